//! The memory of a load, as the system counts it: destinations, the staging budget, and little else. One test in a
//! process of its own, because it is the process that is measured.

#[path = "support/stuck.rs"]
mod stuck;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};
use shardlift::checkpoint::Index;
use shardlift::read::{Engine, EngineChoice, Pread, Work};
use shardlift::{Checkpoint, ErrorKind, Loader, Memory, Plan, Result, Rules, World};
use stuck::Stuck;

const MIB: u64 = 1 << 20;
const STAGING: u64 = 32 * MIB;
/// What a load may take beside destinations and staging.
const REST: u64 = 64 * MIB;

const RULES: &str = r#"
rule = [
  { match = "rows.*", shard = { dim = 0 } },
  { match = "columns.*", shard = { dim = 1 } },
]
"#;

/// 320 MiB of random bytes, half of them cut by columns: ten times the staging budget.
fn write(folder: &Path) {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = |bytes: usize| -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes);
        while out.len() < bytes {
            // xorshift64 (Marsaglia 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.extend_from_slice(&state.to_le_bytes());
        }
        out
    };
    let (rows, columns) = (4096, 4096);
    let names = (0..10).map(|i| if i % 2 == 0 { format!("rows.{i}") } else { format!("columns.{i}") });
    let tensors: Vec<_> = names.map(|name| (name, random(rows * columns * 2))).collect();
    let views =
        tensors.iter().map(|(name, bytes)| (name, TensorView::new(Dtype::BF16, vec![rows, columns], bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Anonymous memory of this process (Linux): what it maps of files is the system's.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// As [`resident`], without what the global allocator keeps for later.
fn resident_trimmed() -> u64 {
    #[cfg(target_env = "gnu")]
    // SAFETY: gives free memory of the allocator back; no memory in use changes.
    unsafe {
        libc::malloc_trim(0);
    }
    resident()
}

/// What `load` returns, and by how much the process grew meanwhile, at most.
fn growth<T>(load: impl FnOnce() -> T) -> (T, u64) {
    let before = resident_trimmed();
    let (peak, stop) = (AtomicU64::new(before), AtomicBool::new(false));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                peak.fetch_max(resident(), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let result = load();
        stop.store(true, Ordering::Relaxed);
        result
    });
    (result, peak.into_inner().max(resident()) - before)
}

/// An engine that takes much memory when its reads are done.
#[derive(Debug)]
struct Heavy(Pread);

const HEAVY: usize = 128 << 20;

// SAFETY: the engine inside answers for it.
unsafe impl Engine for Heavy {
    fn name(&self) -> &'static str {
        "heavy"
    }
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        self.0.run(work)?;
        let memory = std::hint::black_box(vec![1u8; HEAVY]);
        thread::sleep(Duration::from_millis(200));
        drop(memory);
        Ok(())
    }
}

/// An index is text of strangers: a value of some bytes would take nearly a hundred times as many in a tree.
fn an_index_takes_what_its_weight_map_takes() {
    let odd = ["{\"\":0}"; 1 << 19].join(",");
    for key in ["other", "metadata\":{\"x", "metadata\":{\"total_size"] {
        let end = if key.contains('{') { "}" } else { "" };
        let index = format!("{{\"weight_map\":{{\"a\":\"b\"}},\"{key}\":[{odd}]{end}}}");
        let (parsed, took) = growth(|| Index::parse(index.as_bytes()).unwrap());
        assert_eq!(parsed.tensors.len(), 1);
        assert!(took < index.len() as u64, "{key}: {took} bytes for {}", index.len());
    }
}

