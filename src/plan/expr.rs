//! The declarative vocabulary: what a destination is made of, for all ranks at once (sharding.md section 12).

use smallvec::{SmallVec, smallvec};

use super::cut::{Cut, Split};
use super::world::Coord;
use crate::cast::Cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

/// What a destination is made of. Names no rank: a [`Coord`] says which part each rank gets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expr {
    /// The tensor of the checkpoint that the rule matched.
    Source,
    /// Another tensor of the checkpoint, by its name. In a rule `{1}` in it is what the first wildcard of the pattern
    /// matched, and so on, as in [`Rules::rename`](super::Rules::rename).
    Tensor(String),
    /// The same elements in a shape of more dimensions: each dimension of `x` is split into one or more of `dims`.
    View {
        /// What is viewed.
        x: Box<Expr>,
        /// The dimensions, outermost first.
        dims: Vec<u64>,
    },
    /// The same elements with neighbouring dimensions taken as one, the opposite of a [`View`](Expr::View).
    Merge {
        /// What they are of.
        x: Box<Expr>,
        /// The outermost of them, 0 the outermost of all.
        dim: usize,
        /// How many, at least 1.
        count: usize,
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
    /// Parts of one type behind each other in a dimension; in all others they are alike.
    Concat {
        /// The dimension, 0 the outermost.
        dim: usize,
        /// The parts, first to last; a [`Select`](Expr::Select) is as many as it selects.
        parts: Vec<Expr>,
    },
    /// Parts of one type and shape as the indices of a new outermost dimension.
    Stack {
        /// The parts, first to last; a [`Select`](Expr::Select) is as many as it selects.
        parts: Vec<Expr>,
    },
    /// Some of several, for instance a rank's experts: only as a part of a [`Concat`](Expr::Concat) or a
    /// [`Stack`](Expr::Stack).
    Select {
        /// Which of them each rank gets.
        by: Cut,
        /// All of them.
        of: Vec<Expr>,
    },
    /// Filled up at the end of a dimension.
    Pad {
        /// What is padded.
        x: Box<Expr>,
        /// The dimension, 0 the outermost.
        dim: usize,
        /// Its size then; not less than that of `x`.
        to: u64,
        /// What the new places hold.
        fill: Fill,
    },
    /// Each index of a dimension several times, one after the other.
    Repeat {
        /// What is repeated.
        x: Box<Expr>,
        /// The dimension, 0 the outermost.
        dim: usize,
        /// How often, at least once.
        times: u64,
    },
    /// One value in all places.
    Const {
        /// The type.
        dtype: Dtype,
        /// The shape.
        dims: Vec<u64>,
        /// The value.
        fill: Fill,
    },
    /// `x` on the ranks that have one part of a division; on the others as many places that are filled.
    On {
        /// What those ranks get.
        x: Box<Expr>,
        /// The division.
        by: Coord,
        /// The part.
        part: u32,
        /// What the others get.
        fill: Fill,
    },
}

/// A value for places that no tensor of the checkpoint fills.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fill {
    /// Zero.
    Zero,
    /// One.
    One,
    /// Minus infinity.
    NegInf,
    /// An element of these bytes, as it lies in memory.
    Bytes(Vec<u8>),
}

impl Expr {
    /// The matched tensor's parts along `dim`.
    pub fn shard(dim: usize, cut: Cut) -> Expr {
        Expr::Shard { x: Box::new(Expr::Source), dim, cut }
    }

    /// The expressions that this one is made of.
    pub(super) fn inner(&self) -> &[Expr] {
        match self {
            Expr::Source | Expr::Tensor(_) | Expr::Const { .. } => &[],
            Expr::View { x, .. }
            | Expr::Merge { x, .. }
            | Expr::Slice { x, .. }
            | Expr::Shard { x, .. }
            | Expr::Permute { x, .. }
            | Expr::Cast { x, .. }
            | Expr::Pad { x, .. }
            | Expr::Repeat { x, .. }
            | Expr::On { x, .. } => std::slice::from_ref(x),
            Expr::Concat { parts, .. } | Expr::Stack { parts } => parts,
            Expr::Select { of, .. } => of,
        }
    }

    /// Refuses what makes no sense for any tensor.
    pub(super) fn check(&self) -> Result<()> {
        self.check_as(false)
    }

    /// The same of an expression that is a part of a concat or a stack, or not.
    fn check_as(&self, part: bool) -> Result<()> {
        if !part && matches!(self, Expr::Select { .. }) {
            return Err(broken("select", "a selection is no part of a concat or a stack"));
        }
        match self {
            Expr::Shard { cut: Cut { by, .. }, .. } | Expr::Select { by: Cut { by, .. }, .. } | Expr::On { by, .. } => {
                by.check()?;
            }
            Expr::Permute { order, .. } if !is_order(order) => {
                return Err(broken("permute", "not an order of dimensions")
                    .with_expected(format!("each of 0 to {} once", order.len().saturating_sub(1)), list(order)));
            }
            Expr::Cast { x, to } => {
                if x.cast_to().is_some() {
                    return Err(broken("cast", "elements are cast twice"));
                }
                castable(*to)?;
            }
            _ => {}
        }
        let parts = matches!(self, Expr::Concat { .. } | Expr::Stack { .. });
        self.inner().iter().try_for_each(|inner| inner.check_as(parts))
    }

    /// Whether bytes of the sources may be left out on purpose.
    pub(super) fn is_partial(&self) -> bool {
        matches!(self, Expr::Slice { .. }) || self.inner().iter().any(Expr::is_partial)
    }

