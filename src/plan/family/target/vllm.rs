//! vLLM 0.33: queries, keys and values in one module, gates and ups in another, experts in stacks, and a vocabulary that
//! is padded to 64 rows and divided.

use super::Kind;
use super::merge::{Names, Stacked};
use crate::checkpoint::TensorMeta;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::{Expr, Fill};
use crate::plan::family::broken;
use crate::plan::family::config::{Config, Heads};
use crate::plan::family::deepseek::without_predicting_layers;
use crate::plan::family::parts::{ADAPTED, Block, Experts};
use crate::plan::quant::Scalars;
use crate::plan::rules::{Rules, Stage};
use crate::plan::world::{Ax, Coord, Mesh};

/// Rows of the vocabulary are padded to a multiple of this (`vocab_parallel_embedding.py`).
const VOCABULARY_UNIT: u64 = 64;

/// What stacked experts' tensors are named after their module (`routed_experts.py`).
const EXPERT_SUFFIXES: &[(&str, &str)] = &[
    (".weight", "_weight"),
    (".bias", "_bias"),
    (".weight_scale", "_weight_scale"),
    (".weight_scale_inv", "_weight_scale_inv"),
    (".weight_scale_2", "_weight_scale_2"),
    (".input_scale", "_input_scale"),
    (".weight_packed", "_weight_packed"),
    (".weight_shape", "_weight_shape"),
    (".weight_zero_point", "_weight_zero_point"),
    (".weight_g_idx", "_weight_g_idx"),
    (".weight_global_scale", "_weight_global_scale"),
    (".input_global_scale", "_input_global_scale"),
    (".qweight", "_qweight"),
    (".qzeros", "_qzeros"),
    (".scales", "_scales"),
    (".g_idx", "_g_idx"),
];

/// What its parameters have of scales that are one number: one for each expert; of those of inputs one for gate and up, but
/// for both where weights are FP4 (ModelOpt's, which have a scale of their scales).
const EXPERT_SCALARS: Scalars = Scalars { flat: true, last: &[(".input_scale", ".weight_scale_2")] };

pub(super) fn rules(kind: Kind, config: &Config<'_>) -> Result<Rules> {
    match kind {
        Kind::Llama => {
            let rules = decoder(config)?;
            Ok(gate_up(rules, "mlp", config.count(&["intermediate_size"])?))
        }
        Kind::Mixtral => {
            let count = config.count(&["num_local_experts"])?;
            let experts = Experts::new(config, count, config.count(&["intermediate_size"])?)?;
            Ok(stacked(decoder(config)?, config, &Names::MIXTRAL, &experts)?.whole("**.block_sparse_moe.gate"))
        }
        Kind::Qwen3Moe => {
            let count = config.count(&["num_experts"])?;
            let experts = Experts::new(config, count, config.count(&["moe_intermediate_size"])?)?;
            let rules = stacked(decoder(config)?, config, &Names::PROJECTIONS, &experts)?.whole("**.mlp.gate");
            Ok(gate_up(rules, "mlp", config.count(&["intermediate_size"])?))
        }
        Kind::DeepSeek => deepseek(config),
        Kind::GptOss => gpt_oss(config),
    }
}

/// The module below a layer that has scales of cached keys and values (`maybe_remap_kv_scale_name`).
pub(super) fn attention_core(kind: Kind) -> &'static str {
    match kind {
        Kind::Llama | Kind::Mixtral | Kind::Qwen3Moe => "self_attn.attn",
        Kind::DeepSeek => "self_attn.mla_attn.mla_attn",
        Kind::GptOss => "attn.attn",
    }
}

/// All of a decoder of the Llama kind but its MLPs.
fn decoder(config: &Config<'_>) -> Result<Rules> {
    let rules = vocabulary(Rules::new(), config, "embed_tokens")?;
    attention(rules, "self_attn", config.heads()?)
        .row("**.self_attn.o_proj", config.heads()?.heads, config.heads()?.size)
        .norms("self_attn.{q,k}_norm")
        .optional()
        .common(config)
}

