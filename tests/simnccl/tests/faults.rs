//! Calls and operations that fail or hang on demand, peers that go away, and what is left behind.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of driver and NCCL, whose twins check what they get")]

mod support;

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use support::*;

const BYTES: usize = 1 << 16;

#[test]
#[ignore = "run in a process of its own"]
fn calls_fail() {
    if !started() {
        return;
    }
    load();
    let mut version = 0;
    assert_eq!(ncclGetVersion(&mut version), INVALID_USAGE);
    assert_eq!(ncclGetVersion(&mut version), SUCCESS);
    assert_eq!(version, 23003);
    twins::nccl::fault("ncclCommInitRankConfig@1=3");
    let mut rank = Rank::alone(0, 0, 1);
    let id = new_id();
    assert_eq!(init_later(&mut rank.comm, 1, id, 0), 3);
    assert_eq!((twins::nccl::live(), rank.comm), (0, 0));
    assert_eq!(init_later(&mut rank.comm, 1, id, 0), IN_PROGRESS);
    assert_eq!(settled(rank.comm), SUCCESS);
    // Of a group: none of it is done, and it is over.
    let memory = rank.memory(&[0; BYTES]);
    for fault in ["ncclSend@1=2", "ncclGroupEnd@1=2"] {
        twins::nccl::fault(fault);
        assert_eq!(ncclGroupStart(), SUCCESS);
        ncclSend(memory, 1, BYTE, 0, rank.comm, rank.stream);
        ncclRecv(memory + 1, 1, BYTE, 0, rank.comm, rank.stream);
        assert_eq!(ncclGroupEnd(), 2, "{fault}");
        assert!(rank.is_idle(), "{fault}");
    }
    // What gives back does so even if it is made to fail.
    twins::nccl::fault("ncclCommAbort@1=1");
    assert_eq!(ncclCommAbort(rank.comm), CUDA_ERROR);
    assert_eq!(twins::nccl::live(), 0);
    rank.free(memory);
    rank.synchronize();
    unsafe { cudarc::driver::result::stream::destroy(rank.stream as cudarc::driver::sys::CUstream) }.unwrap();
}

#[test]
fn the_nth_call_fails() {
    let (ledger, _) = run("calls_fail", &[("SIMNCCL_FAULT", "ncclGetVersion@1=5")]);
    assert_eq!(ledger["calls_by_function"]["ncclGetVersion"], 2);
}

/// What rank 1 sees of an operation that goes wrong on rank 0.
#[test]
#[ignore = "run in a process of its own"]
fn operations_fail() {
    if !started() {
        return;
    }
    ranks(2, |rank| {
        let memory = rank.memory(&[rank.rank as u8; BYTES]);
        rank.ok(ncclBroadcast(memory, memory, BYTES, BYTE, 0, rank.comm, rank.stream));
        rank.synchronize();
        if rank.rank == 0 {
            twins::nccl::fault(&setting("SIMNCCL_TEST_RUN"));
            // It may have failed before anybody asks how the call went.
            assert_eq!(ncclSend(memory, BYTES, BYTE, 1, rank.comm, rank.stream), IN_PROGRESS);
        } else {
            rank.ok(ncclRecv(memory, BYTES, BYTE, 0, rank.comm, rank.stream));
        }
        let expected = if rank.rank == 0 { number("SIMNCCL_TEST_EXPECTED") } else { SUCCESS };
        let began = Instant::now();
        while status(rank.comm) != expected && began.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(100));
        assert_eq!(status(rank.comm), expected);
        assert!(!rank.is_idle(), "the stream waits until the communicator is aborted");
        if expected != SUCCESS {
            assert_eq!(ncclSend(memory, 1, BYTE, 1, rank.comm, rank.stream), expected, "nothing works any more");
        }
        rank.free_after_abort(memory);
    });
}

