//! Tensor shapes with checked arithmetic.

use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

use crate::dtype::Dtype;

/// The dimensions of a tensor, outermost first. Rank 0 is a scalar with one element.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(SmallVec<[u64; 3]>);

impl Shape {
    /// A shape of these dimensions, outermost first.
    pub fn new(dims: &[u64]) -> Shape {
        Shape(SmallVec::from_slice(dims))
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[u64] {
        &self.0
    }

    /// The number of elements, or `None` if it does not fit 64 bits.
    ///
    /// As in the reference implementation the product is formed from the left, so a zero does not excuse an
    /// overflow before it.
    pub fn elements(&self) -> Option<u64> {
        self.0.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))
    }

    /// The bytes of a dense tensor of this shape, or `None` on overflow or a partial byte.
    pub fn bytes(&self, dtype: Dtype) -> Option<u64> {
        dtype.bytes_of(self.elements()?)
    }
}

impl Deref for Shape {
    type Target = [u64];
    fn deref(&self) -> &[u64] {
        &self.0
    }
}

impl From<Vec<u64>> for Shape {
    fn from(dims: Vec<u64>) -> Shape {
        Shape(SmallVec::from_vec(dims))
    }
}

impl FromIterator<u64> for Shape {
    fn from_iter<I: IntoIterator<Item = u64>>(dims: I) -> Shape {
        Shape(dims.into_iter().collect())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(u64::to_string).collect();
        f.pad(&format!("[{}]", dims.join(",")))
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
