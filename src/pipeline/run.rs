//! The threads of a load, and the supervisor that starts them, watches them, and ends the load.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::prepare::{Prepared, pin_slots, prepare_cuts};
use super::{Device, Job, Peers, Setup, telemetry, traced};
use crate::copy::Landed;
use crate::device::stay;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::observe::{Behind, Direct, Event, Kind, Report, StageTime, resident_bytes};
use crate::plan::World;
use crate::sync::lock;

/// A load whose threads run.
#[derive(Debug)]
pub(crate) struct Running {
    job: Arc<Job>,
    supervisor: Option<JoinHandle<Report>>,
}

impl Running {
    /// Starts the threads of a load.
    ///
    /// # Errors
    /// The system refused a thread.
    pub(crate) fn start(setup: Setup, prepared: Prepared) -> Result<Running> {
        if let Some(trace) = &setup.trace {
            trace.span(Event::of(Kind::Queues), prepared.began, prepared.ended);
        }
        let job = Arc::new(Job::new(setup, prepared));
        telemetry::begins(&job);
        let shared = Arc::clone(&job);
        let supervisor = spawn("shardlift-load", move || {
            let report = catch_unwind(AssertUnwindSafe(|| supervise(&shared))).unwrap_or_else(|payload| {
                shared.fail(Error::panicked(payload));
                shared.abandon(0); // its threads may still run
                Report::default()
            });
            if shared.has_abandoned() {
                retire_slots(&shared);
            }
            // Whatever happened: nobody waits for another tensor any more.
            shared.end();
            report
        })?;
        Ok(Running { job, supervisor: Some(supervisor) })
    }

