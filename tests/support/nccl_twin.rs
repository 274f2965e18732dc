//! NCCL's twin, for tests: found beside the test binary, loaded before anything asks for NCCL. It needs the driver twin,
//! which a test loads with `twin::load`.

#![allow(dead_code, reason = "each test uses its own part")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::{env, mem, ptr};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_NOW: i32 = 2;
const RTLD_GLOBAL: i32 = 0x100;

/// Loads the twin into this process, once: whoever asks for `libnccl.so.2` from now on gets it, by its SONAME.
pub(crate) fn load() {
    library();
}

fn library() -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        let binary = env::current_exe().unwrap();
        let mut folders = binary.ancestors().skip(1).take(2).map(|folder| folder.join("libsimnccl.so"));
        let path = folders.find(|path| path.exists());
        let path = path.unwrap_or_else(|| panic!("no libsimnccl.so beside {}", binary.display()));
        let path = CString::new(path.into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a C string. The library is never closed.
        let library = unsafe { dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
        assert!(!library.is_null(), "{path:?} is no library");
        library as usize
    }) as *mut c_void
}

/// The address of an exported function, as what it is.
///
/// # Safety
/// - `F` is the type of that function.
pub(crate) unsafe fn function<F: Copy>(name: &CStr) -> F {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: a live library and a C string.
    let address = unsafe { dlsym(library(), name.as_ptr()) };
    assert!(!address.is_null(), "the twin has no {name:?}");
    // SAFETY: the duty of the caller; sizes are equal.
    unsafe { mem::transmute_copy(&address) }
}

/// How often a function of NCCL was called; without a name, all of them.
pub(crate) fn calls(name: Option<&str>) -> u64 {
    let name = name.map(|name| CString::new(name).unwrap());
    let name = name.as_ref().map_or(ptr::null(), |name| name.as_ptr());
    // SAFETY: as exported by the twin; null or a C string.
    unsafe { function::<extern "C" fn(*const c_char) -> u64>(c"simnccl_calls")(name) }
}

/// How many communicators were neither destroyed nor aborted.
pub(crate) fn live() -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn() -> u64>(c"simnccl_live")() }
}

/// Violations so far, with `SIMNCCL_STRICT=0`.
pub(crate) fn violations() -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn() -> u64>(c"simnccl_violations")() }
}

/// Bytes that a device received over its link (kind 0), or sent (1).
pub(crate) fn bytes(device: u32, kind: u32) -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn(u32, u32) -> u64>(c"simnccl_bytes")(device, kind) }
}

/// Replaces the faults that are to come, as `SIMNCCL_FAULT` names them.
pub(crate) fn fault(faults: &str) {
    let text = CString::new(faults).unwrap();
    // SAFETY: as exported by the twin; a C string.
    let result = unsafe { function::<extern "C" fn(*const c_char) -> i32>(c"simnccl_fault")(text.as_ptr()) };
    assert_eq!(result, 0, "not a list of faults: {faults}");
}

/// Counts calls and bytes from 0.
pub(crate) fn reset_counts() {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn()>(c"simnccl_reset_counts")() }
}

/// Writes the ledger so far, as JSON.
pub(crate) fn ledger(path: &Path) {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: as exported by the twin; a C string.
    let result = unsafe { function::<extern "C" fn(*const c_char) -> i32>(c"simnccl_ledger")(path.as_ptr()) };
    assert_eq!(result, 0, "the ledger was not written");
}
