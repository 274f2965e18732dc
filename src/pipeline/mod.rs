//! Runs a plan: threads, back-pressure, first error, cancel, drain. Knows no rules and no command line.

mod digests;
#[cfg(feature = "cuda")]
mod exchange;
mod files;
mod fills;
mod job;
mod peers;
mod prepare;
mod run;
mod slots;
pub(crate) mod telemetry;
mod traced;
mod windows;
mod work;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::device::{Host, HostStaged};
use crate::error::Result;
#[cfg(not(feature = "cuda"))]
use crate::error::{Error, ErrorKind};
use crate::extent::{FileId, Rank};
use crate::observe::{Direct, Recording};
use crate::place::Destinations;
use crate::plan::{DeviceSpec, Plan, World};
use crate::read::Engine;
use crate::sync::lock;

pub(crate) use crate::device::Device;
#[cfg(test)]
pub(crate) use crate::device::{Allocation, Feed, Home, Host as HostDevice, Op, Queue};
pub(crate) use crate::stage::Ring;
pub(crate) use job::Job;
#[cfg(feature = "cuda")]
pub(crate) use peers::Meeting;
pub(crate) use peers::Peers;
pub(crate) use prepare::{Prepared, feed};
pub(crate) use run::Running;
pub(crate) use slots::SlotMaker;
pub(crate) use traced::PlanNames;

/// What a load needs to know besides the plan.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) plan: Plan,
    pub(crate) destinations: Destinations,
    /// One for each rank that this process drives, in the order of [`World::driven`].
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) engine_reason: String,
    pub(crate) direct: Option<Direct>,
    pub(crate) ring: Ring,
    /// What makes the slots of a ring in a device's memory.
    pub(crate) maker: Option<Arc<SlotMaker>>,
    /// A read that fails there is repeated through memory of the host.
    pub(crate) falls_back: bool,
    /// What was odd before the load began.
    pub(crate) warnings: Vec<String>,
    pub(crate) stall_warning: Duration,
    pub(crate) stall_error: Duration,
    pub(crate) drop_page_cache: bool,
    /// Files that destinations are lent from.
    pub(crate) mapped: Vec<FileId>,
    /// Whether digests are taken while bytes move.
    pub(crate) digests: bool,
    pub(crate) started: std::time::Instant,
    pub(crate) trace: Option<Arc<Recording>>,
    /// What subscribers of `tracing` see it as.
    pub(crate) span: tracing::Span,
    /// Those who load the other ranks, where this process knows them.
    pub(crate) peers: Option<Peers>,
}

/// The device of each rank that this process drives: ranks on one GPU share it, with its queue; `known` are kept from
/// load to load. `stall` is how long whoever waits for a GPU after its load does so.
///
/// # Errors
/// [`ErrorKind::Device`](crate::ErrorKind::Device) if there is no driver or no such GPU; without the feature `cuda`
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
pub(crate) fn devices(world: &World, known: &Mutex<Gpus>, stall: Duration) -> Result<Vec<Arc<dyn Device>>> {
    let device = |&rank: &Rank| -> Result<Arc<dyn Device>> {
        match world.device(rank) {
            DeviceSpec::Host => Ok(Arc::new(Host)),
            DeviceSpec::HostStaged => Ok(Arc::new(HostStaged)),
            DeviceSpec::Cuda(gpu) => gpu_device(gpu, &mut lock(known), stall).map_err(|error| error.with_rank(rank)),
        }
    };
    world.driven().iter().map(device).collect()
}

/// GPUs by number, whose contexts are kept.
pub(crate) type Gpus = BTreeMap<u32, Arc<dyn Device>>;

#[cfg(feature = "cuda")]
fn gpu_device(gpu: u32, known: &mut Gpus, stall: Duration) -> Result<Arc<dyn Device>> {
    if let Some(device) = known.get(&gpu) {
        return Ok(Arc::clone(device));
    }
    let device: Arc<dyn Device> = Arc::new(crate::device::Cuda::open(gpu, stall)?);
    known.insert(gpu, Arc::clone(&device));
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn gpu_device(gpu: u32, _: &mut Gpus, _: Duration) -> Result<Arc<dyn Device>> {
    Err(Error::new(ErrorKind::Unsupported, format!("not in this build: cuda:{gpu} needs the feature cuda")))
}

/// A device whose memory is an output file.
pub(crate) fn file_device(path: std::path::PathBuf, file: Arc<std::fs::File>) -> Arc<dyn Device> {
    Arc::new(crate::device::FileDevice::new(path, file))
}
