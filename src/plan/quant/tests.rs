//! Modules over synthetic headers: shapes by hand from sharding.md section 7.

use super::{Packed, Quantization};
use crate::dtype::Dtype::{self, Bf16, F8E4M3, F16, F32, I32, I64, U8};
use crate::error::Error;
use crate::extent::Rank;
use crate::plan::tests::checkpoint;
use crate::plan::{Coord, Cut, Expr, Fill, Plan, Rules, ShardRule, Split, World};
use crate::shape::Shape;

fn plan(tensors: &[(&str, Dtype, &[u64])], rules: &Rules, ranks: u32) -> Result<Plan, Error> {
    Plan::new(&checkpoint(tensors, None), rules, &World::host(ranks))
}

/// The shapes of a rank's destinations, by name.
fn shapes(plan: &Plan, rank: u32) -> Vec<(&str, Vec<u64>)> {
    let dests = plan.rank(Rank(rank)).dests.iter();
    dests.map(|dest| (plan.params()[dest.param as usize].name.as_str(), dest.shape.dims().to_vec())).collect()
}

fn shard(dim: usize, unit: u64) -> Expr {
    Expr::shard(dim, Cut { unit, ..Cut::default() })
}

fn gptq(act_order: bool) -> Quantization {
    Quantization { packed: Some(Packed::Gptq), group: Some(128), act_order, ..Quantization::default() }
}

/// Llama-2-7B's down_proj [4096, 11008] with groups of 128.
const DOWN: [(&str, Dtype, &[u64]); 5] = [
    ("m.bias", F16, &[4096]),
    ("m.g_idx", I32, &[11008]),
    ("m.qweight", I32, &[1376, 4096]),
    ("m.qzeros", I32, &[86, 512]),
    ("m.scales", F16, &[86, 4096]),
];

#[test]
fn gptq_is_cut_along_inputs_and_outputs() {
    let rows = Rules::new().module("m", shard(1, 1)).quantization(gptq(false));
    let expected = |k: u64, groups: u64, n: u64| {
        vec![
            ("m.bias", vec![n]),
            ("m.g_idx", vec![k]),
            ("m.qweight", vec![k / 8, n]),
            ("m.qzeros", vec![groups, n / 8]),
            ("m.scales", vec![groups, n]),
        ]
    };
    assert_eq!(shapes(&plan(&DOWN, &rows, 2).unwrap(), 1), expected(5504, 43, 4096));
    // 86 groups: 2 and 43 divide them.
    let error = plan(&DOWN, &rows, 4).unwrap_err();
    assert_eq!(
        (error.rule(), error.tensor(), error.expected(), error.found()),
        (Some("not-divisible"), Some("m.qweight"), Some("a divisor of 86 units: 1, 2, 43, 86"), Some("4 parts"))
    );
    assert!(error.message().contains("units of 128"), "{error}");
    let columns = Rules::new().module("m", shard(0, 128)).quantization(gptq(false));
    let plan = plan(&DOWN, &columns, 4).unwrap();
    let shapes = shapes(&plan, 1);
    assert_eq!(shapes[0], ("m.bias", vec![1024]));
    assert_eq!(
        shapes[1..],
        [
            ("m.g_idx", vec![11008]),
            ("m.qweight", vec![1376, 1024]),
            ("m.qzeros", vec![86, 128]),
            ("m.scales", vec![86, 1024])
        ]
    );
}

#[test]
fn activation_order_keeps_all_groups() {
    let rules = Rules::new().module("m", shard(1, 1)).quantization(gptq(true));
    let plan = plan(&DOWN, &rules, 4).unwrap();
    assert_eq!(
        shapes(&plan, 3)[1..],
        [
            ("m.g_idx", vec![2752]),
            ("m.qweight", vec![344, 4096]),
            ("m.qzeros", vec![86, 512]),
            ("m.scales", vec![86, 4096])
        ]
    );
}

