//! Where bytes live: local files, their identity, alignment and file system. Knows nothing of safetensors.

mod file;
mod mapping;
#[cfg(target_os = "linux")]
mod resident;
mod system;

pub use file::{Identity, SourceFile};
pub(crate) use mapping::Mapping;
pub use system::{DirectAlignment, FileSystem};
