//! Proves a plan before anything is read: every destination byte written once, every source range inside its tensor,
//! and every tensor covered by the ranks together as often as its rules declare. All of it by arithmetic on
//! descriptors; nothing is taken from the code that made them.

use rayon::prelude::*;
use smallvec::SmallVec;

use super::cover::{Strided, Times, cover};
use super::uses::Uses;
use super::{BoxCopy, BoxFill, Dest, RankPlan};
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
            let pieces = uses.of(tensor).iter().map(|of| &ranks[of.rank.index()].pieces[of.piece as usize]);
            let mut set: SmallVec<[Strided; 8]> = pieces.map(|copy| copy.source(meta.start)).collect();
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
    let mut written: SmallVec<[Strided; 8]> = SmallVec::new();
    for copy in pieces {
        let meta = &checkpoint.tensors()[copy.tensor as usize];
        let inside = copy.src >= meta.start && last_source_byte(copy).is_some_and(|end| end <= meta.end);
        if !inside {
            return Err(broken("piece leaves its tensor", meta).with_bytes(meta.start, meta.end));
        }
        written.push(copy.destination());
    }
    written.extend(fills(rank, dest).iter().map(|fill| Strided::collapsed(fill.dst, &fill.loops, fill.run)));
    let what = |what: &str| match pieces.first() {
        Some(copy) => broken(what, &checkpoint.tensors()[copy.tensor as usize]),
        None => Error::new(ErrorKind::Audit, what),
    };
    if let [all] = &written[..]
        && all.loops.is_empty()
        && (all.start, all.run) == (0, dest.bytes)
    {
        return Ok(());
    }
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
