//! Whole plans over synthetic headers.

use std::time::{Duration, Instant};

use super::*;
use crate::error::{Error, ErrorKind};

/// One file with these tensors one after the other.
pub(super) fn checkpoint(tensors: &[(&str, Dtype, &[u64])], config: Option<serde_json::Value>) -> Checkpoint {
    let mut end = 128;
    let metas = tensors.iter().map(|&(name, dtype, dims)| {
        let shape = Shape::new(dims);
        let start = end;
        end += shape.bytes(dtype).expect("whole bytes");
        TensorMeta { name: name.into(), file: FileId(0), dtype, shape, start, end }
    });
    Checkpoint::synthetic(metas.collect(), config)
}

fn two() -> Checkpoint {
    checkpoint(&[("row", Dtype::F32, &[8, 4]), ("col", Dtype::F32, &[4, 8]), ("all", Dtype::F32, &[3])], None)
}

fn rules() -> Rules {
    Rules::new().shard("row", 0).shard("col", 1).replicate("all")
}

fn refused(checkpoint: &Checkpoint, rules: &Rules, world: &World) -> Error {
    Plan::new(checkpoint, rules, world).expect_err("refused")
}

#[test]
fn one_process_reads_every_byte_once() {
    let checkpoint = two();
    let plan = Plan::new(&checkpoint, &rules(), &World::host(4)).unwrap();
    assert_eq!(plan.extents().len(), 3);
    assert_eq!(plan.storage_bytes(), checkpoint.bytes());
    assert_eq!(plan.needed_bytes(plan.world().driven()), checkpoint.bytes());
    for extent in plan.extents() {
        assert_eq!((extent.outer.len(), plan.consumers(extent).len(), extent.reader), (0, 4, Rank(0)));
    }
    assert!(plan.extents().is_sorted_by_key(|extent| extent.start));
    assert_eq!(plan.bytes_on(Rank(1)), 32 + 32 + 12);
    assert_eq!(plan.needed_bytes(&[Rank(1)]), 32 + 32 + 12);
}

#[test]
fn members_read_their_own_and_agree_on_the_digest() {
    let checkpoint = two();
    let whole = Plan::new(&checkpoint, &rules(), &World::host(4)).unwrap();
    for rank in 0..4 {
        let world = World::member(Rank(rank), 4, DeviceSpec::HostStaged);
        let plan = Plan::new(&checkpoint, &rules(), &world).unwrap();
        assert_eq!(plan.digest(), whole.digest());
        assert_eq!(plan.extents().len(), 12);
        // The columns lie so close that their span is read.
        assert_eq!(plan.storage_bytes(), 32 + (3 * 32 + 8) + 12);
        assert!(plan.extents().iter().all(|extent| plan.consumers(extent).iter().all(|c| c.rank == extent.reader)));
    }
    let other = Plan::new(&checkpoint, &rules(), &World::host(2)).unwrap();
    assert_ne!(other.digest(), whole.digest());
}

#[test]
fn distant_columns_are_read_in_pieces() {
    let checkpoint = checkpoint(&[("w", Dtype::Bf16, &[8192, 28672])], None);
    let world = World::member(Rank(7), 8, DeviceSpec::Host);
    let plan = Plan::new(&checkpoint, &Rules::new().shard("w", 1), &world).unwrap();
    let extent = plan.extents().iter().find(|extent| extent.reader == Rank(7)).unwrap();
    assert_eq!((extent.start, extent.run, extent.outer.as_slice()), (128 + 50_176, 7_168, &[(8192, 57_344)][..]));
    assert_eq!(plan.storage_bytes(), plan.bytes_on(Rank(7)));
    let whole = Plan::new(&checkpoint, &Rules::new().shard("w", 1), &World::host(8)).unwrap();
    assert_eq!(whole.extents().len(), 1);
    assert_eq!(whole.storage_bytes(), checkpoint.bytes());
}

