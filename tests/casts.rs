//! Tensors that are cast and permuted on their way, element by element against index arithmetic and the crate `half`.

#[path = "support/tiny.rs"]
mod tiny;
#[path = "support/transform.rs"]
mod transform;
#[path = "support/worlds.rs"]
mod worlds;

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;
use shardlift::limits::LOOPS_MAX;
use shardlift::plan::{BoxCopy, Cut, Expr, Plan, Split, World};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Dtype, ErrorKind, Loader, Memory, Rank, Residency, Result, Rules};

use tiny::tiny;
use transform::{Part, Source, noise};

const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];

/// A tensor of the test model, and what the rules make of it.
struct Tensor {
    name: &'static str,
    source: Source,
    /// The dimension that is sharded.
    shard: Option<usize>,
    order: Vec<usize>,
    to: Dtype,
}

impl Tensor {
    fn part(&self, rank: u64, ranks: u64) -> Part {
        let mut taken: Vec<(u64, u64)> = self.source.dims.iter().map(|&size| (0, size)).collect();
        if let Some(dim) = self.shard {
            let each = self.source.dims[dim] / ranks;
            taken[dim] = (rank * each, each);
        }
        self.source.part(&taken, &self.order, self.to)
    }
}

const RULES: &str = r#"
rule = [
  { match = "a.*", replicate = true },
  { match = "b.*", replicate = true, cast = "bf16" },
  { match = "c.*", replicate = true, transpose = true },
  { match = "d.*", shard = { dim = 0 }, transpose = true, cast = "f16" },
  { match = "e.*", shard = { dim = 1 }, transpose = true },
  { match = "f.*", shard = { dim = 1 }, cast = "f32" },
  { match = "g.*", shard = { dim = 0 }, permute = [2, 0, 1], cast = "bf16" },
  { match = "h.*", shard = { dim = 2 }, permute = [1, 0, 2] },
  { match = "i.*", replicate = true, cast = "f32" },
  { match = "j.*", shard = { dim = 1 }, permute = [0, 2, 1, 3], cast = "f16" },
]
"#;

/// Two files, of which the second one's tensors start at odd offsets: with its header written by hand.
fn write(folder: &Path) -> Vec<Tensor> {
    let order = |dims: usize| (0..dims).collect::<Vec<_>>();
    let tensor = |name, dtype, dims: &[u64], shard, order: Vec<usize>, to| Tensor {
        name,
        source: Source::random(dtype, dims),
        shard,
        order,
        to,
    };
    use Dtype::{Bf16, F8E4M3, F8E5M2, F16, F32, F64, U8};
    let tensors = vec![
        tensor("a.odd", U8, &[3], None, order(1), U8),
        tensor("b.cast", F32, &[700, 1000], None, order(2), Bf16),
        tensor("b.same", Bf16, &[40, 33], None, order(2), Bf16),
        tensor("b.scalar", F16, &[], None, order(0), Bf16),
        tensor("b.empty", F32, &[0, 7], None, order(2), Bf16),
        tensor("c.large", Bf16, &[1200, 777], None, vec![1, 0], Bf16),
        tensor("c.wide", F32, &[3, 90_000], None, vec![1, 0], F32),
        tensor("c.row", F64, &[1, 999], None, vec![1, 0], F64),
        tensor("d.rows", F32, &[768, 500], Some(0), vec![1, 0], F16),
        tensor("e.columns", F16, &[333, 960], Some(1), vec![1, 0], F16),
        tensor("f.columns", Bf16, &[555, 480], Some(1), order(2), F32),
        tensor("g.deep", F16, &[24, 70, 90], Some(0), vec![2, 0, 1], Bf16),
        tensor("h.runs", Bf16, &[31, 9, 1440], Some(2), vec![1, 0, 2], Bf16),
        tensor("i.e4m3", F8E4M3, &[1000, 300], None, order(2), F32),
        tensor("i.e5m2", F8E5M2, &[65_537, 5], None, order(2), F32),
        tensor("j.heads", F8E5M2, &[5, 48, 31, 17], Some(1), vec![0, 2, 1, 3], F16),
    ];
    let (one, two): (Vec<_>, Vec<_>) = tensors.iter().enumerate().partition(|(at, _)| at % 3 == 1);
    for (name, part, odd) in [("one", one, false), ("two", two, true)] {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (_, Tensor { name, source, .. }) in part {
            let from = data.len();
            data.extend_from_slice(&source.bytes);
            let offsets = [from, data.len()];
            let entry = json!({ "dtype": source.dtype.name(), "shape": source.dims, "data_offsets": offsets });
            header.insert((*name).to_owned(), entry);
        }
        let mut header = serde_json::Value::from(header).to_string();
        while (header.len() % 2 == 1) != odd {
            header.push(' ');
        }
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        std::fs::write(folder.join(format!("{name}.safetensors")), file).unwrap();
    }
    tensors
}

