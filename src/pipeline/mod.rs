//! Runs a plan: threads, back-pressure, first error, cancel, drain. Knows no rules and no command line.

mod files;
mod job;
mod run;
mod work;

use std::sync::Arc;
use std::time::Duration;

use crate::extent::FileId;
use crate::place::Destinations;
use crate::plan::Plan;
use crate::read::Engine;

pub(crate) use crate::device::Device;
pub(crate) use crate::stage::Ring;
pub(crate) use job::Job;
pub(crate) use run::Running;

/// What a load needs to know besides the plan.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) plan: Plan,
    pub(crate) destinations: Destinations,
    /// One for each rank that this process drives, in the order of [`World::driven`](crate::World::driven).
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) engine_reason: String,
    pub(crate) ring: Ring,
    pub(crate) stall_warning: Duration,
    pub(crate) stall_error: Duration,
    pub(crate) drop_page_cache: bool,
    /// Files that destinations are lent from.
    pub(crate) mapped: Vec<FileId>,
    pub(crate) started: std::time::Instant,
}

/// The device of each rank that this process drives.
pub(crate) fn devices(world: &crate::plan::World) -> Vec<Arc<dyn Device>> {
    use crate::device::{Host, HostStaged};
    use crate::plan::DeviceSpec;
    let device = |_| -> Arc<dyn Device> {
        match world.device() {
            DeviceSpec::Host => Arc::new(Host),
            DeviceSpec::HostStaged => Arc::new(HostStaged),
        }
    };
    world.driven().iter().map(device).collect()
}

/// A device whose memory is an output file.
pub(crate) fn file_device(path: std::path::PathBuf, file: Arc<std::fs::File>) -> Arc<dyn Device> {
    Arc::new(crate::device::FileDevice::new(path, file))
}
