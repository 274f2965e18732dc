//! Loads into GPUs of the driver twin: what the driver is asked for, what it gets back, and every one of its calls
//! failing in turn. One test function for each process that is needed: faults and counts are of the whole process.

#[path = "support/driver_calls.rs"]
mod driver_calls;
#[path = "support/shapes.rs"]
mod shapes;

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use driver_calls::{ASKED_OFTEN, QUIET};
use safetensors::tensor::Dtype;
use serde_json::Value;
use shapes::Shape;
use shardlift::read::{self, Engine, EngineChoice, Mmap, Work};
use shardlift::{
    CallerMemory, Checkpoint, Digest, ErrorKind, Loader, Memory, Plan, Rank, Result, Rules, Tensor, World,
};

const RULES: &str = r#"
rule = [
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**.cast", cast = "bf16", replicate = true },
  { match = "**.transposed", transpose = true, replicate = true },
  { match = "**", replicate = true },
]
"#;

/// A model of two files in which every way to a device occurs.
fn write(folder: &Path) {
    let tensors: [Shape<'_>; 9] = [
        ("a.rows", Dtype::BF16, &[64, 64]),
        ("b.columns", Dtype::BF16, &[64, 1024]),
        ("c.cast", Dtype::F32, &[33, 7]),
        ("d.transposed", Dtype::BF16, &[40, 24]),
        ("e.whole", Dtype::U8, &[1001]),
        ("f.columns", Dtype::BF16, &[512, 32]),
        // Equal ones beside each other, which are tempting to copy as one.
        ("g.same.0", Dtype::U8, &[1000]),
        ("g.same.1", Dtype::U8, &[1000]),
        ("g.same.2", Dtype::U8, &[1000]),
    ];
    shapes::write(folder, &[("one", &tensors[..3]), ("two", &tensors[3..])]);
}

/// One way to load that is swept for faults.
#[derive(Debug, Clone, Copy)]
struct Way {
    gpus: &'static [u32],
    memory: Memory,
    engine: EngineChoice,
}

const WAYS: [Way; 4] = [
    Way { gpus: &[0], memory: Memory::Blocks, engine: EngineChoice::Pread },
    Way { gpus: &[0, 1, 2, 3], memory: Memory::Blocks, engine: EngineChoice::Pread },
    Way { gpus: &[2, 2], memory: Memory::PerTensor, engine: EngineChoice::Mmap },
    Way { gpus: &[1, 1], memory: Memory::Blocks, engine: EngineChoice::Cufile },
];

/// What the driver is asked for while a load runs, by each of its threads, and what its devices do.
const HANGING: [&str; 8] = [
    "cuMemHostRegister",
    "cuModuleLoadData",
    "cuMemcpyHtoDAsync",
    "cuLaunchKernel",
    "cuEventRecord",
    "cuEventQuery",
    "run:copy",
    "run:kernel",
];

/// Loads and checks, and gives everything back.
fn load(plan: &Plan, way: Way) -> Result<()> {
    let loader = Loader::new().engine(way.engine).memory(way.memory).staging(2 << 20);
    let loader = loader.stall(Duration::from_secs(1), Duration::from_secs(10));
    let (weights, _) = loader.load(plan)?;
    weights.check()?;
    Ok(())
}

/// Calls that are made for a tensor, which their error names.
const OF_TENSORS: [&str; 14] = [
    "cuEventCreate",
    "cuEventQuery",
    "cuEventRecord",
    "cuLaunchKernel",
    "cuMemAllocAsync",
    "cuMemHostRegister_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamQuery",
];

/// Invalid value, out of memory, illegal address, and a device that is gone.
const CODES: [(u32, &str); 4] = [(1, ""), (2, ""), (700, "!"), (46, "!")];

