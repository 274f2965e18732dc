//! Filled slots -> bytes on a device. Knows neither files nor engines.

mod copier;
mod lower;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::device::{Home, Op, Queue};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::{self, CopyCosts};
use crate::stage::Staged;
use crate::sync::lock;

use copier::{Copier, Done};
pub(crate) use lower::{Part, lower};

/// What copies cost whose sources are in memory of `from`.
pub(crate) fn costs(from: Home) -> &'static CopyCosts {
    match from {
        Home::Host => &limits::COPY_COSTS,
        Home::Device => &limits::DEVICE_COPY_COSTS,
    }
}

/// A filled slot and the copies that one device takes from it.
#[derive(Debug)]
pub(crate) struct Filled {
    /// Held until the copies are done.
    pub(crate) staged: Staged,
    pub(crate) ops: Vec<Op>,
    pub(crate) landing: Vec<Landing>,
    /// Other devices take from it, too.
    pub(crate) shared: bool,
    pub(crate) traced: Option<Traced>,
}

/// What a trace wants to know of a slot's copies when they are done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Traced {
    /// When they were submitted.
    pub(crate) since: Instant,
    pub(crate) kernels: u32,
}

impl Traced {
    /// Of operations that are submitted now.
    pub(crate) fn begin(ops: &[Op]) -> Traced {
        let kernels = |op: &Op| if let Op::Cut { copies, .. } = op { copies.len() as u32 } else { 0 };
        Traced { since: Instant::now(), kernels: ops.iter().map(kernels).sum() }
    }
}

/// Bytes of a destination that arrive with a copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Landing {
    pub(crate) rank: Rank,
    /// Position in the rank's destinations.
    pub(crate) dest: u32,
    pub(crate) bytes: u64,
}

/// What copies are reported to.
pub(crate) trait Landed {
    /// The bytes have landed and are visible.
    fn landed(&self, landing: Landing);
    /// All copies of a slot to a device are done.
    fn copied(&self, _device: usize, _filled: &Filled) {}
    /// Whether everything was submitted.
    fn fed(&self) -> bool;
    /// A device failed.
    fn failed(&self, device: usize, error: CopyError);
    /// A device stalled: this many slots are kept for ever, and so must be the destinations of their copies.
    fn abandoned(&self, slots: usize);
}

/// An error of a device, and what was under way first when it came.
#[derive(Debug)]
pub(crate) struct CopyError {
    pub(crate) error: Error,
    pub(crate) landing: Option<Landing>,
}

/// The queues of a load's devices and the slots that their copies read from. Whoever has filled a slot submits it to
/// every device that takes from it, and looks which copies before it are done. So does [one thread](Copies::run), now and
/// then: waking a thread for each slot would cost more than all else that is done for it.
#[derive(Debug)]
pub(crate) struct Copies {
    /// For each device; `None` where bytes land at once.
    devices: Vec<Option<Device>>,
    /// How many slots may wait for one answer.
    group: usize,
    /// The same where each device has slots of its own.
    group_alone: usize,
    /// The thread that looks, once it does.
    looking: OnceLock<Thread>,
    /// It has no reason to hurry.
    resting: AtomicBool,
    /// It has: somebody waits for a slot.
    starved: AtomicBool,
}

/// What is under way to one device.
#[derive(Debug)]
struct Device {
    /// Gone when everything has landed, or nothing will.
    copier: Mutex<Option<Copier>>,
    /// How often somebody has had the copier: who finds it taken knows whether that is the same one all the time.
    turns: AtomicU64,
    /// Slots of the copier, as far as those need to know who cannot have it.
    slots: AtomicUsize,
}

impl Copies {
    /// Copies to devices that have these queues, from so many slots; `None` where bytes land at once.
    pub(crate) fn new(queues: Vec<Option<Box<dyn Queue>>>, slots: usize) -> Copies {
        let device = |queue| Device {
            copier: Mutex::new(Some(Copier::new(queue))),
            turns: AtomicU64::new(0),
            slots: AtomicUsize::new(0),
        };
        let group = |devices: usize| (slots / limits::GROUPS / devices.max(1)).clamp(1, limits::GROUP_MAX);
        let devices: Vec<Option<Device>> = queues.into_iter().map(|queue| queue.map(device)).collect();
        Copies {
            group: group(1),
            group_alone: group(devices.iter().flatten().count()),
            devices,
            looking: OnceLock::new(),
            resting: AtomicBool::new(false),
            starved: AtomicBool::new(false),
        }
    }

