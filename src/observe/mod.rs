//! What a load reports: [`Progress`] while it runs, [`Report`] afterwards, and the counters both come from; when what
//! happened: [`Trace`].

#![forbid(unsafe_code)]

mod chrome;
#[cfg(test)]
mod tests;
mod trace;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sync::lock;

pub use trace::Trace;
pub(crate) use trace::{Event, Kind, Names, Recording};

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
    /// Bytes that went to ranks of other processes, over the links between their devices; what several want counts for each
    /// of them.
    pub sent_bytes: u64,
    /// Bytes that came from them.
    pub received_bytes: u64,
    /// The engine that read.
    pub engine: String,
    /// Why this engine.
    pub engine_reason: String,
    /// If it reads into memory of a GPU, whether that was direct.
    pub direct: Option<Direct>,
    /// Peak memory over destinations and plan: anonymous memory, all of ours. Pages of mapped files do not count, wherever
    /// the files lie.
    pub peak_extra_bytes: u64,
    /// Peak memory pinned for copies to a device; 0 on host devices.
    pub peak_pinned_bytes: u64,
    /// As [`Progress::abandoned_bytes`]; 0, because a load that abandons memory fails.
    pub abandoned_bytes: u64,
    /// Busy and waiting seconds of each stage, summed over its threads.
    pub stages: Stages,
    /// What took how many seconds of the load.
    pub spent: Spent,
    /// What took most of them: `storage`, `cpu`, `link` or `consumer`.
    pub bottleneck: String,
    /// What was odd but no error.
    pub warnings: Vec<String>,
}

impl Report {
    /// Adds what the caller did with the tensors, and says what took longest.
    pub(crate) fn consumed(&mut self, consume: StageTime) {
        self.stages.consume = consume;
        self.spent.consumer = consume.busy;
        self.bottleneck = self.spent.most().into();
    }
}

/// Whether reads into memory of a GPU are known to pass through no memory of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// They would fail otherwise.
    Known,
    /// What reads does not say, and cannot be told to.
    Unknown,
    /// Not all: some failed, and were repeated through that memory.
    No,
}

impl std::fmt::Display for Direct {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Direct::Known => "known",
            Direct::Unknown => "unknown",
            Direct::No => "no",
        })
    }
}

/// Times of the stages of a load.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Stages {
    /// Reading: busy in the engine, which reads or waits for storage; waiting for a free slot.
    pub read: StageTime,
    /// Cutting, and submitting to devices: busy in that, waiting for the queue of a device while others submit.
    pub copy: StageTime,
    /// The caller who iterates over tensors: busy between them, waiting for the next.
    pub consume: StageTime,
}

/// Times of one stage, in seconds, summed over its threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTime {
    /// Doing its work.
    pub busy: f64,
    /// Waiting for its neighbours.
    pub waiting: f64,
}

/// Seconds of a load by what they went to: those of the reading threads divided by their number, and what came after. The
/// setting up before the first read is not in it.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Spent {
    /// Reading threads waited in their engine: for storage, or a throttle. With files as destinations also for these.
    pub storage: f64,
    /// They had a processor, or waited for one: cutting, submitting, and copying out of the page cache.
    pub cpu: f64,
    /// They waited for slots that devices copied from, or for a device to take copies; and from the last read on, until
    /// devices had copied everything.
    pub link: f64,
    /// The caller was busy with tensors that it was given, while the load went on or after it.
    pub consumer: f64,
}

impl Spent {
    /// What took longest.
    fn most(&self) -> &'static str {
        let Spent { storage, cpu, link, consumer } = *self;
        let all = [("cpu", cpu), ("storage", storage), ("link", link), ("consumer", consumer)];
        all.into_iter().reduce(|most, one| if one.1 > most.1 { one } else { most }).map_or("cpu", |(name, _)| name)
    }
}

/// What the reading threads of a load hand on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behind {
    /// Nobody: they copy themselves.
    Nothing,
    /// Queues of devices.
    Link,
    /// Queues that write files.
    Files,
}

