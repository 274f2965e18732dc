//! Hugging Face transformers 5.23: the parts of its tensor-parallel plans, as `torch.chunk` makes them, which know no units;
//! experts in stacks. Heads that do not divide are refused: its attention has no use for parts of heads.

use super::Kind;
use super::merge::{Names, Stacked};
use crate::error::Result;
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Expr;
use crate::plan::family::config::Config;
use crate::plan::family::deepseek::without_predicting_layers;
use crate::plan::family::parts::{ADAPTED, Block, Experts};
use crate::plan::quant::Scalars;
use crate::plan::rules::{Rules, Stage};
use crate::plan::world::{Ax, Coord};

/// What stacked experts' tensors are named after their module (`finegrained_fp8.py`).
const EXPERT_SUFFIXES: &[(&str, &str)] = &[(".weight", ""), (".weight_scale_inv", "_scale_inv")];

pub(super) fn rules(kind: Kind, config: &Config<'_>) -> Result<Rules> {
    match kind {
        Kind::Llama => decoder(Rules::new(), config)?.ceil_mlp("**.mlp").common(config),
        Kind::Mixtral => {
            let experts = Experts::new(config, config.count(&["num_local_experts"])?, 1)?;
            stacked(decoder(Rules::new(), config)?, config, &Names::MIXTRAL, &experts, "mlp")
                .whole("**.block_sparse_moe.gate")
                .rename("{1}.mlp.gate")
                .common(config)
        }
        Kind::Qwen3Moe => {
            let experts = Experts::new(config, config.count(&["num_experts"])?, 1)?;
            stacked(decoder(Rules::new(), config)?, config, &Names::PROJECTIONS, &experts, "mlp")
                .whole("**.mlp.gate")
                .ceil_mlp("**.mlp")
                .common(config)
        }
        Kind::DeepSeek => {
            let experts = Experts::new(config, config.count(&["n_routed_experts"])?, 1)?;
            let rules = vocabulary(without_predicting_layers(Rules::new(), config)?, config)?
                .whole("**.self_attn.{q_proj,q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}")
                .norms("self_attn.{q_a,kv_a}_layernorm");
            stacked(rules, config, &Names::PROJECTIONS, &experts, "mlp")
                .ceil_mlp("**.mlp.shared_experts")
                .ceil_mlp("**.mlp")
                .whole("**.mlp.gate")
                .replicate("**.mlp.gate.e_score_correction_bias")
                .keep_dtype()
                .optional()
                .common(config)
        }
        // Its plan has nothing but the output head, and with expert parallelism the experts.
        Kind::GptOss => {
            let experts = Experts::new(config, config.count(&["num_local_experts"])?, 1)?;
            vocabulary(Rules::new(), config)?
                .whole("**.self_attn.{q,k,v,o}_proj")
                .replicate("**.self_attn.sinks")
                .whole("**.mlp.router")
                .module("**.mlp.experts.{gate_up,down}_proj", Expr::shard(0, experts.cut()))
                .common(config)
        }
    }
}

/// Embeddings and attention of the Llama kind.
fn decoder(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    let heads = config.heads()?;
    Ok(vocabulary(rules, config)?
        .column("**.self_attn.q_proj", heads.heads, heads.size)
        .column("**.self_attn.{k,v}_proj", heads.key_value, heads.size)
        .row("**.self_attn.o_proj", heads.heads, heads.size)
        .norms("self_attn.{q,k}_norm")
        .optional())
}

/// Whole embeddings, and an output head that is divided unless it is the embeddings: `tie_weights` leaves alone what is
/// stored with other values, and those that are equal may as well be read.
fn vocabulary(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    let embeddings = ["model.embed_tokens.weight", "embed_tokens.weight"];
    let (rules, tied) = match config.checkpoint.tensor("lm_head.weight") {
        Some(_) => (rules, false),
        None => config.tie(rules, "lm_head.weight", &embeddings, false)?,
    };
    let rules = rules.whole("**.embed_tokens").optional().stage(if tied { Stage::Ends } else { Stage::First });
    Ok(rules.module(format!("{ADAPTED}lm_head"), Expr::shard(0, ceil())).optional().stage(Stage::Last))
}

/// Experts as two stacks below the module `mlp`: each divided over the tensor-parallel ranks, or, with expert
/// parallelism, whole experts over the groups.
fn stacked(rules: Rules, config: &Config<'_>, names: &Names, experts: &Experts, mlp: &str) -> Rules {
    let inner = (config.options.mesh.ep == 1).then(ceil);
    let (gate_up, down) = (format!("{mlp}.experts.gate_up_proj"), format!("{mlp}.experts.down_proj"));
    let (suffixes, scalars) = (EXPERT_SUFFIXES, Scalars::default());
    rules.stacked(names, &Stacked { experts, inner, gate_up: &gate_up, down: &down, suffixes, scalars })
}

/// Parts of the same size, but for the last that has any.
fn ceil() -> Cut {
    Cut { how: Split::Ceil, by: Coord::Axis(Ax::Tp), units: None, ..Block::new(1, 1).cut(Ax::Tp) }
}

impl Rules {
    /// A gated MLP where there is one.
    fn ceil_mlp(self, mlp: &str) -> Rules {
        self.module(format!("{mlp}.{{gate,up}}_proj"), Expr::shard(0, ceil()))
            .optional()
            .module(format!("{mlp}.down_proj"), Expr::shard(1, ceil()))
            .optional()
    }
}
