//! What a load tells subscribers of `tracing`. Alone in its process: the subscriber is all threads'.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use safetensors::tensor::{Dtype, TensorView};
use shardlift::{Checkpoint, Loader, Monitor, Plan, Rules, World};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

type Fields = BTreeMap<String, String>;

/// A span or an event: its name, or an event's message, what it lies in, and its fields.
#[derive(Debug, Clone)]
struct Told {
    name: String,
    level: Level,
    parent: Option<usize>,
    fields: Fields,
}

/// All spans, of which an id is the position from 1, and all events; what each thread is in.
#[derive(Default)]
struct Heard {
    spans: Vec<Told>,
    events: Vec<Told>,
    entered: Vec<(std::thread::ThreadId, u64)>,
}

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Heard>>, Arc<Mutex<Option<Monitor>>>);

struct Words<'a>(&'a mut Fields);

impl Visit for Words<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().into(), format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }
}

impl Heard {
    fn told(&self, metadata: &Metadata<'_>, parent: Option<&Id>, contextual: bool, fields: Fields) -> Told {
        let here = std::thread::current().id();
        let current = || self.entered.iter().rev().find(|(thread, _)| *thread == here).map(|(_, id)| *id);
        let parent = parent.map(Id::into_u64).or_else(|| if contextual { current() } else { None });
        let name = fields.get("message").cloned().unwrap_or_else(|| metadata.name().into());
        Told { name, level: *metadata.level(), parent: parent.map(|id| id as usize - 1), fields }
    }
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("shardlift")
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::new();
        span.record(&mut Words(&mut fields));
        let mut heard = self.0.lock().unwrap();
        let told = heard.told(span.metadata(), span.parent(), span.is_contextual(), fields);
        heard.spans.push(told);
        Id::from_u64(heard.spans.len() as u64)
    }
    fn record(&self, id: &Id, values: &Record<'_>) {
        values.record(&mut Words(&mut self.0.lock().unwrap().spans[id.into_u64() as usize - 1].fields));
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::new();
        event.record(&mut Words(&mut fields));
        let mut heard = self.0.lock().unwrap();
        let told = heard.told(event.metadata(), event.parent(), event.is_contextual(), fields);
        let loaded = told.name == "loaded";
        heard.events.push(told);
        drop(heard);
        if loaded && let Some(monitor) = self.1.lock().unwrap().take() {
            monitor.cancel();
        }
    }
    fn enter(&self, id: &Id) {
        self.0.lock().unwrap().entered.push((std::thread::current().id(), id.into_u64()));
    }
    fn exit(&self, id: &Id) {
        let mut heard = self.0.lock().unwrap();
        let here = (std::thread::current().id(), id.into_u64());
        let last = heard.entered.iter().rposition(|entered| *entered == here).unwrap();
        heard.entered.remove(last);
    }
}

fn number(told: &Told, field: &str) -> f64 {
    told.fields[field].parse().unwrap_or_else(|_| panic!("{field} of {told:?}"))
}

