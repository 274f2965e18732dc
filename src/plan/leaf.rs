//! The normal form: split-view of one tensor -> per-factor (start, len, step) -> permute -> cast -> dense destination,
//! and its lowering to strided copies. The work is proportional to the number of dimensions, never to rows (sharding.md
//! section 12).

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::cut::gcd;
use super::{BoxCopy, Loop, Loops};
use crate::cast::Cast;
use crate::checkpoint::TensorMeta;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{LOOPS_MAX, UNROLL_MAX};
use crate::shape::Shape;

/// One rank's part of one tensor of the checkpoint: the tensor viewed in factors, the indices taken of each, laid
/// out densely in an order of their own, each element converted on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Position in [`Checkpoint::tensors`](crate::Checkpoint::tensors).
    pub tensor: u32,
    /// The element type in the file.
    pub dtype: Dtype,
    /// The split view of the tensor, outermost first.
    pub factors: SmallVec<[Factor; 4]>,
    /// For each dimension of the destination, outermost first, the position of the factor that it is.
    pub order: SmallVec<[usize; 4]>,
    /// How elements are converted, if they are.
    pub cast: Option<Cast>,
    /// How many different parts the ranks have of it: the product over its shards.
    pub parts: u64,
}

/// One factor of a [`Leaf`]: of `size` indices, `len` from `start` on, every `step`-th.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factor {
    /// Indices in the tensor.
    pub size: u64,
    /// The first index taken.
    pub start: u64,
    /// How many are taken.
    pub len: u64,
    /// From one taken index to the next.
    pub step: u64,
}

impl Leaf {
    /// All of a tensor.
    pub(super) fn whole(tensor: u32, meta: &TensorMeta) -> Leaf {
        Leaf {
            tensor,
            dtype: meta.dtype,
            factors: meta.shape.iter().map(|&size| Factor { size, start: 0, len: size, step: 1 }).collect(),
            order: (0..meta.shape.len()).collect(),
            cast: None,
            parts: 1,
        }
    }

    /// Refuses another order of elements that are not permuted.
    pub(super) fn check_order(&self) -> Result<()> {
        match (self.dtype, self.cast) {
            (Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64, _) | (_, Some(_)) => Ok(()),
            _ if self.order.is_sorted() => Ok(()),
            (dtype, None) => Err(self
                .broken("permute", "elements of this type are not permuted")
                .with_expected("F16, BF16, F32, F64, or F8_E4M3 or F8_E5M2 with a cast", dtype)),
        }
    }

    /// Converts the elements; those that are of this type already stay as they are.
    pub(super) fn cast(mut self, to: Dtype) -> Result<Leaf> {
        if self.dtype != to {
            self.cast = Some(Cast::new(self.dtype, to)?);
        }
        Ok(self)
    }

    /// The shape of the box that it fills.
    pub fn shape(&self) -> Shape {
        self.order.iter().map(|&factor| self.factors[factor].len).collect()
    }

    /// The indices that it takes of each dimension of its tensor, which has this shape; `None` if they are not consecutive,
    /// or lie in another order at the destination.
    pub fn ranges(&self, shape: &Shape) -> Option<SmallVec<[Range<u64>; 4]>> {
        // Factors of one index are of no dimension in particular: whose it is that has none of it cannot be told.
        if !self.order.is_sorted() || self.factors.iter().any(|factor| (factor.size, factor.len) == (1, 0)) {
            return None;
        }
        if shape.contains(&0) {
            // Nor which factors an empty dimension has; of nothing everybody has all.
            let whole = self.factors.iter().all(|factor| factor.len == factor.size);
            return whole.then(|| shape.iter().map(|&size| 0..size).collect());
        }
        let mut factors = self.factors.iter().filter(|factor| factor.size > 1);
        let mut ranges = SmallVec::new();
        for &size in shape.iter() {
            let (mut seen, mut range) = (1, 0..1);
            while seen < size {
                let Factor { size, start, len, step } = *factors.next()?;
                range = if len == size {
                    range.start * size..range.end * size
                } else if range.end - range.start == 1 && (step == 1 || len < 2) {
                    let start = range.start * size + start;
                    start..start + len
                } else {
                    // A part of an inner factor is consecutive only below one index of the outer ones.
                    return None;
                };
                seen *= size;
            }
            ranges.push(range);
        }
        Some(ranges)
    }

