//! How linear layers are stored: one matrix, or what a quantiser made of it.

use serde_json::{Value, json};
use shardlift::Dtype;

use super::{Tensors, Values};

/// A layout of quantised linear layers: from the code that reads them (transformers, vLLM), not from opened headers.
/// Scales that some writers store as F32 and others in the model's dtype are one of the two here. `group` and `size` are
/// 128 in released models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// `weight` in the model's dtype.
    None,
    /// AutoGPTQ, 4 bits, as in TheBloke/Llama-2-7B-GPTQ: `qweight` packed along the input, `qzeros` along the output,
    /// `scales`, `g_idx`. With `act_order` (`desc_act`) `g_idx` is not in order. `bias`: newer writers store one of
    /// zeros for every layer.
    Gptq { group: u64, act_order: bool, bias: bool },
    /// AutoAWQ GEMM, 4 bits, as in TheBloke/Llama-2-7B-AWQ: `qweight` [in, out / 8].
    Awq { group: u64 },
    /// compressed-tensors `pack-quantized`, int4, as in the w4a16 models of RedHatAI. Asymmetric ones have zero points.
    Packed { group: u64, symmetric: bool },
    /// compressed-tensors `float-quantized`, static, one scale for a tensor, as in
    /// neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8.
    Fp8Tensor,
    /// compressed-tensors `float-quantized`, dynamic, one scale for a row, as in
    /// neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic.
    Fp8Channel,
    /// fbgemm, as in meta-llama/Llama-3.1-405B-Instruct-FP8: only MLPs, and not those of the first and last layer;
    /// `layers` is how many there are.
    Fbgemm { layers: u64 },
    /// One scale for a block of both sides, `weight_scale_inv`, as in DeepSeek-V3 (128).
    Fp8Block { size: u64 },
    /// ModelOpt, as in nvidia/Llama-3.1-8B-Instruct-NVFP4: two values a byte, FP8 scales for 16, one for the tensor.
    /// `kv_scales`: the FP8 cache's `k_scale` and `v_scale` beside the projections.
    Nvfp4 { kv_scales: bool },
    /// compressed-tensors `nvfp4-pack-quantized`, as in the NVFP4 models of RedHatAI.
    Nvfp4Packed,
    /// Microscaling FP8: bytes of exponent for 32 inputs.
    Mxfp8,
    /// bitsandbytes NF4 with double quantisation, as in unsloth/Meta-Llama-3.1-8B-bnb-4bit: a flat column of bytes.
    Nf4,
}

/// Elements of one block of absmax, and blocks of one nested block: bitsandbytes' `blocksize` 64 and 256.
const NF4_BLOCKS: [u64; 2] = [64, 256];

/// Pushes what the scheme makes of a linear layer of [rows, columns] (out, in).
pub(super) fn linear(tensors: &mut Tensors, module: &str, rows: u64, columns: u64) {
    use Dtype::{F8E4M3, F16, F32, I32, I64, U8};
    let scheme = tensors.scheme.of(module);
    let model = tensors.dtype;
    let mut typed = |name: &str, dtype, shape: &[u64]| tensors.typed(format!("{module}.{name}"), dtype, shape);
    match scheme {
        Scheme::None => typed("weight", model, &[rows, columns]),
        Scheme::Fbgemm { .. } => {
            typed("weight", F8E4M3, &[rows, columns]);
            typed("weight_scale", F32, &[rows, 1]);
        }
        Scheme::Gptq { group, act_order, .. } => {
            let groups = columns.div_ceil(group);
            typed("qweight", I32, &[columns / 8, rows]);
            typed("qzeros", I32, &[groups, rows / 8]);
            typed("scales", F16, &[groups, rows]);
            let values = Values::Groups { size: group, in_order: !act_order };
            tensors.push(format!("{module}.g_idx"), I32, &[columns], values);
        }
        Scheme::Awq { group } => {
            typed("qweight", I32, &[columns, rows / 8]);
            typed("qzeros", I32, &[columns / group, rows / 8]);
            typed("scales", F16, &[columns / group, rows]);
        }
        Scheme::Packed { group, symmetric } => {
            typed("weight_packed", I32, &[rows, columns.div_ceil(8)]);
            typed("weight_scale", model, &[rows, columns / group]);
            if !symmetric {
                typed("weight_zero_point", I32, &[rows / 8, columns / group]);
            }
            tensors.push(format!("{module}.weight_shape"), I64, &[2], Values::Shape([rows, columns]));
        }
        Scheme::Fp8Tensor => {
            typed("weight", F8E4M3, &[rows, columns]);
            typed("weight_scale", F32, &[1]);
            typed("input_scale", F32, &[1]);
        }
        Scheme::Fp8Channel => {
            typed("weight", F8E4M3, &[rows, columns]);
            typed("weight_scale", model, &[rows, 1]);
        }
        Scheme::Fp8Block { size } => {
            typed("weight", F8E4M3, &[rows, columns]);
            typed("weight_scale_inv", F32, &[rows.div_ceil(size), columns.div_ceil(size)]);
        }
        Scheme::Nvfp4 { kv_scales } => {
            typed("weight", U8, &[rows, columns / 2]);
            typed("weight_scale", F8E4M3, &[rows, columns / 16]);
            typed("weight_scale_2", F32, &[]);
            typed("input_scale", F32, &[]);
            match module.rsplit('.').next() {
                Some("k_proj") if kv_scales => typed("k_scale", F32, &[]),
                Some("v_proj") if kv_scales => typed("v_scale", F32, &[]),
                _ => {}
            }
        }
        Scheme::Nvfp4Packed => {
            typed("weight_packed", U8, &[rows, columns / 2]);
            typed("weight_scale", F8E4M3, &[rows, columns / 16]);
            typed("weight_global_scale", F32, &[1]);
            typed("input_global_scale", F32, &[1]);
        }
        Scheme::Mxfp8 => {
            typed("weight", F8E4M3, &[rows, columns]);
            typed("weight_scale", U8, &[rows, columns / 32]);
        }
        Scheme::Nf4 => {
            let [block, nested] = NF4_BLOCKS;
            let absmax = (rows * columns).div_ceil(block);
            typed("weight", U8, &[rows * columns / 2, 1]);
            typed("weight.absmax", U8, &[absmax]);
            typed("weight.quant_map", F32, &[16]);
            typed("weight.nested_absmax", F32, &[absmax.div_ceil(nested)]);
            typed("weight.nested_quant_map", F32, &[256]);
            typed("weight.quant_state.bitsandbytes__nf4", U8, &[89]);
        }
    }
}

