//! Ranks as processes of their own, which do one thing after the other as the test says, for tests of groups.

#![allow(dead_code, reason = "each test uses its own part")]

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use shardlift::{Error, ErrorKind, Group, GroupOptions, Launch, LaunchOptions, Rank};

/// How long a rank may take for what has no deadline of its own: starting a process on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a rank is started with.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) size: u32,
    pub(crate) rendezvous: String,
    pub(crate) master: Option<u16>,
    pub(crate) session: Option<String>,
    pub(crate) join_timeout: Duration,
    pub(crate) fail_timeout: Duration,
    /// Words before the command, for instance to run it in a network name space.
    pub(crate) within: Vec<String>,
    /// More of its environment.
    pub(crate) settings: Vec<(&'static str, String)>,
}

/// One rank, and what it answers.
pub(crate) struct Process {
    pub(crate) rank: u32,
    child: Child,
    commands: Option<ChildStdin>,
    answers: Receiver<(Instant, String)>,
}

/// What a rank answered to a command, and when.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) at: Instant,
    pub(crate) text: String,
}

impl Setup {
    pub(crate) fn new(size: u32) -> Setup {
        Setup {
            size,
            rendezvous: format!("tcp://127.0.0.1:{}", free_port()),
            master: None,
            session: None,
            join_timeout: Duration::from_secs(60),
            fail_timeout: Duration::from_millis(2500),
            within: Vec::new(),
            settings: Vec::new(),
        }
    }

    pub(crate) fn start(&self, rank: u32) -> Process {
        let program = env::current_exe().unwrap();
        let mut command = match self.within.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(["--ignored", "--exact", "rank", "--nocapture"]);
        command.env("RANKS_RANK", rank.to_string()).env("RANKS_SIZE", self.size.to_string());
        command.env("RANKS_RENDEZVOUS", &self.rendezvous).envs(self.settings.iter().cloned());
        if let Some(port) = self.master {
            command.env("RANKS_MASTER_PORT", port.to_string());
        }
        if let Some(session) = &self.session {
            command.env("RANKS_SESSION", session);
        }
        let millis = |time: Duration| time.as_millis().to_string();
        command.env("RANKS_JOIN", millis(self.join_timeout)).env("RANKS_FAIL", millis(self.fail_timeout));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, answers) = mpsc::channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(text) = line.strip_prefix("@ ") {
                    // The test may have ended.
                    let _ = sender.send((Instant::now(), text.to_owned()));
                }
            }
        });
        let process = Process { rank, commands: child.stdin.take(), child, answers };
        assert_eq!(process.answer(PATIENCE).text, "here");
        process
    }

    pub(crate) fn start_all(&self, ranks: impl IntoIterator<Item = u32>) -> Vec<Process> {
        thread::scope(|scope| {
            let starting: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || self.start(rank))).collect();
            starting.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// All ranks, joined.
    pub(crate) fn joined(&self) -> Vec<Process> {
        let mut ranks = self.start_all(0..self.size);
        tell_all(&mut ranks, "join");
        ranks.iter().for_each(|rank| rank.is_ok());
        ranks
    }
}

pub(crate) fn tell_all(ranks: &mut [Process], command: &str) {
    ranks.iter_mut().for_each(|rank| rank.tell(command));
}

