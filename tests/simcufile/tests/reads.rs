//! The twin by itself: what it reads, counts, refuses, and takes for a defect.

use std::ffi::{CStr, c_char, c_void};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::{env, ptr};

use twins::child::passes;

/// A function of the driver's twin or of cuFile's, as what it is.
///
/// # Safety
/// - `F` is the type of that function.
unsafe fn function<F: Copy>(name: &CStr) -> F {
    twins::cuda::load(); // whom cuFile's needs
    let of_driver = name.to_bytes().starts_with(b"cu") && !name.to_bytes().starts_with(b"cuFile");
    // SAFETY: the duty of the caller.
    unsafe { if of_driver { twins::cuda::function(name) } else { twins::cufile::function(name) } }
}

/// Calls a function by its name and type.
macro_rules! call {
    ($name:literal($($argument:expr => $of:ty),*) -> $result:ty) => {
        // SAFETY: declared as in cuda.h, cufile.h and the twin.
        unsafe { function::<extern "C" fn($($of),*) -> $result>($name)($($argument),*) }
    };
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct Status(i32, i32);

const OK: Status = Status(0, 0);

#[repr(C)]
struct Descriptor(i32, u64, *const c_void);

/// A current context of device 0.
fn context() {
    assert_eq!(call!(c"cuInit"(0 => u32) -> i32), 0);
    let mut context = 0u64;
    assert_eq!(call!(c"cuDevicePrimaryCtxRetain"(&raw mut context => *mut u64, 0 => i32) -> i32), 0);
    assert_eq!(call!(c"cuCtxSetCurrent"(context => u64) -> i32), 0);
}

fn allocate(bytes: usize) -> u64 {
    let mut address = 0;
    assert_eq!(call!(c"cuMemAlloc_v2"(&raw mut address => *mut u64, bytes => usize) -> i32), 0);
    address
}

fn open() -> Status {
    call!(c"cuFileDriverOpen"() -> Status)
}

fn register(address: u64, bytes: usize) -> Status {
    call!(c"cuFileBufRegister"(address => u64, bytes => usize, 0 => i32) -> Status)
}

fn register_file(file: &File) -> (Status, u64) {
    let mut handle = 0;
    let descriptor = Descriptor(1, file.as_raw_fd() as u64, ptr::null());
    let status = call!(c"cuFileHandleRegister"(&raw mut handle => *mut u64, &raw const descriptor => *const Descriptor) -> Status);
    (status, handle)
}

fn read(handle: u64, base: u64, bytes: usize, offset: i64, place: i64) -> isize {
    call!(c"cuFileRead"(handle => u64, base => u64, bytes => usize, offset => i64, place => i64) -> isize)
}

fn bytes(kind: u32) -> u64 {
    call!(c"simcufile_bytes"(kind => u32) -> u64)
}

fn fault(text: &CStr) {
    assert_eq!(call!(c"simcufile_fault"(text.as_ptr() => *const c_char) -> i32), 0);
}

/// A file of so many bytes, its contents, and itself with or without O_DIRECT.
fn file(size: usize, direct: bool) -> (tempfile::NamedTempFile, Vec<u8>, File) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let contents: Vec<u8> = (0..size).map(|at| (at * 7 + at / 251) as u8).collect();
    file.write_all(&contents).unwrap();
    let opened = OpenOptions::new().read(true).custom_flags(if direct { libc::O_DIRECT } else { 0 }).open(file.path());
    (file, contents, opened.unwrap())
}

/// Memory of the twin, which the host reaches.
fn memory(address: u64, bytes: usize) -> &'static [u8] {
    // SAFETY: live memory of the driver twin, which nobody writes meanwhile.
    unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }
}

/// In a process of its own, as all of these.
#[test]
#[ignore = "run by another test"]
fn bytes_come_and_are_counted() {
    context();
    let (_kept, contents, opened) = file(20_000, true);
    let slot = allocate(1 << 20);
    assert_eq!((register(slot, 1 << 20).0, register_file(&opened).0.0), (5001, 5001), "the driver is not open");
    assert_eq!(open(), OK);
    assert_eq!(open().0, 5026);
    assert_eq!(register(slot, 1 << 20), OK);
    assert_eq!(register(slot + 4096, 4096).0, 5023);
    let (status, handle) = register_file(&opened);
    assert_eq!((status, register_file(&opened).0.0), (OK, 5028));
    let (_other, _, buffered) = file(100, false);
    assert_eq!(register_file(&buffered).0.0, 5020);
    // To the end and no further, at any place of the slot.
    assert_eq!(read(handle, slot, 24_576, 0, 4096), 20_000);
    assert_eq!(memory(slot + 4096, 20_000), &contents[..]);
    assert_eq!(read(handle, slot, 4096, 8192, 0), 4096);
    assert_eq!(memory(slot, 4096), &contents[8192..12_288]);
    assert_eq!(read(handle, slot, 4096, 1 << 20, 0), 0);
    assert_eq!([bytes(0), bytes(1), bytes(2), bytes(3)], [24_096, 0, 0, 1 << 20]);
    // What the library would pass through buffers of its own.
    assert_eq!(read(handle, slot, 100, 1, 0), 100);
    assert_eq!(memory(slot, 100), &contents[1..101]);
    let other = allocate(8192);
    assert_eq!(read(handle, other, 4096, 0, 0), 4096);
    assert_eq!(bytes(1), 4196);
    // Faults.
    fault(c"cuFileRead@1=5030,cuFileRead@2=-5,cuFileRead@3=short");
    assert_eq!((read(handle, slot, 8192, 0, 0), read(handle, slot, 8192, 0, 0)), (-5030, -1));
    let short = read(handle, slot, 8192, 0, 0);
    assert!((1..8192).contains(&short), "{short}");
    assert_eq!(memory(slot, short as usize), &contents[..short as usize]);
    // Memory of a context that is not current, and none.
    assert_eq!(call!(c"cuCtxSetCurrent"(0 => u64) -> i32), 0);
    assert!([-5015, -5012].contains(&read(handle, slot, 4096, 0, 0)));
    context();
    assert_eq!(call!(c"simcufile_live"() -> u64), 2);
    call!(c"cuFileHandleDeregister"(handle => u64) -> ());
    assert_eq!(call!(c"cuFileBufDeregister"(slot => u64) -> Status), OK);
    assert_eq!(call!(c"cuFileBufDeregister"(slot => u64) -> Status).0, 5024);
    assert_eq!((call!(c"simcufile_live"() -> u64), call!(c"simcufile_violations"() -> u64)), (0, 0));
    assert_eq!(call!(c"cuFileDriverClose"() -> Status), OK);
}

