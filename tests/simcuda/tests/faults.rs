//! Calls that fail on demand, devices that get lost, and the ledger: each in a process of its own.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, whose twin checks what it gets")]
#![allow(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

use std::{env, fs, path::Path, time::Duration};

use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::result::{self, event};
use cudarc::driver::{CudaContext, DriverError, sys};
use serde_json::Value;

const BYTES: usize = 1 << 20;

fn code<T>(result: Result<T, DriverError>) -> u32 {
    result.map_or_else(|error| error.0 as u32, |_| 0)
}

/// Runs one of the functions below in a process with these settings; gives stderr and the ledger.
fn run(body: &str, settings: &[(&str, &str)]) -> (String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join("ledger.json");
    let mut command = twins::cuda::command(env::current_exe().unwrap());
    command.args([body, "--exact", "--ignored", "--nocapture"]).env("SIMCUDA_LEDGER", &ledger);
    command.env("SIMCUDA_TEST", "1").env("RUST_BACKTRACE", "0").envs(settings.iter().copied());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{body}: {}\n{stderr}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{body} did not run");
    (stderr, serde_json::from_slice(&fs::read(&ledger).unwrap()).unwrap())
}

/// Whether this process is one that `run` started; the tests that say so are skipped otherwise.
fn started() -> bool {
    env::var_os("SIMCUDA_TEST").is_some()
}

