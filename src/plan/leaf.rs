//! The normal form: split-view of one tensor -> per-factor (start, len, step) -> permute -> cast -> dense destination,
//! and its lowering to strided copies. The work is proportional to the number of dimensions, never to rows (sharding.md
//! section 12).

use smallvec::{SmallVec, smallvec};

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

    /// Its indices in a dimension of the box.
    pub(super) fn len(&self, dim: usize) -> u64 {
        self.factors[self.order[dim]].len
    }

    /// Appends what it takes of its tensor as copies, wherever they land.
    pub(super) fn source(&self, start: u64, into: &mut Vec<BoxCopy>) -> Result<()> {
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
        if self.factors.iter().any(|factor| factor.len == 0) {
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
        let landed = |elements| self.bytes_of(self.cast.map_or(self.dtype, |cast| cast.to), elements);
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
            let group = 8 / gcd(8, dtype.bits());
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
        self.step *= step;
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

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::FileId;

    fn meta(dtype: Dtype, dims: &[u64]) -> TensorMeta {
        let shape = Shape::new(dims);
        let end = shape.bytes(dtype).expect("whole bytes");
        TensorMeta { name: "w".into(), file: FileId(0), dtype, shape, start: 0, end }
    }

    fn whole(dtype: Dtype, dims: &[u64]) -> Leaf {
        Leaf::lower(&Expr::Source, 0, &meta(dtype, dims), Mesh::tp(1), Rank(0)).unwrap()
    }

    fn shard(dtype: Dtype, dims: &[u64], dim: usize, cut: Cut, rank: u32, n: u32) -> (Shape, u64, BoxCopy) {
        let leaf = Leaf::lower(&Expr::shard(dim, cut), 0, &meta(dtype, dims), Mesh::tp(n), Rank(rank)).unwrap();
        let (bytes, copies) = leaf.copies(0).unwrap();
        assert_eq!(copies.len(), 1);
        (leaf.shape(), bytes, copies[0].clone())
    }

    fn rows(count: u64, src_stride: u64, dst_stride: u64) -> Loops {
        smallvec![Loop { count, src_stride, dst_stride }]
    }

    // The numbers are those of sharding.md section 15.
    #[test]
    fn table_of_known_shards() {
        let heads = |unit, units| Cut { unit, units: Some(units), replicate_units: true, ..Cut::default() };
        let (shape, bytes, copy) = shard(Dtype::Bf16, &[4096, 4096], 0, heads(128, 32), 1, 4);
        assert_eq!((shape.dims(), bytes), (&[1024, 4096][..], 8_388_608));
        assert_eq!((copy.src, copy.run, copy.loops.len()), (8_388_608, 8_388_608, 0));

        let (shape, _, copy) = shard(Dtype::Bf16, &[1024, 4096], 0, heads(128, 8), 5, 16);
        assert_eq!((shape.dims(), copy.src, copy.src + copy.run), (&[128, 4096][..], 2_097_152, 3_145_728));

        let (shape, _, copy) = shard(Dtype::Bf16, &[4096, 4096], 1, Cut::default(), 3, 4);
        assert_eq!((shape.dims(), copy.src, copy.run), (&[4096, 1024][..], 6_144, 2_048));
        assert_eq!(copy.loops, rows(4096, 8_192, 2_048));

        let (_, _, copy) = shard(Dtype::Bf16, &[8192, 28672], 1, Cut::default(), 7, 8);
        assert_eq!((copy.src, copy.run, &copy.loops), (50_176, 7_168, &rows(8192, 57_344, 7_168)));
        assert_eq!(copy.src + 8191 * 57_344 + copy.run, 469_762_048);

        let (_, _, copy) = shard(Dtype::Bf16, &[43008, 14336], 0, heads(384, 112), 2, 8);
        assert_eq!((copy.src, copy.run), (308_281_344, 154_140_672));
    }

    #[test]
    fn replicated_tensors_are_one_run() {
        let (bytes, copies) = whole(Dtype::Bf16, &[8192]).copies(24).unwrap();
        assert_eq!((bytes, copies.len(), copies[0].src, copies[0].run), (16_384, 1, 24, 16_384));
        let (bytes, copies) = whole(Dtype::F32, &[]).copies(0).unwrap();
        assert_eq!((bytes, copies[0].run), (4, 4));
        assert_eq!(whole(Dtype::F32, &[3, 0]).copies(0).unwrap(), (0, SmallVec::new()));
    }

    #[test]
    fn packed_types_are_cut_on_bytes() {
        let cols = |start, len| whole(Dtype::F4, &[4, 6]).slice(1, start, len, 1).unwrap().copies(0);
        assert_eq!(cols(1, 2).unwrap_err().rule(), Some("cut-not-on-bytes"));
        let (bytes, copies) = cols(2, 2).unwrap();
        assert_eq!((bytes, copies[0].src, copies[0].run, &copies[0].loops), (4, 1, 1, &rows(4, 3, 1)));
        let rows = |start, len| whole(Dtype::F4, &[4, 3]).slice(0, start, len, 1).unwrap().copies(0);
        assert_eq!(rows(1, 1).unwrap_err().rule(), Some("cut-not-on-bytes"));
        let (_, copies) = rows(2, 2).unwrap();
        assert_eq!((copies[0].src, copies[0].run), (3, 3));
    }

    #[test]
    fn views_split_and_slices_compose() {
        let leaf = whole(Dtype::U8, &[24, 5]).view(&[2, 3, 4, 5]).unwrap();
        let leaf = leaf.slice(1, 2, 1, 1).unwrap();
        let (bytes, copies) = leaf.copies(0).unwrap();
        assert_eq!((bytes, copies[0].src, copies[0].run, &copies[0].loops), (40, 40, 20, &rows(2, 60, 20)));
        assert_eq!(whole(Dtype::U8, &[24]).view(&[5, 5]).unwrap_err().rule(), Some("view"));
        let every = whole(Dtype::U8, &[10]).slice(0, 1, 4, 2).unwrap().slice(0, 1, 2, 2).unwrap();
        assert_eq!(every.factors[0], Factor { size: 10, start: 3, len: 2, step: 4 });
        assert_eq!(whole(Dtype::U8, &[10]).slice(0, 9, 2, 1).unwrap_err().rule(), Some("slice"));
        let head = whole(Dtype::U8, &[24]).slice(0, 8, 8, 1).unwrap().view(&[2, 4]).unwrap();
        assert_eq!(head.factors[0], Factor { size: 6, start: 2, len: 2, step: 1 });
        assert!(whole(Dtype::U8, &[24]).slice(0, 6, 8, 1).unwrap().view(&[2, 4]).is_err());
    }

    #[test]
    fn deep_boxes_are_unrolled_or_refused() {
        let deep = |outer: u64| {
            let mut leaf = whole(Dtype::U8, &[outer, 3, 3, 3, 3, 3, 3]);
            for dim in 0..7 {
                let len = leaf.factors[dim].size - 1;
                leaf = leaf.slice(dim, 1, len, 1).unwrap();
            }
            leaf.copies(0)
        };
        let (bytes, copies) = deep(4).unwrap();
        assert_eq!((bytes, copies.len(), copies[0].loops.len()), (3 * 64, 3, 5));
        assert_eq!((copies[1].src - copies[0].src, copies[1].dst), (729, 64));
        assert_eq!(deep(5000).unwrap_err().rule(), Some("too-deep"));
    }
}
