//! A new directory of partitions, written beside its final place and renamed whole.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::format::NewHeader;
use crate::limits;
use crate::shape::Shape;
use crate::sync::lock;

/// A directory in the making. Removed when dropped without [`commit`](NewDirectory::commit).
#[derive(Debug)]
pub(crate) struct NewDirectory {
    out: PathBuf,
    partial: Partial,
    /// Each file as it will be called, and its rank if it holds a partition.
    files: Vec<(PathBuf, Option<Rank>, Arc<File>)>,
    replace: bool,
}

/// What a reshard has on disk before its output has its name: for a process that ends without waiting for it.
#[derive(Debug, Clone)]
pub struct Partial(Arc<Written>);

#[derive(Debug)]
struct Written {
    folder: PathBuf,
    /// Folders above it that were made for it, outermost first.
    parents: Vec<PathBuf>,
    /// Whether it has its name, or is removed. Held while either is done.
    over: Mutex<bool>,
}

impl Partial {
    /// Removes it, unless the output has its name already; the reshard then fails.
    pub fn remove(&self) {
        let mut over = lock(&self.0.over);
        if !std::mem::replace(&mut *over, true) {
            let _ = fs::remove_dir_all(&self.0.folder);
            remove_empty(&self.0.parents);
        }
    }
}

impl NewDirectory {
    /// A directory that will become `out`, with what belongs to the model besides its weights in it: configuration,
    /// tokenizer and the like. A link to a directory stays a link, what it leads to is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `out` exists and `replace` is not set, is no directory or cannot be created; and whatever
    /// `replace` says if replacing it would take the model away. [`ErrorKind::Io`] if a file that belongs to the model
    /// cannot be copied.
    pub(crate) fn create(out: &Path, replace: bool, model: &Checkpoint) -> Result<NewDirectory> {
        let companions = companions(model)?;
        let out = &without_detours(out);
        refuse_own(out, model, &companions)?;
        if out.file_name().is_none() {
            return Err(Error::new(ErrorKind::Usage, "no output name").with_file(out));
        }
        let asked = out;
        let failed = |error| cannot_create(asked, error);
        let out = match exists(out, replace)? {
            true => fs::canonicalize(out).map_err(failed)?,
            false => out.to_path_buf(),
        };
        let parents = make_missing(folder_of(&out)).map_err(failed)?;
        let folder = fresh(&out, "partial").map_err(failed).inspect_err(|_| remove_empty(&parents))?;
        let partial = Partial(Arc::new(Written { folder, parents, over: Mutex::new(false) }));
        let mut directory = NewDirectory { out, partial, files: Vec::new(), replace };
        companions.iter().try_for_each(|(name, path)| directory.copy(name, path))?;
        Ok(directory)
    }

    /// What is on disk so far.
    pub(crate) fn partial(&self) -> &Partial {
        &self.partial
    }

    fn copy(&mut self, name: &OsString, path: &Path) -> Result<()> {
        let copy = || -> io::Result<File> {
            let mut copy = File::create_new(self.partial.0.folder.join(name))?;
            io::copy(&mut File::open(path)?, &mut copy)?;
            Ok(copy)
        };
        let copy = copy().map_err(|error| Error::io("cannot copy", path, error))?;
        self.files.push((self.out.join(name), None, Arc::new(copy)));
        Ok(())
    }

