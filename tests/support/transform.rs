//! What casts and permutations make of a tensor, element by element. Shares no code with the crate but the names of
//! types.
#![allow(dead_code, reason = "each test uses its own part")]

use half::{bf16, f16};
use shardlift::Dtype;
use smallvec::SmallVec;

/// A tensor as a file has it.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) dtype: Dtype,
    pub(crate) dims: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

/// What one rank should hold of it.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) dtype: Dtype,
    pub(crate) dims: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

impl Source {
    /// A tensor of random bits, so also of infinities and NaN.
    pub(crate) fn random(dtype: Dtype, dims: &[u64]) -> Source {
        let elements: u64 = dims.iter().product();
        Source { dtype, dims: dims.into(), bytes: noise((elements * u64::from(dtype.bits()) / 8) as usize) }
    }

    /// Of each dimension `len` indices from `start` on, then the dimensions in `order`, then the type `to`.
    pub(crate) fn part(&self, taken: &[(u64, u64)], order: &[usize], to: Dtype) -> Part {
        let taken: Vec<Vec<u64>> = taken.iter().map(|&(start, len)| (start..start + len).collect()).collect();
        self.part_of(&taken, order, to)
    }

    /// [`part`](Source::part) with any indices.
    pub(crate) fn part_of(&self, taken: &[Vec<u64>], order: &[usize], to: Dtype) -> Part {
        let dims: Vec<u64> = order.iter().map(|&dim| taken[dim].len() as u64).collect();
        let size = self.dtype.bits() as usize / 8;
        let mut bytes = Vec::new();
        let mut index = vec![0; taken.len()];
        for element in 0..dims.iter().product() {
            let mut left: u64 = element;
            for (&dim, &len) in order.iter().zip(&dims).rev() {
                index[dim] = taken[dim][(left % len) as usize];
                left /= len;
            }
            let at = index.iter().zip(&self.dims).fold(0, |at, (index, size)| at * size + index) as usize * size;
            bytes.extend(self::element(self.dtype, to, &self.bytes[at..at + size]));
        }
        Part { dtype: to, dims, bytes }
    }
}

/// One element in another type.
pub(crate) fn element(from: Dtype, to: Dtype, bytes: &[u8]) -> SmallVec<[u8; 8]> {
    if from == to {
        return bytes.into();
    }
    let two = |bytes: &[u8]| u16::from_le_bytes(bytes.try_into().unwrap());
    let wide: f32 = match from {
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::F16 => f16::from_bits(two(bytes)).to_f32(),
        Dtype::Bf16 => bf16::from_bits(two(bytes)).to_f32(),
        Dtype::F8E4M3 => f8(bytes[0], 4),
        Dtype::F8E5M2 => f8(bytes[0], 5),
        other => panic!("no cast of {other}"),
    };
    match to {
        Dtype::F32 => wide.to_bits().to_le_bytes().as_slice().into(),
        Dtype::F16 => f16::from_f32(wide).to_bits().to_le_bytes().as_slice().into(),
        Dtype::Bf16 => bf16::from_f32(wide).to_bits().to_le_bytes().as_slice().into(),
        other => panic!("no cast to {other}"),
    }
}

/// An F8 of so many exponent bits; that of five has infinities.
fn f8(bits: u8, exponent_bits: u32) -> f32 {
    let mantissa_bits = 7 - exponent_bits;
    let mantissa = f32::from(bits & ((1 << mantissa_bits) - 1)) / f32::from(1u8 << mantissa_bits);
    let exponent = i32::from((bits & 0x7F) >> mantissa_bits);
    let bias = (1 << (exponent_bits - 1)) - 1;
    let magnitude = match (exponent_bits, bits & 0x7F) {
        (5, 0x7C) => f32::INFINITY,
        (5, 0x7D..) | (4, 0x7F) => f32::from_bits(0x7FC0_0000),
        _ if exponent == 0 => mantissa * 2f32.powi(1 - bias),
        _ => (1.0 + mantissa) * 2f32.powi(exponent - bias),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Bytes that differ from their neighbours at every stride the tests use.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}
