//! Proves a plan before anything is read: every destination byte written once, every source range inside its tensor,
//! and every tensor covered by the ranks together as often as its rules declare. All of it by arithmetic on
//! descriptors; nothing is taken from the code that made them.

use rayon::prelude::*;
use smallvec::SmallVec;

use super::cover::{Strided, Times, cover};
use super::uses::Uses;
use super::{BoxCopy, BoxFill, Dest, Loop, RankPlan};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::{Error, ErrorKind, Result};

/// What the rules declare of one tensor: bytes that the ranks together want, and how often.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Position of the tensor.
    pub(super) tensor: u32,
    /// The bytes, counted from the tensor's first; `times.should` says how often.
    pub(super) bytes: Strided,
    /// Whether others may be left out (the rule slices).
    pub(super) partial: bool,
}

/// Checks all ranks' partitions; `wanted` is sorted by tensor.
pub(super) fn audit(checkpoint: &Checkpoint, ranks: &[RankPlan], uses: &Uses, wanted: &[Wanted]) -> Result<()> {
    ranks.par_iter().try_for_each(|rank| {
        rank.dests.par_chunks(CHUNK).try_for_each(|dests| {
            let written = |dest| written_once(checkpoint, rank, dest).map_err(|error| error.with_rank(rank.rank));
            dests.iter().try_for_each(written)
        })
    })?;
    let of_tensors: Vec<&[Wanted]> = wanted.chunk_by(|a, b| a.tensor == b.tensor).collect();
    of_tensors.par_chunks(CHUNK).try_for_each(|chunk| {
        chunk.iter().try_for_each(|wanted| {
            let tensor = wanted[0].tensor;
            let meta = &checkpoint.tensors()[tensor as usize];
            let pieces = || uses.of(tensor).iter().map(|of| &ranks[of.rank.index()].pieces[of.piece as usize]);
            if let [wanted] = wanted
                && in_turn(pieces(), wanted, meta)
            {
                return Ok(());
            }
            let mut set: SmallVec<[Strided; 8]> = pieces().map(|copy| copy.source(meta.start)).collect();
            set.extend(wanted.iter().map(|wanted| wanted.bytes.clone()));
            covered(set, wanted.iter().any(|wanted| wanted.partial), meta)
        })
    })
}

/// The copies that fill a destination.
pub(super) fn pieces<'a>(rank: &'a RankPlan, dest: &Dest) -> &'a [BoxCopy] {
    &rank.pieces[dest.pieces.start as usize..dest.pieces.end as usize]
}

/// What of a destination no tensor fills.
pub(super) fn fills<'a>(rank: &'a RankPlan, dest: &Dest) -> &'a [BoxFill] {
    &rank.fills[dest.fills.start as usize..dest.fills.end as usize]
}

/// The pieces of a destination lie inside their tensors, and with its fills write each of its bytes once.
fn written_once(checkpoint: &Checkpoint, rank: &RankPlan, dest: &Dest) -> Result<()> {
    let pieces = pieces(rank, dest);
    if let [copy] = pieces
        && fills(rank, dest).is_empty()
        && is_dense(copy, dest.bytes)
        && is_inside(copy, &checkpoint.tensors()[copy.tensor as usize])
    {
        return Ok(());
    }
    let mut written: SmallVec<[Strided; 8]> = SmallVec::new();
    for copy in pieces {
        let meta = &checkpoint.tensors()[copy.tensor as usize];
        if !is_inside(copy, meta) {
            return Err(broken("piece leaves its tensor", meta).with_bytes(meta.start, meta.end));
        }
        written.push(copy.destination());
    }
    written.extend(fills(rank, dest).iter().map(|fill| Strided::collapsed(fill.dst, &fill.loops, fill.run)));
    let what = |what: &str| match pieces.first() {
        Some(copy) => broken(what, &checkpoint.tensors()[copy.tensor as usize]),
        None => Error::new(ErrorKind::Audit, what),
    };
    if let Some(outside) = written.iter().find(|bytes| bytes.end().is_none_or(|end| end > dest.bytes)) {
        return Err(what("piece leaves its destination").with_expected(dest.bytes, format!("{outside:?}")));
    }
    let mut wrong = None;
    let regular = cover(written, dest.bytes, &mut |range| {
        if range.times.are != 1 {
            wrong.get_or_insert(range);
        }
    });
    if regular.is_none() {
        return Err(what("pieces of a destination are too irregular to be proved"));
    }
    match wrong {
        None => Ok(()),
        Some(range) => {
            let kind = if range.times.are == 0 { "gap in a destination" } else { "destination bytes written twice" };
            let found = format!("bytes {}..{} {} times", range.from, range.to, range.times.are);
            Err(what(kind).with_expected("each byte once", found))
        }
    }
}

