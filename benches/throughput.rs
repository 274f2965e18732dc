//! Loads into host memory against what the machine can do.
//!
//! - `bare`: warm loads against loops that do no more than they must, with as many threads and equally prepared memory, for
//!   every cut: reads of 1 MiB whose rows are cut from a buffer as large, and the same with reads of a huge page, so that no
//!   two threads clear one, and with a buffer of half a core's L2 cache. The ratio is to the better of both.
//! - `pages`: the same loop with memory that got its pages in other ways: what fresh memory costs, and what does not help.
//! - `check`: what it costs that every byte is digested and compared, warm and cold.
//! - `lent`: how long after opening a mapped checkpoint is there.
//! - `small`: how long the command line takes for 1 KB.
//!
//! `cargo bench --bench throughput [-- FOLDER] [--part bare|pages|check|lent|small]`: writes Llama-shaped checkpoints of random
//! bytes into FOLDER (default `target/bench`) unless they are there, measures in turn (a, b, b, a), and prints for each
//! figure [smallest, median, largest]; of two things that are compared the ratio of each pair. `cargo test --bench
//! throughput` does it once with 6 MB: what lands is checked, the figures mean nothing.

mod support;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use memmap2::{Advice, MmapMut};
use rustix::time::ClockId;
use serde_json::json;
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Plan, Residency, Rules, World};
use support::{median, seconds, write_model};

const PAIRS: usize = 8;
/// Times that what takes milliseconds is measured.
const TIMES: usize = 20;

/// The tensors whose columns are cut: the row-parallel third of a Llama layer.
const ROW_PARALLEL: [&str; 2] = ["o_proj", "down_proj"];

/// How the tensors of a load are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cuts {
    /// As a Llama layer: columns of the row-parallel third, rows of the rest.
    Llama,
    Rows,
    Columns,
}

impl Cuts {
    fn rules(self) -> Rules {
        let columns = format!("**.{{{}}}.weight", ROW_PARALLEL.join(","));
        match self {
            Cuts::Llama => Rules::new().shard(columns, 1).shard("**", 0),
            Cuts::Rows => Rules::new().shard("**", 0),
            Cuts::Columns => Rules::new().shard("**", 1),
        }
    }

    fn cuts_columns(self, tensor: &str) -> bool {
        match self {
            Cuts::Llama => ROW_PARALLEL.iter().any(|name| tensor.contains(name)),
            Cuts::Rows => false,
            Cuts::Columns => true,
        }
    }
}

const CASES: [(u32, Cuts); 6] =
    [(1, Cuts::Llama), (2, Cuts::Llama), (4, Cuts::Llama), (8, Cuts::Llama), (8, Cuts::Rows), (8, Cuts::Columns)];

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = arguments.iter().any(|argument| argument == "--bench");
    let (mut part, mut folder) = (None, None);
    let mut words = arguments.iter().filter(|argument| *argument != "--bench");
    while let Some(word) = words.next() {
        match word.as_str() {
            "--part" => part = words.next(),
            word if word.starts_with('-') => return Err(io::Error::other(format!("unknown argument {word}"))),
            word => folder = Some(word),
        }
    }
    let default = if bench { "target/bench" } else { "target/bench/small" };
    let folder = folder.map_or_else(|| PathBuf::from(default), PathBuf::from);
    // Five layers of a 7B model take 2.02 GB, eight 3.24.
    let (pairs, times, layers, hidden) = if bench { (PAIRS, TIMES, [5, 8], 4096) } else { (1, 2, [1, 1], 512) };
    let wanted = |name: &str| part.is_none_or(|part| part == name);
    if wanted("bare") {
        bare(&llama(&folder.join("llama-5"), layers[0], hidden)?, pairs)?;
    }
    if wanted("pages") {
        pages(&llama(&folder.join("llama-5"), layers[0], hidden)?, pairs)?;
    }
    if wanted("check") {
        check(&llama(&folder.join("llama-5"), layers[0], hidden)?, pairs)?;
    }
    if wanted("lent") {
        lent(&llama(&folder.join("llama-8"), layers[1], hidden)?, times)?;
    }
    if wanted("small") {
        small(&folder.join("1-kb"), times)?;
    }
    Ok(())
}

