//! Host memory as a device: in place (`host`), and behind a queue the way a GPU is reached (`host:staged`).

use std::any::Any;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};

use super::elements::{copy_elements, element};
use super::{Allocation, Device, Feed, Home, Op, Queue, RawCopy, stream};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::stride::{bytes_moved, for_each_run};

/// Page-aligned anonymous memory, huge pages advised.
#[derive(Debug)]
pub(crate) struct Pages(MmapRaw);

impl Pages {
    /// Maps `bytes` (at least one page) of zeroed memory. Pages are populated where they are first written, so in
    /// parallel by the threads that read into them.
    pub(crate) fn new(bytes: usize) -> Result<Pages> {
        let map = MmapOptions::new().len(bytes.max(1)).map_anon().map_err(|error| {
            Error::new(ErrorKind::DeviceMemory, format!("no memory for {bytes} bytes: {error}")).with_source(error)
        })?;
        let map = MmapRaw::from(map);
        advise_huge_pages(map.as_mut_ptr(), bytes);
        Ok(Pages(map))
    }

    /// The first byte.
    pub(crate) fn address(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    /// Populates all pages now, and prefers a NUMA node for them if one is named; their contents stay. What the system
    /// refuses costs speed, nothing else.
    pub(crate) fn populate(&mut self, node: Option<u32>) {
        let (address, bytes) = (self.0.as_mut_ptr(), self.0.len());
        if let Some(node) = node {
            prefer_node(address, bytes, node);
        }
        #[cfg(target_os = "linux")]
        {
            let advice = rustix::mm::Advice::LinuxPopulateWrite; // Linux 5.14
            // SAFETY: the range is this mapping; the advice changes no contents.
            if unsafe { rustix::mm::madvise(address.cast(), bytes, advice) }.is_ok() {
                return;
            }
        }
        for page in (0..bytes).step_by(rustix::param::page_size()) {
            // SAFETY: the byte lies in this mapping, which nobody else uses while it is borrowed for writing. Volatile,
            // so that the page is written to at all.
            unsafe { address.add(page).write_volatile(address.add(page).read_volatile()) };
        }
    }
}

/// Prefers a NUMA node for the whole pages of a range, also for those that it has. A refusal costs speed, nothing else.
fn prefer_node(address: *mut u8, bytes: usize, node: u32) {
    #[cfg(target_os = "linux")]
    {
        /// `linux/mempolicy.h`; libc has no name for it.
        const MPOL_MF_MOVE: libc::c_uint = 2;
        let mut nodes = [0 as libc::c_ulong; limits::NUMA_NODES / libc::c_ulong::BITS as usize];
        let bits = libc::c_ulong::BITS;
        let Some(word) = nodes.get_mut((node / bits) as usize) else { return };
        *word = 1 << (node % bits);
        // The kernel takes one bit less than it is told.
        let count = limits::NUMA_NODES as libc::c_ulong + 1;
        // SAFETY: the range lies in memory of the caller, whose contents stay; the kernel reads `count - 1` bits of
        // `nodes`, which has as many.
        unsafe {
            let mode = libc::MPOL_PREFERRED;
            libc::syscall(libc::SYS_mbind, address, bytes, mode, nodes.as_ptr(), count, MPOL_MF_MOVE)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (address, bytes, node);
}

/// Advises huge pages for the whole ones in a range; a refusal costs speed, nothing else.
pub(super) fn advise_huge_pages(address: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let start = address.addr().next_multiple_of(HUGE);
        let end = (address.addr() + bytes) / HUGE * HUGE;
        if start < end {
            let start = address.with_addr(start);
            // SAFETY: the range lies in memory of the caller; the advice changes no contents.
            let _ = unsafe { rustix::mm::madvise(start.cast(), end - start.addr(), rustix::mm::Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (address, bytes);
}

/// Makes one copy now, on this thread.
///
/// # Safety
/// - every source byte that `copy` names is readable, every destination byte writable host memory;
/// - nobody else writes either or reads the destination meanwhile, and the two do not overlap.
pub(crate) unsafe fn copy_now(copy: &RawCopy) {
    let streams = copy.run >= limits::STREAM_RUN && bytes_moved(&copy.loops, copy.run) >= limits::STREAM_MIN;
    // SAFETY: the same duties.
    unsafe { copy_by(copy, streams) }
}

/// The same for what is looked at next: it stays in the processor's cache.
///
/// # Safety
/// As for [`copy_now`].
pub(crate) unsafe fn copy_to_look_at(copy: &RawCopy) {
    // SAFETY: the same duties.
    unsafe { copy_by(copy, false) }
}

/// Makes a copy; if it `streams`, past the processor's caches.
///
/// # Safety
/// As for [`copy_now`].
unsafe fn copy_by(copy: &RawCopy, streams: bool) {
    if let Some(bytes) = element(copy) {
        // SAFETY: the same duties.
        return unsafe { copy_elements(copy, bytes) };
    }
    let dst = std::ptr::with_exposed_provenance_mut::<u8>(copy.dst as usize);
    let run = copy.run as usize;
    for_each_run(&copy.loops, 0, 0, &mut |src_offset, dst_offset| {
        // SAFETY: the caller answers for every run of the copy.
        unsafe {
            let (src, dst) = (copy.src.add(src_offset as usize), dst.add(dst_offset as usize));
            match copy.cast {
                Some(cast) => cast.convert_raw(src, dst, run / cast.source_bytes()),
                None if streams => stream::copy(src, dst, run),
                None => std::ptr::copy_nonoverlapping(src, dst, run),
            }
        }
    });
    if streams {
        stream::fence();
    }
}

/// Host memory, reached directly.
#[derive(Debug)]
pub(crate) struct Host;

impl Device for Host {
    fn name(&self) -> String {
        "host".into()
    }

    fn queue(&self, _: Feed) -> Result<Option<Box<dyn Queue>>> {
        Ok(None)
    }

    fn block(&self, bytes: usize) -> Result<Allocation> {
        Allocation::pages(bytes)
    }

    fn tensor(&self, bytes: usize, alignment: usize) -> Result<Allocation> {
        Allocation::heap(bytes, alignment)
    }

    unsafe fn lent(&self, address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        // SAFETY: the same duties.
        unsafe { Allocation::lent(address, keep) }
    }
}

/// Host memory behind a queue and a thread of its own.
#[derive(Debug)]
pub(crate) struct HostStaged;

impl Device for HostStaged {
    fn name(&self) -> String {
        "host:staged".into()
    }

    fn block(&self, bytes: usize) -> Result<Allocation> {
        Host.block(bytes)
    }

    fn tensor(&self, bytes: usize, alignment: usize) -> Result<Allocation> {
        Host.tensor(bytes, alignment)
    }

    unsafe fn lent(&self, address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        // SAFETY: the same duties.
        unsafe { Host.lent(address, keep) }
    }

    fn queue(&self, _: Feed) -> Result<Option<Box<dyn Queue>>> {
        // SAFETY: `Queue::submit`'s caller answers for the copies until they are done.
        Ok(Some(Box::new(ThreadQueue::new("shardlift-host", |copy| unsafe {
            copy_now(copy);
            Ok(())
        })?)))
    }
}

/// A queue whose copies a thread makes one after the other.
#[derive(Debug)]
pub(super) struct ThreadQueue {
    work: Option<Sender<Vec<Op>>>,
    done: Receiver<Result<u64>>,
    submitted: u64,
    finished: u64,
    thread: Option<thread::JoinHandle<()>>,
}

impl ThreadQueue {
    /// A queue that makes each copy with `copy`.
    pub(super) fn new(
        name: &str,
        mut copy: impl FnMut(&RawCopy) -> Result<()> + Send + 'static,
    ) -> Result<ThreadQueue> {
        let (work, inbox) = mpsc::channel::<Vec<Op>>();
        let (outbox, done) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                for (ticket, ops) in (1..).zip(inbox) {
                    let outcome = ops.iter().try_for_each(|op| match op {
                        Op::Copy(of_op) => copy(of_op),
                        Op::Cut { copies, .. } => copies.iter().try_for_each(&mut copy),
                    });
                    let outcome = outcome.map(|()| ticket);
                    if outbox.send(outcome).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| Error::new(ErrorKind::Device, format!("cannot start a copy thread: {error}")))?;
        Ok(ThreadQueue { work: Some(work), done, submitted: 0, finished: 0, thread: Some(thread) })
    }

    fn lost() -> Error {
        Error::new(ErrorKind::Device, "the copy thread died")
    }
}

impl Queue for ThreadQueue {
    unsafe fn submit(&mut self, ops: Vec<Op>, _: Home) -> Result<u64> {
        let work = self.work.as_ref().expect("bug in shardlift: submit after settle");
        work.send(ops).map_err(|_| ThreadQueue::lost())?;
        self.submitted += 1;
        Ok(self.submitted)
    }

    fn finished(&mut self) -> Result<u64> {
        while self.finished < self.submitted {
            match self.done.try_recv() {
                Ok(outcome) => self.finished = outcome?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(ThreadQueue::lost()),
            }
        }
        Ok(self.finished)
    }

    fn settle(&mut self, bound: Duration) -> bool {
        self.work = None;
        let began = Instant::now();
        loop {
            match self.done.recv_timeout(bound.saturating_sub(began.elapsed())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
                // The thread has ended.
                Err(RecvTimeoutError::Disconnected) => return true,
            }
        }
    }
}

impl Drop for ThreadQueue {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn populating_keeps_contents_whatever_the_node() {
        let bytes = 3 << 20;
        let mut pages = Pages::new(bytes).unwrap();
        // SAFETY: inside the pages, which nobody else uses.
        unsafe { pages.address().add(bytes - 1).write(7) };
        for node in [None, Some(0), Some(limits::NUMA_NODES as u32 - 1), Some(u32::MAX)] {
            pages.populate(node);
            // SAFETY: as above.
            assert_eq!(unsafe { [pages.address().read(), pages.address().add(bytes - 1).read()] }, [0, 7]);
        }
    }
}
