//! cuFile's functions.

#![allow(missing_docs, reason = "cufile.h documents them")]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;

use crate::driver::{Writing, is_live};
use crate::faults::Due;
use crate::sim::{ALLOW_COMPAT, FORCE_COMPAT, RegisteredFile, config, count, lock};

/// `CUfileError_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub status: c_int,
    pub driver: c_int,
}

/// `CUfileDescr_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub kind: c_int,
    /// The descriptor, in the first four bytes.
    pub file: u64,
    pub operations: *const c_void,
}

pub const SUCCESS: c_int = 0;
pub const DRIVER_NOT_INITIALIZED: c_int = 5001;
pub const CUDA_POINTER_INVALID: c_int = 5012;
pub const CUDA_POINTER_RANGE_ERROR: c_int = 5014;
pub const CUDA_CONTEXT_MISMATCH: c_int = 5015;
pub const INVALID_MAPPING_SIZE: c_int = 5016;
pub const INVALID_FILE_TYPE: c_int = 5018;
pub const DIO_NOT_SET: c_int = 5020;
pub const INVALID_VALUE: c_int = 5022;
pub const MEMORY_ALREADY_REGISTERED: c_int = 5023;
pub const MEMORY_NOT_REGISTERED: c_int = 5024;
pub const DRIVER_ALREADY_OPEN: c_int = 5026;
pub const HANDLE_NOT_REGISTERED: c_int = 5027;
pub const HANDLE_ALREADY_REGISTERED: c_int = 5028;

/// What direct reads start and end on, in file and memory.
const BLOCK: u64 = 4096;

/// The top half-word of every handle: no address has it, so one that is followed faults.
const MARK: u64 = 0x5F << 56;

fn answer(body: impl FnOnce() -> Result<(), c_int>, due: Option<Due>) -> Status {
    let outcome = match due {
        Some(Due::Status(status)) => Err(status),
        Some(Due::Errno(_)) => Err(INVALID_VALUE),
        _ => body(),
    };
    Status { status: outcome.err().unwrap_or(SUCCESS), driver: 0 }
}

