//! The Llama kind with experts: Mixtral, Qwen3-MoE.

use super::Family;
use super::config::Config;
use super::llama::decoder;
use super::parts::Experts;
use crate::error::Result;
use crate::plan::rules::Rules;

pub(super) const MIXTRAL: Family = Family { model_types: &["mixtral"], architectures: &["Mixtral"], rules: mixtral };

pub(super) const QWEN3_MOE: Family =
    Family { model_types: &["qwen3_moe"], architectures: &["Qwen3Moe"], rules: qwen3_moe };

/// `w1` is the gate, `w3` what it gates, `w2` the way down.
fn mixtral(config: &Config<'_>) -> Result<Rules> {
    let experts = Experts::new(config, config.count(&["num_local_experts"])?, config.count(&["intermediate_size"])?)?;
    Ok(decoder(Rules::new(), config)?
        .experts(config, "**.{block_sparse_moe,mlp}.experts", ["{w1,w3}", "w2"], &experts)
        .whole("**.{block_sparse_moe,mlp}.gate"))
}

fn qwen3_moe(config: &Config<'_>) -> Result<Rules> {
    let experts = Experts::new(config, config.count(&["num_experts"])?, config.count(&["moe_intermediate_size"])?)?;
    let rules = decoder(Rules::new(), config)?
        .experts(config, "**.mlp.experts", ["{gate,up}_proj", "down_proj"], &experts)
        .whole("**.mlp.gate");
    // Layers of `mlp_only_layers`, and those that `decoder_sparse_step` leaves out.
    Ok(rules.optional_gated_mlp("**.mlp", config.count(&["intermediate_size"])?))
}
