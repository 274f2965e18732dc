//! A libnccl that runs on the driver twin (`tests/simcuda`): shardlift's own loader opens it in place of NVIDIA's. Ranks may
//! be threads, processes, or both; bytes travel between processes through anonymous files, so that nothing is left behind,
//! however a process ends. Processes find each other's in `/proc`, whatever network they are in.
//!
//! It acts as late as NCCL may: a communicator with `blocking = 0` answers "in progress" first and puts its operation into the
//! stream only afterwards; an operation ends when all its peers have taken what it sends; a peer that went away is waited for
//! until the communicator is aborted. It aborts with the call's name when it sees what NCCL answers with wrong bytes or a
//! hang: sizes, roots or kinds that do not match, a communicator that was destroyed, two threads in one communicator, and by
//! way of the driver twin memory of another device, given back too early, or written by somebody else meanwhile.
//!
//! | variable | meaning |
//! |---|---|
//! | `SIMNCCL_VERSION` | what `ncclGetVersion` answers (23003); below 23000 ranks never share a GPU |
//! | `NCCL_MULTI_RANK_GPU_ENABLE=1` | as NCCL: several ranks may be on one GPU |
//! | `SIMNCCL_LINK` | `GB/s[,latency_us]` of each rank's link to its peers, per direction; needs `SIMCUDA_LINK` |
//! | `SIMNCCL_FAULT` | `call@n=code`, comma-separated; `*` is any call, `run:call` an operation that runs; `hang` is a code, and ends with the abort of what runs or of the end of a group |
//! | `SIMNCCL_ABORT` | `tell`: a rank that aborts is an ncclRemoteError to its peers; `wait`: it waits until all peers abort or go |
//! | `SIMNCCL_TIMEOUT` | milliseconds after which waiting for a peer is ncclRemoteError (never) |
//! | `SIMNCCL_SEED`, `SIMNCCL_JITTER` | seed of the delays of calls that do not block, and the longest in microseconds (300) |
//! | `SIMNCCL_STRICT=0` | violations are counted, and do not abort |
//! | `SIMNCCL_LEDGER` | a file that gets everything counted, as JSON, at exit; `%p` in its name is the process |
//! | `SIMNCCL_LEAKS` | `ignore`, or `abort` instead of a line on stderr |
//!
//! A link belongs to a rank of a communicator: two communicators of one device do not share it. Not there: `ncclCommSplit`,
//! `ncclReduce`, `ncclReduceScatter`, registered buffers, several streams in one group of a communicator.

pub mod abi;
pub mod api;
mod comm;
mod config;
mod driver;
mod faults;
mod group;
mod ledger;
mod segment;
mod sim;
mod sum;
mod transfer;
