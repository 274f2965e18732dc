//! What the parallel styles of transformers do to parameters: DTensor's `Shard` and `_StridedShard`, which cut like
//! `torch.chunk`.

use std::collections::HashMap;

use serde_json::Value;

use super::names::{Engine, Expert};
use super::{Owner, Placement, refuse};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Expr;
use crate::plan::world::{Ax, Coord, Mesh};

/// What a style does to parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// Nothing: they are replicated.
    Whole,
    /// The last dimension but one; the first of a bias.
    Column,
    /// The last dimension; a bias is replicated.
    Row,
    /// As [`Column`](Style::Column), but of each half.
    PackedColumn,
    /// As [`Row`](Style::Row), but of each half.
    PackedRow,
    /// This dimension.
    Dim(usize),
    /// The first dimension, over the ranks of expert parallelism.
    Experts,
}

use Engine::{V4, V5};

/// The styles, and the versions that have them.
const STYLES: &[(&str, Style, &[Engine])] = &[
    ("colwise", Style::Column, &[V4, V5]),
    ("rowwise", Style::Row, &[V4, V5]),
    ("colwise_rep", Style::Column, &[V4, V5]),
    ("rowwise_rep", Style::Row, &[V4, V5]),
    ("sequence_parallel", Style::Whole, &[V4, V5]),
    ("replicate", Style::Whole, &[V4, V5]),
    ("grouped_gemm", Style::Experts, &[V4, V5]),
    ("local_colwise", Style::Column, &[V4]),
    ("local_rowwise", Style::Row, &[V4]),
    ("local_packed_rowwise", Style::PackedRow, &[V4]),
    ("local", Style::Whole, &[V4]),
    ("gather", Style::Whole, &[V4]),
    ("ep_router", Style::Whole, &[V4]),
    ("colwise_gather_output", Style::Column, &[V5]),
    ("rowwise_split_input", Style::Row, &[V5]),
    ("packed_colwise", Style::PackedColumn, &[V5]),
    ("packed_rowwise", Style::PackedRow, &[V5]),
    ("embedding_rowwise", Style::Dim(0), &[V5]),
    ("embedding_colwise", Style::Dim(1), &[V5]),
    ("moe_tp_experts", Style::Whole, &[V5]),
    ("moe_identity_expert", Style::Whole, &[V5]),
    ("all_reduce", Style::Whole, &[V5]),
    ("local_params", Style::Whole, &[V5]),
    ("replicated_with_grad_allreduce", Style::Whole, &[V5]),
    ("mla_kv_a_proj", Style::Whole, &[V5]),
    ("ep_dispatch_experts", Style::Whole, &[V5]),
];

impl Style {
    /// The style of this name.
    pub(super) fn named(name: &str, engine: Engine) -> Result<Style> {
        let known = || STYLES.iter().filter(|(_, _, engines)| engines.contains(&engine));
        known().find(|(known, _, _)| *known == name).map(|(_, style, _)| *style).ok_or_else(|| {
            let names: Vec<&str> = known().map(|(name, _, _)| *name).collect();
            refuse("plan has an unknown style")
                .with_expected(format!("one of {}", names.join(", ")), format!("`{name}`"))
        })
    }

    /// The dimension of a parameter of so many that is cut, and whether each half of it is.
    fn cuts(self, dims: usize, bias: bool) -> Option<(usize, bool)> {
        let last = dims.checked_sub(1)?;
        match self {
            Style::Whole => None,
            Style::Row if bias => None,
            Style::PackedRow if last == 0 => None,
            Style::Column => Some((last.saturating_sub(1), false)),
            Style::Row => Some((last, false)),
            Style::PackedColumn => Some((last.saturating_sub(1), last > 0)),
            Style::PackedRow => Some((last, true)),
            Style::Dim(dim) => (dim <= last).then_some((dim, false)),
            Style::Experts => Some((0, false)),
        }
    }
}

/// The only engine that has this style.
pub(super) fn only_of(style: &str) -> Option<Engine> {
    let (_, _, engines) = STYLES.iter().find(|(name, _, _)| *name == style)?;
    if let [only] = engines { Some(*only) } else { None }
}

/// What it takes to place the tensors of a checkpoint.
pub(super) struct Placing<'a> {
    checkpoint: &'a Checkpoint,
    mesh: Mesh,
    engine: Engine,
    /// How many experts have tensors of their own, by what stands before their number.
    experts: HashMap<&'a str, u64>,
    /// The blocks that share a scale, in the two last dimensions.
    blocks: [u64; 2],
}

