//! Checkpoints of which only the names, types and shapes matter.

use safetensors::tensor::TensorView;
use serde_json::json;
use shardlift::{Checkpoint, Dtype};

/// A checkpoint of tiny tensors of these names and types.
pub(crate) fn tiny(tensors: &[(&str, Dtype, &[u64])]) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [0; 64];
    let views = tensors.iter().map(|&(name, dtype, dims)| {
        let data = &bytes[..dtype.bytes_of(dims.iter().product()).unwrap() as usize];
        let shape: Vec<usize> = dims.iter().map(|&dim| dim as usize).collect();
        let dtype = serde_json::from_value(json!(dtype.name())).unwrap();
        (name, TensorView::new(dtype, shape, data).unwrap())
    });
    std::fs::write(folder.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}
