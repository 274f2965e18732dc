//! Models of tensors of these shapes, with bytes that nothing but the shapes says.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

/// A tensor's name, type and shape.
pub(crate) type Shape<'a> = (&'a str, Dtype, &'a [usize]);

/// Writes files of these tensors, without their ending, whose pages are clean: such can be forgotten.
pub(crate) fn write(folder: &Path, files: &[(&str, &[Shape<'_>])]) {
    let mut state = 7u32;
    let mut bytes = |count: usize| -> Vec<u8> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..count).map(next).collect()
    };
    for (file, tensors) in files {
        let width = |dtype| match dtype {
            Dtype::F32 => 4,
            Dtype::BF16 => 2,
            Dtype::U8 => 1,
            other => unreachable!("no test has tensors of {other:?}"),
        };
        let data: BTreeMap<&str, (Dtype, &[usize], Vec<u8>)> = tensors
            .iter()
            .map(|&(name, dtype, shape)| (name, (dtype, shape, bytes(shape.iter().product::<usize>() * width(dtype)))))
            .collect();
        let views = data
            .iter()
            .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        let path = folder.join(format!("{file}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
    }
}
