//! What an expression is for one rank: a destination made of boxes, each of which is a part of one tensor of the
//! checkpoint or filled with one value. All operations are arithmetic on indices; nothing is proportional to rows.

mod boxes;
mod make;
#[cfg(test)]
mod tests;

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::cut::gcd;
use super::expr::{Expr, Fill};
use super::leaf::Leaf;
use super::world::Mesh;
use super::{BoxCopy, BoxFill};
use crate::checkpoint::TensorMeta;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::UNROLL_MAX;
use crate::shape::Shape;

pub(crate) use self::boxes::{BoxOf, Boxes};
use self::make::Maker;
pub(super) use self::make::no_part;

/// Indices, lengths or strides, one for each dimension of a destination.
type Dims = SmallVec<[u64; 4]>;

/// A destination: boxes that do not overlap and together are all of it.
#[derive(Debug, Clone)]
pub(super) struct Form {
    /// The element type.
    pub(super) dtype: Dtype,
    dims: Dims,
    pub(super) boxes: SmallVec<[Placed; 1]>,
}

/// A box and where in the destination it lies.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    /// For each axis of the box; those of one dimension of the destination follow one another.
    spots: SmallVec<[Spot; 4]>,
    what: What,
}

/// Where the indices of one axis of a box lie in a dimension of the destination: `first`, `first + step`... Where several
/// axes are of one dimension, the indices of all are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spot {
    dim: usize,
    first: u64,
    step: u64,
}

/// What a box holds.
#[derive(Debug, Clone)]
enum What {
    Leaf(Leaf),
    /// One value; so many elements in each dimension.
    Fill(Fill, Dims),
}

/// For whom a form is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum For {
    /// One rank of a mesh.
    Rank(Mesh, Rank),
    /// All ranks together: every cut is all of its parts, and [`Leaf::parts`] says how many those are.
    All(Mesh),
}

/// What the sources of an expression are.
pub(super) struct Sources<'a> {
    /// The checkpoint's tensors.
    pub(super) tensors: &'a [TensorMeta],
    /// The tensor that the rule matched; a request has none, and its expression none of it.
    pub(super) matched: Option<u32>,
    /// The tensors that the expression names, in the order in which it does.
    pub(super) named: &'a [u32],
    /// What floats of 16 and 32 bits are cast to where the expression says nothing.
    pub(super) casting: Option<Dtype>,
}

impl Form {
    /// What `expr` is.
    pub(super) fn of(expr: &Expr, sources: &Sources<'_>, whom: For) -> Result<Form> {
        let casting = sources.casting.filter(|_| expr.cast_to().is_none());
        let mut maker = Maker { sources, whom, casting, next: 0 };
        let form = maker.make(expr)?;
        form.boxes.iter().filter_map(Placed::leaf).try_for_each(Leaf::check_order)?;
        Ok(form)
    }

