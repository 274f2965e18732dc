//! Loading into candle's tensors, by us and by candle's own builders, beside our load without candle.
//!
//! `cargo bench --features candle --bench candle [-- FOLDER]` writes 1 GB of random bfloat16 into FOLDER (default
//! `target/bench/candle`) and loads it warm into memory that is new each time: whole, and one of 4 ranks by rows and by
//! columns; 9 rounds in which everybody has a turn and another one begins. Prints medians with their spread, and of each
//! round what the others take of our own load. All tensors are compared once. `cargo test --bench candle` does it once
//! with little data; its figures mean nothing.

mod support;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::{Shard, ShardedSafeTensors};
use serde_json::json;
use shardlift::candle::{sharded_var_builder, var_builder};
use shardlift::{Checkpoint, Digest, Loader, Memory, Plan, Rank, Rules, Weights, World};
use support::{median, write_model};

const ROUNDS: usize = 9;
const RANK: usize = 1;
const RANKS: usize = 4;
const WAYS: [&str; 3] = ["shardlift", "shardlift into candle", "candle"];

struct Case {
    name: &'static str,
    /// The dimension that is cut.
    dim: Option<usize>,
}

const CASES: [Case; 3] = [
    Case { name: "whole", dim: None },
    Case { name: "rows of one of 4", dim: Some(0) },
    Case { name: "columns of one of 4", dim: Some(1) },
];

fn main() -> io::Result<()> {
    let bench = std::env::args().any(|argument| argument == "--bench");
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from("target/bench/candle"), PathBuf::from);
    let (name, layers, hidden, rounds) = if bench { ("large", 20, 4096, ROUNDS) } else { ("small", 2, 256, 1) };
    let folder = folder.join(name);
    let tensors: Vec<_> = (0..layers)
        .flat_map(|layer| {
            [("up", hidden * 2, hidden / 2), ("down", hidden / 2, hidden * 2)]
                .map(move |(name, rows, columns)| (format!("layers.{layer}.{name}.weight"), rows, columns))
        })
        .chain([("embed.weight".into(), hidden * 2, hidden)])
        .collect();
    write_model(&folder, &tensors)?;
    for case in CASES {
        run(&folder, &case, rounds)?;
    }
    Ok(())
}

fn run(folder: &Path, case: &Case, rounds: usize) -> io::Result<()> {
    let expected = digests(case.load(folder, "candle")?.1)?;
    for way in &WAYS[1..2] {
        assert_eq!(digests(case.load(folder, way)?.1)?, expected, "{} by {way}", case.name);
    }
    let (_, _, bytes) = case.load(folder, WAYS[0])?;
    let mut seconds: [Vec<f64>; 3] = Default::default();
    for round in 0..rounds {
        for turn in 0..WAYS.len() {
            let turn = if round % 2 == 0 { turn } else { WAYS.len() - 1 - turn };
            let which = (turn + round) % WAYS.len();
            seconds[which].push(case.load(folder, WAYS[which])?.0);
        }
    }
    let spread = |values: &[f64]| {
        let bound = |pick: fn(f64, f64) -> f64| values.iter().copied().reduce(pick).unwrap_or(f64::NAN);
        json!([bound(f64::min), median(values), bound(f64::max)])
    };
    let of_own: Vec<Vec<f64>> =
        seconds.iter().map(|of| seconds[0].iter().zip(of).map(|(own, other)| own / other).collect()).collect();
    let line: serde_json::Map<_, _> = WAYS
        .iter()
        .enumerate()
        .map(|(at, way)| {
            let rates: Vec<f64> = seconds[at].iter().map(|seconds| bytes as f64 / seconds / 1e9).collect();
            ((*way).into(), json!({ "gb_per_s": spread(&rates), "of_own_load": spread(&of_own[at]) }))
        })
        .collect();
    writeln!(io::stdout(), "{}", json!({ "case": case.name, "bytes": bytes, "ways": line }))
}

impl Case {
    /// Loads in one of the ways: seconds from the path to the last tensor, the tensors of candle, and the bytes.
    fn load(&self, folder: &Path, way: &str) -> io::Result<(f64, Vec<Tensor>, u64)> {
        let began = Instant::now();
        if way == "candle" {
            let tensors = self.by_candle(folder).map_err(io::Error::other)?;
            return Ok((began.elapsed().as_secs_f64(), tensors, 0));
        }
        let (mut weights, bytes) = self.own(folder).map_err(io::Error::other)?;
        let mut tensors = Vec::new();
        if way != WAYS[0] {
            tensors = self.candles_own(&mut weights).map_err(io::Error::other)?;
        }
        Ok((began.elapsed().as_secs_f64(), tensors, bytes))
    }

    fn own(&self, folder: &Path) -> shardlift::Result<(Weights, u64)> {
        let checkpoint = Checkpoint::open(folder)?;
        let (rules, world) = match self.dim {
            None => (Rules::replicate_all(), World::host(1)),
            Some(dim) => (Rules::new().shard("**", dim), World::host(RANKS as u32).driving(Rank(RANK as u32))),
        };
        let plan = Plan::new(&checkpoint, &rules, &world)?;
        let (weights, report) = Loader::new().memory(Memory::PerTensor).load(&plan)?;
        Ok((weights, report.landed_bytes))
    }

    fn candles_own(&self, weights: &mut Weights) -> candle_core::Result<Vec<Tensor>> {
        let checkpoint = weights.plan().checkpoint().clone();
        let rank = weights.plan().world().driven()[0];
        let names = checkpoint.tensors().iter().map(|tensor| tensor.name.as_str());
        match self.dim {
            None => {
                let builder =
                    var_builder(weights, rank, DType::BF16, &Device::Cpu).map_err(candle_core::Error::wrap)?;
                names.map(|name| builder.get_unchecked(name)).collect()
            }
            Some(dim) => {
                let builder =
                    sharded_var_builder(weights, rank, DType::BF16, &Device::Cpu).map_err(candle_core::Error::wrap)?;
                let shard = Shard { dim, rank: RANK, world_size: RANKS };
                names.map(|name| builder.get_with_hints((), name, shard.into())).collect()
            }
        }
    }

    fn by_candle(&self, folder: &Path) -> candle_core::Result<Vec<Tensor>> {
        // The names are those of the header, which candle reads as well.
        let checkpoint = Checkpoint::open(folder).map_err(candle_core::Error::wrap)?;
        let names = checkpoint.tensors().iter().map(|tensor| tensor.name.as_str());
        let files = [folder.join("model.safetensors")];
        // SAFETY: nobody changes the file meanwhile.
        unsafe {
            match self.dim {
                None => {
                    let builder = VarBuilder::from_mmaped_safetensors(&files, DType::BF16, &Device::Cpu)?;
                    names.map(|name| builder.get_unchecked(name)).collect()
                }
                Some(dim) => {
                    let builder = ShardedSafeTensors::var_builder(&files, DType::BF16, &Device::Cpu)?;
                    let shard = Shard { dim, rank: RANK, world_size: RANKS };
                    names.map(|name| builder.get_with_hints((), name, shard)).collect()
                }
            }
        }
    }
}

/// Of each tensor's bytes.
fn digests(tensors: Vec<Tensor>) -> io::Result<Vec<u64>> {
    let digest = |tensor: &Tensor| {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(CpuStorage::BF16(values)) = &*storage else { return Err(io::Error::other("no BF16")) };
        assert!(layout.is_contiguous() && layout.start_offset() == 0 && values.len() == tensor.elem_count());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
        Ok(Digest::of(&bytes))
    };
    tensors.iter().map(digest).collect()
}