fn plan(folder: &Path, rules: &Rules, world: &World) -> Plan {
    Plan::new(&Checkpoint::open(folder).unwrap(), rules, world).unwrap()
}

#[test]
fn every_engine_and_world_lands_the_same_elements() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = write(folder.path());
    let rules = Rules::from_toml(RULES).unwrap();
    // What every rank has whole is the same for all of them.
    let mut parts = HashMap::new();
    for world in [1, 2, 3, 8].into_iter().flat_map(worlds::of) {
        let plan = plan(folder.path(), &rules, &world);
        let ranks = u64::from(world.size());
        let mut part = |rank, tensor: &Tensor| {
            let part = parts.entry((tensor.name, tensor.shard.map(|_| (rank, ranks))));
            Rc::clone(part.or_insert_with(|| Rc::new(tensor.part(rank, ranks))))
        };
        let expected: HashMap<_, _> = (0..ranks)
            .flat_map(|rank| tensors.iter().map(move |tensor| (rank, tensor)))
            .map(|(rank, tensor)| ((rank, tensor.name), part(rank, tensor)))
            .collect();
        let mut digests = None;
        for engine in ENGINES {
            for memory in [Memory::Blocks, Memory::PerTensor] {
                // Engines and memory do not depend on each other, nor on how many ranks there are.
                if engine != EngineChoice::Auto && (memory == Memory::PerTensor || ranks == 8) {
                    continue;
                }
                let loader = Loader::new().engine(engine).memory(memory).staging(3 << 20);
                let (weights, report) = loader.load(&plan).unwrap();
                for tensor in weights.iter() {
                    let part = &expected[&(tensor.rank().0.into(), tensor.name())];
                    assert_eq!((tensor.shape().dims(), tensor.dtype()), (&*part.dims, part.dtype), "{}", tensor.name());
                    assert!(*tensor.to_bytes().unwrap() == part.bytes, "{engine:?} {memory:?} {world:?} {tensor:?}");
                }
                assert_eq!(weights.iter().count(), expected.len());
                let landed: u64 = expected.values().map(|part| part.bytes.len() as u64).sum();
                assert_eq!((report.landed_bytes, report.needed_bytes), (landed, plan.checkpoint().bytes()));
                let slack = if report.engine == "uring" { 200 * 4096 } else { 0 };
                assert!(report.storage_bytes_read >= report.needed_bytes);
                assert!(report.storage_bytes_read <= report.needed_bytes + slack, "{report:?}");
                let checked = weights.check().unwrap();
                assert_eq!(digests.get_or_insert_with(|| checked.clone()), &checked);
            }
        }
    }
}

#[test]
fn members_of_a_world_get_what_one_process_gives_them() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = write(folder.path());
    let rules = Rules::from_toml(RULES).unwrap();
    for rank in 0..3 {
        let world = World::member(Rank(rank), 3, shardlift::plan::DeviceSpec::HostStaged);
        let (weights, _) = Loader::new().staging(2 << 20).load(&plan(folder.path(), &rules, &world)).unwrap();
        for tensor in &tensors {
            let landed = weights.tensor(Rank(rank), tensor.name).unwrap();
            assert!(*landed.to_bytes().unwrap() == tensor.part(rank.into(), 3).bytes, "{landed:?}");
        }
        weights.check().unwrap();
    }
}

