//! Operations that the twins of other libraries put into streams: when they run, what they are told, what comes after them.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, whose twin checks what it gets")]
#![allow(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

use std::env;
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::result::{self, event};
use cudarc::driver::{CudaContext, sys};

#[repr(C)]
struct Touched {
    start: u64,
    bytes: u64,
    writes: u32,
}

#[repr(C)]
struct Operation {
    call: *const c_char,
    touched: *const Touched,
    touched_count: usize,
    run: extern "C" fn(*mut c_void, u64) -> u64,
    skip: extern "C" fn(*mut c_void),
    data: *mut c_void,
    after: [u64; 2],
}

const BYTES: usize = 2_000_000;
/// What an operation here takes in the model's time.
const TOOK_NS: u64 = 30_000_000;

/// Its memory, and what became of it.
#[derive(Default)]
struct Op {
    memory: u64,
    runs: AtomicU64,
    skips: AtomicU64,
    start: AtomicU64,
}

/// Turns every byte into its successor.
extern "C" fn run(data: *mut c_void, start: u64) -> u64 {
    let op = unsafe { &*data.cast::<Op>() };
    op.runs.fetch_add(1, SeqCst);
    op.start.store(start, SeqCst);
    let bytes = unsafe { std::slice::from_raw_parts_mut(op.memory as *mut u8, BYTES) };
    bytes.iter_mut().for_each(|byte| *byte += 1);
    if start > 0 { start + TOOK_NS } else { 0 }
}

extern "C" fn skip(data: *mut c_void) {
    unsafe { &*data.cast::<Op>() }.skips.fetch_add(1, SeqCst);
}

/// Puts one into a stream of device 0; gives the driver's status and the place.
fn submit(queue: sys::CUstream, op: &Op, after: [u64; 2]) -> (u32, [u64; 2]) {
    type Submit = extern "C" fn(i32, u64, &Operation, &mut [u64; 2]) -> u32;
    let submit: Submit = unsafe { twins::cuda::function(c"simcuda_submit") };
    let touched = [Touched { start: op.memory, bytes: BYTES as u64, writes: 1 }];
    let data = std::ptr::from_ref(op).cast_mut().cast();
    let call = c"anOperation".as_ptr();
    let operation = Operation { call, touched: touched.as_ptr(), touched_count: 1, run, skip, data, after };
    let mut place = [0; 2];
    let status = submit(0, queue as u64, &operation, &mut place);
    (status, place)
}

