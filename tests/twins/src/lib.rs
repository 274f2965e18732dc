//! How tests hold the twins of CUDA, NCCL and cuFile ([`cuda`], [`nccl`], [`cufile`], [`child`]), and what these have in
//! common ([`faults`], [`settings`]).

pub mod child;
pub mod cuda;
pub mod cufile;
pub mod faults;
mod library;
pub mod nccl;
pub mod settings;
