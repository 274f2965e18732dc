//! The ring of slots between read and copy. A slot is free, lent to an engine, or staged for copies; which one it
//! is, is the type that holds it, so nobody else needs to know the transitions.

use std::time::Duration;

use crate::device::Pages;
use crate::error::Result;
use crate::sync::{Arc, Condvar, Mutex, lock};

/// A bounded set of slots, kept and reused. Clones are handles to the same ring.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    slot_bytes: usize,
    slots_max: usize,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<SlotMemory>,
    /// Slots that exist, free or not.
    slots: usize,
    /// Slots that were ever made.
    made: u64,
}

#[derive(Debug)]
struct SlotMemory {
    pages: Pages,
    serial: u64,
}

impl Ring {
    /// A ring of at most `budget` bytes; no memory is taken yet. Holds at least one slot.
    pub(crate) fn new(budget: usize, slot_bytes: usize) -> Ring {
        let slots_max = (budget / slot_bytes).max(1);
        let shared = Shared { slot_bytes, slots_max, state: Mutex::new(State::default()), freed: Condvar::new() };
        Ring { shared: Arc::new(shared) }
    }

    /// The size of each slot.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.shared.slot_bytes
    }

    /// A free slot, made if there are fewer than the budget allows; `None` if all are in use.
    pub(crate) fn try_lend(&self) -> Result<Option<Slot>> {
        let mut state = lock(&self.shared.state);
        let memory = match state.free.pop() {
            Some(memory) => memory,
            None if state.slots == self.shared.slots_max => return Ok(None),
            None => {
                let pages = Pages::new(self.shared.slot_bytes)?;
                state.slots += 1;
                state.made += 1;
                SlotMemory { pages, serial: state.made }
            }
        };
        Ok(Some(Slot { memory: Some(memory), ring: self.clone() }))
    }

    /// Waits until a slot may be free, or `bound` has passed.
    pub(crate) fn wait(&self, bound: Duration) {
        let state = lock(&self.shared.state);
        if state.free.is_empty() && state.slots == self.shared.slots_max {
            let _ = self.shared.freed.wait_timeout(state, bound);
        }
    }

    /// Wakes everyone who waits for a slot, so that they notice a cancel or an error.
    pub(crate) fn wake(&self) {
        let _state = lock(&self.shared.state);
        self.shared.freed.notify_all();
    }

    /// Bytes of all slots that exist.
    pub(crate) fn bytes(&self) -> u64 {
        (lock(&self.shared.state).slots * self.shared.slot_bytes) as u64
    }

    /// Gives the memory of free slots back to the system.
    pub(crate) fn release(&self) {
        let mut state = lock(&self.shared.state);
        state.slots -= state.free.len();
        state.free.clear();
    }
}

/// A slot lent to an engine: its memory is the holder's alone. Goes back to the ring when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    memory: Option<SlotMemory>,
    ring: Ring,
}

impl Slot {
    /// The first byte; [`Ring::slot_bytes`] bytes may be written.
    pub(crate) fn address(&self) -> *mut u8 {
        self.memory().pages.address()
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
        Staged(Arc::new(self))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = lock(&self.ring.shared.state);
        state.free.extend(self.memory.take());
        self.ring.shared.freed.notify_one();
    }
}

/// A filled slot that copies read from. Shared by the queues of all devices that take part of it; the last one to
/// drop its handle frees the slot.
#[derive(Debug, Clone)]
pub(crate) struct Staged(Arc<Slot>);

impl Staged {
    /// The first byte.
    pub(crate) fn address(&self) -> *const u8 {
        self.0.address()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_and_come_back() {
        let ring = Ring::new(3 << 20, 1 << 20);
        let slots: Vec<_> = (0..3).map(|_| ring.try_lend().unwrap().unwrap()).collect();
        assert!(ring.try_lend().unwrap().is_none());
        let staged: Vec<_> = slots.into_iter().map(Slot::stage).collect();
        let again = staged[0].clone();
        drop(staged);
        let two: Vec<_> = (0..2).map(|_| ring.try_lend().unwrap().unwrap()).collect();
        assert!(ring.try_lend().unwrap().is_none(), "one slot is still staged");
        drop(again);
        assert!(ring.try_lend().unwrap().is_some());
        assert_eq!(ring.bytes(), 3 << 20);
        drop(two);
        ring.release();
        assert_eq!(ring.bytes(), 0);
    }
}
