//! Launchers that speak PMI: hydra (MPICH, Intel MPI), MVAPICH2, PALS, and Slurm with `--mpi=pmi2`. Rank and size have one
//! name, the rest one for each.

use super::{Found, slurm};
use crate::error::Result;
use crate::launch::vars::Vars;

pub(super) fn find(vars: Vars<'_>) -> Result<Option<Found>> {
    let (Some(rank), Some(size)) = (vars.number("PMI_RANK")?, vars.number("PMI_SIZE")?) else { return Ok(None) };
    let job = vars.text("PMI_JOBID");
    // Slurm's own PMI names the step, and leaves to Slurm's variables what PMI has no words for.
    if let Some(job) = &job
        && let Some(step) = slurm::find(vars)?
        && step.session.as_deref() == Some(&format!("slurm/{job}"))
    {
        step.agrees(Some(rank), Some(size))?;
        return Ok(Some(step));
    }
    Ok(Some(Found {
        launcher: "PMI",
        rank,
        size,
        local_rank: vars.first(&["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"])?,
        local_size: vars.first(&["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"])?,
        node: None,
        session: job.map(|job| format!("pmi/{job}")),
        first_host: None,
    }))
}
