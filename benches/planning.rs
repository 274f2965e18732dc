//! Opening and planning at scale, headers only: sparse files shaped like DeepSeek-V3 (163 files) and Llama-3.1-70B
//! (30 files), planned for 8 ranks, written into FOLDER (default `target/bench`).
//!
//! `cargo bench --bench planning [-- FOLDER]` prints seconds (median of 7), those of the phases of planning, the
//! audit's share of them, and the process's peak memory as JSON, then holds the shapes that have bounds ([`BOUNDS`])
//! against these, each in a process of its own.
//! `cargo test --bench planning` does it once: the results are checked, the figures mean nothing.

#[path = "support/phases.rs"]
mod phases;
#[path = "../tests/support/released/mod.rs"]
mod released;
#[path = "support/shapes.rs"]
mod shapes;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use released::{DeepSeek, Llama, Model};
use serde_json::{Map, Value, json};
use shapes::{RULES, models};
use shardlift::plan::Mesh;
use shardlift::{Checkpoint, Plan, Rules, World};

const RUNS: usize = 7;
const RANKS: u32 = 8;
const BOUND: &str = "--bound";

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

fn main() -> io::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
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

/// The most memory that this process ever had (Linux).
fn peak_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no VmHWM"))
}
