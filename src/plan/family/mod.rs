//! What `config.json`'s architectures mean, as rules: one file per model family. Target `plain`: names and layouts of
//! the disk, sliced; embeddings, heads and the biases of row-parallel layers replicated.

mod bert;
mod bloom;
mod llama;
#[cfg(test)]
mod tests;

use serde_json::Value;

use super::rules::Rules;
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::{Error, ErrorKind, Result};

/// A family: the `model_type`s that it covers, the class names its architectures begin with, and its rules.
struct Family {
    model_types: &'static [&'static str],
    architectures: &'static [&'static str],
    rules: fn(&Config<'_>) -> Result<Rules>,
}

const FAMILIES: &[Family] = &[llama::FAMILY, bert::FAMILY, bloom::FAMILY];

impl Rules {
    /// The rules for the model that the checkpoint's `config.json` describes: tensor-parallel layers in the way of
    /// Megatron, with head counts checked against the shapes when a plan is made.
    ///
    /// Knows the kinds Llama (llama, mistral, qwen2, qwen3), BERT and BLOOM. Where the configuration ties the output
    /// head to the embeddings, the head is an alias of them, and one that is stored all the same is skipped.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`]: rule `no-config` without a `config.json`, `unknown-architecture` for any other model,
    /// `config` if it does not open, is no JSON, or a number is missing or makes no sense.
    pub fn for_model(checkpoint: &Checkpoint) -> Result<Rules> {
        if let Some(error) = checkpoint.config_error() {
            let at = error.file().unwrap_or(checkpoint.path());
            let broken = broken("config", format!("config.json cannot be used: {}", error.message())).with_file(at);
            return Err(match (error.expected(), error.found()) {
                (Some(expected), Some(found)) => broken.with_expected(expected, found),
                _ => broken,
            });
        }
        let Some(json) = checkpoint.config() else {
            return Err(
                broken("no-config", "no config.json beside the model; give rules instead").with_file(checkpoint.path())
            );
        };
        Rules::for_config(&Config { json, checkpoint })
            .map_err(|error| checkpoint.config_path().into_iter().fold(error, Error::with_file))
    }

    fn for_config(config: &Config<'_>) -> Result<Rules> {
        let json = config.json;
        let model_type = json.get("model_type").and_then(Value::as_str);
        let architecture = json.pointer("/architectures/0").and_then(Value::as_str);
        let family = FAMILIES.iter().find(|family| match (model_type, architecture) {
            (Some(model_type), _) => family.model_types.contains(&model_type),
            (None, Some(class)) => family.architectures.iter().any(|prefix| is_class_of(class, prefix)),
            (None, None) => false,
        });
        match family {
            Some(family) => (family.rules)(config),
            None => Err(unknown(model_type.or(architecture))),
        }
    }
}

/// `LlamaForCausalLM` and `LlamaModel` are of `Llama`; `LlamaMoeForCausalLM` is not.
fn is_class_of(class: &str, prefix: &str) -> bool {
    class.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("For") || rest == "Model")
}

fn unknown(model: Option<&str>) -> Error {
    let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
    let example = r#"rule = [{ match = "**.q_proj.weight", shard = { dim = 0 } }, { match = "**", replicate = true }]"#;
    let way_out = "load it whole on every rank (--rules replicate), or give a rules file with lines like";
    broken("unknown-architecture", format!("no rules for this architecture; {way_out} {example}"))
        .with_expected(format!("one of {}", known.join(", ")), model.unwrap_or("no model_type"))
}

/// The model's `config.json` and headers.
struct Config<'a> {
    json: &'a Value,
    checkpoint: &'a Checkpoint,
}

impl Config<'_> {
    /// The first of these keys that is there, as a number of at least 1.
    fn find(&self, keys: &[&str]) -> Result<Option<u64>> {
        let Some((key, value)) =
            keys.iter().filter_map(|key| Some((key, self.json.get(key)?))).find(|(_, value)| !value.is_null())
        else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(number @ 1..) => Ok(Some(number)),
            _ => Err(broken("config", format!("config.json: {key} makes no sense"))
                .with_expected("a number of at least 1", value)),
        }
    }

    /// The first of these keys that is there; one must be.
    fn count(&self, keys: &[&str]) -> Result<u64> {
        self.find(keys)?.ok_or_else(|| broken("config", format!("config.json has no {}", keys.join(" or "))))
    }

    /// `hidden` divided over `heads`.
    fn head_size(&self, hidden: u64, heads: u64) -> Result<u64> {
        if hidden.is_multiple_of(heads) {
            return Ok(hidden / heads);
        }
        Err(broken("config", "config.json: heads do not divide the hidden size")
            .with_expected(format!("a multiple of {heads}"), hidden))
    }

    /// Adds what becomes of an output head's tensor: where weights are tied (`default` without a word in the config) it
    /// is an alias of the first of `embeddings` that is there, and a stored one is skipped; else it is replicated.
    fn head(&self, rules: Rules, head: &str, embeddings: &[&str], default: bool) -> Result<Rules> {
        let tied = match self.json.get("tie_word_embeddings") {
            None | Some(Value::Null) => default,
            Some(value) => value.as_bool().ok_or_else(|| {
                broken("config", "config.json: tie_word_embeddings makes no sense")
                    .with_expected("true or false", value)
            })?,
        };
        let stored = self.checkpoint.tensor(head);
        let embedding = embeddings.iter().find_map(|name| self.checkpoint.tensor(name));
        let Some(embedding) = embedding.filter(|_| tied && (stored.is_some() || self.has_head(head))) else {
            return Ok(rules.replicate(head).optional());
        };
        let rules = match stored {
            Some(stored) if (stored.dtype, &stored.shape) != (embedding.dtype, &embedding.shape) => {
                let shape = |tensor: &TensorMeta| format!("{} {}", tensor.dtype, tensor.shape);
                return Err(broken("config", format!("config.json ties this tensor to `{}`", embedding.name))
                    .with_expected(shape(embedding), shape(stored))
                    .with_tensor(head));
            }
            Some(_) => rules.skip(head),
            None => rules,
        };
        Ok(rules.alias(head, embedding.name.as_str()))
    }

    /// Whether the model has an output head that its files need not store: BERT's is known by its bias, others' by
    /// the class, where the config names one (`LlamaModel` and `LlamaForSequenceClassification` have none).
    fn has_head(&self, head: &str) -> bool {
        if head.starts_with("cls.predictions.") {
            return self.checkpoint.position("cls.predictions.bias").is_some();
        }
        let class = self.json.pointer("/architectures/0").and_then(Value::as_str);
        class.is_none_or(|class| class.ends_with("ForCausalLM"))
    }
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
