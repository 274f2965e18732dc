//! From a location to its files, and from their headers to one name space.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::ffi::OsString;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::checkpoint::index::{Index, rule};
use crate::checkpoint::names::NameTable;
use crate::checkpoint::{Checkpoint, CheckpointFile, Inner, TensorMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{FileId, Rank};
use crate::format::Header;
use crate::limits;
use crate::source::{Identity, SourceFile};

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let metadata = std::fs::metadata(path).map_err(|error| Error::io("cannot open", path, error))?;
    if !metadata.is_dir() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let dir = path.parent().unwrap_or(Path::new(""));
        return assemble(path, dir, vec![(name, path.to_owned())], None, Vec::new());
    }
    // A link to nothing or a folder of this name is a broken checkpoint, not one without an index.
    let index_path = path.join(INDEX);
    if is_named(&index_path)? {
        let bytes = read_whole(&index_path, limits::INDEX_MAX).map_err(unusable)?;
        let index = Index::parse(&bytes).map_err(|error| error.with_file(&index_path))?;
        let files: Vec<_> = index.files.iter().map(|name| (name.clone(), path.join(name))).collect();
        let warnings = left_out(path, &files, "that the index does not name");
        return assemble(path, path, files, Some((&index_path, index)), warnings);
    }
    if is_named(&path.join(SINGLE))? {
        let files = vec![(SINGLE.to_owned(), path.join(SINGLE))];
        let warnings = left_out(path, &files, "beside model.safetensors");
        return assemble(path, path, files, None, warnings);
    }
    let names = list(path)?;
    let ranks = group(path, &names)?;
    if !ranks.is_empty() {
        let message =
            format!("directory holds one checkpoint per rank, of {}: open one of its files", spelled(ranks.keys()));
        return Err(Error::new(ErrorKind::Usage, message)
            .with_expected("one checkpoint", few(ranks.values().flatten().map(|path| file_name(path))))
            .with_file(path));
    }
    let files: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    if files.is_empty() {
        let others: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_other_format(name)).collect();
        let message = match others.is_empty() {
            true => "directory holds no .safetensors file",
            false => "directory holds weights, but not as .safetensors: convert them first",
        };
        let found = if others.is_empty() { "none".to_owned() } else { few(others) };
        return Err(Error::new(ErrorKind::NotFound, message)
            .with_expected(".safetensors files", found)
            .with_file(path));
    }
    let files = files.into_iter().map(|name| (name.clone(), path.join(name))).collect();
    assemble(path, path, files, None, Vec::new())
}

pub(super) fn open_rank(dir: &Path, rank: Rank) -> Result<Checkpoint> {
    let mut ranks = rank_files(dir)?;
    let Some(paths) = ranks.remove(&rank) else {
        let found = if ranks.is_empty() { "none".into() } else { spelled(ranks.keys()) };
        return Err(Error::new(ErrorKind::NotFound, "directory holds no checkpoint for the rank")
            .with_expected(format!("model-rank-{rank}-part-0.safetensors"), found)
            .with_file(dir)
            .with_rank(rank));
    };
    let files = paths.into_iter().map(|path| (file_name(&path), path)).collect();
    assemble(dir, dir, files, None, Vec::new()).map_err(|error| error.with_rank(rank))
}

pub(super) fn rank_files(dir: &Path) -> Result<BTreeMap<Rank, Vec<PathBuf>>> {
    group(dir, &list(dir)?)
}

/// Whether the directory has an entry of this name, whatever it is.
fn is_named(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("cannot look for", path, error)),
    }
}

/// An error about a file that the directory or the index names: if it does not open as a regular file, that breaks a
/// rule, whatever the system says.
fn unusable(error: Error) -> Error {
    let opening = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Usage | ErrorKind::Io);
    match error.file() {
        Some(file) if opening && error.at().bytes.is_none() => {
            let system = error.source().map(ToString::to_string);
            rule("file-unusable", "file cannot be opened")
                .with_expected("a regular file", system.as_deref().unwrap_or("something else"))
                .with_file(file)
                .with_source(error)
        }
        _ => error,
    }
}