/// In a process of its own, by `every_call_of_a_load_can_fail`.
#[test]
#[ignore = "run by another test"]
fn sweep() {
    let (way, (code, lost)) = (WAYS[told_by_parent("SWEEP_WAY")], CODES[told_by_parent("SWEEP_CODE")]);
    twins::cuda::load();
    twins::cufile::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let world = World::local(way.gpus.iter().copied());
    let plan = Plan::new(&checkpoint, &Rules::from_toml(RULES).unwrap(), &world).unwrap();
    // The first initialises the driver.
    load(&plan, way).unwrap();
    twins::cuda::reset_counts();
    load(&plan, way).unwrap();
    assert_eq!((twins::cuda::live(), twins::cuda::violations(), twins::cufile::live()), (0, 0, 0));
    let ledger = folder.path().join("ledger.json");
    twins::cuda::ledger(&ledger);
    let ledger: Value = serde_json::from_slice(&std::fs::read(&ledger).unwrap()).unwrap();
    let calls: BTreeMap<String, u64> = serde_json::from_value(ledger["calls_by_function"].clone()).unwrap();
    let (mut tried, mut failed) = (0, 0);
    let mut problems = Vec::new();
    for (call, &count) in &calls {
        let count = if ASKED_OFTEN.contains(&call.as_str()) { count.min(12) } else { count };
        for n in 1..=count {
            twins::cuda::reset_counts();
            twins::cuda::fault(&format!("{call}@{n}={code}{lost}"));
            let began = Instant::now();
            let outcome = load(&plan, way);
            let fired = twins::cuda::calls(Some(call)) >= n;
            twins::cuda::fault("");
            tried += 1;
            failed += usize::from(outcome.is_err());
            let problem = if began.elapsed() > Duration::from_secs(30) {
                "took too long"
            } else if twins::cuda::violations() > 0 {
                "broke a rule of the driver"
            } else if twins::cuda::live() > 0 || twins::cufile::live() > 0 {
                "something was not given back"
            } else {
                told(&outcome, call, fired, !lost.is_empty(), way)
            };
            if !problem.is_empty() {
                problems.push(format!("call {n} of {call} answers {code}: {problem}: {outcome:?}"));
            }
        }
    }
    assert!(problems.is_empty(), "{way:?}: {}", problems.join("\n"));
    assert!(failed * 2 > tried, "{failed} of {tried} faults were told");
    println_result(&format!("{way:?} {code}: {tried} faults, {failed} told"));
}

/// What is wrong with how a load ended in which `call` failed, if it was made; nothing if all is well.
fn told(outcome: &Result<()>, call: &str, fired: bool, lost: bool, way: Way) -> &'static str {
    // A mapping that cannot be pinned is copied.
    let quiet = QUIET.contains(&call) || way.engine == EngineChoice::Mmap && call == "cuMemHostRegister_v2";
    let Err(error) = outcome else {
        return if !fired || quiet { "" } else { "nobody was told" };
    };
    let message = error.to_string();
    // A lost device may show at whichever call comes next.
    let names_call = message.contains(call) || lost;
    match error.tensor() {
        _ if !message.contains("cuda:") => "the error names no device",
        _ if !names_call => "the error names no call",
        None if OF_TENSORS.contains(&call) => "the error names no tensor",
        _ => "",
    }
}

/// A folder with the model, the plan of it on these GPUs, and a loader for small models.
fn rig(gpus: &[u32], engine: EngineChoice) -> (tempfile::TempDir, Plan, Loader) {
    twins::cuda::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let world = World::local(gpus.iter().copied());
    let plan = Plan::new(&checkpoint, &Rules::from_toml(RULES).unwrap(), &world).unwrap();
    (folder, plan, Loader::new().engine(engine).staging(2 << 20))
}

