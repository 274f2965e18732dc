//! The state that all threads of one load share.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::digests::Digests;
#[cfg(feature = "cuda")]
use super::exchange::Exchanging;
use super::files::Files;
use super::prepare::{Prepared, pinner};
use super::run::distinct;
use super::windows::Windows;
use super::{Device, Peers, Setup};
use crate::copy::{Copies, CopyError, Filled, Landed, Landing};
use crate::device::Pinner;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, Rank};
use crate::limits;
use crate::observe::{Counters, Event, Kind, Totals};
use crate::place::Moved;
use crate::plan::{Consumer, Cursor, Cutting, Reads};
use crate::read::{Pending, Request};
use crate::stage::{Hold, Lend};
use crate::sync::lock;

/// One load in progress.
#[derive(Debug)]
pub(crate) struct Job {
    // First: a queue that is dropped ends its copies, and only then may slots and destinations go.
    pub(super) copies: Copies,
    pub(super) setup: Setup,
    pub(super) reads: Reads,
    /// What offsets and lengths of requests are a multiple of.
    pub(super) alignment: u64,
    pub(super) cursor: Mutex<Cursor>,
    /// Remainders of short reads, and interrupted ones.
    pub(super) again: Mutex<VecDeque<Request>>,
    /// What was remembered of reads that are done, for those to come.
    #[expect(clippy::vec_box, reason = "a request has its own in a box, to be small")]
    pub(super) spare: Mutex<Vec<Box<Pending>>>,
    /// After `setup`, whose engine may have them mapped: pages in use would not be forgotten.
    /// Shared with the thread that compares them at the end, which may not come back.
    pub(super) files: Arc<Files>,
    /// If they are taken.
    pub(super) digests: Option<Digests>,
    /// The devices, each once, with the first rank on it.
    pub(super) devices: Vec<(Arc<dyn Device>, Rank)>,
    /// What pins slots for the devices that copy only from pinned ones.
    pub(super) pinner: Option<Arc<dyn Pinner>>,
    /// Windows of mapped files that devices copy from, where they can and the engine lends them.
    pub(super) windows: Option<Arc<Windows>>,
    /// What is exchanged with other ranks, if anything is.
    #[cfg(feature = "cuda")]
    pub(super) exchanging: Option<Exchanging>,
    /// Its share of the slots, of which pinned ones stay while the load runs.
    pub(super) hold: Hold,
    /// For each rank of the world, the position of its device; those of other processes have none that is used.
    pub(super) device_of: Vec<usize>,
    /// Bytes that each destination still waits for.
    remaining: Vec<Vec<AtomicU64>>,
    /// For each rank, its aliases: (position of the original in the plan's parameters, destination of the alias).
    aliases: Vec<Vec<(u32, u32)>>,
    completed: Mutex<VecDeque<(Rank, u32)>>,
    /// Signalled when a destination completes, the load ends, or it fails.
    changed: Condvar,
    pub(super) in_flight: Mutex<HashMap<u64, InFlight, foldhash::fast::FixedState>>,
    next_id: AtomicU64,
    failure: Mutex<Option<Error>>,
    stopped: AtomicBool,
    cancelled: AtomicBool,
    ended: AtomicBool,
    abandoned: AtomicBool,
    /// No thread reads any more.
    pub(super) readers_ended: AtomicBool,
    /// A device may use slots and destinations at any later time.
    pub(super) copies_abandoned: AtomicBool,
    pub(super) counters: Arc<Counters>,
    pub(super) totals: Totals,
    last_landing: OnceLock<Instant>,
}

/// A read that an engine has, or whose bytes go to the queues of devices.
#[derive(Debug, Clone)]
pub(super) struct InFlight {
    /// The device they go to: then what makes no progress is its driver.
    pub(super) copying: Option<usize>,
    /// The bytes of a file, if they are of one.
    pub(super) extent: Option<Extent>,
    pub(super) bytes: u64,
    pub(super) in_slot: bool,
    /// When it last made progress.
    pub(super) since: Instant,
    /// When an engine got it, this time.
    pub(super) began: Instant,
    pub(super) thread: ThreadId,
    pub(super) warned: bool,
}

