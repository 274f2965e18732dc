//! Ranks for the tests of NCCL's twin: threads of this process, or processes.

#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of driver and NCCL, whose twins check what they get")]
#![allow(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

use std::ffi::CStr;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, Output, Stdio};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, mem, thread};

use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::{CudaContext, result, sys};
use serde_json::Value;

pub(crate) const SUCCESS: i32 = 0;
pub(crate) const CUDA_ERROR: i32 = 1;
pub(crate) const INVALID_ARGUMENT: i32 = 4;
pub(crate) const INVALID_USAGE: i32 = 5;
pub(crate) const REMOTE_ERROR: i32 = 6;
pub(crate) const IN_PROGRESS: i32 = 7;
/// `ncclUint8`, `ncclFloat32`.
pub(crate) const BYTE: i32 = 1;
pub(crate) const FLOAT: i32 = 7;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Id {
    pub(crate) bytes: [u8; 128],
}

/// `ncclConfig_t` of 2.14.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
    padding: i32,
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            #[expect(non_snake_case, reason = "NCCL's names")]
            pub(crate) fn $name($($argument: $type),*) -> i32 {
                let name = CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()).unwrap();
                let function = unsafe { twins::nccl::function::<extern "C" fn($($type),*) -> i32>(name) };
                function($($argument),*)
            }
        )*
    };
}

functions! {
    ncclGetVersion(version: &mut i32);
    ncclGetUniqueId(id: &mut Id);
    ncclCommInitRank(comm: &mut u64, size: i32, id: Id, rank: i32);
    ncclCommInitAll(comms: *mut u64, size: i32, devices: *const i32);
    ncclCommFinalize(comm: u64);
    ncclCommDestroy(comm: u64);
    ncclCommAbort(comm: u64);
    ncclCommGetAsyncError(comm: u64, status: &mut i32);
    ncclCommCount(comm: u64, count: &mut i32);
    ncclCommUserRank(comm: u64, rank: &mut i32);
    ncclCommCuDevice(comm: u64, device: &mut i32);
    ncclGroupStart();
    ncclGroupEnd();
    ncclSend(from: u64, count: usize, data_type: i32, peer: i32, comm: u64, stream: u64);
    ncclRecv(to: u64, count: usize, data_type: i32, peer: i32, comm: u64, stream: u64);
    ncclBroadcast(from: u64, to: u64, count: usize, data_type: i32, root: i32, comm: u64, stream: u64);
    ncclAllGather(from: u64, to: u64, count: usize, data_type: i32, comm: u64, stream: u64);
    ncclAllReduce(from: u64, to: u64, count: usize, data_type: i32, reduction: i32, comm: u64, stream: u64);
}

/// `ncclCommInitRankConfig` with `blocking = 0`.
pub(crate) fn init_later(comm: &mut u64, size: usize, id: Id, rank: usize) -> i32 {
    let mut config =
        Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21400, blocking: 0, padding: i32::MIN };
    type Init = extern "C" fn(&mut u64, i32, Id, i32, &mut Config) -> i32;
    let function = unsafe { twins::nccl::function::<Init>(c"ncclCommInitRankConfig") };
    function(comm, size as i32, id, rank as i32, &mut config)
}

pub(crate) fn new_id() -> Id {
    let mut id = Id { bytes: [0; 128] };
    assert_eq!(ncclGetUniqueId(&mut id), SUCCESS);
    id
}

pub(crate) fn last_error() -> String {
    let function =
        unsafe { twins::nccl::function::<extern "C" fn(u64) -> *const std::ffi::c_char>(c"ncclGetLastError") };
    unsafe { CStr::from_ptr(function(0)) }.to_string_lossy().into_owned()
}

/// What a communicator is at: success, in progress, or what went wrong.
pub(crate) fn status(comm: u64) -> i32 {
    let mut status = -1;
    assert_eq!(ncclCommGetAsyncError(comm, &mut status), SUCCESS);
    status
}

