//! The operations of a group, as one thing that a stream does: everything is published, then everything is taken, then
//! waited for until all that was published was taken. So no order of sends and receives within a group can block.

use std::ffi::{CStr, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use crate::abi::{INTERNAL_ERROR, INVALID_USAGE, Result, SYSTEM_ERROR};
use crate::comm::{Comm, Stop};
use crate::driver::{self, Operation, Touched};
use crate::faults::Due;
use crate::segment::{Entry, Found, Kind, MAX_ENTRIES, anonymous_file};
use crate::sim::{config, fail, lock, violate};
use crate::sum;

/// One operation, as its call asks for it.
#[derive(Clone, Copy)]
pub(crate) struct Op {
    pub(crate) call: &'static CStr,
    /// `None` for a receive.
    pub(crate) kind: Option<Kind>,
    /// Of a message; the root of a broadcast.
    pub(crate) peer: usize,
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// What each rank gives.
    pub(crate) bytes: u64,
    pub(crate) data_type: i32,
    pub(crate) reduction: i32,
    pub(crate) stream: u64,
    /// Which message of its pair, or which collective; known when it is launched.
    pub(crate) ordinal: u64,
}

impl Op {
    pub(crate) fn name(&self) -> &'static str {
        self.call.to_str().expect("names of functions")
    }

    fn is_collective(&self) -> bool {
        self.kind.is_some_and(|kind| kind != Kind::Send)
    }

    /// The memory that it touches, of a communicator of this size.
    fn touched(&self, comm: &Comm) -> Vec<Touched> {
        let at = |start, bytes, writes| Touched { start, bytes, writes: u32::from(writes) };
        let (size, rank, bytes) = (comm.size as u64, comm.rank as u64, self.bytes);
        let touched = match self.kind {
            None => vec![at(self.to, bytes, true)],
            Some(Kind::Send) => vec![at(self.from, bytes, false)],
            Some(Kind::Broadcast) if rank != self.peer as u64 => vec![at(self.to, bytes, true)],
            Some(Kind::Broadcast | Kind::AllReduce) if self.from == self.to => {
                vec![at(self.to, bytes, self.kind == Some(Kind::AllReduce))]
            }
            Some(Kind::Broadcast | Kind::AllReduce) => vec![at(self.from, bytes, false), at(self.to, bytes, true)],
            Some(Kind::AllGather) => {
                let own = self.to + rank * bytes;
                let after = at(own + bytes, (size - rank - 1) * bytes, true);
                vec![
                    at(self.from, bytes, false),
                    at(self.to, rank * bytes, true),
                    after,
                    at(own, bytes, self.from != own),
                ]
            }
        };
        touched.into_iter().filter(|touched| touched.bytes > 0).collect()
    }
}

/// What a stream does for one communicator.
struct Job {
    comm: Arc<Comm>,
    ops: Vec<Op>,
}

/// Puts operations of one communicator into their stream, as one.
pub(crate) fn launch(comm: &Arc<Comm>, mut ops: Vec<Op>) -> Result {
    let Some(&Op { stream, call, .. }) = ops.first() else { return Ok(()) };
    if ops.iter().any(|op| op.stream != stream) {
        return Err(fail(INVALID_USAGE, "the twin has one stream for each communicator of a group"));
    }
    if ops.len() > MAX_ENTRIES {
        return Err(fail(INTERNAL_ERROR, "the twin has no room for so many operations in a group"));
    }
    let mut order = comm.order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if comm.is_aborted() {
        return Err(fail(INVALID_USAGE, "the communicator was aborted"));
    }
    for op in &mut ops {
        let next = match op.kind {
            None => &mut order.receives[op.peer],
            Some(Kind::Send) => &mut order.sends[op.peer],
            Some(_) => &mut order.collectives,
        };
        op.ordinal = *next;
        *next += 1;
    }
    let mut touched: Vec<Touched> = ops.iter().flat_map(|op| op.touched(comm)).collect();
    if let Some(address) = overlap(&mut touched) {
        let what = format!("two operations of one group touch {address:#x}, and at least one of them writes");
        violate(call.to_str().unwrap_or_default(), &what);
    }
    let data = Box::into_raw(Box::new(Job { comm: Arc::clone(comm), ops }));
    let operation = Operation {
        call: call.as_ptr(),
        touched: touched.as_ptr(),
        touched_count: touched.len(),
        run,
        skip,
        data: data.cast(),
        after: order.last,
    };
    comm.queued();
    match driver::submit(comm.device, stream, &operation) {
        Ok(place) => {
            order.last = place;
            Ok(())
        }
        Err(code) => {
            comm.ends(false);
            // SAFETY: from the box above; the driver twin took nothing.
            drop(unsafe { Box::from_raw(data) });
            Err(code)
        }
    }
}

