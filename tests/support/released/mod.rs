//! Released models, tensor by tensor: for every model its `config.json` and the names, dtypes and shapes that its files
//! have on the hub, and small models of the same families, from one description each.
//!
//! A description is a struct of the numbers in the model's config class; its constants are released models (the comment
//! says which, and where the numbers are from), and `TINY` is a model of the family that divides by 1, 2, 4 and 8 where
//! the family can. `..` makes others: `Llama { heads: 24, kv_heads: 24, ..Llama::TINY }` divides by 3 too.
//!
//! Counts of elements are those that the hub shows for the model's safetensors (`tests/released.rs`), so a wrong number
//! or a missing tensor fails there; names are those of the classes of transformers 4.57.6 unless said otherwise. Counts
//! of files are about the hub's; which tensor lies in which file is not.
#![allow(dead_code, unused_imports, reason = "each test uses its own models")]

mod adapter;
mod classic;
mod deepseek;
mod fused;
mod gemma;
mod gpt_oss;
mod llama;
mod llama4;
mod qwen3_next;
mod scheme;
mod tiny;

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use shardlift::Dtype;

pub(crate) use classic::{Bert, Bloom, Gpt2, GptNeox};
pub(crate) use deepseek::DeepSeek;
pub(crate) use fused::{Dbrx, Falcon, InternLm2, Mpt, Phi3};
pub(crate) use gemma::{Gemma, Siglip};
pub(crate) use gpt_oss::GptOss;
pub(crate) use llama::{Experts, Kind, Llama};
pub(crate) use llama4::{Llama4, Llama4Vision};
pub(crate) use qwen3_next::Qwen3Next;
pub(crate) use scheme::Scheme;
pub(crate) use tiny::{schemes, tiny};

/// A checkpoint without its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// `config.json`: what decides shapes, under the names of the model's config class.
    pub(crate) config: Value,
    pub(crate) tensors: Vec<Tensor>,
    /// How many safetensors files; more than one come with an index.
    pub(crate) files: usize,
    /// What the names of its safetensors files begin with.
    stem: &'static str,
    config_name: &'static str,
}

/// A tensor of a model.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    values: Values,
}

/// What [`write_random`] puts into a tensor.
#[derive(Debug, Clone, Copy)]
enum Values {
    /// Random bits; floats are finite and between -2 and 2.
    Random,
    /// The group of each input channel, `g_idx` of GPTQ: in order, or every group in turn (activation order).
    Groups { size: u64, in_order: bool },
    /// The shape of the matrix that a packed tensor stands for.
    Shape([u64; 2]),
}

impl Model {
    /// Elements of one dtype.
    pub(crate) fn elements(&self, dtype: Dtype) -> u64 {
        self.tensors.iter().filter(|tensor| tensor.dtype == dtype).map(Tensor::elements).sum()
    }

    /// The tensor of this name.
    pub(crate) fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
}

impl Tensor {
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.dtype.bytes_of(self.elements()).expect("whole bytes")
    }

    /// Its bytes in what [`write_random`] writes: they depend on the seed and the tensor's name.
    pub(crate) fn random(&self, seed: u64) -> Vec<u8> {
        let four = |value: u64| (value as i32).to_le_bytes();
        match self.values {
            Values::Groups { size, in_order: true } => (0..self.elements()).flat_map(|k| four(k / size)).collect(),
            Values::Groups { size, in_order: false } => {
                let groups = self.elements().div_ceil(size);
                (0..self.elements()).flat_map(|k| four(k % groups)).collect()
            }
            Values::Shape(shape) => shape.iter().flat_map(|size| size.to_le_bytes()).collect(),
            Values::Random => {
                let mut state = self.name.bytes().fold(seed, |state, byte| next(state ^ u64::from(byte)));
                let mut bytes = Vec::with_capacity(self.bytes() as usize + 8);
                while (bytes.len() as u64) < self.bytes() {
                    state = next(state);
                    bytes.extend((state ^ (state >> 29)).to_le_bytes());
                }
                bytes.truncate(self.bytes() as usize);
                bound(self.dtype, &mut bytes);
                bytes
            }
        }
    }
}