    /// All of a tensor.
    fn source(tensor: u32, meta: &TensorMeta, casting: Option<Dtype>) -> Result<Form> {
        let mut leaf = Leaf::whole(tensor, meta);
        let mut dtype = meta.dtype;
        if let Some(to) = casting.filter(|_| matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32)) {
            leaf = leaf.cast(to)?;
            dtype = to;
        }
        let dims: Dims = meta.shape.iter().copied().collect();
        let spots = (0..dims.len()).map(Spot::start).collect();
        Ok(Form { dtype, dims, boxes: smallvec![Placed { spots, what: What::Leaf(leaf) }] })
    }

    /// One value in all places.
    fn filled(dtype: Dtype, dims: Dims, fill: Fill) -> Form {
        let spots = (0..dims.len()).map(Spot::start).collect();
        let boxes = smallvec![Placed { spots, what: What::Fill(fill, dims.clone()) }];
        Form { dtype, dims, boxes }
    }

    /// The shape of the destination.
    pub(super) fn shape(&self) -> Shape {
        Shape::new(&self.dims)
    }

    /// The parts of tensors that it is made of.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &Leaf> {
        self.boxes.iter().filter_map(Placed::leaf)
    }

    /// Bytes of the destination.
    pub(super) fn bytes(&self) -> Result<u64> {
        let elements = self.dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        elements.and_then(|elements| self.dtype.bytes_of(elements)).ok_or_else(|| {
            let group = 8 / gcd(8, self.dtype.bits().into());
            broken("cut-not-on-bytes", format!("destination of {} elements is no whole number of bytes", self.dtype))
                .with_expected(
                    format!("a multiple of {group} elements"),
                    elements.map_or_else(|| "too many".into(), |elements| elements.to_string()),
                )
        })
    }

    /// Appends the strided copies and fills that make the destination.
    pub(super) fn lower(
        &self,
        tensors: &[TensorMeta],
        copies: &mut Vec<BoxCopy>,
        fills: &mut Vec<BoxFill>,
    ) -> Result<()> {
        if self.dims.contains(&0) {
            return Ok(());
        }
        // Numbers of bits that fit bound all products and sums below.
        let bits = self.dims.iter().try_fold(self.dtype.bits().into(), |bits: u64, &dim| bits.checked_mul(dim));
        bits.ok_or_else(|| too_large(&self.dims))?;
        let strides = self.strides();
        for Placed { spots, what } in &self.boxes {
            let offset = spots.iter().map(|spot| spot.first * strides[spot.dim]).sum();
            let strides: Dims = spots.iter().map(|spot| spot.step * strides[spot.dim]).collect();
            match what {
                What::Leaf(leaf) => leaf.copies(tensors[leaf.tensor as usize].start, offset, &strides, copies)?,
                What::Fill(fill, lens) => fills.extend(self.fill(fill, lens, offset, &strides)?),
            }
        }
        Ok(())
    }

    /// Elements from one index of each dimension to the next.
    fn strides(&self) -> Dims {
        let mut strides: Dims = smallvec![1; self.dims.len()];
        for dim in (1..self.dims.len()).rev() {
            strides[dim - 1] = strides[dim] * self.dims[dim];
        }
        strides
    }

    fn fill(&self, fill: &Fill, lens: &Dims, offset: u64, strides: &Dims) -> Result<Option<BoxFill>> {
        if lens.contains(&0) {
            return Ok(None);
        }
        // Innermost first: dimensions that go on where the ones within them end are one with them.
        let mut loops: SmallVec<[(u64, u64); 4]> = SmallVec::new();
        let mut run = 1;
        for (&count, &stride) in lens.iter().zip(strides).rev() {
            match loops.last_mut() {
                _ if count == 1 => {}
                None if stride == run => run *= count,
                Some((inner, of)) if stride == *inner * *of => *inner *= count,
                _ => loops.push((count, stride)),
            }
        }
        loops.reverse();
        let bytes = |elements| {
            let no_bytes =
                || broken("cut-not-on-bytes", format!("fill of {} elements does not fall on bytes", self.dtype));
            self.dtype.bytes_of(elements).ok_or_else(no_bytes)
        };
        let loops = loops.into_iter().map(|(count, stride)| Ok((count, bytes(stride)?))).collect::<Result<_>>()?;
        Ok(Some(BoxFill {
            dst: bytes(offset)?,
            loops,
            run: bytes(run)?,
            fill: fill.clone(),
            element: fill.element(self.dtype)?,
        }))
    }

    fn dim(&self, dim: usize) -> Result<u64> {
        self.dims.get(dim).copied().ok_or_else(|| {
            broken("dimension", "there is no such dimension")
                .with_expected(format!("a dimension below {}", self.dims.len()), dim)
        })
    }

    fn slice(mut self, dim: usize, start: u64, len: u64, step: u64) -> Result<Form> {
        let size = self.dim(dim)?;
        let last = len.saturating_sub(1).checked_mul(step).and_then(|last| last.checked_add(start));
        if step == 0 || start > size || (len > 0 && last.is_none_or(|last| last >= size)) {
            return Err(broken("slice", format!("slice leaves dimension {dim}"))
                .with_expected(format!("indices below {size}"), format!("{len} from {start} by {step}")));
        }
        if (start, len, step) == (0, size, 1) {
            return Ok(self);
        }
        self.dims[dim] = len;
        let mut failed = Ok(());
        self.boxes.retain(|placed| {
            placed.slice(dim, start, len, step).unwrap_or_else(|error| {
                failed = Err(error);
                false
            })
        });
        failed.map(|()| self)
    }

    fn view(self, dims: &[u64]) -> Result<Form> {
        let not_a_view = |form: &Form| {
            broken("view", "view does not split the dimensions it is given")
                .with_expected(format!("a split of {}", form.shape()), Shape::new(dims))
        };
        // The new dimensions of each old one.
        let mut groups: SmallVec<[&[u64]; 4]> = SmallVec::new();
        let mut left = dims;
        for &size in &self.dims {
            let (mut taken, mut product) = (0, 1u64);
            while taken == 0 || product < size {
                let Some(&dim) = left.get(taken) else { return Err(not_a_view(&self)) };
                product = product.saturating_mul(dim);
                taken += 1;
            }
            if product != size {
                return Err(not_a_view(&self));
            }
            let (group, rest) = left.split_at(taken);
            groups.push(group);
            left = rest;
        }
        if left.iter().any(|&dim| dim != 1) {
            return Err(not_a_view(&self));
        }
        let mut boxes = SmallVec::new();
        for placed in &self.boxes {
            let mut lens = Dims::new();
            let mut spots = SmallVec::new();
            let mut next = 0;
            let split = groups.iter().enumerate().all(|(dim, group)| {
                let axes = placed.axes(dim);
                let first = next;
                next += group.len();
                match (axes.len(), group) {
                    (1, _) => split(
                        placed.spots[axes.start],
                        placed.len(axes.start),
                        self.dims[dim],
                        group,
                        &mut lens,
                        &mut spots,
                    )
                    .then(|| spots.iter_mut().rev().zip((first..next).rev()).for_each(|(spot, dim)| spot.dim = dim))
                    .is_some(),
                    (_, [_]) => {
                        lens.extend(axes.clone().map(|axis| placed.len(axis)));
                        spots.extend(axes.map(|axis| Spot { dim: first, ..placed.spots[axis] }));
                        true
                    }
                    _ => false,
                }
            });
            lens.extend(left.iter().copied());
            spots.extend((next..).take(left.len()).map(Spot::start));
            let what = match &placed.what {
                _ if !split => None,
                What::Leaf(leaf) => leaf.clone().view(&lens).map(What::Leaf),
                What::Fill(fill, _) => Some(What::Fill(fill.clone(), lens)),
            };
            boxes.push(Placed { spots, what: what.ok_or_else(|| not_a_view(&self))? });
        }
        Ok(Form { dtype: self.dtype, dims: Dims::from_slice(dims), boxes })
    }

    /// Takes neighbouring dimensions as one.
    fn merge(mut self, dim: usize, count: usize) -> Result<Form> {
        let Some(merged) = dim.checked_add(count).filter(|_| count > 0).and_then(|end| self.dims.get(dim..end)) else {
            return Err(broken("merge", "there are no such dimensions to take as one")
                .with_expected(format!("some of {}", self.dims.len()), format!("{count} from {dim} on")));
        };
        merged.iter().try_fold(1u64, |size, &len| size.checked_mul(len.max(1))).ok_or_else(|| too_large(merged))?;
        // Indices of the one dimension from one index of each of them to the next.
        let mut strides: Dims = smallvec![1; count];
        for at in (1..count).rev() {
            // Nothing has a place where a dimension is empty, but steps stay steps.
            strides[at - 1] = strides[at] * merged[at].max(1);
        }
        let size = merged.iter().product();
        for Spot { dim: at, first, step } in self.boxes.iter_mut().flat_map(|placed| &mut placed.spots) {
            if let Some(stride) = at.checked_sub(dim).and_then(|within| strides.get(within)) {
                (*at, *first, *step) = (dim, *first * stride, *step * stride);
            } else if *at > dim {
                *at -= count - 1;
            }
        }
        self.dims.drain(dim + 1..dim + count);
        self.dims[dim] = size;
        Ok(self)
    }

    fn permute(mut self, order: &[usize]) -> Result<Form> {
        if order.len() != self.dims.len() {
            return Err(broken("permute", "tensor has another number of dimensions")
                .with_expected(format!("{} for {order:?}", order.len()), self.dims.len()));
        }
        for placed in &mut self.boxes {
            let axes: SmallVec<[usize; 4]> = order.iter().flat_map(|&dim| placed.axes(dim)).collect();
            let new = |dim: usize| order.iter().position(|&old| old == dim).unwrap_or(dim);
            let moved = axes.iter().map(|&axis| Spot { dim: new(placed.spots[axis].dim), ..placed.spots[axis] });
            placed.spots = moved.collect();
            match &mut placed.what {
                What::Leaf(leaf) => leaf.permute(&axes),
                What::Fill(_, lens) => *lens = axes.iter().map(|&axis| lens[axis]).collect(),
            }
        }
        self.dims = order.iter().map(|&dim| self.dims[dim]).collect();
        Ok(self)
    }

    fn cast(mut self, to: Dtype) -> Result<Form> {
        for placed in &mut self.boxes {
            match &mut placed.what {
                What::Leaf(leaf) => *leaf = leaf.clone().cast(to)?,
                What::Fill(fill, _) => *fill = fill.cast(self.dtype, to)?,
            }
        }
        self.dtype = to;
        Ok(self)
    }

    /// The forms behind each other in a dimension.
    fn concat(dim: usize, forms: Vec<Form>) -> Result<Form> {
        let mut forms = forms.into_iter();
        let Some(mut whole) = forms.next() else { return Err(broken("concat", "nothing is put together")) };
        whole.dim(dim)?;
        for form in forms {
            let others = |form: &Form| {
                form.dims.iter().enumerate().filter(|(at, _)| *at != dim).map(|(_, &len)| len).collect::<Dims>()
            };
            if form.dims.len() != whole.dims.len() || others(&form) != others(&whole) {
                return Err(broken("concat", format!("parts differ in more than dimension {dim}"))
                    .with_expected(whole.shape(), form.shape()));
            }
            whole.same_dtype(&form)?;
            let end = whole.dims[dim];
            whole.dims[dim] = end.checked_add(form.dims[dim]).ok_or_else(|| too_large(&[end, form.dims[dim]]))?;
            whole.boxes.extend(form.boxes.into_iter().map(|mut placed| {
                let axis = placed.axes(dim).start;
                placed.spots[axis].first += end;
                placed
            }));
        }
        Ok(whole)
    }

    /// The same with a new outermost dimension of 1.
    fn in_a_stack(mut self) -> Form {
        self.dims.insert(0, 1);
        for placed in &mut self.boxes {
            placed.spots.iter_mut().for_each(|spot| spot.dim += 1);
            placed.spots.insert(0, Spot::start(0));
            match &mut placed.what {
                What::Leaf(leaf) => leaf.insert_outermost(),
                What::Fill(_, lens) => lens.insert(0, 1),
            }
        }
        self
    }

    fn same_dtype(&self, other: &Form) -> Result<()> {
        if self.dtype == other.dtype {
            return Ok(());
        }
        Err(broken("concat", "parts have different types").with_expected(self.dtype, other.dtype))
    }

    fn pad(self, dim: usize, to: u64, fill: &Fill) -> Result<Form> {
        let size = self.dim(dim)?;
        if to < size {
            return Err(broken("pad", format!("dimension {dim} is larger than what it is padded to"))
                .with_expected(format!("at most {to}"), size));
        }
        let mut dims = self.dims.clone();
        dims[dim] = to - size;
        let tail = Form::filled(self.dtype, dims, fill.clone());
        Form::concat(dim, vec![self, tail])
    }

    /// Each index of a dimension `times` times, one after the other.
    fn repeat(mut self, dim: usize, times: u64) -> Result<Form> {
        let needed = times.saturating_mul(self.boxes.len() as u64);
        if needed > UNROLL_MAX || times == 0 {
            return Err(broken("repeat", "too many repetitions").with_expected(format!("1 to {UNROLL_MAX}"), needed));
        }
        let size = self.dim(dim)?;
        self.dims[dim] = size.checked_mul(times).ok_or_else(|| too_large(&[size, times]))?;
        let nth = |placed: &Placed, nth: u64| {
            let mut placed = placed.clone();
            let axes = placed.axes(dim);
            placed.spots[axes.clone()].iter_mut().for_each(|spot| {
                spot.first *= times;
                spot.step *= times;
            });
            placed.spots[axes.start].first += nth;
            placed
        };
        self.boxes = self.boxes.iter().flat_map(|placed| (0..times).map(move |at| nth(placed, at))).collect();
        Ok(self)
    }

    fn cut_into(&mut self, parts: u64) {
        for placed in &mut self.boxes {
            if let What::Leaf(leaf) = &mut placed.what {
                leaf.parts *= parts;
            }
        }
    }
}

