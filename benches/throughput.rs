//! Warm loads against bare loops that do no more than they must, with as many threads and equally prepared memory; and
//! the engines against each other, cold and warm.
//!
//! `cargo bench --bench throughput [-- FOLDER]`: writes a Llama-shaped checkpoint of 2 GB random bytes into FOLDER
//! (default `target/bench`) unless it is there, reads it once so that the page cache holds it, then measures pairs in
//! turn (bare, load, load, bare) of each cut, then rounds of all engines. Prints medians and their spread, and the ratios
//! that count. `cargo test --bench throughput` does it once with 6 MB: what lands is checked, the figures mean nothing.

mod support;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use memmap2::{Advice, MmapMut};
use rustix::time::ClockId;
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Plan, Rules, World};
use support::{median, seconds};

const PAIRS: usize = 8;
/// Bytes that the bare loop reads at once: with the buffer that it cuts from, a core's L2 cache.
const CHUNK: usize = 1 << 20;
const ROUNDS: usize = 7;
const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Uring, EngineChoice::Mmap];

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
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let default = if bench { "target/bench" } else { "target/bench/small" };
    let folder = folder.map_or_else(|| PathBuf::from(default), PathBuf::from);
    let (pairs, rounds, layers, hidden) = if bench { (PAIRS, ROUNDS, 5, 4096) } else { (1, 1, 1, 512) };
    let file = write_model(&folder, layers, hidden)?;
    let checkpoint = Checkpoint::open(&folder).map_err(io::Error::other)?;
    let mut out = io::stdout();
    for (ranks, cuts) in CASES {
        let plan = Plan::new(&checkpoint, &cuts.rules(), &World::host(ranks)).map_err(io::Error::other)?;
        let loader = Loader::new().engine(EngineChoice::Pread);
        // Warm-up: the page cache, the staging ring, and the answer.
        let (weights, _) = loader.load(&plan).map_err(io::Error::other)?;
        weights.check().map_err(io::Error::other)?;
        drop(weights);
        let bare = Bare { file: File::open(&file)?, checkpoint: &checkpoint, ranks, cuts };
        bare.load()?;
        let mut measured: [Vec<Measured>; 2] = Default::default();
        for pair in 0..pairs {
            let order = if pair % 2 == 0 { [0, 1] } else { [1, 0] };
            for which in order {
                measured[which].push(Measured::of(|| if which == 0 { bare.load() } else { load(&loader, &plan) })?);
            }
        }
        let [bare, loads] = &measured;
        let ratio = |figure: fn(&Measured) -> f64| spread(bare.iter().zip(loads).map(|(a, b)| figure(b) / figure(a)));
        writeln!(
            out,
            "{{\"ranks\": {ranks}, \"cuts\": \"{cuts:?}\", \"bare_gb_per_s\": {}, \"load_gb_per_s\": {}, \"ratio\": {}, \"load_cpu_s_per_gb\": {}, \"cpu_ratio\": {}}}",
            spread(bare.iter().map(Measured::gb_per_s)),
            spread(loads.iter().map(Measured::gb_per_s)),
            ratio(Measured::gb_per_s),
            spread(loads.iter().map(Measured::cpu_per_gb)),
            ratio(Measured::cpu_per_gb),
        )?;
    }
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1)).map_err(io::Error::other)?;
    for cold in [false, true] {
        engines(&file, &plan, cold, rounds, &mut out)?;
    }
    Ok(())
}

