//! What launchers tell the processes that they start: one file for each. The first complete set wins.

mod openmpi;
mod pmi;
mod slurm;
mod torchrun;

use super::vars::{Named, Vars, agree, at_most, below};
use crate::error::Result;

/// What one launcher says.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) launcher: &'static str,
    pub(super) rank: Named,
    pub(super) size: Named,
    pub(super) local_rank: Option<Named>,
    pub(super) local_size: Option<Named>,
    /// The launcher's number of this node.
    pub(super) node: Option<u32>,
    /// What tells this job, or this attempt of a run, from every other.
    pub(super) session: Option<String>,
    /// The host that rank 0 runs on, where the launcher says so.
    pub(super) first_host: Option<String>,
}

/// A launcher's set: `None` where it is not complete.
type Set = fn(Vars<'_>) -> Result<Option<Found>>;

/// Inner launchers first: `srun torchrun` and `mpirun` inside an allocation show two sets, and the outer one is another
/// job's affair.
const SETS: [Set; 4] = [torchrun::find, openmpi::find, pmi::find, slurm::find];

/// The first complete set, if it does not contradict itself.
pub(super) fn find(vars: Vars<'_>) -> Result<Option<Found>> {
    for set in SETS {
        if let Some(found) = set(vars)? {
            found.check()?;
            return Ok(Some(found));
        }
    }
    Ok(None)
}

impl Found {
    fn check(&self) -> Result<()> {
        below(Some(self.rank), Some(self.size))?;
        below(self.local_rank, self.local_size)?;
        at_most(self.local_rank, Some(self.rank))?;
        at_most(self.local_size, Some(self.size))
    }

    /// Refuses a second source of this launcher's that says something else.
    fn agrees(&self, rank: Option<Named>, size: Option<Named>) -> Result<()> {
        agree(rank, Some(self.rank))?;
        agree(size, Some(self.size))
    }
}