/// Loads against bare loops.
fn bare(folder: &Path, pairs: usize) -> io::Result<()> {
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let file = folder.join("model.safetensors");
    for (ranks, cuts) in CASES {
        let plan = Plan::new(&checkpoint, &cuts.rules(), &World::host(ranks)).map_err(io::Error::other)?;
        let loader = Loader::new().engine(EngineChoice::Pread);
        // Warm-up: the page cache, the staging ring, and the answer.
        let (weights, _) = loader.load(&plan).map_err(io::Error::other)?;
        weights.check().map_err(io::Error::other)?;
        drop(weights);
        let file = File::open(&file)?;
        let bare = |sizes| Bare { file: &file, checkpoint: &checkpoint, ranks, cuts, sizes, pages: Pages::AsRead };
        let loops = LOOPS.map(bare);
        loops.iter().try_for_each(|bare| bare.load().map(|_| ()))?;
        let [first, second, loads] = in_turn(pairs, |which| match loops.get(which) {
            Some(bare) => bare.load(),
            None => load(&loader, &plan),
        })?;
        let speed = |runs: &[Measured]| median(&runs.iter().map(Measured::gb_per_s).collect::<Vec<_>>());
        let better = if speed(&first) >= speed(&second) { &first } else { &second };
        print(json!({
            "ranks": ranks, "cuts": format!("{cuts:?}"),
            "bare_1_mib_gb_per_s": spread(first.iter().map(Measured::gb_per_s)),
            "bare_2_mib_gb_per_s": spread(second.iter().map(Measured::gb_per_s)),
            "load_gb_per_s": spread(loads.iter().map(Measured::gb_per_s)),
            "ratio": ratios(better, &loads, Measured::gb_per_s),
            "ratio_to_1_mib": ratios(&first, &loads, Measured::gb_per_s),
            "load_cpu_s_per_gb": spread(loads.iter().map(Measured::cpu_per_gb)),
            "cpu_ratio": ratios(better, &loads, Measured::cpu_per_gb),
        }))?;
    }
    Ok(())
}

/// Bare loops into memory that gets its pages in different ways.
fn pages(folder: &Path, pairs: usize) -> io::Result<()> {
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let file = File::open(folder.join("model.safetensors"))?;
    io::copy(&mut &file, &mut io::sink())?;
    let bare =
        |pages| Bare { file: &file, checkpoint: &checkpoint, ranks: 1, cuts: Cuts::Rows, sizes: LOOPS[1], pages };
    let loops = PAGES.map(bare);
    let mut kept = loops[0].memory()?;
    loops[0].load_into(&mut kept)?;
    let measured: [Vec<Measured>; PAGES.len() + 1] = in_turn(pairs, |which| match loops.get(which) {
        Some(bare) => bare.load(),
        None => loops[0].load_into(&mut kept),
    })?;
    for (which, runs) in measured.iter().enumerate() {
        print(json!({
            "pages": PAGES.get(which).map_or("Reused".into(), |pages| format!("{pages:?}")),
            "gb_per_s": spread(runs.iter().map(Measured::gb_per_s)),
            "cpu_s_per_gb": spread(runs.iter().map(Measured::cpu_per_gb)),
            "ratio": ratios(&measured[0], runs, Measured::gb_per_s),
        }))?;
    }
    Ok(())
}

