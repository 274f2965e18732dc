//! BERT, with or without the `bert.` prefix: query, key, value and intermediate column-parallel, the two output layers
//! row-parallel.

use super::Family;
use super::config::Config;
use crate::error::Result;
use crate::plan::rules::{Rules, Stage};

pub(super) const FAMILY: Family = Family { model_types: &["bert"], architectures: &["Bert"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads"])?;
    let size = config.head_size(config.count(&["hidden_size"])?, heads)?;
    let intermediate = config.count(&["intermediate_size"])?;

    // BertConfig ties by default, and with the weight of the masked-language head its bias.
    let embeddings = ["bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"];
    let (rules, tied) = config.tie(Rules::new(), "cls.predictions.decoder.weight", &embeddings, true)?;
    let (rules, _) = config.tie(rules, "cls.predictions.decoder.bias", &["cls.predictions.bias"], true)?;
    rules
        .column("**.attention.self.{query,key,value}", heads, size)
        .row("**.attention.output.dense", heads, size)
        .column("**.intermediate.dense", intermediate, 1)
        .row("**.output.dense", intermediate, 1)
        .replicate("**.layer.*.**.LayerNorm.{weight,bias,gamma,beta}")
        .optional()
        .replicate("**.embeddings.**")
        .stage(if tied { Stage::Ends } else { Stage::First })
        .replicate("**.pooler.**")
        .optional()
        .stage(Stage::Last)
        .replicate("cls.**")
        .optional()
        .stage(Stage::Last)
        .layers("{bert.,}encoder.layer.*.**", &["num_hidden_layers"], config)
}
