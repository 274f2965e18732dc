//! The parts that families are made of, as rules of target `plain`: disk names and layouts, sliced. Patterns name modules.

use super::broken;
use super::config::{Config, Heads};
use crate::error::Result;
use crate::extent::Rank;
use crate::limits::UNROLL_MAX;
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Expr;
use crate::plan::quant::Orientation;
use crate::plan::rules::{Rules, ShardRule, Stage};
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
    /// Refuses more than rules have parts for, and groups of ranks that would have none.
    pub(super) fn new(config: &Config<'_>, count: u64, intermediate: u64) -> Result<Experts> {
        if count > UNROLL_MAX {
            return Err(broken("config", "config.json: the number of experts makes no sense")
                .with_expected(format!("at most {UNROLL_MAX}"), count));
        }
        let (experts, mesh) = (Experts { count, intermediate, split: config.options.experts() }, config.options.mesh);
        // What else is wrong with the cut is said of the tensor that it is for.
        let has_none = |rank: &u32| {
            experts.cut().take(count, mesh, Rank(*rank)).is_ok_and(|taken| taken.iter().all(|run| run.len == 0))
        };
        let size = if mesh.ep > 1 { mesh.size() } else { 0 };
        match (0..size).find(has_none) {
            Some(rank) => Err(broken("experts", "an expert-parallel group has no experts")
                .with_expected(format!("some of {count} for each of {} groups", mesh.ep), "none")
                .with_rank(Rank(rank))),
            None => Ok(experts),
        }
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
    /// value head follows it. Ranks have such groups, whole; where there are more ranks than groups, neighbours divide the
    /// query heads of one and share its key and its value head.
    pub(super) fn grouped_heads(self, pattern: &str, heads: Heads, config: &Config<'_>) -> Result<Rules> {
        let (groups, queries) = (heads.key_value, heads.group()?);
        let rows = queries.saturating_add(2).saturating_mul(heads.size);
        let ranks = u64::from(config.options.mesh.tp);
        if queries == 1 || ranks <= groups || !ranks.is_multiple_of(groups) {
            return Ok(self.column(pattern, groups, rows));
        }
        let neighbours = config.options.mesh.tp / groups as u32;
        let tp = || Box::new(Coord::Axis(Ax::Tp));
        let all = all_of(Expr::Source, 0, groups.saturating_mul(rows));
        let rows_of = |group: u64, from: u64, heads_of: u64| {
            let start = group.saturating_mul(rows).saturating_add(from.saturating_mul(heads.size));
            let len = heads_of.saturating_mul(heads.size);
            Box::new(Expr::Slice { x: Box::new(all.clone()), dim: 0, start, len, step: 1 })
        };
        let group = |at: u64| {
            let cut = Cut { by: Coord::Mod(tp(), neighbours), ..Block::new(queries, heads.size).cut(Ax::Tp) };
            let mine = Expr::Shard { x: rows_of(at, 0, queries), dim: 0, cut };
            Expr::Concat { dim: 0, parts: vec![mine, *rows_of(at, queries, 2)] }
        };
        let by = Cut { by: Coord::Div(tp(), neighbours), units: Some(groups), ..Cut::default() };
        let of = (0..groups).map(group).collect();
        Ok(self.module(pattern, Expr::Concat { dim: 0, parts: vec![Expr::Select { by, of }] }))
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

    /// Experts below `module`: [stacks](Rules::stacked_experts), as transformers 5 stores them, where the
    /// checkpoint has some, else each of them is [modules of its own](Rules::each_expert) of these names.
    pub(super) fn experts(
        self,
        config: &Config<'_>,
        module: &str,
        [columns, rows]: [&str; 2],
        experts: &Experts,
    ) -> Rules {
        if config.checkpoint.tensors().iter().any(|tensor| tensor.name.contains(".experts.gate_up_proj")) {
            return self.stacked_experts(module, experts, Orientation::OutIn);
        }
        self.each_expert(&format!("{module}.*.{columns}"), &format!("{module}.*.{rows}"), experts)
    }

    /// The same where there may be none.
    pub(super) fn optional_each_expert(self, columns: &str, rows: &str, experts: &Experts) -> Rules {
        let each = |rules: Rules, pattern: &str, dim| {
            let rules = rules.module(pattern, Expr::shard(dim, experts.inner()));
            rules.among(2, experts.count, experts.cut()).optional()
        };
        each(each(self, columns, 0), rows, 1)
    }

    /// Experts that are stacks of all, below `module`: gates and then ups, and downs.
    pub(super) fn stacked_experts(self, module: &str, experts: &Experts, orientation: Orientation) -> Rules {
        let stacked = Expr::shard(0, experts.cut());
        let half = Block::new(experts.intermediate, 1);
        let down = Expr::Shard { x: Box::new(stacked.clone()), dim: 2, cut: experts.inner() };
        self.module(format!("{module}.gate_up_proj"), blocks_of(stacked, 1, &[half, half], Ax::Etp))
            .orientation(orientation)
            .optional()
            .module(format!("{module}.down_proj"), down)
            .orientation(orientation)
            .optional()
    }

    /// What may lie beside any model. Scales of its cache become those of `cache` below the layer, where it has a name of
    /// its own.
    pub(super) fn beside_the_model(self, cache: Option<&str>) -> Rules {
        // Rotations are computed.
        let rotations = "**.rotary_emb.{inv_freq,cos_cached,sin_cached}";
        self.cache_scales(cache).task_heads().skip(rotations).optional()
    }

    /// Heads of other tasks than to predict tokens.
    fn task_heads(self) -> Rules {
        const HEADS: &str = "{score,classifier,qa_outputs,v_head}";
        // Those of an adapter are modules, and so held against the model.
        let adapted = format!("base_model.model.{HEADS}");
        self.replicate(format!("{HEADS}.**"))
            .optional()
            .stage(Stage::Last)
            .module(adapted.as_str(), Expr::Source)
            .optional()
            .stage(Stage::Last)
            .module(format!("{adapted}.**"), Expr::Source)
            .optional()
            .stage(Stage::Last)
    }

    /// Scales of attention whose keys and values are cached in 8 bits.
    fn cache_scales(self, renamed: Option<&str>) -> Rules {
        const ATTENTION: &str = "{self_attn,self_attention,attn,attention,attention.self}.{attn.,}";
        match renamed {
            None => self.replicate(format!("**.{ATTENTION}{{q,k,v,prob}}_scale")).keep_dtype().optional(),
            Some(attention) => ["q", "k", "v", "prob"].into_iter().fold(self, |rules, of| {
                let rules = rules.replicate(format!("**.{ATTENTION}{of}_scale"));
                rules.rename(format!("{{1}}.{attention}.{of}_scale")).keep_dtype().optional()
            }),
        }
    }

    /// Norms and other tensors that no rank has a part of only.
    pub(super) fn norms(self, names: &str) -> Rules {
        self.replicate(format!("**.{names}.{{weight,bias}}"))
    }

    /// Layers of the language model, and of its adapter: their tensors match `pattern`, in which the first wildcard that
    /// is a number is the layer's. Their number is the first of these keys. All of them must be there to be divided, and
    /// rules of other tensors say on which stage these are.
    pub(super) fn layers(self, pattern: &str, count: &[&str], config: &Config<'_>) -> Result<Rules> {
        let layers = config.find(count)?;
        Ok(self.pipeline(format!("{ADAPTED}{pattern}"), layers, config.options.stages()).all_have_stages())
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
