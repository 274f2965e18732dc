//! The model that answers, and the one that is on its way.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use candle_core::{DType, Device};
use serde_json::{Value, json};
use shardlift::{Checkpoint, Dtype, Loader, Memory, Monitor, Plan, Rank, Report, Rules, World, candle};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use super::embedder::Embedder;
use super::metrics::Metrics;

/// A model in memory. Freed when the last request that it answers is done.
pub(crate) struct Serving {
    pub(crate) name: String,
    pub(crate) embedder: Embedder,
    /// Declared after what it counts, so that it is told of last.
    _held: Held,
}

/// Counts bytes of weights while they are there, and tells when they are gone.
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
    /// Bytes of weights of all models.
    held: Arc<AtomicU64>,
    /// Held by whoever loads.
    loading: AsyncMutex<()>,
    monitor: Mutex<Option<Monitor>>,
    metrics: Metrics,
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
            loading: AsyncMutex::new(()),
            monitor: Mutex::new(None),
            metrics: Metrics::default(),
        }
    }

    pub(crate) fn serving(&self) -> Option<Arc<Serving>> {
        self.serving.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads a model beside the one that answers, lets it take over, and waits until the old one is gone.
    pub(crate) async fn swap(self: &Arc<Models>, model: &Path) -> Result<Value, Failure> {
        let Ok(_alone) = self.loading.try_lock() else { return Err(Failure::Busy) };
        let (this, folder) = (Arc::clone(self), model.to_owned());
        // A load blocks its thread, never the one that answers.
        let loaded = tokio::task::spawn_blocking(move || this.load(&folder)).await;
        *lock(&self.monitor) = None;
        let loaded = loaded.unwrap_or_else(|error| Err(Failure::Model(error.to_string())));
        self.metrics.ended(loaded.as_ref().map(|loaded| &loaded.report).ok());
        let Loaded { serving, gone, report } = loaded?;
        let swapped = json!({
            "model": serving.name, "seconds": report.seconds, "bytes": report.landed_bytes, "engine": report.engine,
        });
        let old = self.serving.write().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(serving));
        drop(old); // requests that it answers keep it
        let old_is_gone = lock(&self.gone).replace(gone);
        if let Some(old_is_gone) = old_is_gone {
            let _ = old_is_gone.await;
        }
        Ok(swapped)
    }

    fn load(&self, folder: &Path) -> Result<Loaded, Failure> {
        let checkpoint = Checkpoint::open(folder)?;
        let rules = Rules::replicate_all().casting(Dtype::F32);
        let plan = Plan::new(&checkpoint, &rules, &World::host(1))?;
        let needed = plan.rank(Rank(0)).dests.iter().map(|dest| dest.bytes).sum();
        let held = self.held.load(Ordering::Relaxed);
        if needed > self.budget.saturating_sub(held) {
            return Err(Failure::Budget { needed, held, budget: self.budget });
        }
        let load = self.loader.start(&plan)?;
        *lock(&self.monitor) = Some(load.monitor());
        let (mut weights, report) = load.finish()?;
        let (sender, gone) = oneshot::channel();
        self.held.fetch_add(needed, Ordering::Relaxed);
        let held = Held { bytes: needed, all: Arc::clone(&self.held), gone: Some(sender) };
        let builder = candle::var_builder(&mut weights, Rank(0), DType::F32, &Device::Cpu)?;
        let embedder = Embedder::new(folder, builder).map_err(|error| Failure::Model(error.to_string()))?;
        let serving = Serving { name: folder.display().to_string(), embedder, _held: held };
        Ok(Loaded { serving, gone, report })
    }

    /// Cancels the load that is under way: its `swap` says so.
    pub(crate) fn cancel(&self) -> bool {
        let monitor = lock(&self.monitor);
        monitor.as_ref().inspect(|monitor| monitor.cancel()).is_some()
    }

    pub(crate) fn status(&self) -> Value {
        let loading = lock(&self.monitor).as_ref().map(Monitor::progress);
        json!({
            "model": self.serving().map(|serving| serving.name.clone()),
            "loading": loading.map(|progress| json!({ "bytes": progress.bytes_done, "of": progress.bytes_total })),
        })
    }

    pub(crate) fn metrics(&self) -> String {
        self.metrics.text(self.held.load(Ordering::Relaxed))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