/// Loads that are checked while they move, against loads that are not: from the page cache, and from the disk.
fn check(folder: &Path, pairs: usize) -> io::Result<()> {
    let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
    let file = folder.join("model.safetensors");
    for (cold, ranks) in [(false, 1), (false, 4), (true, 1), (true, 4)] {
        let plan = Plan::new(&checkpoint, &Cuts::Llama.rules(), &World::host(ranks)).map_err(io::Error::other)?;
        let loaders = [false, true].map(|digests| Loader::new().digests(digests));
        let prepare = || {
            let file = File::open(&file)?;
            match cold {
                true => Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?),
                false => io::copy(&mut &file, &mut io::sink()).map(|_| ()),
            }
        };
        let mut engine = String::new();
        let [plain, checked] = in_turn_after(pairs, prepare, |which| {
            let (weights, report) = loaders[which].load(&plan).map_err(io::Error::other)?;
            if which == 1 {
                weights.check_moved().map_err(io::Error::other)?;
            }
            engine = report.engine;
            Ok(report.needed_bytes)
        })?;
        let seconds = |run: &Measured| run.wall;
        print(json!({
            "check": if cold { "cold" } else { "warm" }, "ranks": ranks, "engine": engine,
            "plain_gb_per_s": spread(plain.iter().map(Measured::gb_per_s)),
            "checked_gb_per_s": spread(checked.iter().map(Measured::gb_per_s)),
            "seconds_ratio": ratios(&plain, &checked, seconds),
            "cpu_ratio": ratios(&plain, &checked, Measured::cpu_per_gb),
        }))?;
    }
    Ok(())
}

/// A checkpoint whose tensors are lent from its mapping: nothing is read.
fn lent(folder: &Path, times: usize) -> io::Result<()> {
    let mut milliseconds = Vec::new();
    let mut bytes = 0;
    for _ in 0..times {
        let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
        let began = Instant::now();
        let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1)).map_err(io::Error::other)?;
        let (weights, report) = Loader::new().residency(Residency::Mapped).load(&plan).map_err(io::Error::other)?;
        milliseconds.push(began.elapsed().as_secs_f64() * 1e3);
        assert_eq!((report.storage_bytes_read, report.reads), (0, 0));
        bytes = weights.iter().map(|tensor| tensor.nbytes()).sum();
    }
    print(json!({ "lent_bytes": bytes, "plan_and_load_ms": spread(milliseconds.into_iter()) }))
}

/// The command line, from its start to its end.
fn small(folder: &Path, times: usize) -> io::Result<()> {
    let Some(shardlift) = option_env!("CARGO_BIN_EXE_shardlift") else {
        return writeln!(io::stdout(), "SKIPPED: 1 KB by the command line (no feature cli)");
    };
    write_model(folder, &[("weight".into(), 16, 32)])?;
    let milliseconds = |command: &mut Command| -> io::Result<f64> {
        let began = Instant::now();
        let status = command.stdout(Stdio::null()).status()?;
        assert!(status.success(), "{command:?}");
        Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    let (mut loads, mut nothing) = (Vec::new(), Vec::new());
    for _ in 0..times {
        loads.push(milliseconds(Command::new(shardlift).arg("load").arg(folder).args(["--rules", "replicate"]))?);
        nothing.push(milliseconds(&mut Command::new("true"))?);
    }
    print(json!({ "load_of_1_kb_ms": spread(loads.into_iter()), "true_ms": spread(nothing.into_iter()) }))
}

/// Measures each of several, in turn and back again.
fn in_turn<const N: usize>(
    pairs: usize,
    measure: impl FnMut(usize) -> io::Result<u64>,
) -> io::Result<[Vec<Measured>; N]> {
    in_turn_after(pairs, || Ok(()), measure)
}

/// The same, each after what is not measured.
fn in_turn_after<const N: usize>(
    pairs: usize,
    prepare: impl Fn() -> io::Result<()>,
    mut measure: impl FnMut(usize) -> io::Result<u64>,
) -> io::Result<[Vec<Measured>; N]> {
    let mut measured = [const { Vec::new() }; N];
    for pair in 0..pairs {
        for turn in 0..N {
            let which = if pair % 2 == 0 { turn } else { N - 1 - turn };
            prepare()?;
            measured[which].push(Measured::of(|| measure(which))?);
        }
    }
    Ok(measured)
}

/// A figure of the second over that of the first, of each pair.
fn ratios(first: &[Measured], second: &[Measured], figure: impl Fn(&Measured) -> f64) -> serde_json::Value {
    spread(first.iter().zip(second).map(|(a, b)| figure(b) / figure(a)))
}

fn print(figures: serde_json::Value) -> io::Result<()> {
    writeln!(io::stdout(), "{figures}")
}

/// What one load took.
struct Measured {
    bytes: u64,
    wall: f64,
    cpu: f64,
}

impl Measured {
    /// Measures what loads so many bytes.
    fn of(load: impl FnOnce() -> io::Result<u64>) -> io::Result<Measured> {
        let clocks = || [ClockId::Monotonic, ClockId::ProcessCPUTime].map(seconds);
        let [wall, cpu] = clocks();
        let bytes = load()?;
        let [wall_end, cpu_end] = clocks();
        Ok(Measured { bytes, wall: wall_end - wall, cpu: cpu_end - cpu })
    }

    fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.wall / 1e9
    }

    fn cpu_per_gb(&self) -> f64 {
        self.cpu / self.bytes as f64 * 1e9
    }
}

