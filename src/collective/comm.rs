//! Communicators: how ranks meet, move bytes, and part, or are torn apart.
//!
//! A communicator's calls return at once and are asked for how they went, until they are done, the deadline has passed, or
//! whoever waits is told to stop. So no call of NCCL is waited for without a bound. After an error it is to be aborted, and not
//! before the other ranks were told why: they may see an abort as an error of their own, or NCCL may wait for theirs.

use std::fmt;
use std::marker::PhantomData;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread;
use std::time::Instant;

use super::nccl::{Failure, Kind, Nccl, Operation, Progress, RawComm, Status, UniqueId};
use crate::device::Cuda;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::sync::lock;

/// How long a call is waited for.
#[derive(Clone, Copy)]
pub(crate) struct Wait<'a> {
    /// When it fails for want of an answer.
    pub(crate) deadline: Instant,
    /// Is asked again and again; its error ends the wait.
    pub(crate) stop: &'a dyn Fn() -> Result<()>,
}

impl fmt::Debug for Wait<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// One rank of a communicator. Operations are for one thread at a time (`&mut`); [aborting](Aborter) is for any.
///
/// After an error of any call the communicator is of no use, and [to be aborted](Comm::abort): then what it had under way is over
/// or, if even aborting failed, may still touch its memory. Dropping it aborts, too.
#[derive(Debug)]
pub(crate) struct Comm {
    shared: Arc<Shared>,
    /// How the call went that began it, until the ranks have met.
    begun: Status<Progress>,
    failed: bool,
    #[cfg(test)]
    size: u32,
}

/// Aborts a communicator from any thread, whatever other threads wait for.
#[derive(Debug, Clone)]
pub(crate) struct Aborter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    nccl: Nccl,
    device: Cuda,
    rank: Rank,
    /// Each call is made under this lock, and none of them waits.
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Live {
        handle: Handle,
        group: Grouping,
    },
    /// Nobody may name it any more: given back, or being aborted.
    Gone {
        settled: bool,
    },
}

impl State {
    fn take(&mut self) -> Option<Handle> {
        match *self {
            State::Live { handle, .. } => {
                *self = State::Gone { settled: false };
                Some(handle)
            }
            State::Gone { .. } => None,
        }
    }

    /// Whether it may be taken away to be aborted.
    fn can_be_aborted(&self) -> bool {
        match *self {
            State::Live { group: Grouping::Collecting, .. } => false,
            State::Live { group: Grouping::Ending(since), .. } => since.elapsed() > limits::NCCL_ENTERED,
            State::Live { group: Grouping::No, .. } | State::Gone { .. } => true,
        }
    }
}

/// What a thread has in `ncclGroupEnd`'s way: that names the communicator once more, and no lock is held meanwhile.
#[derive(Debug, Clone, Copy)]
enum Grouping {
    No,
    Collecting,
    /// It has called it since.
    Ending(Instant),
}

#[derive(Debug, Clone, Copy)]
struct Handle(RawComm);

// SAFETY: NCCL's handles may be used from every thread, one at a time: that is what the lock is for.
unsafe impl Send for Handle {}

impl Comm {
    /// Meets the other ranks, each on its own device, which all have the same id.
    ///
    /// # Errors
    /// As NCCL says; [`ErrorKind::Stalled`] if they have not all come by the deadline; what `wait.stop` says.
    pub(crate) fn meet(
        nccl: Nccl,
        device: &Cuda,
        id: UniqueId,
        rank: Rank,
        size: u32,
        wait: &Wait<'_>,
    ) -> Result<Comm> {
        let mut comm = Comm::begin(nccl, device, id, rank, size)?;
        comm.met(wait)?;
        Ok(comm)
    }

    /// Begins to [meet](Comm::meet) the other ranks; it has not before [`met`](Comm::met) is `Ok`.
    ///
    /// # Errors
    /// NCCL refused, and there is no communicator.
    pub(crate) fn begin(nccl: Nccl, device: &Cuda, id: UniqueId, rank: Rank, size: u32) -> Result<Comm> {
        let mut raw: RawComm = std::ptr::null_mut();
        let begun = {
            let _entered = device.enter()?;
            // SAFETY: the device's context is current.
            unsafe { nccl.init(&mut raw, size, id, rank.0) }
        };
        if raw.is_null() {
            let refused = begun.err().map(Error::from);
            let nothing = || Error::new(ErrorKind::Device, "ncclCommInitRankConfig made no communicator");
            return Err(refused.unwrap_or_else(nothing).with_rank(rank));
        }
        let state = Mutex::new(State::Live { handle: Handle(raw), group: Grouping::No });
        let shared = Arc::new(Shared { nccl, device: device.clone(), rank, state });
        Ok(Comm {
            shared,
            begun,
            failed: false,
            #[cfg(test)]
            size,
        })
    }

