//! Opening and planning at scale, headers only: sparse files shaped like DeepSeek-V3 (163 files) and Llama-3.1-70B
//! (30 files), planned for 8 ranks, written into FOLDER (default `target/bench`).
//!
//! `cargo bench --bench planning [-- FOLDER]` prints seconds (median of 7), those of the phases of planning, the
//! audit's share of them, and the process's peak memory as JSON, then holds the shapes that have bounds ([`BOUNDS`])
//! against these, each in a process of its own.
//! `cargo test --bench planning` does it once: the results are checked, the figures mean nothing.
//! `scripts/count-instructions [--record]` counts instructions (`-- --count`, `-- --record`) and holds them against
//! `benches/record/instructions.json`: a count repeats where a time does not, so it can fail a push.

#[path = "support/phases.rs"]
mod phases;
#[path = "../tests/support/released/mod.rs"]
mod released;

use std::ffi::OsString;
use std::hint::black_box;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use released::{DeepSeek, Llama, Model};
use serde_json::{Map, Value, json};
use shardlift::plan::Mesh;
use shardlift::{Checkpoint, Plan, Rules, World};

const RUNS: usize = 7;
const RANKS: u32 = 8;
const PART: &str = "--part";
const BOUND: &str = "--bound";
const RECORD: &str = "benches/record/instructions.json";

/// What opening and planning may take, whoever asks.
struct Bound {
    name: &'static str,
    model: fn() -> Model,
    tp: u32,
    ep: u32,
    seconds: f64,
    bytes: u64,
}

const BOUNDS: [Bound; 2] = [
    Bound {
        name: "llama-3.1-405b",
        model: || Llama::LLAMA_3_1_405B.model(),
        tp: 16,
        ep: 1,
        seconds: 0.06,
        bytes: 500_000_000,
    },
    Bound { name: "deepseek-v3", model: || DeepSeek::V3.model(), tp: 8, ep: 8, seconds: 1.5, bytes: 500_000_000 },
];

/// Counts repeat where all of [`environment`] is equal. What is left is for unrelated changes that shift what the
/// compiler inlines.
const TOLERANCE: f64 = 0.03;
/// Elsewhere other code is counted. Seen: 4% for another `memcpy` of the libc, 0.4% for a compiler two versions newer
/// and for a `malloc` without caches per thread.
const TOLERANCE_ELSEWHERE: f64 = 0.10;

/// Rows for what feeds a layer, columns for what leaves it, the rest whole (sharding of tensor-parallel experts).
const RULES: &str = r#"
rule = [
  { match = "**.{q,k,v,gate,up,q_b,kv_b}_proj.weight", shard = { dim = 0 } },
  { match = "**.{q_b,kv_b}_proj.weight_scale_inv", shard = { dim = 0 }, optional = true },
  { match = "**.{gate,up}_proj.weight_scale_inv", shard = { dim = 0 }, optional = true },
  { match = "**.{o,down}_proj.weight", shard = { dim = 1 } },
  { match = "**.{o,down}_proj.weight_scale_inv", shard = { dim = 1 }, optional = true },
  { match = "**", replicate = true },
]
"#;

