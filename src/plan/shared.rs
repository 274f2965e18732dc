//! Reading together: which tensors the ranks of a group read once for all of them, and who of them reads what.

use smallvec::SmallVec;

use super::extents::Reads;
use super::{BoxCopy, Consumer, RankPlan, ReadExtent, World};
use crate::checkpoint::TensorMeta;
use crate::extent::Rank;
use crate::limits::{DIRECT_ALIGNMENT, STRIPE_MIN, exchange_cost};
use crate::plan::Cooperate;
use crate::stride::bytes_moved;

/// Stands for the reader of an extent until [`spread`] gives it one or several.
const NOBODY: Rank = Rank(u32::MAX);

impl Reads {
    /// Adds what the ranks of several processes read of one tensor: those of a group together where that is better, and
    /// every other one for itself.
    pub(super) fn add_shared(
        &mut self,
        tensor: u32,
        meta: &TensorMeta,
        world: &World,
        ranks: &[RankPlan],
        consumers: &[Consumer],
    ) {
        let group = |consumer: &Consumer| world.groups()[consumer.rank.index()];
        let mut by_group: SmallVec<[Consumer; 8]> = SmallVec::from_slice(consumers);
        by_group.sort_by_key(group); // stable: ranks stay in order
        for of_group in by_group.chunk_by(|a, b| group(a) == group(b)) {
            let mut alone = Reads::default();
            alone.add_alone(tensor, meta, ranks, of_group);
            if of_group[0].rank == of_group[of_group.len() - 1].rank {
                self.append(alone);
                continue;
            }
            let mut together = Reads::default();
            together.add(tensor, meta, NOBODY, ranks, of_group);
            let cost = |reads: &Reads| reads.extents.iter().map(ReadExtent::cost).sum::<u64>();
            let saved = cost(&alone).saturating_sub(cost(&together));
            let least = match world.cooperate() {
                Cooperate::Auto => exchange_cost(passed_on(of_group, ranks)),
                Cooperate::Always => 0,
            };
            if saved > least {
                together.saved = saved;
                self.append(together);
            } else {
                self.append(alone);
            }
        }
    }
}

/// Bytes that travel between ranks if these consumers, who are of several ranks, read in equal parts.
fn passed_on(consumers: &[Consumer], ranks: &[RankPlan]) -> u64 {
    let of = |consumer: &Consumer| {
        let copy = &ranks[consumer.rank.index()].pieces[consumer.piece as usize];
        bytes_moved(&copy.loops, copy.run)
    };
    let (wanted, parts) = (consumers.iter().map(of).sum::<u64>(), readers(consumers).len() as u64);
    wanted / parts * (parts - 1)
}

/// The ranks among these consumers, ascending.
fn readers(consumers: &[Consumer]) -> SmallVec<[Rank; 8]> {
    let mut readers: SmallVec<[Rank; 8]> = consumers.iter().map(|consumer| consumer.rank).collect();
    readers.sort_unstable();
    readers.dedup();
    readers
}

/// Gives every extent that nobody reads yet to those who want some of it: long ones in equal stripes, short ones whole to
/// whoever has least to read so far. The order stays.
pub(super) fn spread(
    extents: Vec<ReadExtent>,
    consumers: &[Consumer],
    tensors: &[TensorMeta],
    ranks: &[RankPlan],
) -> Vec<ReadExtent> {
    let mut load = vec![0u64; ranks.len()];
    for extent in extents.iter().filter(|extent| extent.reader != NOBODY) {
        load[extent.reader.index()] += extent.bytes();
    }
    let mut spread = Vec::with_capacity(extents.len());
    for extent in extents {
        if extent.reader != NOBODY {
            spread.push(extent);
            continue;
        }
        let of = &consumers[extent.consumers.start as usize..extent.consumers.end as usize];
        let mut readers = readers(of);
        // Whoever has least comes first, so that what does not divide evenly goes there.
        readers.sort_by_key(|rank| load[rank.index()]);
        let stripes = (extent.bytes() / STRIPE_MIN).clamp(1, readers.len() as u64);
        let copies = of.iter().map(|consumer| &ranks[consumer.rank.index()].pieces[consumer.piece as usize]);
        let unit = Unit::of(&extent, tensors[extent.tensor as usize].start, copies);
        readers.truncate(stripes as usize);
        // By rank, as they lie in the file.
        readers.sort_unstable();
        let mut from = 0;
        for (number, &reader) in (1..).zip(&readers) {
            let to =
                if number == stripes { unit.count(&extent) } else { unit.boundary(&extent, number, stripes).max(from) };
            if to > from {
                let stripe = unit.stripe(&extent, from, to, reader);
                load[reader.index()] += stripe.bytes();
                spread.push(stripe);
                from = to;
            }
        }
    }
    spread
}

