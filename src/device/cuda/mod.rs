//! GPUs of NVIDIA, through the driver alone. The only module that names cudarc.

mod context;
mod driver;
mod facts;
mod kernels;
mod measure;
mod memory;
mod pinned;
mod queue;
mod service;
mod stream;
mod wire;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use self::context::Context;
use self::memory::Memory;
use super::{Allocation, Device, Feed, Pinner, Queue, Wire, WireSize};
use crate::error::Result;
use crate::limits;

pub(crate) use context::stay;
pub use facts::{CudaFacts, CudaMachine, PcieLink, cuda_machine};
pub use measure::{CopyMeasurements, copy_measurements, pinned_gb_per_s};
pub(crate) use stream::CudaStream;

/// One GPU, whose primary context is kept while this or any memory of it lives.
#[derive(Debug, Clone)]
pub(crate) struct Cuda {
    context: Arc<Context>,
}

impl Cuda {
    /// The GPU with this number. Whoever waits for it outside of a load does so for at most `stall`.
    ///
    /// # Errors
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) if there is no driver or no such device.
    pub(crate) fn open(ordinal: u32, stall: Duration) -> Result<Cuda> {
        Ok(Cuda { context: Context::open(ordinal, stall)? })
    }

    /// Makes its context current on this thread until what this returns is dropped, for calls of other libraries.
    pub(crate) fn enter(&self) -> Result<context::Entered> {
        self.context.enter()
    }

    /// A stream of its own, for operations of other libraries.
    pub(crate) fn stream(&self) -> Result<CudaStream> {
        CudaStream::new(&self.context)
    }

    fn allocation(memory: Memory) -> Allocation {
        Allocation::on_device(memory.address(), Box::new(memory))
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        format!("cuda:{}", self.context.ordinal())
    }

    fn queue(&self, feed: Feed) -> Result<Option<Box<dyn Queue>>> {
        Ok(Some(Box::new(queue::CudaQueue::new(&self.context, feed)?)))
    }

    fn cuda(&self) -> Option<&Cuda> {
        Some(self)
    }

    fn wire(&self, size: WireSize) -> Result<Option<Box<dyn Wire>>> {
        Ok(Some(Box::new(wire::CudaWire::new(&self.context, size)?)))
    }

    fn block(&self, bytes: usize) -> Result<Allocation> {
        Memory::block(&self.context, bytes).map(Cuda::allocation)
    }

    fn tensor(&self, bytes: usize, _: usize) -> Result<Allocation> {
        Memory::pooled(&self.context, bytes).map(Cuda::allocation)
    }

    unsafe fn lent(&self, address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        Cuda::allocation(Memory::lent(&self.context, address.addr() as u64, keep))
    }

    fn taken_by(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(limits::DEVICE_GRANULARITY)
    }

    fn taken_besides(&self, feed: Feed) -> u64 {
        let scratch = if feed.cuts { (limits::STREAMS * queue::scratch_bytes(feed)) as u64 } else { 0 };
        feed.slots + scratch + feed.wire.map_or(0, |size| size.bytes() + wire::scratch_bytes(size) as u64)
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.context.memory().map(|(free, _)| Some(free))
    }

    fn is_gpu(&self) -> bool {
        true
    }

    fn current(&self) -> Result<Box<dyn Any>> {
        Ok(Box::new(self.context.enter()?))
    }

    /// Of `cuMemAlloc`: that is what other libraries register.
    fn slot(&self, bytes: usize) -> Result<Allocation> {
        Memory::plain(&self.context, bytes).map(Cuda::allocation)
    }

    fn pinner(&self) -> Option<Arc<dyn Pinner>> {
        Some(Arc::new(pinned::CudaPinner::new(&self.context, facts::numa_node(self.context.device()))))
    }

    fn copies_any(&self) -> bool {
        false
    }

    fn prepare_cuts(&self) -> Result<()> {
        self.context.module().map(|_| ())
    }
}
