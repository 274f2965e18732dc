//! Communicators on NCCL's twin: ranks as threads and as processes, peers that do not come, errors, aborting. Each body runs
//! in processes of its own, where the twins have their own settings.

#![expect(clippy::disallowed_methods, reason = "settings of the processes that the tests start")]

mod twins;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Output, Stdio};
use std::sync::Barrier;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use std::{env, thread};

use super::{Aborter, Comm, Nccl, UniqueId, Wait};
use crate::device::{Allocation, Cuda, CudaStream, Device, Feed, Home, Op, RawCopy};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;

const BYTES: usize = 200_003;
/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// A rank's GPU, a stream on it, and its place.
struct Seat {
    device: Cuda,
    stream: CudaStream,
    rank: u32,
    size: u32,
}

impl Seat {
    fn new(rank: u32, size: u32) -> Seat {
        let device = Cuda::open(rank, limits::STALL_ERROR).unwrap();
        Seat { stream: device.stream().unwrap(), device, rank, size }
    }

    fn meet(&self, id: UniqueId) -> Result<Comm> {
        self.meet_within(id, LONG)
    }

    fn meet_within(&self, id: UniqueId, bound: Duration) -> Result<Comm> {
        let wait = Wait { deadline: Instant::now() + bound, stop: &|| Ok(()) };
        Comm::meet(Nccl::open()?, &self.device, id, Rank(self.rank), self.size, &wait)
    }

    /// Memory of the GPU that holds these bytes.
    fn memory(&self, bytes: &[u8]) -> Allocation {
        let memory = self.device.block(bytes.len()).unwrap();
        let feed = Feed { slot_bytes: bytes.len(), cuts: false, slots: 0, wire: None };
        let mut queue = self.device.queue(feed).unwrap().unwrap();
        let copy = RawCopy {
            src: bytes.as_ptr(),
            dst: memory.address(),
            loops: Default::default(),
            run: bytes.len() as u64,
            cast: None,
        };
        // SAFETY: both sides are that long, and stay until the queue is dropped.
        unsafe { queue.submit(vec![Op::Copy(copy)], Home::Host) }.unwrap();
        assert!(queue.settle(LONG));
        memory
    }

    fn read(&self, memory: &Allocation, bytes: usize) -> Vec<u8> {
        assert!(self.stream.settle(LONG).unwrap());
        let mut found = vec![0; bytes];
        // SAFETY: as long as that, written by `memory`, and the stream is idle.
        unsafe { memory.device().unwrap().read(memory.address(), &mut found) }.unwrap();
        found
    }
}

/// Patience without an end that matters.
fn patient(deadline: Instant) -> Wait<'static> {
    Wait { deadline, stop: &|| Ok(()) }
}

fn pattern(rank: u32, block: u32, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 13 + at / 255 + rank as usize * 77 + block as usize * 31) as u8).collect()
}

