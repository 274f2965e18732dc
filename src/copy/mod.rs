//! Filled slots -> bytes on a device. Knows neither files nor engines.

mod lower;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::device::{Op, Queue};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::stage::Staged;
use crate::sync::lock;

pub(crate) use lower::{Part, lower};

/// A filled slot and the copies that one device takes from it.
#[derive(Debug)]
pub(crate) struct Filled {
    /// Held until the copies are done.
    #[expect(dead_code, reason = "its lifetime is its use")]
    pub(crate) staged: Staged,
    pub(crate) ops: Vec<Op>,
    pub(crate) landing: Vec<Landing>,
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
    /// Time that a device spent with copies under way, and without.
    fn spent(&self, busy: Duration, waiting: Duration);
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
/// every device that takes from it. Which copies are done is looked at by [one thread](Copies::run), now and then, and by
/// [whoever needs a slot](Copies::reap): waking a thread for each slot would cost more than all else that is done for it.
#[derive(Debug)]
pub(crate) struct Copies {
    /// For each device its copier, which is gone when everything has landed; no such where bytes land at once.
    copiers: Vec<Option<Mutex<Option<Copier>>>>,
    /// The thread that looks, once it does.
    looking: OnceLock<Thread>,
    /// It has no reason to hurry.
    resting: AtomicBool,
    /// It has: somebody waits for a slot.
    starved: AtomicBool,
}

impl Copies {
    /// Copies to devices that have these queues; `None` where bytes land at once.
    pub(crate) fn new(queues: Vec<Option<Box<dyn Queue>>>) -> Copies {
        let copiers = queues.into_iter().map(|queue| queue.map(|queue| Mutex::new(Some(Copier::new(queue))))).collect();
        let (resting, starved) = (AtomicBool::new(false), AtomicBool::new(false));
        Copies { copiers, looking: OnceLock::new(), resting, starved }
    }

    /// Whether the bytes of this device pass through a queue.
    pub(crate) fn has_queue(&self, device: usize) -> bool {
        self.copiers[device].is_some()
    }

    /// Whether those of any device do.
    pub(crate) fn has_queues(&self) -> bool {
        self.copiers.iter().any(Option::is_some)
    }

    /// Queues what a device takes from a slot, and reports which copies before it are done. The slot is dropped if copies
    /// to the device have failed, which is reported too, or ended.
    pub(crate) fn submit(&self, device: usize, filled: Filled, landed: &dyn Landed) {
        let copier = self.copiers[device].as_ref().expect("bug in shardlift: a device without a queue");
        let mut guard = lock(copier);
        let Some(copier) = guard.as_mut().filter(|copier| !copier.failed) else { return };
        let submitted = copier.guarded(|copier| copier.submit(filled));
        let done = submitted.and_then(|()| copier.reap());
        drop(guard);
        report(device, done, landed);
    }

