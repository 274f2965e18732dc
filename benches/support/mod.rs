//! What the benches on the driver twin share: checkpoints to load, clocks, and figures of many runs.

#![allow(dead_code, reason = "each bench uses its own part")]

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use shardlift::{CallerMemory, Loader, Report, Tensor, Weights};

/// Writes `model.safetensors` of BF16 matrices into a folder, unless it is there: random bytes, so that what lands in
/// the wrong place is noticed.
pub(crate) fn write_model(folder: &Path, tensors: &[(String, u64, u64)]) -> io::Result<()> {
    let file = folder.join("model.safetensors");
    if file.is_file() {
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    let mut header = serde_json::Map::new();
    let mut end = 0;
    let mut tensors: Vec<_> = tensors.iter().collect();
    tensors.sort(); // by name, as safetensors' own writer does with tensors of one dtype
    for (name, rows, columns) in tensors {
        let start = end;
        end += rows * columns * 2;
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}));
    }
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().wrapping_neg() % 8)); // as safetensors' own writer does
    let partial = folder.join("model.partial");
    let mut out = io::BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for _ in 0..end.div_ceil(8) {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
    }
    let file_end = 8 + header.len() as u64 + end;
    let out = out.into_inner()?;
    out.set_len(file_end)?;
    out.sync_all()?;
    std::fs::rename(partial, file)
}

/// A clock in seconds.
pub(crate) fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The memory that weights lie in, to load into it again: fresh memory of the twin costs page faults, which no GPU's
/// does.
pub(crate) fn memory_of(weights: &Weights) -> Vec<CallerMemory> {
    let memory = |tensor: &Tensor| CallerMemory {
        rank: tensor.rank(),
        name: tensor.name().into(),
        address: std::ptr::with_exposed_provenance_mut(tensor.device_ptr() as usize),
        bytes: tensor.nbytes(),
    };
    weights.iter().map(memory).collect()
}

/// Loads into the [memory of](memory_of) these weights.
pub(crate) fn load_again(loader: &Loader, weights: &Weights, memory: &[CallerMemory]) -> io::Result<Report> {
    // SAFETY: the weights keep their memory, nobody reads it meanwhile, and no two of their tensors overlap.
    let load = unsafe { loader.start_into(weights.plan(), memory) }.map_err(io::Error::other)?;
    let (_, report) = load.finish().map_err(io::Error::other)?;
    Ok(report)
}

/// The twin's ledger as it is now.
pub(crate) fn ledger(folder: &Path) -> io::Result<Value> {
    let file = folder.join(format!("ledger.{}.json", std::process::id()));
    twins::cuda::ledger(&file);
    let text = std::fs::read(&file)?;
    std::fs::remove_file(&file)?;
    let ledger: Value = serde_json::from_slice(&text)?;
    assert_eq!(ledger["violations"], json!([]), "the twin saw what no driver forgives");
    Ok(ledger)
}

/// The median of the values.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}
