//! `shardlift load`: the whole journey, and what it took.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use shardlift::observe::StageTime;
use shardlift::read::EngineChoice;
use shardlift::{
    Dtype, Error, ErrorKind, Group, Launch, Loader, Memory, Monitor, Plan, Rank, Report, Residency, Rules, Trace,
    Weights, limits,
};

use crate::args::{Cast, Engine, LoadArgs, MemoryChoice, PageCache, ResidencyChoice};
use crate::interrupt::Interrupt;
use crate::output::{Failure, Output, Warnings, count, fields, hex, human_bytes};
use crate::{model, processes, rates};

pub(crate) fn run(args: &LoadArgs, output: &mut Output, interrupt: &Interrupt) -> Result<Map<String, Value>, Failure> {
    args.supported()?;
    let launch = processes::launch(args, model::ranks(&args.mesh)?)?;
    let group = processes::join(args, launch.as_ref(), interrupt)?;
    let Some(group) = &group else { return load(args, launch.as_ref(), None, output, interrupt) };
    interrupt.joined(group);
    let loaded = load(args, launch.as_ref(), Some(group), output, interrupt);
    let settled = processes::settle(group, loaded, interrupt);
    interrupt.parted();
    settled
}

/// Loads as this process, with those of the other ranks if there are any.
fn load(
    args: &LoadArgs,
    launch: Option<&Launch>,
    group: Option<&Arc<Group>>,
    output: &mut Output,
    interrupt: &Interrupt,
) -> Result<Map<String, Value>, Failure> {
    let LoadArgs { model, mesh, only, skip, dtype, repeat, check, trace, .. } = args;

    let opened = Instant::now();
    let checkpoint = model::open_adapted(model, mesh)?;
    let open_seconds = opened.elapsed().as_secs_f64();
    output.warn(checkpoint.warnings());

    let planned = Instant::now();
    let rank = launch.map(|launch| launch.rank().0);
    let world = model::world(mesh, rank, &processes::devices(args, launch)?)?;
    let loader = loader(args)?.group(group);
    let shared = loader.sharing(processes::sharing(args.processes.cooperate), &checkpoint, world);
    let world = shared.map_err(|error| Failure::from(error).with_signal(interrupt.signal()))?;
    let rules = model::rules(&checkpoint, mesh, &world)?;
    let rules = only.iter().fold(rules, |rules: Rules, pattern| rules.keeping(pattern));
    let rules = skip.iter().fold(rules, |rules, pattern| rules.skipping(pattern));
    let rules = match dtype {
        None => rules,
        Some(Cast::Bf16) => rules.casting(Dtype::Bf16),
        Some(Cast::F16) => rules.casting(Dtype::F16),
        Some(Cast::F32) => rules.casting(Dtype::F32),
    };
    let plan = Plan::new(&checkpoint, &rules, &world)?;
    let plan_seconds = planned.elapsed().as_secs_f64();
    // While a signal still ends a process of no group: opening a pipe waits for its reader.
    let inputs = || model::inputs(&checkpoint, mesh).into_iter().chain(args.doctor.clone());
    let trace = trace.as_deref().map(|path| TraceFile::create(path, inputs())).transpose()?;
    interrupt.waits(); // memory and threads come into being from here on
    interrupt.check()?;

    if let Some(file) = trace.as_ref().filter(|file| file.is_file()) {
        file.write()?; // for whoever ends this process before the end
    }
    let loader = loader.digests(*check).trace(trace.as_ref().map(|file| &file.trace));
    let times = repeat.map_or(1, |times| times as usize);
    let mut runs = Vec::new();
    for _ in 0..times {
        interrupt.waits();
        interrupt.check()?;
        // The weights of a run are gone before the next begins.
        runs.push(run_once(args, &loader, &plan, trace.as_ref(), output, interrupt)?);
    }
    let mut by_time: Vec<&Run> = runs.iter().collect();
    by_time.sort_by(|a, b| a.report.seconds.total_cmp(&b.report.seconds));
    let Run { report, tensors, digests } = by_time[(times - 1) / 2];

    let ranks: Vec<Value> = world
        .driven()
        .iter()
        .map(|rank| {
            json!({
                "rank": rank.0,
                "device": world.device(*rank).to_string(),
                "bytes": plan.bytes_on(*rank),
                "tensors": tensors[rank],
                "digest": digests.get(rank).map(|digest| hex(*digest)),
            })
        })
        .collect();

    print(report, output);
    if repeat.is_some() {
        let [min, median, max] = [0, (times - 1) / 2, times - 1].map(|at| by_time[at].report.seconds);
        let runs = count(times, "run");
        output.line(format_args!("{runs}: min {min:.3} s, median {median:.3} s, max {max:.3} s"));
    }
    for rank in world.driven() {
        let bytes = human_bytes(plan.bytes_on(*rank));
        let digest = digests.get(rank).map(|digest| format!(", digest {}", hex(*digest))).unwrap_or_default();
        output.line(format_args!("rank {rank}: {}, {bytes}{digest}", count(tensors[rank], "tensor")));
    }
    if *check {
        output.line(format_args!("check: every byte as in the files"));
    }
    let mut object = report_object(report);
    object.extend(fields(json!({
        "open_seconds": open_seconds,
        "plan_seconds": plan_seconds,
        "checkpoint_bytes": checkpoint.bytes(),
        "checked": check,
        "ranks": ranks,
        "plan_digest": hex(plan.digest()),
    })));
    if repeat.is_some() {
        object.insert("runs".into(), runs.iter().map(|run| report_object(&run.report)).collect());
    }
    Ok(object)
}

