//! Names to positions, without a second copy of the names.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

/// An open-addressing table of positions; the names stay in the tensors. Its seed is another in each table, so that no
/// file has names which meet in one slot.
#[derive(Debug)]
pub(super) struct NameTable {
    slots: Vec<u32>,
    hasher: RandomState,
}

impl NameTable {
    /// A table that takes `count` names.
    pub(super) fn with_capacity(count: usize) -> NameTable {
        NameTable { slots: vec![EMPTY; (count * 2).next_power_of_two()], hasher: RandomState::default() }
    }

    /// Enters a name; answers the position that has the same name, if there is one, and then changes nothing.
    pub(super) fn insert<'a>(
        &mut self,
        name: &str,
        position: usize,
        name_of: impl Fn(usize) -> &'a str,
    ) -> Option<usize> {
        match self.find(name, name_of) {
            Ok(existing) => Some(existing),
            Err(slot) => {
                self.slots[slot] = position as u32;
                None
            }
        }
    }

    /// The position that was entered for the name.
    pub(super) fn position<'a>(&self, name: &str, name_of: impl Fn(usize) -> &'a str) -> Option<usize> {
        self.find(name, name_of).ok()
    }

    /// The position with this name, or the free slot for it. At most half of the slots are in use.
    fn find<'a>(&self, name: &str, name_of: impl Fn(usize) -> &'a str) -> Result<usize, usize> {
        let mask = self.slots.len() - 1;
        let mut slot = self.hasher.hash_one(name) as usize & mask;
        loop {
            match self.slots[slot] {
                EMPTY => return Err(slot),
                position if name_of(position as usize) == name => return Ok(position as usize),
                _ => slot = (slot + 1) & mask,
            }
        }
    }
}

const EMPTY: u32 = u32::MAX;
