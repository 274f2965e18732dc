//! Which engine a load reads with, and into which slots.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::{EngineSource, Loader};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::observe::Direct;
use crate::pipeline::{Device, Prepared, Ring, SlotMaker};
use crate::plan::{DeviceSpec, Plan};
#[cfg(feature = "cuda")]
use crate::read::Cufile;
#[cfg(target_os = "linux")]
use crate::read::Uring;
use crate::read::{Choice, Engine, EngineChoice, Mmap, Pread, Throttled, choose, choose_cold, default_threads};
#[cfg(feature = "cuda")]
use crate::source::SourceFile;
use crate::sync::lock;

/// How fast a plan's bytes came by cuFile and by the staging engines: from files of one file system, to one GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct CufileMeasurement {
    /// The file system, by the device number of its files.
    pub file_system: u64,
    /// The GPU.
    pub gpu: u32,
    /// Whether cuFile was known to read directly.
    pub direct: Direct,
    /// Bytes per nanosecond through cuFile.
    pub cufile_gb_per_s: f64,
    /// Bytes per nanosecond through pinned memory, past the page cache.
    pub staged_gb_per_s: f64,
}

impl CufileMeasurement {
    /// Whether cuFile is known to be direct, and faster by more than runs differ.
    pub fn is_faster(&self) -> bool {
        self.direct == Direct::Known && self.cufile_gb_per_s > self.staged_gb_per_s * limits::CUFILE_GAIN
    }
}

/// Rings of slots in memory of GPUs, by the device's name.
pub(super) type DeviceRings = Mutex<BTreeMap<String, Ring>>;

/// The slots for a load that begins: others in place of those of a load that may never give all of its own back.
pub(super) fn in_use(ring: &mut Ring) -> Ring {
    if ring.is_retired() {
        *ring = ring.anew();
    }
    ring.clone()
}

/// What a load reads with.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) reason: String,
    pub(super) ring: Ring,
    pub(super) direct: Option<Direct>,
    pub(super) maker: Option<Arc<SlotMaker>>,
    /// What `auto` would have chosen instead of cuFile: then also failed reads are repeated through memory of the host.
    pub(super) otherwise: Option<Choice>,
    pub(super) warnings: Vec<String>,
}

impl Chosen {
    /// What a load that reads with this needs besides its destinations.
    ///
    /// # Errors
    /// As of [`Prepared::new`].
    pub(super) fn prepare(&self, plan: &Plan, devices: &[Arc<dyn Device>]) -> Result<Prepared> {
        Prepared::new(plan, devices, &*self.engine, &self.ring, self.maker.is_some())
    }

    /// Bytes of slots on a device that a load of this plan will make.
    pub(super) fn slots_to_make(&self, plan: &Plan) -> u64 {
        let wanted = plan.storage_bytes().next_multiple_of(self.ring.slot_bytes() as u64);
        let wanted = if self.maker.is_some() { wanted.min(self.ring.budget() as u64) } else { 0 };
        wanted.saturating_sub(self.ring.pinned_bytes())
    }
}

impl Loader {
    /// What was [measured](Loader::measure_cufile) of cuFile, so that [`EngineChoice::Auto`] may choose it: where that was
    /// known to be direct and faster than staging, for plans that read from the same file system into the same GPU.
    pub fn cufile_measured(mut self, measurements: &[CufileMeasurement]) -> Loader {
        self.measured = measurements.to_vec();
        self
    }