/// Where memory is written that is touched otherwise, too: the operations of a group have no order.
fn overlap(touched: &mut [Touched]) -> Option<u64> {
    touched.sort_by_key(|touched| touched.start);
    let [mut read, mut written] = [0; 2];
    touched.iter().find_map(|touched| {
        let overlaps = touched.start < if touched.writes != 0 { written.max(read) } else { written };
        let end = if touched.writes != 0 { &mut written } else { &mut read };
        *end = (*end).max(touched.start + touched.bytes);
        overlaps.then_some(touched.start)
    })
}

extern "C" fn skip(data: *mut c_void) {
    // SAFETY: the box of `launch`, which the driver twin hands over once.
    let job = unsafe { Box::from_raw(data.cast::<Job>()) };
    job.comm.ends(false);
}

extern "C" fn run(data: *mut c_void, start: u64) -> u64 {
    // SAFETY: as in `skip`.
    let job = unsafe { Box::from_raw(data.cast::<Job>()) };
    job.comm.begins();
    let end = match job.run(start) {
        Ok(end) => end,
        Err(Stop::Aborted) => start,
        Err(Stop::Failed(code)) => {
            job.comm.set_status(code);
            job.comm.until_aborted();
            start
        }
    };
    job.comm.ends(true);
    end
}

type Outcome<T = ()> = std::result::Result<T, Stop>;

impl Job {
    fn run(&self, start: u64) -> Outcome<u64> {
        let comm = &*self.comm;
        if comm.is_aborted() {
            return Err(Stop::Aborted);
        }
        for op in &self.ops {
            let due = lock().faults.due(&format!("run:{}", op.name()));
            match due {
                Some(Due::Code(code)) => return Err(Stop::Failed(fail(code, "a test wants this operation to fail"))),
                Some(Due::Hang) => return Err(comm.until_aborted()),
                None => {}
            }
        }
        let ready = start + config().link.map_or(0, |link| link.latency_ns);
        let mut files = Vec::new();
        let entries: Result<Vec<Entry>> =
            self.ops.iter().filter_map(|op| self.entry(op, ready, &mut files).transpose()).collect();
        let entries = entries.map_err(Stop::Failed)?;
        let segment = comm.segment();
        segment.publish(comm.rank, &entries);
        let outcome = self.exchange(start, ready);
        segment.retract(comm.rank);
        if outcome.is_ok() {
            self.count();
        }
        outcome
    }

    /// What an operation publishes; bytes for other processes go into a file first.
    fn entry(&self, op: &Op, ready: u64, files: &mut Vec<File>) -> Result<Option<Entry>> {
        let comm = &*self.comm;
        let Some(kind) = op.kind else { return Ok(None) };
        let gives = op.bytes > 0 && (kind != Kind::Broadcast || op.peer == comm.rank);
        let abroad = |rank: usize| comm.segment().members[rank].process.load(SeqCst) != process::id();
        let needs_file = gives && if kind == Kind::Send { abroad(op.peer) } else { (0..comm.size).any(abroad) };
        let file = if needs_file {
            // SAFETY: device memory that the driver twin found live just before, and keeps so while this runs.
            let bytes = unsafe { std::slice::from_raw_parts(op.from as *const u8, op.bytes as usize) };
            let file = anonymous_file().and_then(|file| file.write_all_at(bytes, 0).map(|()| file));
            let file = file.map_err(|error| fail(SYSTEM_ERROR, &format!("bytes for other processes: {error}")))?;
            let descriptor = file.as_raw_fd();
            files.push(file);
            descriptor
        } else {
            -1
        };
        Ok(Some(Entry {
            kind,
            peer: op.peer as u32,
            ordinal: op.ordinal,
            bytes: op.bytes,
            data_type: op.data_type as u32,
            reduction: op.reduction as u32,
            address: op.from,
            file,
            ready,
        }))
    }

