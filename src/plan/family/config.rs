//! The numbers of a model's `config.json`, and what it says of tied and of quantised weights.

use serde_json::Value;

use super::parts::ADAPTED;
use super::{ModelOptions, broken};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::Result;
use crate::plan::quant::{Packed, Quantization};
use crate::plan::rules::{Rules, Stage};

/// The model's `config.json` and headers.
#[derive(Clone, Copy)]
pub(super) struct Config<'a> {
    /// Where numbers are looked up: the whole, or the part that is about the language model.
    pub(super) json: &'a Value,
    /// The whole.
    pub(super) root: &'a Value,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) options: &'a ModelOptions,
}

impl<'a> Config<'a> {
    /// The same about the part with this key, if there is one.
    pub(super) fn within(self, key: &str) -> Config<'a> {
        Config { json: self.json.get(key).filter(|part| part.is_object()).unwrap_or(self.json), ..self }
    }

    /// The first of these keys that is there, as a number of at least 1.
    pub(super) fn find(&self, keys: &[&str]) -> Result<Option<u64>> {
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
    pub(super) fn count(&self, keys: &[&str]) -> Result<u64> {
        self.find(keys)?.ok_or_else(|| broken("config", format!("config.json has no {}", keys.join(" or "))))
    }

    /// Whether this is so; `default` where the config does not say.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| {
                broken("config", format!("config.json: {key} makes no sense")).with_expected("true or false", value)
            }),
        }
    }

    /// `hidden` divided over `heads`.
    pub(super) fn head_size(&self, hidden: u64, heads: u64) -> Result<u64> {
        if hidden.is_multiple_of(heads) {
            return Ok(hidden / heads);
        }
        Err(broken("config", "config.json: heads do not divide the hidden size")
            .with_expected(format!("a multiple of {heads}"), hidden))
    }

    /// `num_attention_heads`, `num_key_value_heads` and `head_dim`, where they have these names.
    pub(super) fn heads(&self) -> Result<Heads> {
        let heads = self.count(&["num_attention_heads"])?;
        let size = match self.find(&["head_dim"])? {
            Some(size) => size,
            None => self.head_size(self.count(&["hidden_size"])?, heads)?,
        };
        Ok(Heads { heads, key_value: self.find(&["num_key_value_heads"])?.unwrap_or(heads), size })
    }

    /// Adds the embeddings, the first of `embeddings` that is there, and what becomes of the output head: where weights
    /// are tied (`default` without a word in the config) it is an alias of them, and a stored one is skipped; else it is
    /// whole on every rank of the last stage.
    pub(super) fn vocabulary(&self, rules: Rules, head: &str, embeddings: &[&str], default: bool) -> Result<Rules> {
        let module = |name: &str| name.strip_suffix(".weight").unwrap_or(name).to_owned();
        let (rules, tied) = self.tie(rules, head, embeddings, default)?;
        let stage = if tied { Stage::Ends } else { Stage::First };
        let rules = embeddings
            .iter()
            .fold(rules, |rules, name| rules.whole(format!("**.{}", module(name))).optional().stage(stage.clone()));
        Ok(rules.whole(format!("{ADAPTED}{}", module(head))).optional().stage(Stage::Last))
    }

    /// Makes `head` an alias of the first of `originals` that is there, if the config ties weights; and whether it did.
    pub(super) fn tie(&self, rules: Rules, head: &str, originals: &[&str], default: bool) -> Result<(Rules, bool)> {
        let tied = match self.root.get("tie_word_embeddings") {
            Some(_) => Config { json: self.root, ..*self }.flag("tie_word_embeddings", default)?,
            None => self.flag("tie_word_embeddings", default)?,
        };
        let stored = self.checkpoint.tensor(head);
        let original = originals.iter().find_map(|name| self.checkpoint.tensor(name));
        let Some(original) = original.filter(|_| tied && (stored.is_some() || self.has_head(head))) else {
            return Ok((rules, false));
        };
        let rules = match stored {
            Some(stored) if (stored.dtype, &stored.shape) != (original.dtype, &original.shape) => {
                let shape = |tensor: &TensorMeta| format!("{} {}", tensor.dtype, tensor.shape);
                return Err(broken("config", format!("config.json ties this tensor to `{}`", original.name))
                    .with_expected(shape(original), shape(stored))
                    .with_tensor(head));
            }
            Some(_) => rules.skip(head),
            None => rules,
        };
        Ok((rules.alias_on(Stage::Last, head, original.name.as_str()), true))
    }

    /// Whether the model has an output head that its files need not store: BERT's is known by its bias, others' by
    /// the class, where the config names one (`LlamaModel` and `LlamaForSequenceClassification` have none).
    fn has_head(&self, head: &str) -> bool {
        if head.starts_with("cls.predictions.") {
            return self.checkpoint.position("cls.predictions.bias").is_some();
        }
        let class = self.root.pointer("/architectures/0").and_then(Value::as_str);
        let with_head = ["ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "DoubleHeadsModel"];
        class.is_none_or(|class| with_head.iter().any(|suffix| class.ends_with(suffix)))
    }

    /// Whether modules are quantised.
    pub(super) fn is_quantised(&self) -> bool {
        self.quantization_config().is_some()
    }

    /// Whether compressed-tensors says that all that it quantised takes inputs of floats: FP8 or FP4.
    pub(super) fn has_float_inputs(&self) -> bool {
        let groups = self.quantization_config().and_then(|json| json.get("config_groups")).and_then(Value::as_object);
        let is_float =
            |group: &Value| group.pointer("/input_activations/type").and_then(Value::as_str) == Some("float");
        groups.is_some_and(|groups| !groups.is_empty() && groups.values().all(is_float))
    }

    fn quantization_config(&self) -> Option<&'a Value> {
        let of = |config: &'a Value| config.get("quantization_config").or_else(|| config.get("compression_config"));
        of(self.root).or_else(|| of(self.json)).filter(|value| !value.is_null())
    }

    /// How quantised modules are stored.
    pub(super) fn quantization(&self) -> Result<Quantization> {
        let known = Quantization { refine: self.options.refine_scales, ..Quantization::default() };
        let Some(json) = self.quantization_config() else { return Ok(known) };
        let config = Config { json, ..*self };
        let method = json.get("quant_method").and_then(Value::as_str).unwrap_or("bitsandbytes");
        match method {
            "gptq" | "awq" => {
                let packed = Some(if method == "gptq" { Packed::Gptq } else { Packed::Awq });
                if let Some(version) =
                    json.get("version").and_then(Value::as_str).filter(|it| !it.eq_ignore_ascii_case("gemm"))
                    && method == "awq"
                {
                    return Err(
                        broken("quantization", "no layout for this version of AWQ").with_expected("gemm", version)
                    );
                }
                let bits = config.find(&["bits", "w_bit"])?.unwrap_or(4);
                let group = config.group(&["group_size", "q_group_size"])?;
                let act_order = group.is_some() && config.flag("desc_act", false)?;
                Ok(Quantization { packed, bits, group, act_order, ..known })
            }
            "compressed-tensors" => {
                let groups = json.get("config_groups").and_then(Value::as_object);
                let Some(weights) = groups.and_then(|groups| groups.values().next()).and_then(|it| it.get("weights"))
                else {
                    return Ok(known);
                };
                let weights = Config { json: weights, ..*self };
                let act_order =
                    matches!(weights.json.get("actorder").and_then(Value::as_str), Some("group" | "dynamic"));
                let block = weights.block("block_structure")?.unwrap_or(known.block);
                let bits = weights.find(&["num_bits"])?.unwrap_or(4);
                Ok(Quantization { bits, group: weights.group(&["group_size"])?, act_order, block, ..known })
            }
            "fp8" => Ok(Quantization { block: config.block("weight_block_size")?.unwrap_or(known.block), ..known }),
            "modelopt" | "bitsandbytes" | "mxfp4" | "fbgemm_fp8" => Ok(known),
            other => Err(broken("quantization", "no layout for this method of quantization").with_expected(
                "one of gptq, awq, compressed-tensors, fp8, modelopt, bitsandbytes, mxfp4, fbgemm_fp8",
                other,
            )),
        }
    }

    /// A size of groups; -1 stands for one group of all.
    fn group(&self, keys: &[&str]) -> Result<Option<u64>> {
        let all = keys.iter().any(|key| self.json.get(key).and_then(Value::as_i64) == Some(-1));
        if all { Ok(None) } else { self.find(keys) }
    }

    fn block(&self, key: &str) -> Result<Option<[u64; 2]>> {
        let Some(value) = self.json.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        let sides = value.as_array().map(|sides| sides.iter().filter_map(Value::as_u64).collect::<Vec<_>>());
        match sides.as_deref() {
            Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok(Some([rows, columns])),
            _ => {
                Err(broken("config", format!("config.json: {key} makes no sense")).with_expected("two numbers", value))
            }
        }
    }
}

/// Heads of attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    /// Query heads.
    pub(super) heads: u64,
    /// Key and value heads: fewer in grouped-query attention.
    pub(super) key_value: u64,
    /// The size of a head.
    pub(super) size: u64,
}

impl Heads {
    /// Query heads that share a key and a value head.
    pub(super) fn group(self) -> Result<u64> {
        let Heads { heads, key_value, .. } = self;
        if heads.is_multiple_of(key_value) {
            return Ok(heads / key_value);
        }
        Err(broken("config", "config.json: key and value heads do not divide the query heads")
            .with_expected(format!("a multiple of {key_value}"), heads))
    }
}
