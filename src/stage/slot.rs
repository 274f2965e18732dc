//! A slot, by the type that holds it: [`SlotMemory`] while it is free, [`Slot`] while it is lent, [`Staged`] after.

use std::any::Any;

use super::{NOBODY, Ring};
use crate::device::{Home, Pages, Pinned, Pinner};
use crate::error::Result;
use crate::sync::Arc;

/// The memory of a slot.
#[derive(Debug)]
pub(super) struct SlotMemory {
    // Before the pages: unpinned, then unmapped. Of a device, the memory itself.
    pinned: Option<Pinned>,
    place: Place,
    serial: u64,
}

/// Where it lies.
#[derive(Debug)]
pub(super) enum Place {
    Host(Pages),
    /// At this address of a device, which the host does not reach; not made yet if that is 0.
    Device(u64),
}

impl SlotMemory {
    /// Memory that is not pinned, or not made.
    pub(super) fn new(place: Place, serial: u64) -> SlotMemory {
        SlotMemory { pinned: None, place, serial }
    }

    /// Whether it is pinned, or made.
    pub(super) fn is_pinned(&self) -> bool {
        self.pinned.is_some()
    }
}

/// A slot lent to an engine: its memory is the holder's alone. Goes back to the ring when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    memory: Option<Arc<SlotMemory>>,
    /// Counted by the ring as being pinned.
    pinning: bool,
    /// Whose share it counts for.
    holder: u64,
    ring: Ring,
}

impl Slot {
    /// A slot of this ring's memory, for a share of it.
    pub(super) fn new(memory: Arc<SlotMemory>, holder: u64, ring: Ring) -> Slot {
        Slot { memory: Some(memory), pinning: false, holder, ring }
    }

    /// A slot that the ring counts as being pinned until it is dropped.
    pub(super) fn to_pin(memory: Arc<SlotMemory>, ring: Ring) -> Slot {
        Slot { memory: Some(memory), pinning: true, holder: NOBODY, ring }
    }

    /// Pins the slot for good, and gives it back.
    pub(super) fn pin(mut self, pinner: &dyn Pinner) -> Result<()> {
        let bytes = self.ring.slot_bytes();
        let memory = self.memory.as_mut().and_then(Arc::get_mut).expect("bug in shardlift: a lent slot is shared");
        memory.pinned = Some(match &mut memory.place {
            Place::Host(pages) => {
                // Before pinning, which would take the faults one by one under a lock of the driver.
                pages.populate(pinner.numa_node());
                // SAFETY: whole pages of a mapping, which `SlotMemory` keeps until this was dropped.
                unsafe { pinner.pin(pages.address(), bytes)? }
            }
            Place::Device(address) => {
                let (made, kept) = pinner.make(bytes)?;
                *address = made;
                kept
            }
        });
        Ok(())
    }

    /// The first byte; [`Ring::slot_bytes`] bytes may be written. Of a slot in a device's memory it is an address there,
    /// which nobody here follows.
    pub(crate) fn address(&self) -> *mut u8 {
        match &self.memory().place {
            Place::Host(pages) => pages.address(),
            Place::Device(address) => std::ptr::without_provenance_mut(*address as usize),
        }
    }

    /// Where its memory is.
    pub(crate) fn home(&self) -> Home {
        self.ring.home()
    }

    /// The number of its memory among all that its ring ever made: never that of other memory, also at an address
    /// that was freed and came again.
    #[cfg(target_os = "linux")]
    pub(crate) fn serial(&self) -> u64 {
        self.memory().serial
    }

    /// The size.
    #[cfg(target_os = "linux")]
    pub(crate) fn bytes(&self) -> usize {
        self.ring.slot_bytes()
    }

    fn memory(&self) -> &SlotMemory {
        self.memory.as_ref().expect("bug in shardlift: slot without memory")
    }

    /// Hands the slot over for reading: no one writes to it again until the last handle is dropped.
    pub(crate) fn stage(self) -> Staged {
        Staged(Source::Slot(Handle(self)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let memory = self.memory.take().expect("bug in shardlift: slot without memory");
        self.ring.shared.take_back(memory, self.pinning, self.holder);
    }
}

/// One of several that have a slot, which is staged: the memory's count says how many. So a slot is shared without an
/// allocation of its own.
#[derive(Debug)]
struct Handle(Slot);

impl Clone for Handle {
    fn clone(&self) -> Handle {
        let Slot { memory, pinning: _, holder, ring } = &self.0;
        Handle(Slot { memory: memory.clone(), pinning: false, holder: *holder, ring: ring.clone() })
    }
}

/// Bytes that copies read from. Shared by the queues of all devices that take part of them; the last one to drop its
/// handle frees them.
#[derive(Debug, Clone)]
pub(crate) struct Staged(Source);

/// Whose bytes they are.
#[derive(Debug, Clone)]
enum Source {
    Slot(Handle),
    /// Of what `keep` keeps alive. Not loom's `Arc`, which holds no `dyn`.
    Lent {
        address: *const u8,
        #[expect(dead_code, reason = "held for its Drop")]
        keep: std::sync::Arc<dyn Any + Send + Sync>,
    },
}

// SAFETY: the bytes are only read: those of a slot because it is staged, lent ones as `Staged::lent` demands.
unsafe impl Send for Staged {}
// SAFETY: the same.
unsafe impl Sync for Staged {}

impl Staged {
    /// Bytes that are no slot's, for instance of a file's mapping.
    ///
    /// # Safety
    /// Until the last clone is dropped, for all bytes that copies read from `address` on:
    /// - `keep` keeps them mapped and readable, on every thread and by the device that the copies are for;
    /// - this process does not write to them.
    pub(crate) unsafe fn lent(address: *const u8, keep: std::sync::Arc<dyn Any + Send + Sync>) -> Staged {
        Staged(Source::Lent { address, keep })
    }

    /// The first byte.
    pub(crate) fn address(&self) -> *const u8 {
        match &self.0 {
            Source::Slot(Handle(slot)) => slot.address(),
            Source::Lent { address, .. } => *address,
        }
    }

    /// Where the bytes are: of a device's it is that of all its copies.
    pub(crate) fn home(&self) -> Home {
        match &self.0 {
            Source::Slot(Handle(slot)) => slot.home(),
            Source::Lent { .. } => Home::Host,
        }
    }
}
