//! MODEL and MESH: from words on the command line to a checkpoint, a world and rules.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use shardlift::plan::{Mesh, ModelOptions, Split, StageSplit};
use shardlift::{Checkpoint, Error, ErrorKind, HubCache, Plan, Rank, Result, Rules, World, limits};

use crate::args::{Devices, MeshArgs, RulesChoice, SplitChoice, Target};

/// Opens MODEL; an existing path wins over a name in the Hugging Face cache.
pub(crate) fn open(model: &Path) -> Result<Checkpoint> {
    // A link to nothing is a path, too, and so is what cannot be looked at.
    let nothing = |error: io::Error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    match model.to_str().filter(|id| model.symlink_metadata().is_err_and(nothing) && is_hub_id(id)) {
        Some(id) => Checkpoint::open_hub(id, &HubCache::from_env()?),
        None => Checkpoint::open(model),
    }
}

/// Opens MODEL with the adapter that MESH names.
pub(crate) fn open_adapted(model: &Path, mesh: &MeshArgs) -> Result<Checkpoint> {
    let checkpoint = open(model)?;
    match &mesh.adapter {
        Some(dir) => checkpoint.with_adapter(dir),
        None => Ok(checkpoint),
    }
}

/// The files that a command reads for its MODEL and MESH, and those that it would if they were there.
pub(crate) fn inputs(checkpoint: &Checkpoint, mesh: &MeshArgs) -> Vec<PathBuf> {
    let path = checkpoint.path();
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
    let mut inputs: Vec<PathBuf> = checkpoint.files().iter().map(|file| file.path.clone()).collect();
    inputs.extend(["config.json", "model.safetensors.index.json"].map(|name| folder.join(name)));
    inputs.extend(mesh.adapter.iter().map(|dir| dir.join("adapter_config.json")));
    if let RulesChoice::File(path) | RulesChoice::HfPlan(path) = &mesh.rules {
        inputs.push(path.clone());
    }
    inputs.extend(mesh.pp_split.iter().filter_map(SplitChoice::file).cloned());
    inputs.extend(mesh.ep_split.iter().filter_map(SplitChoice::file).cloned());
    inputs
}

/// Whether this reads as `org/name[@revision]`.
fn is_hub_id(model: &str) -> bool {
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let word = |text: &str| {
        !text.is_empty()
            && !text.starts_with('.')
            && text.chars().all(|char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.'))
    };
    let named = id.split_once('/').is_some_and(|(org, name)| word(org) && word(name));
    named && !id.ends_with(".safetensors") && !revision.is_empty()
}

/// How many ranks MESH has.
pub(crate) fn ranks(&MeshArgs { tp, pp, dp, cp, .. }: &MeshArgs) -> Result<u32> {
    let ranks = [dp, pp, cp, tp].iter().try_fold(1u32, |product, size| product.checked_mul(*size));
    let allowed = ranks.filter(|&ranks| ranks <= limits::RANKS_MAX);
    allowed.ok_or_else(|| Error::new(ErrorKind::Usage, "too many ranks"))
}

/// The world that MESH describes, as this process drives it.
pub(crate) fn world(mesh: &MeshArgs, rank: Option<u32>, devices: &Devices) -> Result<World> {
    let MeshArgs { tp, pp, ep, dp, cp, order, .. } = *mesh;
    let ranks = ranks(mesh)?;
    let base = match devices {
        Devices::HostStaged => World::host_staged(tp),
        Devices::Host => World::host(tp),
        Devices::Cuda(gpus) => match (rank, &gpus[..]) {
            (Some(_), [gpu]) => World::local(vec![*gpu; ranks as usize]),
            // A launcher that shows each process its own GPU shows it as the first.
            (Some(_), []) if visible_gpus() == Some(1) => World::local(vec![0; ranks as usize]),
            (_, []) => World::local(0..ranks),
            (_, gpus) => World::local(gpus.iter().copied()),
        },
    };
    let world = base.with_mesh(Mesh { dp, pp, cp, tp, ep, order: order.unwrap_or_default() });
    match rank {
        Some(rank) if rank >= ranks => {
            Err(Error::new(ErrorKind::Usage, "no such rank").with_expected(format!("less than {ranks}"), rank))
        }
        Some(rank) => Ok(world.driving(Rank(rank))),
        None => Ok(world),
    }
}

/// How many GPUs the driver shows, if there is one.
#[cfg(feature = "cuda")]
pub(crate) fn visible_gpus() -> Option<u32> {
    shardlift::device::cuda_machine().ok().map(|machine| machine.devices.len() as u32)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn visible_gpus() -> Option<u32> {
    None
}

/// The rules that `--rules` names.
pub(crate) fn rules(checkpoint: &Checkpoint, mesh: &MeshArgs, world: &World) -> Result<Rules> {
    let stages = mesh.pp_split.as_ref().map(|split| split.read(StageSplit::from_counts)).transpose()?;
    let experts = mesh.ep_split.as_ref().map(|split| split.read(Split::from_table)).transpose()?;
    let is_model = mesh.rules == RulesChoice::Auto;
    let given = [
        ("--ep-split", experts.is_some()),
        ("--refine-scales", mesh.refine_scales),
        ("--target", mesh.target != Target::Plain),
    ];
    for (flag, given) in given {
        if given && !is_model {
            return Err(Error::new(ErrorKind::Usage, format!("{flag} is for rules from config.json: --rules auto")));
        }
    }
    // Whole on one rank only where nothing else is asked for: no flag is ignored.
    let as_it_is = world.size() == 1 && stages.is_none() && given.iter().all(|(_, given)| !given);
    let split = |rules| stages.clone().into_iter().fold(rules, Rules::stage_split);
    match &mesh.rules {
        RulesChoice::Replicate => Ok(split(Rules::replicate_all())),
        RulesChoice::File(path) => Rules::from_file(path).map(split),
        RulesChoice::HfPlan(path) => Rules::from_hf_plan(path, checkpoint, world.mesh()).map(split),
        RulesChoice::Auto => match checkpoint.partition_of() {
            // Divided already: the configuration beside it is of the whole model.
            Some(_) if as_it_is => Ok(Rules::replicate_all()),
            Some(rank) => Err(Error::new(
                ErrorKind::Rules,
                format!("this is the partition of rank {rank} already: load it on one rank, or divide the whole model"),
            )
            .with_file(checkpoint.path())),
            None if checkpoint.config().is_none() && as_it_is => Ok(Rules::replicate_all()),
            None => {
                let mut options = ModelOptions::default();
                options.target = mesh.target.into();
                options.mesh = world.mesh();
                options.stages = stages;
                options.experts = experts;
                options.refine_scales = mesh.refine_scales;
                Rules::for_model_with(checkpoint, &options)
            }
        },
    }
}

/// The names of the tensors that match a pattern of the rules' language.
pub(crate) fn matching(checkpoint: &Checkpoint, pattern: &str) -> Result<HashSet<String>> {
    let rules = Rules::replicate_all().keeping(pattern);
    let plan = Plan::new(checkpoint, &rules, &World::host(1))?;
    Ok(plan.params().iter().map(|param| param.name.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::is_hub_id;

    #[test]
    fn names_in_the_cache() {
        for id in ["a/b", "meta-llama/Llama-3.1-8B", "a/b@main", "a/b@refs/pr/1"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["a", "a/b/c", "./a", "../b", "/a", "a/", "a/b@", "a/b.safetensors", "a/.b"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