/// One load of several.
struct Run {
    report: Report,
    /// Complete tensors of each rank.
    tensors: BTreeMap<Rank, usize>,
    digests: BTreeMap<Rank, u64>,
}

/// Loads, writes what was traced so far however that ended, and checks.
fn run_once(
    args: &LoadArgs,
    loader: &Loader,
    plan: &Plan,
    trace: Option<&TraceFile>,
    output: &Output,
    interrupt: &Interrupt,
) -> Result<Run, Failure> {
    let failed = |error| Failure::started(error).with_signal(interrupt.signal());
    let loaded = load_once(loader, plan, output, interrupt);
    let written = trace.map_or(Ok(()), TraceFile::write);
    let (weights, report, tensors) = loaded?;
    written.map_err(failed)?;
    let mut digests: BTreeMap<Rank, u64> = BTreeMap::new();
    if args.check {
        // Nothing of the load is left to drain. Other ranks are told, where there are any.
        interrupt.exits()?;
        digests.extend(weights.check_moved().map_err(failed)?);
    }
    Ok(Run { report, tensors, digests })
}

fn load_once(
    loader: &Loader,
    plan: &Plan,
    output: &Output,
    interrupt: &Interrupt,
) -> Result<(Weights, Report, BTreeMap<Rank, usize>), Failure> {
    let failed = |error| Failure::started(error).with_signal(interrupt.signal());
    let mut load = loader.start(plan).map_err(|error| match error.kind() {
        // Nothing moves yet: there is no driver, no such device, or it has no room.
        ErrorKind::Device => Failure::from(error),
        _ => failed(error),
    })?;
    interrupt.cancels(load.monitor());
    let watch = Watch::start(load.monitor(), output.warnings());
    let mut tensors: BTreeMap<Rank, usize> = plan.world().driven().iter().map(|rank| (*rank, 0)).collect();
    for tensor in &mut load {
        let tensor = tensor.map_err(failed)?;
        *tensors.entry(tensor.rank()).or_default() += 1;
    }
    let (weights, report) = load.finish().map_err(failed)?;
    drop(watch);
    Ok((weights, report, tensors))
}