#[test]
fn what_is_cast_becomes_a_vector_of_its_new_type() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = write(folder.path());
    let rules = Rules::from_toml(RULES).unwrap();
    let (mut weights, _) =
        Loader::new().memory(Memory::PerTensor).load(&plan(folder.path(), &rules, &World::host(1))).unwrap();
    let expected = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap().part(0, 1).bytes;
    let mut take = |name: &str| weights.take(Rank(0), name).unwrap();
    let bf16 = take("b.cast").into_vec::<half::bf16>().unwrap();
    assert!(bf16.iter().flat_map(|element| element.to_bits().to_le_bytes()).eq(expected("b.cast")));
    let f32 = take("i.e4m3").into_vec::<f32>().unwrap();
    assert!(f32.iter().flat_map(|element| element.to_bits().to_le_bytes()).eq(expected("i.e4m3")));
    assert_eq!(take("d.rows").into_vec::<f32>().unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn only_what_the_file_holds_as_it_is_is_lent() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = write(folder.path());
    for ranks in [1, 2] {
        let plan = plan(folder.path(), &Rules::from_toml(RULES).unwrap(), &World::host(ranks));
        let (weights, report) = Loader::new().residency(Residency::Mapped).load(&plan).unwrap();
        for tensor in weights.iter() {
            let expected = tensors.iter().find(|other| other.name == tensor.name()).unwrap();
            assert!(
                *tensor.to_bytes().unwrap() == expected.part(tensor.rank().0.into(), ranks.into()).bytes,
                "{tensor:?}"
            );
        }
        // Small ones are read with their neighbours.
        assert!(report.storage_bytes_read < plan.storage_bytes());
    }
}

#[test]
fn a_check_notices_one_flipped_bit() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let plan = plan(folder.path(), &Rules::from_toml(RULES).unwrap(), &World::host(2));
    let (weights, _) = Loader::new().load(&plan).unwrap();
    weights.check().unwrap();
    for tensor in weights.iter().filter(|tensor| tensor.nbytes() > 0 && tensor.rank() == Rank(1)) {
        for at in [0, tensor.nbytes() / 2, tensor.nbytes() - 1] {
            let byte = std::ptr::with_exposed_provenance_mut::<u8>(tensor.device_ptr() as usize + at);
            // SAFETY: a byte of the tensor's own memory, and nobody holds a slice of it now.
            unsafe { *byte ^= 0x10 };
            let error = weights.check().unwrap_err();
            assert_eq!((error.kind(), error.tensor()), (ErrorKind::Mismatch, Some(tensor.name())));
            // SAFETY: as above.
            unsafe { *byte ^= 0x10 };
        }
    }
    weights.check().unwrap();
}

#[test]
fn reshard_writes_what_a_load_lands() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = write(folder.path());
    let out = tempfile::tempdir().unwrap();
    for ranks in [1, 2, 3] {
        let plan = plan(folder.path(), &Rules::from_toml(RULES).unwrap(), &World::host(ranks));
        let out = out.path().join(format!("tp{ranks}"));
        Loader::new().staging(4 << 20).reshard(&plan, &out, false).unwrap();
        for rank in 0..ranks {
            let file = out.join(format!("model-rank-{rank}-part-0.safetensors"));
            let bytes = std::fs::read(&file).unwrap();
            let read = SafeTensors::deserialize(&bytes).unwrap();
            let part = Checkpoint::open(&file).unwrap();
            for tensor in &tensors {
                let expected = tensor.part(rank.into(), ranks.into());
                let meta = part.tensor(tensor.name).unwrap();
                assert_eq!((meta.dtype, meta.shape.dims()), (expected.dtype, &*expected.dims), "{}", tensor.name);
                assert!(read.tensor(tensor.name).unwrap().data() == expected.bytes, "{} of {ranks}", tensor.name);
            }
        }
    }
}

#[test]
fn casting_leaves_alone_what_is_no_float_of_16_or_32_bits() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = write(folder.path());
    for to in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        let rules =
            Rules::new().replicate("b.cast").cast(Dtype::F16).replicate("**").casting(to).alias("alias", "b.scalar");
        let plan = plan(folder.path(), &rules, &World::host(2));
        assert_eq!(plan.params()[1].name, "alias");
        assert_eq!(plan.params()[1].dtype, to);
        let (weights, _) = Loader::new().load(&plan).unwrap();
        for tensor in &tensors {
            let landed = weights.tensor(Rank(1), tensor.name).unwrap();
            let is_cast = matches!(tensor.source.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
            let to = if tensor.name == "b.cast" { Dtype::F16 } else { to };
            assert_eq!(landed.dtype(), if is_cast { to } else { tensor.source.dtype });
            let order: Vec<usize> = (0..tensor.order.len()).collect();
            let whole: Vec<_> = tensor.source.dims.iter().map(|&size| (0, size)).collect();
            assert!(
                *landed.to_bytes().unwrap() == tensor.source.part(&whole, &order, landed.dtype()).bytes,
                "{landed:?}"
            );
        }
        weights.check().unwrap();
    }
}

