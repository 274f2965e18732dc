//! Sentences as vectors: a BERT of candle's on weights that shardlift loaded, and once more on those of candle's own
//! loader, which gives the same to the last bit.
//!
//! `cargo run --release --features examples --example 05_candle_bert -- MODEL [SENTENCE ...]`, where MODEL is a folder like
//! that of all-MiniLM-L6-v2, which `scripts/demo` fetches into `.cache/demo`.

mod embedder;

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use embedder::{Embedder, Parts};
use shardlift::{Checkpoint, Loader, Memory, Plan, Rank, Rules, World, candle};

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut words = std::env::args_os().skip(1);
    let model = PathBuf::from(words.next().ok_or("usage: 05_candle_bert MODEL [SENTENCE ...]")?);
    let mut sentences: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    if sentences.is_empty() {
        sentences =
            ["A crane lifts a container.", "A crane raises a box.", "It rained all day."].map(String::from).into();
    }

    let vectors = Embedder::new(Parts::read(&model)?, ours(&model)?)?.embed(&sentences)?;
    let theirs = Embedder::new(Parts::read(&model)?, candles(&model)?)?.embed(&sentences)?;

    let mut out = io::stdout().lock();
    for (at, vector) in vectors.iter().enumerate() {
        let cosine = |other: &Vec<f32>| vector.iter().zip(other).map(|(a, b)| a * b).sum::<f32>();
        let near: Vec<String> = vectors.iter().map(|other| format!("{:6.3}", cosine(other))).collect();
        writeln!(out, "{}  {}", near.join(" "), sentences[at])?;
    }
    let bits = |vectors: &[Vec<f32>]| vectors.iter().flatten().map(|value| value.to_bits()).collect::<Vec<_>>();
    if bits(&vectors) != bits(&theirs) {
        return Err("candle's own loader gives other vectors".into());
    }
    writeln!(out, "candle's own loader gives the same {} numbers", bits(&theirs).len())?;
    Ok(())
}

/// Each tensor is read into the vector that candle's tensor is.
fn ours(model: &Path) -> Result<VarBuilder<'static>, Box<dyn Error + Send + Sync>> {
    let checkpoint = Checkpoint::open(model)?;
    let rules = Rules::replicate_all().casting(shardlift::Dtype::F32);
    let plan = Plan::new(&checkpoint, &rules, &World::host(1))?;
    let (mut weights, _) = Loader::new().memory(Memory::PerTensor).load(&plan)?;
    Ok(candle::var_builder(&mut weights, Rank(0), DType::F32, &Device::Cpu)?)
}

/// Each tensor is copied out of a mapping of the file.
fn candles(model: &Path) -> Result<VarBuilder<'static>, Box<dyn Error + Send + Sync>> {
    let files = [model.join("model.safetensors")];
    // SAFETY: nobody changes the file while this runs.
    Ok(unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &Device::Cpu) }?)
}
