//! What crosses the C boundary: pointers of the caller's, and the driver's structures.

#![allow(missing_docs, reason = "cuda.h documents the fields")]

use std::ffi::{CStr, c_char, c_void};

use crate::code::{INVALID_VALUE, Result};
use crate::handle::Handle;

/// A place of the caller's for a result. The C contract: null, or valid for a write of one `T`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes the result; a null place is an invalid value.
    pub(crate) fn set(self, value: T) -> Result {
        if self.0.is_null() { Err(INVALID_VALUE) } else { self.set_if(value) }
    }

    /// Writes the result where the caller wants it.
    pub(crate) fn set_if(self, value: T) -> Result {
        if !self.0.is_null() {
            // SAFETY: not null, so valid for the write by the contract of the type.
            unsafe { self.0.write_unaligned(value) }
        }
        Ok(())
    }

    /// Whether the caller wants no result.
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The same place for another type; the caller knows it by an attribute.
    pub(crate) fn cast<U>(self) -> Out<U> {
        Out(self.0.cast())
    }

    /// The place of the `index`-th result of several.
    pub(crate) fn at(self, index: usize) -> Out<T> {
        Out(self.0.wrapping_add(index))
    }
}

impl Out<c_char> {
    /// Writes a string with its end, cut to `capacity` bytes.
    pub(crate) fn set_text(self, text: &str, capacity: i32) -> Result {
        let capacity = usize::try_from(capacity).map_err(|_| INVALID_VALUE)?;
        if capacity == 0 {
            return Err(INVALID_VALUE);
        }
        let bytes = text.bytes().take(capacity - 1).chain([0]);
        bytes.enumerate().try_for_each(|(index, byte)| self.at(index).set(byte as c_char))
    }
}

/// Values of the caller's. The C contract: null, or valid for reads of as many `T` as the call says.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// The value; a null pointer is an invalid value.
    pub(crate) fn get(self) -> Result<T> {
        self.at(0)
    }

    /// The `index`-th of several values.
    pub(crate) fn at(self, index: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null, so valid by the contract of the type; callers stay below the count of the call.
        Ok(unsafe { self.0.wrapping_add(index).read_unaligned() })
    }

    /// Whether there is none.
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Where they are, if anywhere.
    pub(crate) fn address(self) -> Option<*const T> {
        (!self.0.is_null()).then_some(self.0)
    }

    /// The same place as another type; the caller knows it by an attribute.
    pub(crate) fn cast<U>(self) -> In<U> {
        In(self.0.cast())
    }
}

impl In<c_char> {
    /// The string, to its end.
    pub(crate) fn text(self) -> Result<String> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: not null, so a C string by the contract of the calls that take one.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map(String::from).map_err(|_| INVALID_VALUE)
    }
}

/// A function of the host that a stream calls.
pub type HostFn = extern "C" fn(*mut c_void);

/// Runs an operation of another library: data and start to end, in the model's time.
pub type ForeignFn = extern "C" fn(HostData, u64) -> u64;

/// Is told that one never runs.
pub type SkipFn = extern "C" fn(HostData);

/// An argument of a host function, which its caller may use from any thread.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct HostData(pub(crate) *mut c_void);

// SAFETY: handed through to the function, which the driver may call from any thread by its documentation.
unsafe impl Send for HostData {}

/// `CUuuid`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Uuid {
    pub bytes: [u8; 16],
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2D {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: u32,
    pub src_host: u64,
    pub src_device: u64,
    pub src_array: u64,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: u32,
    pub dst_host: u64,
    pub dst_device: u64,
    pub dst_array: u64,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location {
    pub kind: u32,
    pub id: i32,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AllocationProp {
    pub kind: u32,
    pub handle_types: u32,
    pub location: Location,
    pub win32: u64,
    pub flags: u64,
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AccessDesc {
    pub location: Location,
    pub flags: u32,
}

/// A handle that the caller may leave out.
pub(crate) fn given(handle: Handle) -> Result<Handle> {
    if handle == 0 { Err(INVALID_VALUE) } else { Ok(handle) }
}