    /// Waits until all ranks have met.
    ///
    /// # Errors
    /// As for [`meet`](Comm::meet).
    pub(crate) fn met(&mut self, wait: &Wait<'_>) -> Result<()> {
        let begun = std::mem::replace(&mut self.begun, Ok(Progress::Done));
        self.settle("ncclCommInitRankConfig", begun, wait)
    }

    /// Whether NCCL failed, or did not answer in time: which may be what another rank's failure looks like from here.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }

    /// This rank.
    #[cfg(test)]
    pub(crate) fn rank(&self) -> Rank {
        self.shared.rank
    }

    /// How many ranks there are.
    #[cfg(test)]
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// What aborts it from another thread.
    pub(crate) fn aborter(&self) -> Aborter {
        Aborter { shared: Arc::clone(&self.shared) }
    }

    /// Queues on `stream` (a number: a handle of the driver's) that `bytes` bytes go from `from` of `root` to `to` of all.
    /// Only the root's `from` is looked at; it may be `to`.
    ///
    /// # Safety
    /// Until what is queued has run, or the communicator was aborted and the stream has gone on:
    /// - the memory is of this rank's device; what is sent is not written, what is received is not touched by others;
    /// - the stream is one of the device's primary context, and live.
    pub(crate) unsafe fn broadcast(
        &mut self,
        root: Rank,
        [from, to]: [u64; 2],
        bytes: usize,
        stream: usize,
        wait: &Wait<'_>,
    ) -> Result<()> {
        let operation = Operation { kind: Kind::Broadcast { root: root.0 }, from, to, bytes };
        // SAFETY: the caller's duties.
        unsafe { self.alone(operation, stream, wait) }
    }

    /// Queues that `bytes` bytes at `from` of each rank go to `to` of all, one rank's after the other's. `from` may be where
    /// they land.
    ///
    /// # Safety
    /// As for [`broadcast`](Comm::broadcast); `to` has room for all of them.
    pub(crate) unsafe fn all_gather(
        &mut self,
        [from, to]: [u64; 2],
        bytes: usize,
        stream: usize,
        wait: &Wait<'_>,
    ) -> Result<()> {
        // SAFETY: the caller's duties.
        unsafe { self.alone(Operation { kind: Kind::AllGather, from, to, bytes }, stream, wait) }
    }

    /// Queues a message. The stream waits until it is taken: where both sides send first, nobody goes on without a
    /// [group](Comm::grouped).
    ///
    /// # Safety
    /// As for [`broadcast`](Comm::broadcast).
    #[cfg(test)]
    pub(crate) unsafe fn send(
        &mut self,
        peer: Rank,
        from: u64,
        bytes: usize,
        stream: usize,
        wait: &Wait<'_>,
    ) -> Result<()> {
        let operation = Operation { kind: Kind::Send { to: peer.0 }, from, to: 0, bytes };
        // SAFETY: the caller's duties.
        unsafe { self.alone(operation, stream, wait) }
    }

    /// Queues that a message is taken.
    ///
    /// # Safety
    /// As for [`broadcast`](Comm::broadcast).
    #[cfg(test)]
    pub(crate) unsafe fn recv(
        &mut self,
        peer: Rank,
        to: u64,
        bytes: usize,
        stream: usize,
        wait: &Wait<'_>,
    ) -> Result<()> {
        let operation = Operation { kind: Kind::Recv { from: peer.0 }, from: 0, to, bytes };
        // SAFETY: the caller's duties.
        unsafe { self.alone(operation, stream, wait) }
    }