#[test]
fn a_transposed_tensor_is_one_read_and_a_few_pieces() {
    let (_folder, checkpoint) = tiny(&[("w", Dtype::F32, &[4, 4])]);
    let one = |rules: &Rules, world| -> (u64, Vec<BoxCopy>) {
        let plan = Plan::new(&checkpoint, rules, &world).unwrap();
        let [extent] = plan.extents() else { panic!("{:?}", plan.extents()) };
        assert_eq!((extent.outer.len(), extent.run, plan.storage_bytes()), (0, 64, 64));
        (plan.digest(), plan.ranks().iter().flat_map(|rank| rank.pieces.clone()).collect())
    };
    let (plain, _) = one(&Rules::new().replicate("w"), World::host(1));
    let (transposed, pieces) = one(&Rules::new().replicate("w").transpose(), World::host(2));
    assert_eq!(pieces.len(), 2);
    let numbers = |loops: &[shardlift::plan::Loop]| -> Vec<[u64; 3]> {
        loops.iter().map(|l| [l.count, l.src_stride, l.dst_stride]).collect()
    };
    assert_eq!((numbers(&pieces[0].loops), pieces[0].run), (vec![[4, 16, 4], [4, 4, 16]], 4));
    assert_eq!(numbers(&pieces[0].destination_loops()), [[4, 4, 16], [4, 16, 4]]);
    let (cast, pieces) = one(&Rules::new().shard("w", 1).cast(Dtype::Bf16), World::host(2));
    assert_eq!((numbers(&pieces[1].loops), pieces[1].run), (vec![[4, 16, 4]], 8));
    let (other, _) = one(&Rules::new().shard("w", 1).cast(Dtype::F16), World::host(2));
    assert_eq!(std::collections::HashSet::from([plain, transposed, cast, other]).len(), 4);
}

/// A random expression and what it takes of a tensor.
#[derive(Debug, Clone)]
struct Case {
    dtype: Dtype,
    dims: Vec<u64>,
    shard: Option<(usize, bool)>,
    slice: Option<(usize, u64, u64)>,
    order: Vec<usize>,
    to: Dtype,
    cast_first: bool,
    ranks: u32,
}

fn cases() -> impl Strategy<Value = Case> {
    let dims = prop_oneof![prop::collection::vec(0u64..7, 0..5), prop::collection::vec(1u64..4, 5..8)];
    let pick = any::<prop::sample::Index>;
    let keys = prop::collection::vec(any::<u32>(), 8);
    (
        dims,
        0usize..5,
        0usize..4,
        keys,
        (pick(), any::<bool>(), any::<bool>()),
        (pick(), any::<bool>(), 0u64..3, 1u64..3),
        (any::<bool>(), 1u32..5),
    )
        .prop_map(
            |(
                dims,
                dtype,
                to,
                keys,
                (shard, is_sharded, shard_last),
                (slice, is_sliced, start, step),
                (cast_first, ranks),
            )| {
                let dtype = [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2][dtype];
                let to = [Dtype::Bf16, Dtype::F16, Dtype::F32].get(to).copied();
                // An F8 is permuted only where it is cast.
                let to = to.unwrap_or(if dtype.bits() == 8 { Dtype::F32 } else { dtype });
                let mut order: Vec<usize> = (0..dims.len()).collect();
                order.sort_by_key(|&dim| keys[dim]);
                let some = !dims.is_empty();
                let shard = (is_sharded && some).then(|| (shard.index(dims.len()), shard_last));
                let slice = (is_sliced && some).then(|| (slice.index(dims.len()), start, step));
                let slice = slice.filter(|&(dim, ..)| shard.is_none_or(|(sharded, _)| sharded != dim));
                Case { dtype, dims, shard, slice, order, to, cast_first, ranks }
            },
        )
}

impl Case {
    fn expr(&self) -> Expr {
        let mut expr = Expr::Source;
        let cut = || {
            let mut cut = Cut::default();
            cut.how = Split::Ceil;
            cut
        };
        if let Some((dim, start, step)) = self.slice {
            let start = start.min(self.dims[dim]);
            let len = (self.dims[dim] - start).div_ceil(step);
            expr = Expr::Slice { x: Box::new(expr), dim, start, len, step };
        }
        if self.cast_first {
            expr = Expr::Cast { x: Box::new(expr), to: self.to };
        }
        if let Some((dim, false)) = self.shard {
            expr = Expr::Shard { x: Box::new(expr), dim, cut: cut() };
        }
        expr = Expr::Permute { x: Box::new(expr), order: self.order.clone() };
        if let Some((dim, true)) = self.shard {
            // The same dimension, by where it is now.
            let dim = self.order.iter().position(|&at| at == dim).unwrap();
            expr = Expr::Shard { x: Box::new(expr), dim, cut: cut() };
        }
        if !self.cast_first {
            expr = Expr::Cast { x: Box::new(expr), to: self.to };
        }
        expr
    }

