//! `shardlift verify`: every rule of the format and the index; with `--deep`, every byte.

use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use shardlift::checkpoint::{CheckpointFile, TensorMeta};
use shardlift::source::SourceFile;
use shardlift::{Checkpoint, Digest, Error, ErrorKind, FileId, Result};

use crate::args::VerifyArgs;
use crate::model;
use crate::output::{Failure, Output, count, fields, hex, human_bytes};

pub(crate) fn run(args: &VerifyArgs, output: &mut Output) -> Result<Map<String, Value>, Failure> {
    let VerifyArgs { model, deep, json: _ } = args;
    // Opening is the proof: a checkpoint that exists keeps every rule.
    let checkpoint = model::open(model)?;
    output.warn(checkpoint.warnings());

    let mut files = Vec::new();
    let mut tensors = Vec::new();
    for (id, file) in (0..).map(FileId).zip(checkpoint.files()) {
        let mut sums = FileSums::default();
        if *deep {
            sums = read(&checkpoint, id, file).map_err(Failure::started)?;
            match &sums.expected {
                Some(_) => output.line(format_args!("{}: sha256 {} as its blob is named", file.name, sums.sha256)),
                None => output.line(format_args!("{}: sha256 {}", file.name, sums.sha256)),
            }
        }
        files.push(json!({
            "name": file.name,
            "bytes": file.identity.size,
            "tensors": tensors_of(&checkpoint, id).len(),
            "sha256": deep.then_some(sums.sha256),
            "sha256_expected": sums.expected,
        }));
        for (tensor, digest) in sums.tensors {
            output.line(format_args!("{}  {tensor}", hex(digest)));
            tensors.push(json!({ "name": tensor, "digest": hex(digest) }));
        }
    }
    let (of_files, of_tensors) = (count(files.len(), "file"), count(checkpoint.tensors().len(), "tensor"));
    let bytes = checkpoint.bytes();
    let read = if *deep { "every byte read" } else { "headers only" };
    output.line(format_args!("ok: {of_files}, {of_tensors}, {} ({read})", human_bytes(bytes)));
    Ok(fields(json!({
        "path": checkpoint.path().to_string_lossy(),
        "deep": deep,
        "checkpoint_bytes": bytes,
        "files": files,
        "tensors": deep.then_some(tensors),
    })))
}

#[derive(Default)]
struct FileSums {
    sha256: String,
    /// The blob name in the Hugging Face cache, where it is a sha256.
    expected: Option<String>,
    tensors: Vec<(String, u64)>,
}

/// Reads a file from start to end, once; it is the one whose header was parsed, before and after.
fn read(checkpoint: &Checkpoint, id: FileId, file: &CheckpointFile) -> Result<FileSums> {
    read_opened(checkpoint, id, file, &SourceFile::reopen(&file.path, file.identity)?)
}

fn read_opened(checkpoint: &Checkpoint, id: FileId, file: &CheckpointFile, source: &SourceFile) -> Result<FileSums> {
    let mut sha256 = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut sums = FileSums { expected: blob_name(&file.path), ..FileSums::default() };

    let mut position = 0;
    let mut advance = |to: u64, mut digest: Option<&mut Digest>| -> Result<()> {
        let start = position;
        while position < to {
            let want = usize::try_from(to - position).unwrap_or(CHUNK).min(CHUNK);
            source.read_exact_at(&mut chunk[..want], position)?;
            sha256.update(&chunk[..want]);
            if let Some(digest) = &mut digest {
                digest.add(position - start, &chunk[..want]);
            }
            position += want as u64;
        }
        Ok(())
    };
    for tensor in tensors_of(checkpoint, id) {
        // The header, or a tensor that the index leaves out: none of the checkpoint's, but in the file's sha256.
        advance(tensor.start, None)?;
        let mut digest = Digest::default();
        advance(tensor.end, Some(&mut digest)).map_err(|error| error.with_tensor(&tensor.name))?;
        sums.tensors.push((tensor.name.clone(), digest.value()));
    }
    advance(file.identity.size, None)?;
    source.verify_identity(file.identity)?;
    SourceFile::verify_path(&file.path, file.identity)?;
    sums.sha256 = sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    match &sums.expected {
        Some(expected) if *expected != sums.sha256 => {
            let error = Error::new(ErrorKind::Mismatch, "sha256 differs from the name of the blob");
            Err(error.with_file(&file.path).with_expected(expected, &sums.sha256))
        }
        _ => Ok(sums),
    }
}

/// The tensors of a file. All are sorted by file: to look through them for each would take files times tensors.
fn tensors_of(checkpoint: &Checkpoint, id: FileId) -> &[TensorMeta] {
    let tensors = checkpoint.tensors();
    let from = tensors.partition_point(|tensor| tensor.file < id);
    &tensors[from..][..tensors[from..].partition_point(|tensor| tensor.file == id)]
}

/// What the file is called in the Hugging Face cache, if that is a sha256.
fn blob_name(path: &Path) -> Option<String> {
    let real = path.canonicalize().ok()?;
    let name = real.file_name()?.to_str()?;
    let sha256 = name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    sha256.then(|| name.to_owned())
}

/// Large enough to keep storage busy, small enough to stay in the cache while two sums are formed.
const CHUNK: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::time::SystemTime;

    use super::*;

    /// A file of one tensor with this many zeros, and its checkpoint.
    fn model(folder: &Path, bytes: u64) -> Checkpoint {
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
        let path = folder.join("model.safetensors");
        fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(8 + header.len() as u64 + bytes).unwrap();
        Checkpoint::open(&path).unwrap()
    }

    fn kind(checkpoint: &Checkpoint) -> ErrorKind {
        read(checkpoint, FileId(0), &checkpoint.files()[0]).err().unwrap().kind()
    }

    #[test]
    fn a_file_that_is_another_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = model(folder.path(), 100);
        let path = &checkpoint.files()[0].path;
        read(&checkpoint, FileId(0), &checkpoint.files()[0]).unwrap();
        let copy = folder.path().join("copy");
        fs::copy(path, &copy).unwrap();
        fs::rename(&copy, path).unwrap();
        assert_eq!(kind(&checkpoint), ErrorKind::Changed);
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
        assert_eq!(kind(&checkpoint), ErrorKind::Changed);
    }

    #[test]
    fn a_file_that_is_touched_while_it_is_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = model(folder.path(), 100);
        let file = &checkpoint.files()[0];
        let source = SourceFile::reopen(&file.path, file.identity).unwrap();
        let read = || read_opened(&checkpoint, FileId(0), file, &source);
        read().unwrap();
        OpenOptions::new().write(true).open(&file.path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(read().err().unwrap().kind(), ErrorKind::Changed);
    }
}