/// Every operation, and what it must leave behind.
fn exchange(seat: &Seat, mut comm: Comm) {
    let wait = patient(Instant::now() + LONG);
    let (me, size, stream) = (seat.rank, seat.size, seat.stream.handle());
    assert_eq!((comm.rank(), comm.size()), (Rank(me), size));
    for root in 0..size {
        let memory = seat.memory(&pattern(me, root, BYTES));
        let address = memory.address();
        // SAFETY: memory of this device, as long as the operation says, which lives until `read` has waited for the stream.
        unsafe { comm.broadcast(Rank(root), [address, address], BYTES, stream, &wait) }.unwrap();
        assert!(seat.read(&memory, BYTES) == pattern(root, root, BYTES), "rank {me}, root {root}");
    }
    let (part, whole) = (seat.memory(&pattern(me, 9, BYTES)), seat.memory(&vec![0; size as usize * BYTES]));
    // SAFETY: as above.
    unsafe { comm.all_gather([part.address(), whole.address()], BYTES, stream, &wait) }.unwrap();
    let expected: Vec<u8> = (0..size).flat_map(|rank| pattern(rank, 9, BYTES)).collect();
    assert!(seat.read(&whole, expected.len()) == expected, "rank {me}");
    // Round a ring, first one message at a time, evens first; then all at once, in a group.
    let (next, previous) = (Rank((me + 1) % size), Rank((me + size - 1) % size));
    if size % 2 == 0 {
        let taken = seat.memory(&[0; BYTES]);
        for turn in 0..2 {
            if me % 2 == turn {
                // SAFETY: as above.
                unsafe { comm.send(next, part.address(), BYTES, stream, &wait) }.unwrap();
            } else {
                // SAFETY: as above.
                unsafe { comm.recv(previous, taken.address(), BYTES, stream, &wait) }.unwrap();
            }
        }
        assert!(seat.read(&taken, BYTES) == pattern(previous.0, 9, BYTES), "rank {me}");
    }
    let blocks: Vec<u8> = (0..size).flat_map(|block| pattern(me, block, BYTES)).collect();
    let (from, to) = (seat.memory(&blocks), seat.memory(&vec![0; blocks.len()]));
    // SAFETY: as above.
    unsafe {
        comm.grouped(stream, &wait, |group| {
            for peer in 0..size {
                let at = u64::from(peer) * BYTES as u64;
                group.send(Rank(peer), from.address() + at, BYTES)?;
                group.recv(Rank(peer), to.address() + at, BYTES)?;
            }
            Ok(())
        })
    }
    .unwrap();
    comm.check().unwrap();
    let expected: Vec<u8> = (0..size).flat_map(|rank| pattern(rank, me, BYTES)).collect();
    assert!(seat.read(&to, expected.len()) == expected, "rank {me}");
    // Two broadcasts at once, of different memory: within a group nothing has an order.
    let halves = seat.memory(&pattern(me, 0, 2 * BYTES));
    let broadcasts = |group: &mut super::Group<'_>| {
        (0..2).try_for_each(|half| {
            let at = halves.address() + half * BYTES as u64;
            group.broadcast(Rank(half as u32 % size), [at; 2], BYTES)
        })
    };
    // SAFETY: as above.
    unsafe { comm.grouped(stream, &wait, broadcasts) }.unwrap();
    let expected = [&pattern(0, 0, 2 * BYTES)[..BYTES], &pattern(1 % size, 0, 2 * BYTES)[BYTES..]].concat();
    assert!(seat.read(&halves, 2 * BYTES) == expected, "rank {me}");
    comm.finish(&wait).unwrap();
}

/// Runs a body on each of `size` ranks, threads of this process.
fn ranks(size: u32, body: impl Fn(Seat, UniqueId) + Sync) {
    twins::load();
    let id = Nccl::open().unwrap().unique_id().unwrap();
    thread::scope(|scope| {
        for rank in 0..size {
            let body = &body;
            scope.spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| body(Seat::new(rank, size), id)));
                // The others may wait for it for ever.
                ended.unwrap_or_else(|_| std::process::exit(101));
            });
        }
    });
    assert_eq!(twins::live(), [0, 0], "something was not given back");
}

/// Whether this process is one that the functions below started; bodies do nothing otherwise.
fn started() -> bool {
    env::var_os("SIMNCCL_TEST").is_some()
}

