//! What comes when: calls that do not block, groups, operations that wait for their peers, aborting.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of driver and NCCL, whose twins check what they get")]

mod support;

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use support::*;

const BYTES: usize = 1 << 16;

#[test]
#[ignore = "run in a process of its own"]
fn without_blocking() {
    if !started() {
        return;
    }
    load();
    let id = new_id();
    let first = Barrier::new(2);
    thread::scope(|scope| {
        for rank in 0..2 {
            let first = &first;
            scope.spawn(move || {
                let mut this = Rank::alone(rank, rank, 2);
                if rank == 1 {
                    first.wait();
                }
                assert_eq!(init_later(&mut this.comm, 2, id, rank), IN_PROGRESS);
                if rank == 0 {
                    // Nobody else is there: it is not ready, and every use is refused.
                    thread::sleep(Duration::from_millis(50));
                    assert_eq!(status(this.comm), IN_PROGRESS);
                    let mut count = 0;
                    assert_eq!(ncclCommCount(this.comm, &mut count), INVALID_ARGUMENT);
                    assert!(last_error().contains("before the previous operation returned ncclSuccess"));
                    first.wait();
                }
                assert_eq!(settled(this.comm), SUCCESS);
                let memory = this.memory(&pattern(rank, 0, BYTES));
                // The operation is in the stream only once the call has ended: until then the stream has nothing to do.
                assert_eq!(ncclBroadcast(memory, memory, BYTES, BYTE, 0, this.comm, this.stream), IN_PROGRESS);
                assert!(this.is_idle(), "it is launched late");
                assert_eq!(ncclBroadcast(memory, memory, BYTES, BYTE, 0, this.comm, this.stream), INVALID_ARGUMENT);
                assert_eq!(settled(this.comm), SUCCESS);
                this.synchronize();
                assert!(this.read(memory, BYTES) == pattern(0, 0, BYTES));
                this.free(memory);
                this.part();
            });
        }
    });
}

#[test]
fn calls_that_do_not_block_end_later() {
    // Late enough that what follows the call always comes first.
    let (ledger, _) = run("without_blocking", &[("SIMNCCL_JITTER", "500000"), ("SIMNCCL_SEED", "3")]);
    assert_eq!(ledger["operations"]["ncclBroadcast"], 2);
}

#[test]
#[ignore = "run in a process of its own"]
fn face_to_face() {
    if !started() {
        return;
    }
    let both = Barrier::new(2);
    ranks(2, |rank| {
        let peer = 1 - rank.rank as i32;
        let memory = rank.memory(&pattern(rank.rank, 0, 2 * BYTES));
        let to = memory + BYTES as u64;
        // Both send first, without a group: neither is ever taken.
        rank.ok(ncclSend(memory, BYTES, BYTE, peer, rank.comm, rank.stream));
        rank.ok(ncclRecv(to, BYTES, BYTE, peer, rank.comm, rank.stream));
        thread::sleep(Duration::from_millis(100));
        assert!(!rank.is_idle(), "a message was taken that nobody asked for yet");
        both.wait();
        // Somebody else aborts it: then the stream goes on, without the bytes.
        let comm = rank.comm;
        thread::spawn(move || assert_eq!(ncclCommAbort(comm), SUCCESS)).join().unwrap();
        let began = Instant::now();
        rank.synchronize();
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(rank.read(to, BYTES) == pattern(rank.rank, 0, 2 * BYTES)[BYTES..]);
        rank.free(memory);
        let stream = rank.stream as cudarc::driver::sys::CUstream;
        unsafe { cudarc::driver::result::stream::destroy(stream) }.unwrap();
    });
}

#[test]
fn an_abort_by_another_thread_frees_the_stream() {
    let (ledger, _) = run("face_to_face", &[]);
    assert_eq!([&ledger["aborted"], &ledger["leaks"]], [2, 0]);
}

