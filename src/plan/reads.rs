//! Extents -> reads: which bytes one request fetches, and the pieces that each rank takes from them.
//!
//! Reads are produced one at a time, so a plan never holds anything proportional to bytes or rows. How large they
//! are and where they may be cut depends on the engine and on the device and is therefore no part of the plan.

use smallvec::SmallVec;

use super::{BoxCopy, Consumer, Plan, ReadExtent};
use crate::cast::Cast;
use crate::extent::{Extent, Rank};
use crate::limits;
use crate::stride::{Loop, Loops, bytes_moved, source_span};

/// How extents are cut into reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cutting {
    /// Most bytes of a read that lands straight in a destination.
    pub(crate) chunk: u64,
    /// Most bytes of a read that is cut from a slot; more than one block of `alignment` and an element.
    pub(crate) cut_chunk: u64,
    /// Long reads are cut at multiples of this file offset, so that no block is read twice; 1 for buffered reads.
    pub(crate) alignment: u64,
    /// Whether reads may land straight in a destination; they are then also cut where the set of consumers changes.
    pub(crate) direct: bool,
    /// Most bytes of a read that is [exchanged](super::Exchange) with other ranks: all of them cut it alike, whatever
    /// their engines and devices.
    pub(crate) exchanged: u64,
}

impl Cutting {
    /// How reads that are exchanged in chunks of so many bytes are cut.
    pub(crate) fn of_exchange(exchanged: u64) -> Cutting {
        let alignment = limits::DIRECT_ALIGNMENT;
        Cutting { chunk: exchanged, cut_chunk: exchanged, alignment, direct: false, exchanged }
    }
}

/// One read: contiguous bytes of one file.
#[derive(Debug, Clone)]
pub(crate) struct ReadOp {
    /// The bytes that are needed (and those between two needed ranges that are not worth skipping).
    pub(crate) extent: Extent,
    /// Whether one consumer takes all of it contiguously, so that it can land there directly.
    pub(crate) direct: bool,
    /// Whether parts of it go to ranks of other processes.
    pub(crate) shared: bool,
    /// The extents it covers, as positions in the list of [`Reads`].
    first: usize,
    last: usize,
}

#[cfg(test)]
impl ReadOp {
    /// A read that is in no plan, for tests of engines.
    pub(crate) fn alone(extent: Extent, direct: bool) -> ReadOp {
        ReadOp { extent, direct, shared: false, first: 0, last: 0 }
    }
}

/// What one destination takes from one read. All numbers are bytes, as in a [`BoxCopy`].
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) rank: Rank,
    /// Position in [`RankPlan::dests`](super::RankPlan::dests).
    pub(crate) dest: u32,
    /// The first source byte, counted from the first byte of the read.
    pub(crate) src: u64,
    /// The first byte of the destination.
    pub(crate) dst: u64,
    pub(crate) loops: Loops,
    pub(crate) run: u64,
    pub(crate) cast: Option<Cast>,
}

impl Piece {
    /// Bytes of the destination that it fills.
    pub(crate) fn landed_bytes(&self) -> u64 {
        let bytes = bytes_moved(&self.loops, self.run);
        self.cast.map_or(bytes, |cast| cast.converted(bytes))
    }
}

/// The reads of one process, in the plan's order. Immutable: how far they were taken is the [`Cursor`]'s.
#[derive(Debug)]
pub(crate) struct Reads {
    plan: Plan,
    cutting: Cutting,
    extents: Vec<u32>,
}

/// How far the reads were taken.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cursor {
    /// Position in `Reads::extents`.
    at: usize,
    /// Which of the extent's ranges.
    range: u64,
    /// Bytes of that range already given out.
    done: u64,
}

impl Reads {
    /// The reads of the plan's extents for which `wanted` holds.
    pub(crate) fn new(plan: &Plan, cutting: Cutting, wanted: impl Fn(&ReadExtent) -> bool) -> Reads {
        let extents = (0..plan.extents().len() as u32).filter(|&position| wanted(&plan.extents()[position as usize]));
        Reads::of(plan, cutting, extents.collect())
    }

    /// The reads of the extents at these positions, ascending.
    pub(crate) fn of(plan: &Plan, cutting: Cutting, extents: Vec<u32>) -> Reads {
        Reads { plan: plan.clone(), cutting, extents }
    }

    /// The read at the cursor, and the cursor behind it.
    pub(crate) fn next(&self, cursor: &Cursor) -> Option<(ReadOp, Cursor)> {
        let mut cursor = cursor.clone();
        let op = cursor.take_next(self)?;
        Some((op, cursor))
    }

    /// How many reads there are, or `most` if there are more.
    pub(crate) fn count(&self, most: usize) -> usize {
        let mut cursor = Cursor::default();
        (0..most).take_while(|_| cursor.take_next(self).is_some()).count()
    }