/// In a process of its own: a load asks the driver for no more than it needs, and gives all of it back.
#[test]
#[ignore = "run by another test"]
fn counted() {
    let (_folder, plan, loader) = rig(&[2, 2, 2, 2], EngineChoice::Pread);
    assert_eq!(twins::cuda::current_context(), 0);
    let (weights, report) = loader.load(&plan).unwrap();
    assert_eq!(twins::cuda::current_context(), 0, "the caller's context is another one now");
    let calls = |name| twins::cuda::calls(Some(name));
    // One GPU in use, whatever the number of ranks on it: one context, one queue of two streams.
    assert_eq!((calls("cuDevicePrimaryCtxRetain"), calls("cuStreamCreate")), (1, 2));
    assert!((0..4).all(|gpu| (twins::cuda::bytes(gpu, 0) > 0) == (gpu == 2)));
    // Two small files are at most two slots, and so few events.
    assert!((1..=2).contains(&calls("cuEventCreate")), "{}", calls("cuEventCreate"));
    assert_eq!(calls("cuMemHostRegister"), 1);
    assert_eq!(calls("cuStreamSynchronize") + calls("cuCtxSynchronize") + calls("cuEventSynchronize"), 2);
    assert_eq!(report.peak_pinned_bytes, 1 << 20);
    drop(weights);
    // What is kept for the next load: a pinned slot, and the context with its kernels.
    let kept = twins::cuda::live();
    assert!((1..=4).contains(&kept), "{kept}");
    let (weights, _) = loader.load(&plan).unwrap();
    assert_eq!((calls("cuMemHostRegister"), calls("cuModuleLoadData")), (1, 1));
    // Slots of two kinds together would be more than the budget.
    let host = Plan::new(plan.checkpoint(), &Rules::from_toml(RULES).unwrap(), &World::host(1)).unwrap();
    assert_eq!(calls("cuMemHostUnregister"), 0);
    loader.load(&host).unwrap();
    assert_eq!(calls("cuMemHostUnregister"), 1, "slots for GPUs are kept beside those for the host");
    let tensor = weights.tensor(Rank(3), "b.columns").unwrap().clone();
    drop(weights);
    loader.release();
    assert!(twins::cuda::live() > 0, "a tensor lives");
    assert_eq!(tensor.to_bytes().unwrap().len(), tensor.nbytes());
    assert!(tensor.as_bytes().is_none());
    drop(tensor);
    drop(loader);
    assert_eq!((twins::cuda::live(), twins::cuda::violations()), (0, 0));
}

/// In a process of its own: copies straight from a mapping pin the mapping, and no slot.
#[test]
#[ignore = "run by another test"]
fn mapped() {
    let (folder, plan, loader) = rig(&[0, 1], EngineChoice::Mmap);
    let (weights, report) = loader.load(&plan).unwrap();
    let registers = told_by_parent("MAPPED_REGISTERS") == 1;
    // Two windows, one for each small file.
    assert_eq!(twins::cuda::calls(Some("cuMemHostRegister")), if registers { 2 } else { 0 });
    weights.check().unwrap();
    let files: u64 = plan.checkpoint().files().iter().map(|file| file.identity.size).sum();
    let most = if registers { files } else { 0 };
    assert!((u64::from(registers)..=most).contains(&report.peak_pinned_bytes), "{report:?}");
    assert_eq!(report.storage_bytes_read, report.needed_bytes);
    drop(weights);
    if registers {
        twins::cuda::fault("cuMemHostRegister_v2@1=1,cuMemHostRegister_v2@2=801");
        let (weights, report) = loader.load(&plan).unwrap();
        twins::cuda::fault("");
        weights.check().unwrap();
        let refused = |code: &&String| code.contains("copied instead of pinned") && code.contains("cuda:0");
        assert_eq!(report.warnings.iter().filter(refused).count(), 2, "{:?}", report.warnings);
    }
    // A file that was cut short since: an error, and nothing stays pinned.
    let path = &plan.checkpoint().files()[0].path;
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
    let error = loader.load(&plan).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Changed | ErrorKind::Truncated), "{error}");
    drop((loader, folder));
    assert_eq!((twins::cuda::live(), twins::cuda::violations()), (0, 0));
}

/// Lends from files whose pages are gone at that moment, and there again after it.
#[derive(Debug)]
struct Losing(Mmap);

// SAFETY: the engine inside answers for it.
unsafe impl Engine for Losing {
    fn name(&self) -> &'static str {
        "losing"
    }
    fn threads(&self) -> usize {
        self.0.threads()
    }
    fn lends(&self) -> bool {
        true
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        self.0.run(&LosingWork(work))
    }
}

struct LosingWork<'a>(&'a dyn Work);

impl Work for LosingWork<'_> {
    fn next(&self, may_wait: bool) -> read::Next {
        self.0.next(may_wait)
    }
    fn stopped(&self) -> bool {
        self.0.stopped()
    }
    fn done(&self, request: read::Request, outcome: std::io::Result<usize>) {
        self.0.done(request, outcome);
    }
    unsafe fn lent(&self, request: read::Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        let path = request.file().path().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.set_len(0).unwrap();
        // SAFETY: the engine's word, passed on.
        unsafe { self.0.lent(request, mapping, keep) };
        file.write_all_at(&bytes, 0).unwrap();
        file.set_modified(modified).unwrap();
    }
}