/// Queries, keys and values in one module.
fn attention(rules: Rules, below: &str, Heads { heads, key_value, size }: Heads) -> Rules {
    let rules = ["k", "v"].into_iter().fold(rules, |rules, of| {
        rules
            .replicate(format!("**.{below}.{of}_proj.{of}_scale"))
            .rename(format!("{{1}}.{below}.attn.{of}_scale"))
            .keep_dtype()
            .optional()
    });
    let (queries, shared) = (Block::new(heads, size).cut(Ax::Tp), Block::shared(key_value, size).cut(Ax::Tp));
    rules.merged(below, &[("q_proj", queries), ("k_proj", shared.clone()), ("v_proj", shared)], "qkv_proj")
}

/// Gates and ups in one module, and downs.
fn gate_up(rules: Rules, below: &str, intermediate: u64) -> Rules {
    let cut = Block::new(intermediate, 1).cut(Ax::Tp);
    rules
        .merged(below, &[("gate_proj", cut.clone()), ("up_proj", cut)], "gate_up_proj")
        .row(&format!("**.{below}.down_proj"), intermediate, 1)
        .optional()
}

fn stacked(rules: Rules, config: &Config<'_>, names: &Names, experts: &Experts) -> Result<Rules> {
    refuse_words(config, names)?;
    let stack = |of: &str| format!("{}.routed_experts.{of}", names.experts);
    let (gate_up, down) = (&stack("w13"), &stack("w2"));
    let (inner, suffixes, scalars) = (Some(experts.inner()), EXPERT_SUFFIXES, EXPERT_SCALARS);
    Ok(rules.stacked(names, &Stacked { experts, inner, gate_up, down, suffixes, scalars }))
}

/// Refuses experts of compressed-tensors in words, of weights alone: with most kernels vLLM has inputs before outputs of
/// them, with some not (`CompressedTensorsWNA16MoEMethod`), and integers are not turned round here.
fn refuse_words(config: &Config<'_>, names: &Names) -> Result<()> {
    let experts = format!(".{}.", names.experts);
    let is_packed = |tensor: &&TensorMeta| {
        tensor.dtype == Dtype::I32 && tensor.name.ends_with(".weight_packed") && tensor.name.contains(&experts)
    };
    let packed = config.checkpoint.tensors().iter().find(is_packed);
    let Some(packed) = packed.filter(|_| !config.has_float_inputs()) else { return Ok(()) };
    Err(broken("target", "target vllm has no one layout of experts that are packed into words")
        .with_expected("target plain, or experts that are GPTQ, AWQ, FP4, FP8 or not quantised", "weight_packed of I32")
        .with_tensor(packed.name.as_str()))
}

/// Embeddings and output head: rows padded with zeros and divided.
fn vocabulary(rules: Rules, config: &Config<'_>, renamed: &str) -> Result<Rules> {
    let embeddings = ["model.embed_tokens.weight", "embed_tokens.weight"];
    let (rules, tied) = config.tie(rules, "lm_head.weight", &embeddings, false)?;
    let padded = |name: &str| -> Result<Expr> {
        let rows = match config.checkpoint.tensor(name).and_then(|tensor| tensor.shape.dims().first().copied()) {
            Some(rows) => rows,
            None => config.count(&["vocab_size"])?,
        };
        let to = rows.checked_next_multiple_of(VOCABULARY_UNIT).ok_or_else(|| {
            broken("config", "config.json: vocab_size makes no sense")
                .with_expected(format!("a number that can be padded to a multiple of {VOCABULARY_UNIT}"), rows)
        })?;
        let x = Expr::Pad { x: Box::new(Expr::Source), dim: 0, to, fill: Fill::Zero };
        Ok(Expr::Shard { x: Box::new(x), dim: 0, cut: Cut::default() })
    };
    let embedding = embeddings.into_iter().find(|name| config.checkpoint.tensor(name).is_some());
    let rules = rules
        .module("**.embed_tokens", padded(embedding.unwrap_or(embeddings[0]))?)
        .rename(format!("{{1}}.{renamed}"))
        .optional()
        .stage(if tied { Stage::Ends } else { Stage::First });
    Ok(rules.module(format!("{ADAPTED}lm_head"), padded("lm_head.weight")?).optional().stage(Stage::Last))
}

