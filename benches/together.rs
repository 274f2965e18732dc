//! Ranks that read together, against the slowest of what they share: one load by 8 ranks, threads of one process with a GPU
//! of the twin each, from storage that all of them share, over links of their own to their GPU and to each other.
//!
//! `cargo bench --bench together [-- [--slow N] [--only WAY] [FOLDER]]`: 537 MB in FOLDER (default `target/bench`), whole tensors,
//! column shards, and two stages, of which one begins with what all its ranks want, while both end with what all ranks want;
//! read together and by each rank alone. Each configuration is a process of its own, which loads once to warm up, then some
//! times. Prints medians in the model's own time, from the start to the end of the last byte on a link, and how they compare
//! with the slowest resource. What is read together has all its rates divided by N (4): the twins copy up to 9 GB for it on
//! this machine's processors, which has to fit into the model's time. `cargo test --bench together` does it once with 16 MB,
//! and then checks that bytes are right and the time is not far off.

mod support;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::thread;

use rustix::time::ClockId;
use serde_json::{Value, json};
use shardlift::plan::{Cooperate, DeviceSpec, Mesh, Traffic};
use shardlift::read::EngineChoice;
use shardlift::{
    Checkpoint, Group, GroupOptions, Launch, LaunchOptions, Loader, Plan, Rank, Report, Result, Rules, World,
};
use support::{ledger, load_again, median, memory_of, seconds, write_model};

const RANKS: u32 = 8;
/// Bytes per second: of the storage that all share, of each rank's link to its GPU, and to the others.
const STORAGE: f64 = 800e6;
const LINK: f64 = 400e6;
const PEERS: f64 = 2e9;
/// What all rates of loads that read together are divided by.
const SLOW: f64 = 4.0;
const RUNS: usize = 3;
/// What a load may take of the time of the slowest of these.
const TARGET: f64 = 1.1;
/// The same on little data, where a busy machine's pauses weigh more.
const SLACK: f64 = 3.0;

