//! A Llama on 1, 2 and 4 tensor-parallel ranks, each a thread that holds only its partition: all give the logits of
//! candle's own Llama, up to the order of additions.
//!
//! `cargo run --release --features examples --example 06_candle_llama_tp -- FOLDER` writes a small random model into FOLDER
//! and loads it from there.

use std::collections::HashMap;
use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Barrier, Mutex};
use std::thread;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{RmsNorm, ops, rotary_emb};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use candle_transformers::utils::{build_causal_mask, repeat_kv};
use shardlift::candle::{Shard, ShardedVarBuilder, sharded_var_builder, var_builder};
use shardlift::{Checkpoint, Loader, Memory, Plan, Rank, Rules, Weights, World};

const CPU: Device = Device::Cpu;
const TOKENS: [u32; 9] = [1, 77, 200, 3, 3, 150, 42, 9, 255];
const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
  "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": 256, "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": false, "torch_dtype": "float32"
}"#;

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("usage: 06_candle_llama_tp FOLDER")?;
    let config: LlamaConfig = serde_json::from_str(CONFIG)?;
    write_model(folder.as_ref(), &config)?;
    let checkpoint = Checkpoint::open(&folder)?;

    // candle's own model, on the weights of one rank.
    let mut weights = load(&checkpoint, 1)?;
    let whole = weights.iter().map(|tensor| tensor.nbytes()).sum::<usize>();
    let builder = var_builder(&mut weights, Rank(0), DType::F32, &CPU)?;
    let dense = config.clone().into_config(false);
    let mut cache = Cache::new(false, DType::F32, &dense, &CPU)?;
    let tokens = Tensor::new(&[TOKENS], &CPU)?;
    let expected: Vec<f32> = Llama::load(builder, &dense)?.forward(&tokens, 0, &mut cache)?.flatten_all()?.to_vec1()?;
    let largest = expected.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));

    let mut out = io::stdout().lock();
    for world in [1, 2, 4] {
        let mut weights = load(&checkpoint, world)?;
        let of_rank = |rank| weights.of_rank(Rank(rank)).map(|tensor| tensor.nbytes()).sum::<usize>();
        let held = (0..world).map(of_rank).max().unwrap_or(0);
        let logits: Vec<f32> = run(&mut weights, &config, world as usize)?.to_vec1()?;
        let differs: Vec<f32> = logits.iter().zip(&expected).map(|(one, other)| (one - other).abs()).collect();
        // What is no number is not near anything.
        let alike = logits.len() == expected.len() && differs.iter().all(|&differs| differs <= 1e-4 * largest);
        let differs = differs.into_iter().fold(0f32, f32::max);
        writeln!(out, "{world} ranks: {held} of {whole} bytes each, logits differ by {differs:.1e} of {largest:.2}")?;
        if !alike {
            return Err("other logits".into());
        }
    }
    Ok(())
}

/// Each rank's partition, as the model's family divides it.
fn load(checkpoint: &Checkpoint, world: u32) -> shardlift::Result<Weights> {
    let plan = Plan::new(checkpoint, &Rules::for_model(checkpoint)?, &World::host(world))?;
    Ok(Loader::new().memory(Memory::PerTensor).load(&plan)?.0)
}

