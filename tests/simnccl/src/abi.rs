//! What crosses the C boundary: status codes, types, structures of nccl.h.

#![allow(missing_docs, reason = "nccl.h documents them")]

use std::ffi::CStr;

/// An `ncclResult_t`.
pub type Code = i32;

/// What a body of a function ends with.
pub(crate) type Result<T = ()> = std::result::Result<T, Code>;

pub const SUCCESS: Code = 0;
pub const UNHANDLED_CUDA_ERROR: Code = 1;
pub const SYSTEM_ERROR: Code = 2;
pub const INTERNAL_ERROR: Code = 3;
pub const INVALID_ARGUMENT: Code = 4;
pub const INVALID_USAGE: Code = 5;
pub const REMOTE_ERROR: Code = 6;
pub const IN_PROGRESS: Code = 7;
pub const TIMEOUT: Code = 8;

/// As `ncclGetErrorString` words a code.
pub(crate) fn text(code: Code) -> &'static CStr {
    match code {
        SUCCESS => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        SYSTEM_ERROR => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        INTERNAL_ERROR => c"internal error - please report this issue to the NCCL developers",
        INVALID_ARGUMENT => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        INVALID_USAGE => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        TIMEOUT => c"NCCL operation timed out",
        _ => c"unknown result code",
    }
}

/// What the caller holds of a communicator: never an address.
pub type Handle = u64;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId {
    pub bytes: [u8; 128],
}

/// The head of `ncclConfig_t` that all its versions since 2.14 have.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    pub size: usize,
    pub magic: u32,
    pub version: u32,
    pub blocking: i32,
}

/// What is in `magic` of a configuration that was initialised.
pub const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// An integer of it that the caller leaves to NCCL.
pub const UNDEFINED: i32 = i32::MIN;

/// A place of the caller's for a result. The C contract: null, or valid for a write of one `T`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes the result; a null place is an invalid argument.
    pub(crate) fn set(self, value: T) -> Result {
        self.set_at(0, value)
    }

    /// Writes one of several results.
    pub(crate) fn set_at(self, index: usize, value: T) -> Result {
        if self.0.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: not null, so valid for the write by the contract of the type; callers stay below the count of the call.
        unsafe { self.0.wrapping_add(index).write_unaligned(value) }
        Ok(())
    }
}

/// Values of the caller's. The C contract: null, or valid for reads of as many `T` as the call says.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// The value, unless there is none.
    pub(crate) fn get(self) -> Option<T> {
        self.at(0)
    }

    /// The `index`-th of several values, unless there are none.
    pub(crate) fn at(self, index: usize) -> Option<T> {
        // SAFETY: not null, so valid by the contract of the type; callers stay below the count of the call.
        (!self.0.is_null()).then(|| unsafe { self.0.wrapping_add(index).read_unaligned() })
    }
}

impl In<std::ffi::c_char> {
    /// The string, to its end.
    pub(crate) fn text(self) -> Option<String> {
        // SAFETY: not null, so a C string by the contract of the calls that take one.
        (!self.0.is_null()).then(|| unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// Bytes of an element of an `ncclDataType_t`.
pub(crate) fn element_bytes(data_type: i32) -> Result<u64> {
    match data_type {
        0 | 1 | 10 | 11 => Ok(1),
        6 | 9 => Ok(2),
        2 | 3 | 7 => Ok(4),
        4 | 5 | 8 => Ok(8),
        _ => Err(INVALID_ARGUMENT),
    }
}
