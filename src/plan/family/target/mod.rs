//! Targets: whose names and layouts the destinations have. `plain` is every family's own rules; the others are here, for
//! the models that they are known for (sharding.md sections 1 to 6).

mod hf;
mod merge;
mod mistralrs;
mod vllm;

use std::fmt;

use super::config::Config;
use super::{Family, broken};
use crate::error::Result;
use crate::plan::cut::Split;
use crate::plan::rules::{Rules, Stage};
use crate::plan::stages::StageSplit;

/// Whose names and layouts the destinations of a model have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Target {
    /// Those of the files, sliced. Embeddings, output heads and biases of row-parallel layers are whole on every rank.
    #[default]
    Plain,
    /// vLLM 0.33: merged projections, stacked experts, a padded vocabulary.
    Vllm,
    /// Hugging Face transformers 5.23: the parts of `torch.chunk`, which may differ in size.
    Hf,
    /// mistral.rs 0.9: names of the files, even parts.
    MistralRs,
}

impl Target {
    /// How layers are divided over pipeline stages where nobody says.
    pub(super) fn stages(self) -> StageSplit {
        match self {
            Target::Plain | Target::MistralRs => StageSplit::Even,
            Target::Vllm => StageSplit::Vllm,
            Target::Hf => StageSplit::Hf,
        }
    }

    /// How experts are divided over expert-parallel groups where nobody says.
    pub(super) fn experts(self) -> Split {
        match self {
            Target::Plain | Target::Hf | Target::MistralRs => Split::Even,
            Target::Vllm => Split::Balanced,
        }
    }

    /// The rules for a model of `family`.
    pub(super) fn rules(self, family: &Family, config: &Config<'_>) -> Result<Rules> {
        let kind = Kind::of(family);
        let rules = match (self, kind) {
            (Target::Plain, _) => (family.rules)(config)?,
            (Target::Vllm, Some(kind)) => vllm::rules(kind, config)?,
            (Target::Hf, Some(kind)) => hf::rules(kind, config)?,
            (Target::MistralRs, Some(kind)) => mistralrs::rules(kind, config)?,
            (_, None) => {
                let known: Vec<&str> = Kind::ALL.iter().flat_map(|kind| kind.family().model_types).copied().collect();
                return Err(broken("target", format!("target {self} is not known for this model")).with_expected(
                    format!("target plain, or vllm, hf or mistralrs for one of {}", known.join(", ")),
                    family.model_types[0],
                ));
            }
        };
        // Behind all others: a family's own rules know better.
        Ok(rules.beside_the_model(kind.filter(|_| self == Target::Vllm).map(vllm::attention_core)))
    }
}

impl Rules {
    /// What all decoders have: norms, pipeline stages.
    fn common(self, config: &Config<'_>) -> Result<Rules> {
        self.norms("{input_layernorm,post_attention_layernorm}").norms("norm").stage(Stage::Last).layers(
            "{model.,}layers.*.**",
            &["num_hidden_layers"],
            config,
        )
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Plain => "plain",
            Target::Vllm => "vllm",
            Target::Hf => "hf",
            Target::MistralRs => "mistralrs",
        })
    }
}

/// The families that targets other than `plain` are known for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Llama,
    Mixtral,
    Qwen3Moe,
    DeepSeek,
    GptOss,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Llama, Kind::Mixtral, Kind::Qwen3Moe, Kind::DeepSeek, Kind::GptOss];

    fn family(self) -> &'static Family {
        match self {
            Kind::Llama => &super::llama::FAMILY,
            Kind::Mixtral => &super::moe::MIXTRAL,
            Kind::Qwen3Moe => &super::moe::QWEN3_MOE,
            Kind::DeepSeek => &super::deepseek::FAMILY,
            Kind::GptOss => &super::gpt_oss::FAMILY,
        }
    }

    fn of(family: &Family) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.family().model_types == family.model_types)
    }
}
