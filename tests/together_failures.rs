//! One of several ranks fails in some way at some time: every other rank ends with an error that names it, soon, and nothing
//! is left.
#![cfg(all(feature = "cli", feature = "cuda", target_os = "linux"))]

#[path = "support/loading.rs"]
mod loading;
#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use loading::{Ended, Model, Ranks};
use rustix::process::{Pid, Signal, kill_process};

const COUNT: usize = 4;
const VICTIM: usize = 2;
/// As the flags say; a busy machine gets as long again.
const FAIL_TIMEOUT: Duration = Duration::from_secs(2);
const JOIN_TIMEOUT: &str = "4";
const SLACK: Duration = Duration::from_secs(4);
const LONG: Duration = Duration::from_secs(60);

/// Four ranks that read together, of which the victim gets these flags and settings, too.
fn start(model: &Model, throttle: &str, victim: impl Fn(&mut Command)) -> Ranks {
    start_each(model, throttle, |rank, command| {
        if rank == VICTIM {
            victim(command);
        }
    })
}

/// The same, each with what `with` gives it.
fn start_each(model: &Model, throttle: &str, with: impl Fn(usize, &mut Command)) -> Ranks {
    Ranks::start(model, COUNT, |rank, command| {
        command.args(["--tp", "4", "--cooperate", "always", "--engine", "pread", "--throttle", throttle]);
        command.args(["--fail-timeout", "2", "--join-timeout", JOIN_TIMEOUT]);
        with(rank, command);
    })
}

/// Where rank `victim` ended with an error, all others did so `within` a time, and named it.
fn all_failed(what: &str, ended: &[Ended], within: Duration) {
    for (rank, ended) in ended.iter().enumerate() {
        let object = format!("{what}, rank {rank}: {:?} {:#}", ended.status, ended.object);
        assert_ne!(ended.status, Some(0), "{object}");
        if rank == VICTIM {
            continue;
        }
        assert!(ended.status.is_some(), "the twins found something left or wrong: {object}");
        assert!(ended.after < within, "{object} after {:?}", ended.after);
        let error = &ended.object["error"];
        let message = ["message", "expected", "found"].map(|part| error[part].as_str().unwrap_or_default()).join(" ");
        let names = error["rank"] == VICTIM || message.contains(&format!("rank {VICTIM}"));
        assert!(names, "{object}");
    }
}

/// Nothing of a group is left where others look for it.
fn nothing_is_left(model: &Model) {
    assert!(!model.path().join("meeting").exists());
    let left: Vec<PathBuf> = fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!left.iter().any(|path| path.to_string_lossy().contains("simnccl")), "{left:?}");
}

