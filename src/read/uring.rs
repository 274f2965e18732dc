//! io_uring: many large reads in flight from few threads, past the page cache (O_DIRECT) where the file system
//! allows it, into registered slots where the memory limit allows that.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;

use foldhash::fast::FixedState;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use super::{Engine, Next, Request, Work, pread};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::stage::Slot;

/// Reads through io_uring, one ring for each thread.
#[derive(Debug)]
pub struct Uring {
    threads: usize,
    depth: u32,
    direct: bool,
}

impl Uring {
    /// Rings of `depth` reads, 1 to [`limits::URING_DEPTH_MAX`], on this many threads; with `direct` past the page cache where
    /// files allow it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the system refuses io_uring (an old kernel, a container's filter, no locked
    /// memory).
    pub fn new(threads: usize, depth: u32, direct: bool) -> Result<Uring> {
        let depth = depth.clamp(1, limits::URING_DEPTH_MAX);
        match ring(depth).and_then(|ring| try_out(&ring)) {
            Ok(()) => Ok(Uring { threads: threads.max(1), depth, direct }),
            Err(error) => {
                Err(Error::new(ErrorKind::Unsupported, format!("io_uring is refused: {error}")).with_source(error))
            }
        }
    }
}

// SAFETY: the kernel counts what it wrote; `Flights` holds a request until its completion was seen, also when dropped.
unsafe impl Engine for Uring {
    fn name(&self) -> &'static str {
        "uring"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn alignment(&self) -> u64 {
        if self.direct { limits::DIRECT_ALIGNMENT } else { 1 }
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        // Each ring takes locked memory on old kernels: what the first ring got, the third may not.
        let Ok(ring) = ring(self.depth) else { return pread::run(work) };
        let mut flights = Flights::new(ring, self.depth, self.direct);
        loop {
            while !flights.full() {
                match work.next(flights.in_flight == 0) {
                    Next::Request(request) => flights.submit(request),
                    Next::Later => break,
                    Next::Finished if flights.in_flight == 0 => return Ok(()),
                    Next::Finished => break,
                }
            }
            flights.reap(work)?;
        }
    }
}

/// A ring for the thread that calls this; completions are handled when that thread asks for them (Linux 6.1), not by
/// interrupting it.
fn ring(depth: u32) -> io::Result<IoUring> {
    let tuned = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(depth);
    tuned.or_else(|_| IoUring::new(depth))
}