/// The counters and warnings of one load, added to from all its threads.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes_landed: AtomicU64,
    pub(crate) tensors_landed: AtomicU64,
    pub(crate) storage_bytes: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    pub(crate) abandoned_bytes: AtomicU64,
    /// What was to be read into memory of a GPU, and was read through that of the host.
    pub(crate) repeated_bytes: AtomicU64,
    read_waiting_ns: AtomicU64,
    copy_busy_ns: AtomicU64,
    copy_waiting_ns: AtomicU64,
    /// Threads that have ended reading, and from begin to end of theirs: what passed, how much of that they had a
    /// processor, and how much they waited for one.
    readers: AtomicU64,
    readers_ns: AtomicU64,
    readers_cpu_ns: AtomicU64,
    readers_delayed_ns: AtomicU64,
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

    pub(crate) fn read_waiting(&self, time: Duration) {
        add_time(&self.read_waiting_ns, time);
    }

    pub(crate) fn copy_busy(&self, time: Duration) {
        add_time(&self.copy_busy_ns, time);
    }

    pub(crate) fn copy_waiting(&self, time: Duration) {
        add_time(&self.copy_waiting_ns, time);
    }

    /// Counts this thread, which has read for so long and ends now.
    pub(crate) fn reader_ended(&self, time: Duration) {
        self.readers.fetch_add(1, Ordering::Relaxed);
        add_time(&self.readers_ns, time);
        let (cpu, delayed) = processor_times();
        add_time(&self.readers_cpu_ns, cpu);
        add_time(&self.readers_delayed_ns, delayed);
    }

    /// The times of a load whose last thread had read at `read_at` and whose last bytes had landed at `landed_at`, and what they
    /// went to.
    pub(crate) fn times(&self, behind: Behind, read_at: Instant, landed_at: Instant) -> (Stages, Spent) {
        let seconds = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e9;
        let all = seconds(&self.readers_ns);
        let slots = seconds(&self.read_waiting_ns);
        let copy = StageTime { busy: seconds(&self.copy_busy_ns), waiting: seconds(&self.copy_waiting_ns) };
        let read = StageTime { busy: (all - slots - copy.busy - copy.waiting).max(0.0), waiting: slots };
        let stages = Stages { read, copy, consume: StageTime::default() };

        let (cpu, delayed) = (seconds(&self.readers_cpu_ns), seconds(&self.readers_delayed_ns));
        // Who seldom needs a processor waits for one when something else is over: no faster one would end that earlier.
        let delayed = delayed * cpu / (all - delayed).max(cpu).max(f64::MIN_POSITIVE);
        let off = (all - cpu - slots - copy.waiting).max(0.0);
        let cpu = cpu + delayed.min(off);
        let asleep = (off - delayed).max(0.0);
        let storage = asleep.min(read.busy);
        // A driver that makes whoever submits wait; and slots that only other readers have are waited for with these.
        let behind_them = if behind == Behind::Nothing { 0.0 } else { slots + copy.waiting + asleep - storage };
        let readers = self.readers.load(Ordering::Relaxed).max(1) as f64;
        let from_to = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        // An engine may sit out its throttle when there is nothing left to read.
        let storage = (storage / readers - from_to(landed_at, read_at)).max(0.0);
        let mut spent = Spent { storage, cpu: cpu / readers, ..Spent::default() };
        let behind_them = behind_them / readers + from_to(read_at, landed_at);
        match behind {
            Behind::Files => spent.storage += behind_them,
            Behind::Link => spent.link = behind_them,
            Behind::Nothing => {}
        }
        (stages, spent)
    }
}

fn add_time(counter: &AtomicU64, time: Duration) {
    counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// How long this thread has had a processor, and waited for one where the system tells that.
fn processor_times() -> (Duration, Duration) {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    // The second number, in nanoseconds (proc_pid_schedstat(5)); the first one is as old as the last tick.
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let waited = told.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0);
    (Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32), Duration::from_nanos(waited))
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
