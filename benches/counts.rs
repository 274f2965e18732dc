//! What a load asks of others, counted: system calls, driver calls, allocations; and what a small one starts. A count
//! repeats where a time does not, so it can fail a push.
//!
//! What grows with the bytes is the difference between loads of a model and of one with the same tensors, four times as
//! large. `cargo test --bench counts` (in `scripts/test`) holds the counts against `benches/record/counts.json`;
//! `cargo bench --bench counts -- --record` writes them there. Instructions are counted by `scripts/count-instructions`.

#[path = "counts/allocator.rs"]
mod allocator;
#[path = "support/record.rs"]
mod record;
mod support;
#[cfg(target_os = "linux")]
#[path = "support/tracer.rs"]
mod tracer;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde_json::{Value, json};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Plan, Rules, World};
use support::{ledger, write_model};

const PART: &str = "--part";
const MIB: u64 = 1 << 20;

/// Tensors of each model; of 8 MiB in the smaller, and of 32 in the larger.
const TENSORS: u64 = 8;
const LARGER: u64 = 4;
const SMALL: u64 = TENSORS * 8 * MIB;
const MORE: u64 = SMALL * (LARGER - 1);

/// One way to load, whose counts are taken.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    engine: EngineChoice,
    devices: Devices,
    /// The dimension that is cut between them.
    cut: u32,
}

#[derive(Clone, Copy)]
enum Devices {
    Host(u32),
    Staged(u32),
    Gpus(u32),
}

const WAYS: [Way; 8] = [
    Way { name: "pread, whole tensors", engine: EngineChoice::Pread, devices: Devices::Host(1), cut: 0 },
    Way { name: "mmap, whole tensors", engine: EngineChoice::Mmap, devices: Devices::Host(1), cut: 0 },
    Way { name: "uring, whole tensors", engine: EngineChoice::Uring, devices: Devices::Host(1), cut: 0 },
    Way { name: "pread, columns of 4 ranks", engine: EngineChoice::Pread, devices: Devices::Host(4), cut: 1 },
    Way { name: "host:staged, rows of 4 ranks", engine: EngineChoice::Pread, devices: Devices::Staged(4), cut: 0 },
    Way { name: "1 GPU, whole tensors", engine: EngineChoice::Pread, devices: Devices::Gpus(1), cut: 0 },
    Way { name: "4 GPUs, rows", engine: EngineChoice::Pread, devices: Devices::Gpus(4), cut: 0 },
    Way { name: "4 GPUs, columns", engine: EngineChoice::Pread, devices: Devices::Gpus(4), cut: 1 },
];

impl Way {
    fn gpus(self) -> Option<u32> {
        if let Devices::Gpus(gpus) = self.devices { Some(gpus) } else { None }
    }

    fn plan(self, model: &Path) -> io::Result<Plan> {
        let world = match self.devices {
            Devices::Host(ranks) => World::host(ranks),
            Devices::Staged(ranks) => World::host_staged(ranks),
            Devices::Gpus(gpus) => World::local(0..gpus),
        };
        let rules = format!("rule = [{{ match = \"**\", shard = {{ dim = {} }} }}]", self.cut);
        let rules = Rules::from_toml(&rules).map_err(io::Error::other)?;
        let checkpoint = Checkpoint::open(model).map_err(io::Error::other)?;
        Plan::new(&checkpoint, &rules, &world).map_err(io::Error::other)
    }

    /// Runs `part` for this way in a process of its own.
    fn child(&self, part: &str, model: &Path) -> io::Result<Command> {
        let mut command = twins::cuda::command(std::env::current_exe()?);
        let way = WAYS.iter().position(|way| way.name == self.name).expect("one of the ways");
        command.args([PART, part, &way.to_string()]).arg(model);
        command.env("SIMCUDA_DEVICES", self.gpus().unwrap_or(1).to_string());
        command.envs([("SIMCUDA_JITTER", "0"), ("SIMCUDA_CHECK", "0"), ("SIMCUDA_POISON", "0")]);
        Ok(command)
    }

    /// What `part` prints for this way.
    fn figures(&self, part: &str, model: &Path) -> io::Result<Value> {
        let output = self.child(part, model)?.output()?;
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout)?),
            false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
        }
    }
}