    /// Takes what is for this rank and waits until others have taken theirs; when all that ends in the model's time.
    fn exchange(&self, start: u64, ready: u64) -> Outcome<u64> {
        let (comm, segment) = (&*self.comm, self.comm.segment());
        let mut end = start;
        for op in &self.ops {
            match op.kind {
                None => end = end.max(self.receive(op, ready)?),
                Some(Kind::Send) => {}
                Some(_) => end = end.max(self.collective(op)?),
            }
        }
        for op in &self.ops {
            if op.kind == Some(Kind::Send) {
                let taken = &segment.taken[comm.rank][op.peer];
                comm.wait(segment, || (taken.load(SeqCst) > op.ordinal).then_some(()))?;
                end = end.max(segment.taken_end[comm.rank][op.peer].load(SeqCst));
            } else if op.is_collective() {
                self.until_done(op)?;
            }
        }
        Ok(end)
    }

    fn receive(&self, op: &Op, ready: u64) -> Outcome<u64> {
        let (comm, segment) = (&*self.comm, self.comm.segment());
        loop {
            let ours = |entry: &Entry| {
                entry.kind == Kind::Send && entry.peer as usize == comm.rank && entry.ordinal == op.ordinal
            };
            let found = comm.wait(segment, || segment.find(op.peer, ours))?;
            if found.entry.bytes != op.bytes {
                let what = format!(
                    "rank {} receives {} bytes from rank {}, which sends {}",
                    comm.rank, op.bytes, op.peer, found.entry.bytes
                );
                violate(op.name(), &what);
                return Err(Stop::Failed(INVALID_USAGE));
            }
            // SAFETY: memory of this operation's, watched by the driver twin; what is published is kept until retracted.
            if !unsafe { segment.fetch(&found, op.to, op.bytes) } {
                self.gone(&found)?;
                continue;
            }
            let end = match config().link {
                Some(link) if op.peer != comm.rank => {
                    let length = (op.bytes as f64 / link.bytes_per_ns) as u64;
                    segment.book(&[(op.peer, 1), (comm.rank, 0)], ready.max(found.entry.ready), length)
                }
                _ => 0,
            };
            segment.taken_end[op.peer][comm.rank].fetch_max(end, SeqCst);
            segment.taken[op.peer][comm.rank].store(op.ordinal + 1, SeqCst);
            segment.ring(op.peer);
            return Ok(end);
        }
    }

    /// What was found was taken back, or its process has gone, and then it never comes.
    fn gone(&self, found: &Found) -> Outcome {
        let (comm, segment) = (&*self.comm, self.comm.segment());
        let process = segment.members[found.from].process.load(SeqCst);
        if process != process::id() && !std::path::Path::new(&format!("/proc/{process}")).exists() {
            comm.wait(segment, || None::<()>)?;
        }
        Ok(())
    }

    fn collective(&self, op: &Op) -> Outcome<u64> {
        let (comm, segment) = (&*self.comm, self.comm.segment());
        let kind = op.kind.unwrap_or(Kind::Send);
        let same = |entry: &Entry| entry.kind != Kind::Send && entry.ordinal == op.ordinal;
        let mut all = Vec::with_capacity(comm.size);
        for rank in 0..comm.size {
            let found = comm.wait(segment, || segment.find(rank, same))?;
            let entry = found.entry;
            let theirs = (entry.kind, entry.peer as usize, entry.bytes, entry.data_type, entry.reduction);
            let ours = (kind, op.peer, op.bytes, op.data_type as u32, op.reduction as u32);
            if theirs != ours {
                let what = format!(
                    "collective {} of rank {} is {kind:?} with {} bytes, root {}; of rank {rank} {:?} with {} bytes, root {}",
                    op.ordinal, comm.rank, op.bytes, op.peer, entry.kind, entry.bytes, entry.peer
                );
                violate(op.name(), &what);
                return Err(Stop::Failed(INVALID_USAGE));
            }
            all.push(found);
        }
        let mut reduced = None;
        match kind {
            Kind::Send => {}
            Kind::Broadcast => self.take(&all[op.peer], op.to, op.bytes)?,
            Kind::AllGather => {
                for (rank, found) in all.iter().enumerate() {
                    self.take(found, op.to + rank as u64 * op.bytes, op.bytes)?;
                }
            }
            Kind::AllReduce => {
                let mut parts = vec![vec![0_u8; op.bytes as usize]; comm.size];
                for (found, part) in all.iter().zip(&mut parts) {
                    self.take(found, part.as_mut_ptr() as u64, op.bytes)?;
                }
                reduced = Some(sum::reduce(parts, op.data_type, op.reduction).map_err(Stop::Failed)?);
            }
        }
        let end = self.times(op, kind, &all)?;
        segment.reach_done(comm.rank, op.ordinal + 1);
        if let Some(reduced) = reduced {
            // It may lie where others still read from.
            self.until_done(op)?;
            // SAFETY: memory of this operation's, as long as that, watched by the driver twin.
            unsafe { (op.to as *mut u8).copy_from(reduced.as_ptr(), reduced.len()) };
        }
        Ok(end)
    }

