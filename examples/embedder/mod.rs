//! A model of candle's that makes vectors of sentences, from a builder that has its weights.

use std::error::Error;
use std::path::Path;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

/// What belongs to a model beside its weights. Read before them: what is wrong with it is known before gigabytes move.
pub(crate) struct Parts {
    config: Config,
    tokenizer: Tokenizer,
}

impl Parts {
    /// Those of a folder with `config.json` and `tokenizer.json`.
    pub(crate) fn read(folder: &Path) -> Result<Parts, Box<dyn Error + Send + Sync>> {
        let config: Config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
        let mut tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
        let max_length = config.max_position_embeddings;
        tokenizer.with_padding(Some(PaddingParams::default()));
        tokenizer.with_truncation(Some(TruncationParams { max_length, ..TruncationParams::default() }))?;
        Ok(Parts { config, tokenizer })
    }
}

pub(crate) struct Embedder {
    model: BertModel,
    tokenizer: Tokenizer,
}

impl Embedder {
    /// The model of these parts and weights.
    pub(crate) fn new(parts: Parts, weights: VarBuilder<'_>) -> candle_core::Result<Embedder> {
        let Parts { config, tokenizer } = parts;
        Ok(Embedder { model: BertModel::load(weights, &config)?, tokenizer })
    }

    /// A vector of length 1 for each sentence: the mean over its tokens. One without tokens has zeros.
    pub(crate) fn embed(&self, sentences: &[String]) -> Result<Vec<Vec<f32>>, Box<dyn Error + Send + Sync>> {
        if sentences.is_empty() {
            return Ok(Vec::new()); // there is no tensor of no rows
        }
        let encoded = self.tokenizer.encode_batch(sentences.to_vec(), true)?;
        let stacked = |of: fn(&tokenizers::Encoding) -> &[u32]| -> candle_core::Result<Tensor> {
            let rows = encoded.iter().map(|one| Tensor::new(of(one), &self.model.device));
            Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let tokens = stacked(tokenizers::Encoding::get_ids)?;
        let mask = stacked(tokenizers::Encoding::get_attention_mask)?;
        let hidden = self.model.forward(&tokens, &tokens.zeros_like()?, Some(&mask))?;
        let mask = mask.to_dtype(hidden.dtype())?.unsqueeze(2)?;
        let mean = hidden.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?.maximum(1.)?)?;
        let unit = mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?)?;
        Ok(unit.to_vec2()?)
    }
}
