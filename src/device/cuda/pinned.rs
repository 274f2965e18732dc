//! Host memory that every GPU copies from directly.

use std::sync::Arc;

use super::context::Context;
use super::driver::{self, Attribute};
use crate::device::{Pinned, Pinner};
use crate::error::Result;

/// Pins with the driver, in the context of one device, for all of them.
#[derive(Debug)]
pub(super) struct CudaPinner {
    context: Arc<Context>,
    numa_node: Option<u32>,
}

impl CudaPinner {
    pub(super) fn new(context: &Arc<Context>, numa_node: Option<u32>) -> CudaPinner {
        CudaPinner { context: Arc::clone(context), numa_node }
    }
}

impl Pinner for CudaPinner {
    unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<Pinned> {
        // SAFETY: the context is current; the caller answers for the memory.
        self.context.with(|| unsafe { driver::register(address, bytes, false) })?;
        Ok(Box::new(Registered { context: Arc::clone(&self.context), address }))
    }

    unsafe fn pin_read_only(&self, address: *const u8, bytes: usize) -> Result<Option<Pinned>> {
        if self.context.has(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES) {
            // The device reads the process's own pages.
            return Ok(None);
        }
        // SAFETY: the context is current; the caller answers for the memory.
        self.context.with(|| unsafe { driver::register(address.cast_mut(), bytes, true) })?;
        Ok(Some(Box::new(Registered { context: Arc::clone(&self.context), address: address.cast_mut() })))
    }

    fn pins_read_only(&self) -> bool {
        self.context.has(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)
            || self.context.has(Attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED)
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }
}

/// Memory that is registered with the driver.
#[derive(Debug)]
struct Registered {
    context: Arc<Context>,
    address: *mut u8,
}

// SAFETY: the address is only given to the driver, once, when this is dropped.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Drop for Registered {
    fn drop(&mut self) {
        let address = self.address;
        // SAFETY: registered when this was made, and whoever copied from there held it.
        self.context.give_back(|| unsafe { driver::unregister(address) });
    }
}
