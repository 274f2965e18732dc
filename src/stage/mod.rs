//! The ring of slots between read and copy. A slot is free, lent to an engine, or staged for copies; which one it
//! is, is the type that holds it, so nobody else needs to know the transitions.

#[cfg(all(test, loom))]
mod model;
mod slot;
#[cfg(all(test, not(loom)))]
mod tests;

use std::sync::PoisonError;
use std::time::Duration;

use crate::device::Pages;
#[cfg_attr(not(all(test, feature = "cuda")), allow(unused_imports, reason = "tests of engines make slots"))]
pub(crate) use crate::device::{Home, Pinned, Pinner};
use crate::error::Result;
use crate::limits;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

use slot::{Place, SlotMemory};
pub(crate) use slot::{Slot, Staged};

/// Which slots will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lend {
    /// Every slot, pinned or not.
    Any,
    /// Pinned ones only.
    Pinned,
}

/// A bounded set of slots, kept and reused. Clones are handles to the same ring.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Where the memory of the slots is.
    home: Home,
    slot_bytes: usize,
    slots_max: usize,
    state: Mutex<State>,
    /// Signalled when a slot that does for [`Lend::Any`] may be there.
    freed: Condvar,
    /// Signalled when a pinned slot is free.
    freed_pinned: Condvar,
    /// Signalled when [`Ring::grow`] may find a slot to pin, or that it has nothing left to do.
    growable: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Free slots that are not pinned.
    plain: Vec<Arc<SlotMemory>>,
    /// Free slots that are pinned.
    pinned: Vec<Arc<SlotMemory>>,
    /// Slots that exist, free or not.
    slots: usize,
    /// Those of them that are pinned.
    slots_pinned: usize,
    /// Those of them that are being pinned now.
    slots_pinning: usize,
    /// Slots that were ever made.
    made: u64,
    /// How many want pinned slots to stay.
    holds: usize,
    waiting: Waiting,
}

/// How many wait for each of the signals: giving one that nobody waits for is a call to the system all the same.
#[derive(Debug, Default)]
struct Waiting {
    freed: usize,
    freed_pinned: usize,
    growable: usize,
}

impl Ring {
    /// A ring of at most `budget` bytes; no memory is taken yet. Holds at least one slot.
    pub(crate) fn new(budget: usize, slot_bytes: usize) -> Ring {
        Ring::at(Home::Host, budget, slot_bytes)
    }

    /// The same of slots in a device's memory, which whoever [grows](Ring::grow) it makes, and none else: what is said of
    /// pinned slots holds for all of them.
    pub(crate) fn on_device(budget: usize, slot_bytes: usize) -> Ring {
        Ring::at(Home::Device, budget, slot_bytes)
    }

    fn at(home: Home, budget: usize, slot_bytes: usize) -> Ring {
        let shared = Shared {
            home,
            slot_bytes,
            slots_max: (budget / slot_bytes).max(1),
            state: Mutex::new(State::default()),
            freed: Condvar::new(),
            freed_pinned: Condvar::new(),
            growable: Condvar::new(),
        };
        Ring { shared: Arc::new(shared) }
    }

    /// Whether both are handles to the same ring.
    pub(crate) fn is(&self, other: &Ring) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Where the memory of its slots is.
    pub(crate) fn home(&self) -> Home {
        self.shared.home
    }

