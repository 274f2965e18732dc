//! Opens a checkpoint and lists its tensors: headers only, no tensor data is read.
//!
//! `cargo run --example 01_inspect -- MODEL`

use std::error::Error;
use std::io::{self, Write};

use shardlift::Checkpoint;

fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args_os().nth(1).ok_or("usage: 01_inspect MODEL")?;
    let checkpoint = Checkpoint::open(model)?;

    let mut out = io::stdout().lock();
    for tensor in checkpoint.tensors() {
        let file = &checkpoint.file(tensor.file).name;
        writeln!(
            out,
            "{} {} {} in {file}, bytes {}..{}",
            tensor.name, tensor.dtype, tensor.shape, tensor.start, tensor.end
        )?;
    }
    writeln!(out, "{} tensors, {} bytes", checkpoint.tensors().len(), checkpoint.bytes())?;
    for warning in checkpoint.warnings() {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}