#[test]
fn awq_is_packed_along_the_outputs() {
    let tensors: [(&str, Dtype, &[u64]); 3] =
        [("m.qweight", I32, &[4096, 512]), ("m.qzeros", I32, &[32, 512]), ("m.scales", F16, &[32, 4096])];
    let awq = Quantization { packed: Some(Packed::Awq), ..Quantization::default() };
    let rules = |dim| Rules::new().module("m", shard(dim, 1)).quantization(awq.clone());
    let columns = plan(&tensors, &rules(0), 4).unwrap();
    assert_eq!(
        shapes(&columns, 1),
        [("m.qweight", vec![4096, 128]), ("m.qzeros", vec![32, 128]), ("m.scales", vec![32, 1024])]
    );
    let rows = plan(&tensors, &rules(1), 4).unwrap();
    assert_eq!(
        shapes(&rows, 1),
        [("m.qweight", vec![1024, 512]), ("m.qzeros", vec![8, 512]), ("m.scales", vec![8, 4096])]
    );
    let error = plan(&tensors, &Rules::new().module("m", shard(0, 1)), 2).unwrap_err();
    assert_eq!((error.rule(), error.tensor()), (Some("quantization"), Some("m.qweight")));
}

#[test]
fn packed_tensors_have_zeros_along_the_outputs() {
    let tensors: [(&str, Dtype, &[u64]); 4] = [
        ("m.weight_packed", I32, &[64, 32]),
        ("m.weight_scale", Bf16, &[64, 2]),
        ("m.weight_shape", I64, &[2]),
        ("m.weight_zero_point", I32, &[8, 2]),
    ];
    let rules = |dim, unit| Rules::new().module("m", shard(dim, unit));
    assert_eq!(
        shapes(&plan(&tensors, &rules(0, 4), 4).unwrap(), 1),
        [
            ("m.weight_packed", vec![16, 32]),
            ("m.weight_scale", vec![16, 2]),
            ("m.weight_shape", vec![2]),
            ("m.weight_zero_point", vec![2, 2])
        ]
    );
    assert_eq!(shapes(&plan(&tensors, &rules(1, 1), 2).unwrap(), 1)[0], ("m.weight_packed", vec![64, 16]));
    let error = plan(&tensors, &rules(1, 1), 4).unwrap_err();
    assert_eq!((error.expected(), error.found()), (Some("a divisor of 2 units: 1, 2"), Some("4 parts")));
}

/// `weight_g_idx` numbers the groups of the whole: whoever has some inputs may need any of them, whatever is said of the
/// activation order.
#[test]
fn packed_inputs_in_any_order_keep_all_groups() {
    let tensors: [(&str, Dtype, &[u64]); 4] = [
        ("m.weight_g_idx", I32, &[256]),
        ("m.weight_packed", I32, &[64, 32]),
        ("m.weight_scale", Bf16, &[64, 8]),
        ("m.weight_zero_point", I32, &[8, 8]),
    ];
    for act_order in [false, true] {
        let quantization = Quantization { group: Some(32), act_order, ..Quantization::default() };
        let rules = Rules::new().module("m", shard(1, 1)).quantization(quantization);
        let two = plan(&tensors, &rules, 2).unwrap();
        for rank in 0..2 {
            assert_eq!(
                shapes(&two, rank),
                [
                    ("m.weight_g_idx", vec![128]),
                    ("m.weight_packed", vec![64, 16]),
                    ("m.weight_scale", vec![64, 8]),
                    ("m.weight_zero_point", vec![8, 8])
                ]
            );
        }
    }
}

#[test]
fn scales_are_those_of_a_tensor_a_row_or_a_group() {
    let of = |dtype, scale: &[u64], scale_dtype| {
        let tensors = [("m.weight", dtype, &[64, 64][..]), ("m.weight_scale", scale_dtype, scale)];
        let shape = |dim| shapes(&plan(&tensors, &Rules::new().module("m", shard(dim, 1)), 2).unwrap(), 1)[1].1.clone();
        (shape(0), shape(1))
    };
    assert_eq!(of(F8E4M3, &[], F32), (vec![], vec![]));
    assert_eq!(of(F8E4M3, &[1], F32), (vec![1], vec![1]));
    assert_eq!(of(F8E4M3, &[64, 1], F32), (vec![32, 1], vec![64, 1]));
    assert_eq!(of(F8E4M3, &[64, 2], U8), (vec![32, 2], vec![64, 1]));
    // Two FP4 to a byte: 128 inputs in groups of 16.
    assert_eq!(of(U8, &[64, 8], F8E4M3), (vec![32, 8], vec![64, 4]));
    let tensors = [("m.weight", F8E4M3, &[64, 64][..]), ("m.weight_scale", F32, &[3, 5])];
    let error = plan(&tensors, &Rules::new().module("m", shard(0, 1)), 1).unwrap_err();
    assert_eq!((error.rule(), error.tensor()), (Some("quantization"), Some("m.weight_scale")));
}

