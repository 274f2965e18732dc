//! Meshes on the command line: pipeline stages, expert-parallel groups, orders of axes and splits from files, from
//! `plan` to what `load` and `reshard` land.
#![cfg(feature = "cli")]

#[path = "support/released/mod.rs"]
mod released;
#[path = "support/schema.rs"]
mod schema;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use released::{DeepSeek, GptOss, Kind, Llama, Llama4, Model, Qwen3Next, Scheme};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

fn run(args: &[&str], status: i32) -> Value {
    schema::run(&mut Command::new(env!("CARGO_BIN_EXE_shardlift")), args, status)
}

/// What `plan` prints for people.
fn text(folder: &TempDir, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
    let output = command.args(["plan", path(folder)]).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn path(folder: &TempDir) -> &str {
    folder.path().to_str().unwrap()
}

fn folder(model: &Model) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    released::write_random(folder.path(), model, 3).unwrap();
    folder
}

fn moe() -> TempDir {
    folder(&Llama::tiny(Kind::Qwen3Moe).model())
}

fn plan(folder: &TempDir, args: &[&str]) -> Value {
    run(&[&["plan", path(folder)], args].concat(), 0)
}

/// The error of a plan that is refused as a wrong argument.
fn refused(folder: &TempDir, args: &[&str]) -> Value {
    run(&[&["plan", path(folder)], args].concat(), 2)["error"].clone()
}

fn ranks(object: &Value) -> &[Value] {
    object["ranks"].as_array().unwrap()
}

fn names(rank: &Value) -> BTreeSet<&str> {
    rank["destinations"].as_array().unwrap().iter().map(|dest| dest["name"].as_str().unwrap()).collect()
}

/// The numbers behind `prefix` in the names that a rank holds.
fn numbers(rank: &Value, prefix: &str) -> Vec<u64> {
    let all: BTreeSet<u64> = names(rank)
        .into_iter()
        .filter_map(|name| {
            let (_, rest) = name.split_once(prefix)?;
            rest.split('.').next()?.parse().ok()
        })
        .collect();
    all.into_iter().collect()
}

const LAYERS: &str = "model.layers.";
const EXPERTS: &str = ".mlp.experts.";

#[test]
fn layers_and_experts_are_where_the_mesh_says() {
    let model = moe();
    let object = plan(&model, &["--dp", "2", "--pp", "2", "--tp", "2", "--ep", "4"]);
    assert_eq!(object["mesh"], json!({ "dp": 2, "pp": 2, "cp": 1, "tp": 2, "ep": 4 }));
    assert_eq!(ranks(&object).len(), 8);
    for (at, rank) in (0..).zip(ranks(&object)) {
        let (dp, pp, tp) = (at / 4, at / 2 % 2, at % 2);
        let ep = dp * 2 + tp;
        assert_eq!(rank["rank"], at);
        assert_eq!(rank["coord"], json!({ "dp": dp, "pp": pp, "cp": 0, "tp": tp, "ep": ep }));
        assert_eq!(numbers(rank, LAYERS), [pp], "rank {at}");
        assert_eq!(numbers(rank, EXPERTS), [2 * ep, 2 * ep + 1], "rank {at}");
        let held = names(rank);
        for (name, stage) in [("model.embed_tokens.weight", 0), ("model.norm.weight", 1), ("lm_head.weight", 1)] {
            assert_eq!(held.contains(name), pp == stage, "rank {at}: {name}");
        }
    }
    let one = plan(&model, &["--dp", "2", "--pp", "2", "--tp", "2", "--ep", "4", "--rank", "6"]);
    assert_eq!((ranks(&one), &one["plan_digest"]), (&ranks(&object)[6..7], &object["plan_digest"]));
    // Without expert parallelism every rank of a stage has a part of every expert.
    let object = plan(&model, &["--pp", "2", "--tp", "2"]);
    assert!(ranks(&object).iter().all(|rank| numbers(rank, EXPERTS) == (0..8).collect::<Vec<_>>()));
}

