//! What comes before what: streams, events, the default stream, functions of the host; and that it comes late.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, whose twin checks what it gets")]
#![allow(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

use std::env;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::result::{self, event};
use cudarc::driver::{CudaContext, sys};

const BYTES: usize = 1 << 20;

/// Runs one of the functions below in a process of its own, where operations run seconds late unless somebody waits for them.
fn late(body: &str, seed: &str) {
    let mut command = twins::cuda::command(env::current_exe().unwrap());
    command.args([body, "--exact", "--ignored", "--nocapture"]).env("SIMCUDA_TEST", "1").env("RUST_BACKTRACE", "0");
    command.env("SIMCUDA_JITTER", "5000000").env("SIMCUDA_SEED", seed).env("SIMCUDA_LEAKS", "abort");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{body}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{body} did not run");
}

/// The context of a device, in a process that `late` started.
fn context(device: usize) -> Option<std::sync::Arc<CudaContext>> {
    env::var_os("SIMCUDA_TEST")?;
    twins::cuda::load();
    let context = CudaContext::new(device).unwrap();
    context.bind_to_thread().unwrap();
    Some(context)
}

fn new_event() -> sys::CUevent {
    event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap()
}

fn copy_in(to: u64, from: *mut c_void, queue: sys::CUstream) {
    unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, BYTES, queue) }.result().unwrap();
}