    /// Appends what each destination takes from `op`; a direct read's first piece is the one it can land in.
    pub(crate) fn pieces(&self, op: &ReadOp, pieces: &mut Vec<Piece>) {
        for &position in &self.extents[op.first..=op.last] {
            let extent = &self.plan.extents()[position as usize];
            // Of a stripe, others read what its consumers want besides.
            let (from, to) = match extent.outer.is_empty() {
                true => (op.extent.start.max(extent.start), op.extent.end.min(extent.start + extent.run)),
                false => (op.extent.start, op.extent.end),
            };
            for consumer in self.plan.consumers(extent) {
                let copy = self.copy(consumer);
                let mut copies = SmallVec::<[BoxCopy; 4]>::new();
                clip(copy, from, to, &mut copies);
                pieces.extend(copies.into_iter().map(|copy| Piece {
                    rank: consumer.rank,
                    dest: consumer.dest,
                    src: copy.src - op.extent.start,
                    dst: copy.dst,
                    loops: copy.loops,
                    run: copy.run,
                    cast: copy.cast,
                }));
            }
        }
    }

    fn copy(&self, consumer: &Consumer) -> &BoxCopy {
        &self.plan.rank(consumer.rank).pieces[consumer.piece as usize]
    }

    fn extent(&self, at: usize) -> Option<&ReadExtent> {
        self.extents.get(at).map(|&position| &self.plan.extents()[position as usize])
    }

    /// How far from `from` the same consumers take every byte contiguously, if any does and it is far enough to be
    /// worth a read of its own; else how far the answer cannot change.
    fn same_consumers(&self, extent: &ReadExtent, from: u64, end: u64) -> (bool, u64) {
        let mut until = end;
        let mut inside = false;
        for consumer in self.plan.consumers(extent) {
            match run_at(self.copy(consumer), from) {
                RunAt::Inside(run_end) => {
                    inside = true;
                    until = until.min(run_end);
                }
                RunAt::Before(start) => until = until.min(start),
                RunAt::After => {}
            }
        }
        (inside && until - from >= limits::DIRECT_MIN, until)
    }

    /// Whether the reader of these two has anything else to read between them, whoever asks: what is exchanged is cut alike
    /// where all that it reads is listed and where that is all that is.
    fn reads_between(&self, first: usize, last: usize) -> bool {
        let (first, last) = (self.extents[first] as usize, self.extents[last] as usize);
        let between = self.plan.extents().get(first + 1..last).unwrap_or_default();
        between.iter().any(|extent| extent.reader == self.plan.extents()[last].reader)
    }

    /// How an extent is cut.
    fn cutting(&self, extent: &ReadExtent) -> Cutting {
        if self.plan.is_shared(extent) { Cutting::of_exchange(self.cutting.exchanged) } else { self.cutting }
    }

    /// Whether reads of it may land straight in a destination: long ones can, and nobody has its bytes converted, for of
    /// consumers whose runs hold a byte any may be the one in whose memory it lands.
    fn can_be_direct(&self, extent: &ReadExtent) -> bool {
        let copies = || self.plan.consumers(extent).iter().map(|consumer| self.copy(consumer));
        self.cutting.direct
            && !self.plan.is_shared(extent)
            && copies().any(|copy| copy.run >= limits::DIRECT_MIN)
            && copies().all(|copy| copy.cast.is_none())
    }

    /// `limit` or a little before it, so that no element is cut in two that is cast or permuted.
    fn whole_elements(&self, extent: &ReadExtent, limit: u64) -> u64 {
        if !self.plan.consumers(extent).iter().any(|consumer| self.copy(consumer).is_transformed()) {
            return limit;
        }
        limit - limit.saturating_sub(self.plan.tensor(extent.tensor).start) % self.element_bytes(extent)
    }

    fn element_bytes(&self, extent: &ReadExtent) -> u64 {
        u64::from(self.plan.tensor(extent.tensor).dtype.bits()).div_ceil(8)
    }
}

impl Plan {
    /// The first destination of these ranks, and its rank, with a piece that is neither contiguous nor wide rows: it is
    /// converted, permuted or cut finely.
    pub(crate) fn first_cut(&self, ranks: impl Iterator<Item = Rank>) -> Option<(Rank, u32)> {
        let is_cut = |piece: &BoxCopy| {
            let is_row = |inner: &Loop| inner.src_stride >= piece.run && inner.dst_stride >= piece.run;
            let wide = piece.loops.is_empty() || piece.run >= limits::NARROW_ROW;
            piece.cast.is_some() || piece.loops.len() > 1 || !wide || !piece.loops.iter().all(is_row)
        };
        ranks.into_iter().find_map(|rank| {
            let ranked = self.rank(rank);
            let pieces = |dest: &super::Dest| &ranked.pieces[dest.pieces.start as usize..dest.pieces.end as usize];
            let dest = ranked.dests.iter().position(|dest| pieces(dest).iter().any(is_cut))?;
            Some((rank, dest as u32))
        })
    }
}

