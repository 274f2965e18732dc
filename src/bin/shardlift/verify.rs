//! `shardlift verify`: every rule of the format and the index; with `--deep`, every byte.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use shardlift::checkpoint::{CheckpointFile, TensorMeta};
use shardlift::{Checkpoint, Digest, Error, ErrorKind, FileId, Result};

use crate::args::VerifyArgs;
use crate::model;
use crate::output::{Failure, Output, fields, hex, human_bytes};

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
            sums = read(&checkpoint, id, file)?;
            match &sums.expected {
                Some(_) => output.line(format_args!("{}: sha256 {} as its blob is named", file.name, sums.sha256)),
                None => output.line(format_args!("{}: sha256 {}", file.name, sums.sha256)),
            }
        }
        let count = checkpoint.tensors().iter().filter(|tensor| tensor.file == id).count();
        files.push(json!({
            "name": file.name,
            "bytes": file.identity.size,
            "tensors": count,
            "sha256": deep.then_some(sums.sha256),
            "sha256_expected": sums.expected,
        }));
        for (tensor, digest) in sums.tensors {
            output.line(format_args!("{}  {tensor}", hex(digest)));
            tensors.push(json!({ "name": tensor, "digest": hex(digest) }));
        }
    }
    let (count, bytes) = (checkpoint.tensors().len(), checkpoint.bytes());
    let read = if *deep { "every byte read" } else { "headers only" };
    output.line(format_args!("ok: {} files, {count} tensors, {} ({read})", files.len(), human_bytes(bytes)));
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

/// Reads a file from start to end, once.
fn read(checkpoint: &Checkpoint, id: FileId, file: &CheckpointFile) -> Result<FileSums, Failure> {
    let failed = |what: &str, error| Failure::started(Error::io(what, &file.path, error));
    let mut reader = File::open(&file.path).map_err(|error| failed("open", error))?;
    let mut sha256 = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut sums = FileSums { expected: blob_name(&file.path), ..FileSums::default() };

    let mut position = 0;
    let mut tensors: Vec<&TensorMeta> = checkpoint.tensors().iter().filter(|tensor| tensor.file == id).collect();
    tensors.sort_by_key(|tensor| tensor.start);
    let mut advance = |mut digest: Option<&mut Digest>, to: u64, tensor: Option<&str>| -> Result<(), Failure> {
        let start = position;
        while position < to {
            let want = usize::try_from(to - position).unwrap_or(CHUNK).min(CHUNK);
            let truncated = || {
                let error = Error::new(ErrorKind::Truncated, "file ended early").with_file(&file.path);
                let error = error.with_bytes(position, to);
                Failure::started(match tensor {
                    Some(tensor) => error.with_tensor(tensor),
                    None => error,
                })
            };
            reader.read_exact(&mut chunk[..want]).map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => truncated(),
                _ => failed("read", error),
            })?;
            sha256.update(&chunk[..want]);
            if let Some(digest) = &mut digest {
                digest.add(position - start, &chunk[..want]);
            }
            position += want as u64;
        }
        Ok(())
    };
    for tensor in tensors {
        // The header, or nothing: the data has no holes.
        advance(None, tensor.start, None)?;
        let mut digest = Digest::default();
        advance(Some(&mut digest), tensor.end, Some(&tensor.name))?;
        sums.tensors.push((tensor.name.clone(), digest.value()));
    }
    // An orphan that the index leaves out is no tensor of the checkpoint, but it is in the file's sha256.
    advance(None, file.identity.size, None)?;
    let end = reader.seek(SeekFrom::End(0)).map_err(|error| failed("seek", error))?;
    if end != file.identity.size {
        let error = Error::new(ErrorKind::Changed, "file changed while it was read").with_file(&file.path);
        return Err(Failure::started(error.with_expected(file.identity.size, end)));
    }
    sums.sha256 = sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    match &sums.expected {
        Some(expected) if *expected != sums.sha256 => {
            let error = Error::new(ErrorKind::Mismatch, "sha256 differs from the name of the blob");
            Err(Failure::started(error.with_file(&file.path).with_expected(expected, &sums.sha256)))
        }
        _ => Ok(sums),
    }
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
