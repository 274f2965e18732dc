//! The declarative vocabulary: what a destination is made of, for all ranks at once (sharding.md section 12).

use std::ops::Range;

use super::world::{Ax, Coord, Mesh};
use crate::cast::Cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// What a destination is made of. Names no rank: a [`Coord`] says which part each rank gets.
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

/// How a dimension is cut into parts.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cut {
    /// Which part each rank gets.
    pub by: Coord,
    /// What happens when the units do not divide evenly.
    pub how: Split,
    /// Indices that stay together: a head, a group, a block. 1 or more.
    pub unit: u64,
    /// How many units the dimension must have, where the configuration says so.
    pub units: Option<u64>,
    /// With more ranks than units, each unit goes to `ranks / units` neighbouring ranks (key and value heads of
    /// grouped-query attention) instead of being an error.
    pub replicate_units: bool,
}

/// What happens when units do not divide evenly over the ranks (sharding.md section 1 names six such rules).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Split {
    /// It is an error.
    #[default]
    Even,
    /// Each rank gets `ceil(units / n)`; the last one that gets any may get fewer, the ranks after it get none.
    Ceil,
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

impl Default for Cut {
    fn default() -> Cut {
        Cut { by: Coord::Axis(Ax::Tp), how: Split::Even, unit: 1, units: None, replicate_units: false }
    }
}

impl Cut {
    /// The part of `rank`, and how many parts there are.
    pub(super) fn part(&self, size: u64, mesh: Mesh, rank: Rank) -> Result<(u64, u64)> {
        let (i, n) = self.by.of(mesh, rank)?;
        let (i, n) = (u64::from(i), u64::from(n));
        let units = size.div_ceil(self.unit.max(1));
        if !self.replicate_units || n <= units || units == 0 {
            return Ok((i, n));
        }
        if !n.is_multiple_of(units) {
            return Err(broken("not-divisible", "units do not divide the ranks that share them")
                .with_expected(format!("a multiple of {units} ranks"), n));
        }
        Ok((i / (n / units), units))
    }

    /// The indices that `rank` gets of a dimension of `size`.
    pub(super) fn range(&self, size: u64, mesh: Mesh, rank: Rank) -> Result<Range<u64>> {
        let unit = self.unit;
        if unit == 0 {
            return Err(broken("unit", "unit of a cut is 0"));
        }
        if let Some(units) = self.units
            && units.checked_mul(unit) != Some(size)
        {
            return Err(broken("units", "dimension is not what the configuration says")
                .with_expected(format!("{units} units of {unit}"), size));
        }
        let (i, n) = self.part(size, mesh, rank)?;
        match self.how {
            Split::Even => {
                if !size.is_multiple_of(unit) {
                    return Err(broken("unit", "dimension is not a whole number of units")
                        .with_expected(format!("a multiple of {unit}"), size));
                }
                let units = size / unit;
                if !units.is_multiple_of(n) {
                    return Err(broken("not-divisible", format!("units of {unit} do not divide evenly"))
                        .with_expected(format!("a multiple of {n} units"), units));
                }
                let len = units / n * unit;
                Ok(i * len..(i + 1) * len)
            }
            Split::Ceil => {
                let units = size.div_ceil(unit);
                let each = units.div_ceil(n);
                let at = |part: u64| (part * each).min(units).saturating_mul(unit).min(size);
                Ok(at(i)..at(i + 1))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn range(cut: &Cut, size: u64, rank: u32, n: u32) -> Result<Range<u64>> {
        cut.range(size, Mesh::tp(n), Rank(rank))
    }

    #[test]
    fn ceil_leaves_trailing_ranks_empty() {
        let cut = Cut { how: Split::Ceil, ..Cut::default() };
        let of = |rank| range(&cut, 9, rank, 4).unwrap();
        assert_eq!([of(0), of(1), of(2), of(3)], [0..3, 3..6, 6..9, 9..9]);
        let cut = Cut { how: Split::Ceil, unit: 32, ..Cut::default() };
        let blocks = |rank| range(&cut, 2880, rank, 4).unwrap();
        assert_eq!((blocks(1), blocks(3)), (23 * 32..46 * 32, 69 * 32..2880));
    }

    #[test]
    fn even_is_strict_about_units() {
        let heads = Cut { unit: 128, ..Cut::default() };
        assert_eq!(range(&heads, 1280, 1, 2).unwrap(), 640..1280);
        assert_eq!(range(&heads, 1280, 1, 4).unwrap_err().rule(), Some("not-divisible"));
        assert_eq!(range(&heads, 1300, 1, 2).unwrap_err().rule(), Some("unit"));
    }

    #[test]
    fn more_ranks_than_heads_share_them() {
        let kv = Cut { unit: 128, units: Some(8), replicate_units: true, ..Cut::default() };
        assert_eq!(range(&kv, 1024, 5, 16).unwrap(), 256..384);
        assert_eq!(range(&kv, 1024, 5, 8).unwrap(), 640..768);
        assert_eq!(range(&kv, 1024, 5, 12).unwrap_err().rule(), Some("not-divisible"));
        let wrong = range(&kv, 2048, 0, 1).unwrap_err();
        assert_eq!((wrong.rule(), wrong.found()), (Some("units"), Some("2048")));
    }
}
