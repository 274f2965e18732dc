//! Hardware behind an unsafe contract: memory and copy queues. Obeys, checks nothing, knows no tensors, files, plans.

mod allocation;
#[cfg(feature = "cuda")]
mod cuda;
mod elements;
mod file;
mod host;
mod stream;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only GPUs exchange with others"))]
mod wire;

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use crate::cast::Cast;
use crate::error::{Error, ErrorKind, Result};
use crate::stride::Loops;

pub(crate) use allocation::Allocation;
#[cfg(feature = "cuda")]
pub(crate) use allocation::DeviceMemory;
#[cfg(feature = "cuda")]
pub use cuda::{CopyMeasurements, CudaFacts, CudaMachine, PcieLink, copy_measurements, cuda_machine, pinned_gb_per_s};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{Cuda, CudaStream, stay};
pub(crate) use file::FileDevice;
pub(crate) use host::{Host, HostStaged, Pages, copy_now, copy_to_look_at};
pub(crate) use wire::WireSize;
#[cfg(feature = "cuda")]
pub(crate) use wire::{Arrived, Wire};

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

/// Where the bytes are that operations take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Home {
    /// In memory of the host.
    Host,
    /// In memory of the device whose queue makes the copies; sources are addresses there.
    Device,
}

/// What a queue is asked to do.
#[derive(Debug)]
pub(crate) enum Op {
    /// A copy straight to its place; of at most one loop and without a cast, unless the device
    /// [copies anything](Device::copies_any).
    Copy(RawCopy),
    /// Bytes that land in the device's own scratch memory as they are, and are put in place from there: the copies'
    /// sources lie in `src..src + bytes`.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "read by GPUs only"))]
    Cut {
        /// The first byte.
        src: *const u8,
        /// How many.
        bytes: usize,
        /// What becomes of them.
        copies: Vec<RawCopy>,
    },
}

// SAFETY: as for `RawCopy`.
unsafe impl Send for Op {}

/// What a queue will be fed with.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by GPUs only"))]
pub(crate) struct Feed {
    /// Most bytes that one operation takes from.
    pub(crate) slot_bytes: usize,
    /// Whether there are sure to be [cuts](Op::Cut) of the host's memory, so that it takes early what those need.
    pub(crate) cuts: bool,
    /// Bytes of slots in the device's own memory.
    pub(crate) slots: u64,
    /// The [wire](Device::wire) beside it, if there is one.
    pub(crate) wire: Option<WireSize>,
}

/// A kind of memory that destinations can live in.
pub(crate) trait Device: Debug + Send + Sync {
    /// As reports name it, for instance `cuda:0`.
    fn name(&self) -> String;

    /// A queue of copies into this device's memory, or `None` if its memory is the host's own: then reads may land
    /// in it directly, and copies are made at once by whoever has the bytes in cache ([`copy_now`]).
    fn queue(&self, feed: Feed) -> Result<Option<Box<dyn Queue>>>;

    /// What it exchanges bytes with devices of other processes through; `None` if it cannot.
    #[cfg(feature = "cuda")]
    fn wire(&self, _size: WireSize) -> Result<Option<Box<dyn Wire>>> {
        Ok(None)
    }

    /// The GPU that it is.
    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Option<&Cuda> {
        None
    }

    /// Whether its queue makes every copy itself, however many loops it has and with a cast.
    fn copies_any(&self) -> bool {
        true
    }

    /// Does early what the first [cut](Op::Cut) would wait for.
    fn prepare_cuts(&self) -> Result<()> {
        Ok(())
    }

    /// A block of memory for many tensors.
    fn block(&self, bytes: usize) -> Result<Allocation>;

    /// Memory for one tensor, of the kind that the owner of such tensors gives back itself.
    fn tensor(&self, bytes: usize, alignment: usize) -> Result<Allocation>;

    /// Memory of the caller's, an address of this device, that `keep` keeps alive.
    ///
    /// # Safety
    /// - what is used of the memory is readable for as long as `keep` lives;
    /// - it is writable too if it is a destination that bytes are copied to, and nobody else uses it until then.
    unsafe fn lent(&self, address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation;

    /// Bytes that an allocation of this size takes.
    fn taken_by(&self, bytes: u64) -> u64 {
        bytes
    }

    /// Bytes that a queue takes.
    fn taken_besides(&self, _feed: Feed) -> u64 {
        0
    }

    /// Bytes that can still be allocated, if the device's memory is not the host's.
    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Whether its memory is that of a GPU.
    fn is_gpu(&self) -> bool {
        false
    }

    /// Makes its context, if it has such a thing, current on this thread until what this returns is dropped.
    fn current(&self) -> Result<Box<dyn Any>> {
        Ok(Box::new(()))
    }

    /// Memory for a slot on the device itself.
    fn slot(&self, _bytes: usize) -> Result<Allocation> {
        Err(Error::new(ErrorKind::Unsupported, format!("{} has no memory for slots", self.name())))
    }

    /// What pins the memory that its queue copies from; `None` if it copies from any.
    fn pinner(&self) -> Option<Arc<dyn Pinner>> {
        None
    }
}

/// Stands for what keeps contexts of drivers current on a thread, which there are none of.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
pub(crate) struct Stay;

/// Lets this thread stay in contexts of drivers.
#[cfg(not(feature = "cuda"))]
pub(crate) fn stay() -> Stay {
    Stay
}

/// A queue of copies that are done in the background, in order.
pub(crate) trait Queue: Send {
    /// Queues operations whose sources are in memory of `from`; they have a ticket in common, one higher than the last. If
    /// it fails, some of them may be under way (see [`settle`](Queue::settle)). [`finished`](Queue::finished) tells of them
    /// after a [`mark`](Queue::mark).
    ///
    /// # Safety
    /// Until [`finished`](Queue::finished) returned this ticket or a higher one, or the queue was dropped:
    /// - every source byte that they name is readable and not written;
    /// - every destination byte is writable memory of this device, and nobody else reads or writes it.
    unsafe fn submit(&mut self, ops: Vec<Op>, from: Home) -> Result<u64>;

    /// Lets [`finished`](Queue::finished) tell of all that was submitted.
    fn mark(&mut self) -> Result<()> {
        Ok(())
    }

    /// The highest ticket that is done, as far as is known without waiting.
    fn finished(&mut self) -> Result<u64>;

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

    /// Makes a slot in a device's memory, until what this returns is dropped; also its address.
    fn make(&self, _bytes: usize) -> Result<(u64, Pinned)> {
        Err(Error::new(ErrorKind::Unsupported, "slots are not made, but pinned"))
    }

    /// Pins memory that is only read, for instance a mapping of a file, until what this returns is dropped; only where
    /// it [can](Pinner::pins_read_only). `None` if devices copy from there as it is.
    ///
    /// # Safety
    /// `address..address + bytes` is mapped, page-aligned, and stays mapped until then.
    unsafe fn pin_read_only(&self, _address: *const u8, _bytes: usize) -> Result<Option<Pinned>> {
        Err(Error::new(ErrorKind::Unsupported, "read-only memory cannot be pinned"))
    }

    /// Whether all of its devices can copy from such memory.
    fn pins_read_only(&self) -> bool {
        false
    }

    /// The NUMA node that is nearest to all of its devices, where there is one such node of several.
    fn numa_node(&self) -> Option<u32>;
}

/// Pinned memory; dropping it unpins.
pub(crate) type Pinned = Box<dyn Debug + Send + Sync>;
