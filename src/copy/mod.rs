//! Filled slots -> bytes on a device. Knows neither files nor engines.

mod lower;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::device::{Op, Queue};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::stage::Staged;

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

/// What a copier reports to.
pub(crate) trait Landed {
    /// The bytes have landed and are visible.
    fn landed(&self, landing: Landing);
    /// Time spent with copies under way, and waiting for filled slots.
    fn spent(&self, busy: Duration, waiting: Duration);
    /// Whether new copies are no longer wanted.
    fn stopped(&self) -> bool;
    /// The device stalled: this many slots are kept for ever, and so must be the destinations of their copies.
    fn abandoned(&self, slots: usize);
}

/// An error of a device, and what was under way first when it came.
#[derive(Debug)]
pub(crate) struct CopyError {
    pub(crate) error: Error,
    pub(crate) landing: Option<Landing>,
}

/// Feeds filled slots to a device's queue until the inbox closes, then drains it.
///
/// # Errors
/// A copy failed, or none completed for `stall`. If copies are still under way then, and do not end within `stall`
/// either, queue and slots are kept for ever (see [`Landed::abandoned`]): the device may still use them.
pub(crate) fn run(
    queue: Box<dyn Queue>,
    inbox: &Receiver<Filled>,
    landed: &dyn Landed,
    stall: Duration,
) -> Result<(), CopyError> {
    let mut copier = Copier { queue, in_flight: VecDeque::new(), progress: Instant::now(), pace: limits::COPY_POLL };
    let outcome = catch_unwind(AssertUnwindSafe(|| copier.feed(inbox, landed, stall)));
    let first = copier.in_flight.front().and_then(|(_, filled)| filled.landing.first().copied());
    let stalled = matches!(&outcome, Ok(Err(error)) if error.kind() == ErrorKind::Stalled);
    if !matches!(outcome, Ok(Ok(()))) && (stalled || !copier.queue.settle(stall)) {
        landed.abandoned(copier.in_flight.len());
        copier.abandon();
    }
    let outcome = outcome.unwrap_or_else(|payload| resume_unwind(payload));
    outcome.map_err(|error| CopyError { error, landing: first })
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
}

impl Copier {
    fn feed(&mut self, inbox: &Receiver<Filled>, landed: &dyn Landed, stall: Duration) -> Result<()> {
        loop {
            match self.next(inbox, landed) {
                Inbox::Filled(filled) if landed.stopped() => drop(filled),
                Inbox::Filled(filled) => self.submit(filled)?,
                Inbox::Closed if self.in_flight.is_empty() => return Ok(()),
                Inbox::Empty => {}
                // There is nothing else to wait for.
                Inbox::Closed => self.reap(landed, limits::COPY_POLL, stall)?,
            }
            // Whoever is awake looks: it costs less than to wake for it.
            if !self.in_flight.is_empty() {
                self.reap(landed, Duration::ZERO, stall)?;
            }
        }
    }

    /// The next filled slot, waiting for one: while there are copies, only until about half of them should be done, for
    /// slots are needed back in time and not one by one.
    fn next(&mut self, inbox: &Receiver<Filled>, landed: &dyn Landed) -> Inbox {
        let began = Instant::now();
        let in_flight = self.in_flight.len() as u32;
        let patience = match in_flight {
            0 => limits::LOOK_AGAIN,
            _ => (self.pace * in_flight.div_ceil(2)).clamp(limits::COPY_POLL, limits::COPY_POLL_MAX),
        };
        let received = inbox.recv_timeout(patience);
        if in_flight == 0 {
            landed.spent(Duration::ZERO, began.elapsed());
            self.progress = Instant::now();
        } else {
            landed.spent(began.elapsed(), Duration::ZERO);
        }
        match received {
            Ok(filled) => Inbox::Filled(filled),
            Err(RecvTimeoutError::Timeout) => Inbox::Empty,
            Err(RecvTimeoutError::Disconnected) => Inbox::Closed,
        }
    }

    fn submit(&mut self, mut filled: Filled) -> Result<()> {
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

    /// Reports the copies that are done, waiting for some for at most `bound`.
    fn reap(&mut self, landed: &dyn Landed, bound: Duration, stall: Duration) -> Result<()> {
        let began = Instant::now();
        let done = self.queue.wait(bound)?;
        let mut count = 0;
        while let Some((_, filled)) = self.in_flight.pop_front_if(|(ticket, _)| *ticket <= done) {
            filled.landing.iter().for_each(|&landing| landed.landed(landing));
            count += 1;
        }
        let now = Instant::now();
        if count > 0 {
            self.pace = (self.pace * 3 + (now - self.progress) / count) / 4;
            self.progress = now;
        }
        landed.spent(now - began, Duration::ZERO);
        if !self.in_flight.is_empty() && self.progress.elapsed() > stall {
            return Err(Error::new(ErrorKind::Stalled, format!("no copy completed for {stall:?}")));
        }
        Ok(())
    }

    /// Keeps what the device may still use for ever.
    #[expect(clippy::mem_forget, reason = "a stalled device may still read these slots: freeing them is worse")]
    fn abandon(self) {
        std::mem::forget(self);
    }
}

enum Inbox {
    Filled(Filled),
    Empty,
    Closed,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{self, Sender};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::stage::{Lend, Ring};

