//! Where bytes live: local files, their identity, alignment and file system. Knows nothing of safetensors.

mod file;

pub use file::{FileSystem, Identity, SourceFile};