/// The logits of the last token, by all ranks together.
fn run(weights: &mut Weights, config: &LlamaConfig, world: usize) -> std::result::Result<Tensor, Box<dyn Error>> {
    let sums = Sums { at: Barrier::new(world), parts: Mutex::new(vec![None; world]) };
    let mut models = Vec::new();
    for rank in 0..world {
        let builder = sharded_var_builder(weights, Rank(rank as u32), DType::F32, &CPU)?;
        models.push(Model::new(config, builder, rank, world)?);
    }
    let forward = |model: &Model| model.forward(&sums).map_err(|error| error.to_string());
    let logits = thread::scope(|scope| {
        let threads: Vec<_> = models.iter().map(|model| scope.spawn(move || forward(model))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect::<Vec<_>>()
    });
    // Each has the logits of its part of the vocabulary.
    let parts = logits.into_iter().collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// Sums of what all ranks have, as an all-reduce.
struct Sums {
    at: Barrier,
    parts: Mutex<Vec<Option<Tensor>>>,
}

impl Sums {
    fn over_ranks(&self, rank: usize, part: Tensor) -> Result<Tensor> {
        self.parts.lock().expect("no rank panics")[rank] = Some(part);
        self.at.wait();
        let parts: Vec<Tensor> = self.parts.lock().expect("no rank panics").iter().flatten().cloned().collect();
        self.at.wait();
        Tensor::stack(&parts, 0)?.sum(0)
    }
}

/// What one rank computes with.
struct Model {
    rank: usize,
    heads: usize,
    kv_heads: usize,
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Tensor,
    cos: Tensor,
    sin: Tensor,
}

struct Layer {
    norms: [RmsNorm; 2],
    /// Queries, keys, values: rows of this rank's heads; and the columns that take them back.
    attention: [Tensor; 4],
    /// Gate and up, down.
    mlp: [Tensor; 3],
}

impl Model {
    fn new(config: &LlamaConfig, builder: ShardedVarBuilder<'_>, rank: usize, world: usize) -> Result<Model> {
        let LlamaConfig { hidden_size: hidden, vocab_size: vocabulary, intermediate_size: inner, .. } = *config;
        let head_size = hidden / config.num_attention_heads;
        let keys = config.num_key_value_heads() * head_size;
        let get = |builder: &ShardedVarBuilder<'_>, name: &str, shape: (usize, usize), dim| {
            builder.pp(name).get_with_hints(shape, "weight", Shard::Simple { dim, rank, world_size: world })
        };
        let norm = |builder: &ShardedVarBuilder<'_>, name: &str| -> Result<RmsNorm> {
            Ok(RmsNorm::new(builder.pp(name).get(hidden, "weight")?, config.rms_norm_eps))
        };
        let layer = |number: usize| -> Result<Layer> {
            let builder = builder.pp("model.layers").pp(number);
            let (attention, mlp) = (builder.pp("self_attn"), builder.pp("mlp"));
            Ok(Layer {
                norms: [norm(&builder, "input_layernorm")?, norm(&builder, "post_attention_layernorm")?],
                attention: [
                    get(&attention, "q_proj", (hidden, hidden), 0)?,
                    get(&attention, "k_proj", (keys, hidden), 0)?,
                    get(&attention, "v_proj", (keys, hidden), 0)?,
                    get(&attention, "o_proj", (hidden, hidden), 1)?,
                ],
                mlp: [
                    get(&mlp, "gate_proj", (inner, hidden), 0)?,
                    get(&mlp, "up_proj", (inner, hidden), 0)?,
                    get(&mlp, "down_proj", (hidden, inner), 1)?,
                ],
            })
        };
        let angle = |at: usize, pair: usize| at as f32 / config.rope_theta.powf(2. * pair as f32 / head_size as f32);
        let angles = (0..TOKENS.len()).flat_map(|at| (0..head_size / 2).map(move |pair| angle(at, pair)));
        let angles = Tensor::from_iter(angles, &CPU)?.reshape((TOKENS.len(), head_size / 2))?;
        Ok(Model {
            rank,
            heads: config.num_attention_heads / world,
            kv_heads: config.num_key_value_heads() / world,
            embeddings: get(&builder, "model.embed_tokens", (vocabulary, hidden), 0)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: norm(&builder, "model.norm")?,
            head: get(&builder, "lm_head", (vocabulary, hidden), 0)?,
            cos: angles.cos()?,
            sin: angles.sin()?,
        })
    }

    fn forward(&self, sums: &Sums) -> Result<Tensor> {
        // Tokens of other ranks' parts of the vocabulary add nothing here.
        let (part, hidden) = self.embeddings.dims2()?;
        let rows = TOKENS.iter().map(|&token| match (token as usize).checked_sub(self.rank * part) {
            Some(row) if row < part => self.embeddings.get(row),
            _ => Tensor::zeros(hidden, DType::F32, &CPU),
        });
        let mut x = sums.over_ranks(self.rank, Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)?)?;
        for layer in &self.layers {
            let attended = self.attend(layer, &layer.norms[0].forward(&x)?)?;
            x = (x + sums.over_ranks(self.rank, attended)?)?;
            let [gate, up, down] = &layer.mlp;
            let normed = layer.norms[1].forward(&x)?;
            let inner = (ops::silu(&normed.matmul(&gate.t()?)?)? * normed.matmul(&up.t()?)?)?;
            x = (x + sums.over_ranks(self.rank, inner.matmul(&down.t()?)?)?)?;
        }
        let last = self.norm.forward(&x)?.narrow(0, TOKENS.len() - 1, 1)?;
        last.matmul(&self.head.t()?)?.flatten_all()
    }

    fn attend(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let [q, k, v, o] = &layer.attention;
        let by_heads = |weight: &Tensor, heads: usize| -> Result<Tensor> {
            let projected = x.matmul(&weight.t()?)?;
            projected.reshape((1, TOKENS.len(), heads, ()))?.transpose(1, 2)?.contiguous()
        };
        let turned = |of: Tensor| rotary_emb::rope(&of, &self.cos, &self.sin);
        let groups = self.heads / self.kv_heads;
        let q = turned(by_heads(q, self.heads)?)?;
        let k = repeat_kv(turned(by_heads(k, self.kv_heads)?)?, groups)?;
        let v = repeat_kv(by_heads(v, self.kv_heads)?, groups)?.contiguous()?;
        let scores = (q.matmul(&k.t()?)? / (q.dim(D::Minus1)? as f64).sqrt())?;
        let later = build_causal_mask(TOKENS.len(), 0, &CPU)?.broadcast_as(scores.shape())?;
        let never = Tensor::new(f32::NEG_INFINITY, &CPU)?.broadcast_as(scores.shape())?;
        let weights = ops::softmax_last_dim(&later.where_cond(&never, &scores)?)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((TOKENS.len(), ()))?.matmul(&o.t()?)
    }
}