fn main() -> io::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, part, way, model] = &arguments[..]
        && flag == PART
    {
        let way = WAYS[way.parse::<usize>().map_err(io::Error::other)?];
        return run_part(part, way, Path::new(model)).map(|()| ExitCode::SUCCESS);
    }
    let record = arguments.iter().any(|argument| argument == "--record");
    let folder = arguments.iter().find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from("target/bench/counts"), PathBuf::from);
    let [small, large] = [("small", 1), ("large", LARGER)].map(|(name, times)| {
        let model = folder.join(name);
        let tensors: Vec<_> = (0..TENSORS).map(|at| (format!("layers.{at}.weight"), 1024 * times, 4096)).collect();
        write_model(&model, &tensors).map(|()| model)
    });
    let (small, large) = (small?, large?);
    let mut within = true;
    within &= allocations(&small, &large, record)?;
    within &= driver_calls(&small, &large, record)?;
    #[cfg(target_os = "linux")]
    {
        let counted = system::calls_per_gb(&small, &large, record).and_then(|first| {
            let second = system::small_load(&folder, record)?;
            Ok(first && second)
        });
        match counted {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                writeln!(io::stdout(), "SKIPPED: system calls (no process may be traced here: {error})")?;
            }
            counted => within &= counted?,
        }
    }
    if !within {
        writeln!(io::stdout(), "meant? then `cargo bench --bench counts -- --record`, and say why in the commit")?;
    }
    Ok(if within { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What a process of its own does; it prints what it has counted, if anything.
fn run_part(part: &str, way: Way, model: &Path) -> io::Result<()> {
    if way.gpus().is_some() {
        twins::cuda::load();
    }
    let plan = way.plan(model)?;
    let loader = Loader::new().engine(way.engine);
    // Slots, contexts and the page cache are there from the second load on.
    let (weights, _) = loader.load(&plan).map_err(io::Error::other)?;
    weights.check().map_err(io::Error::other)?;
    drop(weights);
    let counted = match part {
        "allocations" => {
            let before = allocator::so_far();
            loader.load(&plan).map_err(io::Error::other)?;
            json!(allocator::so_far() - before)
        }
        "driver" => {
            twins::cuda::reset_counts();
            loader.load(&plan).map_err(io::Error::other)?;
            ledger(model)?["calls_by_function"].clone()
        }
        "system" => {
            #[cfg(target_os = "linux")]
            tracer::mark();
            loader.load(&plan).map_err(io::Error::other)?;
            #[cfg(target_os = "linux")]
            tracer::mark();
            return Ok(());
        }
        other => return Err(io::Error::other(format!("no part {other}"))),
    };
    writeln!(io::stdout(), "{counted}")
}

/// Heap allocations, by any thread, that a model four times as large costs more: none for its reads, but a few for lists
/// that grow with what is under way by chance, and for the supervisor's looks.
fn allocations(small: &Path, large: &Path, record: bool) -> io::Result<bool> {
    let mut figures = record::Figures::new();
    for way in WAYS {
        let count = |model| way.figures("allocations", model).map(|count| count.as_f64().expect("a count"));
        // What chance adds is not there every time.
        let (few, many) = (least(|| count(small))?, least(|| count(large))?);
        figures.insert(way.name.into(), many - few);
    }
    record::settle("allocations of 192 MiB more", &figures, record::Slack { share: 0.15, count: 8.0 }, record)
}

/// Calls of the driver for each 16 MiB more of the same tensors, and for each device.
fn driver_calls(small: &Path, large: &Path, record: bool) -> io::Result<bool> {
    let mut figures = record::Figures::new();
    for way in WAYS {
        let Some(gpus) = way.gpus() else { continue };
        let total = |model| -> io::Result<f64> {
            let calls = way.figures("driver", model)?;
            let calls = calls.as_object().ok_or_else(|| io::Error::other("the twin counted nothing"))?;
            Ok(calls.values().filter_map(Value::as_f64).sum())
        };
        let (few, many) = (least(|| total(small))?, least(|| total(large))?);
        let slots = (MORE / (16 * MIB)) as f64;
        figures.insert(way.name.into(), (many - few) / slots / f64::from(gpus));
    }
    record::settle("driver calls per 16 MiB and device", &figures, record::Slack { share: 0.25, count: 0.5 }, record)
}

/// The least of three counts.
fn least(count: impl Fn() -> io::Result<f64>) -> io::Result<f64> {
    let counts = (0..3).map(|_| count()).collect::<io::Result<Vec<f64>>>()?;
    Ok(counts.into_iter().fold(f64::INFINITY, f64::min))
}

#[cfg(target_os = "linux")]
mod system {
    use libc::{
        SYS_brk, SYS_clock_nanosleep, SYS_futex, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap,
        SYS_nanosleep, SYS_openat, SYS_prctl, SYS_sched_yield,
    };

    use super::*;
    use tracer::Calls;

    /// What gives memory and takes it.
    const MEMORY: [i64; 6] = [SYS_brk, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap];
    /// What threads do for each other. How often depends on how they meet.
    const WAITS: [i64; 4] = [SYS_clock_nanosleep, SYS_futex, SYS_nanosleep, SYS_sched_yield];

    /// System calls for each GB (1e9 bytes) more of the same tensors, by the load's own threads and whoever started it.
    pub(super) fn calls_per_gb(small: &Path, large: &Path, record: bool) -> io::Result<bool> {
        let (mut calls, mut waits) = (record::Figures::new(), record::Figures::new());
        for way in WAYS.into_iter().filter(|way| way.gpus().is_none()) {
            let [few, many] = [small, large].map(|model| tracer::count(&mut way.child("system", model)?, true));
            let (few, many) = (few?, many?);
            let per_gb =
                |of: fn(i64) -> bool| ((sum(&many, of) - sum(&few, of)) / (MORE as f64 / 1e9)).round().max(0.0);
            // What goes from thread to thread through a queue lets their arenas grow by chance.
            let of_memory = if matches!(way.devices, Devices::Staged(_)) { &mut waits } else { &mut calls };
            of_memory.insert(format!("{}: memory", way.name), per_gb(|call| MEMORY.contains(&call)));
            let is_work = |call| !MEMORY.contains(&call) && !WAITS.contains(&call);
            // How many reads come back together is chance, too.
            let of_work = if way.engine == EngineChoice::Uring { &mut waits } else { &mut calls };
            of_work.insert(format!("{}: reads and all else", way.name), per_gb(is_work));
            waits.insert(format!("{}: waits", way.name), per_gb(|call| WAITS.contains(&call)));
        }
        let slack = record::Slack { share: 0.1, count: 20.0 };
        let within = record::settle("system calls per GB", &calls, slack, record)?;
        // One for each read would be 477 more, or 1907 where reads are of half a MiB.
        let slack = record::Slack { share: 0.5, count: 250.0 };
        Ok(record::settle("system calls per GB, by chance", &waits, slack, record)? && within)
    }

    /// Calls of threads that the load needs for its bytes: not of the supervisor, which looks now and then, nor of others'
    /// that idle.
    fn sum(calls: &Calls, of: fn(i64) -> bool) -> f64 {
        let ours = |name: &str| name.starts_with("shardlift-") && name != "shardlift-load";
        calls.iter().filter(|((name, call), _)| ours(name) && of(*call)).map(|(_, &count)| count as f64).sum()
    }

    /// What `shardlift load` of a kilobyte starts and opens: nothing that it does not use.
    pub(super) fn small_load(folder: &Path, record: bool) -> io::Result<bool> {
        let model = folder.join("tiny");
        write_model(&model, &[("a.weight".into(), 8, 32), ("b.weight".into(), 8, 32)])?;
        let mut load = Command::new(env!("CARGO_BIN_EXE_shardlift"));
        load.arg("load").arg(&model).arg("--json").stdout(std::process::Stdio::null());
        let calls = tracer::count(&mut load, false)?;
        let ours = |of| calls.iter().filter(move |((name, call), _)| name.starts_with("shardlift-") && *call == of);
        let count = |of| ours(of).map(|(_, &count)| count as f64).sum();
        // A thread that has a name says so to the system once.
        let figures = record::Figures::from([
            ("threads of its own".into(), count(SYS_prctl)),
            ("files that they open".into(), count(SYS_openat)),
        ]);
        record::settle("a load of 1 KB", &figures, record::Slack { share: 0.0, count: 1.0 }, record)
    }
}
