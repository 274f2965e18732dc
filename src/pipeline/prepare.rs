//! What devices need before they copy: pinned slots, and kernels.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use super::run::{panicked, spawn};
use super::{Device, Job};
use crate::copy::{CopyError, Landing};
use crate::device::{Pinned, Pinner};
use crate::error::Result;
use crate::limits;
use crate::plan::{BoxCopy, Loop};

/// What pins memory for all of these devices; pinned is pinned for each of them, but they may be near different nodes.
pub(super) fn pinner(devices: &[Arc<dyn Device>]) -> Option<Arc<dyn Pinner>> {
    let mut all: Vec<Arc<dyn Pinner>> = devices.iter().filter_map(|device| device.pinner()).collect();
    if all.len() > 1 { Some(Arc::new(ForAll(all))) } else { all.pop() }
}

/// Pins for several devices.
#[derive(Debug)]
struct ForAll(Vec<Arc<dyn Pinner>>);

impl Pinner for ForAll {
    unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<Pinned> {
        // SAFETY: the same duties.
        unsafe { self.0[0].pin(address, bytes) }
    }

    unsafe fn pin_read_only(&self, address: *const u8, bytes: usize) -> Result<Option<Pinned>> {
        // SAFETY: the same duties.
        unsafe { self.0[0].pin_read_only(address, bytes) }
    }

    fn pins_read_only(&self) -> bool {
        self.0.iter().all(|pinner| pinner.pins_read_only())
    }

    fn numa_node(&self) -> Option<u32> {
        let node = self.0[0].numa_node();
        node.filter(|_| self.0.iter().all(|pinner| pinner.numa_node() == node))
    }
}

/// Pins the first slots, and starts a thread that pins the rest, if a device needs it and bytes pass through slots.
pub(super) fn pin_slots(job: &Arc<Job>, alive: Sender<()>) -> Result<Option<JoinHandle<()>>> {
    let Some(pinner) = job.pinner.clone().filter(|_| job.windows.is_none()) else { return Ok(None) };
    let ring = &job.setup.ring;
    // No more than there is to read.
    let wanted = job.setup.plan.storage_bytes().div_ceil(ring.slot_bytes() as u64).max(1);
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    let first = wanted.min(limits::FIRST_SLOTS);
    while ring.grow(&*pinner, first, || job.is_stopped())? {}
    let shared = Arc::clone(job);
    let rest = move || {
        let grown = catch_unwind(AssertUnwindSafe(|| -> Result<()> {
            while shared.setup.ring.grow(&*pinner, wanted, || shared.is_stopped())? {}
            Ok(())
        }));
        if let Err(error) = grown.unwrap_or_else(|payload| Err(panicked(payload))) {
            shared.fail(error);
        }
        drop(alive);
    };
    spawn("shardlift-pin", rest).map(Some)
}

/// Starts a thread for each device that makes its kernels ready, if the plan is sure to need them there.
pub(super) fn prepare_cuts(job: &Arc<Job>, alive: &Sender<()>) -> Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for (index, device) in job.devices.iter().enumerate().filter(|(_, device)| !device.copies_any()) {
        let Some(first) = first_cut(job, index) else { continue };
        let (job, device, alive) = (Arc::clone(job), Arc::clone(device), alive.clone());
        let prepare = move || {
            let ready = catch_unwind(AssertUnwindSafe(|| device.prepare_cuts()));
            if let Err(error) = ready.unwrap_or_else(|payload| Err(panicked(payload))) {
                let rank = first.rank;
                job.fail(job.locate_copy(CopyError { error, landing: Some(first) }, rank));
            }
            drop(alive);
        };
        threads.push(spawn(&format!("shardlift-kernel-{index}"), prepare)?);
    }
    Ok(threads)
}

/// A destination on a device that needs a kernel, wherever its copies are cut.
fn first_cut(job: &Job, device: usize) -> Option<Landing> {
    let plan = &job.setup.plan;
    let ranks = plan.world().driven().iter().filter(|rank| job.device_of[rank.index()] == device);
    ranks.flat_map(|&rank| (0..).zip(&plan.rank(rank).dests).map(move |(at, dest)| (rank, at, dest))).find_map(
        |(rank, at, dest)| {
            let pieces = &plan.rank(rank).pieces[dest.pieces.start as usize..dest.pieces.end as usize];
            let needed = pieces.iter().any(|piece| !copy_engine_can(piece));
            needed.then_some(Landing { rank, dest: at, bytes: dest.bytes })
        },
    )
}

/// Whether a copy needs no kernel wherever it is cut.
fn copy_engine_can(piece: &BoxCopy) -> bool {
    let is_row = |inner: &Loop| inner.src_stride >= piece.run && inner.dst_stride >= piece.run;
    piece.cast.is_none() && piece.loops.len() <= 1 && piece.loops.iter().all(is_row)
}