fn deepseek(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads"])?;
    let (nope, rope) = (config.count(&["qk_nope_head_dim"])?, config.count(&["qk_rope_head_dim"])?);
    let value = config.count(&["v_head_dim"])?;
    let intermediate = config.count(&["moe_intermediate_size"])?;
    let experts = Experts::new(config, config.count(&["n_routed_experts"])?, intermediate)?;
    let shared = intermediate.saturating_mul(config.find(&["n_shared_experts"])?.unwrap_or(1));

    let rules = vocabulary(without_predicting_layers(Rules::new(), config)?, config, "embed_tokens")?;
    let rules = match config.find(&["q_lora_rank"])? {
        Some(_) => {
            let parts = [("q_a_proj", whole()), ("kv_a_proj_with_mqa", whole())];
            rules.merged("self_attn", &parts, "fused_qkv_a_proj").column(
                "**.self_attn.q_b_proj",
                heads,
                nope.saturating_add(rope),
            )
        }
        None => rules
            .column("**.self_attn.q_proj", heads, nope.saturating_add(rope))
            .whole("**.self_attn.kv_a_proj_with_mqa"),
    };
    let rules = rules
        .column("**.self_attn.kv_b_proj", heads, nope.saturating_add(value))
        .row("**.self_attn.o_proj", heads, value)
        .norms("self_attn.{q_a,kv_a}_layernorm");
    let rules = stacked(rules, config, &Names::PROJECTIONS, &experts)?;
    let rules = match whole_shared_experts(config.options.mesh) {
        true => rules.whole("**.mlp.shared_experts.down_proj").optional().merged(
            "mlp.shared_experts",
            &[("gate_proj", whole()), ("up_proj", whole())],
            "gate_up_proj",
        ),
        false => gate_up(rules, "mlp.shared_experts", shared),
    };
    gate_up(rules, "mlp", config.count(&["intermediate_size"])?)
        .whole("**.mlp.gate")
        .replicate("**.mlp.gate.e_score_correction_bias")
        .keep_dtype()
        .optional()
        .common(config)
}

fn gpt_oss(config: &Config<'_>) -> Result<Rules> {
    let heads = config.heads()?;
    let experts = Experts::new(config, config.count(&["num_local_experts"])?, config.count(&["intermediate_size"])?)?;
    let is_mxfp4 = config.checkpoint.tensors().iter().any(|tensor| tensor.name.ends_with(".gate_up_proj_blocks"));
    let rules = vocabulary(Rules::new(), config, "embedding")?;
    let queries = Block::new(heads.heads, heads.size).cut(Ax::Tp);
    let shared = Block::shared(heads.key_value, heads.size).cut(Ax::Tp);
    let parts = [Expr::Source, tensor("k_proj"), tensor("v_proj")];
    let parts = parts.into_iter().zip([queries.clone(), shared.clone(), shared.clone()]);
    let parts = parts.map(|(x, cut)| Expr::Shard { x: Box::new(x), dim: 0, cut }).collect();
    rules
        .adapted("self_attn.q_proj", 0, &queries)
        .adapted("self_attn.{k,v}_proj", 0, &shared)
        .adapted("self_attn.o_proj", 1, &queries)
        .module("**.self_attn.q_proj", Expr::Concat { dim: 0, parts })
        .rename("{1}.attn.qkv_proj")
        .module_part("**.self_attn.{k,v}_proj")
        .row("**.self_attn.o_proj", heads.heads, heads.size)
        .rename("{1}.attn.o_proj")
        .column("**.self_attn.sinks", heads.heads, 1)
        .rename("{1}.attn.sinks")
        .whole("**.mlp.router")
        .interleaved_experts(&experts, is_mxfp4)
        .common(config)
}