impl Cursor {
    /// The position of its extent, and how many bytes of that were given out.
    pub(super) fn place(&self, reads: &Reads) -> (usize, u64) {
        let run = reads.extent(self.at).map_or(0, |extent| extent.run);
        (self.at, self.range * run + self.done)
    }

    /// The file range that the cursor is in.
    fn range(&self, extent: &ReadExtent) -> (u64, u64) {
        let mut start = extent.start;
        let mut index = self.range;
        for &(count, stride) in extent.outer.iter().rev() {
            start += (index % count) * stride;
            index /= count;
        }
        (start, start + extent.run)
    }

    /// Moves to `position` in the range that ends at `end`, and on to the next range if that is its end.
    fn move_to(&mut self, extent: &ReadExtent, position: u64) {
        let (start, end) = self.range(extent);
        self.done = position - start;
        if position == end {
            self.done = 0;
            self.range += 1;
            if self.range == extent.outer.iter().map(|&(count, _)| count).product::<u64>() {
                self.range = 0;
                self.at += 1;
            }
        }
    }

    fn take_next(&mut self, reads: &Reads) -> Option<ReadOp> {
        let extent = reads.extent(self.at)?;
        let shared = reads.plan.is_shared(extent);
        let Cutting { chunk, cut_chunk, alignment, .. } = reads.cutting(extent);
        let (range_start, range_end) = self.range(extent);
        let start = range_start + self.done;
        let (first, file) = (self.at, extent.file);
        let op = |end, direct, last| ReadOp { extent: Extent { file, start, end }, direct, shared, first, last };

        if reads.can_be_direct(extent) {
            let (direct, until) = reads.same_consumers(extent, start, range_end);
            if direct {
                // A remainder too small to be direct goes with the chunk before it.
                let end = if until - start < chunk + limits::DIRECT_MIN { until } else { start + chunk };
                self.move_to(extent, end);
                return Some(op(end, true, first));
            }
        }

        let limit = (start - start % alignment).saturating_add(cut_chunk);
        let mut end = start;
        let mut last = first;
        while let Some(extent) = reads.extent(self.at) {
            let (range_start, range_end) = self.range(extent);
            let position = range_start + self.done;
            let adjacent = extent.file == file
                && (end..limit).contains(&position)
                && !limits::is_skipped(position - end, range_end - position);
            let apart = || reads.plan.is_shared(extent) != shared || shared && reads.reads_between(last, self.at);
            if end > start && (!adjacent || apart()) {
                break;
            }
            let mut until = range_end;
            if reads.can_be_direct(extent) {
                let (direct, boundary) = reads.same_consumers(extent, position, range_end);
                if direct {
                    break;
                }
                until = boundary;
            }
            let mut limit = reads.whole_elements(extent, limit);
            if position == limit {
                if end > start {
                    break;
                }
                // An element that lies across the limit is a read of its own.
                limit += reads.element_bytes(extent);
            }
            end = until.min(limit);
            last = self.at;
            self.move_to(extent, end);
            if end == limit {
                break;
            }
        }
        Some(op(end, false, last))
    }
}

enum RunAt {
    /// The byte is in a run that ends here.
    Inside(u64),
    /// The next run starts here.
    Before(u64),
    /// No run follows.
    After,
}

/// Which run of `copy` a file position lies in.
fn run_at(copy: &BoxCopy, position: u64) -> RunAt {
    if position < copy.src {
        return RunAt::Before(copy.src);
    }
    let mut start = copy.src;
    let mut next = None;
    for (level, l) in copy.loops.iter().enumerate() {
        let step = ((position - start) / l.src_stride).min(l.count - 1);
        if step + 1 < l.count {
            next = Some(start + (step + 1) * l.src_stride);
        }
        start += step * l.src_stride;
        if position >= start + source_span(&copy.loops[level + 1..], copy.run) {
            return next.map_or(RunAt::After, RunAt::Before);
        }
    }
    if position < start + copy.run { RunAt::Inside(start + copy.run) } else { next.map_or(RunAt::After, RunAt::Before) }
}

