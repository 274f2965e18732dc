//! The model that answers, and the one that is on its way.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use candle_core::{DType, Device};
use serde_json::{Value, json};
use shardlift::{Checkpoint, Dtype, Loader, Memory, Monitor, Plan, Rank, Report, Rules, World, candle};
use tokio::sync::{Mutex as AsyncMutex, oneshot};
use tokio::task::spawn_blocking;

use super::embedder::{Embedder, Parts};
use super::metrics::Metrics;

/// A model in memory. Freed when the last request that it answers is done.
pub(crate) struct Serving {
    pub(crate) name: String,
    pub(crate) embedder: Embedder,
    /// Declared after what it counts, so that it is told of last.
    _held: Held,
}

/// Counts bytes of weights from before they are loaded until they are gone, and tells when they are.
struct Held {
    bytes: u64,
    all: Arc<AtomicU64>,
    gone: Option<oneshot::Sender<()>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(gone) = self.gone.take() {
            let _ = gone.send(()); // nobody may be waiting any more
        }
    }
}

/// Why a model did not take over. The old one answers.
pub(crate) enum Failure {
    /// Another one is on its way.
    Busy,
    Budget {
        needed: u64,
        held: u64,
        budget: u64,
    },
    Load(shardlift::Error),
    /// When there was no load to cancel, or none any more.
    Cancelled,
    Model(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Busy => f.write_str("another model is being loaded"),
            Failure::Budget { needed, held, budget } => {
                write!(f, "the model needs {needed} bytes beside {held}, and the budget is {budget}")
            }
            Failure::Load(error) => write!(f, "{error}"),
            Failure::Cancelled => f.write_str("the swap was cancelled"),
            Failure::Model(why) => f.write_str(why),
        }
    }
}

impl From<shardlift::Error> for Failure {
    fn from(error: shardlift::Error) -> Failure {
        Failure::Load(error)
    }
}

pub(crate) struct Models {
    loader: Loader,
    budget: u64,
    serving: RwLock<Option<Arc<Serving>>>,
    /// When the model that serves is gone.
    gone: Mutex<Option<oneshot::Receiver<()>>>,
    /// Bytes of weights of all models, those on their way included.
    held: Arc<AtomicU64>,
    /// Held by whoever swaps.
    swapping: AsyncMutex<()>,
    /// The model that is on its way, until it is decided whether it takes over.
    coming: Mutex<Option<Coming>>,
    metrics: Metrics,
}

#[derive(Default)]
struct Coming {
    cancelled: bool,
    /// Once there is a load.
    monitor: Option<Monitor>,
}

/// What was loaded, before anybody asks it.
struct Loaded {
    serving: Serving,
    gone: oneshot::Receiver<()>,
    report: Report,
}

impl Models {
    pub(crate) fn new(budget: u64, throttle: Option<u64>) -> Models {
        Models {
            // One loader for all: it keeps its staging memory from load to load.
            loader: Loader::new().memory(Memory::PerTensor).throttle(throttle),
            budget,
            serving: RwLock::new(None),
            gone: Mutex::new(None),
            held: Arc::default(),
            swapping: AsyncMutex::new(()),
            coming: Mutex::new(None),
            metrics: Metrics::default(),
        }
    }

    pub(crate) fn serving(&self) -> Option<Arc<Serving>> {
        self.serving.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads a model beside the one that answers, lets it take over, and waits until the old one is gone. To be awaited to
    /// its end: a load goes on when its future is dropped.
    pub(crate) async fn swap(self: &Arc<Models>, model: &Path) -> Result<Value, Failure> {
        let Ok(_alone) = self.swapping.try_lock() else { return Err(Failure::Busy) };
        *lock(&self.coming) = Some(Coming::default());
        let (this, folder) = (Arc::clone(self), model.to_owned());
        // A load blocks its thread, never the one that answers.
        let loaded = spawn_blocking(move || this.load_unless_cancelled(&folder)).await;
        *lock(&self.coming) = None; // after a panic, too
        let loaded = loaded.unwrap_or_else(|error| Err(Failure::Model(error.to_string())));
        self.metrics.ended(loaded.as_ref().map(|loaded| &loaded.report).ok());
        let Loaded { serving, gone, report } = loaded?;
        let swapped = json!({
            "model": serving.name, "seconds": report.seconds, "bytes": report.landed_bytes, "engine": report.engine,
        });
        let old = self.serving.write().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(serving));
        // Requests that it answers keep it. Giving back gigabytes takes a while, too.
        spawn_blocking(move || drop(old));
        let old_is_gone = lock(&self.gone).replace(gone);
        if let Some(old_is_gone) = old_is_gone {
            let _ = old_is_gone.await;
        }
        Ok(swapped)
    }

