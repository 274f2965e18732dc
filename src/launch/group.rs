//! All ranks, connected: what a process does with the others.

use std::hash::{BuildHasher, RandomState};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::failure::Failure;
use super::rendezvous::Place;
use super::shared::{Kind, Offer, Shared};
use super::{Launch, hub, member};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::sync::lock;

/// How long ranks wait for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupOptions {
    /// For the others to arrive, when they join and at each exchange.
    pub join_timeout: Duration,
    /// Until every rank knows of a failure, from when it happened. The same on all ranks.
    pub fail_timeout: Duration,
}

impl Default for GroupOptions {
    fn default() -> GroupOptions {
        GroupOptions { join_timeout: limits::JOIN_TIMEOUT, fail_timeout: limits::FAIL_TIMEOUT }
    }
}

/// All ranks of a launch, connected. A thread that does nothing else says that this rank lives and hears of the others: if
/// one fails, is killed, is stopped or falls silent, all others know within [`GroupOptions::fail_timeout`].
///
/// The first failure is the group's, for good: whatever is called after it returns it. Dropping a group that has neither
/// [finished](Group::finish) nor failed makes it fail for the others.
#[derive(Debug)]
pub struct Group {
    shared: Arc<Shared>,
    size: u32,
    node: String,
    join_timeout: Duration,
    fail_timeout: Duration,
    /// The number of the next step; held while one is under way.
    turn: Mutex<u32>,
    /// None for a group of one, which has nobody to hear of.
    control: Option<JoinHandle<()>>,
}

/// What the control thread has to know.
#[derive(Debug)]
pub(super) struct Membership {
    pub(super) place: Place,
    pub(super) session: String,
    pub(super) rank: Rank,
    pub(super) size: u32,
    pub(super) node: String,
    /// Whether all ranks are known to be on this node.
    pub(super) one_node: bool,
    /// Of this attempt to join.
    pub(super) nonce: u64,
    pub(super) join_timeout: Duration,
    pub(super) fail_timeout: Duration,
    pub(super) started: Instant,
}

impl Group {
    /// Waits until all ranks are there.
    ///
    /// # Errors
    /// [`ErrorKind::Peer`] if some do not come in time, naming them, or go away again; [`ErrorKind::Usage`] where the launch does
    /// not say where the ranks meet, or ranks disagree; [`ErrorKind::Io`] if rank 0 cannot listen there.
    pub fn join(launch: &Launch, options: &GroupOptions) -> Result<Group> {
        Group::join_unless(launch, options, &|| false)
    }

