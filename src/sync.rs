//! The primitives that the staging ring is built from: std, or loom's models of them under `--cfg loom`.

pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks, also when a thread panicked while it held the lock: every critical section of this crate leaves its data
/// consistent at each step, and the panic itself is reported as the load's error.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
