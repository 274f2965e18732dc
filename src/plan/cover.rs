//! Exact coverage of a tensor's bytes by strided copies, by arithmetic on their descriptors: how often each byte is
//! covered, without ever looking at single rows of a regular pattern.

use std::cmp::Reverse;

use smallvec::SmallVec;

use super::BoxCopy;
use crate::limits::UNROLL_MAX;

/// The source bytes of a copy: `start + sum(i * stride) .. + run`, loops outermost first with descending strides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Strided {
    pub(super) start: u64,
    pub(super) loops: SmallVec<[(u64, u64); 1]>,
    pub(super) run: u64,
    pub(super) times: Times,
}

/// How often bytes are covered, and how often they should be: the two are told apart so that one is held against the
/// other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Times {
    pub(super) are: u64,
    pub(super) should: u64,
}

/// Bytes that are covered equally often: `from..to`, and its repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Covered {
    /// The first byte of the first repetition.
    pub(super) from: u64,
    /// The byte after the last of the first repetition.
    pub(super) to: u64,
    /// How many such ranges there are.
    pub(super) repeats: u64,
    /// How often each of their bytes is covered; never for a gap.
    pub(super) times: Times,
}

impl Times {
    /// Once.
    pub(super) const ONE: Times = Times { are: 1, should: 0 };

    fn add(&mut self, other: Times) {
        self.are += other.are;
        self.should += other.should;
    }

    fn take(&mut self, other: Times) {
        self.are -= other.are;
        self.should -= other.should;
    }
}

impl Strided {
    /// The bytes of loops, outermost first, those that go on where the ones within them end as one.
    pub(super) fn collapsed(start: u64, outermost_first: &[(u64, u64)], mut run: u64) -> Strided {
        let mut loops = SmallVec::<[(u64, u64); 1]>::new();
        for &(count, stride) in outermost_first.iter().rev() {
            match loops.last_mut() {
                None if stride == run => run *= count,
                Some((inner, of)) if stride == *inner * *of => *inner *= count,
                _ => loops.push((count, stride)),
            }
        }
        loops.reverse();
        Strided { start, loops, run, times: Times::ONE }
    }

    fn is_like(&self, other: &Strided) -> bool {
        (self.start, self.run, &self.loops) == (other.start, other.run, &other.loops)
    }

    /// Bytes from the first to the last, gaps included.
    pub(super) fn span(&self) -> u64 {
        self.loops.iter().map(|&(count, stride)| (count - 1) * stride).sum::<u64>() + self.run
    }
}

impl BoxCopy {
    /// The source bytes, counted from byte `base` of the file: loops that only a permuted destination keeps apart are
    /// one.
    pub(super) fn source(&self, base: u64) -> Strided {
        let loops: SmallVec<[(u64, u64); 4]> = self.loops.iter().map(|inner| (inner.count, inner.src_stride)).collect();
        Strided::collapsed(self.src - base, &loops, self.run)
    }

    /// The destination bytes.
    pub(super) fn destination(&self) -> Strided {
        let mut loops: SmallVec<[(u64, u64); 4]> =
            self.loops.iter().map(|inner| (inner.count, inner.dst_stride)).collect();
        loops.sort_unstable_by_key(|&(_, stride)| Reverse(stride));
        Strided::collapsed(self.dst, &loops, self.landed(self.run))
    }
}

/// Calls `visit` for ranges that together are exactly `0..len`. All of `set` must lie in `0..len`.
///
/// `None` if the patterns are too irregular to be compared in bounded work.
pub(super) fn cover(set: SmallVec<[Strided; 8]>, len: u64, visit: &mut impl FnMut(Covered)) -> Option<()> {
    descend(set, 0, len, 1, visit)
}

fn descend(
    mut set: SmallVec<[Strided; 8]>,
    base: u64,
    len: u64,
    repeats: u64,
    visit: &mut impl FnMut(Covered),
) -> Option<()> {
    let Some(period) = set.iter().filter_map(|strided| strided.loops.first()).map(|&(_, stride)| stride).max() else {
        flat(&mut set, base, len, repeats, visit);
        return Some(());
    };
    let mut banded: SmallVec<[Band; 8]> = SmallVec::new();
    for strided in set {
        split(strided, period, &mut banded)?;
    }
    let rows = len.div_ceil(period);
    let mut edges: SmallVec<[u64; 8]> = banded.iter().flat_map(|band| [band.first, band.end]).collect();
    // The last row may be short; it then is a band of its own.
    edges.extend([0, rows, len / period]);
    edges.sort_unstable();
    edges.dedup();
    for edge in edges.windows(2) {
        let (first, end) = (edge[0], edge[1]);
        let active = banded.iter().filter(|band| band.first <= first && end <= band.end);
        let inner = active.map(|band| band.inner.clone()).collect();
        let width = period.min(len - first * period);
        descend(inner, base + first * period, width, repeats * (end - first), visit)?;
    }
    Some(())
}

/// The same bytes in each of the rows `first..end`.
struct Band {
    first: u64,
    end: u64,
    inner: Strided,
}