/// DeepSeek-V3's expert gate.
const GATE: [(&str, Dtype, &[u64]); 2] = [("m.weight", F8E4M3, &[2048, 7168]), ("m.weight_scale_inv", F32, &[16, 56])];

#[test]
fn blocks_are_cut_whole_or_refined() {
    let strict = Rules::new().module("m", shard(0, 1));
    assert_eq!(
        shapes(&plan(&GATE, &strict, 16).unwrap(), 15),
        [("m.weight", vec![128, 7168]), ("m.weight_scale_inv", vec![1, 56])]
    );
    let error = plan(&GATE, &strict, 32).unwrap_err();
    assert_eq!(
        (error.rule(), error.tensor(), error.expected()),
        (Some("not-divisible"), Some("m.weight"), Some("a divisor of 16 units: 1, 2, 4, 8, 16"))
    );
    let refining = Quantization { refine: true, ..Quantization::default() };
    let refined = strict.clone().quantization(refining.clone());
    let refined_plan = plan(&GATE, &refined, 32).unwrap();
    assert_eq!(shapes(&refined_plan, 5), [("m.weight", vec![64, 7168]), ("m.weight_scale_inv", vec![1, 112])]);
    // Nothing changes where nothing has to.
    let (same, before) = (plan(&GATE, &refined, 16).unwrap(), plan(&GATE, &strict, 16).unwrap());
    assert_eq!(same.digest(), before.digest());
    // 16 rows: smaller than any block that kernels know.
    assert_eq!(plan(&GATE, &refined, 128).unwrap_err().rule(), Some("not-divisible"));
}

/// Gate and up of 1536 outputs each in one tensor: 192 of 8 ranks are a block of 128 and a half.
#[test]
fn blocks_of_fused_modules_are_refined() {
    let fused = [("m.weight", F8E4M3, &[3072, 4096][..]), ("m.weight_scale_inv", F32, &[24, 32])];
    let half = |start| Expr::Slice { x: Box::new(Expr::Source), dim: 0, start, len: 1536, step: 1 };
    let parts = |x: &dyn Fn(Expr) -> Expr| Expr::Concat {
        dim: 0,
        parts: [0, 1536].map(|at| Expr::Shard { x: Box::new(x(half(at))), dim: 0, cut: Cut::default() }).into(),
    };
    let refining = Quantization { refine: true, ..Quantization::default() };
    let strict = Rules::new().module("m", parts(&|x| x));
    assert_eq!(plan(&fused, &strict, 8).unwrap_err().rule(), Some("not-divisible"));
    let refined = plan(&fused, &strict.clone().quantization(refining.clone()), 8).unwrap();
    assert_eq!(shapes(&refined, 5), [("m.weight", vec![384, 4096]), ("m.weight_scale_inv", vec![6, 64])]);
    // Each scale of 64 x 64 is the one of the block of 128 x 128 that these lie in.
    let rank = refined.rank(Rank(5));
    let mut scales = [[u64::MAX; 64]; 6];
    for piece in &rank.pieces[rank.dests[1].pieces.start as usize..rank.dests[1].pieces.end as usize] {
        let mut places = vec![(piece.src - refined.tensor(piece.tensor).start, piece.dst)];
        for inner in &piece.loops {
            let steps = |(src, dst): (u64, u64)| {
                (0..inner.count).map(move |at| (src + at * inner.src_stride, dst + at * inner.dst_stride))
            };
            places = places.into_iter().flat_map(steps).collect();
        }
        for (src, dst) in places {
            (0..piece.run / 4)
                .for_each(|at| scales[dst as usize / 256][dst as usize % 256 / 4 + at as usize] = src / 4 + at);
        }
    }
    for (row, scales) in scales.iter().enumerate() {
        let first = row as u64 / 3 * 1536 + 5 * 192 + row as u64 % 3 * 64;
        assert!((0..64).all(|column| scales[column as usize] == first / 128 * 32 + column / 2), "{row}: {scales:?}");
    }
    // What fits as it is stays as it is.
    let (same, before) =
        (plan(&fused, &strict.clone().quantization(refining), 4).unwrap(), plan(&fused, &strict, 4).unwrap());
    assert_eq!(same.digest(), before.digest());
}

