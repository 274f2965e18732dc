//! BLOOM, with or without the `transformer.` prefix. The fused query_key_value is interleaved by head,
//! `(heads, 3, head size)`, and stays so: a shard of whole heads is one range (sharding.md section 2).

use super::{Config, Family};
use crate::error::Result;
use crate::plan::rules::{Rules, ShardRule};

pub(super) const FAMILY: Family = Family { model_types: &["bloom"], architectures: &["Bloom"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["n_head", "num_attention_heads"])?;
    let hidden = config.count(&["hidden_size", "n_embed"])?;
    let head = config.head_size(hidden, heads)?;

    // BloomConfig ties by default.
    let embeddings = ["transformer.word_embeddings.weight", "word_embeddings.weight"];
    let rules = config
        .head(Rules::new(), "lm_head.weight", &embeddings, true)?
        .shard("**.self_attention.query_key_value.{weight,bias}", ShardRule::dim(0).unit(3 * head).units(heads))
        .shard("**.self_attention.dense.weight", ShardRule::dim(1).unit(head).units(heads))
        .shard("**.mlp.dense_h_to_4h.{weight,bias}", ShardRule::dim(0).units(4 * hidden))
        .shard("**.mlp.dense_4h_to_h.weight", ShardRule::dim(1).units(4 * hidden))
        .replicate("**.{self_attention.dense,mlp.dense_4h_to_h}.bias")
        .replicate("**.{input_layernorm,post_attention_layernorm}.{weight,bias}")
        .replicate("**.{word_embeddings_layernorm,ln_f}.{weight,bias}")
        .replicate("**.word_embeddings.weight");
    Ok(rules)
}