impl Job {
    /// The shared state of a load that has not begun.
    pub(super) fn new(setup: Setup, prepared: Prepared) -> Job {
        let Prepared { alignment, copies, .. } = prepared;
        let plan = setup.plan.clone();
        let world = plan.world();
        let devices = distinct(world, &setup.devices);
        let mut device_of = vec![0; world.size() as usize];
        for (rank, device) in world.driven().iter().zip(&setup.devices) {
            let known = devices.iter().position(|(known, _)| Arc::ptr_eq(known, device));
            device_of[rank.index()] = known.expect("bug in shardlift: a device that no rank has");
        }
        let pinner = match &setup.maker {
            Some(maker) => Some(Arc::clone(maker) as Arc<dyn Pinner>),
            None => pinner(&devices),
        };
        let windows = windows(&setup, pinner.as_ref());
        let hold = setup.ring.hold();
        let in_place = !copies.has_queues();
        let slot = setup.ring.slot_bytes() as u64;
        let cut_chunk = if in_place { slot.min(limits::CUT_CHUNK) } else { slot };
        // What is lent from one window is one read.
        let cut_at = if windows.is_some() { slot } else { alignment };
        #[cfg(feature = "cuda")]
        let exchanging = setup.peers.as_ref().and_then(|peers| peers.meeting.as_ref()).map(Exchanging::new);
        #[cfg(feature = "cuda")]
        let exchanged = exchanging.as_ref().map_or(0, Exchanging::chunk);
        #[cfg(not(feature = "cuda"))]
        let exchanged = 0;
        let cutting = Cutting {
            chunk: limits::DIRECT_CHUNK,
            cut_chunk,
            alignment: cut_at,
            direct: in_place && alignment == 1,
            exchanged,
        };
        let driven = |rank: Rank| world.driven().binary_search(&rank).is_ok();
        let reads = Reads::new(&plan, cutting, |extent| {
            let waits = |consumer: &Consumer| setup.destinations.waits(consumer.rank, consumer.dest);
            // What others want is read also if nobody here does.
            driven(extent.reader) && (plan.is_shared(extent) || plan.consumers(extent).iter().any(waits))
        });

        let mut totals = Totals::default();
        let mut remaining: Vec<Vec<AtomicU64>> = (0..world.size()).map(|_| Vec::new()).collect();
        let mut aliases = vec![Vec::new(); world.size() as usize];
        let mut completed = VecDeque::new();
        for &rank in world.driven() {
            for (dest, planned) in plan.rank(rank).dests.iter().enumerate() {
                let dest = dest as u32;
                totals.tensors += 1;
                let awaited = if setup.destinations.waits(rank, dest) { planned.bytes } else { 0 };
                totals.bytes += awaited;
                totals.lent_bytes += planned.bytes - awaited;
                // An alias is complete when its original is.
                match plan.params()[planned.param as usize].alias_of {
                    Some(original) => aliases[rank.index()].push((original, dest)),
                    None if awaited == 0 => completed.push_back((rank, dest)),
                    None => {}
                }
                remaining[rank.index()].push(AtomicU64::new(awaited));
            }
        }
        let job = Job {
            copies,
            files: Arc::new(Files::new(&plan, &setup.mapped, setup.drop_page_cache)),
            digests: setup.digests.then(|| Digests::new(&plan)),
            setup,
            alignment,
            reads,
            cursor: Mutex::default(),
            again: Mutex::default(),
            spare: Mutex::default(),
            devices,
            pinner,
            windows,
            #[cfg(feature = "cuda")]
            exchanging,
            hold,
            device_of,
            remaining,
            aliases,
            completed: Mutex::default(),
            changed: Condvar::new(),
            in_flight: Mutex::default(),
            next_id: AtomicU64::new(0),
            failure: Mutex::default(),
            stopped: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            readers_ended: AtomicBool::new(false),
            copies_abandoned: AtomicBool::new(false),
            counters: Arc::default(),
            totals,
            last_landing: OnceLock::new(),
        };
        for (rank, dest) in completed {
            job.complete(rank, dest);
        }
        job.setup.warnings.iter().for_each(|warning| job.counters.warn(warning.clone()));
        job
    }

