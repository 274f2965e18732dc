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
    pub fn in_blocks(rank: &RankPlan, params: &[super::Param], alignment: u64, block_max: u64) -> Layout {
        let _ = (rank, params, alignment, block_max);
        todo!("helper B")
    }
}
