//! A location in, [`Checkpoint`] out: many headers, one name space. Knows no ranks and no devices.

#![forbid(unsafe_code)]

mod write;
pub(crate) use write::NewDirectory;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::Result;
use crate::extent::FileId;
use crate::shape::Shape;
use crate::source::Identity;

/// The headers of a model's files, cross-checked. Cheap to clone; no tensor data is read and no file is kept open.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    files: Vec<CheckpointFile>,
    tensors: Vec<TensorMeta>,
    config: Option<serde_json::Value>,
    warnings: Vec<String>,
}

/// One file of a checkpoint.
#[derive(Debug, Clone)]
pub struct CheckpointFile {
    /// The name relative to the model's directory, as indexes and plans print it.
    pub name: String,
    /// The path to open.
    pub path: PathBuf,
    /// The file's identity when its header was parsed.
    pub identity: Identity,
    /// The first byte after the header: tensor offsets in the header count from here.
    pub data_start: u64,
    /// xxh3-64 of the header bytes (without the 8 length bytes).
    pub header_hash: u64,
    /// `__metadata__`, sorted by key.
    pub metadata: Vec<(String, String)>,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct TensorMeta {
    /// The name, unique in the checkpoint.
    pub name: String,
    /// The file that holds it.
    pub file: FileId,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, outermost dimension first.
    pub shape: Shape,
    /// The first byte, counted from byte 0 of the file.
    pub start: u64,
    /// The byte after the last, counted from byte 0 of the file.
    pub end: u64,
}

impl TensorMeta {
    /// The size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a directory of them, or a directory with an index. Reads headers only.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let _ = path;
        todo!()
    }

    /// The file or directory that was opened.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The files; a [`FileId`] is a position in this list.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.inner.files
    }

    /// The file with this id.
    pub fn file(&self, id: FileId) -> &CheckpointFile {
        &self.inner.files[id.0 as usize]
    }

    /// All tensors, sorted by file and position in the file.
    pub fn tensors(&self) -> &[TensorMeta] {
        &self.inner.tensors
    }

    /// The position in [`tensors`](Checkpoint::tensors) of the tensor with this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        let _ = name;
        todo!()
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorMeta> {
        self.position(name).map(|position| &self.inner.tensors[position])
    }

    /// The model's `config.json`, if there is one beside the files.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.inner.config.as_ref()
    }

    /// What is odd but no error: orphans that the index leaves out, a wrong `total_size`, and the like.
    pub fn warnings(&self) -> &[String] {
        &self.inner.warnings
    }

    /// A checkpoint of one file with these tensors, for tests of what never opens a file.
    #[cfg(test)]
    pub(crate) fn synthetic(tensors: Vec<TensorMeta>, config: Option<serde_json::Value>) -> Checkpoint {
        let name = "model.safetensors";
        let path = PathBuf::from("model");
        let size = tensors.iter().map(|tensor| tensor.end).max().unwrap_or(0);
        let data_start = tensors.iter().map(|tensor| tensor.start).min().unwrap_or(0);
        let file = CheckpointFile {
            name: name.into(),
            path: path.join(name),
            identity: Identity { device: 0, inode: 0, size, modified_ns: 0 },
            data_start,
            header_hash: 1,
            metadata: Vec::new(),
        };
        Checkpoint { inner: Arc::new(Inner { path, files: vec![file], tensors, config, warnings: Vec::new() }) }
    }

    /// The bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.inner.tensors.iter().map(TensorMeta::bytes).sum()
    }
}

/// Where the local Hugging Face cache lies.
#[derive(Debug, Clone)]
pub struct HubCache {
    path: PathBuf,
}

impl HubCache {
    /// The cache in this directory (the folder with `models--org--name` in it).
    pub fn new(path: impl Into<PathBuf>) -> HubCache {
        HubCache { path: path.into() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