/// The file of `--trace`: created before anything moves, and whole JSON whenever something was written to it.
struct TraceFile {
    trace: Trace,
    path: PathBuf,
    file: File,
}

impl TraceFile {
    /// Refuses one of the `inputs`. Compares identities: a name may be spelt in many ways.
    fn create(path: &Path, inputs: impl IntoIterator<Item = PathBuf>) -> shardlift::Result<TraceFile> {
        let cannot = |error| Error::io("cannot create trace", path, error);
        let mut made = true;
        // What was in it goes when something is written.
        let opened = OpenOptions::new().write(true).create_new(true).open(path).or_else(|error| {
            made = false;
            match error.kind() {
                io::ErrorKind::AlreadyExists => OpenOptions::new().write(true).create(true).truncate(false).open(path),
                _ => Err(error),
            }
        });
        let file = opened.map_err(cannot)?;
        let own = file.metadata().map_err(cannot)?;
        let is_own = |input: &PathBuf| {
            fs::metadata(input).is_ok_and(|input| (input.dev(), input.ino()) == (own.dev(), own.ino()))
        };
        if own.is_file()
            && let Some(input) = inputs.into_iter().find(is_own)
        {
            if made {
                // It would be read if it stayed.
                fs::remove_file(path).map_err(cannot)?;
            }
            return Err(Error::new(ErrorKind::Usage, "the trace would take the place of a file that is read")
                .with_rule("trace-is-input")
                .with_expected("another file", input.display())
                .with_file(path));
        }
        Ok(TraceFile { trace: Trace::new(), path: path.into(), file })
    }

    fn is_file(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.is_file())
    }

    /// Writes all that was recorded so far in the place of what was written before.
    fn write(&self) -> shardlift::Result<()> {
        let write = || {
            let mut file = &self.file;
            // What is no file, a pipe for instance, gets one after the other.
            if self.is_file() {
                file.rewind()?;
                file.set_len(0)?;
            }
            self.trace.write(file)
        };
        write().map_err(|error| Error::io("cannot write trace", &self.path, error))
    }
}