#[test]
fn a_partial_block_is_only_the_last() {
    // DeepSeek-V3: q_a_proj and kv_a_proj_with_mqa, 12 and 4.5 blocks of outputs.
    let tensors: [(&str, Dtype, &[u64]); 4] = [
        ("kv.weight", F8E4M3, &[576, 7168]),
        ("kv.weight_scale_inv", F32, &[5, 56]),
        ("q.weight", F8E4M3, &[1536, 7168]),
        ("q.weight_scale_inv", F32, &[12, 56]),
    ];
    let merged = |first: &str, second: &str| {
        let parts = vec![Expr::Source, Expr::Tensor(second.into())];
        Rules::new().module(first, Expr::Concat { dim: 0, parts }).rename("qkv").module_part(second)
    };
    assert_eq!(
        shapes(&plan(&tensors, &merged("q", "kv"), 4).unwrap(), 3),
        [("qkv.weight", vec![2112, 7168]), ("qkv.weight_scale_inv", vec![17, 56])]
    );
    let error = plan(&tensors, &merged("kv", "q"), 4).unwrap_err();
    assert_eq!((error.rule(), error.expected()), (Some("unit"), Some("a multiple of 128")));
}

#[test]
fn merged_modules_keep_one_scale_for_each_part() {
    let tensors: [(&str, Dtype, &[u64]); 6] = [
        ("gate.input_scale", F32, &[]),
        ("gate.weight", F8E4M3, &[64, 32]),
        ("gate.weight_scale", F32, &[1]),
        ("up.input_scale", F32, &[]),
        ("up.weight", F8E4M3, &[64, 32]),
        ("up.weight_scale", F32, &[1]),
    ];
    let part = |x| Expr::Shard { x: Box::new(x), dim: 0, cut: Cut::default() };
    let parts = vec![part(Expr::Source), part(Expr::Tensor("up".into()))];
    let rules = Rules::new().module("gate", Expr::Concat { dim: 0, parts }).rename("gate_up").module_part("up");
    assert_eq!(
        shapes(&plan(&tensors, &rules, 4).unwrap(), 2),
        [("gate_up.input_scale", vec![2]), ("gate_up.weight", vec![32, 32]), ("gate_up.weight_scale", vec![2])]
    );
}

#[test]
fn groups_in_the_same_order_are_merged_once() {
    let module = |name: &'static str| -> [(String, Dtype, Vec<u64>); 4] {
        [
            ("g_idx", I32, vec![64]),
            ("qweight", I32, vec![8, 32]),
            ("qzeros", I32, vec![4, 4]),
            ("scales", F16, vec![4, 32]),
        ]
        .map(|(suffix, dtype, shape)| (format!("{name}.{suffix}"), dtype, shape))
    };
    let tensors: Vec<_> = module("k").into_iter().chain(module("q")).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, &shape[..])).collect();
    let quantization = Quantization { packed: Some(Packed::Gptq), group: Some(16), ..Quantization::default() };
    let part = |x| Expr::Shard { x: Box::new(x), dim: 0, cut: Cut { unit: 8, ..Cut::default() } };
    let parts = vec![part(Expr::Source), part(Expr::Tensor("k".into()))];
    let rules = Rules::new().module("q", Expr::Concat { dim: 0, parts }).rename("qk").module_part("k");
    let plan = plan(&tensors, &rules.quantization(quantization), 2).unwrap();
    assert_eq!(
        shapes(&plan, 1),
        [("qk.g_idx", vec![64]), ("qk.qweight", vec![8, 32]), ("qk.qzeros", vec![4, 4]), ("qk.scales", vec![4, 32])]
    );
}

#[test]
fn mxfp4_blocks_are_cut_along_stacked_experts() {
    // gpt-oss-20b's down_proj: 90 blocks of 32.
    let tensors: [(&str, Dtype, &[u64]); 3] = [
        ("down_bias", Bf16, &[32, 2880]),
        ("down_blocks", U8, &[32, 2880, 90, 16]),
        ("down_scales", U8, &[32, 2880, 90]),
    ];
    let cut = Cut { how: Split::Ceil, ..Cut::default() };
    let rules = Rules::new()
        .module("down", Expr::shard(2, cut))
        .bias_on(Coord::Axis(crate::plan::Ax::Tp), 0, Fill::Zero)
        .suffix("_blocks", "_weight");
    let plan = plan(&tensors, &rules, 4).unwrap();
    for (rank, blocks) in [(0, 23), (1, 23), (3, 21)] {
        assert_eq!(
            shapes(&plan, rank),
            [
                ("down_bias", vec![32, 2880]),
                ("down_scales", vec![32, 2880, blocks]),
                ("down_weight", vec![32, 2880, blocks, 16])
            ]
        );
    }
    assert_eq!(plan.rank(Rank(0)).fills.len() + plan.rank(Rank(1)).fills.len(), 1);
}