#[test]
fn a_rank_that_never_starts_is_named() {
    let model = Model::new();
    let mut ranks = start(&model, "1G", |command| {
        command.arg("--help"); // ends at once, without a load
    });
    let began = Instant::now();
    let victim = ranks.processes[VICTIM].wait().unwrap();
    assert_eq!(victim.code(), Some(0));
    let ended = ranks.ended(LONG);
    for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != VICTIM) {
        let message = ended.object["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(&format!("{VICTIM}")), "rank {rank}: {:#}", ended.object);
        assert_eq!(ended.status, Some(1), "rank {rank}: {:#}", ended.object);
    }
    assert!(began.elapsed() < Duration::from_secs(4) + FAIL_TIMEOUT + SLACK);
    nothing_is_left(&model);
}

#[test]
fn calls_that_fail_on_one_rank_are_everybodys_error() {
    calls_fail("");
}

/// Their connections end with the abort of the rank that failed, of which its peers hear before anybody says why.
#[test]
fn an_abort_that_others_hear_of_is_not_what_failed() {
    calls_fail("tell");
}

/// No rank of a node has aborted before all have: none waits for that before it says why.
#[test]
fn an_abort_that_waits_for_others_does_not_keep_them_from_hearing() {
    calls_fail("wait");
}

/// Calls that fail, with an NCCL whose aborts are so.
fn calls_fail(aborts: &str) {
    let model = Model::new();
    for (variable, fault) in [
        ("SIMCUDA_FAULT", "cuMemAlloc_v2@1=2"),
        ("SIMCUDA_FAULT", "cuStreamWaitEvent@1=1"),
        ("SIMCUDA_FAULT", "cuMemcpyHtoDAsync_v2@3=700"),
        ("SIMCUDA_FAULT", "cuEventRecord@6=46"),
        ("SIMCUDA_FAULT", "cuLaunchKernel@2=700"),
        ("SIMNCCL_FAULT", "ncclCommInitRankConfig@1=2"),
        ("SIMNCCL_FAULT", "ncclSend@1=4"),
        ("SIMNCCL_FAULT", "ncclRecv@4=3"),
        ("SIMNCCL_FAULT", "ncclGroupEnd@2=2"),
        ("SIMNCCL_FAULT", "ncclCommFinalize@1=2"),
        // Queued well, and failed when it ran.
        ("SIMNCCL_FAULT", "run:ncclRecv@2=6"),
    ] {
        let ranks = start_each(&model, "100M", |rank, command| {
            command.env("SIMNCCL_ABORT", aborts);
            if rank == VICTIM {
                command.env(variable, fault);
            }
        });
        let ended = ranks.ended(LONG);
        all_failed(fault, &ended, LONG);
        assert!(ended[VICTIM].status.is_some(), "{fault}: the twins found something left or wrong");
        // What failed when it ran is told by whatever was asked next.
        let said = ended[VICTIM].object["error"]["message"].as_str().unwrap_or_default().to_owned();
        let call = fault.split('@').next().unwrap().trim_start_matches("run:");
        let later = said.contains(if variable == "SIMCUDA_FAULT" { "(700)" } else { "NCCL" })
            || fault.starts_with("run:") && said.contains("a test wants this operation to fail");
        assert!(said.contains(call) || later, "{fault}: {said}");
        nothing_is_left(&model);
    }
}

#[test]
fn other_checkpoints_and_flags_of_one_rank_are_told_before_anything_moves() {
    let model = Model::new();
    let other = copy(&model);
    // One tensor has another name: headers differ, sizes do not.
    let file = model_files(other.path()).remove(0);
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.windows(2).position(|bytes| bytes == b"a.").unwrap();
    bytes[at] = b'z';
    fs::write(&file, bytes).unwrap();
    for (what, victim) in [
        ("the header of", &(|command: &mut Command| load_instead(command, other.path())) as &dyn Fn(&mut Command)),
        ("the plan", &|command| {
            command.args(["--skip", "c.whole"]);
        }),
        ("the plan", &|command| {
            command.args(["--dtype", "f32"]);
        }),
    ] {
        let ended = start(&model, "1G", victim).ended(LONG);
        all_failed(what, &ended, LONG);
        for ended in &ended {
            assert!(ended.object["error"].to_string().contains(what), "{what}: {:#}", ended.object);
        }
        nothing_is_left(&model);
    }
}

#[test]
fn a_rank_that_is_killed_or_stopped_is_missed_by_all() {
    let model = Model::new();
    for (signal, when) in [
        (Signal::KILL, Duration::from_millis(300)),
        (Signal::KILL, Duration::from_millis(1200)),
        (Signal::STOP, Duration::from_millis(300)),
        (Signal::STOP, Duration::from_millis(1200)),
    ] {
        // 3 MB of each rank, in 2 seconds.
        let mut ranks = start(&model, "1700K", |_| ());
        thread::sleep(when);
        let victim = Pid::from_child(&ranks.processes[VICTIM]);
        kill_process(victim, signal).unwrap();
        let struck = Instant::now();
        let others: Vec<usize> = (0..COUNT).filter(|rank| *rank != VICTIM).collect();
        while others.iter().any(|&rank| ranks.processes[rank].try_wait().unwrap().is_none()) {
            assert!(struck.elapsed() < FAIL_TIMEOUT + SLACK, "{signal:?} after {when:?}");
            thread::sleep(Duration::from_millis(5));
        }
        if signal == Signal::STOP {
            // It wakes in a world that has given it up.
            kill_process(victim, Signal::CONT).unwrap();
        }
        let ended = ranks.ended(Duration::from_secs(30));
        all_failed(&format!("{signal:?} after {when:?}"), &ended, Duration::from_secs(30));
        nothing_is_left(&model);
    }
}

/// NCCL keeps a thread of a rank when another one dies: it is aborted from elsewhere, and where that does not help given up,
/// with all that it may still touch.
#[test]
fn a_rank_that_nccl_keeps_ends_when_another_fails() {
    let model = Model::new();
    for (call, leaves) in [("ncclSend@3=hang", true), ("ncclGroupEnd@3=hang", false), ("ncclCommAbort@1=hang", true)] {
        let mut ranks = start_each(&model, "1G", |rank, command| {
            if rank == VICTIM && call.starts_with("ncclCommAbort") {
                command.env("SIMNCCL_FAULT", "ncclGroupEnd@3=hang"); // what others have queued waits for it
            }
            if rank == 1 {
                command.env("SIMNCCL_FAULT", call).env("SIMNCCL_LEAKS", "abort");
                if leaves {
                    command.envs([("SIMCUDA_LEAKS", "ignore"), ("SIMNCCL_LEAKS", "ignore")]);
                }
            }
        });
        thread::sleep(Duration::from_millis(1500)); // all wait for the one that is kept
        kill_process(Pid::from_child(&ranks.processes[VICTIM]), Signal::KILL).unwrap();
        let struck = Instant::now();
        while (0..COUNT).any(|rank| ranks.processes[rank].try_wait().unwrap().is_none()) {
            assert!(struck.elapsed() < FAIL_TIMEOUT * 3 + SLACK, "{call}");
            thread::sleep(Duration::from_millis(5));
        }
        all_failed(call, &ranks.ended(LONG), LONG);
        nothing_is_left(&model);
    }
}

#[test]
fn a_cancel_of_one_rank_cancels_all() {
    let model = Model::new();
    let ranks = start(&model, "1700K", |_| ());
    ranks.all_read();
    thread::sleep(Duration::from_millis(200)); // some of it
    kill_process(Pid::from_child(&ranks.processes[VICTIM]), Signal::TERM).unwrap();
    let ended = ranks.ended(FAIL_TIMEOUT + SLACK);
    for (rank, ended) in ended.iter().enumerate() {
        assert_eq!(ended.object["error"]["kind"], "cancelled", "rank {rank}: {:#}", ended.object);
        assert_eq!(ended.status, Some(if rank == VICTIM { 143 } else { 130 }), "rank {rank}");
    }
    nothing_is_left(&model);
}

#[test]
fn a_file_that_ends_early_at_one_rank_fails_all() {
    let model = Model::new();
    let own = copy(&model);
    let ranks = start(&model, "1700K", |command| load_instead(command, own.path()));
    ranks.all_read();
    thread::sleep(Duration::from_millis(200)); // some of it
    for file in model_files(own.path()) {
        fs::OpenOptions::new().write(true).open(file).unwrap().set_len(4096).unwrap();
    }
    let ended = ranks.ended(LONG);
    all_failed("cut short", &ended, LONG);
    let kind = ended[VICTIM].object["error"]["kind"].as_str().unwrap_or_default();
    assert!(["truncated", "changed"].contains(&kind), "{:#}", ended[VICTIM].object);
    nothing_is_left(&model);
}

/// The files of a model, elsewhere.
fn copy(model: &Model) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(model.path()).unwrap().flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn model_files(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect();
    files.sort();
    files
}

/// Makes a command load this folder, with all its flags and settings.
fn load_instead(command: &mut Command, folder: &Path) {
    let mut other = Command::new(command.get_program());
    other.arg("load").arg(folder).args(command.get_args().skip(2));
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
    *command = other;
}
