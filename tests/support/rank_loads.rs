//! What ranks of tests load, beside what `ranks.rs` has them do: into GPUs of the twins, with calls and reads that go wrong when
//! the test says so.

#![allow(dead_code, reason = "each test uses its own part")]

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use rustix::process::{Signal, getpid, kill_process};
use safetensors::tensor::{Dtype, TensorView};
use shardlift::plan::DeviceSpec;
use shardlift::read::{Engine, Next, Pread, Request, Work};
use shardlift::{Checkpoint, Error, Group, Loader, Plan, Rank, Result, Rules, Sharing, Weights, World};

use crate::ranks::{self, Process, say};

pub(crate) const RULES: &str = r#"
rule = [
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**", replicate = true },
]
"#;

/// A model for up to four ranks, in which some rounds are exchanged and the last read is every rank's own.
pub(crate) fn write(folder: &Path) {
    let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
    for layer in 0..3 {
        for part in 0..2 {
            tensors.push((format!("a{layer}.{part}.columns"), vec![48, 96]));
            tensors.push((format!("a{layer}.{part}.whole"), vec![3001]));
        }
        tensors.push((format!("a{layer}.rows"), vec![96, 64]));
    }
    tensors.push(("b.columns".into(), vec![300, 1944]));
    tensors.push(("c.rows".into(), vec![768, 256]));
    let mut state = 5u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for (file, part) in [("one", &tensors[..8]), ("two", &tensors[8..])] {
        let bytes: Vec<Vec<u8>> =
            part.iter().map(|(_, shape)| (0..shape.iter().product::<usize>() * 2).map(|_| byte()).collect()).collect();
        let views: BTreeMap<&str, TensorView<'_>> = part
            .iter()
            .zip(&bytes)
            .map(|((name, shape), bytes)| (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()))
            .collect();
        safetensors::serialize_to_file(views, None, &folder.join(format!("{file}.safetensors"))).unwrap();
    }
}

/// Digests of so many ranks, from host memory.
pub(crate) fn host_digests(folder: &Path, ranks: u32) -> Vec<String> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let plan = Plan::new(&checkpoint, &Rules::from_toml(RULES).unwrap(), &World::host(ranks)).unwrap();
    let (weights, _) = Loader::new().load(&plan).unwrap();
    weights.check().unwrap().into_iter().map(|(_, digest)| format!("{digest:016x}")).collect()
}

/// What a rank read from storage, sent to others and received, as it answered to `load`.
pub(crate) fn traffic(answer: &str) -> [u64; 3] {
    let mut numbers = answer.split(' ').map(|number| number.parse().unwrap());
    std::array::from_fn(|_| numbers.next().unwrap())
}

/// Has a rank forget what it counted, load, and tell how often it called and read what.
pub(crate) fn counts(process: &mut Process) -> Counts {
    process.tell("counts");
    serde_json::from_str(&process.answer(Duration::from_secs(30)).text).unwrap()
}

/// What one load of a rank asked for.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Counts {
    pub(crate) reads: usize,
    pub(crate) driver: BTreeMap<String, u64>,
    pub(crate) nccl: BTreeMap<String, u64>,
    /// Of NCCL, when they ran.
    pub(crate) operations: BTreeMap<String, u64>,
}

/// The other side: what the ignored test `rank` of a test binary runs.
pub(crate) fn run() {
    twins::cuda::load();
    twins::nccl::load();
    let mut seat = Seat::default();
    ranks::run_with(&mut |words, group| seat.obey(words, group));
}

/// One rank, and what it has.
#[derive(Default)]
struct Seat {
    /// For the next load.
    strike: Option<Strike>,
    reads: Arc<AtomicUsize>,
    loader: Option<Loader>,
    plan: Option<Plan>,
    weights: Option<Weights>,
}

