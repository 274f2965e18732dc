//! What a process exchanges with those of other ranks while it loads: what it read for several goes to the others, and
//! what they read comes back, round after round, in the order that the plan gives to all of them.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::Job;
use super::Peers;
use super::peers::Meeting;
use super::run::{keep_for_ever, spawn};
use crate::collective::{Aborter, Comm, Wait};
use crate::copy::{CopyError, Landed, Landing, Part, costs, lower};
use crate::device::{Arrived, Home, Op, RawCopy, Wire, WireSize, stay};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, Rank};
use crate::limits;
use crate::plan::{Exchange, Parcel, Received, Round};
use crate::stage::Staged;
use crate::sync::lock;

/// What a load keeps of its exchange.
#[derive(Debug)]
pub(super) struct Exchanging {
    meeting: Meeting,
    /// Reads for several ranks that were begun.
    begun: AtomicU64,
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    calls: Mutex<Calls>,
}

/// What the thread that exchanges calls NCCL with.
#[derive(Debug, Default)]
struct Calls {
    /// For others, until that thread needs no help any more.
    aborter: Option<Aborter>,
    /// When one of them used it.
    aborted: Option<Instant>,
    /// When it was found that even aborting does not end what NCCL has on the device: whoever gives memory of that device back
    /// waits for it.
    given_up: Option<Instant>,
}

/// Chunks that were read and wait for their round, by their number among those that this process reads.
#[derive(Debug, Default)]
struct Waiting {
    chunks: BTreeMap<u64, Chunk>,
    /// The exchange is over, and takes no more.
    over: bool,
}

/// What was read for one round.
#[derive(Debug)]
struct Chunk {
    staged: Staged,
    extent: Extent,
    /// Where in it the bytes begin that the round is about.
    offset: usize,
}

impl Exchanging {
    /// Nothing was read yet.
    pub(super) fn new(meeting: &Meeting) -> Exchanging {
        let (begun, waiting) = (AtomicU64::default(), Mutex::default());
        Exchanging { meeting: meeting.clone(), begun, waiting, arrived: Condvar::new(), calls: Mutex::default() }
    }

    /// Most bytes of a read for several ranks.
    pub(super) fn chunk(&self) -> u64 {
        self.meeting.chunk
    }

    /// The number of the next such read; taken in the plan's order.
    pub(super) fn begin(&self) -> u64 {
        self.begun.fetch_add(1, Ordering::Relaxed)
    }

    /// What read `number` brought, from `offset` of it on.
    pub(super) fn arrived(&self, number: u64, staged: Staged, extent: Extent, offset: usize) {
        let mut waiting = lock(&self.waiting);
        if !waiting.over {
            waiting.chunks.insert(number, Chunk { staged, extent, offset });
            self.arrived.notify_all();
        }
    }