    /// The size of each slot.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.shared.slot_bytes
    }

    /// Most bytes of all slots.
    pub(crate) fn budget(&self) -> usize {
        self.shared.slots_max * self.shared.slot_bytes
    }

    /// A free slot; `None` if all that would do are in use. Makes one that is not pinned if none is free, such a one
    /// would do, and the budget allows it.
    pub(crate) fn try_lend(&self, lend: Lend) -> Result<Option<Slot>> {
        let mut state = self.shared.state();
        let free = match lend {
            Lend::Pinned => state.pinned.pop(),
            Lend::Any => match state.plain.pop().or_else(|| state.pinned.pop()) {
                Some(memory) => Some(memory),
                None => self.shared.make(&mut state)?,
            },
        };
        Ok(free.map(|memory| Slot::new(memory, self.clone())))
    }

    /// Waits until a slot that would do may be free, somebody [wakes](Ring::wake) it, or `bound` has passed; not at all
    /// once `stopped`, which is asked where no later wake is missed.
    pub(crate) fn wait(&self, lend: Lend, bound: Duration, stopped: impl FnOnce() -> bool) {
        let state = self.shared.state();
        match lend {
            Lend::Any => {
                let none_free = state.plain.is_empty() && state.pinned.is_empty();
                if none_free && state.slots == self.shared.slots_max && !stopped() {
                    self.shared.wait(state, &self.shared.freed, |waiting| &mut waiting.freed, bound);
                }
            }
            Lend::Pinned => {
                if state.pinned.is_empty() && !stopped() {
                    self.shared.wait(state, &self.shared.freed_pinned, |waiting| &mut waiting.freed_pinned, bound);
                }
            }
        }
    }

    /// Pins one more slot, unless `slots` of them, or as many as the budget allows, are pinned; true if more are
    /// wanted after that. Takes a free slot, or else makes one. If all are in use or being pinned it waits a little for
    /// that to change. Lending goes on meanwhile. Once `stopped`, nothing more is wanted.
    ///
    /// # Errors
    /// No memory, or the pinner's own; the ring is as it was, but for a slot that may have been made.
    pub(crate) fn grow(&self, pinner: &dyn Pinner, slots: usize, stopped: impl FnOnce() -> bool) -> Result<bool> {
        let wanted = slots.min(self.shared.slots_max);
        let mut state = self.shared.state();
        if state.slots_pinned >= wanted || stopped() {
            return Ok(false);
        }
        let memory = if state.slots_pinned + state.slots_pinning >= wanted {
            None
        } else {
            match state.plain.pop() {
                Some(memory) => Some(memory),
                None => self.shared.make(&mut state)?,
            }
        };
        let Some(memory) = memory else {
            self.shared.wait(state, &self.shared.growable, |waiting| &mut waiting.growable, limits::LOOK_AGAIN);
            return Ok(true);
        };
        state.slots_pinning += 1;
        drop(state);
        // Out of the lock, since it takes milliseconds.
        Slot::to_pin(memory, self.clone()).pin(pinner)?;
        Ok(self.shared.state().slots_pinned < wanted)
    }

    /// Wakes everyone who waits for a slot, so that they notice a cancel or an error; who sets what they look at does so
    /// before.
    pub(crate) fn wake(&self) {
        let _state = self.shared.state();
        self.shared.wake_all();
    }

    /// Bytes of all slots that exist.
    pub(crate) fn bytes(&self) -> u64 {
        (self.shared.state().slots * self.shared.slot_bytes) as u64
    }

    /// Bytes of all slots that are pinned, or in a device's memory.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        (self.shared.state().slots_pinned * self.shared.slot_bytes) as u64
    }

    /// Gives the memory of free slots back to the system; not that of pinned ones while somebody [holds](Ring::hold)
    /// them.
    pub(crate) fn release(&self) {
        let mut state = self.shared.state();
        let plain = std::mem::take(&mut state.plain);
        let pinned = if state.holds == 0 { std::mem::take(&mut state.pinned) } else { Vec::new() };
        let slots = plain.len() + pinned.len();
        // No longer pinned for whoever counts on them from now on.
        state.slots_pinned -= pinned.len();
        drop(state);
        // Out of the lock, since unpinning takes long; in the count until it is done, so that the budget holds.
        drop((plain, pinned));
        let mut state = self.shared.state();
        state.slots -= slots;
        self.shared.wake_all();
    }

    /// Keeps pinned slots from being [released](Ring::release): who lends no others would wait for ever.
    pub(crate) fn hold(&self) -> Hold {
        self.shared.state().holds += 1;
        Hold { ring: self.clone() }
    }
}

impl Shared {
    /// The state, also when a thread panicked while it had it: each of its changes leaves it consistent.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for one more slot, if the budget allows it.
    fn make(&self, state: &mut State) -> Result<Option<Arc<SlotMemory>>> {
        if state.slots == self.slots_max {
            return Ok(None);
        }
        let place = match self.home {
            Home::Host => Place::Host(Pages::new(self.slot_bytes)?),
            Home::Device => Place::Device(0),
        };
        state.slots += 1;
        state.made += 1;
        Ok(Some(Arc::new(SlotMemory::new(place, state.made))))
    }

    /// Takes a handle to a slot. With the last one the slot is free again, which whoever may be waiting for it is told.
    fn take_back(&self, memory: Arc<SlotMemory>, pinning: bool) {
        let mut state = self.state();
        // Handles to a staged slot are dropped here, one after the other: whoever finds no other has the last one.
        if Arc::strong_count(&memory) > 1 {
            drop(memory);
            return;
        }
        if pinning {
            state.slots_pinning -= 1;
            state.slots_pinned += usize::from(memory.is_pinned());
        }
        if (pinning || !memory.is_pinned()) && state.waiting.growable > 0 {
            self.growable.notify_all();
        }
        if memory.is_pinned() {
            state.pinned.push(memory);
            if state.waiting.freed_pinned > 0 {
                self.freed_pinned.notify_one();
            }
        } else {
            state.plain.push(memory);
        }
        if state.waiting.freed > 0 {
            self.freed.notify_one();
        }
    }

    /// Waits for a signal, for at most `bound`.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        signal: &Condvar,
        count: impl Fn(&mut Waiting) -> &mut usize,
        bound: Duration,
    ) {
        *count(&mut state.waiting) += 1;
        let (mut state, _) = signal.wait_timeout(state, bound).unwrap_or_else(PoisonError::into_inner);
        *count(&mut state.waiting) -= 1;
    }

    /// Wakes everyone who waits for anything.
    fn wake_all(&self) {
        self.freed.notify_all();
        self.freed_pinned.notify_all();
        self.growable.notify_all();
    }
}

/// While it lives, the pinned slots of its ring stay.
#[derive(Debug)]
pub(crate) struct Hold {
    ring: Ring,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.ring.shared.state().holds -= 1;
    }
}