/// Cuts a pattern at the rows of `period` bytes.
fn split(strided: Strided, period: u64, into: &mut SmallVec<[Band; 8]>) -> Option<()> {
    let row = strided.start / period;
    let offset = strided.start % period;
    if offset + strided.span() <= period {
        into.push(Band { first: row, end: row + 1, inner: Strided { start: offset, ..strided } });
        return Some(());
    }
    let Some(&(count, stride)) = strided.loops.first() else {
        let mut push = |from: u64, to: u64| {
            if from < to {
                let first = from / period;
                let end = to.div_ceil(period);
                let run = if end - first > 1 { period } else { to - from };
                let inner = Strided { start: from % period, loops: SmallVec::new(), run, times: strided.times };
                into.push(Band { first, end, inner });
            }
        };
        let (from, to) = (strided.start, strided.start + strided.run);
        let (body, tail) = (from.next_multiple_of(period), to / period * period);
        push(from, body);
        push(body, tail);
        push(tail.max(body), to);
        return Some(());
    };
    let times = strided.times;
    let inner = Strided { start: offset, loops: SmallVec::from_slice(&strided.loops[1..]), run: strided.run, times };
    if stride == period && offset + inner.span() <= period {
        into.push(Band { first: row, end: row + count, inner });
        return Some(());
    }
    let per_row = period / stride;
    let regular = period.is_multiple_of(stride) && offset < stride && inner.span() + offset <= stride;
    if regular && count.is_multiple_of(per_row) {
        let mut inner = inner;
        inner.loops.insert(0, (per_row, stride));
        into.push(Band { first: row, end: row + count / per_row, inner });
        return Some(());
    }
    if count > UNROLL_MAX || into.len() as u64 > UNROLL_MAX {
        return None;
    }
    for i in 0..count {
        let start = strided.start + i * stride;
        split(Strided { start, loops: inner.loops.clone(), run: strided.run, times }, period, into)?;
    }
    Some(())
}

fn flat(set: &mut [Strided], base: u64, len: u64, repeats: u64, visit: &mut impl FnMut(Covered)) {
    if let Some(first) = set.first()
        && first.start == 0
        && first.run == len
        && set.iter().all(|strided| strided.is_like(first))
    {
        let mut times = Times::default();
        set.iter().for_each(|strided| times.add(strided.times));
        visit(Covered { from: base, to: base + len, repeats, times });
        return;
    }
    let mut ends: SmallVec<[(u64, Times); 8]> =
        set.iter().map(|strided| (strided.start + strided.run, strided.times)).collect();
    ends.sort_unstable_by_key(|&(end, _)| end);
    set.sort_unstable_by_key(|strided| strided.start);
    let (mut at, mut times, mut ended) = (0, Times::default(), 0);
    for (next, more) in set.iter().map(|strided| (strided.start, strided.times)).chain([(len, Times::default())]) {
        while ended < ends.len() && ends[ended].0 <= next {
            emit(&mut at, ends[ended].0, times, base, repeats, visit);
            times.take(ends[ended].1);
            ended += 1;
        }
        emit(&mut at, next, times, base, repeats, visit);
        times.add(more);
    }
}

fn emit(at: &mut u64, to: u64, times: Times, base: u64, repeats: u64, visit: &mut impl FnMut(Covered)) {
    if *at < to {
        visit(Covered { from: base + *at, to: base + to, repeats, times });
        *at = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs(start: u64, loops: &[(u64, u64)], run: u64) -> Strided {
        Strided { start, loops: SmallVec::from_slice(loops), run, times: Times::ONE }
    }

    fn covered(set: &[Strided], len: u64) -> Vec<Covered> {
        let mut seen = Vec::new();
        cover(set.iter().cloned().collect(), len, &mut |covered| seen.push(covered)).expect("regular");
        seen
    }

    #[test]
    fn columns_of_many_rows_are_a_few_ranges() {
        let rows = 1 << 40;
        let set: Vec<_> = (0..4).map(|rank| runs(rank * 8, &[(rows, 32)], 8)).collect();
        let seen = covered(&set, rows * 32);
        assert_eq!(seen.len(), 4);
        assert!(seen.iter().all(|range| range.times == Times::ONE && range.repeats == rows));
        let gap = covered(&set[1..], rows * 32);
        assert_eq!(gap[0], Covered { from: 0, to: 8, repeats: rows, times: Times::default() });
    }

    proptest! {
        #[test]
        fn equals_counting_every_byte(
            patterns in prop::collection::vec((0u64..40, 1u64..5, 0u64..4, 1u64..4, 0u64..3, 1u64..6), 0..6)
        ) {
            let set: Vec<Strided> = patterns.iter().map(|&(start, outer, gap, inner, hole, run)| {
                let stride = run + hole;
                let pitch = (inner - 1) * stride + run + gap;
                let loops: Vec<_> = [(outer, pitch), (inner, stride)].into_iter().filter(|&(c, _)| c > 1).collect();
                runs(start, &loops, run)
            }).collect();
            let len = set.iter().map(|strided| strided.start + strided.span()).max().unwrap_or(0) + 3;
            let mut count = vec![0u64; len as usize];
            for &(start, outer, gap, inner, hole, run) in &patterns {
                let stride = run + hole;
                let pitch = (inner - 1) * stride + run + gap;
                for o in 0..outer {
                    for i in 0..inner {
                        for byte in 0..run {
                            count[(start + o * pitch + i * stride + byte) as usize] += 1;
                        }
                    }
                }
            }
            let seen = covered(&set, len);
            prop_assert_eq!(seen.iter().map(|range| (range.to - range.from) * range.repeats).sum::<u64>(), len);
            let bytes: u64 = seen.iter().map(|range| (range.to - range.from) * range.repeats * range.times.are).sum();
            prop_assert_eq!(bytes, count.iter().sum::<u64>());
            let union: u64 =
                seen.iter().filter(|r| r.times.are > 0).map(|r| (r.to - r.from) * r.repeats).sum();
            prop_assert_eq!(union, count.iter().filter(|&&times| times > 0).count() as u64);
            for range in seen {
                for byte in range.from..range.to {
                    prop_assert_eq!(count[byte as usize], range.times.are);
                }
            }
        }
    }
}