    /// What read `number` brought, if it comes within `bound`.
    fn take(&self, number: u64, bound: Duration) -> Option<Chunk> {
        let mut waiting = lock(&self.waiting);
        if !waiting.chunks.contains_key(&number) {
            (waiting, _) = self.arrived.wait_timeout(waiting, bound).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.chunks.remove(&number)
    }

    /// Whether NCCL keeps the thread that exchanges, or those that give memory back, although the load stopped `since`. Before it
    /// says so it aborts the communicator from the caller's thread, which takes as long as that may.
    pub(super) fn is_stuck(&self, since: Instant) -> bool {
        let aborter = match &*lock(&self.calls) {
            Calls { given_up: Some(at), .. } => return (*at).max(since).elapsed() > NOTICED,
            Calls { aborted: Some(at), aborter: Some(_), .. } => return at.elapsed() > limits::NCCL_ABORT,
            Calls { aborter: Some(aborter), .. } if since.elapsed() > NOTICED => aborter.clone(),
            _ => return false,
        };
        if let Err(error) = aborter.abort() {
            tracing::warn!("{error}");
        }
        lock(&self.calls).aborted = Some(Instant::now());
        false
    }

    /// Takes no more, and lets go of what waits.
    fn end(&self) {
        let chunks = {
            let mut waiting = lock(&self.waiting);
            waiting.over = true;
            std::mem::take(&mut waiting.chunks)
        };
        drop(chunks);
    }
}

/// Starts the thread that exchanges, if the load has anything to.
pub(super) fn start(job: &Arc<Job>, alive: Sender<()>) -> Result<Option<JoinHandle<()>>> {
    if job.exchanging.is_none() {
        return Ok(None);
    }
    let job = Arc::clone(job);
    let body = move || {
        let exchanged = catch_unwind(AssertUnwindSafe(|| {
            let _stay = stay();
            exchange(&job)
        }));
        if let Err(error) = exchanged.unwrap_or_else(|payload| Err(Error::panicked(payload))) {
            job.fail(error);
        }
        job.exchanging.iter().for_each(Exchanging::end);
        drop(alive);
    };
    spawn("shardlift-exchange", body).map(Some)
}

/// Exchanges all that the plan has to be exchanged.
fn exchange(job: &Arc<Job>) -> Result<()> {
    let (Some(exchanging), Some(peers)) = (&job.exchanging, &job.setup.peers) else { return Ok(()) };
    let Some(rounds) = Exchange::new(&job.setup.plan, exchanging.chunk()) else { return Ok(()) };
    let members: Vec<Rank> = rounds.members().collect();
    let mut traffic = Traffic::begin(job, exchanging, members)?;
    let outcome = traffic.run(rounds);
    if let Err(error) = outcome {
        // Before anything ends: peers whose connections end with the communicator would tell of that, and not why; and where
        // NCCL waits for all to abort, this tells them to.
        job.fail(traffic.cause_of(error, peers));
        traffic.abort();
    }
    Ok(())
}

/// The rounds that are under way.
#[derive(Debug)]
struct Traffic<'a> {
    job: &'a Arc<Job>,
    exchanging: &'a Exchanging,
    /// Who takes part, in the order of the communicator.
    members: Vec<Rank>,
    // Before the wire: what it has queued on the wire's streams ends with it.
    comm: Comm,
    wire: Box<dyn Wire>,
    /// Oldest first.
    under_way: VecDeque<UnderWay>,
    /// Rounds that were begun, and those of them in which this process read.
    begun: usize,
    read: u64,
}

/// A round whose steps are queued.
#[derive(Debug)]
struct UnderWay {
    /// Which of the wire's buffers it has.
    at: usize,
    /// What it sends lies here, until it has landed on the device.
    staged: Option<Staged>,
    /// What is in place when it is done.
    landings: Vec<Landing>,
}

