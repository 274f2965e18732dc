//! GPT-2, with or without the `transformer.` prefix. Its layers are `Conv1D`, stored `[inputs, outputs]`; c_attn is
//! `[q; k; v]` (sharding.md section 2).

use super::Family;
use super::config::{Config, Heads};
use crate::error::Result;
use crate::plan::quant::Orientation::InOut;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["gpt2"], architectures: &["GPT2"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["n_head", "num_attention_heads"])?;
    let hidden = config.count(&["n_embd", "hidden_size"])?;
    let size = config.head_size(hidden, heads)?;
    let intermediate = config.find(&["n_inner"])?.unwrap_or(hidden.saturating_mul(4));

    // GPT2Config ties by default.
    let embeddings = ["transformer.wte.weight", "wte.weight"];
    config
        .vocabulary(Rules::new(), "lm_head.weight", &embeddings, true)?
        .whole("**.wpe")
        .stage(Stage::First)
        // The causal mask, which is computed.
        .skip("**.attn.{bias,masked_bias}")
        .optional()
        .fused_heads("**.attn.c_attn", Heads { heads, key_value: heads, size })
        .orientation(InOut)
        .row("**.attn.c_proj", heads, size)
        .orientation(InOut)
        .column("**.mlp.c_fc", intermediate, 1)
        .orientation(InOut)
        .row("**.mlp.c_proj", intermediate, 1)
        .orientation(InOut)
        .norms("{ln_1,ln_2}")
        .norms("ln_f")
        .stage(Stage::Last)
        .layers("{transformer.,}h.*.**", &["n_layer", "num_hidden_layers"], config)
}