/// One load, its memory allocated and freed in the time.
fn load(loader: &Loader, plan: &Plan) -> io::Result<u64> {
    let (_, report) = loader.load(plan).map_err(io::Error::other)?;
    Ok(report.needed_bytes)
}

/// Bytes of a bare loop: what it reads at once, and at most into the buffer that it cuts rows from.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    read: usize,
    cut: usize,
}

const LOOPS: [Sizes; 2] = [Sizes { read: 1 << 20, cut: 1 << 20 }, Sizes { read: 2 << 20, cut: 512 << 10 }];

/// When fresh memory gets its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// Huge ones, where and when a read writes first.
    AsRead,
    /// The same, of 4 KiB.
    Small,
    /// Huge ones, all that a read will write, by its thread right before.
    Before,
    /// Huge ones, by a thread of its own that goes ahead.
    Ahead,
}

const PAGES: [Pages; 4] = [Pages::AsRead, Pages::Small, Pages::Before, Pages::Ahead];

/// A load without a program around it: a thread for each core, reads into fresh memory with huge pages advised; where
/// columns are cut, into a buffer of the thread and from there row by row.
struct Bare<'a> {
    file: &'a File,
    checkpoint: &'a Checkpoint,
    ranks: u32,
    cuts: Cuts,
    sizes: Sizes,
    pages: Pages,
}