/// Where activations are divided over the ranks between attention and experts, shared experts are whole on each
/// (`ParallelConfig.use_sequence_parallel_moe`).
fn whole_shared_experts(mesh: Mesh) -> bool {
    mesh.ep > 1 && mesh.tp > 1 && mesh.dp > 1
}

/// One part, for all ranks.
fn whole() -> Cut {
    Cut { by: Coord::One, ..Cut::default() }
}

fn tensor(name: &str) -> Expr {
    Expr::Tensor(format!("{{1}}.self_attn.{name}"))
}

impl Rules {
    /// gpt-oss: rows of gate and up stay interleaved; ranks have whole MXFP4 blocks of the intermediate dimension, the
    /// last one fewer; the bias of the way down is on one of them, and zeros on the others.
    fn interleaved_experts(self, experts: &Experts, is_mxfp4: bool) -> Rules {
        let mine = |x| Expr::Shard { x: Box::new(x), dim: 0, cut: experts.cut() };
        let ceil = |x, dim, unit| {
            let cut = Cut { how: Split::Ceil, unit, units: None, ..experts.inner() };
            Expr::Shard { x: Box::new(x), dim, cut }
        };
        let (gate_up, down) = ("**.mlp.experts.gate_up_proj", "**.mlp.experts.down_proj");
        let (w13, w2) = ("{1}.mlp.experts.routed_experts.w13", "{1}.mlp.experts.routed_experts.w2");
        let zeros = |x| Expr::On { x: Box::new(x), by: Coord::Axis(Ax::Etp), part: 0, fill: Fill::Zero };
        if is_mxfp4 {
            // Blocks and the bytes of each are one dimension.
            let flat = |x| Expr::Merge { x: Box::new(x), dim: 2, count: 2 };
            return self
                .place(format!("{gate_up}_blocks"), flat(ceil(mine(Expr::Source), 1, 2 * MX_BLOCK)))
                .rename(format!("{w13}_weight"))
                .place(format!("{down}_blocks"), flat(ceil(mine(Expr::Source), 2, 1)))
                .rename(format!("{w2}_weight"))
                .module(gate_up, ceil(mine(Expr::Source), 1, 2 * MX_BLOCK))
                .rename(w13)
                .suffixes(MXFP4_SUFFIXES)
                .module(down, ceil(mine(Expr::Source), 2, MX_BLOCK))
                .rename(w2)
                .suffixes(MXFP4_SUFFIXES)
                .bias_on(Coord::Axis(Ax::Etp), 0, Fill::Zero);
        }
        // Stored [experts, inputs, outputs].
        self.place(gate_up, ceil(mine(Expr::Source), 2, 2))
            .permute(&[0, 2, 1])
            .rename(format!("{w13}_weight"))
            .place(format!("{gate_up}_bias"), ceil(mine(Expr::Source), 1, 2))
            .rename(format!("{w13}_bias"))
            .place(down, ceil(mine(Expr::Source), 1, 1))
            .permute(&[0, 2, 1])
            .rename(format!("{w2}_weight"))
            .place(format!("{down}_bias"), zeros(mine(Expr::Source)))
            .rename(format!("{w2}_bias"))
    }
}

/// What gpt-oss' tensors of experts are named after their module.
const MXFP4_SUFFIXES: &[(&str, &str)] = &[("_scales", "_weight_scale"), ("_bias", "_bias")];

/// Inputs of a block of MXFP4.
const MX_BLOCK: u64 = 32;
