//! Loads by candle to its CPU device: whole tensors from mapped files, parts through its sharded builder, as engines on
//! candle do it.

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use candle_nn::var_builder::{Shard, ShardedSafeTensors};
use compare_protocol::{Failure, Part, Task, serve};

fn main() -> Result<(), Failure> {
    serve(load, parts)
}

struct Loaded {
    tensors: Vec<(usize, String, Tensor)>,
    /// Mapped until the end, as in an engine.
    _files: MmapedSafetensors,
}

fn load(task: &Task) -> Result<Loaded, Failure> {
    if task.loader != "candle" {
        return Err(format!("unknown loader {}", task.loader).into());
    }
    // SAFETY: nobody changes the files while scripts/compare/run measures.
    let files = unsafe { MmapedSafetensors::multi(&task.files) }?;
    let views = files.tensors();
    let mut tensors = Vec::with_capacity(views.len() * task.ranks.len());
    if task.world == 1 {
        for (name, _) in &views {
            tensors.push((0, name.clone(), files.load(name, &Device::Cpu)?));
            if task.first {
                break;
            }
        }
    } else {
        // SAFETY: as above.
        let builder = unsafe { ShardedSafeTensors::var_builder(&task.files, DType::BF16, &Device::Cpu) }?;
        for (name, view) in &views {
            for &rank in &task.ranks {
                let shard = match task.cuts.get(name) {
                    Some(&dim) => Shard { dim, rank, world_size: task.world },
                    None => Shard::default(),
                };
                let dtype = DType::try_from(view.dtype())?;
                let tensor = builder.get_with_hints_dtype(view.shape(), name, shard, dtype)?;
                tensors.push((rank, name.clone(), tensor));
            }
        }
    }
    Ok(Loaded { tensors, _files: files })
}

fn parts(loaded: &Loaded) -> Result<Vec<Part<'_>>, Failure> {
    let part = |(rank, name, tensor): &(usize, String, Tensor)| {
        let (storage, layout) = tensor.storage_and_layout();
        let (address, size) = match &*storage {
            Storage::Cpu(CpuStorage::BF16(values)) => (values.as_ptr().cast::<u8>(), size_of_val(values.as_slice())),
            Storage::Cpu(CpuStorage::F32(values)) => (values.as_ptr().cast::<u8>(), size_of_val(values.as_slice())),
            _ => return Err(format!("{name} is neither BF16 nor F32 in host memory").into()),
        };
        if !layout.is_contiguous()
            || layout.start_offset() != 0
            || size != tensor.elem_count() * tensor.dtype().size_in_bytes()
        {
            return Err(format!("{name} is a view").into());
        }
        // SAFETY: the storage belongs to the tensor, which `loaded` keeps, and nobody asks for it in order to write.
        let bytes = unsafe { std::slice::from_raw_parts(address, size) };
        let shape = tensor.dims().iter().map(|&dim| dim as u64).collect();
        Ok(Part { rank: *rank, name: name.clone(), shape, bytes })
    };
    loaded.tensors.iter().map(part).collect()
}
