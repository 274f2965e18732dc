//! The inverse of all partitions: the pieces that take bytes of each tensor.

use super::{Consumer, RankPlan};
use crate::error::{Error, ErrorKind, Result};

/// For each tensor the pieces that take bytes of it, sorted by rank and destination.
pub(super) struct Uses {
    /// Where the consumers of each tensor begin, and one more.
    starts: Vec<u32>,
    consumers: Vec<Consumer>,
}

impl Uses {
    /// The uses of so many tensors.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if there are more pieces than numbers for them.
    pub(super) fn new<'a>(tensors: usize, ranks: impl Iterator<Item = &'a RankPlan> + Clone) -> Result<Uses> {
        let pieces = ranks.clone().map(|rank| rank.pieces.len()).sum::<usize>();
        if pieces > u32::MAX as usize {
            return Err(Error::new(ErrorKind::Unsupported, "plan has too many pieces"));
        }
        let mut starts = vec![0; tensors + 1];
        for piece in ranks.clone().flat_map(|rank| &rank.pieces) {
            starts[piece.tensor as usize + 1] += 1;
        }
        for tensor in 0..tensors {
            starts[tensor + 1] += starts[tensor];
        }
        let mut next = starts.clone();
        let nobody = Consumer { rank: crate::extent::Rank(0), dest: 0, piece: 0 };
        let mut consumers = vec![nobody; pieces];
        for partition in ranks {
            for (dest, entry) in (0..).zip(&partition.dests) {
                for piece in entry.pieces.clone() {
                    let place = &mut next[partition.pieces[piece as usize].tensor as usize];
                    consumers[*place as usize] = Consumer { rank: partition.rank, dest, piece };
                    *place += 1;
                }
            }
        }
        Ok(Uses { starts, consumers })
    }

    /// Those of one tensor.
    pub(super) fn of(&self, tensor: u32) -> &[Consumer] {
        &self.consumers[self.starts[tensor as usize] as usize..self.starts[tensor as usize + 1] as usize]
    }
}
