//! GPT-NeoX, with or without the `gpt_neox.` prefix. As in BLOOM the fused query_key_value is interleaved by head, and
//! stays so.

use super::Family;
use super::config::Config;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["gpt_neox"], architectures: &["GPTNeoX"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.heads()?;

    // GPTNeoXConfig does not tie by default.
    let embeddings = ["gpt_neox.embed_in.weight", "embed_in.weight"];
    config
        .vocabulary(Rules::new(), "embed_out.weight", &embeddings, false)?
        // The causal mask, which is computed.
        .skip("**.attention.{bias,masked_bias}")
        .optional()
        .grouped_heads("**.attention.query_key_value", heads, config)?
        .row("**.attention.dense", heads.heads, heads.size)
        .plain_mlp(config.count(&["intermediate_size"])?)
        .norms("{input_layernorm,post_attention_layernorm}")
        .norms("final_layer_norm")
        .stage(Stage::Last)
        .layers("{gpt_neox.,}layers.*.**", &["num_hidden_layers"], config)
}