    /// Whether the bytes of this device pass through a queue.
    pub(crate) fn has_queue(&self, device: usize) -> bool {
        self.devices[device].is_some()
    }

    /// Whether those of any device do.
    pub(crate) fn has_queues(&self) -> bool {
        self.devices.iter().any(Option::is_some)
    }

    /// Queues what a device takes from a slot, and reports now and then which copies before it are done. The slot is
    /// dropped if copies to the device have failed, which is reported too, or ended. Returns how long others had the queue.
    pub(crate) fn submit(&self, device: usize, filled: Filled, landed: &dyn Landed) -> Duration {
        let of_device = self.devices[device].as_ref().expect("bug in shardlift: a device without a queue");
        let asked = Instant::now();
        let mut guard = lock(&of_device.copier);
        let waited = asked.elapsed();
        of_device.turns.fetch_add(1, Ordering::Relaxed);
        let Some(copier) = guard.as_mut().filter(|copier| copier.failed.is_none()) else { return waited };
        of_device.slots.store(copier.in_flight.len() + 1, Ordering::Relaxed);
        let most = if filled.shared { self.group } else { self.group_alone };
        // Asked first: what is submitted now is not done yet.
        let done = copier.reap_after(self.group);
        let submitted = match &done {
            Ok(_) => copier.guarded(|copier| copier.submit(filled, most)),
            Err(_) => Ok(()),
        };
        drop(guard);
        report(device, done, landed);
        report(device, submitted.map(|()| Done::new()), landed);
        waited
    }