/// A load in small: returns the first error, having tried to give everything back.
fn load() -> Result<(), DriverError> {
    unsafe {
        result::init()?;
        let device = result::device::get(0)?;
        let context = result::primary_ctx::retain(device)?;
        let loaded = (|| {
            result::ctx::set_current(context)?;
            let queue = stream::create(StreamKind::NonBlocking)?;
            let loaded = (|| {
                let done = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
                let loaded = (|| {
                    let pinned = result::malloc_host(BYTES, 0)?;
                    let loaded = (|| {
                        let memory = result::malloc_sync(BYTES)?;
                        let loaded = (|| {
                            for _ in 0..3 {
                                sys::cuMemcpyHtoDAsync_v2(memory, pinned, BYTES, queue).result()?;
                            }
                            event::record(done, queue)?;
                            while let Err(error) = event::query(done) {
                                if error.0 != sys::CUresult::CUDA_ERROR_NOT_READY {
                                    return Err(error);
                                }
                                std::thread::sleep(Duration::from_micros(100));
                            }
                            Ok(())
                        })();
                        if loaded.is_err() {
                            result::ctx::synchronize().ok(); // what is queued must not outlive its memory
                        }
                        let freed = result::free_sync(memory);
                        loaded.and(freed)
                    })();
                    let freed = result::free_host(pinned);
                    loaded.and(freed)
                })();
                let freed = event::destroy(done);
                loaded.and(freed)
            })();
            let freed = stream::destroy(queue);
            loaded.and(freed)
        })();
        let freed = result::primary_ctx::release(device);
        loaded.and(freed)
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn every_call_fails_in_turn() {
    if !started() {
        return;
    }
    twins::cuda::load();
    load().unwrap();
    let calls = twins::cuda::calls(None);
    assert!(calls > 15 && twins::cuda::calls(Some("cuMemcpyHtoDAsync")) == 3, "{calls}");
    for wanted in [1, 2, 700, 719] {
        for call in 1.. {
            twins::cuda::reset_counts();
            twins::cuda::fault(&format!("*@{call}={wanted}"));
            let found = code(load());
            // How often the event is asked for is a matter of time.
            if found == 0 {
                assert!(call > 12, "call {call} with code {wanted} was no error");
                break;
            }
            assert_eq!(found, wanted, "call {call}");
            twins::cuda::fault("");
            assert_eq!(twins::cuda::live(), 0, "call {call} with code {wanted} left something");
        }
    }
}

#[test]
fn a_sweep_over_all_calls_finds_each_error_and_no_leak() {
    let (stderr, ledger) = run("every_call_fails_in_turn", &[("SIMCUDA_LEAKS", "abort")]);
    assert_eq!(ledger["leaks"].as_array().unwrap().len(), 0, "{stderr}");
    assert_eq!(ledger["violations"].as_array().unwrap().len(), 0, "{stderr}");
}

#[test]
#[ignore = "run in a process of its own"]
fn lost_while_it_runs() {
    if !started() {
        return;
    }
    twins::cuda::load();
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    unsafe {
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let done = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
        let (pinned, memory) = (result::malloc_host(BYTES, 0).unwrap(), result::malloc_sync(BYTES).unwrap());
        // Whichever call comes first after the copy ran.
        let found = loop {
            let copied = sys::cuMemcpyHtoDAsync_v2(memory, pinned, BYTES, queue).result();
            let recorded = copied.and_then(|()| event::record(done, queue));
            match code(recorded.and_then(|()| event::query(done))) {
                0 | 600 => std::thread::yield_now(),
                found => break found,
            }
        };
        assert_eq!(found, 700);
        assert_eq!(code(result::malloc_sync(1)), 700);
        assert_eq!(code(stream::synchronize(queue)), 700);
        assert_eq!(code(result::ctx::synchronize()), 700);
        // Another device works.
        let other = CudaContext::new(1).unwrap();
        other.bind_to_thread().unwrap();
        result::ctx::synchronize().unwrap();
        context.bind_to_thread().unwrap();
        // What is given back counts as given back, whatever the driver says.
        assert_eq!(code(result::free_sync(memory)), 700);
        assert_eq!(code(result::free_host(pinned)), 700);
        assert_eq!(code(event::destroy(done)), 700);
        assert_eq!(code(stream::destroy(queue)), 700);
    }
}

#[test]
fn an_error_of_a_copy_that_runs_is_found_by_a_later_query_and_stays() {
    let (_, ledger) = run("lost_while_it_runs", &[("SIMCUDA_FAULT", "run:copy@2=700"), ("SIMCUDA_LEAKS", "abort")]);
    assert_eq!(ledger["leaks"].as_array().unwrap().len(), 0);
    assert_eq!(ledger["devices"][0]["h2d_bytes"], BYTES);
}

#[test]
#[ignore = "run in a process of its own"]
fn leaves_things() {
    if !started() {
        return;
    }
    twins::cuda::load();
    let context = CudaContext::new(1).unwrap();
    context.bind_to_thread().unwrap();
    unsafe {
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let (pinned, memory) = (result::malloc_host(BYTES, 0).unwrap(), result::malloc_sync(3 * BYTES).unwrap());
        sys::cuMemcpyHtoDAsync_v2(memory, pinned, BYTES, queue).result().unwrap();
        sys::cuMemcpyDtoHAsync_v2(pinned, memory, 1000, queue).result().unwrap();
        sys::cuMemsetD8Async(memory, 1, 10, queue).result().unwrap();
        stream::synchronize(queue).unwrap();
        let midway = env::temp_dir().join(format!("simcuda-ledger-{}", std::process::id()));
        twins::cuda::ledger(&midway);
        assert!(read(&midway)["calls"].as_u64().unwrap() > 5);
        fs::remove_file(midway).unwrap();
    }
    assert_eq!(
        (twins::cuda::bytes(1, 0), twins::cuda::bytes(1, 1), twins::cuda::bytes(1, 2)),
        (BYTES as u64, 1000, 10)
    );
    std::mem::forget(context);
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_ledger_says_what_was_done_and_what_was_left() {
    let (stderr, ledger) = run("leaves_things", &[]);
    assert!(stderr.contains("simcuda: LEAK: "), "{stderr}");
    let kinds: Vec<&str> =
        ledger["leaks"].as_array().unwrap().iter().map(|leak| leak["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["primary context", "stream", "device memory", "pinned memory"]);
    let device = &ledger["devices"][1];
    assert_eq!(
        (&device["h2d_bytes"], &device["d2h_bytes"], &device["d2d_bytes"]),
        (&BYTES.into(), &1000.into(), &10.into())
    );
    assert_eq!(device["peak_bytes"], 3 * BYTES);
    assert_eq!(ledger["peak_pinned_bytes"], BYTES);
    assert_eq!(ledger["copies"]["1d"], 3);
    assert_eq!(ledger["calls_by_function"]["cuMemcpyHtoDAsync_v2"], 1);
    assert!(ledger["copy_cpu_seconds"].as_f64().unwrap() > 0.0);
    assert!(ledger["last_copy_end_ns"].as_u64() > ledger["first_copy_start_ns"].as_u64());
    let (stderr, _) = run("leaves_things", &[("SIMCUDA_LEAKS", "ignore")]);
    assert!(!stderr.contains("LEAK"), "{stderr}");
}

#[test]
#[ignore = "run in a process of its own"]
fn times_of_a_link() {
    if !started() {
        return;
    }
    twins::cuda::load();
    let bytes = 20_000_000;
    let contexts: Vec<_> = (0..4).map(|device| CudaContext::new(device).unwrap()).collect();
    let parts: Vec<_> = contexts
        .iter()
        .map(|context| {
            context.bind_to_thread().unwrap();
            unsafe {
                (
                    context,
                    stream::create(StreamKind::NonBlocking).unwrap(),
                    result::malloc_host(bytes, 1).unwrap(),
                    result::malloc_sync(bytes).unwrap(),
                )
            }
        })
        .collect();
    let start = std::time::Instant::now();
    for (context, queue, pinned, memory) in &parts {
        context.bind_to_thread().unwrap();
        for _ in 0..2 {
            unsafe { sys::cuMemcpyHtoDAsync_v2(*memory, *pinned, bytes, *queue) }.result().unwrap();
        }
    }
    for (context, queue, pinned, memory) in parts {
        context.bind_to_thread().unwrap();
        unsafe {
            stream::synchronize(queue).unwrap();
            result::free_sync(memory).unwrap();
            result::free_host(pinned).unwrap();
            stream::destroy(queue).unwrap();
        }
    }
    // 40 ms each, side by side.
    assert!(start.elapsed() >= Duration::from_millis(40), "{:?}", start.elapsed());
}

#[test]
fn copies_end_when_the_model_says() {
    let seconds = |ledger: &Value| {
        (ledger["last_copy_end_ns"].as_u64().unwrap() - ledger["first_copy_start_ns"].as_u64().unwrap()) as f64 / 1e9
    };
    let (_, ledger) = run("times_of_a_link", &[("SIMCUDA_LINK", "1,10"), ("SIMCUDA_LEAKS", "abort")]);
    // 40 MB over each of four links of 1 GB/s, side by side; what is more is the time that submitting took.
    assert!((0.040..0.120).contains(&seconds(&ledger)), "{ledger}");
    for device in ledger["devices"].as_array().unwrap() {
        assert!((device["busy_seconds"].as_f64().unwrap() - 0.040).abs() < 1e-6, "{device}");
    }
    let (_, ledger) = run("times_of_a_link", &[("SIMCUDA_LINK", "1,10,root=2"), ("SIMCUDA_LEAKS", "abort")]);
    assert!((0.080..0.150).contains(&seconds(&ledger)), "{ledger}");
}

#[test]
#[ignore = "run in a process of its own"]
fn no_device() {
    if started() {
        // Found by the loader's path, as any program finds it.
        assert_eq!(code(CudaContext::device_count()), 100);
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn old_and_small() {
    if !started() {
        return;
    }
    twins::cuda::load();
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    let mut version = 0;
    let mut memory = vec![0_u8; BYTES];
    unsafe {
        sys::cuDriverGetVersion(&mut version).result().unwrap();
        assert_eq!(version, 12000);
        let read_only = 8;
        assert_eq!(code(sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), BYTES, read_only).result()), 801);
        assert_eq!(code(result::malloc_host(BYTES + 1, 0)), 2);
        assert_eq!(code(result::malloc_sync(BYTES + 1)), 2);
        result::free_sync(result::malloc_sync(BYTES).unwrap()).unwrap();
        let image = |version| std::ffi::CString::new(format!(".version {version}\n.target sm_70\n")).unwrap();
        assert_eq!(code(result::module::load_data(image("8.1").as_ptr().cast())), 222);
        result::module::unload(result::module::load_data(image("8.0").as_ptr().cast()).unwrap()).unwrap();
        let mut address = std::ptr::null_mut();
        let name = c"cuMemAlloc".as_ptr();
        let mut ask = |version| sys::cuGetProcAddress_v2(name, &mut address, version, 0, std::ptr::null_mut()).result();
        assert_eq!(code(ask(12090)), 500);
        ask(12000).unwrap();
        assert!(!address.is_null());
    }
}

#[test]
fn settings_make_it_smaller_and_older() {
    run("no_device", &[("SIMCUDA_DEVICES", "0")]);
    let settings = [
        ("SIMCUDA_DRIVER_VERSION", "12000"),
        ("SIMCUDA_READ_ONLY", "0"),
        ("SIMCUDA_PINNED", "1M"),
        ("SIMCUDA_MEMORY", "1M"),
    ];
    run("old_and_small", &settings);
}