    fn take(&self, found: &Found, to: u64, bytes: u64) -> Outcome {
        let own = found.from == self.comm.rank && to == found.entry.address;
        // SAFETY: memory of this operation's, watched by the driver twin; what is published is kept until retracted, which
        // comes after all have taken it.
        if own || unsafe { self.comm.segment().fetch(found, to, bytes) } {
            return Ok(());
        }
        // A peer that was aborted or killed after it had published.
        Err(self.comm.until_aborted())
    }

    /// When a collective ends in the model's time: one rank says so for all. Bytes go round a ring, all links at once.
    fn times(&self, op: &Op, kind: Kind, all: &[Found]) -> Outcome<u64> {
        let (comm, segment) = (&*self.comm, self.comm.segment());
        let Some(link) = config().link else { return Ok(0) };
        let size = comm.size;
        let leader = if kind == Kind::Broadcast { op.peer } else { 0 };
        if comm.rank == leader {
            let from = all.iter().map(|found| found.entry.ready).max().unwrap_or(0);
            let rounds = match kind {
                Kind::Send | Kind::Broadcast => 1.0,
                Kind::AllGather => (size - 1) as f64,
                Kind::AllReduce => 2.0 * (size - 1) as f64 / size as f64,
            };
            let last = (op.peer + size - 1) % size;
            let used = |rank: usize, way: usize| match kind {
                Kind::Broadcast => rank != if way == 0 { op.peer } else { last },
                _ => true,
            };
            let ways = (0..size).flat_map(|rank| [(rank, 0), (rank, 1)]);
            let links: Vec<_> = if size > 1 { ways.filter(|(rank, way)| used(*rank, *way)).collect() } else { vec![] };
            let end = segment.book(&links, from, (rounds * op.bytes as f64 / link.bytes_per_ns) as u64);
            segment.timed_end.store(end, SeqCst);
            segment.timed.store(op.ordinal + 1, SeqCst);
            segment.ring_all();
        }
        comm.wait(segment, || (segment.timed.load(SeqCst) > op.ordinal).then(|| segment.timed_end.load(SeqCst)))
    }

    /// Waits until all ranks have taken what they get of a collective.
    fn until_done(&self, op: &Op) -> Outcome {
        let (comm, segment) = (&*self.comm, self.comm.segment());
        comm.wait(segment, || segment.all_done(op.ordinal + 1).then_some(()))
    }

    /// Writes down what went over the links.
    fn count(&self) {
        let comm = &*self.comm;
        let others = comm.size as u64 - 1;
        for op in &self.ops {
            let alone = comm.size == 1 || !op.is_collective() && op.peer == comm.rank;
            let last = (op.peer + comm.size - 1) % comm.size;
            let (received, sent) = match op.kind {
                _ if alone => (0, 0),
                None => (op.bytes, 0),
                Some(Kind::Send) => (0, op.bytes),
                Some(Kind::Broadcast) => {
                    (if comm.rank == op.peer { 0 } else { op.bytes }, if comm.rank == last { 0 } else { op.bytes })
                }
                Some(Kind::AllGather) => (others * op.bytes, others * op.bytes),
                Some(Kind::AllReduce) => {
                    let bytes = 2 * others * op.bytes / comm.size as u64;
                    (bytes, bytes)
                }
            };
            lock().ledger.moved(op.name(), comm.device, received, sent);
        }
    }
}
