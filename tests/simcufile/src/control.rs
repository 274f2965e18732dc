//! What tests steer the twin with; not part of cuFile.

use std::ffi::{CStr, c_char};
use std::fs;

use crate::faults::{Due, Faults};
use crate::sim::lock;

/// A string of a test's. The C contract: null, or a C string.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Text(*const c_char);

fn text(Text(text): Text) -> Option<String> {
    // SAFETY: not null, so a C string by the contract of the type.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// 1: this is no cuFile.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_is_simulator() -> i32 {
    1
}

/// How often a function was called; null for all.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_calls(name: Text) -> u64 {
    lock().calls(text(name).as_deref())
}

/// How many handles and places of memory were not deregistered.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_live() -> u64 {
    lock().live()
}

/// How many violations were counted; only with `SIMCUFILE_STRICT=0` can there be any.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_violations() -> u64 {
    lock().violations()
}

/// Bytes that came directly (kind 0), through buffers of the library (1), in compatibility mode (2); the most that were
/// registered at a time (3).
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_bytes(kind: u32) -> u64 {
    let bytes = lock().bytes;
    [bytes.direct, bytes.bounced, bytes.compat, bytes.registered_peak].get(kind as usize).copied().unwrap_or(0)
}

/// Replaces all faults, as `SIMCUFILE_FAULT` has them; counting starts now. Not 0 if it means nothing.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_fault(faults: Text) -> i32 {
    match Faults::parse(text(faults).as_deref().unwrap_or_default(), Due::read) {
        Some(faults) => {
            lock().faults = faults;
            0
        }
        None => 1,
    }
}

/// Counts calls and bytes from 0 again.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_reset_counts() {
    lock().reset();
}

/// Writes the ledger into a file now. Not 0 if that fails.
#[unsafe(no_mangle)]
pub extern "C" fn simcufile_ledger(path: Text) -> i32 {
    let report = lock().report();
    text(path).and_then(|path| fs::write(path, report).ok()).map_or(1, |()| 0)
}
