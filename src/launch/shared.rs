//! What the threads that use a group share with the one that speaks for it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::failure::Failure;
use crate::error::Error;
use crate::extent::Rank;
use crate::limits;
use crate::sync::lock;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: Rank,
    state: Mutex<State>,
    changed: Condvar,
    /// `state.failure.is_some()`, for those who ask often.
    failed: AtomicBool,
    /// Wakes the control thread.
    bell: UnixStream,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) joined: bool,
    /// The first failure, for good.
    pub(super) failure: Option<Failure>,
    /// What this rank has to say of itself.
    pub(super) to_tell: Option<Failure>,
    /// This rank's part of the next step, until the control thread takes it.
    pub(super) offer: Option<Offer>,
    /// This rank said that it is done: what counts from now on is what the hub decides.
    pub(super) end_offered: bool,
    /// The parts of the step that was completed last, until they are taken.
    pub(super) gathered: Option<(u32, Vec<Vec<u8>>)>,
    /// All ranks said that they are done. Nothing fails any more.
    pub(super) finished: bool,
    /// All others have left after that.
    pub(super) all_left: bool,
    /// The control thread should say its last words and end.
    pub(super) stop: bool,
    /// It has ended.
    pub(super) ended: bool,
    wakers: Vec<Waker>,
}

/// What ranks do in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// They give each other their parts, and come soon or not at all.
    Exchange,
    /// They wait for the slowest, which takes as long as its work does.
    Barrier,
    /// The same, as the last step of all.
    End,
}

/// One rank's part of a step.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) step: u32,
    pub(super) kind: Kind,
    pub(super) what: String,
    pub(super) part: Vec<u8>,
}

impl Shared {
    pub(super) fn new(rank: Rank, bell: UnixStream) -> Shared {
        Shared { rank, state: Mutex::default(), changed: Condvar::new(), failed: AtomicBool::new(false), bell }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Changes the state and wakes those who wait for that.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Waits for a change, but not for long, and not beyond this moment.
    pub(super) fn wait<'a>(&'a self, state: MutexGuard<'a, State>, until: Option<Instant>) -> MutexGuard<'a, State> {
        let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
        let waited = self.changed.wait_timeout(state, left.min(limits::LOOK_AGAIN));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes the control thread.
    pub(super) fn ring(&self) {
        // A full pipe wakes as well as one more byte, and without a reader nobody has to be woken.
        let _ = (&self.bell).write(&[0]);
    }

    /// The group has failed, unless it has already, or has finished.
    pub(super) fn fail(&self, failure: Failure) {
        let wakers = self.change(|state| {
            if state.failure.is_some() || state.finished {
                return Vec::new();
            }
            state.failure = Some(failure);
            self.failed.store(true, Ordering::Release);
            std::mem::take(&mut state.wakers)
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    /// This rank has failed. Where it has said before that it is done, the hub decides which came first.
    pub(super) fn tell(&self, failure: Failure) {
        let decided_here = self.change(|state| {
            if state.failure.is_none() && !state.finished {
                state.to_tell.get_or_insert_with(|| failure.clone());
            }
            !state.end_offered
        });
        if decided_here {
            self.fail(failure);
        }
        self.ring();
    }

    /// All ranks said that they are done; false if the group failed before.
    pub(super) fn finish(&self) -> bool {
        self.change(|state| {
            state.finished |= state.failure.is_none();
            state.finished
        })
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The failure, as this rank returns it.
    pub(super) fn failure(&self) -> Option<Error> {
        if !self.has_failed() {
            return None;
        }
        self.lock().failure.as_ref().map(|failure| failure.to_error(self.rank))
    }

    /// Wakes this waker at the first failure, or now if that was before.
    pub(super) fn wake_on_failure(&self, waker: Waker) {
        let now = {
            let mut state = self.lock();
            if state.failure.is_some() {
                Some(waker)
            } else {
                state.wakers.push(waker);
                None
            }
        };
        if let Some(waker) = now {
            waker.wake();
        }
    }
}
