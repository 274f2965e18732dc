//! The inverse view: which bytes are read, by whom, and which ranks get them.

use rayon::prelude::*;
use smallvec::SmallVec;

use super::audit::CHUNK;
use super::cover::{Strided, Times};
use super::shared::spread;
use super::uses::Uses;
use super::world::{Cooperate, Processes, World};
use super::{Consumer, RankPlan, ReadExtent, ReadOrder};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::Result;
use crate::extent::Rank;
use crate::limits::{COOPERATE_MIN, is_skipped, read_cost};

/// All reads in the order asked for, and their consumers.
pub(super) fn extents(
    checkpoint: &Checkpoint,
    world: &World,
    ranks: &[RankPlan],
    uses: &Uses,
    order: ReadOrder,
) -> Result<(Vec<ReadExtent>, Vec<Consumer>)> {
    let shares = !world.groups().is_empty() && world.processes() == Processes::PerRank;
    let mut all = reads(checkpoint, world, ranks, uses, shares);
    if shares && world.cooperate() == Cooperate::Auto && all.saved < COOPERATE_MIN {
        all = reads(checkpoint, world, ranks, uses, false);
    }
    let Reads { mut extents, consumers, saved: _ } = all;
    match order {
        ReadOrder::File => extents.sort_unstable_by_key(|extent| (extent.file, extent.start, extent.reader)),
        ReadOrder::Layer => extents.sort_by_cached_key(|extent| {
            let layer = layer(&checkpoint.tensors()[extent.tensor as usize].name);
            (layer, extent.file, extent.start, extent.reader)
        }),
    }
    if shares {
        extents = spread(extents, &consumers, checkpoint.tensors(), ranks);
    }
    Ok((extents, consumers))
}

/// The reads of all tensors, in their order.
fn reads(checkpoint: &Checkpoint, world: &World, ranks: &[RankPlan], uses: &Uses, shares: bool) -> Reads {
    let tensors = checkpoint.tensors();
    let parts: Vec<Reads> = tensors
        .par_chunks(CHUNK)
        .enumerate()
        .map(|(chunk, metas)| {
            let mut reads = Reads::default();
            for (tensor, meta) in ((chunk * CHUNK) as u32..).zip(metas) {
                let consumers = uses.of(tensor);
                match world.processes() {
                    Processes::One => reads.add(tensor, meta, Rank(0), ranks, consumers),
                    Processes::PerRank if shares => reads.add_shared(tensor, meta, world, ranks, consumers),
                    Processes::PerRank => reads.add_alone(tensor, meta, ranks, consumers),
                }
            }
            reads
        })
        .collect();

    let mut all = Reads::default();
    parts.into_iter().for_each(|part| all.append(part));
    all
}

impl ReadExtent {
    /// The bytes read: all ranges, without what lies between them.
    pub fn bytes(&self) -> u64 {
        self.outer.iter().map(|&(count, _)| count).product::<u64>() * self.run
    }
}

/// Extents and their consumers.
#[derive(Default)]
pub(super) struct Reads {
    pub(super) extents: Vec<ReadExtent>,
    pub(super) consumers: Vec<Consumer>,
    /// Bytes that are not read because others read them.
    pub(super) saved: u64,
}

struct Wanted {
    source: Strided,
    consumer: Consumer,
}

impl Reads {
    /// Appends those of others.
    pub(super) fn append(&mut self, other: Reads) {
        let base = self.consumers.len() as u32;
        self.extents.extend(other.extents.into_iter().map(|extent| ReadExtent {
            consumers: extent.consumers.start + base..extent.consumers.end + base,
            ..extent
        }));
        self.consumers.extend(other.consumers);
        self.saved += other.saved;
    }

    /// Adds what each rank reads of one tensor for itself; the consumers are sorted by rank.
    pub(super) fn add_alone(&mut self, tensor: u32, meta: &TensorMeta, ranks: &[RankPlan], consumers: &[Consumer]) {
        for of_rank in consumers.chunk_by(|a, b| a.rank == b.rank) {
            self.add(tensor, meta, of_rank[0].rank, ranks, of_rank);
        }
    }

    /// Adds what `reader` reads of one tensor for these consumers.
    pub(super) fn add(
        &mut self,
        tensor: u32,
        meta: &TensorMeta,
        reader: Rank,
        ranks: &[RankPlan],
        consumers: &[Consumer],
    ) {
        let wanted = |&consumer: &Consumer| {
            let copy = &ranks[consumer.rank.index()].pieces[consumer.piece as usize];
            Wanted { source: copy.source(0), consumer }
        };
        let mut wanted: SmallVec<[Wanted; 8]> = consumers.iter().map(wanted).collect();
        let Some(first) = wanted.first() else { return };
        let base = ReadExtent {
            tensor,
            file: meta.file,
            reader,
            start: first.source.start,
            outer: SmallVec::new(),
            run: first.source.span(),
            consumers: 0..0,
        };
        if wanted.iter().all(|other| other.source == first.source) {
            let (outer, run) = cheapest(&first.source);
            self.push(ReadExtent { outer, run, ..base }, wanted.iter());
            return;
        }
        wanted.sort_by_key(|wanted| (wanted.source.start, wanted.consumer.rank));
        let (mut from, mut end) = (0, 0);
        for (at, next) in wanted.iter().enumerate() {
            let Strided { start, .. } = next.source;
            if at > from && start > end && is_skipped(start - end, next.source.span()) {
                self.push(covering(&base, &wanted[from], end), wanted[from..at].iter());
                from = at;
            }
            end = end.max(start + next.source.span());
        }
        self.push(covering(&base, &wanted[from], end), wanted[from..].iter());
    }

    fn push<'a>(&mut self, extent: ReadExtent, wanted: impl Iterator<Item = &'a Wanted>) {
        let start = self.consumers.len() as u32;
        self.consumers.extend(wanted.map(|wanted| wanted.consumer));
        self.extents.push(ReadExtent { consumers: start..self.consumers.len() as u32, ..extent });
    }
}

/// One range from the first wanted byte to `end`.
fn covering(base: &ReadExtent, first: &Wanted, end: u64) -> ReadExtent {
    let start = first.source.start;
    ReadExtent { start, run: end - start, ..base.clone() }
}

/// How many of the outermost loops are worth separate reads: the cheapest of covering the span once and of reading
/// ranges, by what each [costs](read_cost).
fn cheapest(source: &Strided) -> (SmallVec<[(u64, u64); 1]>, u64) {
    let inner = |depth: usize| {
        let loops = SmallVec::from_slice(&source.loops[depth..]);
        Strided { start: 0, loops, run: source.run, times: Times::ONE }.span()
    };
    let cost = |depth: usize| {
        let ranges: u64 = source.loops[..depth].iter().map(|&(count, _)| count).product();
        ranges.saturating_mul(read_cost(inner(depth)))
    };
    let depth = (0..=source.loops.len()).min_by_key(|&depth| cost(depth)).unwrap_or(0);
    (SmallVec::from_slice(&source.loops[..depth]), inner(depth))
}

/// The first number among the segments of a name, counted from 1; 0 if there is none.
fn layer(name: &str) -> u64 {
    name.split('.').find_map(|part| part.parse::<u64>().ok()).map_or(0, |layer| layer.saturating_add(1))
}
