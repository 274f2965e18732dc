//! What a load tells its [`Trace`](crate::observe::Trace). Called only if there is one.

use std::io;
use std::sync::Arc;

use super::job::InFlight;
use super::run::distinct;
use super::{Device, Job};
use crate::copy::{Filled, Landing, Traced};
use crate::extent::{FileId, Rank};
use crate::observe::{Event, Kind, Names, Recording};
use crate::plan::Plan;
use crate::read::Request;

/// Names of a plan's files and tensors, and of a load's devices.
#[derive(Debug)]
pub(crate) struct PlanNames {
    plan: Plan,
    devices: Vec<String>,
}

impl PlanNames {
    /// Those of a load of this plan into these devices, one for each rank that this process drives.
    pub(crate) fn new(plan: &Plan, devices: &[Arc<dyn Device>]) -> PlanNames {
        let distinct = distinct(plan.world(), devices);
        let names: Vec<String> = distinct.iter().map(|(device, _)| device.name()).collect();
        let alone = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
        let devices = names.iter().zip(&distinct).map(|(name, (_, rank))| match alone(name) {
            true => name.clone(),
            false => format!("{name} of rank {rank}"),
        });
        PlanNames { plan: plan.clone(), devices: devices.collect() }
    }
}

impl Names for PlanNames {
    fn file(&self, file: FileId) -> String {
        self.plan.file(file).name.clone()
    }

    fn device(&self, device: usize) -> String {
        self.devices.get(device).cloned().unwrap_or_default()
    }

    fn tensor(&self, rank: Rank, dest: u32) -> String {
        let param = self.plan.rank(rank).dests[dest as usize].param;
        self.plan.params()[param as usize].name.clone()
    }
}

/// What a read that is over was, of which so many bytes lie in their destination now.
pub(super) fn read(read: &InFlight, landed: u64) -> Event {
    let (number, offset) = read.extent.map_or((0, 0), |extent| (extent.file.0, extent.start));
    Event { kind: Kind::Read, number, bytes: read.bytes, offset, landed }
}

/// The bytes that a read's end brought where they belong, without a copy.
pub(super) fn landed_by(request: &Request, outcome: &io::Result<usize>) -> u64 {
    let complete = |bytes: usize| {
        bytes > 0 && bytes <= request.bytes && request.offset + bytes as u64 >= request.pending.op.extent.end
    };
    match (&request.slot, outcome) {
        (None, Ok(bytes)) if complete(*bytes) => request.pending.pieces.first().map_or(0, |piece| piece.landed_bytes()),
        _ => 0,
    }
}

/// Bytes of a copy or a fill that this thread made.
pub(super) fn copied(kind: Kind, bytes: u64) -> Event {
    Event { bytes, ..Event::of(kind) }
}

/// Something about a file.
pub(super) fn of_file(kind: Kind, file: FileId) -> Event {
    Event { number: file.0, ..Event::of(kind) }
}

/// Something about a device.
pub(super) fn of_device(kind: Kind, device: usize, bytes: u64) -> Event {
    Event { number: device as u32, bytes, ..Event::of(kind) }
}

pub(super) fn bytes_of(landing: &[Landing]) -> u64 {
    landing.iter().map(|landing| landing.bytes).sum()
}

impl Job {
    pub(super) fn trace(&self) -> Option<&Arc<Recording>> {
        self.setup.trace.as_ref()
    }

    /// Records that copies which were submitted are done.
    pub(super) fn transferred(&self, device: usize, filled: &Filled) {
        if let (Some(trace), Some(Traced { since, kernels })) = (self.trace(), filled.traced) {
            let event = of_device(Kind::Transfer, device, bytes_of(&filled.landing));
            trace.since(Event { offset: kernels.into(), ..event }, since);
        }
    }
}
