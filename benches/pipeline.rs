//! What the pipeline itself costs on its way to a device: processor time outside reads and memory copies, on the driver
//! twin at unlimited speed; and what many small tensors cost against few large ones.
//!
//! `cargo bench --bench pipeline [-- FOLDER]`: three checkpoints in FOLDER (default `target/bench`): 18,867 tensors in the
//! shapes of a mixture of experts, a few large ones of the same 310 MB, and ten times as many of these: what they cost
//! more is the cost per byte, without that of starting and ending a load. `cargo test --bench pipeline` does it once with
//! few, and checks only what lands.

mod support;

use std::any::Any;
use std::cell::Cell;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use rustix::time::ClockId;
use serde_json::{Value, json};
use shardlift::read::{Engine, Next, Pread, Request, Work};
use shardlift::{Checkpoint, Loader, Plan, Result, Rules, World};
use support::{ledger, median, seconds, write_model};

/// What the pipeline may take for this many bytes, and what small tensors must keep of the speed of large ones.
const PER_BYTES: f64 = (16 << 20) as f64;
const TARGET_SECONDS: f64 = 50e-6;
const TARGET_RATIO: f64 = 0.5;
/// Calls of the driver for each slot and device, and for each small tensor's part on each device.
const TARGET_CALLS: [f64; 2] = [3.0, 1.5];
/// One figure is a difference of small parts of large times: the verdict is on the median of rounds, each round's own
/// figures are medians of runs in one process.
const ROUNDS: usize = 5;
const RUNS: usize = 7;

/// How many times the bytes of the others the larger checkpoint has, or nearly.
const LARGER: u64 = 10;

/// Layers and experts of the mixture: 48 x (128 x 3 + 9) + 3 tensors.
const LAYERS: u64 = 48;
const EXPERTS: u64 = 128;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    if let Some("--one") = std::env::args().nth(1).as_deref() {
        let [folder, devices, runs] = [(); 3].map(|()| arguments.by_ref().find(|word| word != "--one").expect("three"));
        let (devices, runs) = (devices.parse().expect("a number"), runs.parse().expect("a number"));
        return one(Path::new(&folder), devices, runs);
    }
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = arguments.find(|argument| !argument.starts_with('-')).map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from("target/bench"));
    let (suffix, layers, experts) = if bench { ("", LAYERS, EXPERTS) } else { ("-small", 2, 8) };
    let (rounds, runs) = if bench { (ROUNDS, RUNS) } else { (1, 1) };
    let small = mixture(layers, experts);
    let bytes: u64 = small.iter().map(|(_, rows, columns)| rows * columns * 2).sum();
    // The same bytes in large ones, the last of which takes what is left.
    let (rows, each) = (2048, 2048 * 4096 * 2);
    let matrices = |count| (0..count).map(move |at| (format!("layers.{at}.weight"), rows, 4096));
    let mut large: Vec<_> = matrices(bytes / each).collect();
    large.push(("rest.weight".into(), 4, bytes % each / 8));
    let larger: Vec<_> = matrices(LARGER * (bytes / each).max(1)).collect();
    let mut out = io::stdout();
    for (name, tensors) in [("large", &large), ("larger", &larger), ("mixture", &small)] {
        write_model(&folder.join(format!("{name}{suffix}")), tensors)?;
    }
    for devices in [1, 4] {
        let (mut own, mut ratio) = (Vec::new(), Vec::new());
        let mut calls = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            let mut of = |name: &str| -> io::Result<[f64; 4]> {
                let figures = measure(&folder.join(format!("{name}{suffix}")), devices, runs)?;
                let head = format!("\"model\": \"{name}\", \"devices\": {devices}");
                writeln!(out, "{{{head}, {}", &figures.to_string()[1..])?;
                Ok(["own_seconds", "bytes", "gb_per_s", "driver_calls"]
                    .map(|name| figures[name].as_f64().expect("a number")))
            };
            let ([few, few_bytes, fast, some_calls], [many, many_bytes, _, more_calls]) = (of("large")?, of("larger")?);
            let [_, _, slow, small_calls] = of("mixture")?;
            own.push((many - few) / (many_bytes - few_bytes) * PER_BYTES);
            ratio.push(slow / fast);
            let slots = (many_bytes - few_bytes) / PER_BYTES;
            calls[0].push((more_calls - some_calls) / slots / f64::from(devices));
            calls[1].push(small_calls / small.len() as f64 / f64::from(devices));
        }
        let (of_rounds, own, ratio) =
            (format!("{:.0?}", own.iter().map(|own| own * 1e6).collect::<Vec<_>>()), median(&own), median(&ratio));
        // Less than nothing is what a busy machine makes of it.
        let verdict = |met| if met { "met" } else { "missed" };
        writeln!(
            out,
            "{devices} devices: {:.1} us per 16 MiB of {of_rounds}, target {:.0}: {}; small tensors at {ratio:.2} of large ones, target {}: {}",
            own * 1e6,
            TARGET_SECONDS * 1e6,
            verdict((0.0..=TARGET_SECONDS).contains(&own)),
            TARGET_RATIO,
            verdict(ratio >= TARGET_RATIO),
        )?;
        let [of_slots, of_small] = calls.map(|calls| median(&calls));
        writeln!(
            out,
            "{devices} devices: {of_slots:.2} driver calls for each slot and device, {of_small:.2} for each part of a small tensor, targets {TARGET_CALLS:?}: {}",
            verdict(of_slots <= TARGET_CALLS[0] && of_small <= TARGET_CALLS[1]),
        )?;
    }
    Ok(())
}

