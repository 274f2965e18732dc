//! What is written down: calls, bytes, violations, and communicators that were not given back.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::Once;

use twins::settings::Leaks;

use crate::sim::{Sim, config, lock};

/// The counters.
#[derive(Default)]
pub(crate) struct Ledger {
    calls: BTreeMap<&'static str, u64>,
    total: u64,
    /// Operations that ended with their bytes where they belong, by the call that made them.
    operations: BTreeMap<&'static str, u64>,
    /// By device: received over its link, and sent.
    devices: BTreeMap<usize, [u64; 2]>,
    pub(crate) created: u64,
    pub(crate) destroyed: u64,
    pub(crate) aborted: u64,
    pub(crate) violations: Vec<String>,
}

impl Ledger {
    /// Counts a call.
    pub(crate) fn count(&mut self, call: &'static str) {
        static AT_EXIT: Once = Once::new();
        AT_EXIT.call_once(|| {
            // SAFETY: the function stays, since nobody unloads the twin.
            unsafe { libc::atexit(at_exit) };
        });
        *self.calls.entry(call).or_default() += 1;
        self.total += 1;
    }

    /// Counts an operation of a device and what it received and sent.
    pub(crate) fn moved(&mut self, call: &'static str, device: usize, received: u64, sent: u64) {
        *self.operations.entry(call).or_default() += 1;
        let [all_received, all_sent] = self.devices.entry(device).or_default();
        *all_received += received;
        *all_sent += sent;
    }

    /// How often a function was called since the last reset; all of them without a name.
    pub(crate) fn calls(&self, name: Option<&str>) -> u64 {
        name.map_or(self.total, |name| self.calls.get(name).copied().unwrap_or(0))
    }

    /// Bytes that a device received (kind 0) or sent (1).
    pub(crate) fn bytes(&self, device: usize, kind: usize) -> u64 {
        self.devices.get(&device).and_then(|bytes| bytes.get(kind)).copied().unwrap_or(0)
    }

    /// Forgets what was counted, but not violations.
    pub(crate) fn reset(&mut self) {
        *self = Ledger { violations: std::mem::take(&mut self.violations), ..Ledger::default() };
    }
}

impl Sim {
    /// Everything, as JSON.
    pub(crate) fn report(&self) -> String {
        let ledger = &self.ledger;
        let counts = |counts: &BTreeMap<&'static str, u64>| {
            let counts: Vec<String> = counts.iter().map(|(name, count)| format!("\"{name}\": {count}")).collect();
            format!("{{{}}}", counts.join(", "))
        };
        let devices: Vec<String> = ledger
            .devices
            .iter()
            .map(|(device, [received, sent])| {
                format!("{{\"device\": {device}, \"received_bytes\": {received}, \"sent_bytes\": {sent}}}")
            })
            .collect();
        let violations: Vec<String> = ledger.violations.iter().map(|text| format!("{text:?}")).collect();
        let mut text = String::from("{\n");
        let mut field = |name: &str, value: String| writeln!(text, "  \"{name}\": {value},").expect("a string");
        field("calls", ledger.total.to_string());
        field("calls_by_function", counts(&ledger.calls));
        field("operations", counts(&ledger.operations));
        field("devices", format!("[{}]", devices.join(", ")));
        field("created", ledger.created.to_string());
        field("destroyed", ledger.destroyed.to_string());
        field("aborted", ledger.aborted.to_string());
        field("leaks", self.comms.len().to_string());
        write!(text, "  \"violations\": [{}]\n}}\n", violations.join(", ")).expect("a string");
        text
    }
}

extern "C" fn at_exit() {
    let sim = lock();
    if let Some(path) = config().ledger.as_ref().map(|path| path.replace("%p", &std::process::id().to_string()))
        && let Err(error) = fs::write(&path, sim.report())
    {
        eprintln!("simnccl: SIMNCCL_LEDGER={path}: {error}");
    }
    if sim.comms.is_empty() || config().leaks == Leaks::Ignore {
        return;
    }
    eprintln!("simnccl: LEAK: {} communicators", sim.comms.len());
    if config().leaks == Leaks::Abort {
        std::process::abort();
    }
}