/// What stripes of an extent are whole numbers of.
enum Unit {
    /// Ranges of the outermost loop.
    Ranges,
    /// Bytes: multiples of `step` from byte `base` of the file on.
    Bytes { base: u64, step: u64 },
}

impl Unit {
    /// Rows, where all copies step over rows of one length; else blocks of direct reads, or the nearest whole elements.
    fn of<'a>(extent: &ReadExtent, tensor_start: u64, mut copies: impl Iterator<Item = &'a BoxCopy> + Clone) -> Unit {
        if !extent.outer.is_empty() {
            return Unit::Ranges;
        }
        let pitch = |copy: &BoxCopy| copy.loops.first().map(|outermost| outermost.src_stride);
        let first = copies.clone().next().and_then(pitch);
        match first.filter(|first| copies.all(|copy| pitch(copy) == Some(*first))) {
            Some(step) => Unit::Bytes { base: tensor_start, step },
            // A multiple of every element's size, which need not lie on blocks of the file.
            None => Unit::Bytes { base: tensor_start, step: DIRECT_ALIGNMENT },
        }
    }

    /// How many ranges or bytes there are.
    fn count(&self, extent: &ReadExtent) -> u64 {
        match self {
            Unit::Ranges => extent.outer[0].0,
            Unit::Bytes { .. } => extent.run,
        }
    }

    /// Where the stripe before number `part` of `parts` ends.
    fn boundary(&self, extent: &ReadExtent, part: u64, parts: u64) -> u64 {
        let even = (u128::from(self.count(extent)) * u128::from(part) / u128::from(parts)) as u64;
        match *self {
            Unit::Ranges => even,
            Unit::Bytes { base, step } => {
                let at = extent.start + even;
                (at - (at - base) % step).saturating_sub(extent.start)
            }
        }
    }

    fn stripe(&self, extent: &ReadExtent, from: u64, to: u64, reader: Rank) -> ReadExtent {
        let mut stripe = ReadExtent { reader, ..extent.clone() };
        match self {
            Unit::Ranges => {
                let (count, stride) = &mut stripe.outer[0];
                stripe.start += from * *stride;
                *count = to - from;
            }
            Unit::Bytes { .. } => {
                stripe.start += from;
                stripe.run = to - from;
            }
        }
        stripe
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::FileId;
    use crate::plan::{Loop, Loops};

    fn extent(start: u64, outer: &[(u64, u64)], run: u64) -> ReadExtent {
        let (outer, consumers) = (SmallVec::from_slice(outer), 0..0);
        ReadExtent { tensor: 0, file: FileId(0), reader: NOBODY, start, outer, run, consumers }
    }

    fn copy(src: u64, pitch: Option<u64>, run: u64) -> BoxCopy {
        let rows = pitch.map(|src_stride| Loop { count: 9, src_stride, dst_stride: run });
        BoxCopy { tensor: 0, src, dst: 0, loops: rows.into_iter().collect::<Loops>(), run, cast: None }
    }

    #[test]
    fn stripes_are_whole_rows_or_blocks_and_leave_nothing_out() {
        for (extent, copies, step) in [
            (extent(108, &[], 9000), vec![copy(108, Some(1000), 500), copy(608, Some(1000), 500)], Some(1000)),
            (extent(108, &[], 90_000), vec![copy(108, None, 90_000), copy(108, Some(1000), 500)], Some(4096)),
            (extent(50_000, &[], 90_000), vec![copy(50_000, None, 90_000)], None),
            (extent(108, &[(7, 500)], 100), vec![copy(108, Some(500), 100)], None),
        ] {
            let unit = Unit::of(&extent, 108, copies.iter());
            let mut ends = vec![0];
            ends.extend((1..4).map(|part| unit.boundary(&extent, part, 4)));
            ends.push(unit.count(&extent));
            assert!(ends.is_sorted(), "{ends:?}");
            let stripes: Vec<ReadExtent> =
                ends.windows(2).map(|ends| unit.stripe(&extent, ends[0], ends[1], Rank(1))).collect();
            assert_eq!(stripes.iter().map(ReadExtent::bytes).sum::<u64>(), extent.bytes());
            let mut at = extent.start;
            for stripe in &stripes {
                assert_eq!(stripe.start, at);
                if let Some(step) = step {
                    assert_eq!((stripe.start - 108) % step, 0);
                }
                at += stripe.outer.first().map_or(stripe.run, |&(count, stride)| count * stride);
            }
        }
    }
}
