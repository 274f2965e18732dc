//! The exported functions, by subject: the driver's, as cuda.h declares them, and those that tests steer the twin with.
//!
//! Every driver function is counted and can be made to fail, except those that only name things: `cuGetErrorName`,
//! `cuGetErrorString`, `cuGetProcAddress_v2`, `cuGetExportTable`.

#![allow(missing_docs, reason = "cuda.h documents the driver's functions")]

pub mod context;
pub mod control;
pub mod copy;
pub mod device;
pub mod event;
pub mod foreign;
pub mod memory;
pub mod module;
pub mod pointer;
pub mod stream;
pub mod virtual_memory;