impl Scheme {
    /// What becomes of one module: [`Scheme::Fbgemm`] takes only some.
    fn of(self, module: &str) -> Scheme {
        match self {
            Scheme::Fbgemm { layers }
                if !module.contains(".mlp.") || skipped(layers).any(|kept| module.starts_with(&kept)) =>
            {
                Scheme::None
            }
            scheme => scheme,
        }
    }

    /// `quantization_config`, where there is one: what transformers, vLLM and the writers themselves read.
    pub(super) fn config(self) -> Option<Value> {
        let compressed = |format: &str, weights: Value, inputs: Value| {
            json!({
                "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
                "config_groups": {
                    "group_0": { "targets": ["Linear"], "weights": weights, "input_activations": inputs }
                },
                "ignore": ["lm_head"], "kv_cache_scheme": null,
            })
        };
        let float = |strategy: &str, dynamic| json!({ "num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true, "dynamic": dynamic });
        let blocks = |bits, group| {
            json!({ "num_bits": bits, "type": "float", "strategy": "tensor_group", "group_size": group,
                "symmetric": true, "dynamic": false })
        };
        Some(match self {
            Scheme::None => return None,
            Scheme::Gptq { group, act_order, .. } => json!({
                "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order, "sym": true,
                "true_sequential": true, "damp_percent": 0.01,
            }),
            Scheme::Awq { group } => json!({
                "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": true,
            }),
            Scheme::Packed { group, symmetric } => compressed(
                "pack-quantized",
                json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": group,
                    "symmetric": symmetric, "dynamic": false, "actorder": null }),
                Value::Null,
            ),
            Scheme::Fp8Tensor => compressed("float-quantized", float("tensor", false), float("tensor", false)),
            Scheme::Fp8Channel => compressed("float-quantized", float("channel", false), float("token", true)),
            Scheme::Fbgemm { layers } => {
                let attention = (0..layers).map(|layer| format!("model.layers.{layer}.self_attn"));
                let mlps = skipped(layers).map(|module| module.trim_end_matches('.').to_owned());
                json!({ "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                    "modules_to_not_convert": mlps.chain(attention).chain(["lm_head".into()]).collect::<Vec<_>>() })
            }
            Scheme::Fp8Block { size } => json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [size, size],
            }),
            Scheme::Nvfp4 { kv_scales } => json!({
                "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"],
                "kv_cache_quant_algo": kv_scales.then_some("FP8"),
            }),
            Scheme::Nvfp4Packed => compressed("nvfp4-pack-quantized", blocks(4, 16), blocks(4, 16)),
            Scheme::Mxfp8 => compressed("mxfp8-quantized", blocks(8, 32), blocks(8, 32)),
            Scheme::Nf4 => json!({
                "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
            }),
        })
    }
}

/// The MLPs that fbgemm leaves as they are.
fn skipped(layers: u64) -> impl Iterator<Item = String> {
    [0, layers - 1].into_iter().map(|layer| format!("model.layers.{layer}.mlp."))
}