    /// Which slots this load can read into.
    pub(super) fn lend(&self) -> Lend {
        if self.pinner.is_some() { Lend::Pinned } else { Lend::Any }
    }

    /// Whether slots that were not there yet would be of no use.
    pub(super) fn wants_no_slots(&self) -> bool {
        self.is_stopped() || self.readers_ended.load(Ordering::Acquire)
    }

    /// Bytes that are or were pinned for this load.
    pub(super) fn pinned_bytes(&self) -> u64 {
        let of_windows = self.windows.as_ref().map_or(0, |windows| windows.peak_bytes());
        let slots = self.pinner.is_some() && self.setup.maker.is_none();
        of_windows + if slots { self.setup.ring.pinned_bytes() } else { 0 }
    }

    /// Bytes of all slots in memory of the host.
    pub(super) fn slots_here(&self) -> u64 {
        if self.setup.maker.is_some() { 0 } else { self.setup.ring.bytes() }
    }

    /// Whether every byte has landed, whatever the engine said.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] naming the first tensor that has not, and its rank.
    pub(super) fn check_complete(&self) -> Result<()> {
        for &rank in self.setup.plan.world().driven() {
            let waiting = |bytes: &AtomicU64| bytes.load(Ordering::Acquire) > 0;
            if let Some(dest) = self.remaining[rank.index()].iter().position(waiting) {
                let plan = &self.setup.plan;
                let tensor = &plan.params()[plan.rank(rank).dests[dest].param as usize].name;
                let missing = self.remaining[rank.index()][dest].load(Ordering::Acquire);
                let message = format!("engine {} ended {missing} bytes early", self.setup.engine.name());
                return Err(Error::new(ErrorKind::Io, message).with_tensor(tensor).with_rank(rank));
            }
        }
        Ok(())
    }

    /// Enters a read in the list of those in flight, from which only its end removes it; when it last made progress, and
    /// when it begins.
    pub(super) fn begin(&self, id: u64, extent: Extent, bytes: usize, in_slot: bool, [since, began]: [Instant; 2]) {
        let (bytes, thread) = (bytes as u64, std::thread::current().id());
        let extent = Some(extent);
        let read = InFlight { copying: None, extent, bytes, in_slot, since, began, thread, warned: false };
        lock(&self.in_flight).insert(id, read);
    }

    /// The same for copies of what a read brought, while its thread submits them to a device.
    pub(super) fn begin_copies(&self, id: u64, device: usize, extent: Option<Extent>, in_slot: bool) {
        let (since, thread) = (Instant::now(), std::thread::current().id());
        let copies =
            InFlight { copying: Some(device), extent, bytes: 0, in_slot, since, began: since, thread, warned: false };
        lock(&self.in_flight).insert(id, copies);
    }

    /// Takes them out again.
    pub(super) fn end_copies(&self, id: u64) {
        lock(&self.in_flight).remove(&id);
    }

    /// A fresh number for a request.
    pub(super) fn request_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// [`locate`](Job::locate), where there is an extent.
    pub(super) fn locate_any(&self, error: Error, extent: Option<Extent>) -> Error {
        match extent {
            Some(extent) => self.locate(error, extent),
            None => error,
        }
    }

    /// Adds file, tensor and bytes to an error about an extent.
    pub(super) fn locate(&self, error: Error, extent: Extent) -> Error {
        let plan = &self.setup.plan;
        let tensors = plan.checkpoint().tensors();
        let end = tensors.partition_point(|tensor| (tensor.file, tensor.start) <= (extent.file, extent.start));
        let tensor = end.checked_sub(1).map(|position| &tensors[position]);
        let error = error.with_file(&plan.file(extent.file).path).with_bytes(extent.start, extent.end);
        match tensor {
            Some(tensor) if tensor.file == extent.file && tensor.end > extent.start => error.with_tensor(&tensor.name),
            _ => error,
        }
    }

