//! A LoRA adapter of a model, as PEFT writes it: one more file of the checkpoint.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::index::rule;
use super::open::{File, name_table, read_header, read_whole};
use super::{Checkpoint, Inner, TensorMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::FileId;
use crate::limits;

pub(super) fn with_adapter(model: &Checkpoint, dir: &Path) -> Result<Checkpoint> {
    if let Some(rank) = model.partition_of() {
        let what = format!("this is the partition of rank {rank} already: divide the whole model with its adapter");
        return Err(Error::new(ErrorKind::Usage, what).with_rule("adapter").with_file(model.path()));
    }
    if let Some(other) = model.adapter_config() {
        return Err(Error::new(ErrorKind::Usage, "the model has an adapter already")
            .with_rule("adapter")
            .with_file(other));
    }
    let adapter_config = lora(dir.join(CONFIG))?;
    let path = dir.join(WEIGHTS);
    if let Some(other) = model.files().iter().find(|file| file.name == WEIGHTS) {
        return Err(rule("adapter-is-model", "a file of the model has the adapter's name")
            .with_expected("another", other.path.display())
            .with_file(path));
    }
    let (identity, header) = read_header(&path, &mut Vec::new())?;
    let Inner { path: of, files, tensors, config, warnings, .. } = &*model.inner;
    let (mut files, mut tensors, mut warnings) = (files.clone(), tensors.clone(), warnings.clone());
    let added = File::new(FileId(files.len() as u32), WEIGHTS.to_owned(), path, identity, header);
    warnings.extend(added.warnings);
    let first = tensors.len();
    tensors.extend(added.tensors);
    files.push(added.file);
    let names = name_table(&files, &tensors)?;
    check_pairs(&tensors[first..]).map_err(|error| error.with_file(dir.join(WEIGHTS)))?;
    let (path, config, adapter_config) = (of.clone(), config.clone(), Some(adapter_config));
    Ok(Checkpoint { inner: Arc::new(Inner { path, files, tensors, names, config, adapter_config, warnings }) })
}

/// Refuses a factor without the other, and two that do not meet in one rank.
fn check_pairs(tensors: &[TensorMeta]) -> Result<()> {
    let named: HashMap<&str, &TensorMeta> = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let pairs = [(".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")];
    for tensor in tensors {
        for (a, b) in pairs {
            let is_a = tensor.name.ends_with(a);
            let (mine, other) = if is_a { (a, b) } else { (b, a) };
            let Some(module) = tensor.name.strip_suffix(mine) else { continue };
            let wrong = |what, expected: &dyn Display, found: &dyn Display| {
                rule("adapter", what).with_expected(expected, found).with_tensor(tensor.name.as_str())
            };
            let [rows, columns] = *tensor.shape.dims() else {
                return Err(wrong("a factor is no matrix", &"2 dimensions", &tensor.shape));
            };
            let name = format!("{module}{other}");
            let Some(other) = named.get(name.as_str()) else {
                return Err(wrong("a factor without the other", &format!("`{name}` beside it"), &"no such tensor"));
            };
            let &[first, ..] = other.shape.dims() else { continue };
            if !is_a && columns != first {
                let expected = format!("[{rows},{first}], the rank of `{name}`");
                return Err(wrong("factors are of different ranks", &expected, &tensor.shape));
            }
        }
    }
    Ok(())
}

/// Refuses a configuration of what is more than factors, or something else. The path of one that is neither.
fn lora(path: PathBuf) -> Result<PathBuf> {
    let config: Value = serde_json::from_slice(&read_whole(&path, limits::CONFIG_MAX)?)
        .map_err(|error| rule("adapter-config-not-json", "not json").with_expected("json", error).with_file(&path))?;
    let unsupported = |what: &str, expected: &str, found: &Value| {
        Error::new(ErrorKind::Unsupported, what)
            .with_rule("adapter")
            .with_expected(expected, found)
            .with_file(path.as_path())
    };
    let of = |key: &str| config.get(key).unwrap_or(&Value::Null);
    match (of("peft_type"), of("modules_to_save")) {
        (kind, _) if kind.as_str() != Some("LORA") => {
            Err(unsupported("adapter is of another method: peft_type", "\"LORA\"", kind))
        }
        (_, whole) if !whole.is_null() && whole.as_array().is_none_or(|whole| !whole.is_empty()) => Err(unsupported(
            "adapter replaces whole modules of the model: modules_to_save",
            "none, with their weights merged into the model",
            whole,
        )),
        _ => Ok(path),
    }
}

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
