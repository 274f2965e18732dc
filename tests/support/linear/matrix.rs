//! Tensors in f64, and what quantised ones stand for: plain dequantisers, from the formats' definitions.

use std::collections::BTreeMap;

use shardlift::Dtype;

use crate::released::Scheme;
use crate::transform::element;

/// A tensor's elements, integers as they lie in memory without a sign.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    pub(crate) dims: Vec<u64>,
    pub(crate) values: Vec<f64>,
}

/// The tensors of a module, by what follows its name.
pub(crate) type Parts = BTreeMap<String, Matrix>;

impl Matrix {
    pub(crate) fn decode(dtype: Dtype, dims: &[u64], bytes: &[u8]) -> Matrix {
        let size = dtype.bits() as usize / 8;
        let value = |bytes: &[u8]| match dtype {
            Dtype::Bf16 | Dtype::F16 | Dtype::F32 | Dtype::F8E4M3 => {
                f64::from(f32::from_le_bytes(element(dtype, Dtype::F32, bytes)[..].try_into().unwrap()))
            }
            Dtype::U8 => f64::from(bytes[0]),
            Dtype::I32 => f64::from(u32::from_le_bytes(bytes.try_into().unwrap())),
            Dtype::I64 => u64::from_le_bytes(bytes.try_into().unwrap()) as f64,
            other => panic!("no value of {other}"),
        };
        Matrix { dims: dims.to_vec(), values: bytes.chunks_exact(size).map(value).collect() }
    }

    /// [rows, columns] with elements that `value` says.
    fn of(rows: u64, columns: u64, value: impl Fn(u64, u64) -> f64) -> Matrix {
        let values = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        Matrix { dims: vec![rows, columns], values: values.map(|(row, column)| value(row, column)).collect() }
    }

    fn at(&self, row: u64, column: u64) -> f64 {
        self.values[(row * self.dims[1] + column) as usize]
    }

    /// The nibble of a packed element.
    fn nibble(&self, row: u64, column: u64, nibble: u64) -> f64 {
        ((self.at(row, column) as u32 >> (4 * nibble)) & 15).into()
    }

    /// These indices of a dimension.
    pub(crate) fn take(&self, dim: usize, indices: &[u64]) -> Matrix {
        let inner: usize = self.dims[dim + 1..].iter().product::<u64>() as usize;
        let block = self.dims[dim] as usize * inner;
        let outer = self.values.chunks_exact(block.max(1));
        let values = outer.flat_map(|block| {
            indices.iter().flat_map(move |&index| &block[index as usize * inner..(index as usize + 1) * inner])
        });
        let mut dims = self.dims.clone();
        let values = values.copied().collect();
        dims[dim] = indices.len() as u64;
        Matrix { dims, values }
    }

    /// The product with a vector over a dimension.
    pub(crate) fn times(&self, dim: usize, vector: &[f64]) -> Matrix {
        assert_eq!(self.dims[dim], vector.len() as u64, "dimension {dim} of {:?}", self.dims);
        let inner: usize = self.dims[dim + 1..].iter().product::<u64>() as usize;
        let block = vector.len() * inner;
        let mut values = Vec::new();
        for block in self.values.chunks_exact(block.max(1)) {
            values.extend(
                (0..inner).map(|at| vector.iter().enumerate().map(|(i, x)| x * block[i * inner + at]).sum::<f64>()),
            );
        }
        let mut dims = self.dims.clone();
        dims.remove(dim);
        Matrix { dims, values }
    }

    /// The sum with another of the same shape.
    pub(crate) fn plus(&self, other: &Matrix) -> Matrix {
        assert_eq!(self.dims, other.dims);
        let values = self.values.iter().zip(&other.values).map(|(a, b)| a + b).collect();
        Matrix { dims: self.dims.clone(), values }
    }

    /// The same elements in another shape.
    pub(crate) fn viewed(mut self, dims: &[u64]) -> Matrix {
        assert_eq!(self.values.len() as u64, dims.iter().product::<u64>());
        self.dims = dims.to_vec();
        self
    }
}

