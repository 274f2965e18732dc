//! Bytes between ranks that are threads, and ranks that are processes.

mod support;

use support::*;

const BYTES: usize = 300_001;

/// Every operation, and what it must leave behind.
fn exchange(rank: &Rank) {
    let (me, size) = (rank.rank, rank.size);
    // Broadcasts, from each root in turn, in place and not.
    for root in 0..size {
        let own = rank.memory(&pattern(me, root, BYTES));
        rank.ok(ncclBroadcast(own, own, BYTES, BYTE, root as i32, rank.comm, rank.stream));
        let other = rank.memory(&vec![0; BYTES]);
        let from = if me == root { own } else { 0 };
        rank.ok(ncclBroadcast(from, other, BYTES, BYTE, root as i32, rank.comm, rank.stream));
        rank.synchronize();
        let expected = pattern(root, root, BYTES);
        assert!(rank.read(own, BYTES) == expected && rank.read(other, BYTES) == expected, "rank {me}, root {root}");
        [own, other].into_iter().for_each(|memory| rank.free(memory));
    }
    // All-gather, in place and not.
    let whole: Vec<u8> = (0..size).flat_map(|rank| pattern(rank, 9, BYTES)).collect();
    let parts = rank.memory(&vec![0; size * BYTES]);
    let part = rank.memory(&pattern(me, 9, BYTES));
    rank.ok(ncclAllGather(part, parts, BYTES, BYTE, rank.comm, rank.stream));
    rank.synchronize();
    assert!(rank.read(parts, size * BYTES) == whole, "rank {me}");
    rank.ok(ncclAllGather(parts + (me * BYTES) as u64, parts, BYTES, BYTE, rank.comm, rank.stream));
    rank.synchronize();
    assert!(rank.read(parts, size * BYTES) == whole, "rank {me}");
    // Everybody sends everybody two blocks, itself too: in one group, receives first.
    let from = rank.memory(&(0..2 * size).flat_map(|block| pattern(me, block, BYTES)).collect::<Vec<_>>());
    let to = rank.memory(&vec![0; 2 * size * BYTES]);
    let at = |base: u64, block: usize| base + (block * BYTES) as u64;
    assert_eq!(ncclGroupStart(), SUCCESS);
    for block in 0..2 * size {
        assert_eq!(ncclRecv(at(to, block), BYTES, BYTE, (block / 2) as i32, rank.comm, rank.stream), SUCCESS);
    }
    for block in 0..2 * size {
        assert_eq!(ncclSend(at(from, block), BYTES, BYTE, (block / 2) as i32, rank.comm, rank.stream), SUCCESS);
    }
    rank.ok(ncclGroupEnd());
    rank.synchronize();
    for block in 0..2 * size {
        let expected = pattern(block / 2, 2 * me + block % 2, BYTES);
        assert!(rank.read(at(to, block), BYTES) == expected, "rank {me}, block {block}");
    }
    // A sum, in place.
    let ones: Vec<u8> = [me as f32 + 1.0, 0.5].iter().flat_map(|value| value.to_le_bytes()).collect();
    let sum = rank.memory(&ones);
    rank.ok(ncclAllReduce(sum, sum, 2, FLOAT, 0, rank.comm, rank.stream));
    // Nothing at all is an operation, too.
    rank.ok(ncclBroadcast(0, 0, 0, BYTE, 0, rank.comm, rank.stream));
    rank.synchronize();
    let expected = [(size * (size + 1) / 2) as f32, 0.5 * size as f32];
    assert_eq!(rank.read(sum, 8), expected.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>());
    [parts, part, from, to, sum].into_iter().for_each(|memory| rank.free(memory));
}

#[test]
#[ignore = "run in a process of its own"]
fn as_threads() {
    if started() {
        ranks(number("SIMNCCL_TEST_SIZE"), |rank| {
            exchange(&rank);
            rank.part();
        });
    }
}

#[test]
#[ignore = "run in processes of their own"]
fn as_processes() {
    if started() {
        let (id, rank, size) = place();
        let rank = Rank::meet(id, rank, size);
        exchange(&rank);
        rank.part();
    }
}

#[test]
fn bytes_are_exact_between_threads() {
    for size in ["1", "2", "4", "8"] {
        let (ledger, _) = run("as_threads", &[("SIMNCCL_TEST_SIZE", size)]);
        assert_eq!((ledger["leaks"].as_u64(), ledger["violations"].as_array().unwrap().len()), (Some(0), 0));
    }
}

#[test]
fn bytes_are_exact_between_processes() {
    for size in [2, 4, 8] {
        for child in processes("as_processes", size, |_| vec![]) {
            succeeded("as_processes", &child.wait_with_output().unwrap());
        }
    }
}

/// One rank of two, on the only device that its process sees.
#[test]
#[ignore = "run in processes of their own"]
fn on_what_is_visible() {
    if started() {
        let (id, rank, size) = place();
        let mut this = Rank::alone(0, rank, size);
        assert_eq!(init_later(&mut this.comm, size, id, rank), IN_PROGRESS);
        let expected: i32 = number("SIMNCCL_TEST_EXPECTED");
        assert_eq!(settled(this.comm), expected, "{}", last_error());
        if expected == SUCCESS { this.part() } else { this.abort() }
    }
}

