//! Phi-3: the Llama kind with `[q; k; v]` and `[gate; up]` as one tensor each, whose blocks are cut one by one
//! (sharding.md section 2).

use super::Family;
use super::config::Config;
use super::parts::Block;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["phi3"], architectures: &["Phi3"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.heads()?;
    let half = Block::new(config.count(&["intermediate_size"])?, 1);

    // Phi3Config does not tie by default.
    let embeddings = ["model.embed_tokens.weight", "embed_tokens.weight"];
    config
        .vocabulary(Rules::new(), "lm_head.weight", &embeddings, false)?
        .fused_heads("**.self_attn.qkv_proj", heads)
        .row("**.self_attn.o_proj", heads.heads, heads.size)
        .blocks("**.mlp.gate_up_proj", &[half, half])
        .row("**.mlp.down_proj", half.units, half.unit)
        .norms("{input_layernorm,post_attention_layernorm}")
        .norms("norm")
        .stage(Stage::Last)
        .layers("{model.,}layers.*.**", &["num_hidden_layers"], config)
}