impl<'a> Placing<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, mesh: Mesh, engine: Engine) -> Placing<'a> {
        let mut experts: HashMap<&str, u64> = HashMap::new();
        for tensor in checkpoint.tensors() {
            for Expert { index, start } in engine.names(&tensor.name).filter_map(|name| name.expert) {
                let count = experts.entry(&tensor.name[..start]).or_default();
                *count = index.saturating_add(1).max(*count);
            }
        }
        let config = |at: usize| {
            let path = format!("/quantization_config/weight_block_size/{at}");
            checkpoint.config().and_then(|json| json.pointer(&path)).and_then(Value::as_u64)
        };
        // DeepSeek-V3's, which others took over.
        let blocks = [0, 1].map(|at| config(at).filter(|&block| block > 0).unwrap_or(128));
        Placing { checkpoint, mesh, engine, experts, blocks }
    }

    /// What the ranks get of a tensor.
    pub(super) fn place(&self, style: Style, tensor: &TensorMeta, expert: Option<Expert>) -> Result<Placement> {
        let dims = tensor.shape.len() + usize::from(expert.is_some());
        let whole = Placement::replicate();
        // A scale of all of a matrix, which is one of every part of it. Whole experts take theirs along.
        if style != Style::Experts && tensor.shape.dims().iter().all(|&size| size == 1) {
            return Ok(whole);
        }
        let Some((dim, packed)) = style.cuts(dims, tensor.name.ends_with(".bias")) else { return Ok(whole) };
        let cut = match (expert, dim.checked_sub(1)) {
            (None, _) => self.cut(style, tensor, dim, packed)?,
            // Gate and up are the halves.
            (Some(_), Some(dim)) => self.cut(style, tensor, dim, false)?,
            (Some(Expert { index, start }), None) if style == Style::Experts => {
                return self.expert(index, self.experts[&tensor.name[..start]]);
            }
            (Some(_), None) => {
                return Err(refuse("style cuts the experts of a parameter that the files have expert by expert"));
            }
        };
        Ok(cut.map_or(whole, Placement::from))
    }

    fn cut(&self, style: Style, tensor: &TensorMeta, dim: usize, packed: bool) -> Result<Option<Expr>> {
        let size = tensor.shape[dim];
        // A scale of all rows, or of the whole tensor, is none of any part.
        if size <= 1 {
            return Ok(None);
        }
        let scale = tensor.name.ends_with("_scale") || tensor.name.ends_with("_scale_inv");
        if style != Style::Experts && !scale && !is_float(tensor.dtype) {
            return Err(refuse("plan divides packed elements, of which it does not know the layout")
                .with_expected("a type of floats", tensor.dtype));
        }
        let even = style == Style::Experts || (packed && self.engine == Engine::V4);
        let cut = Cut {
            by: if style == Style::Experts { self.experts_by() } else { Coord::Axis(Ax::Tp) },
            how: if even { Split::Even } else { Split::Ceil },
            unit: if style == Style::Experts { 1 } else { self.unit(tensor, dim)? },
            ..Cut::default()
        };
        if !packed {
            return Ok(Some(Expr::shard(dim, cut)));
        }
        let half = size.div_ceil(2);
        if !half.is_multiple_of(cut.unit) {
            return Err(refuse("half of a dimension is no whole number of blocks that share a scale")
                .with_expected(format!("a multiple of {}", cut.unit), half));
        }
        let part = |start: u64, len: u64| {
            let x = Box::new(Expr::Slice { x: Box::new(Expr::Source), dim, start, len, step: 1 });
            Expr::Shard { x, dim, cut: cut.clone() }
        };
        Ok(Some(Expr::Concat { dim, parts: vec![part(0, half), part(half, size - half)] }))
    }

    /// Only the ranks that have this expert hold it.
    fn expert(&self, index: u64, count: u64) -> Result<Placement> {
        let by = self.experts_by();
        let groups = u64::from(match by {
            Coord::Axis(ax) => self.mesh.axis(ax),
            _ => 1,
        });
        if groups <= 1 {
            return Ok(Placement::replicate());
        }
        if !count.is_multiple_of(groups) {
            return Err(refuse("experts do not divide evenly").with_expected(format!("a multiple of {groups}"), count));
        }
        let owner = Owner::Where(by, (index / (count / groups)) as u32);
        Ok(Placement::Place { owner, expr: Expr::Source })
    }

    /// 4.57 has one mesh.
    fn experts_by(&self) -> Coord {
        let own = self.engine == Engine::V5 || self.mesh.ep > 1;
        Coord::Axis(if own { Ax::Ep } else { Ax::Tp })
    }

    /// How many indices share a scale: no rank gets a part of them.
    fn unit(&self, tensor: &TensorMeta, dim: usize) -> Result<u64> {
        let scales = ["_scale_inv", "_scale"].iter().find_map(|suffix| {
            self.checkpoint
                .tensor(&format!("{}{suffix}", tensor.name))
                .filter(|it| it.shape.len() == tensor.shape.len())
        });
        let size = tensor.shape[dim];
        let Some(scales) = scales.map(|scales| scales.shape[dim]).filter(|&scales| scales > 1 && scales != size) else {
            return Ok(1);
        };
        let block = self.blocks[usize::from(dim + 1 == tensor.shape.len())];
        match size.div_ceil(block) == scales {
            true => Ok(block),
            false if size.is_multiple_of(scales) => Ok(size / scales),
            false => {
                Err(refuse("scales do not fit the blocks of a dimension").with_expected(size.div_ceil(block), scales))
            }
        }
    }
}

/// Whether an element is a number that stands for itself.
fn is_float(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::F64
            | Dtype::F32
            | Dtype::F16
            | Dtype::Bf16
            | Dtype::F8E4M3
            | Dtype::F8E5M2
            | Dtype::F8E4M3Fnuz
            | Dtype::F8E5M2Fnuz
    )
}