impl Seat {
    /// `share HOW FOLDER [FLAG..]`, `load [landed|doomed]`, `check`, `all HOW FOLDER` (these three, and finishes); `read N WHAT` and
    /// `read N WHAT after FILE`, `driver FAULTS`, `nccl FAULTS`; `uncount`, `counts`, `left`.
    fn obey(&mut self, words: &[&str], group: Option<&Arc<Group>>) -> Option<Result<Option<String>>> {
        let done = || Some(Ok(None));
        match *words {
            ["share", how, folder, ref flags @ ..] => {
                Some(self.share(group?, how, Path::new(folder), flags).map(|()| None))
            }
            ["load", "doomed"] => Some(self.load(false, group.cloned()).map(Some)),
            ["load", ref flags @ ..] => Some(self.load(flags == ["landed"], None).map(Some)),
            ["check"] => Some(self.check().map(Some)),
            ["all", how, folder, ref flags @ ..] => Some(match group {
                Some(group) => self.all(group, how, Path::new(folder), flags).map(Some),
                None => Err(Error::new(shardlift::ErrorKind::Usage, "no group")),
            }),
            ["read", at, what, ref after @ ..] => {
                let after = (after.first() == Some(&"after")).then(|| PathBuf::from(after[1]));
                self.strike = Some(Strike { at: at.parse().unwrap(), what: what.into(), after });
                done()
            }
            ["driver", faults] => {
                twins::cuda::fault(faults.trim_matches('-'));
                done()
            }
            ["nccl", faults] => {
                twins::nccl::fault(faults.trim_matches('-'));
                done()
            }
            ["uncount"] => {
                twins::cuda::reset_counts();
                twins::nccl::reset_counts();
                done()
            }
            ["counts"] => Some(Ok(Some(serde_json::to_string(&self.counts()).unwrap()))),
            ["left"] => {
                let left =
                    [twins::cuda::live(), twins::cuda::violations(), twins::nccl::live(), twins::nccl::violations()];
                Some(Ok(Some(format!("{left:?}"))))
            }
            ["drop"] => {
                self.forget();
                None // the group is not ours
            }
            _ => None,
        }
    }

    fn forget(&mut self) {
        (self.weights, self.plan, self.loader) = (None, None, None);
    }

    fn all(&mut self, group: &Arc<Group>, how: &str, folder: &Path, flags: &[&str]) -> Result<String> {
        let outcome = (|| {
            self.share(group, how, folder, flags)?;
            self.load(false, None)?;
            let digest = self.check()?;
            group.finish()?;
            Ok(digest)
        })();
        self.forget();
        if let Err(error) = &outcome {
            group.fail(error); // as the command line does of what fails between loads
        }
        outcome
    }

    fn share(&mut self, group: &Arc<Group>, how: &str, folder: &Path, flags: &[&str]) -> Result<()> {
        let sharing = match how {
            "auto" => Sharing::Auto,
            "always" => Sharing::Node,
            "cluster" => Sharing::Cluster,
            _ => Sharing::Never,
        };
        self.reads = Arc::default();
        let engine = Striking {
            engine: Pread::new(1),
            strike: self.strike.take(),
            reads: Arc::clone(&self.reads),
            fails: AtomicBool::new(false),
        };
        let loader = Loader::new().staging(2 << 20).group(Some(group)).custom_engine(Arc::new(engine));
        let checkpoint = Checkpoint::open(folder)?;
        let world = World::member(group.rank(), group.size(), DeviceSpec::Cuda(group.rank().0));
        let world = loader.sharing(sharing, &checkpoint, world)?;
        let mut rules = Rules::from_toml(RULES)?;
        for flag in flags {
            rules = match flag.strip_prefix("skip=") {
                Some(pattern) => rules.skipping(pattern),
                None => rules.casting(shardlift::Dtype::F32),
            };
        }
        self.plan = Some(loader.plan(&checkpoint, &rules, &world)?);
        self.loader = Some(loader);
        Ok(())
    }

    /// With a group it is cancelled in the moment in which a failure is known there.
    fn load(&mut self, tells: bool, doomed: Option<Arc<Group>>) -> Result<String> {
        let (loader, plan) = (self.loader.as_ref().unwrap(), self.plan.as_ref().unwrap());
        let mut load = loader.start(plan)?;
        if let Some(group) = doomed {
            let monitor = load.monitor();
            std::thread::spawn(move || {
                while group.failure().is_none() {
                    std::thread::sleep(Duration::from_micros(100));
                }
                monitor.cancel();
            });
        }
        let all = plan.world().driven().iter().map(|rank: &Rank| plan.rank(*rank).dests.len()).sum::<usize>();
        let mut landed = 0;
        for tensor in &mut load {
            tensor?;
            landed += 1;
            if landed == all && tells {
                say("landed");
            }
        }
        let (weights, report) = load.finish()?;
        self.weights = Some(weights);
        Ok(format!("{} {} {}", report.storage_bytes_read, report.sent_bytes, report.received_bytes))
    }

