//! GPU-direct loader of safetensors weights for multi-GPU inference.
//!
//! A checkpoint is opened (headers only), rules say how its tensors are divided over the ranks of a world, a plan
//! maps header offsets to per-rank destinations, and a loader moves the bytes: each byte is read from storage once,
//! cut on the way, and lands in the memory of every rank that wants it.
//!
//! The folders are the journey of a byte: `format -> plan -> read -> stage -> copy -> place`; `ARCHITECTURE.md` says
//! what each may know.

#[cfg(target_endian = "big")]
compile_error!("shardlift reads little-endian files into memory as they are: big-endian targets are not supported");

mod cast;
pub mod checkpoint;
#[cfg(feature = "cuda")]
#[cfg_attr(not(test), expect(dead_code, reason = "operations that loads do not use"))]
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

// The examples of the README and of launches are compiled with the documentation's tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/launch.md")]
struct LaunchPage;