/// Tensors named and counted as those of a mixture of experts, and small.
fn mixture(layers: u64, experts: u64) -> Vec<(String, u64, u64)> {
    let mut tensors = Vec::new();
    for layer in 0..layers {
        let layer = format!("model.layers.{layer}");
        for expert in 0..experts {
            for name in ["gate_proj", "up_proj", "down_proj"] {
                tensors.push((format!("{layer}.mlp.experts.{expert}.{name}.weight"), 64, 128));
            }
        }
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            tensors.push((format!("{layer}.self_attn.{name}.weight"), 128, 128));
        }
        for name in ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm", "mlp.gate"]
        {
            tensors.push((format!("{layer}.{name}.weight"), 4, 128));
        }
    }
    for name in ["model.embed_tokens", "model.norm", "lm_head"] {
        tensors.push((format!("{name}.weight"), 512, 128));
    }
    tensors
}

/// One configuration, in a process of its own: the twin reads its settings once.
fn measure(folder: &Path, devices: u32, runs: usize) -> io::Result<Value> {
    let output = twins::cuda::command(std::env::current_exe()?)
        .arg("--one")
        .arg(folder)
        .args([devices.to_string(), runs.to_string()])
        .env("SIMCUDA_DEVICES", devices.to_string())
        .envs([("SIMCUDA_JITTER", "0"), ("SIMCUDA_CHECK", "0"), ("SIMCUDA_POISON", "0"), ("SIMCUDA_MEMORY", "4G")])
        .env("SIMCUDA_POPULATE", "1")
        .output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Loads row shards, and prints medians.
fn one(folder: &Path, devices: u32, runs: usize) -> io::Result<()> {
    twins::cuda::load();
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let rules = Rules::from_toml("rule = [{ match = \"**\", shard = { dim = 0 } }]").map_err(io::Error::other)?;
    let plan = Plan::new(&checkpoint, &rules, &World::local(0..devices)).map_err(io::Error::other)?;
    let engine = Arc::new(Metered { inner: Pread::new(2), nanoseconds: AtomicU64::new(0) });
    let loader = Loader::new().custom_engine(Arc::clone(&engine) as Arc<dyn Engine>);
    // Warm-up: the page cache, the pinned slots, and the answer.
    let (weights, _) = loader.load(&plan).map_err(io::Error::other)?;
    if runs == 1 {
        weights.check().map_err(io::Error::other)?;
    }
    let mut figures: [Vec<f64>; 8] = Default::default();
    let (mut calls, mut read_bytes) = (0, 0);
    drop(weights);
    for _ in 0..runs {
        twins::cuda::reset_counts();
        engine.nanoseconds.store(0, Ordering::Relaxed);
        let (began, cpu) = (Instant::now(), seconds(ClockId::ProcessCPUTime));
        let (weights, report) = loader.load(&plan).map_err(io::Error::other)?;
        let (wall, cpu) = (began.elapsed().as_secs_f64(), seconds(ClockId::ProcessCPUTime) - cpu);
        let ledger = ledger(folder)?;
        drop(weights);
        let of_twin = |name: &str| ledger[name].as_f64().expect("a number");
        let reads = engine.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
        let (copies, twin) = (of_twin("copy_cpu_seconds"), of_twin("other_cpu_seconds"));
        // Memory of a device has its pages.
        let wall = wall - of_twin("populate_seconds");
        let bytes = report.storage_bytes_read as f64;
        let per = |seconds: f64| seconds / bytes * PER_BYTES * 1e6;
        let in_calls = of_twin("call_cpu_seconds");
        let own = cpu - copies - twin - in_calls - reads;
        let all = [own, per(own), per(reads), per(copies), per(twin), per(in_calls), bytes / wall / 1e9, wall];
        read_bytes = report.storage_bytes_read;
        figures.iter_mut().zip(all).for_each(|(figures, figure)| figures.push(figure));
        calls = ledger["calls"].as_u64().expect("a number");
    }
    let [own, own_each, reads, copies, twin, in_calls, speed, wall] = figures.map(|figures| median(&figures));
    let object = json!({
        "bytes": read_bytes, "own_seconds": own, "own_us_per_16_mib": own_each, "reads_us_per_16_mib": reads, "copies_us_per_16_mib": copies,
        "twin_us_per_16_mib": twin, "calls_us_per_16_mib": in_calls, "gb_per_s": speed, "seconds": wall, "driver_calls": calls,
    });
    writeln!(io::stdout(), "{object}")
}

/// Plain reads that know what processor time they took.
#[derive(Debug)]
struct Metered {
    inner: Pread,
    nanoseconds: AtomicU64,
}

// SAFETY: the engine inside answers for all of it; `Meter` hands requests through as they are.
unsafe impl Engine for Metered {
    fn name(&self) -> &'static str {
        "metered"
    }

    fn threads(&self) -> usize {
        self.inner.threads()
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        self.inner.run(&Meter { work, spent: &self.nanoseconds })
    }
}