impl Placed {
    fn leaf(&self) -> Option<&Leaf> {
        match &self.what {
            What::Leaf(leaf) => Some(leaf),
            What::Fill(..) => None,
        }
    }

    /// Its axes that are of a dimension of the destination: at least one.
    fn axes(&self, dim: usize) -> Range<usize> {
        if self.spots.get(dim).is_some_and(|spot| spot.dim == dim)
            && self.spots.get(dim + 1).is_none_or(|next| next.dim > dim)
        {
            // As in most boxes.
            let before = self.spots[..dim].iter().rev().take_while(|spot| spot.dim == dim).count();
            return dim - before..dim + 1;
        }
        let start = self.spots.partition_point(|spot| spot.dim < dim);
        start..self.spots.partition_point(|spot| spot.dim <= dim)
    }

    /// Its indices on an axis.
    fn len(&self, axis: usize) -> u64 {
        match &self.what {
            What::Leaf(leaf) => leaf.len(axis),
            What::Fill(_, lens) => lens[axis],
        }
    }

    fn narrow(&mut self, axis: usize, start: u64, len: u64, step: u64) {
        match &mut self.what {
            What::Leaf(leaf) => leaf.narrow(axis, start, len, step),
            What::Fill(_, lens) => lens[axis] = len,
        }
    }