/// Whether the kernel knows the reads that we need. The filters of containers refuse already the set-up of a ring.
fn try_out(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if probe.is_supported(opcode::Read::CODE) { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// A ring and the requests that the kernel has. The kernel may write to their buffers until they complete, so
/// dropping this waits for them.
struct Flights {
    ring: IoUring,
    /// By the number that the kernel knows them by.
    flights: Vec<Option<Flight>>,
    in_flight: usize,
    direct: bool,
    registered: Registered,
}

struct Flight {
    request: Request,
    /// Whether the kernel was asked to read past the page cache.
    past_cache: bool,
}

impl Flights {
    fn new(ring: IoUring, depth: u32, direct: bool) -> Flights {
        let registered = Registered::new(&ring);
        let flights = (0..depth).map(|_| None).collect();
        Flights { ring, flights, in_flight: 0, direct, registered }
    }

    fn full(&self) -> bool {
        self.in_flight == self.flights.len()
    }

    fn submit(&mut self, request: Request) {
        let position = self.flights.iter().position(Option::is_none).expect("bug in shardlift: the ring is full");
        self.flights[position] = Some(Flight { request, past_cache: false });
        self.in_flight += 1;
        self.push(position);
    }

    /// Queues the read of a request that is entered in `flights`.
    fn push(&mut self, position: usize) {
        let Flight { request, past_cache } = self.flights[position].as_mut().expect("bug in shardlift: no flight");
        let direct = if self.direct { request.file.direct(limits::DIRECT_ALIGNMENT) } else { None };
        *past_cache = direct.is_some();
        let descriptor = types::Fd(direct.unwrap_or_else(|| request.file.file()).as_raw_fd());
        let registered = request.slot.as_ref().and_then(|slot| self.registered.position(&self.ring, slot));
        let (offset, buffer) = (request.offset, request.buffer());
        let address = buffer.as_mut_ptr().cast();
        // A completion counts at most i32::MAX bytes; a longer read comes back short and is continued.
        let bytes = u32::try_from(buffer.len()).unwrap_or(1 << 30);
        let entry: squeue::Entry = match registered {
            Some(index) => opcode::ReadFixed::new(descriptor, address, bytes, index).offset(offset).build(),
            None => opcode::Read::new(descriptor, address, bytes).offset(offset).build(),
        };
        // SAFETY: the buffer belongs to the request, which stays in `flights` until its completion was seen (also
        // when this is dropped), and both descriptors of the request's file are open for as long as that lives.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(position as u64)) };
        pushed.expect("bug in shardlift: more requests than the ring has entries");
    }

    /// Submits what was pushed, waits for at least one completion, and hands all back that there are.
    fn reap(&mut self, work: &dyn Work) -> Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The kernel is short of something for now; completions may free it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                std::thread::sleep(limits::URING_BUSY);
            }
            Err(error) => return Err(Error::new(ErrorKind::Io, format!("io_uring: {error}")).with_source(error)),
        }
        while let Some((position, result)) = self.completed() {
            let flight = self.flights[position].take().expect("bug in shardlift: a completion of nothing");
            if flight.past_cache && result < 0 && only_direct_is_refused(-result) {
                flight.request.file.refuse_direct();
                self.flights[position] = Some(flight);
                self.push(position);
                continue;
            }
            self.in_flight -= 1;
            let outcome = match usize::try_from(result) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(-result)),
            };
            work.done(flight.request, outcome);
        }
        Ok(())
    }

    fn completed(&mut self) -> Option<(usize, i32)> {
        let entry: cqueue::Entry = self.ring.completion().next()?;
        Some((entry.user_data() as usize, entry.result()))
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.ring.submit_and_wait(1).is_err() {
                // The load's supervisor watches how long this goes on.
                std::thread::sleep(limits::LOOK_AGAIN);
            }
            while let Some((position, _)) = self.completed() {
                self.flights[position] = None;
                self.in_flight -= 1;
            }
        }
    }
}

/// Whether an error may only say that the file is not read past the page cache: some file systems open files for that
/// and then do not read them. Then it is read once more, through the cache.
fn only_direct_is_refused(errno: i32) -> bool {
    matches!(errno, libc::EINVAL | libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOMEM)
}

/// The slots whose pages a ring holds pinned, so that the kernel does not look them up for every read.
struct Registered {
    /// Slot to position in the ring's table.
    positions: HashMap<u64, u16, FixedState>,
    /// How many positions are left; 0 after a refusal.
    left: u16,
}

impl Registered {
    fn new(ring: &IoUring) -> Registered {
        let table = ring.submitter().register_buffers_sparse(u32::from(limits::URING_SLOTS));
        Registered { positions: HashMap::default(), left: if table.is_ok() { limits::URING_SLOTS } else { 0 } }
    }

    /// The slot's position, registering it if it has none and the system still allows it.
    fn position(&mut self, ring: &IoUring, slot: &Slot) -> Option<u16> {
        if let Some(&position) = self.positions.get(&slot.serial()) {
            return Some(position);
        }
        let position = limits::URING_SLOTS - self.left;
        let buffer = libc::iovec { iov_base: slot.address().cast(), iov_len: slot.bytes() };
        // SAFETY: the pages are pinned by the kernel, so they outlive the slot's memory should that be freed while
        // the ring lives; they are written only by reads of a request that holds this very slot: a slot that gets
        // other memory gets another serial number.
        let registered = || unsafe { ring.submitter().register_buffers_update(u32::from(position), &[buffer], None) };
        if self.left == 0 || registered().is_err() {
            // No locked memory left, or not this many slots: plain reads do as well.
            self.left = 0;
            return None;
        }
        self.left -= 1;
        self.positions.insert(slot.serial(), position);
        Some(position)
    }
}
