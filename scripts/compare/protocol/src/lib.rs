//! What every program of `scripts/compare` does alike, so that figures mean the same: one load of a process, between a
//! line on standard input and one on standard output.
//!
//! The first argument is a [`Task`] as JSON. The program prints `{"ready": true, "pid": ..}`, waits for a line, loads,
//! touches every byte of what it then has, and prints one object; `seconds` are those of loading and touching. Whatever
//! is allocated, opened, parsed or planned is part of the load.

mod touch;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};

pub use touch::{compare_touch, threads, touch};

/// What is to be loaded, and what is asked about it.
#[derive(Debug, Deserialize)]
pub struct Task {
    /// Who loads, and in which way.
    pub loader: String,
    /// The files to load.
    pub files: Vec<PathBuf>,
    /// What a loader that opens checkpoints opens.
    pub model: PathBuf,
    /// Into how many tensor-parallel parts the weights are cut; 1 is none.
    pub world: usize,
    /// Whose parts are wanted.
    pub ranks: Vec<usize>,
    /// By which dimension a tensor is cut; all others are whole on every rank.
    pub cuts: BTreeMap<String, usize>,
    /// Whether one tensor, the first that comes, is all.
    pub first: bool,
    /// Whether every byte is read once afterwards.
    pub touch: bool,
    /// Whether to tell digests of what landed, after the clock has stopped.
    pub verify: bool,
}

/// A tensor that landed.
#[derive(Debug, Clone)]
pub struct Part<'a> {
    /// Whose it is.
    pub rank: usize,
    /// Its name.
    pub name: String,
    /// Its shape on this rank.
    pub shape: Vec<u64>,
    /// Its bytes, row-major and dense.
    pub bytes: &'a [u8],
}

/// Whatever went wrong.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Serves the task of the command line: `load` is timed, `parts` shows what it left in memory. Does not return when all
/// went well: nobody's clock runs while memory is given back, and nobody waits for it.
///
/// # Errors
/// Those of `load`, and a task or a line that did not come.
pub fn serve<L>(
    load: impl FnOnce(&Task) -> Result<L, Failure>,
    parts: impl FnOnce(&L) -> Result<Vec<Part<'_>>, Failure>,
) -> Result<(), Failure> {
    let task = std::env::args().nth(1).ok_or("usage: PROGRAM TASK, where scripts/compare/run says what a TASK is")?;
    let task: Task = serde_json::from_str(&task)?;
    say(&json!({"ready": true, "pid": std::process::id()}))?;
    if io::stdin().read_line(&mut String::new())? == 0 {
        return Ok(()); // whoever wanted it has gone
    }

    let (began, worked) = (Instant::now(), cpu_seconds());
    let loaded = load(&task)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let parts = parts(&loaded)?;
    let sum = if task.touch {
        let bytes: Vec<&[u8]> = parts.iter().map(|part| part.bytes).collect();
        Some(touch(&bytes))
    } else {
        None
    };
    let seconds = began.elapsed().as_secs_f64();
    let cpu_seconds = cpu_seconds() - worked;
    let digests = if task.verify { Some(digests(&parts)) } else { None };
    say(&json!({
        "seconds": seconds,
        "load_seconds": load_seconds,
        "cpu_seconds": cpu_seconds,
        "bytes": parts.iter().map(|part| part.bytes.len()).sum::<usize>(),
        "tensors": parts.len(),
        "sum": sum,
        "digests": digests,
    }))?;
    std::process::exit(0)
}

fn say(object: &serde_json::Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{object}")?;
    out.flush()
}

/// What all threads of this process have worked, in the kernel too.
fn cpu_seconds() -> f64 {
    // SAFETY: integers, for which zeros are values.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a place for the answer.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    assert_eq!(status, 0, "getrusage knows no process");
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// For each rank the SHA-256 of the lines `name shape digest` of its tensors, sorted; digests are SHA-256 too.
fn digests(parts: &[Part<'_>]) -> BTreeMap<usize, String> {
    let (next, lines) = (AtomicUsize::new(0), Mutex::new(BTreeMap::<usize, Vec<String>>::new()));
    thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let shape: Vec<String> = part.shape.iter().map(u64::to_string).collect();
                    let line = format!("{} [{}] {}\n", part.name, shape.join(","), hex(&Sha256::digest(part.bytes)));
                    lines.lock().expect("a thread that digests panicked").entry(part.rank).or_default().push(line);
                }
            });
        }
    });
    let lines = lines.into_inner().expect("a thread that digests panicked");
    let of_rank = |(rank, mut lines): (usize, Vec<String>)| {
        lines.sort();
        (rank, hex(&Sha256::digest(lines.concat())))
    };
    lines.into_iter().map(of_rank).collect()
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