    /// What it has of a slice of the destination; false if nothing.
    fn slice(&mut self, dim: usize, start: u64, len: u64, step: u64) -> Result<bool> {
        let axes = self.axes(dim);
        let axis = axes.start;
        let count = self.len(axis);
        let (taken, what) = match axes.len() {
            1 => (self.spots[axis].meet(count, start, len, step), "slice with a step of what is repeated"),
            _ => {
                let inner = axis + 1..axes.end;
                let first = self.spots[inner.clone()].iter().map(|spot| spot.first).sum();
                let span = inner.map(|axis| self.len(axis).saturating_sub(1) * self.spots[axis].step).sum::<u64>() + 1;
                (self.spots[axis].meet_whole(count, first, span, start, len, step), "slice inside of what was merged")
            }
        };
        let taken = taken.ok_or_else(|| broken("slice", what).with_expected("whole ones, by a step of 1", step))?;
        let Some((from, every, count, spot)) = taken else { return Ok(false) };
        self.narrow(axis, from, count, every);
        self.spots[axis] = spot;
        Ok(true)
    }
}

impl Spot {
    fn start(dim: usize) -> Spot {
        Spot { dim, first: 0, step: 1 }
    }

    /// The same as [`meet`](Spot::meet), for indices each of which stands for a span of them, from `inner` after it on: of
    /// these either all are taken or none.
    fn meet_whole(self, count: u64, inner: u64, span: u64, start: u64, len: u64, step: u64) -> Option<Option<Met>> {
        let Spot { dim, first, step: every } = self;
        if step != 1 || count == 0 || len == 0 {
            return (step == 1).then_some(None);
        }
        let at = |index: u64| first + inner + index * every;
        let from = start.saturating_sub(first + inner).div_ceil(every).min(count);
        let until = (start + len).saturating_sub(first + inner).div_ceil(every).min(count);
        let is_clean =
            (from == 0 || at(from - 1) + span <= start) && (until == from || at(until - 1) + span <= start + len);
        // Offsets of all axes are added: this one's takes the others' before the start of the slice.
        let offset = |from: u64| (at(from) - start).checked_sub(inner);
        if !is_clean || from == until {
            return is_clean.then_some(None);
        }
        let first = offset(from)?;
        Some(Some((from, 1, until - from, Spot { dim, first, step: every })))
    }