/// A step of a linear congruential generator.
fn next(state: u64) -> u64 {
    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

/// Makes floats finite and smaller than 2 by their highest exponent bits, of which only those below 1 stay.
fn bound(dtype: Dtype, bytes: &mut [u8]) {
    match dtype {
        // The exponent is 0x7c..=0x7f: from 1/8 to 2.
        Dtype::Bf16 => bytes.chunks_exact_mut(2).for_each(|b| b[1] = b[1] & 0x81 | 0x3e),
        Dtype::F32 => bytes.chunks_exact_mut(4).for_each(|b| b[3] = b[3] & 0x81 | 0x3e),
        // 0xc..=0xf of 5 bits.
        Dtype::F16 => bytes.chunks_exact_mut(2).for_each(|b| b[1] = b[1] & 0x8f | 0x30),
        // 0..=7 of 4 bits.
        Dtype::F8E4M3 => bytes.iter_mut().for_each(|b| *b &= 0xbf),
        _ => {}
    }
}

/// The tensors of a model under construction: what they are stored as, and how linear layers are quantised.
struct Tensors {
    list: Vec<Tensor>,
    dtype: Dtype,
    scheme: Scheme,
}

impl Tensors {
    fn new(dtype: Dtype, scheme: Scheme) -> Tensors {
        Tensors { list: Vec::new(), dtype, scheme }
    }

    fn push(&mut self, name: impl Display, dtype: Dtype, shape: &[u64], values: Values) {
        self.list.push(Tensor { name: name.to_string(), dtype, shape: shape.to_vec(), values });
    }

    /// A tensor of this dtype.
    fn typed(&mut self, name: impl Display, dtype: Dtype, shape: &[u64]) {
        self.push(name, dtype, shape, Values::Random);
    }

    /// A tensor of the model's dtype.
    fn plain(&mut self, name: impl Display, shape: &[u64]) {
        self.typed(name, self.dtype, shape);
    }

    /// `module.weight` and perhaps `module.bias` of a norm or the like.
    fn norm(&mut self, module: impl Display, size: u64, bias: bool) {
        self.plain(format!("{module}.weight"), &[size]);
        if bias {
            self.plain(format!("{module}.bias"), &[size]);
        }
    }

    /// `module.weight` of [rows, columns] (out, in) in the model's dtype, whatever the scheme, and perhaps its bias.
    fn dense(&mut self, module: impl Display, rows: u64, columns: u64, bias: bool) {
        self.plain(format!("{module}.weight"), &[rows, columns]);
        if bias {
            self.plain(format!("{module}.bias"), &[rows]);
        }
    }

    /// The same as the scheme stores it.
    fn linear(&mut self, module: impl Display, rows: u64, columns: u64, bias: bool) {
        scheme::linear(self, &module.to_string(), rows, columns);
        if bias || matches!(self.scheme, Scheme::Gptq { bias: true, .. }) {
            self.plain(format!("{module}.bias"), &[rows]);
        }
    }

    /// `gate_proj`, `up_proj` and `down_proj` below `module`.
    fn gated_mlp(&mut self, module: impl Display, hidden: u64, intermediate: u64) {
        self.linear(format!("{module}.gate_proj"), intermediate, hidden, false);
        self.linear(format!("{module}.up_proj"), intermediate, hidden, false);
        self.linear(format!("{module}.down_proj"), hidden, intermediate, false);
    }

    /// The model, with the scheme's `quantization_config`.
    fn model(self, mut config: Value, files: usize) -> Model {
        if let Some(quantization) = self.scheme.config() {
            config["quantization_config"] = quantization;
        }
        let known = json!({ "BF16": "bfloat16", "F16": "float16", "F32": "float32" });
        config["torch_dtype"] = known[self.dtype.name()].clone();
        Model { config, tensors: self.list, files, stem: "model", config_name: "config.json" }
    }
}

/// Writes the model without its bytes: `config.json`, headers, and files whose data has no blocks on disk.
pub(crate) fn write(folder: &Path, model: &Model) -> io::Result<()> {
    write_files(folder, model, |_, _| Ok(()))
}

/// Writes the model with [`Tensor::random`] bytes.
pub(crate) fn write_random(folder: &Path, model: &Model, seed: u64) -> io::Result<()> {
    write_files(folder, model, |file, tensor| file.write_all(&tensor.random(seed)))
}

fn write_files(folder: &Path, model: &Model, data: impl Fn(&mut File, &Tensor) -> io::Result<()>) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join(model.config_name), format!("{:#}\n", model.config))?;
    let (parts, stem) = (parts(model), model.stem);
    let (mut weight_map, mut total) = (Map::new(), 0);
    for (number, tensors) in parts.iter().enumerate() {
        let name = match parts.len() {
            1 => format!("{stem}.safetensors"),
            files => format!("{stem}-{:05}-of-{files:05}.safetensors", number + 1),
        };
        let (mut header, mut end) = (Map::new(), 0);
        for tensor in tensors {
            let start = end;
            end += tensor.bytes();
            let entry = json!({ "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [start, end] });
            assert!(header.insert(tensor.name.clone(), entry).is_none(), "{} twice", tensor.name);
            weight_map.insert(tensor.name.clone(), Value::String(name.clone()));
        }
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut file = File::create(folder.join(&name))?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        tensors.iter().try_for_each(|tensor| data(&mut file, tensor))?;
        file.set_len(8 + header.len() as u64 + end)?;
        total += end;
    }
    assert_eq!(weight_map.len(), model.tensors.len(), "every tensor has its own name");
    if parts.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        std::fs::write(folder.join(format!("{stem}.safetensors.index.json")), format!("{index:#}\n"))?;
    }
    Ok(())
}

/// The tensors of each file: about equal bytes, and within a file in the order of the reference writer, which is by
/// dtype and then by name, so that all are aligned.
fn parts(model: &Model) -> Vec<Vec<&Tensor>> {
    let total: u64 = model.tensors.iter().map(Tensor::bytes).sum();
    let mut parts: Vec<Vec<&Tensor>> = vec![Vec::new(); model.files];
    let mut start = 0;
    for tensor in &model.tensors {
        let part = u128::from(start) * model.files as u128 / u128::from(total.max(1));
        parts[(part as usize).min(model.files - 1)].push(tensor);
        start += tensor.bytes();
    }
    parts.retain(|part| !part.is_empty());
    for part in &mut parts {
        part.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    }
    parts
}
