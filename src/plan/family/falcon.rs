//! Falcon. How the fused query_key_value lies, and so how it is cut, the configuration says (sharding.md section 2): by
//! group (40B, 180B), all query heads and then one key and one value head (7B), or by head (falcon-rw).

use super::Family;
use super::config::{Config, Heads};
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["falcon"], architectures: &["Falcon"], rules };

const QUERY_KEY_VALUE: &str = "**.self_attention.query_key_value";

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads", "n_head"])?;
    let hidden = config.count(&["hidden_size"])?;
    let size = config.head_size(hidden, heads)?;
    let intermediate = config.find(&["ffn_hidden_size"])?.unwrap_or(hidden.saturating_mul(4));
    let is_grouped = config.flag("new_decoder_architecture", false)?;

    // FalconConfig ties by default; released models store a head all the same.
    let embeddings = ["transformer.word_embeddings.weight", "word_embeddings.weight"];
    let rules = config.vocabulary(Rules::new(), "lm_head.weight", &embeddings, true)?;
    let rules = if !is_grouped && config.flag("multi_query", true)? {
        // Its num_kv_heads is not looked at.
        rules.fused_heads(QUERY_KEY_VALUE, Heads { heads, key_value: 1, size })
    } else {
        let key_value = config.find(&["num_kv_heads", "n_head_kv"])?.filter(|_| is_grouped).unwrap_or(heads);
        rules.grouped_heads(QUERY_KEY_VALUE, Heads { heads, key_value, size }, config)?
    };
    rules
        .row("**.self_attention.dense", heads, size)
        .plain_mlp(intermediate)
        .norms("{ln_attn,ln_mlp,input_layernorm,post_attention_layernorm}")
        .norms("ln_f")
        .stage(Stage::Last)
        .layers("{transformer.,}h.*.**", &["num_hidden_layers", "n_layer"], config)
}
