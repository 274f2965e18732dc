//! A new directory of partitions, written beside its final place and renamed whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::format::NewHeader;
use crate::shape::Shape;

/// A directory in the making. Removed when dropped without [`commit`](NewDirectory::commit).
#[derive(Debug)]
pub(crate) struct NewDirectory {
    out: PathBuf,
    temporary: PathBuf,
    files: Vec<(PathBuf, File)>,
    replace: bool,
    committed: bool,
}

impl NewDirectory {
    /// A directory that will become `out`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `out` exists and `replace` is not set; [`ErrorKind::Io`] if nothing can be written
    /// beside it.
    pub(crate) fn create(out: &Path, replace: bool) -> Result<NewDirectory> {
        if out.exists() && !replace {
            return Err(Error::new(ErrorKind::Usage, "the output exists (--force replaces it)")
                .with_rule("output-exists")
                .with_file(out));
        }
        let name = out.file_name().ok_or_else(|| Error::new(ErrorKind::Usage, "no output name").with_file(out))?;
        let temporary = out.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
        fs::create_dir_all(&temporary).map_err(|error| Error::io("cannot create", &temporary, error))?;
        Ok(NewDirectory { out: out.into(), temporary, files: Vec::new(), replace, committed: false })
    }

    /// Creates the file of a rank, header written and its size set, and says where each tensor's bytes go.
    pub(crate) fn add_partition(
        &mut self,
        rank: Rank,
        tensors: &[(&str, Dtype, &Shape)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<(PathBuf, File, Vec<u64>)> {
        let path = self.temporary.join(format!("model-rank-{rank}-part-0.safetensors"));
        let header = NewHeader::new(tensors, metadata);
        let write = || -> std::io::Result<(File, File)> {
            let mut file = File::create_new(&path)?;
            file.write_all(&header.bytes)?;
            file.set_len(header.file_bytes)?;
            let handle = file.try_clone()?;
            Ok((file, handle))
        };
        let (file, handle) = write().map_err(|error| Error::io("cannot write", &path, error))?;
        self.files.push((path.clone(), file));
        Ok((path, handle, header.offsets))
    }

    /// Copies what belongs to a model besides its weights: configuration, tokenizer and the like.
    pub(crate) fn copy_companions(&self, model: &Path) -> Result<()> {
        let Ok(entries) = fs::read_dir(model) else { return Ok(()) };
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let companion = [".json", ".txt", ".model", ".jinja", ".tiktoken"].iter().any(|end| name.ends_with(end))
                && !name.ends_with(".index.json");
            if companion && path.is_file() {
                fs::copy(&path, self.temporary.join(&name)).map_err(|error| Error::io("cannot copy", &path, error))?;
            }
        }
        Ok(())
    }

    /// Makes everything durable and gives the directory its name.
    pub(crate) fn commit(mut self) -> Result<()> {
        for (path, file) in &self.files {
            file.sync_all().map_err(|error| Error::io("cannot sync", path, error))?;
        }
        sync_directory(&self.temporary)?;
        let mut old = None;
        if self.replace && self.out.exists() {
            let aside = self.temporary.with_extension("old");
            fs::rename(&self.out, &aside).map_err(|error| Error::io("cannot replace", &self.out, error))?;
            old = Some(aside);
        }
        fs::rename(&self.temporary, &self.out).map_err(|error| Error::io("cannot rename to", &self.out, error))?;
        self.committed = true;
        sync_directory(self.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        match old {
            Some(old) if old.is_dir() => fs::remove_dir_all(&old),
            Some(old) => fs::remove_file(&old),
            None => Ok(()),
        }
        .map_err(|error| Error::io("cannot remove the replaced output", &self.out, error))
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| Error::io("cannot sync", path, error))
}
