//! The ring with threads as they come; `model` has every order of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::device::Pinned;
use crate::error::{Error, ErrorKind};

const SLOT: usize = 1 << 16;

/// Counts pins, and refuses the one of this number.
#[derive(Debug, Default)]
struct Pins {
    calls: AtomicUsize,
    refuse: usize,
    pinned: std::sync::Arc<AtomicUsize>,
}

impl Pinner for Pins {
    unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<Pinned> {
        assert!(address.addr().is_multiple_of(4096) && bytes == SLOT);
        if self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.refuse {
            return Err(Error::new(ErrorKind::DeviceMemory, "of the test"));
        }
        self.pinned.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Pin { address: address.addr(), pinned: std::sync::Arc::clone(&self.pinned) }))
    }

    fn numa_node(&self) -> Option<u32> {
        None
    }
}

#[derive(Debug)]
struct Pin {
    address: usize,
    pinned: std::sync::Arc<AtomicUsize>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let address: *const u8 = std::ptr::with_exposed_provenance(self.address);
        // SAFETY: the slot's memory is mapped until after this, which is what this proves, and nobody uses it.
        unsafe { address.read_volatile() };
        self.pinned.fetch_sub(1, Ordering::Relaxed);
    }
}

fn ring(slots: usize) -> Ring {
    Ring::new(slots * SLOT, SLOT)
}

fn lend(ring: &Ring, lend: Lend) -> Slot {
    ring.try_lend(lend).unwrap().expect("a slot")
}

fn grow(ring: &Ring, pinner: &dyn Pinner, slots: usize) -> Result<bool> {
    ring.grow(pinner, slots, || false)
}

fn none(ring: &Ring, lend: Lend) -> bool {
    ring.try_lend(lend).unwrap().is_none()
}

#[track_caller]
fn holds(ring: &Ring, slots: usize, pinned: usize) {
    assert_eq!((ring.bytes(), ring.pinned_bytes()), ((slots * SLOT) as u64, (pinned * SLOT) as u64));
}

#[test]
fn slots_are_bounded_and_come_back() {
    let ring = ring(3);
    let slots: Vec<_> = (0..3).map(|_| lend(&ring, Lend::Any)).collect();
    assert!(none(&ring, Lend::Any));
    let staged: Vec<_> = slots.into_iter().map(Slot::stage).collect();
    let again = staged[0].clone();
    drop(staged);
    let two: Vec<_> = (0..2).map(|_| lend(&ring, Lend::Any)).collect();
    assert!(none(&ring, Lend::Any), "one slot is still staged");
    drop(again);
    drop(lend(&ring, Lend::Any));
    holds(&ring, 3, 0);
    drop(two);
    ring.release();
    holds(&ring, 0, 0);
}

#[test]
fn it_grows_to_what_is_asked_for_or_the_budget() {
    let (ring, pins) = (ring(3), Pins::default());
    assert!(none(&ring, Lend::Pinned), "none is made");
    holds(&ring, 0, 0);
    assert!(grow(&ring, &pins, 2).unwrap());
    assert!(!grow(&ring, &pins, 2).unwrap());
    assert!(!grow(&ring, &pins, 2).unwrap());
    holds(&ring, 2, 2);
    assert!(!grow(&ring, &pins, 100).unwrap());
    assert!(!grow(&ring, &pins, 100).unwrap());
    holds(&ring, 3, 3);
    let slots: Vec<_> = (0..3).map(|_| lend(&ring, Lend::Pinned)).collect();
    assert!(none(&ring, Lend::Pinned) && none(&ring, Lend::Any));
    ring.release();
    holds(&ring, 3, 3);
    drop(slots);
    ring.release();
    holds(&ring, 0, 0);
    assert_eq!(pins.pinned.load(Ordering::Relaxed), 0);
}

#[test]
fn nothing_grows_once_stopped() {
    let ring = ring(1);
    assert!(!ring.grow(&Pins::default(), 1, || true).unwrap());
    holds(&ring, 0, 0);
}

#[test]
fn free_plain_slots_are_pinned_before_new_ones_are_made() {
    let (ring, pins) = (ring(2), Pins::default());
    let (one, two) = (lend(&ring, Lend::Any), lend(&ring, Lend::Any));
    let address = one.address();
    assert!(grow(&ring, &pins, 2).unwrap(), "the budget is in use: later");
    holds(&ring, 2, 0);
    drop(one);
    assert!(grow(&ring, &pins, 2).unwrap());
    holds(&ring, 2, 1);
    let pinned = lend(&ring, Lend::Pinned);
    assert_eq!(pinned.address(), address);
    drop(two);
    assert!(!grow(&ring, &pins, 2).unwrap());
    holds(&ring, 2, 2);
}

