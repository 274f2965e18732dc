//! Opening and planning at scale, headers only: sparse files shaped like DeepSeek-V3 (163 files) and Llama-3.1-70B
//! (30 files), planned for 8 ranks.
//!
//! `cargo bench --bench planning [-- FOLDER]` prints seconds (median of 7) and the process's peak memory as JSON.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};
use shardlift::{Checkpoint, Plan, Rules, World};

const RUNS: usize = 7;

/// Rows for what feeds a layer, columns for what leaves it, the rest whole (sharding of tensor-parallel experts).
const RULES: &str = r#"
rule = [
  { match = "**.{q,k,v,gate,up,q_b,kv_b}_proj.weight", shard = { dim = 0 } },
  { match = "**.{q_b,kv_b}_proj.weight_scale_inv", shard = { dim = 0 }, optional = true },
  { match = "**.{gate,up}_proj.weight_scale_inv", shard = { dim = 0 }, optional = true },
  { match = "**.{o,down}_proj.weight", shard = { dim = 1 } },
  { match = "**.{o,down}_proj.weight_scale_inv", shard = { dim = 1 }, optional = true },
  { match = "**", replicate = true },
]
"#;

type Named = (String, &'static str, Vec<u64>);

fn main() -> io::Result<()> {
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    let rules = Rules::from_toml(RULES).map_err(io::Error::other)?;
    for (name, tensors, files) in [("llama-3.1-70b", llama(), 30), ("deepseek-v3", deepseek(), 163)] {
        let model = folder.join(name);
        write(&model, &tensors, files)?;
        let (mut open, mut plan) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let began = Instant::now();
            let checkpoint = Checkpoint::open(&model).map_err(io::Error::other)?;
            open.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            let planned = Plan::new(&checkpoint, &rules, &World::host(8)).map_err(io::Error::other)?;
            plan.push(began.elapsed().as_secs_f64());
            assert_eq!(planned.params().len(), tensors.len(), "every tensor is planned");
            assert_eq!(planned.storage_bytes(), checkpoint.bytes(), "every byte is read once");
        }
        open.sort_by(f64::total_cmp);
        plan.sort_by(f64::total_cmp);
        let result = json!({
            "model": name, "tensors": tensors.len(), "files": files, "ranks": 8,
            "open_seconds": open[RUNS / 2], "plan_seconds": plan[RUNS / 2], "peak_bytes": peak_bytes()?,
        });
        writeln!(io::stdout(), "{result}")?;
    }
    Ok(())
}

/// Llama-3.1-70B: 80 layers, hidden 8192, intermediate 28672, 8 key-value heads of 128 (its config.json).
fn llama() -> Vec<Named> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".into(), "BF16", vec![128_256, 8192]),
        ("model.norm.weight".into(), "BF16", vec![8192]),
        ("lm_head.weight".into(), "BF16", vec![128_256, 8192]),
    ];
    for layer in 0..80 {
        for (name, shape) in [
            ("input_layernorm", vec![8192]),
            ("post_attention_layernorm", vec![8192]),
            ("self_attn.q_proj", vec![8192, 8192]),
            ("self_attn.k_proj", vec![1024, 8192]),
            ("self_attn.v_proj", vec![1024, 8192]),
            ("self_attn.o_proj", vec![8192, 8192]),
            ("mlp.gate_proj", vec![28_672, 8192]),
            ("mlp.up_proj", vec![28_672, 8192]),
            ("mlp.down_proj", vec![8192, 28_672]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), "BF16", shape));
        }
    }
    tensors
}

/// DeepSeek-V3: 61 layers, 3 of them dense, 256 routed experts and one shared, FP8 weights with a scale for each
/// 128 x 128 block, and one multi-token-prediction layer (its config.json).
fn deepseek() -> Vec<Named> {
    let mut tensors: Vec<Named> = vec![
        ("model.embed_tokens.weight".into(), "BF16", vec![129_280, 7168]),
        ("model.norm.weight".into(), "BF16", vec![7168]),
        ("lm_head.weight".into(), "BF16", vec![129_280, 7168]),
    ];
    let fp8 = |tensors: &mut Vec<Named>, name: String, rows: u64, columns: u64| {
        tensors.push((format!("{name}.weight"), "F8_E4M3", vec![rows, columns]));
        let blocks = vec![rows.div_ceil(128), columns.div_ceil(128)];
        tensors.push((format!("{name}.weight_scale_inv"), "F32", blocks));
    };
    let mlp = |tensors: &mut Vec<Named>, name: String, intermediate: u64| {
        fp8(tensors, format!("{name}.gate_proj"), intermediate, 7168);
        fp8(tensors, format!("{name}.up_proj"), intermediate, 7168);
        fp8(tensors, format!("{name}.down_proj"), 7168, intermediate);
    };
    for layer in 0..62 {
        let name = format!("model.layers.{layer}");
        for (norm, size) in [
            ("input_layernorm", 7168),
            ("post_attention_layernorm", 7168),
            ("self_attn.q_a_layernorm", 1536),
            ("self_attn.kv_a_layernorm", 512),
        ] {
            tensors.push((format!("{name}.{norm}.weight"), "BF16", vec![size]));
        }
        for (part, rows, columns) in [
            ("q_a_proj", 1536, 7168),
            ("q_b_proj", 24_576, 1536),
            ("kv_a_proj_with_mqa", 576, 7168),
            ("kv_b_proj", 32_768, 512),
            ("o_proj", 7168, 16_384),
        ] {
            fp8(&mut tensors, format!("{name}.self_attn.{part}"), rows, columns);
        }
        if layer < 3 {
            mlp(&mut tensors, format!("{name}.mlp"), 18_432);
            continue;
        }
        tensors.push((format!("{name}.mlp.gate.weight"), "BF16", vec![256, 7168]));
        tensors.push((format!("{name}.mlp.gate.e_score_correction_bias"), "F32", vec![256]));
        mlp(&mut tensors, format!("{name}.mlp.shared_experts"), 2048);
        for expert in 0..256 {
            mlp(&mut tensors, format!("{name}.mlp.experts.{expert}"), 2048);
        }
    }
    tensors
}

/// Writes an index and sparse files whose tensors have no blocks on disk.
fn write(model: &Path, tensors: &[Named], files: usize) -> io::Result<()> {
    std::fs::create_dir_all(model)?;
    let mut weight_map = Map::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
        let name = format!("model-{:05}-of-{files:06}.safetensors", number + 1);
        let mut header = Map::new();
        let mut end = 0;
        for (tensor, dtype, shape) in part {
            let bits = shardlift::Dtype::from_name(dtype).ok_or_else(|| io::Error::other("unknown dtype"))?.bits();
            let start = end;
            end += shape.iter().product::<u64>() * u64::from(bits) / 8;
            header.insert(tensor.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
            weight_map.insert(tensor.clone(), Value::String(name.clone()));
        }
        let header = Value::Object(header).to_string();
        let mut file = File::create(model.join(&name))?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.set_len(8 + header.len() as u64 + end)?;
    }
    std::fs::write(model.join("model.safetensors.index.json"), json!({ "weight_map": weight_map }).to_string())
}

/// The most memory that this process ever had (Linux).
fn peak_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no VmHWM"))
}
