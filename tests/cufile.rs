//! Loads through cuFile, on its twin: from storage into memory of a GPU and nowhere else. One test function for each process
//! that is needed: what the twins are told and count is of the whole process.

#[path = "support/cufile.rs"]
mod cufile;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cufile::{
    MORE, SKIPPED, auto, compare, cool, is_direct, loader, nothing_is_left, on_host, plan_for, planned, println_result,
};
use safetensors::tensor::{Dtype, TensorView};
use shardlift::read::{Cufile, Engine, EngineChoice, Registrar, Work};
use shardlift::{Checkpoint, Direct, ErrorKind, Loader, Memory, Plan, Rank, Rules, World, limits};
use twins::child::passes;

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