#[test]
fn rows_of_bitsandbytes_are_not_cut() {
    let tensors: [(&str, Dtype, &[u64]); 6] = [
        ("m.weight", U8, &[64 * 1024 / 2, 1]),
        ("m.weight.absmax", U8, &[1024]),
        ("m.weight.nested_absmax", F32, &[4]),
        ("m.weight.nested_quant_map", F32, &[256]),
        ("m.weight.quant_map", F32, &[16]),
        ("m.weight.quant_state.bitsandbytes__nf4", U8, &[89]),
    ];
    let heads = |dim| ShardRule::dim(dim).unit(4).units(if dim == 0 { 16 } else { 256 });
    let columns = plan(&tensors, &Rules::new().module("m", heads(0).expr()), 4).unwrap();
    assert_eq!(
        shapes(&columns, 1)[..3],
        [("m.weight", vec![8192, 1]), ("m.weight.absmax", vec![256]), ("m.weight.nested_absmax", vec![1])]
    );
    let error = plan(&tensors, &Rules::new().module("m", heads(0).expr()), 8).unwrap_err();
    assert_eq!(error.expected(), Some("a divisor of 4 units: 1, 2, 4"));
    let error = plan(&tensors, &Rules::new().module("m", Expr::shard(1, Cut::default())), 2).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("quantization"), Some("2 parts")));
}

#[test]
fn adapters_are_cut_as_their_base_layer() {
    let tensors: [(&str, Dtype, &[u64]); 4] = [
        ("base.o.lora_A.weight", F32, &[16, 4096]),
        ("base.o.lora_B.weight", F32, &[4096, 16]),
        ("base.q.lora_A.weight", F32, &[16, 4096]),
        ("base.q.lora_B.weight", F32, &[4096, 16]),
    ];
    let rules = Rules::new().module("**.q", shard(0, 128)).module("**.o", shard(1, 128));
    assert_eq!(
        shapes(&plan(&tensors, &rules, 4).unwrap(), 1),
        [
            ("base.o.lora_A.weight", vec![16, 1024]),
            ("base.o.lora_B.weight", vec![4096, 16]),
            ("base.q.lora_A.weight", vec![16, 4096]),
            ("base.q.lora_B.weight", vec![1024, 16])
        ]
    );
}

#[test]
fn zero_points_of_rows_are_cut_with_them_and_what_is_not_known_is_refused() {
    let tensors = |zeros: &'static str| {
        [("m.weight", Dtype::I8, &[128, 64][..]), ("m.weight_scale", F32, &[128, 1]), (zeros, Dtype::I8, &[128, 1])]
    };
    let rules = Rules::new().module("m", shard(0, 1));
    let plan_of = |zeros| plan(&tensors(zeros), &rules, 2);
    assert_eq!(shapes(&plan_of("m.weight_zero_point").unwrap(), 1)[2], ("m.weight_zero_point", vec![64, 1]));
    let error = plan_of("m.input_scale").unwrap_err();
    assert_eq!(
        (error.rule(), error.tensor(), error.found()),
        (Some("quantization"), Some("m.input_scale"), Some("128"))
    );
}

