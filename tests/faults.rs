//! Every read of a load made to fail, end short, return nothing, stall or panic: always an error that names its
//! place, never a hang, never wrong bytes.

#[path = "support/model.rs"]
mod model;
#[path = "support/stuck.rs"]
mod stuck;
#[path = "support/worlds.rs"]
mod worlds;

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use shardlift::read::{Engine, EngineChoice, Mmap, Next, Pread, Request, Uring, Work};
use shardlift::{Checkpoint, ErrorKind, Loader, Rank, Residency, Result, Rules, World};
use stuck::Stuck;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Fails,
    OneShort,
    Nothing,
    Interrupted,
    Stalls,
    Panics,
}

/// An engine whose n-th completion goes wrong.
#[derive(Debug)]
struct Faulty {
    engine: Arc<dyn Engine>,
    fault: Fault,
    at: usize,
    count: AtomicUsize,
}

/// Longer than any bound below.
const STALL: Duration = Duration::from_millis(1500);

// SAFETY: the engine inside answers for it; an outcome is only made worse.
unsafe impl Engine for Faulty {
    fn name(&self) -> &'static str {
        self.engine.name()
    }
    fn threads(&self) -> usize {
        self.engine.threads()
    }
    fn alignment(&self) -> u64 {
        self.engine.alignment()
    }
    fn lends(&self) -> bool {
        self.engine.lends()
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        self.engine.run(&FaultyWork { work, faulty: self })
    }
}

struct FaultyWork<'a> {
    work: &'a dyn Work,
    faulty: &'a Faulty,
}

impl Work for FaultyWork<'_> {
    fn next(&self, may_wait: bool) -> Next {
        self.work.next(may_wait)
    }

    fn stopped(&self) -> bool {
        self.work.stopped()
    }

    fn done(&self, mut request: Request, outcome: io::Result<usize>) {
        let outcome = if self.faulty.count.fetch_add(1, Ordering::Relaxed) == self.faulty.at {
            match self.faulty.fault {
                Fault::None => outcome,
                Fault::Fails => Err(io::Error::from_raw_os_error(5)),
                Fault::OneShort => outcome.map(|bytes| {
                    // What did not arrive must be read again: spoil it.
                    request.buffer()[bytes - 1].write(0xAA);
                    bytes - 1
                }),
                Fault::Nothing => Ok(0),
                Fault::Interrupted => Err(io::ErrorKind::Interrupted.into()),
                Fault::Stalls => {
                    std::thread::sleep(STALL);
                    outcome
                }
                Fault::Panics => panic!("a fault of the test"),
            }
        } else {
            outcome
        };
        self.work.done(request, outcome);
    }

    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        let now = self.faulty.count.fetch_add(1, Ordering::Relaxed) == self.faulty.at;
        match if now { self.faulty.fault } else { Fault::None } {
            Fault::None => {}
            Fault::Fails => return self.work.done(request, Err(io::Error::from_raw_os_error(5))),
            Fault::Nothing => return self.work.done(request, Ok(0)),
            Fault::OneShort => {
                let bytes = request.bytes() - 1;
                return self.work.done(request, Ok(bytes));
            }
            Fault::Interrupted => return self.work.done(request, Err(io::ErrorKind::Interrupted.into())),
            Fault::Stalls => std::thread::sleep(STALL),
            Fault::Panics => panic!("a fault of the test"),
        }
        // SAFETY: the engine's word, passed on.
        unsafe { self.work.lent(request, mapping, keep) }
    }
}

fn engines() -> Vec<Arc<dyn Engine>> {
    let mut engines: Vec<Arc<dyn Engine>> = vec![Arc::new(Pread::new(2)), Arc::new(Mmap::new(2))];
    match Uring::new(2, 4, true) {
        Ok(uring) => engines.push(Arc::new(uring)),
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        Err(error) => eprintln!("SKIPPED: faults of io_uring: {error}"),
    }
    engines
}

