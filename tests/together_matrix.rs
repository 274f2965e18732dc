//! Every way in which one of several ranks can fail, at every time of a load: the others end with an error that names it and
//! says what it said, within the fail-timeout, and give everything back. Ranks are processes, which load again and again.
//!
//! | | before all have met | while they load | while others wait for the end |
//! |---|---|---|---|
//! | a read fails | a | every read | `at_the_end` |
//! | a call of the driver fails | a | every function: its first two calls, one in the middle, the last | `at_the_end`, `check` |
//! | a call of NCCL fails | a | the same | the last rounds, parting |
//! | NCCL fails when an operation runs | a | every operation | parting |
//! | SIGKILL | `struck` | every read, and between calls | `struck` |
//! | SIGSTOP | `struck` | some reads, and between calls | `struck` |
//! | never started, never loads | `struck` | `struck` | b |
//! | another checkpoint | c | cut short at some read | changed at the last one |
//! | an abort that peers hear of, or that waits for theirs | | a few calls and operations | |
//! | other flags | other ranks, session or timeout: `tests/launch.rs` | c | d |
//!
//! - a: whoever has not joined speaks to nobody: the others miss a rank that never came. What fails between joining and
//!   loading is among the first calls of the driver here.
//! - b: whoever waits for the end waits for a rank that loads, however slow; one that goes is `struck`.
//! - c: is told when ranks compare what they load, before anything moves: here, and on the command line in
//!   `tests/together_failures.rs`.
//! - d: what differs then has differed before.
#![cfg(all(feature = "cli", feature = "cuda", target_os = "linux"))]

#[path = "support/driver_calls.rs"]
mod driver_calls;
#[path = "support/rank_loads.rs"]
mod rank_loads;
#[path = "support/ranks.rs"]
mod ranks;
#[path = "support/team.rs"]
mod team;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use driver_calls::{ASKED_OFTEN, QUIET};
use rank_loads::{Counts, counts};
use ranks::{Answer, Setup, tell_all};
use rustix::process::Signal;
use team::{COUNT, LONG, Team};

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    rank_loads::run();
}

/// Rank 0 is the one that all others speak to.
const VICTIMS: [usize; 2] = [0, 2];

/// With timeouts in which a load passes on the busiest machine.
fn setup() -> Setup {
    Setup { fail_timeout: Duration::from_millis(2500), ..Setup::new(COUNT) }
}

/// A load and all that may follow from a fault in it: the timeout runs from the fault on, which may be its last act.
fn bound(setup: &Setup) -> Duration {
    setup.fail_timeout * 2
}

/// Of so many calls those that are made to fail.
fn sample(count: u64) -> Vec<u64> {
    let mut sample = vec![1, 2.min(count), count.div_ceil(2), count];
    sample.sort_unstable();
    sample.dedup();
    sample
}

fn say(line: &str) {
    // The test harness would keep it to itself.
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn of_every_victim(test: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for victim in VICTIMS {
            let test = &test;
            scope.spawn(move || test(victim));
        }
    });
}

#[test]
fn every_read_of_a_rank_can_fail() {
    of_every_victim(|victim| {
        let mut team = Team::new(victim, setup());
        let reads = team.counted().reads;
        let other = tempfile::tempdir().unwrap();
        for at in 1..=reads {
            team.victim_is_told(&format!("read {at} fail"));
            let began = Instant::now();
            let answers = team.load("");
            let what = format!("read {at} of rank {victim}");
            assert!(team.agreed(&what, &answers, bound(&team.setup), began), "{what} was not missed");
            let told = &answers[victim].text;
            assert!(
                told.starts_with("error io ") && told.contains("tensor") && told.contains("bytes"),
                "{what}: {told}"
            );
        }
        for (what, at, kind) in [("cut", reads / 2, ["truncated", "changed"]), ("touch", reads, ["changed"; 2])] {
            for entry in fs::read_dir(team.folder.path()).unwrap().flatten() {
                fs::copy(entry.path(), other.path().join(entry.file_name())).unwrap();
            }
            let (own, path) = (other.path().display().to_string(), team.path());
            team.victim_is_told(&format!("read {at} {what}:{own}"));
            let began = Instant::now();
            Team::tell_join(&mut team.ranks);
            team.tell_others(&format!("all always {path}"));
            team.victim().tell(&format!("all always {own}"));
            team.all_are_ok();
            let answers: Vec<Answer> = team.ranks.iter().map(|rank| rank.answer(LONG)).collect();
            assert!(team.agreed(what, &answers, bound(&team.setup), began), "{what} was not missed");
            let told = &answers[victim].text;
            assert!(kind.iter().any(|kind| told.starts_with(&format!("error {kind} "))), "{what}: {told}");
            team.nothing_is_left();
        }
        team.loads_well();
        say(&format!("rank {victim}: {reads} reads failed, each told to all"));
        team.quit();
    });
}

