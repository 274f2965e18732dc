//! One process for each rank: whichever launcher started it finds the others, makes sure that all load the same, reads what
//! several want once, and is done when all are.
//!
//! `torchrun --no-python --nproc-per-node 4 target/release/examples/04_multi_process MODEL cuda`, or mpirun, or srun;
//! `host` instead of `cuda` needs no GPU.

use std::error::Error;
use std::io::{self, Write};
use std::sync::Arc;

use shardlift::plan::DeviceSpec;
use shardlift::{Checkpoint, Group, GroupOptions, Launch, LaunchOptions, Loader, Rules, Sharing};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, devices] = &arguments[..] else { return Err("usage: 04_multi_process MODEL host|cuda".into()) };
    let launch = Launch::from_env(&LaunchOptions::default())?.ok_or("no launcher started this process")?;
    let device = match devices.as_str() {
        "cuda" => DeviceSpec::Cuda(launch.gpu(None)?),
        _ => DeviceSpec::Host,
    };
    // From here on a rank that fails, dies or falls silent is an error of all.
    let group = Arc::new(Group::join(&launch, &GroupOptions::default())?);
    let loader = Loader::new().group(Some(&group));

    let checkpoint = Checkpoint::open(model)?;
    let world = loader.sharing(Sharing::Auto, &checkpoint, launch.world(device))?;
    let plan = loader.plan(&checkpoint, &Rules::for_model(&checkpoint)?, &world)?;
    let (weights, report) = loader.load(&plan)?;
    group.finish()?;

    let mut out = io::stdout();
    writeln!(
        out,
        "rank {} of {}: {} tensors, {} bytes, {} of them from other ranks, in {:.2} s",
        launch.rank(),
        launch.size(),
        weights.iter().count(),
        report.landed_bytes,
        report.received_bytes,
        report.seconds
    )?;
    Ok(())
}