/// Runs one of the functions below in a process of its own.
fn process(body: &str, settings: &[(&str, &str)]) -> String {
    let mut command = twins::cuda::command(env::current_exe().unwrap());
    command.args([body, "--exact", "--ignored", "--nocapture"]).env("SIMCUDA_TEST", "1").env("RUST_BACKTRACE", "0");
    let output = command.env("SIMCUDA_LEAKS", "abort").envs(settings.iter().copied()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{body}: {}\n{stderr}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{body} did not run");
    stderr
}

/// The context of device 0, in a process that `process` started.
fn context() -> Option<Arc<CudaContext>> {
    env::var_os("SIMCUDA_TEST")?;
    twins::cuda::load();
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    Some(context)
}

#[test]
#[ignore = "run in a process of its own"]
fn in_its_turn() {
    let Some(context) = context() else { return };
    unsafe {
        let queues = [(); 2].map(|()| stream::create(StreamKind::NonBlocking).unwrap());
        let pinned = result::malloc_host(BYTES, 0).unwrap();
        pinned.cast::<u8>().write_bytes(4, BYTES);
        let op = Op { memory: result::malloc_sync(BYTES).unwrap(), ..Op::default() };
        sys::cuMemcpyHtoDAsync_v2(op.memory, pinned, BYTES, queues[0]).result().unwrap();
        let (status, first) = submit(queues[0], &op, [0; 2]);
        assert_eq!((status, op.runs.load(SeqCst)), (0, 0), "it is late");
        // On another stream, after the first one: else this were a violation.
        let (status, second) = submit(queues[1], &op, first);
        assert_eq!(status, 0);
        assert_ne!(first, second);
        stream::synchronize(queues[1]).unwrap();
        let mut found = vec![0_u8; BYTES];
        result::memcpy_dtoh_sync(&mut found, op.memory).unwrap();
        assert!(found.iter().all(|byte| *byte == 6), "{}", found[0]);
        assert_eq!((op.runs.load(SeqCst), op.skips.load(SeqCst), op.start.load(SeqCst)), (2, 0, 0));
        // Not on a stream of another device, nor on none.
        let other = CudaContext::new(1).unwrap();
        other.bind_to_thread().unwrap();
        let foreign = stream::create(StreamKind::NonBlocking).unwrap();
        assert_eq!((submit(foreign, &op, [0; 2]).0, submit(77 as _, &op, [0; 2]).0), (400, 400));
        stream::destroy(foreign).unwrap();
        drop(other);
        context.bind_to_thread().unwrap();
        result::free_sync(op.memory).unwrap();
        result::free_host(pinned).unwrap();
        queues.into_iter().for_each(|queue| stream::destroy(queue).unwrap());
    }
}

#[test]
fn an_operation_runs_in_its_turn_and_late() {
    for seed in ["4", "6"] {
        process("in_its_turn", &[("SIMCUDA_JITTER", "5000000"), ("SIMCUDA_SEED", seed)]);
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn lost() {
    let Some(_context) = context() else { return };
    unsafe {
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let op = Op { memory: result::malloc_sync(BYTES).unwrap(), ..Op::default() };
        assert_eq!(submit(queue, &op, [0; 2]).0, 0);
        twins::cuda::fault("cuStreamQuery@1=700");
        assert_eq!(sys::cuStreamQuery(queue) as u32, 700);
        while op.skips.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        assert_eq!((op.runs.load(SeqCst), submit(queue, &op, [0; 2]).0), (0, 700));
        sys::cuMemFree_v2(op.memory);
        sys::cuStreamDestroy_v2(queue);
    }
}

#[test]
fn an_operation_of_a_lost_device_is_skipped() {
    process("lost", &[("SIMCUDA_JITTER", "50000000")]);
}

#[test]
#[ignore = "run in a process of its own"]
fn in_the_models_time() {
    let Some(_context) = context() else { return };
    unsafe {
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let pinned = result::malloc_host(BYTES, 0).unwrap();
        let op = Op { memory: result::malloc_sync(BYTES).unwrap(), ..Op::default() };
        let events = [(); 3].map(|()| event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap());
        event::record(events[0], queue).unwrap();
        sys::cuMemcpyHtoDAsync_v2(op.memory, pinned, BYTES, queue).result().unwrap();
        assert_eq!(submit(queue, &op, [0; 2]).0, 0);
        event::record(events[1], queue).unwrap();
        // Queued before anybody can know when the operation ends.
        sys::cuMemcpyHtoDAsync_v2(op.memory, pinned, BYTES, queue).result().unwrap();
        event::record(events[2], queue).unwrap();
        stream::synchronize(queue).unwrap();
        // 20 ms on the link, 30 ms of the operation, 20 ms on the link.
        let [half, whole] = [events[1], events[2]].map(|end| event::elapsed(events[0], end).unwrap());
        assert!((50.0..51.0).contains(&half) && (70.0..71.0).contains(&whole), "{half} ms, {whole} ms");
        result::free_sync(op.memory).unwrap();
        result::free_host(pinned).unwrap();
        events.into_iter().for_each(|made| event::destroy(made).unwrap());
        stream::destroy(queue).unwrap();
    }
}

#[test]
fn what_comes_after_an_operation_starts_when_that_ends_in_the_models_time() {
    process("in_the_models_time", &[("SIMCUDA_LINK", "0.1")]);
}