/// Has each of these calls of the victim fail in turn, with `fault` for the n-th one of a name.
fn sweep(
    team: &mut Team,
    twin: &str,
    calls: &BTreeMap<String, u64>,
    chosen: impl Fn(&str, u64) -> Vec<u64>,
    fault: impl Fn(usize, &str, u64) -> String,
    called: impl Fn(&Counts, &str) -> u64,
) {
    let (mut tried, mut told) = (0, 0);
    for (call, &count) in calls {
        for at in chosen(call, count) {
            let fault = fault(tried, call, at);
            let what = format!("{fault} at rank {}", team.victim);
            team.victim_is_told("uncount");
            team.victim_is_told(&format!("{twin} {fault}"));
            let began = Instant::now();
            let answers = team.load("");
            let failed = team.agreed(&what, &answers, bound(&team.setup), began);
            let was_made = called(&counts(team.victim()), call) >= at;
            assert!(failed || !was_made || QUIET.contains(&call.as_str()), "{what} was not missed");
            tried += 1;
            told += usize::from(failed);
        }
    }
    team.victim_is_told(&format!("{twin} -"));
    team.loads_well();
    assert!(told * 2 > tried, "{told} of {tried} faults were told");
    say(&format!("rank {}: {tried} faults of {twin}, {told} told to all", team.victim));
}

#[test]
fn every_function_of_the_driver_can_fail() {
    /// Invalid value, out of memory, illegal address, and a device that is gone.
    const CODES: [&str; 4] = ["1", "2", "700!", "46!"];
    of_every_victim(|victim| {
        let mut team = Team::new(victim, setup());
        let calls = team.counted().driver;
        let few = |call: &str, count: u64| if ASKED_OFTEN.contains(&call) { vec![1, 4] } else { sample(count) };
        let code = |tried: usize| CODES[(tried + victim) % CODES.len()];
        let fault = |tried: usize, call: &str, at| format!("{call}@{at}={}", code(tried));
        sweep(&mut team, "driver", &calls, few, fault, |counts, call| counts.driver.get(call).copied().unwrap_or(0));
        team.quit();
    });
}

#[test]
fn every_function_and_operation_of_nccl_can_fail() {
    thread::scope(|scope| {
        for victim in VICTIMS {
            scope.spawn(move || {
                let mut team = Team::new(victim, setup());
                let calls = team.counted().nccl;
                // Without a version there is no NCCL; that is told otherwise.
                let few = |call: &str, count: u64| match call {
                    "ncclGetVersion" => vec![],
                    "ncclCommGetAsyncError" => vec![1, 4],
                    _ => sample(count),
                };
                let fault = |tried: usize, call: &str, at| format!("{call}@{at}={}", [1, 2, 3, 4, 6][tried % 5]);
                sweep(&mut team, "nccl", &calls, few, fault, |counts, call| {
                    counts.nccl.get(call).copied().unwrap_or(0)
                });
                team.quit();
            });
            scope.spawn(move || {
                let mut team = Team::new(victim, setup());
                let operations = team.counted().operations;
                // An operation that failed is not counted.
                let made = |counts: &Counts, call: &str| counts.operations.get(call).map_or(1, |count| count + 1);
                let fault = |_, call: &str, at| format!("run:{call}@{at}=6");
                let every = |_: &str, count: u64| (1..=count).collect();
                sweep(&mut team, "nccl", &operations, every, fault, made);
                team.quit();
            });
        }
    });
}

