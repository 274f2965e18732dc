//! Recordings as JSON: the array format of Chrome's trace events. A load is a process there, what threads and devices do
//! are tracks. What overlaps on one (reads of a ring, copies of a device) is spread over several, so that spans of a track
//! nest or are apart.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::trace::{Event, Kind, Recorded, Recording};
use crate::extent::{FileId, Rank};

/// Writes loads, and how many events are missing.
pub(super) fn write(out: impl Write, loads: &[Arc<Recording>], dropped: u64) -> io::Result<()> {
    let mut out = Lines { out: io::BufWriter::new(out), first: true };
    for (load, recording) in (1..).zip(loads) {
        out.name("process_name", load, 0, &format!("load {load}"))?;
        write_load(&mut out, load, recording)?;
    }
    if dropped > 0 {
        let args = Map::from_iter([("events".into(), json!(dropped))]);
        let start = loads.iter().flat_map(|load| load.tracks()).flat_map(|(_, events)| events).map(|event| event.end);
        let ts = us(start.max().unwrap_or(0));
        out.line(&Line { name: "dropped", cat: "trace", ph: "i", ts, dur: None, s: Some("g"), pid: 1, tid: 0, args })?;
    }
    let end = if out.first { "[]\n" } else { "\n]\n" };
    out.out.write_all(end.as_bytes())?;
    out.out.flush()
}

/// A track and what it shows, which nests or is apart.
struct Track {
    name: String,
    spans: Vec<Recorded>,
    instants: Vec<Recorded>,
}

fn write_load(out: &mut Lines<impl Write>, load: u32, recording: &Recording) -> io::Result<()> {
    let tracks = tracks(recording);
    let mut names = Names { recording, files: BTreeMap::new() };
    for (tid, track) in (1..).zip(tracks) {
        out.name("thread_name", load, tid, &track.name)?;
        let args = Map::from_iter([("sort_index".into(), json!(tid))]);
        let meta = |name| Line { name, cat: "__metadata", ph: "M", ts: 0.0, dur: None, s: None, pid: load, tid, args };
        out.line(&meta("thread_sort_index"))?;
        for Recorded { event, start, end } in track.spans {
            let (name, cat, args) = names.of(&event);
            let (ts, dur) = (us(start), Some(us(end - start)));
            out.line(&Line { name, cat, ph: "X", ts, dur, s: None, pid: load, tid, args })?;
        }
        for Recorded { event, end, .. } in track.instants {
            let (name, cat, args) = names.of(&event);
            let name = if event.kind == Kind::Transfer { "done" } else { name };
            out.line(&Line { name, cat, ph: "i", ts: us(end), dur: None, s: Some("t"), pid: load, tid, args })?;
        }
    }
    Ok(())
}

/// Threads by name, each with its reads if these overlap other things, then devices.
fn tracks(recording: &Recording) -> Vec<Track> {
    let mut threads = recording.tracks();
    threads.sort_by(|a, b| a.0.cmp(&b.0));
    let mut tracks = Vec::new();
    let mut devices: BTreeMap<u32, Vec<Recorded>> = BTreeMap::new();
    for (name, events) in threads {
        let (mut spans, mut reads, mut stalled, mut instants) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for recorded in events {
            match recorded.event.kind {
                Kind::Transfer => {
                    devices.entry(recorded.event.number).or_default().push(recorded);
                    instants.push(recorded);
                }
                Kind::Tensor => instants.push(recorded),
                Kind::Read => reads.push(recorded),
                Kind::Stalled => stalled.push(recorded),
                _ => spans.push(recorded),
            }
        }
        let together: Vec<Recorded> = spans.iter().chain(&reads).copied().collect();
        let apart = if nests(together.clone()) { Vec::new() } else { lanes(reads) };
        let spans = if apart.is_empty() { together } else { spans };
        tracks.push(Track { name: name.clone(), spans: in_order(spans), instants });
        let lanes = apart.into_iter().chain(lanes(stalled)).zip(1..);
        tracks.extend(lanes.map(|(lane, at)| Track { name: format!("{name}, read {at}"), ..Track::of(lane) }));
    }
    for (device, transfers) in devices {
        let name = recording.names.device(device as usize);
        let lanes = lanes(transfers).into_iter().zip(1..);
        tracks.extend(lanes.map(|(lane, at)| Track { name: format!("{name}, copy {at}"), ..Track::of(lane) }));
    }
    tracks
}

impl Track {
    fn of(spans: Vec<Recorded>) -> Track {
        Track { name: String::new(), spans, instants: Vec::new() }
    }
}

