//! The parts that families are made of, as rules of target `plain`: disk names and layouts, sliced. Patterns name modules.

use super::config::{Config, Heads};
use crate::error::Result;
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Expr;
use crate::plan::rules::{Rules, ShardRule};
use crate::plan::world::{Ax, Coord};

/// Indices of a dimension that are cut alike, before or after others that are cut on their own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    /// Units: heads, or 1.
    pub(super) units: u64,
    /// Indices of a unit.
    pub(super) unit: u64,
    /// With more ranks than units neighbours share one.
    pub(super) shared: bool,
}

impl Block {
    pub(super) fn new(units: u64, unit: u64) -> Block {
        Block { units, unit, shared: false }
    }

    /// Key or value heads.
    pub(super) fn shared(units: u64, unit: u64) -> Block {
        Block { shared: true, ..Block::new(units, unit) }
    }

    fn len(self) -> u64 {
        self.units.saturating_mul(self.unit)
    }

    /// How it is cut over the ranks of `by`.
    pub(super) fn cut(self, by: Ax) -> Cut {
        Cut {
            by: Coord::Axis(by),
            unit: self.unit,
            units: Some(self.units),
            replicate_units: self.shared,
            ..Cut::default()
        }
    }
}

/// The experts of a layer.
#[derive(Debug, Clone)]
pub(super) struct Experts {
    pub(super) count: u64,
    /// The intermediate size of one.
    pub(super) intermediate: u64,
    /// Which ones each expert-parallel group has.
    pub(super) split: Split,
}

impl Experts {
    pub(super) fn new(config: &Config<'_>, count: u64, intermediate: u64) -> Experts {
        Experts { count, intermediate, split: config.options.experts() }
    }

    /// Which experts a rank has.
    pub(super) fn cut(&self) -> Cut {
        let units = match self.split {
            // A table may name an expert several times.
            Split::Table(_) => None,
            _ => Some(self.count),
        };
        Cut { by: Coord::Axis(Ax::Ep), how: self.split.clone(), units, ..Cut::default() }
    }

    /// How the ranks that share experts divide the intermediate dimension of each.
    pub(super) fn inner(&self) -> Cut {
        Block::new(self.intermediate, 1).cut(Ax::Etp)
    }
}

impl Rules {
    /// Whole on every rank.
    pub(in crate::plan) fn whole(self, pattern: impl AsRef<str>) -> Rules {
        self.module(pattern, Expr::Source)
    }

    /// Column-parallel: outputs divided, `units` of them of `unit` each.
    pub(super) fn column(self, pattern: &str, units: u64, unit: u64) -> Rules {
        self.module(pattern, ShardRule::dim(0).unit(unit).units(units).expr())
    }

    /// Row-parallel: inputs divided.
    pub(super) fn row(self, pattern: &str, units: u64, unit: u64) -> Rules {
        self.module(pattern, ShardRule::dim(1).unit(unit).units(units).expr())
    }

    /// Keys and values: column-parallel, with heads shared by neighbours where there are more ranks.
    pub(super) fn key_value(self, pattern: &str, heads: u64, size: u64) -> Rules {
        self.module(pattern, ShardRule::dim(0).unit(size).units(heads).replicate_units().expr())
    }

    /// Several blocks of outputs, each divided on its own.
    pub(super) fn blocks(self, pattern: &str, blocks: &[Block]) -> Rules {
        self.module(pattern, blocks_of(Expr::Source, 0, blocks, Ax::Tp))
    }

    /// Fused query, key and value heads, `[q; k; v]`.
    pub(super) fn fused_heads(self, pattern: &str, Heads { heads, key_value, size }: Heads) -> Rules {
        let shared = Block::shared(key_value, size);
        self.blocks(pattern, &[Block::new(heads, size), shared, shared])
    }

    /// Fused query, key and value heads that are interleaved: each key head follows the query heads that share it, its
    /// value head follows it. Cut between such groups, so more ranks than key heads are an error.
    pub(super) fn grouped_heads(self, pattern: &str, heads: Heads) -> Result<Rules> {
        Ok(self.column(pattern, heads.key_value, (heads.group()? + 2).saturating_mul(heads.size)))
    }

