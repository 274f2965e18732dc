//! What a load reports: [`Progress`] while it runs, [`Report`] afterwards, and the counters both come from.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::sync::lock;

/// How far a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that were copied to destinations, over all ranks of this process.
    pub bytes_done: u64,
    /// Bytes that will have been copied at the end.
    pub bytes_total: u64,
    /// Destinations that are complete.
    pub tensors_done: u64,
    /// Destinations in all.
    pub tensors_total: u64,
    /// Bytes of slots and destinations given up because a read or copy that stalled may still write to them. A stalled
    /// read gives them back when it returns after all; a stalled copy never does.
    pub abandoned_bytes: u64,
}

/// What the end of a load will have moved.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    /// Bytes to copy.
    pub(crate) bytes: u64,
    /// Bytes that are there already, in memory lent from the files.
    pub(crate) lent_bytes: u64,
    pub(crate) tensors: u64,
}

/// What a load did. Sizes are bytes, times seconds.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// From `start` to the last tensor complete, allocation included.
    pub seconds: f64,
    /// Processor time of the whole process in that time.
    pub cpu_seconds: f64,
    /// Union of the source bytes over this process's ranks.
    pub needed_bytes: u64,
    /// Bytes that landed, summed over this process's ranks; those lent from a mapping included.
    pub landed_bytes: u64,
    /// Bytes asked of files after the headers, padding and retries included.
    pub storage_bytes_read: u64,
    /// Reads asked of files after the headers.
    pub reads: u64,
    /// The engine that read.
    pub engine: String,
    /// Why this engine.
    pub engine_reason: String,
    /// Peak memory over destinations and plan: anonymous memory, all of ours. Pages of mapped files do not count, wherever
    /// the files lie.
    pub peak_extra_bytes: u64,
    /// Peak memory pinned for copies to a device; 0 on host devices.
    pub peak_pinned_bytes: u64,
    /// As [`Progress::abandoned_bytes`]; 0, because a load that abandons memory fails.
    pub abandoned_bytes: u64,
    /// Busy and waiting seconds of each stage, summed over its threads.
    pub stages: Stages,
    /// The stage that bounds the load: `storage`, `cpu` or `link`.
    pub bottleneck: String,
    /// What was odd but no error.
    pub warnings: Vec<String>,
}

/// Times of the stages of a load.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Stages {
    /// Reading: busy in reads, waiting for a free slot.
    pub read: StageTime,
    /// Cutting, and submitting to devices: busy in that, waiting for the queue of a device while others submit.
    pub copy: StageTime,
}

/// Times of one stage, in seconds, summed over its threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTime {
    /// Doing its work.
    pub busy: f64,
    /// Waiting for its neighbours.
    pub waiting: f64,
}

/// The counters and warnings of one load, added to from all its threads.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes_landed: AtomicU64,
    pub(crate) tensors_landed: AtomicU64,
    pub(crate) storage_bytes: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) abandoned_bytes: AtomicU64,
    read_busy_ns: AtomicU64,
    read_waiting_ns: AtomicU64,
    copy_busy_ns: AtomicU64,
    copy_waiting_ns: AtomicU64,
    warnings: Mutex<Vec<String>>,
}

impl Counters {
    pub(crate) fn progress(&self, totals: Totals) -> Progress {
        Progress {
            bytes_done: self.bytes_landed.load(Ordering::Relaxed),
            bytes_total: totals.bytes,
            tensors_done: self.tensors_landed.load(Ordering::Relaxed),
            tensors_total: totals.tensors,
            abandoned_bytes: self.abandoned_bytes.load(Ordering::Relaxed),
        }
    }

    /// Adds a warning, unless it was given before.
    pub(crate) fn warn(&self, warning: String) {
        let mut warnings = lock(&self.warnings);
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        lock(&self.warnings).clone()
    }

    pub(crate) fn read_busy(&self, time: Duration) {
        add_time(&self.read_busy_ns, time);
    }

    pub(crate) fn read_waiting(&self, time: Duration) {
        add_time(&self.read_waiting_ns, time);
    }

    pub(crate) fn copy_busy(&self, time: Duration) {
        add_time(&self.copy_busy_ns, time);
    }

    pub(crate) fn copy_waiting(&self, time: Duration) {
        add_time(&self.copy_waiting_ns, time);
    }

    pub(crate) fn stages(&self) -> Stages {
        let seconds = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e9;
        Stages {
            read: StageTime { busy: seconds(&self.read_busy_ns), waiting: seconds(&self.read_waiting_ns) },
            copy: StageTime { busy: seconds(&self.copy_busy_ns), waiting: seconds(&self.copy_waiting_ns) },
        }
    }
}

impl Stages {
    /// The stage that the others wait for.
    pub(crate) fn bottleneck(&self) -> &'static str {
        let Stages { read, copy } = *self;
        if read.waiting > read.busy {
            "link"
        } else if copy.busy > read.busy {
            "cpu"
        } else {
            "storage"
        }
    }
}

fn add_time(counter: &AtomicU64, time: Duration) {
    counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// Anonymous memory of this process in bytes, or `None` where the system does not say. What it shares are files, also
/// those that lie in memory.
pub(crate) fn resident_bytes() -> Option<u64> {
    // Pages: all, resident, shared... (proc_pid_statm(5)). Cheaper to ask for than the words of `status`.
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = pages.split_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some(resident.saturating_sub(shared) * rustix::param::page_size() as u64)
}