#[test]
#[ignore = "run in a process of its own"]
fn streams_of_one_communicator() {
    if !started() {
        return;
    }
    ranks(2, |rank| {
        let other = Rank::alone(rank.rank, rank.rank, 2);
        let memory = rank.memory(&pattern(rank.rank, 0, BYTES));
        // The second stream's operation comes after the first one's, and so may touch its memory.
        for round in 0..20 {
            let (root, stream) = (round % 2, if round % 2 == 0 { rank.stream } else { other.stream });
            rank.ok(ncclBroadcast(memory, memory, BYTES, BYTE, root, rank.comm, stream));
        }
        other.synchronize();
        rank.synchronize();
        assert!(rank.read(memory, BYTES) == pattern(0, 0, BYTES));
        // Not two of them in one group.
        assert_eq!(ncclGroupStart(), SUCCESS);
        assert_eq!(ncclBroadcast(memory, memory, 1, BYTE, 0, rank.comm, rank.stream), SUCCESS);
        assert_eq!(ncclBroadcast(memory, memory, 1, BYTE, 0, rank.comm, other.stream), SUCCESS);
        assert_eq!(ncclGroupEnd(), IN_PROGRESS);
        assert_eq!(settled(rank.comm), INVALID_USAGE);
        rank.free(memory);
        unsafe { cudarc::driver::result::stream::destroy(other.stream as cudarc::driver::sys::CUstream) }.unwrap();
        rank.abort();
    });
}

#[test]
fn operations_of_a_communicator_are_ordered_across_streams() {
    for seed in ["1", "2"] {
        run("streams_of_one_communicator", &[("SIMCUDA_SEED", seed), ("SIMCUDA_JITTER", "3000")]);
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn in_a_group_that_failed() {
    if !started() {
        return;
    }
    ranks(2, |rank| {
        let memory = rank.memory(&[1; 100]);
        assert_eq!(ncclGroupStart(), SUCCESS);
        assert_eq!(ncclBroadcast(memory, memory, 100, BYTE, 0, rank.comm, rank.stream), SUCCESS);
        assert_eq!(ncclSend(memory, 100, BYTE, 7, rank.comm, rank.stream), INVALID_ARGUMENT);
        assert_eq!(ncclGroupEnd(), INVALID_ARGUMENT, "nothing of it is done");
        assert!(rank.is_idle());
        // The group is over, the communicator as it was.
        rank.ok(ncclBroadcast(memory, memory, 100, BYTE, 0, rank.comm, rank.stream));
        for (status, expected) in [
            (ncclSend(0, 1, BYTE, 0, rank.comm, rank.stream), INVALID_ARGUMENT),
            (ncclSend(memory, 1, 99, 0, rank.comm, rank.stream), INVALID_ARGUMENT),
            (ncclSend(memory, usize::MAX, FLOAT, 0, rank.comm, rank.stream), INVALID_ARGUMENT),
            (ncclSend(memory, 1, BYTE, 0, 77, rank.stream), INVALID_ARGUMENT),
        ] {
            assert_eq!(status, expected);
        }
        rank.synchronize();
        rank.free(memory);
        rank.part();
    });
}

#[test]
fn a_group_with_a_bad_call_does_nothing() {
    let (ledger, _) = run("in_a_group_that_failed", &[]);
    assert_eq!(ledger["operations"], serde_json::json!({"ncclBroadcast": 2}));
}

#[test]
#[ignore = "run in a process of its own"]
fn on_one_gpu() {
    if !started() {
        return;
    }
    load();
    let id = new_id();
    thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let mut this = Rank::alone(0, rank, 2);
                assert_eq!(init_later(&mut this.comm, 2, id, rank), IN_PROGRESS);
                let expected: i32 = number("SIMNCCL_TEST_EXPECTED");
                assert_eq!(settled(this.comm), expected, "{}", last_error());
                this.abort();
            });
        }
    });
}

#[test]
fn several_ranks_on_a_gpu_only_if_nccl_is_told_so() {
    let usage = INVALID_USAGE.to_string();
    for (version, enabled, expected) in
        [("23003", "0", usage.as_str()), ("23003", "1", "0"), ("22809", "1", usage.as_str())]
    {
        run(
            "on_one_gpu",
            &[
                ("SIMNCCL_VERSION", version),
                ("NCCL_MULTI_RANK_GPU_ENABLE", enabled),
                ("SIMNCCL_TEST_EXPECTED", expected),
            ],
        );
    }
}