/// What the abort of a rank is to its peers: an error of their connections, or what theirs waits for. Neither hides why it aborted.
#[test]
fn an_abort_hides_no_failure() {
    thread::scope(|scope| {
        for (victim, aborts) in VICTIMS.into_iter().flat_map(|victim| [(victim, "tell"), (victim, "wait")]) {
            scope.spawn(move || {
                let settings = vec![("SIMNCCL_ABORT", aborts.to_owned())];
                let mut team = Team::new(victim, Setup { settings, ..setup() });
                let Counts { driver, nccl, operations, .. } = team.counted();
                let middle = |count: u64| vec![count.div_ceil(2)];
                let of_device = |call: &str, count| match call {
                    "cuStreamWaitEvent" | "cuMemcpyHtoDAsync_v2" | "cuEventRecord" | "cuLaunchKernel" => middle(count),
                    _ => vec![],
                };
                let fault = |_, call: &str, at| format!("{call}@{at}=1");
                let made = |counts: &Counts, call: &str| counts.driver.get(call).copied().unwrap_or(0);
                sweep(&mut team, "driver", &driver, of_device, fault, made);
                let of_nccl = |call: &str, count| match call {
                    "ncclGetVersion" | "ncclCommGetAsyncError" => vec![],
                    _ => middle(count),
                };
                let made = |counts: &Counts, call: &str| counts.nccl.get(call).copied().unwrap_or(0);
                sweep(&mut team, "nccl", &nccl, of_nccl, |_, call, at| format!("{call}@{at}=3"), made);
                let made = |counts: &Counts, call: &str| counts.operations.get(call).map_or(1, |count| count + 1);
                let fault = |_, call: &str, at| format!("run:{call}@{at}=6");
                sweep(&mut team, "nccl", &operations, |_, count| middle(count), fault, made);
                team.quit();
            });
        }
    });
}

/// What fails at the end: the last read, and its copy, when all others have all that they want.
#[test]
fn at_the_end_others_are_told_too() {
    of_every_victim(|victim| {
        let mut team = Team::new(victim, setup());
        let counts = team.counted();
        let copies = counts.driver["cuMemcpyHtoDAsync_v2"];
        let last = format!("driver cuMemcpyHtoDAsync_v2@{copies}=700!");
        for (number, (read, fault)) in [("fail", None), ("wait", Some(&last))].into_iter().enumerate() {
            let gate = team.folder.path().join(format!("gate{number}"));
            team.all_join();
            team.victim_is_told(&format!("read {} {read} after {}", counts.reads, gate.display()));
            let path = team.path();
            tell_all(&mut team.ranks, &format!("share always {path}"));
            team.all_are_ok();
            // Counting begins here: what sharing asked for is made again by no load.
            if let Some(fault) = fault {
                team.victim_is_told(fault);
            }
            tell_all(&mut team.ranks, "load landed");
            team.others().for_each(|rank| assert_eq!(rank.answer(LONG).text, "landed"));
            let began = Instant::now();
            fs::write(&gate, "").unwrap();
            let answers: Vec<Answer> = team.ranks.iter().map(|rank| rank.answer(LONG)).collect();
            assert!(team.agreed(read, &answers, team.setup.fail_timeout, began), "{read} was not missed");
            team.nothing_is_left();
        }
        team.quit();
    });
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Kill,
    Stop,
    /// Goes without a word, as a program does that has lost interest.
    Leave,
    /// Does not come.
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Unmet,
    Joined,
    Shared,
    Read(usize),
    /// All others have all bytes.
    Landed,
    /// All have.
    Loaded,
}