#[test]
fn a_load_is_a_span_with_files_stages_and_an_outcome() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["one", "two"] {
        let bytes = vec![5; 3 << 20];
        let view = || TensorView::new(Dtype::U8, vec![3 << 10, 1 << 10], &bytes).unwrap();
        let tensors = (0..3).map(|at| (format!("{file}.{at}"), view()));
        safetensors::serialize_to_file(tensors, None, &folder.path().join(format!("{file}.safetensors"))).unwrap();
    }
    let plan = |world: World| {
        let rules = Rules::from_toml("rule = [{ match = \"**\", shard = { dim = 1 } }]").unwrap();
        Plan::new(&Checkpoint::open(folder.path()).unwrap(), &rules, &world).unwrap()
    };
    let collector = Collector::default();
    tracing::subscriber::set_global_default(collector.clone()).unwrap();
    // A load between what it is told in, and what was heard of it.
    let hear = |load: &dyn Fn()| {
        *collector.0.lock().unwrap() = Heard::default();
        tracing::info_span!(target: "shardlift_server", "request").in_scope(load);
        std::mem::take(&mut *collector.0.lock().unwrap())
    };
    for world in [World::host(2), World::host_staged(2)] {
        let plan = plan(world);
        let heard = hear(&|| drop(Loader::new().load(&plan).unwrap()));
        assert!(heard.entered.is_empty(), "{:?}", heard.entered);
        let [request, load, files @ ..] = &heard.spans[..] else { panic!("{:?}", heard.spans) };
        assert_eq!((&*request.name, &*load.name, load.level, load.parent), ("request", "load", Level::INFO, Some(0)));
        assert_eq!(load.fields["plan"], format!("{:016x}", plan.digest()));
        assert_eq!(load.fields["model"], folder.path().to_str().unwrap());
        assert_eq!((&*load.fields["world"], &*load.fields["ranks"], &*load.fields["engine"]), ("2", "0,1", "pread"));
        assert_eq!((number(load, "bytes"), &*load.fields["outcome"]), (f64::from(18 << 20), "loaded"));
        assert!(number(load, "seconds") > 0.0);
        let mut opened: Vec<&str> = files.iter().map(|file| &*file.fields["path"]).collect();
        opened.sort_unstable();
        let paths = ["one", "two"].map(|file| folder.path().join(format!("{file}.safetensors")));
        assert_eq!(opened, paths.each_ref().map(|path| path.to_str().unwrap()));
        assert!(files.iter().all(|file| (&*file.name, file.level, file.parent) == ("file", Level::DEBUG, Some(1))));

        let events: Vec<_> = heard.events.iter().map(|event| (&*event.name, event.level, event.parent)).collect();
        let stage = ("stage", Level::DEBUG, Some(1));
        assert_eq!(events, [stage, stage, ("loaded", Level::INFO, Some(1)), stage]);
        let [read, copy, loaded, consume] = &heard.events[..] else { unreachable!() };
        assert_eq!([read, copy, consume].map(|stage| &*stage.fields["stage"]), ["read", "copy", "consume"]);
        assert!([read, copy, consume].iter().all(|stage| number(stage, "busy") + number(stage, "waiting") >= 0.0));
        assert!(number(read, "reads") >= 6.0 && number(read, "bytes") == f64::from(18 << 20));
        assert_eq!(number(loaded, "landed_bytes"), f64::from(18 << 20));
    }

    let plan = plan(World::host(1));
    let heard = hear(&|| {
        let load = Loader::new().throttle(Some(1 << 20)).start(&plan).unwrap();
        load.monitor().cancel();
        load.finish().unwrap_err();
    });
    assert_eq!(heard.spans[1].fields["outcome"], "cancelled");
    assert!(heard.events.iter().any(|event| (&*event.name, event.level) == ("load cancelled", Level::INFO)));

    // A load that was told of is no longer cancelled.
    let load = Loader::new().throttle(Some(256 << 20)).start(&plan).unwrap();
    *collector.1.lock().unwrap() = Some(load.monitor());
    load.finish().unwrap();
    assert!(collector.1.lock().unwrap().is_none());

    let file = std::fs::File::options().write(true).open(folder.path().join("two.safetensors")).unwrap();
    file.set_len(4096).unwrap();
    let heard = hear(&|| drop(Loader::new().load(&plan).unwrap_err()));
    assert_eq!(heard.spans[1].fields["outcome"], "failed");
    let failed = heard.events.iter().find(|event| event.name == "load failed").unwrap();
    assert_eq!((failed.level, failed.parent, &*failed.fields["kind"]), (Level::ERROR, Some(1), "truncated"));
    assert!(failed.fields["error"].contains("two.safetensors"), "{failed:?}");

    // Before anything moves, too.
    let memory = shardlift::CallerMemory {
        rank: shardlift::Rank(0),
        name: "none".into(),
        address: std::ptr::null_mut(),
        bytes: 1,
    };
    // SAFETY: what is given is refused.
    let heard = hear(&|| drop(unsafe { Loader::new().start_into(&plan, std::slice::from_ref(&memory)) }.unwrap_err()));
    assert_eq!(heard.spans[1].fields["outcome"], "failed");
    assert_eq!(heard.events.len(), 1);
}
