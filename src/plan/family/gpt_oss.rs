//! gpt-oss: attention with sinks and biases, stacked experts in MXFP4 or BF16 whose gate and up outputs alternate and
//! stay so (sharding.md sections 2, 3 and 5). MXFP4 is cut between blocks of 32 inputs.

use super::Family;
use super::config::Config;
use super::llama::decoder;
use super::parts::{Block, Experts};
use crate::error::Result;
use crate::plan::expr::Expr;
use crate::plan::quant::Orientation;
use crate::plan::rules::{Rules, ShardRule};
use crate::plan::world::Ax;

pub(super) const FAMILY: Family = Family { model_types: &["gpt_oss"], architectures: &["GptOss"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads"])?;
    let intermediate = config.count(&["intermediate_size"])?;
    let experts = Experts::new(config, config.count(&["num_local_experts", "num_experts"])?, intermediate)?;
    let stacked = || Box::new(Expr::shard(0, experts.cut()));
    // The gate and the up output of an index are neighbours.
    let pairs = Block::new(intermediate, 2).cut(Ax::Etp);
    Ok(decoder(Rules::new(), config)?
        .shard("**.self_attn.sinks", ShardRule::dim(0).units(heads))
        .whole("**.mlp.router")
        .module("**.mlp.experts.gate_up_proj", Expr::Shard { x: stacked(), dim: 1, cut: pairs })
        .orientation(Orientation::InOut)
        .module("**.mlp.experts.down_proj", Expr::Shard { x: stacked(), dim: 2, cut: experts.inner() })
        .orientation(Orientation::InOut))
}