/// One that gives something back does so even if it is made to fail.
fn release(body: impl FnOnce() -> Result<(), c_int>, due: Option<Due>) -> Status {
    let outcome = body();
    answer(|| outcome, due)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileGetVersion(version: Option<&mut c_int>) -> Status {
    let due = count("cuFileGetVersion");
    answer(|| version.map(|version| *version = config().version).ok_or(INVALID_VALUE), due)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverOpen() -> Status {
    let due = count("cuFileDriverOpen");
    thread::sleep(config().open);
    let status = answer(
        || {
            let mut sim = lock();
            if sim.open {
                return Err(DRIVER_ALREADY_OPEN);
            }
            if config().compat && !sim.compat(ALLOW_COMPAT) {
                return Err(DRIVER_NOT_INITIALIZED);
            }
            sim.open = true;
            Ok(())
        },
        due,
    );
    if ![SUCCESS, DRIVER_ALREADY_OPEN].contains(&status.status) {
        // As NVIDIA's does, on stdout.
        println!(" cuFile initialization failed");
    }
    status
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverClose() -> Status {
    let due = count("cuFileDriverClose");
    release(
        || {
            let mut sim = lock();
            if sim.live() > 0 {
                sim.violate("cuFileDriverClose", "files or memory are registered");
            }
            std::mem::take(&mut sim.open).then_some(()).ok_or(DRIVER_NOT_INITIALIZED)
        },
        due,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterBool(parameter: c_int, value: bool) -> Status {
    let due = count("cuFileSetParameterBool");
    answer(
        || {
            let mut sim = lock();
            if sim.open {
                return Err(DRIVER_ALREADY_OPEN);
            }
            if !config().parameters {
                return Err(INVALID_VALUE);
            }
            sim.parameters.insert(parameter, value);
            Ok(())
        },
        due,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileGetParameterBool(parameter: c_int, value: Option<&mut bool>) -> Status {
    let due = count("cuFileGetParameterBool");
    let found = || lock().parameters.get(&parameter).copied().filter(|_| config().parameters);
    answer(|| value.zip(found()).map(|(value, found)| *value = found).ok_or(INVALID_VALUE), due)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleRegister(handle: Option<&mut u64>, descriptor: Option<&Descriptor>) -> Status {
    let due = count("cuFileHandleRegister");
    answer(
        || {
            let (handle, descriptor) = handle.zip(descriptor).ok_or(INVALID_VALUE)?;
            if descriptor.kind != 1 || !descriptor.operations.is_null() {
                return Err(INVALID_VALUE);
            }
            let file = descriptor.file as u32 as i32;
            let identity = identity(file).ok_or(INVALID_FILE_TYPE)?;
            // SAFETY: asks for flags.
            if unsafe { libc::fcntl(file, libc::F_GETFL) } & libc::O_DIRECT == 0 {
                return Err(DIO_NOT_SET);
            }
            let mut sim = lock();
            if !sim.open {
                return Err(DRIVER_NOT_INITIALIZED);
            }
            if sim.files.values().any(|other| other.descriptor == file) {
                return Err(HANDLE_ALREADY_REGISTERED);
            }
            sim.made += 1;
            *handle = MARK | sim.made;
            let made = *handle;
            sim.files.insert(made, RegisteredFile { descriptor: file, identity, reads: 0 });
            Ok(())
        },
        due,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleDeregister(handle: u64) {
    count("cuFileHandleDeregister");
    let mut sim = lock();
    match sim.files.remove(&handle) {
        None => sim.violate("cuFileHandleDeregister", "not a registered file"),
        Some(file) if file.reads > 0 => sim.violate("cuFileHandleDeregister", "a read of the file is under way"),
        Some(file) if identity(file.descriptor) != Some(file.identity) => {
            sim.violate("cuFileHandleDeregister", "the file was closed before");
        }
        Some(_) => {}
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufRegister(address: u64, bytes: usize, flags: c_int) -> Status {
    let due = count("cuFileBufRegister");
    answer(
        || {
            if bytes == 0 || flags != 0 {
                return Err(INVALID_VALUE);
            }
            // Of the current context, and nobody uses it.
            drop(Writing::begin(c"cuFileBufRegister", address, bytes as u64).map_err(refused)?);
            let mut sim = lock();
            if !sim.open {
                return Err(DRIVER_NOT_INITIALIZED);
            }
            let end = address + bytes as u64;
            if sim.memory.iter().any(|(&start, &length)| start < end && address < start + length) {
                return Err(MEMORY_ALREADY_REGISTERED);
            }
            let all = sim.memory.values().sum::<u64>() + bytes as u64;
            if all > config().register_max {
                return Err(INVALID_MAPPING_SIZE);
            }
            sim.memory.insert(address, bytes as u64);
            sim.bytes.registered_peak = sim.bytes.registered_peak.max(all);
            Ok(())
        },
        due,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufDeregister(address: u64) -> Status {
    let due = count("cuFileBufDeregister");
    release(
        || {
            let removed = lock().memory.remove(&address);
            let Some(bytes) = removed else { return Err(MEMORY_NOT_REGISTERED) };
            if !is_live(address, bytes) {
                lock().violate("cuFileBufDeregister", "the memory was given back before");
            }
            Ok(())
        },
        due,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileRead(handle: u64, base: u64, bytes: usize, offset: i64, place: i64) -> isize {
    let due = count("cuFileRead");
    let outcome = match due {
        Some(Due::Status(status)) => Err(status),
        Some(Due::Errno(errno)) => return system(errno),
        _ => read(handle, base, bytes, offset, place, due == Some(Due::Short)),
    };
    match outcome {
        Ok(Ok(read)) => read as isize,
        Ok(Err(errno)) => system(errno),
        Err(status) => -(status as isize),
    }
}

/// A status, or else how many bytes came or the system's error.
fn read(
    handle: u64,
    base: u64,
    bytes: usize,
    offset: i64,
    place: i64,
    short: bool,
) -> Result<Result<usize, i32>, c_int> {
    let (Ok(offset), Ok(place)) = (u64::try_from(offset), u64::try_from(place)) else { return Err(INVALID_VALUE) };
    let (file, registered, compat, short) = {
        let mut sim = lock();
        if !sim.open {
            return Err(DRIVER_NOT_INITIALIZED);
        }
        let Some(&file) = sim.files.get(&handle) else {
            if handle & MARK == MARK {
                sim.violate("cuFileRead", "the file was deregistered");
            }
            return Err(HANDLE_NOT_REGISTERED);
        };
        if identity(file.descriptor) != Some(file.identity) {
            sim.violate("cuFileRead", "the file was closed");
        }
        let registered = sim.memory.get(&base).copied();
        if registered.is_some_and(|length| place + bytes as u64 > length) {
            sim.violate("cuFileRead", "reads behind registered memory");
            return Err(CUDA_POINTER_RANGE_ERROR);
        }
        sim.reads += 1;
        let short = short || config().short > 0 && sim.reads.is_multiple_of(config().short);
        let compat = config().compat || sim.compat(FORCE_COMPAT);
        sim.files.get_mut(&handle).expect("found above").reads += 1;
        (file, registered.is_some(), compat, short)
    };
    let writing = Writing::begin(c"cuFileRead", base + place, bytes as u64).map_err(refused);
    let aligned = [base, place, bytes as u64, offset].iter().all(|number| number.is_multiple_of(BLOCK));
    let straight = registered && aligned;
    // A part of it, and not whole blocks.
    let wanted = if short { (bytes / 2).saturating_sub(7).max(1) } else { bytes };
    let outcome = writing.map(|_writing| {
        let buffered = if straight && !short && !compat {
            None
        } else {
            File::open(format!("/proc/self/fd/{}", file.descriptor)).ok()
        };
        let descriptor = buffered.as_ref().map_or(file.descriptor, AsRawFd::as_raw_fd);
        // SAFETY: live memory of the driver twin, which nobody else uses: that was checked where the write began.
        let read = unsafe { libc::pread(descriptor, (base + place) as *mut c_void, wanted, offset as i64) };
        usize::try_from(read).map_err(|_| errno())
    });
    let mut sim = lock();
    if let Some(file) = sim.files.get_mut(&handle) {
        file.reads -= 1;
    }
    let came = outcome.as_ref().ok().and_then(|read| read.as_ref().ok()).map_or(0, |read| *read as u64);
    match (compat, straight) {
        (true, _) => sim.bytes.compat += came,
        (false, true) => sim.bytes.direct += came,
        (false, false) => sim.bytes.bounced += came,
    }
    outcome
}

/// What the driver's status about memory is to cuFile.
fn refused(status: u32) -> c_int {
    if status == 201 { CUDA_CONTEXT_MISMATCH } else { CUDA_POINTER_INVALID }
}

/// Device and inode of an open descriptor.
fn identity(descriptor: i32) -> Option<(u64, u64)> {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: writes the structure, or fails.
    let done = unsafe { libc::fstat(descriptor, status.as_mut_ptr()) } == 0;
    // SAFETY: written.
    done.then(|| unsafe { status.assume_init() }).map(|status| (status.st_dev, status.st_ino))
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// -1, with `errno`.
fn system(errno: i32) -> isize {
    // SAFETY: this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}
