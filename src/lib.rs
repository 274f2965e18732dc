//! GPU-direct loader of safetensors weights for multi-GPU inference.
//!
//! A checkpoint is opened (headers only), rules say how its tensors are divided over the ranks of a world, a plan
//! maps header offsets to per-rank destinations, and a loader moves the bytes: each byte is read from storage once,
//! cut on the way, and lands in the memory of every rank that wants it.
//!
//! # One process that drives all GPUs
//!
//! ```no_run
//! use shardlift::{Checkpoint, Loader, Plan, Rank, Rules, World};
//!
//! # fn main() -> shardlift::Result<()> {
//! let checkpoint = Checkpoint::open("/models/Llama-3.1-8B-Instruct")?; // headers only
//! let world = World::local(0..4);                                      // a rank on each of four GPUs
//! let rules = Rules::for_model(&checkpoint)?;                          // from config.json
//! let plan = Plan::new(&checkpoint, &rules, &world)?;                  // what will move where: it can be printed
//!
//! let (weights, report) = Loader::new().load(&plan)?;
//! let q = weights.tensor(Rank(2), "model.layers.0.self_attn.q_proj.weight")?;
//! println!("{} {} at {:#x}", q.dtype(), q.shape(), q.device_ptr());
//! println!("{:.2} s, limited by {}", report.seconds, report.bottleneck);
//! # Ok(())
//! # }
//! ```
//!
//! `World::host(4)` is the same with four ranks in host memory, and needs no GPU.
//!
//! # One process for each rank
//!
//! Started by torchrun, mpirun or srun. The ranks make sure that they load the same; those of a node read together what several
//! of them want; a failure of one is an error of all.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use shardlift::plan::DeviceSpec;
//! use shardlift::{Checkpoint, Group, GroupOptions, Launch, LaunchOptions, Loader, Rules, Sharing};
//!
//! # fn main() -> shardlift::Result<()> {
//! let launch = Launch::from_env(&LaunchOptions::default())?.expect("started by a launcher");
//! let group = Arc::new(Group::join(&launch, &GroupOptions::default())?); // all are there
//! let loader = Loader::new().group(Some(&group));
//!
//! let checkpoint = Checkpoint::open("/models/Llama-3.1-70B-Instruct")?;
//! let world = launch.world(DeviceSpec::Cuda(launch.gpu(None)?));
//! let world = loader.sharing(Sharing::Auto, &checkpoint, world)?;
//! let plan = loader.plan(&checkpoint, &Rules::for_model(&checkpoint)?, &world)?;
//! let (weights, _) = loader.load(&plan)?;                                // this rank's part
//! group.finish()?;                                                       // all have theirs
//! println!("{} tensors", weights.iter().count());
//! # Ok(())
//! # }
//! ```
//!
//! # Further
//!
//! The [`guide`] has a page for each concept. Features: `cuda` (GPUs and NCCL, found at run time) and `cli` (the binary), both on
//! by default; `candle` (weights for candle's models) and `candle-cuda` (the same on GPUs, which needs `nvcc` to build). The library
//! prints nothing, installs no subscriber, and starts no runtime.
//!
//! The folders are the journey of a byte: `format -> plan -> read -> stage -> copy -> place`; `ARCHITECTURE.md` says
//! what each may know.

#[cfg(target_endian = "big")]
compile_error!("shardlift reads little-endian files into memory as they are: big-endian targets are not supported");

#[cfg(feature = "candle")]
pub mod candle;
mod cast;
pub mod checkpoint;
#[cfg(feature = "cuda")]
mod collective;
mod copy;
pub mod device;
mod dtype;
mod error;
mod extent;
pub mod format;
mod launch;
pub mod limits;
mod loader;
pub mod observe;
mod pipeline;
mod place;
pub mod plan;
pub mod read;
mod shape;
pub mod source;
mod stage;
mod stride;
mod sync;

pub use cast::Cast;
pub use checkpoint::{Checkpoint, HubCache, Partial};
#[cfg(feature = "cuda")]
pub use collective::{NcclVersion, nccl_alone, nccl_version};
pub use dtype::Dtype;
pub use error::{At, Error, ErrorKind, OneLine, Result};
pub use extent::{Extent, FileId, Rank};
pub use launch::{Group, GroupOptions, Launch, LaunchOptions};
pub use loader::{CallerMemory, CufileMeasurement, Load, Loader, Memory, Monitor, Reshard, Residency, Sharing};
pub use observe::{Direct, Progress, Report, Trace};
pub use place::{Digest, Element, Tensor, Weights};
pub use plan::{Plan, Rules, World};
pub use shape::Shape;

/// A page for each concept.
pub mod guide {
    // Its example needs candle-transformers, too.
    #[cfg(feature = "candle")]
    #[cfg_attr(any(not(doctest), feature = "examples"), doc = include_str!("../docs/candle.md"))]
    pub mod candle {}
    #[doc = include_str!("../docs/engines.md")]
    pub mod engines {}
    #[doc = include_str!("../docs/errors.md")]
    pub mod errors {}
    #[doc = include_str!("../docs/memory.md")]
    pub mod memory {}
    #[doc = include_str!("../docs/plan.md")]
    pub mod plan {}
    #[doc = include_str!("../docs/launch.md")]
    pub mod processes {}
    #[doc = include_str!("../docs/rules.md")]
    pub mod rules {}
    #[doc = include_str!("../docs/servers.md")]
    pub mod servers {}
    #[doc = include_str!("../docs/telemetry.md")]
    pub mod telemetry {}
}

// The examples of the README are compiled with those of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
