//! Qwen3-Next: layers of linear attention, whose fused projections are interleaved by key head and stay so, and of full
//! attention with a gate for each query head; experts and a shared one in all of them (sharding.md section 2). Layers
//! that only predict further tokens are skipped.

use super::Family;
use super::config::{Config, Heads};
use super::llama::around_attention;
use super::parts::{Block, Experts};
use crate::error::Result;
use crate::plan::rules::{Rules, ShardRule};

pub(super) const FAMILY: Family = Family { model_types: &["qwen3_next"], architectures: &["Qwen3Next"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let Heads { heads, key_value, size } = config.heads()?;
    let experts = Experts::new(config, config.count(&["num_experts"])?, config.count(&["moe_intermediate_size"])?)?;
    let rules = linear_attention(Rules::new().skip("mtp.**").optional(), config)?
        // Queries and gate of each head.
        .column("**.self_attn.q_proj", heads, size.saturating_mul(2))
        .key_value("**.self_attn.{k,v}_proj", key_value, size)
        .row("**.self_attn.o_proj", heads, size);
    Ok(around_attention(rules, config)?
        .experts(config, "**.mlp.experts", ["{gate,up}_proj", "down_proj"], &experts)
        .whole("**.mlp.{gate,shared_expert_gate}")
        .gated_mlp("**.mlp.shared_expert", config.count(&["shared_expert_intermediate_size"])?)
        // Layers of `mlp_only_layers`, and those that `decoder_sparse_step` leaves out.
        .optional_gated_mlp("**.mlp", config.count(&["intermediate_size"])?))
}

/// Every key head and the value heads that share it are one unit, in all tensors.
fn linear_attention(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    let (keys, values) = (config.count(&["linear_num_key_heads"])?, config.count(&["linear_num_value_heads"])?);
    // Value heads that share a key head.
    let group = Heads { heads: values, key_value: keys, size: 1 }.group()?;
    let key = config.count(&["linear_key_head_dim"])?;
    let value = config.count(&["linear_value_head_dim"])?.saturating_mul(group);
    let (of_key, of_value) = (Block::new(keys, key), Block::new(keys, value));
    Ok(rules
        .column("**.linear_attn.in_proj_qkvz", keys, key.saturating_add(value).saturating_mul(2))
        .column("**.linear_attn.in_proj_ba", keys, group.saturating_mul(2))
        .blocks("**.linear_attn.conv1d", &[of_key, of_key, of_value])
        .shard("**.linear_attn.{A_log,dt_bias}", ShardRule::dim(0).units(keys).unit(group))
        .keep_dtype()
        .norms("linear_attn.norm")
        .row("**.linear_attn.out_proj", keys, value))
}
