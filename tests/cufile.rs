//! Loads through cuFile, on its twin: from storage into memory of a GPU and nowhere else. One test function for each process
//! that is needed: what the twins are told and count is of the whole process.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};
use shardlift::read::{Cufile, Engine, EngineChoice, Registrar, Work};
use shardlift::{
    Checkpoint, CufileMeasurement, Direct, ErrorKind, Loader, Memory, Plan, Rank, Report, Rules, Weights, World, limits,
};
use twins::child::passes;

const RULES: &str = r#"
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
fn write(folder: &Path, more: usize) {
    let shapes: [(&str, Dtype, &[usize]); 12] = [
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
    let mut state = 7u32;
    let mut bytes = |count: usize| -> Vec<u8> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..count).map(next).collect()
    };
    for (file, part) in [("one", &shapes[..4]), ("two", &shapes[4..])] {
        let width = |dtype| match dtype {
            Dtype::F32 => 4,
            Dtype::BF16 => 2,
            _ => 1,
        };
        let data: BTreeMap<&str, (Dtype, &[usize], Vec<u8>)> = part
            .iter()
            .map(|&(name, dtype, shape)| (name, (dtype, shape, bytes(shape.iter().product::<usize>() * width(dtype)))))
            .collect();
        let views = data
            .iter()
            .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        let path = folder.join(format!("{file}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
        // Clean pages can be forgotten.
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
    }
}

/// The model, and the plan of it for ranks on these GPUs.
fn planned(gpus: &[u32], more: usize) -> (tempfile::TempDir, Plan) {
    twins::cuda::load();
    twins::cufile::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), more);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let plan = plan_for(&checkpoint, World::local(gpus.iter().copied()));
    (folder, plan)
}

fn plan_for(checkpoint: &Checkpoint, world: World) -> Plan {
    Plan::new(checkpoint, &Rules::from_toml(RULES).unwrap(), &world).unwrap()
}

/// A loader that asks for cuFile, with slots that the model does not fit into.
fn loader() -> Loader {
    Loader::new().engine(EngineChoice::Cufile).staging(2 << 20)
}

/// What a plan is, for memory of the host.
fn on_host(plan: &Plan) -> Plan {
    plan_for(plan.checkpoint(), World::host(plan.world().size()))
}