    /// The shared state.
    pub(crate) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// Waits for the end of the load.
    pub(crate) fn finish(&mut self) -> Result<Report> {
        let supervisor = self.supervisor.take().expect("bug in shardlift: a load finishes once");
        let report = supervisor.join().map_err(Error::panicked)?;
        match self.job.take_failure() {
            Some(error) => Err(error),
            None => Ok(report),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(supervisor) = self.supervisor.take() {
            self.job.cancel();
            let _ = supervisor.join();
        }
    }
}

/// The devices of the ranks that a process drives, each once, with the first rank on it.
pub(super) fn distinct(world: &World, of_ranks: &[Arc<dyn Device>]) -> Vec<(Arc<dyn Device>, Rank)> {
    let mut devices: Vec<(Arc<dyn Device>, Rank)> = Vec::new();
    for (&rank, device) in world.driven().iter().zip(of_ranks) {
        if !devices.iter().any(|(known, _)| Arc::ptr_eq(known, device)) {
            devices.push((Arc::clone(device), rank));
        }
    }
    devices
}

/// The threads of a load.
#[derive(Default)]
struct Workers {
    readers: Vec<JoinHandle<()>>,
    /// Those that call drivers of devices.
    of_devices: Vec<JoinHandle<()>>,
}

/// Ends of channels on which nothing is sent: when the last thread that holds one is gone, the other end says so.
#[derive(Clone)]
struct Alive {
    readers: Sender<()>,
    of_devices: Sender<()>,
}

fn supervise(job: &Arc<Job>) -> Report {
    let _span = job.setup.span.enter();
    let mut memory = MemoryWatch::new(job.setup.destinations.in_memory());
    let cpu_before = cpu_seconds();
    let mut workers = Workers::default();
    let (readers_alive, readers) = mpsc::channel();
    let (devices_alive, of_devices) = mpsc::channel();
    let alive = Alive { readers: readers_alive, of_devices: devices_alive };
    if let Err(error) = start_workers(job, &alive, &mut workers) {
        job.fail(error);
    }
    drop(alive);
    let mut abandoned = false;
    while !abandoned && readers.recv_timeout(limits::SUPERVISE_EVERY) == Err(RecvTimeoutError::Timeout) {
        memory.sample(job.counters.bytes_landed.load(Ordering::Relaxed));
        job.watch_peers();
        abandoned = watch_reads(job);
    }
    let read = Instant::now();
    job.readers_ended.store(true, Ordering::Release);
    job.hold.wants_no_more();
    job.setup.ring.wake(); // for whoever pins slots
    job.copies.wake();
    let lost = !devices_end(job, &of_devices);
    let readers = workers.readers.into_iter().filter(|_| !abandoned);
    for thread in readers.chain(workers.of_devices.into_iter().filter(|_| !lost)) {
        let _ = thread.join();
    }
    // Nobody reads them any more, and a job that is kept must not keep their slots.
    lock(&job.again).clear();
    memory.sample(job.counters.bytes_landed.load(Ordering::Relaxed));
    if !job.is_stopped() {
        match job.check_complete().and_then(|()| verify_files(job)).and_then(|()| await_peers(job)) {
            // All others have loaded: it is too late to cancel.
            Ok(()) => job.end(),
            Err(error) => job.fail(error),
        }
    }
    let report = report(job, &memory, cpu_before, read);
    telemetry::ended(job, &report);
    report
}

/// Waits until every rank has loaded: no rank has unless all have.
fn await_peers(job: &Job) -> Result<()> {
    job.setup.peers.as_ref().map_or(Ok(()), Peers::finish)
}

/// Waits until the threads that call drivers have ended; false if one of them does not come back from its driver: copies
/// fail when they make no progress for the stall bound, and are given as long again to end. NCCL is aborted once the load has
/// stopped, and given up soon.
fn devices_end(job: &Arc<Job>, alive: &Receiver<()>) -> bool {
    let mut stopped: Option<Instant> = None;
    let mut progress = (job.counters.bytes_landed.load(Ordering::Relaxed), Instant::now());
    while alive.recv_timeout(limits::SUPERVISE_EVERY) == Err(RecvTimeoutError::Timeout) {
        job.watch_peers();
        let landed = job.counters.bytes_landed.load(Ordering::Relaxed);
        if landed != progress.0 {
            progress = (landed, Instant::now());
        }
        // Nobody waits for others any more.
        let bound = job.setup.stall_error * 3;
        let bound = if job.is_stopped() { bound } else { job.patience(bound) };
        if job.is_stopped() && stopped.is_none() {
            // What ends now has its time from now on.
            stopped = Some(Instant::now());
            progress.1 = Instant::now();
        }
        if stopped.is_some_and(|since| job.is_stuck(since)) || progress.1.elapsed() > bound {
            job.abandon(job.hold.lent());
            keep_for_ever(job);
            job.fail(Error::new(ErrorKind::Stalled, format!("a driver did not answer for {bound:?}")));
            return false;
        }
    }
    true
}

/// [`Files::verify`](super::files::Files::verify) on a thread of its own: a file system that is gone may not answer at all.
fn verify_files(job: &Arc<Job>) -> Result<()> {
    // Nothing is sent: the channel closes when the thread is done.
    let (alive, ended) = mpsc::channel::<()>();
    // Nothing more of the job: a thread that never comes back would keep the memory of all tensors.
    let (files, trace) = (Arc::clone(&job.files), job.setup.trace.clone());
    let thread = spawn("shardlift-verify", move || {
        let began = Instant::now();
        let outcome = files.verify();
        if let Some(trace) = trace {
            trace.since(Event::of(Kind::Verify), began);
        }
        drop(alive);
        outcome
    })?;
    if ended.recv_timeout(job.setup.stall_error) == Err(RecvTimeoutError::Timeout) {
        return Err(Error::new(ErrorKind::Stalled, "the files' identities could not be had again in time"));
    }
    thread.join().unwrap_or_else(|payload| Err(Error::panicked(payload)))
}

fn start_workers(job: &Arc<Job>, alive: &Alive, workers: &mut Workers) -> Result<()> {
    if job.copies.has_queues() {
        let (job, alive) = (Arc::clone(job), alive.of_devices.clone());
        let thread = spawn("shardlift-copy", move || {
            let run = AssertUnwindSafe(|| {
                let _stay = stay();
                job.copies.run(&*job, job.setup.stall_error);
            });
            if let Err(payload) = catch_unwind(run) {
                job.fail(Error::panicked(payload));
                // Nobody knows what is under way.
                job.abandoned(0);
            }
            if job.copies_abandoned.load(Ordering::Acquire) {
                keep_for_ever(&job);
            }
            drop(alive);
        })?;
        workers.of_devices.push(thread);
    }
    workers.of_devices.extend(prepare_cuts(job, &alive.of_devices)?);
    workers.of_devices.extend(pin_slots(job, alive.of_devices.clone())?);
    #[cfg(feature = "cuda")]
    workers.of_devices.extend(super::exchange::start(job, alive.of_devices.clone())?);
    if job.has_fills() {
        let (job, alive) = (Arc::clone(job), alive.readers.clone());
        let thread = spawn("shardlift-fill", move || {
            let fill = AssertUnwindSafe(|| {
                let _stay = stay();
                job.fill();
            });
            if let Err(payload) = catch_unwind(fill) {
                fail_with_reads_of_this_thread(&job, Error::panicked(payload));
            }
            drop(alive);
        })?;
        workers.readers.push(thread);
    }
    // A thread without anything to read is not started.
    for index in 0..job.reads.count(job.setup.engine.threads()).max(1) {
        let (job, alive) = (Arc::clone(job), alive.readers.clone());
        let thread = spawn(&format!("shardlift-read-{index}"), move || {
            let began = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let (_stay, _span) = (stay(), job.setup.span.enter());
                // An engine that reads into memory of the one device asks for its context.
                let device = job.setup.maker.as_ref().map(|_| job.devices[0].0.current());
                let _current = device.transpose()?;
                job.setup.engine.run(&*job)
            }));
            job.counters.reader_ended(began.elapsed());
            if let Err(error) = outcome.unwrap_or_else(|payload| Err(Error::panicked(payload))) {
                fail_with_reads_of_this_thread(&job, error);
            }
            drop(alive);
        })?;
        workers.readers.push(thread);
    }
    Ok(())
}

