//! InternLM2: the Llama kind with a fused `wqkv` that is interleaved by group, and stays so.

use super::Family;
use super::config::Config;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["internlm2"], architectures: &["InternLM2"], rules };

/// `w1` is the gate, `w3` what it gates, `w2` the way down.
fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.heads()?;
    let intermediate = config.count(&["intermediate_size"])?;

    // InternLM2Config does not tie by default.
    let embeddings = ["model.tok_embeddings.weight", "tok_embeddings.weight"];
    config
        .vocabulary(Rules::new(), "output.weight", &embeddings, false)?
        .grouped_heads("**.attention.wqkv", heads, config)?
        .row("**.attention.wo", heads.heads, heads.size)
        .column("**.feed_forward.{w1,w3}", intermediate, 1)
        .row("**.feed_forward.w2", intermediate, 1)
        .norms("{attention_norm,ffn_norm}")
        .norms("norm")
        .stage(Stage::Last)
        .layers("{model.,}layers.*.**", &["num_hidden_layers"], config)
}