#[test]
fn an_operation_fails_or_hangs_when_it_runs() {
    for (fault, expected) in [("run:ncclSend@1=6", "6"), ("run:ncclSend@1=2", "2"), ("run:ncclSend@1=hang", "0")] {
        let (ledger, _) = run("operations_fail", &[("SIMNCCL_TEST_RUN", fault), ("SIMNCCL_TEST_EXPECTED", expected)]);
        assert_eq!([&ledger["aborted"], &ledger["leaks"]], [2, 0], "{fault}");
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn nobody_comes() {
    if !started() {
        return;
    }
    load();
    let mut rank = Rank::alone(0, 0, 2);
    assert_eq!(init_later(&mut rank.comm, 2, new_id(), 0), IN_PROGRESS);
    thread::sleep(Duration::from_millis(200));
    assert_eq!(status(rank.comm), number::<i32>("SIMNCCL_TEST_EXPECTED"));
    rank.abort();
}

#[test]
fn a_peer_that_never_comes_is_waited_for_until_the_abort() {
    run("nobody_comes", &[("SIMNCCL_TEST_EXPECTED", "7")]);
    run("nobody_comes", &[("SIMNCCL_TEST_EXPECTED", "6"), ("SIMNCCL_TIMEOUT", "50")]);
    run("nobody_comes", &[("SIMNCCL_TEST_EXPECTED", "7"), ("SIMNCCL_FAULT", "ncclCommInitRankConfig@1=hang")]);
}

#[test]
#[ignore = "run in processes of their own"]
fn one_of_three() {
    if !started() {
        return;
    }
    let (id, rank, size) = place();
    let rank = Rank::meet(id, rank, size);
    let memory = rank.memory(&pattern(rank.rank, 0, BYTES));
    rank.ok(ncclBroadcast(memory, memory, BYTES, BYTE, 0, rank.comm, rank.stream));
    rank.synchronize();
    let victim: usize = number("SIMNCCL_TEST_VICTIM");
    if rank.rank == victim {
        // As late as can be: it has taken part once.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    rank.ok(ncclBroadcast(memory, memory, BYTES, BYTE, 1, rank.comm, rank.stream));
    thread::sleep(Duration::from_millis(500));
    assert!(!rank.is_idle() && status(rank.comm) == SUCCESS, "nobody tells that a peer was killed");
    rank.free_after_abort(memory);
}

#[test]
fn a_peer_that_is_killed_is_waited_for_until_the_abort() {
    let before = shared_files().unwrap();
    for victim in [0, 1, 2] {
        let name = victim.to_string();
        let children = processes("one_of_three", 3, |_| vec![("SIMNCCL_TEST_VICTIM", name.as_str())]);
        for (rank, child) in children.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            if rank != victim {
                succeeded("one_of_three", &output);
            }
        }
    }
    assert_eq!(shared_files().unwrap().difference(&before).count(), 0, "a file was left in /dev/shm");
}

fn shared_files() -> io::Result<BTreeSet<String>> {
    let files = fs::read_dir("/dev/shm")?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    files.filter(|name: &io::Result<String>| name.as_ref().is_ok_and(|name| name.contains("nccl"))).collect()
}

/// Rank 0 aborts while rank 1 waits for a message, and rank 2 for nothing.
#[test]
#[ignore = "run in a process of its own"]
fn aborts() {
    if !started() {
        return;
    }
    let (tells, both) = (setting("SIMNCCL_ABORT") == "tell", Barrier::new(3));
    ranks(3, |rank| {
        let memory = rank.memory(&[0; BYTES]);
        if rank.rank == 1 {
            rank.ok(ncclRecv(memory, BYTES, BYTE, 0, rank.comm, rank.stream));
        }
        both.wait();
        let began = Instant::now();
        if rank.rank > 0 {
            thread::sleep(Duration::from_millis(300));
            assert_eq!(status(rank.comm), if tells { REMOTE_ERROR } else { SUCCESS });
            assert!(!tells || last_error().contains("rank 0 has aborted"), "{}", last_error());
            assert_eq!(rank.is_idle(), rank.rank == 2, "the stream waits until the communicator is aborted");
            both.wait();
        } else if tells {
            rank.free_after_abort(memory);
            assert!(began.elapsed() < Duration::from_millis(250));
            both.wait();
            return;
        } else {
            let waiting = thread::scope(|scope| {
                let abort = scope.spawn(|| ncclCommAbort(rank.comm));
                both.wait();
                abort.join().unwrap()
            });
            assert_eq!(waiting, SUCCESS);
            assert!(began.elapsed() >= Duration::from_millis(300), "it waits for the others");
            rank.free_aborted(memory);
            return;
        }
        rank.free_after_abort(memory);
    });
}

#[test]
fn an_abort_is_told_to_peers_or_waits_for_them() {
    for how in ["tell", "wait"] {
        let (ledger, _) = run("aborts", &[("SIMNCCL_ABORT", how)]);
        assert_eq!([&ledger["aborted"], &ledger["leaks"]], [3, 0], "{how}");
    }
}

/// Rank 0 aborts before it has come to where the ranks meet, rank 1 later; rank 2 never comes.
#[test]
#[ignore = "run in a process of its own"]
fn aborts_before_it_meets() {
    if !started() {
        return;
    }
    load();
    let id = new_id();
    let mut first = Rank::alone(0, 0, 3);
    assert_eq!(init_later(&mut first.comm, 3, id, 0), IN_PROGRESS);
    first.abort();
    let mut second = Rank::alone(1, 1, 3);
    assert_eq!(init_later(&mut second.comm, 3, id, 1), IN_PROGRESS);
    thread::sleep(Duration::from_millis(500)); // both have come by then
    second.abort();
}

#[test]
fn who_aborts_while_it_meets_is_not_waited_for() {
    run("aborts_before_it_meets", &[("SIMNCCL_ABORT", "wait"), ("SIMNCCL_JITTER", "200000"), ("SIMNCCL_SEED", "3")]);
}

#[test]
#[ignore = "run in a process of its own"]
fn a_group_does_not_end() {
    if !started() {
        return;
    }
    load();
    let rank = Rank::meet(new_id(), 0, 1);
    let memory = rank.memory(&[0; BYTES]);
    let (comm, stream) = (rank.comm, rank.stream);
    twins::nccl::fault("ncclGroupEnd@1=hang");
    let ended = thread::spawn(move || {
        assert_eq!(ncclGroupStart(), SUCCESS);
        ncclSend(memory, 1, BYTE, 0, comm, stream);
        ncclGroupEnd()
    });
    thread::sleep(Duration::from_millis(300));
    assert!(!ended.is_finished() && rank.is_idle());
    rank.free_after_abort(memory);
    assert_eq!(ended.join().unwrap(), INVALID_USAGE);
}

#[test]
fn the_end_of_a_group_can_hang_until_the_abort() {
    run("a_group_does_not_end", &[]);
}

#[test]
#[ignore = "run in a process of its own"]
fn forgets() {
    if started() {
        ranks(1, drop);
    }
}

#[test]
fn a_communicator_that_is_not_given_back_is_a_leak() {
    let output = process("forgets", &[("SIMCUDA_LEAKS", "ignore")]).output().unwrap();
    succeeded("forgets", &output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("simnccl: LEAK: 1 communicators"), "{output:?}");
    let output = process("forgets", &[("SIMCUDA_LEAKS", "ignore"), ("SIMNCCL_LEAKS", "abort")]).output().unwrap();
    assert!(!output.status.success());
}
