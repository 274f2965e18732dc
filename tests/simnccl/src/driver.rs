//! The driver twin, on whose streams everything runs.

use std::ffi::{CStr, c_void};
use std::mem;
use std::sync::OnceLock;

use crate::abi::{Result, SYSTEM_ERROR, UNHANDLED_CUDA_ERROR};
use crate::sim;

/// Bytes of device memory that an operation touches, as the driver twin takes them.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Touched {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) writes: u32,
}

/// An operation, as the driver twin takes it.
#[repr(C)]
pub(crate) struct Operation {
    pub(crate) call: *const std::ffi::c_char,
    pub(crate) touched: *const Touched,
    pub(crate) touched_count: usize,
    pub(crate) run: extern "C" fn(*mut c_void, u64) -> u64,
    pub(crate) skip: extern "C" fn(*mut c_void),
    pub(crate) data: *mut c_void,
    pub(crate) after: Place,
}

/// Where an operation is: its stream and its number there; zeros for nowhere.
pub(crate) type Place = [u64; 2];

struct Driver {
    submit: Submit,
    current_device: CurrentDevice,
    board: Board,
}

type Submit = extern "C" fn(i32, u64, *const Operation, *mut Place) -> u32;
type CurrentDevice = extern "C" fn() -> i32;
type Board = extern "C" fn(i32) -> i32;

/// Finds the driver twin, which whoever uses NCCL has loaded, or loads it.
fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    let found = DRIVER.get_or_init(|| {
        // SAFETY: C strings; the library may be loaded into any process, and is never closed.
        let library = unsafe { libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        let symbol = |name: &CStr| {
            // SAFETY: a live library and a C string.
            let address = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!address.is_null()).then_some(address)
        };
        let submit = symbol(c"simcuda_submit")?;
        let current_device = symbol(c"simcuda_current_device")?;
        let board = symbol(c"simcuda_board")?;
        // SAFETY: functions of the driver twin, declared as there.
        unsafe {
            Some(Driver {
                submit: mem::transmute::<*mut c_void, Submit>(submit),
                current_device: mem::transmute::<*mut c_void, CurrentDevice>(current_device),
                board: mem::transmute::<*mut c_void, Board>(board),
            })
        }
    });
    found.as_ref().ok_or_else(|| sim::fail(SYSTEM_ERROR, "libcuda.so is not the driver twin: this library needs it"))
}

/// The device of the context that is current on this thread.
pub(crate) fn current_device() -> Result<usize> {
    usize::try_from((driver()?.current_device)())
        .map_err(|_| sim::fail(UNHANDLED_CUDA_ERROR, "no context is current on this thread"))
}

/// Which of the machine's devices one of this process is.
pub(crate) fn board(device: usize) -> Result<u64> {
    u64::try_from((driver()?.board)(device as i32))
        .map_err(|_| sim::fail(UNHANDLED_CUDA_ERROR, &format!("there is no device {device}")))
}

/// Puts an operation into a stream; only if that succeeds is one of its functions called.
pub(crate) fn submit(device: usize, stream: u64, operation: &Operation) -> Result<Place> {
    let mut place = [0; 2];
    match (driver()?.submit)(device as i32, stream, operation, &raw mut place) {
        0 => Ok(place),
        status => Err(sim::fail(UNHANDLED_CUDA_ERROR, &format!("Cuda failure {status}"))),
    }
}