impl Team {
    /// Strikes the victim, holds what the others say against it, and leaves all as they were.
    fn struck(&mut self, blow: Blow, moment: Moment, reads: usize) {
        let what = format!("{blow:?} of rank {} {moment:?}", self.victim);
        let gate: PathBuf = self.folder.path().join(what.replace(' ', "_"));
        let path = self.path();
        if moment == Moment::Unmet {
            let victim = self.victim as u32;
            self.ranks.iter_mut().filter(|rank| rank.rank != victim).for_each(|rank| rank.tell("join"));
        } else {
            self.all_join();
        }
        let signal = if blow == Blow::Kill { "kill" } else { "stop" };
        match moment {
            Moment::Read(at) => self.victim_is_told(&format!("read {at} {signal}")),
            Moment::Landed => self.victim_is_told(&format!("read {reads} {signal} after {}", gate.display())),
            _ => {}
        }
        if !matches!(moment, Moment::Unmet | Moment::Joined) {
            tell_all(&mut self.ranks, &format!("share always {path}"));
            self.all_are_ok();
        }
        // What the others do, and what the victim would do next.
        let next = match moment {
            Moment::Unmet => "join".into(),
            Moment::Joined => format!("share always {path}"),
            Moment::Shared | Moment::Read(_) => "load".into(),
            Moment::Landed => "load landed".into(),
            Moment::Loaded => {
                tell_all(&mut self.ranks, "load");
                for rank in &self.ranks {
                    rank_loads::traffic(&rank.answer(LONG).text);
                }
                "finish".to_owned()
            }
        };
        if moment != Moment::Unmet {
            self.tell_others(&next);
        }
        let by_itself = matches!(moment, Moment::Read(_) | Moment::Landed);
        let since = if by_itself {
            self.victim().tell(&next);
            if moment == Moment::Landed {
                self.others().for_each(|rank| assert_eq!(rank.answer(LONG).text, "landed"));
                fs::write(&gate, "").unwrap();
            }
            let struck = self.victim().answer(LONG);
            assert_eq!(struck.text, "struck", "{what}");
            struck.at
        } else {
            let now = Instant::now();
            match blow {
                Blow::Kill => self.victim().signal(Signal::KILL),
                Blow::Stop => self.victim().signal(Signal::STOP),
                Blow::Leave => self.victim().tell("drop"),
                Blow::Never => {}
            }
            now
        };
        let waits = moment == Moment::Unmet || blow == Blow::Never;
        let within = self.setup.fail_timeout + if waits { self.setup.join_timeout } else { Duration::ZERO };
        self.others_name(&what, within, since);
        match blow {
            Blow::Kill => {
                self.ranks[self.victim] = self.setup.start(self.victim as u32);
                self.victim_is_told("settled");
            }
            Blow::Stop => {
                self.victim().signal(Signal::CONT);
                if !by_itself {
                    self.victim().tell(&next);
                }
                // It was given up, whatever it has by then.
                let answer = self.victim().answer(LONG);
                assert!(answer.text == "landed" || answer.text.starts_with("error "), "{what}: {}", answer.text);
                if answer.text == "landed" {
                    self.victim().error(LONG);
                }
            }
            Blow::Leave => drop(self.victim().answer(LONG)),
            Blow::Never => {}
        }
        self.nothing_is_left();
    }
}

/// Strikes one victim in one way at these moments, one after the other.
fn strike(victim: usize, blow: Blow, setup: Setup, moments: impl Fn(usize) -> Vec<Moment>) {
    let mut team = Team::new(victim, setup);
    let reads = team.counted().reads;
    let moments = moments(reads);
    for &moment in &moments {
        team.struck(blow, moment, reads);
    }
    team.loads_well();
    say(&format!("rank {victim}: {blow:?} at {} moments", moments.len()));
    if blow == Blow::Kill {
        team.ranks.remove(victim); // it began elsewhere than the others
    }
    team.quit();
}

#[test]
fn a_rank_can_go_at_every_moment() {
    let long = || Setup { fail_timeout: Duration::from_secs(4), ..Setup::new(COUNT) };
    let short = || Setup { join_timeout: Duration::from_millis(1500), ..long() };
    thread::scope(|scope| {
        for victim in VICTIMS {
            scope.spawn(move || {
                strike(victim, Blow::Kill, long(), |reads| {
                    let reads = (1..=reads).map(Moment::Read);
                    [Moment::Joined, Moment::Shared]
                        .into_iter()
                        .chain(reads)
                        .chain([Moment::Landed, Moment::Loaded])
                        .collect()
                });
            });
            scope.spawn(move || {
                strike(victim, Blow::Stop, long(), |reads| {
                    let reads = [1, reads / 2].map(Moment::Read);
                    [Moment::Joined, Moment::Shared]
                        .into_iter()
                        .chain(reads)
                        .chain([Moment::Landed, Moment::Loaded])
                        .collect()
                });
            });
            scope.spawn(move || {
                strike(victim, Blow::Leave, long(), |_| vec![Moment::Joined, Moment::Shared, Moment::Loaded]);
                // Who does not come is waited for as long as that takes on a busy machine, and no longer.
                for blow in [Blow::Kill, Blow::Stop] {
                    strike(victim, blow, short(), |_| vec![Moment::Unmet]);
                }
                strike(victim, Blow::Never, short(), |_| vec![Moment::Unmet, Moment::Joined, Moment::Shared]);
            });
        }
    });
}

