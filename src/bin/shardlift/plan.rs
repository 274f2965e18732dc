//! `shardlift plan`: what would move where, without moving it.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use shardlift::plan::{Ax, BoxCopy, BoxFill, ClassReport, Cooperate, Dest, Mesh, Multiplicity, RankPlan, Traffic};
use shardlift::{Plan, Rank, World};

use crate::args::{CooperateChoice, Devices, PlanArgs};
use crate::output::{Answer, Array, Failure, Output, count, fields, hex};
use crate::{model, rates};

/// What `--json` shows of a plan.
#[derive(Debug, Serialize)]
pub(crate) struct Planned {
    #[serde(flatten)]
    fields: Map<String, Value>,
    #[serde(rename = "ranks", serialize_with = "ranks")]
    plan: Plan,
}

pub(crate) fn run(args: &PlanArgs, output: &mut Output) -> Result<Answer, Failure> {
    let PlanArgs { model, mesh, rank, cooperate, explain, audit, storage, link, doctor, json } = args;
    let measured = doctor.as_deref().map(rates::measured).transpose()?.unwrap_or_default();
    let checkpoint = model::open_adapted(model, mesh)?;
    output.warn(checkpoint.warnings());
    let world = processes(model::world(mesh, *rank, &Devices::Host)?, *rank, *cooperate);
    let rules = model::rules(&checkpoint, mesh, &world)?;
    let plan = Plan::new(&checkpoint, &rules, &world)?;

    let explanation = explain.as_ref().map(|tensor| plan.explain(tensor)).transpose()?;
    let report = plan.report();
    let seconds = report.predicted_seconds(storage.or(measured.storage), link.or(measured.link));
    // Nothing is told with `--json`, and telling all of a plan takes longer than many a plan.
    if !json {
        let told = explanation.clone().unwrap_or_else(|| format!("{plan}{report}"));
        told.lines().for_each(|line| output.line(format_args!("{line}")));
    }
    if let Some(seconds) = seconds {
        output.line(format_args!("predicted: {seconds:.3} s"));
    }
    // Only where there is a cuFile: others have nothing to know.
    let direct = direct();
    if let Some(direct) = &direct {
        output.line(format_args!("engine cufile, direct: {direct}"));
    }
    let audited = audit.then(|| audited(&plan, output));
    let classes: Vec<Value> = report.classes.iter().map(class_object).collect();
    let fields = fields(json!({
        "path": checkpoint.path().to_string_lossy(),
        "plan_digest": hex(plan.digest()),
        "mesh": mesh_object(world.mesh()),
        "checkpoint_bytes": checkpoint.bytes(),
        "storage_bytes": plan.storage_bytes(),
        "predicted_seconds": seconds,
        "needed_bytes": report.needed_bytes,
        "read_bytes": report.read_bytes,
        "over_read": report.over_read(),
        "reads": report.reads,
        "pieces": report.pieces,
        "kernel_launches": report.launches,
        "peak_staging_bytes": report.peak_staging_bytes,
        "sent_bytes": report.sent_bytes,
        "received_bytes": report.received_bytes,
        "direct": direct,
        "classes": classes,
        "explain": explanation,
        "audit": audited,
    }));
    Ok(Answer::Planned(Box::new(Planned { fields, plan })))
}

/// The world of ranks with a process each, where `--cooperate` asks for them: all on one node, nothing in the page cache.
fn processes(world: World, rank: Option<u32>, cooperate: Option<CooperateChoice>) -> World {
    let Some(choice) = cooperate else { return world };
    let world = if rank.is_none() { world.per_rank() } else { world };
    let groups = vec![0; world.size() as usize];
    match choice {
        CooperateChoice::Auto => world.reading_together(groups, Cooperate::Auto),
        CooperateChoice::Always | CooperateChoice::Cluster => world.reading_together(groups, Cooperate::Always),
        CooperateChoice::Never => world,
    }
}

/// Whether reads through this machine's cuFile would be known to be direct; nothing of it is opened.
#[cfg(feature = "cuda")]
fn direct() -> Option<String> {
    shardlift::read::cufile_facts().ok().map(|facts| facts.direct.to_string())
}

#[cfg(not(feature = "cuda"))]
fn direct() -> Option<String> {
    None
}

fn class_object(of: &ClassReport) -> Value {
    json!({
        "class": of.class,
        "tensors": of.tensors,
        "needed_bytes": of.needed_bytes,
        "read_bytes": of.read_bytes,
        "over_read": of.over_read(),
        "lowering": of.lowering.iter().map(|it| it.name()).collect::<Vec<_>>(),
        "reading": of.reading.iter().map(|it| it.name()).collect::<Vec<_>>(),
        "reads": of.reads,
        "pieces": of.pieces,
        "kernel_launches": of.launches,
    })
}