/// Compares all tensors with what buffered reads bring into memory of the host.
fn compare(weights: &Weights, host: &Plan) {
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
fn is_direct(plan: &Plan, report: &Report) {
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

fn nothing_is_left() {
    assert_eq!(
        [twins::cuda::live(), twins::cuda::violations(), twins::cufile::live(), twins::cufile::violations()],
        [0; 4]
    );
}

/// In a process of its own: every way into a destination is bit-exact, and all bytes came directly.
#[test]
#[ignore = "run by another test"]
fn exact() {
    for gpus in [&[0u32][..], &[2, 2], &[1, 1, 1, 1]] {
        let (_folder, plan) = planned(gpus, 10_000_000);
        for memory in [Memory::Blocks, Memory::PerTensor] {
            let loader = loader().memory(memory).digests(memory == Memory::Blocks);
            twins::cuda::reset_counts();
            twins::cufile::reset_counts();
            let (weights, report) = loader.load(&plan).unwrap();
            is_direct(&plan, &report);
            weights.check().unwrap();
            weights.check_moved().unwrap();
            compare(&weights, &on_host(&plan));
            // Slots stay, with their registrations, and the driver stays open.
            let calls = |name| twins::cufile::calls(Some(name));
            assert_eq!((calls("cuFileBufRegister"), calls("cuFileHandleRegister") > 0), (2, true));
            let (again, _) = loader.load(&plan).unwrap();
            assert_eq!((calls("cuFileBufRegister"), calls("cuFileBufDeregister")), (2, 0));
            drop((weights, again));
            loader.release();
            assert_eq!(twins::cufile::live(), 0);
            // A load into the host's memory gives them back, too.
            loader.load(&plan).unwrap();
            assert_eq!(twins::cufile::live(), 2);
            let host = plan_for(plan.checkpoint(), World::host(1));
            let loader = loader.engine(EngineChoice::Pread);
            loader.load(&host).unwrap();
            assert_eq!(twins::cufile::live(), 0);
            drop(loader);
            nothing_is_left();
        }
    }
}

/// In a process of its own: elements that are converted or moved one by one, in tensors that start within an element of the
/// file. No place is the end of an element and of a block there, so one block for each slot that ends is read twice.
#[test]
#[ignore = "run by another test"]
fn crooked() {
    twins::cuda::load();
    twins::cufile::load();
    let folder = tempfile::tempdir().unwrap();
    let header = r#"{"a.odd":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
        "b.cast":{"dtype":"F32","shape":[1000,1000],"data_offsets":[3,4000003]},
        "c.turned":{"dtype":"BF16","shape":[1500,1000],"data_offsets":[4000003,7000003]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend((0..7_000_003u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8));
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let rules = r#"
        rule = [
          { match = "*.cast", cast = "bf16", replicate = true },
          { match = "*.turned", transpose = true, cast = "f32", shard = { dim = 0 } },
          { match = "**", replicate = true },
        ]"#;
    let planned = |world| Plan::new(&checkpoint, &Rules::from_toml(rules).unwrap(), &world).unwrap();
    let plan = planned(World::local([0, 0]));
    let (weights, report) = loader().load(&plan).unwrap();
    let extents = plan.report().reads;
    let ends = report.reads - extents;
    assert!(ends >= 4, "{report:?}");
    let most = report.needed_bytes + 8192 * extents + 4096 * ends;
    assert!(report.storage_bytes_read <= most, "{extents} {report:?}");
    compare(&weights, &planned(World::host(2)));
    drop(weights);
    nothing_is_left();
}

/// In a process of its own: one rank of a world reads no more than with another engine, but for blocks.
#[test]
#[ignore = "run by another test"]
fn member() {
    let (_folder, plan) = planned(&[0, 1, 2, 3], 0);
    for rank in 0..4 {
        let world = World::local(0..4).driving(Rank(rank));
        let plan = plan_for(plan.checkpoint(), world);
        let (weights, report) = loader().load(&plan).unwrap();
        weights.check().unwrap();
        let (_, other) = Loader::new().engine(EngineChoice::Pread).staging(2 << 20).load(&plan).unwrap();
        assert!(report.storage_bytes_read <= other.storage_bytes_read + 8192 * report.reads, "{report:?} {other:?}");
        drop(weights);
    }
    nothing_is_left();
}

/// In a process of its own, whose cuFile brings a part of every third read only.
#[test]
#[ignore = "run by another test"]
fn short() {
    let (_folder, plan) = planned(&[0, 0], 10_000_000);
    let (weights, report) = loader().load(&plan).unwrap();
    // As many as of another engine with such slots and blocks, and one more for each that was short.
    let (_, whole) = Loader::new().engine(EngineChoice::Uring).staging(2 << 20).load(&plan).unwrap();
    if whole.engine == "uring" {
        assert!(report.reads >= whole.reads + whole.reads / 3, "{report:?} {whole:?}");
    }
    weights.check().unwrap();
    compare(&weights, &on_host(&plan));
    drop(weights);
    nothing_is_left();
}

/// In a process of its own, whose cuFile brings less of every read than it is asked for, and so at last nothing of use.
#[test]
#[ignore = "run by another test"]
fn shorter() {
    let (_folder, plan) = planned(&[0], MORE);
    let error = loader().load(&plan).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Truncated, "file ended early"), "{error}");
    nothing_is_left();
    cool(&plan);
    let (weights, report) = auto(&plan).load(&plan).unwrap();
    if report.engine != "cufile" {
        return println_result(SKIPPED);
    }
    assert_eq!((report.warnings.len(), report.direct), (1, Some(Direct::No)), "{report:?}");
    assert!(report.warnings[0].contains("less than a block"), "{report:?}");
    weights.check().unwrap();
    drop(weights);
    nothing_is_left();
}

/// In a process of its own, whose cuFile registers one slot and no more.
#[test]
#[ignore = "run by another test"]
fn limited() {
    let (_folder, plan) = planned(&[0], 10_000_000);
    let loader = loader();
    let (weights, report) = loader.load(&plan).unwrap();
    let limited = |warning: &String| warning.contains("fewer slots") && warning.contains("5016");
    assert!(report.warnings.iter().any(limited), "{:?}", report.warnings);
    assert_eq!(twins::cufile::bytes()[3], 1 << 20);
    compare(&weights, &on_host(&plan));
    drop((weights, loader));
    nothing_is_left();
}

/// In a process of its own: each call of cuFile that a load makes fails in turn; who asked for it is told.
#[test]
#[ignore = "run by another test"]
fn sweep() {
    let (_folder, plan) = planned(&[0, 0], 1_000_000);
    let load = |loader: &Loader| loader.load(&plan)?.0.check();
    load(&loader()).unwrap();
    twins::cufile::reset_counts();
    load(&loader()).unwrap();
    let calls = ["cuFileHandleRegister", "cuFileBufRegister", "cuFileRead", "cuFileBufDeregister"];
    let counts = calls.map(|call| twins::cufile::calls(Some(call)));
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    for (call, count) in calls.iter().zip(counts) {
        for n in 1..=count {
            for code in ["5011", "5030", "-5", "-22"] {
                twins::cufile::fault(&format!("{call}@{n}={code}"));
                let outcome = load(&loader());
                twins::cufile::fault("");
                let told = outcome.as_ref().map_err(ToString::to_string);
                match *call {
                    // Nobody is left to tell; one slot more or less is a warning.
                    "cuFileBufDeregister" => assert!(told.is_ok(), "{call} {n} {code}: {told:?}"),
                    "cuFileBufRegister" if n > 1 => assert!(told.is_ok(), "{call} {n} {code}: {told:?}"),
                    "cuFileRead" => {
                        let error = outcome.unwrap_err();
                        let os = code.strip_prefix('-').map_or("cuFileRead", |_| "os error");
                        assert!(error.to_string().contains(os), "{n} {code}: {error}");
                        assert_eq!(error.kind(), ErrorKind::Io);
                        assert!(error.tensor().is_some() && error.file().is_some(), "{error}");
                    }
                    call => assert!(told.is_err_and(|error| error.contains(call)), "{call} {n} {code}: {outcome:?}"),
                }
                nothing_is_left();
            }
        }
    }
}

/// In a process of its own: a read that does not come back ends the load, and what it may still write is kept.
#[test]
#[ignore = "run by another test"]
fn hanging() {
    let (_folder, plan) = planned(&[0], 0);
    let loader = loader().stall(Duration::from_millis(100), Duration::from_millis(400));
    twins::cufile::fault("cuFileRead@2=hang");
    let began = Instant::now();
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    let error = load.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
    assert!(error.file().is_some() && monitor.progress().abandoned_bytes > 0, "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
    loader.release();
    assert_eq!([twins::cuda::violations(), twins::cufile::violations()], [0, 0]);
    assert!(twins::cufile::live() > 0, "what is still read into was given back");
}

/// In a process of its own: registering does not come back. Who asked is told in time, and `auto` does without.
#[test]
#[ignore = "run by another test"]
fn registering() {
    let (_folder, plan) = planned(&[0], MORE);
    for call in ["cuFileHandleRegister", "cuFileBufRegister"] {
        let fault = format!("{call}@1=hang");
        twins::cufile::fault(&fault);
        let began = Instant::now();
        let bound = Duration::from_millis(300);
        let error = loader().stall(bound / 3, bound).load(&plan).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
        assert!(error.to_string().contains("engine cufile: registering a"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        twins::cufile::fault(&fault);
        let loader = auto(&plan).stall(Duration::from_secs(1), Duration::from_secs(2));
        // A slot that is being registered for ever is none for the next load either; a file is, if that comes back.
        let loads = if call == "cuFileBufRegister" { 2 } else { 1 };
        for _ in 0..loads {
            cool(&plan);
            let (weights, report) = loader.load(&plan).unwrap();
            assert_ne!(report.engine, "cufile");
            if report.warnings.is_empty() {
                return println_result(SKIPPED);
            }
            assert!(report.warnings[0].contains("cufile is not used: engine cufile: "), "{report:?}");
            assert!(report.warnings[0].contains("regist"), "{report:?}");
            weights.check().unwrap();
        }
    }
    assert_eq!([twins::cuda::violations(), twins::cufile::violations()], [0, 0]);
}

/// As many files with a tensor each, some smaller than a block but for what they have `more`, and the plan of them.
fn files(count: usize, more: usize) -> (tempfile::TempDir, Plan) {
    twins::cuda::load();
    twins::cufile::load();
    let folder = tempfile::tempdir().unwrap();
    for file in 0..count {
        let bytes: Vec<u8> = (0..[1, 10, 4096, 5001][file % 4] + more).map(|at: usize| (at * 7 + file) as u8).collect();
        let view = TensorView::new(Dtype::U8, vec![bytes.len()], &bytes).unwrap();
        let path = folder.path().join(format!("{file:03}.safetensors"));
        safetensors::serialize_to_file([(format!("tensor.{file}"), view)], None, &path).unwrap();
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::local([0])).unwrap();
    (folder, plan)
}

/// In a process of its own: files are registered while they are read from, few at a time, and none stays open.
#[test]
#[ignore = "run by another test"]
fn many() {
    let count = limits::OPEN_FILES + 20;
    let (_folder, plan) = files(count, 0);
    let loader = loader();
    loader.load(&plan).unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    twins::cufile::reset_counts();
    let (weights, report) = loader.load(&plan).unwrap();
    let calls = |name| twins::cufile::calls(Some(name));
    assert_eq!(calls("cuFileHandleRegister"), count as u64, "{report:?}");
    assert_eq!(calls("cuFileHandleDeregister"), count as u64);
    weights.check().unwrap();
    // Memory of the twin's has a descriptor, too.
    drop(weights);
    assert_eq!(open(), before);
    drop(loader);
    nothing_is_left();
}

/// In a process of its own: a file that takes long to be registered holds up no other.
#[test]
#[ignore = "run by another test"]
fn one_of_many() {
    // More than one slot has room for: one of them is held up, too.
    let (_folder, plan) = files(8, 1_000_000);
    // The first is tried before the load begins.
    twins::cufile::fault("cuFileHandleRegister@3=hang");
    let load = loader().stall(Duration::from_secs(1), Duration::from_secs(2)).start(&plan).unwrap();
    let monitor = load.monitor();
    assert_eq!(load.finish().unwrap_err().kind(), ErrorKind::Stalled);
    assert_eq!(monitor.progress().tensors_done, 7);
}

/// In a process of its own: what the plan does not read from is not asked for, and an error names its file once.
#[test]
#[ignore = "run by another test"]
fn first() {
    let (_folder, plan) = files(3, 0);
    let path = |file: usize| plan.checkpoint().files()[file].path.clone();
    twins::cufile::fault("cuFileHandleRegister@1=5008");
    let error = loader().load(&plan).unwrap_err();
    twins::cufile::fault("");
    assert_eq!((error.kind(), error.file()), (ErrorKind::Unsupported, Some(&*path(0))), "{error}");
    let message = "engine cufile: cuFileHandleRegister failed: status 5008: this file system is not supported";
    assert_eq!(error.message(), message);
    let rules = Rules::replicate_all().keeping("tensor.2");
    let last = Plan::new(plan.checkpoint(), &rules, &World::local([0])).unwrap();
    std::fs::remove_file(path(0)).unwrap();
    loader().load(&last).unwrap();
    nothing_is_left();
}

/// cuFile, which counts the slots that are made known to it.
#[derive(Debug)]
struct Counting {
    cufile: Cufile,
    registered: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct CountingRegistrar(Arc<dyn Registrar>, Arc<AtomicUsize>);

impl Registrar for CountingRegistrar {
    fn register(&self, address: u64, bytes: usize) -> shardlift::Result<Box<dyn Any + Send + Sync>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.register(address, bytes)
    }
}

// SAFETY: the engine inside answers for every request.
unsafe impl Engine for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }
    fn threads(&self) -> usize {
        self.cufile.threads()
    }
    fn alignment(&self) -> u64 {
        self.cufile.alignment()
    }
    fn registrar(&self) -> Option<Arc<dyn Registrar>> {
        let inside = self.cufile.registrar()?;
        Some(Arc::new(CountingRegistrar(inside, Arc::clone(&self.registered))))
    }
    fn run(&self, work: &dyn Work) -> shardlift::Result<()> {
        self.cufile.run(work)
    }
}

/// In a process of its own: an engine reads into slots that were made known to it, and not to the one before.
#[test]
#[ignore = "run by another test"]
fn another() {
    let (_folder, plan) = planned(&[0], 10_000_000);
    let loader = loader();
    loader.load(&plan).unwrap();
    let registered = Arc::default();
    let cufile = Cufile::new(2, Duration::from_secs(10)).unwrap();
    let loader = loader.custom_engine(Arc::new(Counting { cufile, registered: Arc::clone(&registered) }));
    let (weights, _) = loader.load(&plan).unwrap();
    assert_eq!(registered.load(Ordering::Relaxed), 2);
    compare(&weights, &on_host(&plan));
    drop((weights, loader));
    nothing_is_left();
}

/// In a process of its own, whose GPU has room for the tensors and for few slots.
#[test]
#[ignore = "run by another test"]
fn tight() {
    let (_folder, plan) = planned(&[0], MORE);
    let error = loader().staging(64 << 20).load(&plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceMemory, "{error}");
    nothing_is_left();
    cool(&plan);
    let auto = auto(&plan).staging(64 << 20);
    let (weights, report) = auto.load(&plan).unwrap();
    if report.warnings.is_empty() {
        return println_result(SKIPPED);
    }
    assert_ne!(report.engine, "cufile");
    assert!(report.warnings[0].contains("cufile is not used: too little free memory on cuda:0"), "{report:?}");
    assert_eq!((report.direct, twins::cufile::live()), (None, 0));
    weights.check().unwrap();
    drop((weights, auto));
    nothing_is_left();
}

/// In a process of its own, whose cuFile takes long to open.
#[test]
#[ignore = "run by another test"]
fn late() {
    let (_folder, plan) = planned(&[0], 0);
    let began = Instant::now();
    let error = loader().stall(Duration::from_millis(50), Duration::from_millis(200)).load(&plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
    assert!(error.to_string().contains("cuFileDriverOpen"), "{error}");
    assert!(began.elapsed() < Duration::from_millis(1200), "{:?}", began.elapsed());
    // Another engine never asks for it.
    let began = Instant::now();
    Loader::new().engine(EngineChoice::Pread).load(&plan).unwrap();
    assert!(began.elapsed() < Duration::from_millis(1000), "{:?}", began.elapsed());
    loader().load(&plan).unwrap().0.check().unwrap();
    assert_eq!(twins::cufile::calls(Some("cuFileDriverOpen")), 1);
}

/// What a measurement of this plan's path could say.
fn measurement(plan: &Plan, direct: Direct, cufile: f64) -> CufileMeasurement {
    let file_system = plan.checkpoint().files()[0].identity.device;
    CufileMeasurement { file_system, gpu: 0, direct, cufile_gb_per_s: cufile, staged_gb_per_s: 5.0 }
}

/// A loader whose `auto` takes cuFile for a plan on GPU 0, of files that are not in the page cache.
fn auto(plan: &Plan) -> Loader {
    Loader::new().staging(2 << 20).drop_page_cache(true).cufile_measured(&[measurement(plan, Direct::Known, 6.0)])
}

const SKIPPED: &str = "SKIPPED: this file system is not read past the page cache";

/// More than `auto` reads through the page cache as a matter of course.
const MORE: usize = 68_000_000;

/// Empties the page cache of a plan's files.
fn cool(plan: &Plan) {
    Loader::new().engine(EngineChoice::Pread).drop_page_cache(true).load(plan).unwrap();
}

/// In a process of its own: `auto` chooses cuFile where it was measured to be faster and known to be direct, and does without
/// it where it fails.
#[test]
#[ignore = "run by another test"]
fn automatic() {
    let (_folder, plan) = planned(&[0], MORE);
    let auto = |measurement| Loader::new().staging(2 << 20).drop_page_cache(true).cufile_measured(&[measurement]);
    let fast = measurement(&plan, Direct::Known, 6.0);
    let chosen = |measurement| {
        // Whoever asks what is in the page cache brings some of it there.
        cool(&plan);
        auto(measurement).engine_for(&plan).0
    };
    if chosen(measurement(&plan, Direct::Known, 5.0)) != "uring" {
        return println_result(SKIPPED);
    }
    assert_eq!(chosen(measurement(&plan, Direct::Unknown, 6.0)), "uring");
    assert_eq!(chosen(CufileMeasurement { gpu: 1, ..fast.clone() }), "uring");
    assert_eq!(chosen(CufileMeasurement { file_system: 0, ..fast.clone() }), "uring");
    // Whoever measured is told why that was of no use.
    let why = |measurement| {
        cool(&plan);
        auto(measurement).engine_for(&plan).1
    };
    for (measurement, expected) in [
        (measurement(&plan, Direct::Known, 5.0), "; cufile was no faster"),
        (measurement(&plan, Direct::Unknown, 6.0), "; cufile is not known to be direct"),
        (CufileMeasurement { gpu: 1, ..fast.clone() }, "; cufile was measured elsewhere"),
    ] {
        let reason = why(measurement);
        assert!(reason.ends_with(expected), "{reason}");
    }
    assert_eq!(chosen(fast.clone()), "cufile");
    assert_eq!(twins::cufile::calls(None), 0, "cuFile was asked without being chosen");
    cool(&plan);
    let (weights, report) = auto(fast.clone()).load(&plan).unwrap();
    assert_eq!((report.engine.as_str(), report.direct), ("cufile", Some(Direct::Known)));
    assert!(report.engine_reason.contains("6.00 GB/s where staging had 5.00"), "{report:?}");
    weights.check().unwrap();
    drop(weights);
    // Before it begins, and while it reads: the load goes on.
    for (fault, engine) in [
        ("cuFileHandleRegister@1=5008", "another"),
        ("cuFileBufRegister@1=5010", "another"),
        ("cuFileHandleRegister@2=5030", "cufile"),
        ("cuFileRead@1=5030", "cufile"),
        ("cuFileRead@7=-5", "cufile"),
        ("cuFileRead@3=5011,cuFileRead@4=5011,cuFileRead@20=5034", "cufile"),
    ] {
        cool(&plan);
        twins::cufile::fault(fault);
        let (weights, report) = auto(fast.clone()).load(&plan).unwrap();
        twins::cufile::fault("");
        assert_eq!(report.engine == "cufile", engine == "cufile", "{fault}");
        // Not all bytes were read directly, if any.
        assert_eq!(report.direct, (engine == "cufile").then_some(Direct::No), "{fault}");
        let cause = fault.split('=').nth(1).unwrap().split(',').next().unwrap();
        let cause = cause.strip_prefix('-').map_or(cause.to_owned(), |errno| format!("os error {errno}"));
        assert!(report.warnings.iter().any(|warning| warning.contains(&cause)), "{fault}: {:?}", report.warnings);
        weights.check().unwrap();
        drop(weights);
        nothing_is_left();
    }
    // A file that is not there cannot be had by any way.
    std::fs::OpenOptions::new().write(true).open(&plan.checkpoint().files()[1].path).unwrap().set_len(4096).unwrap();
    let error = auto(fast).load(&plan).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Changed | ErrorKind::Truncated), "{error}");
    nothing_is_left();
}

/// In a process of its own, without nvidia-fs: reads that are not direct fail, where that can be asked for.
#[test]
#[ignore = "run by another test"]
fn compatible() {
    let (_folder, plan) = planned(&[0], MORE);
    let (weights, report) = match loader().load(&plan) {
        Ok(loaded) => loaded,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Device);
            assert!(error.to_string().contains("engine cufile") && error.to_string().contains("nvidia-fs"), "{error}");
            cool(&plan);
            let auto = Loader::new().cufile_measured(&[measurement(&plan, Direct::Known, 6.0)]);
            let (weights, report) = auto.load(&plan).unwrap();
            assert_ne!(report.engine, "cufile");
            assert!(report.warnings.iter().all(|warning| warning.contains("nvidia-fs")), "{:?}", report.warnings);
            weights.check().unwrap();
            return println_result("refused");
        }
    };
    assert_eq!((report.engine.as_str(), report.direct), ("cufile", Some(Direct::Unknown)));
    let [direct, bounced, compat, _] = twins::cufile::bytes();
    assert_eq!([direct, bounced], [0, 0]);
    assert!(compat >= report.needed_bytes);
    weights.check().unwrap();
    println_result("unknown");
}

