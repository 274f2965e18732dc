//! torchrun, and launchers that set what it sets. Its agent starts the ranks of one node and numbers the nodes.

use super::Found;
use crate::error::Result;
use crate::launch::vars::Vars;

/// `RANK` and `WORLD_SIZE` alone are what clusters give to whole pods; with `LOCAL_RANK` they are a process's.
pub(super) fn find(vars: Vars<'_>) -> Result<Option<Found>> {
    if !vars.has(&["RANK", "WORLD_SIZE", "LOCAL_RANK"]) {
        return Ok(None);
    }
    let (Some(rank), Some(size)) = (vars.number("RANK")?, vars.number("WORLD_SIZE")?) else { return Ok(None) };
    // The id of static runs is `none` for all of them. Restarts are no part of it: each agent counts those that its own ranks
    // made needed, so that ranks of one attempt have different counts. All agents end their ranks before any starts others.
    let session = vars
        .text("TORCHELASTIC_RUN_ID")
        .map(|run| format!("torchrun/{run}/{}", vars.text("MASTER_PORT").unwrap_or_default()));
    Ok(Some(Found {
        launcher: "torchrun",
        rank,
        size,
        local_rank: vars.number("LOCAL_RANK")?,
        local_size: vars.number("LOCAL_WORLD_SIZE")?,
        node: vars.number("GROUP_RANK")?.map(|node| node.value),
        session,
        first_host: None,
    }))
}
