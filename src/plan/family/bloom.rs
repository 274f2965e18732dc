//! BLOOM, with or without the `transformer.` prefix. The fused query_key_value is interleaved by head,
//! `(heads, 3, head size)`, and stays so: a shard of whole heads is one range (sharding.md section 2).

use super::Family;
use super::config::Config;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["bloom"], architectures: &["Bloom"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["n_head", "num_attention_heads"])?;
    let hidden = config.count(&["hidden_size", "n_embed"])?;
    let size = config.head_size(hidden, heads)?;

    // BloomConfig ties by default.
    let embeddings = ["transformer.word_embeddings.weight", "word_embeddings.weight"];
    config
        .vocabulary(Rules::new(), "lm_head.weight", &embeddings, true)?
        .column("**.self_attention.query_key_value", heads, size.saturating_mul(3))
        .row("**.self_attention.dense", heads, size)
        .plain_mlp(hidden.saturating_mul(4))
        .norms("{input_layernorm,post_attention_layernorm}")
        .norms("word_embeddings_layernorm")
        .stage(Stage::First)
        .norms("ln_f")
        .stage(Stage::Last)
        .layers("{transformer.,}h.*.**", &["n_layer", "num_hidden_layers"], config)
}
