//! Tiny checkpoints with random bytes, and what each rank should hold, by index arithmetic.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

/// A tensor of a test model: name, shape of 16-bit elements, bytes.
pub(crate) struct TestTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// How a test divides a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    Whole,
    Rows,
    Columns,
}

/// How the test model's tensors are divided, by their names.
pub(crate) fn cut_of(name: &str) -> Cut {
    match name {
        name if name.ends_with("rows") => Cut::Rows,
        name if name.ends_with("columns") => Cut::Columns,
        _ => Cut::Whole,
    }
}

/// The rules that [`cut_of`] stands for.
pub(crate) const RULES: &str = r#"
rule = [
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**", replicate = true },
]
"#;

/// Writes a model of two files, with tensors large enough for direct reads and small enough for cut ones.
pub(crate) fn write(folder: &Path, seed: u64) -> Vec<TestTensor> {
    let mut random = seed;
    let mut tensors = Vec::new();
    let shapes: &[(&str, &[usize])] = &[
        ("a.rows", &[48, 24]),
        ("b.columns", &[24, 48]),
        ("c.whole", &[7, 5]),
        ("d.rows", &[1536, 1024]),
        ("e.columns", &[768, 1536]),
        ("f.whole", &[1000, 333]),
        ("g.columns", &[24, 96000]),
        ("h.scalar", &[]),
        ("i.empty", &[0, 4]),
        ("j.rows", &[24, 3, 5]),
    ];
    for &(name, shape) in shapes {
        let elements: usize = shape.iter().product();
        let bytes = (0..elements * 2).map(|_| next(&mut random) as u8).collect();
        tensors.push(TestTensor { name: name.into(), shape: shape.into(), bytes });
    }
    for (file, part) in [("one", &tensors[..5]), ("two", &tensors[5..])] {
        let views: BTreeMap<&str, TensorView<'_>> = part
            .iter()
            .map(|t| (t.name.as_str(), TensorView::new(Dtype::BF16, t.shape.clone(), &t.bytes).unwrap()))
            .collect();
        safetensors::serialize_to_file(views, None, &folder.join(format!("{file}.safetensors"))).unwrap();
    }
    tensors
}

/// The bytes of `rank` of `ranks`.
pub(crate) fn expected(tensor: &TestTensor, rank: usize, ranks: usize) -> Vec<u8> {
    let part = |size: usize| (size / ranks * rank, size / ranks * (rank + 1));
    let row: usize = tensor.shape.iter().skip(1).product::<usize>() * 2;
    match cut_of(&tensor.name) {
        Cut::Whole => tensor.bytes.clone(),
        Cut::Rows => {
            let (from, to) = part(tensor.shape[0]);
            tensor.bytes[from * row..to * row].to_vec()
        }
        Cut::Columns => {
            let (from, to) = part(tensor.shape[1]);
            (0..tensor.shape[0]).flat_map(|i| &tensor.bytes[i * row..][from * 2..to * 2]).copied().collect()
        }
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}