    /// Reports the copies that are done; whether there were any. Devices that somebody else is busy with are left out.
    pub(crate) fn reap(&self, landed: &dyn Landed) -> bool {
        let mut any = false;
        for (device, copier) in self.copiers.iter().enumerate() {
            let Some(Ok(mut guard)) = copier.as_ref().map(Mutex::try_lock) else { continue };
            let Some(copier) = &mut *guard else { continue };
            let done = copier.reap();
            drop(guard);
            any |= report(device, done, landed);
        }
        any
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

    /// Looks which copies are done until everything was submitted and has landed: seldom while there are slots, and
    /// when somebody waits for them whenever about half of the copies should be done, for waking costs more than looking.
    ///
    /// A device that fails, or completes no copy for `stall`, is reported. If what is under way there does not end within
    /// `stall` then, its queue and slots are kept for ever (see [`Landed::abandoned`]): the device may still use them.
    pub(crate) fn run(&self, landed: &dyn Landed, stall: Duration) {
        let _ = self.looking.set(thread::current());
        // Since when somebody has been in a call of each device's driver.
        let mut taken: Vec<Option<Instant>> = vec![None; self.copiers.len()];
        loop {
            let (fed, starved) = (landed.fed(), self.starved.swap(false, Ordering::SeqCst));
            let (mut open, mut half) = (false, None);
            for (device, copier) in self.copiers.iter().enumerate() {
                let Some(copier) = copier else { continue };
                let outlook = look(device, copier, &mut taken[device], landed, fed, stall);
                open |= outlook != Outlook::Closed;
                if let Outlook::Busy(of_device) = outlook {
                    half = Some(half.unwrap_or(of_device).min(of_device));
                }
            }
            if !open {
                return;
            }
            let sleep = match half {
                // Nothing comes after the last copies: their end is the load's.
                Some(half) if fed => half.clamp(limits::EVENT_POLL, limits::COPY_POLL_MAX),
                Some(half) if starved => half.clamp(limits::COPY_POLL, limits::COPY_POLL_MAX),
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

/// What is to be expected of a device.
#[derive(PartialEq)]
enum Outlook {
    /// Copies; about half of them should be done after this time.
    Busy(Duration),
    /// Nothing before something is submitted.
    Idle,
    /// Nothing ever.
    Closed,
}

/// Reports what is done of a device's copies, and ends the copier of one that has done everything, or fails, or stalls.
fn look(
    device: usize,
    copier: &Mutex<Option<Copier>>,
    taken: &mut Option<Instant>,
    landed: &dyn Landed,
    fed: bool,
    stall: Duration,
) -> Outlook {
    let mut guard = match copier.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) if taken.get_or_insert_with(Instant::now).elapsed() <= stall => {
            return Outlook::Busy(limits::COPY_TICK);
        }
        Err(TryLockError::WouldBlock) => {
            // Its driver does not come back from a call, of which its caller knows.
            landed.abandoned(0);
            return Outlook::Closed;
        }
    };
    *taken = None;
    let Some(copier) = &mut *guard else { return Outlook::Closed };
    let done = copier.reap();
    let stalled = !copier.failed && copier.stalls(stall);
    let ends = copier.failed || stalled || fed && copier.in_flight.is_empty();
    let outlook = copier.outlook();
    let ending = if ends { guard.take() } else { None };
    drop(guard);
    report(device, done, landed);
    let Some(mut copier) = ending else { return outlook };
    if stalled {
        let error = Error::new(ErrorKind::Stalled, format!("no copy completed for {stall:?}"));
        landed.failed(device, CopyError { error, landing: copier.first() });
    }
    if stalled || copier.failed && !copier.queue.settle(stall) {
        landed.abandoned(copier.in_flight.len());
        copier.abandon();
    }
    Outlook::Closed
}

/// Tells who waits for it what has come of a device's copies; whether some are done.
fn report(device: usize, done: Result<Done, CopyError>, landed: &dyn Landed) -> bool {
    match done {
        Ok(Done { filled, busy, waiting }) => {
            landed.spent(busy, waiting);
            filled.iter().flat_map(|filled| &filled.landing).for_each(|&landing| landed.landed(landing));
            !filled.is_empty()
        }
        Err(error) => {
            landed.failed(device, error);
            false
        }
    }
}

/// What is done since somebody last looked.
#[derive(Default)]
struct Done {
    filled: Vec<Filled>,
    busy: Duration,
    waiting: Duration,
}

/// A queue and the slots that its copies read from. A slot is in the list before its copies are submitted, and leaves
/// it only when they are done (design invariant 7).
struct Copier {
    // Before the slots: dropping the queue ends its copies, and only then may the slots go back.
    queue: Box<dyn Queue>,
    in_flight: VecDeque<(u64, Filled)>,
    /// When a copy last completed, or there was none to wait for.
    progress: Instant,
    /// How long after each other slots complete, about.
    pace: Duration,
    /// The queue refused something, or panicked.
    failed: bool,
    /// Up to when time is counted.
    counted: Instant,
    busy: Duration,
    waiting: Duration,
}

impl Copier {
    fn new(queue: Box<dyn Queue>) -> Copier {
        let (now, none) = (Instant::now(), Duration::ZERO);
        let (in_flight, pace) = (VecDeque::new(), limits::COPY_POLL);
        Copier { queue, in_flight, progress: now, pace, failed: false, counted: now, busy: none, waiting: none }
    }

    /// What was under way first.
    fn first(&self) -> Option<Landing> {
        self.in_flight.front().and_then(|(_, filled)| filled.landing.first().copied())
    }

    /// Remembers a failure, which a panic is too, and what was under way first.
    fn guarded<T>(&mut self, body: impl FnOnce(&mut Copier) -> Result<T>) -> Result<T, CopyError> {
        let outcome =
            catch_unwind(AssertUnwindSafe(|| body(self))).unwrap_or_else(|payload| Err(Error::panicked(payload)));
        outcome.map_err(|error| {
            self.failed = true;
            CopyError { error, landing: self.first() }
        })
    }

    fn submit(&mut self, mut filled: Filled) -> Result<()> {
        self.count();
        let ops = std::mem::take(&mut filled.ops);
        let was_idle = self.in_flight.is_empty();
        self.in_flight.push_back((u64::MAX, filled));
        // SAFETY: the slot is in `in_flight` until its ticket is done, so nobody writes to it; the plan's audit proved
        // that no other copy names these destination bytes, which the load keeps alive.
        let ticket = unsafe { self.queue.submit(ops)? };
        self.in_flight.back_mut().expect("bug in shardlift: pushed above").0 = ticket;
        if was_idle {
            // Submitting may have taken long: a driver compiles kernels when they are first used.
            self.progress = Instant::now();
        }
        Ok(())
    }

    /// Takes out what is done.
    fn reap(&mut self) -> Result<Done, CopyError> {
        if self.failed {
            return Ok(Done::default());
        }
        self.count();
        let (busy, waiting) = (std::mem::take(&mut self.busy), std::mem::take(&mut self.waiting));
        let mut filled = Vec::new();
        if !self.in_flight.is_empty() {
            let finished = self.guarded(|copier| copier.queue.finished())?;
            while let Some((_, done)) = self.in_flight.pop_front_if(|(ticket, _)| *ticket <= finished) {
                filled.push(done);
            }
        }
        if !filled.is_empty() {
            let each = (self.counted - self.progress) / filled.len() as u32;
            self.pace = (self.pace * 3 + each) / 4;
            self.progress = self.counted;
        }
        Ok(Done { filled, busy, waiting })
    }

    /// Counts the time until now.
    fn count(&mut self) {
        let now = Instant::now();
        let spent = if self.in_flight.is_empty() { &mut self.waiting } else { &mut self.busy };
        *spent += now - self.counted;
        self.counted = now;
    }

    fn stalls(&self, stall: Duration) -> bool {
        !self.in_flight.is_empty() && self.progress.elapsed() > stall
    }

    fn outlook(&self) -> Outlook {
        match self.in_flight.len() as u32 {
            0 => Outlook::Idle,
            copies => Outlook::Busy(self.pace * copies / 2),
        }
    }

    /// Keeps what the device may still use for ever.
    #[expect(clippy::mem_forget, reason = "a stalled device may still read these slots: freeing them is worse")]
    fn abandon(self) {
        std::mem::forget(self);
    }
}

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier")
            .field("in_flight", &self.in_flight)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
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
        unsafe fn submit(&mut self, _: Vec<Op>) -> Result<u64> {
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
        fn spent(&self, _: Duration, _: Duration) {}
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
        let copies = Arc::new(Copies::new(vec![Some(Box::new(queue) as Box<dyn Queue>)]));
        let (landed, looked_at) = (Arc::clone(&seen), Arc::clone(&copies));
        let thread = std::thread::spawn(move || looked_at.run(&*landed, stall));
        Rig { ring: Ring::new(8192, 4096), copies, done, seen, dropped, thread }
    }

    impl Rig {
        fn submit(&self, dest: u32) {
            let staged = self.ring.try_lend(Lend::Any).unwrap().unwrap().stage();
            let landing = vec![Landing { rank: Rank(0), dest, bytes: 1 }];
            self.copies.submit(0, Filled { staged, ops: Vec::new(), landing }, &*self.seen);
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
    fn who_needs_a_slot_can_look_for_it() {
        let rig = rig(LONG, true);
        rig.seen.fed.store(true, Ordering::Release);
        rig.copies.wake();
        rig.until(|rig| lock(rig.copies.copiers[0].as_ref().unwrap()).is_none());
        // The thread has ended. Nothing is taken any more, and nothing kept.
        rig.submit(1);
        assert!(!rig.copies.reap(&*rig.seen));
        assert_eq!(rig.free_slots(), 2);

        let (done, told) = mpsc::channel();
        let queue = Slow { submitted: 0, done: told, finished: 0, settles: true, dropped: Arc::default() };
        let rig = Rig { copies: Arc::new(Copies::new(vec![None, Some(Box::new(queue))])), ..rig };
        let staged = rig.ring.try_lend(Lend::Any).unwrap().unwrap().stage();
        let landing = vec![Landing { rank: Rank(0), dest: 5, bytes: 1 }];
        rig.copies.submit(1, Filled { staged, ops: Vec::new(), landing }, &*rig.seen);
        assert!(!rig.copies.reap(&*rig.seen));
        done.send(Ok(1)).unwrap();
        assert!(rig.copies.reap(&*rig.seen));
        assert_eq!((rig.free_slots(), &rig.seen.landed.lock().unwrap()[..]), (2, &[5][..]));
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
        let rig = rig(LONG, false);
        rig.submit(1);
        rig.submit(2);
        rig.done.send(Err(Error::new(ErrorKind::Device, "of the test"))).unwrap();
        rig.until(|rig| rig.seen.abandoned.load(Ordering::Relaxed) == 2);
        assert!(rig.dropped.lock().unwrap().is_empty(), "the queue lives");
        assert_eq!(rig.free_slots(), 0);
        assert_eq!(*rig.end().errors.lock().unwrap(), [ErrorKind::Device]);
    }
}
