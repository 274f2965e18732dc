//! Memory of a GPU: blocks that can be exported to other processes, memory of the pool, and the caller's.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::context::Context;
use super::driver::{self, Attribute, RawHandle};
use super::kernels;
use crate::device::DeviceMemory;
use crate::error::{Error, ErrorKind, Result};

/// Memory of a GPU, given back in its own way.
pub(super) struct Memory {
    context: Arc<Context>,
    address: u64,
    kind: Kind,
}

enum Kind {
    /// Virtual addresses over physical memory that can be exported; how far its making came.
    Mapped { bytes: usize, handle: Option<RawHandle>, reserved: bool, mapped: bool },
    /// Of `cuMemAlloc`.
    Plain,
    /// Of the device's pool, as a `CudaSlice` of cudarc has it: `cuMemAllocAsync`.
    Pooled,
    /// Somebody else's now.
    #[cfg(feature = "candle-cuda")]
    GivenUp,
    /// The caller's, in an allocation that starts at `base`.
    Lent {
        base: u64,
        #[expect(dead_code, reason = "held for its Drop")]
        keep: Arc<dyn Any + Send + Sync>,
    },
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of cuda:{} at {:#x}", self.context.ordinal(), self.address)
    }
}

impl Memory {
    /// A block of its own: mapped where the device can, so that it can be exported to other processes.
    pub(super) fn block(context: &Arc<Context>, bytes: usize) -> Result<Memory> {
        let can_map = context.has(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
            && context.has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
        if can_map && let Some(memory) = Memory::mapped(context, bytes)? {
            return Ok(memory);
        }
        Memory::plain(context, bytes)
    }

    /// Memory of `cuMemAlloc`.
    pub(super) fn plain(context: &Arc<Context>, bytes: usize) -> Result<Memory> {
        // SAFETY: the context is current.
        let address =
            context.with(|| unsafe { driver::allocate(bytes.max(1)) }).map_err(|error| sized(context, error, bytes))?;
        Ok(Memory { context: Arc::clone(context), address, kind: Kind::Plain })
    }

    /// A mapped block, or `None` where this process may not have one (containers without the right to file descriptors
    /// of the driver).
    fn mapped(context: &Arc<Context>, bytes: usize) -> Result<Option<Memory>> {
        let device = context.device();
        // SAFETY: the context is current, here and below.
        let granularity = context.with(|| unsafe { driver::granularity(device) })?.max(1);
        let bytes = bytes.max(1).next_multiple_of(granularity);
        let created = {
            let _entered = context.enter()?;
            // SAFETY: a multiple of the granularity.
            unsafe { driver::create_memory(device, bytes) }
        };
        let handle = match created {
            Ok(handle) => handle,
            Err(failure) if failure.is_unsupported() => return Ok(None),
            Err(failure) => return Err(sized(context, context.error(failure), bytes)),
        };
        // From here on dropping it undoes what was done.
        let kind = Kind::Mapped { bytes, handle: Some(handle), reserved: false, mapped: false };
        let mut memory = Memory { context: Arc::clone(context), address: 0, kind };
        let Kind::Mapped { handle: kept, reserved, mapped, .. } = &mut memory.kind else { unreachable!() };
        let address = &mut memory.address;
        context
            .with(|| {
                // SAFETY: the handle is live, the addresses are reserved before they are mapped, and mapped before
                // they are granted.
                unsafe {
                    *address = driver::reserve_addresses(bytes)?;
                    *reserved = true;
                    driver::map(*address, bytes, handle)?;
                    *mapped = true;
                    driver::grant(*address, bytes, device)?;
                    // The mapping keeps the memory.
                    *kept = None;
                    driver::release_memory(handle)
                }
            })
            .map_err(|error| sized(context, error, bytes))?;
        Ok(Some(memory))
    }

    /// Memory of one tensor, such that a `CudaSlice` can own it: it frees with `cuMemFreeAsync`.
    pub(super) fn pooled(context: &Arc<Context>, bytes: usize) -> Result<Memory> {
        if !context.has(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED) {
            return Memory::plain(context, bytes);
        }
        let stream = context.service()?;
        // SAFETY: the context is current, the stream is its own.
        let address = context.with(|| unsafe { driver::allocate_async(bytes.max(1), stream) });
        let address = address.map_err(|error| sized(context, error, bytes))?;
        let memory = Memory { context: Arc::clone(context), address, kind: Kind::Pooled };
        // Then it is there for every stream. Given back in the stream's order it would not be before it is there.
        context.serve(|_| Ok(()))?;
        Ok(memory)
    }

    /// Memory of the caller's at this address, which `keep` keeps alive.
    pub(super) fn lent(context: &Arc<Context>, address: u64, keep: Arc<dyn Any + Send + Sync>) -> Memory {
        // Of memory that the driver does not know nothing is assumed.
        // SAFETY: the context is current.
        let base = context.with(|| unsafe { driver::allocation_of(address) }).unwrap_or(address);
        Memory { context: Arc::clone(context), address, kind: Kind::Lent { base, keep } }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl DeviceMemory for Memory {
    fn base(&self) -> u64 {
        if let Kind::Lent { base, .. } = self.kind { base } else { self.address }
    }

    fn is_lent(&self) -> bool {
        matches!(self.kind, Kind::Lent { .. })
    }

    unsafe fn read(&self, address: u64, into: &mut [u8]) -> Result<()> {
        // SAFETY: the same duties.
        unsafe { self.context.read(address, into) }
    }

    unsafe fn digest(&self, address: u64, bytes: u64) -> Result<u64> {
        // SAFETY: the same duties.
        unsafe { kernels::digest(&self.context, address, bytes) }
    }

    #[cfg(feature = "candle-cuda")]
    fn gpu(&self) -> u32 {
        self.context.ordinal()
    }

    #[cfg(feature = "candle-cuda")]
    fn give_up(mut self: Box<Self>) -> Result<(), Box<dyn DeviceMemory>> {
        let has_pools = self.context.has(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED);
        match self.kind {
            Kind::Pooled => {}
            Kind::Plain if !has_pools => {}
            _ => return Err(self),
        }
        self.kind = Kind::GivenUp;
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let address = self.address;
        match &mut self.kind {
            // SAFETY: whoever used the memory held it, and what is undone was done.
            Kind::Mapped { bytes, handle, reserved, mapped } => unsafe {
                let unmapped = !std::mem::take(mapped) || self.context.give_back(|| driver::unmap(address, *bytes));
                if std::mem::take(reserved) && unmapped {
                    self.context.give_back(|| driver::free_addresses(address, *bytes));
                }
                if let Some(handle) = handle.take() {
                    self.context.give_back(|| driver::release_memory(handle));
                }
            },
            Kind::Plain => {
                // SAFETY: whoever used the memory held it; the driver waits for what is under way.
                self.context.give_back(|| unsafe { driver::free(address) });
            }
            Kind::Pooled => match self.context.service() {
                Ok(stream) => {
                    // SAFETY: whoever used the memory held it.
                    self.context.give_back(|| unsafe { driver::free_async(address, stream) });
                }
                Err(error) => tracing::warn!("{error}"),
            },
            #[cfg(feature = "candle-cuda")]
            Kind::GivenUp => {}
            Kind::Lent { .. } => {}
        }
    }
}

/// Says how much was asked for and what there is, if that was too little.
fn sized(context: &Context, error: Error, bytes: usize) -> Error {
    if error.kind() != ErrorKind::DeviceMemory {
        return error;
    }
    let free = context.memory().map_or("less".into(), |(free, _)| format!("{free} bytes"));
    error.with_expected(format!("{bytes} bytes"), free)
}
