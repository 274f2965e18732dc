//! DeepSeek-V2 and V3: multi-head latent attention, whose projections into the latent space are whole on every rank
//! (sharding.md section 2), shared and routed experts. Layers that only predict further tokens are skipped.

use super::Family;
use super::config::Config;
use super::parts::Experts;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family =
    Family { model_types: &["deepseek_v2", "deepseek_v3"], architectures: &["DeepseekV2", "DeepseekV3"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let intermediate = config.count(&["moe_intermediate_size"])?;
    let experts = Experts::new(config, config.count(&["n_routed_experts"])?, intermediate)?;
    let rules = without_predicting_layers(Rules::new(), config)?.experts(
        config,
        "**.mlp.experts",
        ["{gate,up}_proj", "down_proj"],
        &experts,
    );
    decoder(rules, config)
}

/// All but routed experts.
pub(super) fn decoder(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads"])?;
    let (nope, rope) = (config.count(&["qk_nope_head_dim"])?, config.count(&["qk_rope_head_dim"])?);
    let value = config.count(&["v_head_dim"])?;
    let shared =
        config.count(&["moe_intermediate_size"])?.saturating_mul(config.find(&["n_shared_experts"])?.unwrap_or(1));

    config
        .vocabulary(rules, "lm_head.weight", &["model.embed_tokens.weight"], false)?
        .whole("**.self_attn.{q_a_proj,kv_a_proj_with_mqa}")
        .column("**.self_attn.{q_proj,q_b_proj}", heads, nope.saturating_add(rope))
        .column("**.self_attn.kv_b_proj", heads, nope.saturating_add(value))
        .row("**.self_attn.o_proj", heads, value)
        .norms("self_attn.{q_a,kv_a}_layernorm")
        .optional_gated_mlp("**.mlp.shared_experts", shared)
        .optional_gated_mlp("**.mlp", config.count(&["intermediate_size"])?)
        .whole("**.mlp.gate")
        .replicate("**.mlp.gate.e_score_correction_bias")
        .keep_dtype()
        .optional()
        .norms("{input_layernorm,post_attention_layernorm}")
        .norms("norm")
        .stage(Stage::Last)
        .layers("{model.,}layers.*.**", &["num_hidden_layers"], config)
}

/// Skips the layers behind the last, which only predict further tokens.
pub(super) fn without_predicting_layers(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    let layers = config.count(&["num_hidden_layers"])?;
    let predicting = layers..layers.saturating_add(config.find(&["num_nextn_predict_layers"])?.unwrap_or(0).min(64));
    Ok(predicting.fold(rules, |rules, layer| rules.skip(format!("model.layers.{layer}.**")).optional()))
}
