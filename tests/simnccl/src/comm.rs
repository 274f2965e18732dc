//! Communicators: how ranks meet, and how they part.

use std::fs;
use std::process;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::abi::{Code, Handle, IN_PROGRESS, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, Result, SUCCESS, UniqueId};
use crate::config::Abort;
use crate::driver::{self, Place};
use crate::segment::{self, MAX_RANKS, Member, Segment};
use crate::sim::{config, dawdle, fail, lock, violate};

/// One rank of a communicator.
pub(crate) struct Comm {
    pub(crate) handle: Handle,
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) device: usize,
    pub(crate) blocking: bool,
    segment: OnceLock<Segment>,
    /// What `ncclCommGetAsyncError` answers.
    status: AtomicI32,
    aborted: AtomicBool,
    finalized: AtomicBool,
    /// A call is in it.
    busy: AtomicBool,
    pub(crate) order: Mutex<Order>,
    under_way: Mutex<UnderWay>,
    ended: Condvar,
}

/// What comes next.
#[derive(Default)]
pub(crate) struct Order {
    /// Messages to and from each peer, and collectives, so far.
    pub(crate) sends: Vec<u64>,
    pub(crate) receives: Vec<u64>,
    pub(crate) collectives: u64,
    /// Where its last operation is: the next one comes after that, on whatever stream.
    pub(crate) last: Place,
}

#[derive(Default)]
struct UnderWay {
    /// Operations that were put into a stream and have not ended.
    queued: u32,
    /// Those of them that run.
    running: u32,
}

/// Why an operation, or the making of a communicator, does not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Aborted,
    Failed(Code),
}

/// A call is in a communicator while this lives.
pub(crate) struct Entered<'a>(&'a Comm);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, SeqCst);
    }
}

impl Comm {
    /// A rank that has not met its peers yet.
    pub(crate) fn new(size: usize, rank: usize, device: usize, blocking: bool) -> Result<Arc<Comm>> {
        if size == 0 || rank >= size {
            return Err(fail(INVALID_ARGUMENT, &format!("Invalid rank requested : {rank}/{size}")));
        }
        if size > MAX_RANKS {
            return Err(fail(INVALID_ARGUMENT, "the twin has no room for so many ranks"));
        }
        let mut sim = lock();
        let handle = sim.handle();
        let order = Order { sends: vec![0; size], receives: vec![0; size], ..Order::default() };
        let comm = Arc::new(Comm {
            handle,
            rank,
            size,
            device,
            blocking,
            segment: OnceLock::new(),
            status: AtomicI32::new(IN_PROGRESS),
            aborted: AtomicBool::new(false),
            finalized: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            order: Mutex::new(order),
            under_way: Mutex::default(),
            ended: Condvar::new(),
        });
        sim.ledger.created += 1;
        sim.comms.insert(handle, Arc::clone(&comm));
        Ok(comm)
    }

    /// What is shared with the peers, once they have met.
    pub(crate) fn segment(&self) -> &Segment {
        self.segment.get().expect("only ready communicators have operations")
    }

    pub(crate) fn status(&self) -> Code {
        let status = self.status.load(SeqCst);
        match (status, self.hears_of_an_abort()) {
            (SUCCESS | IN_PROGRESS, Some(code)) if !(self.is_finalized() && status == SUCCESS) => {
                self.set_status(code);
                code
            }
            _ => status,
        }
    }

    /// What a peer's abort is to this rank, where it hears of it.
    fn hears_of_an_abort(&self) -> Option<Code> {
        if config().abort != Abort::Tells {
            return None;
        }
        let members = &self.segment.get()?.members[..self.size];
        let others = || members.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        let (peer, _) = others().find(|(_, member)| member.aborted.load(SeqCst) == 1)?;
        Some(fail(REMOTE_ERROR, &format!("connection closed by remote peer: rank {peer} has aborted")))
    }

    pub(crate) fn set_status(&self, status: Code) {
        self.status.store(status, SeqCst);
    }