fn loader(args: &LoadArgs) -> shardlift::Result<Loader> {
    let LoadArgs { engine, doctor, staging, memory, residency, page_cache, throttle, .. } = args;
    let measured = doctor.as_deref().map(rates::measured).transpose()?.unwrap_or_default();
    let engine = match engine {
        Engine::Auto => EngineChoice::Auto,
        Engine::Pread => EngineChoice::Pread,
        Engine::Mmap => EngineChoice::Mmap,
        Engine::Uring => EngineChoice::Uring,
        Engine::Cufile => EngineChoice::Cufile,
    };
    let memory = match memory {
        MemoryChoice::Blocks => Memory::Blocks,
        MemoryChoice::PerTensor => Memory::PerTensor,
    };
    let residency = match residency {
        ResidencyChoice::Owned => Residency::Owned,
        ResidencyChoice::Mapped => Residency::Mapped,
    };
    let staging = staging.map_or(limits::STAGING, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    Ok(Loader::new()
        .engine(engine)
        .cufile_measured(&measured.cufile)
        .staging(staging)
        .memory(memory)
        .residency(residency)
        .drop_page_cache(*page_cache == PageCache::Drop)
        .throttle(*throttle))
}

fn print(report: &Report, output: &mut Output) {
    let needed = human_bytes(report.needed_bytes);
    let landed = human_bytes(report.landed_bytes);
    let rate = gb_per_s(report);
    output.line(format_args!("loaded {needed} into {landed} in {:.3} s: {rate:.2} GB/s", report.seconds));
    let direct = report.direct.map_or(String::new(), |direct| format!(", direct: {direct}"));
    output.line(format_args!("engine: {} ({}{direct})", report.engine, report.engine_reason));
    output.line(format_args!(
        "read {}, peak beyond destinations {}, bottleneck {}",
        human_bytes(report.storage_bytes_read),
        human_bytes(report.peak_extra_bytes),
        report.bottleneck
    ));
    let [sent, received] = [report.sent_bytes, report.received_bytes];
    if sent > 0 || received > 0 {
        output.line(format_args!("sent {} to other ranks, received {}", human_bytes(sent), human_bytes(received)));
    }
}

/// The fields that every command with a load in it reports.
pub(crate) fn report_object(report: &Report) -> Map<String, Value> {
    let stage = |time: StageTime| json!({ "busy_seconds": time.busy, "waiting_seconds": time.waiting });
    let (stages, spent) = (&report.stages, &report.spent);
    fields(json!({
        "seconds": report.seconds,
        "cpu_seconds": report.cpu_seconds,
        "needed_bytes": report.needed_bytes,
        "landed_bytes": report.landed_bytes,
        "storage_bytes_read": report.storage_bytes_read,
        "sent_bytes": report.sent_bytes,
        "received_bytes": report.received_bytes,
        "gb_per_s": gb_per_s(report),
        "engine": report.engine,
        "engine_reason": report.engine_reason,
        "direct": report.direct.map(|direct| direct.to_string()),
        "peak_extra_bytes": report.peak_extra_bytes,
        "peak_pinned_bytes": report.peak_pinned_bytes,
        "abandoned_bytes": report.abandoned_bytes,
        "stages": {
            "read": stage(stages.read),
            "copy": stage(stages.copy),
            "consume": stage(stages.consume),
        },
        "spent": {
            "storage_seconds": spent.storage,
            "cpu_seconds": spent.cpu,
            "link_seconds": spent.link,
            "consumer_seconds": spent.consumer,
        },
        "bottleneck": report.bottleneck,
    }))
}

fn gb_per_s(report: &Report) -> f64 {
    if report.seconds > 0.0 { report.needed_bytes as f64 / report.seconds / 1e9 } else { 0.0 }
}

/// While it lives: the load's warnings as they come, and a bar on stderr if that is a terminal. When it is dropped no
/// warning is left untold, however the load ended.
pub(crate) struct Watch {
    news: Arc<Mutex<News>>,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct News {
    monitor: Monitor,
    warnings: Warnings,
    told: usize,
    bar: ProgressBar,
}

impl News {
    fn tell(&mut self) {
        let all = self.monitor.warnings();
        let new = &all[self.told..];
        if !new.is_empty() {
            self.bar.suspend(|| self.warnings.warn(new));
            self.told = all.len();
        }
    }
}

impl Watch {
    pub(crate) fn start(monitor: Monitor, warnings: Warnings) -> Watch {
        let bar = match std::io::stderr().is_terminal() {
            true => ProgressBar::new(monitor.progress().bytes_total),
            false => ProgressBar::hidden(),
        };
        let style =
            ProgressStyle::with_template("{bar:40} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}");
        let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let done = Arc::new(AtomicBool::new(false));
        let news = News { monitor: monitor.clone(), warnings, told: 0, bar: bar.clone() };
        let news = Arc::new(Mutex::new(news));
        let (theirs, told) = (Arc::clone(&done), Arc::clone(&news));
        let watch = move || {
            while !theirs.load(Ordering::Acquire) {
                lock(&told).tell();
                bar.set_position(monitor.progress().bytes_done);
                thread::park_timeout(Duration::from_millis(100));
            }
            bar.finish_and_clear();
        };
        // Without the thread there is no bar, and the warnings come at the end.
        let thread = thread::Builder::new().name("shardlift-watch".into()).spawn(watch).ok();
        Watch { news, done, thread }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The bar is gone either way; a panic while drawing it is not the load's error.
            let _ = thread.join();
        }
        lock(&self.news).tell();
    }
}

fn lock(news: &Mutex<News>) -> MutexGuard<'_, News> {
    news.lock().unwrap_or_else(PoisonError::into_inner)
}
