//! What an event of a trace costs, and what it costs not to record one: loads of very many very short reads, whose engine
//! brings a kilobyte at a time out of nothing, each an event.
//!
//! `cargo bench --bench trace [-- FOLDER]`: 64 MB in FOLDER (default `target/bench`) in 65,536 reads. Prints nanoseconds an
//! event, the median of interleaved pairs in one process, and where valgrind is there instructions: of an event, and of
//! such a read without a trace. `cargo test --bench trace` does it once with few reads.

mod support;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use shardlift::read::{Engine, Next, Work};
use shardlift::{Checkpoint, Loader, Plan, Result, Rules, Trace, World};
use support::{median, write_model};

const PAIRS: usize = 15;

/// Bytes that a read brings.
const CRUMB: usize = 1 << 10;

/// Brings zeros, a little at a time.
#[derive(Debug)]
struct Crumbs;

// SAFETY: what is reported was written; a request goes back before the next is taken.
unsafe impl Engine for Crumbs {
    fn name(&self) -> &'static str {
        "crumbs"
    }
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        while let Next::Request(mut request) = work.next(true) {
            let bytes = request.bytes().min(CRUMB);
            request.buffer()[..bytes].fill(std::mem::MaybeUninit::new(0));
            work.done(request, Ok(bytes));
        }
        Ok(())
    }
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    if let Some("--one") = std::env::args().nth(1).as_deref() {
        arguments.next();
        let [folder, traced] = [(); 2].map(|()| arguments.next().expect("two arguments"));
        load(&plan(Path::new(&folder))?, (traced == "on").then(Trace::new).as_ref())?;
        return Ok(());
    }
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = arguments.find(|argument| !argument.starts_with('-')).map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from("target/bench"));
    let (name, tensors, pairs) = if bench { ("trace", 32, PAIRS) } else { ("trace-small", 1, 1) };
    let folder = folder.join(name);
    let tensors: Vec<_> = (0..tensors).map(|at| (format!("layers.{at}.weight"), 256, 4096)).collect();
    write_model(&folder, &tensors)?;
    let plan = plan(&folder)?;
    let mut each = Vec::new();
    let mut reads = 0;
    let mut one = |traced: bool| -> io::Result<f64> {
        let trace = traced.then(Trace::new);
        let (seconds, of_load) = load(&plan, trace.as_ref())?;
        reads = of_load;
        assert_eq!(trace.map_or(0, |trace| trace.dropped()), 0);
        Ok(seconds)
    };
    for pair in 0..pairs {
        let (first, second) = (one(pair % 2 == 0)?, one(pair % 2 == 1)?);
        each.push(if pair % 2 == 0 { first - second } else { second - first });
    }
    each.iter_mut().for_each(|seconds| *seconds *= 1e9 / reads as f64);
    let (min, max) = each.iter().fold((f64::MAX, f64::MIN), |(min, max), one| (min.min(*one), max.max(*one)));
    let mut out = io::stdout();
    writeln!(out, "{:.0} ns an event ({min:.0} to {max:.0} in {pairs} pairs of {reads} events)", median(&each))?;
    if bench {
        match [false, true].map(|traced| instructions(&folder, traced)) {
            [Some(off), Some(on)] => {
                let [event, read] = [on - off, off].map(|instructions| instructions / reads as f64);
                writeln!(
                    out,
                    "{event:.0} instructions an event; {read:.1} a read without a trace, all of the load included"
                )?;
            }
            _ => writeln!(out, "SKIPPED: instructions (no valgrind)")?,
        }
    }
    Ok(())
}

fn plan(folder: &Path) -> io::Result<Plan> {
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1)).map_err(io::Error::other)
}

/// Loads, and tells the seconds and the reads.
fn load(plan: &Plan, trace: Option<&Trace>) -> io::Result<(f64, u64)> {
    let loader = Loader::new().custom_engine(Arc::new(Crumbs)).trace(trace);
    let began = Instant::now();
    let (_, report) = loader.load(plan).map_err(io::Error::other)?;
    Ok((began.elapsed().as_secs_f64(), report.reads))
}

/// Instructions of a process that loads once, as valgrind counts them.
fn instructions(folder: &Path, traced: bool) -> Option<f64> {
    let counts = folder.join("instructions");
    let mut option = std::ffi::OsString::from("--cachegrind-out-file=");
    option.push(&counts);
    let status = Command::new("valgrind")
        .args(["--quiet", "--tool=cachegrind", "--cache-sim=no"])
        .arg(option)
        .arg(std::env::current_exe().ok()?)
        .arg("--one")
        .arg(folder)
        .arg(if traced { "on" } else { "off" })
        .status();
    status.ok().filter(|status| status.success())?;
    let counts = std::fs::read_to_string(counts).ok()?;
    counts.lines().rev().find_map(|line| line.strip_prefix("summary:"))?.split_whitespace().next()?.parse().ok()
}
