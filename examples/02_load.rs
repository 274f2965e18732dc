//! Loads a whole checkpoint into host memory and reads a value out of each tensor.
//!
//! `cargo run --release --example 02_load -- MODEL`

use std::error::Error;
use std::io::{self, Write};

use shardlift::{Checkpoint, Loader, Plan, Rules, World};

fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args_os().nth(1).ok_or("usage: 02_load MODEL")?;
    let checkpoint = Checkpoint::open(model)?;
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1))?;

    let mut load = Loader::new().start(&plan)?;
    let mut out = io::stdout().lock();
    for tensor in &mut load {
        let tensor = tensor?; // complete, in the order they land
        let first: Vec<u8> = tensor.to_bytes()?.iter().take(4).copied().collect();
        writeln!(out, "{} {} {}: first bytes {first:02x?}", tensor.name(), tensor.dtype(), tensor.shape())?;
    }
    let (_weights, report) = load.finish()?; // the memory lives as long as the weights or any tensor
    writeln!(out, "{} bytes in {:.3} s with {}", report.landed_bytes, report.seconds, report.engine)?;
    Ok(())
}