#[test]
fn a_load_takes_its_destinations_the_staging_budget_and_little_else() {
    an_index_takes_what_its_weight_map_takes();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(RULES).unwrap();
    let at_rest = resident_trimmed();
    for world in [World::host(4), World::host_staged(4)] {
        let plan = Plan::new(&checkpoint, &rules, &world).unwrap();
        for engine in [EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring] {
            for memory in [Memory::Blocks, Memory::PerTensor] {
                let loader = Loader::new().engine(engine).memory(memory).staging(STAGING as usize);
                let ((mut weights, report), grown) = growth(|| loader.load(&plan).unwrap());
                let what = format!("{engine:?} {memory:?} {:?}", world.device(shardlift::Rank(0)));
                assert!(grown <= checkpoint.bytes() + STAGING + REST, "{what}: grew by {} MiB", grown / MIB);
                assert!(grown >= checkpoint.bytes(), "{what}: what was measured is not the load: {} MiB", grown / MIB);
                let extra = report.peak_extra_bytes;
                assert!(extra <= STAGING + REST, "{what}: reports {} MiB", extra / MIB);
                let (_, grown) = growth(|| weights.check().unwrap());
                assert!(grown <= REST / 2, "{what}: the check grew by {} MiB", grown / MIB);
                if engine == EngineChoice::Pread {
                    let (_, grown) = growth(|| loader.reload(&plan, &mut weights).unwrap());
                    assert!(grown <= REST / 2, "{what}: loading again grew by {} MiB", grown / MIB);
                }
                drop((weights, loader));
            }
        }
        // A reshard's destinations are files.
        let out = tempfile::tempdir().unwrap();
        let loader = Loader::new().staging(STAGING as usize);
        let (report, grown) = growth(|| loader.reshard(&plan, out.path().join("out"), false).unwrap());
        assert!(grown <= STAGING + REST, "reshard grew by {} MiB", grown / MIB);
        assert!(report.peak_extra_bytes <= STAGING + REST, "reshard reports {} MiB", report.peak_extra_bytes / MIB);
    }
    assert!(resident_trimmed() < at_rest + REST, "what was dropped is given back");

    // However many ranks it has. One tensor, or the disk would be what is measured.
    let one = rules.clone().keeping("rows.0");
    let plan = Plan::new(&checkpoint, &Rules::replicate_all().keeping("rows.0"), &World::host(32)).unwrap();
    let cut = Plan::new(&checkpoint, &one, &World::host(32)).unwrap();
    for plan in [&plan, &cut] {
        let out = tempfile::tempdir().unwrap();
        let loader = Loader::new().staging(STAGING as usize);
        let (report, grown) = growth(|| loader.reshard(plan, out.path().join("out"), false).unwrap());
        assert!(grown <= STAGING + REST, "reshard for 32 ranks grew by {} MiB", grown / MIB);
        assert!(report.peak_extra_bytes <= STAGING + REST, "it reports {} MiB", report.peak_extra_bytes / MIB);
    }
    // What the process grew by is reported, whatever has landed in files by then.
    let out = tempfile::tempdir().unwrap();
    let loader = Loader::new().staging(STAGING as usize).custom_engine(Arc::new(Heavy(Pread::new(2))));
    let report = loader.reshard(&plan, out.path().join("out"), false).unwrap();
    assert!(report.peak_extra_bytes >= HEAVY as u64, "it reports {} MiB", report.peak_extra_bytes / MIB);

    // A load that fails gives everything back; one that stalls, as soon as its reads have returned.
    let plan = Plan::new(&checkpoint, &rules, &World::host(4)).unwrap();
    let loader = Loader::new().throttle(Some(200 * MIB));
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    while monitor.progress().bytes_done < 32 * MIB {
        thread::sleep(Duration::from_millis(1));
    }
    monitor.cancel();
    assert_eq!(load.finish().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(monitor.progress().abandoned_bytes, 0);
    drop(loader);
    assert!(resident_trimmed() < at_rest + REST, "a cancelled load gives its memory back");

    let loader = Loader::new()
        .custom_engine(Arc::new(Stuck(Duration::from_millis(600))))
        .staging(STAGING as usize)
        .stall(Duration::from_millis(50), Duration::from_millis(100));
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    assert_eq!(load.finish().unwrap_err().kind(), ErrorKind::Stalled);
    let abandoned = monitor.progress().abandoned_bytes;
    assert!((checkpoint.bytes()..=checkpoint.bytes() + STAGING).contains(&abandoned), "{abandoned}");
    drop(loader);
    let began = Instant::now();
    while threads_of_loads() > 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "the threads of the stalled load end");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(resident_trimmed() < at_rest + REST, "a stalled load gives its memory back in the end");
}

/// Threads of loads that still live.
fn threads_of_loads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("shardlift")).count()
}
