//! Models of candle on weights of ours: every element type, memory that is taken over, and parts, against candle's own
//! loader.
#![cfg(feature = "candle")]

mod support {
    #[allow(dead_code, reason = "other tests use the rest")]
    pub(crate) mod model;
}

use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::{Shard as CandleShard, ShardedSafeTensors};
use safetensors::tensor::TensorView;
use serde_json::json;
use shardlift::candle::{Shard, sharded_var_builder, var_builder};
use shardlift::{Checkpoint, Dtype, ErrorKind, Loader, Memory, Plan, Rank, Rules, Weights, World};

const CPU: Device = Device::Cpu;

fn load(folder: &Path, rules: &Rules, world: &World, memory: Memory) -> Weights {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let plan = Plan::new(&checkpoint, rules, world).unwrap();
    Loader::new().memory(memory).load(&plan).unwrap().0
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|of| of == "safetensors")).collect()
}

/// One tensor of each type, of random bytes; 2 x 12 elements fill whole bytes of all of them.
fn of_all_types(folder: &Path) -> Vec<(String, Dtype, Vec<u8>)> {
    let mut random = 11_u32;
    let mut byte = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 24) as u8
    };
    let tensors: Vec<(String, Dtype, Vec<u8>)> = Dtype::ALL
        .iter()
        .map(|&dtype| (format!("of.{dtype}"), dtype, (0..dtype.bytes_of(24).unwrap()).map(|_| byte()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, dtype, bytes)| {
        let of = serde_json::from_value(json!(dtype.name())).unwrap();
        (name.as_str(), TensorView::new(of, vec![2, 12], bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    tensors
}

/// The bytes that a tensor of candle's consists of, and where they are.
fn raw(tensor: &Tensor) -> (Vec<u8>, usize) {
    /// Those of a vector.
    fn bytes<T>(values: &[T]) -> (Vec<u8>, usize) {
        let (address, size) = (values.as_ptr().cast::<u8>(), size_of_val(values));
        // SAFETY: the elements are plain numbers.
        (unsafe { std::slice::from_raw_parts(address, size) }.to_vec(), address.addr())
    }
    let (storage, layout) = tensor.storage_and_layout();
    assert!(layout.is_contiguous() && layout.start_offset() == 0);
    let Storage::Cpu(storage) = &*storage else { panic!("not in host memory") };
    match storage {
        CpuStorage::U32(values) => bytes(values),
        CpuStorage::I16(values) => bytes(values),
        CpuStorage::I32(values) => bytes(values),
        CpuStorage::I64(values) => bytes(values),
        CpuStorage::BF16(values) => bytes(values),
        CpuStorage::F16(values) => bytes(values),
        CpuStorage::F32(values) => bytes(values),
        CpuStorage::F64(values) => bytes(values),
        CpuStorage::F8E4M3(values) => bytes(values),
        CpuStorage::U8(values)
        | CpuStorage::F6E2M3(values)
        | CpuStorage::F6E3M2(values)
        | CpuStorage::F4(values)
        | CpuStorage::F8E8M0(values) => bytes(values),
    }
}

#[test]
fn all_types_of_candle_are_as_candle_loads_them_and_others_are_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = of_all_types(folder.path());
    // SAFETY: nobody changes the file.
    let theirs = unsafe { MmapedSafetensors::multi(&files(folder.path())) }.unwrap();
    for memory in [Memory::PerTensor, Memory::Blocks] {
        let mut weights = load(folder.path(), &Rules::replicate_all(), &World::host(1), memory);
        let mut known = 0;
        for (name, dtype, bytes) in &tensors {
            let tensor = weights.take(Rank(0), name).unwrap();
            let address = tensor.device_ptr() as usize;
            match theirs.load(name, &CPU) {
                Ok(expected) => {
                    let ours = shardlift::candle::tensor(tensor, &CPU).unwrap();
                    assert_eq!((ours.dtype(), ours.shape()), (expected.dtype(), expected.shape()), "{name}");
                    let (found, at) = raw(&ours);
                    assert_eq!(found, raw(&expected).0, "{name}");
                    // Taken over, unless its elements became others.
                    assert_eq!(at == address, memory == Memory::PerTensor && *dtype != Dtype::U16, "{name}");
                    known += 1;
                }
                Err(_) => {
                    assert_eq!(shardlift::candle::dtype(*dtype), None);
                    let error = shardlift::candle::tensor(tensor.clone(), &CPU).unwrap_err().to_string();
                    assert!(error.contains(name) && error.contains(dtype.name()), "{error}");
                    let ours = shardlift::candle::bytes(tensor).unwrap();
                    assert_eq!((ours.dtype(), raw(&ours).0), (DType::U8, bytes.clone()), "{name}");
                }
            }
        }
        assert_eq!(known, 15);
    }
}

#[test]
fn a_builder_gives_what_candles_own_gives() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = support::model::write(folder.path(), 3);
    // SAFETY: nobody changes the file.
    let theirs = unsafe { VarBuilder::from_mmaped_safetensors(&files(folder.path()), DType::F32, &CPU) }.unwrap();
    let mut weights = load(folder.path(), &Rules::replicate_all(), &World::host(1), Memory::PerTensor);
    let ours = var_builder(&mut weights, Rank(0), DType::F32, &CPU).unwrap();
    assert_eq!(weights.iter().count(), 0);
    for tensor in &tensors {
        let (module, name) = tensor.name.split_once('.').unwrap();
        let asked = |builder: &VarBuilder<'_>| builder.pp(module).get(tensor.shape.as_slice(), name).unwrap();
        let (found, expected) = (asked(&ours), asked(&theirs));
        assert_eq!((found.dtype(), found.shape()), (DType::F32, expected.shape()));
        assert_eq!(raw(&found).0, raw(&expected).0, "{}", tensor.name);
        assert!(ours.contains_tensor(&tensor.name));
    }
    assert!(!ours.contains_tensor("a"));
    for builder in [&ours, &theirs] {
        let error = builder.get((24, 48), "a.rows").unwrap_err().to_string();
        assert!(error.contains("a.rows") && error.contains("[24, 48]") && error.contains("[48, 24]"), "{error}");
        let error = builder.get((24, 48), "b.rows").unwrap_err().to_string();
        assert!(error.contains("b.rows"), "{error}");
    }
    // Nobody can have twice what was given away.
    for rank in [0, 1] {
        let error = var_builder(&mut weights, Rank(rank), DType::F32, &CPU).map(|_| ()).unwrap_err();
        assert_eq!((error.kind(), error.at().rank), (ErrorKind::NotFound, Some(Rank(rank))));
    }
}

#[test]
fn tied_weights_are_one_tensor_however_often_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    support::model::write(folder.path(), 4);
    let rules = Rules::replicate_all().alias("head.weight", "f.whole");
    let mut weights = load(folder.path(), &rules, &World::host(1), Memory::PerTensor);
    let address = weights.tensor(Rank(0), "f.whole").unwrap().device_ptr() as usize;
    let builder = var_builder(&mut weights, Rank(0), DType::BF16, &CPU).unwrap();
    let dtype = builder.get_unchecked("f.whole").unwrap().dtype();
    for name in ["head.weight", "f.whole", "head.weight"] {
        let tensor = builder.get_with_hints_dtype((1000, 333), name, candle_nn::Init::Const(0.), dtype).unwrap();
        assert_eq!(raw(&tensor).1, address, "{name}");
    }
}

#[test]
fn what_candle_has_no_type_for_is_an_error_only_where_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    of_all_types(folder.path());
    let mut weights = load(folder.path(), &Rules::replicate_all(), &World::host(1), Memory::PerTensor);
    let builder = var_builder(&mut weights, Rank(0), DType::F32, &CPU).unwrap();
    builder.get((2, 12), "of.F32").unwrap();
    for _ in 0..2 {
        let error = builder.get((2, 12), "of.F8_E5M2").unwrap_err().to_string();
        assert!(error.contains("of.F8_E5M2") && error.contains("no elements of type F8_E5M2"), "{error}");
    }
}

