//! What plans tell: bytes that are read for those that are needed, how often each byte is held, the story of a tensor.
//! Numbers are those of sharding.md section 13, or follow from the shapes by hand.

#[path = "support/released/mod.rs"]
mod released;

use released::{Bloom, DeepSeek, GptOss, Llama, Model};
use shardlift::plan::{ClassReport, Cut, DeviceSpec, Expr, Lowering, PlanReport, Reading};
use shardlift::{Checkpoint, Dtype, Plan, Rank, Rules, World, limits};

/// The plan of every tensor whose name ends so, cut along `dim`, as the process of one rank sees it.
fn member(model: Model, suffix: &str, dim: usize, rank: u32, ranks: u32) -> Plan {
    let checkpoint = only(model, |name| name.ends_with(suffix));
    let world = World::member(Rank(rank), ranks, DeviceSpec::Host);
    Plan::new(&checkpoint, &Rules::new().shard("**", dim), &world).unwrap()
}

/// A checkpoint of some tensors of a model.
fn only(mut model: Model, wanted: impl Fn(&str) -> bool) -> Checkpoint {
    let folder = tempfile::tempdir().unwrap();
    model.tensors.retain(|tensor| wanted(&tensor.name));
    model.files = 1;
    released::write(folder.path(), &model).unwrap();
    Checkpoint::open(folder.path()).unwrap()
}

fn only_class(report: &PlanReport) -> &ClassReport {
    let [class] = &report.classes[..] else { panic!("{report:?}") };
    class
}

#[test]
fn narrow_rows_are_covered_and_cut() {
    let [_8b, _70b] = [Llama::LLAMA_3_1_8B, Llama::LLAMA_3_1_70B];
    let deepseek = "model.layers.3.mlp.experts.0.down_proj.weight";
    for (model, suffix, dim, ranks) in [
        // Rows of 8192 bytes: pieces would cost 16 KiB each (`limits::READ_COST`).
        (_8b.model(), "layers.0.self_attn.o_proj.weight", 1, &[2, 4, 8][..]),
        // Rows of 16 KiB, which is what a piece costs.
        (_70b.model(), "layers.0.self_attn.o_proj.weight", 1, &[2, 4, 8, 16]),
        // Rows of 2048 and 1440 bytes: never in pieces.
        (DeepSeek::V3.model(), deepseek, 1, &[2, 4, 8, 16]),
        (GptOss::GPT_OSS_20B.model(), "layers.0.mlp.experts.down_proj_blocks", 2, &[2, 5]),
    ] {
        for &ranks in ranks {
            let plan = member(model.clone(), suffix, dim, ranks - 1, ranks);
            let report = plan.report();
            let class = only_class(&report);
            let bytes = plan.checkpoint().bytes();
            assert_eq!(class.needed_bytes, bytes / u64::from(ranks), "{suffix}");
            assert_eq!((class.reads, class.pieces, class.launches), (1, 1, 0), "{suffix}");
            assert_eq!((&class.lowering[..], &class.reading[..]), (&[Lowering::Rows][..], &[Reading::Cover][..]));
            // From the first to the last byte of this rank.
            let row = bytes / plan.rank(Rank(0)).pieces[0].loops[0].count;
            assert_eq!(class.read_bytes, bytes - row + row / u64::from(ranks), "{suffix}");
            assert!((class.over_read() - f64::from(ranks)).abs() < 0.001 * f64::from(ranks), "{suffix}");
        }
    }
}

#[test]
fn wide_rows_are_read_in_pieces_of_whole_pages() {
    let bloom = "h.0.mlp.dense_4h_to_h.weight";
    for (model, suffix, row, over_reads) in [
        (Llama::LLAMA_3_1_8B.model(), "layers.0.mlp.down_proj.weight", 28_672, &[(2, 1.29), (4, 1.57), (8, 2.14)][..]),
        (Llama::LLAMA_3_1_70B.model(), "layers.0.mlp.down_proj.weight", 57_344, &[(2, 1.14), (4, 1.29), (8, 1.57)]),
        (Bloom::BLOOM_176B.model(), bloom, 114_688, &[(2, 1.07), (4, 1.14), (8, 1.29), (16, 1.57)]),
    ] {
        for &(ranks, mean) in over_reads {
            let width = row / u64::from(ranks);
            let mut all = 0.0;
            for rank in 0..ranks {
                let plan = member(model.clone(), suffix, 1, rank, ranks);
                let report = plan.report();
                let class = only_class(&report);
                let meta = plan.tensor(0);
                let rows = meta.bytes() / row;
                assert_eq!((class.reads, class.needed_bytes), (rows, rows * width), "{suffix}");
                assert_eq!((&class.lowering[..], &class.reading[..]), (&[Lowering::Rows][..], &[Reading::Pieces][..]));
                let pages = |at: u64| {
                    let from = meta.start + at * row + u64::from(rank) * width;
                    (from + width).div_ceil(4096) - from / 4096
                };
                assert_eq!(class.read_bytes, (0..rows).map(pages).sum::<u64>() * 4096, "{suffix}");
                // A piece takes as long as 16 KiB, or its bytes and a page.
                let cost = rows * (width + 4096).max(16_384);
                assert_eq!(report.cost_bytes, cost);
                assert_eq!(report.predicted_seconds(Some(2.0), None), Some(cost as f64 / 2e9));
                assert_eq!(report.predicted_seconds(Some(1e9), Some(2.0)), Some((rows * width) as f64 / 2e9));
                all += class.over_read() / f64::from(ranks);
            }
            // The mean over all places in a page is the table's; one file has one of them.
            assert!((all - mean).abs() < 4096.0 / width as f64 * 0.51, "{suffix} {ranks}: {all}");
        }
    }
}