    /// Queues what `body` asks the group for, as one operation of one stream: no order of messages within can block. If
    /// `body` fails, the group ends all the same, and the communicator is of no use.
    ///
    /// # Safety
    /// As for [`broadcast`](Comm::broadcast), for each operation of the group.
    pub(crate) unsafe fn grouped(
        &mut self,
        stream: usize,
        wait: &Wait<'_>,
        body: impl FnOnce(&mut Group<'_>) -> Result<()>,
    ) -> Result<()> {
        let nccl = self.shared.nccl;
        let entered = self.shared.device.enter()?;
        self.shared.group(Grouping::Collecting)?;
        if let Err(failure) = nccl.group_start() {
            self.shared.group(Grouping::No)?;
            return self.failed(failure);
        }
        let mut group = Group { shared: &self.shared, stream, ended: false, _here: PhantomData };
        let asked = body(&mut group);
        let ended = group.end();
        drop(entered);
        if let Err(error) = asked {
            // What of it was launched nobody can say.
            self.failed = true;
            return Err(error);
        }
        self.settle("ncclGroupEnd", ended, wait)
    }

    /// Whether all is well as far as is known; to be asked while one waits for what is queued.
    ///
    /// # Errors
    /// What an operation came to, of this rank or, as far as NCCL notices, of another.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.shared.poll("an operation of NCCL")? {
            Ok(_) => Ok(()),
            Err(failure) => self.failed(failure),
        }
    }

    /// Ends well: all ranks do so, after all that was queued has run. Nothing is left to abort then.
    ///
    /// # Errors
    /// As for any call.
    pub(crate) fn finish(&mut self, wait: &Wait<'_>) -> Result<()> {
        // SAFETY: live, and the lock keeps others away; the context is current.
        let begun = self.shared.with(|nccl, raw| unsafe { nccl.finalize(raw) })?;
        self.settle("ncclCommFinalize", begun, wait)?;
        let Some(Handle(raw)) = self.shared.take() else { return Err(self.shared.gone()) };
        let _entered = self.shared.device.enter()?;
        // SAFETY: finalized, and nobody names it any more.
        let destroyed = unsafe { self.shared.nccl.destroy(raw) };
        self.shared.settled();
        destroyed.or_else(|failure| self.failed(failure))
    }

    /// As [`Aborter::abort`].
    pub(crate) fn abort(&self) -> Result<()> {
        self.shared.abort()
    }

    /// One operation that is no part of a group.
    ///
    /// # Safety
    /// As for [`broadcast`](Comm::broadcast).
    unsafe fn alone(&mut self, operation: Operation, stream: usize, wait: &Wait<'_>) -> Result<()> {
        // SAFETY: live, and the lock keeps others away; the context is current; the caller's duties.
        let begun = self.shared.with(|nccl, raw| unsafe { nccl.operation(raw, &operation, stream) })?;
        self.settle(operation.kind.call(), begun, wait)
    }

    /// Waits for the end of a call.
    fn settle(&mut self, call: &'static str, begun: Status<Progress>, wait: &Wait<'_>) -> Result<()> {
        let began = Instant::now();
        let mut pause = limits::NCCL_POLL_FIRST;
        let mut progress = begun;
        loop {
            match progress {
                Ok(Progress::Done) => return Ok(()),
                Ok(Progress::Pending) => {}
                Err(failure) => return self.failed(failure),
            }
            (wait.stop)()?;
            if Instant::now() >= wait.deadline {
                self.failed = true;
                let waited = began.elapsed().as_secs_f64();
                let error = Error::new(ErrorKind::Stalled, format!("{call} did not end within {waited:.1} s"));
                return Err(error.with_rank(self.shared.rank));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(limits::NCCL_POLL);
            progress = self.shared.poll(call)?;
        }
    }

    fn failed(&mut self, failure: Failure) -> Result<()> {
        self.failed = true;
        Err(self.shared.error(failure))
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if let Err(error) = self.shared.abort() {
            tracing::warn!("{error}");
        }
    }
}

impl Aborter {
    /// Ends the communicator and whatever it has under way; streams that waited for peers go on, without the bytes. Nothing
    /// if it is gone already. When this is `Ok`, nothing of it touches memory any more once its streams are idle.
    ///
    /// # Errors
    /// [`ErrorKind::Stalled`] if NCCL did not come back within [`limits::NCCL_ABORT`]: what the communicator works with is
    /// not to be touched again. Then, and if NCCL refuses, the next call fails likewise.
    pub(crate) fn abort(&self) -> Result<()> {
        self.shared.abort()
    }
}

impl Shared {
    /// Makes a call, if there still is a communicator.
    fn with<T>(&self, call: impl FnOnce(Nccl, RawComm) -> Status<T>) -> Result<Status<T>> {
        let _entered = self.device.enter()?;
        let state = lock(&self.state);
        match *state {
            State::Live { handle: Handle(raw), .. } => Ok(call(self.nccl, raw)),
            State::Gone { .. } => Err(self.gone()),
        }
    }

    /// Says how far this thread is with a group.
    fn group(&self, now: Grouping) -> Result<()> {
        match &mut *lock(&self.state) {
            State::Live { group, .. } => *group = now,
            State::Gone { .. } => return Err(self.gone()),
        }
        Ok(())
    }

    /// Ends a group.
    fn group_end(&self) -> Status<Progress> {
        // While it was collected nobody took it away.
        let _ = self.group(Grouping::Ending(Instant::now()));
        let ended = self.nccl.group_end();
        // Aborted meanwhile, if it is gone.
        let _ = self.group(Grouping::No);
        ended
    }

    /// How `call`, the last one, went so far.
    fn poll(&self, call: &'static str) -> Result<Status<Progress>> {
        // SAFETY: live, and the lock keeps others away.
        self.with(|nccl, raw| unsafe { nccl.poll(raw, call) })
    }

    /// Takes the handle away, so that nobody else names it.
    fn take(&self) -> Option<Handle> {
        lock(&self.state).take()
    }