impl<'a> Traffic<'a> {
    /// Begins to meet the others.
    fn begin(job: &'a Arc<Job>, exchanging: &'a Exchanging, members: Vec<Rank>) -> Result<Traffic<'a>> {
        let (device, rank) = &job.devices[0];
        let unable = || Error::new(ErrorKind::Unsupported, format!("{} exchanges nothing with others", device.name()));
        let size = size(members.len(), exchanging.chunk(), job.setup.ring.slot_bytes());
        let wire = device.wire(size).map_err(|error| error.with_rank(*rank))?.ok_or_else(unable)?;
        let cuda = device.cuda().ok_or_else(unable)?;
        let Meeting { nccl, id, .. } = exchanging.meeting.clone();
        let comm = Comm::begin(nccl, cuda, id, position(&members, *rank), members.len() as u32)?;
        lock(&exchanging.calls).aborter = Some(comm.aborter());
        Ok(Traffic { job, exchanging, members, comm, wire, under_way: VecDeque::new(), begun: 0, read: 0 })
    }

    /// Meets the others, exchanges all that there is, and parts.
    fn run(&mut self, rounds: Exchange) -> Result<()> {
        let job = self.job;
        let stopped = || stop(job);
        self.comm.met(&wait(&stopped, job.setup.stall_error))?;
        self.all(rounds)?;
        self.comm.finish(&wait(&stopped, job.setup.stall_error * PATIENCE))?;
        *lock(&self.exchanging.calls) = Calls::default();
        Ok(())
    }

    /// What is to be told of an error: what failed at another rank, if that comes to be known soon. What a device says is seldom
    /// a consequence of it, what NCCL says often.
    fn cause_of(&self, error: Error, peers: &Peers) -> Error {
        if self.job.is_stopped() {
            return error; // the load knows more
        }
        let part = if self.comm.has_failed() { CAUSE_OF_NCCL } else { CAUSE_OF_DEVICE };
        peers.cause_of(error, peers.group.fail_timeout() / part, || self.job.is_stopped())
    }

    /// Ends the streams' waiting for others.
    fn abort(mut self) {
        lock(&self.exchanging.calls).aborter = None; // what follows has its own bounds
        let aborted = self.comm.abort();
        if let Err(error) = &aborted {
            tracing::warn!("{error}");
        }
        if aborted.is_err() || !self.wire.settle(self.job.setup.stall_error) {
            self.keep_for_ever();
        }
    }

    /// Every round.
    fn all(&mut self, rounds: Exchange) -> Result<()> {
        for round in rounds.filter(|round| !round.is_idle()) {
            self.make_room()?;
            self.begin_round(&round)?;
        }
        self.make_room()?;
        self.begin_parting()?;
        while !self.under_way.is_empty() {
            self.end_oldest()?;
        }
        Ok(())
    }

    /// Waits until one more round can begin.
    fn make_room(&mut self) -> Result<()> {
        while self.under_way.len() == limits::EXCHANGE_ROUNDS {
            self.end_oldest()?;
        }
        Ok(())
    }

    /// Queues a round in which all members meet once more: ending a communicator may wait for those who still need it, and has
    /// no business to do so for as long as they load.
    fn begin_parting(&mut self) -> Result<()> {
        let at = self.begun % limits::EXCHANGE_ROUNDS;
        let (sending, receiving) = self.wire.buffers(at);
        self.under_way.push_back(UnderWay { at, staged: None, landings: Vec::new() });
        let (job, comm) = (self.job, &mut self.comm);
        let stopped = || stop(job);
        let until = wait(&stopped, job.setup.stall_error * PATIENCE);
        self.wire.travel(at, &mut |stream| {
            // SAFETY: the buffers are this round's, and large enough for a few bytes of everybody.
            unsafe { comm.all_gather([sending, receiving], PARTING, stream, &until) }
        })?;
        // SAFETY: nothing is put in place.
        unsafe { self.wire.place(at, Vec::new()) }.map_err(|error| self.at_landing(error))
    }

    /// Queues the steps of a round.
    fn begin_round(&mut self, Round { own, sent, received }: &Round) -> Result<()> {
        let at = self.begun % limits::EXCHANGE_ROUNDS;
        self.begun += 1;
        let (sending, receiving) = self.wire.buffers(at);
        let chunk = match own {
            Some(own) => Some(self.next_chunk().map_err(|error| self.job.locate(error, own.extent))?),
            None => None,
        };
        self.under_way.push_back(UnderWay { at, staged: None, landings: Vec::new() });
        let under_way = self.under_way.back_mut().expect("bug in shardlift: pushed above");
        if let (Some(own), Some(Chunk { staged, extent, offset }), false) = (own, chunk, sent.is_empty()) {
            assert_eq!(extent, own.extent, "bug in shardlift: a round is about other bytes than were read");
            let (first, from) = (staged.address().wrapping_add(offset), staged.home());
            under_way.staged = Some(staged);
            // SAFETY: what was staged is kept until it has landed, or for ever.
            unsafe { self.wire.land(at, packing(sent, first, sending, from), from) }
                .map_err(|error| self.job.locate(error, own.extent).with_rank(self.rank()))?;
        }
        let (rank, most) = (self.rank(), self.most());
        let messages = Messages { rank, members: &self.members, sent, received, sending, receiving, most };
        let (job, comm) = (self.job, &mut self.comm);
        let stopped = || stop(job);
        let until = wait(&stopped, job.setup.stall_error * PATIENCE);
        self.wire.travel(at, &mut |stream| {
            // SAFETY: the buffers are this round's: nobody else uses what is received until it is in place, nor writes what is
            // sent until it has travelled. They go after the communicator.
            unsafe { comm.grouped(stream, &until, |group| messages.queue(group)) }
        })?;
        let mut arrived = Vec::new();
        let under_way = self.under_way.back_mut().expect("bug in shardlift: pushed above");
        for (Received { pieces, .. }, from) in received.iter().zip(messages.places()) {
            for piece in pieces.iter().filter(|piece| job.setup.destinations.waits(piece.rank, piece.dest)) {
                arrived.push(Arrived { from: from + piece.src, copy: job.raw_copy(piece, std::ptr::null()) });
                let landing = Landing { rank: piece.rank, dest: piece.dest, bytes: piece.landed_bytes() };
                under_way.landings.push(landing);
            }
        }
        // SAFETY: the audit proved that no other copy names the destination bytes; the job keeps them alive.
        unsafe { self.wire.place(at, arrived) }.map_err(|error| self.at_landing(error))?;
        let counters = &job.counters;
        let to_others = sent.iter().map(|parcel| parcel.bytes * parcel.to.len() as u64).sum::<u64>();
        counters.sent_bytes.fetch_add(to_others, Ordering::Relaxed);
        counters.received_bytes.fetch_add(received.iter().map(|it| it.bytes).sum::<u64>(), Ordering::Relaxed);
        Ok(())
    }

    /// What this process read for the round that is its next.
    fn next_chunk(&mut self) -> Result<Chunk> {
        let number = self.read;
        self.read += 1;
        loop {
            stop(self.job)?;
            if let Some(chunk) = self.exchanging.take(number, limits::COPY_POLL) {
                return Ok(chunk);
            }
            // While there is nothing to begin, others may be done.
            self.comm.check()?;
            self.look()?;
        }
    }

    /// Waits until the oldest round is done. How long that takes is the slowest rank's business: each of them looks after its
    /// own reads, and the group after the ranks.
    fn end_oldest(&mut self) -> Result<()> {
        let (began, before) = (Instant::now(), self.under_way.len());
        while self.under_way.len() == before {
            stop(self.job)?;
            self.comm.check()?;
            self.look()?;
            if began.elapsed() > self.job.setup.stall_error * PATIENCE {
                let error = Error::new(ErrorKind::Stalled, format!("no round was done for {:?}", began.elapsed()));
                return Err(self.at_landing(error));
            }
            if self.under_way.len() == before {
                thread::sleep(limits::EVENT_POLL);
            }
        }
        Ok(())
    }

    /// Lets go of what has landed on the device, and tells of the rounds that are done.
    fn look(&mut self) -> Result<()> {
        for at in 0..self.under_way.len() {
            let UnderWay { at: buffer, staged, .. } = &mut self.under_way[at];
            if staged.is_some()
                && self.wire.has_landed(*buffer).map_err(|error| error.with_rank(self.job.devices[0].1))?
            {
                *staged = None;
            }
        }
        while let Some(oldest) = self.under_way.front() {
            if !self.wire.is_placed(oldest.at).map_err(|error| self.at_landing(error))? {
                break;
            }
            let done = self.under_way.pop_front();
            done.into_iter().flat_map(|done| done.landings).for_each(|landing| self.job.landed(landing));
        }
        Ok(())
    }

    /// An error of the device with the tensor that was to be put in place first.
    fn at_landing(&self, error: Error) -> Error {
        let landing = self.under_way.iter().find_map(|round| round.landings.first().copied());
        self.job.locate_copy(CopyError { error, landing }, self.rank())
    }

    fn rank(&self) -> Rank {
        self.job.devices[0].1
    }

    fn most(&self) -> u64 {
        buffer(self.exchanging.chunk())
    }

    /// Somebody may still use what it has.
    #[expect(clippy::mem_forget, reason = "freeing memory that a device may still write to is worse than leaking it")]
    fn keep_for_ever(self) {
        lock(&self.exchanging.calls).given_up = Some(Instant::now());
        self.job.abandon(self.under_way.iter().filter(|round| round.staged.is_some()).count());
        keep_for_ever(self.job);
        let Traffic { wire, under_way, .. } = self;
        std::mem::forget((wire, under_way));
    }
}