    fn check(&self) -> Result<String> {
        Ok(format!("{:016x}", self.weights.as_ref().unwrap().check()?[0].1))
    }

    fn counts(&self) -> Counts {
        let folder = tempfile::tempdir().unwrap();
        let [driver, nccl] = ["driver", "nccl"].map(|name| folder.path().join(name));
        twins::cuda::ledger(&driver);
        twins::nccl::ledger(&nccl);
        let [driver, nccl] =
            [driver, nccl].map(|path| serde_json::from_slice::<serde_json::Value>(&fs::read(path).unwrap()).unwrap());
        let of = |ledger: &serde_json::Value, field: &str| serde_json::from_value(ledger[field].clone()).unwrap();
        Counts {
            reads: self.reads.load(Ordering::Relaxed),
            driver: of(&driver, "calls_by_function"),
            nccl: of(&nccl, "calls_by_function"),
            operations: of(&nccl, "operations"),
        }
    }
}

/// What happens at a read.
#[derive(Debug)]
struct Strike {
    /// Which one, from 1.
    at: usize,
    /// `fail`, `kill`, `stop`, `wait`, or `cut:FOLDER` and `touch:FOLDER`, which change the files there.
    what: String,
    /// Not before this file is there.
    after: Option<PathBuf>,
}

/// An engine with one thread, at one of whose reads something happens.
#[derive(Debug)]
struct Striking {
    engine: Pread,
    strike: Option<Strike>,
    reads: Arc<AtomicUsize>,
    /// The next read does.
    fails: AtomicBool,
}

// SAFETY: the engine inside answers for it; an outcome is only made worse.
unsafe impl Engine for Striking {
    fn name(&self) -> &'static str {
        self.engine.name()
    }
    fn threads(&self) -> usize {
        self.engine.threads()
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        self.engine.run(&StrikingWork { work, engine: self })
    }
}

struct StrikingWork<'a> {
    work: &'a dyn Work,
    engine: &'a Striking,
}

impl StrikingWork<'_> {
    fn strike(&self, strike: &Strike) {
        let awaited = |file: &PathBuf| !file.exists() && !self.work.stopped();
        while strike.after.as_ref().is_some_and(awaited) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let files = |folder: &str| {
            let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        };
        let signal = |signal| {
            say("struck");
            kill_process(getpid(), signal).unwrap();
        };
        match strike.what.split_once(':') {
            Some(("cut", folder)) => {
                files(folder).for_each(|file| File::options().write(true).open(file).unwrap().set_len(4096).unwrap());
            }
            Some((_, folder)) => files(folder).for_each(|file| {
                File::options().write(true).open(file).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            }),
            None => match strike.what.as_str() {
                "fail" => self.engine.fails.store(true, Ordering::Relaxed),
                "kill" => signal(Signal::KILL),
                "stop" => signal(Signal::STOP),
                _ => {}
            },
        }
    }
}

impl Work for StrikingWork<'_> {
    fn next(&self, may_wait: bool) -> Next {
        let next = self.work.next(may_wait);
        if matches!(next, Next::Request(_)) {
            let number = self.engine.reads.fetch_add(1, Ordering::Relaxed) + 1;
            self.engine.strike.iter().filter(|strike| strike.at == number).for_each(|strike| self.strike(strike));
        }
        next
    }

    fn stopped(&self) -> bool {
        self.work.stopped()
    }

    fn done(&self, request: Request, outcome: io::Result<usize>) {
        let fails = self.engine.fails.swap(false, Ordering::Relaxed);
        self.work.done(request, if fails { Err(io::Error::from_raw_os_error(5)) } else { outcome });
    }

    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        // SAFETY: the engine's word, passed on.
        unsafe { self.work.lent(request, mapping, keep) }
    }
}