#[test]
fn parts_are_what_candles_sharded_builder_cuts() {
    let folder = tempfile::tempdir().unwrap();
    support::model::write(folder.path(), 5);
    let rules = Rules::from_toml(support::model::RULES).unwrap();
    let mut weights = load(folder.path(), &rules, &World::host(3), Memory::PerTensor);
    // SAFETY: nobody changes the file.
    let theirs = unsafe { ShardedSafeTensors::var_builder(&files(folder.path()), DType::F32, &CPU) }.unwrap();
    for rank in 0..3_usize {
        let ours = sharded_var_builder(&mut weights, Rank(rank as u32), DType::F32, &CPU).unwrap();
        for (name, shape, dim) in [
            ("a.rows", (48, 24), 0),
            ("d.rows", (1536, 1024), 0),
            ("b.columns", (24, 48), 1),
            ("e.columns", (768, 1536), 1),
        ] {
            let asked = CandleShard { dim, rank, world_size: 3 };
            let expected = theirs.get_with_hints(shape, name, asked).unwrap();
            let found = ours.get_with_hints(shape, name, asked.into()).unwrap();
            assert_eq!(found.shape(), expected.shape(), "{name}");
            assert_eq!(raw(&found).0, raw(&expected).0, "{name} of {rank}");

            // The same by numbers; a part of it; and what this rank has not.
            let size = [shape.0, shape.1][dim];
            let (part, offset) = (size / 3, size / 3 * rank);
            let by_number = |offset, len| ours.get_with_hints(shape, name, Shard::Offset { dim, offset, len });
            assert_eq!(raw(&by_number(offset, part).unwrap()).0, raw(&expected).0);
            let middle = by_number(offset + 2, 3).unwrap();
            assert_eq!(raw(&middle).0, raw(&expected.narrow(dim, 2, 3).unwrap().force_contiguous().unwrap()).0);
            for error in [
                by_number(offset + 1, part).unwrap_err(),
                by_number(usize::MAX, 2).unwrap_err(),
                ours.get(shape, name).unwrap_err(),
                ours.get_unchecked(name).unwrap_err(),
                ours.get_with_hints(shape, name, Shard::Offset { dim: 1 - dim, offset: 0, len: 3 }).unwrap_err(),
                ours.get_with_hints(shape, name, Shard::Simple { dim, rank: (rank + 1) % 3, world_size: 3 })
                    .unwrap_err(),
            ] {
                let held = format!("{offset}..{} of {size}", offset + part);
                let (error, whose) = (error.to_string(), format!("tensor {name} (rank {rank})"));
                assert!(error.contains(&whose) && error.contains(&held), "{error}");
            }
        }
        // What every rank has whole can be cut by who asks for it; 7 rows by 3 ranks cannot.
        let whole = theirs.get((1000, 333), "f.whole").unwrap();
        assert_eq!(raw(&ours.get((1000, 333), "f.whole").unwrap()).0, raw(&whole).0);
        assert_eq!(raw(&ours.get_unchecked("f.whole").unwrap()).0, raw(&whole).0);
        let third = Shard::Simple { dim: 1, rank, world_size: 3 };
        let third = ours.get_with_hints((1000, 333), "f.whole", third).unwrap();
        assert_eq!(raw(&third).0, raw(&whole.narrow(1, 111 * rank, 111).unwrap().force_contiguous().unwrap()).0);
        let uneven = Shard::Simple { dim: 0, rank, world_size: 3 };
        let error = ours.get_with_hints((7, 5), "c.whole", uneven).unwrap_err().to_string();
        assert!(error.contains("[7, 5]") && error.contains('3'), "{error}");
        let error = ours.get_with_hints((7, 5), "c.whole", Shard::Offset { dim: 2, offset: 0, len: 1 }).unwrap_err();
        assert!(error.to_string().contains("no dimension 2"), "{error}");
        let error = ours.get_with_hints((), "h.scalar", third_of(rank)).unwrap_err();
        assert!(error.to_string().contains("no dimension 0"), "{error}");
        for (part, world_size) in [(3, 3), (0, 0)] {
            let none = Shard::Simple { dim: 1, rank: part, world_size };
            let error = ours.get_with_hints((1000, 333), "f.whole", none).unwrap_err().to_string();
            assert!(error.contains(&format!("no part {part} of {world_size}")), "{error}");
        }
        // Of nothing everybody has nothing.
        assert_eq!(ours.get_with_hints((0, 4), "i.empty", third_of(rank)).unwrap().dims(), [0, 4]);
        let columns = Shard::Offset { dim: 1, offset: 1, len: 2 };
        assert_eq!(ours.get_with_hints((0, 4), "i.empty", columns).unwrap().dims(), [0, 2]);
    }
}

