//! Exchanges as rank 0 sees them: every rank's part of one step after the other, and whether they mean the same.

use std::time::Instant;

use super::failure::{Failure, Missing};
use super::shared::{Kind, Offer};
use crate::error::ErrorKind;
use crate::extent::Rank;
use crate::limits;

/// The step that ranks have begun, and what they brought.
#[derive(Debug)]
pub(super) struct Steps {
    step: u32,
    parts: Vec<Option<Vec<u8>>>,
    /// Who came first, with what, and when.
    first: Option<(Rank, String, Kind, Instant)>,
    arrived: u32,
    bytes: usize,
}

/// A step that all ranks have come to.
#[derive(Debug)]
pub(super) struct Complete {
    pub(super) step: u32,
    /// It was the last one.
    pub(super) end: bool,
    pub(super) parts: Vec<Vec<u8>>,
}

impl Steps {
    pub(super) fn new(size: u32) -> Steps {
        Steps { step: 0, parts: vec![None; size as usize], first: None, arrived: 0, bytes: 0 }
    }

    /// Takes a rank's part. The last one completes the step.
    pub(super) fn offer(&mut self, rank: Rank, offer: Offer, now: Instant) -> Result<Option<Complete>, Box<Failure>> {
        let Offer { step, kind, what, part } = offer;
        let (first, first_what, first_kind, _) = self.first.get_or_insert_with(|| (rank, what.clone(), kind, now));
        if step != self.step || self.parts[rank.index()].is_some() {
            return Err(Failure::malformed(rank).into());
        }
        if (&what, kind) != (&*first_what, *first_kind) {
            let message = format!("ranks {first} and {rank} are at different points of the program");
            return Err(Failure::of(rank, ErrorKind::Peer, message)
                .with_expected(point(first_what, *first_kind), point(&what, kind))
                .into());
        }
        self.bytes += part.len();
        if self.bytes > limits::EXCHANGE_MAX {
            let message = format!("the parts of all ranks in {what:?} are too large together");
            return Err(Failure::of(None, ErrorKind::Usage, message)
                .with_expected(format!("at most {} bytes", limits::EXCHANGE_MAX), self.bytes)
                .into());
        }
        self.parts[rank.index()] = Some(part);
        self.arrived += 1;
        if (self.arrived as usize) < self.parts.len() {
            return Ok(None);
        }
        let parts = self.parts.iter_mut().filter_map(Option::take).collect();
        self.first = None;
        (self.step, self.arrived, self.bytes) = (step.wrapping_add(1), 0, 0);
        Ok(Some(Complete { step, end: kind == Kind::End, parts }))
    }

    /// What the step is about and since when ranks wait for others in it; `None` before the first one, and where they
    /// wait for the slowest one's work.
    pub(super) fn waiting(&self) -> Option<(&str, Instant)> {
        self.first
            .as_ref()
            .filter(|(_, _, kind, _)| *kind == Kind::Exchange)
            .map(|(_, what, _, since)| (what.as_str(), *since))
    }

    /// Who has not come.
    pub(super) fn missing(&self) -> Missing {
        let absent = |(rank, part): (u32, &Option<Vec<u8>>)| part.is_none().then_some(rank);
        Missing::of((0..).zip(&self.parts).filter_map(absent))
    }
}

fn point(what: &str, kind: Kind) -> String {
    if kind == Kind::End { "the end".into() } else { format!("{what:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(step: u32, what: &str, part: &[u8]) -> Offer {
        Offer { step, kind: Kind::Exchange, what: what.into(), part: part.to_vec() }
    }

    #[test]
    fn parts_come_in_any_order_and_leave_in_that_of_ranks() {
        let now = Instant::now();
        let mut steps = Steps::new(3);
        for step in 0..3 {
            assert!(steps.waiting().is_none());
            assert!(steps.offer(Rank(2), offer(step, "x", &[2]), now).unwrap().is_none());
            assert_eq!(steps.missing(), Missing::of([0, 1]));
            assert_eq!(steps.waiting(), Some(("x", now)));
            assert!(steps.offer(Rank(0), offer(step, "x", &[]), now).unwrap().is_none());
            let complete = steps.offer(Rank(1), offer(step, "x", &[1, 1]), now).unwrap().unwrap();
            assert_eq!((complete.step, complete.end), (step, false));
            assert_eq!(complete.parts, [vec![], vec![1, 1], vec![2]]);
        }
    }

    #[test]
    fn ranks_that_mean_different_things_are_named() {
        let now = Instant::now();
        let mut steps = Steps::new(3);
        steps.offer(Rank(1), offer(0, "plan", &[]), now).unwrap();
        let failure = steps.offer(Rank(2), offer(0, "headers", &[]), now).unwrap_err();
        assert_eq!(
            failure.to_error(Rank(0)).to_string(),
            "ranks 1 and 2 are at different points of the program: expected \"plan\", found \"headers\", rank 2"
        );
        let end = Offer { kind: Kind::End, ..offer(0, "plan", &[]) };
        let failure = steps.offer(Rank(0), end, now).unwrap_err();
        assert_eq!(failure.found.as_deref(), Some("the end"));
        assert!(steps.offer(Rank(1), offer(0, "plan", &[]), now).is_err(), "a second part");
        assert!(steps.offer(Rank(0), offer(1, "plan", &[]), now).is_err(), "a step too early");
    }

    #[test]
    fn parts_are_bounded_together() {
        let now = Instant::now();
        let many = limits::EXCHANGE_MAX / limits::EXCHANGE_PART;
        let mut steps = Steps::new(many as u32 + 2);
        let part = vec![0; limits::EXCHANGE_PART];
        let offered = (0..=many as u32).map(|rank| steps.offer(Rank(rank), offer(0, "x", &part), now));
        let results: Vec<_> = offered.collect();
        assert!(results[..many].iter().all(Result::is_ok));
        assert_eq!(results[many].as_ref().unwrap_err().kind, ErrorKind::Usage);
    }
}
