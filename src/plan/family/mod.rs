//! What `config.json`'s architectures mean, as rules: one file per model family. Target `plain`: names and layouts of
//! the disk, sliced; embeddings, heads and the biases of row-parallel layers replicated.

mod bert;
mod bloom;
mod config;
mod deepseek;
mod falcon;
mod gemma;
mod gpt2;
mod gpt_neox;
mod gpt_oss;
mod internlm2;
mod llama;
mod llama4;
mod moe;
mod mpt;
mod parts;
mod phi3;
mod qwen3_next;
mod target;
#[cfg(test)]
mod tests;

use serde_json::Value;

use self::config::Config;
pub use self::target::Target;
use super::cut::Split;
use super::rules::Rules;
use super::stages::StageSplit;
use super::world::Mesh;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};

/// What rules for a model depend on besides the model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Whose names and layouts the destinations have.
    pub target: Target,
    /// The ranks: some targets place experts in another way with expert parallelism than without, or have none, and heads
    /// that lie in groups are cut in another way on more ranks than groups.
    pub mesh: Mesh,
    /// Which layers each pipeline stage has; `None` is what the target does.
    pub stages: Option<StageSplit>,
    /// Which experts each expert-parallel group has; `None` is what the target does.
    pub experts: Option<Split>,
    /// Repeats scales of FP8 blocks that a cut falls inside: see [`Quantization::refine`](super::Quantization::refine).
    pub refine_scales: bool,
}

impl Default for ModelOptions {
    fn default() -> ModelOptions {
        let (target, mesh) = (Target::Plain, Mesh::tp(1));
        ModelOptions { target, mesh, stages: None, experts: None, refine_scales: false }
    }
}

impl ModelOptions {
    fn stages(&self) -> StageSplit {
        self.stages.clone().unwrap_or_else(|| self.target.stages())
    }

    fn experts(&self) -> Split {
        self.experts.clone().unwrap_or_else(|| self.target.experts())
    }
}

/// A family: the `model_type`s that it covers, the class names its architectures begin with, and its rules.
struct Family {
    model_types: &'static [&'static str],
    architectures: &'static [&'static str],
    rules: fn(&Config<'_>) -> Result<Rules>,
}

const FAMILIES: &[Family] = &[
    llama::FAMILY,
    moe::MIXTRAL,
    moe::QWEN3_MOE,
    qwen3_next::FAMILY,
    gpt_oss::FAMILY,
    llama4::FAMILY,
    gemma::FAMILY,
    phi3::FAMILY,
    internlm2::FAMILY,
    deepseek::FAMILY,
    mpt::DBRX,
    mpt::MPT,
    falcon::FAMILY,
    bloom::FAMILY,
    gpt_neox::FAMILY,
    gpt2::FAMILY,
    bert::FAMILY,
];

impl Rules {
    /// The rules for the model that the checkpoint's `config.json` describes: tensor-parallel layers in the way of
    /// Megatron, with head counts checked against the shapes when a plan is made.
    ///
    /// Knows the kinds Llama (llama, mistral, qwen2, qwen3), Mixtral, Qwen3-MoE and Qwen3-Next, Llama 4, Gemma 2 and 3,
    /// Phi-3, InternLM2, DeepSeek-V2 and V3, gpt-oss, DBRX, MPT, Falcon, BLOOM, GPT-NeoX, GPT-2 and BERT. Where the
    /// configuration ties the output head to the embeddings, the head is an alias of them, and one that is stored all the
    /// same is skipped (but for [`Target::Hf`]).
    ///
    /// # Errors
    /// [`ErrorKind::Rules`]: rule `no-config` without a `config.json`, `unknown-architecture` for any other model,
    /// `config` if it does not open, is no JSON, or a number is missing or makes no sense.
    pub fn for_model(checkpoint: &Checkpoint) -> Result<Rules> {
        Rules::for_model_with(checkpoint, &ModelOptions::default())
    }

    /// [`Rules::for_model`] with options.
    ///
    /// # Errors
    /// As [`Rules::for_model`].
    pub fn for_model_with(checkpoint: &Checkpoint, options: &ModelOptions) -> Result<Rules> {
        options.mesh.check()?;
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
        Rules::for_config(&Config { json, root: json, checkpoint, options })
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
            Some(family) => {
                let rules = config.options.target.rules(family, config)?;
                Ok(rules.quantization(config.quantization()?))
            }
            None => Err(unknown(model_type.or(architecture))),
        }
    }
}

/// `LlamaForCausalLM`, `LlamaModel` and `LlamaLMHeadModel` are of `Llama`; `LlamaMoeForCausalLM` is not.
fn is_class_of(class: &str, prefix: &str) -> bool {
    let is_end =
        |rest: &str| rest.starts_with("For") || ["", "Model", "LMHeadModel", "DoubleHeadsModel"].contains(&rest);
    class.strip_prefix(prefix).is_some_and(is_end)
}

fn unknown(model: Option<&str>) -> Error {
    let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
    let example = r#"rule = [{ match = "**.q_proj.weight", shard = { dim = 0 } }, { match = "**", replicate = true }]"#;
    let way_out = "load it whole on every rank (--rules replicate), or give a rules file with lines like";
    broken("unknown-architecture", format!("no rules for this architecture; {way_out} {example}"))
        .with_expected(format!("one of {}", known.join(", ")), model.unwrap_or("no model_type"))
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
