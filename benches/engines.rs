//! Which engine reads best where, and whether `auto` chooses it: {page cache, disk, tmpfs} x {large tensors, 20,000 small
//! ones, column shards} x engines.
//!
//! `cargo bench --bench engines [-- FOLDER] [--storage warm|cold|tmpfs] [--shape large|small|columns]` writes its models
//! into FOLDER (default `target/bench/engines`) and, for tmpfs, into `/dev/shm`; loads with every engine in turn, in
//! rounds that start with another one each time; and prints medians with their spread. `auto` should be within 15% of the
//! best median, or inside that engine's spread. Cold means dropped from the page cache, which mincore confirms.
//!
//! `--sweep threads|depth|chunk` measures what a default of `limits.rs` is chosen from instead: threads of `pread`, threads
//! and reads in flight of `uring`, and the bytes of one bare read. `cargo test --bench engines` does all of it once with
//! little data; its figures mean nothing.

mod support;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use memmap2::{Advice, Mmap, MmapMut};
use serde_json::json;
use shardlift::read::{Engine, EngineChoice, Pread, Uring};
use shardlift::{Checkpoint, Loader, Plan, Rules, World, limits};
use support::{median, write_model};

const ROUNDS: usize = 7;
const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];
const SHARE: f64 = 0.85;

#[derive(Clone, Copy, PartialEq)]
enum Storage {
    Warm,
    Cold,
    Tmpfs,
}

const STORAGES: [(&str, Storage); 3] = [("warm", Storage::Warm), ("cold", Storage::Cold), ("tmpfs", Storage::Tmpfs)];

/// A model, and how many ranks take how much of each tensor.
struct Shape {
    name: &'static str,
    file: &'static str,
    tensors: u64,
    rows: u64,
    columns: u64,
    ranks: u32,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "large", file: "large", tensors: 8, rows: 8192, columns: 4096, ranks: 1 },
    Shape { name: "small", file: "small", tensors: 20_000, rows: 64, columns: 128, ranks: 1 },
    Shape { name: "columns", file: "large", tensors: 8, rows: 8192, columns: 4096, ranks: 4 },
];

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let bench = arguments.iter().any(|argument| argument == "--bench");
    let (mut storage, mut shape, mut sweep, mut folder) = (None, None, None, None);
    let mut words = arguments.iter().filter(|argument| *argument != "--bench");
    while let Some(word) = words.next() {
        match word.as_str() {
            "--storage" => storage = words.next(),
            "--shape" => shape = words.next(),
            "--sweep" => sweep = words.next(),
            word if word.starts_with('-') => return Err(io::Error::other(format!("unknown argument {word}"))),
            word => folder = Some(word),
        }
    }
    let default = if bench { "target/bench/engines" } else { "target/bench/engines/small" };
    let disk = folder.map_or_else(|| PathBuf::from(default), PathBuf::from);
    let (rounds, divisor) = if bench { (ROUNDS, 1) } else { (1, 64) };
    let memory = Path::new("/dev/shm").join(if bench { "shardlift-engines" } else { "shardlift-engines-small" });
    let mut out = io::stdout();
    for (name, storage) in STORAGES.into_iter().filter(|(name, _)| storage.is_none_or(|wanted| wanted == name)) {
        let folder = if storage == Storage::Tmpfs { &memory } else { &disk };
        if storage == Storage::Tmpfs && !memory.parent().is_some_and(Path::is_dir) {
            writeln!(out, "SKIPPED: no /dev/shm")?;
            continue;
        }
        for shape in SHAPES.iter().filter(|known| shape.is_none_or(|wanted| wanted == known.name)) {
            let place = Place { storage, name, model: shape.write(folder, divisor)?, shape };
            match sweep {
                Some(what) => place.sweep(what, rounds, &mut out)?,
                None => place.compare(rounds, &mut out)?,
            }
        }
    }
    if memory.is_dir() {
        std::fs::remove_dir_all(memory)?;
    }
    Ok(())
}