/// What travels in a round.
struct Messages<'a> {
    rank: Rank,
    members: &'a [Rank],
    sent: &'a [Parcel],
    received: &'a [Received],
    sending: u64,
    receiving: u64,
    /// Bytes between places of the buffer of what is received.
    most: u64,
}

impl Messages<'_> {
    /// Queues them: what everybody gets as broadcasts, which all ranks have to queue in the same order.
    fn queue(&self, group: &mut crate::collective::Group<'_>) -> Result<()> {
        let (members, at) = (self.members, |rank| position(self.members, rank));
        let mut broadcasts = SmallVec::<[(Rank, u64, u64); 8]>::new();
        for (parcel, from) in self.sent.iter().zip(places(self.sent, self.sending)) {
            if parcel.to.len() + 1 == members.len() {
                broadcasts.push((self.rank, from, parcel.bytes));
            } else {
                parcel.to.iter().try_for_each(|&to| group.send(at(to), from, parcel.bytes as usize))?;
            }
        }
        for (&Received { from, by_all, bytes, .. }, to) in self.received.iter().zip(self.places()) {
            if by_all {
                broadcasts.push((from, to, bytes));
            } else {
                group.recv(at(from), to, bytes as usize)?;
            }
        }
        broadcasts.sort_unstable();
        // In place: the root sends from where the others receive.
        broadcasts.iter().try_for_each(|&(root, place, bytes)| group.broadcast(at(root), [place; 2], bytes as usize))
    }

    /// Where each parcel that is received lies.
    fn places(&self) -> impl Iterator<Item = u64> {
        let (receiving, most) = (self.receiving, self.most);
        (0..).map(move |number| receiving + number * most)
    }
}

