//! BERT, with or without the `bert.` prefix: query, key, value and intermediate column-parallel, the two output layers
//! row-parallel.

use super::{Config, Family};
use crate::error::Result;
use crate::plan::rules::{Rules, ShardRule};

pub(super) const FAMILY: Family = Family { model_types: &["bert"], architectures: &["Bert"], rules };

fn rules(config: &Config<'_>) -> Result<Rules> {
    let heads = config.count(&["num_attention_heads"])?;
    let head = config.head_size(config.count(&["hidden_size"])?, heads)?;
    let intermediate = config.count(&["intermediate_size"])?;

    let by_head = |dim| ShardRule::dim(dim).unit(head).units(heads);
    // BertConfig ties by default, and with the weight of the masked-language head its bias.
    let embeddings = ["bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"];
    let rules = config.head(Rules::new(), "cls.predictions.decoder.weight", &embeddings, true)?;
    let rules = config.head(rules, "cls.predictions.decoder.bias", &["cls.predictions.bias"], true)?;
    Ok(rules
        .shard("**.attention.self.{query,key,value}.{weight,bias}", by_head(0))
        .shard("**.attention.output.dense.weight", by_head(1))
        .shard("**.intermediate.dense.{weight,bias}", ShardRule::dim(0).units(intermediate))
        .shard("**.output.dense.weight", ShardRule::dim(1).units(intermediate))
        .replicate("**.output.dense.bias")
        .replicate("**.LayerNorm.{weight,bias,gamma,beta}")
        .replicate("**.embeddings.**")
        .replicate("**.pooler.**")
        .optional()
        .replicate("{cls,classifier,qa_outputs}.**")
        .optional())
}
