//! Llama 4: experts stacked as `[experts, inputs, outputs]`, a shared expert, layers without experts, and a vision tower
//! that is whole. Names are those of the multimodal model, or without its `language_model.` those of the text model
//! alone. Norms of queries and keys have no weights.

use super::Family;
use super::config::Config;
use super::parts::{ADAPTED, Experts};
use crate::error::Result;
use crate::plan::quant::Orientation;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["llama4", "llama4_text"], architectures: &["Llama4"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let config = &config.within("text_config");
    let intermediate = config.count(&["intermediate_size"])?;
    let experts = Experts::new(config, config.count(&["num_local_experts"])?, intermediate)?;

    let text = ["model.embed_tokens.weight", "lm_head.weight"];
    let multimodal = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"];
    let is_text = config.checkpoint.position(text[0]).is_some();
    let [embeddings, head] = if is_text { text } else { multimodal };
    // Images become embeddings, which the first stage has.
    let rules = Rules::new()
        .replicate(format!("{ADAPTED}{{vision_model,multi_modal_projector}}.**"))
        .optional()
        .stage(Stage::First);
    config
        .vocabulary(rules, head, &[embeddings], false)?
        .attention(config.heads()?)
        .stacked_experts("**.feed_forward.experts", &experts, Orientation::InOut)
        // Quantised models have modules for each expert.
        .optional_each_expert(
            "**.feed_forward.experts.*.{gate,up}_proj",
            "**.feed_forward.experts.*.down_proj",
            &experts,
        )
        .whole("**.feed_forward.router")
        .optional_gated_mlp("**.feed_forward.shared_expert", intermediate)
        .optional_gated_mlp("**.feed_forward", config.find(&["intermediate_size_mlp"])?.unwrap_or(intermediate))
        .norms("{input_layernorm,post_attention_layernorm}")
        .norms("norm")
        .stage(Stage::Last)
        .layers("{language_model.,}model.layers.*.**", &["num_hidden_layers"], config)
}
