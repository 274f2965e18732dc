//! What loads did, in the text format of Prometheus.

use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

use shardlift::Report;

#[derive(Default)]
pub(crate) struct Metrics(Mutex<Counts>);

#[derive(Default, Clone, Copy)]
struct Counts {
    loads: u64,
    failures: u64,
    seconds: f64,
    bytes: u64,
    read_busy: f64,
    copy_busy: f64,
    last_gb_per_s: f64,
}

impl Metrics {
    /// A load is over; no report, no success.
    pub(crate) fn ended(&self, report: Option<&Report>) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.loads += 1;
        let Some(report) = report else { return counts.failures += 1 };
        counts.seconds += report.seconds;
        counts.bytes += report.landed_bytes;
        counts.read_busy += report.stages.read.busy;
        counts.copy_busy += report.stages.copy.busy;
        counts.last_gb_per_s = report.landed_bytes as f64 / report.seconds / 1e9;
    }

    pub(crate) fn text(&self, weights_bytes: u64) -> String {
        let counts = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
            let _ = writeln!(text, "# HELP shardlift_{name} {help}\n# TYPE shardlift_{name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(text, "shardlift_{name}{labels} {value}");
            }
        };
        metric("loads_total", "counter", "Loads that ended.", &[("", counts.loads as f64)]);
        metric(
            "load_failures_total",
            "counter",
            "Loads that failed or were cancelled.",
            &[("", counts.failures as f64)],
        );
        metric("load_seconds_total", "counter", "Seconds of loads that did not fail.", &[("", counts.seconds)]);
        metric("load_bytes_total", "counter", "Bytes that they landed.", &[("", counts.bytes as f64)]);
        let stages = [(r#"{stage="read"}"#, counts.read_busy), (r#"{stage="copy"}"#, counts.copy_busy)];
        metric("stage_busy_seconds_total", "counter", "Seconds that stages were busy, over their threads.", &stages);
        metric(
            "last_load_gb_per_second",
            "gauge",
            "Throughput of the last of them, in 1e9 bytes.",
            &[("", counts.last_gb_per_s)],
        );
        metric(
            "weights_bytes",
            "gauge",
            "Bytes of the weights of all models, those on their way included.",
            &[("", weights_bytes as f64)],
        );
        text
    }
}