#[test]
fn every_read_of_a_load_can_go_wrong() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload_as_str().is_none_or(|why| !why.contains("a fault of the test")) {
            told(panic)
        }
    }));
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 11);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    for world in worlds::of(2) {
        for engine in engines() {
            let load = |fault, at| {
                let faulty = Arc::new(Faulty { engine: Arc::clone(&engine), fault, at, count: AtomicUsize::new(0) });
                let loader = Loader::new().staging(8 << 20).custom_engine(faulty);
                let plan = loader.plan(&checkpoint, &rules, &world).unwrap();
                loader.load(&plan)
            };
            let (_, report) = load(Fault::None, 0).unwrap();
            for at in 0..report.reads as usize {
                for fault in [Fault::Fails, Fault::Nothing, Fault::Panics] {
                    let error = load(fault, at).unwrap_err();
                    let kind = match fault {
                        Fault::Fails => ErrorKind::Io,
                        Fault::Nothing => ErrorKind::Truncated,
                        _ => ErrorKind::Panicked,
                    };
                    assert_eq!(error.kind(), kind, "{fault:?} {at} {error:?}");
                    assert!(error.file().is_some() && error.tensor().is_some(), "{error:?}");
                    assert!(error.at().bytes.is_some(), "{error:?}");
                }
                for fault in [Fault::OneShort, Fault::Interrupted] {
                    let (weights, _) = load(fault, at).unwrap();
                    for rank in 0..2 {
                        for tensor in &tensors {
                            let landed = weights.tensor(Rank(rank), &tensor.name).unwrap();
                            let expected = model::expected(tensor, rank as usize, 2);
                            assert!(landed.to_bytes().unwrap() == expected, "{fault:?} {at} {}", tensor.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_load_may_be_waited_for_without_a_bound() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 18);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for world in worlds::of(2) {
        let loader = Loader::new().stall(Duration::MAX, Duration::MAX);
        let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &world).unwrap();
        loader.load(&plan).unwrap().0.check().unwrap();
    }
}

#[test]
fn every_read_of_a_load_can_stall() {
    const WARNING: Duration = Duration::from_millis(10);
    const BOUND: Duration = Duration::from_millis(60);
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 17);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    for world in worlds::of(2) {
        for engine in engines() {
            let start = |fault, at, bound| {
                let faulty = Arc::new(Faulty { engine: Arc::clone(&engine), fault, at, count: AtomicUsize::new(0) });
                let loader = Loader::new().staging(8 << 20).custom_engine(faulty.clone()).stall(WARNING, bound);
                (loader.start(&loader.plan(&checkpoint, &rules, &world).unwrap()).unwrap(), faulty)
            };
            let (load, _) = start(Fault::None, 0, shardlift::limits::STALL_ERROR);
            let (_, report) = load.finish().unwrap();
            for at in 0..report.reads as usize {
                // On a busy machine a load may exceed this bound by itself, before its fault, and what was late then comes.
                let mut struck = (0..20).filter_map(|_| {
                    let began = Instant::now();
                    let (load, faulty) = start(Fault::Stalls, at, BOUND);
                    let monitor = load.monitor();
                    let error = load.finish().unwrap_err();
                    let took = began.elapsed();
                    let place = format!("{} {world:?} {at} {error:?}", engine.name());
                    assert_eq!(error.kind(), ErrorKind::Stalled, "{place}");
                    assert!(BOUND <= took && took < STALL, "{place}: {took:?}");
                    assert!(error.file().is_some() && error.tensor().is_some(), "{place}");
                    assert!(error.at().bytes.is_some_and(|(from, to)| from < to), "{place}");
                    (faulty.count.load(Ordering::Relaxed) > at).then_some((place, monitor))
                });
                let (place, monitor) = struck.next().expect("a load that gets as far as its fault");
                assert!(monitor.progress().abandoned_bytes > 0, "{place}");
            }
        }
    }
}

/// A tensor of one page, on a page of the file: what is left after a short read is no whole page.
#[test]
fn a_read_of_a_single_page_may_come_short_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let header = r#"{"page":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}"#;
    let data: Vec<u8> = (0..4096u32).map(|i| (i * 7 + i / 256) as u8).collect();
    let mut bytes = 4088u64.to_le_bytes().to_vec();
    bytes.extend(format!("{header:4088}").into_bytes());
    bytes.extend(&data);
    std::fs::write(&file, bytes).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    for engine in engines() {
        let faulty = Faulty { engine, fault: Fault::OneShort, at: 0, count: AtomicUsize::new(0) };
        let loader = Loader::new().custom_engine(Arc::new(faulty));
        let plan = loader.plan(&checkpoint, &Rules::replicate_all(), &World::host(1)).unwrap();
        let (weights, report) = loader.load(&plan).unwrap();
        assert!(weights.tensor(Rank(0), "page").unwrap().to_bytes().unwrap() == data);
        assert_eq!(report.reads, 2);
    }
}

#[test]
fn a_stalled_read_is_a_warning_and_then_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 12);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new()
        .custom_engine(Arc::new(Stuck(STALL)))
        .stall(Duration::from_millis(50), Duration::from_millis(200));
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(2)).unwrap();
    let began = Instant::now();
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    while monitor.warnings().is_empty() && began.elapsed() < STALL {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(began.elapsed() < STALL && monitor.warnings()[0].contains(".safetensors"), "{:?}", monitor.warnings());
    let error = load.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled);
    assert!(!monitor.warnings().is_empty());
    assert!(error.file().is_some() && error.tensor().is_some() && error.at().bytes.is_some(), "{error:?}");
    assert!(began.elapsed() < STALL, "{:?}", began.elapsed());
}

/// Keeps what it is given until it is let go, and from then on reads.
#[derive(Debug, Default)]
struct Kept {
    gone: Mutex<bool>,
    go: Condvar,
    reads: AtomicBool,
}

impl Kept {
    const THREADS: usize = 4;

    fn let_go(&self) {
        *self.gone.lock().unwrap() = true;
        self.go.notify_all();
    }
}

