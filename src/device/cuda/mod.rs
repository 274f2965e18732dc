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

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use self::context::Context;
use self::memory::Memory;
use super::{Allocation, Device, Feed, Pinner, Queue};
use crate::error::Result;
use crate::limits;

pub(crate) use context::stay;
pub use facts::{CudaFacts, CudaMachine, PcieLink, cuda_machine};
pub use measure::{CopyMeasurements, copy_measurements, pinned_gb_per_s};

/// One GPU, whose primary context is kept while this or any memory of it lives.
#[derive(Debug)]
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
        if feed.cuts { (limits::STREAMS * queue::scratch_bytes(feed)) as u64 } else { 0 }
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.context.memory().map(|(free, _)| Some(free))
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