/// In a process of its own: both ways are measured, and what comes of it may be given to another loader.
#[test]
#[ignore = "run by another test"]
fn measured() {
    let (_folder, plan) = planned(&[3, 3], 5_000_000);
    let found = Loader::new().staging(2 << 20).measure_cufile(&plan).unwrap();
    assert_eq!((found.gpu, found.direct), (3, Direct::Known));
    assert!(found.cufile_gb_per_s > 0.0 && found.staged_gb_per_s > 0.0, "{found:?}");
    let several = plan_for(plan.checkpoint(), World::local(0..2));
    assert_eq!(Loader::new().measure_cufile(&several).unwrap_err().kind(), ErrorKind::Usage);
    nothing_is_left();
}

/// In a process of its own: where cuFile does not read to is told before it is opened.
#[test]
#[ignore = "run by another test"]
fn elsewhere() {
    let (_folder, plan) = planned(&[0, 1], 0);
    let host = plan_for(plan.checkpoint(), World::host(2));
    for (plan, found) in [(&plan, "cuda:0, cuda:1"), (&host, "host")] {
        let error = loader().load(plan).unwrap_err();
        assert_eq!((error.kind(), error.found()), (ErrorKind::Unsupported, Some(found)), "{error}");
    }
    assert_eq!(twins::cufile::calls(None), 0);
    nothing_is_left();
}

