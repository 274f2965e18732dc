//! LoRA adapters beside their model: divided as the layers that they are for (sharding.md section 8), and what is wrong
//! with those that are refused.

#[path = "support/released/mod.rs"]
mod released;
#[cfg(feature = "cli")]
#[path = "support/schema.rs"]
mod schema;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use released::{Kind, Llama, Llama4, Model, Scheme};
use serde_json::json;
use shardlift::plan::{Dest, Mesh, ModelOptions, Plan, Rules, Target, World};
use shardlift::{Checkpoint, ErrorKind, Loader, Rank, Result};
use tempfile::TempDir;

/// A model and its adapter, each in a folder of its own.
struct Adapted {
    model: TempDir,
    adapter: TempDir,
}

impl Adapted {
    fn new(model: &Model, adapter: &Model) -> Adapted {
        let folders = Adapted { model: tempfile::tempdir().unwrap(), adapter: tempfile::tempdir().unwrap() };
        released::write(folders.model.path(), model).unwrap();
        released::write(folders.adapter.path(), adapter).unwrap();
        folders
    }

    fn open(&self) -> Result<Checkpoint> {
        Checkpoint::open(self.model.path())?.with_adapter(self.adapter.path())
    }

    fn plan(&self, mesh: Mesh) -> Result<Plan> {
        let checkpoint = self.open()?;
        Plan::new(&checkpoint, &Rules::for_model(&checkpoint)?, &World::host(1).with_mesh(mesh))
    }
}

fn dest<'a>(plan: &'a Plan, rank: u32, name: &str) -> Option<&'a Dest> {
    plan.rank(Rank(rank)).dests.iter().find(|dest| plan.params()[dest.param as usize].name == name)
}

fn shape(plan: &Plan, rank: u32, name: &str) -> Vec<u64> {
    dest(plan, rank, name).expect(name).shape.dims().to_vec()
}

/// The one piece of a destination: the first byte, rows, their distance and length.
fn piece(plan: &Plan, rank: u32, name: &str) -> (u64, u64, u64, u64) {
    let dest = dest(plan, rank, name).expect(name);
    let [copy] = &plan.rank(Rank(rank)).pieces[dest.pieces.start as usize..dest.pieces.end as usize] else {
        panic!("{name}: one piece")
    };
    let (count, pitch) = copy.loops.first().map_or((1, 0), |inner| (inner.count, inner.src_stride));
    (copy.src - plan.tensor(copy.tensor).start, count, pitch, copy.run)
}

const LAYER: &str = "base_model.model.model.layers.1";