fn entries(dir: &Path) -> Result<Vec<OsString>> {
    let failed = |error| Error::io("cannot list", dir, error);
    let names = std::fs::read_dir(dir).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.file_name()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// The names in a directory, sorted. Those that are not UTF-8 are none of ours, unless they end like ours.
fn list(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for name in entries(dir)? {
        match name.into_string() {
            Ok(name) => names.push(name),
            Err(name) if name.as_encoded_bytes().ends_with(b".safetensors") => {
                return Err(rule("file-name-not-utf8", "name of a file is not utf-8")
                    .with_expected("utf-8", format!("{name:?}"))
                    .with_file(dir.join(name)));
            }
            Err(_) => {}
        }
    }
    Ok(names)
}

/// A warning of the `.safetensors` files in a directory that are not among `used`, which is sorted.
fn left_out(dir: &Path, used: &[(String, PathBuf)], why: &str) -> Vec<String> {
    // Nothing else of the directory is needed: where it cannot be listed nothing is known of other files.
    let names = entries(dir).unwrap_or_default();
    let names = names.iter().map(|name| name.to_string_lossy()).filter(|name| {
        name.ends_with(".safetensors") && used.binary_search_by(|(used, _)| used.as_str().cmp(name)).is_err()
    });
    let names: Vec<_> = names.collect();
    match names.len() {
        0 => Vec::new(),
        others => vec![format!("left out: {} {why}: {}", count(others, ".safetensors file"), few(names))],
    }
}

fn group(dir: &Path, names: &[String]) -> Result<BTreeMap<Rank, Vec<PathBuf>>> {
    let mut ranks: BTreeMap<Rank, Vec<(u32, &String)>> = BTreeMap::new();
    for name in names {
        if let Some((rank, part)) = rank_and_part(name) {
            ranks.entry(rank).or_default().push((part, name));
        }
    }
    let mut paths = BTreeMap::new();
    for (rank, mut parts) in ranks {
        parts.sort_unstable();
        for (expected, &(found, name)) in parts.iter().enumerate() {
            if found as usize != expected {
                return Err(rule("rank-part-missing", "parts of a rank are not 0, 1, 2, ...")
                    .with_expected(format!("part {expected}"), format!("part {found}"))
                    .with_file(dir.join(name))
                    .with_rank(rank));
            }
        }
        paths.insert(rank, parts.into_iter().map(|(_, name)| dir.join(name)).collect());
    }
    Ok(paths)
}

/// `model-rank-R-part-P.safetensors`
pub(super) fn rank_and_part(name: &str) -> Option<(Rank, u32)> {
    let (rank, part) = name.strip_prefix("model-rank-")?.strip_suffix(".safetensors")?.split_once("-part-")?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    Some((Rank(number(rank)?), number(part)?))
}

/// `rank 3`, or `ranks 0 to 2, 5`.
fn spelled<'a>(ranks: impl Iterator<Item = &'a Rank>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(rank.0) => *last = rank.0,
            _ => runs.push((rank.0, rank.0)),
        }
    }
    let noun = if matches!(runs[..], [(first, last)] if first == last) { "rank" } else { "ranks" };
    let run = |&(first, last): &(u32, u32)| match last - first {
        0 => first.to_string(),
        _ => format!("{first} to {last}"),
    };
    let more = if runs.len() > NAMES_SHOWN { ", ..." } else { "" };
    format!("{noun} {}{more}", few(runs.iter().map(run)))
}

fn is_other_format(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack"].iter().any(|end| name.ends_with(end))
}