#[test]
fn any_slot_does_for_any() {
    let (ring, pins) = (ring(2), Pins::default());
    grow(&ring, &pins, 1).unwrap();
    drop(lend(&ring, Lend::Any));
    holds(&ring, 1, 1);
    let (_pinned, _plain) = (lend(&ring, Lend::Any), lend(&ring, Lend::Any));
    holds(&ring, 2, 1);
    assert!(none(&ring, Lend::Any));
}

#[test]
fn a_refused_pin_leaves_the_counts_right() {
    for refuse in 1..=3 {
        let (ring, pins) = (ring(3), Pins { refuse, ..Pins::default() });
        for _ in 1..refuse {
            assert!(grow(&ring, &pins, 3).unwrap());
        }
        assert_eq!(grow(&ring, &pins, 3).unwrap_err().kind(), ErrorKind::DeviceMemory);
        holds(&ring, refuse, refuse - 1);
        while grow(&ring, &pins, 3).unwrap() {}
        holds(&ring, 3, 3);
        assert_eq!(pins.calls.load(Ordering::Relaxed), 4);
    }
}

#[test]
fn a_panic_of_the_pinner_too() {
    #[derive(Debug)]
    struct Panics;
    impl Pinner for Panics {
        unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
            panic!("of the test")
        }
        fn numa_node(&self) -> Option<u32> {
            None
        }
    }
    let ring = ring(1);
    let grown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| grow(&ring, &Panics, 1)));
    assert!(grown.is_err());
    holds(&ring, 1, 0);
    assert!(!grow(&ring, &Pins::default(), 1).unwrap());
    holds(&ring, 1, 1);
}

#[test]
fn lending_goes_on_while_one_is_pinned() {
    /// Pins when it is told to.
    #[derive(Debug)]
    struct Slow(std::sync::Mutex<mpsc::Receiver<()>>, mpsc::Sender<()>);
    impl Pinner for Slow {
        unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
            self.1.send(()).unwrap();
            self.0.lock().unwrap().recv().unwrap();
            Ok(Box::new(()))
        }
        fn numa_node(&self) -> Option<u32> {
            None
        }
    }
    let ring = ring(2);
    let (go, wait) = mpsc::channel();
    let (tell, began) = mpsc::channel();
    let slow = Slow(std::sync::Mutex::new(wait), tell);
    thread::scope(|scope| {
        let grower = scope.spawn(|| grow(&ring, &slow, 1).unwrap());
        began.recv().unwrap();
        holds(&ring, 1, 0);
        drop(lend(&ring, Lend::Any));
        let _other = lend(&ring, Lend::Any);
        assert!(none(&ring, Lend::Any) && none(&ring, Lend::Pinned), "the budget holds");
        go.send(()).unwrap();
        while none(&ring, Lend::Pinned) {
            ring.wait(Lend::Pinned, Duration::from_secs(60), || false);
        }
        assert!(!grower.join().unwrap());
    });
}

#[test]
fn held_slots_stay_pinned() {
    let (ring, pins) = (ring(2), Pins::default());
    drop(lend(&ring, Lend::Any));
    grow(&ring, &pins, 1).unwrap();
    drop((lend(&ring, Lend::Any), lend(&ring, Lend::Any)));
    holds(&ring, 2, 1);
    let held = ring.hold();
    ring.release();
    holds(&ring, 1, 1);
    drop(held);
    ring.release();
    holds(&ring, 0, 0);
}

#[test]
fn a_ring_that_lost_slots_is_for_those_who_have_it() {
    let (ring, pins) = (ring(4), Pins::default());
    while grow(&ring, &pins, 3).unwrap() {}
    let [one, other] = [ring.hold(), ring.hold()];
    let (lost, late) = (one.try_lend(Lend::Any).unwrap(), one.try_lend(Lend::Any).unwrap());
    assert_eq!((one.lent(), other.lent(), ring.is_retired()), (2, 0, false));
    one.retire();
    assert!(ring.is_retired() && !ring.anew().is_retired());
    ring.release();
    holds(&ring, 3, 3);
    // The other one goes on with what is left, and what comes back; then nothing stays.
    drop(other.try_lend(Lend::Pinned).unwrap().expect("the pinned one that is free"));
    holds(&ring, 3, 3);
    drop(other);
    holds(&ring, 2, 2);
    drop(one);
    drop(late);
    holds(&ring, 1, 1);
    assert_eq!(pins.pinned.load(Ordering::Relaxed), 1);
    drop(lost);
    holds(&ring, 0, 0);
    assert_eq!(ring.anew().budget(), ring.budget());
}

