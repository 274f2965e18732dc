//! Bytes between ranks of several processes: NCCL, opened at run time. Within a process nothing of this is needed.

mod comm;
mod nccl;
#[cfg(test)]
mod tests;

#[cfg_attr(not(test), expect(unused_imports, reason = "cooperative loads use them"))]
pub(crate) use comm::{Aborter, Comm, Group, Wait};
#[cfg_attr(not(test), expect(unused_imports, reason = "cooperative loads use them"))]
pub(crate) use nccl::{Nccl, UniqueId};
pub use nccl::{NcclVersion, nccl_version};