/// The first names, for a message that says how many there are.
fn few<N: AsRef<str>>(names: impl IntoIterator<Item = N>) -> String {
    let names: Vec<N> = names.into_iter().take(NAMES_SHOWN).collect();
    names.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", ")
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The bytes of an index or a configuration, at most `max`.
pub(super) fn read_whole(path: &Path, max: u64) -> Result<Vec<u8>> {
    let file = SourceFile::open(path)?;
    let size = file.identity().size;
    if size > max {
        return Err(rule("index-too-large", "json file is too large")
            .with_expected(format!("at most {max} bytes"), format!("{size} bytes"))
            .with_file(path));
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Reads all headers and checks them against each other and the index.
fn assemble(
    path: &Path,
    dir: &Path,
    names: Vec<(String, PathBuf)>,
    index: Option<(&Path, Index)>,
    mut warnings: Vec<String>,
) -> Result<Checkpoint> {
    let in_directory = path == dir;
    let headers = read_headers(&names);
    let mut files = Vec::with_capacity(names.len());
    let mut tensors = Vec::new();
    for (position, ((name, path), header)) in names.into_iter().zip(headers).enumerate() {
        let (identity, header) = match (header, &index) {
            (Ok(read), _) => read,
            (Err(error), Some((_, index))) if error.kind() == ErrorKind::NotFound => {
                let tensor = index.tensors.iter().find(|(_, file)| *file as usize == position);
                return Err(rule("index-file-missing", "index names a file that is not there")
                    .with_expected(name, "no such file")
                    .with_tensor(tensor.map(|(tensor, _)| tensor.as_str()).unwrap_or_default())
                    .with_file(path)
                    .with_source(error));
            }
            (Err(error), _) if in_directory => return Err(unusable(error)),
            (Err(error), _) => return Err(error),
        };
        let read = File::new(FileId(position as u32), name, path, identity, header);
        warnings.extend(read.warnings);
        tensors.extend(read.tensors);
        files.push(read.file);
    }
    let names = match &index {
        Some((index_path, index)) => {
            cross_check(index, &files, &mut tensors, &mut warnings).map_err(|error| error.with_file(*index_path))?
        }
        None => name_table(&files, &tensors)?,
    };
    let config = read_config(dir.join("config.json"), &mut warnings).map(Arc::new);
    let (path, adapter_config) = (path.to_owned(), None);
    Ok(Checkpoint { inner: Arc::new(Inner { path, files, tensors, names, config, adapter_config, warnings }) })
}

/// A file of a checkpoint, with what its header says.
pub(super) struct File {
    pub(super) file: CheckpointFile,
    pub(super) tensors: Vec<TensorMeta>,
    pub(super) warnings: Vec<String>,
}

impl File {
    pub(super) fn new(id: FileId, name: String, path: PathBuf, identity: Identity, header: Header) -> File {
        let Header { tensors, metadata, data_start, hash: header_hash, warnings } = header;
        let warnings = warnings.iter().map(|warning| format!("{name}: {warning}")).collect();
        let tensor = |tensor| {
            let crate::format::HeaderTensor { name, dtype, shape, start, end } = tensor;
            TensorMeta { name, file: id, dtype, shape, start, end }
        };
        let tensors = tensors.into_iter().map(tensor).collect();
        File { file: CheckpointFile { name, path, identity, data_start, header_hash, metadata }, tensors, warnings }
    }
}

pub(super) fn name_table(files: &[CheckpointFile], tensors: &[TensorMeta]) -> Result<NameTable> {
    let mut names = NameTable::with_capacity(tensors.len());
    for (position, tensor) in tensors.iter().enumerate() {
        if let Some(first) = names.insert(&tensor.name, position, |at| &tensors[at].name) {
            let file = |tensor: &TensorMeta| &files[tensor.file.0 as usize];
            return Err(rule("tensor-in-two-files", "two files hold a tensor of this name")
                .with_expected(&file(&tensors[first]).name, &file(tensor).name)
                .with_tensor(&tensor.name)
                .with_file(&file(tensor).path));
        }
    }
    Ok(names)
}

/// The index against the headers. Tensors that it does not name, and copies in other files than it names, are left out.
fn cross_check(
    index: &Index,
    files: &[CheckpointFile],
    tensors: &mut Vec<TensorMeta>,
    warnings: &mut Vec<String>,
) -> Result<NameTable> {
    let mut indexed = NameTable::with_capacity(index.tensors.len());
    for (position, (name, _)) in index.tensors.iter().enumerate() {
        indexed.insert(name, position, |at| &index.tensors[at].0);
    }
    // Per tensor of the index: whether its file holds it, else another file that does.
    let mut held = vec![false; index.tensors.len()];
    let mut elsewhere: BTreeMap<usize, FileId> = BTreeMap::new();
    let mut orphans = Vec::new();
    for tensor in tensors.iter() {
        match indexed.position(&tensor.name, |at| &index.tensors[at].0) {
            Some(at) if index.tensors[at].1 == tensor.file.0 => held[at] = true,
            Some(at) => drop(elsewhere.entry(at).or_insert(tensor.file)),
            None => orphans.push(tensor.name.as_str()),
        }
    }
    if let Some(at) = held.iter().position(|held| !held) {
        let (tensor, file) = &index.tensors[at];
        let expected = &files[*file as usize];
        return Err(match elsewhere.get(&at) {
            Some(found) => rule("index-tensor-elsewhere", "tensor is in another file than the index says")
                .with_expected(&expected.name, &files[found.0 as usize].name),
            None => rule("index-tensor-missing", "tensor that the index names is not in its file")
                .with_expected(tensor, "nothing"),
        }
        .with_tensor(tensor)
        .with_file(&expected.path));
    }
    if !orphans.is_empty() {
        let orphaned = count(orphans.len(), "tensor");
        warnings.push(format!("left out: {orphaned} that the index does not name: {}", few(&orphans)));
    }
    if !elsewhere.is_empty() {
        let copied = count(elsewhere.len(), "tensor");
        let shown = few(elsewhere.keys().map(|&at| &index.tensors[at].0));
        warnings.push(format!("left out: copies of {copied} in other files than the index says: {shown}"));
    }
    if !orphans.is_empty() || !elsewhere.is_empty() {
        tensors.retain(|tensor| {
            let at = indexed.position(&tensor.name, |at| &index.tensors[at].0);
            at.is_some_and(|at| index.tensors[at].1 == tensor.file.0)
        });
    }
    let bytes: u64 = tensors.iter().map(TensorMeta::bytes).sum();
    if let Some(total) = &index.total_size
        && total.as_u64() != Some(bytes)
        && total.as_f64() != Some(bytes as f64)
    {
        warnings.push(format!("index says total_size {total}, its tensors take {}", count(bytes as usize, "byte")));
    }
    name_table(files, tensors)
}

fn read_config(path: PathBuf, warnings: &mut Vec<String>) -> Option<(PathBuf, Result<serde_json::Value>)> {
    if std::fs::symlink_metadata(&path).is_err() {
        return None;
    }
    let parsed = read_whole(&path, limits::CONFIG_MAX).and_then(|bytes| {
        serde_json::from_slice(&bytes)
            .map_err(|error| rule("config-not-json", "not json").with_expected("json", error).with_file(&path))
    });
    let config = parsed.inspect_err(|error| warnings.push(format!("config.json is not used: {error}")));
    Some((path, config))
}

/// All headers, in the order of the files. Threads of our own: a read that waits must not hold a core of rayon's pool.
fn read_headers(files: &[(String, PathBuf)]) -> Vec<Result<(Identity, Header)>> {
    let slots: Vec<_> = files.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = Vec::new();
        while let Some((file, slot)) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            files.get(at).zip(slots.get(at))
        } {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(read_header(&file.1, &mut buffer));
        }
    };
    // Twice the cores: on a network file system most of the time goes to waiting.
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = files.len().min(2 * cores).min(limits::HEADER_THREADS_MAX);
    thread::scope(|scope| {
        for at in 1..threads {
            // Fewer threads than wanted do the same work.
            let named = thread::Builder::new().name(format!("shardlift-open-{at}"));
            if named.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let read = slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner));
    read.map(|header| header.expect("bug in shardlift: a header was left out")).collect()
}

pub(super) fn read_header(path: &Path, buffer: &mut Vec<u8>) -> Result<(Identity, Header)> {
    let file = SourceFile::open(path)?;
    let identity = file.identity();
    // One read gets most headers whole.
    buffer.resize(identity.size.min(limits::HEADER_FIRST_READ) as usize, 0);
    file.read_exact_at(buffer, 0)?;
    let place = |error| Error::from(error).with_file(path);
    let length = Header::header_len(buffer, identity.size).map_err(place)? + Header::LENGTH_BYTES;
    let first = buffer.len();
    if length > first as u64 {
        buffer.resize(length as usize, 0);
        file.read_exact_at(&mut buffer[first..], first as u64)?;
    }
    let header = Header::parse(buffer, identity.size).map_err(place)?;
    file.verify_identity(identity)?;
    Ok((identity, header))
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Names that a message repeats before it says how many there are.
const NAMES_SHOWN: usize = 3;
