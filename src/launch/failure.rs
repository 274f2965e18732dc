//! What made a group fail, as every rank of it is told.

use std::time::Duration;

use crate::error::{At, Error, ErrorKind};
use crate::extent::Rank;
use crate::limits;

/// The first failure of a group. What a rank said of itself keeps its kind and place; of a rank that says nothing any more
/// others report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// Whether `at.rank` itself said so, rather than others of it.
    pub(super) said: bool,
    pub(super) kind: ErrorKind,
    pub(super) message: String,
    pub(super) expected: Option<String>,
    pub(super) found: Option<String>,
    pub(super) at: At,
}

impl Failure {
    /// What `rank` says of itself.
    pub(super) fn said(error: &Error, rank: Rank) -> Failure {
        let mut at = error.at().clone();
        at.rank.get_or_insert(rank);
        Failure {
            said: true,
            kind: error.kind(),
            message: error.message().into(),
            expected: error.expected().map(Into::into),
            found: error.found().map(Into::into),
            at,
        }
    }

    /// What is reported of `rank`, or of the group as a whole.
    pub(super) fn of(rank: impl Into<Option<Rank>>, kind: ErrorKind, message: impl Into<String>) -> Failure {
        let at = At { rank: rank.into(), ..At::default() };
        Failure { said: false, kind, message: message.into(), expected: None, found: None, at }
    }

    pub(super) fn with_expected(mut self, expected: impl ToString, found: impl ToString) -> Failure {
        self.expected = Some(expected.to_string());
        self.found = Some(found.to_string());
        self
    }

    /// Its connection ended without a word.
    pub(super) fn gone(rank: Rank) -> Failure {
        Failure::of(rank, ErrorKind::Peer, "a rank is gone: its process ended, or its connection did")
    }

    /// Its connection is there, and nothing comes.
    pub(super) fn silent(rank: Rank, silence: Duration) -> Failure {
        let message = format!("a rank fell silent: nothing heard of it for {:.1} s", silence.as_secs_f64());
        Failure::of(rank, ErrorKind::Peer, message)
    }

    pub(super) fn left(rank: Rank) -> Failure {
        Failure::of(rank, ErrorKind::Peer, "a rank left before all had finished")
    }

    /// It speaks, but not as agreed.
    pub(super) fn malformed(rank: Rank) -> Failure {
        Failure::of(rank, ErrorKind::Peer, "a rank sent what is no message of this version")
    }

    pub(super) fn missing(ranks: &Missing, waited: Duration) -> Failure {
        let message = format!("not all ranks arrived within {:.1} s: {ranks} missing", waited.as_secs_f64());
        Failure::of(ranks.first(), ErrorKind::Peer, message)
    }

    /// The error of this failure, as `rank` returns it.
    pub(super) fn to_error(&self, rank: Rank) -> Error {
        let Failure { said, kind, message, expected, found, at } = self;
        let mut error = Error::new(*kind, message.clone());
        if let (Some(expected), Some(found)) = (expected, found) {
            error = error.with_expected(expected, found);
        }
        if let Some(file) = &at.file {
            error = error.with_file(file);
        }
        if let Some(tensor) = &at.tensor {
            error = error.with_tensor(tensor.clone());
        }
        if let Some((from, to)) = at.bytes {
            error = error.with_bytes(from, to);
        }
        if let Some(rank) = at.rank {
            error = error.with_rank(rank);
        }
        match (said, at.rank == Some(rank)) {
            (true, false) => error.in_context("another rank failed"),
            (false, true) if *kind == ErrorKind::Peer => error.in_context("this rank was given up by the others"),
            _ => error,
        }
    }
}

/// Ranks that something waits for: runs of them, the first few.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Missing {
    /// How many there are.
    pub(super) count: u32,
    /// First and last of each run.
    pub(super) runs: Vec<(u32, u32)>,
}

impl Missing {
    /// The ranks of `ranks`, which ascend.
    pub(super) fn of(ranks: impl IntoIterator<Item = u32>) -> Missing {
        let mut missing = Missing::default();
        for rank in ranks {
            missing.count += 1;
            if let Some((_, last)) = missing.runs.last_mut().filter(|(_, last)| *last + 1 == rank) {
                *last = rank;
            } else if missing.runs.len() < limits::MISSING_SHOWN {
                missing.runs.push((rank, rank));
            }
        }
        missing
    }

    pub(super) fn first(&self) -> Option<Rank> {
        self.runs.first().map(|run| Rank(run.0))
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.count == 1 { "rank " } else { "ranks " })?;
        let mut shown = 0;
        for (index, (first, last)) in self.runs.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first}, {last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            shown += last - first + 1;
        }
        match self.count.saturating_sub(shown) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_names_the_one_that_failed() {
        let error = Error::new(ErrorKind::Truncated, "file ended early").with_expected(16, 12).with_tensor("w");
        let failure = Failure::said(&error.with_file("a").with_bytes(8, 16), Rank(2));
        let told = failure.to_error(Rank(0));
        assert_eq!(told.kind(), ErrorKind::Truncated);
        assert_eq!(
            told.to_string(),
            "another rank failed: file ended early: expected 16, found 12, file a, tensor w, bytes 8..16, rank 2"
        );
        assert!(failure.to_error(Rank(2)).to_string().starts_with("file ended early: "));
        let silent = Failure::silent(Rank(3), Duration::from_secs(3));
        assert_eq!(silent.to_error(Rank(1)).to_string(), "a rank fell silent: nothing heard of it for 3.0 s, rank 3");
        assert_eq!(
            silent.to_error(Rank(3)).to_string(),
            "this rank was given up by the others: a rank fell silent: nothing heard of it for 3.0 s, rank 3"
        );
    }

    #[test]
    fn missing_ranks_are_few_words() {
        let text = |ranks: &[u32]| Missing::of(ranks.iter().copied()).to_string();
        assert_eq!(text(&[3]), "rank 3");
        assert_eq!(text(&[1, 2, 4, 6, 7, 8]), "ranks 1, 2, 4, 6-8");
        let every_other = Missing::of((0..100).map(|n| 2 * n));
        assert_eq!(every_other.runs.len(), limits::MISSING_SHOWN);
        assert!(every_other.to_string().ends_with(" and 84 more"), "{every_other}");
    }
}
