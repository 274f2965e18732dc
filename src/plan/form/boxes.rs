//! What a destination should hold, box by box, for who compares it with what it does.

use super::{Dims, Form, Placed, What};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::leaf::Leaf;

/// What a destination should hold, for who compares it with what it does.
pub(crate) struct Boxes(pub(in crate::plan) Form);

/// A box and where in the destination it lies, in elements.
pub(crate) struct BoxAt<'a> {
    /// What it holds.
    pub(crate) what: BoxOf<'a>,
    /// Its size.
    pub(crate) lens: Dims,
    /// Position of its first element in the destination.
    pub(crate) offset: u64,
    /// From one index of each of its dimensions to the next.
    pub(crate) strides: Dims,
}

/// What a box holds.
pub(crate) enum BoxOf<'a> {
    Leaf(&'a Leaf),
    /// The same element everywhere.
    Fill(&'a [u8]),
}

impl Boxes {
    /// The part of a tensor that is all of the destination, if one is.
    pub(crate) fn only_leaf(&self) -> Option<&Leaf> {
        let [Placed { what: What::Leaf(leaf), .. }] = &self.0.boxes[..] else { return None };
        Some(leaf)
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.0.dtype
    }

    pub(crate) fn bytes(&self) -> Result<u64> {
        self.0.bytes()
    }

    /// The same in bands of at most `max` bytes, or one element, that lie behind each other.
    pub(crate) fn bands(self, max: u64) -> Result<Vec<Boxes>> {
        let mut bands = Vec::new();
        let mut left = vec![(self.0, 0)];
        while let Some((form, dim)) = left.pop() {
            let Some(&size) = form.dims.get(dim).filter(|_| form.bytes().is_ok_and(|bytes| bytes > max)) else {
                bands.push(Boxes(form));
                continue;
            };
            let each = (max / (form.bytes()? / size).max(1)).max(1);
            let mut parts = Vec::new();
            for first in (0..size).step_by(each as usize) {
                parts.push((form.clone().slice(dim, first, each.min(size - first), 1)?, dim + 1));
            }
            left.extend(parts.into_iter().rev());
        }
        Ok(bands)
    }

    /// Shows all boxes that have elements.
    pub(crate) fn for_each(&self, mut show: impl FnMut(BoxAt<'_>) -> Result<()>) -> Result<()> {
        if self.0.dims.contains(&0) {
            return Ok(());
        }
        let strides = self.0.strides();
        for Placed { spots, what } in &self.0.boxes {
            let lens = match what {
                What::Leaf(leaf) => leaf.shape().iter().copied().collect::<Dims>(),
                What::Fill(_, lens) => lens.clone(),
            };
            if lens.contains(&0) {
                continue;
            }
            let element;
            let what = match what {
                What::Leaf(leaf) => BoxOf::Leaf(leaf),
                What::Fill(fill, _) => {
                    element = fill.element(self.0.dtype)?;
                    BoxOf::Fill(&element)
                }
            };
            let offset = spots.iter().map(|spot| spot.first * strides[spot.dim]).sum();
            let strides = spots.iter().map(|spot| spot.step * strides[spot.dim]).collect();
            show(BoxAt { what, lens, offset, strides })?;
        }
        Ok(())
    }
}
