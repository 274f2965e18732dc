//! Destinations made of several tensors, and of none: what lands is what the expressions say, on every kind of device.

#[path = "support/worlds.rs"]
mod worlds;

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype as Stored, TensorView};
use shardlift::plan::{Ax, Coord, Cut, Expr, Fill, Split};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Dtype, ErrorKind, Loader, Memory, Plan, Rules, World};

const ENGINES: [EngineChoice; 3] = [EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];
const EXPERTS: u64 = 5;

/// Rows of 16-bit elements.
type Rows = Vec<Vec<u16>>;

/// Tensors by name, each element different from the others near it.
fn tensors() -> Vec<(String, Rows)> {
    let mut all: Vec<(String, usize, usize)> = vec![
        ("l.q_proj".into(), 24, 40),
        ("l.k_proj".into(), 12, 40),
        ("l.v_proj".into(), 12, 40),
        ("l.left".into(), 700, 36),
        ("l.right".into(), 700, 24),
        ("vocabulary".into(), 10_001, 16),
        ("bias".into(), 1, 50),
        ("scales".into(), 6, 4),
    ];
    all.extend((0..EXPERTS).flat_map(|expert| ["up", "down"].map(|name| (format!("experts.{expert}.{name}"), 30, 20))));
    let mut next = 0u16;
    let mut element = || {
        next = next.wrapping_mul(25_173).wrapping_add(13_849);
        next
    };
    all.into_iter()
        .map(|(name, rows, columns)| (name, (0..rows).map(|_| (0..columns).map(|_| element()).collect()).collect()))
        .collect()
}