struct Meter<'a> {
    work: &'a dyn Work,
    spent: &'a AtomicU64,
}

/// What asking for a thread's time takes itself.
static ASKING: LazyLock<f64> = LazyLock::new(|| {
    let began = seconds(ClockId::ThreadCPUTime);
    for _ in 0..255 {
        seconds(ClockId::ThreadCPUTime);
    }
    (seconds(ClockId::ThreadCPUTime) - began) / 256.0
});

thread_local! {
    /// This thread's processor time when it got its request.
    static BEGAN: Cell<f64> = const { Cell::new(0.0) };
}

impl Work for Meter<'_> {
    fn next(&self, may_wait: bool) -> Next {
        let next = self.work.next(may_wait);
        BEGAN.set(seconds(ClockId::ThreadCPUTime));
        next
    }

    fn stopped(&self) -> bool {
        self.work.stopped()
    }

    fn done(&self, request: Request, outcome: io::Result<usize>) {
        let took = seconds(ClockId::ThreadCPUTime) - BEGAN.get() + *ASKING;
        self.spent.fetch_add((took * 1e9) as u64, Ordering::Relaxed);
        self.work.done(request, outcome);
    }

    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        // SAFETY: the same duties.
        unsafe { self.work.lent(request, mapping, keep) }
    }
}