/// By begin; what contains another comes before it.
fn in_order(mut spans: Vec<Recorded>) -> Vec<Recorded> {
    spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
    spans
}

/// Whether reads contain nothing but what they wait for, and no spans overlap otherwise.
fn nests(spans: Vec<Recorded>) -> bool {
    let mut open: Vec<Recorded> = Vec::new();
    in_order(spans).into_iter().all(|span| {
        while open.pop_if(|open| open.end <= span.start).is_some() {}
        let within = open.last().is_none_or(|open| {
            span.end <= open.end && (open.event.kind != Kind::Read || matches!(span.event.kind, Kind::Open | Kind::Pin))
        });
        open.push(span);
        within
    })
}

/// As few lanes as it takes for spans of each to be apart.
fn lanes(spans: Vec<Recorded>) -> Vec<Vec<Recorded>> {
    let mut lanes: Vec<Vec<Recorded>> = Vec::new();
    for span in in_order(spans) {
        let free = lanes.iter_mut().find(|lane| lane.last().is_none_or(|last| last.end <= span.start));
        match free {
            Some(lane) => lane.push(span),
            None => lanes.push(vec![span]),
        }
    }
    lanes
}

/// Names of what events speak of.
struct Names<'a> {
    recording: &'a Recording,
    files: BTreeMap<u32, Value>,
}

impl Names<'_> {
    /// An event's name, category and details.
    fn of(&mut self, event: &Event) -> (&'static str, &'static str, Map<String, Value>) {
        let &Event { kind, number, bytes, offset, landed } = event;
        let mut args = Map::new();
        let mut add = |name: &str, value: Value| args.insert(name.into(), value);
        match kind {
            Kind::Open | Kind::Read | Kind::Stalled => {
                let names = &self.recording.names;
                let file = self.files.entry(number).or_insert_with(|| names.file(FileId(number)).into());
                add("file", file.clone());
            }
            Kind::Kernels | Kind::Submit | Kind::WaitForQueue | Kind::Transfer => {
                add("device", self.recording.names.device(number as usize).into());
            }
            Kind::Tensor => {
                add("tensor", self.recording.names.tensor(Rank(number), offset as u32).into());
                add("rank", number.into());
            }
            _ => {}
        }
        if matches!(kind, Kind::Read | Kind::Stalled) {
            add("offset", offset.into());
        }
        if bytes > 0 {
            add("bytes", bytes.into());
        }
        if landed > 0 {
            add("landed", landed.into());
        }
        if kind == Kind::Transfer && offset > 0 {
            add("kernels", offset.into());
        }
        let (name, cat) = match kind {
            Kind::Devices => ("open devices", "setup"),
            Kind::Allocate => ("allocate", "setup"),
            Kind::Queues => ("make queues", "setup"),
            Kind::Open => ("open file", "read"),
            Kind::Read => ("read", "read"),
            Kind::Stalled => ("stalled read", "read"),
            Kind::WaitForSlot => ("wait for slot", "wait"),
            Kind::Pin => ("pin", "setup"),
            Kind::Kernels => ("load kernels", "setup"),
            Kind::Copy => ("copy", "copy"),
            Kind::Fill => ("fill", "copy"),
            Kind::Submit => ("submit", "copy"),
            Kind::WaitForQueue => ("wait for queue", "wait"),
            Kind::Transfer if offset > 0 => ("copy and kernels", "link"),
            Kind::Transfer => ("copy", "link"),
            Kind::Tensor => ("tensor", "consumer"),
            Kind::WaitForTensor => ("wait for tensor", "consumer"),
            Kind::Verify => ("verify files", "read"),
        };
        (name, cat, args)
    }
}

/// An array, an element a line.
struct Lines<W: Write> {
    out: io::BufWriter<W>,
    first: bool,
}

/// A trace event; times in microseconds.
#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'a str,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'a str>,
    pid: u32,
    tid: u32,
    args: Map<String, Value>,
}

impl<W: Write> Lines<W> {
    fn line(&mut self, line: &Line<'_>) -> io::Result<()> {
        self.out.write_all(if self.first { b"[\n" } else { b",\n" })?;
        self.first = false;
        serde_json::to_writer(&mut self.out, line)?;
        Ok(())
    }

    /// Names a process, or a thread of it.
    fn name(&mut self, what: &str, pid: u32, tid: u32, name: &str) -> io::Result<()> {
        let args = Map::from_iter([("name".into(), json!(name))]);
        self.line(&Line { name: what, cat: "__metadata", ph: "M", ts: 0.0, dur: None, s: None, pid, tid, args })
    }
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}
