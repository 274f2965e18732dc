//! Windows of mapped files that devices copy from directly: pinned while copies read them, a bounded number at a time.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::device::{Pinned, Pinner};
use crate::error::{Error, Result};
use crate::extent::FileId;
use crate::limits;
use crate::sync::lock;

/// The windows of one load.
#[derive(Debug)]
pub(super) struct Windows {
    pinner: Arc<dyn Pinner>,
    /// Size of each window; they lie on multiples of it in their file.
    window_bytes: u64,
    /// Most leases and permits at a time.
    leases_max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    permits: usize,
    windows: HashMap<(FileId, u64), Window, foldhash::fast::FixedState>,
    pinned_bytes: u64,
    peak_bytes: u64,
}

/// The state of a window that somebody wants or wanted.
#[derive(Debug)]
enum Window {
    /// Somebody pins or unpins it.
    Changing,
    /// Pinned for this many leases, if it has to be; so many bytes of it are.
    Open { leases: usize, pinned: Option<Pinned>, bytes: u64 },
}

/// The right to lease a window. Given back when dropped.
#[derive(Debug)]
pub(super) struct Permit(Arc<Windows>);

/// A pinned window of a mapping; the last one to drop its lease unpins it.
#[derive(Debug)]
pub(super) struct Lease {
    key: (FileId, u64),
    // Given back after the window, so that no more than the bound are ever pinned.
    permit: Permit,
    /// The mapping.
    _keep: Arc<dyn std::any::Any + Send + Sync>,
}

