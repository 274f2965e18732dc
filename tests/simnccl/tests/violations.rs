//! Each defect that NCCL answers with wrong bytes or a hang, in a process of its own: it must abort and name the call.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of driver and NCCL, whose twins check what they get")]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use cudarc::driver::{CudaContext, result};
use support::*;

/// A defect, the twin that sees it, the call that must be named, and what is said about it.
struct Case {
    name: &'static str,
    twin: &'static str,
    call: &'static str,
    says: &'static str,
    run: fn(&Rank, u64),
}

const BYTES: usize = 4096;

#[rustfmt::skip]
const CASES: &[Case] = &[
    Case { name: "counts of a broadcast", twin: "simnccl", call: "ncclBroadcast", says: "Broadcast with 11",
        run: |r, m| { ncclBroadcast(m, m, 10 + r.rank, BYTE, 0, r.comm, r.stream); } },
    Case { name: "roots of a broadcast", twin: "simnccl", call: "ncclBroadcast", says: "root 1",
        run: |r, m| { ncclBroadcast(m, m, 10, BYTE, r.rank as i32, r.comm, r.stream); } },
    Case { name: "kinds of a collective", twin: "simnccl", call: "nccl", says: "AllGather",
        run: |r, m| {
            if r.rank == 0 { ncclBroadcast(m, m, 10, BYTE, 0, r.comm, r.stream) } else { thread::sleep(Duration::from_millis(100)); ncclAllGather(m, m + 100, 10, BYTE, r.comm, r.stream) };
        } },
    Case { name: "sizes of a message", twin: "simnccl", call: "ncclRecv", says: "receives 11 bytes from rank 0, which sends 10",
        run: |r, m| {
            if r.rank == 0 { ncclSend(m, 10, BYTE, 1, r.comm, r.stream) } else { ncclRecv(m, 11, BYTE, 0, r.comm, r.stream) };
        } },
    Case { name: "order within a group", twin: "simnccl", call: "ncclBroadcast", says: "two operations of one group touch",
        run: |r, m| {
            ncclGroupStart();
            (0..2).for_each(|root| { ncclBroadcast(m, m, 10, BYTE, root, r.comm, r.stream); });
            ncclGroupEnd();
        } },
    Case { name: "destroyed communicator", twin: "simnccl", call: "ncclCommCount", says: "was destroyed or aborted",
        run: |r, _| { ncclCommAbort(r.comm); let mut count = 0; ncclCommCount(r.comm, &mut count); } },
    Case { name: "aborted twice", twin: "simnccl", call: "ncclCommAbort", says: "was destroyed or aborted",
        run: |r, _| { ncclCommAbort(r.comm); ncclCommAbort(r.comm); } },
    Case { name: "two threads at once", twin: "simnccl", call: "ncclCommGetAsyncError", says: "two threads are in one communicator",
        run: |r, _| {
            let comm = r.comm;
            // It waits for the other rank to do the same.
            if r.rank == 0 { thread::spawn(move || ncclCommDestroy(comm)); }
            thread::sleep(Duration::from_millis(100));
            if r.rank == 0 { status(comm); }
        } },
    Case { name: "memory given back too early", twin: "simcuda", call: "cuMemFreeAsync", says: "another stream still touches",
        run: |r, _| unsafe {
            let memory = result::malloc_async(r.stream as _, BYTES).unwrap();
            let other = Rank::alone(r.rank, 0, 1);
            r.synchronize();
            if r.rank == 0 {
                ncclBroadcast(memory, memory, BYTES, BYTE, 0, r.comm, r.stream);
                settled(r.comm);
                result::free_async(memory, other.stream as _).unwrap();
                other.synchronize();
            }
            thread::sleep(Duration::from_millis(200));
        } },
    Case { name: "memory that was given back", twin: "simcuda", call: "ncclSend", says: "gave back",
        run: |r, m| { r.free(m); ncclSend(m, 10, BYTE, 1 - r.rank as i32, r.comm, r.stream); } },
    Case { name: "past the end", twin: "simcuda", call: "ncclRecv", says: "outside every allocation",
        run: |r, m| { ncclRecv(m + 1, BYTES, BYTE, 1 - r.rank as i32, r.comm, r.stream); } },
    Case { name: "memory of another device", twin: "simcuda", call: "ncclSend", says: "another device",
        run: |r, _| {
            let context = CudaContext::new(2 + r.rank).unwrap();
            context.bind_to_thread().unwrap();
            let foreign = unsafe { result::malloc_sync(BYTES) }.unwrap();
            ncclSend(foreign, 10, BYTE, 1 - r.rank as i32, r.comm, r.stream);
            std::mem::forget(context);
        } },
    Case { name: "written meanwhile", twin: "simcuda", call: "cuMemsetD8Async", says: "without an event between them",
        run: |r, m| {
            let other = Rank::alone(r.rank, 0, 1);
            if r.rank == 0 {
                ncclSend(m, 10, BYTE, 1, r.comm, r.stream);
                settled(r.comm);
                unsafe { result::memset_d8_async(m, 1, 10, other.stream as _) }.unwrap();
            }
        } },
];

/// Not a test: what the processes below run.
#[test]
#[ignore = "run by the tests below, in a process that must die"]
fn defect() {
    if started() {
        let name = setting("SIMNCCL_TEST_DEFECT");
        let case = CASES.iter().find(|case| case.name == name).unwrap();
        ranks(2, |rank| {
            let memory = rank.memory(&[0; BYTES]);
            (case.run)(&rank, memory);
            thread::sleep(Duration::from_millis(500));
            std::process::exit(0);
        });
    }
}

fn defective(case: &Case, settings: &[(&str, &str)]) -> (std::process::ExitStatus, String) {
    let mut command = process("defect", &[("SIMNCCL_TEST_DEFECT", case.name)]);
    command.envs([("SIMCUDA_LEAKS", "ignore"), ("SIMNCCL_LEAKS", "ignore"), ("SIMCUDA_JITTER", "100000")]);
    let output = command.envs(settings.iter().copied()).output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn each_defect_aborts_with_the_name_of_its_call() {
    for case in CASES {
        let (status, stderr) = defective(case, &[]);
        let expected = format!("{}: VIOLATION {}", case.twin, case.call);
        let line = stderr.lines().find(|line| line.contains("VIOLATION")).unwrap_or("no violation");
        assert!(line.contains(&expected) && line.contains(case.says), "{}: {line}\n{stderr}", case.name);
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{}: {status}", case.name);
    }
}

#[test]
fn without_strict_a_violation_is_only_said() {
    let (status, stderr) = defective(&CASES[0], &[("SIMNCCL_STRICT", "0")]);
    assert!(stderr.contains("simnccl: VIOLATION ncclBroadcast: ") && status.success(), "{status} {stderr}");
}
