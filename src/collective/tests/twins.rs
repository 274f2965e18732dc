//! The twins of the driver and of NCCL, which cargo leaves beside the test binary.

use std::ffi::{CString, c_char};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, ptr};

use libloading::Library;

/// Loads both into this process: whoever asks for the driver or for NCCL from now on gets them, by their names.
pub(super) fn load() {
    twins();
}

struct Twins {
    driver: Library,
    nccl: Library,
}

fn twins() -> &'static Twins {
    static TWINS: OnceLock<Twins> = OnceLock::new();
    TWINS.get_or_init(|| {
        let binary = env::current_exe().unwrap();
        let load = |name: &str| {
            let path = binary.with_file_name(name);
            // SAFETY: libraries of this workspace, which are never closed.
            unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        Twins { driver: load("libsimcuda.so"), nccl: load("libsimnccl.so") }
    })
}

/// A command that gets none of the twins' settings.
pub(super) fn command() -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    let ours = |name: &[u8]| [&b"SIMCUDA_"[..], b"SIMNCCL_", b"NCCL_"].iter().any(|ours| name.starts_with(ours));
    for (name, _) in env::vars_os().filter(|(name, _)| ours(name.as_encoded_bytes())) {
        command.env_remove(name);
    }
    command
}

/// How much was not returned to the driver, and how many communicators not to NCCL.
pub(super) fn live() -> [u64; 2] {
    let Twins { driver, nccl } = twins();
    [(driver, "simcuda_live"), (nccl, "simnccl_live")].map(|(library, name)| {
        // SAFETY: as exported by the twins.
        unsafe { library.get::<extern "C" fn() -> u64>(name).unwrap()() }
    })
}

/// How often a function of NCCL was called; without a name, all of them.
pub(super) fn calls(name: Option<&str>) -> u64 {
    let name = name.map(|name| CString::new(name).unwrap());
    let name = name.as_ref().map_or(ptr::null(), |name| name.as_ptr());
    // SAFETY: as exported by the twin; null or a C string.
    unsafe { twins().nccl.get::<extern "C" fn(*const c_char) -> u64>("simnccl_calls").unwrap()(name) }
}

/// Replaces NCCL's faults that are to come, as `SIMNCCL_FAULT` names them.
pub(super) fn fault(faults: &str) {
    let text = CString::new(faults).unwrap();
    // SAFETY: as exported by the twin; a C string.
    let status =
        unsafe { twins().nccl.get::<extern "C" fn(*const c_char) -> i32>("simnccl_fault").unwrap()(text.as_ptr()) };
    assert_eq!(status, 0, "not a list of faults: {faults}");
}