    /// Separate `q_proj`, `k_proj`, `v_proj` and `o_proj` below `self_attn`.
    pub(super) fn attention(self, Heads { heads, key_value, size }: Heads) -> Rules {
        self.column("**.self_attn.q_proj", heads, size).key_value("**.self_attn.{k,v}_proj", key_value, size).row(
            "**.self_attn.o_proj",
            heads,
            size,
        )
    }

    /// `gate_proj`, `up_proj` and `down_proj` below the module `mlp`.
    pub(super) fn gated_mlp(self, mlp: &str, intermediate: u64) -> Rules {
        self.column(&format!("{mlp}.{{gate,up}}_proj"), intermediate, 1).row(
            &format!("{mlp}.down_proj"),
            intermediate,
            1,
        )
    }

    /// The same where some layers, or all, may have none.
    pub(super) fn optional_gated_mlp(self, mlp: &str, intermediate: u64) -> Rules {
        self.column(&format!("{mlp}.{{gate,up}}_proj"), intermediate, 1)
            .optional()
            .row(&format!("{mlp}.down_proj"), intermediate, 1)
            .optional()
    }

    /// `dense_h_to_4h` and `dense_4h_to_h` below `mlp`.
    pub(super) fn plain_mlp(self, intermediate: u64) -> Rules {
        self.column("**.mlp.dense_h_to_4h", intermediate, 1).row("**.mlp.dense_4h_to_h", intermediate, 1)
    }

    /// Experts of which each is modules of its own. In the patterns the second wildcard is the expert's number.
    pub(super) fn each_expert(self, columns: &str, rows: &str, experts: &Experts) -> Rules {
        let sharded = |dim| Expr::shard(dim, experts.inner());
        self.module(columns, sharded(0)).among(2, experts.count, experts.cut()).module(rows, sharded(1)).among(
            2,
            experts.count,
            experts.cut(),
        )
    }

    /// The same where there may be none.
    pub(super) fn optional_each_expert(self, columns: &str, rows: &str, experts: &Experts) -> Rules {
        let each = |rules: Rules, pattern: &str, dim| {
            let rules = rules.module(pattern, Expr::shard(dim, experts.inner()));
            rules.among(2, experts.count, experts.cut()).optional()
        };
        each(each(self, columns, 0), rows, 1)
    }

    /// Norms and other tensors that no rank has a part of only.
    pub(super) fn norms(self, names: &str) -> Rules {
        self.replicate(format!("**.{names}.{{weight,bias}}"))
    }

    /// Layers of the language model, and of its adapter: their tensors match `pattern`, in which the first wildcard that
    /// is a number is the layer's. Their number is the first of these keys.
    pub(super) fn layers(self, pattern: &str, count: &[&str], config: &Config<'_>) -> Result<Rules> {
        Ok(self.pipeline(format!("{ADAPTED}{pattern}"), config.find(count)?, config.options.stages()))
    }
}

/// Several blocks of a dimension, each divided on its own.
pub(super) fn blocks_of(x: Expr, dim: usize, blocks: &[Block], by: Ax) -> Expr {
    let len = blocks.iter().fold(0, |len: u64, block| len.saturating_add(block.len()));
    let x = all_of(x, dim, len);
    let mut start = 0;
    let parts = blocks.iter().map(|&block| {
        let part = Expr::Slice { x: Box::new(x.clone()), dim, start, len: block.len(), step: 1 };
        start = start.saturating_add(block.len());
        Expr::Shard { x: Box::new(part), dim, cut: block.cut(by) }
    });
    Expr::Concat { dim, parts: parts.collect() }
}

/// All of a dimension that must have `len` indices: slices alone would leave out what there is more of.
pub(super) fn all_of(x: Expr, dim: usize, len: u64) -> Expr {
    Expr::Shard { x: Box::new(x), dim, cut: Cut { by: Coord::One, units: Some(len), ..Cut::default() } }
}

/// What names of a LoRA adapter have before those of the model.
pub(super) const ADAPTED: &str = "{base_model.model.,}";