fn start(body: &str, settings: &[(&str, &str)]) -> Child {
    let mut command = twins::command();
    let body = format!("collective::tests::{body}");
    command.args([&body, "--exact", "--ignored", "--nocapture"]).env("SIMNCCL_TEST", "1").env("RUST_BACKTRACE", "0");
    command.envs([("SIMCUDA_LEAKS", "abort"), ("SIMNCCL_LEAKS", "abort"), ("SIMCUDA_DEVICES", "8")]);
    command.env("SIMCUDA_MEMORY", "256M").envs(settings.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn run(body: &str, settings: &[(&str, &str)]) {
    // The package has no twins; in the repository a test does not do without.
    if !std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/simnccl").exists() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        return eprintln!("SKIPPED: {body}: no twin of NCCL");
    }
    succeeded(body, &start(body, settings).wait_with_output().unwrap());
}

#[track_caller]
fn succeeded(body: &str, output: &Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{body}: {}\n{stderr}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{body} did not run");
}

#[test]
#[ignore = "run in a process of its own"]
fn as_threads() {
    if started() {
        let size = env::var("SIMNCCL_TEST_SIZE").unwrap().parse().unwrap();
        ranks(size, |seat, id| {
            let comm = seat.meet(id).unwrap();
            exchange(&seat, comm);
        });
    }
}

#[test]
fn bytes_are_exact_between_threads() {
    for size in ["1", "2", "4", "8"] {
        run("as_threads", &[("SIMNCCL_TEST_SIZE", size)]);
    }
}

#[test]
#[ignore = "run in processes of their own"]
fn as_processes() {
    if started() {
        twins::load();
        let text = env::var("SIMNCCL_TEST_ID").unwrap();
        let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
        let id = UniqueId::from_bytes(std::array::from_fn(byte));
        let place = env::var("SIMNCCL_TEST_PLACE").unwrap();
        let (rank, size) = place.split_once(' ').unwrap();
        let seat = Seat::new(rank.parse().unwrap(), size.parse().unwrap());
        let comm = seat.meet(id).unwrap();
        exchange(&seat, comm);
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn of_processes() {
    if !started() {
        return;
    }
    twins::load();
    for size in [2, 4, 8] {
        // Of this process, which is no rank.
        let id = Nccl::open().unwrap().unique_id().unwrap();
        let id: String = id.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let settings = |rank: u32| format!("{rank} {size}");
        let ranks: Vec<Child> = (0..size)
            .map(|rank| start("as_processes", &[("SIMNCCL_TEST_ID", &id), ("SIMNCCL_TEST_PLACE", &settings(rank))]))
            .collect();
        for child in ranks {
            succeeded("as_processes", &child.wait_with_output().unwrap());
        }
    }
}

#[test]
fn bytes_are_exact_between_processes() {
    run("of_processes", &[]);
}

#[test]
#[ignore = "run in a process of its own"]
fn nobody_comes() {
    if !started() {
        return;
    }
    twins::load();
    let seat = Seat::new(0, 2);
    let id = || Nccl::open().unwrap().unique_id().unwrap();
    let error = seat.meet_within(id(), Duration::from_millis(200)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled);
    assert_eq!(error.to_string(), "ncclCommInitRankConfig did not end within 0.2 s, rank 0");
    // Whoever waits may be told to stop, for whatever reason.
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        if asked.get() < 5 { Ok(()) } else { Err(Error::new(ErrorKind::Cancelled, "rank 1 has failed")) }
    };
    let wait = Wait { deadline: Instant::now() + LONG, stop: &stop };
    let error = Comm::meet(Nccl::open().unwrap(), &seat.device, id(), Rank(0), 2, &wait).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Cancelled, "rank 1 has failed"));
    drop(seat);
    assert_eq!(twins::live(), [0, 0]);
}

#[test]
fn a_peer_that_never_comes_is_waited_for_until_the_deadline_or_a_stop() {
    run("nobody_comes", &[]);
    run("nobody_comes", &[("SIMNCCL_FAULT", "ncclCommInitRankConfig@1=hang")]);
}

#[test]
#[ignore = "run in a process of its own"]
fn on_one_gpu() {
    if !started() {
        return;
    }
    ranks(2, |seat, id| {
        let shared = Seat {
            stream: Cuda::open(0, limits::STALL_ERROR).unwrap().stream().unwrap(),
            device: Cuda::open(0, limits::STALL_ERROR).unwrap(),
            ..seat
        };
        let error = shared.meet(id).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("ncclCommInitRankConfig failed: status 5: invalid usage"), "{text}");
        assert!(text.contains("NCCL_MULTI_RANK_GPU_ENABLE=1") && error.at().rank == Some(Rank(shared.rank)), "{text}");
    });
}

#[test]
fn what_nccl_says_is_in_the_error() {
    run("on_one_gpu", &[]);
}

/// An operation goes wrong on rank 0, and rank 1 waits for it.
#[test]
#[ignore = "run in a process of its own"]
fn operations_fail() {
    if !started() {
        return;
    }
    let both = Barrier::new(2);
    ranks(2, |seat, id| {
        let mut comm = seat.meet(id).unwrap();
        let wait = patient(Instant::now() + LONG);
        let (memory, stream) = (seat.memory(&pattern(seat.rank, 0, BYTES)), seat.stream.handle());
        let [from, to] = [memory.address(); 2];
        both.wait();
        if seat.rank == 0 {
            twins::fault("run:ncclBroadcast@1=6");
        }
        both.wait();
        // SAFETY: memory of the device, kept until the stream is idle.
        let mut outcome = unsafe { comm.broadcast(Rank(0), [from, to], BYTES, stream, &wait) };
        // One of the two fails, it does not matter which, and when; the other one only waits, until somebody tells it.
        let began = Instant::now();
        while outcome.is_ok() && began.elapsed() < Duration::from_millis(500) {
            assert!(!seat.stream.is_done().unwrap());
            thread::sleep(Duration::from_millis(1));
            outcome = comm.check();
        }
        if let Err(error) = &outcome {
            let text = error.to_string();
            assert!(text.contains(" failed: status 6: remote process exited"), "{text}");
        }
        let failed = FAILED.fetch_add(u32::from(outcome.is_err()), SeqCst);
        both.wait();
        assert_eq!(FAILED.load(SeqCst), 1, "{failed}");
        comm.abort().unwrap();
        comm.abort().unwrap();
        assert!(seat.stream.settle(Duration::from_secs(5)).unwrap(), "the abort frees the stream");
        assert_eq!(comm.check().unwrap_err().to_string(), format!("the communicator was aborted, rank {}", seat.rank));
        // SAFETY: as above.
        let after = unsafe { comm.broadcast(Rank(0), [from, to], BYTES, stream, &wait) };
        assert_eq!(after.unwrap_err().kind(), ErrorKind::Cancelled);
    });
}

