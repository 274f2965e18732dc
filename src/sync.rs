//! The primitives that the staging ring is built from: std, or loom's models of them under `--cfg loom`.

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks, also when a thread panicked while it held the lock: every critical section of this crate leaves its data
/// consistent at each step, and the panic itself is reported as the load's error. For std's own, which all but the
/// ring use.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
