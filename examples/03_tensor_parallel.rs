//! Divides a model over four tensor-parallel ranks, as its config.json says, and loads every partition; a second
//! thread watches the progress.
//!
//! `cargo run --release --example 03_tensor_parallel -- MODEL`

use std::error::Error;
use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use shardlift::{Checkpoint, Loader, Plan, Rank, Rules, World};

fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args_os().nth(1).ok_or("usage: 03_tensor_parallel MODEL")?;
    let checkpoint = Checkpoint::open(model)?;
    let world = World::host(4);
    let rules = Rules::for_model(&checkpoint)?;
    let plan = Plan::new(&checkpoint, &rules, &world)?;
    writeln!(io::stdout(), "{plan}")?; // what will move where, before anything moves

    let load = Loader::new().start(&plan)?;
    let monitor = load.monitor();
    let watcher = thread::spawn(move || -> io::Result<()> {
        loop {
            let progress = monitor.progress();
            writeln!(io::stderr(), "{} of {} bytes", progress.bytes_done, progress.bytes_total)?;
            if progress.bytes_done >= progress.bytes_total {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50)); // here `monitor.cancel()` would end the load
        }
    });
    let loaded = load.finish();
    if loaded.is_ok() {
        watcher.join().map_err(|_| "the watcher panicked")??;
    }
    let (weights, report) = loaded?;

    let mut out = io::stdout().lock();
    for (rank, digest) in weights.check()? {
        writeln!(out, "rank {rank}: {} bytes, digest {digest:016x}", plan.bytes_on(rank))?;
    }
    // An inference engine would now take each rank's tensors by name.
    let name = &plan.params()[plan.rank(Rank(0)).dests[0].param as usize].name;
    let tensor = weights.tensor(Rank(0), name)?;
    writeln!(out, "{name} on rank 0: {} {}", tensor.dtype(), tensor.shape())?;
    writeln!(out, "loaded in {:.3} s, limited by {}", report.seconds, report.bottleneck)?;
    Ok(())
}