// SAFETY: the engine inside answers for itself; else it reports no bytes, and keeps no request.
unsafe impl Engine for Kept {
    fn name(&self) -> &'static str {
        "kept"
    }
    fn threads(&self) -> usize {
        Kept::THREADS
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        if self.reads.load(Ordering::Relaxed) {
            return Pread::new(Kept::THREADS).run(work);
        }
        while let Next::Request(request) = work.next(true) {
            drop(self.go.wait_while(self.gone.lock().unwrap(), |gone| !*gone).unwrap());
            work.done(request, Ok(0));
        }
        Ok(())
    }
}

#[test]
fn a_loader_loads_again_after_reads_that_do_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 19);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for world in worlds::of(2) {
        let engine = Arc::new(Kept::default());
        // Two slots, which the reads have both.
        let loader = Loader::new().staging(2 << 20).custom_engine(Arc::clone(&engine) as Arc<dyn Engine>);
        let loader = loader.stall(Duration::from_millis(50), Duration::from_millis(200));
        let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &world).unwrap();
        assert_eq!(loader.load(&plan).unwrap_err().kind(), ErrorKind::Stalled);
        engine.reads.store(true, Ordering::Relaxed);
        let loader = loader.stall(shardlift::limits::STALL_WARNING, shardlift::limits::STALL_ERROR);
        let (weights, _) = loader.load(&plan).unwrap_or_else(|error| panic!("{world:?}: {error}"));
        engine.let_go();
        for (rank, tensor) in (0..2).flat_map(|rank| tensors.iter().map(move |tensor| (rank, tensor))) {
            let landed = weights.tensor(Rank(rank), &tensor.name).unwrap();
            assert!(landed.to_bytes().unwrap() == model::expected(tensor, rank as usize, 2), "{}", tensor.name);
        }
    }
}

#[test]
fn a_read_that_is_only_slow_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 13);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let engine = Faulty { engine: Arc::new(Pread::new(2)), fault: Fault::Stalls, at: 1, count: AtomicUsize::new(0) };
    let loader = Loader::new().custom_engine(Arc::new(engine));
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(1)).unwrap();
    loader.load(&plan).unwrap().0.check().unwrap();
}

#[test]
fn a_file_cut_short_or_replaced_is_an_error_with_every_engine() {
    for engine in [EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring] {
        for replace in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            model::write(folder.path(), 14);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let loader = Loader::new().engine(engine).throttle(Some(30 << 20));
            let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(2)).unwrap();
            let mut load = loader.start(&plan).unwrap();
            load.next();
            let path = folder.path().join("two.safetensors");
            if replace {
                let copy = folder.path().join("copy");
                std::fs::copy(&path, &copy).unwrap();
                std::fs::rename(&copy, &path).unwrap();
            } else {
                std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000).unwrap();
            }
            let error = load.finish().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Changed | ErrorKind::Truncated), "{engine:?} {error:?}");
            assert!(error.file().is_some_and(|file| file.ends_with("two.safetensors")), "{error:?}");
        }
    }
}

#[test]
fn lent_tensors_of_a_file_cut_short_read_as_zeros_from_there() {
    const LEFT: u64 = 100_001;
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 16);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().residency(Residency::Mapped);
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(1)).unwrap();
    let (weights, report) = loader.load(&plan).unwrap();
    assert_eq!(report.storage_bytes_read, 0, "all are lent");
    let cut = folder.path().join("two.safetensors");
    std::fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(LEFT).unwrap();
    let mut missing = 0;
    for tensor in &tensors {
        let meta = &checkpoint.tensors()[checkpoint.position(&tensor.name).unwrap()];
        let of_cut = checkpoint.files()[meta.file.0 as usize].path == cut;
        let left = if of_cut { LEFT.clamp(meta.start, meta.end) - meta.start } else { meta.end - meta.start } as usize;
        let landed = weights.tensor(Rank(0), &tensor.name).unwrap().as_bytes().unwrap();
        assert!(landed[..left] == tensor.bytes[..left], "{}", tensor.name);
        assert!(landed[left..].iter().all(|&byte| byte == 0), "{}", tensor.name);
        missing += landed.len() - left;
    }
    assert!(missing > 4 << 20, "{missing} bytes were cut off");
}

/// An engine that leaves what it should read, or says that it read more than there is room for.
#[derive(Debug)]
struct Careless {
    reports: Option<usize>,
}

// SAFETY: it writes nothing and keeps nothing; what it reports is refused, which is what the test is about.
unsafe impl Engine for Careless {
    fn name(&self) -> &'static str {
        "careless"
    }
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        if let (Some(bytes), Next::Request(request)) = (self.reports, work.next(true)) {
            work.done(request, Ok(bytes));
        }
        Ok(())
    }
}

#[test]
fn a_load_is_over_when_every_byte_has_landed_not_when_the_engine_says_so() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 16);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for world in worlds::of(2) {
        for reports in [None, Some(usize::MAX)] {
            let loader = Loader::new().custom_engine(Arc::new(Careless { reports }));
            let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &world).unwrap();
            let error = loader.load(&plan).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.tensor().is_some() && error.to_string().contains("engine careless"), "{error}");
            let out = folder.path().join("out");
            assert_eq!(loader.reshard(&plan, &out, false).unwrap_err().kind(), ErrorKind::Io);
            assert!(!out.exists());
        }
    }
}