    /// As [`join`](Group::join), but asks again and again, from this thread, whether the wait was cancelled.
    ///
    /// # Errors
    /// As [`join`](Group::join), and [`ErrorKind::Cancelled`].
    pub fn join_unless(launch: &Launch, options: &GroupOptions, is_cancelled: &dyn Fn() -> bool) -> Result<Group> {
        let &GroupOptions { join_timeout, fail_timeout } = options;
        for (name, timeout) in [("join timeout", join_timeout), ("fail timeout", fail_timeout)] {
            if !(limits::TIMEOUT_MIN..=limits::TIMEOUT_MAX).contains(&timeout) {
                let bounds = format!("{:?} to {:?}", limits::TIMEOUT_MIN, limits::TIMEOUT_MAX);
                return Err(
                    Error::new(ErrorKind::Usage, format!("no {name}")).with_expected(bounds, format!("{timeout:?}"))
                );
            }
        }
        let system = |error: std::io::Error| {
            Error::new(ErrorKind::Io, format!("cannot make what a group needs: {error}")).with_source(error)
        };
        let (ring, bell) = UnixStream::pair().map_err(system)?;
        ring.set_nonblocking(true).and_then(|()| bell.set_nonblocking(true)).map_err(system)?;
        let shared = Arc::new(Shared::new(launch.rank(), ring));
        let mut group = Group {
            shared,
            size: launch.size(),
            node: launch.node().into(),
            join_timeout,
            fail_timeout,
            turn: Mutex::new(0),
            control: None,
        };
        if launch.size() == 1 {
            return Ok(group);
        }
        let (place, session) = Place::of(launch)?;
        let membership = Membership {
            place,
            session,
            rank: launch.rank(),
            size: launch.size(),
            node: launch.node().into(),
            one_node: launch.is_one_node(),
            nonce: RandomState::new().hash_one((std::process::id(), launch.rank())),
            join_timeout,
            fail_timeout,
            started: Instant::now(),
        };
        let until = membership.started + join_timeout + fail_timeout;
        let shared = Arc::clone(&group.shared);
        let control = thread::Builder::new().name("shardlift-group".into()).spawn(move || {
            let speak = if membership.rank == Rank(0) { hub::run } else { member::run };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| speak(&shared, &bell, &membership))) {
                shared.fail(Failure::said(&Error::panicked(panic), membership.rank));
            }
            shared.change(|state| state.ended = true);
        });
        group.control = Some(control.map_err(system)?);
        group.await_joined(until, is_cancelled)?;
        Ok(group)
    }

    fn await_joined(&self, until: Instant, is_cancelled: &dyn Fn() -> bool) -> Result<()> {
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.to_error(self.rank()));
            }
            if state.joined {
                return Ok(());
            }
            if Instant::now() >= until {
                // The thread is held up by the system, for instance by a name server.
                return Err(Error::new(ErrorKind::Peer, "joining the other ranks took too long").with_rank(self.rank()));
            }
            drop(state);
            if is_cancelled() {
                let cancelled = Error::new(ErrorKind::Cancelled, "cancelled while waiting for other ranks");
                self.fail(&cancelled);
                return Err(cancelled.with_rank(self.rank()));
            }
            state = self.shared.wait(self.shared.lock(), Some(until));
        }
    }

    /// The rank of this process.
    pub fn rank(&self) -> Rank {
        self.shared.rank
    }

    /// The number of ranks.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The node that this rank is on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// How soon all know of a failure.
    pub fn fail_timeout(&self) -> Duration {
        self.fail_timeout
    }

    /// Gives `part` to all ranks and returns those of all, in the order of ranks. All call it in the same order, and `what`
    /// says what it is about. Waits for the others as long as joining does; from several threads one after the other.
    ///
    /// # Errors
    /// The group's failure; it fails if ranks are at different points, which names them, or do not come in time.
    /// [`ErrorKind::Usage`] if `part` is larger than [`limits::EXCHANGE_PART`], or the group has finished.
    pub fn exchange(&self, what: &str, part: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        if part.len() > limits::EXCHANGE_PART {
            let message = format!("the part of {what:?} is too large");
            let error = Error::new(ErrorKind::Usage, message)
                .with_expected(format!("at most {} bytes", limits::EXCHANGE_PART), part.len());
            self.fail(&error);
            return Err(error.with_rank(self.rank()));
        }
        let what = what[..what.floor_char_boundary(limits::CONTROL_TEXT)].to_owned();
        self.step(what, part, Kind::Exchange)
    }

    /// Waits until all ranks have come here, for as long as they live: the slowest may have much to do before.
    ///
    /// # Errors
    /// The group's failure; it fails if ranks are at different points, which names them.
    pub fn await_all(&self, what: &str) -> Result<()> {
        let what = what[..what.floor_char_boundary(limits::CONTROL_TEXT)].to_owned();
        self.step(what, Vec::new(), Kind::Barrier).map(drop)
    }

    /// Tells everybody that this rank has failed, of what and where. Unless the group has failed before, this is its failure;
    /// one that is [`ErrorKind::Cancelled`] cancels all ranks. After [`finish`](Group::finish) returned it does nothing.
    pub fn fail(&self, error: &Error) {
        self.failing(error)();
    }

    /// What [`fail`](Group::fail) does, for when nothing is locked any more: it wakes others on this thread.
    pub(crate) fn failing(&self, error: &Error) -> impl FnOnce() + use<'_> {
        let failure = Failure::said(error, self.rank());
        move || match self.control {
            Some(_) => self.shared.tell(failure),
            None => self.shared.fail(failure),
        }
    }

    /// The failure of the group: what a rank said of itself, this one included, or that one is gone or silent. The error names
    /// the rank. Costs a load of an atomic while there is none.
    pub fn failure(&self) -> Option<Error> {
        self.shared.failure()
    }

    /// Wakes `waker` when the group fails, now if it has: from another thread, which should not be held up.
    pub fn wake_on_failure(&self, waker: Waker) {
        self.shared.wake_on_failure(waker);
    }

    /// Says that this rank is done, and waits until all have said so: `Ok` on one rank means that all are done, and as long as
    /// the others live it waits for the slowest.
    ///
    /// # Errors
    /// The group's failure; [`ErrorKind::Usage`] if it has finished before.
    pub fn finish(&self) -> Result<()> {
        self.step(String::new(), Vec::new(), Kind::End)?;
        // Rank 0 stays until the others know.
        let until = Instant::now() + self.fail_timeout;
        let mut state = self.shared.lock();
        while self.rank() == Rank(0)
            && !state.all_left
            && !state.ended
            && Instant::now() < until
            && self.control.is_some()
        {
            state = self.shared.wait(state, Some(until));
        }
        Ok(())
    }

    fn step(&self, what: String, part: Vec<u8>, kind: Kind) -> Result<Vec<Vec<u8>>> {
        let mut turn = lock(&self.turn);
        let step = *turn;
        let bound = || Instant::now() + self.join_timeout + self.fail_timeout;
        let until = (kind == Kind::Exchange).then(bound);
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.to_error(self.rank()));
        }
        if state.finished {
            return Err(Error::new(ErrorKind::Usage, "this group has finished"));
        }
        if self.control.is_none() {
            state.finished = kind == Kind::End;
            return Ok(vec![part]);
        }
        *turn = step.wrapping_add(1);
        state.offer = Some(Offer { step, kind, what, part });
        state.end_offered = kind == Kind::End;
        self.shared.ring();
        loop {
            if let Some((_, parts)) = state.gathered.take_if(|(gathered, _)| *gathered == step) {
                return Ok(parts);
            }
            if let Some(failure) = &state.failure {
                return Err(failure.to_error(self.rank()));
            }
            if state.ended || until.is_some_and(|until| Instant::now() >= until) {
                // Rank 0 judges who is late, and its silence is judged by the thread: both have failed to.
                let error = Error::new(ErrorKind::Peer, "waiting for other ranks took too long").with_rank(self.rank());
                drop(state);
                self.fail(&error);
                return Err(error);
            }
            state = self.shared.wait(state, until);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let Some(control) = self.control.take() else { return };
        self.shared.change(|state| state.stop = true);
        self.shared.ring();
        if control.thread().id() == thread::current().id() {
            return; // a waker had the last handle
        }
        let until = Instant::now() + 2 * limits::LEAVE;
        let mut state = self.shared.lock();
        while !state.ended && Instant::now() < until {
            state = self.shared.wait(state, Some(until));
        }
        let ended = state.ended;
        drop(state);
        if ended {
            // It caught its panics.
            let _ = control.join();
        } // else the system holds it up, while looking for a host; it ends by itself after that
    }
}
