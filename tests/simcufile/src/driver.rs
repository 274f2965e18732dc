//! The driver twin, whose memory everything is read into.

use std::ffi::{CStr, c_char, c_void};
use std::mem;
use std::sync::OnceLock;

struct Driver {
    begin: extern "C" fn(*const c_char, u64, u64, *mut u64) -> u32,
    end: extern "C" fn(u64),
    is_live: extern "C" fn(u64, u64) -> i32,
}

/// Finds the driver twin, which whoever uses cuFile has loaded, or loads it.
fn driver() -> Option<&'static Driver> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    let found = DRIVER.get_or_init(|| {
        // SAFETY: C strings; the library may be loaded into any process, and is never closed.
        let library = unsafe { libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW) };
        let symbol = |name: &CStr| -> Option<*mut c_void> {
            // SAFETY: a live library and a C string.
            let address = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!address.is_null()).then_some(address)
        };
        if library.is_null() {
            return None;
        }
        let (begin, end) = (symbol(c"simcuda_begin_write")?, symbol(c"simcuda_end_write")?);
        let is_live = symbol(c"simcuda_is_live")?;
        // SAFETY: functions of the driver twin, declared as there.
        unsafe {
            Some(Driver {
                begin: mem::transmute::<*mut c_void, extern "C" fn(*const c_char, u64, u64, *mut u64) -> u32>(begin),
                end: mem::transmute::<*mut c_void, extern "C" fn(u64)>(end),
                is_live: mem::transmute::<*mut c_void, extern "C" fn(u64, u64) -> i32>(is_live),
            })
        }
    });
    found.as_ref()
}

/// A write to memory of the current context's device, until it is dropped.
pub(crate) struct Writing(u64);

impl Writing {
    /// `Err` with the driver's status if the memory is not that.
    pub(crate) fn begin(call: &'static CStr, start: u64, bytes: u64) -> Result<Writing, u32> {
        let driver = driver().ok_or(3u32)?; // CUDA_ERROR_NOT_INITIALIZED
        let mut id = 0;
        match (driver.begin)(call.as_ptr(), start, bytes, &raw mut id) {
            0 => Ok(Writing(id)),
            status => Err(status),
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(driver) = driver() {
            (driver.end)(self.0);
        }
    }
}

/// Whether the memory was not given back.
pub(crate) fn is_live(start: u64, bytes: u64) -> bool {
    driver().is_some_and(|driver| (driver.is_live)(start, bytes) != 0)
}
