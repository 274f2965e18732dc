//! Warm loads against a bare loop of large `pread`s into equally prepared memory, with the same number of threads;
//! and the engines against each other, cold and warm.
//!
//! `cargo bench --bench throughput [-- FOLDER]`: writes a Llama-shaped checkpoint of 2 GB random bytes into FOLDER
//! (default `target/bench`) unless it is there, reads it once so that the page cache holds it, then measures pairs in
//! turn (ceiling, load, load, ceiling), then rounds of all engines. Prints medians and their spread, and the ratios
//! that count. `cargo test --bench throughput` does it once with 6 MB: what lands is checked, the figures mean nothing.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use memmap2::{Advice, MmapMut};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Plan, Rules, World};

const PAIRS: usize = 8;
const CHUNK: usize = 2 << 20;
const ROUNDS: usize = 7;
const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Uring, EngineChoice::Mmap];

/// The cuts of a Llama layer, its row-parallel third included.
const RULES: &str = r#"
rule = [
  { match = "**.{q,k,v,gate,up}_proj.weight", shard = { dim = 0 } },
  { match = "**.{o,down}_proj.weight", shard = { dim = 1 } },
]
"#;

fn main() -> io::Result<()> {
    // `cargo bench` says --bench, `cargo test` does not.
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let default = if bench { "target/bench" } else { "target/bench/small" };
    let folder = folder.map_or_else(|| PathBuf::from(default), PathBuf::from);
    let (pairs, rounds, layers, hidden) = if bench { (PAIRS, ROUNDS, 5, 4096) } else { (1, 1, 1, 512) };
    let file = write_model(&folder, layers, hidden)?;
    let checkpoint = Checkpoint::open(&folder).map_err(io::Error::other)?;
    let rules = Rules::from_toml(RULES).map_err(io::Error::other)?;
    let mut out = io::stdout();
    for ranks in [1, 4] {
        let plan = Plan::new(&checkpoint, &rules, &World::host(ranks)).map_err(io::Error::other)?;
        let loader = Loader::new().engine(EngineChoice::Pread);
        // Warm-up: the page cache, the staging ring, and the answer.
        let (weights, _) = loader.load(&plan).map_err(io::Error::other)?;
        weights.check().map_err(io::Error::other)?;
        drop(weights);
        ceiling(&file)?;
        let (mut bare, mut loads, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for pair in 0..pairs {
            let mut measured = [0.0; 2];
            let order = if pair % 2 == 0 { [0, 1] } else { [1, 0] };
            for which in order {
                measured[which] = if which == 0 { ceiling(&file)? } else { load(&loader, &plan)? };
            }
            bare.push(measured[0]);
            loads.push(measured[1]);
            ratios.push(measured[1] / measured[0]);
        }
        writeln!(
            out,
            "{{\"ranks\": {ranks}, \"ceiling_gb_per_s\": {}, \"load_gb_per_s\": {}, \"ratio\": {}}}",
            spread(&mut bare),
            spread(&mut loads),
            spread(&mut ratios)
        )?;
    }
    let plan = Plan::new(&checkpoint, &rules, &World::host(1)).map_err(io::Error::other)?;
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
            spread(&mut speeds[which]),
            spread(&mut ratios[which])
        )?;
    }
    writeln!(out, "{{\"auto_chose\": \"{chosen}\", \"cold\": {cold}}}")
}

/// GB/s of one load, its memory allocated in the time and freed after it.
fn load(loader: &Loader, plan: &Plan) -> io::Result<f64> {
    let began = Instant::now();
    let (weights, report) = loader.load(plan).map_err(io::Error::other)?;
    let seconds = began.elapsed().as_secs_f64();
    drop(weights);
    Ok(report.needed_bytes as f64 / seconds / 1e9)
}

/// GB/s of the bare loop: the file in chunks, into fresh memory with huge pages advised, as many threads as a load.
fn ceiling(file: &Path) -> io::Result<f64> {
    let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
    let file = File::open(file)?;
    let bytes = file.metadata()?.len() as usize;
    let began = Instant::now();
    let mut memory = MmapMut::map_anon(bytes)?;
    let _ = memory.advise(Advice::HugePage); // as a load does: where the kernel has none, small ones serve
    let next = std::sync::Mutex::new(memory.chunks_mut(CHUNK).enumerate());
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let taken = next.lock().map_err(|_| io::Error::other("poisoned"))?.next();
                        let Some((index, chunk)) = taken else { return Ok::<_, io::Error>(()) };
                        file.read_exact_at(chunk, (index * CHUNK) as u64)?;
                    }
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| io::Error::other("panicked"))?)
    })?;
    Ok(bytes as f64 / began.elapsed().as_secs_f64() / 1e9)
}

/// The median with the smallest and the largest value.
fn spread(values: &mut [f64]) -> String {
    values.sort_by(f64::total_cmp);
    let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    format!("[{:.3}, {median:.3}, {:.3}]", values[0], values[values.len() - 1])
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
