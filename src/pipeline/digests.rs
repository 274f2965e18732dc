//! Digests of what a load moves, taken while the bytes are in a processor's cache: of what was read, placed by the declared
//! cut rather than by the copies that are made of it, and of what lies in the destinations after these.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use crate::extent::{Extent, Rank};
use crate::place::{Digest, Moved};
use crate::plan::{Factor, Piece, Plan};
use crate::stride::for_each_run;

/// The digests of all destinations of a load, in the making.
#[derive(Debug)]
pub(super) struct Digests {
    /// One list for each rank of the world; empty for those of other processes.
    ranks: Vec<Vec<Taken>>,
}

/// What was digested of one destination so far.
#[derive(Debug, Default)]
struct Taken {
    /// What it is of its tensor, looked up when its first bytes come; `None` if that is not plain.
    part: OnceLock<Option<Part>>,
    read: Sum,
    landed: Sum,
}

/// The digest of some bytes of a destination, and how many they are.
#[derive(Debug, Default)]
struct Sum {
    digest: AtomicU64,
    bytes: AtomicU64,
}

/// Indices of a tensor that are all of a destination, in their order and unconverted.
#[derive(Debug)]
struct Part {
    /// The tensor's bytes in its file.
    start: u64,
    end: u64,
    factors: SmallVec<[Factor; 4]>,
    element: u64,
}

/// Bytes in memory, as what part of a destination they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    address: *const u8,
    dst: u64,
    bytes: u64,
}

/// The last digest that a thread took for one read, which the next destination may need again.
pub(super) type Last = Option<(Run, u64)>;

impl Digests {
    /// Nothing yet of the destinations of `plan`.
    pub(super) fn new(plan: &Plan) -> Digests {
        let mut ranks: Vec<Vec<Taken>> = (0..plan.world().size()).map(|_| Vec::new()).collect();
        for &rank in plan.world().driven() {
            ranks[rank.index()].resize_with(plan.rank(rank).dests.len(), Taken::default);
        }
        Digests { ranks }
    }

    /// Digests what a read brought for the destinations of `pieces`. The read's needed bytes begin at `first`.
    ///
    /// # Safety
    /// The bytes of `extent` lie at `first`, initialised, and nobody writes them meanwhile.
    pub(super) unsafe fn read(&self, plan: &Plan, extent: Extent, first: *const u8, pieces: &[Piece]) -> Last {
        let mut dests: SmallVec<[(Rank, u32); 16]> = pieces.iter().map(|piece| (piece.rank, piece.dest)).collect();
        dests.sort_unstable();
        dests.dedup();
        let mut last = None;
        for (rank, dest) in dests {
            let taken = &self.ranks[rank.index()][dest as usize];
            let Some(part) = taken.part.get_or_init(|| Part::of(plan, rank, dest)) else { continue };
            let all = plan.rank(rank).dests[dest as usize].bytes;
            let within = |at: u64| at.clamp(part.start, part.end) - part.start;
            runs(
                &part.factors,
                part.element,
                [0, 0],
                [within(extent.start), within(extent.end)],
                &mut |src, dst, bytes| {
                    let address = first.wrapping_add((part.start + src - extent.start) as usize);
                    // SAFETY: the run lies in the extent.
                    unsafe { taken.read.add(Run { address, dst, bytes }, all, &mut last) };
                },
            );
        }
        last
    }

    /// Digests what lies where `piece` was copied to, or read; its destination begins at `address`.
    ///
    /// # Safety
    /// The piece's bytes of the destination are initialised, and nobody writes them meanwhile; nor has anybody since
    /// `last` was taken.
    pub(super) unsafe fn landed(&self, plan: &Plan, piece: &Piece, address: u64, last: &mut Last) {
        let taken = &self.ranks[piece.rank.index()][piece.dest as usize];
        // Without the other half of the comparison it is of no use.
        if !matches!(taken.part.get(), Some(Some(_))) {
            return;
        }
        let all = plan.rank(piece.rank).dests[piece.dest as usize].bytes;
        for_each_run(&piece.loops, 0, piece.dst, &mut |_, dst| {
            let address = std::ptr::with_exposed_provenance((address + dst) as usize);
            // SAFETY: the caller answers for all runs of the piece.
            unsafe { taken.landed.add(Run { address, dst, bytes: piece.run }, all, last) };
        });
    }

    /// What was digested, of the destinations all of whose bytes were.
    pub(super) fn taken(&self, plan: &Plan) -> Vec<Vec<Option<Moved>>> {
        let of_rank = |(index, dests): (usize, &Vec<Taken>)| {
            let sizes = plan.rank(Rank(index as u32)).dests.iter().map(|dest| dest.bytes);
            dests.iter().zip(sizes).map(|(taken, bytes)| taken.moved(bytes)).collect()
        };
        self.ranks.iter().enumerate().map(of_rank).collect()
    }
}

impl Taken {
    fn moved(&self, bytes: u64) -> Option<Moved> {
        Some(Moved { read: self.read.of_all(bytes)?, landed: self.landed.of_all(bytes) })
    }
}

