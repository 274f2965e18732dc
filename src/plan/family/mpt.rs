//! MPT and DBRX, which took over its attention: `Wqkv` is `[q; k; v]`, norms have no bias.

use super::Family;
use super::config::{Config, Heads};
use super::parts::{Experts, all_of};
use crate::error::Result;
use crate::plan::expr::Expr;
use crate::plan::rules::{Rules, Stage};

pub(super) const MPT: Family = Family { model_types: &["mpt"], architectures: &["MPT", "Mpt"], rules: mpt };

pub(super) const DBRX: Family = Family { model_types: &["dbrx"], architectures: &["Dbrx"], rules: dbrx };

fn mpt(config: &Config<'_>) -> Result<Rules> {
    let ratio = config.find(&["expansion_ratio"])?.unwrap_or(4);
    let intermediate = config.count(&["d_model"])?.saturating_mul(ratio);
    // MptConfig ties by default.
    decoder(config, true)?.column("**.ffn.up_proj", intermediate, 1).row("**.ffn.down_proj", intermediate, 1).layers(
        "{transformer.,}blocks.*.**",
        &["n_layers"],
        config,
    )
}

/// The matrices of all experts lie one after the other in `w1` (gate), `v1` (up) and `w2` (down, which is stored as the
/// others are, `[intermediate, hidden]`): of each expert a rank has some rows.
fn dbrx(config: &Config<'_>) -> Result<Rules> {
    let ffn = config.within("ffn_config");
    let intermediate = ffn.count(&["ffn_hidden_size"])?;
    let experts = Experts::new(config, ffn.count(&["moe_num_experts"])?, intermediate)?;
    let all = all_of(Expr::Source, 0, experts.count.saturating_mul(intermediate));
    let expert = |at: u64| {
        let rows = Expr::Slice {
            x: Box::new(all.clone()),
            dim: 0,
            start: at.saturating_mul(intermediate),
            len: intermediate,
            step: 1,
        };
        Expr::Shard { x: Box::new(rows), dim: 0, cut: experts.inner() }
    };
    let selected = Expr::Select { by: experts.cut(), of: (0..experts.count).map(expert).collect() };
    // DbrxConfig does not tie by default.
    decoder(config, false)?
        .module("**.ffn.experts.mlp.{w1,v1,w2}", Expr::Concat { dim: 0, parts: vec![selected] })
        .whole("**.ffn.router.layer")
        .layers("{transformer.,}blocks.*.**", &["n_layers"], config)
}

/// All of a decoder of this kind but what its layers have behind the attention.
fn decoder(config: &Config<'_>, tied: bool) -> Result<Rules> {
    let heads = config.count(&["n_heads"])?;
    let size = config.head_size(config.count(&["d_model"])?, heads)?;
    let key_value = config.within("attn_config").find(&["kv_n_heads"])?.unwrap_or(heads);

    let embeddings = ["transformer.wte.weight", "wte.weight"];
    Ok(config
        .vocabulary(Rules::new(), "lm_head.weight", &embeddings, tied)?
        .fused_heads("**.attn.Wqkv", Heads { heads, key_value, size })
        .row("**.attn.out_proj", heads, size)
        .norms("{norm_1,norm_2}")
        .norms("norm_f")
        .stage(Stage::Last))
}