#[test]
fn one_process_reads_what_several_ranks_want_once() {
    let checkpoint = only(Llama::LLAMA_3_1_8B.model(), |name| name.contains("layers.0.") || name.contains("layers.1."));
    let rules = Rules::new().shard("**.{o,down}_proj.weight", 1).shard("**.*_proj.weight", 0).replicate("**");
    let report = Plan::new(&checkpoint, &rules, &World::host(8)).unwrap().report();
    assert_eq!((report.needed_bytes, report.read_bytes), (checkpoint.bytes(), checkpoint.bytes()));
    assert_eq!((report.over_read(), report.reads, report.pieces), (1.0, 18, 18 * 8));
    let class = |name: &str| report.classes.iter().find(|class| class.class == name).unwrap();
    let down = class("model.layers.*.mlp.down_proj.weight");
    assert_eq!(
        (down.tensors, &down.lowering[..], &down.reading[..]),
        (2, &[Lowering::Rows][..], &[Reading::FanOut][..])
    );
    assert_eq!(class("model.layers.*.self_attn.q_proj.weight").lowering, [Lowering::Contiguous]);
    assert_eq!(report.peak_staging_bytes, limits::STAGING as u64);
    assert_eq!(report.predicted_seconds(None, None), None);
}

#[test]
fn the_rule_for_pieces() {
    // sharding.md 13: pieces when max(P + 4096, B/Q) < L, with B/Q of 16 KiB; L is the gap and the piece.
    let pitch = |pitch: u64, piece: u64| limits::is_skipped(pitch - piece, piece);
    assert!(!pitch(4096, 1) && !pitch(8192, 1024) && !pitch(16_384, 2048));
    assert!(pitch(16_385, 2048) && pitch(28_672, 14_336) && pitch(57_344, 28_672));
    assert!(!pitch(40_000, 40_000 - 4096) && pitch(40_000, 40_000 - 4097));
}

#[test]
fn what_kernels_do_is_counted() {
    let checkpoint = only(Llama::LLAMA_3_1_8B.model(), |name| name == "model.layers.0.self_attn.q_proj.weight");
    for rules in [Rules::new().replicate("**").transpose(), Rules::new().replicate("**").cast(Dtype::F16)] {
        let report = Plan::new(&checkpoint, &rules, &World::host(1)).unwrap().report();
        assert_eq!(only_class(&report).lowering, [Lowering::Elements]);
        // 33,554,432 bytes in slots of 16 MiB.
        assert_eq!(report.launches, 2);
    }
}

#[test]
fn bytes_are_held_as_often_as_is_counted() {
    let checkpoint = only(Llama::LLAMA_3_1_8B.model(), |name| !name.contains("layers.") || name.contains("layers.0."));
    let heads = shardlift::plan::ShardRule::dim(0).unit(128).units(8).replicate_units();
    let rules = Rules::new()
        .shard("**.{k,v}_proj.weight", heads)
        .shard("**.q_proj.weight", 0)
        .shard("**.{o,down}_proj.weight", 1)
        .only("lm_head.weight", Rank(3))
        .skip("**.up_proj.weight")
        .replicate("**")
        .skipping("**.gate_proj.weight");
    let plan = Plan::new(&checkpoint, &rules, &World::host(16)).unwrap();
    let classes = plan.multiplicities();
    let told = |class: &str| classes.iter().find(|it| it.class == class).unwrap().to_string().trim().to_owned();
    let layer = "model.layers.*.";
    for (class, words) in [
        (&*format!("{layer}self_attn.k_proj.weight"), "{2} 8.4 MB each part shared by 2 ranks"),
        (&format!("{layer}self_attn.o_proj.weight"), "{1} 33.6 MB sharded over 16 ranks"),
        (&format!("{layer}input_layernorm.weight"), "{16} 8.2 kB replicated on all 16 ranks"),
        (&format!("{layer}mlp.up_proj.weight"), "{0} 117.4 MB skipped by `**.up_proj.weight`"),
        (&format!("{layer}mlp.gate_proj.weight"), "{0} 117.4 MB left out by a filter"),
        ("lm_head.weight", "{1} 1.05 GB on one rank"),
    ] {
        assert_eq!(told(class), format!("1  {class}: {words}"));
    }
}

