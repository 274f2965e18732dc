//! Traces of loads: on every kind of device and engine they parse, their spans nest, and their bytes are the report's;
//! also when the load fails or is cancelled.

#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;
#[path = "support/stuck.rs"]
mod stuck;
#[path = "support/worlds.rs"]
mod worlds;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, ErrorKind, Loader, Rules, Trace};

/// Every kind of copy: shards by rows and columns, casts, transposes, and padding that no tensor fills.
const RULES: &str = r#"
rule = [
  { match = "**.rows", shard = { dim = 0 } },
  { match = "f.whole", cast = "f32", transpose = true, replicate = true },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "c.whole", steps = [{ pad = { dim = 0, to = 64, fill = "zero" } }] },
  { match = "**", replicate = true },
]
"#;

fn written(trace: &Trace) -> Vec<Value> {
    let mut text = Vec::new();
    trace.write(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Spans of a track nest or are apart, and every track has a name.
fn assert_nests(events: &[Value]) {
    let ns = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
    let mut tracks: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
    let id = |event: &Value| (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let start = ns(&event["ts"]);
        tracks.entry(id(event)).or_default().push((start, start + ns(&event["dur"])));
    }
    for (track, mut spans) in tracks {
        assert!(events.iter().any(|event| event["name"] == "thread_name" && id(event) == track), "{track:?}");
        spans.sort_by_key(|(start, end)| (*start, std::cmp::Reverse(*end)));
        let mut open: Vec<u64> = Vec::new();
        for (start, end) in spans {
            while open.pop_if(|until| *until <= start).is_some() {}
            assert!(open.last().is_none_or(|until| end <= *until), "{track:?}: {start}..{end} in ..{:?}", open.last());
            open.push(end);
        }
    }
}

/// What the spans of these names add up to.
fn sum(events: &[Value], names: &[&str], of: &str) -> u64 {
    let named = |event: &&Value| event["ph"] == "X" && names.iter().any(|name| event["name"] == *name);
    events.iter().filter(named).filter_map(|event| event["args"][of].as_u64()).sum()
}

#[test]
fn spans_nest_and_bytes_add_up() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 5);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(RULES).unwrap();
    for engine in [EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring] {
        for world in worlds::of(1).into_iter().chain(worlds::of(3)) {
            let trace = Trace::new();
            let loader = Loader::new().engine(engine).staging(8 << 20).trace(Some(&trace));
            let plan = loader.plan(&checkpoint, &rules, &world).unwrap();
            let mut load = loader.start(&plan).unwrap();
            let tensors = load.by_ref().map(Result::unwrap).count();
            let (weights, report) = load.finish().unwrap();
            weights.check().unwrap();
            let events = written(&trace);
            assert_nests(&events);
            assert_eq!(trace.dropped(), 0);
            assert_eq!(sum(&events, &["read"], "bytes"), report.storage_bytes_read, "{engine:?} {world:?}");
            let reads = events.iter().filter(|event| event["ph"] == "X" && event["name"] == "read");
            assert_eq!(reads.count() as u64, report.reads);
            let copied = sum(&events, &["copy", "copy and kernels", "fill"], "bytes");
            assert_eq!(copied + sum(&events, &["read"], "landed"), report.landed_bytes, "{engine:?} {world:?}");
            assert_eq!(events.iter().filter(|event| event["name"] == "tensor").count(), tensors);
            let gpus = world.device(shardlift::Rank(0)).to_string().starts_with("cuda");
            let has = |name: &str| events.iter().any(|event| event["name"] == name);
            assert_eq!(gpus, has("copy and kernels"), "{world:?}");
            assert!(has("allocate") && has("verify files") && (has("submit") == has("done")));
        }
    }
}

#[test]
fn loads_of_one_trace_are_apart() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 6);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let trace = Trace::new();
    let loader = Loader::new().trace(Some(&trace));
    let plan = loader.plan(&checkpoint, &Rules::from_toml(RULES).unwrap(), &worlds::of(2)[1]).unwrap();
    let loads: Vec<_> = (0..3).map(|_| loader.start(&plan).unwrap()).collect();
    let read: u64 = loads.into_iter().map(|load| load.finish().unwrap().1.storage_bytes_read).sum();
    let events = written(&trace);
    assert_nests(&events);
    assert_eq!(sum(&events, &["read"], "bytes"), read);
    let names: Vec<&Value> = events.iter().filter(|event| event["name"] == "process_name").collect();
    assert_eq!(names.len(), 3);
}

#[test]
fn what_a_cancelled_load_did_is_told() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 7);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for world in worlds::of(2) {
        let trace = Trace::new();
        let loader = Loader::new().throttle(Some(20 << 20)).trace(Some(&trace));
        let plan = loader.plan(&checkpoint, &Rules::from_toml(RULES).unwrap(), &world).unwrap();
        let load = loader.start(&plan).unwrap();
        let monitor = load.monitor();
        // Until a read is told of: what is filled without reading may be done first.
        loop {
            let events = written(&trace);
            assert_nests(&events); // it may be written at any time
            if sum(&events, &["read"], "bytes") > 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        monitor.cancel();
        assert_eq!(load.finish().unwrap_err().kind(), ErrorKind::Cancelled);
        let events = written(&trace);
        assert_nests(&events);
        let read = sum(&events, &["read"], "bytes");
        assert!(read > 0 && read < checkpoint.bytes(), "{read}");
    }
}

#[test]
fn what_a_failed_load_did_is_told() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 8);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(RULES).unwrap();
    let failing = |engine: stuck::Stuck, stall: Duration| {
        let trace = Trace::new();
        let loader = Loader::new().custom_engine(Arc::new(engine)).stall(stall, stall).trace(Some(&trace));
        let error = loader.load(&loader.plan(&checkpoint, &rules, &worlds::of(1)[0]).unwrap()).unwrap_err();
        let events = written(&trace);
        assert_nests(&events);
        (error.kind(), events)
    };
    let (kind, events) = failing(stuck::Stuck(Duration::ZERO), Duration::from_secs(60));
    assert_eq!(kind, ErrorKind::Truncated);
    assert!(sum(&events, &["read"], "bytes") > 0);
    // Reads that did not come back: both threads have one.
    let (kind, events) = failing(stuck::Stuck(Duration::from_millis(1500)), Duration::from_millis(100));
    assert_eq!(kind, ErrorKind::Stalled);
    let stalled: Vec<&Value> = events.iter().filter(|event| event["name"] == "stalled read").collect();
    assert!((1..=2).contains(&stalled.len()), "{events:?}");
    assert!(stalled.iter().all(|read| read["args"]["file"].is_string() && read["dur"].as_f64().unwrap() >= 100e3));
}
