//! Each defect that the twin is for, in a process of its own: it must abort and name the call.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, whose twin checks what it gets")]
#![allow(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::{env, ptr, thread, time::Duration};

use cudarc::driver::result::event;
use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::{CudaContext, result, sys};

/// A defect, the call that must be named, and what is said about it.
struct Case {
    name: &'static str,
    call: &'static str,
    says: &'static str,
    run: fn(&Parts),
}

/// What the defects are made of.
struct Parts {
    stream: sys::CUstream,
    other: sys::CUstream,
    pinned: *mut u8,
    memory: u64,
}

const BYTES: usize = 1 << 20;

#[rustfmt::skip]
const CASES: &[Case] = &[
    Case { name: "slot refilled before its copy ran", call: "cuMemcpyHtoDAsync_v2", says: "changed while a copy was queued",
        run: |p| { p.copy_in(); p.fill(9); p.synchronise(); } },
    Case { name: "unregistered under a copy", call: "cuMemHostUnregister", says: "has not finished",
        run: |p| {
            let memory = vec![0_u8; BYTES].leak();
            unsafe {
                sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), BYTES, 0).result().unwrap();
                sys::cuMemcpyHtoDAsync_v2(p.memory, memory.as_ptr().cast(), BYTES, p.stream).result().unwrap();
                sys::cuMemHostUnregister(memory.as_mut_ptr().cast()).result().unwrap();
            }
        } },
    Case { name: "pinned memory freed under a copy", call: "cuMemFreeHost", says: "has not finished",
        run: |p| { p.copy_in(); unsafe { sys::cuMemFreeHost(p.pinned.cast()) }.result().unwrap(); } },
    Case { name: "registered memory unmapped under a copy", call: "cuMemcpyHtoDAsync_v2", says: "was unmapped",
        run: |p| unsafe {
            let map = libc::mmap(ptr::null_mut(), BYTES, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            sys::cuMemHostRegister_v2(map, BYTES, 0).result().unwrap();
            sys::cuMemcpyHtoDAsync_v2(p.memory, map, BYTES, p.stream).result().unwrap();
            libc::munmap(map, BYTES);
            p.synchronise();
        } },
    Case { name: "copy past the end", call: "cuMemcpyHtoDAsync_v2", says: "outside every allocation",
        run: |p| unsafe { sys::cuMemcpyHtoDAsync_v2(p.memory + 1, p.pinned.cast(), BYTES, p.stream).result().unwrap() } },
    Case { name: "copy into freed memory", call: "cuMemcpyHtoDAsync_v2", says: "which cuMemFree_v2 gave back",
        run: |p| unsafe { result::free_sync(p.memory).unwrap(); p.copy_in(); } },
    Case { name: "copy after a stream-ordered free", call: "cuMemcpyHtoDAsync_v2", says: "which cuMemFreeAsync gave back",
        run: |p| unsafe { result::free_async(p.memory, p.stream).unwrap(); p.copy_in(); } },
    Case { name: "freed under another stream's copy", call: "cuMemFreeAsync", says: "another stream still touches",
        run: |p| unsafe { p.copies_in(p.other, 200); result::free_async(p.memory, p.stream).unwrap(); stream::synchronize(p.stream).unwrap(); } },
    Case { name: "freed twice", call: "cuMemFree_v2", says: "is not the start of a live allocation",
        run: |p| unsafe { result::free_sync(p.memory).unwrap(); result::free_sync(p.memory).unwrap(); } },
    Case { name: "two streams write one place", call: "cuMemsetD8Async", says: "without an event between them",
        run: |p| { p.copy_in(); unsafe { sys::cuMemsetD8Async(p.memory + 5, 1, 1, p.other) }.result().unwrap(); } },
    Case { name: "read before it is written", call: "cuMemcpyDtoHAsync_v2", says: "without an event between them",
        run: |p| { p.copy_in(); unsafe { sys::cuMemcpyDtoHAsync_v2(p.pinned.add(BYTES).cast(), p.memory, 10, p.other) }.result().unwrap(); } },
    Case { name: "destroyed stream", call: "cuStreamQuery", says: "the stream was destroyed",
        run: |p| unsafe { stream::destroy(p.stream).unwrap(); sys::cuStreamQuery(p.stream).result().unwrap(); } },
    Case { name: "destroyed event", call: "cuEventQuery", says: "the event was destroyed",
        run: |_| unsafe {
            let made = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
            event::destroy(made).unwrap();
            event::query(made).unwrap();
        } },
    Case { name: "destroyed context", call: "cuCtxSetCurrent", says: "the context was destroyed",
        run: |_| unsafe {
            let context = result::primary_ctx::retain(1).unwrap();
            result::ctx::set_current(context).unwrap();
            result::primary_ctx::release(1).unwrap();
            assert_eq!(result::mem_get_info().unwrap_err().0 as u32, 709);
            result::ctx::set_current(context).unwrap();
        } },
    Case { name: "context released once too often", call: "cuDevicePrimaryCtxRelease_v2", says: "was not retained",
        run: |_| unsafe { result::primary_ctx::release(2).unwrap() } },
    Case { name: "written behind the end", call: "cuMemFree_v2", says: "behind the end",
        run: |p| unsafe { let odd = result::malloc_sync(100).unwrap(); *((odd + 100) as *mut u8) = 1; let _ = p; result::free_sync(odd).unwrap(); } },
    Case { name: "unmapped under a copy", call: "cuMemUnmap", says: "has not finished",
        run: |p| unsafe {
            let (address, bytes) = map_memory(true);
            sys::cuMemcpyHtoDAsync_v2(address, p.pinned.cast(), BYTES, p.stream).result().unwrap();
            sys::cuMemUnmap(address, bytes).result().unwrap();
        } },
    Case { name: "mapping that nobody may access", call: "cuMemcpyHtoDAsync_v2", says: "cuMemSetAccess comes first",
        run: |p| unsafe {
            let (address, _) = map_memory(false);
            sys::cuMemcpyHtoDAsync_v2(address, p.pinned.cast(), BYTES, p.stream).result().unwrap();
        } },
    Case { name: "addresses freed under a mapping", call: "cuMemAddressFree", says: "still mapped",
        run: |_| unsafe { let (address, bytes) = map_memory(true); sys::cuMemAddressFree(address, bytes).result().unwrap(); } },
    Case { name: "written although registered read-only", call: "cuMemcpyDtoHAsync_v2", says: "registered read-only",
        run: |p| unsafe {
            let memory = vec![0_u8; BYTES].leak();
            sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), BYTES, 8).result().unwrap();
            sys::cuMemcpyDtoHAsync_v2(memory.as_mut_ptr().cast(), p.memory, BYTES, p.stream).result().unwrap();
        } },
];