/// Leaves the slots of a load that has abandoned something to those who use them now: a later one would wait for those that do
/// not come back. The free ones are given back on a thread that nobody waits for, since it may be the driver that stands still
/// which unpins them.
fn retire_slots(job: &Job) {
    job.hold.retire();
    let ring = job.setup.ring.clone();
    if let Err(error) = spawn("shardlift-release", move || ring.release()) {
        job.warn(format!("staging memory that is free is kept: {error}"));
    }
}

/// A stalled device may write to the load's destinations at any later time.
#[expect(clippy::mem_forget, reason = "freeing memory that a device may still write to is worse than leaking it")]
pub(super) fn keep_for_ever(job: &Arc<Job>) {
    std::mem::forget(Arc::clone(job));
}

/// Fails the load because of what happened on this thread, naming the read that it had, if any.
fn fail_with_reads_of_this_thread(job: &Job, error: Error) {
    let mut in_flight = lock(&job.in_flight);
    let this = thread::current().id();
    let extent =
        in_flight.values().filter(|read| read.thread == this).min_by_key(|read| read.since).and_then(|r| r.extent);
    in_flight.retain(|_, read| read.thread != this);
    drop(in_flight);
    job.fail(job.locate_any(error, extent));
}

/// Warns of reads that make no progress, and fails the load past the bound; then what they may still write to is
/// counted as abandoned, and true is returned. The same for drivers that do not take what a read brought.
fn watch_reads(job: &Job) -> bool {
    let (warning, bound) = (job.setup.stall_warning, job.setup.stall_error);
    let mut slow = Vec::new();
    let mut stalled = None;
    let mut slots = 0;
    for read in lock(&job.in_flight).values_mut() {
        let waited = read.since.elapsed();
        if waited >= bound {
            slots += usize::from(read.in_slot);
            if let Some(trace) = job.trace().filter(|_| read.copying.is_none()) {
                trace.since(Event { kind: Kind::Stalled, ..traced::read(read, 0) }, read.began);
            }
            stalled = Some((read.copying, read.extent));
        } else if waited >= warning && !read.warned {
            read.warned = true;
            slow.push((read.copying, read.extent));
        }
    }
    let name = |device: usize| job.devices[device].0.name();
    for (copying, extent) in slow {
        let file =
            extent.map_or(String::new(), |extent| format!(" of {}", job.setup.plan.file(extent.file).path.display()));
        let message = match copying {
            None => format!("a read{file} has made no progress for {warning:?}"),
            Some(device) => format!("{} has not taken what was read{file} for {warning:?}", name(device)),
        };
        job.warn(message);
    }
    let Some((copying, extent)) = stalled else { return false };
    job.abandon(slots);
    let message = match copying {
        None => format!("a read made no progress for {bound:?}"),
        Some(device) => format!("{} did not take copies for {bound:?}", name(device)),
    };
    job.fail(job.locate_any(Error::new(ErrorKind::Stalled, message), extent));
    true
}