    /// Which of `count` indices that lie here are among `len` from `start` on, every `step`-th: the first one, from one
    /// to the next, how many, and where they lie among those. `None` inside if there are none, outside if both have a
    /// step.
    fn meet(self, count: u64, start: u64, len: u64, step: u64) -> Option<Option<Met>> {
        if count == 0 || len == 0 {
            // What has no elements stays, with its place.
            return Some((count == 0 && len == 0).then_some((0, 1, 0, Spot::start(self.dim))));
        }
        if step == 1 {
            let from = start.saturating_sub(self.first).div_ceil(self.step);
            let until = (start + len).saturating_sub(self.first).div_ceil(self.step).min(count);
            let spot = |from: u64| Spot { first: self.first + from * self.step - start, ..self };
            return Some((from < until).then(|| (from, 1, until - from, spot(from))));
        }
        if self.step != 1 {
            return None;
        }
        let from = self.first.saturating_sub(start).div_ceil(step);
        let until = (self.first + count).saturating_sub(start).div_ceil(step).min(len);
        Some(
            (from < until)
                .then(|| (start + from * step - self.first, step, until - from, Spot { first: from, step: 1, ..self })),
        )
    }
}

/// Which indices meet a slice: the first one, from one to the next, how many, and where they lie then.
type Met = (u64, u64, u64, Spot);