    /// From its end on a swap cannot be cancelled: who was told that it is finds the old model.
    fn load_unless_cancelled(&self, folder: &Path) -> Result<Loaded, Failure> {
        let loaded = self.load(folder)?;
        let coming = lock(&self.coming).take();
        if coming.is_some_and(|coming| coming.cancelled) { Err(Failure::Cancelled) } else { Ok(loaded) }
    }

    fn load(&self, folder: &Path) -> Result<Loaded, Failure> {
        let other = |error: &dyn fmt::Display| Failure::Model(format!("{}: {error}", folder.display()));
        let parts = Parts::read(folder).map_err(|error| other(&error))?;
        let checkpoint = Checkpoint::open(folder)?;
        let rules = Rules::replicate_all().casting(Dtype::F32);
        let plan = Plan::new(&checkpoint, &rules, &World::host(1))?;
        let needed = plan.rank(Rank(0)).dests.iter().map(|dest| dest.bytes).sum();
        let (held, gone) = self.hold(needed)?;
        let load = self.loader.start(&plan)?;
        self.watch(load.monitor());
        let (mut weights, report) = load.finish()?;
        let builder = candle::var_builder(&mut weights, Rank(0), DType::F32, &Device::Cpu)?;
        let embedder = Embedder::new(parts, builder).map_err(|error| other(&error))?;
        let serving = Serving { name: folder.display().to_string(), embedder, _held: held };
        Ok(Loaded { serving, gone, report })
    }

    /// Takes bytes of the budget, until what is returned is dropped. Only one swap at a time does.
    fn hold(&self, needed: u64) -> Result<(Held, oneshot::Receiver<()>), Failure> {
        let held = self.held.load(Ordering::Relaxed);
        if needed > self.budget.saturating_sub(held) {
            return Err(Failure::Budget { needed, held, budget: self.budget });
        }
        self.held.fetch_add(needed, Ordering::Relaxed);
        let (sender, gone) = oneshot::channel();
        Ok((Held { bytes: needed, all: Arc::clone(&self.held), gone: Some(sender) }, gone))
    }

    /// Lets a load be cancelled, which is what becomes of it if that was asked for before it began.
    fn watch(&self, monitor: Monitor) {
        if let Some(coming) = &mut *lock(&self.coming) {
            if coming.cancelled {
                monitor.cancel();
            }
            coming.monitor = Some(monitor);
        }
    }

    /// Cancels the swap that is under way, which says so, if there is one that has not taken over yet.
    pub(crate) fn cancel(&self) -> bool {
        let mut coming = lock(&self.coming);
        let Some(coming) = &mut *coming else { return false };
        coming.cancelled = true;
        if let Some(monitor) = &coming.monitor {
            monitor.cancel();
        }
        true
    }

    pub(crate) fn status(&self) -> Value {
        let progress = |coming: &Coming| coming.monitor.as_ref().map(Monitor::progress);
        let loading = lock(&self.coming).as_ref().map(|coming| {
            let progress = progress(coming);
            json!({ "bytes": progress.map_or(0, |of| of.bytes_done), "of": progress.map(|of| of.bytes_total) })
        });
        json!({ "model": self.serving().map(|serving| serving.name.clone()), "loading": loading })
    }

    pub(crate) fn metrics(&self) -> String {
        self.metrics.text(self.held.load(Ordering::Relaxed))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
