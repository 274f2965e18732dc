//! Slurm, inside a step: allocations and batch scripts have ranks in their variables, too, which nobody was started as.

use super::Found;
use crate::error::Result;
use crate::launch::hosts;
use crate::launch::vars::{Named, Vars};

/// Steps that no `srun` made have the highest numbers: batch script, `extern`, interactive shell of an allocation.
const FIRST_SPECIAL_STEP: u32 = 0xffff_fff0;

pub(super) fn find(vars: Vars<'_>) -> Result<Option<Found>> {
    let (Some(step), Some(size)) = (vars.number("SLURM_STEP_ID")?, vars.number("SLURM_STEP_NUM_TASKS")?) else {
        return Ok(None);
    };
    let Some(rank) = vars.number("SLURM_PROCID")?.filter(|_| step.value < FIRST_SPECIAL_STEP) else { return Ok(None) };
    let node = vars.number("SLURM_NODEID")?.map(|node| node.value);
    let tasks = vars.text("SLURM_STEP_TASKS_PER_NODE");
    let here = tasks.zip(node).and_then(|(tasks, node)| hosts::tasks_on(&tasks, node));
    Ok(Some(Found {
        launcher: "Slurm",
        rank,
        size,
        local_rank: vars.number("SLURM_LOCALID")?,
        local_size: here.map(|value| Named { value, name: "SLURM_STEP_TASKS_PER_NODE" }),
        node,
        session: vars.text("SLURM_JOB_ID").map(|job| format!("slurm/{job}.{}", step.value)),
        first_host: vars.text("SLURM_STEP_NODELIST").and_then(|list| hosts::first(&list)),
    }))
}
