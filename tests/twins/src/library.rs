//! A twin's library in the process of a test, and what all of them export.

use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, mem, ptr};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

const RTLD_NOW: i32 = 2;
const RTLD_GLOBAL: i32 = 0x100;

pub(crate) struct Library {
    /// `simcuda`, as its functions begin.
    name: &'static str,
    /// The handle, whose library is never closed.
    handle: OnceLock<usize>,
}

impl Library {
    pub(crate) const fn new(name: &'static str) -> Library {
        Library { name, handle: OnceLock::new() }
    }

    pub(crate) fn load(&self) -> *mut c_void {
        *self.handle.get_or_init(|| {
            let path = CString::new(self.path().into_os_string().into_encoded_bytes()).unwrap();
            // SAFETY: a C string.
            let library = unsafe { dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
            // SAFETY: after a failed dlopen this is a C string.
            assert!(!library.is_null(), "{}", unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy());
            library as usize
        }) as *mut c_void
    }

    /// The built library: cargo leaves it beside the tests of whatever depends on it.
    pub(crate) fn path(&self) -> PathBuf {
        let binary = env::current_exe().unwrap();
        let name = format!("lib{}.so", self.name);
        let mut folders = binary.ancestors().skip(1).take(2).map(|folder| folder.join(&name));
        folders.find(|path| path.exists()).unwrap_or_else(|| panic!("no {name} beside {}", binary.display()))
    }

    /// The address of an exported function, as what it is.
    ///
    /// # Safety
    /// - `F` is the type of that function.
    pub(crate) unsafe fn function<F: Copy>(&self, name: &CStr) -> F {
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
        // SAFETY: a live library and a C string.
        let address = unsafe { dlsym(self.load(), name.as_ptr()) };
        assert!(!address.is_null(), "{} has no {name:?}", self.name);
        // SAFETY: the duty of the caller; sizes are equal.
        unsafe { mem::transmute_copy(&address) }
    }

    /// The same of a function that begins with the name of the library.
    ///
    /// # Safety
    /// - `F` is the type of that function.
    pub(crate) unsafe fn own<F: Copy>(&self, name: &str) -> F {
        let name = CString::new(format!("{}_{name}", self.name)).unwrap();
        // SAFETY: the duty of the caller.
        unsafe { self.function(&name) }
    }

    /// Calls a function that gives a count.
    pub(crate) fn count(&self, name: &str) -> u64 {
        // SAFETY: as every twin exports those that the functions beside have it called with.
        unsafe { self.own::<extern "C" fn() -> u64>(name)() }
    }

    pub(crate) fn calls(&self, name: Option<&str>) -> u64 {
        let name = name.map(|name| CString::new(name).unwrap());
        let name = name.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        // SAFETY: as every twin exports it; null or a C string.
        unsafe { self.own::<extern "C" fn(*const c_char) -> u64>("calls")(name) }
    }

    pub(crate) fn fault(&self, faults: &str) {
        assert_eq!(self.tell("fault", faults.as_ref()), 0, "not a list of faults: {faults}");
    }

    pub(crate) fn reset_counts(&self) {
        // SAFETY: as every twin exports it.
        unsafe { self.own::<extern "C" fn()>("reset_counts")() }
    }

    pub(crate) fn ledger(&self, path: &Path) {
        assert_eq!(self.tell("ledger", path.as_os_str()), 0, "the ledger was not written");
    }

    fn tell(&self, name: &str, text: &OsStr) -> i32 {
        let text = CString::new(text.as_bytes()).unwrap();
        // SAFETY: as every twin exports both; a C string.
        unsafe { self.own::<extern "C" fn(*const c_char) -> i32>(name)(text.as_ptr()) }
    }
}

/// What can be asked of, and done with, every twin: functions of the module that has its `LIBRARY`.
macro_rules! functions_of_every_twin {
    () => {
        /// Loads the twin into this process, once: whoever asks for the library from now on gets it, by its SONAME.
        pub fn load() {
            LIBRARY.load();
        }

        /// The address of an exported function, as what it is.
        ///
        /// # Safety
        /// - `F` is the type of that function.
        pub unsafe fn function<F: Copy>(name: &std::ffi::CStr) -> F {
            // SAFETY: the duty of the caller.
            unsafe { LIBRARY.function(name) }
        }

        /// How often a function of the library was called; without a name, all of them.
        pub fn calls(name: Option<&str>) -> u64 {
            LIBRARY.calls(name)
        }

        /// How much was not given back.
        pub fn live() -> u64 {
            LIBRARY.count("live")
        }

        /// Violations so far, where the environment says that they are counted.
        pub fn violations() -> u64 {
            LIBRARY.count("violations")
        }

        /// Replaces the faults that are to come, as the environment names them.
        pub fn fault(faults: &str) {
            LIBRARY.fault(faults);
        }

        /// Counts calls, bytes and times from 0.
        pub fn reset_counts() {
            LIBRARY.reset_counts();
        }

        /// Writes the ledger so far, as JSON.
        pub fn ledger(path: &std::path::Path) {
            LIBRARY.ledger(path);
        }
    };
}
pub(crate) use functions_of_every_twin;
