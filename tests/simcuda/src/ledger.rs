//! What is written down: calls, bytes, times, violations, and what was not returned.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use twins::settings::Leaks;

use crate::device_memory::Kind;
use crate::link::Span;
use crate::sim::{Sim, lock};
use crate::stream::Traffic;

/// CPU time of calls on their callers' threads, to the end of each: that is after the lock was given back.
pub(crate) static CALL_CPU_NS: AtomicU64 = AtomicU64::new(0);
/// Time in which memory got its pages: no device's driver takes it.
pub(crate) static POPULATE_NS: AtomicU64 = AtomicU64::new(0);

/// The counters.
pub(crate) struct Ledger {
    calls: BTreeMap<&'static str, u64>,
    total: u64,
    /// The number of the last call; unlike the counters it is never reset.
    number: u64,
    devices: Vec<DeviceBytes>,
    copies: BTreeMap<&'static str, u64>,
    kernels: BTreeMap<&'static str, u64>,
    pub(crate) pageable_copies: u64,
    /// Copies of memory that is pinned, but for another context.
    pub(crate) foreign_copies: u64,
    copy_cpu_ns: u64,
    worker_cpu_ns: u64,
    first_start: u64,
    last_end: u64,
    pub(crate) violations: Vec<String>,
    pub(crate) peak_pinned_bytes: u64,
    /// What was left in a context when that was destroyed.
    abandoned: Vec<(&'static str, u64)>,
}

#[derive(Default, Clone, Copy)]
struct DeviceBytes {
    h2d: u64,
    d2h: u64,
    d2d: u64,
    busy_ns: u64,
}

impl Ledger {
    pub(crate) fn new(devices: usize) -> Ledger {
        Ledger {
            calls: BTreeMap::new(),
            total: 0,
            number: 0,
            devices: vec![DeviceBytes::default(); devices],
            copies: BTreeMap::new(),
            kernels: BTreeMap::new(),
            pageable_copies: 0,
            foreign_copies: 0,
            copy_cpu_ns: 0,
            worker_cpu_ns: 0,
            first_start: 0,
            last_end: 0,
            violations: Vec::new(),
            peak_pinned_bytes: 0,
            abandoned: Vec::new(),
        }
    }

    /// Counts a call and gives its number.
    pub(crate) fn count(&mut self, call: &'static str) -> u64 {
        static AT_EXIT: Once = Once::new();
        AT_EXIT.call_once(|| {
            // SAFETY: the function stays, since nobody unloads the twin.
            unsafe { libc::atexit(at_exit) };
        });
        *self.calls.entry(call).or_default() += 1;
        self.total += 1;
        self.number += 1;
        self.number
    }

    /// How often a function was called since the last reset; all of them without a name.
    pub(crate) fn calls(&self, name: Option<&str>) -> u64 {
        let Some(name) = name else { return self.total };
        let of = |call: &str| call == name || call.strip_suffix("_v2") == Some(name);
        self.calls.iter().filter(|(call, _)| of(call)).map(|(_, count)| count).sum()
    }

    /// Bytes by kind: 0 from the host, 1 to the host, 2 from device to device.
    pub(crate) fn bytes(&self, device: usize, kind: u32) -> u64 {
        let bytes = self.devices.get(device).copied().unwrap_or_default();
        match kind {
            0 => bytes.h2d,
            1 => bytes.d2h,
            2 => bytes.d2d,
            _ => 0,
        }
    }

    /// Forgets what was counted, but not violations, nor what was abandoned.
    pub(crate) fn reset(&mut self) {
        CALL_CPU_NS.store(0, Ordering::Relaxed);
        POPULATE_NS.store(0, Ordering::Relaxed);
        let mut fresh = Ledger::new(self.devices.len());
        fresh.number = self.number;
        fresh.violations = std::mem::take(&mut self.violations);
        fresh.abandoned = std::mem::take(&mut self.abandoned);
        *self = fresh;
    }

    pub(crate) fn copied(&mut self, device: usize, traffic: Traffic, strided: bool, span: Span) {
        let counts = &mut self.devices[device];
        let bytes = match traffic {
            Traffic::In(_) => &mut counts.h2d,
            Traffic::Out(_) => &mut counts.d2h,
            Traffic::Device(_) => &mut counts.d2d,
            Traffic::Kernel(name) => {
                *self.kernels.entry(name).or_default() += 1;
                return;
            }
        };
        let (Traffic::In(more) | Traffic::Out(more) | Traffic::Device(more)) = traffic else { return };
        *bytes += more;
        *self.copies.entry(if strided { "2d" } else { "1d" }).or_default() += 1;
        if matches!(traffic, Traffic::In(_) | Traffic::Out(_)) {
            counts.busy_ns += span.busy;
            self.moved(span);
        }
    }

    /// Something moved bytes on a link in this time: a copy, or an operation of another library.
    pub(crate) fn moved(&mut self, span: Span) {
        self.first_start = if self.first_start == 0 { span.start } else { self.first_start.min(span.start) };
        self.last_end = self.last_end.max(span.end);
    }

