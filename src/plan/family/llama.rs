//! Llama, Mistral, Qwen2, Qwen3: separate q, k and v with grouped-query attention (sharding.md section 2).

use super::{Config, Family};
use crate::error::Result;
use crate::plan::rules::{Rules, ShardRule};

pub(super) const FAMILY: Family = Family {
    model_types: &["llama", "mistral", "qwen2", "qwen3"],
    architectures: &["Llama", "Mistral", "Qwen2", "Qwen3"],
    rules,
};

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads"])?;
    let kv_heads = config.find(&["num_key_value_heads"])?.unwrap_or(heads);
    let head = match config.find(&["head_dim"])? {
        Some(head) => head,
        None => config.head_size(config.count(&["hidden_size"])?, heads)?,
    };
    let intermediate = config.count(&["intermediate_size"])?;

    let q = ShardRule::dim(0).unit(head).units(heads);
    let kv = ShardRule::dim(0).unit(head).units(kv_heads).replicate_units();
    // LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config do not tie by default.
    let rules = config
        .head(Rules::new(), "lm_head.weight", &["model.embed_tokens.weight", "embed_tokens.weight"], false)?
        .shard("**.self_attn.q_proj.weight", q.clone())
        .shard("**.self_attn.q_proj.bias", q)
        .optional()
        .shard("**.self_attn.{k,v}_proj.weight", kv.clone())
        .shard("**.self_attn.{k,v}_proj.bias", kv)
        .optional()
        .shard("**.self_attn.o_proj.weight", ShardRule::dim(1).unit(head).units(heads))
        .shard("**.mlp.{gate,up}_proj.weight", ShardRule::dim(0).units(intermediate))
        .shard("**.mlp.{gate,up}_proj.bias", ShardRule::dim(0).units(intermediate))
        .optional()
        .shard("**.mlp.down_proj.weight", ShardRule::dim(1).units(intermediate))
        .replicate("**.{o,down}_proj.bias")
        .optional()
        // Qwen3 normalises each head alone, so the weight has the size of one head.
        .replicate("**.self_attn.{q,k}_norm.weight")
        .optional()
        .replicate("**.{input_layernorm,post_attention_layernorm,norm}.weight")
        .replicate("**.embed_tokens.weight")
        .optional()
        .skip("**.rotary_emb.inv_freq")
        .optional();
    Ok(rules)
}
