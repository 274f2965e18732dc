//! Operations in flight: who reads and writes what, and whether one comes before another.

use std::collections::{BTreeMap, HashMap};

use crate::work::Region;

/// A stream's number; never used twice.
pub(crate) type QueueId = u64;

/// What has surely happened: for each stream the number of its last operation that has.
pub(crate) type Clock = HashMap<QueueId, u64>;

/// Adds what `other` knows.
pub(crate) fn merge(clock: &mut Clock, other: &Clock) {
    for (queue, seq) in other {
        let known = clock.entry(*queue).or_default();
        *known = (*known).max(*seq);
    }
}

/// The regions of all operations that were submitted and have not finished.
#[derive(Default)]
pub(crate) struct Flights {
    by_start: BTreeMap<(u64, u64), Flight>,
    next: u64,
    /// The longest span since there was none: how far back one that overlaps may start.
    longest: u64,
}

struct Flight {
    queue: QueueId,
    seq: u64,
    call: &'static str,
    region: Region,
    write: bool,
}

/// Names a region in flight.
#[derive(Clone, Copy)]
pub(crate) struct FlightId(u64, u64);

/// How many neighbours one look at the table may compare with: a bound on its cost, not on what is right.
const LOOK: usize = 512;

impl Flights {
    /// The call of an operation that touches a byte of `region`, unordered with one that comes after `clock`; at least
    /// one of the two writes.
    pub(crate) fn conflict(&self, queue: QueueId, clock: &Clock, region: Region, write: bool) -> Option<&'static str> {
        let from = (region.start.saturating_sub(self.longest), 0);
        self.by_start
            .range(from..(region.end(), 0))
            .rev()
            .take(LOOK)
            .map(|(_, flight)| flight)
            .find(|flight| {
                flight.queue != queue
                    && (write || flight.write)
                    && clock.get(&flight.queue).is_none_or(|known| *known < flight.seq)
                    && flight.region.overlaps(region)
            })
            .map(|flight| flight.call)
    }

    /// Whether an operation in flight writes into the region.
    pub(crate) fn written(&self, region: Region) -> bool {
        let from = (region.start.saturating_sub(self.longest), 0);
        self.by_start.range(from..(region.end(), 0)).any(|(_, flight)| flight.write && flight.region.overlaps(region))
    }

    pub(crate) fn add(
        &mut self,
        queue: QueueId,
        seq: u64,
        call: &'static str,
        region: Region,
        write: bool,
    ) -> FlightId {
        self.next += 1;
        self.longest = self.longest.max(region.span());
        let id = FlightId(region.start, self.next);
        self.by_start.insert((id.0, id.1), Flight { queue, seq, call, region, write });
        id
    }

    pub(crate) fn remove(&mut self, id: FlightId) {
        self.by_start.remove(&(id.0, id.1));
        if self.by_start.is_empty() {
            self.longest = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_without_an_order_conflict() {
        let mut flights = Flights::default();
        let region = Region::flat(100, 50);
        let id = flights.add(1, 4, "first", region, true);
        let ordered = Clock::from([(1, 4)]);
        let before = Clock::from([(1, 3)]);
        assert_eq!(flights.conflict(2, &ordered, region, true), None);
        assert_eq!(flights.conflict(2, &before, region, true), Some("first"));
        assert_eq!(flights.conflict(2, &Clock::new(), Region::flat(149, 1), false), Some("first"));
        assert_eq!(flights.conflict(2, &Clock::new(), Region::flat(150, 9), true), None);
        assert_eq!(flights.conflict(1, &Clock::new(), region, true), None);
        assert!(flights.written(region));
        flights.remove(id);
        assert_eq!(flights.conflict(2, &before, region, true), None);
    }
}