    /// Loads a plan several times through cuFile and through pinned memory, in turn and past the page cache; the latter by the
    /// engine that [`EngineChoice::Auto`] would choose. All that it reads lies on one file system, and its ranks on one GPU.
    ///
    /// # Errors
    /// As of such loads; [`ErrorKind::Usage`] for a plan of several file systems or devices.
    pub fn measure_cufile(&self, plan: &Plan) -> Result<CufileMeasurement> {
        let (file_system, gpu) = path(plan).ok_or_else(|| {
            Error::new(
                ErrorKind::Usage,
                "cufile is measured from one file system into one GPU, which this plan is not for",
            )
        })?;
        let loader = |engine| {
            let loader = Loader::new().engine(engine).staging(self.staging).drop_page_cache(true);
            loader.stall(self.stall_warning, self.stall_error)
        };
        let loaders = [loader(EngineChoice::Cufile), loader(choose_cold(plan))];
        let (mut best, mut direct) = ([0f64; 2], Direct::Unknown);
        // The first round makes slots, opens the driver, and empties the page cache.
        for round in 0..=MEASURED_ROUNDS {
            for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let (_, report) = loaders[at].load(plan)?;
                direct = report.direct.unwrap_or(direct);
                let rate = report.needed_bytes as f64 / report.seconds.max(1e-9) / 1e9;
                best[at] = if round == 0 { 0.0 } else { best[at].max(rate) };
            }
        }
        let [cufile_gb_per_s, staged_gb_per_s] = best;
        Ok(CufileMeasurement { file_system, gpu, direct, cufile_gb_per_s, staged_gb_per_s })
    }

    /// Name of the engine that a load of this plan would read with, and why, without loading: the same two that its
    /// [`Report`](crate::Report) would hold, unless cuFile turns out not to be usable.
    pub fn engine_for(&self, plan: &Plan) -> (&'static str, String) {
        match self.decide(plan) {
            (Some(EngineChoice::Cufile), reason, _) => ("cufile", reason),
            (choice, reason, _) => {
                let (engine, reason) = self.staging_engine(choice, reason);
                (engine.name(), reason)
            }
        }
    }

    /// What to read with, and why; no choice is the caller's own engine. And what to read with where that fails.
    fn decide(&self, plan: &Plan) -> (Option<EngineChoice>, String, Option<Choice>) {
        let choice = match &self.engine {
            EngineSource::Custom(_) => return (None, "the caller's own engine".into(), None),
            EngineSource::Choice(choice) => *choice,
        };
        if choice != EngineChoice::Auto {
            return (Some(choice), "asked for".into(), None);
        }
        let on = path(plan);
        let mut here = self.measured.iter().filter(|one| on == Some((one.file_system, one.gpu)));
        let faster = here
            .clone()
            .find(|one| one.is_faster())
            .map(|one| format!("direct, {:.2} GB/s where staging had {:.2}", one.cufile_gb_per_s, one.staged_gb_per_s));
        let better = faster.is_some();
        let ((choice, reason), otherwise) = choose(plan, faster);
        // Whoever measured wants to know what became of that.
        let why_not = match here.next() {
            _ if better || self.measured.is_empty() => "",
            None => "; cufile was measured elsewhere",
            Some(one) if one.direct != Direct::Known => "; cufile is not known to be direct",
            Some(_) => "; cufile was no faster",
        };
        (Some(choice), reason + why_not, otherwise)
    }

    /// The engine that a load into these devices reads with, and its slots.
    ///
    /// # Errors
    /// Of an engine that was asked for and cannot be had.
    pub(super) fn choose_engine(&self, plan: &Plan, devices: &[Arc<dyn Device>]) -> Result<Chosen> {
        let (choice, reason, otherwise) = self.decide(plan);
        if choice != Some(EngineChoice::Cufile) {
            return self.staged(choice, reason, devices);
        }
        match (self.cufile(plan, devices, reason), otherwise) {
            (Err(error), Some(otherwise)) => self.instead_of_cufile(otherwise, devices, &error),
            (chosen, otherwise) => Ok(Chosen { otherwise, ..chosen? }),
        }
    }

    /// What a load reads with where `auto` chose cuFile, which cannot be used because of this error.
    ///
    /// # Errors
    /// As [`choose_engine`](Loader::choose_engine).
    pub(super) fn instead_of_cufile(
        &self,
        (choice, reason): Choice,
        devices: &[Arc<dyn Device>],
        error: &Error,
    ) -> Result<Chosen> {
        let chosen = self.staged(Some(choice), reason, devices)?;
        Ok(Chosen { warnings: vec![format!("cufile is not used: {error}")], ..chosen })
    }

    fn staged(&self, choice: Option<EngineChoice>, reason: String, devices: &[Arc<dyn Device>]) -> Result<Chosen> {
        let (engine, reason) = self.staging_engine(choice, reason);
        self.chosen(engine, reason, None, devices)
    }

    /// An engine with the slots that it reads into: those for these devices, or in the memory of the one that there is.
    fn chosen(
        &self,
        engine: Arc<dyn Engine>,
        reason: String,
        direct: Option<Direct>,
        devices: &[Arc<dyn Device>],
    ) -> Result<Chosen> {
        let (mut ring, mut maker) = (self.ring_for(devices), None);
        if let Some(registrar) = engine.registrar() {
            let device = only_gpu(engine.name(), devices)?;
            let slot = lock(&self.device_ring).slot_bytes();
            let fresh = || Ring::on_device(self.staging, slot);
            ring = in_use(lock(&self.slots_on_gpus).entry(device.name()).or_insert_with(fresh));
            let made = Arc::new(SlotMaker::new(device, registrar));
            let (first, slots, bound) = (Arc::clone(&made), ring.clone(), self.stall_error);
            within(bound, "registering a slot", move || first.try_out(&slots, bound))?;
            maker = Some(made);
        }
        let engine = match self.throttle {
            Some(rate) => Arc::new(Throttled::new(engine, rate)),
            None => engine,
        };
        Ok(Chosen { engine, reason, ring, direct, maker, otherwise: None, warnings: Vec::new() })
    }

    #[cfg(feature = "cuda")]
    fn cufile(&self, plan: &Plan, devices: &[Arc<dyn Device>], reason: String) -> Result<Chosen> {
        let device = only_gpu("cufile", devices)?;
        let named = |error: Error| error.in_context("engine cufile");
        let engine = Arc::new(Cufile::new(limits::CUFILE_THREADS, self.stall_error).map_err(named)?);
        if let Some(file) = plan.first_read() {
            let (engine, path, identity) = (Arc::clone(&engine), file.path.clone(), file.identity);
            let try_out = move || {
                let _current = device.current()?;
                engine.try_out(&Arc::new(SourceFile::reopen(path, identity)?))
            };
            within(self.stall_error, "registering a file", try_out).map_err(named)?;
        }
        let direct = engine.direct();
        self.chosen(engine, reason, Some(direct), devices).map_err(named)
    }

    #[cfg(not(feature = "cuda"))]
    fn cufile(&self, _: &Plan, _: &[Arc<dyn Device>], _: String) -> Result<Chosen> {
        Err(Error::new(ErrorKind::Unsupported, "not in this build: engine cufile needs the feature cuda"))
    }

    /// An engine that reads into memory of the host, or the caller's.
    fn staging_engine(&self, choice: Option<EngineChoice>, reason: String) -> (Arc<dyn Engine>, String) {
        let threads = default_threads();
        match (choice, &self.engine) {
            (None, EngineSource::Custom(engine)) => (Arc::clone(engine), reason),
            (Some(EngineChoice::Mmap), _) => (Arc::new(Mmap::new(threads)), reason),
            (Some(EngineChoice::Uring), _) => uring(threads, reason),
            _ => (Arc::new(Pread::new(threads)), reason),
        }
    }
}