fn third_of(rank: usize) -> Shard {
    Shard::Simple { dim: 0, rank, world_size: 3 }
}

#[test]
fn what_candle_cannot_cut_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    of_all_types(folder.path());
    let mut weights = load(folder.path(), &Rules::replicate_all(), &World::host(1), Memory::PerTensor);
    let builder = sharded_var_builder(&mut weights, Rank(0), DType::F32, &CPU).unwrap();
    for dtype in [Dtype::F4, Dtype::F6E2M3, Dtype::F6E3M2, Dtype::F8E8M0] {
        let half = Shard::Simple { dim: 0, rank: 1, world_size: 2 };
        let error = builder.get_with_hints((2, 12), &format!("of.{dtype}"), half).unwrap_err().to_string();
        assert!(error.contains(&format!("cuts no {dtype}")), "{error}");
    }
}

#[test]
fn what_is_no_plain_part_is_given_as_it_is_and_cut_by_nobody() {
    let folder = tempfile::tempdir().unwrap();
    support::model::write(folder.path(), 6);
    for (made, shape) in [
        ("replicate = true, transpose = true", &[24, 48][..]),
        // Their indices are not those of the tensor, though what they have of it is a plain part.
        ("steps = [{ view = [6, 8, 24] }]", &[6, 8, 24]),
        ("steps = [{ pad = { dim = 0, to = 50, fill = \"zero\" } }]", &[50, 24]),
    ] {
        let rules = format!("rule = [{{ match = \"a.rows\", {made} }}, {{ match = \"**\", skip = true }}]");
        let rules = Rules::from_toml(&rules).unwrap();
        let mut weights = load(folder.path(), &rules, &World::host(1), Memory::PerTensor);
        let builder = sharded_var_builder(&mut weights, Rank(0), DType::F32, &CPU).unwrap();
        assert_eq!(builder.get(shape, "a.rows").unwrap().dims(), shape);
        assert_eq!(builder.get_unchecked("a.rows").unwrap().dims(), shape);
        for part in [
            Shard::Simple { dim: 0, rank: 0, world_size: 2 },
            Shard::Offset { dim: 0, offset: 0, len: 48 },
            Shard::Offset { dim: 1, offset: 0, len: 24 },
        ] {
            let error = builder.get_with_hints((48, 24), "a.rows", part).unwrap_err().to_string();
            assert!(error.contains("no plain part"), "{made} {part:?}: {error}");
        }
    }
}