/// Case 48.
#[test]
fn columns_divide_the_second_factor_and_rows_the_first() {
    let model = Llama { layers: 2, ..Llama::LLAMA_3_1_8B }.model();
    let adapted = Adapted::new(&model, &model.adapter(16, &["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]));
    let four = adapted.plan(Mesh::tp(4)).unwrap();
    let of = |name: &str| piece(&four, 1, &format!("{LAYER}.{name}.weight"));
    assert_eq!(of("self_attn.q_proj.lora_B"), (65_536, 1, 0, 65_536));
    assert_eq!(of("self_attn.q_proj.lora_A"), (0, 1, 0, 16 * 4096 * 4));
    assert_eq!(of("self_attn.o_proj.lora_A"), (4096, 16, 16_384, 4096));
    assert_eq!(of("self_attn.o_proj.lora_B"), (0, 1, 0, 4096 * 16 * 4));
    assert_eq!(of("mlp.up_proj.lora_B"), (3584 * 64, 1, 0, 3584 * 64));
    assert_eq!(of("mlp.down_proj.lora_A"), (3584 * 4, 16, 14_336 * 4, 3584 * 4));
    // Two ranks share a key head, and what is added to it.
    let sixteen = adapted.plan(Mesh::tp(16)).unwrap();
    for rank in [4, 5] {
        let rows = piece(&sixteen, rank, &format!("{LAYER}.self_attn.k_proj.lora_B.weight"));
        assert_eq!(rows, (2 * 128 * 64, 1, 0, 128 * 64));
    }
    // The base is as it was.
    assert_eq!(shape(&four, 1, "model.layers.1.self_attn.q_proj.weight"), [1024, 4096]);
}

#[test]
fn an_adapter_is_where_its_layers_and_experts_are() {
    let model = Llama::tiny(Kind::Qwen3Moe).model();
    let targets = ["q_proj", "gate_proj", "down_proj", "gate", "lm_head"];
    let adapted = Adapted::new(&model, &model.adapter(4, &targets));
    let plan = adapted.plan(Mesh { pp: 2, ep: 2, ..Mesh::tp(4) }).unwrap();
    for rank in plan.ranks() {
        let (stage, group) = (rank.rank.0 / 4, rank.rank.0 % 4 / 2);
        let names = rank.dests.iter().map(|dest| plan.params()[dest.param as usize].name.as_str());
        let adapter: BTreeSet<&str> = names.filter(|name| name.starts_with("base_model.")).collect();
        assert!(adapter.iter().all(|name| name.contains(&format!(".layers.{stage}.")) || name.contains("lm_head")));
        assert_eq!(adapter.contains("base_model.model.lm_head.lora_A.weight"), stage == 1);
        let layer = format!("base_model.model.model.layers.{stage}.mlp");
        for expert in 0..8 {
            let held = adapter.contains(format!("{layer}.experts.{expert}.down_proj.lora_A.weight").as_str());
            assert_eq!(held, expert / 4 == group, "{:?}: {expert}", rank.rank);
        }
        let (experts, first) = (format!("{layer}.experts.{}", 4 * group), rank.rank.0);
        // 128 over the two ranks of a group.
        assert_eq!(shape(&plan, first, &format!("{experts}.gate_proj.lora_B.weight")), [64, 4]);
        assert_eq!(shape(&plan, first, &format!("{experts}.down_proj.lora_A.weight")), [4, 64]);
        assert_eq!(shape(&plan, first, &format!("{layer}.gate.lora_B.weight")), [8, 4]);
    }
}

#[test]
fn quantised_layers_and_whole_ones_have_adapters_too() {
    let gptq = Scheme::Gptq { group: 16, act_order: false, bias: false };
    let plain = Llama::TINY.model();
    let quantised =
        Adapted::new(&Llama { scheme: gptq, ..Llama::TINY }.model(), &plain.adapter(4, &["q_proj", "down_proj"]));
    let plan = quantised.plan(Mesh::tp(4)).unwrap();
    assert_eq!(shape(&plan, 3, &format!("{LAYER}.self_attn.q_proj.lora_B.weight")), [64, 4]);
    assert_eq!(shape(&plan, 3, &format!("{LAYER}.mlp.down_proj.lora_A.weight")), [4, 64]);
    // What is whole stays whole.
    let model = Llama4::TINY.model();
    let vision = Adapted::new(&model, &model.adapter(4, &["q_proj"])).plan(Mesh { pp: 2, ..Mesh::tp(2) }).unwrap();
    let name = "base_model.model.vision_model.model.layers.1.self_attn.q_proj.lora_B.weight";
    assert_eq!(shape(&vision, 0, name), [36, 4]);
    assert!(dest(&vision, 2, name).is_none());
    let name = "base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_B.weight";
    assert_eq!(shape(&vision, 2, name), [64, 4]);
    assert!(dest(&vision, 0, name).is_none());
}

#[test]
fn what_lands_is_what_the_adapter_has() {
    let model = Llama { tied: true, ..Llama::TINY }.model();
    let adapter = model.adapter(4, &["q_proj", "v_proj", "o_proj"]);
    let adapted = Adapted::new(&model, &adapter);
    released::write_random(adapted.model.path(), &model, 5).unwrap();
    released::write_random(adapted.adapter.path(), &adapter, 6).unwrap();
    let plan = adapted.plan(Mesh { pp: 2, ..Mesh::tp(2) }).unwrap();
    let weights = Loader::new().load(&plan).unwrap().0;
    weights.check().unwrap();
    let name = format!("{LAYER}.self_attn.o_proj.lora_A.weight");
    let whole = adapter.tensor(&name).random(6);
    let columns: Vec<u8> = whole.chunks(256 * 4).flat_map(|row| &row[512..]).copied().collect();
    let landed = weights.iter().find(|tensor| tensor.rank() == Rank(3) && tensor.name() == name).unwrap();
    assert_eq!(landed.as_bytes().unwrap(), columns);

    // Changed since its header was read.
    let config = adapted.adapter.path().join("adapter_model.safetensors");
    let bytes = fs::read(&config).unwrap();
    fs::remove_file(&config).unwrap();
    fs::write(&config, bytes).unwrap();
    let error = Loader::new().load(&plan).unwrap_err();
    assert_eq!((error.kind(), error.file()), (ErrorKind::Changed, Some(&*config)));
}

#[test]
fn a_plan_with_an_adapter_is_another_one() {
    let model = Llama::TINY.model();
    let adapter = |rank| Adapted::new(&model, &model.adapter(rank, &["q_proj"]));
    let (one, other) = (adapter(4), adapter(8));
    let digest = |adapted: &Adapted| adapted.plan(Mesh::tp(2)).unwrap().digest();
    assert_ne!(digest(&one), digest(&other));
    assert_eq!(digest(&one), digest(&adapter(4)));
    let (base, with) = (Checkpoint::open(one.model.path()).unwrap(), one.open().unwrap());
    assert_eq!(with.bytes() - base.bytes(), 2 * (4 * 64 + 256 * 4) * 4);
    assert_eq!((with.files().len(), &*with.files()[1].name), (2, "adapter_model.safetensors"));
    assert_eq!((with.path(), with.config()), (base.path(), base.config()));
}

#[test]
fn what_is_no_adapter_of_the_model_is_refused() {
    let model = Llama::TINY.model();
    let adapted = Adapted::new(&model, &model.adapter(4, &["q_proj"]));
    let folder = adapted.adapter.path();
    let path = |name: &str| folder.join(name);
    let refused = |file: &Path| {
        let error = adapted.open().unwrap_err();
        assert_eq!(error.file(), Some(file), "{error}");
        (error.kind(), error.rule())
    };
    let config = fs::read(path("adapter_config.json")).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config[key] = value;
        fs::write(path("adapter_config.json"), config.to_string()).unwrap();
    };
    with("modules_to_save", json!(["lm_head"]));
    assert_eq!(refused(&path("adapter_config.json")), (ErrorKind::Unsupported, Some("adapter")));
    with("peft_type", json!("IA3"));
    assert_eq!(refused(&path("adapter_config.json")), (ErrorKind::Unsupported, Some("adapter")));
    fs::write(path("adapter_config.json"), "{").unwrap();
    assert_eq!(refused(&path("adapter_config.json")), (ErrorKind::Index, Some("adapter-config-not-json")));
    with("modules_to_save", json!([]));
    adapted.open().unwrap();
    let twice = adapted.open().unwrap().with_adapter(folder).unwrap_err();
    assert_eq!((twice.kind(), twice.rule()), (ErrorKind::Usage, Some("adapter")));

    fs::rename(path("adapter_model.safetensors"), path("weights")).unwrap();
    assert_eq!(refused(&path("adapter_model.safetensors")).0, ErrorKind::NotFound);
    fs::rename(path("adapter_config.json"), path("config")).unwrap();
    assert_eq!(refused(&path("adapter_config.json")).0, ErrorKind::NotFound);
}

#[test]
fn names_and_modules_that_do_not_fit_are_errors() {
    let model = Llama::TINY.model();
    let factors = model.adapter(4, &["q_proj"]);
    let with = |change: &dyn Fn(&mut Model)| {
        let mut adapter = factors.clone();
        change(&mut adapter);
        Adapted::new(&model, &adapter).plan(Mesh::tp(2)).unwrap_err()
    };
    let error = with(&|adapter| adapter.tensors[1].name = "model.norm.weight".into());
    assert_eq!((error.rule(), error.tensor()), (Some("tensor-in-two-files"), Some("model.norm.weight")));
    let score = ["base_model.model.score.lora_A.weight", "base_model.model.score.lora_B.weight"];
    let error = with(&|adapter| adapter.tensors.iter_mut().zip(score).for_each(|(it, name)| it.name = name.into()));
    assert_eq!((error.rule(), error.tensor()), (Some("adapter"), Some(score[0])));
    // A factor alone.
    let error = with(&|adapter| drop(adapter.tensors.remove(1)));
    assert_eq!((error.rule(), error.found()), (Some("adapter"), Some("no such tensor")));
    let error = with(&|adapter| drop(adapter.tensors.remove(0)));
    assert_eq!((error.rule(), error.tensor()), (Some("adapter"), Some(factors.tensors[1].name.as_str())));
    // Of another rank than the other.
    let error = with(&|adapter| adapter.tensors[1].shape = vec![256, 8]);
    assert_eq!((error.rule(), error.found()), (Some("adapter"), Some("[256,8]")));
    assert!(error.expected().unwrap().starts_with("[256,4]"), "{error}");
    // Made for a model of another width, or with more layers.
    let error = with(&|adapter| adapter.tensors[0].shape = vec![4, 128]);
    assert_eq!((error.rule(), error.found()), (Some("adapter"), Some("[4,128]")));
    let error = with(&|adapter| {
        adapter.tensors.iter_mut().for_each(|it| it.name = it.name.replace("layers.1.", "layers.9."));
    });
    assert_eq!((error.rule(), error.found()), (Some("adapter"), Some("no weight of it")));
    // A packed base has logical sizes.
    let gptq = Scheme::Gptq { group: 16, act_order: false, bias: false };
    let mut wide = factors.clone();
    wide.tensors[0].shape = vec![4, 128];
    let packed = Adapted::new(&Llama { scheme: gptq, ..Llama::TINY }.model(), &wide);
    let error = packed.plan(Mesh::tp(2)).unwrap_err();
    assert_eq!((error.rule(), error.tensor()), (Some("adapter"), Some(wide.tensors[0].name.as_str())));
    // Made for a model with other heads.
    let error = with(&|adapter| adapter.tensors[1].shape = vec![128, 4]);
    assert_eq!((error.rule(), error.found()), (Some("units"), Some("128")));
}

#[test]
fn a_partition_gets_no_adapter() {
    let model = Llama::TINY.model();
    let adapted = Adapted::new(&model, &model.adapter(4, &["q_proj", "o_proj"]));
    let plan = adapted.plan(Mesh::tp(2)).unwrap();
    let out = adapted.model.path().join("out");
    Loader::new().reshard(&plan, &out, false).unwrap();
    // The adapter is in the partitions, and its configuration beside them.
    assert!(out.join("adapter_config.json").is_file() && out.join("config.json").is_file());
    let partition = Checkpoint::open(out.join("model-rank-1-part-0.safetensors")).unwrap();
    let factor = partition.tensor(&format!("{LAYER}.self_attn.q_proj.lora_B.weight")).unwrap();
    assert_eq!(factor.shape.dims(), [128, 4]);
    let error = partition.with_adapter(adapted.adapter.path()).unwrap_err();
    assert_eq!((error.kind(), error.rule()), (ErrorKind::Usage, Some("adapter")));
    let error = Loader::new().reshard(&plan, adapted.adapter.path(), true).unwrap_err();
    assert_eq!(error.rule(), Some("output-is-model"));
}

#[test]
fn targets_that_merge_leave_adapters_apart() {
    let options = |target, mesh| {
        let mut options = ModelOptions::default();
        (options.target, options.mesh) = (target, mesh);
        options
    };
    let planned = |model: &Model, targets: &[&str], target, mesh: Mesh| {
        let checkpoint = Adapted::new(model, &model.adapter(4, targets)).open().unwrap();
        let rules = Rules::for_model_with(&checkpoint, &options(target, mesh)).unwrap();
        Plan::new(&checkpoint, &rules, &World::host(1).with_mesh(mesh)).unwrap_or_else(|error| panic!("{error}"))
    };
    let model = Llama::TINY.model();
    let plain = |name: &str| {
        let targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"];
        shape(&planned(&model, &targets, Target::Plain, Mesh::tp(2)), 1, name)
    };
    let all = [&["q_proj", "v_proj"][..], &["k_proj"], &["up_proj"], &["gate_proj"], &["q_proj", "k_proj", "v_proj"]];
    for targets in all {
        let plan = planned(&model, targets, Target::Vllm, Mesh::tp(2));
        for target in targets {
            let below = if target.len() == 6 { "self_attn" } else { "mlp" };
            for factor in ["lora_A", "lora_B"] {
                let name = format!("{LAYER}.{below}.{target}.{factor}.weight");
                assert_eq!(shape(&plan, 1, &name), plain(&name));
            }
        }
        assert!(dest(&plan, 0, "model.layers.1.self_attn.qkv_proj.weight").is_some());
    }
    let moe = Llama::tiny(Kind::Qwen3Moe).model();
    for target in [Target::Vllm, Target::Hf] {
        let plan = planned(&moe, &["up_proj", "down_proj"], target, Mesh { ep: 2, ..Mesh::tp(2) });
        let name = |expert| format!("{LAYER}.mlp.experts.{expert}.up_proj.lora_B.weight");
        assert!(dest(&plan, 0, &name(4)).is_none() && dest(&plan, 1, &name(4)).is_some());
    }
}

#[cfg(feature = "cli")]
mod command {
    use std::process::Command;

    use super::*;

    #[test]
    fn plan_load_and_reshard_take_an_adapter() {
        let model = Llama::TINY.model();
        let adapted = Adapted::new(&model, &model.adapter(4, &["q_proj", "o_proj"]));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (base, adapter) = (text(adapted.model.path()), text(adapted.adapter.path()));
        let out = text(&adapted.adapter.path().join("out"));
        let more = ["--adapter", &adapter, "--tp", "2", "--pp", "2"];
        let run = |args: &[&str], status| {
            schema::run(&mut Command::new(env!("CARGO_BIN_EXE_shardlift")), &[args, &more].concat(), status)
        };
        let planned = run(&["plan", &base], 0);
        let pieces = planned["ranks"][2]["destinations"].as_array().unwrap().iter().flat_map(|dest| {
            let pieces = dest["pieces"].as_array().unwrap();
            pieces.iter().map(|piece| piece["file"].as_str().unwrap())
        });
        let files: BTreeSet<&str> = pieces.collect();
        assert_eq!(files, BTreeSet::from(["adapter_model.safetensors", "model.safetensors"]));
        let loaded = run(&["load", &base, "--check"], 0);
        assert_eq!(loaded["plan_digest"], planned["plan_digest"]);
        assert_eq!(run(&["reshard", &base, &out], 0)["plan_digest"], planned["plan_digest"]);
        let wrong = text(adapted.model.path());
        let error =
            schema::run(&mut Command::new(env!("CARGO_BIN_EXE_shardlift")), &["plan", &base, "--adapter", &wrong], 2);
        assert!(error["error"]["file"].as_str().unwrap().ends_with("adapter_config.json"), "{error}");
    }
}
