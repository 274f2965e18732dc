//! Processes of several ranks, each with a GPU of the twin of its own.

#![allow(dead_code, reason = "each test uses its own part")]

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::model;

/// A model of 13 MB and rules for it.
pub(crate) struct Model {
    folder: tempfile::TempDir,
    /// A file, or what `--rules` takes besides.
    rules: OsString,
}

impl Model {
    pub(crate) fn new() -> Model {
        let folder = tempfile::tempdir().unwrap();
        model::write(folder.path(), 1);
        let rules = folder.path().join("rules.toml");
        fs::write(&rules, model::RULES).unwrap();
        Model { folder, rules: rules.into() }
    }

    /// A model of random bytes, which is divided as its family is; `write` writes it into a folder.
    pub(crate) fn of_family(write: impl FnOnce(&Path)) -> Model {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        Model { folder, rules: "auto".into() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A command that loads it.
    pub(crate) fn load(&self) -> Command {
        self.command("load")
    }

    fn command(&self, name: &str) -> Command {
        let mut command = twins::cuda::command(env!("CARGO_BIN_EXE_shardlift"));
        command.arg(name).arg(self.path()).arg("--rules").arg(&self.rules).arg("--json");
        command
    }

    /// What `plan` prints.
    pub(crate) fn plan(&self, args: &[&str]) -> Value {
        let output = self.command("plan").args(args).output().unwrap();
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(output.status.success(), "{object:#}");
        object
    }

    /// Digests of all ranks, loaded by one process into host memory.
    pub(crate) fn host_digests(&self, mesh: &[&str]) -> Vec<Value> {
        let output = self.load().args(mesh).arg("--check").output().unwrap();
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(output.status.success(), "{object:#}");
        object["ranks"].as_array().unwrap().iter().map(|rank| rank["digest"].clone()).collect()
    }
}

/// One process for each rank; killed when dropped.
pub(crate) struct Ranks {
    pub(crate) processes: Vec<Child>,
}

/// How a rank ended.
pub(crate) struct Ended {
    pub(crate) status: Option<i32>,
    pub(crate) object: Value,
    pub(crate) after: Duration,
}

impl Ranks {
    /// Starts so many ranks, which meet at a file.
    pub(crate) fn start(model: &Model, count: usize, with: impl Fn(usize, &mut Command)) -> Ranks {
        let meeting = model.path().join("meeting");
        assert!(!meeting.exists(), "left by others");
        let url = format!("file://{}", meeting.display());
        Ranks::alone(model, count, |rank, command| {
            command.args(["--rendezvous", &url]);
            with(rank, command);
        })
    }

    /// Starts so many ranks, which do not meet.
    pub(crate) fn alone(model: &Model, count: usize, with: impl Fn(usize, &mut Command)) -> Ranks {
        let start = |rank: usize| {
            let mut command = model.load();
            command.args(["--rank", &rank.to_string(), "--devices", &format!("cuda:{rank}")]);
            command.envs([("SIMCUDA_LEAKS", "abort"), ("SIMCUDA_DEVICES", "8")]);
            with(rank, &mut command);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        Ranks { processes: (0..count).map(start).collect() }
    }

    /// Waits until all of them read, which a busy machine may take long to come to.
    pub(crate) fn all_read(&self) {
        let reads = |process: &Child| {
            let tasks = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
            let mut names = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
            names.any(|name| name.starts_with("shardlift-read"))
        };
        let began = Instant::now();
        while !self.processes.iter().all(reads) {
            assert!(began.elapsed() < Duration::from_secs(60), "some ranks never read");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the ranks printed, who have all loaded.
    pub(crate) fn loaded(self) -> Vec<Value> {
        let ended = self.ended(Duration::from_secs(120));
        let loaded = |ended: Ended| {
            assert_eq!(ended.status, Some(0), "{:#}", ended.object);
            ended.object
        };
        ended.into_iter().map(loaded).collect()
    }

    /// How all ranks ended, within `bound` of now.
    pub(crate) fn ended(mut self, bound: Duration) -> Vec<Ended> {
        let began = Instant::now();
        let mut ended: Vec<Option<Ended>> = self.processes.iter().map(|_| None).collect();
        while ended.iter().any(Option::is_none) {
            assert!(
                began.elapsed() < bound,
                "some ranks are still there: {:?}",
                ended.iter().map(Option::is_some).collect::<Vec<_>>()
            );
            for (process, ended) in self.processes.iter_mut().zip(&mut ended).filter(|(_, ended)| ended.is_none()) {
                if let Some(status) = process.try_wait().unwrap() {
                    let after = began.elapsed();
                    let output = output(process);
                    let object = serde_json::from_slice(&output.stdout)
                        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&output.stderr).into_owned()));
                    *ended = Some(Ended { status: status.code(), object, after });
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ended.into_iter().flatten().collect()
    }
}

/// What an ended process printed; it is little enough for a pipe.
fn output(process: &mut Child) -> Output {
    use std::io::Read as _;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    process.stdout.as_mut().unwrap().read_to_end(&mut stdout).unwrap();
    process.stderr.as_mut().unwrap().read_to_end(&mut stderr).unwrap();
    Output { status: process.wait().unwrap(), stdout, stderr }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
