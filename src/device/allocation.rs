//! Memory with an owner: pages, a piece of the global heap, or memory lent by somebody else.

use std::alloc::{self, Layout};
use std::any::Any;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::host::Pages;
use crate::error::{Error, ErrorKind, Result};

/// Destination memory. Freed in its owner's way when dropped.
#[derive(Debug)]
pub(crate) struct Allocation {
    address: *mut u8,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    Pages(#[expect(dead_code, reason = "held for its Drop")] Pages),
    Heap(Layout),
    /// Memory of somebody else, kept alive by this handle.
    Lent(#[expect(dead_code, reason = "held for its Drop")] Arc<dyn Any + Send + Sync>),
}

// SAFETY: the address is memory that this value owns or keeps alive. Access from several threads is governed by the
// pipeline, which writes each byte once before anyone may read it.
unsafe impl Send for Allocation {}
// SAFETY: as above; shared handles only read.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// Fresh zeroed pages, huge where the system grants them.
    pub(crate) fn pages(bytes: usize) -> Result<Allocation> {
        let pages = Pages::new(bytes)?;
        Ok(Allocation { address: pages.address(), owner: Owner::Pages(pages) })
    }

    /// Uninitialised memory of the global allocator, so that a `Vec<T>` with this alignment can own it.
    pub(crate) fn heap(bytes: usize, alignment: usize) -> Result<Allocation> {
        let out_of_memory = || Error::new(ErrorKind::DeviceMemory, format!("no memory for {bytes} bytes"));
        let layout = Layout::from_size_align(bytes, alignment).map_err(|_| out_of_memory())?;
        let address = if bytes == 0 {
            std::ptr::without_provenance_mut(alignment)
        } else {
            // SAFETY: the layout has a size above 0.
            unsafe { alloc::alloc(layout) }
        };
        if address.is_null() {
            return Err(out_of_memory());
        }
        super::host::advise_huge_pages(address, bytes);
        Ok(Allocation { address, owner: Owner::Heap(layout) })
    }

    /// Memory that `keep` keeps alive.
    ///
    /// # Safety
    /// - the memory at `address`, as much as is used of it, is readable for as long as `keep` lives;
    /// - it is writable too if it is a destination that bytes are copied to, and nobody else uses it until then.
    pub(crate) unsafe fn lent(address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        Allocation { address, owner: Owner::Lent(keep) }
    }

    /// The first byte.
    pub(crate) fn address(&self) -> *mut u8 {
        self.address
    }

    /// Gives the memory up as the parts of a `Vec` whose elements have this size and alignment, if that is how it
    /// was allocated; else gives itself back.
    pub(crate) fn into_vec_parts(self, size: usize, alignment: usize) -> Result<(*mut u8, usize), Allocation> {
        match self.owner {
            Owner::Heap(layout) if layout.align() == alignment && layout.size() % size == 0 => {
                let this = ManuallyDrop::new(self);
                Ok((this.address, layout.size() / size))
            }
            _ => Err(self),
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Owner::Heap(layout) = self.owner
            && layout.size() > 0
        {
            // SAFETY: allocated in `heap` with this layout and not given away (`into_vec_parts` forgets `self`).
            unsafe { alloc::dealloc(self.address, layout) }
        }
    }
}
