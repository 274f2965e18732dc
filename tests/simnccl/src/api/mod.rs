//! The exported functions, by subject: NCCL's, as nccl.h declares them, and those that tests steer the twin with.
//!
//! Every function of NCCL is counted and can be made to fail, except those that only name things: `ncclGetErrorString`,
//! `ncclGetLastError`.

#![allow(missing_docs, reason = "nccl.h documents NCCL's functions")]

pub mod comm;
pub mod control;
pub mod operation;
