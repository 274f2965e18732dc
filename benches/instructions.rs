//! Instructions of parsing headers, opening, planning, and of what a load does for each slot, as valgrind counts them: a
//! count repeats where a time does not, so it can fail a push.
//!
//! `scripts/count-instructions [--record]` holds them against `benches/record/counts.json`, or writes them there
//! (`cargo bench --bench instructions -- --count` or `--record`). `cargo test --bench instructions` only runs each part.

#[path = "support/record.rs"]
mod record;
#[path = "../tests/support/released/mod.rs"]
mod released;
#[path = "support/shapes.rs"]
mod shapes;
mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use serde_json::{Value, json};
use shapes::{RULES, models};
use shardlift::format::Header;
use shardlift::read::{Engine, Pread, Work};
use shardlift::{Checkpoint, Loader, Plan, Result, Rules, World};
use support::write_model;

const RANKS: u32 = 8;
const PART: &str = "--part";

/// Counts repeat where all of [`environment`] is equal. What is left is for unrelated changes that shift what the
/// compiler inlines.
const TOLERANCE: f64 = 0.03;
/// Where a queue's thread takes what is read, who waits for whom is chance: one code gave 1122 to 1271 for each MiB, and
/// medians of eleven were no nearer to each other.
const TOLERANCE_QUEUED: f64 = 0.15;
/// Elsewhere other code is counted. Seen: 4% for another `memcpy` of the libc, 0.4% for a compiler two versions newer
/// and for a `malloc` without caches per thread.
const TOLERANCE_ELSEWHERE: f64 = 0.10;

/// What a reading thread may spend in `tracing` if nobody subscribed, with all its reads: the file is opened once, and the
/// span that there is not was seen to take 15. One for each read would be hundreds.
const TRACING: u64 = 100;

/// A load whose reading thread is counted: of a model, and of one with four times as much.
struct Slots {
    name: &'static str,
    /// Tensors, rows and columns of the smaller, in BF16.
    model: (u64, u64, u64),
    /// What the larger has more: rows of each tensor, or tensors.
    more_rows: bool,
    /// The dimension that is cut between the ranks.
    cut: u32,
    ranks: u32,
    staged: bool,
}

const SLOTS: [Slots; 4] = [
    Slots { name: "whole tensors", model: (4, 512, 4096), more_rows: true, cut: 0, ranks: 1, staged: false },
    Slots { name: "columns", model: (4, 512, 4096), more_rows: true, cut: 1, ranks: 4, staged: false },
    Slots { name: "small tensors", model: (500, 8, 128), more_rows: false, cut: 0, ranks: 1, staged: false },
    Slots { name: "staged rows", model: (4, 2048, 4096), more_rows: true, cut: 0, ranks: 4, staged: true },
];
const LARGER: u64 = 4;

