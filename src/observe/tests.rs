use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::trace::Names;
use super::*;
use crate::extent::{FileId, Rank};
use crate::limits;

#[derive(Debug)]
struct Numbers;

impl Names for Numbers {
    fn file(&self, file: FileId) -> String {
        format!("file \"{}\"", file.0)
    }
    fn device(&self, device: usize) -> String {
        format!("device {device}")
    }
    fn tensor(&self, rank: Rank, dest: u32) -> String {
        format!("tensor {dest} of {rank}")
    }
}

fn written(trace: &Trace) -> Vec<Value> {
    let mut text = Vec::new();
    trace.write(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// The spans of all tracks: track, name, begin and end in nanoseconds.
fn spans(events: &[Value]) -> Vec<(String, String, u64, u64)> {
    let named = |event: &&Value| event["name"] == "thread_name";
    let tracks: Vec<&Value> = events.iter().filter(named).collect();
    let track = |tid: &Value| tracks.iter().find(|track| track["tid"] == *tid).unwrap()["args"]["name"].clone();
    let ns = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
    let span = |event: &Value| {
        let (start, name) = (ns(&event["ts"]), event["name"].as_str().unwrap().into());
        (track(&event["tid"]).as_str().unwrap().into(), name, start, start + ns(&event["dur"]))
    };
    events.iter().filter(|event| event["ph"] == "X").map(span).collect()
}

#[test]
fn what_threads_record_is_written_and_what_finds_no_room_is_counted() {
    assert_eq!(written(&Trace::new()), [] as [Value; 0]);
    // Two threads, of which the second needs two chunks, and one that comes too late.
    let trace = Trace::of(3);
    let recording = trace.begin(Box::new(Numbers));
    for (thread, events) in [("one", 1), ("two", limits::TRACE_CHUNK + 1), ("three", 7)] {
        let recording = std::sync::Arc::clone(&recording);
        let record = move || {
            let read = Event { number: 5, bytes: 10, offset: 20, landed: 0, ..Event::of(Kind::Read) };
            (0..events).for_each(|_| recording.since(read, Instant::now()));
        };
        thread::Builder::new().name(thread.into()).spawn(record).unwrap().join().unwrap();
    }
    assert_eq!(trace.dropped(), 7);
    let events = written(&trace);
    let of = |thread: &str| spans(&events).iter().filter(|(track, ..)| track == thread).count();
    assert_eq!([of("one"), of("two"), of("three")], [1, limits::TRACE_CHUNK + 1, 0]);
    let read = events.iter().find(|event| event["ph"] == "X").unwrap();
    assert_eq!(read["args"], serde_json::json!({ "file": "file \"5\"", "offset": 20, "bytes": 10 }));
    assert_eq!(events.iter().find(|event| event["name"] == "dropped").unwrap()["args"]["events"], 7);
}

/// Each keeps a plan: a server may load for as long as it runs.
#[test]
fn loads_that_record_nothing_any_more_are_not_kept() {
    let trace = Trace::of(1);
    let recorded = |events: usize| {
        let recording = trace.begin(Box::new(Numbers));
        (0..events).for_each(|_| recording.since(Event::of(Kind::Verify), Instant::now()));
        std::sync::Arc::downgrade(&recording)
    };
    let loads = [recorded(0), recorded(1), recorded(3)];
    assert_eq!(loads.map(|load| load.strong_count()), [0, 1, 0]);
    assert_eq!((spans(&written(&trace)).len(), trace.dropped()), (1, 3));
}

#[test]
fn a_thread_records_for_one_load_after_the_other() {
    let trace = Trace::new();
    let loads = [trace.begin(Box::new(Numbers)), trace.begin(Box::new(Numbers))];
    for load in [0, 1, 0, 1, 1] {
        loads[load].since(Event::of(Kind::Verify), Instant::now());
    }
    let events = written(&trace);
    let of = |pid: u32| events.iter().filter(|event| event["ph"] == "X" && event["pid"] == pid).count();
    assert_eq!([of(1), of(2)], [2, 3]);
}

#[test]
fn what_overlaps_is_spread_over_tracks() {
    let trace = Trace::new();
    let recording = trace.begin(Box::new(Numbers));
    let record = move || {
        let at = |us| recording.origin + Duration::from_micros(us);
        let span = |kind, from, to| recording.span(Event::of(kind), at(from), at(to));
        // Three reads in flight, of which two overlap, and a copy while they last.
        span(Kind::Read, 0, 10);
        span(Kind::Read, 5, 15);
        span(Kind::Copy, 6, 7);
        span(Kind::Read, 12, 20);
        span(Kind::Transfer, 1, 9);
        span(Kind::Transfer, 9, 12);
    };
    thread::Builder::new().name("reader".into()).spawn(record).unwrap().join().unwrap();
    let found = spans(&written(&trace));
    let found: Vec<(&str, u64)> =
        found.iter().map(|(track, _, start, end)| (track.as_str(), (end - start) / 1000)).collect();
    let expected = [
        ("reader", 1),
        ("reader, read 1", 10),
        ("reader, read 1", 8),
        ("reader, read 2", 10),
        ("device 0, copy 1", 8),
        ("device 0, copy 1", 3),
    ];
    assert_eq!(found, expected);
}

#[test]
fn seconds_go_to_what_threads_waited_for() {
    // Of 10 seconds of two threads: 2 for slots, 1 for a queue, 3 copying; the processor had them for 4.
    let seconds = |seconds: u64| AtomicU64::new(seconds * 1_000_000_000);
    let counters = Counters {
        readers: AtomicU64::new(2),
        readers_ns: seconds(10),
        readers_cpu_ns: seconds(4),
        read_waiting_ns: seconds(2),
        copy_busy_ns: seconds(3),
        copy_waiting_ns: seconds(1),
        ..Counters::default()
    };
    let read = Instant::now();
    let landed = read + Duration::from_secs(2);
    let spent = |behind| counters.times(behind, read, landed).1;
    let of = |Spent { storage, cpu, link, .. }: Spent| [storage, cpu, link];
    assert_eq!(of(spent(Behind::Link)), [1.5, 2.0, 3.5]);
    assert_eq!(of(spent(Behind::Files)), [5.0, 2.0, 0.0]);
    assert_eq!(of(spent(Behind::Nothing)), [1.5, 2.0, 0.0]);
    let (stages, late) = counters.times(Behind::Link, read + Duration::from_secs(1), read);
    assert_eq!(of(late), [0.5, 2.0, 1.5]);
    assert_eq!((stages.read.busy, stages.read.waiting, stages.copy.busy), (4.0, 2.0, 3.0));
    // A driver that makes who submits wait: half of what copying took was without a processor.
    let blocked =
        Counters { readers: 1.into(), readers_ns: seconds(10), copy_busy_ns: seconds(9), ..Counters::default() };
    assert_eq!(of(blocked.times(Behind::Link, read, read).1), [1.0, 0.0, 9.0]);

    // A busy machine, where threads wait for a processor half of the time: it counts as what they need it for.
    let busy = |cpu| Counters {
        readers: 1.into(),
        readers_ns: seconds(10),
        readers_cpu_ns: seconds(cpu),
        readers_delayed_ns: seconds(5),
        ..Counters::default()
    };
    assert_eq!(of(busy(5).times(Behind::Nothing, read, read).1), [0.0, 10.0, 0.0]);
    assert_eq!(of(busy(1).times(Behind::Nothing, read, read).1), [8.0, 2.0, 0.0]);

    let mut report = Report { spent: spent(Behind::Link), ..Report::default() };
    report.consumed(StageTime::default());
    assert_eq!(report.bottleneck, "link");
    report.consumed(StageTime { busy: 5.0, waiting: 0.0 });
    assert_eq!((report.bottleneck.as_str(), report.spent.consumer), ("consumer", 5.0));
}

#[test]
fn a_thread_knows_its_processor_time() {
    let began = Instant::now();
    let taken = || {
        let (cpu, delayed) = processor_times();
        cpu + delayed
    };
    let before = taken();
    while began.elapsed() < Duration::from_millis(20) {}
    let took = taken() - before;
    assert!(took > Duration::from_millis(10), "{took:?}");
    let (before, _) = processor_times();
    thread::sleep(Duration::from_millis(20));
    let (after, _) = processor_times();
    assert!(after - before < Duration::from_millis(15));
}