#[test]
#[ignore = "run in a process of its own"]
fn an_event_orders_two_streams() {
    let Some(_context) = context(0) else { return };
    unsafe {
        let streams = [(); 2].map(|()| stream::create(StreamKind::NonBlocking).unwrap());
        let (start, done) = (new_event(), new_event());
        let pinned = result::malloc_host(2 * BYTES, 0).unwrap();
        let memory = result::malloc_sync(BYTES).unwrap();
        pinned.cast::<u8>().write_bytes(5, BYTES);
        event::query(done).unwrap(); // never recorded: nothing to wait for
        event::record(start, streams[0]).unwrap();
        copy_in(memory, pinned, streams[0]);
        event::record(done, streams[0]).unwrap();
        stream::wait_event(streams[1], done, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT).unwrap();
        sys::cuMemcpyDtoHAsync_v2(pinned.byte_add(BYTES), memory, BYTES, streams[1]).result().unwrap();
        assert_eq!(event::query(done).unwrap_err().0 as u32, 600, "the copy is late");
        assert_eq!(sys::cuStreamQuery(streams[1]) as u32, 600);
        stream::synchronize(streams[1]).unwrap();
        event::query(done).unwrap();
        assert_eq!(std::slice::from_raw_parts(pinned.byte_add(BYTES).cast::<u8>(), BYTES), vec![5; BYTES]);
        assert!(event::elapsed(start, done).unwrap() > 0.0);
        result::free_sync(memory).unwrap();
        result::free_host(pinned).unwrap();
        [start, done].into_iter().for_each(|made| event::destroy(made).unwrap());
        streams.into_iter().for_each(|made| stream::destroy(made).unwrap());
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn the_default_stream_waits_for_blocking_ones() {
    let Some(_context) = context(0) else { return };
    unsafe {
        let blocking = stream::create(StreamKind::Default).unwrap();
        let pinned = result::malloc_host(BYTES, 0).unwrap();
        let memory = result::malloc_sync(BYTES).unwrap();
        copy_in(memory, pinned, blocking);
        sys::cuMemsetD8Async(memory, 3, BYTES, std::ptr::null_mut()).result().unwrap();
        sys::cuMemcpyDtoHAsync_v2(pinned, memory, BYTES, blocking).result().unwrap();
        stream::synchronize(blocking).unwrap();
        assert_eq!(std::slice::from_raw_parts(pinned.cast::<u8>(), BYTES), vec![3; BYTES]);
        result::free_sync(memory).unwrap();
        result::free_host(pinned).unwrap();
        stream::destroy(blocking).unwrap();
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn a_function_of_the_host_runs_in_its_turn() {
    extern "C" fn count(data: *mut c_void) {
        // The copy before it has arrived, the one after it has not begun.
        unsafe { &*data.cast::<AtomicU32>() }.fetch_add(1, Ordering::SeqCst);
    }
    let Some(_context) = context(2) else { return };
    let calls = AtomicU32::new(0);
    unsafe {
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let memory = result::malloc_async(queue, BYTES).unwrap();
        sys::cuMemsetD8Async(memory, 3, BYTES, queue).result().unwrap();
        sys::cuLaunchHostFunc(queue, Some(count), (&raw const calls).cast_mut().cast()).result().unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        // A stream that is destroyed does what it has to, and pageable memory is taken at the call.
        let mut pageable = vec![1_u8; BYTES];
        copy_in(memory, pageable.as_mut_ptr().cast(), queue);
        pageable.fill(2);
        sys::cuMemcpyDtoHAsync_v2(pageable.as_mut_ptr().cast(), memory, BYTES, queue).result().unwrap();
        assert_eq!((calls.load(Ordering::SeqCst), pageable), (1, vec![1; BYTES]));
        result::free_async(memory, queue).unwrap();
        stream::destroy(queue).unwrap();
        result::ctx::synchronize().unwrap();
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn a_registration_is_for_its_context_unless_portable() {
    let (Some(first), Some(_second)) = (context(0), context(1)) else { return };
    let mut bytes = vec![1_u8; 2 * BYTES];
    unsafe {
        first.bind_to_thread().unwrap();
        sys::cuMemHostRegister_v2(bytes.as_mut_ptr().cast(), BYTES, 0).result().unwrap();
        _second.bind_to_thread().unwrap();
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let memory = result::malloc_sync(BYTES).unwrap();
        copy_in(memory, bytes.as_mut_ptr().cast(), queue);
        bytes[..BYTES].fill(2); // as pageable memory it was taken at the call
        let mut back = vec![0_u8; BYTES];
        stream::synchronize(queue).unwrap();
        result::memcpy_dtoh_sync(&mut back, memory).unwrap();
        assert_eq!(back, vec![1; BYTES]);
        // A range that is only partly registered is no range.
        let partly = sys::cuMemcpyHtoDAsync_v2(memory, bytes.as_ptr().add(BYTES / 2 + 1).cast(), BYTES, queue);
        assert_eq!(partly as u32, 1);
        // Whether memory of a pool may be touched is asked in the current context, whatever the stream's is.
        let pooled = result::malloc_async(queue, BYTES).unwrap();
        copy_in(pooled, bytes.as_mut_ptr().cast(), queue);
        first.bind_to_thread().unwrap();
        copy_in(memory, bytes.as_mut_ptr().cast(), queue);
        let foreign = sys::cuMemcpyHtoDAsync_v2(pooled, bytes.as_mut_ptr().cast(), BYTES, queue);
        assert_eq!(foreign as u32, 1);
        _second.bind_to_thread().unwrap();
        result::free_async(pooled, queue).unwrap();
        stream::synchronize(queue).unwrap();
        first.bind_to_thread().unwrap();
        // A kernel's stream, an event and its stream must be of one context; nothing works without one.
        let made = new_event();
        assert_eq!(event::record(made, queue).unwrap_err().0 as u32, 400);
        event::destroy(made).unwrap();
        sys::cuMemHostUnregister(bytes.as_mut_ptr().cast()).result().unwrap();
        result::free_sync(memory).unwrap();
        stream::destroy(queue).unwrap();
        result::ctx::set_current(std::ptr::null_mut()).unwrap();
        assert_eq!(result::malloc_sync(1).unwrap_err().0 as u32, 201);
        assert_eq!(sys::cuStreamQuery(std::ptr::dangling_mut()) as u32, 201);
    }
}

#[test]
fn operations_run_late_and_in_order() {
    for seed in ["4", "6", "11"] {
        late("an_event_orders_two_streams", seed);
        late("the_default_stream_waits_for_blocking_ones", seed);
        late("a_function_of_the_host_runs_in_its_turn", seed);
    }
    late("a_registration_is_for_its_context_unless_portable", "4");
}

/// A loader in small: slots of pinned memory, each refilled once the copies out of it are done, several threads.
#[test]
fn slots_are_reused_under_several_devices() {
    const SLOT: usize = 64 << 10;
    const SLOTS: usize = 4;
    const ROUNDS: usize = 200;
    twins::cuda::load();
    let contexts = [0, 1, 2, 3].map(|device| CudaContext::new(device).unwrap());
    contexts[0].bind_to_thread().unwrap();
    let ring = unsafe { result::malloc_host(contexts.len() * SLOTS * SLOT, 1) }.unwrap() as usize;
    let pattern = |thread: usize, round: usize| (thread * 89 + round * 7 + 1) as u8;
    std::thread::scope(|scope| {
        for thread in 0..contexts.len() {
            let contexts = &contexts;
            scope.spawn(move || unsafe {
                // Each thread feeds two devices.
                let targets = [thread, (thread + 1) % contexts.len()].map(|device| {
                    contexts[device].bind_to_thread().unwrap();
                    let queue = stream::create(StreamKind::NonBlocking).unwrap();
                    let events = [(); SLOTS].map(|()| new_event());
                    (device, queue, events, result::malloc_sync(ROUNDS * SLOT).unwrap())
                });
                for round in 0..ROUNDS {
                    let slot = round % SLOTS;
                    let address = (ring + (thread * SLOTS + slot) * SLOT) as *mut u8;
                    if round >= SLOTS {
                        for (device, _, events, _) in &targets {
                            contexts[*device].bind_to_thread().unwrap();
                            while event::query(events[slot]).is_err() {
                                std::thread::yield_now();
                            }
                        }
                    }
                    address.write_bytes(pattern(thread, round), SLOT);
                    for (device, queue, events, memory) in &targets {
                        contexts[*device].bind_to_thread().unwrap();
                        let to = memory + (round * SLOT) as u64;
                        sys::cuMemcpyHtoDAsync_v2(to, address.cast(), SLOT, *queue).result().unwrap();
                        event::record(events[slot], *queue).unwrap();
                    }
                }
                for (device, queue, events, memory) in targets {
                    contexts[device].bind_to_thread().unwrap();
                    stream::synchronize(queue).unwrap();
                    let mut found = vec![0_u8; ROUNDS * SLOT];
                    result::memcpy_dtoh_sync(&mut found, memory).unwrap();
                    for (round, bytes) in found.chunks(SLOT).enumerate() {
                        assert!(bytes.iter().all(|byte| *byte == pattern(thread, round)), "round {round} of {thread}");
                    }
                    result::free_sync(memory).unwrap();
                    events.into_iter().for_each(|made| event::destroy(made).unwrap());
                    stream::destroy(queue).unwrap();
                }
            });
        }
    });
    contexts[0].bind_to_thread().unwrap();
    unsafe { result::free_host(ring as *mut c_void) }.unwrap();
}