/// What a load did whose last thread had read at `read`.
fn report(job: &Job, memory: &MemoryWatch, cpu_before: f64, read: Instant) -> Report {
    let counters = &job.counters;
    let ended = job.completed_at().unwrap_or_else(Instant::now);
    let behind = match job.copies.has_queues() {
        false => Behind::Nothing,
        true if job.setup.destinations.are_files() => Behind::Files,
        true => Behind::Link,
    };
    let (stages, spent) = counters.times(behind, read, ended);
    let repeated = counters.repeated_bytes.load(Ordering::Relaxed) > 0;
    let mut report = Report {
        seconds: (ended - job.setup.started).as_secs_f64(),
        cpu_seconds: cpu_seconds() - cpu_before,
        needed_bytes: 0,
        landed_bytes: counters.bytes_landed.load(Ordering::Relaxed) + job.totals.lent_bytes,
        storage_bytes_read: counters.storage_bytes.load(Ordering::Relaxed),
        reads: counters.reads.load(Ordering::Relaxed),
        sent_bytes: counters.sent_bytes.load(Ordering::Relaxed),
        received_bytes: counters.received_bytes.load(Ordering::Relaxed),
        engine: job.setup.engine.name().into(),
        engine_reason: job.setup.engine_reason.clone(),
        direct: if repeated { Some(Direct::No) } else { job.setup.direct },
        peak_extra_bytes: memory.peak_extra.max(job.slots_here()),
        peak_pinned_bytes: job.pinned_bytes(),
        abandoned_bytes: counters.abandoned_bytes.load(Ordering::Relaxed),
        stages,
        spent,
        bottleneck: String::new(),
        warnings: job.counters.warnings(),
    };
    report.consumed(StageTime::default());
    report
}

/// Processor time of this process.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Samples the memory of the process during a load.
struct MemoryWatch {
    before: Option<u64>,
    /// Whether destinations are memory of the process: then what has landed is not extra.
    in_memory: bool,
    peak_extra: u64,
}

impl MemoryWatch {
    fn new(in_memory: bool) -> MemoryWatch {
        MemoryWatch { before: resident_bytes(), in_memory, peak_extra: 0 }
    }

    fn sample(&mut self, landed: u64) {
        if let (Some(before), Some(now)) = (self.before, resident_bytes()) {
            let destinations = if self.in_memory { landed } else { 0 };
            self.peak_extra = self.peak_extra.max(now.saturating_sub(before + destinations));
        }
    }
}

pub(super) fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a thread: {error}")).with_source(error))
}

/// The longest that a cancel may take on a healthy disk is one read; the supervisor adds at most this.
const _: () = assert!(limits::SUPERVISE_EVERY.as_millis() < Duration::from_millis(100).as_millis());
