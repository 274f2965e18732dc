//! Loads a Llama into buffers of an engine's own: the rows of q, k and v in one, those of gate and up in another, with no
//! second copy; then compares them with the tensors of the checkpoint.
//!
//! `cargo run --release --example 08_fused_buffers -- MODEL`

use std::error::Error;
use std::io::{self, Write};

use shardlift::plan::{Cut, Expr, Request};
use shardlift::{Checkpoint, Dtype, Loader, Plan, Rank, Rules, Shape, World};

const RANKS: u32 = 2;

/// The engine's buffer for one destination of one rank.
struct Buffer {
    name: String,
    rank: Rank,
    elements: Vec<u16>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args_os().nth(1).ok_or("usage: 08_fused_buffers MODEL")?;
    let checkpoint = Checkpoint::open(model)?;
    let world = World::host(RANKS);

    let mut buffers = Vec::new();
    let mut requests = Vec::new();
    for (name, parts) in (0..).map_while(|layer| fused(&checkpoint, layer)).flatten() {
        let shapes = parts.iter().map(|part| Ok(&checkpoint.tensor(part).ok_or("no such tensor")?.shape));
        let shapes: Vec<&Shape> = shapes.collect::<Result<_, &str>>()?;
        let rows = shapes.iter().map(|shape| shape[0]).sum::<u64>() / u64::from(RANKS);
        let columns = shapes[0][1];

        // Each rank's rows of all parts, behind each other.
        let sharded =
            |part: &String| Expr::Shard { x: Box::new(Expr::Tensor(part.clone())), dim: 0, cut: Cut::default() };
        let expr = Expr::Concat { dim: 0, parts: parts.iter().map(sharded).collect() };
        let mut request = Request::new(&name, Dtype::F16, expr).shape([rows, columns]);
        for rank in (0..RANKS).map(Rank) {
            let mut elements = vec![0; usize::try_from(rows * columns)?];
            request = request.memory(rank, elements.as_mut_ptr().cast(), 2 * elements.len());
            buffers.push(Buffer { name: name.clone(), rank, elements });
        }
        requests.push(request);
    }

    let plan = Plan::of_requests(&checkpoint, &requests, &world)?;
    // SAFETY: the buffers are as long as they are said to be, their elements stay where they are, and nobody uses them
    // until the weights are dropped.
    let load = unsafe { Loader::new().start_requests(&plan, &requests) }?;
    let monitor = load.monitor();
    let (weights, report) = load.finish()?;
    drop(weights);
    if monitor.progress().abandoned_bytes > 0 {
        return Err("a read that stalled may still write to the buffers".into());
    }

    let whole = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1))?;
    let (whole, _) = Loader::new().load(&whole)?;
    for (at, Buffer { name, rank, elements }) in buffers.iter().enumerate() {
        let layer = at as u64 / 2 / u64::from(RANKS);
        let parts = fused(&checkpoint, layer).into_iter().flatten().find(|(fused, _)| fused == name);
        let mut expected = Vec::new();
        for part in parts.ok_or("no such buffer")?.1 {
            let tensor = whole.tensor(Rank(0), &part)?;
            let bytes = tensor.as_bytes().ok_or("not in host memory")?;
            let share = bytes.len() / RANKS as usize;
            expected.extend_from_slice(&bytes[rank.index() * share..][..share]);
        }
        if elements.iter().flat_map(|element| element.to_le_bytes()).ne(expected) {
            return Err(format!("{name} on rank {rank} is not what it should be").into());
        }
    }
    let (tensors, bytes) = plan.skipped();
    let mut out = io::stdout().lock();
    writeln!(out, "{} buffers are as they should be, loaded in {:.3} s", buffers.len(), report.seconds)?;
    writeln!(out, "{tensors} tensors that no request names were not loaded: {bytes} bytes")?;
    Ok(())
}

/// The fused destinations of a layer and what they are made of; `None` if there is no such layer.
fn fused(checkpoint: &Checkpoint, layer: u64) -> Option<[(String, Vec<String>); 2]> {
    let layer = format!("model.layers.{layer}");
    checkpoint.tensor(&format!("{layer}.self_attn.q_proj.weight"))?;
    let weights = |module: &str, names: &[&str]| {
        names.iter().map(|name| format!("{layer}.{module}.{name}_proj.weight")).collect::<Vec<_>>()
    };
    Some([
        (format!("{layer}.attention.qkv"), weights("self_attn", &["q", "k", "v"])),
        (format!("{layer}.mlp.gate_up"), weights("mlp", &["gate", "up"])),
    ])
}