/// Splits what a box has of a dimension of `size` along the dimensions of `group`, whose product that is. False if it
/// is no box then.
fn split(spot: Spot, len: u64, size: u64, group: &[u64], lens: &mut Dims, spots: &mut SmallVec<[Spot; 4]>) -> bool {
    if let [_] = group {
        lens.push(len);
        spots.push(spot);
        return true;
    }
    let Spot { mut first, step, dim } = spot;
    if step != 1 {
        return false;
    }
    let mut inner = size;
    for (at, &part) in group.iter().enumerate() {
        if at + 1 == group.len() {
            lens.push(len);
            spots.push(Spot { dim, first, step });
            return true;
        }
        inner = inner.checked_div(part).unwrap_or(0);
        if inner > 0 && first.is_multiple_of(inner) && len.is_multiple_of(inner) {
            lens.push(len / inner);
            spots.push(Spot { dim, first: first / inner, step });
            lens.extend(group[at + 1..].iter().copied());
            spots.extend(group[at + 1..].iter().map(|_| Spot::start(dim)));
            return true;
        }
        if inner == 0 || len == 0 || first / inner != (first + len - 1) / inner {
            return false;
        }
        lens.push(1);
        spots.push(Spot { dim, first: first / inner, step });
        first %= inner;
    }
    false
}

/// Of dimensions, or what would become one.
fn too_large(dims: &[u64]) -> Error {
    broken("shape", "destination is too large").with_expected(format!("less than {} bits", u64::MAX), Shape::new(dims))
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