fn main() -> io::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, part, model] = &arguments[..]
        && flag == PART
    {
        return run_part(part, Path::new(model)).map(|()| ExitCode::SUCCESS);
    }
    let flagged = |flag| arguments.iter().any(|argument| argument == flag);
    let folder = arguments.iter().find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    for (name, model) in models() {
        released::write(&folder.join(name), &model)?;
    }
    for slots in &SLOTS {
        slots.write(&folder)?;
    }
    if !flagged("--count") && !flagged("--record") {
        for slots in &SLOTS {
            let status = Command::new(std::env::current_exe()?)
                .args([PART, slots.name])
                .arg(slots.folder(&folder, 1))
                .status()?;
            assert!(status.success(), "{}", slots.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let counted = count_all(&folder)?;
    let environment = environment()?;
    if flagged("--record") {
        record::write("instructions", json!({ "environment": environment, "counts": counted }))?;
        return Ok(ExitCode::SUCCESS);
    }
    compare(&counted, &environment, &record::read()?["instructions"])
}

/// What valgrind runs: of opening and planning each part does what the one before it does, and one thing more.
fn run_part(part: &str, model: &Path) -> io::Result<()> {
    if let Some(slots) = SLOTS.iter().find(|slots| slots.name == part) {
        return slots.load(model);
    }
    // Planning happens in this thread: what an idle worker does depends on when it is woken.
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().map_err(io::Error::other)?;
    let rules = Rules::from_toml(RULES).map_err(io::Error::other)?;
    if part == "start" {
        return Ok(());
    }
    if let "read" | "parse" = part {
        for entry in std::fs::read_dir(model)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let (prefix, bytes) = read_header(&path)?;
                if part == "parse" {
                    black_box(Header::parse(&prefix, bytes).map_err(io::Error::other)?);
                }
            }
        }
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

/// A file's length and header, and the length of the file.
fn read_header(path: &Path) -> io::Result<(Vec<u8>, u64)> {
    let mut file = File::open(path)?;
    let mut prefix = vec![0; 8];
    file.read_exact(&mut prefix)?;
    let bytes = file.metadata()?.len();
    let length = Header::header_len(&prefix, bytes).map_err(io::Error::other)?;
    file.take(length).read_to_end(&mut prefix)?;
    Ok((prefix, bytes))
}

impl Slots {
    fn folder(&self, folder: &Path, times: u64) -> PathBuf {
        folder.join("slots").join(format!("{} {times}", self.name).replace(' ', "-"))
    }

    fn write(&self, folder: &Path) -> io::Result<()> {
        for times in [1, LARGER] {
            let (count, rows, columns) = self.model;
            let (count, rows) = if self.more_rows { (count, rows * times) } else { (count * times, rows) };
            let tensors: Vec<_> = (0..count).map(|at| (format!("layers.{at}.weight"), rows, columns)).collect();
            write_model(&self.folder(folder, times), &tensors)?;
        }
        Ok(())
    }

    fn load(&self, model: &Path) -> io::Result<()> {
        let rules = format!("rule = [{{ match = \"**\", shard = {{ dim = {} }} }}]", self.cut);
        let rules = Rules::from_toml(&rules).map_err(io::Error::other)?;
        let checkpoint = Checkpoint::open(model).map_err(io::Error::other)?;
        let world = if self.staged { World::host_staged(self.ranks) } else { World::host(self.ranks) };
        let plan = Plan::new(&checkpoint, &rules, &world).map_err(io::Error::other)?;
        let loader = Loader::new().custom_engine(Arc::new(Counted(Pread::new(1))));
        let (weights, _) = loader.load(&plan).map_err(io::Error::other)?;
        black_box(weights.iter().count());
        Ok(())
    }
}

/// Plain reads of one thread, which does nothing else that is counted.
#[derive(Debug)]
struct Counted(Pread);

/// What valgrind counts, by the symbol's name, with all that it calls.
#[unsafe(export_name = "shardlift_counted")]
#[inline(never)]
fn counted(engine: &Pread, work: &dyn Work) -> Result<()> {
    black_box(engine.run(work))
}

// SAFETY: the engine inside answers for all of it.
unsafe impl Engine for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }

    fn threads(&self) -> usize {
        self.0.threads()
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        counted(&self.0, work)
    }
}

/// Instructions by what they are for.
fn count_all(folder: &Path) -> io::Result<BTreeMap<String, u64>> {
    let mut counted = BTreeMap::new();
    for (name, _) in models() {
        let count = |part| count(&folder.join(name), part, None);
        let [start, read, parse, open, plan] = ["start", "read", "parse", "open", "plan"].map(count);
        let (start, read, parse, open, plan) = (start?, read?, parse?, open?, plan?);
        counted.insert(format!("{name}: parse"), parse - read);
        counted.insert(format!("{name}: open"), open - start);
        counted.insert(format!("{name}: plan"), plan - open);
    }
    for slots in &SLOTS {
        let [few, many] =
            [1, LARGER].map(|times| count(&slots.folder(folder, times), slots.name, Some("shardlift_counted")));
        let (few, many) = (few?, many?);
        let (tensors, rows, columns) = slots.model;
        let more = if slots.more_rows { (tensors * rows * columns * 2) >> 20 } else { tensors } * (LARGER - 1);
        let each = if slots.more_rows { "MiB" } else { "tensor" };
        counted.insert(format!("load, {}: each {each}", slots.name), (many - few) / more);
        let spent = of_tracing(&slots.folder(folder, LARGER), slots.name)?;
        writeln!(io::stdout(), "tracing, {}: {spent} instructions of all reads, at most {TRACING}", slots.name)?;
        if spent > TRACING {
            return Err(io::Error::other(format!("{}: reads call tracing, though nobody subscribed", slots.name)));
        }
    }
    Ok(counted)
}

