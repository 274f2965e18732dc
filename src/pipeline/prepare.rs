//! What devices need before they copy: queues, pinned slots, and kernels.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Instant;

use super::run::{distinct, spawn};
use super::{Device, Job, Peers, Ring, traced};
use crate::copy::{Copies, CopyError, Landing};
use crate::device::{Feed, Pinned, Pinner, stay};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::observe::{Event, Kind};
use crate::plan::Plan;
use crate::read::Engine;

/// What devices will be fed with, cuts aside: slots of this size, of which so many bytes are theirs, and what ranks exchange.
pub(crate) fn feed(plan: &Plan, slot_bytes: usize, slots: u64, peers: Option<&Peers>) -> Feed {
    #[cfg(feature = "cuda")]
    let wire = peers
        .and_then(|peers| Some((peers.meeting.as_ref()?, peers.group.rank())))
        .map(|(meeting, rank)| super::exchange::size(plan.partners(rank).len(), meeting.chunk, slot_bytes));
    #[cfg(not(feature = "cuda"))]
    let (wire, _) = (None, (plan, peers));
    Feed { slot_bytes, cuts: false, slots, wire }
}

/// What a load needs besides its destinations and may be refused: asked for before anything is given up for it.
pub(crate) struct Prepared {
    /// Of the engine, asked once: the reads are cut for this answer.
    pub(super) alignment: u64,
    /// With a place for each of the [`distinct`] devices.
    pub(super) copies: Copies,
    pub(super) began: Instant,
    pub(super) ended: Instant,
}

impl Prepared {
    /// What a load of this plan needs. Only queues that have slots of the host behind them cut what is read.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if the engine asks for an alignment that slots do not have; a device refused a queue.
    pub(crate) fn new(
        plan: &Plan,
        devices: &[Arc<dyn Device>],
        engine: &dyn Engine,
        ring: &Ring,
        slots_on_device: bool,
    ) -> Result<Prepared> {
        let began = Instant::now();
        let alignment = engine.alignment();
        if !alignment.is_power_of_two() || alignment > limits::DIRECT_ALIGNMENT {
            let message = format!("engine {} has an alignment that no slot has", engine.name());
            return Err(Error::new(ErrorKind::Usage, message)
                .with_expected(format!("a power of two up to {}", limits::DIRECT_ALIGNMENT), alignment));
        }
        let mut queues = Vec::new();
        for (device, rank) in distinct(plan.world(), devices) {
            let driven = plan.world().driven().iter().zip(devices);
            let ranks = driven.filter(|(_, other)| Arc::ptr_eq(other, &device)).map(|(&rank, _)| rank);
            let cuts = !slots_on_device && plan.first_cut(ranks).is_some();
            let feed = Feed { slot_bytes: ring.slot_bytes(), cuts, slots: 0, wire: None };
            queues.push(device.queue(feed).map_err(|error| error.with_rank(rank))?);
        }
        let copies = Copies::new(queues, ring.budget() / ring.slot_bytes());
        Ok(Prepared { alignment, copies, began, ended: Instant::now() })
    }
}

/// What pins memory for all of these devices; pinned is pinned for each of them, but they may be near different nodes.
pub(super) fn pinner(devices: &[(Arc<dyn Device>, Rank)]) -> Option<Arc<dyn Pinner>> {
    let mut all: Vec<Arc<dyn Pinner>> = devices.iter().filter_map(|(device, _)| device.pinner()).collect();
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

/// Starts a thread that pins slots, if a device needs it and bytes pass through slots, and waits for the first of them: on
/// this thread a driver that does not come back would not be noticed.
pub(super) fn pin_slots(job: &Arc<Job>, alive: Sender<()>) -> Result<Option<JoinHandle<()>>> {
    let Some(pinner) = job.pinner.clone().filter(|_| job.windows.is_none()) else { return Ok(None) };
    let ring = &job.setup.ring;
    // No more than there is to read.
    let wanted = job.setup.plan.storage_bytes().div_ceil(ring.slot_bytes() as u64).max(1);
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(ring.budget() / ring.slot_bytes());
    if ring.pinned_bytes() >= (wanted * ring.slot_bytes()) as u64 {
        return Ok(None);
    }
    let (pinned, first) = mpsc::channel();
    let shared = Arc::clone(job);
    let pin = move || {
        let grown = catch_unwind(AssertUnwindSafe(|| -> Result<()> {
            let _stay = stay();
            while grow(&shared, &*pinner, wanted.min(limits::FIRST_SLOTS), || shared.is_stopped())? {}
            let _ = pinned.send(());
            while grow(&shared, &*pinner, wanted, || shared.wants_no_slots())? {}
            Ok(())
        }));
        match grown.unwrap_or_else(|payload| Err(Error::panicked(payload))) {
            // What can be registered on a device is limited; with fewer slots it takes longer.
            Err(error) if shared.setup.maker.is_some() && shared.setup.ring.pinned_bytes() > 0 => {
                shared.counters.warn(format!("fewer slots on the device than wanted: {error}"));
            }
            Err(error) => shared.fail(shared.locate_next(error)),
            Ok(()) => {}
        }
        // Only now, so that nobody reads for a load that has failed.
        drop(pinned);
        drop(alive);
    };
    let thread = spawn("shardlift-pin", pin)?;
    if first.recv_timeout(job.setup.stall_error) == Err(RecvTimeoutError::Timeout) {
        let message = format!("no staging slot could be pinned for {:?}", job.setup.stall_error);
        return Err(job.locate_next(Error::new(ErrorKind::Stalled, message)));
    }
    Ok(Some(thread))
}

/// [`Ring::grow`](crate::stage::Ring::grow).
fn grow(job: &Job, pinner: &dyn Pinner, slots: usize, stopped: impl FnOnce() -> bool) -> Result<bool> {
    let began = Instant::now();
    let more = job.setup.ring.grow(pinner, slots, stopped);
    if let Some(trace) = job.trace() {
        trace.since(Event { bytes: job.setup.ring.slot_bytes() as u64, ..Event::of(Kind::Pin) }, began);
    }
    more
}

/// Starts a thread for each device that makes its kernels ready, if the plan is sure to need them there.
pub(super) fn prepare_cuts(job: &Arc<Job>, alive: &Sender<()>) -> Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for (index, (device, _)) in job.devices.iter().enumerate().filter(|(_, (device, _))| !device.copies_any()) {
        let plan = &job.setup.plan;
        let ranks = plan.world().driven().iter().filter(|rank| job.device_of[rank.index()] == index);
        let Some((rank, dest)) = plan.first_cut(ranks.copied()) else { continue };
        let first = Landing { rank, dest, bytes: 0 };
        let (job, device, alive) = (Arc::clone(job), Arc::clone(device), alive.clone());
        let prepare = move || {
            let began = Instant::now();
            let ready = catch_unwind(AssertUnwindSafe(|| device.prepare_cuts()));
            if let Some(trace) = job.trace() {
                trace.since(traced::of_device(Kind::Kernels, index, 0), began);
            }
            if let Err(error) = ready.unwrap_or_else(|payload| Err(Error::panicked(payload))) {
                job.fail(job.locate_copy(CopyError { error, landing: Some(first) }, rank));
            }
            drop(alive);
        };
        threads.push(spawn(&format!("shardlift-kernel-{index}"), prepare)?);
    }
    Ok(threads)
}
