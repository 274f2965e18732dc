//! A load by shardlift, from a path to tensors: opening, planning, a new loader and all its memory are in its seconds.

use compare_protocol::{Failure, Part, Task, serve};
use shardlift::{Checkpoint, Load, Loader, Plan, Rank, Residency, Rules, Tensor, Weights, World};

fn main() -> Result<(), Failure> {
    serve(load, parts)
}

enum Loaded {
    All(Weights),
    /// One tensor of a load that goes on.
    First(Tensor, #[expect(dead_code, reason = "dropping it would wait for its threads")] Load),
}

fn load(task: &Task) -> Result<Loaded, Failure> {
    let residency = match task.loader.as_str() {
        "shardlift" => Residency::Owned,
        "shardlift_mapped" => Residency::Mapped,
        other => return Err(format!("unknown loader {other}").into()),
    };
    let checkpoint = Checkpoint::open(&task.model)?;
    let world = World::host(u32::try_from(task.world)?);
    let world = match task.ranks[..] {
        [rank] if task.world > 1 => world.driving(Rank(u32::try_from(rank)?)),
        _ => world,
    };
    // Whoever cuts asks the model's configuration where; the digests tell whether that is where the others cut.
    let rules = if task.world == 1 { Rules::replicate_all() } else { Rules::for_model(&checkpoint)? };
    let plan = Plan::new(&checkpoint, &rules, &world)?;
    let mut load = Loader::new().residency(residency).start(&plan)?;
    if task.first
        && let Some(tensor) = load.next()
    {
        return Ok(Loaded::First(tensor?, load));
    }
    let (weights, _) = load.finish()?;
    Ok(Loaded::All(weights))
}

fn parts(loaded: &Loaded) -> Result<Vec<Part<'_>>, Failure> {
    let part = |tensor| part(tensor).ok_or_else(|| Failure::from("a tensor in host memory has no bytes to be read"));
    match loaded {
        Loaded::All(weights) => {
            // A tied head is another name for the embeddings, which others do not load twice either.
            let aliases = weights.plan().params().iter().filter(|param| param.alias_of.is_some());
            let aliases: Vec<_> = aliases.map(|param| param.name.clone()).collect();
            let own = |tensor: &&Tensor| !aliases.iter().any(|name| **name == *tensor.name());
            weights.iter().filter(own).map(part).collect()
        }
        Loaded::First(tensor, _) => Ok(vec![part(tensor)?]),
    }
}

fn part(tensor: &Tensor) -> Option<Part<'_>> {
    Some(Part {
        rank: tensor.rank().index(),
        name: tensor.name().into(),
        shape: tensor.shape().dims().to_vec(),
        bytes: tensor.as_bytes()?,
    })
}