static FAILED: AtomicU32 = AtomicU32::new(0);

#[test]
fn an_error_of_an_operation_is_found_and_aborting_frees_its_stream() {
    run("operations_fail", &[]);
}

#[test]
#[ignore = "run in a process of its own"]
fn torn_apart() {
    if !started() {
        return;
    }
    ranks(2, |seat, id| {
        let mut comm = seat.meet(id).unwrap();
        let wait = patient(Instant::now() + LONG);
        let (memory, stream) = (seat.memory(&pattern(seat.rank, 0, BYTES)), seat.stream.handle());
        let address = memory.address();
        // Both send, nobody takes. Another thread ends it, while this one waits for all to part.
        // SAFETY: memory of the device, kept until the stream is idle.
        unsafe { comm.send(Rank(1 - seat.rank), address, BYTES, stream, &wait) }.unwrap();
        let aborter: Aborter = comm.aborter();
        let other = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            aborter.abort()
        });
        let began = Instant::now();
        let error = comm.finish(&wait).unwrap_err();
        assert_eq!(error.to_string(), format!("the communicator was aborted, rank {}", seat.rank));
        other.join().unwrap().unwrap();
        assert!(seat.stream.settle(Duration::from_secs(5)).unwrap() && began.elapsed() < Duration::from_secs(5));
        assert!(seat.read(&memory, BYTES) == pattern(seat.rank, 0, BYTES));
    });
}

/// What is collected names the communicator once more when the group ends: until then nobody takes it away.
#[test]
#[ignore = "run in a process of its own"]
fn torn_apart_while_a_group_is_collected() {
    if !started() {
        return;
    }
    ranks(2, |seat, id| {
        let (mut comm, wait) = (seat.meet(id).unwrap(), patient(Instant::now() + LONG));
        let (part, taken) = (seat.memory(&pattern(seat.rank, 1, BYTES)), seat.memory(&[0; BYTES]));
        let (other, stream, aborter) = (Rank(1 - seat.rank), seat.stream.handle(), comm.aborter());
        let aborting = Barrier::new(2);
        thread::scope(|scope| {
            let aborted = scope.spawn(|| {
                aborting.wait();
                aborter.abort()
            });
            // SAFETY: memory of this device, which lives until the stream is idle.
            let outcome = unsafe {
                comm.grouped(stream, &wait, |group| {
                    group.send(other, part.address(), BYTES)?;
                    aborting.wait();
                    thread::sleep(limits::NCCL_ABORT / 4);
                    group.recv(other, taken.address(), BYTES).unwrap();
                    Ok(())
                })
            };
            aborted.join().unwrap().unwrap();
            // It ended before it was taken away, or was told so when it was asked how that went.
            assert!(outcome.is_ok() || outcome.is_err_and(|error| error.kind() == ErrorKind::Cancelled));
        });
        assert!(seat.stream.settle(LONG).unwrap());
        assert_eq!(comm.check().unwrap_err().kind(), ErrorKind::Cancelled);
    });
}

#[test]
fn a_group_is_not_torn_apart_while_it_is_collected() {
    run("torn_apart_while_a_group_is_collected", &[]);
}

#[test]
fn another_thread_may_abort() {
    run("torn_apart", &[]);
}