/// Does what may never come back on a thread of its own, and waits no longer than this for that, which then has what it was
/// given for ever.
fn within(bound: Duration, what: &str, body: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let (done, outcome) = mpsc::channel();
    let thread = thread::Builder::new().name("shardlift-try".into()).spawn(move || {
        let _ = done.send(body());
    });
    let thread = thread.map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a thread: {error}")))?;
    match outcome.recv_timeout(bound) {
        Err(RecvTimeoutError::Timeout) => {
            Err(Error::new(ErrorKind::Stalled, format!("{what} took longer than {bound:?}")))
        }
        // Joined, so that nothing of it is left.
        outcome => {
            thread.join().map_err(Error::panicked)?;
            outcome.unwrap_or_else(|_| unreachable!("bug in shardlift: a thread that sent nothing"))
        }
    }
}

/// Rounds of a measurement: the best of three is seldom disturbed.
const MEASURED_ROUNDS: usize = 3;

/// The one file system that a plan reads from, and the one GPU that it is for.
fn path(plan: &Plan) -> Option<(u64, u32)> {
    let mut systems = plan.checkpoint().files().iter().map(|file| file.identity.device);
    let world = plan.world();
    let mut gpus = world.driven().iter().map(|&rank| match world.device(rank) {
        DeviceSpec::Cuda(gpu) => Some(gpu),
        _ => None,
    });
    let (system, gpu) = (systems.next()?, gpus.next()??);
    (systems.all(|other| other == system) && gpus.all(|other| other == Some(gpu))).then_some((system, gpu))
}

/// The GPU that all ranks of this process are on. A slot on one of several would have to pass its bytes on to the others, and
/// reading them once for each would break the rule that a byte is read once.
fn only_gpu(engine: &str, devices: &[Arc<dyn Device>]) -> Result<Arc<dyn Device>> {
    let first = devices.first().filter(|first| first.is_gpu() && devices.iter().all(|one| Arc::ptr_eq(one, first)));
    first.map(Arc::clone).ok_or_else(|| {
        let message = format!("engine {engine} reads into memory of one GPU for each process");
        let mut names: Vec<String> = devices.iter().map(|device| device.name()).collect();
        names.dedup();
        Error::new(ErrorKind::Unsupported, message).with_expected("all ranks on one GPU", names.join(", "))
    })
}

/// io_uring, or buffered reads and the reason why not.
fn uring(threads: usize, reason: String) -> (Arc<dyn Engine>, String) {
    #[cfg(target_os = "linux")]
    let refused = match Uring::new(threads.min(limits::URING_THREADS_MAX), limits::URING_DEPTH, true) {
        Ok(engine) => return (Arc::new(engine), reason),
        Err(error) => error.to_string(),
    };
    #[cfg(not(target_os = "linux"))]
    let refused = "io_uring needs Linux";
    (Arc::new(Pread::new(threads)), format!("{reason}; but {refused}"))
}
