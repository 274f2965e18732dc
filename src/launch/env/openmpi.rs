//! Open MPI, versions 1.3 to 5. `OMPI_COMM_WORLD_NODE_RANK` is no number of the node, but of the process on it.

use super::Found;
use crate::error::Result;
use crate::launch::vars::Vars;

pub(super) fn find(vars: Vars<'_>) -> Result<Option<Found>> {
    let (Some(rank), Some(size)) = (vars.number("OMPI_COMM_WORLD_RANK")?, vars.number("OMPI_COMM_WORLD_SIZE")?) else {
        return Ok(None);
    };
    // The name space of version 4 and later is the job; earlier ones number it.
    let job = vars.text("PMIX_NAMESPACE").or_else(|| vars.text("OMPI_MCA_ess_base_jobid"));
    Ok(Some(Found {
        launcher: "Open MPI",
        rank,
        size,
        local_rank: vars.number("OMPI_COMM_WORLD_LOCAL_RANK")?,
        local_size: vars.number("OMPI_COMM_WORLD_LOCAL_SIZE")?,
        node: None,
        session: job.map(|job| format!("openmpi/{job}")),
        first_host: None,
    }))
}
