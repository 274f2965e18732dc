//! How to load: [`Loader`]; and a load in progress: [`Load`].

mod agree;
mod check;
mod engine;
mod lend;
mod reload;
mod reshard;
#[cfg(test)]
mod tests;
mod together;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tracing::Span;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::launch::Group;
use crate::limits;
use crate::observe::{Counters, Event, Kind, Progress, Report, StageTime, Totals, Trace};
use crate::pipeline::{Device, Gpus, Job, PlanNames, Ring, Running, Setup, devices, feed, telemetry};
use crate::place::{Destinations, Tensor, Weights};
use crate::plan::{Plan, Request, Rules, World};
use crate::read::{Engine, EngineChoice};
use crate::sync::lock;

use engine::{Chosen, DeviceRings, in_use};

pub use engine::CufileMeasurement;
pub use lend::CallerMemory;
pub use reshard::Reshard;
pub use together::Sharing;

/// How to load. Owns the staging ring, which its loads share and reuse.
#[derive(Debug)]
pub struct Loader {
    engine: EngineSource,
    memory: Memory,
    residency: Residency,
    staging: usize,
    throttle: Option<u64>,
    drop_page_cache: bool,
    stall_warning: Duration,
    stall_error: Duration,
    digests: bool,
    trace: Option<Trace>,
    /// Those who load the other ranks.
    group: Option<Arc<Group>>,
    /// Slots for loads into host memory, which stay in a processor's cache.
    ring: Mutex<Ring>,
    /// Larger ones, pinned, for loads into GPUs, whose copies cost by the piece.
    device_ring: Mutex<Ring>,
    /// The same in memory of each GPU that an engine read into.
    slots_on_gpus: DeviceRings,
    /// What is known of cuFile, for `auto`.
    measured: Vec<CufileMeasurement>,
    /// GPUs that were used, whose contexts are kept: making one takes longer than many a load.
    gpus: Mutex<Gpus>,
}

#[derive(Debug)]
enum EngineSource {
    Choice(EngineChoice),
    Custom(Arc<dyn Engine>),
}

/// How destination memory is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Memory {
    /// Few large blocks, each tensor on a multiple of 256 bytes.
    #[default]
    Blocks,
    /// One allocation for each tensor, which [`Tensor::into_vec`] can take over.
    PerTensor,
}

/// Whether tensors own their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Residency {
    /// Every tensor is a copy in memory of its own.
    #[default]
    Owned,
    /// Whole, untransformed tensors are lent from a read-only mapping of their file, without a copy; the others are
    /// owned. A lent tensor starts where the file has it, and shows what the file holds: keep the file unchanged. If
    /// it is cut short all the same, the missing pages read as zeros.
    Mapped,
}

impl Default for Loader {
    fn default() -> Loader {
        Loader::new()
    }
}

impl Loader {
    /// A loader with the defaults of [`limits`].
    pub fn new() -> Loader {
        Loader {
            engine: EngineSource::Choice(EngineChoice::Auto),
            memory: Memory::default(),
            residency: Residency::default(),
            staging: limits::STAGING,
            throttle: None,
            drop_page_cache: false,
            stall_warning: limits::STALL_WARNING,
            stall_error: limits::STALL_ERROR,
            digests: false,
            trace: None,
            group: None,
            ring: Mutex::new(Ring::new(limits::STAGING, limits::SLOT)),
            device_ring: Mutex::new(Ring::new(limits::STAGING, limits::DEVICE_SLOT)),
            slots_on_gpus: DeviceRings::default(),
            measured: Vec::new(),
            gpus: Mutex::default(),
        }
    }

    /// Chooses the engine that reads.
    pub fn engine(mut self, engine: EngineChoice) -> Loader {
        self.engine = EngineSource::Choice(engine);
        self.forget_slots_on_gpus();
        self
    }

    /// Reads with an engine of the caller's own.
    pub fn custom_engine(mut self, engine: Arc<dyn Engine>) -> Loader {
        self.engine = EngineSource::Custom(engine);
        self.forget_slots_on_gpus();
        self
    }

    /// Bounds the staging memory in bytes; at least [`limits::STAGING_MIN`]. What a load that stalled had of it counts no more.
    pub fn staging(mut self, bytes: usize) -> Loader {
        self.staging = bytes.max(limits::STAGING_MIN);
        let ring = |slot: usize| {
            // Whole blocks, so that O_DIRECT reads fill a slot and no more.
            let slot = slot as u64 / limits::DIRECT_ALIGNMENT * limits::DIRECT_ALIGNMENT;
            Mutex::new(Ring::new(self.staging, slot as usize))
        };
        let slot = limits::SLOT.min(self.staging / 2);
        (self.ring, self.device_ring) =
            (ring(slot), ring((self.staging / limits::DEVICE_SLOTS).clamp(slot, limits::DEVICE_SLOT)));
        self.forget_slots_on_gpus();
        self
    }