    /// A device under the test's control: copies are done when the test says so.
    struct Slow {
        submitted: u64,
        tell: Sender<u64>,
        done: Receiver<Result<u64>>,
        finished: u64,
        settles: bool,
        dropped: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Queue for Slow {
        unsafe fn submit(&mut self, _: Vec<Op>) -> Result<u64> {
            self.submitted += 1;
            let _ = self.tell.send(self.submitted);
            Ok(self.submitted)
        }

        fn wait(&mut self, bound: Duration) -> Result<u64> {
            if let Ok(done) = self.done.recv_timeout(bound) {
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
    }

    impl Landed for Seen {
        fn landed(&self, landing: Landing) {
            self.landed.lock().unwrap().push(landing.dest);
        }
        fn spent(&self, _: Duration, _: Duration) {}
        fn stopped(&self) -> bool {
            false
        }
        fn abandoned(&self, slots: usize) {
            self.abandoned.store(slots, Ordering::Relaxed);
        }
    }

    struct Rig {
        ring: Ring,
        inbox: Option<Sender<Filled>>,
        submitted: Receiver<u64>,
        done: Sender<Result<u64>>,
        seen: Arc<Seen>,
        dropped: Arc<Mutex<Vec<&'static str>>>,
        thread: std::thread::JoinHandle<Result<(), CopyError>>,
    }

    /// A copier on a thread of its own, and a ring of two slots.
    fn rig(stall: Duration, settles: bool) -> Rig {
        let (inbox, filled) = mpsc::channel();
        let (tell, submitted) = mpsc::channel();
        let (done, told) = mpsc::channel();
        let (seen, dropped) = (Arc::new(Seen::default()), Arc::default());
        let queue = Slow { submitted: 0, tell, done: told, finished: 0, settles, dropped: Arc::clone(&dropped) };
        let landed = Arc::clone(&seen);
        let thread = std::thread::spawn(move || run(Box::new(queue), &filled, &*landed, stall));
        Rig { ring: Ring::new(8192, 4096), inbox: Some(inbox), submitted, done, seen, dropped, thread }
    }

    impl Rig {
        fn send(&self, dest: u32) {
            let staged = self.ring.try_lend(Lend::Any).unwrap().unwrap().stage();
            let landing = vec![Landing { rank: Rank(0), dest, bytes: 1 }];
            self.inbox.as_ref().unwrap().send(Filled { staged, ops: Vec::new(), landing }).unwrap();
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_slot_is_free_only_after_its_copies() {
        let mut rig = rig(LONG, true);
        rig.send(1);
        rig.send(2);
        assert_eq!((rig.submitted.recv().unwrap(), rig.submitted.recv().unwrap()), (1, 2));
        assert!(rig.ring.try_lend(Lend::Any).unwrap().is_none(), "both are in flight");
        assert!(rig.seen.landed.lock().unwrap().is_empty());
        rig.done.send(Ok(1)).unwrap();
        rig.ring.wait(Lend::Any, LONG, || false);
        assert_eq!(*rig.seen.landed.lock().unwrap(), [1]);
        let again = rig.ring.try_lend(Lend::Any).unwrap().expect("the first slot is back");
        assert!(rig.ring.try_lend(Lend::Any).unwrap().is_none(), "the second is not");
        drop(again);
        rig.inbox = None;
        rig.done.send(Ok(2)).unwrap();
        rig.thread.join().unwrap().unwrap();
        assert_eq!(*rig.seen.landed.lock().unwrap(), [1, 2]);
    }

    #[test]
    fn a_failed_copy_ends_the_queue_before_its_slots_go_back() {
        let rig = rig(LONG, true);
        rig.send(1);
        rig.submitted.recv().unwrap();
        rig.done.send(Err(Error::new(ErrorKind::Device, "of the test"))).unwrap();
        assert_eq!(rig.thread.join().unwrap().unwrap_err().error.kind(), ErrorKind::Device);
        assert_eq!(*rig.dropped.lock().unwrap(), ["queue"]);
        assert!(rig.seen.landed.lock().unwrap().is_empty());
        assert_eq!([(); 2].map(|()| rig.ring.try_lend(Lend::Any).unwrap().unwrap()).len(), 2);
    }

    #[test]
    fn what_a_stalled_device_may_still_use_is_kept() {
        let rig = rig(Duration::from_millis(20), true);
        rig.send(1);
        assert_eq!(rig.thread.join().unwrap().unwrap_err().error.kind(), ErrorKind::Stalled);
        assert!(rig.dropped.lock().unwrap().is_empty(), "the queue lives");
        assert_eq!(rig.seen.abandoned.load(Ordering::Relaxed), 1);
        let free = rig.ring.try_lend(Lend::Any).unwrap();
        assert!(
            free.is_some() && rig.ring.try_lend(Lend::Any).unwrap().is_none(),
            "the slot in flight is gone for ever"
        );
    }

    #[test]
    fn a_failed_copy_does_not_wait_for_ever_for_the_others() {
        let rig = rig(LONG, false);
        rig.send(1);
        rig.send(2);
        assert_eq!((rig.submitted.recv().unwrap(), rig.submitted.recv().unwrap()), (1, 2));
        rig.done.send(Err(Error::new(ErrorKind::Device, "of the test"))).unwrap();
        assert_eq!(rig.thread.join().unwrap().unwrap_err().error.kind(), ErrorKind::Device);
        assert!(rig.dropped.lock().unwrap().is_empty(), "the queue lives");
        assert_eq!(rig.seen.abandoned.load(Ordering::Relaxed), 2);
        assert!(rig.ring.try_lend(Lend::Any).unwrap().is_none());
    }
}
