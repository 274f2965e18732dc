//! Ranks that read together, against the slowest of what they share: one load by 8 ranks, threads of one process with a GPU
//! of the twin each, from storage that all of them share, over links of their own to their GPU and to each other.
//!
//! `cargo bench --bench together [-- FOLDER]`: 512 MB in FOLDER (default `target/bench`), whole tensors and column shards,
//! read together and by each rank alone. Each configuration is a process of its own, which loads once to warm up, then
//! five times. Prints medians in the model's own time, from the start to the end of the last byte on a link, and how they
//! compare with the slowest resource. `cargo test --bench together` does it once with 16 MB, and then checks that bytes
//! are right and the time is not far off.

#[path = "../tests/support/nccl_twin.rs"]
mod nccl_twin;
mod support;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::thread;

use rustix::time::ClockId;
use serde_json::{Value, json};
use shardlift::plan::{Cooperate, DeviceSpec};
use shardlift::read::EngineChoice;
use shardlift::{
    Checkpoint, Group, GroupOptions, Launch, LaunchOptions, Loader, Plan, Rank, Report, Result, Rules, World,
};
use support::{ledger, load_again, median, memory_of, seconds, twin, write_model};

const RANKS: u32 = 8;
/// Bytes per second: of the storage that all share, of each rank's link to its GPU, and to the others.
const STORAGE: f64 = 800e6;
const LINK: f64 = 400e6;
const PEERS: f64 = 2e9;
const RUNS: usize = 5;
/// What a load may take of the time of the slowest of these.
const TARGET: f64 = 1.1;
/// The same on little data, where a busy machine's pauses weigh more.
const SLACK: f64 = 3.0;

const WAYS: [(&str, &str); 2] = [
    ("whole", "rule = [{ match = \"**\", replicate = true }]"),
    ("columns", "rule = [{ match = \"**\", shard = { dim = 1 } }]"),
];

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    if let Some("--one") = std::env::args().nth(1).as_deref() {
        arguments.next();
        let [folder, way, how, runs] = [(); 4].map(|()| arguments.next().expect("four arguments"));
        return one(Path::new(&folder), &way, how == "together", runs.parse().expect("a number"));
    }
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = arguments.find(|argument| !argument.starts_with('-')).map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from("target/bench"));
    let (name, tensors, rows, runs) = if bench { ("together", 32, 2048, RUNS) } else { ("together-small", 8, 256, 1) };
    let folder = folder.join(name);
    let tensors: Vec<_> = (0..tensors).map(|at| (format!("layers.{at}.weight"), rows, 4096)).collect();
    write_model(&folder, &tensors)?;
    let mut out = io::stdout();
    writeln!(out, "way      how       storage s  link s  peers s  ideal s  model s  ratio  wall s  read of all")?;
    let mut met = true;
    for (way, _) in WAYS {
        for how in ["together", "alone"] {
            let measured = measure(&folder, way, how, runs)?;
            let figure = |name: &str| measured[name].as_f64().expect("a number");
            let (ideal, model) = (figure("ideal"), figure("model"));
            writeln!(
                out,
                "{way:8} {how:8}  {:9.3}  {:6.3}  {:7.3}  {ideal:7.3}  {model:7.3}  {:5.3}  {:6.3}  {:11.3}",
                figure("storage"),
                figure("link"),
                figure("peers"),
                model / ideal,
                figure("wall"),
                figure("read_of_all"),
            )?;
            if how == "together" {
                met &= model <= ideal * TARGET;
                assert!(figure("read_of_all") <= 1.01, "{way}: storage was read more than once");
                assert!(bench || model < ideal * SLACK, "{way}: {model} s, ideal {ideal} s");
            }
        }
    }
    writeln!(out, "target of {TARGET}: {}", if met { "met" } else { "missed" })
}