#[test]
fn axes_come_in_the_order_that_is_asked_for() {
    let model = moe();
    let mesh = ["--dp", "2", "--pp", "2", "--tp", "2", "--ep", "2"];
    let coordinates = |order: &str| {
        let object = plan(&model, &[&mesh[..], &["--order", order]].concat());
        let layers: Vec<_> = ranks(&object).iter().map(|rank| numbers(rank, LAYERS)).collect();
        let coordinates: Vec<Value> = ranks(&object).iter().map(|rank| rank["coord"].clone()).collect();
        assert!(coordinates.iter().zip(layers).all(|(coord, layers)| json!(layers) == json!([coord["pp"]])));
        let experts: Vec<_> = ranks(&object).iter().map(|rank| numbers(rank, EXPERTS)[0] / 4).collect();
        assert!(coordinates.iter().zip(experts).all(|(coord, group)| coord["ep"] == group), "{order}");
        coordinates
    };
    let coord = |dp: u64, pp: u64, tp: u64, ep: u64| json!({ "dp": dp, "pp": pp, "cp": 0, "tp": tp, "ep": ep });
    // The ranks of a stage are counted dp, tp: ep is dp here, and tp where etp is slower.
    let stages_slowest = coordinates("pp,dp,cp,tp");
    let tensor_slowest = coordinates("tp,pp,cp,dp,etp,ep");
    for at in 0..8 {
        let (slow, middle, fast) = (at / 4, at / 2 % 2, at % 2);
        assert_eq!(stages_slowest[at as usize], coord(middle, slow, fast, middle));
        assert_eq!(tensor_slowest[at as usize], coord(fast, middle, slow, fast));
    }
    for wrong in ["dp,pp,tp", "dp,pp,cp,tp,ep", "dp,dp,cp,tp", "x"] {
        let error = refused(&model, &["--order", wrong]);
        assert_eq!(error["kind"], "usage", "{error}");
    }
}

/// What a split says: the layers of each stage, or the experts of each group.
fn parts(folder: &TempDir, args: &[&str], prefix: &str) -> Vec<Vec<u64>> {
    ranks(&plan(folder, args)).iter().map(|rank| numbers(rank, prefix)).collect()
}

#[test]
fn layers_are_split_as_engines_do_or_as_a_file_says() {
    let model = folder(&Llama { layers: 5, ..Llama::TINY }.model());
    let file = model.path().join("stages");
    let of = |split: &str| parts(&model, &["--pp", "3", "--pp-split", split], LAYERS);
    assert_eq!(of("vllm"), [vec![0, 1], vec![2, 3], vec![4]]);
    assert_eq!(of("hf"), [vec![0], vec![1], vec![2, 3, 4]]);
    assert_eq!(of("trt"), [vec![0, 1], vec![2, 3], vec![4]]);
    fs::write(&file, "1, 0\n4\n").unwrap();
    assert_eq!(of(file.to_str().unwrap()), [vec![0], vec![], vec![1, 2, 3, 4]]);
    let error = refused(&model, &["--pp", "3"]);
    assert_eq!((&error["rule"], &error["found"]), (&json!("stages"), &json!("3 stages")));
    for (broken, found) in [("1 x 4", "`x`"), ("1 4", "2"), ("1 1 1", "3")] {
        fs::write(&file, broken).unwrap();
        let error = refused(&model, &["--pp", "3", "--pp-split", file.to_str().unwrap()]);
        assert_eq!((&error["rule"], &error["found"]), (&json!("stages"), &json!(found)), "{error}");
    }
    let error = refused(&model, &["--pp", "3", "--pp-split", "no/such/file"]);
    assert!(error["file"].as_str().unwrap().ends_with("no/such/file"), "{error}");
    let error = refused(&model, &["--pp", "3", "--pp-split", "/dev/zero"]);
    assert_eq!((&error["kind"], &error["expected"]), (&json!("rules"), &json!("at most 16777216 bytes")), "{error}");
    // More stages than layers.
    assert_eq!(refused(&model, &["--pp", "6", "--pp-split", "hf"])["rule"], "stages");
}

#[test]
fn experts_are_split_by_name_or_as_a_file_says() {
    let model = moe();
    let file = model.path().join("experts");
    let path = file.to_str().unwrap();
    let of = |groups: &str, split: &str| parts(&model, &["--dp", groups, "--ep", groups, "--ep-split", split], EXPERTS);
    assert_eq!(of("3", "balanced"), [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7]]);
    assert_eq!(of("3", "round-robin"), [vec![0, 3, 6], vec![1, 4, 7], vec![2, 5]]);
    assert_eq!(of("4", "even"), [[0, 1], [2, 3], [4, 5], [6, 7]]);
    fs::write(&file, "# redundant ones last\n0..4 7\n4..8, 0\n").unwrap();
    assert_eq!(of("2", path), [[0, 1, 2, 3, 7], [0, 4, 5, 6, 7]]);
    let error = refused(&model, &["--dp", "3", "--ep", "3"]);
    assert_eq!((&error["rule"], &error["found"]), (&json!("not-divisible"), &json!("3 parts")));
    for (broken, found) in
        [("0..4\n", "1"), ("0..4\n5..8\n", "none of 4..5"), ("0..4\n4..9\n", "4..9"), ("0..4\n4..x\n", "`4..x`")]
    {
        fs::write(&file, broken).unwrap();
        let error = refused(&model, &["--dp", "2", "--ep", "2", "--ep-split", path]);
        assert_eq!((&error["rule"], &error["found"]), (&json!("table"), &json!(found)), "{error}");
    }
    let error = refused(&model, &["--dp", "2", "--ep", "2", "--ep-split", "/dev/zero"]);
    assert_eq!((&error["kind"], &error["expected"]), (&json!("rules"), &json!("at most 16777216 bytes")), "{error}");
    let error = refused(&model, &["--ep-split", "balanced", "--rules", "replicate"]);
    assert_eq!(error["kind"], "usage");
}

