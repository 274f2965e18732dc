//! Proves a plan before anything is read: every destination byte written once, every source range inside its tensor,
//! and every tensor covered by the ranks together as often as its rule declares. All of it by arithmetic on
//! descriptors; nothing is taken from the code that made them.

use std::ops::Range;

use rayon::prelude::*;
use smallvec::SmallVec;

use super::cover::{Strided, cover};
use super::{BoxCopy, Dest, RankPlan};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// How often the ranks together must cover a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Declared {
    /// Position of the parameter that the tensor becomes.
    pub(super) param: u32,
    /// Position of the tensor.
    pub(super) tensor: u32,
    /// Position of the rule that places it.
    pub(super) rule: u32,
    /// How often each byte is wanted.
    pub(super) times: u32,
    /// Whether bytes may be left out (the rule slices).
    pub(super) partial: bool,
}

/// Checks all ranks' partitions; `declared` is sorted by parameter and has an entry for each that has a source.
pub(super) fn audit(checkpoint: &Checkpoint, ranks: &[RankPlan], declared: &[Declared]) -> Result<()> {
    ranks.par_iter().try_for_each(|rank| {
        for dest in &rank.dests {
            written_once(checkpoint, rank, dest).map_err(|error| error.with_rank(rank.rank))?;
        }
        Ok::<(), Error>(())
    })?;
    declared.par_chunks(CHUNK).try_for_each(|chunk| {
        for_each_param(ranks, chunk, |declared, holders| {
            let meta = &checkpoint.tensors()[declared.tensor as usize];
            let mut set: SmallVec<[Strided; 8]> = SmallVec::new();
            for &(rank, dest) in holders {
                let rank = &ranks[rank.index()];
                for copy in pieces(rank, &rank.dests[dest as usize]) {
                    if copy.tensor != declared.tensor {
                        return Err(broken("piece comes from another tensor", meta));
                    }
                    set.push(copy.source(meta.start));
                }
            }
            covered(set, declared, meta)
        })
    })
}

/// Calls `visit` for each entry of `declared` (sorted by parameter) with the ranks that hold it and their
/// destinations' positions.
pub(super) fn for_each_param(
    ranks: &[RankPlan],
    declared: &[Declared],
    mut visit: impl FnMut(&Declared, &[(Rank, u32)]) -> Result<()>,
) -> Result<()> {
    let Some(first) = declared.first() else { return Ok(()) };
    let mut cursors: SmallVec<[usize; 8]> =
        ranks.iter().map(|rank| rank.dests.partition_point(|dest| dest.param < first.param)).collect();
    let mut holders: SmallVec<[(Rank, u32); 8]> = SmallVec::new();
    for entry in declared {
        holders.clear();
        for (rank, cursor) in ranks.iter().zip(&mut cursors) {
            while rank.dests.get(*cursor).is_some_and(|dest| dest.param < entry.param) {
                *cursor += 1;
            }
            if rank.dests.get(*cursor).is_some_and(|dest| dest.param == entry.param) {
                holders.push((rank.rank, *cursor as u32));
            }
        }
        visit(entry, &holders)?;
    }
    Ok(())
}

/// The copies that fill a destination.
pub(super) fn pieces<'a>(rank: &'a RankPlan, dest: &Dest) -> &'a [BoxCopy] {
    let Range { start, end } = dest.pieces;
    &rank.pieces[start as usize..end as usize]
}

/// The pieces of a destination lie inside their tensors and tile the destination exactly.
fn written_once(checkpoint: &Checkpoint, rank: &RankPlan, dest: &Dest) -> Result<()> {
    let pieces = pieces(rank, dest);
    let mut written: SmallVec<[(u64, u64); 4]> = SmallVec::new();
    for copy in pieces {
        let meta = &checkpoint.tensors()[copy.tensor as usize];
        let inside = copy.src >= meta.start && last_source_byte(copy).is_some_and(|end| end <= meta.end);
        if !inside {
            return Err(broken("piece leaves its tensor", meta).with_bytes(meta.start, meta.end));
        }
        let Some(bytes) = dense_bytes(copy) else {
            return Err(broken("piece does not fill a dense range", meta).with_bytes(meta.start, meta.end));
        };
        written.push((copy.dst, bytes));
    }
    written.sort_unstable();
    let mut end = 0;
    for &(start, bytes) in &written {
        if start != end {
            let what = if start > end { "gap in a destination" } else { "destination bytes written twice" };
            return Err(tiled(checkpoint, pieces, what).with_expected(end, start));
        }
        end += bytes;
    }
    if end != dest.bytes {
        return Err(tiled(checkpoint, pieces, "destination is not filled").with_expected(dest.bytes, end));
    }
    Ok(())
}

fn tiled(checkpoint: &Checkpoint, pieces: &[BoxCopy], what: &str) -> Error {
    match pieces.first() {
        Some(copy) => broken(what, &checkpoint.tensors()[copy.tensor as usize]),
        None => Error::new(ErrorKind::Audit, what),
    }
}

/// The byte after the last source byte; `None` on overflow or an empty loop.
fn last_source_byte(copy: &BoxCopy) -> Option<u64> {
    copy.loops.iter().try_fold(copy.src.checked_add(copy.run)?, |end, inner| {
        end.checked_add(inner.count.checked_sub(1)?.checked_mul(inner.src_stride)?)
    })
}

/// The bytes written, if they are one range without overlap in whatever order; else `None`.
fn dense_bytes(copy: &BoxCopy) -> Option<u64> {
    let mut loops: SmallVec<[(u64, u64); 5]> = copy.loops.iter().map(|inner| (inner.dst_stride, inner.count)).collect();
    loops.sort_unstable();
    loops.iter().try_fold(copy.landed(copy.run), |filled, &(stride, count)| {
        if stride == filled && count > 0 { filled.checked_mul(count) } else { None }
    })
}

fn covered(set: SmallVec<[Strided; 8]>, declared: &Declared, meta: &TensorMeta) -> Result<()> {
    let times = u64::from(declared.times);
    let mut wrong = None;
    let regular = cover(set, meta.bytes(), &mut |range| {
        if range.times != times && !(declared.partial && range.times == 0) {
            wrong.get_or_insert(range);
        }
    });
    if regular.is_none() {
        return Err(broken("pieces are too irregular to be proved", meta).with_bytes(meta.start, meta.end));
    }
    match wrong {
        None => Ok(()),
        Some(range) => {
            let what = if range.times < times { "gap: no rank gets some bytes" } else { "overlap between ranks" };
            Err(broken(what, meta)
                .with_bytes(meta.start + range.from, meta.start + range.to)
                .with_expected(format!("{times} times"), format!("{} times", range.times)))
        }
    }
}

fn broken(message: &str, meta: &TensorMeta) -> Error {
    Error::new(ErrorKind::Audit, message).with_tensor(meta.name.as_str())
}

/// Parameters that one task takes: enough to make its start cheap.
pub(super) const CHUNK: usize = 2048;
