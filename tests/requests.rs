//! An engine's own list of destinations, with memory of its own.

use std::path::Path;

use safetensors::tensor::{Dtype as Type, TensorView};
use shardlift::plan::{Ax, Coord, Cut, Expr, Fill, Request, ShardRule};
use shardlift::{Checkpoint, Dtype, Error, ErrorKind, Loader, Memory, Plan, Rank, Residency, Rules, World};

/// Rows of the test model's tensors, of which all have 4 columns.
const ROWS: [(&str, u16); 4] = [("k", 4), ("q", 8), ("v", 4), ("z", 6)];

/// The value of an element: where it is from.
fn value(name: &str, row: u16, column: u16) -> u16 {
    (u16::from(name.as_bytes()[0]) << 8) | (row * 16 + column)
}

fn open(folder: &Path) -> Checkpoint {
    let bytes = ROWS.map(|(name, rows)| {
        let rows = (0..rows).flat_map(|row| (0..4).map(move |column| value(name, row, column)));
        (name, rows.flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
    });
    let views = bytes
        .iter()
        .map(|(name, bytes)| (*name, TensorView::new(Type::BF16, vec![bytes.len() / 8, 4], bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    Checkpoint::open(folder).unwrap()
}

fn rows(name: &str) -> Expr {
    Expr::Shard { x: Box::new(Expr::Tensor(name.into())), dim: 0, cut: Cut::default() }
}

fn qkv() -> Request {
    let parts = ["q", "k", "v"].map(rows).to_vec();
    Request::new("qkv", Dtype::Bf16, Expr::Concat { dim: 0, parts })
}

fn refused(checkpoint: &Checkpoint, requests: &[Request]) -> Error {
    Plan::of_requests(checkpoint, requests, &World::host(2)).unwrap_err()
}

#[test]
fn bytes_land_in_the_buffers_of_requests() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path());
    let ones = || Expr::Const { dtype: Dtype::F32, dims: vec![3], fill: Fill::One };
    let transposed = Expr::Permute { x: Box::new(Expr::Tensor("q".into())), order: vec![1, 0] };
    for world in [World::host(2), World::host_staged(2)] {
        let mut fused = [[0u16; 32]; 2];
        let mut tail = [0u16; 16];
        let mut one = [0f32; 3];
        let mut of_qkv = qkv().shape([8, 4]);
        for (rank, buffer) in (0..).map(Rank).zip(&mut fused) {
            of_qkv = of_qkv.memory(rank, buffer.as_mut_ptr().cast(), 64);
        }
        let requests = [
            of_qkv,
            // The same tensors once more, and on one rank.
            Request::new("tail", Dtype::Bf16, Expr::Tensor("k".into())).shape([4, 4]).on([Rank(1)]).memory(
                Rank(1),
                tail.as_mut_ptr().cast(),
                32,
            ),
            Request::new("ones", Dtype::F32, ones()).shape([3]).held_by(Coord::Axis(Ax::Tp), 0).memory(
                Rank(0),
                one.as_mut_ptr().cast(),
                12,
            ),
            Request::new("turned", Dtype::Bf16, transposed.clone()).shape([4, 8]),
        ];
        let plan = Plan::of_requests(&checkpoint, &requests, &world).unwrap();
        assert_eq!((plan.skipped(), plan.report().skipped_bytes), ((1, 48), 48));
        assert_eq!(plan.needed_bytes(world.driven()), checkpoint.bytes() - 48);
        assert!(plan.to_string().contains("4 tensors, 1 of them skipped (48 B); 4 destinations"), "{plan}");
        // SAFETY: the buffers live until after the weights, and nobody uses them before that.
        let (weights, _) = unsafe { Loader::new().start_requests(&plan, &requests) }.unwrap().finish().unwrap();
        assert_eq!(weights.tensor(Rank(1), "turned").unwrap().shape().dims(), [4, 8]);
        assert!(weights.tensor(Rank(0), "tail").is_err() && weights.tensor(Rank(1), "ones").is_err());
        let at = weights.tensor(Rank(0), "qkv").unwrap().as_bytes().unwrap().as_ptr();
        drop(weights);
        assert_eq!(at, fused[0].as_ptr().cast());
        assert_eq!(one, [1.0; 3]);
        for (rank, buffer) in (0u16..).zip(fused) {
            let of = |name: &'static str, rows: u16| {
                (rank * rows..(rank + 1) * rows).flat_map(move |row| (0..4).map(move |at| value(name, row, at)))
            };
            let expected: Vec<u16> = of("q", 4).chain(of("k", 2)).chain(of("v", 2)).collect();
            assert_eq!(buffer[..], expected);
        }
        assert_eq!(tail[7], value("k", 1, 3));
    }
}

/// Long enough to be read straight to where they belong, were it not that one of the two wants them converted.
#[test]
fn bytes_that_one_wants_converted_and_another_as_they_are_land_as_both() {
    const ROWS: u32 = 16 << 10;
    let folder = tempfile::tempdir().unwrap();
    // A conversion to BF16 keeps the upper half of numbers whose lower half is 0.
    let short: Vec<u8> = (0..ROWS * 4).flat_map(|at| (at as u16 & 0x3FFF).to_le_bytes()).collect();
    let long: Vec<u8> = (0..ROWS * 4).flat_map(|at| ((at & 0x3FFF) << 16).to_le_bytes()).collect();
    let view = |dtype, bytes| TensorView::new(dtype, vec![ROWS as usize, 4], bytes).unwrap();
    let views = [("long", view(Type::F32, &long)), ("short", view(Type::BF16, &short))];
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let half = |name: &str, start| Expr::Slice {
        x: Box::new(Expr::Tensor(name.into())),
        dim: 0,
        start: u64::from(start),
        len: u64::from(ROWS / 2),
        step: 1,
    };
    for (name, from, to, stored, other) in
        [("long", Dtype::F32, Dtype::Bf16, &long, &short), ("short", Dtype::Bf16, Dtype::F32, &short, &long)]
    {
        let whole = || Expr::Tensor(name.into());
        let upper = &other[other.len() / 2..];
        let lower = &stored[..stored.len() / 2];
        for [converted, kept] in [["a", "b"], ["b", "a"]] {
            for (exprs, expected) in
                [([whole(), whole()], [&other[..], stored]), ([half(name, ROWS / 2), half(name, 0)], [upper, lower])]
            {
                let [x, y] = exprs;
                let requests =
                    [Request::new(converted, to, Expr::Cast { x: Box::new(x), to }), Request::new(kept, from, y)];
                let plan = Plan::of_requests(&checkpoint, &requests, &World::host(1)).unwrap();
                for memory in [Memory::Blocks, Memory::PerTensor] {
                    for residency in [Residency::Owned, Residency::Mapped] {
                        let (weights, _) = Loader::new().memory(memory).residency(residency).load(&plan).unwrap();
                        for (name, expected) in [converted, kept].into_iter().zip(expected) {
                            let landed = weights.tensor(Rank(0), name).unwrap().to_bytes().unwrap();
                            assert!(landed == expected, "{from} as {to}: {name}, {memory:?}, {residency:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_request_that_does_not_fit_is_refused_when_it_is_planned() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path());
    let tensor = |name: &str, of: &str| Request::new(name, Dtype::Bf16, Expr::Tensor(of.into()));
    for (requests, rule, message) in [
        (vec![tensor("a", "x")], "source", "request `a`: no tensor `x` for its destination"),
        (vec![tensor("a", "{1}")], "source", "request `a`: no tensor `{1}` for its destination"),
        (
            vec![tensor("a", "q").shape([8, 5])],
            "request",
            "request `a`: its expression has another shape: expected [8,5], found [8,4]",
        ),
        (vec![qkv().shape([8, 4]).shape_on(Rank(1), [9, 4])], "request", "expected [9,4], found [8,4]"),
        (
            vec![Request::new("a", Dtype::F16, Expr::Tensor("q".into()))],
            "request",
            "request `a`: its expression is of another type: expected F16, found BF16",
        ),
        (vec![tensor("a", "q"), tensor("a", "k")], "rename-collision", "request `a` and request `a` get one name"),
        (vec![Request::new("a", Dtype::Bf16, Expr::Source)], "source", "nothing is matched"),
        (vec![tensor("", "q")], "request", "a request for an empty name"),
        (vec![tensor("a", "q").on([Rank(0), Rank(2)])], "rank", "request `a`: no such rank"),
        (vec![tensor("a", "q").held_by(Coord::Flat(vec![]), 0)], "coordinate", "request `a`: no axis"),
        (
            vec![Request::new(
                "a",
                Dtype::Bf16,
                Expr::Shard { x: Box::new(Expr::Tensor("z".into())), dim: 2, cut: Cut::default() },
            )],
            "dimension",
            "request `a`: ",
        ),
    ] {
        let error = refused(&checkpoint, &requests);
        assert_eq!((error.kind(), error.rule()), (ErrorKind::Rules, Some(rule)), "{error}");
        assert!(error.to_string().contains(message), "{error}\n{message}");
        assert!(message.contains("an empty name") || error.tensor().is_some(), "{error}");
    }
    let error = refused(&checkpoint, &[qkv().shape([8, 4]).shape_on(Rank(1), [9, 4])]);
    assert_eq!((error.at().rank, error.tensor()), (Some(Rank(1)), Some("qkv")));
}

#[test]
fn memory_that_does_not_fit_is_refused_before_anything_moves() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path());
    let buffer = [0u16; 80];
    let at = |element: usize| buffer.as_ptr().wrapping_add(element).cast_mut().cast::<u8>();
    let one = || Request::new("one", Dtype::Bf16, Expr::Tensor("k".into())).on([Rank(1)]);
    for (requests, kind, message) in [
        (vec![qkv().memory(Rank(0), at(0), 62)], ErrorKind::Usage, "expected 64 bytes, found 62 bytes"),
        (vec![qkv().memory(Rank(0), at(0), 66)], ErrorKind::Usage, "expected 64 bytes, found 66 bytes"),
        (vec![qkv().memory(Rank(2), at(0), 64)], ErrorKind::NotFound, "no such tensor"),
        (vec![one().memory(Rank(0), at(0), 32)], ErrorKind::NotFound, "no such tensor"),
        (
            vec![qkv().memory(Rank(0), at(0).wrapping_add(1), 64)],
            ErrorKind::Usage,
            "the caller's memory does not start on an element: expected a multiple of 2",
        ),
        (
            vec![qkv().memory(Rank(0), at(0), 64).memory(Rank(1), at(31), 64)],
            ErrorKind::Usage,
            "the caller's memory overlaps that of `qkv` on rank 0",
        ),
        (
            vec![one().memory(Rank(1), at(33), 32), qkv().memory(Rank(0), at(32), 64)],
            ErrorKind::Usage,
            "the caller's memory overlaps that of `qkv` on rank 0",
        ),
        (
            vec![qkv().memory(Rank(0), at(0), 64).memory(Rank(0), at(32), 64)],
            ErrorKind::Usage,
            "the caller gives two memories for one destination",
        ),
    ] {
        let plan = Plan::of_requests(&checkpoint, &requests, &World::host(2)).unwrap();
        // SAFETY: what is given is refused.
        let error = unsafe { Loader::new().start_requests(&plan, &requests) }.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(message), "{error}\n{message}");
        assert!(error.tensor().is_some() && error.at().rank.is_some());
    }
}

#[test]
fn requests_go_beside_rules() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path());
    let world = World::host(2);
    let rules = Rules::new().submit(qkv());
    assert_eq!(Plan::new(&checkpoint, &rules, &world).unwrap_err().tensor(), Some("z"));
    let rules = rules.shard("z", ShardRule::dim(0)).alias("fused", "qkv");
    // What a request says of its type counts, whatever rules cast.
    let plan = Plan::new(&checkpoint, &rules.clone().casting(Dtype::F32), &world).unwrap();
    let of = |name: &str| plan.params().iter().find(|param| param.name == name).unwrap();
    assert_eq!((of("qkv").dtype, of("z").dtype, of("fused").alias_of), (Dtype::Bf16, Dtype::F32, Some(1)));
    let told = plan.explain("qkv").unwrap();
    assert!(told.contains("  request `qkv`: ") && told.contains("BF16 on 2 of 2 ranks"), "{told}");
    assert!(plan.explain("k").unwrap().contains("request `qkv`: "));
    // Without the list there is no plan of it.
    let only = Plan::new(&checkpoint, &rules.clone().keeping("qkv"), &world).unwrap();
    assert_eq!(only.params().len(), 1);
    let clash = rules.replicate("k").rename("qkv");
    let error = Plan::new(&checkpoint, &clash, &world).unwrap_err();
    assert!(error.rule() == Some("rename-collision") && error.message().contains("request `qkv`"), "{error}");
}