    /// Adds file, tensor and bytes of the read that comes next to an error that keeps it from coming.
    pub(super) fn locate_next(&self, error: Error) -> Error {
        let next = self.reads.next(&lock(&self.cursor));
        match next {
            Some((op, _)) => self.locate(error, op.extent),
            None => error,
        }
    }

    /// Adds tensor and rank to an error of a device: of the destination whose bytes it names, or else of what was under
    /// way first; `rank` is one that lives there.
    pub(super) fn locate_copy(&self, CopyError { error, landing }: CopyError, rank: Rank) -> Error {
        let (plan, at) = (&self.setup.plan, error.at().bytes);
        let holds = |dest: usize, bytes: u64| {
            let start = self.setup.destinations.place(rank, dest as u32).map(|place| place.address);
            start.zip(at).is_some_and(|(start, (from, _))| start <= from && from < start + bytes)
        };
        let mut originals = plan.rank(rank).dests.iter().enumerate().filter_map(|(position, dest)| {
            let param = &plan.params()[dest.param as usize];
            param.alias_of.is_none().then_some((position, dest.bytes, &param.name))
        });
        if let Some((_, _, name)) = originals.find(|(position, bytes, _)| holds(*position, *bytes)) {
            return error.with_tensor(name).with_rank(rank);
        }
        let Some(Landing { rank, dest, .. }) = landing else { return error.with_rank(rank) };
        let param = plan.rank(rank).dests[dest as usize].param;
        error.with_tensor(&plan.params()[param as usize].name).with_rank(rank)
    }

    /// Makes this the load's error unless it has one, and stops everything that has not begun.
    pub(crate) fn fail(&self, error: Error) {
        // First here, with all that is known of it here, then to the others, whose copy comes back.
        let telling = {
            let mut failure = lock(&self.failure);
            let failure = failure.get_or_insert(error);
            self.setup.peers.as_ref().map(|peers| peers.telling(failure))
        };
        // Unlocked: whoever is woken by that may cancel this load.
        if let Some(tell) = telling {
            tell();
        }
        self.stop();
    }

    /// How long a load waits for a slot, or for its devices, whose own bound is `bound`: what is exchanged waits for others too,
    /// and the exchange has bounds of its own.
    pub(super) fn patience(&self, bound: Duration) -> Duration {
        #[cfg(feature = "cuda")]
        if self.exchanging.is_some() {
            return bound * (super::exchange::PATIENCE + 1);
        }
        bound
    }

    /// Whether a thread does not come back from NCCL although the load stopped `since`; what it waits for is aborted first.
    #[cfg(feature = "cuda")]
    pub(super) fn is_stuck(&self, since: Instant) -> bool {
        self.exchanging.as_ref().is_some_and(|exchanging| exchanging.is_stuck(since))
    }

    #[cfg(not(feature = "cuda"))]
    pub(super) fn is_stuck(&self, _: Instant) -> bool {
        false
    }

    /// Fails if another rank has.
    pub(super) fn watch_peers(&self) {
        if let Some(error) = self.setup.peers.as_ref().and_then(Peers::failure) {
            self.fail(error);
        }
    }