/// In a process of its own, without cuFile.
#[test]
#[ignore = "run by another test"]
fn missing() {
    twins::cuda::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 0);
    let plan = plan_for(&Checkpoint::open(folder.path()).unwrap(), World::local([0]));
    if shardlift::read::cufile_facts().is_ok() {
        return println_result("SKIPPED: this machine has a cuFile");
    }
    let error = loader().load(&plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("engine cufile: no cuFile: libcufile.so.0 not found"), "{error}");
}

#[expect(clippy::print_stdout, reason = "figures for whoever reads the test's output")]
fn println_result(text: &str) {
    println!("{text}");
}

#[test]
fn every_way_is_bit_exact_and_direct() {
    passes("exact", &[]);
    passes("member", &[]);
    passes("crooked", &[]);
}

#[test]
fn short_reads_are_continued() {
    passes("short", &[("SIMCUFILE_SHORT", "3")]);
    passes("shorter", &[("SIMCUFILE_SHORT", "1")]);
}

#[test]
fn what_can_be_registered_may_be_little() {
    passes("limited", &[("SIMCUFILE_REGISTER_MAX", "1500000")]);
}

#[test]
fn every_call_of_cufile_can_fail() {
    passes("sweep", &[("SIMCUDA_POISON", "0")]);
}

