//! mistral.rs 0.9: tensors of the files in even parts; embeddings, output head and quantised experts whole on every rank. It
//! has one axis of ranks.

use super::Kind;
use super::merge::{Names, Stacked};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::family::config::Config;
use crate::plan::family::parts::{Block, Experts};
use crate::plan::family::{Family, deepseek, llama};
use crate::plan::quant::Scalars;
use crate::plan::rules::Rules;
use crate::plan::world::{Ax, Mesh};

pub(super) fn rules(kind: Kind, config: &Config<'_>) -> Result<Rules> {
    let Mesh { dp: _, pp, cp, tp: _, ep, order: _ } = config.options.mesh;
    for (axis, size) in [("pp", pp), ("cp", cp), ("ep", ep)] {
        if size > 1 {
            return Err(Error::new(ErrorKind::Rules, format!("target mistralrs has no {axis}"))
                .with_rule("target")
                .with_expected(format!("{axis} 1"), size));
        }
    }
    let stacked = |rules: Rules, names: &Names, count: u64, intermediate: u64, mlp: &str| -> Result<Rules> {
        let experts = Experts::new(config, count, intermediate)?;
        // Those that are quantised are whole on every rank.
        if config.is_quantised() {
            let Names { experts, gate, up, down } = *names;
            return Ok(rules.whole(format!("**.{experts}.*.{{{gate},{up},{down}}}")));
        }
        let (gate_up, down) = (format!("{mlp}.experts.gate_up_proj"), format!("{mlp}.experts.down_proj"));
        let inner = Some(Block::new(intermediate, 1).cut(Ax::Tp));
        let (experts, gate_up, down) = (&experts, gate_up.as_str(), down.as_str());
        let (suffixes, scalars) = (&[(".weight", "")], Scalars::default());
        Ok(rules.stacked(names, &Stacked { experts, inner, gate_up, down, suffixes, scalars }))
    };
    let plain = |family: &Family| (family.rules)(config);
    match kind {
        Kind::Llama => plain(&llama::FAMILY),
        Kind::Mixtral => {
            let (count, size) = (config.count(&["num_local_experts"])?, config.count(&["intermediate_size"])?);
            Ok(stacked(llama::decoder(Rules::new(), config)?, &Names::MIXTRAL, count, size, "block_sparse_moe")?
                .whole("**.block_sparse_moe.gate"))
        }
        Kind::Qwen3Moe => {
            let (count, size) = (config.count(&["num_experts"])?, config.count(&["moe_intermediate_size"])?);
            Ok(stacked(llama::decoder(Rules::new(), config)?, &Names::PROJECTIONS, count, size, "mlp")?
                .whole("**.mlp.gate")
                .optional_gated_mlp("**.mlp", config.count(&["intermediate_size"])?))
        }
        Kind::DeepSeek => {
            let (count, size) = (config.count(&["n_routed_experts"])?, config.count(&["moe_intermediate_size"])?);
            let rules = deepseek::without_predicting_layers(Rules::new(), config)?;
            deepseek::decoder(stacked(rules, &Names::PROJECTIONS, count, size, "mlp")?, config)
        }
        Kind::GptOss => {
            let heads = config.heads()?;
            config
                .vocabulary(Rules::new(), "lm_head.weight", &["model.embed_tokens.weight"], false)?
                .attention(heads)
                .replicate("**.self_attn.sinks")
                .whole("**.mlp.router")
                .whole("**.mlp.experts.{gate_up,down}_proj")
                .common(config)
        }
    }
}