    /// Tells that somebody found no slot: they are needed as soon as some are done.
    pub(crate) fn hurry(&self) {
        self.starved.store(true, Ordering::SeqCst);
        if self.resting.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Makes the thread that looks do so now.
    pub(crate) fn wake(&self) {
        if let Some(thread) = self.looking.get() {
            thread.unpark();
        }
    }

    /// Looks which copies are done until everything was submitted and has landed: seldom while there are slots, and when
    /// somebody waits for them whenever about half of the copies should be done, for waking costs more than looking.
    ///
    /// A device that fails, or completes no copy for `stall`, is reported. If what is under way there does not end within
    /// `stall` then, its queue and slots are kept for ever (see [`Landed::abandoned`]): the device may still use them.
    pub(crate) fn run(&self, landed: &dyn Landed, stall: Duration) {
        let _ = self.looking.set(thread::current());
        let mut watches: Vec<Watch> =
            self.devices.iter().map(|device| if device.is_some() { Watch::Open } else { Watch::Closed }).collect();
        // Nothing comes after the last copies, and their end is the load's.
        let mut at_the_end = limits::EVENT_POLL;
        loop {
            let (fed, starved) = (landed.fed(), self.starved.swap(false, Ordering::SeqCst));
            let (mut freed, mut half) = (false, None);
            for (device, watch) in watches.iter_mut().enumerate() {
                let Some(of_device) = self.devices[device].as_ref().filter(|_| *watch != Watch::Closed) else {
                    continue;
                };
                let (any, next) =
                    of_device.look(device, watch, landed, &Looking { fed, hurry: starved, group: self.group, stall });
                freed |= any;
                half = [half, next].into_iter().flatten().min();
            }
            if watches.iter().all(|watch| *watch == Watch::Closed) {
                return;
            }
            if starved && !freed {
                self.starved.store(true, Ordering::SeqCst);
            }
            let sleep = match half {
                Some(half) if fed => {
                    let sleep = half.min(at_the_end).clamp(limits::EVENT_POLL, limits::COPY_POLL_MAX);
                    at_the_end = twice(at_the_end);
                    sleep
                }
                Some(half) if starved => half.max(limits::COPY_POLL),
                _ => {
                    self.resting.store(true, Ordering::SeqCst);
                    // Who waits since before that did not wake this thread.
                    let missed = half.is_some() && self.starved.load(Ordering::SeqCst);
                    if missed { limits::COPY_POLL } else { limits::COPY_TICK }
                }
            };
            thread::park_timeout(sleep);
            self.resting.store(false, Ordering::SeqCst);
        }
    }
}

/// How the thread that looks does so.
struct Looking {
    /// Everything was submitted.
    fed: bool,
    /// Somebody waits for a slot.
    hurry: bool,
    /// How many slots wait for one answer.
    group: usize,
    /// How long a device may take.
    stall: Duration,
}

/// What the thread that looks knows of a device.
#[derive(Debug, PartialEq)]
enum Watch {
    Open,
    /// Somebody has had the copier for so long, in this turn: its driver does not come back.
    Taken(Instant, u64),
    /// It has nothing more to do.
    Closed,
}

impl Device {
    /// Reports what is done of the copies, and ends the copier when it has done everything, fails or stalls. Whether
    /// anything was done, and how soon about half of what is left should be.
    fn look(
        &self,
        device: usize,
        watch: &mut Watch,
        landed: &dyn Landed,
        &Looking { fed, hurry, group, stall }: &Looking,
    ) -> (bool, Option<Duration>) {
        let mut guard = match self.copier.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let turn = self.turns.load(Ordering::Relaxed);
                match *watch {
                    Watch::Taken(since, of) if of == turn && since.elapsed() > stall => {
                        let message = format!("a driver did not come back for {stall:?}");
                        let error = Error::new(ErrorKind::Stalled, message);
                        landed.failed(device, CopyError { error, landing: None });
                        landed.abandoned(self.slots.load(Ordering::Relaxed));
                        *watch = Watch::Closed;
                    }
                    Watch::Taken(_, of) if of == turn => {}
                    _ => *watch = Watch::Taken(Instant::now(), turn),
                }
                return (false, Some(limits::COPY_POLL_MAX));
            }
        };
        self.turns.fetch_add(1, Ordering::Relaxed);
        *watch = Watch::Open;
        let Some(copier) = &mut *guard else {
            *watch = Watch::Closed;
            return (false, None);
        };
        let asks = fed || hurry || copier.is_late(group);
        let done = if asks { copier.reap_all(fed, group) } else { Ok(Done::new()) };
        let stalled = copier.failed.is_none() && copier.stalls(stall);
        let (over, abandoned) = match copier.failed {
            // A little at a time: other devices are waited for, too.
            Some(since) => match copier.queue.settle(Duration::ZERO) {
                true => (true, false),
                false => (since.elapsed() > stall, since.elapsed() > stall),
            },
            None => (stalled || fed && copier.in_flight.is_empty(), stalled),
        };
        let half = copier.half(group);
        let ending = if over { guard.take() } else { None };
        drop(guard);
        let freed = report(device, done, landed);
        let Some(copier) = ending else { return (freed, half) };
        *watch = Watch::Closed;
        if stalled {
            let error = Error::new(ErrorKind::Stalled, format!("no copy completed for {stall:?}"));
            landed.failed(device, CopyError { error, landing: copier.first() });
        }
        if abandoned {
            landed.abandoned(copier.in_flight.len());
            copier.abandon();
        }
        (freed, None)
    }
}

/// Tells who waits for it what has come of a device's copies; whether some are done.
fn report(device: usize, done: Result<Done, CopyError>, landed: &dyn Landed) -> bool {
    let filled = match done {
        Ok(filled) => filled,
        Err(error) => {
            landed.failed(device, error);
            return false;
        }
    };
    let landings = || {
        for filled in &filled {
            landed.copied(device, filled);
            filled.landing.iter().for_each(|&landing| landed.landed(landing));
        }
    };
    if let Err(payload) = catch_unwind(AssertUnwindSafe(landings)) {
        landed.failed(device, CopyError { error: Error::panicked(payload), landing: None });
    }
    !filled.is_empty()
}

