//! A libcuda that runs on the host: unmodified cudarc and shardlift's own loader open it in place of NVIDIA's.
//!
//! It acts as late as the driver may: a copy reads its pinned source when it runs, not when it is submitted, and runs
//! some time after that. It never uses an address twice, poisons memory, checks every handle for type, generation and
//! context, and aborts with the call's name when it sees what a GPU would show only now and then: a slot refilled
//! before its copy ran, memory given back under a copy, two copies onto one place without an event between them.
//!
//! Twins of other libraries put their operations into its streams by `simcuda_submit`, under the same rules, and write to its
//! memory between `simcuda_begin_write` and `simcuda_end_write`.
//!
//! | variable | meaning |
//! |---|---|
//! | `SIMCUDA_DEVICES` | how many devices (4) |
//! | `SIMCUDA_VISIBLE` | instead, which devices of the machine: their numbers, as in `CUDA_VISIBLE_DEVICES` |
//! | `SIMCUDA_MEMORY` | bytes of each device, with suffix K, M or G (1G) |
//! | `SIMCUDA_PINNED` | most bytes of host memory that may be pinned at a time (no bound) |
//! | `SIMCUDA_DRIVER_VERSION` | what `cuDriverGetVersion` answers (12090) |
//! | `SIMCUDA_READ_ONLY=0` | attribute 113 off: no read-only registering |
//! | `SIMCUDA_HOST_PAGE_TABLES=1` | attribute 100 on: pageable memory is read when a copy runs |
//! | `SIMCUDA_SEED`, `SIMCUDA_JITTER` | seed of the delays, and the longest in microseconds (300; 0 for none) |
//! | `SIMCUDA_LINK` | `GB/s[,latency_us][,root=GB/s]`: each device's link, per direction, and what all share |
//! | `SIMCUDA_FAULT` | `call@n=code[!]`, comma-separated; `*` is any call, `run:copy` a copy that runs, `!` loses the device, the code `hang` never comes back |
//! | `SIMCUDA_CHECK` | 0: sources are not compared; 1: samples of them (default); 2: all of them |
//! | `SIMCUDA_POISON=0` | fresh memory is not filled with 0xCD |
//! | `SIMCUDA_POPULATE=1` | memory has all its pages from the start, as a device's has: copies cost no page faults |
//! | `SIMCUDA_STRICT=0` | violations are counted, and do not abort |
//! | `SIMCUDA_LEDGER` | a file that gets everything counted, as JSON, at exit; `%p` in its name is the process |
//! | `SIMCUDA_LEAKS` | `ignore`, or `abort` instead of a line on stderr |

pub mod abi;
pub mod api;
pub mod code;
mod config;
mod context;
mod crash;
mod device_memory;
mod faults;
pub mod handle;
mod hazard;
mod host_memory;
mod kernels;
mod ledger;
mod link;
mod sim;
mod stream;
mod work;
