//! A location in, [`Checkpoint`] out: many headers, one name space. Knows no ranks and no devices.

#![forbid(unsafe_code)]

mod adapter;
mod hub;
mod index;
mod names;
mod open;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::extent::{FileId, Rank};
use crate::shape::Shape;
use crate::source::Identity;

pub use hub::HubCache;
pub use index::Index;
pub(crate) use write::NewDirectory;
pub use write::Partial;

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
    names: names::NameTable,
    config: Option<Arc<(PathBuf, Result<serde_json::Value>)>>,
    /// The path of the adapter's own.
    adapter_config: Option<PathBuf>,
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

impl CheckpointFile {
    /// What opening it is for subscribers of `tracing`.
    pub(crate) fn span(&self) -> tracing::Span {
        tracing::debug_span!("file", path = %self.path.display(), bytes = self.identity.size)
    }
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
    ///
    /// A directory means `model.safetensors.index.json` and exactly its files and the tensors that it names; else
    /// `model.safetensors`; else all `*.safetensors` directly in it. What is there and belongs to none of these is left
    /// out with a [warning](Checkpoint::warnings).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no checkpoint,
    /// [`Format`](crate::ErrorKind::Format) if a header and [`Index`](crate::ErrorKind::Index) if the index breaks a
    /// rule or names what is no regular file that opens, [`Usage`](crate::ErrorKind::Usage) if the directory holds one
    /// checkpoint per rank: [`open_rank`](Checkpoint::open_rank) opens one of them. [`Io`](crate::ErrorKind::Io) as the
    /// system says.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        open::open(path.as_ref())
    }

    /// Opens the checkpoint of one rank in a directory of `model-rank-R-part-P.safetensors` files.
    ///
    /// # Errors
    /// As [`open`](Checkpoint::open); [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is none for `rank`.
    pub fn open_rank(dir: impl AsRef<Path>, rank: Rank) -> Result<Checkpoint> {
        open::open_rank(dir.as_ref(), rank)
    }

    /// The `model-rank-R-part-P.safetensors` files of a directory: per rank the paths, by part. Empty if it holds none.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) if the directory cannot be listed, and
    /// [`Index`](crate::ErrorKind::Index) if a rank lacks a part or has one twice.
    pub fn rank_files(dir: impl AsRef<Path>) -> Result<BTreeMap<Rank, Vec<PathBuf>>> {
        open::rank_files(dir.as_ref())
    }

    /// Opens `org/name` or `org/name@revision` from the local Hugging Face cache; no network. The revision is a
    /// branch, a tag or a commit, and `main` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::ErrorKind::Usage) if the id makes no sense,
    /// [`NotFound`](crate::ErrorKind::NotFound) if the cache lacks the model or the revision, else as
    /// [`open`](Checkpoint::open).
    pub fn open_hub(id: &str, cache: &HubCache) -> Result<Checkpoint> {
        open::open(&cache.snapshot(id)?)
    }

    /// The same with a LoRA adapter: `adapter_model.safetensors` in `dir` is one more file, whose tensors keep their names
    /// (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`). Rules of modules divide an adapter's factors
    /// as what they are added to.
    ///
    /// # Errors
    /// As [`open`](Checkpoint::open) for that file and the `adapter_config.json` beside it;
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if that says that it is no LoRA adapter or has whole
    /// modules (`modules_to_save`), [`Index`](crate::ErrorKind::Index) if the model has a tensor or a file of the same
    /// name, [`Usage`](crate::ErrorKind::Usage) if this has an adapter already, or is the partition of one rank.
    pub fn with_adapter(&self, dir: impl AsRef<Path>) -> Result<Checkpoint> {
        adapter::with_adapter(self, dir.as_ref())
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

    /// All tensors, sorted by file and position in the file. Between two of them may lie bytes of one that the index
    /// leaves out.
    pub fn tensors(&self) -> &[TensorMeta] {
        &self.inner.tensors
    }

    /// The position in [`tensors`](Checkpoint::tensors) of the tensor with this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.inner.names.position(name, |position| &self.inner.tensors[position].name)
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorMeta> {
        self.position(name).map(|position| &self.inner.tensors[position])
    }

    /// The model's `config.json`, if there is one beside the files.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.inner.config.as_deref().and_then(|(_, config)| config.as_ref().ok())
    }

    /// The path of that `config.json`.
    pub fn config_path(&self) -> Option<&Path> {
        self.inner.config.as_deref().filter(|(_, config)| config.is_ok()).map(|(path, _)| path.as_path())
    }

    /// Why the `config.json` that is there is not used.
    pub(crate) fn config_error(&self) -> Option<&Error> {
        self.inner.config.as_deref().and_then(|(_, config)| config.as_ref().err())
    }

    /// The adapter's `adapter_config.json`, if there is an adapter.
    pub(crate) fn adapter_config(&self) -> Option<&Path> {
        self.inner.adapter_config.as_deref()
    }

    /// The rank whose partition this is, as far as names say: all files are `model-rank-R-part-P.safetensors` of one
    /// rank. A `config.json` beside them describes the whole model.
    pub fn partition_of(&self) -> Option<Rank> {
        let mut ranks = self.inner.files.iter().map(|file| open::rank_and_part(&file.name).map(|(rank, _)| rank));
        let first = ranks.next()??;
        ranks.all(|rank| rank == Some(first)).then_some(first)
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
        let mut names = names::NameTable::with_capacity(tensors.len());
        for (position, tensor) in tensors.iter().enumerate() {
            assert!(names.insert(&tensor.name, position, |at| tensors[at].name.as_str()).is_none(), "two of a name");
        }
        let config = config.map(|config| Arc::new((path.join("config.json"), Ok(config))));
        let (files, adapter_config, warnings) = (vec![file], None, Vec::new());
        Checkpoint { inner: Arc::new(Inner { path, files, tensors, names, config, adapter_config, warnings }) }
    }

    /// The bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.inner.tensors.iter().map(TensorMeta::bytes).sum()
    }
}