/// Far longer than anything takes that has no time-out.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// What a group does at last that lives.
pub(crate) fn finish(mut ranks: Vec<Process>) {
    tell_all(&mut ranks, "exchange plan x");
    let all = vec!["x"; ranks.len()].join(",");
    ranks.iter().for_each(|rank| assert_eq!(rank.answer(SOON).text, all));
    tell_all(&mut ranks, "finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    ranks.into_iter().for_each(Process::quit);
}

impl Process {
    /// `join`, `exchange WHAT PART`, `finish`, `fail MESSAGE`, `cancel`, `await` (for a failure), `drop`, `left`.
    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.commands.as_mut().unwrap(), "{command}").unwrap();
    }

    #[track_caller]
    pub(crate) fn answer(&self, within: Duration) -> Answer {
        match self.answers.recv_timeout(within) {
            Ok((at, text)) => Answer { at, text },
            Err(error) => panic!("rank {} did not answer within {within:?}: {error}", self.rank),
        }
    }

    #[track_caller]
    pub(crate) fn is_ok(&self) {
        assert_eq!(self.answer(PATIENCE).text, "ok", "rank {}", self.rank);
    }

    /// The error that it answers with, and when.
    #[track_caller]
    pub(crate) fn error(&self, within: Duration) -> Answer {
        let answer = self.answer(within);
        let text = answer.text.strip_prefix("error ").map(str::to_owned);
        let text = text.unwrap_or_else(|| panic!("rank {} answered {:?}", self.rank, answer.text));
        Answer { text, ..answer }
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.answers.try_recv().is_err()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let process = Pid::from_child(&self.child);
        kill_process(process, signal).unwrap();
        if signal == Signal::STOP {
            // One of its threads has to run once more before all of them stand still.
            waitid(WaitId::Pid(process), WaitIdOptions::STOPPED).unwrap();
        }
    }

    /// Ends it as a program ends, in good time.
    #[track_caller]
    pub(crate) fn quit(mut self) {
        drop(self.commands.take());
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().unwrap() {
                return assert!(status.success(), "rank {}: {status}", self.rank);
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("rank {} did not end", self.rank);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, and then both say so.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody listens on, and that no other test is given while this process lives; the next 38 are its test's, too. Below
/// those that the system gives away.
pub(crate) fn free_port() -> u16 {
    /// The port before them, of each: whoever has that has them all.
    static CLAIMS: Mutex<Vec<TcpListener>> = Mutex::new(Vec::new());
    let listen = |port: u16| TcpListener::bind(("127.0.0.1", port));
    let mut claims = CLAIMS.lock().unwrap();
    let first = std::process::id() % BLOCKS; // those of one process need not look through another's
    let mut blocks = (0..BLOCKS).map(|block| FIRST_PORT + ((first + block) % BLOCKS) as u16 * 40);
    let (claim, port) =
        blocks.find_map(|block| listen(block).ok().zip(listen(block + 1).ok().map(|_| block + 1))).unwrap();
    claims.push(claim);
    port
}

const FIRST_PORT: u16 = 20_000;
const BLOCKS: u32 = 300;

/// What a rank does besides: the words of a command, and the group if it has joined; `None` for what it does not know.
pub(crate) type Besides<'a> = dyn FnMut(&[&str], Option<&Arc<Group>>) -> Option<Result<Option<String>, Error>> + 'a;

/// The other side: what the ignored test `rank` of a test binary runs.
pub(crate) fn run() {
    run_with(&mut |_, _| None);
}

pub(crate) fn run_with(besides: &mut Besides<'_>) {
    let variable = |name: &str| variables().remove(name);
    let number = |name: &str| variable(name).unwrap().parse::<u64>().unwrap();
    let mut options = LaunchOptions::default();
    options.rank = Some(Rank(number("RANKS_RANK") as u32));
    options.size = Some(number("RANKS_SIZE") as u32);
    options.session = variable("RANKS_SESSION");
    let master = variable("RANKS_MASTER_PORT");
    options.rendezvous = master.is_none().then(|| variable("RANKS_RENDEZVOUS").unwrap());
    let lookup = |name: &str| match name {
        "MASTER_ADDR" => master.as_ref().map(|_| "127.0.0.1".into()),
        "MASTER_PORT" => master.clone(),
        _ => None,
    };
    let launch = Launch::from_vars(&lookup, &options).unwrap().unwrap();
    let mut group_options = GroupOptions::default();
    group_options.join_timeout = Duration::from_millis(number("RANKS_JOIN"));
    group_options.fail_timeout = Duration::from_millis(number("RANKS_FAIL"));

    let mut before = resources();
    say("here");
    let mut group = None;
    for command in io::stdin().lines().map(Result::unwrap) {
        let words: Vec<&str> = command.split(' ').collect();
        if words == ["settled"] {
            before = resources(); // what is made once was made
            say("ok");
            continue;
        }
        let result = match besides(&words, group.as_ref()) {
            Some(result) => result,
            None => obey(&words, &mut group, &launch, &group_options),
        };
        match result {
            Ok(text) => say(text.as_deref().unwrap_or("ok")),
            Err(error) => say(&format!("error {} {error}", error.kind().name())),
        }
    }
    drop(group);
    // Threads that nobody joins, of the twins for instance, end soon.
    let until = Instant::now() + Duration::from_secs(5);
    let has_more = || resources().0 > before.0 || resources().1 > before.1;
    while has_more() && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    let after = resources();
    assert!(!has_more(), "threads and descriptors, before {before:?} and after {after:?}: {:?}", descriptors());
}

fn obey(
    words: &[&str],
    group: &mut Option<Arc<Group>>,
    launch: &Launch,
    options: &GroupOptions,
) -> Result<Option<String>, Error> {
    let joined = || group.as_ref().unwrap();
    match *words {
        ["join"] => *group = Some(Arc::new(Group::join(launch, options)?)),
        ["exchange", what, part] => {
            let parts = joined().exchange(what, part.as_bytes().to_vec())?;
            let parts: Vec<String> = parts.into_iter().map(|part| String::from_utf8(part).unwrap()).collect();
            return Ok(Some(parts.join(",")));
        }
        ["finish"] => joined().finish()?,
        ["fail", message] => joined().fail(&Error::new(ErrorKind::Truncated, message).with_tensor("w")),
        ["cancel"] => joined().fail(&Error::new(ErrorKind::Cancelled, "the load was cancelled")),
        ["await"] => loop {
            if let Some(error) = joined().failure() {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(5));
        },
        ["drop"] => {
            let began = Instant::now();
            drop(group.take());
            return Ok(Some(format!("{}", began.elapsed().as_millis())));
        }
        _ => panic!("no such command: {words:?}"),
    }
    Ok(None)
}

/// One line of its own: the test harness begins its line before.
pub(crate) fn say(text: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "\n@ {text}").unwrap();
    out.flush().unwrap();
}

/// Threads and open descriptors of this process.
fn resources() -> (usize, usize) {
    (fs::read_dir("/proc/self/task").map_or(0, Iterator::count), descriptors().len())
}

/// What the descriptors of this process lead to. NCCL keeps what an id leads to until all ranks have met there, which some
/// never do; so does its twin.
fn descriptors() -> Vec<PathBuf> {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|link| fs::read_link(link.path()).ok());
    links.filter(|link| !link.starts_with("/memfd:simnccl (deleted)")).collect()
}

#[expect(clippy::disallowed_methods, reason = "tests speak to their children so")]
fn variables() -> BTreeMap<String, String> {
    env::vars().collect()
}
