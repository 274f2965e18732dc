//! How many bytes pass between ranks that read together: what the exchange will send, counted without moving it.

use super::exchange::{Exchange, parcels};
use super::{Cursor, Cutting, Plan, Processes, Reads};
use crate::extent::Rank;
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
        let mut sizes = vec![0; self.ranks().len()];
        self.circles().into_iter().for_each(|first| sizes[first.index()] += 1);
        // All have the chunk of those who are most.
        let members = sizes.into_iter().max().unwrap_or(0);
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

    /// Those with whom a rank passes on what they read, directly or because both do so with a third, itself among them,
    /// ascending; none if it neither reads for others nor they for it.
    pub(crate) fn partners(&self, rank: Rank) -> Vec<Rank> {
        let circles = self.circles();
        let Some(&first) = circles.get(rank.index()) else { return Vec::new() };
        let partners = (0..).zip(&circles).filter(|(_, of)| **of == first).map(|(rank, _)| Rank(rank));
        Some(partners.collect::<Vec<_>>()).filter(|partners| partners.len() > 1).unwrap_or_default()
    }

    /// Whether the rank that this process drives passes anything on, or is passed something.
    pub(crate) fn exchanges(&self) -> bool {
        let driven = self.world().driven();
        driven.len() == 1 && !self.partners(driven[0]).is_empty()
    }

    /// For each rank the first of its partners, or itself if it has none.
    fn circles(&self) -> Vec<Rank> {
        let mut first: Vec<Rank> = self.ranks().iter().map(|partition| partition.rank).collect();
        if !self.shares() {
            return first;
        }
        fn find(first: &mut [Rank], mut rank: Rank) -> Rank {
            while first[rank.index()] != rank {
                first[rank.index()] = first[first[rank.index()].index()];
                rank = first[rank.index()];
            }
            rank
        }
        for extent in self.extents() {
            for consumer in self.consumers(extent) {
                let (one, other) = (find(&mut first, extent.reader), find(&mut first, consumer.rank));
                first[one.max(other).index()] = one.min(other);
            }
        }
        (0..first.len() as u32).map(|rank| find(&mut first, Rank(rank))).collect()
    }

    /// Whether ranks could pass on to each other what they read.
    fn shares(&self) -> bool {
        self.world().processes() == Processes::PerRank && !self.world().groups().is_empty()
    }
}
