//! `shardlift reshard`: each rank's partition as a checkpoint of its own.

use serde_json::{Map, Value, json};
use shardlift::{Loader, Plan};

use crate::args::{Devices, ReshardArgs};
use crate::interrupt::Interrupt;
use crate::load::{Watch, report_object};
use crate::model;
use crate::output::{Failure, Output, fields, hex, human_bytes};
use crate::plan::mesh_object;

pub(crate) fn run(
    args: &ReshardArgs,
    output: &mut Output,
    interrupt: &Interrupt,
) -> Result<Map<String, Value>, Failure> {
    let ReshardArgs { model, out, mesh, force, json: _ } = args;
    let checkpoint = model::open_adapted(model, mesh)?;
    output.warn(checkpoint.warnings());
    let world = model::world(mesh, None, &Devices::Host)?;
    let rules = model::rules(&checkpoint, mesh, &world)?;
    let plan = Plan::new(&checkpoint, &rules, &world)?;
    interrupt.waits(); // so that no temporary folder stays behind
    interrupt.check()?;

    let failed = |error| Failure::started(error).with_signal(interrupt.signal());
    interrupt.makes();
    let reshard = Loader::new().start_reshard(&plan, out, *force).map_err(failed)?;
    interrupt.removes(reshard.partial());
    let monitor = reshard.monitor();
    interrupt.cancels(monitor.clone());
    let watch = Watch::start(monitor.clone(), output.warnings());
    let report = reshard.finish().map_err(failed)?;
    drop(watch);
    // What was odd while bytes moved is told already; what came after is not.
    output.warn(&report.warnings[monitor.warnings().len()..]);

    let mut files = Vec::new();
    for rank in world.driven() {
        let (name, bytes) = (format!("model-rank-{rank}-part-0.safetensors"), plan.bytes_on(*rank));
        output.line(format_args!("{name}: {}", human_bytes(bytes)));
        files.push(json!({ "rank": rank.0, "file": name, "bytes": bytes }));
    }
    output.line(format_args!("wrote {} in {:.3} s", out.display(), report.seconds));
    let mut object = report_object(&report);
    object.extend(fields(json!({
        "out": out.to_string_lossy(),
        "mesh": mesh_object(world.mesh()),
        "checkpoint_bytes": checkpoint.bytes(),
        "plan_digest": hex(plan.digest()),
        "ranks": files,
    })));
    Ok(object)
}
