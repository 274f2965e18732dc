//! Loads through cuFile, on its twin: a model, its plans, and what must hold of each load.

#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "shapes.rs"]
mod shapes;

use std::path::Path;

use safetensors::tensor::Dtype;
use shapes::Shape;
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, CufileMeasurement, Direct, Loader, Plan, Report, Rules, Weights, World};

pub(crate) const RULES: &str = r#"
rule = [
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**.cast", cast = "bf16", replicate = true },
  { match = "**.transposed", transpose = true, replicate = true },
  { match = "**.turned", transpose = true, cast = "f32", shard = { dim = 0 } },
  { match = "**", replicate = true },
]
"#;

/// A model in which every way into a destination occurs, at offsets that no block starts on; with so many bytes besides.
pub(crate) fn write(folder: &Path, more: usize) {
    let tensors: [Shape<'_>; 12] = [
        ("a.odd", Dtype::U8, &[4097]),
        ("b.rows", Dtype::BF16, &[64, 640]),
        ("c.odd", Dtype::U8, &[3]),
        ("d.columns", Dtype::BF16, &[96, 1024]),
        ("e.cast", Dtype::F32, &[333, 77]),
        ("f.transposed", Dtype::BF16, &[40, 24]),
        ("g.turned", Dtype::BF16, &[132, 68]),
        ("h.columns", Dtype::BF16, &[4096, 32]),
        ("i.whole", Dtype::U8, &[1_234_567]),
        ("j.rows", Dtype::U8, &[4, 500_001]),
        ("k.empty", Dtype::U8, &[0, 5]),
        ("l.more", Dtype::U8, &[more]),
    ];
    shapes::write(folder, &[("one", &tensors[..4]), ("two", &tensors[4..])]);
}

/// The model, and the plan of it for ranks on these GPUs.
pub(crate) fn planned(gpus: &[u32], more: usize) -> (tempfile::TempDir, Plan) {
    twins::cuda::load();
    twins::cufile::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), more);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let plan = plan_for(&checkpoint, World::local(gpus.iter().copied()));
    (folder, plan)
}

pub(crate) fn plan_for(checkpoint: &Checkpoint, world: World) -> Plan {
    Plan::new(checkpoint, &Rules::from_toml(RULES).unwrap(), &world).unwrap()
}

/// A loader that asks for cuFile, with slots that the model does not fit into.
pub(crate) fn loader() -> Loader {
    Loader::new().engine(EngineChoice::Cufile).staging(2 << 20)
}

/// What a plan is, for memory of the host.
pub(crate) fn on_host(plan: &Plan) -> Plan {
    plan_for(plan.checkpoint(), World::host(plan.world().size()))
}

/// Compares all tensors with what buffered reads bring into memory of the host.
pub(crate) fn compare(weights: &Weights, host: &Plan) {
    let (expected, _) = Loader::new().engine(EngineChoice::Pread).load(host).unwrap();
    let mut compared = 0;
    for tensor in weights.iter() {
        let other = expected.tensor(tensor.rank(), tensor.name()).unwrap();
        assert!(tensor.to_bytes().unwrap() == other.to_bytes().unwrap(), "{} {}", tensor.rank(), tensor.name());
        compared += 1;
    }
    assert_eq!(compared, expected.iter().count());
}

/// That a report and the twins tell of reads that went nowhere but to the GPU, and of parts of two blocks at most for each
/// contiguous extent of a file, however many slots it takes.
pub(crate) fn is_direct(plan: &Plan, report: &Report) {
    assert_eq!((report.engine.as_str(), report.direct), ("cufile", Some(Direct::Known)));
    let [direct, bounced, compat, _] = twins::cufile::bytes();
    assert_eq!([bounced, compat], [0, 0], "through memory of the host");
    assert!(direct >= report.needed_bytes && direct <= report.storage_bytes_read, "{direct} {report:?}");
    let from_host: u64 = (0..4).map(|gpu| twins::cuda::bytes(gpu, 0)).sum();
    assert_eq!((from_host, report.peak_pinned_bytes, twins::cuda::calls(Some("cuMemHostRegister"))), (0, 0, 0));
    assert_eq!(report.warnings, Vec::<String>::new());
    let extents = plan.report().reads;
    assert!(report.storage_bytes_read <= report.needed_bytes + 8192 * extents, "{extents} {report:?}");
}

pub(crate) fn nothing_is_left() {
    assert_eq!(
        [twins::cuda::live(), twins::cuda::violations(), twins::cufile::live(), twins::cufile::violations()],
        [0; 4]
    );
}

/// What a measurement of this plan's path could say.
pub(crate) fn measurement(plan: &Plan, direct: Direct, cufile: f64) -> CufileMeasurement {
    let file_system = plan.checkpoint().files()[0].identity.device;
    CufileMeasurement { file_system, gpu: 0, direct, cufile_gb_per_s: cufile, staged_gb_per_s: 5.0 }
}

/// A loader whose `auto` takes cuFile for a plan on GPU 0, of files that are not in the page cache.
pub(crate) fn auto(plan: &Plan) -> Loader {
    Loader::new().staging(2 << 20).drop_page_cache(true).cufile_measured(&[measurement(plan, Direct::Known, 6.0)])
}

pub(crate) const SKIPPED: &str = "SKIPPED: this file system is not read past the page cache";

/// More than `auto` reads through the page cache as a matter of course.
pub(crate) const MORE: usize = 68_000_000;

/// Empties the page cache of a plan's files.
pub(crate) fn cool(plan: &Plan) {
    Loader::new().engine(EngineChoice::Pread).drop_page_cache(true).load(plan).unwrap();
}

#[expect(clippy::print_stdout, reason = "figures for whoever reads the test's output")]
pub(crate) fn println_result(text: &str) {
    println!("{text}");
}
