//! What is under way on one queue.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::{CopyError, Filled, Landing};
use crate::device::Queue;
use crate::error::{Error, Result};
use crate::limits;

/// What is done. Without an allocation if they are few, as they are: how many a look finds is chance.
pub(super) type Done = SmallVec<[Filled; 4]>;

/// A queue and the slots that its copies read from. A slot is in the list before its copies are submitted, and leaves
/// it only when they are done (design invariant 7).
pub(super) struct Copier {
    // Before the slots: dropping the queue ends its copies, and only then may the slots go back.
    pub(super) queue: Box<dyn Queue>,
    pub(super) in_flight: VecDeque<(u64, Filled)>,
    /// How many of these, at the end, were submitted after the last mark of the queue.
    unmarked: usize,
    /// How many were submitted since somebody asked which are done.
    unasked: usize,
    /// When somebody asked last.
    asked: Instant,
    /// When a copy last completed, or there was none to wait for.
    progress: Instant,
    /// How long after each other slots complete, about.
    pace: Duration,
    /// Since when it is: the queue refused something, or panicked.
    pub(super) failed: Option<Instant>,
}

impl Copier {
    pub(super) fn new(queue: Box<dyn Queue>) -> Copier {
        Copier {
            queue,
            in_flight: VecDeque::new(),
            unmarked: 0,
            unasked: 0,
            asked: Instant::now(),
            progress: Instant::now(),
            pace: limits::COPY_POLL,
            failed: None,
        }
    }

    /// What was under way first.
    pub(super) fn first(&self) -> Option<Landing> {
        self.in_flight.front().and_then(|(_, filled)| filled.landing.first().copied())
    }

    /// Remembers a failure, which a panic is too, and what was under way first.
    pub(super) fn guarded<T>(&mut self, body: impl FnOnce(&mut Copier) -> Result<T>) -> Result<T, CopyError> {
        let outcome =
            catch_unwind(AssertUnwindSafe(|| body(self))).unwrap_or_else(|payload| Err(Error::panicked(payload)));
        outcome.map_err(|error| {
            self.failed.get_or_insert_with(Instant::now);
            CopyError { error, landing: self.first() }
        })
    }

    /// Queues what a device takes from a slot, whose end can be asked for when `most` have come since that was so last;
    /// that of the very first at once.
    pub(super) fn submit(&mut self, mut filled: Filled, most: usize) -> Result<()> {
        let (ops, from) = (std::mem::take(&mut filled.ops), filled.staged.home());
        let was_idle = self.in_flight.is_empty();
        self.in_flight.push_back((u64::MAX, filled));
        // SAFETY: the slot is in `in_flight` until its ticket is done, so nobody writes to it; the plan's audit proved
        // that no other copy names these destination bytes, which the load keeps alive.
        let ticket = unsafe { self.queue.submit(ops, from)? };
        self.in_flight.back_mut().expect("bug in shardlift: pushed above").0 = ticket;
        if was_idle {
            // Submitting may have taken long: a driver compiles kernels when they are first used.
            self.progress = Instant::now();
        }
        self.unmarked += 1;
        self.unasked += 1;
        if self.unmarked >= most || ticket == 1 { self.mark() } else { Ok(()) }
    }

    fn mark(&mut self) -> Result<()> {
        if self.unmarked > 0 {
            self.queue.mark()?;
            self.unmarked = 0;
        }
        Ok(())
    }

    /// Takes out what is done, if `least` were submitted since this was asked last.
    pub(super) fn reap_after(&mut self, least: usize) -> Result<Done, CopyError> {
        // What is not marked is not known to be done.
        if self.unasked < least || self.in_flight.len() == self.unmarked {
            return Ok(Done::new());
        }
        self.reap()
    }

    /// Takes out what is done; of what is not marked, too, if nothing else comes or is under way, or it waits for long.
    pub(super) fn reap_all(&mut self, fed: bool, group: usize) -> Result<Done, CopyError> {
        if self.failed.is_some() || self.in_flight.is_empty() {
            return Ok(Done::new());
        }
        if fed || self.in_flight.len() == self.unmarked || self.is_late(group) {
            self.guarded(Copier::mark)?;
        }
        self.reap()
    }

    /// Whether nobody has asked for longer than a tensor may wait, or a group takes.
    pub(super) fn is_late(&self, group: usize) -> bool {
        self.asked.elapsed() >= limits::COPY_TICK.max(self.pace * group as u32)
    }

    fn reap(&mut self) -> Result<Done, CopyError> {
        self.unasked = 0;
        self.asked = Instant::now();
        let finished = self.guarded(|copier| copier.queue.finished())?;
        let mut filled = Done::new();
        while let Some((_, done)) = self.in_flight.pop_front_if(|(ticket, _)| *ticket <= finished) {
            filled.push(done);
        }
        if !filled.is_empty() {
            let each = self.progress.elapsed() / filled.len() as u32;
            self.pace = (self.pace * 3 + each) / 4;
            self.progress = Instant::now();
        }
        Ok(filled)
    }

    pub(super) fn stalls(&self, stall: Duration) -> bool {
        !self.in_flight.is_empty() && self.progress.elapsed() > stall
    }

    /// How soon about half of what is under way should be done, if anything is; but not for long, since that is a guess.
    pub(super) fn half(&self, group: usize) -> Option<Duration> {
        let half = self.pace * self.in_flight.len() as u32 / 2;
        let most = limits::COPY_POLL_MAX.max(self.pace * group as u32);
        (!self.in_flight.is_empty()).then_some(half.min(most))
    }

    /// Keeps what the device may still use for ever.
    #[expect(clippy::mem_forget, reason = "a stalled device may still read these slots: freeing them is worse")]
    pub(super) fn abandon(self) {
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