    /// Chooses how destination memory is allocated.
    pub fn memory(mut self, memory: Memory) -> Loader {
        self.memory = memory;
        self
    }

    /// Chooses whether tensors own their bytes.
    pub fn residency(mut self, residency: Residency) -> Loader {
        self.residency = residency;
        self
    }

    /// Limits reading to this many bytes per second.
    pub fn throttle(mut self, bytes_per_second: Option<u64>) -> Loader {
        self.throttle = bytes_per_second;
        self
    }

    /// Whether the page cache should forget the files that a load read: each when it is closed, which is at the end
    /// but for the first of very many.
    pub fn drop_page_cache(mut self, drop: bool) -> Loader {
        self.drop_page_cache = drop;
        self
    }

    /// How long a read may make no progress before a warning, and before the load fails; and how long a tensor waits for
    /// its GPU ([`Tensor::to_bytes`], [`Tensor::digest`]); a day at most.
    pub fn stall(mut self, warning: Duration, error: Duration) -> Loader {
        (self.stall_warning, self.stall_error) = (warning, error.min(limits::TIMEOUT_MAX));
        self
    }

    /// Whether its loads digest every byte while it is in a processor's cache, once as it was read and once as it landed:
    /// then [`Weights::check_moved`] has little left to do.
    pub fn digests(mut self, take: bool) -> Loader {
        self.digests = take;
        self
    }

    /// Records what its loads do when, in this trace; without one nothing is recorded, and nothing spent on it.
    pub fn trace(mut self, trace: Option<&Trace>) -> Loader {
        self.trace = trace.cloned();
        self
    }

    /// Loads together with the processes of the other ranks: before anything moves all make sure that they load the same, a
    /// failure of one is the error of all, and no load is over before all are. Each of them loads as often, one load after
    /// the other, in the same order. [`Group::fail`] with a [cancel](ErrorKind::Cancelled) ends all of that at any moment, also
    /// a wait for ranks that have not come, when there is no [`Monitor`] yet.
    pub fn group(mut self, group: Option<&Arc<Group>>) -> Loader {
        self.group = group.cloned();
        self
    }

    /// Plans a load; the same as [`Plan::new`].
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn plan(&self, checkpoint: &Checkpoint, rules: &Rules, world: &World) -> Result<Plan> {
        Plan::new(checkpoint, rules, world)
    }

    /// Starts a load.
    ///
    /// # Errors
    /// No memory for the destinations, no threads, a custom engine with an alignment that slots do not have; with
    /// [`Residency::Mapped`] also the errors of opening the files. Everything later is an error of the [`Load`].
    pub fn start(&self, plan: &Plan) -> Result<Load> {
        // SAFETY: no memory of the caller.
        unsafe { self.start_into(plan, &[]) }
    }

    /// Starts a load in which these destinations are the caller's memory; the others are allocated as usual.
    ///
    /// # Errors
    /// As [`start`](Loader::start); before anything moves [`ErrorKind::NotFound`] and [`ErrorKind::Usage`] for memory of
    /// no destination, of another size than its destination, that does not start on an element, and that overlaps.
    ///
    /// # Safety
    /// For each entry, until the load, its weights and all their tensors are dropped; and for ever if its monitor's
    /// [`Progress::abandoned_bytes`] is not 0 after that, because what stalled may still write:
    /// - `address..address + bytes` is valid for reads and writes;
    /// - it is memory of the rank's device: for a GPU an address there;
    /// - nobody else reads or writes it before its tensor is complete, nor writes it after.
    pub unsafe fn start_into(&self, plan: &Plan, memory: &[CallerMemory]) -> Result<Load> {
        // SAFETY: the same duties.
        unsafe { self.begin(plan, memory, None) }
    }

    /// Tells the other ranks, if there are any, of an error before they can see that a load has failed.
    fn tell(&self, error: &Error) {
        if let Some(group) = &self.group {
            group.fail(error);
        }
    }

    /// A load into memory of the caller's, into that of the weights that it replaces, or into new memory.
    ///
    /// # Safety
    /// That of [`start_into`](Loader::start_into).
    unsafe fn begin(&self, plan: &Plan, memory: &[CallerMemory], again: Option<&mut Weights>) -> Result<Load> {
        let span = telemetry::span(plan);
        // SAFETY: the same duties.
        span.in_scope(|| unsafe { self.begin_in(&span, plan, memory, again) }).inspect_err(|error| {
            telemetry::failed(&span, error);
            self.tell(error);
        })
    }