    /// Refuses a partition that [`add_partition`](NewDirectory::add_partition) could not write, before there is a directory.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if nobody could open the file, for its header would be too large: it has the metadata of all
    /// files of the model.
    pub(crate) fn check_partition(
        out: &Path,
        rank: Rank,
        tensors: &[(&str, Dtype, &Shape)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        // Made again when it is written: those of all ranks together may not fit memory.
        new_header(&out.join(partition_name(rank)), rank, tensors, metadata).map(drop)
    }

    /// Creates the file of a rank, header written and its size set, and says what it will be called and where each
    /// tensor's bytes go.
    pub(crate) fn add_partition(
        &mut self,
        rank: Rank,
        tensors: &[(&str, Dtype, &Shape)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<(PathBuf, Arc<File>, Vec<u64>)> {
        let name = partition_name(rank);
        let path = self.out.join(&name);
        let header = new_header(&path, rank, tensors, metadata)?;
        let write = || -> io::Result<File> {
            let mut file = File::create_new(self.partial.0.folder.join(&name))?;
            file.write_all(&header.bytes)?;
            file.set_len(header.file_bytes)?;
            Ok(file)
        };
        let file = write().map_err(|error| Error::io("cannot write", &path, error).with_rank(rank))?;
        let file = Arc::new(file);
        self.files.push((path.clone(), Some(rank), Arc::clone(&file)));
        Ok((path, file, header.offsets))
    }

    /// Makes everything durable and gives the directory its name. `check` is asked between any two steps that may take
    /// long; what is returned is odd but no error.
    pub(crate) fn commit(self, check: impl Fn() -> Result<()>) -> Result<Option<String>> {
        let Written { folder, parents, over } = &*self.partial.0;
        for (path, rank, file) in &self.files {
            check()?;
            file.sync_all().map_err(|error| {
                let error = Error::io("cannot sync", path, error);
                rank.iter().fold(error, |error, rank| error.with_rank(*rank))
            })?;
        }
        sync_directory(folder)?;
        let old = {
            let mut over = lock(over);
            check()?;
            if *over {
                return Err(Error::new(ErrorKind::Cancelled, "what was written has been removed").with_file(&self.out));
            }
            let old = take_name(folder, &self.out, self.replace, parents)?;
            *over = true;
            old
        };
        let Some(old) = old else { return Ok(None) };
        let removed = fs::remove_dir_all(&old).err();
        Ok(removed.map(|error| format!("the replaced output is now {}: cannot remove: {error}", old.display())))
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        self.partial.remove();
    }
}

fn partition_name(rank: Rank) -> String {
    format!("model-rank-{rank}-part-0.safetensors")
}

fn new_header(
    path: &Path,
    rank: Rank,
    tensors: &[(&str, Dtype, &Shape)],
    metadata: &BTreeMap<String, String>,
) -> Result<NewHeader> {
    NewHeader::new(tensors, metadata).map_err(|error| {
        let (expected, found) = error.expected_found();
        Error::new(ErrorKind::Usage, "the header of the output would be too large")
            .with_rule("output-header-too-large")
            .with_expected(expected, found)
            .with_file(path)
            .with_rank(rank)
            .with_source(error)
    })
}

/// What belongs to a model besides its weights: names, and paths to copy. The folder around a single file is a model's
/// if it holds a `config.json`. An adapter's configuration takes the place of one of its name.
fn companions(model: &Checkpoint) -> Result<Vec<(OsString, PathBuf)>> {
    let mut found = companions_of_model(model)?;
    if let Some((path, name)) = model.adapter_config().and_then(|path| Some((path, path.file_name()?))) {
        found.retain(|(other, _)| other != name);
        found.push((name.to_owned(), path.to_owned()));
    }
    Ok(found)
}

fn companions_of_model(model: &Checkpoint) -> Result<Vec<(OsString, PathBuf)>> {
    let path = model.path();
    let folder = if path.is_dir() { path } else { folder_of(path) };
    if folder != path && fs::symlink_metadata(folder.join("config.json")).is_err() {
        return Ok(Vec::new());
    }
    let failed = |error| Error::io("cannot list", folder, error);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let text = name.to_string_lossy();
        let companion = [".json", ".txt", ".model", ".jinja", ".tiktoken"].iter().any(|end| text.ends_with(end))
            && !text.ends_with(".index.json");
        if companion {
            let path = folder.join(&name);
            // A link that leads nowhere is an error, not a file less.
            if fs::metadata(&path).map_err(|error| Error::io("cannot copy", &path, error))?.is_file() {
                found.push((name, path));
            }
        }
    }
    Ok(found)
}

/// Refuses an output that is the model, one of its files, or a folder with some of it inside. Compares identities: a
/// name may be spelt in many ways.
fn refuse_own(out: &Path, model: &Checkpoint, companions: &[(OsString, PathBuf)]) -> Result<()> {
    let Ok(own) = fs::metadata(out) else { return Ok(()) };
    let files = model.files().iter().map(|file| file.path.as_path());
    let companions = companions.iter().map(|(_, path)| path.as_path());
    let mut seen = BTreeSet::new();
    for place in [model.path()].into_iter().chain(files).chain(companions).flat_map(places) {
        for part in place.ancestors() {
            if !seen.insert(part.to_path_buf()) {
                break;
            }
            if fs::metadata(part).is_ok_and(|part| (part.dev(), part.ino()) == (own.dev(), own.ino())) {
                return Err(Error::new(ErrorKind::Usage, "the output is the model, or holds some of it")
                    .with_rule("output-is-model")
                    .with_expected("another folder", place.display())
                    .with_file(out));
            }
        }
    }
    Ok(())
}

/// Where a path leads: itself and what each link on the way names, each in its real folder.
fn places(path: &Path) -> Vec<PathBuf> {
    let mut places = Vec::from_iter(fs::canonicalize(path));
    let mut at = path.to_path_buf();
    for _ in 0..limits::LINKS_MAX {
        let (Ok(folder), Some(name)) = (fs::canonicalize(folder_of(&at)), at.file_name()) else { break };
        let place = folder.join(name);
        let target = fs::read_link(&place);
        places.push(place);
        match target {
            Ok(target) => at = folder.join(target),
            Err(_) => break,
        }
    }
    places
}

/// Whether there is an output to replace.
fn exists(out: &Path, replace: bool) -> Result<bool> {
    let refuse = |rule, message: &str| Err(Error::new(ErrorKind::Usage, message).with_rule(rule).with_file(out));
    match fs::symlink_metadata(out) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(cannot_create(out, error)),
        Ok(_) if !fs::metadata(out).is_ok_and(|out| out.is_dir()) => {
            refuse("output-not-folder", "the output exists and is no folder")
        }
        Ok(_) if is_mount_point(out) => refuse("output-is-mount", "the output is a mount point: name a folder in it"),
        Ok(_) if !replace => refuse("output-exists", "the output exists (--force replaces it)"),
        Ok(_) => Ok(true),
    }
}

/// Whether a file system begins here, so that the folder cannot be renamed.
fn is_mount_point(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
        let stat = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS);
        stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        false
    }
}