#[test]
fn rules_must_fit_the_checkpoint() {
    let checkpoint = two();
    let error = refused(&checkpoint, &Rules::new().shard("row", 0), &World::host(2));
    assert_eq!((error.kind(), error.rule(), error.tensor()), (ErrorKind::Rules, Some("unmatched-tensor"), Some("col")));
    assert!(error.to_string().contains("{ match = \"col\", replicate = true }"), "{error}");
    assert_eq!(error.at().rank, None);
    let error = refused(&checkpoint, &rules().replicate("typo.**"), &World::host(2));
    assert_eq!(error.rule(), Some("unused-rule"));
    assert!(Plan::new(&checkpoint, &rules().replicate("typo.**").optional(), &World::host(2)).is_ok());
    let error = refused(&checkpoint, &rules(), &World::host(3));
    assert_eq!((error.rule(), error.tensor()), (Some("not-divisible"), Some("col")));
    // It concerns all ranks.
    assert_eq!((error.at().rank, error.message().starts_with("rule `col`: ")), (None, true), "{error}");
    let error = refused(&checkpoint, &Rules::new().replicate("*").rename("x"), &World::host(1));
    assert_eq!(error.rule(), Some("rename-collision"));
    assert!(error.message().contains("tensor `row`") && error.message().contains("tensor `col`"), "{error}");
    let error = refused(&checkpoint, &Rules::new().only("*", Rank(2)), &World::host(2));
    assert_eq!(error.rule(), Some("rank"));
    let error = refused(&checkpoint, &Rules::new().shard("*", 2), &World::host(1));
    assert_eq!((error.rule(), error.at().rank), (Some("dimension"), None));
    assert!(error.message().starts_with("rule `*`: "), "{error}");
}

#[test]
fn an_error_of_one_rank_alone_names_it() {
    // Columns 0..4 of 8 are there on rank 0 only.
    let cut = Cut { how: Split::Ceil, unit: 6, ..Cut::default() };
    let slice = Expr::Slice { x: Box::new(Expr::shard(1, cut)), dim: 1, start: 0, len: 4, step: 1 };
    let error = refused(&two(), &Rules::new().place("col", slice).replicate("*"), &World::host(2));
    assert_eq!((error.rule(), error.tensor(), error.at().rank), (Some("slice"), Some("col"), Some(Rank(1))));
}

#[test]
fn an_error_of_the_rules_names_their_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let rules = |text: &str| {
        std::fs::write(file.path(), text).unwrap();
        Rules::from_file(file.path()).unwrap()
    };
    for (text, rule) in [
        ("rule = [{ match = 'row', shard = { dim = 2 } }, { match = '**', replicate = true }]", "dimension"),
        ("rule = [{ match = 'row', shard = { dim = 0, unit = 5 } }, { match = '**', replicate = true }]", "unit"),
        ("rule = [{ match = 'row', replicate = true }]", "unmatched-tensor"),
        ("rule = [{ match = '**', replicate = true }, { match = 'typo', replicate = true }]", "unused-rule"),
        ("rule = [{ match = '**', replicate = true }]\nalias = [{ name = 'a', of = 'b' }]", "alias"),
        ("rule = [{ match = '**', only = 9 }]", "rank"),
        ("rule = [{ match = '*', replicate = true, rename = 'x' }]", "rename-collision"),
    ] {
        let error = refused(&two(), &rules(text), &World::host(2));
        assert_eq!((error.rule(), error.file()), (Some(rule), Some(file.path())), "{error}");
    }
    // A filter is not the file's.
    let all = rules("rule = [{ match = '**', replicate = true }]");
    let error = refused(&two(), &all.keeping("typo"), &World::host(1));
    assert_eq!((error.rule(), error.file()), (Some("unused-rule"), None));
}

#[test]
fn the_line_to_add_works_for_every_name() {
    for name in
        ["w.0.weight", "a{b", "a}", "{a,b}", "a*", "**", r"back\slash", "quo\"te", "'", "new\nline", "\u{7f}é", ""]
    {
        let checkpoint = checkpoint(&[(name, Dtype::F32, &[1])], None);
        let error = refused(&checkpoint, &Rules::new(), &World::host(1));
        let (_, line) = error.message().split_once(" add ").expect(name);
        let rules = Rules::from_toml(&format!("rule = [{line}]")).expect(line);
        let plan = Plan::new(&checkpoint, &rules, &World::host(1)).expect(line);
        assert_eq!(plan.params()[0].name, name);
    }
}