/// In a process of its own: what is copied of a mapping that cannot be pinned is not zeros that the file never had.
#[test]
#[ignore = "run by another test"]
fn mapped_and_lost() {
    let (_folder, plan, loader) = rig(&[0], EngineChoice::Mmap);
    let loader = loader.custom_engine(Arc::new(Losing(Mmap::new(1))));
    let refused: Vec<String> = (1..=9).map(|n| format!("cuMemHostRegister@{n}=1")).collect();
    twins::cuda::fault(&refused.join(","));
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    let error = load.finish().map(|(_, report)| report).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
    assert!(monitor.warnings().iter().any(|warning| warning.contains("copied instead of pinned")));
}

/// In a process of its own: a copy that fails while it runs is an error that names a tensor.
#[test]
#[ignore = "run by another test"]
fn failing_late() {
    let (_folder, plan, loader) = rig(&[0, 1], EngineChoice::Pread);
    for n in 1..=6 {
        twins::cuda::fault(&format!("run:copy@{n}=700!"));
        let error = loader.load(&plan).unwrap_err();
        twins::cuda::fault("");
        let message = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Device, "{message}");
        assert!(message.contains("CUDA_ERROR_ILLEGAL_ADDRESS") && message.contains("cuda:"), "{message}");
        assert!(error.tensor().is_some() && error.at().rank.is_some(), "{message}");
        loader.release();
        assert_eq!((twins::cuda::live(), twins::cuda::violations()), (0, 0));
    }
    let (mut weights, _) = loader.load(&plan).unwrap();
    weights.check().unwrap();
    // What a reload cannot start without is asked for before anything is given up.
    twins::cuda::fault("cuStreamCreate@1=2");
    let error = loader.reload(&plan, &mut weights).unwrap_err();
    twins::cuda::fault("");
    assert_eq!(error.kind(), ErrorKind::DeviceMemory, "{error}");
    weights.check().unwrap();
    loader.reload(&plan, &mut weights).unwrap();
    weights.check().unwrap();
}

/// In a process of its own: a link that moves next to nothing ends the load; what copies still use is kept.
#[test]
#[ignore = "run by another test"]
fn stalled() {
    let (_folder, plan, loader) = rig(&[0, 1], EngineChoice::Pread);
    let loader = loader.stall(Duration::from_millis(100), Duration::from_millis(500));
    let began = Instant::now();
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    let error = load.finish().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
    assert!(error.tensor().is_some() && monitor.progress().abandoned_bytes > 0, "{error}");
    drop(loader);
    assert_eq!(twins::cuda::violations(), 0);
    // Nothing that a copy may still write to was given back.
    assert!(twins::cuda::live() > 0);
}

/// In a process of its own: a driver that does not come back from a call ends the load, and what it may still use is kept.
#[test]
#[ignore = "run by another test"]
fn hanging() {
    let (_folder, plan, loader) = rig(&[0, 1], EngineChoice::Pread);
    let loader = loader.stall(Duration::from_millis(100), Duration::from_millis(300));
    let call = HANGING[told_by_parent("HANGING_CALL")];
    twins::cuda::fault(&format!("{call}@1=hang"));
    let began = Instant::now();
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    let error = load.finish().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10), "{call}: {:?}", began.elapsed());
    assert_eq!(error.kind(), ErrorKind::Stalled, "{call}: {error}");
    assert!(monitor.progress().abandoned_bytes > 0, "{call}: {error}");
    println_result(&format!("{call}: {error}"));
    // The loader loads into other GPUs, although the one slot that this model needs may never be free again.
    twins::cuda::fault("");
    let rules = Rules::from_toml(RULES).unwrap();
    let elsewhere = Plan::new(plan.checkpoint(), &rules, &World::local([2, 3])).unwrap();
    let loader = loader.stall(Duration::from_secs(5), Duration::from_secs(20));
    loader.load(&elsewhere).unwrap_or_else(|error| panic!("{call}: {error}")).0.check().unwrap();
    drop(loader);
    assert_eq!(twins::cuda::violations(), 0);
}