/// Name, rules, pipeline stages, and staging memory of each rank: the stages' is less than what waits for others there.
const WAYS: [(&str, &str, u32, usize); 3] = [
    ("whole", "rule = [{ match = '**', replicate = true }]", 1, 64 << 20),
    ("columns", "rule = [{ match = '**', shard = { dim = 1 } }]", 1, 64 << 20),
    (
        "stages",
        "rule = [
            { match = 'z.**', replicate = true },
            { match = 'a.**', stage = 'first', replicate = true },
            { match = 'b.**', stage = 'first', shard = { dim = 0 } },
            { match = '{c,d}.**', stage = 'last', shard = { dim = 0 } },
        ]",
        2,
        16 << 20,
    ),
];

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [one, folder, way, how, slow, runs] = &arguments[..]
        && one == "--one"
    {
        let number = |text: &String| text.parse::<f64>().expect("a number");
        return self::one(Path::new(folder), way, how == "together", number(slow), number(runs) as usize);
    }
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = arguments.iter().any(|argument| argument == "--bench");
    let after =
        |flag: &str| arguments.iter().position(|argument| argument == flag).and_then(|at| arguments.get(at + 1));
    let slow = after("--slow").map_or(SLOW, |text| text.parse().expect("a number"));
    let values = [after("--slow"), after("--only")];
    let is_folder = |argument: &&String| !argument.starts_with('-') && !values.contains(&Some(argument));
    let folder = PathBuf::from(arguments.iter().find(is_folder).map_or("target/bench", String::as_str));
    let (name, tensors, rows, runs) = if bench { ("ranks", 8, 2048, RUNS) } else { ("ranks-small", 2, 256, 1) };
    let folder = folder.join(name);
    let names = (0..tensors).flat_map(|at| ["a", "b", "c", if at == 0 { "z" } else { "d" }].map(|part| (part, at)));
    let tensors: Vec<_> = names.map(|(part, at)| (format!("{part}.{at}.weight"), rows, 4096)).collect();
    write_model(&folder, &tensors)?;
    let mut out = io::stdout();
    writeln!(out, "way      how       slow  storage s  link s  peers s  ideal s  model s  ratio  wall s  read of all")?;
    let mut met = true;
    for (way, ..) in WAYS.iter().filter(|(way, ..)| after("--only").is_none_or(|only| only == way)) {
        for (how, slow, runs) in [("together", slow, runs), ("alone", 1.0, 1)] {
            let measured = measure(&folder, way, how, slow, runs)?;
            let figure = |name: &str| measured[name].as_f64().expect("a number");
            let (ideal, model) = (figure("ideal"), figure("model"));
            writeln!(
                out,
                "{way:8} {how:8}  {slow:4}  {:9.3}  {:6.3}  {:7.3}  {ideal:7.3}  {model:7.3}  {:5.3}  {:6.3}  {:11.3}",
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
fn measure(folder: &Path, way: &str, how: &str, slow: f64, runs: usize) -> io::Result<Value> {
    let output = twins::cuda::command(std::env::current_exe()?)
        .arg("--one")
        .arg(folder)
        .args([way, how, &slow.to_string(), &runs.to_string()])
        .env("SIMCUDA_DEVICES", RANKS.to_string())
        .env("SIMCUDA_LINK", (LINK / slow / 1e9).to_string())
        .env("SIMNCCL_LINK", (PEERS / slow / 1e9).to_string())
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
fn one(folder: &Path, way: &str, together: bool, slow: f64, runs: usize) -> io::Result<()> {
    twins::cuda::load();
    twins::nccl::load();
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let (_, rules, stages, staging) = *WAYS.iter().find(|(name, ..)| *name == way).expect("a way");
    let rules = Rules::from_toml(rules).map_err(io::Error::other)?;
    let case = Case { checkpoint: &checkpoint, rules, stages, staging, together, slow, runs };
    // All begin at once; the first of them looks at the clock and at the ledger.
    let line = Barrier::new(RANKS as usize);
    let meeting = tempfile::tempdir()?;
    let url = format!("file://{}", meeting.path().join("meeting").display());
    let of_ranks: Vec<io::Result<OfRank>> = thread::scope(|scope| {
        let (case, line, url) = (&case, &line, &url);
        let rank = |rank| move || load(Rank(rank), case, line, url, folder);
        let ranks: Vec<_> = (0..RANKS).map(|at| scope.spawn(rank(at))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
    });
    let of_ranks = of_ranks.into_iter().collect::<io::Result<Vec<OfRank>>>()?;
    // What must be: every byte once from storage, of which each rank has an equal share, over the ranks' links what they
    // read, and the rest of what lands from peers.
    let bytes = checkpoint.bytes() as f64;
    let most = |of: fn(&Traffic, &Report) -> u64| {
        let of = of_ranks.iter().map(|rank| of(&rank.traffic, &rank.report));
        of.max().unwrap_or(0) as f64 * slow
    };
    let storage = if together {
        (bytes / STORAGE * slow).max(most(|_, report| report.storage_bytes_read) / (STORAGE / f64::from(RANKS)))
    } else {
        bytes / STORAGE * slow
    };
    let link = bytes / f64::from(RANKS) / LINK * slow;
    let peers = most(|traffic, _| traffic.sent_bytes.max(traffic.received_bytes)) / PEERS;
    let ideal = storage.max(link).max(peers);
    let read = of_ranks.iter().map(|rank| rank.report.storage_bytes_read).sum::<u64>() as f64;
    let first = &of_ranks[0];
    let object = json!({
        "storage": storage, "link": link, "peers": peers, "ideal": ideal,
        "model": median(&first.model), "wall": median(&first.wall), "models": first.model,
        "read_of_all": read / bytes,
    });
    writeln!(io::stdout(), "{object}")
}

/// What all ranks do.
struct Case<'a> {
    checkpoint: &'a Checkpoint,
    rules: Rules,
    stages: u32,
    staging: usize,
    together: bool,
    slow: f64,
    runs: usize,
}

/// What one rank saw: the times are the first one's to tell.
struct OfRank {
    report: Report,
    traffic: Traffic,
    model: Vec<f64>,
    wall: Vec<f64>,
}

fn load(rank: Rank, case: &Case<'_>, line: &Barrier, url: &str, folder: &Path) -> io::Result<OfRank> {
    let &Case { checkpoint, ref rules, stages, staging, together, slow, runs } = case;
    let group = join(rank, url).map_err(io::Error::other)?;
    let mesh = Mesh { pp: stages, ..Mesh::tp(RANKS / stages) };
    let world = World::member(rank, RANKS, DeviceSpec::Cuda(rank.0)).with_mesh(mesh);
    let world = match together {
        true => world.reading_together(vec![0; RANKS as usize], Cooperate::Always),
        false => world,
    };
    let plan = Plan::new(checkpoint, rules, &world).map_err(io::Error::other)?;
    let rate = STORAGE / f64::from(RANKS) / slow;
    let loader =
        Loader::new().engine(EngineChoice::Pread).staging(staging).throttle(Some(rate as u64)).group(Some(&group));
    let (weights, mut report) = loader.load(&plan).map_err(io::Error::other)?;
    if runs == 1 {
        weights.check().map_err(io::Error::other)?;
    }
    let memory = memory_of(&weights);
    let (mut model, mut wall) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        if line.wait().is_leader() {
            twins::cuda::reset_counts();
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
    Ok(OfRank { report, traffic: plan.traffic()[rank.index()], model, wall })
}

fn join(rank: Rank, url: &str) -> Result<Arc<Group>> {
    let mut options = LaunchOptions::default();
    (options.rank, options.size, options.rendezvous) = (Some(rank), Some(RANKS), Some(url.into()));
    options.node = Some("here".into());
    let launch = Launch::from_vars(&|_| None, &options)?.expect("flags say it all");
    Group::join(&launch, &GroupOptions::default()).map(Arc::new)
}
