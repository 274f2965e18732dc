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
    /// Those who want pinned slots to stay, and what they have of the slots.
    shares: Vec<Share>,
    /// Shares that there ever were.
    held: u64,
    /// Slots that were ever lent.
    lent: u64,
    /// Whether it is for no later load.
    retired: bool,
    waiting: Waiting,
}

/// What a [`Hold`] has of the slots.
#[derive(Debug)]
struct Share {
    id: u64,
    lent: usize,
    /// Which of all slots that were lent it had last.
    last: u64,
    /// Whether it got none when it last asked.
    wants: bool,
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

    /// Another ring of the same kind and size, without any slots yet.
    pub(crate) fn anew(&self) -> Ring {
        Ring::at(self.shared.home, self.budget(), self.shared.slot_bytes)
    }

    /// Whether a load that ended without some of its slots has [retired](Hold::retire) it: it is for no other one.
    pub(crate) fn is_retired(&self) -> bool {
        self.shared.state().retired
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

    /// [`Hold::try_lend`] for nobody's share.
    #[cfg(test)]
    pub(crate) fn try_lend(&self, lend: Lend) -> Result<Option<Slot>> {
        self.try_lend_to(NOBODY, lend)
    }

    /// [`Hold::wait`] for nobody's share.
    #[cfg(test)]
    pub(crate) fn wait(&self, lend: Lend, bound: Duration, stopped: impl FnOnce() -> bool) {
        self.wait_for(NOBODY, lend, bound, stopped);
    }

    fn try_lend_to(&self, holder: u64, lend: Lend) -> Result<Option<Slot>> {
        let mut state = self.shared.state();
        let free = match lend {
            _ if !self.shared.leaves_shares(&state, holder, lend) => None,
            Lend::Pinned => state.pinned.pop(),
            Lend::Any => match state.plain.pop().or_else(|| state.pinned.pop()) {
                Some(memory) => Some(memory),
                None => self.shared.make(&mut state)?,
            },
        };
        state.lent += u64::from(free.is_some());
        let last = state.lent;
        if let Some(share) = state.share(holder) {
            if free.is_some() {
                share.lent += 1;
                share.last = last;
            }
            let wanted = std::mem::replace(&mut share.wants, free.is_none());
            if wanted && free.is_some() && state.shares.len() > 1 {
                self.shared.wake_lenders(&state); // who left it this one may have the next
            }
        }
        drop(state);
        Ok(free.map(|memory| Slot::new(memory, holder, self.clone())))
    }

    fn wait_for(&self, holder: u64, lend: Lend, bound: Duration, stopped: impl FnOnce() -> bool) {
        let state = self.shared.state();
        let free = !state.pinned.is_empty()
            || lend == Lend::Any && (!state.plain.is_empty() || state.slots < self.shared.slots_max);
        if free && self.shared.leaves_shares(&state, holder, lend) || stopped() {
            return;
        }
        match lend {
            Lend::Any => self.shared.wait(state, &self.shared.freed, |waiting| &mut waiting.freed, bound),
            Lend::Pinned => {
                self.shared.wait(state, &self.shared.freed_pinned, |waiting| &mut waiting.freed_pinned, bound);
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
        self.shared.release(self.shared.state());
    }

    /// A share of the slots, for one load; while there is one, pinned slots are not [released](Ring::release): who lends no
    /// others would wait for ever.
    pub(crate) fn hold(&self) -> Hold {
        let mut state = self.shared.state();
        state.held += 1;
        let id = state.held;
        state.shares.push(Share { id, lent: 0, last: 0, wants: false });
        Hold { id, ring: self.clone() }
    }
}

impl Shared {
    /// The state, also when a thread panicked while it had it: each of its changes leaves it consistent.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Ring::release`].
    fn release(&self, mut state: MutexGuard<'_, State>) {
        let plain = std::mem::take(&mut state.plain);
        let pinned = if state.shares.is_empty() { std::mem::take(&mut state.pinned) } else { Vec::new() };
        let slots = plain.len() + pinned.len();
        // No longer pinned for whoever counts on them from now on.
        state.slots_pinned -= pinned.len();
        drop(state);
        // Out of the lock, since unpinning takes long; in the count until it is done, so that the budget holds.
        drop((plain, pinned));
        let mut state = self.state();
        state.slots -= slots;
        self.wake_all();
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

    /// Whether whoever holds this share may have one more slot: it has less than an equal part of them, or nobody who has
    /// less asks for one. Where there are fewer slots than shares, they go from one to the next.
    fn leaves_shares(&self, state: &State, holder: u64, lend: Lend) -> bool {
        if state.shares.len() < 2 {
            return true;
        }
        let slots = if lend == Lend::Pinned { state.slots_pinned } else { self.slots_max };
        let part = (slots / state.shares.len()).max(1);
        let below = |share: &Share| share.lent < part;
        let mine = state.shares.iter().find(|share| share.id == holder && below(share));
        let comes_first = |other: &Share| match mine {
            None => true,
            Some(mine) => slots < state.shares.len() && other.last < mine.last,
        };
        !state.shares.iter().any(|other| other.id != holder && other.wants && below(other) && comes_first(other))
    }

    /// Takes a handle to a slot of a share. With the last one the slot is free again, which whoever may be waiting for it is
    /// told.
    fn take_back(&self, memory: Arc<SlotMemory>, pinning: bool, holder: u64) {
        let mut state = self.state();
        // Handles to a staged slot are dropped here, one after the other: whoever finds no other has the last one.
        if Arc::strong_count(&memory) > 1 {
            drop(memory);
            return;
        }
        if let Some(share) = state.share(holder) {
            share.lent -= 1;
        }
        if pinning {
            state.slots_pinning -= 1;
            state.slots_pinned += usize::from(memory.is_pinned());
        }
        if (pinning || !memory.is_pinned()) && state.waiting.growable > 0 {
            self.growable.notify_all();
        }
        let pinned = memory.is_pinned();
        if pinned {
            state.pinned.push(memory)
        } else {
            state.plain.push(memory)
        }
        if state.is_over() {
            return self.release(state);
        }
        if state.shares.len() > 1 {
            return self.wake_lenders(&state); // the first that wakes may have to leave it to another
        }
        if pinned && state.waiting.freed_pinned > 0 {
            self.freed_pinned.notify_one();
        }
        if state.waiting.freed > 0 {
            self.freed.notify_one();
        }
    }

    /// Wakes all who wait for a free slot.
    fn wake_lenders(&self, state: &State) {
        if state.waiting.freed > 0 {
            self.freed.notify_all();
        }
        if state.waiting.freed_pinned > 0 {
            self.freed_pinned.notify_all();
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

impl State {
    /// Whether no load uses the slots any more, or will.
    fn is_over(&self) -> bool {
        self.retired && self.shares.is_empty()
    }

    fn share(&mut self, holder: u64) -> Option<&mut Share> {
        self.shares.iter_mut().find(|share| share.id == holder)
    }
}

/// What a load has of a ring. While it lives, pinned slots stay.
#[derive(Debug)]
pub(crate) struct Hold {
    id: u64,
    ring: Ring,
}

/// The holder of what is lent without a [`Hold`].
const NOBODY: u64 = 0;

impl Hold {
    /// A free slot; `None` if all that would do are in use, or others have fewer and ask for them. Makes one that is not
    /// pinned if none is free, such a one would do, and the budget allows it.
    pub(crate) fn try_lend(&self, lend: Lend) -> Result<Option<Slot>> {
        self.ring.try_lend_to(self.id, lend)
    }

    /// Waits until a slot that would do may be free for it, somebody [wakes](Ring::wake) it, or `bound` has passed; not at all
    /// once `stopped`, which is asked where no later wake is missed.
    pub(crate) fn wait(&self, lend: Lend, bound: Duration, stopped: impl FnOnce() -> bool) {
        self.ring.wait_for(self.id, lend, bound, stopped);
    }

    /// It will ask for no more slots: nobody needs to leave it any.
    pub(crate) fn wants_no_more(&self) {
        let mut state = self.ring.shared.state();
        if let Some(share) = state.share(self.id) {
            share.wants = false;
        }
        self.ring.shared.wake_lenders(&state);
    }

    /// How many slots it has not given back; and those that are being pinned now, whoever it is for.
    pub(crate) fn lent(&self) -> usize {
        let mut state = self.ring.shared.state();
        state.slots_pinning + state.share(self.id).map_or(0, |share| share.lent)
    }

    /// Gives the share up, although some of its slots may never come back. Whoever else shares the ring goes on with the
    /// others, but it is for no later load, and once nobody shares it a slot that is free is given back at once. Those that are
    /// free by now stay until they are [released](Ring::release).
    pub(crate) fn retire(&self) {
        let mut state = self.ring.shared.state();
        state.retired = true;
        state.shares.retain(|share| share.id != self.id);
        self.ring.shared.wake_lenders(&state);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.ring.shared.state();
        state.shares.retain(|share| share.id != self.id);
        self.ring.shared.wake_lenders(&state);
        if state.is_over() {
            self.ring.shared.release(state);
        }
    }
}
