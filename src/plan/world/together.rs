//! Ranks of several processes that read together: each byte once, by one of them, which passes it on to the others.

use super::{Processes, World};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// When ranks that could read together do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Cooperate {
    /// Where it costs less than reading alone, and enough bytes of storage are saved in all
    /// ([`COOPERATE_MIN`](crate::limits::COOPERATE_MIN)).
    #[default]
    Auto,
    /// Wherever storage would be read twice.
    Always,
}

/// Which ranks read together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Together {
    /// The group of each rank; empty where each rank is alone.
    groups: Vec<u32>,
    cooperate: Cooperate,
}

impl Together {
    pub(super) fn check(&self, size: u32) -> Result<()> {
        if self.groups.is_empty() || self.groups.len() == size as usize {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Usage, "every rank needs a group to read with")
            .with_expected(format!("{size} groups"), format!("{} groups", self.groups.len())))
    }
}

impl World {
    /// The same world, in which the ranks with the same number in `groups`, which has one for each rank, read together:
    /// the ranks of a node, for instance, or of a cluster with slow storage. Only where each rank has its own process
    /// and memory of a GPU.
    pub fn reading_together(self, groups: Vec<u32>, cooperate: Cooperate) -> World {
        World { together: Together { groups, cooperate }, ..self }
    }

    /// The same world with a process for each rank, looked at as a whole: a plan for it tells of all of them, and none of
    /// them can load it.
    pub fn per_rank(self) -> World {
        World { processes: Processes::PerRank, driven: self.mesh.ranks(), ..self }
    }

    /// The group of each rank that reads together with others; empty where each reads alone.
    pub fn groups(&self) -> &[u32] {
        &self.together.groups
    }

    /// When groups cooperate.
    pub fn cooperate(&self) -> Cooperate {
        self.together.cooperate
    }

    /// The ranks that `rank` reads together with, itself among them, ascending.
    pub fn group_of(&self, rank: Rank) -> Vec<Rank> {
        let groups = self.groups();
        let Some(group) = groups.get(rank.index()) else { return vec![rank] };
        (0..).zip(groups).filter(|(_, other)| *other == group).map(|(rank, _)| Rank(rank)).collect()
    }
}
