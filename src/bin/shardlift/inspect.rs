//! `shardlift inspect`: what is in a checkpoint, from its headers.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use shardlift::checkpoint::TensorMeta;
use shardlift::{Checkpoint, Dtype};

use crate::args::{InspectArgs, Sort};
use crate::model;
use crate::output::{Failure, Output, count, fields, human_bytes};

pub(crate) fn run(args: &InspectArgs, output: &mut Output) -> Result<Map<String, Value>, Failure> {
    let InspectArgs { model, filter, sort, json: _ } = args;
    let checkpoint = model::open(model)?;
    output.warn(checkpoint.warnings());
    let mut tensors: Vec<&TensorMeta> = checkpoint.tensors().iter().collect();
    if let Some(pattern) = filter {
        let names = model::matching(&checkpoint, pattern)?;
        tensors.retain(|tensor| names.contains(&tensor.name));
    }
    match sort {
        Sort::Name => tensors.sort_by(|a, b| a.name.cmp(&b.name)),
        Sort::Size => tensors.sort_by(|a, b| b.bytes().cmp(&a.bytes()).then_with(|| a.name.cmp(&b.name))),
        Sort::Offset => {} // the order of the checkpoint
    }
    print(&checkpoint, &tensors, output);
    Ok(object(&checkpoint, &tensors))
}

fn print(checkpoint: &Checkpoint, tensors: &[&TensorMeta], output: &mut Output) {
    let width = tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
    for tensor in tensors {
        let size = human_bytes(tensor.bytes());
        output.line(format_args!("{:width$}  {:8} {:>14}  {size:>10}", tensor.name, tensor.dtype, tensor.shape));
    }
    let mut dtypes: BTreeMap<Dtype, (usize, u64)> = BTreeMap::new();
    for tensor in tensors {
        let (number, bytes) = dtypes.entry(tensor.dtype).or_default();
        *number += 1;
        *bytes += tensor.bytes();
    }
    for (dtype, (number, bytes)) in dtypes {
        output.line(format_args!("{dtype}: {}, {}", count(number, "tensor"), human_bytes(bytes)));
    }
    let (files, all) = (count(checkpoint.files().len(), "file"), checkpoint.tensors().len());
    let bytes = checkpoint.bytes();
    output.line(format_args!("{files}, {}, {} ({bytes} bytes)", count(all, "tensor"), human_bytes(bytes)));
    if tensors.len() != all {
        output.line(format_args!("matching: {}", count(tensors.len(), "tensor")));
    }
}

fn object(checkpoint: &Checkpoint, tensors: &[&TensorMeta]) -> Map<String, Value> {
    let files: Vec<Value> = checkpoint
        .files()
        .iter()
        .map(|file| {
            let metadata: Map<String, Value> =
                file.metadata.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
            json!({
                "name": file.name,
                "bytes": file.identity.size,
                "data_start": file.data_start,
                "metadata": metadata,
            })
        })
        .collect();
    let tensors: Vec<Value> = tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name,
                "dtype": tensor.dtype.name(),
                "shape": tensor.shape.dims(),
                "bytes": tensor.bytes(),
                "file": checkpoint.file(tensor.file).name,
                "file_offset": tensor.start,
            })
        })
        .collect();
    fields(json!({
        "path": checkpoint.path().to_string_lossy(),
        "checkpoint_bytes": checkpoint.bytes(),
        "files": files,
        "tensors": tensors,
    }))
}
