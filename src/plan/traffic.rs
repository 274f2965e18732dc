//! How many bytes pass between ranks that read together: what the exchange will send, counted without moving it.

use std::collections::BTreeMap;

use super::exchange::{Exchange, parcels};
use super::{Cursor, Cutting, Plan, Processes, Reads};
use crate::limits::DEVICE_SLOT;

/// What passes between a rank and those of other processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Bytes that it sends. What several ranks get counts once for each of them, whichever way a broadcast takes.
    pub sent_bytes: u64,
    /// Bytes that it receives.
    pub received_bytes: u64,
    /// Bytes that it takes to its device in order to send them.
    pub(super) packed_bytes: u64,
}

impl Plan {
    /// What passes between each rank and others that it [reads together](super::World::reading_together) with, whichever
    /// process drives it. Exact for loads with the default staging memory: with less of it they read in smaller chunks, and
    /// where ranks want different parts of the same bytes that may change what is sent.
    pub fn traffic(&self) -> Vec<Traffic> {
        let mut sizes = BTreeMap::<u32, usize>::new();
        self.world().groups().iter().for_each(|&group| *sizes.entry(group).or_default() += 1);
        // All groups have the chunk of the largest.
        let members = sizes.into_values().max().unwrap_or(0);
        self.traffic_in(Exchange::chunk(members, DEVICE_SLOT))
    }

    /// The same where so many bytes are read for a round.
    pub(super) fn traffic_in(&self, chunk: u64) -> Vec<Traffic> {
        let mut traffic = vec![Traffic::default(); self.ranks().len()];
        if !self.shares() {
            return traffic;
        }
        let mut of_readers = vec![Vec::new(); self.ranks().len()];
        for (position, extent) in (0..).zip(self.extents()).filter(|(_, extent)| self.is_shared(extent)) {
            of_readers[extent.reader.index()].push(position);
        }
        for (reader, extents) in self.ranks().iter().map(|partition| partition.rank).zip(of_readers) {
            let reads = Reads::of(self, Cutting::of_exchange(chunk), extents);
            let (mut cursor, mut pieces) = (Cursor::default(), Vec::new());
            while let Some((op, behind)) = reads.next(&cursor) {
                cursor = behind;
                for parcel in parcels(&reads, &op, reader, &mut pieces) {
                    let of_reader = &mut traffic[reader.index()];
                    of_reader.sent_bytes += parcel.bytes * parcel.to.len() as u64;
                    of_reader.packed_bytes += parcel.bytes;
                    parcel.to.iter().for_each(|to| traffic[to.index()].received_bytes += parcel.bytes);
                }
            }
        }
        traffic
    }

    /// Whether ranks could pass on to each other what they read.
    fn shares(&self) -> bool {
        self.world().processes() == Processes::PerRank && !self.world().groups().is_empty()
    }
}