    /// A call came to its end, unless what it launched has failed already.
    pub(crate) fn launched(&self, status: Code) {
        self.status.compare_exchange(IN_PROGRESS, status, SeqCst, SeqCst).ok();
    }

    /// Fails unless the last call has come to its end, well.
    pub(crate) fn ready(&self) -> Result {
        match self.status() {
            SUCCESS => Ok(()),
            IN_PROGRESS => {
                let text = "Attempt to use communicator before the previous operation returned ncclSuccess";
                Err(fail(INVALID_ARGUMENT, text))
            }
            code => Err(code),
        }
    }

    /// Notes that a call is in it. Only one may be, but for the one that aborts.
    pub(crate) fn enter(&self, call: &str) -> Entered<'_> {
        if self.busy.swap(true, SeqCst) {
            violate(call, "two threads are in one communicator at once");
        }
        Entered(self)
    }

    /// Waits until `look` finds something; not once the communicator is aborted, nor longer than a test wants.
    pub(crate) fn wait<T>(
        &self,
        segment: &Segment,
        mut look: impl FnMut() -> Option<T>,
    ) -> std::result::Result<T, Stop> {
        let began = Instant::now();
        segment.wait(self.rank, || {
            if self.aborted.load(SeqCst) {
                return Some(Err(Stop::Aborted));
            }
            if let Some(found) = look() {
                return Some(Ok(found));
            }
            if let Some(code) = self.hears_of_an_abort() {
                return Some(Err(Stop::Failed(code)));
            }
            let late = config().timeout.is_some_and(|timeout| began.elapsed() > timeout);
            late.then(|| Err(Stop::Failed(fail(REMOTE_ERROR, "a peer did not come within SIMNCCL_TIMEOUT"))))
        })
    }

    /// Meets the peers, however long that takes.
    pub(crate) fn meet(&self, id: &UniqueId, hangs: bool) {
        if !self.blocking {
            dawdle();
        }
        let outcome = if hangs { Err(self.until_aborted()) } else { self.try_meet(id) };
        if outcome == Err(Stop::Aborted) {
            self.tells_of_its_abort(); // whoever aborted it may have come before there was anybody to tell
        }
        self.set_status(match outcome {
            Ok(()) => SUCCESS,
            Err(Stop::Failed(code)) => code,
            Err(Stop::Aborted) => INVALID_USAGE,
        });
    }

    fn try_meet(&self, id: &UniqueId) -> std::result::Result<(), Stop> {
        let began = Instant::now();
        let opened = loop {
            if let Some(segment) = segment::open(id) {
                break segment;
            }
            if self.aborted.load(SeqCst) {
                return Err(Stop::Aborted);
            }
            if config().timeout.is_some_and(|timeout| began.elapsed() > timeout) {
                return Err(Stop::Failed(fail(REMOTE_ERROR, "whoever made the id has gone")));
            }
            thread::sleep(Duration::from_millis(5));
        };
        let segment = self.segment.get_or_init(|| opened);
        let size = self.size as u32;
        if let Err(other) = segment.ranks.compare_exchange(0, size, SeqCst, SeqCst)
            && other != size
        {
            violate(
                "ncclCommInitRank",
                &format!("rank {} has a communicator of {size} ranks, another one of {other}", self.rank),
            );
            return Err(Stop::Failed(INVALID_USAGE));
        }
        let member = &segment.members[self.rank];
        member.board.store(driver::board(self.device).map_err(Stop::Failed)?, SeqCst);
        if member.process.compare_exchange(0, process::id(), SeqCst, SeqCst).is_err() {
            violate("ncclCommInitRank", &format!("there are two ranks {}", self.rank));
            return Err(Stop::Failed(INVALID_USAGE));
        }
        segment.attached.fetch_add(1, SeqCst);
        segment.ring_all();
        self.wait(segment, || (segment.attached.load(SeqCst) == size).then_some(()))?;
        if let Some(nonce) = segment::nonce(id) {
            lock().files.remove(&nonce);
        }
        self.alone_on_its_gpu(segment)
    }

    fn alone_on_its_gpu(&self, segment: &Segment) -> std::result::Result<(), Stop> {
        let board = |rank: usize| segment.members[rank].board.load(SeqCst);
        let pairs = (0..self.size).flat_map(|one| (one + 1..self.size).map(move |other| (one, other)));
        let Some((one, other)) = pairs.into_iter().find(|(one, other)| board(*one) == board(*other)) else {
            return Ok(());
        };
        let text = match (config().version >= 23000, config().shared_gpus) {
            (true, true) => return Ok(()),
            (true, false) => {
                "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable this configuration."
                    .to_string()
            }
            (false, _) => {
                format!("Duplicate GPU detected : rank {other} and rank {one} both on CUDA device {}", board(one))
            }
        };
        Err(Stop::Failed(fail(INVALID_USAGE, &text)))
    }

    /// One more operation is in a stream.
    pub(crate) fn queued(&self) {
        self.count(|counts| counts.queued += 1);
    }

    /// One of them runs.
    pub(crate) fn begins(&self) {
        self.count(|counts| counts.running += 1);
    }

    /// It ran to its end, or (`ran` is false) never will.
    pub(crate) fn ends(&self, ran: bool) {
        self.count(|counts| {
            counts.queued -= 1;
            counts.running -= u32::from(ran);
        });
        self.ended.notify_all();
    }

    fn count(&self, change: impl FnOnce(&mut UnderWay)) {
        change(&mut self.under_way.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn settle(&self, settled: impl Fn(&UnderWay) -> bool) {
        let mut counts = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        while !settled(&counts) {
            counts =
                self.ended.wait_timeout(counts, Duration::from_millis(20)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.aborted.load(SeqCst)
    }

    /// Waits until the communicator is aborted, as the kernel of an operation that went wrong does.
    pub(crate) fn until_aborted(&self) -> Stop {
        while !self.is_aborted() {
            thread::sleep(Duration::from_millis(2));
        }
        Stop::Aborted
    }

    /// Waits for all of its operations, and for all peers to do the same.
    pub(crate) fn finalize(&self) {
        if self.finalized.swap(true, SeqCst) {
            return;
        }
        self.settle(|counts| counts.queued == 0 || self.is_aborted());
        let segment = self.segment();
        segment.members[self.rank].finalized.store(1, SeqCst);
        segment.ring_all();
        let all = || segment.members[..self.size].iter().all(|member| member.finalized.load(SeqCst) == 1);
        let outcome = self.wait(segment, || all().then_some(()));
        self.set_status(match outcome {
            Ok(()) => SUCCESS,
            Err(Stop::Failed(code)) => code,
            Err(Stop::Aborted) => INVALID_USAGE,
        });
    }

    pub(crate) fn is_finalized(&self) -> bool {
        self.finalized.load(SeqCst)
    }

    fn tells_of_its_abort(&self) {
        if let Some(segment) = self.segment.get() {
            segment.members[self.rank].aborted.store(1, SeqCst);
            segment.ring_all();
        }
    }

    /// Ends what runs, and lets nothing run any more.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, SeqCst);
        // Whoever is launching something has done so; nobody begins to.
        drop(self.order.lock());
        self.tells_of_its_abort();
        self.settle(|counts| counts.running == 0);
        if let Some(segment) = self.segment.get().filter(|_| config().abort == Abort::Waits) {
            let parts = |member: &Member| {
                let process = member.process.load(SeqCst);
                [&member.aborted, &member.finalized].iter().any(|flag| flag.load(SeqCst) == 1) || !lives(process)
            };
            while !segment.members[..self.size].iter().all(parts) {
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Whether a process runs, or could: one that has ended and was not waited for does not, nor one that never came.
fn lives(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    process != 0 && stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}