/// One configuration, in a process of its own: the twins read their settings once.
fn measure(folder: &Path, way: &str, how: &str, runs: usize) -> io::Result<Value> {
    let output = twin::command(std::env::current_exe()?)
        .arg("--one")
        .arg(folder)
        .args([way, how, &runs.to_string()])
        .env("SIMCUDA_DEVICES", RANKS.to_string())
        .env("SIMCUDA_LINK", (LINK / 1e9).to_string())
        .env("SIMNCCL_LINK", (PEERS / 1e9).to_string())
        .env("SIMCUDA_MEMORY", "2G")
        // What the twin checks of the bytes takes processor time that the model does not know of.
        .envs([("SIMCUDA_CHECK", "0"), ("SIMCUDA_POISON", "0")])
        .output()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(io::Error::other(format!("{way}, {how}: {message}")));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Loads by all ranks, and prints the medians and what they are held against.
fn one(folder: &Path, way: &str, together: bool, runs: usize) -> io::Result<()> {
    twin::load();
    nccl_twin::load();
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let rules = WAYS.iter().find(|(name, _)| *name == way).expect("a way").1;
    let rules = Rules::from_toml(rules).map_err(io::Error::other)?;
    // All begin at once; the first of them looks at the clock and at the ledger.
    let line = Barrier::new(RANKS as usize);
    let meeting = tempfile::tempdir()?;
    let url = format!("file://{}", meeting.path().join("meeting").display());
    let of_ranks: Vec<io::Result<OfRank>> = thread::scope(|scope| {
        let (checkpoint, rules, line, url) = (&checkpoint, &rules, &line, &url);
        let rank = |rank| move || load(Rank(rank), checkpoint, rules, together, runs, line, url, folder);
        let ranks: Vec<_> = (0..RANKS).map(|at| scope.spawn(rank(at))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
    });
    let of_ranks = of_ranks.into_iter().collect::<io::Result<Vec<OfRank>>>()?;
    let sum = |of: fn(&Report) -> u64| of_ranks.iter().map(|rank| of(&rank.report)).sum::<u64>() as f64;
    let most = |of: fn(&Report) -> u64| of_ranks.iter().map(|rank| of(&rank.report)).max().unwrap_or(0) as f64;
    // What must be: every byte once from storage, in equal parts over the ranks' links, and the rest from peers.
    let bytes = checkpoint.bytes() as f64;
    let landed = most(|report| report.landed_bytes);
    let own = bytes / f64::from(RANKS);
    let (storage, link, peers) = (bytes / STORAGE, own / LINK, (landed - landed / f64::from(RANKS)) / PEERS);
    let ideal = storage.max(link).max(peers);
    let first = &of_ranks[0];
    let object = json!({
        "storage": storage, "link": link, "peers": peers, "ideal": ideal,
        "model": median(&first.model), "wall": median(&first.wall), "models": first.model,
        "read_of_all": sum(|report| report.storage_bytes_read) / bytes,
    });
    writeln!(io::stdout(), "{object}")
}

/// What one rank saw: the times are the first one's to tell.
struct OfRank {
    report: Report,
    model: Vec<f64>,
    wall: Vec<f64>,
}

#[expect(clippy::too_many_arguments, reason = "one call, from the threads of a scope")]
fn load(
    rank: Rank,
    checkpoint: &Checkpoint,
    rules: &Rules,
    together: bool,
    runs: usize,
    line: &Barrier,
    url: &str,
    folder: &Path,
) -> io::Result<OfRank> {
    let group = join(rank, url).map_err(io::Error::other)?;
    let world = World::member(rank, RANKS, DeviceSpec::Cuda(rank.0));
    let world = match together {
        true => world.reading_together(vec![0; RANKS as usize], Cooperate::Always),
        false => world,
    };
    let plan = Plan::new(checkpoint, rules, &world).map_err(io::Error::other)?;
    let rate = STORAGE / f64::from(RANKS);
    let loader =
        Loader::new().engine(EngineChoice::Pread).staging(64 << 20).throttle(Some(rate as u64)).group(Some(&group));
    let (weights, mut report) = loader.load(&plan).map_err(io::Error::other)?;
    if runs == 1 {
        weights.check().map_err(io::Error::other)?;
    }
    let memory = memory_of(&weights);
    let (mut model, mut wall) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        if line.wait().is_leader() {
            twin::reset_counts();
        }
        line.wait();
        let began = seconds(ClockId::Monotonic);
        report = load_again(&loader, &weights, &memory)?;
        line.wait();
        if rank == Rank(0) {
            wall.push(seconds(ClockId::Monotonic) - began);
            model.push(ledger(folder)?["last_copy_end_ns"].as_f64().expect("a number") / 1e9 - began);
        }
    }
    group.finish().map_err(io::Error::other)?;
    Ok(OfRank { report, model, wall })
}

fn join(rank: Rank, url: &str) -> Result<Arc<Group>> {
    let mut options = LaunchOptions::default();
    (options.rank, options.size, options.rendezvous) = (Some(rank), Some(RANKS), Some(url.into()));
    options.node = Some("here".into());
    let launch = Launch::from_vars(&|_| None, &options)?.expect("flags say it all");
    Group::join(&launch, &GroupOptions::default()).map(Arc::new)
}
