//! Where bytes live: local files, their identity, alignment and file system. Knows nothing of safetensors.

mod file;
mod mapping;

pub use file::{FileSystem, Identity, SourceFile};
pub(crate) use mapping::Mapping;
