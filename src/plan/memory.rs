//! Where in a rank's memory each tensor lies. Depends on the plan alone, not on the engine or the device.

use super::RankPlan;

/// The memory of one rank: sizes of its blocks, and where in them each destination lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of each block.
    pub blocks: Vec<u64>,
    /// One per destination of the rank, in the order of [`RankPlan::dests`].
    pub locations: Vec<Location>,
}

/// A place in the blocks of a [`Layout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Position in [`Layout::blocks`].
    pub block: u32,
    /// Bytes from the start of the block.
    pub offset: u64,
}

impl Layout {
    /// Lays the destinations of `rank` out in blocks of at most `block_max` bytes (a larger tensor gets a block of
    /// its own), each starting on a multiple of `alignment`. An alias lies where its original lies.
    ///
    /// A destination of no bytes has a location too: no block is empty, and every offset is at most its block's size.
    ///
    /// # Panics
    /// If `params` are not those of the plan that `rank` is of.
    pub fn in_blocks(rank: &RankPlan, params: &[super::Param], alignment: u64, block_max: u64) -> Layout {
        let alignment = alignment.max(1);
        let mut blocks: Vec<u64> = Vec::new();
        let mut locations = Vec::with_capacity(rank.dests.len());
        for dest in &rank.dests {
            let room = blocks.last().map(|used| used.next_multiple_of(alignment));
            let offset = match room {
                Some(offset) if offset + dest.bytes <= block_max => offset,
                Some(_) if dest.bytes == 0 => 0,
                _ => {
                    blocks.push(0);
                    0
                }
            };
            let block = blocks.len() - 1;
            blocks[block] = blocks[block].max(offset + dest.bytes);
            locations.push(Location { block: block as u32, offset });
        }
        for used in &mut blocks {
            *used = (*used).max(alignment);
        }
        for (position, dest) in rank.dests.iter().enumerate() {
            if let Some(original) = params[dest.param as usize].alias_of
                && let Ok(original) = rank.dests.binary_search_by_key(&original, |dest| dest.param)
            {
                locations[position] = locations[original];
            }
        }
        Layout { blocks, locations }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dest, Param};
    use super::*;
    use crate::dtype::Dtype;
    use crate::extent::Rank;
    use crate::shape::Shape;

    fn layout(sizes: &[u64], alias: Option<(usize, u32)>) -> Layout {
        let params: Vec<Param> = (0..sizes.len())
            .map(|i| Param {
                name: format!("t{i}"),
                dtype: Dtype::U8,
                cast: None,
                alias_of: alias.filter(|alias| alias.0 == i).map(|alias| alias.1),
            })
            .collect();
        let dest = |(i, &bytes): (usize, &u64)| Dest {
            param: i as u32,
            shape: Shape::new(&[bytes]),
            bytes,
            pieces: 0..0,
            fills: 0..0,
        };
        let rank = RankPlan {
            rank: Rank(0),
            dests: sizes.iter().enumerate().map(dest).collect(),
            pieces: Vec::new(),
            fills: Vec::new(),
        };
        Layout::in_blocks(&rank, &params, 256, 1024)
    }

    fn at(block: u32, offset: u64) -> Location {
        Location { block, offset }
    }

    #[test]
    fn tensors_are_aligned_and_blocks_bounded() {
        let layout = layout(&[100, 700, 2000, 10, 0], None);
        assert_eq!(layout.blocks, [956, 2000, 256]);
        assert_eq!(layout.locations, [at(0, 0), at(0, 256), at(1, 0), at(2, 0), at(2, 256)]);
    }

    #[test]
    fn an_alias_lies_where_its_original_lies() {
        let layout = layout(&[0, 300, 10], Some((0, 2)));
        assert_eq!(layout.locations, [at(0, 512), at(0, 0), at(0, 512)]);
    }

    #[test]
    fn nothing_still_has_a_place() {
        assert_eq!(layout(&[0], None), Layout { blocks: vec![256], locations: vec![at(0, 0)] });
        assert_eq!(layout(&[], None), Layout { blocks: vec![], locations: vec![] });
    }
}