#[test]
#[ignore = "run by another test"]
fn registering_has_a_bound() {
    context();
    assert_eq!(open(), OK);
    let (one, other) = (allocate(1 << 20), allocate(1 << 20));
    assert_eq!((register(one, 1 << 20), register(other, 1 << 20).0), (OK, 5016));
    assert_eq!(call!(c"cuFileBufDeregister"(one => u64) -> Status), OK);
    assert_eq!(register(other, 1 << 20), OK);
    call!(c"cuFileBufDeregister"(other => u64) -> Status);
}

#[test]
#[ignore = "run by another test"]
fn without_nvidia_fs() {
    context();
    let set = |parameter: i32| call!(c"cuFileSetParameterBool"(parameter => i32, false => bool) -> Status);
    let forbidden = set(1) == OK && set(2) == OK;
    assert_eq!(open().0, if forbidden { 5001 } else { 0 });
    if !forbidden {
        let (_kept, contents, opened) = file(8192, true);
        let slot = allocate(8192);
        assert_eq!(register(slot, 8192), OK);
        let (_, handle) = register_file(&opened);
        assert_eq!(read(handle, slot, 8192, 0, 0), 8192);
        assert_eq!(memory(slot, 8192), &contents[..]);
        assert_eq!([bytes(0), bytes(2)], [0, 8192]);
        call!(c"cuFileHandleDeregister"(handle => u64) -> ());
        call!(c"cuFileBufDeregister"(slot => u64) -> Status);
    }
}

/// Which defect: told by the environment.
#[expect(clippy::disallowed_methods, reason = "tests speak to their children so")]
#[test]
#[ignore = "run by another test"]
fn a_defect() {
    context();
    assert_eq!(open(), OK);
    let (_kept, _, opened) = file(8192, true);
    let slot = allocate(8192);
    assert_eq!(register(slot, 8192), OK);
    let (_, handle) = register_file(&opened);
    match env::var("DEFECT").unwrap().as_str() {
        "closed" => {
            drop(opened);
            read(handle, slot, 4096, 0, 0);
        }
        "deregistered" => {
            call!(c"cuFileHandleDeregister"(handle => u64) -> ());
            read(handle, slot, 4096, 0, 0);
        }
        "behind" => {
            read(handle, slot, 8192, 0, 4096);
        }
        "freed" => {
            assert_eq!(call!(c"cuMemFree_v2"(slot => u64) -> i32), 0);
            call!(c"cuFileBufDeregister"(slot => u64) -> Status);
        }
        "read into" => {
            assert_eq!(call!(c"cuMemFree_v2"(slot => u64) -> i32), 0);
            read(handle, slot, 4096, 0, 0);
        }
        "busy" => {
            let (target, mut stream) = (allocate(8192), 0u64);
            assert_eq!(call!(c"cuStreamCreate"(&raw mut stream => *mut u64, 1 => u32) -> i32), 0);
            call!(c"cuMemcpyDtoDAsync_v2"(target => u64, slot => u64, 8192 => usize, stream => u64) -> i32);
            read(handle, slot, 4096, 0, 0);
        }
        _ => {}
    }
}

#[test]
fn reads_are_counted_by_how_they_came() {
    passes("bytes_come_and_are_counted", &[]);
}

#[test]
fn registered_memory_has_a_bound() {
    passes("registering_has_a_bound", &[("SIMCUFILE_REGISTER_MAX", "1500000")]);
}

#[test]
fn compatibility_mode_is_forbidden_where_that_can_be_said() {
    passes("without_nvidia_fs", &[("SIMCUFILE_MODE", "compat")]);
    passes("without_nvidia_fs", &[("SIMCUFILE_MODE", "compat"), ("SIMCUFILE_PARAMETERS", "0")]);
}

#[test]
fn defects_are_named() {
    for (defect, what) in [
        ("closed", "cuFileRead: the file was closed"),
        ("deregistered", "cuFileRead: the file was deregistered"),
        ("behind", "cuFileRead: reads behind registered memory"),
        ("freed", "cuFileBufDeregister: the memory was given back before"),
        ("read into", "cuFileRead: touches 4096 bytes"),
        ("busy", "cuFileRead: writes 4096 bytes"),
    ] {
        let output = twins::child::run("a_defect", &[("DEFECT", defect), ("SIMCUDA_JITTER", "2000000")]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(&format!("VIOLATION {what}")), "{defect}: {text}");
    }
}
