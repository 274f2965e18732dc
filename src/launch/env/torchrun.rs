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
    // The id of static runs is `none` for all of them, and a restart has the id of the attempt before it.
    let session = vars.text("TORCHELASTIC_RUN_ID").map(|run| {
        let part = |name| vars.text(name).unwrap_or_default();
        format!("torchrun/{run}/{}/{}", part("MASTER_PORT"), part("TORCHELASTIC_RESTART_COUNT"))
    });
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
