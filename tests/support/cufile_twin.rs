//! cuFile's twin, for tests: found beside the test binary, loaded before anything asks for cuFile. It needs the driver twin,
//! which a test loads with `twin::load`.

#![allow(dead_code, reason = "each test uses its own part")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;
use std::{env, mem, ptr};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_NOW: i32 = 2;
const RTLD_GLOBAL: i32 = 0x100;

/// Loads the twin into this process, once: whoever asks for `libcufile.so.0` from now on gets it, by its SONAME.
pub(crate) fn load() {
    library();
}

fn library() -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        let binary = env::current_exe().unwrap();
        let mut folders = binary.ancestors().skip(1).take(2).map(|folder| folder.join("libsimcufile.so"));
        let path = folders.find(|path| path.exists());
        let path = path.unwrap_or_else(|| panic!("no libsimcufile.so beside {}", binary.display()));
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

/// How often a function of cuFile was called; without a name, all of them.
pub(crate) fn calls(name: Option<&str>) -> u64 {
    let name = name.map(|name| CString::new(name).unwrap());
    let name = name.as_ref().map_or(ptr::null(), |name| name.as_ptr());
    // SAFETY: as exported by the twin; null or a C string.
    unsafe { function::<extern "C" fn(*const c_char) -> u64>(c"simcufile_calls")(name) }
}

/// How many handles and places of memory were not deregistered.
pub(crate) fn live() -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn() -> u64>(c"simcufile_live")() }
}

/// Violations so far, with `SIMCUFILE_STRICT=0`.
pub(crate) fn violations() -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn() -> u64>(c"simcufile_violations")() }
}

/// Bytes that came directly, bounced, and in compatibility mode; the most that were registered.
pub(crate) fn bytes() -> [u64; 4] {
    // SAFETY: as exported by the twin.
    let bytes = unsafe { function::<extern "C" fn(u32) -> u64>(c"simcufile_bytes") };
    [0, 1, 2, 3].map(|kind| bytes(kind))
}

/// Replaces the faults that are to come, as `SIMCUFILE_FAULT` names them.
pub(crate) fn fault(faults: &str) {
    let text = CString::new(faults).unwrap();
    // SAFETY: as exported by the twin; a C string.
    let result = unsafe { function::<extern "C" fn(*const c_char) -> i32>(c"simcufile_fault")(text.as_ptr()) };
    assert_eq!(result, 0, "not a list of faults: {faults}");
}

/// Counts calls and bytes from 0.
pub(crate) fn reset_counts() {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn()>(c"simcufile_reset_counts")() }
}