/// In a process of its own: pinned memory that a device still reads when a load is given up stays, and no other.
#[test]
#[ignore = "run by another test"]
fn given_back() {
    twins::cuda::load();
    let folder = tempfile::tempdir().unwrap();
    let shapes: [Shape<'_>; 2] = [("large", Dtype::U8, &[12 << 20]), ("small", Dtype::U8, &[1001])];
    let plan_of = |shape: &Shape<'_>, gpu: u32| {
        let folder = folder.path().join(shape.0);
        std::fs::create_dir_all(&folder).unwrap();
        shapes::write(&folder, &[("one", std::slice::from_ref(shape))]);
        Plan::new(&Checkpoint::open(&folder).unwrap(), &Rules::replicate_all(), &World::local([gpu])).unwrap()
    };
    let (large, small) = (plan_of(&shapes[0], 0), plan_of(&shapes[1], 0));
    let pinned = || twins::cuda::calls(Some("cuMemHostRegister")) - twins::cuda::calls(Some("cuMemHostUnregister"));
    // Slots of 4 MiB.
    let loader = Loader::new().engine(EngineChoice::Pread).staging(64 << 20);
    loader.load(&large).unwrap();
    assert!(pinned() >= 2, "{}", pinned());
    let loader = loader.stall(Duration::from_millis(100), Duration::from_millis(300));
    twins::cuda::fault("run:copy@1=hang");
    let error = loader.load(&small).map(|(_, report)| report).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
    twins::cuda::fault("");
    loader.release();
    // On a thread that nobody waits for.
    let began = Instant::now();
    while pinned() > 1 {
        assert!(began.elapsed() < Duration::from_secs(20), "{} slots are pinned", pinned());
        std::thread::sleep(Duration::from_millis(5));
    }
    let loader = loader.stall(Duration::from_secs(5), Duration::from_secs(20));
    loader.load(&plan_of(&shapes[0], 1)).unwrap().0.check().unwrap();
    loader.release();
    assert_eq!((pinned(), twins::cuda::violations()), (1, 0));
}