impl Shape {
    fn write(&self, folder: &Path, divisor: u64) -> io::Result<PathBuf> {
        let rows = (self.rows / divisor).max(1);
        let tensors: Vec<_> = (0..self.tensors).map(|at| (format!("layers.{at}.weight"), rows, self.columns)).collect();
        let model = folder.join(self.file);
        write_model(&model, &tensors)?;
        Ok(model)
    }

    fn plan(&self, model: &Path) -> io::Result<Plan> {
        let rules = Rules::from_toml("rule = [{ match = \"**\", shard = { dim = 1 } }]").map_err(io::Error::other)?;
        let checkpoint = Checkpoint::open(model).map_err(io::Error::other)?;
        Plan::new(&checkpoint, &rules, &World::host(self.ranks)).map_err(io::Error::other)
    }
}

/// One cell of the matrix, but for the engine.
struct Place {
    storage: Storage,
    name: &'static str,
    model: PathBuf,
    shape: &'static Shape,
}

impl Place {
    fn file(&self) -> PathBuf {
        self.model.join("model.safetensors")
    }

    /// Puts the file where it should be read from.
    fn prepare(&self) -> io::Result<()> {
        let file = File::open(self.file())?;
        if self.storage != Storage::Cold {
            io::copy(&mut &file, &mut io::sink())?;
            return Ok(());
        }
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        match resident(&file)? {
            share if share < 0.01 => Ok(()),
            share => Err(io::Error::other(format!("{share} of the file stays in the page cache"))),
        }
    }

    /// GB/s of one load by a loader of its own, as the first of a process.
    fn load(&self, plan: &Plan, loader: &Loader) -> io::Result<(f64, String)> {
        self.prepare()?;
        let began = Instant::now();
        let (weights, report) = loader.load(plan).map_err(io::Error::other)?;
        let speed = report.needed_bytes as f64 / began.elapsed().as_secs_f64() / 1e9;
        drop(weights);
        Ok((speed, format!("{}: {}", report.engine, report.engine_reason)))
    }

    /// Every engine in turn, and the verdict on `auto`.
    fn compare(&self, rounds: usize, out: &mut impl Write) -> io::Result<()> {
        let plan = self.shape.plan(&self.model)?;
        let mut chosen = String::new();
        let names: Vec<String> = ENGINES.iter().map(|engine| format!("{engine:?}").to_lowercase()).collect();
        let speeds = in_turn(ENGINES.len(), rounds, |which| {
            let (speed, engine) = self.load(&plan, &Loader::new().engine(ENGINES[which]))?;
            chosen = if ENGINES[which] == EngineChoice::Auto { engine } else { std::mem::take(&mut chosen) };
            Ok(speed)
        })?;
        let medians: Vec<f64> = speeds.iter().map(|speeds| median(speeds)).collect();
        let best = (1..ENGINES.len()).max_by(|&a, &b| medians[a].total_cmp(&medians[b])).expect("engines");
        let slowest_of_best = speeds[best].iter().copied().fold(f64::INFINITY, f64::min);
        let met = medians[0] >= SHARE * medians[best] || medians[0] >= slowest_of_best;
        let mut cell = json!({
            "storage": self.name, "shape": self.shape.name, "chosen": chosen, "best": names[best],
            "auto_of_best": round(medians[0] / medians[best]), "verdict": if met { "met" } else { "missed" },
        });
        for (name, speeds) in names.iter().zip(&speeds) {
            cell[format!("{name}_gb_per_s")] = spread(speeds);
        }
        writeln!(out, "{cell}")
    }

