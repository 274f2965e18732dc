//! Whether reads and copies overlap: loads in the driver twin's timing mode from throttled storage, against the larger
//! of the storage's time and that of the busiest link, plus what one slot takes to fill and to drain.
//!
//! `cargo bench --bench overlap [-- FOLDER]`: 512 MB in FOLDER (default `target/bench`), 1 to 8 devices, whole tensors,
//! row shards and column shards. Each configuration is a process of its own, which loads once to warm up, then five
//! times. Prints medians, in the model's own time (from the start to the end of the last copy on its link) and in wall
//! time, and how they compare. `cargo test --bench overlap` does it once with 16 MB on few devices, and then only checks
//! that bytes are right and no time is far off.

mod support;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::time::ClockId;
use serde_json::{Value, json};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Plan, Rules, World, limits};
use support::{ledger, load_again, median, memory_of, seconds, write_model};

/// Bytes per second.
const STORAGE: f64 = 400e6;
const LINK: f64 = 200e6;
const STAGING: usize = 64 << 20;
const RUNS: usize = 5;
/// What a load may take of the bound, in the model's time and in wall time.
const TARGETS: [f64; 2] = [1.02, 1.05];
/// The same on little data, where a busy machine's pauses weigh more.
const SLACK: f64 = 2.0;

/// How the tensors are divided: a name, and rules.
const WAYS: [(&str, &str); 3] = [
    ("whole", "rule = [{ match = \"**\", replicate = true }]"),
    ("rows", "rule = [{ match = \"**\", shard = { dim = 0 } }]"),
    ("columns", "rule = [{ match = \"**\", shard = { dim = 1 } }]"),
];

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    if let Some("--one") = std::env::args().nth(1).as_deref() {
        arguments.next();
        let [folder, way, devices, runs] = [(); 4].map(|()| arguments.next().expect("four arguments"));
        let (devices, runs) = (devices.parse().expect("a number"), runs.parse().expect("a number"));
        return one(Path::new(&folder), &way, devices, runs);
    }
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = arguments.find(|argument| !argument.starts_with('-')).map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from("target/bench"));
    let (name, tensors, rows, device_counts, runs) = match bench {
        true => ("overlap", 32, 2048, &[1, 2, 4, 8][..], RUNS),
        false => ("overlap-small", 8, 256, &[1, 4][..], 1),
    };
    let folder = folder.join(name);
    let tensors: Vec<_> = (0..tensors).map(|at| (format!("layers.{at}.weight"), rows, 4096)).collect();
    write_model(&folder, &tensors)?;
    let mut out = io::stdout();
    writeln!(out, "way      devices  storage s  link s  bound s  model s  ratio  wall s  ratio")?;
    let mut met = true;
    for (way, _) in WAYS {
        for &devices in device_counts {
            let measured = measure(&folder, way, devices, runs)?;
            let figure = |name: &str| measured[name].as_f64().expect("a number");
            let bound = figure("bound");
            let (model, wall) = (figure("model"), figure("wall"));
            writeln!(
                out,
                "{way:8} {devices:7}  {:9.3}  {:6.3}  {bound:7.3}  {model:7.3}  {:5.3}  {wall:6.3}  {:5.3}",
                figure("storage"),
                figure("link"),
                model / bound,
                wall / bound,
            )?;
            met &= model <= bound * TARGETS[0] && wall <= bound * TARGETS[1];
            assert!(bench || wall.max(model) < bound * SLACK, "{way}, {devices} devices: {wall} s, bound {bound} s");
        }
    }
    writeln!(out, "targets of {} and {}: {}", TARGETS[0], TARGETS[1], if met { "met" } else { "missed" })
}

/// One configuration, in a process of its own: the twin reads its settings once.
fn measure(folder: &Path, way: &str, devices: u32, runs: usize) -> io::Result<Value> {
    let output = twins::cuda::command(std::env::current_exe()?)
        .arg("--one")
        .arg(folder)
        .args([way, &devices.to_string(), &runs.to_string()])
        .env("SIMCUDA_DEVICES", devices.to_string())
        .env("SIMCUDA_LINK", (LINK / 1e9).to_string())
        .env("SIMCUDA_MEMORY", "2G")
        // What the twin checks of the bytes takes processor time that the model does not know of.
        .envs([("SIMCUDA_CHECK", "0"), ("SIMCUDA_POISON", "0")])
        .output()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(io::Error::other(format!("{way}, {devices} devices: {message}")));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Loads, and prints the medians and what they are held against.
fn one(folder: &Path, way: &str, devices: u32, runs: usize) -> io::Result<()> {
    twins::cuda::load();
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let rules = WAYS.iter().find(|(name, _)| *name == way).expect("a way").1;
    let rules = Rules::from_toml(rules).map_err(io::Error::other)?;
    let plan = Plan::new(&checkpoint, &rules, &World::local(0..devices)).map_err(io::Error::other)?;
    let loader = Loader::new().engine(EngineChoice::Pread).staging(STAGING).throttle(Some(STORAGE as u64));
    let (weights, report) = loader.load(&plan).map_err(io::Error::other)?;
    if runs == 1 {
        weights.check().map_err(io::Error::other)?;
    }
    let (mut model, mut wall, mut busiest) = (Vec::new(), Vec::new(), 0);
    let memory = memory_of(&weights);
    for _ in 0..runs {
        twins::cuda::reset_counts();
        let began = seconds(ClockId::Monotonic);
        load_again(&loader, &weights, &memory)?;
        wall.push(seconds(ClockId::Monotonic) - began);
        let ledger = ledger(folder)?;
        model.push(ledger["last_copy_end_ns"].as_f64().expect("a number") / 1e9 - began);
        let devices = ledger["devices"].as_array().expect("devices");
        let bytes = devices.iter().map(|device| device["h2d_bytes"].as_u64().expect("a number"));
        busiest = bytes.max().expect("a device");
    }
    // What the plan needs, whatever was copied besides: rows that are cut on the device count against the load.
    let ways = if way == "whole" { 1 } else { devices };
    let storage = report.storage_bytes_read as f64 / STORAGE;
    let link = report.storage_bytes_read as f64 / f64::from(ways) / LINK;
    let slot = limits::SLOT as f64;
    let bound = storage.max(link) + slot / STORAGE + slot / f64::from(ways) / LINK;
    let object = json!({
        "storage": storage, "link": link, "bound": bound, "busiest_bytes": busiest,
        "model": median(&model), "wall": median(&wall), "walls": wall, "models": model,
    });
    writeln!(io::stdout(), "{object}")
}