#[test]
fn what_a_rename_makes_of_a_tensor_must_be_a_name() {
    let checkpoint = checkpoint(&[("a.__metadata__", Dtype::F32, &[1])], None);
    for rules in [Rules::new().replicate("a.*").rename("{1}"), Rules::new().replicate("a.*.**").rename("{2}")] {
        let error = refused(&checkpoint, &rules, &World::host(1));
        assert_eq!((error.rule(), error.tensor()), (Some("rename"), Some("a.__metadata__")));
        assert!(error.message().contains("rule `a.*"), "{error}");
    }
}

#[test]
fn ranks_and_destinations_that_are_not_there() {
    let plan = Plan::new(&two(), &rules(), &World::host(2)).unwrap();
    for (rank, dest) in [(Rank(2), 0), (Rank(u32::MAX), 0), (Rank(1), 3), (Rank(1), usize::MAX)] {
        assert_eq!(plan.leaves(rank, dest).unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert_eq!(plan.needed_bytes(&[Rank(1), Rank(7)]), plan.needed_bytes(&[Rank(1)]));
}

#[test]
fn skip_only_rename_and_filters() {
    let checkpoint = two();
    let rules = Rules::new().skip("all").only("row", Rank(1)).rename("r").replicate("col");
    let plan = Plan::new(&checkpoint, &rules, &World::host(2)).unwrap();
    let names: Vec<&str> = plan.params().iter().map(|param| param.name.as_str()).collect();
    assert_eq!(names, ["col", "r"]);
    assert_eq!((plan.rank(Rank(0)).dests.len(), plan.rank(Rank(1)).dests.len()), (1, 2));
    assert!(plan.explain("all").unwrap().contains("skipped"));
    assert!(plan.explain("row").unwrap().contains("rank 1"));
    assert_eq!(plan.explain("nothing").unwrap_err().kind(), ErrorKind::NotFound);

    let kept = Plan::new(&checkpoint, &Rules::replicate_all().keeping("*o*").skipping("row"), &World::host(1)).unwrap();
    assert_eq!(kept.params().len(), 1);
    let error = refused(&checkpoint, &Rules::replicate_all().keeping("typo"), &World::host(1));
    assert_eq!(error.rule(), Some("unused-rule"));
}

#[test]
fn aliases_have_no_bytes_of_their_own() {
    let checkpoint = two();
    let plan = Plan::new(&checkpoint, &rules().alias("a.row", "row"), &World::host(2)).unwrap();
    let alias = &plan.rank(Rank(1)).dests[0];
    assert_eq!((alias.bytes, alias.pieces.len(), alias.shape.dims()), (0, 0, &[4, 4][..]));
    assert_eq!(plan.params()[0].alias_of, Some(3));
    assert_eq!(plan.leaves(Rank(1), 0).unwrap()[0].factors[0].start, 4);
    assert_eq!(refused(&checkpoint, &rules().alias("x", "y"), &World::host(1)).rule(), Some("alias"));
    assert_eq!(refused(&checkpoint, &rules().alias("row", "col"), &World::host(1)).rule(), Some("rename-collision"));
    let twice = rules().alias("x", "row").alias("y", "x");
    assert_eq!(refused(&checkpoint, &twice, &World::host(1)).rule(), Some("alias"));
    let chain = rules().alias("l", "m").alias("m", "row");
    for chain in [chain.clone(), chain.skipping("row")] {
        let error = refused(&checkpoint, &chain, &World::host(1));
        assert_eq!((error.rule(), error.tensor()), (Some("alias"), Some("l")));
    }
}

#[test]
fn filters_go_by_the_names_of_destinations_and_tensors() {
    let checkpoint = two();
    let tied = || rules().alias("y", "row").alias("x", "row");
    // Each destination's name, bytes on rank 0 and original.
    let left = |rules: Rules| -> Vec<(String, u64, Option<String>)> {
        let plan = Plan::new(&checkpoint, &rules, &World::host(2)).unwrap();
        assert_eq!(plan.storage_bytes(), plan.needed_bytes(plan.world().driven()));
        let params = plan.params();
        let dests = plan.rank(Rank(0)).dests.iter().map(|dest| (&params[dest.param as usize], dest.bytes));
        dests
            .map(|(param, bytes)| {
                (param.name.clone(), bytes, param.alias_of.map(|original| params[original as usize].name.clone()))
            })
            .collect()
    };
    let own = |name: &str, bytes: u64| (name.to_owned(), bytes, None);
    let alias = |name: &str, of: &str| (name.to_owned(), 0, Some(of.to_owned()));
    let (all, col, row) = (own("all", 12), own("col", 64), own("row", 64));
    assert_eq!(left(tied().keeping("x")), [own("x", 64)]);
    assert_eq!(left(tied().keeping("{x,y}")), [alias("x", "y"), own("y", 64)]);
    assert_eq!(left(tied().keeping("row")), std::slice::from_ref(&row));
    assert_eq!(left(tied().skipping("x")), [all.clone(), col.clone(), row, alias("y", "row")]);
    assert_eq!(left(tied().skipping("row")), [all.clone(), col.clone(), alias("x", "y"), own("y", 64)]);
    assert_eq!(left(tied().skipping("{row,y}")), [all, col, own("x", 64)]);
    let renamed = || Rules::new().replicate("row").rename("r").replicate("*");
    for name in ["r", "row"] {
        assert_eq!(left(renamed().keeping(name)), [own("r", 128)]);
        assert_eq!(left(renamed().skipping(name)).len(), 2);
    }
    assert!(Plan::new(&checkpoint, &tied().keeping("x"), &World::host(2)).unwrap().explain("row").is_ok());
}

#[test]
fn data_and_context_parallel_ranks_replicate() {
    let checkpoint = two();
    let world = World::host(1).with_mesh(Mesh { dp: 2, cp: 2, ..Mesh::tp(2) });
    let plan = Plan::new(&checkpoint, &rules(), &world).unwrap();
    assert_eq!(plan.ranks().len(), 8);
    assert_eq!(plan.bytes_on(Rank(0)), plan.bytes_on(Rank(6)));
    assert_eq!(plan.storage_bytes(), checkpoint.bytes());
}

#[test]
fn a_cut_that_leaves_a_gap_fails_the_audit() {
    let checkpoint = two();
    let cut = || Cut { by: Coord::Axis(Ax::Tp), ..Cut::default() };
    let twice = Cut { by: Coord::Flat(vec![Ax::Tp, Ax::Tp]), ..Cut::default() };
    let error = refused(&checkpoint, &Rules::new().shard("row", ShardRule::dim(0).by(twice.by)), &World::host(2));
    assert_eq!((error.kind(), error.rule()), (ErrorKind::Rules, Some("coordinate")));
    assert!(error.message().contains("rule `row`: axis tp"), "{error}");
    let diagonal = Expr::Shard { x: Box::new(Expr::shard(0, cut())), dim: 1, cut: cut() };
    let error = refused(&checkpoint, &Rules::new().place("row", diagonal).replicate("*"), &World::host(2));
    assert_eq!((error.kind(), error.tensor()), (ErrorKind::Audit, Some("row")));
    assert!(error.at().bytes.is_some());
}

#[test]
fn reads_cut_no_element_that_is_permuted_or_cast() {
    let tensors: &[(&str, Dtype, &[u64])] = &[
        ("a", Dtype::U8, &[3]),
        ("b", Dtype::F32, &[300, 7]),
        ("c", Dtype::F16, &[900]),
        ("d", Dtype::F64, &[100, 40]),
    ];
    let checkpoint = checkpoint(tensors, None);
    let rules = Rules::new().replicate("a").replicate("b").transpose().cast(Dtype::Bf16);
    let rules = rules.replicate("c").cast(Dtype::F32).shard("d", 0).transpose();
    let plan = Plan::new(&checkpoint, &rules, &World::host(2)).unwrap();
    for (alignment, cut_chunk) in [(1, 1000), (512, 1024), (4096, 8192)] {
        let reads = Reads::new(
            &plan,
            Cutting { chunk: 1 << 20, cut_chunk, alignment, direct: true, exchanged: cut_chunk },
            |_| true,
        );
        let (mut cursor, mut landed, mut pieces) = (Cursor::default(), 0, Vec::new());
        let mut at = 128;
        while let Some((op, behind)) = reads.next(&cursor) {
            cursor = behind;
            assert_eq!((op.extent.start, op.direct), (at, false));
            at = op.extent.end;
            assert!(at.next_multiple_of(alignment) - op.extent.start / alignment * alignment <= cut_chunk);
            pieces.clear();
            reads.pieces(&op, &mut pieces);
            for piece in &pieces {
                let dest = &plan.rank(piece.rank).dests[piece.dest as usize];
                let tensor = plan.tensor(plan.rank(piece.rank).pieces[dest.pieces.start as usize].tensor);
                let (element, offset) =
                    (u64::from(tensor.dtype.bits()) / 8, op.extent.start + piece.src - tensor.start);
                assert!(offset.is_multiple_of(element) && piece.run.is_multiple_of(element), "{piece:?}");
                landed += piece.landed_bytes();
            }
        }
        assert_eq!(landed, plan.bytes_on(Rank(0)) + plan.bytes_on(Rank(1)));
        assert_eq!(at, 128 + checkpoint.bytes());
    }
}

#[test]
fn empty_shards_have_no_pieces() {
    let checkpoint = checkpoint(&[("w", Dtype::F32, &[9, 2]), ("none", Dtype::F32, &[0, 2])], None);
    let rules = Rules::new().shard("*", ShardRule::dim(0).split(Split::Ceil));
    let plan = Plan::new(&checkpoint, &rules, &World::host(4)).unwrap();
    let last = &plan.rank(Rank(3)).dests[1];
    assert_eq!((last.bytes, last.pieces.len(), last.shape.dims()), (0, 0, &[0, 2][..]));
    assert_eq!(plan.extents().len(), 1);
}

#[test]
fn layers_come_in_order() {
    let w: &[u64] = &[2];
    let tensors = [("l.10.w", Dtype::F32, w), ("l.2.w", Dtype::F32, w), ("norm", Dtype::F32, w)];
    let checkpoint = checkpoint(&tensors, None);
    let plan = Plan::with_order(&checkpoint, &Rules::replicate_all(), &World::host(1), ReadOrder::Layer).unwrap();
    let order: Vec<u32> = plan.extents().iter().map(|extent| extent.tensor).collect();
    assert_eq!(order, [2, 1, 0]);
}

#[test]
fn a_plan_prints_itself() {
    let text = Plan::new(&two(), &rules(), &World::host(2)).unwrap().to_string();
    assert!(text.contains("dp 1 pp 1 cp 1 tp 2 ep 1") && text.contains("268 B asked for"), "{text}");
}

/// Ranks of different releases compare digests: a change of this number is a change of the encoding's version.
#[test]
fn the_digest_is_stable() {
    let plan = Plan::new(&two(), &rules().alias("z", "row"), &World::host(2)).unwrap();
    assert_eq!(plan.digest(), 10_808_410_945_639_415_345);
}

/// As many tensors as DeepSeek-V3 has, and 8 ranks.
#[test]
fn large_checkpoints_plan() {
    let names: Vec<String> = (0..61)
        .flat_map(|layer| (0..256).map(move |expert| format!("model.layers.{layer}.mlp.experts.{expert}")))
        .flat_map(|expert| {
            ["gate_proj", "up_proj", "down_proj"].into_iter().flat_map(move |projection| {
                let expert = expert.clone();
                ["weight", "weight_scale_inv"].into_iter().map(move |kind| format!("{expert}.{projection}.{kind}"))
            })
        })
        .collect();
    let shape = |name: &str| -> (Dtype, &'static [u64]) {
        match (name.contains("down_proj"), name.ends_with("inv")) {
            (true, true) => (Dtype::F32, &[56, 16]),
            (false, true) => (Dtype::F32, &[16, 56]),
            (true, false) => (Dtype::F8E4M3, &[7168, 2048]),
            (false, false) => (Dtype::F8E4M3, &[2048, 7168]),
        }
    };
    let tensors: Vec<(&str, Dtype, &[u64])> =
        names.iter().map(|name| (name.as_str(), shape(name).0, shape(name).1)).collect();
    let checkpoint = checkpoint(&tensors, None);
    let rules = Rules::new()
        .replicate("**.{input,post_attention}_layernorm.weight")
        .optional()
        .shard("**.{gate,up}_proj.{weight,weight_scale_inv}", 0)
        .shard("**.down_proj.{weight,weight_scale_inv}", 1);
    let plan = Plan::new(&checkpoint, &rules, &World::host(8)).unwrap();
    assert_eq!(plan.ranks().len() * plan.params().len(), 8 * 93_696);
    assert_eq!(plan.storage_bytes(), checkpoint.bytes());
}

/// A few lines of rules cannot ask for hours of work.
#[test]
fn parts_of_destinations_are_bounded() {
    let names: Vec<String> = (0..=crate::limits::PARTS_MAX >> 18).map(|at| format!("w.{at}")).collect();
    let tensors: Vec<(&str, Dtype, &[u64])> = names.iter().map(|name| (name.as_str(), Dtype::U8, &[1][..])).collect();
    let parts = vec![Expr::Source; 1 << 18];
    let rules = Rules::new().place("w.*", Expr::Stack { parts });
    let error = refused(&checkpoint(&tensors, None), &rules, &World::host(1));
    assert_eq!((error.rule(), error.expected()), (Some("parts"), Some("at most 1048576 of all rules")));
    assert!(error.message().starts_with("rule `w.*`: "), "{error}");
}

/// What a plan says of itself takes no more work for more rows.
#[test]
fn experts_are_told_however_many_rows_say_so() {
    let rows = 1 << 36;
    let checkpoint = checkpoint(&[("x", Dtype::U8, &[rows])], None);
    for (how, unit, experts) in [
        (Split::Even, 1, "34359738368..68719476736"),
        (Split::Even, 1 << 30, "32..64"),
        (Split::RoundRobin, 1, "1..68719476736 by 2"),
    ] {
        let cut = Cut { by: Coord::Axis(Ax::Ep), how, unit, ..Cut::default() };
        let rules = Rules::new().place("x", Expr::shard(0, cut));
        let world = World::host(2).with_mesh(Mesh { ep: 2, ..Mesh::tp(2) });
        let told = Plan::new(&checkpoint, &rules, &world).unwrap().to_string();
        assert!(told.contains(experts), "{told}");
    }
}

/// Every name is looked at once or twice, not each beside each other.
#[test]
fn many_aliases_and_long_orders_are_checked_at_once() {
    let aliases =
        |count: u32| (0..count).fold(Rules::new().replicate("w"), |rules, at| rules.alias(at.to_string(), "w"));
    let checkpoint = checkpoint(&[("w", Dtype::U8, &[8])], None);
    let begin = Instant::now();
    let plan = Plan::new(&checkpoint, &aliases(150_000), &World::host(1)).unwrap();
    assert_eq!(plan.params().len(), 150_001);
    let plan = Plan::new(&checkpoint, &aliases(150_000).skipping("w"), &World::host(1)).unwrap();
    assert_eq!(plan.params().len(), 150_000);
    let order: Vec<usize> = (0..500_000).rev().collect();
    let rules = Rules::new().place("w", Expr::Permute { x: Box::new(Expr::Source), order: order.clone() });
    assert!(refused(&checkpoint, &rules, &World::host(1)).message().contains("another number of dimensions"));
    // Quadratic they take minutes.
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    for twice in [vec![1, 0, 1], vec![0, 3, 1], vec![0, usize::MAX]] {
        let rules = Rules::new().place("w", Expr::Permute { x: Box::new(Expr::Source), order: twice });
        assert!(refused(&checkpoint, &rules, &World::host(1)).message().contains("not an order of dimensions"));
    }
}

/// Numbers that a header or a rule may have, and that a product of does not fit.
#[test]
fn sizes_and_steps_up_to_the_largest_number() {
    let slice = |x, dim, step| Expr::Slice { x: Box::new(x), dim, start: 0, len: 1, step };
    let checkpoint = checkpoint(&[("none", Dtype::U8, &[0, 1 << 40, 1 << 40]), ("w", Dtype::Bf16, &[4, 512])], None);
    for expr in [
        slice(Expr::Source, 0, i64::MAX as u64),
        slice(slice(Expr::Source, 0, u64::MAX), 0, u64::MAX),
        slice(slice(Expr::Source, 1, u64::MAX), 0, u64::MAX),
    ] {
        let rules = Rules::new().place("w", expr).replicate("none");
        let plan = Plan::new(&checkpoint, &rules, &World::host(2)).unwrap();
        let [whole, part] = &plan.rank(Rank(1)).dests[..] else { panic!("two destinations") };
        assert_eq!(whole.bytes, 0);
        let piece = &plan.rank(Rank(1)).pieces[part.pieces.start as usize];
        assert_eq!(piece.src, checkpoint.tensor("w").unwrap().start);
        assert!(!plan.to_string().is_empty() && ["none", "w"].iter().all(|name| plan.explain(name).is_ok()));
    }
}
