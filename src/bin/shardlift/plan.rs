//! `shardlift plan`: what would move where, without moving it.

use serde_json::{Map, Value, json};
use shardlift::plan::{Ax, BoxCopy, Mesh, RankPlan};
use shardlift::{Plan, Rank};

use crate::args::{Devices, PlanArgs};
use crate::model;
use crate::output::{Failure, Output, count, fields, hex};

pub(crate) fn run(args: &PlanArgs, output: &mut Output) -> Result<Map<String, Value>, Failure> {
    let PlanArgs { model, mesh, rank, explain, audit, storage, link, json } = args;
    mesh.supported()?;
    let checkpoint = model::open(model)?;
    output.warn(checkpoint.warnings());
    let world = model::world(mesh, *rank, &Devices::Host)?;
    let rules = model::rules(&checkpoint, mesh, &world)?;
    let plan = Plan::new(&checkpoint, &rules, &world)?;

    let explanation = explain.as_ref().map(|tensor| plan.explain(tensor)).transpose()?;
    let seconds = predict(&plan, *storage, *link);
    for line in explanation.clone().unwrap_or_else(|| plan.to_string()).lines() {
        output.line(format_args!("{line}"));
    }
    if let Some(seconds) = seconds {
        output.line(format_args!("predicted: {seconds:.3} s"));
    }
    let counts = |of: fn(&RankPlan) -> usize| plan.ranks().iter().map(of).sum::<usize>();
    let (destinations, pieces) = (counts(|rank| rank.dests.len()), counts(|rank| rank.pieces.len()));
    if *audit {
        // A plan that breaks an invariant does not exist: Plan::new audits every plan.
        output.line(format_args!(
            "audit: passed for {}, {}, {}",
            count(plan.ranks().len(), "rank"),
            count(destinations, "destination"),
            count(pieces, "piece")
        ));
    }
    let audited = json!({ "passed": true, "destinations": destinations, "pieces": pieces });
    // One object for each destination of each rank: only for who reads them.
    let shown = if *json { world.driven() } else { &[] };
    let ranks: Vec<Value> = shown.iter().map(|rank| rank_object(&plan, *rank)).collect();
    Ok(fields(json!({
        "path": checkpoint.path().to_string_lossy(),
        "plan_digest": hex(plan.digest()),
        "mesh": mesh_object(world.mesh()),
        "checkpoint_bytes": checkpoint.bytes(),
        "storage_bytes": plan.storage_bytes(),
        "predicted_seconds": seconds,
        "explain": explanation,
        "audit": audit.then_some(audited),
        "ranks": ranks,
    })))
}

/// Storage and links work at the same time, so the slower of them decides. Rates are in GB/s.
fn predict(plan: &Plan, storage: Option<f64>, link: Option<f64>) -> Option<f64> {
    let read = storage.map(|rate| plan.storage_bytes() as f64 / (rate * 1e9));
    // Every device has a link of its own.
    let most = plan.world().driven().iter().map(|rank| plan.bytes_on(*rank)).max().unwrap_or(0);
    let copy = link.map(|rate| most as f64 / (rate * 1e9));
    match (read, copy) {
        (Some(read), Some(copy)) => Some(read.max(copy)),
        (read, copy) => read.or(copy),
    }
}

pub(crate) fn mesh_object(mesh: Mesh) -> Value {
    let Mesh { dp, pp, cp, tp } = mesh;
    json!({ "dp": dp, "pp": pp, "cp": cp, "tp": tp, "ep": 1 })
}

fn rank_object(plan: &Plan, rank: Rank) -> Value {
    let RankPlan { rank: _, dests, pieces } = plan.rank(rank);
    let mesh = plan.world().mesh();
    let at = |ax| mesh.coordinate(rank, ax);
    let destinations: Vec<Value> = dests
        .iter()
        .map(|dest| {
            let param = &plan.params()[dest.param as usize];
            let own = &pieces[dest.pieces.start as usize..dest.pieces.end as usize];
            json!({
                "name": param.name,
                "dtype": param.dtype.name(),
                "shape": dest.shape.dims(),
                "bytes": dest.bytes,
                "prefill": null,
                "alias_of": param.alias_of.map(|other| &plan.params()[other as usize].name),
                "cast": null,
                "pieces": own.iter().map(|piece| piece_object(plan, piece)).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "rank": rank.0,
        "coord": { "dp": at(Ax::Dp), "pp": at(Ax::Pp), "cp": at(Ax::Cp), "tp": at(Ax::Tp) },
        "bytes": plan.bytes_on(rank),
        "destinations": destinations,
    })
}

fn piece_object(plan: &Plan, piece: &BoxCopy) -> Value {
    let BoxCopy { tensor, src, dst, loops, run } = piece;
    let tensor = plan.tensor(*tensor);
    let loops: Vec<[u64; 3]> = loops.iter().map(|it| [it.count, it.src_stride, it.dst_stride]).collect();
    json!({
        "tensor": tensor.name,
        "file": plan.file(tensor.file).name,
        "file_offset": src,
        "dst_offset": dst,
        "loops": loops,
        "run": run,
    })
}