    /// Stops the load: nothing new starts, what is in flight is drained.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        if !self.ended.load(Ordering::Acquire) {
            // When one rank ends a launcher signals the others, sooner than anybody looked: why it ended is the error.
            self.watch_peers();
            self.fail(cancelled());
        }
    }

    /// An error if the load was cancelled, also after everything had landed.
    pub(crate) fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Acquire) { Err(cancelled()) } else { Ok(()) }
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.setup.ring.wake();
        let _completed = lock(&self.completed);
        self.changed.notify_all();
    }

    /// Counts what is given up because somebody may still write to it: these slots, and all destinations, which the
    /// job keeps alive until the last one who uses it lets go.
    pub(super) fn abandon(&self, slots: usize) {
        let destinations = if self.abandoned.swap(true, Ordering::AcqRel) { 0 } else { self.totals.bytes };
        let slots = (slots * self.setup.ring.slot_bytes()) as u64;
        self.counters.abandoned_bytes.fetch_add(destinations + slots, Ordering::Relaxed);
    }

    /// Whether anything was given up so.
    pub(super) fn has_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// The load's error, if it has one.
    pub(super) fn take_failure(&self) -> Option<Error> {
        lock(&self.failure).take()
    }

    /// Kind and text of the load's error, if it has one.
    pub(super) fn failure(&self) -> Option<(ErrorKind, String)> {
        lock(&self.failure).as_ref().map(|error| (error.kind(), error.to_string()))
    }

    /// Whether nothing new should start.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// What the load was started with.
    pub(crate) fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Marks the load as over: nothing will land any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        let _completed = lock(&self.completed);
        self.changed.notify_all();
    }

    /// The next complete destination; `None` when there are no more, or the load failed.
    pub(crate) fn next_completed(&self) -> Option<(Rank, u32)> {
        let mut completed = lock(&self.completed);
        loop {
            if self.is_stopped() {
                return None;
            }
            if let Some(next) = completed.pop_front() {
                return Some(next);
            }
            if self.ended.load(Ordering::Acquire) {
                return None;
            }
            completed = self.changed.wait(completed).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// The counters and where they end, for those who watch the load and must not keep its memory.
    pub(crate) fn watch(&self) -> (Arc<Counters>, Totals) {
        (Arc::clone(&self.counters), self.totals)
    }

    /// What was digested on the way, if anything: complete when the load has ended.
    pub(crate) fn moved(&self) -> Vec<Vec<Option<Moved>>> {
        self.digests.as_ref().map_or_else(Vec::new, |digests| digests.taken(&self.setup.plan))
    }

    /// When the last destination became complete.
    pub(super) fn completed_at(&self) -> Option<Instant> {
        self.last_landing.get().copied()
    }

    fn complete(&self, rank: Rank, dest: u32) {
        if let Some(trace) = self.trace() {
            let event = Event { number: rank.0, offset: dest.into(), ..Event::of(Kind::Tensor) };
            trace.since(event, Instant::now());
        }
        let param = self.setup.plan.rank(rank).dests[dest as usize].param;
        let mut completed = lock(&self.completed);
        // Nobody waits while there are some.
        let awaited = completed.is_empty();
        completed.push_back((rank, dest));
        let mut count = 1;
        for &(_, alias) in self.aliases[rank.index()].iter().filter(|(original, _)| *original == param) {
            completed.push_back((rank, alias));
            count += 1;
        }
        let done = self.counters.tensors_landed.fetch_add(count, Ordering::Relaxed) + count;
        if done == self.totals.tensors {
            let _ = self.last_landing.set(Instant::now());
        }
        if awaited {
            self.changed.notify_all();
        }
    }
}

impl Landed for Job {
    fn landed(&self, Landing { rank, dest, bytes }: Landing) {
        self.counters.bytes_landed.fetch_add(bytes, Ordering::Relaxed);
        // AcqRel: whoever completes the destination has seen every thread's bytes of it.
        let before = self.remaining[rank.index()][dest as usize].fetch_sub(bytes, Ordering::AcqRel);
        assert!(before >= bytes, "bug in shardlift: more bytes landed than the destination has");
        if before == bytes {
            self.complete(rank, dest);
        }
    }

    fn copied(&self, device: usize, filled: &Filled) {
        self.transferred(device, filled);
    }

    fn fed(&self) -> bool {
        self.readers_ended.load(Ordering::Acquire)
    }

    fn failed(&self, device: usize, error: CopyError) {
        self.fail(self.locate_copy(error, self.devices[device].1));
    }

    fn abandoned(&self, slots: usize) {
        self.abandon(slots);
        self.copies_abandoned.store(true, Ordering::Release);
    }
}

/// Windows to lend from, if the engine lends and every device can copy from there.
fn windows(setup: &Setup, pinner: Option<&Arc<dyn Pinner>>) -> Option<Arc<Windows>> {
    let pinner = pinner.filter(|pinner| setup.engine.lends() && pinner.pins_read_only())?;
    let window = setup.ring.slot_bytes();
    if !window.is_multiple_of(rustix::param::page_size()) {
        return None;
    }
    Some(Arc::new(Windows::new(Arc::clone(pinner), window, setup.ring.budget())))
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the load was cancelled")
}