unsafe fn map_memory(access: bool) -> (u64, usize) {
    let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 };
    let bytes = 2 << 20;
    unsafe {
        let mut prop: sys::CUmemAllocationProp = std::mem::zeroed();
        prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location = location;
        let (mut handle, mut address) = (0, 0);
        sys::cuMemCreate(&mut handle, bytes, &prop, 0).result().unwrap();
        sys::cuMemAddressReserve(&mut address, bytes, 0, 0, 0).result().unwrap();
        sys::cuMemMap(address, bytes, 0, handle, 0).result().unwrap();
        if access {
            let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
            sys::cuMemSetAccess(address, bytes, &sys::CUmemAccessDesc { location, flags }, 1).result().unwrap();
        }
        (address, bytes)
    }
}

impl Parts {
    fn new() -> Parts {
        let context = CudaContext::new(0).unwrap();
        context.bind_to_thread().unwrap();
        std::mem::forget(context);
        unsafe {
            Parts {
                stream: stream::create(StreamKind::NonBlocking).unwrap(),
                other: stream::create(StreamKind::NonBlocking).unwrap(),
                pinned: result::malloc_host(2 * BYTES, 0).unwrap().cast(),
                memory: result::malloc_sync(BYTES).unwrap(),
            }
        }
    }

    fn copy_in(&self) {
        self.copies_in(self.stream, 1);
    }

    fn copies_in(&self, stream: sys::CUstream, count: usize) {
        for _ in 0..count {
            unsafe { sys::cuMemcpyHtoDAsync_v2(self.memory, self.pinned.cast(), BYTES, stream) }.result().unwrap();
        }
    }

    fn fill(&self, byte: u8) {
        unsafe { self.pinned.write_bytes(byte, BYTES) }
    }

    fn synchronise(&self) {
        unsafe { stream::synchronize(self.stream) }.unwrap();
    }
}

/// Not a test: what the processes below run.
#[test]
#[ignore = "run by the test below, in a process that must die"]
fn defect() {
    let Ok(name) = env::var("SIMCUDA_TEST_DEFECT") else { return };
    twins::cuda::load();
    (CASES.iter().find(|case| case.name == name).unwrap().run)(&Parts::new());
    thread::sleep(Duration::from_millis(200));
}

fn run(case: &Case, strict: bool) -> (std::process::ExitStatus, String) {
    let mut command: Command = twins::cuda::command(env::current_exe().unwrap());
    command.args(["defect", "--exact", "--ignored", "--nocapture"]).env("SIMCUDA_TEST_DEFECT", case.name);
    // Late enough that what follows the submission always comes first.
    command.env("SIMCUDA_JITTER", "5000000").env("SIMCUDA_LEAKS", "ignore").env("RUST_BACKTRACE", "0");
    if !strict {
        command.env("SIMCUDA_STRICT", "0");
    }
    let output = command.output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn each_defect_aborts_with_the_name_of_its_call() {
    for case in CASES {
        let (status, stderr) = run(case, true);
        let expected = format!("simcuda: VIOLATION {}: ", case.call);
        let line = stderr.lines().find(|line| line.contains("simcuda: VIOLATION")).unwrap_or("no violation");
        assert!(line.contains(&expected) && line.contains(case.says), "{}: {line}\n{stderr}", case.name);
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{}: {status}", case.name);
    }
}

#[test]
fn without_strict_a_violation_is_only_said() {
    let (status, stderr) = run(&CASES[0], false);
    assert!(stderr.contains("changed while a copy was queued"), "{stderr}");
    assert!(status.success(), "{status} {stderr}");
}