/// The operations that pack parcels from what was read, whose first byte is `first`, into a buffer.
///
/// What they name of the read is not checked here: it lies in it, as the parts of parcels do.
fn packing(parcels: &[Parcel], first: *const u8, buffer: u64, from: Home) -> Vec<Op> {
    let mut parts = Vec::new();
    for (parcel, place) in parcels.iter().zip(places(parcels, buffer)) {
        parts.extend(parcel.parts.iter().map(|part| {
            let (src, dst) = (first.wrapping_add(part.src as usize), place + part.dst);
            let copy = RawCopy { src, dst, loops: part.loops.clone(), run: part.run, cast: None };
            Part { copy, allocation: buffer }
        }));
    }
    // SAFETY: nothing is packed in place, so the sources are not even looked at here.
    unsafe { lower(parts, false, costs(from)) }
}

/// Where each parcel lies in the buffer of what is sent.
fn places(parcels: &[Parcel], buffer: u64) -> impl Iterator<Item = u64> {
    parcels.iter().scan(buffer, |next, parcel| {
        let place = *next;
        *next += parcel.bytes.next_multiple_of(limits::TENSOR_ALIGNMENT);
        Some(place)
    })
}

/// The buffers of so many ranks that exchange chunks of so many bytes, read into slots of that size.
pub(super) fn size(members: usize, chunk: u64, slot_bytes: usize) -> WireSize {
    let others = members.saturating_sub(1) as u64;
    let sent = buffer(chunk) + others * limits::TENSOR_ALIGNMENT;
    WireSize { rounds: limits::EXCHANGE_ROUNDS, sent, received: others * buffer(chunk), slot_bytes }
}

/// Bytes of a buffer that holds any parcel of a chunk.
fn buffer(chunk: u64) -> u64 {
    Exchange::most(chunk).next_multiple_of(limits::TENSOR_ALIGNMENT)
}

/// A rank's place in the communicator.
fn position(members: &[Rank], rank: Rank) -> Rank {
    let at = members.binary_search(&rank).expect("bug in shardlift: a message to a rank of another group");
    Rank(at as u32)
}

/// An error if the load has failed or was cancelled.
fn stop(job: &Job) -> Result<()> {
    match job.is_stopped() {
        true => Err(Error::new(ErrorKind::Cancelled, "the load has ended")),
        false => Ok(()),
    }
}

fn wait(stop: &dyn Fn() -> Result<()>, bound: Duration) -> Wait<'_> {
    Wait { deadline: Instant::now() + bound, stop }
}

/// Bytes that members give each other when they part.
const PARTING: usize = 16;

/// Which part of the time in which all ranks know of a failure one waits for the cause of an error of NCCL's, and of a device's:
/// others tell before they abort.
const CAUSE_OF_NCCL: u32 = 5;
const CAUSE_OF_DEVICE: u32 = 50;

/// How long a thread has to notice that the load has stopped, or that what it waits for was given up: it looks every few
/// milliseconds.
const NOTICED: Duration = Duration::from_millis(500);

/// How many times the bound on a rank's own reads others are waited for: they may wait for theirs, and tell.
pub(super) const PATIENCE: u32 = 3;
