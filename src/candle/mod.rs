//! Weights for models of candle: loaded tensors become candle's without another copy, and builders hand them to a model
//! by name.
//!
//! A tensor of host memory that was loaded with [`Memory::PerTensor`](crate::Memory::PerTensor) is a vector of the
//! global allocator already, which candle's takes over. Other memory of the host is copied once, since candle can own
//! nothing else. Feature `candle-cuda` takes over memory of GPUs in the same way.
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use shardlift::{Checkpoint, Loader, Memory, Plan, Rank, Rules, World, candle};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("/models/all-MiniLM-L6-v2")?;
//! let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1))?;
//! let (mut weights, _) = Loader::new().memory(Memory::PerTensor).load(&plan)?;
//! let builder = candle::var_builder(&mut weights, Rank(0), DType::F32, &Device::Cpu)?;
//! let embeddings = builder.pp("embeddings.word_embeddings").get((30522, 384), "weight")?;
//! # Ok(())
//! # }
//! ```
//!
//! # Element types
//!
//! All that candle has map: `U8`, `U32`, `I16`, `I32`, `I64`, `BF16`, `F16`, `F32`, `F64`, `F8_E4M3`, and as bytes that it
//! does not compute with `F4`, `F6_E2M3`, `F6_E3M2` and `F8_E8M0`. Like candle's own loader `U16` becomes `U32`. A tensor of
//! another type (`BOOL`, `I8`, `U64`, `C64`, `F8_E5M2`, the `FNUZ` types) loads like all others, and is an error only
//! where it is asked for as a tensor of candle: [`bytes`] gives what it consists of, as `U8`.

mod builder;
#[cfg(feature = "candle-cuda")]
mod cuda;

use std::borrow::Cow;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::place;
use crate::place::Element;

pub use builder::{Shard, Sharded, ShardedVarBuilder, sharded_var_builder, var_builder};

// SAFETY: a transparent wrapper of a byte, of which every value is a number of the type.
unsafe impl Element for float8::F8E4M3 {
    const DTYPES: &'static [Dtype] = &[Dtype::F8E4M3];
}

/// candle's name of an element type, if it has one. It has none of `U16`, of which [`tensor`] makes `U32`.
pub fn dtype(of: Dtype) -> Option<DType> {
    Some(match of {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F8E4M3 => DType::F8E4M3,
        Dtype::F6E2M3 => DType::F6E2M3,
        Dtype::F6E3M2 => DType::F6E3M2,
        Dtype::F4 => DType::F4,
        Dtype::F8E8M0 => DType::F8E8M0,
        Dtype::Bool
        | Dtype::I8
        | Dtype::U16
        | Dtype::U64
        | Dtype::C64
        | Dtype::F8E5M2
        | Dtype::F8E4M3Fnuz
        | Dtype::F8E5M2Fnuz => return None,
    })
}

/// A tensor of candle's on this device: without a copy if it is there already and nobody else has the memory.
///
/// # Errors
/// An element type that candle has not; a GPU that refuses; memory of a GPU that is of another than `device`, or that
/// candle cannot own because it was not loaded with [`Memory::PerTensor`](crate::Memory::PerTensor).
pub fn tensor(tensor: place::Tensor, device: &Device) -> Result<Tensor> {
    check_dtype(&tensor)?;
    #[cfg(feature = "candle-cuda")]
    let tensor = match cuda::tensor(tensor, device)? {
        cuda::Taken::Made(made) => return Ok(made),
        cuda::Taken::OfHost(tensor) => tensor,
    };
    let shape: Vec<usize> = tensor.shape().iter().map(|&size| size as usize).collect();
    let storage = match tensor.dtype() {
        Dtype::U16 => CpuStorage::U32(vector::<u16>(tensor)?.into_iter().map(u32::from).collect()),
        Dtype::U8 => CpuStorage::U8(vector(tensor)?),
        Dtype::U32 => CpuStorage::U32(vector(tensor)?),
        Dtype::I16 => CpuStorage::I16(vector(tensor)?),
        Dtype::I32 => CpuStorage::I32(vector(tensor)?),
        Dtype::I64 => CpuStorage::I64(vector(tensor)?),
        Dtype::Bf16 => CpuStorage::BF16(vector::<bf16>(tensor)?),
        Dtype::F16 => CpuStorage::F16(vector::<f16>(tensor)?),
        Dtype::F32 => CpuStorage::F32(vector(tensor)?),
        Dtype::F64 => CpuStorage::F64(vector(tensor)?),
        Dtype::F8E4M3 => CpuStorage::F8E4M3(vector(tensor)?),
        Dtype::F6E2M3 => CpuStorage::F6E2M3(vector(tensor)?),
        Dtype::F6E3M2 => CpuStorage::F6E3M2(vector(tensor)?),
        Dtype::F4 => CpuStorage::F4(vector(tensor)?),
        Dtype::F8E8M0 => CpuStorage::F8E8M0(vector(tensor)?),
        other => unreachable!("bug in shardlift: candle has no {other}"),
    };
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false).to_device(device)
}

/// Refuses element types that candle has not.
fn check_dtype(tensor: &place::Tensor) -> Result<()> {
    let of = tensor.dtype();
    if dtype(of).is_none() && of != Dtype::U16 {
        candle_core::bail!(
            "tensor {} (rank {}): candle has no elements of type {of}; shardlift::candle::bytes gives its bytes",
            tensor.name(),
            tensor.rank()
        );
    }
    Ok(())
}

/// The bytes of a tensor of any element type, as `U8` in host memory.
///
/// # Errors
/// A GPU that refuses.
pub fn bytes(tensor: place::Tensor) -> Result<Tensor> {
    let bytes: Vec<u8> = vector(tensor)?;
    let count = bytes.len();
    Tensor::from_vec(bytes, count, &Device::Cpu)
}

/// Its elements as a vector: the memory itself if that can be, else a copy. `T` has the size of an element, or is a byte.
fn vector<T: Element>(tensor: place::Tensor) -> Result<Vec<T>> {
    let tensor = match tensor.try_into_vec() {
        Ok(vector) => return Ok(vector),
        Err((tensor, _)) => tensor,
    };
    let bytes: Cow<'_, [u8]> = tensor.to_bytes().map_err(wrapped)?;
    let count = bytes.len() / size_of::<T>();
    let mut copy: Vec<T> = Vec::with_capacity(count);
    // SAFETY: the vector has room for as many elements, the bytes of any are one (`Element`), and they do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.as_mut_ptr().cast::<u8>(), count * size_of::<T>());
        copy.set_len(count);
    }
    Ok(copy)
}

/// An error of ours as candle's.
fn wrapped(error: crate::error::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}
