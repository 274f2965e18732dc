//! A load whose destinations are files: each rank's partition as a checkpoint of its own.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::{Loader, Monitor};
use crate::checkpoint::NewDirectory;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::Report;
use crate::pipeline::{Running, Setup, file_device};
use crate::place::Destinations;
use crate::plan::Plan;

impl Loader {
    /// Writes each driven rank's partition as `out/model-rank-R-part-0.safetensors`, with the model's configuration
    /// and tokenizer files beside them. Memory stays within the staging budget; `out` appears whole or not at all.
    /// Aliases are not written.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `out` exists and `force` is not set; else as a load, and [`ErrorKind::Io`] if a file
    /// cannot be written.
    pub fn reshard(&self, plan: &Plan, out: impl AsRef<Path>, force: bool) -> Result<Report> {
        self.start_reshard(plan, out, force)?.finish()
    }

    /// Starts what [`reshard`](Loader::reshard) does and waits for.
    ///
    /// # Errors
    /// As [`reshard`](Loader::reshard), as far as they are known before anything moves.
    pub fn start_reshard(&self, plan: &Plan, out: impl AsRef<Path>, force: bool) -> Result<Reshard> {
        let started = Instant::now();
        let out = out.as_ref();
        let model = plan.checkpoint().path();
        if out.exists() && out.canonicalize().ok() == model.canonicalize().ok() {
            return Err(Error::new(ErrorKind::Usage, "the output is the model itself").with_file(out));
        }
        let mut directory = NewDirectory::create(out, force)?;
        let mut metadata = BTreeMap::new();
        for file in plan.checkpoint().files() {
            metadata.extend(file.metadata.iter().cloned());
        }
        let mut devices = Vec::new();
        let mut offsets = vec![Vec::new(); plan.world().size() as usize];
        for &rank in plan.world().driven() {
            let ranked = plan.rank(rank);
            let original = |param: u32| plan.params()[param as usize].alias_of.is_none();
            let tensors: Vec<_> = ranked
                .dests
                .iter()
                .filter(|dest| original(dest.param))
                .map(|dest| {
                    let param = &plan.params()[dest.param as usize];
                    (param.name.as_str(), param.dtype, &dest.shape)
                })
                .collect();
            let (path, file, starts) =
                directory.add_partition(rank, &tensors, &metadata).map_err(|error| error.with_rank(rank))?;
            let mut starts = starts.into_iter();
            offsets[rank.index()] = ranked
                .dests
                .iter()
                .map(|dest| if original(dest.param) { starts.next().unwrap_or(0) } else { 0 })
                .collect();
            devices.push(file_device(path, Arc::new(file)));
        }
        let destinations = Destinations::in_files(plan, |rank| std::mem::take(&mut offsets[rank.index()]))?;
        let running = Running::start(Setup { started, ..self.setup(plan, destinations, devices) })?;
        Ok(Reshard { plan: plan.clone(), running, directory, started })
    }
}

/// A reshard in progress. Dropping it cancels it, waits for its threads and removes what was written.
#[derive(Debug)]
pub struct Reshard {
    plan: Plan,
    // Before the directory: no thread may still write when that is removed.
    running: Running,
    directory: NewDirectory,
    started: Instant,
}

impl Reshard {
    /// A handle for progress and cancel, for any thread.
    pub fn monitor(&self) -> Monitor {
        Monitor::new(self.running.job())
    }

    /// Waits for the last byte, makes everything durable and gives the directory its name.
    ///
    /// # Errors
    /// The first error; then nothing of the output is left.
    pub fn finish(self) -> Result<Report> {
        let Reshard { plan, mut running, directory, started } = self;
        let mut report = running.finish()?;
        report.needed_bytes = plan.needed_bytes(plan.world().driven());
        let model = plan.checkpoint().path();
        if model.is_dir() {
            directory.copy_companions(model)?;
        }
        directory.commit()?;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }
}
