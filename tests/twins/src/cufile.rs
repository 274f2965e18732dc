//! cuFile's twin, for tests, which load it before anything asks for cuFile. It needs the driver's.

use crate::library::{Library, functions_of_every_twin};

static LIBRARY: Library = Library::new("simcufile");

functions_of_every_twin!();

/// Bytes that came directly, bounced, and in compatibility mode; the most that were registered.
pub fn bytes() -> [u64; 4] {
    // SAFETY: as exported by the twin.
    let bytes = unsafe { LIBRARY.own::<extern "C" fn(u32) -> u64>("bytes") };
    [0, 1, 2, 3].map(|kind| bytes(kind))
}