/// How long to sleep next where nothing was done, however often that is.
fn twice(sleep: Duration) -> Duration {
    (sleep * 2).min(limits::COPY_POLL_MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{self, Receiver, Sender};

    use super::*;
    use crate::stage::{Lend, Ring};

    /// A device under the test's control: copies are done when the test says so.
    struct Slow {
        submitted: u64,
        done: Receiver<Result<u64>>,
        finished: u64,
        settles: bool,
        dropped: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Queue for Slow {
        unsafe fn submit(&mut self, _: Vec<Op>, _: Home) -> Result<u64> {
            self.submitted += 1;
            Ok(self.submitted)
        }

        fn finished(&mut self) -> Result<u64> {
            if let Ok(done) = self.done.try_recv() {
                self.finished = done?;
            }
            Ok(self.finished)
        }

        fn settle(&mut self, _: Duration) -> bool {
            self.settles
        }
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            self.dropped.lock().unwrap().push("queue");
        }
    }

    #[derive(Default)]
    struct Seen {
        landed: Mutex<Vec<u32>>,
        abandoned: AtomicUsize,
        fed: AtomicBool,
        errors: Mutex<Vec<ErrorKind>>,
    }

    impl Landed for Seen {
        fn landed(&self, landing: Landing) {
            self.landed.lock().unwrap().push(landing.dest);
        }
        fn fed(&self) -> bool {
            self.fed.load(Ordering::Acquire)
        }
        fn failed(&self, device: usize, error: CopyError) {
            assert_eq!(device, 0);
            self.errors.lock().unwrap().push(error.error.kind());
        }
        fn abandoned(&self, slots: usize) {
            self.abandoned.store(slots, Ordering::Relaxed);
        }
    }

    struct Rig {
        ring: Ring,
        copies: Arc<Copies>,
        done: Sender<Result<u64>>,
        seen: Arc<Seen>,
        dropped: Arc<Mutex<Vec<&'static str>>>,
        thread: std::thread::JoinHandle<()>,
    }

    /// Copies to one device, whose thread runs, and a ring of two slots.
    fn rig(stall: Duration, settles: bool) -> Rig {
        let (done, told) = mpsc::channel();
        let (seen, dropped) = (Arc::new(Seen::default()), Arc::default());
        let queue = Slow { submitted: 0, done: told, finished: 0, settles, dropped: Arc::clone(&dropped) };
        let copies = Arc::new(Copies::new(vec![Some(Box::new(queue) as Box<dyn Queue>)], 2));
        let (landed, looked_at) = (Arc::clone(&seen), Arc::clone(&copies));
        let thread = std::thread::spawn(move || looked_at.run(&*landed, stall));
        Rig { ring: Ring::new(8192, 4096), copies, done, seen, dropped, thread }
    }

    impl Rig {
        fn submit(&self, dest: u32) {
            let staged = self.ring.try_lend(Lend::Any).unwrap().unwrap().stage();
            let landing = vec![Landing { rank: Rank(0), dest, bytes: 1 }];
            let filled = Filled { staged, ops: Vec::new(), landing, shared: false, traced: None };
            self.copies.submit(0, filled, &*self.seen);
        }

        fn end(self) -> Arc<Seen> {
            self.seen.fed.store(true, Ordering::Release);
            self.copies.wake();
            self.thread.join().unwrap();
            self.seen
        }

        fn free_slots(&self) -> usize {
            let slots: Vec<_> = std::iter::from_fn(|| self.ring.try_lend(Lend::Any).unwrap()).collect();
            slots.len()
        }

        /// Waits until the thread that looks has seen to it.
        fn until(&self, condition: impl Fn(&Rig) -> bool) {
            let began = Instant::now();
            while !condition(self) {
                assert!(began.elapsed() < LONG);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn a_device_that_is_slow_at_the_end_is_waited_for_in_bounded_steps() {
        let mut sleep = limits::EVENT_POLL;
        (0..1000).for_each(|_| sleep = twice(sleep));
        assert_eq!(sleep, limits::COPY_POLL_MAX);
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_slot_is_free_only_after_its_copies() {
        let rig = rig(LONG, true);
        rig.submit(1);
        rig.submit(2);
        thread::sleep(limits::COPY_POLL_MAX * 2);
        assert_eq!(rig.free_slots(), 0, "both are in flight");
        assert!(rig.seen.landed.lock().unwrap().is_empty());
        rig.done.send(Ok(1)).unwrap();
        rig.until(|rig| *rig.seen.landed.lock().unwrap() == [1]);
        rig.ring.wait(Lend::Any, LONG, || false);
        assert_eq!(rig.free_slots(), 1, "the second is not back");
        rig.done.send(Ok(2)).unwrap();
        assert_eq!(*rig.end().landed.lock().unwrap(), [1, 2]);
    }

    #[test]
    fn whoever_submits_looks_and_nothing_is_taken_after_the_end() {
        let rig = rig(LONG, true);
        rig.seen.fed.store(true, Ordering::Release);
        rig.copies.wake();
        rig.until(|rig| lock(&rig.copies.devices[0].as_ref().unwrap().copier).is_none());
        rig.submit(1);
        assert_eq!(rig.free_slots(), 2);

        let (done, told) = mpsc::channel();
        let queue = Slow { submitted: 0, done: told, finished: 0, settles: true, dropped: Arc::default() };
        let rig = Rig { copies: Arc::new(Copies::new(vec![Some(Box::new(queue))], 2)), ..rig };
        rig.submit(5);
        assert_eq!(rig.free_slots(), 1);
        done.send(Ok(1)).unwrap();
        rig.submit(6);
        assert_eq!((rig.free_slots(), &rig.seen.landed.lock().unwrap()[..]), (1, &[5][..]));
    }

    #[test]
    fn a_driver_that_does_not_come_back_is_told_from_many_who_call_it() {
        let rig = rig(Duration::from_millis(40), true);
        let device = rig.copies.devices[0].as_ref().unwrap();
        for _ in 0..20 {
            let _taken = lock(&device.copier);
            device.turns.fetch_add(1, Ordering::Relaxed);
            rig.copies.wake();
            thread::sleep(Duration::from_millis(5));
        }
        assert!(rig.seen.errors.lock().unwrap().is_empty());
        let taken = lock(&device.copier);
        rig.until(|rig| *rig.seen.errors.lock().unwrap() == [ErrorKind::Stalled]);
        drop(taken);
        rig.end();
    }

    #[test]
    fn a_failed_copy_ends_the_queue_before_its_slots_go_back() {
        let rig = rig(LONG, true);
        rig.submit(1);
        rig.done.send(Err(Error::new(ErrorKind::Device, "of the test"))).unwrap();
        rig.until(|rig| *rig.dropped.lock().unwrap() == ["queue"]);
        rig.until(|rig| rig.free_slots() == 2);
        rig.submit(2); // dropped
        assert_eq!(rig.free_slots(), 2);
        let seen = rig.end();
        assert_eq!(*seen.errors.lock().unwrap(), [ErrorKind::Device]);
        assert!(seen.landed.lock().unwrap().is_empty());
    }

    #[test]
    fn what_a_stalled_device_may_still_use_is_kept() {
        let rig = rig(Duration::from_millis(20), true);
        rig.submit(1);
        rig.until(|rig| rig.seen.abandoned.load(Ordering::Relaxed) == 1);
        assert!(rig.dropped.lock().unwrap().is_empty(), "the queue lives");
        assert_eq!(rig.free_slots(), 1, "the slot in flight is gone for ever");
        assert_eq!(*rig.end().errors.lock().unwrap(), [ErrorKind::Stalled]);
    }

    #[test]
    fn a_failed_copy_does_not_wait_for_ever_for_the_others() {
        let rig = rig(Duration::from_millis(500), false);
        rig.submit(1);
        rig.submit(2);
        rig.done.send(Err(Error::new(ErrorKind::Device, "of the test"))).unwrap();
        rig.until(|rig| rig.seen.abandoned.load(Ordering::Relaxed) == 2);
        assert!(rig.dropped.lock().unwrap().is_empty(), "the queue lives");
        assert_eq!(rig.free_slots(), 0);
        assert_eq!(*rig.end().errors.lock().unwrap(), [ErrorKind::Device]);
    }
}