#[test]
fn meshes_that_nobody_can_have_are_refused() {
    let model = moe();
    let error = refused(&model, &["--tp", "4", "--ep", "3"]);
    assert_eq!((&error["expected"], &error["found"]), (&json!("a divisor of 4 ranks: 1, 2, 4"), &json!("ep 3")));
    assert_eq!(refused(&model, &["--pp", "2", "--ep", "2"])["found"], "ep 2");
    let mesh = ["--dp", "2", "--pp", "2", "--tp", "2"];
    assert_eq!(refused(&model, &[&mesh[..], &["--rank", "8"]].concat())["expected"], "less than 8");
    assert_eq!(refused(&model, &["--dp", "70000", "--tp", "70000"])["kind"], "usage");
    // Rules of one's own know no layers until they say so.
    let rules = model.path().join("rules.toml");
    fs::write(&rules, "rule = [{ match = '**', replicate = true }]").unwrap();
    let rules = rules.to_str().unwrap();
    assert_eq!(refused(&model, &["--pp", "2", "--pp-split", "hf", "--rules", rules])["rule"], "stages");
    assert_eq!(refused(&model, &["--pp", "2", "--pp-split", "hf", "--rules", "replicate"])["rule"], "stages");
    // What is taken as it is takes no flag that would change it.
    fs::remove_file(model.path().join("config.json")).unwrap();
    plan(&model, &[]);
    for flags in [&["--pp-split", "hf"][..], &["--ep-split", "balanced"], &["--refine-scales"], &["--target", "hf"]] {
        assert_eq!(refused(&model, flags)["rule"], "no-config", "{flags:?}");
    }
}