#[test]
fn a_block_that_is_all_of_a_side_is_shared_but_followed_only_when_full() {
    let merged = |rows: u64, ranks: u32, refine: bool| {
        let names: [(&str, Dtype, Vec<u64>); 4] = [
            ("gate.weight", F8E4M3, vec![rows, 256]),
            ("gate.weight_scale_inv", F32, vec![rows.div_ceil(128), 2]),
            ("up.weight", F8E4M3, vec![rows, 256]),
            ("up.weight_scale_inv", F32, vec![rows.div_ceil(128), 2]),
        ];
        let tensors: Vec<_> = names.iter().map(|(name, dtype, shape)| (*name, *dtype, &shape[..])).collect();
        let part = |x| Expr::Shard { x: Box::new(x), dim: 0, cut: Cut::default() };
        let parts = vec![part(Expr::Source), part(Expr::Tensor("up".into()))];
        let rules = Rules::new().module("gate", Expr::Concat { dim: 0, parts }).rename("gate_up").module_part("up");
        let rules = rules.quantization(Quantization { refine, ..Quantization::default() });
        plan(&tensors, &rules, ranks).map(|plan| shapes(&plan, 0)[1].1.clone())
    };
    assert_eq!(merged(128, 1, false).unwrap(), [2, 2]);
    // 64 rows, and then those of another block.
    for (rows, ranks) in [(64, 1), (128, 2)] {
        let error = merged(rows, ranks, false).unwrap_err();
        assert_eq!((error.rule(), error.expected()), (Some("unit"), Some("a multiple of 128")), "{rows} {ranks}");
    }
    assert_eq!(merged(128, 2, true).unwrap(), [2, 4]);
    // Alone it needs nothing.
    let alone = [("m.weight", F8E4M3, &[128, 256][..]), ("m.weight_scale_inv", F32, &[1, 2])];
    let alone = plan(&alone, &Rules::new().module("m", shard(0, 1)), 2).unwrap();
    assert_eq!(shapes(&alone, 1), [("m.weight", vec![64, 256]), ("m.weight_scale_inv", vec![1, 2])]);
}

#[test]
fn scales_of_inputs_before_outputs_turn_nothing_round() {
    let tensors = [("m.weight", Dtype::I8, &[64, 64][..]), ("m.weight_scale", F32, &[])];
    let rules = Rules::new().module("m", shard(1, 1)).orientation(crate::plan::Orientation::InOut);
    assert_eq!(shapes(&plan(&tensors, &rules, 2).unwrap(), 1)[0], ("m.weight", vec![32, 64]));
    let blocks = [("m.weight", F8E4M3, &[256, 256][..]), ("m.weight_scale_inv", F32, &[2, 2])];
    assert_eq!(plan(&blocks, &rules, 2).unwrap_err().rule(), Some("quantization"));
}

#[test]
fn quantised_weights_without_elements_are_refused() {
    let whole = Rules::new().module("m", Expr::Source);
    let rows = Rules::new().module("m", shard(1, 1));
    let gptq = whole.clone().quantization(gptq(false));
    type Tensors<'a> = &'a [(&'a str, Dtype, &'a [u64])];
    let large = 1 << 62;
    let cases: [(Tensors<'_>, &Rules); 10] = [
        (&[("m.weight", U8, &[0, 1]), ("m.weight.absmax", U8, &[0])], &whole),
        (&[("m.weight", F8E4M3, &[4, 0]), ("m.weight_scale", F32, &[4, 2])], &rows),
        (&[("m.weight", F8E4M3, &[0, 4]), ("m.weight_scale", F32, &[0, 2])], &rows),
        (&[("m.weight", F8E4M3, &[4, 0]), ("m.weight_scale_inv", F32, &[1, 0])], &rows),
        (&[("m.weight_packed", I32, &[4, 0]), ("m.weight_scale", Bf16, &[4, 2])], &rows),
        (&[("m.qweight", I32, &[0, 4]), ("m.scales", F16, &[2, 4])], &gptq),
        (&[("m_blocks", U8, &[2, 4, 0, 16]), ("m_scales", U8, &[2, 4, 0])], &whole),
        // Beside a dimension of 0 a header has room for others of any size.
        (&[("m_blocks", U8, &[0, 0, large, 16]), ("m_scales", U8, &[0, 0, large])], &whole),
        (&[("m.weight", U8, &[0, 1 << 63]), ("m.weight_scale", F32, &[0, 1])], &whole),
        (&[("m.qweight", I32, &[large, 0]), ("m.scales", F16, &[0, 0])], &gptq),
    ];
    for (tensors, rules) in cases {
        let error = plan(tensors, rules, 2).unwrap_err();
        assert_eq!((error.rule(), error.tensor()), (Some("quantization"), Some(tensors[0].0)), "{error}");
        assert_eq!(error.found(), Some(Shape::new(tensors[0].2).to_string().as_str()));
    }
    // One that nobody quantised may have none.
    let plain = plan(&[("m.bias", F32, &[4]), ("m.weight", F32, &[4, 0])], &rows, 2).unwrap();
    assert_eq!(shapes(&plain, 1), [("m.bias", vec![4]), ("m.weight", vec![4, 0])]);
}
