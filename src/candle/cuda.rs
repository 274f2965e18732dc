//! Memory of GPUs for candle: a tensor that was loaded with an allocation of its own is what a `CudaSlice` frees.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{Device, Result, Storage, Tensor};
use float8::F8E4M3;
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::place;

/// What became of a tensor.
pub(super) enum Taken {
    Made(Tensor),
    /// It is in host memory, or goes there.
    OfHost(place::Tensor),
}

/// Takes the memory of a GPU over, unless that is not what is asked for.
pub(super) fn tensor(tensor: place::Tensor, device: &Device) -> Result<Taken> {
    let (Some(gpu), Device::Cuda(cuda)) = (tensor.gpu(), device) else { return Ok(Taken::OfHost(tensor)) };
    if tensor.dtype() == Dtype::U16 {
        return Ok(Taken::OfHost(tensor)); // candle has it as U32
    }
    let stream = cuda.cuda_stream();
    let whose = format!("tensor {} (rank {})", tensor.name(), tensor.rank());
    if stream.context().ordinal() != gpu as usize {
        candle_core::bail!("{whose}: it is on cuda:{gpu}, not on cuda:{}", stream.context().ordinal());
    }
    let (dtype, bytes) = (tensor.dtype(), tensor.nbytes());
    let shape: Vec<usize> = tensor.shape().iter().map(|&size| size as usize).collect();
    // A slice has events, and making one of a device that is lost is an error here, and a panic there.
    drop(stream.context().new_event(None).map_err(candle_core::Error::wrap)?);
    let Ok(address) = tensor.into_gpu_memory() else {
        candle_core::bail!("{whose}: memory that others share cannot become candle's; load with Memory::PerTensor");
    };
    /// A slice of the memory.
    macro_rules! slice {
        ($type:ty) => {{
            // SAFETY: the memory is of `cuMemAllocAsync` where the device has that, else of `cuMemAlloc`, which is how
            // cudarc frees it; complete for every stream, large enough, and nobody else's any more.
            let slice: CudaSlice<$type> = unsafe { stream.upgrade_device_ptr(address, bytes / size_of::<$type>()) };
            slice
        }};
    }
    let slice = match dtype {
        Dtype::U8 => CudaStorageSlice::U8(slice!(u8)),
        Dtype::U32 => CudaStorageSlice::U32(slice!(u32)),
        Dtype::I16 => CudaStorageSlice::I16(slice!(i16)),
        Dtype::I32 => CudaStorageSlice::I32(slice!(i32)),
        Dtype::I64 => CudaStorageSlice::I64(slice!(i64)),
        Dtype::Bf16 => CudaStorageSlice::BF16(slice!(bf16)),
        Dtype::F16 => CudaStorageSlice::F16(slice!(f16)),
        Dtype::F32 => CudaStorageSlice::F32(slice!(f32)),
        Dtype::F64 => CudaStorageSlice::F64(slice!(f64)),
        Dtype::F8E4M3 => CudaStorageSlice::F8E4M3(slice!(F8E4M3)),
        Dtype::F6E2M3 => CudaStorageSlice::F6E2M3(slice!(u8)),
        Dtype::F6E3M2 => CudaStorageSlice::F6E3M2(slice!(u8)),
        Dtype::F4 => CudaStorageSlice::F4(slice!(u8)),
        Dtype::F8E8M0 => CudaStorageSlice::F8E8M0(slice!(u8)),
        other => unreachable!("bug in shardlift: candle has no {other}"),
    };
    let storage = Storage::Cuda(CudaStorage { slice, device: cuda.clone() });
    Ok(Taken::Made(Tensor::from_storage(storage, shape, BackpropOp::none(), false)))
}