#[test]
fn a_read_that_hangs_ends_the_load() {
    passes("hanging", &[("SIMCUDA_LEAKS", "ignore")]);
}

#[test]
fn registering_has_a_bound() {
    passes("registering", &[("SIMCUDA_LEAKS", "ignore")]);
}

#[test]
fn files_are_registered_one_by_one() {
    passes("many", &[]);
    passes("one_of_many", &[("SIMCUDA_LEAKS", "ignore")]);
    passes("first", &[]);
}

#[test]
fn slots_are_of_the_engine_that_reads() {
    passes("another", &[]);
}

#[test]
fn auto_does_without_it_where_slots_have_no_room() {
    passes("tight", &[("SIMCUDA_MEMORY", "120M")]);
}

#[test]
fn a_driver_that_opens_late_is_not_waited_for() {
    passes("late", &[("SIMCUFILE_OPEN_MS", "1500")]);
}

#[test]
fn auto_takes_it_where_it_is_known_to_be_better() {
    passes("automatic", &[]);
}

#[test]
fn indirect_reads_are_refused_or_not_called_direct() {
    assert!(passes("compatible", &[("SIMCUFILE_MODE", "compat")]).contains("refused"));
    assert!(passes("compatible", &[("SIMCUFILE_MODE", "compat"), ("SIMCUFILE_PARAMETERS", "0")]).contains("unknown"));
}

#[test]
fn both_ways_are_measured() {
    passes("measured", &[]);
}

#[test]
fn other_destinations_are_refused() {
    passes("elsewhere", &[]);
    passes("missing", &[]);
}