    /// CPU time of a worker: in the copy itself, and all of it.
    pub(crate) fn worked(&mut self, copy_ns: u64, all_ns: u64) {
        self.copy_cpu_ns += copy_ns;
        self.worker_cpu_ns += all_ns;
    }

    pub(crate) fn abandoned(&mut self, kind: &'static str, made: u64) {
        self.abandoned.push((kind, made));
    }
}

impl Sim {
    /// What was not returned: what it is, and the number of the call that made it.
    pub(crate) fn live(&self) -> Vec<(&'static str, u64)> {
        let mut live = Vec::new();
        for device in &self.devices {
            live.extend(device.retained.iter().map(|made| ("primary context", *made)));
        }
        live.extend(self.streams.iter().map(|(_, made, _)| ("stream", made)));
        live.extend(self.events.iter().map(|(_, made, _)| ("event", made)));
        live.extend(self.modules.iter().map(|(_, made, _)| ("module", made)));
        live.extend(self.physicals.iter().map(|(_, made, _)| ("physical allocation", made)));
        live.extend(self.memory.reservations.values().map(|reservation| ("address range", reservation.made)));
        live.extend(self.memory.iter().filter(|(_, range)| !range.freed).map(|(_, range)| match range.kind {
            Kind::Plain | Kind::Pool => ("device memory", range.made),
            Kind::Mapped(_) => ("mapping", range.made),
        }));
        live.extend(self.host.iter().map(|(_, range)| match range.registered {
            true => ("registered memory", range.made),
            false => ("pinned memory", range.made),
        }));
        live
    }

    fn leaks(&self) -> Vec<(&'static str, u64)> {
        let mut leaks = self.live();
        leaks.extend(&self.ledger.abandoned);
        leaks
    }

    /// Everything, as JSON.
    pub(crate) fn report(&self) -> String {
        let ledger = &self.ledger;
        let seconds = |ns: u64| ns as f64 / 1e9;
        let mut text = String::from("{\n");
        let counts = |counts: &BTreeMap<&'static str, u64>| {
            let counts: Vec<String> = counts.iter().map(|(name, count)| format!("\"{name}\": {count}")).collect();
            format!("{{{}}}", counts.join(", "))
        };
        let mut field = |name: &str, value: String| writeln!(text, "  \"{name}\": {value},").expect("a string");
        field("calls", ledger.total.to_string());
        field("calls_by_function", counts(&ledger.calls));
        let devices: Vec<String> = ledger
            .devices
            .iter()
            .zip(&self.devices)
            .map(|(bytes, device)| {
                format!(
                    "{{\"h2d_bytes\": {}, \"d2h_bytes\": {}, \"d2d_bytes\": {}, \"busy_seconds\": {}, \"peak_bytes\": {}, \"used_bytes\": {}}}",
                    bytes.h2d, bytes.d2h, bytes.d2d, seconds(bytes.busy_ns), device.peak, device.used
                )
            })
            .collect();
        field("devices", format!("[{}]", devices.join(", ")));
        field("copies", counts(&ledger.copies));
        field("kernels", counts(&ledger.kernels));
        field("pageable_copies", ledger.pageable_copies.to_string());
        field("foreign_copies", ledger.foreign_copies.to_string());
        field("copy_cpu_seconds", seconds(ledger.copy_cpu_ns).to_string());
        field("other_cpu_seconds", seconds(ledger.worker_cpu_ns.saturating_sub(ledger.copy_cpu_ns)).to_string());
        field("call_cpu_seconds", seconds(CALL_CPU_NS.load(Ordering::Relaxed)).to_string());
        field("populate_seconds", seconds(POPULATE_NS.load(Ordering::Relaxed)).to_string());
        field("first_copy_start_ns", ledger.first_start.to_string());
        field("last_copy_end_ns", ledger.last_end.to_string());
        field("peak_pinned_bytes", ledger.peak_pinned_bytes.to_string());
        let leaks: Vec<String> =
            self.leaks().iter().map(|(kind, made)| format!("{{\"kind\": \"{kind}\", \"call\": {made}}}")).collect();
        field("leaks", format!("[{}]", leaks.join(", ")));
        let violations: Vec<String> = ledger.violations.iter().map(|text| format!("{text:?}")).collect();
        write!(text, "  \"violations\": [{}]\n}}\n", violations.join(", ")).expect("a string");
        text
    }
}

extern "C" fn at_exit() {
    let sim = lock();
    if let Some(path) = sim.config.ledger.as_ref().map(|path| path.replace("%p", &std::process::id().to_string()))
        && let Err(error) = fs::write(&path, sim.report())
    {
        eprintln!("simcuda: SIMCUDA_LEDGER={path}: {error}");
    }
    let leaks = sim.leaks();
    if leaks.is_empty() || sim.config.leaks == Leaks::Ignore {
        return;
    }
    let mut kinds: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    leaks.iter().for_each(|(kind, made)| kinds.entry(kind).or_default().push(*made));
    let kinds: Vec<String> =
        kinds.iter().map(|(kind, made)| format!("{} {kind} (first: call {})", made.len(), made[0])).collect();
    eprintln!("simcuda: LEAK: {}", kinds.join(", "));
    if sim.config.leaks == Leaks::Abort {
        std::process::abort();
    }
}
