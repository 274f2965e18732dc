//! The strided loops of a copy: plain numbers that plans, staging and devices share.

use smallvec::SmallVec;

use crate::limits::{PITCH_MAX, RECTS_MAX};

/// The loops of a strided copy, outermost first.
pub type Loops = SmallVec<[Loop; 1]>;

/// One loop of a strided copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loop {
    /// How often.
    pub count: u64,
    /// Source bytes from one step to the next.
    pub src_stride: u64,
    /// Destination bytes from one step to the next.
    pub dst_stride: u64,
}

/// Calls `run` with the source and destination offset of each contiguous run, innermost loop fastest.
pub(crate) fn for_each_run(loops: &[Loop], src: u64, dst: u64, run: &mut impl FnMut(u64, u64)) {
    match loops {
        [] => run(src, dst),
        [Loop { count, src_stride, dst_stride }, inner @ ..] => {
            for step in 0..*count {
                for_each_run(inner, src + step * src_stride, dst + step * dst_stride, run);
            }
        }
    }
}

/// Source bytes from the first to the last byte that the loops touch.
pub(crate) fn source_span(loops: &[Loop], run: u64) -> u64 {
    loops.iter().map(|l| (l.count - 1) * l.src_stride).sum::<u64>() + run
}

/// Bytes that the loops move.
pub(crate) fn bytes_moved(loops: &[Loop], run: u64) -> u64 {
    loops.iter().map(|l| l.count).product::<u64>() * run
}

/// Whether a strided copy is few enough copies of rows, the only cut that a copy engine makes.
pub(crate) fn is_rows(loops: &[Loop], run: u64) -> bool {
    let Some((inner, outer)) = loops.split_last() else { return false };
    let pitches = [inner.src_stride, inner.dst_stride];
    let rects: u64 = outer.iter().map(|outer| outer.count).product();
    pitches.iter().all(|pitch| (run..=PITCH_MAX).contains(pitch)) && rects <= RECTS_MAX
}
