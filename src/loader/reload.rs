//! New values in the memory of weights that are there already.

use super::{Load, Loader};
use crate::error::Result;
use crate::observe::Report;
use crate::place::Weights;
use crate::plan::Plan;

impl Loader {
    /// Loads other values into the memory of `weights`, which allocates nothing and leaves every tensor at its address: for
    /// a model that is trained while it serves. `plan` may be of other files, and divide them otherwise; its destinations
    /// are the same. The loader need not be the one that made them, and its [`memory`](Loader::memory) and
    /// [`residency`](Loader::residency) do not count.
    ///
    /// On a GPU work of the caller's that uses the addresses must have ended, as when memory is given back: what it would
    /// read is some of the old and some of the new.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`], with the weights as they were: the plan has other ranks, devices, names, types or shapes; a tensor
    /// was taken out, or a handle to one lives elsewhere; the memory is the caller's or a file's (use
    /// [`start_into`](Loader::start_into) again). Else as a load. They stay as they were where it cannot start: for an engine
    /// that cannot read this, a device that has no room for the scratch memory of casts, or ranks that would load something
    /// else; of ranks that load as a group others may have begun by then. Once their memory is taken over they hold nothing, and it
    /// is given back if the load fails, because it has values of both.
    ///
    /// [`ErrorKind::Usage`]: crate::ErrorKind::Usage
    pub fn reload(&self, plan: &Plan, weights: &mut Weights) -> Result<Report> {
        let report;
        (*weights, report) = self.start_reload(plan, weights)?.finish()?;
        Ok(report)
    }

    /// Starts what [`reload`](Loader::reload) does and waits for. `weights` hold nothing from then on;
    /// [`Load::finish`] gives those that replace them.
    ///
    /// # Errors
    /// As [`reload`](Loader::reload), as far as they are known before anything moves.
    pub fn start_reload(&self, plan: &Plan, weights: &mut Weights) -> Result<Load> {
        // SAFETY: no memory of the caller.
        unsafe { self.begin(plan, &[], Some(weights)) }
    }
}
