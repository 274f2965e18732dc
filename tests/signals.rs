//! Ctrl-C, SIGTERM and a terminal that is gone while the command line moves bytes: drained, nothing left behind, and the exit
//! status says which.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// 16 MiB in 8 tensors: at 1 MiB a second the signal comes long before the end.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..2u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let view = || safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![1024, 2048], &bytes).unwrap();
    let tensors: Vec<_> = (0..8).map(|i| (format!("tensor.{i}"), view())).collect();
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
    command.args(args).args(["--rules", "replicate", "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The same as what a shell starts after `before`.
fn start_after(before: &str, args: &[&str]) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{before}; exec \"$@\""), "sh", env!("CARGO_BIN_EXE_shardlift")]);
    command.args(args).args(["--rules", "replicate", "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the command reads: its handlers are installed by then.
fn wait_for_reads(child: &Child) {
    wait_for_thread(child, "shardlift-read");
}

/// Waits until the command has a thread whose name begins so.
fn wait_for_thread(child: &Child, name: &str) {
    let began = Instant::now();
    let found = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).ok()?;
        let mut names = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.find(|found| found.starts_with(name))
    };
    while found().is_none() {
        if began.elapsed() > Duration::from_secs(20) {
            kill_process(Pid::from_child(child), Signal::KILL).unwrap();
            panic!("no thread {name}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Signals the command so often until it ends, more than a second apart; its exit status and its object.
fn end_after(mut child: Child, signal: Signal, times: u32) -> (Option<i32>, Value) {
    for _ in 0..times {
        kill_process(Pid::from_child(&child), signal).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(1500) {
            if child.try_wait().unwrap().is_some() {
                let output = child.wait_with_output().unwrap();
                let object = serde_json::from_slice(&output.stdout).unwrap_or_default();
                return (output.status.code(), object);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("not ended by {times} signals");
}

fn fifo(folder: &Path) -> String {
    let fifo = folder.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path(&fifo).to_owned()
}

/// Signals the command once it reads, and returns its exit status, its object, and how long it took to end.
fn end(child: Child, signal: Signal) -> (i32, Value, Duration) {
    wait_for_reads(&child);
    kill_process(Pid::from_child(&child), signal).unwrap();
    let began = Instant::now();
    let output = child.wait_with_output().unwrap();
    let took = began.elapsed();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap(), took)
}

#[test]
fn a_load_is_cancelled() {
    let folder = model();
    let path = folder.path().to_str().unwrap();
    for (number, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        for engine in ["pread", "mmap", "uring"] {
            for devices in ["host", "host:staged"] {
                let args = ["load", path, "--tp", "2", "--engine", engine, "--devices", devices, "--throttle", "1M"];
                let trace = folder.path().join("trace.json");
                let args = [&args[..], &["--trace", trace.to_str().unwrap(), "--repeat", "2"]].concat();
                let (code, object, took) = end(start(&args), number);
                assert_eq!((code, &object["error"]["kind"]), (status, &Value::from("cancelled")), "{object}");
                assert!(took < Duration::from_secs(1), "{engine} {devices}: {took:?}");
                let events: Vec<Value> = serde_json::from_slice(&fs::read(&trace).unwrap()).unwrap();
                assert!(events.iter().any(|event| event["name"] == "allocate"), "what was done is told: {events:?}");
            }
        }
    }
}

#[test]
fn a_reshard_is_cancelled_and_leaves_nothing() {
    let folder = model();
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().join("out");
    for (number, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        // Reshard has no throttle: a machine that is done before the signal tries again with more ranks.
        let mut cancelled = false;
        for ranks in ["16", "64"] {
            let child = start(&["reshard", path(folder.path()), path(&out), "--dp", ranks, "--force"]);
            while fs::read_dir(outside.path()).unwrap().next().is_none() {
                thread::sleep(Duration::from_millis(1));
            }
            kill_process(Pid::from_child(&child), number).unwrap();
            let output = child.wait_with_output().unwrap();
            if output.status.success() {
                fs::remove_dir_all(&out).unwrap();
                continue;
            }
            let object: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(object["error"]["kind"], "cancelled", "{object}");
            assert_eq!(output.status.code(), Some(status));
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "nothing is left behind");
            cancelled = true;
            break;
        }
        assert!(cancelled, "the signal never came in time");
    }
}

/// As under nohup.
#[test]
fn a_hangup_that_is_ignored_stays_ignored() {
    let folder = model();
    let child = start_after("trap '' HUP", &["load", path(folder.path()), "--throttle", "1M"]);
    wait_for_reads(&child);
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    thread::sleep(Duration::from_millis(100));
    let (code, object, _) = end(child, Signal::TERM);
    assert_eq!((code, &object["error"]["kind"]), (143, &Value::from("cancelled")), "{object}");
}

/// `ulimit -f` ends a process that writes beyond it, unless it ignores the signal.
#[test]
fn a_limit_of_file_sizes_is_an_error_that_leaves_nothing() {
    let folder = model();
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().join("out");
    let child = start_after("ulimit -f 64", &["reshard", path(folder.path()), path(&out)]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["error"]["kind"], "io", "{object}");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_trace_that_nobody_reads_keeps_no_load() {
    let folder = model();
    let child = start(&["load", path(folder.path()), "--trace", &fifo(folder.path())]);
    wait_for_thread(&child, "shardlift-signa");
    // Sooner it would not wait for a reader yet, and end all the same.
    thread::sleep(Duration::from_millis(300));
    let (code, object) = end_after(child, Signal::INT, 1);
    assert_eq!((code, &object["error"]["kind"]), (Some(130), &Value::from("cancelled")), "{object}");
}

/// It waits where nothing cancels it, and others would have to hear of a signal first.
#[test]
fn a_second_signal_ends_the_process_with_an_object() {
    let folder = model();
    let meet = format!("file://{}", path(&folder.path().join("meet")));
    let (fifo, args) = (fifo(folder.path()), ["load", path(folder.path()), "--rank", "0", "--rendezvous", &meet]);
    let child = start(&[&args[..], &["--doctor", &fifo]].concat());
    wait_for_thread(&child, "shardlift-signa");
    thread::sleep(Duration::from_millis(300));
    let (code, object) = end_after(child, Signal::TERM, 10);
    assert_eq!((code, &object["error"]["kind"]), (Some(143), &Value::from("cancelled")), "{object}");
}

#[test]
fn an_output_that_nobody_reads_keeps_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [0u8];
    let view = || safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![1], &bytes).unwrap();
    // More than a pipe holds.
    let tensors = (0..4000).map(|i| (format!("{i:0100}"), view()));
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
    command.arg("inspect").arg(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    wait_for_thread(&child, "shardlift-signa");
    thread::sleep(Duration::from_millis(500)); // it comes to where nobody reads
    let (code, _) = end_after(child, Signal::TERM, 5);
    assert_eq!(code, Some(143));
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
