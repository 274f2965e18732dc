//! The Llama kind, dense: separate q, k and v with grouped-query attention, a gated MLP (sharding.md section 2).

use super::Family;
use super::config::Config;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family {
    model_types: &["llama", "mistral", "qwen2", "qwen3"],
    architectures: &["Llama", "Mistral", "Qwen2", "Qwen3"],
    rules,
};

fn rules(config: &Config<'_>) -> Result<Rules> {
    let rules = decoder(Rules::new(), config)?;
    Ok(rules.gated_mlp("**.mlp", config.count(&["intermediate_size"])?))
}

/// All of a decoder of this kind but its MLPs.
pub(super) fn decoder(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    around_attention(rules.attention(config.heads()?), config)
}

/// All of a decoder of this kind but its MLPs and what its attention projects with.
pub(super) fn around_attention(rules: Rules, config: &Config<'_>) -> Result<Rules> {
    // LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config do not tie by default.
    let embeddings = ["model.embed_tokens.weight", "embed_tokens.weight"];
    config
        .vocabulary(rules, "lm_head.weight", &embeddings, false)?
        // Qwen3 normalises each head alone, so the weight has the size of one head.
        .norms("self_attn.{q,k}_norm")
        .optional()
        .norms("{input_layernorm,post_attention_layernorm}")
        .norms("norm")
        .stage(Stage::Last)
        .layers("{model.,}layers.*.**", &["num_hidden_layers"], config)
}