    /// The same, unless somebody is in a call that does not come back.
    fn take_soon(&self) -> Result<Option<Handle>> {
        let began = Instant::now();
        loop {
            match self.state.try_lock() {
                Ok(mut state) if state.can_be_aborted() => return Ok(state.take()),
                Err(TryLockError::Poisoned(state)) => return Ok(state.into_inner().take()),
                Ok(_) | Err(TryLockError::WouldBlock) if began.elapsed() < limits::NCCL_ABORT => {
                    thread::sleep(limits::NCCL_POLL)
                }
                Ok(_) | Err(TryLockError::WouldBlock) => {
                    let seconds = limits::NCCL_ABORT.as_secs_f64();
                    let text = format!("another call of NCCL did not end within {seconds:.1} s");
                    return Err(Error::new(ErrorKind::Stalled, text).with_rank(self.rank));
                }
            }
        }
    }

    fn settled(&self) {
        *lock(&self.state) = State::Gone { settled: true };
    }

    /// On a thread of its own: NCCL's own waits have no bound.
    fn abort(&self) -> Result<()> {
        let Some(handle) = self.take_soon()? else { return self.wait_settled() };
        let (nccl, device) = (self.nccl, self.device.clone());
        let (told, tells) = mpsc::channel();
        let abort = move || {
            // The context is kept by `device`; if it cannot be entered, a GPU was lost, and NCCL is to see to that.
            let entered = device.enter();
            let Handle(raw) = { handle };
            // SAFETY: taken from its owner, so nobody names it any more; calls that were in it are over, but for an
            // `ncclGroupEnd` that does not come back, which an abort is for.
            let outcome = unsafe { nccl.abort(raw) };
            // Whoever is told may be the last to hold the device then.
            drop(entered);
            drop(device);
            let _ = told.send(outcome);
        };
        let thread = thread::Builder::new().name("shardlift-nccl-abort".into()).spawn(abort);
        if let Err(error) = thread {
            let text = format!("no thread to abort NCCL with: {error}");
            return Err(Error::new(ErrorKind::Device, text).with_rank(self.rank).with_source(error));
        }
        match tells.recv_timeout(limits::NCCL_ABORT) {
            Ok(outcome) => {
                self.settled();
                outcome.map_err(|failure| self.error(failure))
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(self.stuck()),
        }
    }

    /// Waits until whoever gives the communicator back has done so.
    fn wait_settled(&self) -> Result<()> {
        let began = Instant::now();
        while matches!(*lock(&self.state), State::Gone { settled: false }) {
            if began.elapsed() >= limits::NCCL_ABORT {
                return Err(self.stuck());
            }
            thread::sleep(limits::NCCL_POLL);
        }
        Ok(())
    }

    fn error(&self, failure: Failure) -> Error {
        Error::from(failure).with_rank(self.rank)
    }

    fn gone(&self) -> Error {
        Error::new(ErrorKind::Cancelled, "the communicator was aborted").with_rank(self.rank)
    }

    fn stuck(&self) -> Error {
        let seconds = limits::NCCL_ABORT.as_secs_f64();
        Error::new(ErrorKind::Stalled, format!("ncclCommAbort did not end within {seconds:.1} s")).with_rank(self.rank)
    }
}

/// Operations that are queued together, while `ncclGroupStart` is in force on this thread.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    shared: &'a Shared,
    stream: usize,
    ended: bool,
    /// What is collected is this thread's.
    _here: PhantomData<*const ()>,
}

impl Group<'_> {
    /// Sends a message.
    pub(crate) fn send(&mut self, peer: Rank, from: u64, bytes: usize) -> Result<()> {
        self.operation(Operation { kind: Kind::Send { to: peer.0 }, from, to: 0, bytes })
    }

    /// Takes a message.
    pub(crate) fn recv(&mut self, peer: Rank, to: u64, bytes: usize) -> Result<()> {
        self.operation(Operation { kind: Kind::Recv { from: peer.0 }, from: 0, to, bytes })
    }

    /// A broadcast, as [`Comm::broadcast`].
    pub(crate) fn broadcast(&mut self, root: Rank, [from, to]: [u64; 2], bytes: usize) -> Result<()> {
        self.operation(Operation { kind: Kind::Broadcast { root: root.0 }, from, to, bytes })
    }

    fn operation(&mut self, operation: Operation) -> Result<()> {
        let stream = self.stream;
        // SAFETY: live, and the lock keeps others away; the duties of `grouped`'s caller.
        let begun = self.shared.with(|nccl, raw| unsafe { nccl.operation(raw, &operation, stream) })?;
        begun.map(drop).map_err(|failure| self.shared.error(failure))
    }

    fn end(mut self) -> Status<Progress> {
        self.ended = true;
        self.shared.group_end()
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        // `body` panicked: the thread must not go on collecting.
        if !self.ended {
            let _ = self.shared.group_end();
        }
    }
}