#[test]
fn processes_that_see_one_device_each_may_share_it_or_not() {
    for (visible, expected) in [(["3", "5"], "0"), (["3", "3"], "5")] {
        let children = processes("on_what_is_visible", 2, |rank| {
            vec![("SIMCUDA_VISIBLE", visible[rank]), ("SIMNCCL_TEST_EXPECTED", expected)]
        });
        for child in children {
            succeeded("on_what_is_visible", &child.wait_with_output().unwrap());
        }
    }
}

#[test]
#[ignore = "run in a process of its own"]
fn counted() {
    if started() {
        ranks(4, |rank| {
            let memory = rank.memory(&[5; 4000]);
            rank.ok(ncclBroadcast(memory, memory, 1000, BYTE, 1, rank.comm, rank.stream));
            rank.ok(ncclAllGather(memory + 1000 * rank.rank as u64, memory, 1000, BYTE, rank.comm, rank.stream));
            let (next, previous) = ((rank.rank + 1) % 4, (rank.rank + 3) % 4);
            assert_eq!(ncclGroupStart(), SUCCESS);
            assert_eq!(ncclSend(memory, 100, BYTE, next as i32, rank.comm, rank.stream), SUCCESS);
            assert_eq!(ncclRecv(memory + 200, 100, BYTE, previous as i32, rank.comm, rank.stream), SUCCESS);
            rank.ok(ncclGroupEnd());
            rank.synchronize();
            rank.free(memory);
            rank.part();
        });
        assert_eq!(twins::nccl::calls(Some("ncclBroadcast")), 4);
        assert_eq!((twins::nccl::bytes(1, 0), twins::nccl::bytes(1, 1)), (3000 + 100, 1000 + 3000 + 100));
        assert_eq!((twins::nccl::live(), twins::nccl::violations()), (0, 0));
    }
}

#[test]
fn the_ledger_counts_what_goes_over_links() {
    let (ledger, _) = run("counted", &[]);
    let of = |device: usize, what: &str| ledger["devices"][device][what].as_u64().unwrap();
    // The root of the broadcast is rank 1, the last of its ring rank 0.
    assert_eq!([of(0, "received_bytes"), of(0, "sent_bytes")], [1000 + 3000 + 100, 3000 + 100]);
    assert_eq!([of(1, "received_bytes"), of(1, "sent_bytes")], [3000 + 100, 1000 + 3000 + 100]);
    assert_eq!(ledger["operations"]["ncclSend"], 4);
    assert_eq!([&ledger["created"], &ledger["destroyed"], &ledger["aborted"], &ledger["leaks"]], [4, 4, 0, 0]);
}

#[test]
#[ignore = "run in a process of its own"]
fn of_one_thread() {
    if !started() {
        return;
    }
    load();
    // Communicators whose calls block: made by one thread, used by it in groups.
    let ranks: Vec<Rank> = (0..3).map(|rank| Rank::alone(rank, rank, 3)).collect();
    let mut comms = [0; 3];
    assert_eq!(ncclCommInitAll(comms.as_mut_ptr(), 3, std::ptr::null()), SUCCESS, "{}", last_error());
    for (at, comm) in comms.iter().enumerate() {
        let (mut count, mut rank, mut device) = (0, 0, 0);
        assert_eq!(ncclCommCount(*comm, &mut count), SUCCESS);
        assert_eq!(ncclCommUserRank(*comm, &mut rank), SUCCESS);
        assert_eq!(ncclCommCuDevice(*comm, &mut device), SUCCESS);
        assert_eq!((count, rank, device), (3, at as i32, at as i32));
    }
    let memories: Vec<u64> = ranks.iter().map(|rank| rank.memory(&pattern(rank.rank, 0, BYTES))).collect();
    assert_eq!(ncclGroupStart(), SUCCESS);
    for (rank, (comm, memory)) in ranks.iter().zip(comms.iter().zip(&memories)) {
        assert_eq!(ncclBroadcast(*memory, *memory, BYTES, BYTE, 2, *comm, rank.stream), SUCCESS);
    }
    assert_eq!(ncclGroupEnd(), SUCCESS);
    assert_eq!(ncclGroupEnd(), INVALID_USAGE, "there is no group");
    for (rank, memory) in ranks.iter().zip(&memories) {
        rank.synchronize();
        assert!(rank.read(*memory, BYTES) == pattern(2, 0, BYTES));
        rank.free(*memory);
    }
    for (mut rank, comm) in ranks.into_iter().zip(comms) {
        rank.comm = comm;
        rank.abort();
    }
}

#[test]
fn one_thread_may_have_all_ranks() {
    let (ledger, _) = run("of_one_thread", &[]);
    assert_eq!(ledger["aborted"], 3);
}