#[test]
fn tied_embeddings_are_on_both_ends() {
    let model = folder(&Llama { layers: 3, tied: true, ..Llama::TINY }.model());
    let object = plan(&model, &["--pp", "3", "--tp", "2"]);
    for rank in ranks(&object) {
        let held: BTreeMap<&str, &Value> = rank["destinations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|dest| (dest["name"].as_str().unwrap(), dest))
            .collect();
        let stage = rank["coord"]["pp"].as_u64().unwrap();
        assert_eq!(held.contains_key("model.embed_tokens.weight"), stage != 1);
        assert_eq!(held.contains_key("model.norm.weight"), stage == 2);
        let head = held.get("lm_head.weight").map(|head| (&head["alias_of"], &head["bytes"]));
        let alias = (&json!("model.embed_tokens.weight"), &json!(0));
        assert_eq!(head, (stage == 2).then_some(alias), "{rank}");
    }
    run(&["load", path(&model), "--pp", "3", "--tp", "2", "--check"], 0);
}

/// The bytes that a destination should have, by its pieces of the files.
fn expected(folder: &Path, dest: &Value) -> Vec<u8> {
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let mut bytes = vec![0; number(&dest["bytes"])];
    for piece in dest["pieces"].as_array().unwrap() {
        let file = fs::read(folder.join(piece["file"].as_str().unwrap())).unwrap();
        let mut at = vec![(number(&piece["file_offset"]), number(&piece["dst_offset"]))];
        for inner in piece["loops"].as_array().unwrap() {
            let [count, from, to] = [0, 1, 2].map(|index| number(&inner[index]));
            at = at.iter().flat_map(|&(a, b)| (0..count).map(move |i| (a + i * from, b + i * to))).collect();
        }
        let run = number(&piece["run"]);
        at.into_iter().for_each(|(from, to)| bytes[to..to + run].copy_from_slice(&file[from..from + run]));
    }
    bytes
}

#[test]
fn what_lands_is_checked_and_written_on_every_mesh() {
    let models = [
        Llama::tiny(Kind::Mixtral).model(),
        DeepSeek::TINY_V3.model(),
        GptOss::TINY.model(),
        Llama4::TINY.model(),
        Qwen3Next::TINY.model(),
    ];
    for model in models {
        let model = folder(&model);
        for mesh in [
            &["--pp", "2", "--tp", "2", "--ep", "2"][..],
            &["--dp", "2", "--pp", "2", "--tp", "2", "--ep", "2", "--order", "tp,dp,cp,pp,etp,ep"],
            &["--tp", "4", "--ep", "4", "--ep-split", "round-robin"],
        ] {
            let planned = plan(&model, mesh);
            let loaded = run(&[&["load", path(&model), "--check"], mesh].concat(), 0);
            assert_eq!(loaded["plan_digest"], planned["plan_digest"]);
            let out = tempfile::tempdir().unwrap();
            let written = out.path().join("out");
            let args = ["reshard", path(&model), written.to_str().unwrap()];
            let resharded = run(&[&args, mesh].concat(), 0);
            assert_eq!(ranks(&resharded).len(), ranks(&planned).len());
            for (rank, file) in ranks(&planned).iter().zip(ranks(&resharded)) {
                let path: PathBuf = written.join(file["file"].as_str().unwrap());
                let bytes = fs::read(&path).unwrap();
                let tensors = SafeTensors::deserialize(&bytes).unwrap();
                let dests = rank["destinations"].as_array().unwrap();
                assert_eq!(tensors.len(), dests.len());
                for dest in dests {
                    let tensor = tensors.tensor(dest["name"].as_str().unwrap()).unwrap();
                    assert_eq!(json!(tensor.shape()), dest["shape"]);
                    assert!(tensor.data() == expected(model.path(), dest), "{}", dest["name"]);
                }
                let partition = run(&["load", path.to_str().unwrap(), "--check"], 0);
                assert_eq!(partition["landed_bytes"], rank["bytes"]);
            }
        }
    }
}

#[test]
fn plan_says_who_holds_what() {
    let rows = |text: &str| -> Vec<String> {
        let table = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let is_rank = |word: &str| word == "rank" || word.parse::<u32>().is_ok();
        let table = table.skip_while(|row| row.first() != Some(&"rank"));
        let columns = table.take_while(|row| row.first().is_some_and(|word| is_rank(word)));
        // Without bytes, tensors and pieces; bytes are a number and a unit.
        let told = columns.map(|row| [&row[..1], &row[if row[0] == "rank" { 4 } else { 5 }..]].concat().join(" "));
        told.collect()
    };
    let model = folder(&Llama { layers: 4, ..Llama::tiny(Kind::Qwen3Moe) }.model());
    let told = text(&model, &["--pp", "2", "--tp", "2", "--ep", "2"]);
    assert_eq!(
        rows(&told),
        [
            "rank pp tp ep layers experts",
            "0 0 0 0 0..2 0..4",
            "1 0 1 1 0..2 4..8",
            "2 1 0 0 2..4 0..4",
            "3 1 1 1 2..4 4..8"
        ]
    );
    let told = text(&model, &["--tp", "2", "--ep", "2", "--ep-split", "round-robin"]);
    assert_eq!(rows(&told), ["rank tp ep layers experts", "0 0 0 0..4 0..7 by 2", "1 1 1 0..4 1..8 by 2"]);
    // Stacked experts are told by how their tensors are cut.
    for model in [GptOss::TINY.model(), Llama4::TINY.model()] {
        let told = text(&folder(&model), &["--tp", "4", "--ep", "2"]);
        assert_eq!(rows(&told)[3..], ["2 2 1 0 0..2 4..8", "3 3 1 1 0..2 4..8"]);
    }
    assert_eq!(rows(&text(&model, &["--tp", "2"]))[0], "rank");
}

#[test]
fn scales_are_refined_where_cuts_fall_inside_blocks() {
    let model =
        folder(&Llama { hidden: 128, kv_heads: 8, scheme: Scheme::Fp8Block { size: 64 }, ..Llama::TINY }.model());
    assert_eq!(refused(&model, &["--tp", "8"])["rule"], "not-divisible");
    let object = plan(&model, &["--tp", "8", "--refine-scales"]);
    let shape = |name: &str| {
        let dests = ranks(&object)[3]["destinations"].as_array().unwrap();
        dests.iter().find(|dest| dest["name"] == name).unwrap()["shape"].clone()
    };
    // Blocks of 32: 32 of 256 outputs, and all 128 inputs.
    assert_eq!(shape("model.layers.0.mlp.up_proj.weight_scale_inv"), json!([1, 4]));
    assert_eq!(shape("model.layers.0.mlp.down_proj.weight_scale_inv"), json!([4, 1]));
    run(&["load", path(&model), "--tp", "8", "--refine-scales", "--check"], 0);
}