/// In a process of its own: whoever asks for the bytes of a tensor whose GPU hangs is told so, and its memory stays.
#[test]
#[ignore = "run by another test"]
fn hanging_later() {
    let (_folder, plan, loader) = rig(&[0], EngineChoice::Pread);
    let loader = loader.stall(Duration::from_millis(100), Duration::from_millis(300));
    let (weights, _) = loader.load(&plan).unwrap();
    let tensor = weights.tensor(Rank(0), "e.whole").unwrap().clone();
    assert_eq!(tensor.digest().unwrap(), Digest::of(&tensor.to_bytes().unwrap()));
    twins::cuda::fault(["run:copy@1=hang", "run:kernel@1=hang"][told_by_parent("HANGING_CALL")]);
    let began = Instant::now();
    for error in [tensor.digest().unwrap_err(), tensor.to_bytes().unwrap_err()] {
        assert_eq!((error.kind(), error.tensor()), (ErrorKind::Stalled, Some("e.whole")), "{error}");
        assert!(error.to_string().contains("cuda:0"), "{error}");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    drop((tensor, weights, loader));
    assert!(twins::cuda::live() > 0, "memory that is still read was given back");
    assert_eq!(twins::cuda::violations(), 0);
}

/// In a process of its own: new values land in memory that the caller has on the GPU already.
#[test]
#[ignore = "run by another test"]
fn refreshed() {
    let (_folder, plan, loader) = rig(&[1], EngineChoice::Pread);
    for memory in [Memory::Blocks, Memory::PerTensor] {
        let loader = Loader::new().memory(memory).staging(2 << 20);
        let (weights, _) = loader.load(&plan).unwrap();
        let place = |tensor: &Tensor| CallerMemory {
            rank: tensor.rank(),
            name: tensor.name().into(),
            address: std::ptr::without_provenance_mut(tensor.device_ptr() as usize),
            bytes: tensor.nbytes(),
        };
        let places: Vec<CallerMemory> = weights.iter().map(place).collect();
        // SAFETY: the tensors whose memory it is live longer than the load and what it returns, and nobody reads them.
        let load = unsafe { loader.start_into(&plan, &places) }.unwrap();
        let (fresh, _) = load.finish().unwrap();
        assert!(fresh.iter().zip(weights.iter()).all(|(new, old)| new.device_ptr() == old.device_ptr()));
        fresh.check().unwrap();
        let mut wrong = places[0].clone();
        wrong.bytes += 1;
        // SAFETY: refused before anything is touched.
        assert_eq!(unsafe { loader.start_into(&plan, &[wrong]) }.unwrap_err().kind(), ErrorKind::Usage);
    }
    drop(loader);
    assert_eq!((twins::cuda::live(), twins::cuda::violations()), (0, 0));
}

/// In a process of its own: a cancel and a drop leave nothing behind, and two loads share a loader.
#[test]
#[ignore = "run by another test"]
fn cancelled() {
    let (folder, plan, _) = rig(&[0, 1, 2, 3], EngineChoice::Pread);
    let loader = Loader::new().staging(2 << 20).throttle(Some(100_000));
    let load = loader.start(&plan).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    let began = Instant::now();
    load.monitor().cancel();
    assert_eq!(load.finish().unwrap_err().kind(), ErrorKind::Cancelled);
    drop(loader.start(&plan).unwrap());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    loader.release();
    assert_eq!((twins::cuda::live(), twins::cuda::violations()), (0, 0));
    let loader = Loader::new().staging(2 << 20);
    let (one, other) = (loader.start(&plan).unwrap(), loader.start(&plan).unwrap());
    other.finish().unwrap().0.check().unwrap();
    one.finish().unwrap().0.check().unwrap();
    drop((loader, folder));
    assert_eq!((twins::cuda::live(), twins::cuda::violations()), (0, 0));
}

#[expect(clippy::print_stdout, reason = "figures for whoever reads the test's output")]
fn println_result(text: &str) {
    println!("{text}");
}

/// A number that a test gave to the process of another.
#[expect(clippy::disallowed_methods, reason = "tests speak to their children so")]
fn told_by_parent(name: &str) -> usize {
    std::env::var(name).unwrap().parse().unwrap()
}

/// Runs an ignored test of this file in a process of its own.
fn child(test: &str, env: &[(&str, String)]) {
    let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    println_result(&twins::child::passes(test, &env));
}

#[test]
fn every_call_of_a_load_can_fail() {
    // Side by side: mostly they wait for devices that were lost.
    std::thread::scope(|scope| {
        for (way, code) in (0..WAYS.len()).flat_map(|way| (0..CODES.len()).map(move |code| (way, code))) {
            scope.spawn(move || {
                let (way, code) = (way.to_string(), code.to_string());
                // Fresh memory is not what this is about, and filling it takes most of the time.
                child("sweep", &[("SWEEP_WAY", way), ("SWEEP_CODE", code), ("SIMCUDA_POISON", "0".into())]);
            });
        }
    });
}

#[test]
fn a_load_asks_for_what_it_needs_and_gives_it_back() {
    child("counted", &[]);
}

#[test]
fn mappings_are_copied_from_where_the_driver_can() {
    let (on, off) = ("1".to_owned(), "0".to_owned());
    child("mapped", &[("MAPPED_REGISTERS", on.clone())]);
    child("mapped", &[("MAPPED_REGISTERS", off), ("SIMCUDA_HOST_PAGE_TABLES", on)]);
}

#[test]
fn pages_that_are_lost_while_a_mapping_is_copied_are_an_error() {
    child("mapped_and_lost", &[]);
}

#[test]
fn copies_that_fail_late_are_told() {
    child("failing_late", &[]);
}

#[test]
fn memory_of_the_caller_on_a_gpu_is_filled() {
    child("refreshed", &[]);
}

#[test]
fn cancels_and_neighbours_leave_nothing_behind() {
    child("cancelled", &[]);
}

#[test]
fn a_driver_that_does_not_come_back_ends_the_load() {
    let child = |call: usize| {
        child("hanging", &[("HANGING_CALL", call.to_string()), ("SIMCUDA_LEAKS", "ignore".into())]);
    };
    std::thread::scope(|scope| (0..HANGING.len()).for_each(|call| drop(scope.spawn(move || child(call)))));
}

#[test]
fn a_load_that_is_given_up_keeps_no_free_memory() {
    child("given_back", &[("SIMCUDA_LEAKS", "ignore".into())]);
}

#[test]
fn bytes_of_a_gpu_that_hangs_are_not_waited_for() {
    for call in 0..2 {
        child("hanging_later", &[("HANGING_CALL", call.to_string()), ("SIMCUDA_LEAKS", "ignore".into())]);
    }
}

#[test]
fn a_link_that_stands_still_ends_the_load() {
    child("stalled", &[("SIMCUDA_LINK", "0.00001".into()), ("SIMCUDA_LEAKS", "ignore".into())]);
}
