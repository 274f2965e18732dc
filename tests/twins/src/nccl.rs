//! NCCL's twin, for tests, which load it before anything asks for NCCL. It needs the driver's.

use crate::library::{Library, functions_of_every_twin};

static LIBRARY: Library = Library::new("simnccl");

functions_of_every_twin!();

/// Bytes that a device received over its link (kind 0), or sent (1).
pub fn bytes(device: u32, kind: u32) -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { LIBRARY.own::<extern "C" fn(u32, u32) -> u64>("bytes")(device, kind) }
}
