//! The declarative vocabulary: what a destination is made of, for all ranks at once (sharding.md section 12).

use super::cut::Cut;
use crate::cast::Cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

/// What a destination is made of. Names no rank: a [`Coord`](super::Coord) says which part each rank gets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expr {
    /// The tensor of the checkpoint that the rule matched.
    Source,
    /// The same elements in a shape of more dimensions: each dimension of `x` is split into one or more of `dims`.
    View {
        /// What is viewed.
        x: Box<Expr>,
        /// The dimensions, outermost first.
        dims: Vec<u64>,
    },
    /// Every `step`-th index of a dimension, `len` of them from `start` on.
    Slice {
        /// What is sliced.
        x: Box<Expr>,
        /// The dimension, 0 the outermost.
        dim: usize,
        /// The first index.
        start: u64,
        /// How many indices.
        len: u64,
        /// From one index to the next, at least 1.
        step: u64,
    },
    /// Each rank's part of a dimension.
    Shard {
        /// What is cut.
        x: Box<Expr>,
        /// The dimension, 0 the outermost.
        dim: usize,
        /// How it is cut.
        cut: Cut,
    },
    /// The same elements with the dimensions in another order. The source must be of a float type of 16 bits or more,
    /// or an F8 that is [cast](Expr::Cast).
    Permute {
        /// What is permuted.
        x: Box<Expr>,
        /// For each dimension, outermost first, which one of `x` it is.
        order: Vec<usize>,
    },
    /// The same elements converted to another type, once: see [`Cast`](crate::Cast) for the pairs. Elements that have
    /// the type already stay as they are.
    Cast {
        /// What is cast.
        x: Box<Expr>,
        /// The type at the destination.
        to: Dtype,
    },
}

impl Expr {
    /// The matched tensor's parts along `dim`.
    pub fn shard(dim: usize, cut: Cut) -> Expr {
        Expr::Shard { x: Box::new(Expr::Source), dim, cut }
    }

    /// Refuses what makes no sense for any tensor.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Expr::Source => Ok(()),
            Expr::View { x, .. } | Expr::Slice { x, .. } => x.check(),
            Expr::Shard { x, cut, .. } => {
                cut.by.check()?;
                x.check()
            }
            Expr::Permute { x, order } => {
                if !(0..order.len()).all(|dim| order.contains(&dim)) {
                    return Err(broken("permute", "not an order of dimensions")
                        .with_expected(format!("each of 0 to {} once", order.len().saturating_sub(1)), list(order)));
                }
                x.check()
            }
            Expr::Cast { x, to } => {
                if x.cast_to().is_some() {
                    return Err(broken("cast", "elements are cast twice"));
                }
                castable(*to)?;
                x.check()
            }
        }
    }

    /// Whether bytes of the source may be left out on purpose.
    pub(super) fn is_partial(&self) -> bool {
        match self {
            Expr::Source => false,
            Expr::Slice { .. } => true,
            Expr::View { x, .. } | Expr::Shard { x, .. } | Expr::Permute { x, .. } | Expr::Cast { x, .. } => {
                x.is_partial()
            }
        }
    }

    /// The type that elements are cast to.
    pub(super) fn cast_to(&self) -> Option<Dtype> {
        match self {
            Expr::Source => None,
            Expr::Cast { to, .. } => Some(*to),
            Expr::View { x, .. } | Expr::Slice { x, .. } | Expr::Shard { x, .. } | Expr::Permute { x, .. } => {
                x.cast_to()
            }
        }
    }
}

/// Refuses types that nothing can be cast to.
pub(super) fn castable(to: Dtype) -> Result<()> {
    if Cast::TARGETS.contains(&to) {
        return Ok(());
    }
    Err(broken("cast", "no such type to cast to").with_expected("one of BF16, F16, F32", to))
}

/// Dimensions as they are written in a rules file.
pub(super) fn list(dims: &[usize]) -> String {
    format!("{dims:?}")
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
