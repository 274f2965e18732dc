//! The ring under loom: every order of what two or three threads do, up to a bound on preemptions (`scripts/loom`).
//! A wait does not time out here, so that one which nobody ends is found as a deadlock.

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::{model, thread};

use super::*;
use crate::device::Pinned;
use crate::error::{Error, ErrorKind};

/// The size of a slot, and far more than a bound that is never reached.
const SLOT: usize = 4096;
const LONG: Duration = Duration::MAX;

/// What lies in each slot, by serial number: loom finds whoever writes without having it alone, and whoever reads what
/// was not written before.
struct Contents(Vec<UnsafeCell<u32>>);

// SAFETY: loom checks each access.
unsafe impl Send for Contents {}
// SAFETY: the same.
unsafe impl Sync for Contents {}

impl Contents {
    fn new(slots: usize) -> Arc<Contents> {
        Arc::new(Contents((0..=slots).map(|_| UnsafeCell::new(0)).collect()))
    }

    /// Fills a slot, as an engine does.
    fn write(&self, slot: &Slot) {
        // SAFETY: loom checks that nobody else has it.
        self.0[slot.serial() as usize].with_mut(|value| unsafe { *value += 1 });
    }

    /// Reads a staged slot, as a copy does.
    fn read(&self, serial: u64) -> u32 {
        // SAFETY: loom checks that nobody writes it.
        self.0[serial as usize].with(|value| unsafe { *value })
    }
}

/// Pins at once, or refuses.
#[derive(Debug)]
struct Pins {
    refuse: bool,
}

impl Pinner for Pins {
    unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
        // Where another thread may be let in, as while a driver works.
        thread::yield_now();
        match self.refuse {
            true => Err(Error::new(ErrorKind::DeviceMemory, "of the model")),
            false => Ok(Box::new(())),
        }
    }

    fn numa_node(&self) -> Option<u32> {
        None
    }
}

/// Lends, waiting if need be.
fn lend(ring: &Ring, lend: Lend) -> Slot {
    loop {
        match ring.try_lend(lend).unwrap() {
            Some(slot) => return slot,
            None => ring.wait(lend, LONG, || false),
        }
    }
}

/// Grows to `slots`, as the thread of a pipeline does.
fn grow(ring: &Ring, slots: usize) {
    while ring.grow(&Pins { refuse: false }, slots, || false).unwrap() {}
}

/// Fills a slot, and has two copies read it that end in any order.
fn move_bytes(ring: &Ring, contents: &Contents, lent: Lend) {
    let slot = lend(ring, lent);
    contents.write(&slot);
    let (serial, staged) = (slot.serial(), slot.stage());
    let other = staged.clone();
    contents.read(serial);
    drop(staged);
    contents.read(serial);
    drop(other);
}

/// That nothing got lost: all slots are free, and as many as counted.
#[track_caller]
fn whole(ring: &Ring) {
    let state = ring.shared.state();
    assert_eq!(state.slots, state.plain.len() + state.pinned.len());
    assert_eq!((state.slots_pinned, state.slots_pinning), (state.pinned.len(), 0));
    assert!(state.slots <= ring.shared.slots_max);
}

fn ring(slots: usize) -> Ring {
    Ring::new(slots * SLOT, SLOT)
}

#[test]
fn a_slot_is_lent_to_one_at_a_time_and_no_waiter_is_lost() {
    model(|| {
        let (ring, contents) = (ring(1), Contents::new(1));
        let others = [(); 2].map(|()| {
            let (ring, contents) = (ring.clone(), Arc::clone(&contents));
            thread::spawn(move || move_bytes(&ring, &contents, Lend::Any))
        });
        move_bytes(&ring, &contents, Lend::Any);
        for thread in others {
            thread.join().unwrap();
        }
        assert_eq!(contents.read(1), 3);
        whole(&ring);
    });
}

#[test]
fn the_last_of_two_devices_frees_a_slot() {
    model(|| {
        let (ring, contents) = (ring(1), Contents::new(1));
        let slot = lend(&ring, Lend::Any);
        contents.write(&slot);
        let staged = slot.stage();
        let devices = [(); 2].map(|()| {
            let (staged, contents) = (staged.clone(), Arc::clone(&contents));
            thread::spawn(move || {
                contents.read(1);
                drop(staged);
            })
        });
        drop(staged);
        contents.write(&lend(&ring, Lend::Any));
        for thread in devices {
            thread.join().unwrap();
        }
        whole(&ring);
    });
}

