//! Bytes between ranks of several processes: NCCL, opened at run time. Within a process nothing of this is needed.

mod alone;
mod comm;
mod nccl;
#[cfg(test)]
mod tests;

pub use alone::nccl_alone;
pub(crate) use comm::{Aborter, Comm, Group, Wait};
pub(crate) use nccl::{Nccl, UniqueId};
pub use nccl::{NcclVersion, nccl_version};