    /// What the defaults are chosen from.
    fn sweep(&self, what: &str, rounds: usize, out: &mut impl Write) -> io::Result<()> {
        let plan = self.shape.plan(&self.model)?;
        let load = |engine: Arc<dyn Engine>| Ok(self.load(&plan, &Loader::new().custom_engine(engine))?.0);
        let (names, speeds): (Vec<String>, Vec<Vec<f64>>) = match what {
            "threads" => {
                let all = [1, 2, 3, 4, 8];
                let speeds = in_turn(all.len(), rounds, |which| load(Arc::new(Pread::new(all[which]))))?;
                (all.map(|threads| format!("pread, {threads} threads")).into(), speeds)
            }
            "depth" => {
                let all = [(1, 4), (1, 8), (1, 16), (1, 32), (2, 2), (2, 4), (2, 8), (2, 16), (4, 8)];
                let speeds = in_turn(all.len(), rounds, |which| {
                    let (threads, depth) = all[which];
                    load(Arc::new(Uring::new(threads, depth, true).map_err(io::Error::other)?))
                })?;
                (all.map(|(threads, depth)| format!("uring, {threads} threads of {depth}")).into(), speeds)
            }
            "chunk" => {
                let all = [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 16 << 20];
                let speeds = in_turn(all.len(), rounds, |which| {
                    self.prepare()?;
                    bare(&self.file(), all[which])
                })?;
                (all.map(|chunk| format!("bare reads of {} KiB", chunk >> 10)).into(), speeds)
            }
            other => return Err(io::Error::other(format!("no sweep {other}"))),
        };
        for (name, speeds) in names.iter().zip(&speeds) {
            let head =
                json!({ "storage": self.name, "shape": self.shape.name, "what": name, "gb_per_s": spread(speeds) });
            writeln!(out, "{head}")?;
        }
        Ok(())
    }
}

/// Measures each of several in rounds, which start with another one each time.
fn in_turn(
    count: usize,
    rounds: usize,
    mut measure: impl FnMut(usize) -> io::Result<f64>,
) -> io::Result<Vec<Vec<f64>>> {
    let mut measured = vec![Vec::new(); count];
    for round in 0..rounds {
        for turn in 0..count {
            let which = (round + turn) % count;
            measured[which].push(measure(which)?);
        }
    }
    Ok(measured)
}

/// The share of a file's pages that the page cache holds.
fn resident(file: &File) -> io::Result<f64> {
    let bytes = file.metadata()?.len() as usize;
    // SAFETY: the mapping is never looked into.
    let mapping = unsafe { Mmap::map(file.as_raw_fd())? };
    let mut pages = vec![0u8; bytes.div_ceil(rustix::param::page_size())];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    let told = unsafe { libc::mincore(mapping.as_ptr().cast_mut().cast(), bytes, pages.as_mut_ptr()) };
    if told != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pages.iter().filter(|&&page| page & 1 == 1).count() as f64 / pages.len().max(1) as f64)
}

/// GB/s of reading the file in chunks into fresh memory with huge pages advised, with as many threads as a load.
fn bare(file: &Path, chunk: usize) -> io::Result<f64> {
    let threads = thread::available_parallelism().map_or(2, usize::from).max(limits::READ_THREADS_MIN);
    let file = File::open(file)?;
    let bytes = file.metadata()?.len() as usize;
    let began = Instant::now();
    let mut memory = MmapMut::map_anon(bytes)?;
    let _ = memory.advise(Advice::HugePage); // as a load does: where the kernel has none, small ones serve
    let next = Mutex::new(memory.chunks_mut(chunk).enumerate());
    let read = || -> io::Result<()> {
        loop {
            let taken = next.lock().map_err(|_| io::Error::other("poisoned"))?.next();
            let Some((index, buffer)) = taken else { return Ok(()) };
            file.read_exact_at(buffer, (index * chunk) as u64)?;
        }
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| io::Error::other("panicked"))?)
    })?;
    Ok(bytes as f64 / began.elapsed().as_secs_f64() / 1e9)
}

/// The smallest value, the median and the largest.
fn spread(values: &[f64]) -> serde_json::Value {
    let of = |pick: fn(f64, f64) -> f64, from| round(values.iter().copied().fold(from, pick));
    json!([of(f64::min, f64::INFINITY), round(median(values)), of(f64::max, 0.0)])
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
