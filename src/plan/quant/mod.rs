//! How linear modules are stored: one tensor, or several that a quantiser made of it. What a rule says of the module is
//! derived for each of them, so that weights, scales, zeros and group indices can never disagree (sharding.md section 7).

mod derive;
mod recognise;
#[cfg(test)]
mod tests;

use smallvec::SmallVec;

use super::cut::lcm;
use crate::error::{Error, ErrorKind, Result};

pub(super) use derive::{Parts, check_derivable, derive, refined};
pub(super) use recognise::{Known, SUFFIXES, WEIGHTS, recognise};

/// What a model's `quantization_config` says that its headers do not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quantization {
    /// Whose `qweight` it is: both methods use this name, and pack it along different dimensions.
    pub packed: Option<Packed>,
    /// Bits of a packed value.
    pub bits: u64,
    /// Inputs that share a scale; `None` where one scale is all of a row's.
    pub group: Option<u64>,
    /// Whether inputs are of groups in any order (`desc_act` of GPTQ), so that a part of the inputs needs all groups. Of
    /// modules with `weight_g_idx` they are, whatever this says.
    pub act_order: bool,
    /// Outputs and inputs of a block of FP8 that share a scale.
    pub block: [u64; 2],
    /// Where a cut falls inside a block of FP8: scales are repeated for smaller blocks that it does not fall inside, of
    /// at least [`REFINED_BLOCK_MIN`](crate::limits::REFINED_BLOCK_MIN). Without it such a cut is an error.
    pub refine: bool,
}

/// Who packed a `qweight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Packed {
    /// GPTQ: along the inputs, and its zeros along the outputs.
    Gptq,
    /// AWQ: along the outputs.
    Awq,
}

impl Default for Quantization {
    fn default() -> Quantization {
        Quantization { packed: None, bits: 4, group: None, act_order: false, block: [128, 128], refine: false }
    }
}

impl Quantization {
    /// Refuses sizes that no layout has.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |what: &str, expected: &str, found: String| {
            Err(Error::new(ErrorKind::Rules, what).with_rule("quantization").with_expected(expected, found))
        };
        match *self {
            Quantization { bits, .. } if !(1..=32).contains(&bits) => {
                wrong("packed values have no such size", "1 to 32 bits", bits.to_string())
            }
            Quantization { block, .. } if block.contains(&0) => {
                wrong("blocks have no such sides", "1 or more each", format!("{block:?}"))
            }
            Quantization { group: Some(0), .. } => wrong("groups have no such size", "1 or more", "0".into()),
            _ => Ok(()),
        }
    }
}

/// Which of a stored matrix's dimensions are the outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Orientation {
    /// `[.., outputs, inputs]`, as `torch.nn.Linear` has it.
    #[default]
    OutIn,
    /// `[.., inputs, outputs]`: GPT-2's Conv1D, stacked experts of Llama-4.
    InOut,
}

/// A linear module: its logical matrix, and the tensors that are stored for it.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    /// The logical sizes: `[outputs, inputs]`, or `[experts, outputs, inputs]`, or as many as a tensor of other use has.
    pub(super) sizes: SmallVec<[u64; 3]>,
    stored: Vec<Stored>,
    /// Outputs and inputs of its FP8 blocks.
    block: Option<[u64; 2]>,
    /// Why it cannot be cut along the inputs, where it cannot.
    whole_inputs: Option<&'static str>,
}

/// One tensor of a linear module.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    /// What its name has after the module's.
    suffix: &'static str,
    dims: SmallVec<[Dim; 4]>,
    /// Whether it is one element, of all of the matrix.
    is_scalar: bool,
    /// What becomes of it where modules are put together along a dimension that it does not have.
    merged: Merged,
    /// How often each index of each of its dimensions is repeated first, and how many are taken then.
    refined: Option<[(u64, u64); 2]>,
}

/// A dimension of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dim {
    /// A logical dimension: `per` indices for each `of` of that; the last `of` may be fewer.
    Of { dim: usize, per: u64, of: u64 },
    /// One index for all of a logical dimension, which is one group of at most `of`: what is cut shares it.
    One { dim: usize, of: u64 },
    /// None of the logical ones.
    Own,
}

/// What becomes of tensors of one element where modules are stacked, for engines that have layouts of their own for them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Scalars {
    /// Whether a stack of them has one dimension, however many each of them is stored with.
    pub(super) flat: bool,
    /// Endings of which modules that are put together have one, that of the last; but not where they have one of the
    /// other ending, too.
    pub(super) last: &'static [(&'static str, &'static str)],
}

/// What becomes of tensors in which no index is of the merged dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Merged {
    /// One for each part, one after the other.
    Each,
    /// They are the same; the first one is taken, of so many indices.
    First(u64),
}

impl Dim {
    fn same(dim: usize) -> Dim {
        Dim::Of { dim, per: 1, of: 1 }
    }

    fn each(dim: usize, of: u64) -> Dim {
        Dim::Of { dim, per: 1, of }
    }

    /// So many groups of `of` indices of a logical dimension, the last of which may be smaller.
    fn groups(dim: usize, of: u64, count: u64) -> Dim {
        if count == 1 { Dim::One { dim, of } } else { Dim::each(dim, of) }
    }

    /// Where parts lie behind each other that are put together along this logical dimension.
    fn place(dims: &[Dim], logical: usize) -> Option<usize> {
        let is = |at: &Dim| matches!(*at, Dim::Of { dim, .. } | Dim::One { dim, .. } if dim == logical);
        dims.iter().position(is)
    }

    /// Which one of the stored dimensions is this logical one, and how many of its indices each `of` are.
    fn find(dims: &[Dim], logical: usize) -> Option<(usize, u64, u64)> {
        dims.iter().enumerate().find_map(|(at, dim)| match *dim {
            Dim::Of { dim, per, of } if dim == logical => Some((at, per, of)),
            _ => None,
        })
    }
}

impl Linear {
    /// The tensor with this suffix.
    pub(super) fn stored(&self, suffix: &str) -> Option<&Stored> {
        self.stored.iter().find(|stored| stored.suffix == suffix)
    }

    /// The logical outputs and inputs, where they are known: packed rows are told apart by the outputs that a rule says.
    pub(super) fn matrix(&self, outputs: Option<u64>) -> Option<[u64; 2]> {
        let &[rows, columns] = &self.sizes[..] else { return None };
        let is_known = columns != recognise::UNKNOWN && (self.whole_inputs.is_none() || outputs.is_some());
        is_known.then_some([rows, columns])
    }

    /// Logical indices of a dimension that no tensor of the module divides: a cut must fall between such groups.
    fn align(&self, dim: usize) -> u64 {
        let units = self.stored.iter().filter_map(|stored| Dim::find(&stored.dims, dim)).map(|(_, _, of)| of);
        units.fold(1, lcm)
    }

    /// The size of a group where one is all of a dimension, else 1.
    fn one(&self, logical: usize) -> u64 {
        let dims = self.stored.iter().flat_map(|stored| &stored.dims);
        let ones = dims.filter_map(|at| match *at {
            Dim::One { dim, of } if dim == logical => Some(of),
            _ => None,
        });
        ones.fold(1, lcm)
    }
}