impl Sum {
    /// Adds a run of a destination of `all` bytes, unless it ends or begins within a word of the digest.
    ///
    /// # Safety
    /// The run is initialised, and nobody writes it meanwhile; nor has anybody since `last` was taken.
    unsafe fn add(&self, run: Run, all: u64, last: &mut Last) {
        let Run { address, dst, bytes } = run;
        if !dst.is_multiple_of(WORD) || !(bytes.is_multiple_of(WORD) || dst + bytes == all) {
            return;
        }
        let digest = match last {
            Some((known, digest)) if *known == run => *digest,
            _ => {
                let mut digest = Digest::default();
                // SAFETY: the same duties.
                digest.add(dst, unsafe { std::slice::from_raw_parts(address, bytes as usize) });
                last.insert((run, digest.value())).1
            }
        };
        self.digest.fetch_add(digest, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The digest, if it is of so many bytes.
    fn of_all(&self, bytes: u64) -> Option<u64> {
        (self.bytes.load(Ordering::Relaxed) == bytes).then(|| self.digest.load(Ordering::Relaxed))
    }
}

impl Part {
    fn of(plan: &Plan, rank: Rank, dest: u32) -> Option<Part> {
        let boxes = plan.boxes(rank, dest as usize).ok()?;
        let leaf = boxes.only_leaf()?;
        let bits = u64::from(leaf.dtype.bits());
        if leaf.cast.is_some() || !leaf.order.is_sorted() || !bits.is_multiple_of(8) {
            return None;
        }
        let tensor = plan.tensor(leaf.tensor);
        Some(Part { start: tensor.start, end: tensor.end, factors: leaf.factors.clone(), element: bits / 8 })
    }
}

/// Bytes of a word of the digest.
const WORD: u64 = 8;

/// Shows which of bytes `from..to` of a row-major tensor are of a part of it, in runs: the first byte in the tensor and in
/// the part, and how many. `base` are the first bytes of what these factors stand for.
fn runs(factors: &[Factor], element: u64, base: [u64; 2], within: [u64; 2], show: &mut impl FnMut(u64, u64, u64)) {
    let ([src, dst], [from, to]) = (base, within);
    let mut show_part = |start: u64, to_dst: u64, bytes: u64| {
        let (first, end) = (start.max(from), (start + bytes).min(to));
        if first < end {
            show(first, to_dst + (first - start), end - first);
        }
    };
    let Some((factor, inner)) = factors.split_first() else { return show_part(src, dst, element) };
    let whole = |factor: &Factor| (factor.start, factor.len, factor.step) == (0, factor.size, 1);
    let inner_src = inner.iter().map(|factor| factor.size).product::<u64>() * element;
    let inner_dst = inner.iter().map(|factor| factor.len).product::<u64>() * element;
    let first = src + factor.start * inner_src;
    if factor.step == 1 && inner.iter().all(whole) {
        return show_part(first, dst, factor.len * inner_src);
    }
    if from >= to || inner_src == 0 {
        return;
    }
    // Indices whose bytes lie in the range, at least in part.
    let stride = factor.step * inner_src;
    let lowest = if from >= first + inner_src { (from - first - inner_src) / stride + 1 } else { 0 };
    for index in lowest..factor.len {
        let at = first + index * stride;
        if at >= to {
            break;
        }
        runs(inner, element, [at, dst + index * inner_dst], within, show);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(size: u64, start: u64, len: u64, step: u64) -> Factor {
        Factor { size, start, len, step }
    }

    #[test]
    fn runs_are_the_bytes_of_the_taken_indices() {
        for factors in [
            vec![],
            vec![factor(7, 2, 3, 1)],
            vec![factor(7, 1, 3, 2)],
            vec![factor(5, 0, 5, 1), factor(6, 3, 3, 1)],
            vec![factor(4, 1, 2, 2), factor(3, 0, 3, 1), factor(2, 1, 1, 1)],
            vec![factor(3, 0, 3, 1), factor(4, 2, 2, 1), factor(2, 0, 2, 1)],
            vec![factor(3, 0, 0, 1), factor(2, 0, 2, 1)],
        ] {
            // (byte of the tensor, byte of the part), by indices.
            let mut taken = vec![(0, 0)];
            for factor in &factors {
                taken = taken
                    .iter()
                    .flat_map(|&(src, dst)| {
                        let index =
                            move |at| (src * factor.size + factor.start + at * factor.step, dst * factor.len + at);
                        (0..factor.len).map(index)
                    })
                    .collect();
            }
            let element = 3;
            let taken: Vec<(u64, u64)> = taken
                .iter()
                .flat_map(|(src, dst)| (0..element).map(move |at| (src * element + at, dst * element + at)))
                .collect();
            let all = factors.iter().map(|factor| factor.size).product::<u64>() * element;
            for from in 0..=all {
                for to in from..=all {
                    let mut found = Vec::new();
                    runs(&factors, element, [0, 0], [from, to], &mut |src, dst, bytes| {
                        found.extend((0..bytes).map(|at| (src + at, dst + at)));
                    });
                    let expected: Vec<_> =
                        taken.iter().copied().filter(|&(src, _)| (from..to).contains(&src)).collect();
                    assert_eq!(found, expected, "{factors:?} in {from}..{to}");
                }
            }
        }
    }

    #[test]
    fn words_that_are_cut_leave_a_destination_undigested() {
        let bytes: Vec<u8> = (0..64).collect();
        let run = |dst: u64, bytes_: u64| Run { address: bytes[dst as usize..].as_ptr(), dst, bytes: bytes_ };
        let digest = |pieces: &[(u64, u64)]| {
            let sum = Sum::default();
            // SAFETY: all runs lie in the vector.
            pieces.iter().for_each(|&(dst, bytes)| unsafe { sum.add(run(dst, bytes), 61, &mut None) });
            sum.of_all(61)
        };
        assert_eq!(digest(&[(16, 45), (0, 16)]), Some(Digest::of(&bytes[..61])));
        assert_eq!(digest(&[(0, 12), (12, 49)]), None);
        assert_eq!(digest(&[(0, 16)]), None);
    }
}