/// Makes the folders of `path` that are missing; these, outermost first.
fn make_missing(path: &Path) -> io::Result<Vec<PathBuf>> {
    let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
    let mut made = Vec::new();
    for &path in missing.iter().rev().filter(|path| !path.as_os_str().is_empty()) {
        match fs::create_dir(path) {
            Ok(()) => made.push(path.to_path_buf()),
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(error) => {
                remove_empty(&made);
                return Err(error);
            }
        }
    }
    Ok(made)
}

/// Nothing has been read yet: where the output cannot be, it is the argument that is wrong.
fn cannot_create(out: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Usage, format!("cannot create the output: {error}"))
        .with_rule("output-not-creatable")
        .with_file(out)
        .with_source(error)
}

/// The path without the `a/..` of folders that are not there: they would be made only to be left.
fn without_detours(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        let missing = || fs::symlink_metadata(&plain).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if part == Component::ParentDir && !plain.as_os_str().is_empty() && missing() {
            plain.pop();
        } else {
            plain.push(part);
        }
    }
    plain
}

/// Removes those of these folders, outermost first, that hold nothing.
fn remove_empty(folders: &[PathBuf]) {
    for folder in folders.iter().rev() {
        let _ = fs::remove_dir(folder);
    }
}

/// A new empty folder beside `out`. Process numbers come again, in containers above all, so they are not enough; the
/// name of `out` may be as long as names can be.
fn fresh(out: &Path, suffix: &str) -> io::Result<PathBuf> {
    for number in 0..limits::TEMPORARY_NAMES {
        let path = out.with_file_name(format!(".shardlift-{}-{number}.{suffix}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("every temporary name beside it is taken"))
}

/// Renames `folder` to `out`, and before that what is there to the name that is returned. Undone if it fails.
fn take_name(folder: &Path, out: &Path, replace: bool, parents: &[PathBuf]) -> Result<Option<PathBuf>> {
    let old = match exists(out, replace)? {
        false => None,
        true => {
            let old = fresh(out, "old").map_err(|error| Error::io("cannot replace", out, error))?;
            fs::rename(out, &old).map_err(|error| {
                let _ = fs::remove_dir(&old);
                Error::io("cannot replace", out, error)
            })?;
            Some(old)
        }
    };
    let durable = || {
        let folders = std::iter::once(folder_of(out)).chain(parents.iter().map(|parent| folder_of(parent)));
        folders.into_iter().try_for_each(sync_directory)
    };
    let named = match fs::rename(folder, out) {
        Ok(()) => durable().inspect_err(|_| drop(fs::rename(out, folder))),
        Err(error) => Err(Error::io("cannot rename to", out, error)),
    };
    let Err(error) = named else { return Ok(old) };
    Err(match old.map(|old| fs::rename(&old, out).map_err(|failed| (old, failed))) {
        None | Some(Ok(())) => error,
        Some(Err((old, failed))) => {
            Error::new(error.kind(), format!("{}; the output is now {}: {failed}", error.message(), old.display()))
                .with_file(out)
                .with_source(error)
        }
    })
}

fn sync_directory(path: &Path) -> Result<()> {
    match File::open(path).and_then(|directory| directory.sync_all()) {
        // Some network file systems have nothing to sync in a directory.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        outcome => outcome.map_err(|error| Error::io("cannot sync", path, error)),
    }
}

/// The folder that a path is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_output_comes_back_if_the_new_one_cannot_take_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("old"), "old").unwrap();
        let error = take_name(&folder.path().join("gone"), &out, true, &[]).unwrap_err();
        assert_eq!((error.kind(), error.file()), (ErrorKind::NotFound, Some(&*out)));
        assert_eq!(fs::read_to_string(out.join("old")).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        let new = folder.path().join("new");
        fs::create_dir(&new).unwrap();
        let old = take_name(&new, &out, true, &[]).unwrap().unwrap();
        assert_eq!(fs::read_to_string(old.join("old")).unwrap(), "old");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    }

    #[test]
    fn temporary_names_are_never_used_twice() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let names = BTreeSet::from_iter((0..5).map(|_| fresh(&out, "partial").unwrap()));
        assert_eq!(names.len(), 5);
    }
}
