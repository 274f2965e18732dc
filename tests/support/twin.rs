//! The driver twin, for tests: found beside the test binary, loaded before anything asks for the driver.

#![allow(dead_code, reason = "each test uses its own part")]

use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs, mem};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

const RTLD_NOW: i32 = 2;
const RTLD_GLOBAL: i32 = 0x100;

/// Loads the twin into this process, once: whoever asks for `libcuda.so` from now on gets it, by its SONAME.
pub(crate) fn load() {
    library();
}

fn library() -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        let path = CString::new(path().into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a C string. The library is never closed.
        let library = unsafe { dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
        // SAFETY: after a failed dlopen this is a C string.
        assert!(!library.is_null(), "{}", unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy());
        library as usize
    }) as *mut c_void
}

/// The built library: cargo leaves it beside the tests of whatever depends on it.
fn path() -> PathBuf {
    let binary = env::current_exe().unwrap();
    let path = binary.ancestors().skip(1).take(2).map(|folder| folder.join("libsimcuda.so")).find(|path| path.exists());
    path.unwrap_or_else(|| panic!("no libsimcuda.so beside {}", binary.display()))
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

/// How often a driver function was called; without a name, all of them.
pub(crate) fn calls(name: Option<&str>) -> u64 {
    let name = name.map(|name| CString::new(name).unwrap());
    // SAFETY: as exported by the twin; null or a C string.
    unsafe { function::<extern "C" fn(*const c_char) -> u64>(c"simcuda_calls")(text(&name)) }
}

/// The context that is current on this thread, as a number; 0 for none.
pub(crate) fn current_context() -> usize {
    let mut context = 0;
    // SAFETY: as the driver declares it: it writes a handle.
    let result = unsafe { function::<extern "C" fn(*mut usize) -> i32>(c"cuCtxGetCurrent")(&raw mut context) };
    assert!(result == 0 || result == 3, "{result}"); // 3: not initialised yet
    context
}

/// How much was not returned to the driver.
pub(crate) fn live() -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn() -> u64>(c"simcuda_live")() }
}

/// Violations so far, with `SIMCUDA_STRICT=0`.
pub(crate) fn violations() -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn() -> u64>(c"simcuda_violations")() }
}

/// Bytes that went to a device (kind 0), came from it (1), or were copied on it (2).
pub(crate) fn bytes(device: u32, kind: u32) -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn(u32, u32) -> u64>(c"simcuda_bytes")(device, kind) }
}

/// Replaces the faults that are to come, as `SIMCUDA_FAULT` names them.
pub(crate) fn fault(faults: &str) {
    let faults = Some(CString::new(faults).unwrap());
    // SAFETY: as exported by the twin; a C string.
    let result = unsafe { function::<extern "C" fn(*const c_char) -> i32>(c"simcuda_fault")(text(&faults)) };
    assert_eq!(result, 0, "not a list of faults: {faults:?}");
}

/// Counts calls, bytes and times from 0.
pub(crate) fn reset_counts() {
    // SAFETY: as exported by the twin.
    unsafe { function::<extern "C" fn()>(c"simcuda_reset_counts")() }
}

/// Writes the ledger so far, as JSON.
pub(crate) fn ledger(path: &Path) {
    let path = Some(CString::new(path.as_os_str().as_encoded_bytes()).unwrap());
    // SAFETY: as exported by the twin; a C string.
    let result = unsafe { function::<extern "C" fn(*const c_char) -> i32>(c"simcuda_ledger")(text(&path)) };
    assert_eq!(result, 0, "the ledger was not written");
}

fn text(text: &Option<CString>) -> *const c_char {
    text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr())
}

/// A command whose process finds the twins under the names that programs ask for, and none of our settings.
#[expect(clippy::disallowed_methods, reason = "what the tests' own environment says must not reach the process")]
pub(crate) fn command(binary: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(binary);
    let ours = |name: &OsString| {
        [b"SIMCUDA_".as_slice(), b"SIMNCCL_", b"SIMCUFILE_", b"NCCL_"]
            .iter()
            .any(|ours| name.as_encoded_bytes().starts_with(ours))
    };
    for (name, _) in env::vars_os().filter(|(name, _)| ours(name)) {
        command.env_remove(name);
    }
    command.env("LD_LIBRARY_PATH", folder());
    command
}

/// A folder with both names of the driver, and those of NCCL and cuFile where their twins were built.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let library = path();
        let folder = library.parent().unwrap().join("twins");
        fs::create_dir_all(&folder).unwrap();
        let [nccl, cufile] = ["nccl", "cufile"].map(|name| library.with_file_name(format!("libsim{name}.so")));
        let cuda = [("libcuda.so", &library), ("libcuda.so.1", &library)];
        for (name, target) in cuda.into_iter().chain([("libnccl.so.2", &nccl), ("libcufile.so.0", &cufile)]) {
            // Another test may do the same at this moment: a link of one's own, moved into place.
            let link = folder.join(format!("{name}.{}", std::process::id()));
            fs::remove_file(&link).ok();
            if target.exists() {
                std::os::unix::fs::symlink(target, &link).unwrap();
                fs::rename(&link, folder.join(name)).unwrap();
            }
        }
        folder
    })
}