/// A model of random weights.
fn write_model(folder: &Path, config: &LlamaConfig) -> std::result::Result<(), Box<dyn Error>> {
    let LlamaConfig { hidden_size: hidden, vocab_size: vocabulary, intermediate_size: inner, .. } = *config;
    let keys = hidden / config.num_attention_heads * config.num_key_value_heads();
    let mut tensors = HashMap::new();
    let mut random = |name: String, shape: &[usize]| -> Result<()> {
        let scale = if shape.len() == 1 { 0.1 } else { 2. / (shape[1] as f32).sqrt() };
        tensors.insert(name, Tensor::randn(f32::from(shape.len() == 1), scale, shape, &CPU)?);
        Ok(())
    };
    random("model.embed_tokens.weight".into(), &[vocabulary, hidden])?;
    random("model.norm.weight".into(), &[hidden])?;
    random("lm_head.weight".into(), &[vocabulary, hidden])?;
    for layer in 0..config.num_hidden_layers {
        for (name, shape) in [
            ("input_layernorm", &[hidden][..]),
            ("post_attention_layernorm", &[hidden]),
            ("self_attn.q_proj", &[hidden, hidden]),
            ("self_attn.k_proj", &[keys, hidden]),
            ("self_attn.v_proj", &[keys, hidden]),
            ("self_attn.o_proj", &[hidden, hidden]),
            ("mlp.gate_proj", &[inner, hidden]),
            ("mlp.up_proj", &[inner, hidden]),
            ("mlp.down_proj", &[hidden, inner]),
        ] {
            random(format!("model.layers.{layer}.{name}.weight"), shape)?;
        }
    }
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), CONFIG)?;
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?;
    Ok(())
}
