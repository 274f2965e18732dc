//! What tests steer the twin with; not part of NCCL.

use std::ffi::c_char;
use std::fs;

use crate::abi::In;
use crate::faults::{Due, Faults};
use crate::sim::lock;

/// 1: this is no NCCL.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_is_simulator() -> i32 {
    1
}

/// How often a function was called; null for all.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_calls(name: In<c_char>) -> u64 {
    lock().ledger.calls(name.text().as_deref())
}

/// How many communicators were neither destroyed nor aborted.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_live() -> u64 {
    lock().comms.len() as u64
}

/// How many violations were counted; only with `SIMNCCL_STRICT=0` can there be any.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_violations() -> u64 {
    lock().ledger.violations.len() as u64
}

/// Bytes that a device received over its link (kind 0), or sent (1).
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_bytes(device: u32, kind: u32) -> u64 {
    lock().ledger.bytes(device as usize, kind as usize)
}

/// Replaces all faults, as `SIMNCCL_FAULT` has them; counting starts now. Not 0 if it means nothing.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_fault(text: In<c_char>) -> i32 {
    match Faults::parse(text.text().as_deref().unwrap_or_default(), Due::read) {
        Some(faults) => {
            lock().faults = faults;
            0
        }
        None => 1,
    }
}

/// Counts calls and bytes from 0 again.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_reset_counts() {
    lock().ledger.reset();
}

/// Writes the ledger into a file now. Not 0 if that fails.
#[unsafe(no_mangle)]
pub extern "C" fn simnccl_ledger(path: In<c_char>) -> i32 {
    let report = lock().report();
    path.text().and_then(|path| fs::write(path, report).ok()).map_or(1, |()| 0)
}
