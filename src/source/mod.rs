//! Where bytes live: local files, their identity, alignment and file system. Knows nothing of safetensors.

#![forbid(unsafe_code)]

mod file;
mod system;

pub use file::{Identity, SourceFile};
pub use system::{DirectAlignment, FileSystem};