#[test]
fn growing_goes_on_beside_lending() {
    model(|| {
        let (ring, contents) = (ring(2), Contents::new(2));
        let grower = {
            let ring = ring.clone();
            thread::spawn(move || grow(&ring, 2))
        };
        let host = {
            let (ring, contents) = (ring.clone(), Arc::clone(&contents));
            thread::spawn(move || move_bytes(&ring, &contents, Lend::Any))
        };
        move_bytes(&ring, &contents, Lend::Pinned);
        host.join().unwrap();
        grower.join().unwrap();
        assert_eq!(ring.pinned_bytes(), 2 * SLOT as u64);
        whole(&ring);
    });
}

#[test]
fn two_growers_pin_no_more_than_wanted_and_both_end() {
    model(|| {
        let ring = ring(2);
        let other = {
            let ring = ring.clone();
            thread::spawn(move || grow(&ring, 1))
        };
        grow(&ring, 1);
        assert_eq!(ring.pinned_bytes(), SLOT as u64, "it ended because there is one");
        other.join().unwrap();
        assert_eq!(ring.bytes(), SLOT as u64);
        whole(&ring);
    });
}

#[test]
fn a_grower_waits_for_one_that_fails() {
    model(|| {
        let ring = ring(1);
        let failing = {
            let ring = ring.clone();
            // May come second, and then find nothing to do.
            thread::spawn(move || while let Ok(true) = ring.grow(&Pins { refuse: true }, 1, || false) {})
        };
        grow(&ring, 1);
        failing.join().unwrap();
        assert_eq!(ring.pinned_bytes(), SLOT as u64);
        whole(&ring);
    });
}

#[test]
fn releasing_beside_lending_keeps_the_counts() {
    model(|| {
        let (ring, contents) = (ring(1), Contents::new(3));
        grow(&ring, 1);
        let slot = lend(&ring, Lend::Any);
        let other = {
            let (ring, contents) = (ring.clone(), Arc::clone(&contents));
            // The budget is one slot: released memory must go before there is another.
            thread::spawn(move || contents.write(&lend(&ring, Lend::Any)))
        };
        let releasing = {
            let ring = ring.clone();
            thread::spawn(move || ring.release())
        };
        drop(slot);
        other.join().unwrap();
        releasing.join().unwrap();
        whole(&ring);
    });
}

#[test]
fn held_slots_are_there_for_those_who_need_them() {
    model(|| {
        let ring = ring(1);
        let held = ring.hold();
        grow(&ring, 1);
        let releasing = {
            let ring = ring.clone();
            thread::spawn(move || ring.release())
        };
        drop(lend(&ring, Lend::Pinned));
        drop(lend(&ring, Lend::Pinned));
        releasing.join().unwrap();
        drop(held);
        whole(&ring);
    });
}

#[test]
fn loads_that_share_leave_each_other_slots_and_neither_is_lost() {
    model(|| {
        let (ring, contents) = (ring(2), Contents::new(2));
        let load = |hold: Hold, contents: &Contents| {
            // Both slots at once, unless the other one asks for its own.
            let first = lend_share(&hold);
            contents.write(&first);
            if let Some(second) = hold.try_lend(Lend::Any).unwrap() {
                contents.write(&second);
            }
            hold.wants_no_more();
            drop(first);
            contents.write(&lend_share(&hold));
        };
        let other = {
            let (hold, contents) = (ring.hold(), Arc::clone(&contents));
            thread::spawn(move || load(hold, &contents))
        };
        load(ring.hold(), &contents);
        other.join().unwrap();
        assert!(ring.shared.state().shares.is_empty());
        whole(&ring);
    });
}

fn lend_share(hold: &Hold) -> Slot {
    loop {
        match hold.try_lend(Lend::Any).unwrap() {
            Some(slot) => return slot,
            None => hold.wait(Lend::Any, LONG, || false),
        }
    }
}

#[test]
fn a_cancel_reaches_all_who_wait() {
    model(|| {
        let (ring, stopped) = (ring(1), Arc::new(AtomicBool::new(false)));
        let slot = lend(&ring, Lend::Any);
        let waiters = [Some(Lend::Any), Some(Lend::Pinned), None].map(|waits_for| {
            let (ring, stopped) = (ring.clone(), Arc::clone(&stopped));
            thread::spawn(move || {
                let stopped = || stopped.load(Ordering::Acquire);
                match waits_for {
                    Some(lend) => {
                        while !stopped() {
                            assert!(ring.try_lend(lend).unwrap().is_none());
                            ring.wait(lend, LONG, stopped);
                        }
                    }
                    None => while ring.grow(&Pins { refuse: false }, 1, stopped).unwrap() {},
                }
            })
        });
        stopped.store(true, Ordering::Release);
        ring.wake();
        for thread in waiters {
            thread.join().unwrap();
        }
        drop(slot);
        whole(&ring);
    });
}