    /// # Safety
    /// That of [`start_into`](Loader::start_into).
    unsafe fn begin_in(
        &self,
        span: &Span,
        plan: &Plan,
        memory: &[CallerMemory],
        again: Option<&mut Weights>,
    ) -> Result<Load> {
        let started = Instant::now();
        if let Some(weights) = &again {
            weights.check_reusable(plan)?;
        }
        // What is loaded again lies in memory of its own, and stays there.
        let lends = self.residency == Residency::Mapped && again.is_none();
        if lends {
            lend::check_mappable(plan)?;
        }
        let callers = lend::destinations_of(plan, memory)?;
        let lent = callers.iter().map(|&(_, rank, dest)| (rank, dest)).collect();
        let devices = devices(plan.world(), &self.gpus, self.stall_error)?;
        let opened = Instant::now();
        let slot_bytes = self.ring_for(&devices).slot_bytes();
        let peers = agree::agree(self.group.as_ref(), plan, slot_bytes)?;
        let mut chosen = self.choose_engine(plan, &devices)?;
        let allocate = |chosen: &Chosen| {
            let feed = feed(plan, slot_bytes, chosen.slots_to_make(plan), peers.as_ref());
            match self.memory {
                Memory::Blocks => Destinations::in_blocks(plan, &devices, feed, &lent),
                Memory::PerTensor => Destinations::per_tensor(plan, &devices, feed, &lent),
            }
        };
        let (mut destinations, prepared) = match again {
            Some(weights) => {
                // Before they are given up: what is refused leaves them as they were.
                let prepared = chosen.prepare(plan, &devices)?;
                (Destinations::again(weights), prepared)
            }
            None => {
                let destinations = match (allocate(&chosen), chosen.otherwise.take()) {
                    // There may be room without slots.
                    (Err(error), Some(otherwise)) => {
                        chosen.ring.release();
                        chosen = self.instead_of_cufile(otherwise, &devices, &error)?;
                        allocate(&chosen)?
                    }
                    (allocated, otherwise) => {
                        chosen.otherwise = otherwise;
                        allocated?
                    }
                };
                (destinations, chosen.prepare(plan, &devices)?)
            }
        };
        let mapped = if lends { lend::lend_mapped(plan, &mut destinations, &devices)? } else { Vec::new() };
        // SAFETY: the same duties.
        unsafe { lend::place_into(&mut destinations, &devices, memory, &callers) };
        destinations.share_aliases(plan);
        let setup = Setup { mapped, started, peers, ..self.setup(span, plan, destinations, devices, chosen) };
        if let Some(trace) = &setup.trace {
            trace.span(Event::of(Kind::Devices), started, opened);
            trace.since(Event::of(Kind::Allocate), opened);
        }
        Ok(Load {
            plan: plan.clone(),
            running: Running::start(setup, prepared)?,
            consume: StageTime::default(),
            handed: None,
        })
    }

    /// Starts a load of a plan with these [`Request`]s into the memory that they carry; destinations without any are
    /// allocated as usual.
    ///
    /// # Errors
    /// As [`start_into`](Loader::start_into).
    ///
    /// # Safety
    /// That of [`start_into`](Loader::start_into), for all [memory](Request::memory) of the requests.
    pub unsafe fn start_requests(&self, plan: &Plan, requests: &[Request]) -> Result<Load> {
        let memory: Vec<CallerMemory> = requests.iter().flat_map(CallerMemory::of).collect();
        // SAFETY: the same duties.
        unsafe { self.start_into(plan, &memory) }
    }

    /// Loads and waits: [`start`](Loader::start) and [`finish`](Load::finish).
    ///
    /// # Errors
    /// As both.
    pub fn load(&self, plan: &Plan) -> Result<(Weights, Report)> {
        self.start(plan)?.finish()
    }

    /// Gives back what is kept from load to load and none uses now: staging memory, pinned or not, and the contexts of
    /// GPUs.
    pub fn release(&self) {
        self.rings().iter().for_each(Ring::release);
        lock(&self.gpus).clear();
    }

    /// What a load of this loader begins with.
    fn setup(
        &self,
        span: &Span,
        plan: &Plan,
        destinations: Destinations,
        devices: Vec<Arc<dyn Device>>,
        chosen: Chosen,
    ) -> Setup {
        let Chosen { engine, reason: engine_reason, ring, direct, maker, otherwise, warnings } = chosen;
        self.release_other(&ring);
        let trace = self.trace.as_ref().map(|trace| trace.begin(Box::new(PlanNames::new(plan, &devices))));
        Setup {
            plan: plan.clone(),
            destinations,
            devices,
            engine,
            engine_reason,
            direct,
            ring,
            maker,
            falls_back: otherwise.is_some(),
            warnings,
            stall_warning: self.stall_warning,
            stall_error: self.stall_error,
            drop_page_cache: self.drop_page_cache,
            mapped: Vec::new(),
            digests: self.digests,
            started: Instant::now(),
            trace,
            span: span.clone(),
            peers: None,
        }
    }

