//! A libcufile that reads into memory of the driver twin (`tests/simcuda`): shardlift's own loader opens it in place of
//! NVIDIA's.
//!
//! It counts how each byte came: directly, through buffers of the library's own because something was not aligned or not
//! registered (bounced), or in compatibility mode through memory of the host. It aborts with the call's name when it sees
//! what cuFile answers with wrong bytes or worse: a handle that was deregistered or whose file was closed, memory given back
//! while registered, and by way of the driver twin a read into memory that a copy still reads.
//!
//! | variable | meaning |
//! |---|---|
//! | `SIMCUFILE_MODE` | `direct` (default), or `compat`: without nvidia-fs, the driver opens only if compatibility mode is allowed |
//! | `SIMCUFILE_PARAMETERS=0` | `cuFileSetParameterBool` and `cuFileGetParameterBool` refuse, which is what a caller can tell of a library without them |
//! | `SIMCUFILE_VERSION` | what `cuFileGetVersion` answers (1140) |
//! | `SIMCUFILE_OPEN_MS` | how long `cuFileDriverOpen` takes (0) |
//! | `SIMCUFILE_REGISTER_MAX` | most bytes that are registered at a time (no bound) |
//! | `SIMCUFILE_SHORT` | every so many-th read brings a part of what it is asked for (0: none) |
//! | `SIMCUFILE_FAULT` | `call@n=code`, comma-separated; `*` is any call; a code is a status, `-N` for errno N of a read, `short` or `hang` |
//! | `SIMCUFILE_STRICT=0` | violations are counted, and do not abort |
//! | `SIMCUFILE_LEDGER` | a file that gets everything counted, as JSON, at exit; `%p` in its name is the process |
//!
//! Not there: writes, asynchronous and batched reads, properties, parameters that are no booleans.

pub mod api;
mod config;
pub mod control;
mod driver;
mod faults;
mod sim;