/// What the audit proved and counted. A plan that breaks an invariant does not exist: `Plan::new` audits every plan.
fn audited(plan: &Plan, output: &mut Output) -> Value {
    let counts = |of: fn(&RankPlan) -> usize| plan.ranks().iter().map(of).sum::<usize>();
    let (destinations, pieces) = (counts(|rank| rank.dests.len()), counts(|rank| rank.pieces.len()));
    output.line(format_args!(
        "audit: passed for {}, {}, {}; how many ranks hold the bytes of each class:",
        count(plan.ranks().len(), "rank"),
        count(destinations, "destination"),
        count(pieces, "piece")
    ));
    let classes = plan.multiplicities();
    for class in &classes {
        output.line(format_args!("{class}"));
    }
    let held = |class: &Multiplicity, &(times, bytes): &(u64, u64)| json!({ "times": times, "bytes": bytes, "meaning": class.meaning(times) });
    let object = |class: &Multiplicity| {
        let multiplicity: Vec<Value> = class.bytes.iter().map(|bytes| held(class, bytes)).collect();
        json!({
            "class": class.class,
            "tensors": class.tensors,
            "holders": class.holders,
            "skipped_by": class.skipped_by,
            "multiplicity": multiplicity,
        })
    };
    let classes: Vec<Value> = classes.iter().map(object).collect();
    json!({ "passed": true, "destinations": destinations, "pieces": pieces, "classes": classes })
}

pub(crate) fn mesh_object(mesh: Mesh) -> Value {
    let Mesh { dp, pp, cp, tp, ep, order: _ } = mesh;
    json!({ "dp": dp, "pp": pp, "cp": cp, "tp": tp, "ep": ep })
}

/// One object for each destination of each rank, which is most of the output: none is kept.
fn ranks<S: Serializer>(plan: &Plan, serializer: S) -> Result<S::Ok, S::Error> {
    let traffic = plan.traffic();
    let object = |&rank: &Rank| RankObject { plan, rank, traffic: traffic[rank.index()] };
    serializer.collect_seq(plan.world().driven().iter().map(object))
}

struct RankObject<'a> {
    plan: &'a Plan,
    rank: Rank,
    traffic: Traffic,
}

impl Serialize for RankObject<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<D> {
            rank: u32,
            coord: Value,
            bytes: u64,
            sent_bytes: u64,
            received_bytes: u64,
            destinations: D,
        }
        let RankObject { plan, rank, traffic: Traffic { sent_bytes, received_bytes, .. } } = *self;
        let mesh = plan.world().mesh();
        let at = |ax| mesh.coordinate(rank, ax);
        let RankPlan { rank: _, dests, pieces, fills } = plan.rank(rank);
        let fields = Fields {
            rank: rank.0,
            coord: json!({ "dp": at(Ax::Dp), "pp": at(Ax::Pp), "cp": at(Ax::Cp), "tp": at(Ax::Tp), "ep": at(Ax::Ep) }),
            bytes: plan.bytes_on(rank),
            sent_bytes,
            received_bytes,
            destinations: Array(|| dests.iter().map(|dest| DestObject { plan, dest, pieces, fills })),
        };
        fields.serialize(serializer)
    }
}

struct DestObject<'a> {
    plan: &'a Plan,
    dest: &'a Dest,
    /// Those of all destinations of the rank.
    pieces: &'a [BoxCopy],
    /// Those of all destinations of the rank.
    fills: &'a [BoxFill],
}

impl Serialize for DestObject<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a, F, P> {
            name: &'a str,
            dtype: &'static str,
            shape: &'a [u64],
            bytes: u64,
            prefill: Option<String>,
            fills: F,
            alias_of: Option<&'a str>,
            cast: Option<Value>,
            pieces: P,
        }
        let DestObject { plan, dest, pieces, fills } = *self;
        let param = &plan.params()[dest.param as usize];
        let fills = &fills[dest.fills.start as usize..dest.fills.end as usize];
        let own = &pieces[dest.pieces.start as usize..dest.pieces.end as usize];
        let fields = Fields {
            name: &param.name,
            dtype: param.dtype.name(),
            shape: dest.shape.dims(),
            bytes: dest.bytes,
            prefill: fills.first().map(|fill| fill.fill.to_string()),
            fills: Array(|| fills.iter().map(fill_object)),
            alias_of: param.alias_of.map(|other| plan.params()[other as usize].name.as_str()),
            cast: param.cast.map(|cast| json!({ "from": cast.from().name(), "to": cast.to().name() })),
            pieces: Array(|| own.iter().map(|piece| piece_object(plan, piece))),
        };
        fields.serialize(serializer)
    }
}

#[derive(Serialize)]
struct FillObject {
    value: String,
    dst_offset: u64,
    loops: Vec<[u64; 2]>,
    run: u64,
}

fn fill_object(fill: &BoxFill) -> FillObject {
    FillObject {
        value: fill.fill.to_string(),
        dst_offset: fill.dst,
        loops: fill.loops.iter().map(|&(count, stride)| [count, stride]).collect(),
        run: fill.run,
    }
}

#[derive(Serialize)]
struct PieceObject<'a> {
    tensor: &'a str,
    file: &'a str,
    file_offset: u64,
    dst_offset: u64,
    loops: Vec<[u64; 3]>,
    run: u64,
}

fn piece_object<'a>(plan: &'a Plan, piece: &BoxCopy) -> PieceObject<'a> {
    // What a kernel permutes or casts after landing lists its file side in the order of the destination.
    let loops = piece.destination_loops();
    let BoxCopy { tensor, src, dst, loops: _, run, cast: _ } = *piece;
    let tensor = plan.tensor(tensor);
    PieceObject {
        tensor: &tensor.name,
        file: &plan.file(tensor.file).name,
        file_offset: src,
        dst_offset: dst,
        loops: loops.iter().map(|it| [it.count, it.src_stride, it.dst_stride]).collect(),
        run,
    }
}