fn write(folder: &Path, tensors: &[(String, Rows)]) {
    let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, rows)| {
            let bytes = rows.iter().flatten().flat_map(|element| element.to_le_bytes()).collect();
            (name.as_str(), vec![rows.len(), rows[0].len()], bytes)
        })
        .collect();
    let views =
        bytes.iter().map(|(name, shape, bytes)| (*name, TensorView::new(Stored::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

fn named(name: &str) -> Expr {
    Expr::Tensor(name.into())
}

fn cut(how: Split) -> Cut {
    let mut cut = Cut::default();
    cut.how = how;
    cut
}

fn shard(x: Expr, dim: usize, how: Split) -> Expr {
    Expr::Shard { x: Box::new(x), dim, cut: cut(how) }
}

/// Rows of a padded vocabulary on each rank.
fn padded(ranks: u64) -> u64 {
    10_001u64.div_ceil(ranks) + 3
}

fn rules(ranks: u64) -> Rules {
    let qkv = ["{1}.q_proj", "{1}.k_proj", "{1}.v_proj"].map(|name| shard(named(name), 0, Split::Even));
    let columns = vec![shard(named("l.left"), 1, Split::Ceil), shard(Expr::Source, 1, Split::Ceil)];
    let expert =
        |at| Expr::Concat { dim: 0, parts: ["up", "down"].map(|name| named(&format!("experts.{at}.{name}"))).into() };
    let experts = Expr::Select { by: cut(Split::Balanced), of: (0..EXPERTS).map(expert).collect() };
    let rows = Box::new(shard(Expr::Source, 0, Split::Ceil));
    let repeated = Expr::Repeat { x: Box::new(Expr::Source), dim: 0, times: 2 };
    Rules::new()
        .place("*.q_proj", Expr::Concat { dim: 0, parts: qkv.into() })
        .rename("{1}.qkv_proj")
        .part("*.{k,v}_proj")
        .place("l.right", Expr::Concat { dim: 1, parts: columns })
        .rename("l.both")
        .place("experts.0.up", Expr::Stack { parts: vec![experts] })
        .rename("experts")
        .place("vocabulary", Expr::Pad { x: rows, dim: 0, to: padded(ranks), fill: Fill::One })
        .place("bias", Expr::On { x: Box::new(Expr::Source), by: Coord::Axis(Ax::Tp), part: 0, fill: Fill::NegInf })
        .place("scales", Expr::Repeat { x: Box::new(repeated), dim: 1, times: 3 })
}

/// What a rank should hold: by the plainest arithmetic on rows.
fn expected(tensors: &[(String, Rows)], rank: usize, ranks: usize) -> HashMap<String, (Vec<u64>, Vec<u16>)> {
    let of = |name: &str| &tensors.iter().find(|(of, _)| of == name).unwrap().1;
    let ceil = |size: usize| (rank * size.div_ceil(ranks)).min(size)..((rank + 1) * size.div_ceil(ranks)).min(size);
    let mut all = HashMap::new();
    let mut put = |name: &str, rows: Rows, dims: Option<Vec<u64>>| {
        let columns = rows.first().map_or(0, Vec::len);
        let dims = dims.unwrap_or_else(|| vec![rows.len() as u64, columns as u64]);
        all.insert(name.to_owned(), (dims, rows.concat()));
    };
    let even = |name: &str| of(name)[rank * of(name).len() / ranks..(rank + 1) * of(name).len() / ranks].to_vec();
    put("l.qkv_proj", [even("l.q_proj"), even("l.k_proj"), even("l.v_proj")].concat(), None);
    let both = of("l.left").iter().zip(of("l.right"));
    put("l.both", both.map(|(left, right)| [&left[ceil(36)], &right[ceil(24)]].concat()).collect(), None);
    let experts: Vec<usize> = (0..EXPERTS as usize)
        .filter(|&expert| {
            let (each, more) = (EXPERTS as usize / ranks, EXPERTS as usize % ranks);
            (rank * each + rank.min(more)..(rank + 1) * each + (rank + 1).min(more)).contains(&expert)
        })
        .collect();
    let rows =
        experts.iter().flat_map(|expert| ["up", "down"].map(|name| of(&format!("experts.{expert}.{name}")).clone()));
    put("experts", rows.flatten().collect(), Some(vec![experts.len() as u64, 60, 20]));
    let mut vocabulary = of("vocabulary")[ceil(10_001)].to_vec();
    vocabulary.resize(padded(ranks as u64) as usize, vec![0x3F80; 16]); // 1.0
    put("vocabulary", vocabulary, None);
    put("bias", if rank == 0 { of("bias").clone() } else { vec![vec![0xFF80; 50]] }, None);
    let thrice = |row: &Vec<u16>| row.iter().flat_map(|&element| [element; 3]).collect::<Vec<_>>();
    put("scales", of("scales").iter().flat_map(|row| [thrice(row), thrice(row)]).collect(), None);
    all
}

#[test]
fn merged_stacked_padded_and_repeated_destinations_land_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors();
    write(folder.path(), &tensors);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for ranks in [1, 2, 3] {
        for world in worlds::of(ranks) {
            let plan = Plan::new(&checkpoint, &rules(ranks.into()), &world).unwrap();
            let mut digests = None;
            for engine in ENGINES {
                for memory in [Memory::Blocks, Memory::PerTensor] {
                    let loader = Loader::new().engine(engine).memory(memory).staging(3 << 20);
                    let (weights, report) = loader.load(&plan).unwrap();
                    for rank in 0..ranks {
                        let mut expected = expected(&tensors, rank as usize, ranks as usize);
                        for tensor in weights.iter().filter(|tensor| tensor.rank().0 == rank) {
                            let (dims, elements) = expected.remove(tensor.name()).unwrap();
                            assert_eq!(tensor.shape().dims(), dims, "{}", tensor.name());
                            let bytes: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
                            assert!(*tensor.to_bytes().unwrap() == bytes, "{engine:?} {world:?} {}", tensor.name());
                        }
                        assert!(expected.is_empty());
                    }
                    assert_eq!(report.needed_bytes, checkpoint.bytes());
                    let checked = weights.check().unwrap();
                    assert_eq!(digests.get_or_insert_with(|| checked.clone()), &checked);
                }
            }
        }
    }
}

#[test]
fn a_check_sees_what_no_tensor_filled() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &tensors());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let plan = Plan::new(&checkpoint, &rules(2), &World::host(2)).unwrap();
    let (weights, _) = Loader::new().load(&plan).unwrap();
    let vocabulary = weights.iter().find(|tensor| tensor.name() == "vocabulary").unwrap();
    let last = vocabulary.nbytes() - 1;
    // SAFETY: nobody reads the tensor meanwhile.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(vocabulary.device_ptr() as usize).add(last).write(1) };
    let error = weights.check().unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (ErrorKind::Mismatch, Some("vocabulary")));
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &tensors());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let refused = |expr: Expr| {
        let rules = Rules::new().place("l.q_proj", expr).replicate("**");
        let error = Plan::new(&checkpoint, &rules, &World::host(2)).unwrap_err();
        assert!(error.to_string().contains("l.q_proj"), "{error}");
        error.rule().unwrap()
    };
    let concat = |dim, other| Expr::Concat { dim, parts: vec![Expr::Source, other] };
    assert_eq!(refused(concat(0, named("l.left"))), "concat");
    assert_eq!(refused(concat(0, named("l.nothing"))), "source");
    assert_eq!(refused(concat(0, named("l.{1}"))), "rename");
    let one = |dtype| Expr::Const { dtype, dims: vec![1, 40], fill: Fill::One };
    assert_eq!(refused(concat(0, one(Dtype::F32))), "concat");
    assert_eq!(refused(Expr::Pad { x: Box::new(Expr::Source), dim: 0, to: 3, fill: Fill::Zero }), "pad");
    assert_eq!(refused(Expr::Select { by: Cut::default(), of: vec![Expr::Source] }), "select");
    let on = Expr::On { x: Box::new(Expr::Source), by: Coord::Axis(Ax::Tp), part: 2, fill: Fill::Zero };
    assert_eq!(refused(on), "coordinate");
    let unused = Rules::new().part("l.q_proj").replicate("**");
    assert_eq!(Plan::new(&checkpoint, &unused, &World::host(1)).unwrap_err().rule(), Some("unused-part"));
}