#[test]
fn a_load_leaves_another_its_part_of_the_slots() {
    let ring = ring(5);
    let (one, other) = (ring.hold(), ring.hold());
    let lent = |hold: &Hold| hold.try_lend(Lend::Any).unwrap();
    let mut all: Vec<_> = std::iter::from_fn(|| lent(&one)).collect();
    assert_eq!(all.len(), 5, "the other one wants none");
    // It got none, and wants one from now on.
    assert!(lent(&other).is_none());
    all.pop();
    assert!(lent(&one).is_none());
    let first = lent(&other).unwrap();
    all.pop();
    assert!(
        lent(&other).is_some_and(|slot| {
            all.push(slot);
            true
        }),
        "it has a part of two"
    );
    all.pop();
    all.pop();
    // Neither is below its part, or asks.
    all.push(lent(&one).unwrap());
    drop(first);
    assert!(lent(&other).is_some());
    drop(other);
    all.extend(std::iter::from_fn(|| lent(&one)));
    assert!(none(&ring, Lend::Any));
}

#[test]
fn loads_that_are_more_than_slots_take_turns() {
    let ring = ring(1);
    let holds = [ring.hold(), ring.hold(), ring.hold()];
    let lent = |load: usize| holds[load].try_lend(Lend::Any).unwrap();
    let mut slot = lent(0);
    for turn in 0..9 {
        assert!(slot.is_some(), "{turn}");
        let [next, after] = [(turn + 1) % 3, (turn + 2) % 3];
        assert!(lent(after).is_none() && lent(next).is_none());
        drop(slot);
        // Who had it last is not the first again, nor who had it before others.
        assert!(lent(turn % 3).is_none());
        if turn > 1 {
            assert!(lent(after).is_none());
        }
        slot = lent(next);
    }
}

#[test]
fn whoever_asks_no_more_is_left_nothing() {
    let ring = ring(2);
    let (one, other) = (ring.hold(), ring.hold());
    let lent = |hold: &Hold| hold.try_lend(Lend::Any).unwrap();
    let (first, _second) = (lent(&one).unwrap(), lent(&one).unwrap());
    assert!(lent(&other).is_none());
    drop(first);
    assert!(lent(&one).is_none());
    other.wants_no_more();
    assert!(lent(&one).is_some());
}

#[test]
fn lent_bytes_live_as_long_as_their_last_handle() {
    let keep = std::sync::Arc::new([1u8, 2, 3]);
    // SAFETY: `keep` is the array itself, which nobody writes.
    let staged = unsafe { Staged::lent(keep.as_ptr(), std::sync::Arc::clone(&keep) as _) };
    let clone = staged.clone();
    drop(staged);
    assert_eq!(clone.address(), keep.as_ptr());
    assert_eq!(std::sync::Arc::strong_count(&keep), 2);
    drop(clone);
    assert_eq!(std::sync::Arc::strong_count(&keep), 1);
}

#[test]
fn who_holds_while_slots_are_released_does_not_count_on_them() {
    /// Grows the ring while it is unpinned.
    #[derive(Debug)]
    struct Grows(Ring, std::sync::Arc<AtomicUsize>);
    impl Drop for Grows {
        fn drop(&mut self) {
            // The budget is one slot, which is not given back yet: so more is wanted, and later.
            let more = self.0.grow(&Pins::default(), 1, || false).unwrap();
            self.1.fetch_add(usize::from(more), Ordering::Relaxed);
        }
    }
    #[derive(Debug)]
    struct Pinning(Ring, std::sync::Arc<AtomicUsize>);
    impl Pinner for Pinning {
        unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
            Ok(Box::new(Grows(self.0.clone(), std::sync::Arc::clone(&self.1))))
        }
        fn numa_node(&self) -> Option<u32> {
            None
        }
    }
    let (ring, wanted) = (ring(1), std::sync::Arc::default());
    assert!(!grow(&ring, &Pinning(ring.clone(), std::sync::Arc::clone(&wanted)), 1).unwrap());
    ring.release();
    assert_eq!(wanted.load(Ordering::Relaxed), 1);
    holds(&ring, 0, 0);
}