    /// The slots for loads into these devices.
    fn ring_for(&self, devices: &[Arc<dyn Device>]) -> Ring {
        let of_host = devices.iter().all(|device| device.copies_any());
        in_use(&mut lock(if of_host { &self.ring } else { &self.device_ring }))
    }

    /// Gives back what is free of the slots that a load does not use: all kinds together would be more than the budget.
    fn release_other(&self, used: &Ring) {
        for ring in self.rings() {
            if !ring.is(used) && ring.bytes() > 0 {
                ring.release();
            }
        }
    }

    /// Every kind, to be used without the locks: giving slots back takes its time.
    fn rings(&self) -> Vec<Ring> {
        let mut rings = vec![lock(&self.ring).clone(), lock(&self.device_ring).clone()];
        rings.extend(lock(&self.slots_on_gpus).values().cloned());
        rings
    }

    /// Begins with other slots there: those that are were made for other engines, or of another size.
    fn forget_slots_on_gpus(&self) {
        lock(&self.slots_on_gpus).clear();
    }
}

/// A load in progress: an iterator over tensors in the order in which they become complete. Dropping it cancels the
/// load and waits for its threads.
#[derive(Debug)]
#[must_use = "a load that is dropped is cancelled: `finish` waits for it"]
pub struct Load {
    plan: Plan,
    running: Running,
    /// What the caller did.
    consume: StageTime,
    /// When it got the last tensor, until it comes back.
    handed: Option<Instant>,
}

impl Load {
    /// A handle for progress and cancel, for any thread.
    pub fn monitor(&self) -> Monitor {
        Monitor::new(self.running.job())
    }

    /// Waits for the end of the load.
    ///
    /// # Errors
    /// The load's first error; then there are no weights and all memory is given back (but see
    /// [`Progress::abandoned_bytes`]).
    pub fn finish(mut self) -> Result<(Weights, Report)> {
        self.comes_back(Instant::now());
        let mut report = self.running.finish()?;
        report.consumed(self.consume);
        telemetry::consumed(&self.running.job().setup().span, self.consume);
        report.needed_bytes = self.plan.needed_bytes(self.plan.world().driven());
        let job = self.running.job();
        let weights = Weights::new(&self.plan, &job.setup().destinations, job.moved());
        Ok((weights, report))
    }

    /// Counts how long the caller was away with a tensor.
    fn comes_back(&mut self, now: Instant) {
        if let Some(handed) = self.handed.take() {
            self.consume.busy += (now - handed).as_secs_f64();
        }
    }
}

impl Iterator for Load {
    type Item = Result<Tensor>;

    /// The next tensor to become complete. `None` at the end, and after a failure: then
    /// [`finish`](Load::finish) tells the error.
    fn next(&mut self) -> Option<Result<Tensor>> {
        let asked = Instant::now();
        self.comes_back(asked);
        let next = self.running.job().next_completed();
        let now = Instant::now();
        self.consume.waiting += (now - asked).as_secs_f64();
        if let Some(trace) = &self.running.job().setup().trace {
            trace.unless_short(Event::of(Kind::WaitForTensor), asked, now);
        }
        let (rank, dest) = next?;
        self.handed = Some(now);
        let tensor = Tensor::new(&self.plan, &self.running.job().setup().destinations, rank, dest);
        Some(tensor.ok_or_else(|| Error::new(ErrorKind::Unsupported, "not memory of this process").with_rank(rank)))
    }
}

/// A handle to a load: how far it is, and a way to cancel it. Does not keep the load's memory alive.
#[derive(Debug, Clone)]
pub struct Monitor {
    job: Weak<Job>,
    counters: Arc<Counters>,
    totals: Totals,
}

impl Monitor {
    fn new(job: &Arc<Job>) -> Monitor {
        let (counters, totals) = job.watch();
        Monitor { job: Arc::downgrade(job), counters, totals }
    }

    /// How far the load is, or was at its end.
    pub fn progress(&self) -> Progress {
        self.counters.progress(self.totals)
    }

    /// What was odd so far, a read that makes no progress for instance: what [`Report::warnings`] will hold, and there
    /// also while the load runs and after it failed.
    pub fn warnings(&self) -> Vec<String> {
        self.counters.warnings()
    }

    /// Cancels the load: nothing new starts, what is in flight is drained, and the load's error says so. A reshard can
    /// be cancelled until its directory has its name.
    pub fn cancel(&self) {
        if let Some(job) = self.job.upgrade() {
            job.cancel();
        }
    }
}