/// Waits until a communicator is not in progress any more.
pub(crate) fn settled(comm: u64) -> i32 {
    let began = Instant::now();
    loop {
        match status(comm) {
            IN_PROGRESS if began.elapsed() < Duration::from_secs(20) => thread::sleep(Duration::from_micros(200)),
            status => return status,
        }
    }
}

/// A GPU, a stream on it, and a place among others.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) comm: u64,
    pub(crate) stream: u64,
    /// Its primary context.
    context: Arc<CudaContext>,
}

impl Rank {
    /// On the GPU of this number; its communicator does not block, and is ready.
    pub(crate) fn meet(id: Id, rank: usize, size: usize) -> Rank {
        let mut this = Rank::alone(rank, rank, size);
        assert_eq!(init_later(&mut this.comm, size, id, rank), IN_PROGRESS);
        assert_eq!(settled(this.comm), SUCCESS, "{}", last_error());
        this
    }

    /// Without a communicator.
    pub(crate) fn alone(device: usize, rank: usize, size: usize) -> Rank {
        let context = CudaContext::new(device).unwrap();
        context.bind_to_thread().unwrap();
        let stream = stream::create(StreamKind::NonBlocking).unwrap() as u64;
        Rank { rank, size, comm: 0, stream, context }
    }

    pub(crate) fn memory(&self, bytes: &[u8]) -> u64 {
        self.context.bind_to_thread().unwrap();
        unsafe {
            let memory = result::malloc_sync(bytes.len()).unwrap();
            result::memcpy_htod_sync(memory, bytes).unwrap();
            memory
        }
    }

    pub(crate) fn read(&self, memory: u64, bytes: usize) -> Vec<u8> {
        self.context.bind_to_thread().unwrap();
        let mut found = vec![0; bytes];
        unsafe { result::memcpy_dtoh_sync(&mut found, memory) }.unwrap();
        found
    }

    pub(crate) fn free(&self, memory: u64) {
        self.context.bind_to_thread().unwrap();
        unsafe { result::free_sync(memory) }.unwrap();
    }

    /// The call answers "in progress", and comes to a good end.
    #[track_caller]
    pub(crate) fn ok(&self, status: i32) {
        assert_eq!(status, IN_PROGRESS, "{}", last_error());
        assert_eq!(settled(self.comm), SUCCESS, "{}", last_error());
    }

    pub(crate) fn is_idle(&self) -> bool {
        unsafe { sys::cuStreamQuery(self.stream as sys::CUstream) == sys::CUresult::CUDA_SUCCESS }
    }

    pub(crate) fn synchronize(&self) {
        unsafe { stream::synchronize(self.stream as sys::CUstream) }.unwrap();
    }

    /// Ends as it should.
    pub(crate) fn part(self) {
        self.synchronize();
        self.ok(ncclCommFinalize(self.comm));
        assert_eq!(ncclCommDestroy(self.comm), SUCCESS);
        unsafe { stream::destroy(self.stream as sys::CUstream) }.unwrap();
    }

    /// Ends whatever is under way, and only then gives its memory back.
    pub(crate) fn free_after_abort(self, memory: u64) {
        assert_eq!(ncclCommAbort(self.comm), SUCCESS);
        self.free_aborted(memory);
    }

    /// The same for one that was aborted.
    pub(crate) fn free_aborted(self, memory: u64) {
        self.synchronize();
        self.free(memory);
        unsafe { stream::destroy(self.stream as sys::CUstream) }.unwrap();
    }

    /// Ends whatever is under way.
    pub(crate) fn abort(self) {
        self.context.bind_to_thread().unwrap();
        assert_eq!(ncclCommAbort(self.comm), SUCCESS);
        self.synchronize();
        unsafe { stream::destroy(self.stream as sys::CUstream) }.unwrap();
    }
}

