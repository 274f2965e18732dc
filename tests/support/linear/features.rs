//! Which inputs or outputs of a linear map a rank has: heads, groups, blocks, in the order in which its shard has them.

use std::ops::Range;

/// What a dimension of a weight consists of.
#[derive(Debug, Clone)]
pub(crate) enum Features {
    /// So many, all on every rank.
    Whole(u64),
    /// So many heads of so many features each, divided evenly.
    Heads(u64, u64),
    /// Key-value heads: with more ranks than heads, neighbours share one.
    Shared(u64, u64),
    /// Blocks behind each other, each divided on its own.
    Blocks(Vec<Features>),
    /// So many groups of so many query heads with a key and a value head behind them, of so many features each: whole
    /// groups, and with more ranks than groups a part of one's queries with its key and its value head.
    Grouped(u64, u64, u64),
}

use Features::{Blocks, Grouped, Heads, Shared, Whole};

impl Features {
    /// So many features, divided evenly.
    pub(crate) fn even(count: u64) -> Features {
        Heads(count, 1)
    }

    pub(crate) fn count(&self) -> u64 {
        match self {
            Whole(count) => *count,
            Heads(count, size) | Shared(count, size) => count * size,
            Blocks(blocks) => blocks.iter().map(Features::count).sum(),
            Grouped(groups, queries, size) => groups * (queries + 2) * size,
        }
    }

    /// The features of `rank` of `ranks`; `None` if they do not divide.
    pub(crate) fn of(&self, rank: u64, ranks: u64) -> Option<Vec<u64>> {
        let heads = |range: Range<u64>, size: u64| Some((range.start * size..range.end * size).collect());
        match self {
            Whole(count) => Some((0..*count).collect()),
            Heads(count, size) | Shared(count, size) if count.is_multiple_of(ranks) => {
                heads(rank * (count / ranks)..(rank + 1) * (count / ranks), *size)
            }
            Shared(count, size) if ranks.is_multiple_of(*count) => {
                let head = rank / (ranks / count);
                heads(head..head + 1, *size)
            }
            Heads(..) | Shared(..) => None,
            Grouped(groups, queries, size) => {
                let all = queries + 2; // heads of a group
                if groups.is_multiple_of(ranks) {
                    return Heads(*groups, all * size).of(rank, ranks);
                }
                let neighbours = ranks.checked_div(*groups).filter(|_| ranks.is_multiple_of(*groups))?;
                let mine = queries.is_multiple_of(neighbours).then_some(queries / neighbours)?;
                let (first, at) = (rank / neighbours * all, rank % neighbours * mine);
                let of_group = heads(first + at..first + at + mine, *size)?;
                Some([of_group, heads(first + queries..first + all, *size)?].concat())
            }
            Blocks(blocks) => {
                let (mut all, mut start) = (Vec::new(), 0);
                for block in blocks {
                    all.extend(block.of(rank, ranks)?.into_iter().map(|feature| start + feature));
                    start += block.count();
                }
                Some(all)
            }
        }
    }
}