    /// For each dimension of the tensor the indices that a rank gets.
    fn taken(&self, rank: u64) -> Vec<Vec<u64>> {
        let all = self.dims.iter().enumerate().map(|(dim, &size)| {
            let indices: Vec<u64> = match self.slice {
                Some((sliced, start, step)) if sliced == dim => (start..size).step_by(step as usize).collect(),
                _ => (0..size).collect(),
            };
            match self.shard {
                Some((sharded, _)) if sharded == dim => {
                    let each = indices.len().div_ceil(self.ranks as usize).max(1);
                    indices.chunks(each).nth(rank as usize).unwrap_or_default().to_vec()
                }
                _ => indices,
            }
        });
        all.collect()
    }
}

/// Executes copies element by element, and counts the writes of each byte.
fn execute(copies: &[BoxCopy], dtype: Dtype, file: &[u8], bytes: u64) -> Vec<u8> {
    let mut out = vec![None; bytes as usize];
    let element = u64::from(dtype.bits()) / 8;
    for copy in copies {
        let landed = copy.cast.map_or(element, |cast| u64::from(cast.to().bits()) / 8);
        let steps: u64 = copy.loops.iter().map(|inner| inner.count).product();
        for step in 0..steps {
            let (mut left, mut src, mut dst) = (step, copy.src, copy.dst);
            for inner in copy.loops.iter().rev() {
                src += left % inner.count * inner.src_stride;
                dst += left % inner.count * inner.dst_stride;
                left /= inner.count;
            }
            assert!(
                copy.run.is_multiple_of(element)
                    && copy.loops.len() <= LOOPS_MAX
                    && copy.loops.is_sorted_by(|a, b| a.src_stride >= b.src_stride)
            );
            for at in 0..copy.run / element {
                let from = &file[(src + at * element) as usize..][..element as usize];
                let to = copy.cast.map_or(dtype, |cast| cast.to());
                for (byte, to) in transform::element(dtype, to, from).into_iter().zip(dst + at * landed..) {
                    assert!(out[to as usize].replace(byte).is_none(), "byte {to} written twice");
                }
            }
        }
    }
    out.into_iter().map(|byte| byte.expect("every byte is written")).collect()
}

proptest! {
    #[test]
    fn every_rank_gets_what_the_oracle_says(case in cases(), per_process in any::<bool>()) {
        let source = Source::random(case.dtype, &case.dims);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let shape: Vec<usize> = case.dims.iter().map(|&dim| dim as usize).collect();
        let dtype = serde_json::from_value(json!(case.dtype.name())).unwrap();
        let odd = noise(5);
        let tensors = [
            ("a", TensorView::new(safetensors::Dtype::U8, vec![5], &odd).unwrap()),
            ("w", TensorView::new(dtype, shape, &source.bytes).unwrap()),
        ];
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        let file = std::fs::read(&path).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let world = match per_process {
            true => World::member(Rank(0), case.ranks, shardlift::plan::DeviceSpec::Host),
            false => World::host(case.ranks),
        };
        let rules = Rules::new().place("w", case.expr()).replicate("a");
        let plan: Result<Plan> = Plan::new(&checkpoint, &rules, &world);
        let plan = plan.unwrap();
        for rank in plan.ranks() {
            let dest = &rank.dests[1];
            let part = source.part_of(&case.taken(rank.rank.0.into()), &case.order, case.to);
            prop_assert_eq!(dest.shape.dims(), &part.dims);
            prop_assert_eq!(dest.bytes, part.bytes.len() as u64);
            let pieces = &rank.pieces[dest.pieces.start as usize..dest.pieces.end as usize];
            prop_assert_eq!(execute(pieces, case.dtype, &file, dest.bytes), part.bytes);
        }
        let (weights, _) = Loader::new().load(&plan).unwrap();
        for tensor in weights.iter().filter(|tensor| tensor.name() == "w") {
            let part = source.part_of(&case.taken(tensor.rank().0.into()), &case.order, case.to);
            prop_assert_eq!(&*tensor.to_bytes().unwrap(), &part.bytes[..]);
        }
        weights.check().unwrap();
    }
}