fn main() -> io::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, part, model] = &arguments[..]
        && flag == PART
    {
        return run_part(part, Path::new(model)).map(|()| ExitCode::SUCCESS);
    }
    if let [flag, name, folder, runs] = &arguments[..]
        && flag == BOUND
    {
        let bound = BOUNDS.iter().find(|bound| bound.name == name).ok_or_else(|| io::Error::other("no such bound"))?;
        return bound.measure(Path::new(folder), runs.parse().map_err(io::Error::other)?);
    }
    let flagged = |flag| arguments.iter().any(|argument| argument == flag);
    let folder = arguments.iter().find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    for (name, model) in models() {
        released::write(&folder.join(name), &model)?;
    }
    match flagged("--bench") {
        // `cargo test` does not say --bench.
        false => {
            time(&folder, 1)?;
            bounds(&folder, 1)?;
        }
        true if flagged("--record") => return instructions(&folder, true),
        true if flagged("--count") => return instructions(&folder, false),
        true => {
            time(&folder, RUNS)?;
            return bounds(&folder, RUNS);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Holds every shape of [`BOUNDS`] against its bound: fails if one is over it.
fn bounds(folder: &Path, runs: usize) -> io::Result<ExitCode> {
    let mut within = true;
    for Bound { name, model, .. } in &BOUNDS {
        released::write(&folder.join(name), &model())?;
        let status =
            Command::new(std::env::current_exe()?).args([BOUND, name]).arg(folder).arg(runs.to_string()).status()?;
        within &= status.success();
    }
    Ok(if within { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Bound {
    /// Opens and plans; fails if that takes too long or too much. One run alone proves nothing, and fails nothing.
    fn measure(&self, folder: &Path, runs: usize) -> io::Result<ExitCode> {
        let Bound { name, tp, ep, .. } = *self;
        let world = World::host(tp).with_mesh(Mesh { ep, ..Mesh::tp(tp) });
        let (mut open, mut plan, mut tensors) = (Vec::new(), Vec::new(), 0);
        for _ in 0..runs {
            let began = Instant::now();
            let checkpoint = Checkpoint::open(folder.join(name)).map_err(io::Error::other)?;
            open.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            let rules = Rules::for_model(&checkpoint).map_err(io::Error::other)?;
            let planned = Plan::new(&checkpoint, &rules, &world).map_err(io::Error::other)?;
            plan.push(began.elapsed().as_secs_f64());
            assert_eq!(planned.storage_bytes(), planned.needed_bytes(world.driven()), "every byte is read once");
            tensors = checkpoint.tensors().len();
        }
        open.sort_by(f64::total_cmp);
        plan.sort_by(f64::total_cmp);
        let (open, plan, peak) = (open[runs / 2], plan[runs / 2], peak_bytes()?);
        let within = open + plan <= self.seconds && peak <= self.bytes;
        let verdict = match (runs, within) {
            (1, _) => "one run alone",
            (_, true) => "ok",
            (_, false) => "FAILED: over its bound",
        };
        let result = json!({
            "model": name, "tensors": tensors, "tp": tp, "ep": ep, "open_seconds": open, "plan_seconds": plan,
            "at_most_seconds": self.seconds, "peak_bytes": peak, "at_most_bytes": self.bytes, "verdict": verdict,
        });
        writeln!(io::stdout(), "{result}")?;
        Ok(if within || runs == 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn time(folder: &Path, runs: usize) -> io::Result<()> {
    let rules = Rules::from_toml(RULES).map_err(io::Error::other)?;
    for (name, Model { tensors, files, .. }) in models() {
        let (mut open, mut plan, mut audit) = (Vec::new(), Vec::new(), Vec::new());
        let mut phases: Vec<(&str, Vec<f64>)> = Vec::new();
        for _ in 0..runs {
            let began = Instant::now();
            let checkpoint = Checkpoint::open(folder.join(name)).map_err(io::Error::other)?;
            open.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            let (planned, spent) = phases::of(|| Plan::new(&checkpoint, &rules, &World::host(RANKS)));
            let planned = planned.map_err(io::Error::other)?;
            plan.push(began.elapsed().as_secs_f64());
            let audited = spent.iter().find(|(name, _)| *name == "audit").map_or(f64::NAN, |(_, seconds)| *seconds);
            audit.push(audited / plan[plan.len() - 1]);
            for (name, seconds) in spent {
                match phases.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, all)) => all.push(seconds),
                    None => phases.push((name, vec![seconds])),
                }
            }
            assert_eq!(planned.params().len(), tensors.len(), "every tensor is planned");
            assert_eq!(planned.storage_bytes(), checkpoint.bytes(), "every byte is read once");
        }
        open.sort_by(f64::total_cmp);
        plan.sort_by(f64::total_cmp);
        audit.sort_by(f64::total_cmp);
        let phases: Map<String, Value> =
            phases.iter_mut().map(|(name, all)| ((*name).into(), json!(median(all)))).collect();
        let result = json!({
            "model": name, "tensors": tensors.len(), "files": files, "ranks": RANKS,
            "open_seconds": open[runs / 2], "plan_seconds": plan[runs / 2],
            "phases": phases, "audit_share": audit[runs / 2], "peak_bytes": peak_bytes()?,
        });
        writeln!(io::stdout(), "{result}")?;
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What valgrind runs: each part does what the one before it does, and one thing more.
fn run_part(part: &str, model: &Path) -> io::Result<()> {
    // Planning happens in this thread: what an idle worker does depends on when it is woken.
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().map_err(io::Error::other)?;
    let rules = Rules::from_toml(RULES).map_err(io::Error::other)?;
    if part == "start" {
        return Ok(());
    }
    let checkpoint = black_box(Checkpoint::open(model).map_err(io::Error::other)?);
    if part == "open" {
        return Ok(());
    }
    let planned = Plan::new(&checkpoint, &rules, &World::host(RANKS)).map_err(io::Error::other)?;
    assert_eq!(planned.storage_bytes(), checkpoint.bytes(), "every byte is read once");
    Ok(())
}

/// Counts both models, then records the counts or holds them against the record.
fn instructions(folder: &Path, record: bool) -> io::Result<ExitCode> {
    let mut counted = Map::new();
    for (name, _) in models() {
        let count = |part| count(folder, name, part);
        let (start, open, plan) = (count("start")?, count("open")?, count("plan")?);
        counted.insert(name.into(), json!({ "open": open - start, "plan": plan - open }));
    }
    let environment = environment()?;
    if record {
        let record = json!({
            "command": "scripts/count-instructions --record",
            "ranks": RANKS, "environment": environment, "instructions": counted,
        });
        std::fs::write(RECORD, format!("{record:#}\n"))?;
        writeln!(io::stdout(), "{RECORD}: {record:#}")?;
        return Ok(ExitCode::SUCCESS);
    }
    let record: Value = serde_json::from_str(&std::fs::read_to_string(RECORD)?)?;
    compare(&counted, &environment, &record)
}

fn compare(counted: &Map<String, Value>, environment: &Value, record: &Value) -> io::Result<ExitCode> {
    let mut out = io::stdout();
    let same = *environment == record["environment"];
    let tolerance = if same {
        TOLERANCE
    } else if environment["target"] == record["environment"]["target"] {
        TOLERANCE_ELSEWHERE
    } else {
        f64::INFINITY // the instructions of another target are other instructions
    };
    match tolerance.is_finite() {
        true => writeln!(out, "may differ from {RECORD} by {:.0}%", tolerance * 100.0)?,
        false => writeln!(out, "not held against {RECORD}, which is of another target")?,
    }
    if !same {
        writeln!(out, "recorded with {}", record["environment"])?;
        writeln!(out, "counted  with {environment}")?;
    }
    let mut failed = false;
    for (model, parts) in counted {
        for part in ["open", "plan"] {
            let count = parts[part].as_u64().ok_or_else(|| io::Error::other("no count"))?;
            let recorded = record["instructions"][model][part].as_u64();
            let recorded = recorded.ok_or_else(|| io::Error::other(format!("{RECORD} has no {model} {part}")))?;
            let change = count as f64 / recorded as f64 - 1.0;
            // A record that is too high would let a gain be lost again unseen. It is only made again where it was made.
            let (fails, verdict) = match change {
                change if change > tolerance => (true, "more work than recorded"),
                change if change < -tolerance => (same, "less work than recorded: record it (--record)"),
                _ if tolerance.is_finite() => (false, "ok"),
                _ => (false, "not compared"),
            };
            failed |= fails;
            let failure = if fails { "FAILED: " } else { "" };
            let change = change * 100.0;
            writeln!(
                out,
                "{model} {part}: {count} instructions, recorded {recorded}, {change:+.2}%: {failure}{verdict}"
            )?;
        }
    }
    if failed {
        writeln!(out, "meant? then `scripts/count-instructions --record` and say why in the commit")?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Instructions of a process that does `part`, its start included. What cachegrind wrote stays beside the model, for
/// `cg_annotate`.
fn count(folder: &Path, model: &str, part: &str) -> io::Result<u64> {
    let beside = |extension| folder.join(format!("{model}.{part}.{extension}"));
    let option = |name: &str, path: &Path| {
        let mut option = OsString::from(name);
        option.push(path);
        option
    };
    let (counts, log) = (beside("cachegrind"), beside("log"));
    let status = Command::new("valgrind")
        .args(["--quiet", "--tool=cachegrind", "--cache-sim=no"])
        .arg(option("--cachegrind-out-file=", &counts))
        .arg(option("--log-file=", &log))
        .arg(std::env::current_exe()?)
        .args([PART, part])
        .arg(folder.join(model))
        // No stack is that large, so no thread starts, and opening reads all headers in its own: with several, who
        // reads which file, and so the count, depends on the moment.
        .env("RUST_MIN_STACK", (usize::MAX / 16 + 1).to_string())
        .env_remove("VALGRIND_OPTS")
        .env_remove("DEBUGINFOD_URLS") // valgrind would ask the network for symbols
        .status()?;
    if !status.success() {
        return Err(io::Error::other(format!("valgrind: {status}, see {}", log.display())));
    }
    let counts = std::fs::read_to_string(counts)?;
    let summary = counts.lines().rev().find_map(|line| line.strip_prefix("summary:"));
    let count = summary.and_then(|line| line.split_whitespace().next()?.parse().ok());
    count.ok_or_else(|| io::Error::other("cachegrind gave no summary"))
}

/// All that counts depend on besides our code and its dependencies. Valgrind shows every x86-64 machine the same
/// processor, with AVX2 or without: that decides which `memcpy` is counted.
fn environment() -> io::Result<Value> {
    #[cfg(target_arch = "x86_64")]
    let avx2 = std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    let avx2 = false;
    Ok(json!({
        "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        "avx2": avx2,
        "rustc": first_line("rustc", "--version")?,
        "libc": first_line("getconf", "GNU_LIBC_VERSION")?,
        "valgrind": first_line("valgrind", "--version")?,
    }))
}

fn first_line(program: &str, argument: &str) -> io::Result<String> {
    let output = Command::new(program).arg(argument).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").into())
}

fn models() -> [(&'static str, Model); 2] {
    [("llama-3.1-70b", Llama::LLAMA_3_1_70B.model()), ("deepseek-v3", DeepSeek::V3.model())]
}

/// The most memory that this process ever had (Linux).
fn peak_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no VmHWM"))
}