/// What a module's tensors stand for, [out, in]; `None` if they are of no linear layer.
pub(crate) fn dequantised(scheme: Scheme, parts: &Parts) -> Option<Matrix> {
    let part = |name: &str| parts.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", parts.keys()));
    let quantised = ["qweight", "weight_packed", "weight_scale", "weight_scale_inv"];
    if !quantised.iter().any(|name| parts.contains_key(*name)) {
        return parts.get("weight").cloned();
    }
    Some(match scheme {
        Scheme::Gptq { act_order, .. } => {
            let [weight, zeros, scales, groups] = ["qweight", "qzeros", "scales", "g_idx"].map(part);
            // A shard's groups in order are relative to its first; its activation order names those of the whole.
            let first = if act_order { 0.0 } else { groups.values.iter().copied().fold(f64::INFINITY, f64::min) };
            Matrix::of(weight.dims[1], 8 * weight.dims[0], |n, k| {
                let group = (groups.values[k as usize] - first) as u64;
                let zero = zeros.nibble(group, n / 8, n % 8) + 1.0;
                scales.at(group, n) * (weight.nibble(k / 8, n, k % 8) - zero)
            })
        }
        Scheme::Awq { group } => {
            let [weight, zeros, scales] = ["qweight", "qzeros", "scales"].map(part);
            // Where AutoAWQ's GEMM puts output 0, 1, 2... of eight.
            let place = [0, 4, 1, 5, 2, 6, 3, 7];
            Matrix::of(8 * weight.dims[1], weight.dims[0], |n, k| {
                let place = place[n as usize % 8];
                scales.at(k / group, n) * (weight.nibble(k, n / 8, place) - zeros.nibble(k / group, n / 8, place))
            })
        }
        Scheme::Packed { group, symmetric } => {
            let [weight, scales] = ["weight_packed", "weight_scale"].map(part);
            Matrix::of(weight.dims[0], 8 * weight.dims[1], |n, k| {
                let zero = if symmetric { 8.0 } else { part("weight_zero_point").nibble(n / 8, k / group, n % 8) };
                scales.at(n, k / group) * (weight.nibble(n, k / 8, k % 8) - zero)
            })
        }
        Scheme::Fp8Tensor => {
            let scale = part("weight_scale").values[0];
            let weight = part("weight");
            Matrix::of(weight.dims[0], weight.dims[1], |n, k| weight.at(n, k) * scale)
        }
        Scheme::Fp8Channel | Scheme::Fbgemm { .. } => {
            let [weight, scales] = ["weight", "weight_scale"].map(part);
            Matrix::of(weight.dims[0], weight.dims[1], |n, k| weight.at(n, k) * scales.at(n, 0))
        }
        Scheme::Fp8Block { size } => {
            let [weight, scales] = ["weight", "weight_scale_inv"].map(part);
            assert_eq!(scales.dims, [weight.dims[0].div_ceil(size), weight.dims[1].div_ceil(size)]);
            Matrix::of(weight.dims[0], weight.dims[1], |n, k| weight.at(n, k) * scales.at(n / size, k / size))
        }
        Scheme::Nvfp4 { .. } => {
            let [weight, scales] = ["weight", "weight_scale"].map(part);
            let whole = part("weight_scale_2").values[0];
            Matrix::of(weight.dims[0], 2 * weight.dims[1], |n, k| e2m1(weight, n, k) * scales.at(n, k / 16) * whole)
        }
        Scheme::Nvfp4Packed => {
            let [weight, scales] = ["weight_packed", "weight_scale"].map(part);
            let whole = part("weight_global_scale").values[0];
            Matrix::of(weight.dims[0], 2 * weight.dims[1], |n, k| e2m1(weight, n, k) * scales.at(n, k / 16) / whole)
        }
        Scheme::Mxfp8 => {
            let [weight, scales] = ["weight", "weight_scale"].map(part);
            Matrix::of(weight.dims[0], weight.dims[1], |n, k| weight.at(n, k) * e8m0(scales.at(n, k / 32)))
        }
        Scheme::None | Scheme::Nf4 => panic!("{scheme:?} has none of these"),
    })
}

/// MXFP4 as gpt-oss stores it: blocks [.., in / 32, 16] and their scales, to [.., in].
pub(crate) fn mxfp4(blocks: &Matrix, scales: &Matrix) -> Matrix {
    let [outer @ .., count, 16] = &blocks.dims[..] else { panic!("blocks of {:?}", blocks.dims) };
    assert_eq!(scales.dims, [outer, &[*count]].concat());
    let rows = blocks.values.len() as u64 / 16;
    let flat = blocks.clone().viewed(&[rows, 16]);
    let values = Matrix::of(rows, 32, |block, k| e2m1(&flat, block, k) * e8m0(scales.values[block as usize]));
    values.viewed(&[outer, &[count * 32]].concat())
}

/// A 4-bit float of which a byte has two, the first one below.
fn e2m1(bytes: &Matrix, row: u64, column: u64) -> f64 {
    let bits = bytes.nibble(row, column / 2, column % 2) as usize;
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][bits % 8];
    if bits < 8 { magnitude } else { -magnitude }
}

/// A power of two.
fn e8m0(bits: f64) -> f64 {
    (bits - 127.0).exp2()
}