/// Instructions of `tracing` itself, and of what it is called for, in what was counted last for this model and part. What
/// the compiler put into its callers is not seen: a branch on a static number, if nobody subscribed.
fn of_tracing(model: &Path, part: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string(beside(model, part, "callgrind"))?;
    let (mut names, mut inside, mut called, mut total) = (BTreeMap::new(), false, false, 0);
    for line in text.lines() {
        if let Some(function) = line.strip_prefix("fn=") {
            // A name is written out where it comes first: `(7) name`.
            let (id, name) = function.split_once(' ').unwrap_or((function, ""));
            let known: &mut bool = names.entry(id.to_owned()).or_default();
            *known |= name.contains("tracing");
            inside = *known;
        } else if let Some(function) = line.strip_prefix("cfn=") {
            let (id, name) = function.split_once(' ').unwrap_or((function, ""));
            *names.entry(id.to_owned()).or_default() |= name.contains("tracing");
        } else if line.starts_with("calls=") {
            called = true; // the next line is what the callee cost
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            let cost = line.split_whitespace().nth(1).and_then(|cost| cost.parse::<u64>().ok()).unwrap_or(0);
            total += if inside && !std::mem::take(&mut called) { cost } else { 0 };
            called = false;
        }
    }
    Ok(total)
}

fn compare(counted: &BTreeMap<String, u64>, environment: &Value, record: &Value) -> io::Result<ExitCode> {
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
        true => writeln!(out, "may differ from {} by {:.0}%", record::RECORD, tolerance * 100.0)?,
        false => writeln!(out, "not held against {}, which is of another target", record::RECORD)?,
    }
    if !same {
        writeln!(out, "recorded with {}", record["environment"])?;
        writeln!(out, "counted  with {environment}")?;
    }
    let mut failed = false;
    for (name, &count) in counted {
        let recorded = record["counts"][name].as_u64();
        let recorded = recorded.ok_or_else(|| io::Error::other(format!("{} has no {name}", record::RECORD)))?;
        let change = count as f64 / recorded as f64 - 1.0;
        let queued = SLOTS.iter().any(|slots| slots.staged && name.contains(slots.name));
        let tolerance = if queued { tolerance.max(TOLERANCE_QUEUED) } else { tolerance };
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
        writeln!(out, "{name}: {count} instructions, recorded {recorded}, {change:+.2}%: {failure}{verdict}")?;
    }
    if failed {
        writeln!(out, "meant? then `scripts/count-instructions --record` and say why in the commit")?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Where what valgrind tells of a part is kept.
fn beside(model: &Path, part: &str, extension: &str) -> PathBuf {
    let name = format!("{}.{extension}", part.replace(' ', "-"));
    model.with_file_name(format!("{}.{name}", model.file_name().unwrap_or_default().display()))
}

/// Instructions of a process that does `part`, its start included, or of one function of it with all that it calls. What
/// callgrind wrote stays beside the model, for `callgrind_annotate`.
fn count(model: &Path, part: &str, function: Option<&str>) -> io::Result<u64> {
    let option = |name: &str, path: &Path| {
        let mut option = OsString::from(name);
        option.push(path);
        option
    };
    let (counts, log) = (beside(model, part, "callgrind"), beside(model, part, "log"));
    let mut command = Command::new("valgrind");
    command
        .args(["--quiet", "--tool=callgrind"])
        .arg(option("--callgrind-out-file=", &counts))
        .arg(option("--log-file=", &log));
    match function {
        Some(function) => command.arg(format!("--toggle-collect={function}")),
        // No stack is that large, so no thread starts, and opening reads all headers in its own: with several, who reads
        // which file, and so the count, depends on the moment.
        None => command.env("RUST_MIN_STACK", (usize::MAX / 16 + 1).to_string()),
    };
    let status = command
        .arg(std::env::current_exe()?)
        .args([PART, part])
        .arg(model)
        .env_remove("VALGRIND_OPTS")
        .env_remove("DEBUGINFOD_URLS") // valgrind would ask the network for symbols
        .status()?;
    if !status.success() {
        return Err(io::Error::other(format!("valgrind: {status}, see {}", log.display())));
    }
    let counts = std::fs::read_to_string(counts)?;
    let total = counts.lines().rev().find_map(|line| line.strip_prefix("totals:").or(line.strip_prefix("summary:")));
    let count = total.and_then(|line| line.split_whitespace().next()?.parse().ok());
    count.ok_or_else(|| io::Error::other("callgrind gave no totals"))
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