    /// Whether indices are taken of what was cut before, so that all parts together say nothing of what they are.
    pub(super) fn takes_of_parts(&self) -> bool {
        let own = match self {
            Expr::View { x, .. } => x.is_cut(),
            Expr::Slice { x, dim, .. } | Expr::Shard { x, dim, cut: Cut { how: Split::Table(_), .. } } => x.cuts(*dim),
            _ => false,
        };
        own || self.inner().iter().any(Expr::takes_of_parts)
    }

    /// Whether the ranks' parts differ.
    fn is_cut(&self) -> bool {
        matches!(self, Expr::Shard { .. } | Expr::Select { .. } | Expr::On { .. })
            || self.inner().iter().any(Expr::is_cut)
    }

    /// Whether this dimension was cut, as far as that is easily told.
    fn cuts(&self, dim: usize) -> bool {
        match self {
            Expr::Shard { x, dim: cut, .. } => *cut == dim || x.cuts(dim),
            Expr::Slice { x, .. } | Expr::Cast { x, .. } | Expr::Pad { x, .. } | Expr::Repeat { x, .. } => x.cuts(dim),
            other => other.is_cut(),
        }
    }

    /// The first type that elements are cast to.
    pub(super) fn cast_to(&self) -> Option<Dtype> {
        match self {
            Expr::Cast { to, .. } => Some(*to),
            _ => self.inner().iter().find_map(Expr::cast_to),
        }
    }

    /// What its first elements are.
    pub(super) fn first(&self) -> &Expr {
        self.inner().first().map_or(self, Expr::first)
    }

    /// How many tensors and values it is put together of.
    pub(super) fn parts(&self) -> u64 {
        match self.inner() {
            [] => 1,
            inner => inner.iter().map(Expr::parts).sum(),
        }
    }

    /// Whether the tensor that a rule matched is a part of it.
    pub(super) fn has_source(&self) -> bool {
        matches!(self, Expr::Source) || self.inner().iter().any(Expr::has_source)
    }

    /// How many tensors it names.
    pub(super) fn names(&self) -> usize {
        match self {
            Expr::Tensor(_) => 1,
            _ => self.inner().iter().map(Expr::names).sum(),
        }
    }

    /// Shows the tensors that it names, first to last.
    pub(super) fn for_each_name<'a>(&'a self, see: &mut impl FnMut(&'a str) -> Result<()>) -> Result<()> {
        match self {
            Expr::Tensor(name) => see(name),
            _ => self.inner().iter().try_for_each(|inner| inner.for_each_name(see)),
        }
    }
}

impl Fill {
    /// The same value in another type.
    pub(super) fn cast(&self, from: Dtype, to: Dtype) -> Result<Fill> {
        if from == to || !matches!(self, Fill::Bytes(_)) {
            return Ok(self.clone());
        }
        let cast = Cast::new(from, to)?;
        let mut converted = vec![0; cast.destination_bytes()];
        cast.convert(&self.element(from)?, &mut converted);
        Ok(Fill::Bytes(converted))
    }

    /// An element of this type.
    pub(super) fn element(&self, dtype: Dtype) -> Result<SmallVec<[u8; 8]>> {
        let bytes = dtype.bits().div_ceil(8) as usize;
        let float = |f64: f64, f32: f32, f16: u16, bf16: u16| -> Option<SmallVec<[u8; 8]>> {
            match dtype {
                Dtype::F64 => Some(SmallVec::from_slice(&f64.to_le_bytes())),
                Dtype::F32 => Some(SmallVec::from_slice(&f32.to_le_bytes())),
                Dtype::F16 => Some(SmallVec::from_slice(&f16.to_le_bytes())),
                Dtype::Bf16 => Some(SmallVec::from_slice(&bf16.to_le_bytes())),
                _ => None,
            }
        };
        let element = match self {
            Fill::Zero => Some(smallvec![0; bytes]),
            // IEEE 754: the exponent's bias and nothing else; in the integer types the lowest bit.
            Fill::One => float(1.0, 1.0, 0x3C00, 0x3F80).or_else(|| match dtype {
                Dtype::F8E4M3 => Some(smallvec![0x38]),
                Dtype::F8E5M2 => Some(smallvec![0x3C]),
                Dtype::Bool
                | Dtype::U8
                | Dtype::I8
                | Dtype::U16
                | Dtype::I16
                | Dtype::U32
                | Dtype::I32
                | Dtype::U64
                | Dtype::I64 => {
                    let mut one: SmallVec<[u8; 8]> = smallvec![0; bytes];
                    one[0] = 1;
                    Some(one)
                }
                _ => None,
            }),
            Fill::NegInf => float(f64::NEG_INFINITY, f32::NEG_INFINITY, 0xFC00, 0xFF80),
            Fill::Bytes(element) => (element.len() == bytes).then(|| SmallVec::from_slice(element)),
        };
        element.ok_or_else(|| {
            broken("fill", format!("{dtype} has no such value"))
                .with_expected(format!("{bytes} bytes that it has"), self)
        })
    }
}

impl std::fmt::Display for Fill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fill::Zero => f.write_str("zero"),
            Fill::One => f.write_str("one"),
            Fill::NegInf => f.write_str("-inf"),
            Fill::Bytes(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

/// Whether each of as many dimensions is in it once.
fn is_order(order: &[usize]) -> bool {
    let mut seen = vec![false; order.len()];
    order.iter().all(|&dim| seen.get_mut(dim).is_some_and(|seen| !std::mem::replace(seen, true)))
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