#[test]
#[ignore = "run in a process of its own"]
fn every_call_fails() {
    if !started() {
        return;
    }
    twins::load();
    let once = || -> Result<()> {
        let nccl = Nccl::open()?;
        let seat = Seat::new(0, 1);
        let wait = patient(Instant::now() + LONG);
        let mut comm = Comm::meet(nccl, &seat.device, nccl.unique_id()?, Rank(0), 1, &wait)?;
        let (memory, stream) = (seat.memory(&[1; 300]), seat.stream.handle());
        let at = |offset: u64| memory.address() + offset;
        // SAFETY: memory of the device, which lives until `read` has waited for the stream, or the communicator is gone and
        // the stream idle.
        let done = unsafe {
            (|| {
                comm.broadcast(Rank(0), [at(0), at(0)], 100, stream, &wait)?;
                comm.all_gather([at(0), at(0)], 100, stream, &wait)?;
                comm.grouped(stream, &wait, |group| {
                    group.send(Rank(0), at(0), 100)?;
                    group.recv(Rank(0), at(100), 100)
                })?;
                comm.check()
            })()
        };
        if done.is_err() {
            // What it has under way ends; the error stays the one that there was.
            let _ = comm.abort();
        }
        drop(seat.read(&memory, 300));
        done?;
        comm.finish(&wait)
    };
    let mut version = 0;
    once().unwrap();
    let calls = twins::calls(None);
    assert!(calls > 15, "{calls}");
    for status in [1, 3, 6, 8, 77] {
        for call in 1.. {
            twins::fault(&format!("*@{call}={status}"));
            let outcome = once();
            twins::fault("");
            let Err(error) = outcome else {
                // How often it is asked how a call went is a matter of time.
                assert!(call > 12, "call {call} with status {status} was no error");
                break;
            };
            let text = error.to_string();
            assert!(text.contains(&format!("failed: status {status}: ")), "call {call}: {text}");
            assert_eq!(twins::live(), [0, 0], "call {call} with status {status} left something");
            version = call;
        }
    }
    assert!(version > 12);
}

#[test]
fn a_sweep_over_all_calls_finds_each_error_and_no_leak() {
    run("every_call_fails", &[]);
}

#[test]
#[ignore = "run in a process of its own"]
fn nccl_hangs() {
    if !started() {
        return;
    }
    ranks_that_leak(|seat, id| {
        // Neither dropping nor aborting waits for ever.
        let comm = seat.meet(id).unwrap();
        twins::fault("ncclCommAbort@1=hang");
        let began = Instant::now();
        let error = comm.abort().unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::Stalled, "ncclCommAbort did not end within 2.0 s, rank 0")
        );
        assert!(began.elapsed() < limits::NCCL_ABORT * 2);
        assert_eq!(comm.abort().unwrap_err().kind(), ErrorKind::Stalled, "it is still not known to be over");
        drop(comm);
        // Nor where a thread is stuck in a call that should not block.
        let id = Nccl::open().unwrap().unique_id().unwrap();
        let mut comm = seat.meet(id).unwrap();
        let aborter = comm.aborter();
        twins::fault("ncclBroadcast@1=hang");
        let (memory, stream) = (seat.memory(&[0; 10]).address(), seat.stream.handle());
        // SAFETY: the call hangs: nothing is queued.
        thread::spawn(move || unsafe {
            comm.broadcast(Rank(0), [memory; 2], 10, stream, &patient(Instant::now() + LONG))
        });
        while twins::calls(Some("ncclBroadcast")) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let error = aborter.abort().unwrap_err();
        assert_eq!(error.to_string(), "another call of NCCL did not end within 2.0 s, rank 0");
        // The end of a group is no call of one communicator: aborting that is what may free it.
        let id = Nccl::open().unwrap().unique_id().unwrap();
        let mut comm = seat.meet(id).unwrap();
        let aborter = comm.aborter();
        twins::fault("ncclGroupEnd@1=hang");
        // SAFETY: as above.
        thread::spawn(move || unsafe {
            comm.grouped(stream, &patient(Instant::now() + LONG), |group| {
                group.send(Rank(0), memory, 10)?;
                group.recv(Rank(0), memory, 10)
            })
        });
        while twins::calls(Some("ncclGroupEnd")) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        aborter.abort().unwrap();
    });
}

/// One rank, whose communicators nobody can give back.
fn ranks_that_leak(body: impl Fn(&Seat, UniqueId)) {
    twins::load();
    let id = Nccl::open().unwrap().unique_id().unwrap();
    body(&Seat::new(0, 1), id);
}

#[test]
fn nothing_waits_without_a_bound() {
    run("nccl_hangs", &[("SIMCUDA_LEAKS", "ignore"), ("SIMNCCL_LEAKS", "ignore")]);
}

#[test]
#[ignore = "run in a process of its own"]
fn too_old() {
    if started() {
        twins::load();
        assert_eq!(
            super::nccl_version().unwrap_err().to_string(),
            "NCCL too old: expected 2.14.0 or newer, found 2.13.4"
        );
    }
}

#[test]
fn an_nccl_that_is_too_old_is_refused() {
    run("too_old", &[("SIMNCCL_VERSION", "21304")]);
}
