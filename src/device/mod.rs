//! Hardware behind an unsafe contract: memory and copy queues. Obeys, checks nothing, knows no tensors, files, plans.

mod allocation;
mod elements;
mod file;
mod host;

use std::fmt::Debug;
use std::time::Duration;

use crate::cast::Cast;
use crate::error::Result;
use crate::stride::Loops;

pub(crate) use allocation::Allocation;
pub(crate) use file::FileDevice;
pub(crate) use host::{Host, HostStaged, Pages, copy_now};

/// One strided copy from host memory to an address of a device.
#[derive(Debug)]
pub(crate) struct RawCopy {
    pub(crate) src: *const u8,
    /// An address in the device's own space; for host memory, a pointer.
    pub(crate) dst: u64,
    pub(crate) loops: Loops,
    /// Source bytes of each run.
    pub(crate) run: u64,
    /// Elements are converted on the way: then source strides are in bytes of the one type, destination strides in
    /// bytes of the other.
    pub(crate) cast: Option<Cast>,
}

// SAFETY: a `RawCopy` is a description; whoever submits it answers for the memory it names (see `Queue::submit`).
unsafe impl Send for RawCopy {}

/// A kind of memory that destinations can live in.
pub(crate) trait Device: Debug + Send + Sync {
    /// A queue of copies into this device's memory, or `None` if its memory is the host's own: then reads may land
    /// in it directly, and copies are made at once by whoever has the bytes in cache ([`copy_now`]).
    fn queue(&self) -> Result<Option<Box<dyn Queue>>>;
}

/// A queue of copies that are done in the background, in order.
pub(crate) trait Queue: Send {
    /// Queues copies; they have a ticket in common, one higher than the last.
    ///
    /// # Safety
    /// Until [`wait`](Queue::wait) returned this ticket or a higher one, or the queue was dropped:
    /// - every source byte that the copies name is readable and not written;
    /// - every destination byte is writable memory of this device, and nobody else reads or writes it.
    unsafe fn submit(&mut self, copies: Vec<RawCopy>) -> Result<u64>;

    /// The highest ticket that is done, waiting for at most `bound` if the last submitted one is not.
    fn wait(&mut self, bound: Duration) -> Result<u64>;

    /// Whether no copy is under way any more, failed ones included, waiting for at most `bound`. Until it says so,
    /// dropping the queue may take for ever.
    fn settle(&mut self, bound: Duration) -> bool;
}

/// Makes host memory known to a driver, so that every device of it copies from there directly and in the background.
pub(crate) trait Pinner: Debug + Send + Sync {
    /// Pins memory until what this returns is dropped.
    ///
    /// # Safety
    /// `address..address + bytes` is mapped, page-aligned, and stays mapped until then.
    unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<Pinned>;

    /// The NUMA node that is nearest to all of its devices, where there is one such node of several.
    fn numa_node(&self) -> Option<u32>;
}

/// Pinned memory; dropping it unpins.
pub(crate) type Pinned = Box<dyn Debug + Send + Sync>;