    /// Its indices in a dimension of the box.
    pub(super) fn len(&self, dim: usize) -> u64 {
        self.factors[self.order[dim]].len
    }

    /// Whether it takes no elements; the product of its other sizes may be no number then.
    fn is_empty(&self) -> bool {
        self.factors.iter().any(|factor| factor.len == 0)
    }

    /// Appends what it takes of its tensor as copies, wherever they land.
    pub(super) fn source(&self, start: u64, into: &mut Vec<BoxCopy>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let mut strides: SmallVec<[u64; 4]> = smallvec![1; self.order.len()];
        for dim in (1..self.order.len()).rev() {
            strides[dim - 1] = strides[dim] * self.len(dim);
        }
        self.copies(start, 0, &strides, into)
    }

    /// Appends the strided copies that fill a box of a destination from the tensor whose first byte is at `start` of its
    /// file. The box begins at element `offset` of the destination; `strides` are the elements there from one index of
    /// each of its dimensions to the next.
    pub(super) fn copies(&self, start: u64, offset: u64, strides: &[u64], into: &mut Vec<BoxCopy>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let (from, mut loops) = self.loops(strides);
        let run = match loops.last() {
            Some(&Loop { count, src_stride: 1, dst_stride: 1 }) => {
                loops.pop();
                count
            }
            _ => 1,
        };
        let in_file = |elements| self.bytes_of(self.dtype, elements);
        let landed = |elements| self.bytes_of(self.cast.map_or(self.dtype, Cast::to), elements);
        let mut copy = BoxCopy {
            tensor: self.tensor,
            src: start + in_file(from)?,
            dst: landed(offset)?,
            run: in_file(run)?,
            cast: self.cast,
            loops: Loops::new(),
        };
        let mut in_bytes: SmallVec<[Loop; 4]> = SmallVec::new();
        for Loop { count, src_stride, dst_stride } in loops {
            in_bytes.push(Loop { count, src_stride: in_file(src_stride)?, dst_stride: landed(dst_stride)? });
        }
        if in_bytes.len() <= LOOPS_MAX {
            copy.loops = Loops::from_slice(&in_bytes);
            into.push(copy);
            return Ok(());
        }
        let mut copies = smallvec![copy];
        while in_bytes.len() > LOOPS_MAX {
            // The outermost of the destination, so that every copy fills a range of its box.
            let outermost = (0..in_bytes.len()).rev().max_by_key(|&at| in_bytes[at].dst_stride).unwrap_or(0);
            copies = self.unroll(copies, in_bytes.remove(outermost))?;
        }
        into.extend(copies.into_iter().map(|copy| BoxCopy { loops: Loops::from_slice(&in_bytes), ..copy }));
        Ok(())
    }

    fn unroll(&self, copies: SmallVec<[BoxCopy; 1]>, outer: Loop) -> Result<SmallVec<[BoxCopy; 1]>> {
        let needed = outer.count.saturating_mul(copies.len() as u64);
        if needed > UNROLL_MAX {
            return Err(self.broken("too-deep", "copy has too many loops to unroll").with_expected(
                format!("at most {LOOPS_MAX} loops or {UNROLL_MAX} copies"),
                format!("{needed} copies"),
            ));
        }
        let step = |copy: &BoxCopy, i: u64| BoxCopy {
            src: copy.src + i * outer.src_stride,
            dst: copy.dst + i * outer.dst_stride,
            ..copy.clone()
        };
        Ok(copies.iter().flat_map(|copy| (0..outer.count).map(move |i| step(copy, i))).collect())
    }

    /// The offset of the first element and the collapsed loops, outermost of the tensor first, all in elements.
    fn loops(&self, strides: &[u64]) -> (u64, SmallVec<[Loop; 4]>) {
        let mut dst_strides: SmallVec<[u64; 4]> = smallvec![1; self.factors.len()];
        for (&factor, &stride) in self.order.iter().zip(strides) {
            dst_strides[factor] = stride;
        }
        let mut reversed: SmallVec<[Loop; 4]> = SmallVec::new();
        let (mut offset, mut src) = (0, 1);
        for (factor, &dst_stride) in self.factors.iter().zip(&dst_strides).rev() {
            offset += factor.start * src;
            let next = Loop { count: factor.len, src_stride: factor.step * src, dst_stride };
            match reversed.last_mut() {
                _ if next.count == 1 => {}
                Some(inner)
                    if next.src_stride == inner.count * inner.src_stride
                        && next.dst_stride == inner.count * inner.dst_stride =>
                {
                    inner.count *= next.count;
                }
                _ => reversed.push(next),
            }
            src *= factor.size;
        }
        reversed.reverse();
        (offset, reversed)
    }