/// Whether a copy writes bytes `0..bytes` of a destination from first to last: what most destinations are, shown
/// without any list of patterns.
fn is_dense(copy: &BoxCopy, bytes: u64) -> bool {
    let dense = copy.loops.iter().rev().try_fold(copy.landed(copy.run), |dense, inner| {
        if inner.dst_stride == dense { dense.checked_mul(inner.count) } else { None }
    });
    copy.dst == 0 && dense == Some(bytes)
}

fn is_inside(copy: &BoxCopy, meta: &TensorMeta) -> bool {
    copy.src >= meta.start && last_source_byte(copy).is_some_and(|end| end <= meta.end)
}

/// Whether pieces take all of a tensor in turn, as often as it is wanted: equal parts of equal rows, each part where the
/// one before it ends, some of them several times, and all of them once or more. That is what shards and whole tensors
/// are; whatever else may be right is left to [`cover`].
fn in_turn<'a>(mut pieces: impl Iterator<Item = &'a BoxCopy>, wanted: &Wanted, meta: &TensorMeta) -> bool {
    let Strided { start: 0, loops, run, times: Times { should, .. } } = &wanted.bytes else { return false };
    let Some(first) = pieces.next().filter(|_| loops.is_empty() && *run == meta.bytes()) else { return false };
    let (rows, width) = match first.loops[..] {
        [] => (1, *run),
        [Loop { count, src_stride, .. }] => (count, src_stride),
        _ => return false,
    };
    if rows.checked_mul(width) != Some(*run) || first.src != meta.start {
        return false;
    }
    // Equal neighbours so far, and what the first part and the rounds had of them.
    let (mut same, mut each, mut rounds) = (1, None, 1);
    let (mut src, mut end) = (first.src, first.src + first.run);
    for copy in pieces {
        let in_rows = match copy.loops[..] {
            [] => rows == 1,
            [Loop { count, src_stride, .. }] => (count, src_stride) == (rows, width),
            _ => false,
        };
        if !in_rows {
            return false;
        }
        if (copy.src, copy.src + copy.run) == (src, end) {
            same += 1;
            continue;
        }
        if *each.get_or_insert(same) != same {
            return false;
        }
        match copy.src {
            next if next == end => {}
            next if next == meta.start && end == meta.start + width => rounds += 1,
            _ => return false,
        }
        (same, src, end) = (1, copy.src, copy.src + copy.run);
    }
    each.unwrap_or(same) == same && end == meta.start + width && same * rounds == *should
}

/// The byte after the last source byte; `None` on overflow or an empty loop.
fn last_source_byte(copy: &BoxCopy) -> Option<u64> {
    copy.loops.iter().try_fold(copy.src.checked_add(copy.run)?, |end, inner| {
        end.checked_add(inner.count.checked_sub(1)?.checked_mul(inner.src_stride)?)
    })
}

impl Strided {
    /// The byte after the last; `None` on overflow or an empty loop.
    fn end(&self) -> Option<u64> {
        self.loops.iter().try_fold(self.start.checked_add(self.run)?, |end, &(count, stride)| {
            end.checked_add(count.checked_sub(1)?.checked_mul(stride)?)
        })
    }
}

