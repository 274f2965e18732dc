//! The planner against a naive oracle, over real files that the reference implementation wrote.

#[path = "support/oracle.rs"]
mod oracle;

use std::path::Path;

use proptest::prelude::*;
use safetensors::tensor::TensorView;
use shardlift::plan::{BoxCopy, DeviceSpec, Plan, ReadExtent, Rules, ShardRule, Split, World};
use shardlift::{Checkpoint, Rank};

use oracle::{Case, Refusal};

type Written = safetensors::Dtype;

/// Each with the bits of an element.
const DTYPES: &[(Written, u64)] = &[
    (Written::BOOL, 8),
    (Written::F4, 4),
    (Written::F6_E2M3, 6),
    (Written::F8_E4M3, 8),
    (Written::BF16, 16),
    (Written::F32, 32),
    (Written::C64, 64),
    (Written::I64, 64),
];

/// Bytes that differ from their neighbours at every stride the tests use.
fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn write(path: &Path, tensors: &[(String, Written, Vec<u64>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, dims, data)| {
        let shape = dims.iter().map(|&dim| dim as usize).collect();
        (name.clone(), TensorView::new(*dtype, shape, data).expect("valid tensor"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("serializes")).expect("writes");
}

/// Executes copies one byte at a time and counts the writes of each.
fn execute(copies: &[BoxCopy], file: &[u8], bytes: u64) -> Vec<u8> {
    let mut out = vec![None; bytes as usize];
    for copy in copies {
        each(copy, &mut |src, dst| {
            assert!(out[dst as usize].replace(file[src as usize]).is_none(), "byte {dst} written twice");
        });
    }
    out.into_iter().map(|byte| byte.expect("every byte is written")).collect()
}

fn each(copy: &BoxCopy, visit: &mut dyn FnMut(u64, u64)) {
    let steps: u64 = copy.loops.iter().map(|inner| inner.count).product();
    for step in 0..steps {
        let (mut left, mut src, mut dst) = (step, copy.src, copy.dst);
        for inner in copy.loops.iter().rev() {
            src += left % inner.count * inner.src_stride;
            dst += left % inner.count * inner.dst_stride;
            left /= inner.count;
        }
        for byte in 0..copy.run {
            visit(src + byte, dst + byte);
        }
    }
}

/// The bytes that an extent reads.
fn read(extent: &ReadExtent) -> Vec<u64> {
    let steps: u64 = extent.outer.iter().map(|&(count, _)| count).product();
    let start = |step: u64| {
        let (mut left, mut at) = (step, extent.start);
        for &(count, stride) in extent.outer.iter().rev() {
            at += left % count * stride;
            left /= count;
        }
        at
    };
    (0..steps).flat_map(|step| start(step)..start(step) + extent.run).collect()
}

/// The reads of each process are disjoint, and give every destination all its bytes.
fn check_reads(plan: &Plan, file_len: usize) {
    for reader in (0..plan.world().size()).map(Rank) {
        let mut reads = vec![0; file_len];
        for extent in plan.extents().iter().filter(|extent| extent.reader == reader) {
            let bytes = read(extent);
            bytes.iter().for_each(|&byte| reads[byte as usize] += 1);
            for consumer in plan.consumers(extent) {
                let piece = &plan.rank(consumer.rank).pieces[consumer.piece as usize];
                let set: std::collections::HashSet<u64> = bytes.iter().copied().collect();
                each(piece, &mut |src, _| assert!(set.contains(&src), "byte {src} is not in its extent"));
            }
        }
        assert!(reads.iter().all(|&times| times <= 1), "a byte is read twice");
    }
    let fed: usize = plan.extents().iter().map(|extent| plan.consumers(extent).len()).sum();
    let pieces: usize = plan.ranks().iter().map(|rank| rank.pieces.len()).sum();
    assert_eq!(fed, pieces, "every piece is fed once");
}

fn shards() -> impl Strategy<Value = (Written, Case)> {
    let dims = prop::collection::vec(0u64..7, 0..5);
    (0..DTYPES.len(), dims, any::<prop::sample::Index>(), any::<bool>(), any::<bool>(), 1u64..4, 1u64..6).prop_map(
        |(dtype, mut dims, dim, shard, ceil, unit, ranks)| {
            let (dtype, bits) = DTYPES[dtype];
            if bits < 8 {
                match dims.last_mut() {
                    Some(last) => *last *= 4,
                    None => dims.push(4),
                }
            }
            let dim = (shard && !dims.is_empty()).then(|| dim.index(dims.len()));
            if let (Some(dim), false) = (dim, ceil) {
                // Even shards of random sizes would nearly always be refused.
                dims[dim] *= if dims[dim] % 2 == 0 { unit * ranks } else { 1 };
            }
            (dtype, Case { bits, dims, dim, ceil, unit, ranks })
        },
    )
}

fn rules(case: &Case) -> Rules {
    match case.dim {
        None => Rules::new().replicate("w"),
        Some(dim) => {
            let split = if case.ceil { Split::Ceil } else { Split::Even };
            Rules::new().shard("w", ShardRule::dim(dim).unit(case.unit).split(split))
        }
    }
    .replicate("before")
}

proptest! {
    #[test]
    fn every_rank_gets_what_the_oracle_says((dtype, case) in shards(), per_process in any::<bool>()) {
        let bytes = case.dims.iter().product::<u64>() * case.bits / 8;
        let data = noise(bytes as usize);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let before = ("before".to_owned(), Written::U8, vec![5], vec![1, 2, 3, 4, 5]);
        write(&path, &[before, ("w".to_owned(), dtype, case.dims.clone(), data.clone())]);

        let checkpoint = Checkpoint::open(&path).unwrap();
        let ranks = case.ranks as u32;
        let world = if per_process { World::member(Rank(0), ranks, DeviceSpec::Host) } else { World::host(ranks) };
        let expected: Result<Vec<_>, Refusal> = (0..case.ranks).map(|rank| case.part(&data, rank)).collect();
        let planned = Plan::new(&checkpoint, &rules(&case), &world);
        let (plan, expected) = match (planned, expected) {
            (Ok(plan), Ok(expected)) => (plan, expected),
            (Err(error), Err(refusal)) => {
                let rules: &[&str] = match refusal {
                    Refusal::Uneven => &["unit", "not-divisible"],
                    Refusal::Misaligned => &["cut-not-on-bytes"],
                };
                prop_assert!(error.rule().is_some_and(|rule| rules.contains(&rule)), "{error:?} for {refusal:?}");
                prop_assert_eq!(error.tensor(), Some("w"));
                return Ok(());
            }
            (planned, expected) => panic!("planned {planned:?}, expected {expected:?}"),
        };

        let file = std::fs::read(&path).unwrap();
        for (rank, (shape, bytes)) in plan.ranks().iter().zip(expected) {
            let dest = rank.dests.iter().find(|dest| plan.params()[dest.param as usize].name == "w").unwrap();
            prop_assert_eq!(dest.shape.dims(), &shape[..]);
            prop_assert_eq!(dest.bytes, bytes.len() as u64);
            let pieces = &rank.pieces[dest.pieces.start as usize..dest.pieces.end as usize];
            prop_assert_eq!(execute(pieces, &file, dest.bytes), bytes);
        }
        check_reads(&plan, file.len());
        if !per_process {
            prop_assert_eq!(plan.needed_bytes(plan.world().driven()), checkpoint.bytes());
            prop_assert_eq!(plan.storage_bytes(), checkpoint.bytes());
        }
    }
}
