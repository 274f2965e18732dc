//! A load whose destinations are files: each rank's partition as a checkpoint of its own.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::{Loader, Monitor, agree};
use crate::checkpoint::{NewDirectory, Partial};
use crate::error::Result;
use crate::observe::Report;
use crate::pipeline::{Running, Setup, file_device, telemetry};
use crate::place::Destinations;
use crate::plan::Plan;

impl Loader {
    /// Writes each driven rank's partition as `out/model-rank-R-part-0.safetensors`, with the model's configuration
    /// and tokenizer files beside them; those of a model that is a single file if a `config.json` lies beside it.
    /// Memory stays within the staging budget; `out` appears whole or not at all. Aliases are not written, which is
    /// a warning of the report.
    ///
    /// With `force` a directory at `out` is replaced; if `out` is a link to one, the link stays.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `out` exists and `force` is not set; if it cannot be created, is no directory, a mount
    /// point, the model, or holds some of the model, whatever `force` says; if the header of a rank's file, with the metadata
    /// of all files of the model, would be larger than [`limits::HEADER_MAX`](crate::limits::HEADER_MAX). Else as a load, and
    /// [`ErrorKind::Io`] if a file cannot be written.
    ///
    /// [`ErrorKind::Usage`]: crate::ErrorKind::Usage
    /// [`ErrorKind::Io`]: crate::ErrorKind::Io
    pub fn reshard(&self, plan: &Plan, out: impl AsRef<Path>, force: bool) -> Result<Report> {
        self.start_reshard(plan, out, force)?.finish()
    }

    /// Starts what [`reshard`](Loader::reshard) does and waits for.
    ///
    /// # Errors
    /// As [`reshard`](Loader::reshard), as far as they are known before anything moves.
    pub fn start_reshard(&self, plan: &Plan, out: impl AsRef<Path>, force: bool) -> Result<Reshard> {
        let started = Instant::now();
        agree::alone(plan)?;
        let mut metadata = BTreeMap::new();
        for file in plan.checkpoint().files() {
            metadata.extend(file.metadata.iter().cloned());
        }
        let original = |param: u32| plan.params()[param as usize].alias_of.is_none();
        let tensors = |rank| -> Vec<_> {
            let dests = plan.rank(rank).dests.iter().filter(|dest| original(dest.param));
            let of = dests.map(|dest| (&plan.params()[dest.param as usize], &dest.shape));
            of.map(|(param, shape)| (param.name.as_str(), param.dtype, shape)).collect()
        };
        for &rank in plan.world().driven() {
            NewDirectory::check_partition(out.as_ref(), rank, &tensors(rank), &metadata)?;
        }
        let mut directory = NewDirectory::create(out.as_ref(), force, plan.checkpoint())?;
        let mut devices = Vec::new();
        let mut offsets = vec![Vec::new(); plan.world().size() as usize];
        for &rank in plan.world().driven() {
            let (path, file, starts) = directory.add_partition(rank, &tensors(rank), &metadata)?;
            let mut starts = starts.into_iter();
            offsets[rank.index()] = plan
                .rank(rank)
                .dests
                .iter()
                .map(|dest| if original(dest.param) { starts.next().unwrap_or(0) } else { 0 })
                .collect();
            devices.push(file_device(path, file));
        }
        let destinations = Destinations::in_files(plan, |rank| std::mem::take(&mut offsets[rank.index()]));
        let span = telemetry::span(plan);
        let chosen = self.choose_engine(plan, &devices)?;
        let prepared = chosen.prepare(plan, &devices)?;
        let setup = Setup { started, ..self.setup(&span, plan, destinations, devices, chosen) };
        let running = Running::start(setup, prepared).inspect_err(|error| telemetry::failed(&span, error))?;
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

    /// What is on disk so far, for a process that ends without waiting for [`finish`](Reshard::finish).
    pub fn partial(&self) -> Partial {
        self.directory.partial().clone()
    }

    /// Waits for the last byte, makes everything durable and gives the directory its name.
    ///
    /// # Errors
    /// The first error; then nothing of the output is left. A cancel is one until the directory has its name.
    pub fn finish(self) -> Result<Report> {
        let Reshard { plan, mut running, directory, started } = self;
        let mut report = running.finish()?;
        report.needed_bytes = plan.needed_bytes(plan.world().driven());
        report.warnings.extend(left_out(&plan));
        report.warnings.extend(directory.commit(|| running.job().check_cancelled())?);
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }
}

/// A warning of the aliases: whoever opens the output must know of them from elsewhere.
fn left_out(plan: &Plan) -> Option<String> {
    let params = plan.params();
    let aliases = params.iter().filter_map(|param| Some((&param.name, &params[param.alias_of? as usize].name)));
    let aliases: Vec<String> = aliases.map(|(name, of)| format!("{name} of {of}")).collect();
    (!aliases.is_empty()).then(|| format!("aliases are not written: {}", aliases.join(", ")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use safetensors::tensor::{Dtype, TensorView};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::error::ErrorKind;
    use crate::extent::Rank;
    use crate::plan::{Rules, World};

    /// What a full disk looks like to the load: writes are refused.
    #[test]
    fn a_refused_write_names_file_tensor_bytes_and_rank() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let bytes = vec![1; 1 << 20];
        let view = || TensorView::new(Dtype::U8, vec![1 << 20], &bytes).unwrap();
        safetensors::serialize_to_file([("a", view()), ("b", view())], None, &path).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(2)).unwrap();

        let loader = Loader::new();
        let writable = Arc::new(tempfile::tempfile().unwrap());
        let refused = Arc::new(std::fs::File::open(&path).unwrap());
        let devices = vec![file_device("0".into(), writable), file_device("1".into(), refused)];
        let size = plan.rank(Rank(1)).dests[0].bytes;
        let destinations = Destinations::in_files(&plan, |_| vec![size + 8, 8]);
        let chosen = loader.choose_engine(&plan, &devices).unwrap();
        let prepared = chosen.prepare(&plan, &devices).unwrap();
        let setup = loader.setup(&tracing::Span::none(), &plan, destinations, devices, chosen);
        let mut running = Running::start(setup, prepared).unwrap();
        let error = running.finish().unwrap_err();
        let at = error.at();
        assert_eq!((error.kind(), at.file.as_deref(), at.rank), (ErrorKind::Io, Some("1".as_ref()), Some(Rank(1))));
        let from = if error.tensor() == Some("b") { 8 } else { size + 8 };
        assert!(at.tensor.is_some() && at.bytes.is_some_and(|(start, end)| from <= start && end <= from + size));
    }
}