fn covered(set: SmallVec<[Strided; 8]>, partial: bool, meta: &TensorMeta) -> Result<()> {
    let mut wrong = None;
    let regular = cover(set, meta.bytes(), &mut |range| {
        let Times { are, should } = range.times;
        if are != should || should == 0 && !partial {
            wrong.get_or_insert(range);
        }
    });
    if regular.is_none() {
        return Err(broken("pieces are too irregular to be proved", meta).with_bytes(meta.start, meta.end));
    }
    match wrong {
        None => Ok(()),
        Some(range) => {
            let Times { are, should } = range.times;
            let gap = are < should || should == 0;
            let what = if gap { "gap: no rank gets some bytes" } else { "overlap between ranks" };
            Err(broken(what, meta)
                .with_bytes(meta.start + range.from, meta.start + range.to)
                .with_expected(format!("{} times", should.max(1)), format!("{are} times")))
        }
    }
}

fn broken(message: &str, meta: &TensorMeta) -> Error {
    Error::new(ErrorKind::Audit, message).with_tensor(meta.name.as_str())
}

/// Parameters that one task takes: enough to make its start cheap.
pub(super) const CHUNK: usize = 2048;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::Dtype;
    use crate::extent::FileId;
    use crate::shape::Shape;

    const START: u64 = 64;

    fn meta(bytes: u64) -> TensorMeta {
        let (name, shape) = ("w".into(), Shape::new(&[bytes]));
        TensorMeta { name, file: FileId(0), dtype: Dtype::U8, shape, start: START, end: START + bytes }
    }

    /// Bytes `from..from + run` of each of so many rows.
    fn piece(rows: u64, width: u64, from: u64, run: u64) -> BoxCopy {
        let rows = Loop { count: rows, src_stride: width, dst_stride: run };
        let loops = std::iter::once(rows).filter(|rows| rows.count > 1 && run < width).collect();
        let run = if rows.count > 1 && run == width { rows.count * run } else { run };
        BoxCopy { tensor: 0, src: START + from, dst: 0, loops, run, cast: None }
    }

    /// What both ways say of pieces of a tensor that should be held so often.
    fn judged(pieces: &[BoxCopy], bytes: u64, should: u64) -> (bool, bool) {
        let meta = meta(bytes);
        let whole = Strided { start: 0, loops: SmallVec::new(), run: bytes, times: Times { are: 0, should } };
        let wanted = Wanted { tensor: 0, bytes: whole.clone(), partial: false };
        let mut set: SmallVec<[Strided; 8]> = pieces.iter().map(|copy| copy.source(START)).collect();
        set.push(whole);
        (in_turn(pieces.iter(), &wanted, &meta), covered(set, false, &meta).is_ok())
    }

    #[test]
    fn shards_and_whole_tensors_are_proved_in_turn() {
        for rows in [1, 5] {
            let parts = |times: usize| -> Vec<BoxCopy> {
                (0..4).flat_map(|part| vec![piece(rows, 16, part * 4, 4); times]).collect()
            };
            assert_eq!(judged(&parts(1), rows * 16, 1), (true, true));
            assert_eq!(judged(&parts(2), rows * 16, 2), (true, true));
            let again = [parts(2), parts(2)].concat();
            assert_eq!(judged(&again, rows * 16, 4), (true, true));
            assert_eq!(judged(&again, rows * 16, 2), (false, false));
            assert_eq!(judged(&again[..12], rows * 16, 4), (false, false));
            assert_eq!(judged(&parts(1)[1..], rows * 16, 1), (false, false));
            let whole = vec![piece(rows, 16, 0, 16); 3];
            assert_eq!(judged(&whole, rows * 16, 3), (true, true));
            assert_eq!(judged(&whole, rows * 16, 2), (false, false));
        }
    }

    proptest! {
        #[test]
        fn what_is_proved_in_turn_is_covered(
            rows in 1u64..3, should in 1u64..4, parts in prop::collection::vec((0u64..4, 1u64..4), 0..7)
        ) {
            let pieces: Vec<BoxCopy> =
                parts.iter().map(|&(from, run)| piece(rows, 4, from, run.min(4 - from))).collect();
            let (in_turn, covered) = judged(&pieces, rows * 4, should);
            prop_assert!(covered || !in_turn, "{pieces:?}");
        }
    }
}