/// Runs a body on each of `size` ranks, threads of this process, on a GPU each.
pub(crate) fn ranks(size: usize, body: impl Fn(Rank) + Sync) {
    load();
    let id = new_id();
    thread::scope(|scope| {
        for rank in 0..size {
            let body = &body;
            scope.spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| body(Rank::meet(id, rank, size))));
                // The others may wait for it for ever.
                ended.unwrap_or_else(|_| std::process::exit(101));
            });
        }
    });
}

/// Loads both twins.
pub(crate) fn load() {
    twins::cuda::load();
    twins::nccl::load();
}

/// Whether this process is one that the functions below started; bodies do nothing otherwise.
pub(crate) fn started() -> bool {
    env::var_os("SIMNCCL_TEST").is_some()
}

/// What a test told the process that it started.
pub(crate) fn setting(name: &str) -> String {
    env::var(name).unwrap()
}

/// The same as a number.
pub(crate) fn number<T: FromStr<Err: Debug>>(name: &str) -> T {
    setting(name).parse().unwrap()
}

/// A process that runs one body of this test binary.
pub(crate) fn process(body: &str, settings: &[(&str, &str)]) -> Command {
    let mut command = twins::cuda::command(env::current_exe().unwrap());
    command.args([body, "--exact", "--ignored", "--nocapture"]);
    command.envs([
        ("SIMNCCL_TEST", "1"),
        ("RUST_BACKTRACE", "0"),
        ("SIMCUDA_DEVICES", "8"),
        ("SIMCUDA_MEMORY", "256M"),
    ]);
    command.envs(settings.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs one body in a process of its own, to a good end; gives NCCL's ledger and the driver's.
pub(crate) fn run(body: &str, settings: &[(&str, &str)]) -> (Value, Value) {
    let folder = tempfile::tempdir().unwrap();
    let ledgers = ["nccl.json", "cuda.json"].map(|name| folder.path().join(name));
    let mut command = process(body, &[("SIMCUDA_LEAKS", "abort"), ("SIMNCCL_LEAKS", "abort")]);
    command.env("SIMNCCL_LEDGER", &ledgers[0]).env("SIMCUDA_LEDGER", &ledgers[1]).envs(settings.iter().copied());
    succeeded(body, &command.output().unwrap());
    let [nccl, cuda] = ledgers.map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap());
    (nccl, cuda)
}

pub(crate) fn succeeded(body: &str, output: &Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{body}: {}\n{stderr}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{body} did not run");
}

/// Starts one body on each of `size` ranks, a process each; this one makes the id.
pub(crate) fn processes<'a>(
    body: &str,
    size: usize,
    settings: impl Fn(usize) -> Vec<(&'a str, &'a str)>,
) -> Vec<Child> {
    load();
    let id: String = new_id().bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let start = |rank: usize| {
        let mut command = process(body, &[("SIMCUDA_LEAKS", "abort"), ("SIMNCCL_LEAKS", "abort")]);
        command.env("SIMNCCL_TEST_ID", &id).env("SIMNCCL_TEST_PLACE", format!("{rank} {size}"));
        command.envs(settings(rank)).spawn().unwrap()
    };
    (0..size).map(start).collect()
}

/// Id, rank and size, in a process that `processes` started.
pub(crate) fn place() -> (Id, usize, usize) {
    load();
    let text = setting("SIMNCCL_TEST_ID");
    let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
    let place = setting("SIMNCCL_TEST_PLACE");
    let (rank, size) = place.split_once(' ').unwrap();
    (Id { bytes: std::array::from_fn(byte) }, rank.parse().unwrap(), size.parse().unwrap())
}

/// Bytes that tell which rank, and which of several blocks, they are of.
pub(crate) fn pattern(rank: usize, block: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 + rank * 101 + block * 29 + at / 251) as u8).collect()
}

/// Whether the size of a type is what the C side has; for structures that cross by value.
const _: () = assert!(mem::size_of::<Id>() == 128);