impl Windows {
    /// Windows of `window_bytes`, a multiple of the page size, of which at most `budget` bytes are pinned at a time.
    pub(super) fn new(pinner: Arc<dyn Pinner>, window_bytes: usize, budget: usize) -> Windows {
        Windows {
            pinner,
            window_bytes: window_bytes as u64,
            leases_max: (budget / window_bytes).max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The right to lease one more window, unless there are too many.
    pub(super) fn try_permit(self: &Arc<Windows>) -> Option<Permit> {
        let mut state = lock(&self.state);
        if state.permits == self.leases_max {
            return None;
        }
        state.permits += 1;
        Some(Permit(Arc::clone(self)))
    }

    /// Whether one window has all of these bytes.
    pub(super) fn has(&self, start: u64, end: u64) -> bool {
        start / self.window_bytes == end.saturating_sub(1) / self.window_bytes
    }

    /// Waits until there may be a permit, or `bound` has passed.
    pub(super) fn wait(&self, bound: Duration) {
        let state = lock(&self.state);
        if state.permits == self.leases_max {
            drop(self.changed.wait_timeout(state, bound));
        }
    }

    /// Most bytes that were pinned at a time.
    pub(super) fn peak_bytes(&self) -> u64 {
        lock(&self.state).peak_bytes
    }

    /// Pins the window of a file that has byte `offset`, or shares it with those who have it. `mapping` is the address
    /// of the file's first byte, `size` the file's.
    ///
    /// # Errors
    /// It cannot be pinned; the permit comes back.
    ///
    /// # Safety
    /// The mapping has all of the file, and stays for as long as `keep` lives.
    pub(super) unsafe fn lease(
        self: &Arc<Windows>,
        permit: Permit,
        file: FileId,
        offset: u64,
        mapping: *const u8,
        size: u64,
        keep: Arc<dyn std::any::Any + Send + Sync>,
    ) -> Result<Lease, (Error, Permit)> {
        let key = (file, offset / self.window_bytes);
        let lease = |permit| Lease { key, permit, _keep: keep };
        let mut state = lock(&self.state);
        loop {
            match state.windows.get_mut(&key) {
                Some(Window::Open { leases, .. }) => {
                    *leases += 1;
                    return Ok(lease(permit));
                }
                Some(Window::Changing) => {
                    // Its bound is that of the read which waits here.
                    let waited = self.changed.wait_timeout(state, limits::LOOK_AGAIN);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => break,
            }
        }
        state.windows.insert(key, Window::Changing);
        drop(state);
        let mut opening = Opening { windows: self, key, open: None };
        let start = key.1 * self.window_bytes;
        let bytes = self.window_bytes.min(size - start);
        let address = mapping.wrapping_add(start as usize);
        // SAFETY: the range lies in the mapping (whose last page is mapped whole), which the lease keeps.
        let pinned = unsafe { self.pinner.pin_read_only(address, bytes as usize) };
        let pinned = match pinned {
            Ok(pinned) => pinned,
            Err(error) => return Err((error, permit)),
        };
        let bytes = if pinned.is_some() { bytes } else { 0 };
        opening.open = Some(Window::Open { leases: 1, pinned, bytes });
        drop(opening);
        let mut state = lock(&self.state);
        state.pinned_bytes += bytes;
        state.peak_bytes = state.peak_bytes.max(state.pinned_bytes);
        Ok(lease(permit))
    }
}

/// A window that this thread pins: open when this is dropped, or as if it had never been wanted.
struct Opening<'a> {
    windows: &'a Windows,
    key: (FileId, u64),
    open: Option<Window>,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.windows.state);
        match self.open.take() {
            Some(open) => state.windows.insert(self.key, open),
            None => state.windows.remove(&self.key),
        };
        self.windows.changed.notify_all();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let windows = &*self.permit.0;
        let mut state = lock(&windows.state);
        match state.windows.get_mut(&self.key) {
            Some(Window::Open { leases, .. }) if *leases > 1 => {
                *leases -= 1;
                return;
            }
            _ => {}
        }
        let window = state.windows.insert(self.key, Window::Changing);
        drop(state);
        // Out of the lock: it takes long.
        let bytes = match window {
            Some(Window::Open { pinned, bytes, .. }) => {
                drop(pinned);
                bytes
            }
            _ => 0,
        };
        let mut state = lock(&windows.state);
        state.windows.remove(&self.key);
        state.pinned_bytes -= bytes;
        windows.changed.notify_all();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        lock(&self.0.state).permits -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// Refuses to pin what is pinned, as drivers do.
    #[derive(Debug, Default)]
    struct Strict {
        pinned: Arc<Mutex<Vec<usize>>>,
        most: AtomicUsize,
    }

    #[derive(Debug)]
    struct Unpin(Arc<Mutex<Vec<usize>>>, usize);

    impl Drop for Unpin {
        fn drop(&mut self) {
            lock(&self.0).retain(|&address| address != self.1);
        }
    }

    impl Pinner for Strict {
        unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
            unreachable!("windows are only read")
        }

        unsafe fn pin_read_only(&self, address: *const u8, _: usize) -> Result<Option<Pinned>> {
            let mut pinned = lock(&self.pinned);
            assert!(!pinned.contains(&address.addr()), "pinned twice");
            pinned.push(address.addr());
            self.most.fetch_max(pinned.len(), Ordering::Relaxed);
            Ok(Some(Box::new(Unpin(Arc::clone(&self.pinned), address.addr()))))
        }

        fn pins_read_only(&self) -> bool {
            true
        }

        fn numa_node(&self) -> Option<u32> {
            None
        }
    }

    #[test]
    fn a_window_is_pinned_once_for_all_who_want_it_and_not_too_many_are() {
        let strict = Arc::new(Strict::default());
        let windows = Arc::new(Windows::new(strict.clone(), 4096, 3 * 4096));

        thread::scope(|scope| {
            for thread in 0..4u64 {
                let windows = &windows;
                scope.spawn(move || {
                    for step in 0..500 {
                        let permit = loop {
                            match windows.try_permit() {
                                Some(permit) => break permit,
                                None => windows.wait(Duration::from_millis(10)),
                            }
                        };
                        let offset = (step + thread % 2) % 7 * 4096 + thread;
                        let base: *const u8 = std::ptr::without_provenance(1 << 30);
                        // SAFETY: nothing is mapped, and nothing touched.
                        let lease = unsafe { windows.lease(permit, FileId(0), offset, base, 7 * 4096, Arc::new(())) };
                        let lease = lease.unwrap();
                        assert!(matches!(lock(&windows.state).windows[&lease.key], Window::Open { .. }));
                        drop(lease);
                    }
                });
            }
        });
        assert!(lock(&strict.pinned).is_empty());
        assert!(strict.most.load(Ordering::Relaxed) <= 3);
        assert!(windows.peak_bytes() <= 3 * 4096 && windows.peak_bytes() > 0);
        assert_eq!(lock(&windows.state).permits, 0);
    }
}
