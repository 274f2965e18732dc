//! One local file: opened once, read at positions, compared with the identity it had when its header was parsed.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// What makes a file the same file: compared at every further open and after the last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The device number of the file system.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
    /// The size in bytes.
    pub size: u64,
    /// The time of the last change of the contents, in nanoseconds since 1970.
    pub modified_ns: i128,
}

/// An open file.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    file: File,
    identity: Identity,
}

impl SourceFile {
    /// Opens `path` for reading and takes its identity from the descriptor.
    pub fn open(path: impl Into<PathBuf>) -> Result<SourceFile> {
        let _ = (path.into(), ErrorKind::Io, Error::new);
        todo!("helper A")
    }

    /// The path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The identity that the descriptor had when it was opened.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// What kind of file system a file lies on, as far as the choice of an engine needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileSystem {
    /// A disk of this machine, with this file system name (`ext4`, `xfs`, `btrfs`, ...).
    Local(&'static str),
    /// Memory (`tmpfs`, `ramfs`): every read is a copy.
    Memory(&'static str),
    /// Another machine, or a host below this one (`nfs`, `lustre`, `virtiofs`, `fuse`, ...).
    Network(&'static str),
    /// Not known, with its magic number.
    Unknown(i64),
}