impl Bare<'_> {
    /// From the first byte of a tensor to the last one's end.
    fn extent(&self) -> (u64, u64) {
        let tensors = self.checkpoint.tensors();
        let (start, end) = (tensors.iter().map(|it| it.start).min(), tensors.iter().map(|it| it.end).max());
        (start.unwrap_or(0), end.unwrap_or(0))
    }

    /// Fresh memory for all of it.
    fn memory(&self) -> io::Result<MmapMut> {
        let (start, end) = self.extent();
        let memory = MmapMut::map_anon((end - start) as usize)?;
        if self.pages != Pages::Small {
            let _ = memory.advise(Advice::HugePage); // as a load does: where the kernel has none, small ones serve
        }
        Ok(memory)
    }

    fn load(&self) -> io::Result<u64> {
        let mut memory = self.memory()?;
        self.load_into(&mut memory)
    }

    fn load_into(&self, memory: &mut MmapMut) -> io::Result<u64> {
        let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
        let tensors = self.checkpoint.tensors();
        let (start, end) = self.extent();
        // As numbers: the thread that populates ahead changes no contents.
        let (address, bytes) = (memory.as_mut_ptr().expose_provenance(), memory.len());
        let mut chunks = Vec::new();
        let (mut rest, mut at) = (&mut memory[..], start);
        for tensor in tensors {
            let (mine, others) = rest.split_at_mut((tensor.end - at) as usize);
            (rest, at) = (others, tensor.end);
            match self.cuts.cuts_columns(&tensor.name) && self.ranks > 1 {
                false => {
                    let offsets = (tensor.start..).step_by(self.sizes.read);
                    chunks.extend(offsets.zip(mine.chunks_mut(self.sizes.read)).map(|(offset, chunk)| Chunk {
                        offset,
                        width: 0,
                        parts: vec![chunk],
                    }));
                }
                true => {
                    let rows = tensor.shape.dims()[0] as usize;
                    let part = mine.len() / self.ranks as usize;
                    let width = part / rows;
                    let rows_each = (self.sizes.cut / (mine.len() / rows)).max(1);
                    let step = (rows_each * width * self.ranks as usize) as u64;
                    let mut parts: Vec<_> =
                        mine.chunks_mut(part).map(|part| part.chunks_mut(rows_each * width)).collect();
                    let mut offset = tensor.start;
                    while offset < tensor.end {
                        let parts = parts.iter_mut().filter_map(Iterator::next).collect();
                        chunks.push(Chunk { offset, width, parts });
                        offset += step;
                    }
                }
            }
        }
        let next = Mutex::new(chunks.into_iter());
        thread::scope(|scope| {
            if self.pages == Pages::Ahead {
                scope.spawn(move || {
                    let part = LOOPS[1].read;
                    (0..bytes).step_by(part).for_each(|at| populate(address + at, part.min(bytes - at)));
                });
            }
            let readers: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.read(&next))).collect();
            readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| io::Error::other("panicked"))?)
        })?;
        Ok(end - start)
    }

    fn read<'m>(&self, chunks: &Mutex<impl Iterator<Item = Chunk<'m>>>) -> io::Result<()> {
        let mut buffer = vec![0; self.sizes.cut];
        loop {
            let taken = chunks.lock().map_err(|_| io::Error::other("poisoned"))?.next();
            let Some(Chunk { offset, width, mut parts }) = taken else { return Ok(()) };
            if let [chunk] = &mut parts[..] {
                if self.pages == Pages::Before {
                    populate(chunk.as_mut_ptr().expose_provenance(), chunk.len());
                }
                self.file.read_exact_at(chunk, offset)?;
                continue;
            }
            let pitch = width * parts.len();
            buffer.resize(parts.iter().map(|part| part.len()).sum(), 0);
            self.file.read_exact_at(&mut buffer, offset)?;
            for (at, part) in parts.into_iter().enumerate() {
                for (to, row) in part.chunks_exact_mut(width).zip(buffer.chunks_exact(pitch)) {
                    to.copy_from_slice(&row[at * width..][..width]);
                }
            }
        }
    }
}

/// Gives memory its pages. What the system refuses is populated when it is written.
fn populate(address: usize, bytes: usize) {
    let page = rustix::param::page_size();
    let (start, end) = (address / page * page, (address + bytes).next_multiple_of(page));
    let memory = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the pages are those of a mapping that lives; the advice changes no contents.
    let _ = unsafe { rustix::mm::madvise(memory, end - start, rustix::mm::Advice::LinuxPopulateWrite) };
}

/// Bytes of the file from an offset on, and where they go: to one place, or rows of `width` bytes to each in turn.
struct Chunk<'m> {
    offset: u64,
    width: usize,
    parts: Vec<&'m mut [u8]>,
}
/// The smallest value, the median and the largest.
fn spread(values: impl Iterator<Item = f64>) -> serde_json::Value {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    json!([round(values[0]), round(median(&values)), round(values[values.len() - 1])])
}

/// Writes a Llama-shaped checkpoint, a third of it row-parallel.
fn llama(folder: &Path, layers: u64, hidden: u64) -> io::Result<PathBuf> {
    let intermediate = hidden * 43 / 16;
    let names = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", hidden, hidden),
        ("self_attn.v_proj", hidden, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", intermediate, hidden),
        ("mlp.up_proj", intermediate, hidden),
        ("mlp.down_proj", hidden, intermediate),
    ];
    let of_layer =
        |layer| names.map(|(name, rows, columns)| (format!("model.layers.{layer}.{name}.weight"), rows, columns));
    write_model(folder, &(0..layers).flat_map(of_layer).collect::<Vec<_>>())?;
    Ok(folder.into())
}
