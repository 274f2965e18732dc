//! The library's kernels, loaded from their PTX and run on the host.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, whose twin checks what it gets")]
#![allow(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

use std::ffi::{CString, c_void};
use std::os::unix::process::ExitStatusExt;
use std::{env, fs};

use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::{CudaContext, result};

/// The digest of some bytes by the kernel, which is told that there are `claimed` of them.
fn digest(bytes: &[u8], claimed: u64) -> u64 {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/shardlift.ptx");
    let ptx = CString::new(fs::read(path).unwrap()).unwrap();
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    unsafe {
        let module = result::module::load_data(ptx.as_ptr().cast()).unwrap();
        let unknown = CString::new("shardlift_nothing").unwrap();
        assert_eq!(result::module::get_function(module, unknown).unwrap_err().0 as u32, 500);
        let function = result::module::get_function(module, CString::new("shardlift_digest").unwrap()).unwrap();
        let queue = stream::create(StreamKind::NonBlocking).unwrap();
        let mut source = result::malloc_sync(bytes.len()).unwrap();
        let mut sum = result::malloc_sync(8).unwrap();
        result::memcpy_htod_sync(source, bytes).unwrap();
        result::memset_d8_sync(sum, 0, 8).unwrap();
        result::ctx::synchronize().unwrap();
        let mut claimed = claimed;
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut source).cast(), (&raw mut claimed).cast(), (&raw mut sum).cast()];
        let launch = |threads: u32, parameters: &mut [*mut c_void]| {
            result::launch_kernel(function, (4, 1, 1), (threads, 1, 1), 0, queue, parameters)
        };
        assert_eq!(launch(2048, &mut parameters).unwrap_err().0 as u32, 1);
        launch(256, &mut parameters).unwrap();
        claimed = 0; // the launch took its parameters
        let _ = claimed;
        stream::synchronize(queue).unwrap();
        let mut found = [0_u8; 8];
        result::memcpy_dtoh_sync(&mut found, sum).unwrap();
        [source, sum].into_iter().for_each(|memory| result::free_sync(memory).unwrap());
        stream::destroy(queue).unwrap();
        result::module::unload(module).unwrap();
        u64::from_le_bytes(found)
    }
}

#[test]
fn a_kernel_runs_on_its_stream() {
    twins::cuda::load();
    let bytes: Vec<u8> = (0..100_003_u32).map(|i| (i * 7 + i / 251) as u8).collect();
    let mut expected = 0_u64;
    for (index, chunk) in (1_u64..).zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let mut mixed = u64::from_le_bytes(word) ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed = mixed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        expected = expected.wrapping_add(mixed ^ mixed >> 31);
    }
    assert_eq!(digest(&bytes, bytes.len() as u64), expected);
}

#[test]
#[ignore = "run by the test below, in a process that must die"]
fn overrun() {
    if env::var_os("SIMCUDA_TEST").is_some() {
        twins::cuda::load();
        digest(&[1; 1000], 1 << 20);
    }
}

#[test]
fn a_kernel_that_leaves_its_memory_dies_with_its_name() {
    let mut command = twins::cuda::command(env::current_exe().unwrap());
    command.args(["overrun", "--exact", "--ignored", "--nocapture"]).env("SIMCUDA_TEST", "1");
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("simcuda: VIOLATION cuLaunchKernel: shardlift_digest touched memory"), "{stderr}");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT));
}
