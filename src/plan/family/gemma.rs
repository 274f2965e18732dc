//! Gemma 2 and 3, dense, with a norm before and after both halves of a layer. Gemma 3 may have a vision tower, whole on
//! every rank of the first stage: what is about the language model then lies below `language_model`, in the names and in
//! the config.

use super::Family;
use super::config::{Config, Heads};
use super::parts::ADAPTED;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family {
    model_types: &["gemma2", "gemma3", "gemma3_text"],
    architectures: &["Gemma2", "Gemma3", "Gemma3Text"],
    rules,
};

fn rules(config: &Config<'_>) -> Result<Rules> {
    let config = config.within("text_config");
    // What Gemma2Config and Gemma3TextConfig have by default; released configs leave it out.
    let count = |key, default| -> Result<u64> { Ok(config.find(&[key])?.unwrap_or(default)) };
    let heads = Heads {
        heads: count("num_attention_heads", 8)?,
        key_value: count("num_key_value_heads", 4)?,
        size: count("head_dim", 256)?,
    };

    let embeddings = ["language_model.model.embed_tokens.weight", "model.embed_tokens.weight", "embed_tokens.weight"];
    let is_below = config.checkpoint.tensor(embeddings[0]).is_some();
    let head = if is_below { "language_model.lm_head.weight" } else { "lm_head.weight" };
    // Before the others: the tower has modules of the same names.
    let rules = Rules::new()
        .replicate(format!("{ADAPTED}{{vision_tower,multi_modal_projector}}.**"))
        .optional()
        .stage(Stage::First);
    config
        // Both tie by default.
        .vocabulary(rules, head, &embeddings, true)?
        .attention(heads)
        .norms("self_attn.{q,k}_norm")
        .optional()
        .gated_mlp("**.mlp", config.count(&["intermediate_size"])?)
        .norms("{input,post_attention,pre_feedforward,post_feedforward}_layernorm")
        .norms("norm")
        .stage(Stage::Last)
        .layers("{language_model.,}{model.,}layers.*.**", &["num_hidden_layers"], &config)
}