/// Every engine in turn, in rounds that start with another one each time; the ratios are to the best of the round.
fn engines(file: &Path, plan: &Plan, cold: bool, rounds: usize, out: &mut impl Write) -> io::Result<()> {
    let mut speeds: [Vec<f64>; ENGINES.len()] = Default::default();
    let mut ratios = speeds.clone();
    let mut chosen = String::new();
    for round in 0..rounds {
        let mut measured = [0.0; ENGINES.len()];
        for turn in 0..ENGINES.len() {
            let which = (round + turn) % ENGINES.len();
            // Cold means out of the page cache, or in it.
            let opened = File::open(file)?;
            if cold {
                rustix::fs::fadvise(&opened, 0, None, rustix::fs::Advice::DontNeed)?;
            } else {
                io::copy(&mut &opened, &mut io::sink())?;
            }
            let loader = Loader::new().engine(ENGINES[which]);
            let began = Instant::now();
            let (weights, report) = loader.load(plan).map_err(io::Error::other)?;
            measured[which] = report.needed_bytes as f64 / began.elapsed().as_secs_f64() / 1e9;
            drop(weights);
            if ENGINES[which] == EngineChoice::Auto {
                chosen = format!("{}: {}", report.engine, report.engine_reason);
            }
        }
        let best = measured.iter().copied().fold(0.0, f64::max);
        for (which, speed) in measured.into_iter().enumerate() {
            speeds[which].push(speed);
            ratios[which].push(speed / best);
        }
    }
    for (which, engine) in ENGINES.iter().enumerate() {
        writeln!(
            out,
            "{{\"engine\": \"{engine:?}\", \"cold\": {cold}, \"gb_per_s\": {}, \"of_the_best\": {}}}",
            spread(speeds[which].iter().copied()),
            spread(ratios[which].iter().copied())
        )?;
    }
    writeln!(out, "{{\"auto_chose\": \"{chosen}\", \"cold\": {cold}}}")
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

/// A load without a program around it: a thread for each core, reads of [`CHUNK`] bytes into fresh memory with huge pages
/// advised; where columns are cut, into a buffer of the thread and from there row by row.
struct Bare<'a> {
    file: File,
    checkpoint: &'a Checkpoint,
    ranks: u32,
    cuts: Cuts,
}

impl Bare<'_> {
    fn load(&self) -> io::Result<u64> {
        let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
        let tensors = self.checkpoint.tensors();
        let (start, end) = (tensors.iter().map(|it| it.start).min(), tensors.iter().map(|it| it.end).max());
        let (start, end) = (start.unwrap_or(0), end.unwrap_or(0));
        let mut memory = MmapMut::map_anon((end - start) as usize)?;
        let _ = memory.advise(Advice::HugePage); // as a load does: where the kernel has none, small ones serve
        let mut chunks = Vec::new();
        let (mut rest, mut at) = (&mut memory[..], start);
        for tensor in tensors {
            let (mine, others) = rest.split_at_mut((tensor.end - at) as usize);
            (rest, at) = (others, tensor.end);
            match self.cuts.cuts_columns(&tensor.name) && self.ranks > 1 {
                false => {
                    let offsets = (tensor.start..).step_by(CHUNK);
                    chunks.extend(offsets.zip(mine.chunks_mut(CHUNK)).map(|(offset, chunk)| Chunk {
                        offset,
                        width: 0,
                        parts: vec![chunk],
                    }));
                }
                true => {
                    let rows = tensor.shape.dims()[0] as usize;
                    let part = mine.len() / self.ranks as usize;
                    let width = part / rows;
                    let rows_each = (CHUNK / (mine.len() / rows)).max(1);
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
            let readers: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.read(&next))).collect();
            readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| io::Error::other("panicked"))?)
        })?;
        Ok(end - start)
    }

    fn read<'m>(&self, chunks: &Mutex<impl Iterator<Item = Chunk<'m>>>) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let taken = chunks.lock().map_err(|_| io::Error::other("poisoned"))?.next();
            let Some(Chunk { offset, width, mut parts }) = taken else { return Ok(()) };
            if let [chunk] = &mut parts[..] {
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

/// Bytes of the file from an offset on, and where they go: to one place, or rows of `width` bytes to each in turn.
struct Chunk<'m> {
    offset: u64,
    width: usize,
    parts: Vec<&'m mut [u8]>,
}
/// The median with the smallest and the largest value.
fn spread(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    format!("[{:.3}, {:.3}, {:.3}]", values[0], median(&values), values[values.len() - 1])
}

/// A Llama-shaped checkpoint, a third of it row-parallel. Five layers of a 7B model (hidden size 4096) take 2.02 GB.
fn write_model(folder: &Path, layers: u64, hidden: u64) -> io::Result<PathBuf> {
    let file = folder.join("model.safetensors");
    if file.is_file() {
        return Ok(file);
    }
    std::fs::create_dir_all(folder)?;
    let intermediate = hidden * 43 / 16;
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for layer in 0..layers {
        for (name, rows, columns) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, hidden),
            ("self_attn.v_proj", hidden, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ] {
            let start = end;
            end += rows * columns * 2;
            let entry = serde_json::json!({"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]});
            header.insert(format!("model.layers.{layer}.{name}.weight"), entry);
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let partial = folder.join("model.partial");
    let mut out = io::BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for _ in 0..end / 8 {
        // xorshift64 (Marsaglia 2003): bytes that no layer below can compress or share.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
    }
    out.into_inner()?.sync_all()?;
    std::fs::rename(partial, &file)?;
    Ok(file)
}