#[test]
fn other_flags_of_a_rank_are_named_by_all() {
    of_every_victim(|victim| {
        let mut team = Team::new(victim, setup());
        let path = team.path();
        for (what, own) in [
            ("how reading is shared", format!("all cluster {path}")),
            ("how reading is shared", format!("all never {path}")),
            ("the plan", format!("all always {path} skip=a0.0.whole")),
            ("the plan", format!("all always {path} f32")),
        ] {
            Team::tell_join(&mut team.ranks);
            team.all_are_ok();
            let began = Instant::now();
            team.tell_others(&format!("all always {path}"));
            team.victim().tell(&own);
            for rank in &team.ranks {
                let error = rank.error(LONG);
                let named = error.text.ends_with(&format!(", rank {victim}"));
                assert!(named && error.text.contains(&format!("ranks disagree about {what}")), "{own}: {}", error.text);
                assert!(error.at - began < team.setup.fail_timeout, "{own}");
            }
            team.nothing_is_left();
        }
        team.quit();
    });
}

/// When one rank has died launchers signal the others, sooner than a load looks: what is known by then is the error.
#[test]
fn a_cancel_after_a_failure_does_not_hide_it() {
    let folder = tempfile::tempdir().unwrap();
    rank_loads::write(folder.path());
    let mut ranks = Setup::new(2).joined();
    ranks[1].tell("read 2 kill");
    ranks[1].is_ok();
    tell_all(&mut ranks, &format!("share always {}", folder.path().display()));
    ranks.iter().for_each(|rank| rank.is_ok());
    ranks[0].tell("load doomed");
    ranks[1].tell("load");
    let error = ranks[0].error(LONG).text;
    assert!(error.starts_with("peer a rank is gone") && error.ends_with(", rank 1"), "{error}");
}

/// Ctrl-C reaches a rank that waits for others: in sharing, at the start of the load, and at the end.
#[test]
fn a_signal_ends_every_wait_for_others() {
    let folder = tempfile::tempdir().unwrap();
    rank_loads::write(folder.path());
    let rules = folder.path().join("rules.toml");
    fs::write(&rules, rank_loads::RULES).unwrap();
    let path = folder.path().display();
    for (victim, commands) in [
        (0, vec![]),
        (1, vec![]),
        (0, vec![format!("share always {path}")]),
        (1, vec![format!("share always {path}"), "load".into()]),
    ] {
        // Nothing else ends the waits soon.
        let long = Duration::from_secs(100);
        let setup = Setup { join_timeout: long, fail_timeout: long, ..Setup::new(2) };
        let mut other = setup.start(1 - victim);
        let mut command = twins::cuda::command(env!("CARGO_BIN_EXE_shardlift"));
        command.arg("load").arg(folder.path()).arg("--rules").arg(&rules).args(["--json", "--tp", "2"]);
        command.args(["--rank", &victim.to_string(), "--devices", &format!("cuda:{victim}")]);
        command.args(["--rendezvous", &setup.rendezvous, "--cooperate", "always"]);
        command.args(["--join-timeout", "100", "--fail-timeout", "100"]);
        command.stdout(std::process::Stdio::piped());
        let waiting = Waiting(Some(command.spawn().unwrap()));
        other.tell("join");
        other.is_ok();
        for command in &commands {
            other.tell(command);
            let text = other.answer(LONG).text;
            assert!(!text.starts_with("error"), "{command}: {text}");
        }
        thread::sleep(Duration::from_millis(300)); // it comes to where it waits
        let began = Instant::now();
        waiting.signal(Signal::INT);
        let output = waiting.output();
        let took = began.elapsed();
        let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &object["error"]["kind"]), (Some(130), &"cancelled".into()), "{object:#}");
        assert!(took < Duration::from_secs(10), "{commands:?}: {took:?}");
        other.tell("await");
        let told = other.error(Duration::from_secs(10)).text;
        assert!(told.starts_with("cancelled ") && told.ends_with(&format!(", rank {victim}")), "{commands:?}: {told}");
        other.tell("drop");
        other.answer(LONG);
    }
}

/// A command that waits for others; killed when dropped.
struct Waiting(Option<std::process::Child>);

impl Waiting {
    fn signal(&self, signal: Signal) {
        let child = self.0.as_ref().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    fn output(mut self) -> std::process::Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
