//! Memory with an owner: pages, a piece of the global heap, or memory lent by somebody else.

use std::alloc::{self, Layout};
use std::any::Any;
use std::fmt::Debug;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::host::Pages;
use crate::error::{Error, ErrorKind, Result};

/// Destination memory. Freed in its owner's way when dropped.
#[derive(Debug)]
pub(crate) struct Allocation {
    /// In the address space of the device; a pointer where it is the host's.
    address: u64,
    owner: Owner,
}

/// Memory that the host cannot reach by pointers.
pub(crate) trait DeviceMemory: Debug + Send + Sync {
    /// The address of the allocation that it is, or lies in.
    fn base(&self) -> u64;

    /// Whether it is memory of somebody else.
    fn is_lent(&self) -> bool;

    /// Copies bytes at `address` of the device to host memory.
    ///
    /// # Errors
    /// [`ErrorKind::Stalled`] if the device does not answer in time, and may still read the memory.
    ///
    /// # Safety
    /// - all of `address..address + into.len()` lies in this memory, was written, and nobody writes it meanwhile;
    /// - if this stalls the memory is never given back.
    unsafe fn read(&self, address: u64, into: &mut [u8]) -> Result<()>;

    /// The digest of bytes of the device, as [`Digest::of`](crate::Digest::of) takes it.
    ///
    /// # Errors
    /// As for [`read`](DeviceMemory::read).
    ///
    /// # Safety
    /// As for [`read`](DeviceMemory::read); `address` is a multiple of 8.
    unsafe fn digest(&self, address: u64, bytes: u64) -> Result<u64>;

    /// Which GPU it is of.
    #[cfg(feature = "candle-cuda")]
    fn gpu(&self) -> u32;

    /// Gives the memory up, if it is one that a `CudaSlice` of cudarc frees, from `address` on; else gives itself back.
    #[cfg(feature = "candle-cuda")]
    fn give_up(self: Box<Self>) -> Result<(), Box<dyn DeviceMemory>>;
}

#[derive(Debug)]
enum Owner {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "made by GPUs only"))]
    Device(Box<dyn DeviceMemory>),
    Pages(#[expect(dead_code, reason = "held for its Drop")] Pages),
    Heap(Layout),
    /// Memory of somebody else, kept alive by this handle.
    Lent(#[expect(dead_code, reason = "held for its Drop")] Arc<dyn Any + Send + Sync>),
}

impl Allocation {
    /// Fresh zeroed pages, huge where the system grants them.
    pub(crate) fn pages(bytes: usize) -> Result<Allocation> {
        let pages = Pages::new(bytes)?;
        Ok(Allocation { address: pages.address().expose_provenance() as u64, owner: Owner::Pages(pages) })
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
        Ok(Allocation { address: address.expose_provenance() as u64, owner: Owner::Heap(layout) })
    }

    /// Memory that `keep` keeps alive.
    ///
    /// # Safety
    /// - the memory at `address`, as much as is used of it, is readable for as long as `keep` lives;
    /// - it is writable too if it is a destination that bytes are copied to, and nobody else uses it until then.
    pub(crate) unsafe fn lent(address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        Allocation { address: address.expose_provenance() as u64, owner: Owner::Lent(keep) }
    }

    /// Memory of a device.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(address: u64, memory: Box<dyn DeviceMemory>) -> Allocation {
        Allocation { address, owner: Owner::Device(memory) }
    }

    /// The address of the first byte; a pointer unless this is [memory of a device](Allocation::device).
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The address of the whole allocation that this is, or lies in as far as is known: no copy may reach from one into
    /// another.
    pub(crate) fn base(&self) -> u64 {
        self.device().map_or(self.address, DeviceMemory::base)
    }

    /// How to reach it, if the host cannot by pointers.
    pub(crate) fn device(&self) -> Option<&dyn DeviceMemory> {
        match &self.owner {
            Owner::Device(memory) => Some(&**memory),
            Owner::Pages(_) | Owner::Heap(_) | Owner::Lent(_) => None,
        }
    }

    /// Whether it is memory of somebody else.
    pub(crate) fn is_lent(&self) -> bool {
        match &self.owner {
            Owner::Device(memory) => memory.is_lent(),
            Owner::Lent(_) => true,
            Owner::Pages(_) | Owner::Heap(_) => false,
        }
    }

    /// Gives the memory up as the parts of a `Vec` whose elements have this size and alignment, if that is how it
    /// was allocated; else gives itself back.
    pub(crate) fn into_vec_parts(self, size: usize, alignment: usize) -> Result<(*mut u8, usize), Allocation> {
        match self.owner {
            Owner::Heap(layout) if layout.align() == alignment && layout.size() % size == 0 => {
                let this = ManuallyDrop::new(self);
                Ok((this.pointer(), layout.size() / size))
            }
            _ => Err(self),
        }
    }

    /// Gives the memory up as what a `CudaSlice` of cudarc can own, if that is how it was allocated; else gives itself back.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn into_gpu_memory(mut self) -> Result<u64, Allocation> {
        match std::mem::replace(&mut self.owner, Owner::Heap(Layout::new::<()>())) {
            Owner::Device(memory) => match memory.give_up() {
                Ok(()) => Ok(self.address),
                Err(memory) => Err(Allocation { address: self.address, owner: Owner::Device(memory) }),
            },
            owner => Err(Allocation { address: self.address, owner }),
        }
    }

    /// The first byte of host memory.
    fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address as usize)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Owner::Heap(layout) = self.owner
            && layout.size() > 0
        {
            // SAFETY: allocated in `heap` with this layout and not given away (`into_vec_parts` forgets `self`).
            unsafe { alloc::dealloc(self.pointer(), layout) }
        }
    }
}