    /// The same elements in more dimensions, into which those of the box are split. `None` if they cannot be: the
    /// indices taken of a factor would be no box.
    pub(super) fn view(mut self, dims: &[u64]) -> Option<Leaf> {
        let mut left = dims.iter().copied();
        // What becomes of each factor, and the dimensions that each of them has in the end.
        let mut splits: SmallVec<[(usize, SmallVec<[Factor; 4]>); 4]> = SmallVec::new();
        for &position in &self.order {
            let factor = self.factors[position];
            let mut split: SmallVec<[u64; 4]> = SmallVec::new();
            let mut product = 1u64;
            while split.is_empty() || product < factor.len {
                let dim = left.next()?;
                product = product.saturating_mul(dim);
                split.push(dim);
            }
            if product != factor.len {
                return None;
            }
            splits.push((position, factor.split(&split)?));
        }
        let ones = left.map(|_| Factor { size: 1, start: 0, len: 1, step: 1 }).collect();
        splits.push((self.factors.len(), ones));
        let before = |position: usize| -> usize {
            splits.iter().filter(|(other, _)| *other < position).map(|(_, split)| split.len()).sum()
        };
        self.order = splits.iter().flat_map(|(position, split)| (before(*position)..).take(split.len())).collect();
        splits.sort_unstable_by_key(|(position, _)| *position);
        self.factors = splits.into_iter().flat_map(|(_, split)| split).collect();
        Some(self)
    }

    /// Puts the dimensions of the box in another order, of as many.
    pub(super) fn permute(&mut self, order: &[usize]) {
        self.order = order.iter().map(|&dim| self.order[dim]).collect();
    }

    /// Adds a dimension of 1 before the others.
    pub(super) fn insert_outermost(&mut self) {
        self.factors.insert(0, Factor { size: 1, start: 0, len: 1, step: 1 });
        self.order.iter_mut().for_each(|factor| *factor += 1);
        self.order.insert(0, 0);
    }

    /// Takes some of the indices of a dimension, which has them.
    pub(super) fn narrow(&mut self, dim: usize, start: u64, len: u64, step: u64) {
        self.factors[self.order[dim]].narrow(start, len, step);
    }

    /// Elements of a type in bytes.
    fn bytes_of(&self, dtype: Dtype, elements: u64) -> Result<u64> {
        dtype.bytes_of(elements).ok_or_else(|| {
            let group = 8 / gcd(8, dtype.bits().into());
            self.broken("cut-not-on-bytes", format!("cut of {dtype} elements does not fall on bytes"))
                .with_expected(format!("a multiple of {group} elements"), elements)
        })
    }

    fn broken(&self, rule: &'static str, message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Rules, message).with_rule(rule)
    }
}

impl Factor {
    fn narrow(&mut self, start: u64, len: u64, step: u64) {
        // The start of nothing is kept inside the tensor.
        self.start += if len == 0 { 0 } else { start * self.step };
        self.len = len;
        // From one index there is no way to the next, so that a step may be any number.
        self.step = if len < 2 { 1 } else { self.step * step };
    }

    /// Splits into factors of these lengths, whose product is `len`. `None` if the indices taken are not a box.
    fn split(self, lens: &[u64]) -> Option<SmallVec<[Factor; 4]>> {
        let mut into = SmallVec::new();
        if let [_] = lens {
            into.push(self);
            return Some(into);
        }
        let inner: u64 = lens[1..].iter().product();
        if self.step != 1 || inner == 0 || !self.start.is_multiple_of(inner) || !self.size.is_multiple_of(inner) {
            return None;
        }
        into.push(Factor { size: self.size / inner, start: self.start / inner, len: lens[0], step: 1 });
        into.extend(lens[1..].iter().map(|&len| Factor { size: len, start: 0, len, step: 1 }));
        Some(into)
    }
}
