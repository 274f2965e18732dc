//! The model of the links between ranks: when operations end in its own time, and what comes after them.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of driver and NCCL, whose twins check what they get")]

mod support;

use cudarc::driver::result::event;
use cudarc::driver::{result, sys};
use serde_json::Value;
use support::*;

/// Bytes per second of each link, and of each device's link to the host.
const LINK: f64 = 100e6;
const HOST: f64 = 50e6;
const BYTES: usize = 2_000_000;

/// What all ranks do between two events of each, and how long it may take there at least.
type Body = fn(&Rank, u64);

const CASES: [(&str, Body, f64); 5] = [
    ("broadcast", |rank, memory| rank.ok(ncclBroadcast(memory, memory, BYTES, BYTE, 0, rank.comm, rank.stream)), 1.0),
    (
        "all-gather",
        |rank, memory| {
            rank.ok(ncclAllGather(memory + (rank.rank * BYTES) as u64, memory, BYTES, BYTE, rank.comm, rank.stream))
        },
        3.0,
    ),
    (
        "one to all",
        |rank, memory| {
            // The link of rank 0 is what takes the time.
            assert_eq!(ncclGroupStart(), SUCCESS);
            for peer in 1..rank.size {
                match rank.rank {
                    0 => ncclSend(memory, BYTES, BYTE, peer as i32, rank.comm, rank.stream),
                    this if this == peer => ncclRecv(memory, BYTES, BYTE, 0, rank.comm, rank.stream),
                    _ => SUCCESS,
                };
            }
            rank.ok(ncclGroupEnd());
        },
        3.0,
    ),
    (
        "all to all",
        |rank, memory| {
            // All links at once, both ways.
            assert_eq!(ncclGroupStart(), SUCCESS);
            for peer in (0..rank.size).filter(|peer| *peer != rank.rank) {
                let to = memory + ((1 + peer) * BYTES) as u64;
                assert_eq!(ncclSend(memory, BYTES, BYTE, peer as i32, rank.comm, rank.stream), SUCCESS);
                assert_eq!(ncclRecv(to, BYTES, BYTE, peer as i32, rank.comm, rank.stream), SUCCESS);
            }
            rank.ok(ncclGroupEnd());
        },
        3.0,
    ),
    (
        "a copy, a broadcast, a copy",
        |rank, memory| {
            // Only rank 0 has something to wait for, and all wait for it: copies take the host's link, twice the time.
            let copy = |pinned: *mut std::ffi::c_void| unsafe {
                sys::cuMemcpyHtoDAsync_v2(memory, pinned, BYTES, rank.stream as _).result().unwrap();
            };
            let pinned = unsafe { result::malloc_host(BYTES, 0) }.unwrap();
            if rank.rank == 0 {
                copy(pinned);
            }
            rank.ok(ncclBroadcast(memory, memory, BYTES, BYTE, 0, rank.comm, rank.stream));
            copy(pinned);
            rank.synchronize();
            unsafe { result::free_host(pinned) }.unwrap();
        },
        2.0 + 1.0 + 2.0,
    ),
];

#[test]
#[ignore = "run in a process of its own"]
fn timed() {
    if !started() {
        return;
    }
    let name = setting("SIMNCCL_TEST_CASE");
    let (_, body, expected) = CASES.iter().find(|(case, ..)| *case == name).unwrap();
    let together = std::sync::Barrier::new(4);
    ranks(4, |rank| {
        let memory = rank.memory(&vec![1; 5 * BYTES]);
        let events = [(); 2].map(|()| event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap());
        together.wait();
        if rank.rank == 0 {
            twins::cuda::reset_counts();
        }
        together.wait();
        event_record(events[0], &rank);
        body(&rank, memory);
        event_record(events[1], &rank);
        rank.synchronize();
        let seconds = f64::from(unsafe { event::elapsed(events[0], events[1]) }.unwrap()) / 1e3;
        let link = BYTES as f64 / LINK;
        if !name.starts_with("one") || rank.rank == 0 {
            // Calls come some time after the first event; on a busy machine that may be long.
            assert!(seconds > expected * link * 0.95, "{name}: {seconds} s, {} links expected", expected);
            assert!(seconds < expected * link + 0.2, "{name}: {seconds} s, {} links expected", expected);
        }
        events.into_iter().for_each(|made| unsafe { event::destroy(made) }.unwrap());
        rank.free(memory);
        rank.part();
    });
}

fn event_record(event: sys::CUevent, rank: &Rank) {
    unsafe { cudarc::driver::result::event::record(event, rank.stream as _) }.unwrap();
}

#[test]
fn operations_take_what_their_links_take() {
    let (link, host) = ((LINK / 1e9).to_string(), (HOST / 1e9).to_string());
    for (name, _, expected) in &CASES {
        let settings = [("SIMNCCL_LINK", link.as_str()), ("SIMCUDA_LINK", &host), ("SIMNCCL_TEST_CASE", name)];
        // The best of three: other tests take the machine's cores meanwhile.
        let span = || {
            let (_, cuda): (Value, Value) = run("timed", &settings);
            let at = |field: &str| cuda[field].as_f64().unwrap();
            (at("last_copy_end_ns") - at("first_copy_start_ns")) / 1e9
        };
        let took = (0..3).map(|_| span()).fold(f64::MAX, f64::min);
        let exact = expected * BYTES as f64 / LINK;
        assert!(took > exact * 0.99 && took < exact * 1.15, "{name}: {took} s in the model's time, {exact} s expected");
    }
}