/// Appends the parts of `copy` whose source lies in `from..to`: at most two partial steps for each loop, and one
/// strided copy of the whole ones. Elements that are cast must lie in it whole or not at all.
///
/// The loops' source strides nest (each is at least the span of the loops inside it), as slices of a row-major
/// tensor do.
fn clip(copy: &BoxCopy, from: u64, to: u64, out: &mut SmallVec<[BoxCopy; 4]>) {
    let span = source_span(&copy.loops, copy.run);
    let (start, end) = (copy.src, copy.src + span);
    if end <= from || start >= to {
        return;
    }
    if start >= from && end <= to {
        out.push(copy.clone());
        return;
    }
    let Some((&Loop { count, src_stride, dst_stride }, inner)) = copy.loops.split_first() else {
        let (start, end) = (start.max(from), end.min(to));
        out.push(BoxCopy {
            src: start,
            dst: copy.dst + copy.landed(start - copy.src),
            run: end - start,
            ..copy.clone()
        });
        return;
    };
    let step = |index: u64| BoxCopy {
        src: copy.src + index * src_stride,
        dst: copy.dst + index * dst_stride,
        loops: inner.into(),
        ..copy.clone()
    };
    let inner_span = source_span(inner, copy.run);
    // Steps touch from..to in touched_from..touched_to, and lie in it whole in whole_from..whole_to.
    let touched_from = if from >= start + inner_span { (from - start - inner_span) / src_stride + 1 } else { 0 };
    let touched_to = ((to - start - 1) / src_stride + 1).min(count);
    let whole_from = from.saturating_sub(start).div_ceil(src_stride);
    let whole_to = if to >= start + inner_span { ((to - start - inner_span) / src_stride + 1).min(count) } else { 0 };
    if whole_from >= whole_to {
        (touched_from..touched_to).for_each(|index| clip(&step(index), from, to, out));
        return;
    }
    (touched_from..whole_from).for_each(|index| clip(&step(index), from, to, out));
    let mut whole = step(whole_from);
    if whole_to - whole_from > 1 {
        whole.loops.insert(0, Loop { count: whole_to - whole_from, src_stride, dst_stride });
    }
    out.push(whole);
    (whole_to..touched_to).for_each(|index| clip(&step(index), from, to, out));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stride::for_each_run;

    fn bytes(copy: &BoxCopy) -> Vec<(u64, u64)> {
        let mut pairs = Vec::new();
        for_each_run(&copy.loops, copy.src, copy.dst, &mut |src, dst| {
            pairs.extend((0..copy.run).map(|i| (src + i, dst + i)));
        });
        pairs
    }

    fn boxes() -> Vec<BoxCopy> {
        let make = |loops: &[(u64, u64, u64)], run| BoxCopy {
            tensor: 0,
            src: 11,
            dst: 3,
            loops: loops
                .iter()
                .map(|&(count, src_stride, dst_stride)| Loop { count, src_stride, dst_stride })
                .collect(),
            run,
            cast: None,
        };
        vec![
            make(&[], 17),
            make(&[(5, 9, 4)], 4),
            make(&[(3, 40, 16), (4, 10, 4)], 4),
            make(&[(2, 100, 24), (3, 30, 8), (2, 9, 4)], 4),
            make(&[(2, 30, 50), (3, 8, 5)], 5),
        ]
    }

    #[test]
    fn clip_agrees_with_a_filter_over_bytes() {
        for copy in boxes() {
            let all = bytes(&copy);
            let end = copy.src + source_span(&copy.loops, copy.run) + 3;
            for from in 0..end {
                for to in from + 1..=end {
                    let mut clipped = SmallVec::new();
                    clip(&copy, from, to, &mut clipped);
                    let mut found: Vec<_> = clipped.iter().flat_map(bytes).collect();
                    let mut expected: Vec<_> =
                        all.iter().copied().filter(|&(src, _)| (from..to).contains(&src)).collect();
                    found.sort_unstable();
                    expected.sort_unstable();
                    assert_eq!(found, expected, "{copy:?} in {from}..{to}");
                }
            }
        }
    }

    #[test]
    fn run_at_agrees_with_a_search_over_runs() {
        for copy in boxes() {
            let mut runs = Vec::new();
            for_each_run(&copy.loops, copy.src, 0, &mut |src, _| runs.push((src, src + copy.run)));
            runs.sort_unstable();
            for position in 0..copy.src + source_span(&copy.loops, copy.run) + 3 {
                let inside = runs.iter().find(|r| r.0 <= position && position < r.1);
                let before = runs.iter().find(|r| r.0 > position);
                match (run_at(&copy, position), inside, before) {
                    (RunAt::Inside(end), Some(run), _) => assert_eq!(end, run.1),
                    (RunAt::Before(start), None, Some(run)) => assert_eq!(start, run.0),
                    (RunAt::After, None, None) => {}
                    (_, inside, before) => panic!("{copy:?} at {position}: {inside:?} {before:?}"),
                }
            }
        }
    }
}
