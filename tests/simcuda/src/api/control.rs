//! What tests steer the twin with; not part of the driver.

use std::ffi::c_char;
use std::fs;

use crate::abi::In;
use crate::faults::{Due, Faults};
use crate::sim::lock;

/// 1: this is no driver.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_is_simulator() -> i32 {
    1
}

/// How often a function was called, with or without its suffix `_v2`; null for all.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_calls(name: In<c_char>) -> u64 {
    lock().ledger.calls(name.text().ok().as_deref())
}

/// How much was not returned: handles, allocations, registrations, retained contexts.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_live() -> u64 {
    lock().live().len() as u64
}

/// How many violations were counted; only with `SIMCUDA_STRICT=0` can there be any.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_violations() -> u64 {
    lock().ledger.violations.len() as u64
}

/// Bytes that were copied: from the host (kind 0), to it (1), within or between devices (2).
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_bytes(device: u32, kind: u32) -> u64 {
    lock().ledger.bytes(device as usize, kind)
}

/// Replaces all faults, as `SIMCUDA_FAULT` has them; counting starts now. Not 0 if it means nothing.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_fault(text: In<c_char>) -> i32 {
    match Faults::parse(text.text().ok().as_deref().unwrap_or_default(), Due::read) {
        Some(faults) => {
            lock().faults = faults;
            0
        }
        None => 1,
    }
}

/// Counts calls, bytes and times from 0 again.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_reset_counts() {
    lock().ledger.reset();
}

/// Writes the ledger into a file now. Not 0 if that fails.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ledger(path: In<c_char>) -> i32 {
    let report = lock().report();
    path.text().ok().and_then(|path| fs::write(path, report).ok()).map_or(1, |()| 0)
}