/// Every line is short, and there are not too many.
fn explained(plan: &Plan, name: &str) -> String {
    let text = plan.explain(name).unwrap();
    assert!(text.lines().count() <= 40 && text.lines().all(|line| line.chars().count() <= 100), "{text}");
    text
}

#[test]
fn a_shard_is_explained() {
    let checkpoint = only(Llama::LLAMA_3_1_8B.model(), |name| name.ends_with("layers.0.self_attn.k_proj.weight"));
    let heads = shardlift::plan::ShardRule::dim(0).unit(128).units(8).replicate_units();
    let plan = Plan::new(&checkpoint, &Rules::new().shard("**.k_proj.weight", heads), &World::host(16)).unwrap();
    let start = checkpoint.tensors()[0].start;
    let text = explained(&plan, "model.layers.0.self_attn.k_proj.weight");
    for line in [
        "model.layers.0.self_attn.k_proj.weight: BF16 on 16 of 16 ranks",
        "  rule    `**.k_proj.weight`: shard = { dim = 0, unit = 128, units = 8, replicate_units = true }",
        "  read    8.4 MB for 8.4 MB needed (over-read 1.00) in 1 read: contiguous, covered once, fanned out",
        "  ranks 4-5 (tp 4-5): [128,4096], 1.0 MB: [256..384, all]",
        &format!("    file byte {} -> 0: 1048576 bytes: contiguous", start + 2 * 1_048_576),
    ] {
        assert!(text.lines().any(|found| found == line), "no {line:?} in\n{text}");
    }
    assert!(text.contains(&format!("BF16 [1024,4096], bytes {start}..")), "{text}");
}

#[test]
fn many_ranks_are_told_in_a_screenful() {
    let checkpoint = only(Llama::LLAMA_3_1_405B.model(), |name| name.ends_with("layers.0.mlp.down_proj.weight"));
    let plan = Plan::new(&checkpoint, &Rules::new().shard("**", 1), &World::host(4096)).unwrap();
    let text = explained(&plan, "model.layers.0.mlp.down_proj.weight");
    assert!(text.contains("rank 0 (tp 0)") && text.contains("rank 4095 (tp 4095)"), "{text}");
    assert!(text.contains("ranks between") && text.lines().count() >= 25, "{text}");
    let mesh = shardlift::plan::Mesh { dp: 3, pp: 2, ..shardlift::plan::Mesh::tp(2) };
    let plan = Plan::new(&checkpoint, &Rules::new().shard("**", 1), &World::host(1).with_mesh(mesh)).unwrap();
    let text = explained(&plan, "model.layers.0.mlp.down_proj.weight");
    assert!(text.contains("ranks 0, 2, 4, 6, 8, 10 (dp 0-2, pp 0-1, tp 0)"), "{text}");
}

#[test]
fn a_merged_destination_and_its_parts_are_explained() {
    let checkpoint = only(Llama::LLAMA_3_1_8B.model(), |name| name.contains("layers.0.mlp") || name.contains("head"));
    let shard = |name: &str| Expr::Shard { x: Box::new(Expr::Tensor(name.into())), dim: 0, cut: Cut::default() };
    let parts = vec![Expr::shard(0, Cut::default()), shard("{1}.up_proj.weight")];
    let merged = Expr::Concat { dim: 0, parts };
    let padded = Expr::Pad { x: Box::new(merged), dim: 0, to: 8192, fill: shardlift::plan::Fill::Zero };
    let rules = Rules::new()
        .place("**.gate_proj.weight", padded)
        .rename("{1}.gate_up.weight")
        .part("**.up_proj.weight")
        .skip("lm_head.weight")
        .shard("**", 1)
        .alias("tied", "model.layers.0.mlp.gate_up.weight");
    let plan = Plan::new(&checkpoint, &rules, &World::host(4)).unwrap();
    let text = explained(&plan, "model.layers.0.mlp.gate_up.weight");
    // Wherever its lines are broken.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in [
        "gate_up.weight: BF16 on 4 of 4 ranks",
        "tied shares its memory",
        "pad = { dim = 0, to = 8192, fill = \"zero\" }",
        "rank 1 (tp 1): [8192,4096], 67.1 MB",
        "[0..3584, all] is model.layers.0.mlp.gate_proj.weight [3584..7168, all]",
        "[3584..7168, all] is model.layers.0.mlp.up_proj.weight [3584..7168, all]",
        "[7168..8192, all] is zero",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    let up = explained(&plan, "model.layers.0.mlp.up_proj.weight");
    assert!(
        up.contains("no destination of its own") && up.contains("part of model.layers.0.mlp.gate_up.weight"),
        "{up}"
    );
    assert!(explained(&plan, "tied").contains("shares the memory of model.layers.0.mlp.gate_up.weight"));
    let head = explained(&plan, "lm_head.weight");
    assert!(head.contains("skipped by rule `lm_head.weight` on every rank") && head.contains("1.05 GB"), "{head}");
}
