//! Tensor-parallel plans of transformers over released models: what the dictionaries of its configuration classes
//! (`models/*/configuration_*.py` of 4.57.6 and 5.23.0) make of them, in numbers worked out by hand.

#[path = "support/released/mod.rs"]
mod released;

use released::{DeepSeek, GptNeox, GptOss, Kind, Llama, Llama4, Model, Scheme};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use shardlift::plan::Mesh;
use shardlift::{Checkpoint, Error, ErrorKind, Plan, Rank, Result, Rules, World};

const HEAD: &str = "colwise_gather_output";

/// A model and a plan for it.
struct Case {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
}

impl Case {
    fn new(model: Model) -> Case {
        let folder = tempfile::tempdir().unwrap();
        released::write(folder.path(), &model).unwrap();
        Case { checkpoint: Checkpoint::open(folder.path()).unwrap(), folder }
    }

    fn rules(&self, plan: &Value, mesh: Mesh) -> Result<Rules> {
        let path = self.folder.path().join("plan.json");
        std::fs::write(&path, plan.to_string()).unwrap();
        Rules::from_hf_plan(&path, &self.checkpoint, mesh)
    }

    fn plan(&self, plan: &Value, mesh: Mesh) -> Plan {
        Plan::new(&self.checkpoint, &self.rules(plan, mesh).unwrap(), &World::host(1).with_mesh(mesh)).unwrap()
    }

    fn refused(&self, plan: Value, mesh: Mesh) -> Error {
        let error = self.rules(&plan, mesh).unwrap_err();
        assert_eq!((error.kind(), error.rule()), (ErrorKind::Rules, Some("hf-plan")), "{error}");
        error
    }
}

fn ep(tp: u32, ep: u32) -> Mesh {
    Mesh { ep, ..Mesh::tp(tp) }
}

/// Bytes of a tensor: the first, how many runs, from one to the next, and of each run.
type Runs = (u64, u64, u64, u64);

/// The shape that a rank has, and where in the tensor its bytes are.
fn part(plan: &Plan, rank: u32, name: &str) -> (Vec<u64>, Vec<Runs>) {
    let param = plan.params().iter().position(|param| param.name == name).unwrap() as u32;
    let rank = plan.rank(Rank(rank));
    let dest = rank.dests.iter().find(|dest| dest.param == param).unwrap();
    let pieces = &rank.pieces[dest.pieces.start as usize..dest.pieces.end as usize];
    let runs = pieces.iter().map(|piece| {
        let first = piece.src - plan.tensor(piece.tensor).start;
        let (count, stride) = match piece.loops[..] {
            [] => (1, 0),
            [inner] => (inner.count, inner.src_stride),
            _ => panic!("{name}: {piece:?}"),
        };
        (first, count, stride, piece.run)
    });
    (dest.shape.dims().to_vec(), runs.collect())
}

/// Whether a rank has the destination at all.
fn has(plan: &Plan, rank: u32, name: &str) -> bool {
    plan.rank(Rank(rank)).dests.iter().any(|dest| plan.params()[dest.param as usize].name == name)
}

/// A rank has this range of the tensor's bytes, as one run.
fn assert_range(plan: &Plan, rank: u32, name: &str, shape: &[u64], range: std::ops::Range<u64>) {
    assert_eq!(part(plan, rank, name), (shape.to_vec(), vec![(range.start, 1, 0, range.end - range.start)]), "{name}");
}

/// Every rank has all of it.
fn assert_whole(plan: &Plan, name: &str) {
    let tensor = plan.checkpoint().tensor(name).unwrap();
    for rank in 0..plan.world().size() {
        assert_range(plan, rank, name, tensor.shape.dims(), 0..tensor.end - tensor.start);
    }
}

fn llama() -> Value {
    json!({
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    })
}

/// `base` with the entries of `more`.
fn with(mut base: Value, more: Value) -> Value {
    base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    base
}

#[test]
fn llama_in_every_spelling() {
    let case = Case::new(Llama::LLAMA_3_1_8B.model());
    let absolute: Value =
        llama().as_object().unwrap().iter().map(|(key, style)| (format!("model.{key}"), style.clone())).collect();
    for plan in [
        json!({ "base_model_tp_plan": llama(), "_tp_plan": { "lm_head": HEAD } }),
        json!({ "base_model_prefix": "model", "base_model_tp_plan": llama(), "_tp_plan": { "lm_head": HEAD } }),
        json!({ "version": "4.57", "base_model_tp_plan": llama(), "_tp_plan": { "lm_head": "colwise_rep" } }),
        with(llama(), json!({ "lm_head": HEAD, "norm.of.nothing": "rowwise" })),
        with(absolute, json!({ "lm_head": "colwise_rep" })),
    ] {
        let four = case.plan(&plan, Mesh::tp(4));
        let layer = |rest: &str| format!("model.layers.31.{rest}.weight");
        assert_range(&four, 1, &layer("self_attn.q_proj"), &[1024, 4096], 8_388_608..16_777_216);
        assert_range(&four, 1, &layer("self_attn.k_proj"), &[256, 4096], 2_097_152..4_194_304);
        let o_proj = part(&four, 3, &layer("self_attn.o_proj"));
        assert_eq!(o_proj, (vec![4096, 1024], vec![(6144, 4096, 8192, 2048)]), "{plan}");
        assert_range(&four, 3, "lm_head.weight", &[32_064, 4096], 788_004_864..1_050_673_152);
        for whole in ["model.embed_tokens.weight", "model.norm.weight", &layer("input_layernorm")] {
            assert_whole(&four, whole);
        }
        // 7 ranks: 586 rows each and 580 for the last, whatever a head is.
        let seven = case.plan(&plan, Mesh::tp(7));
        assert_range(&seven, 6, &layer("self_attn.q_proj"), &[580, 4096], 3516 * 8192..4096 * 8192);
        assert_range(&seven, 6, &layer("self_attn.v_proj"), &[142, 4096], 882 * 8192..1024 * 8192);
        assert_eq!(part(&seven, 6, &layer("self_attn.o_proj")), (vec![4096, 580], vec![(7032, 4096, 8192, 1160)]));
    }
}

fn qwen3_moe() -> Value {
    with(
        llama(),
        json!({
            "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
            "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
            "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
            "layers.*.mlp.experts.down_proj": "rowwise",
            "layers.*.mlp.experts": "moe_tp_experts",
        }),
    )
}

fn ep_plan() -> Value {
    json!({
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    })
}

#[test]
fn single_experts_are_divided_as_the_stack_of_them() {
    let case = Case::new(Llama { layers: 2, ..Llama::QWEN_3_30B_A3B }.model());
    let expert = |number: u32, part: &str| format!("model.layers.1.mlp.experts.{number}.{part}_proj.weight");
    let plan = json!({ "base_model_tp_plan": qwen3_moe(), "base_model_ep_plan": ep_plan() });
    let legacy = json!({
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
    });
    let legacy = json!({ "version": "4.57.6", "base_model_tp_plan": legacy });
    for plan in [&plan, &legacy] {
        let eight = case.plan(plan, Mesh::tp(8));
        assert_range(&eight, 2, &expert(17, "gate"), &[96, 2048], 192 * 4096..288 * 4096);
        assert_range(&eight, 2, &expert(17, "up"), &[96, 2048], 192 * 4096..288 * 4096);
        assert_eq!(part(&eight, 2, &expert(17, "down")), (vec![2048, 96], vec![(384, 2048, 1536, 192)]));
        assert_whole(&eight, "model.layers.1.mlp.gate.weight");
        assert_whole(&eight, "model.layers.1.self_attn.q_norm.weight");
    }

    // 16 experts for each of 8 ranks; attention as before.
    let experts = case.plan(&plan, ep(8, 8));
    for part_of in ["gate", "up"] {
        assert_range(&experts, 1, &expert(17, part_of), &[768, 2048], 0..768 * 4096);
        assert!(!has(&experts, 0, &expert(17, part_of)));
    }
    assert_range(&experts, 7, &expert(127, "down"), &[2048, 768], 0..2048 * 1536);
    assert!(!has(&experts, 7, &expert(1, "down")));
    assert_range(&experts, 1, "model.layers.0.self_attn.q_proj.weight", &[512, 2048], 512 * 4096..1024 * 4096);
    // Two groups of four ranks: the ranks of a group have the same experts.
    let two = case.plan(&plan, ep(8, 2));
    for rank in 4..8 {
        assert_range(&two, rank, &expert(64, "up"), &[768, 2048], 0..768 * 4096);
    }
    let error = case.refused(plan, ep(3, 3));
    assert_eq!((error.expected(), error.found()), (Some("a multiple of 3"), Some("128")));
}

#[test]
fn the_documented_plan_fits_a_model() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/rules.md")).unwrap();
    let (_, plan) = text.split_once("```json\n").unwrap();
    let plan: Value = serde_json::from_str(plan.split_once("```").unwrap().0).unwrap();
    let case = Case::new(Llama::tiny(Kind::Qwen3Moe).model());
    let experts = case.plan(&plan, ep(4, 2));
    let name = "model.layers.0.mlp.experts.7.up_proj.weight";
    assert_eq!([0, 1, 2, 3].map(|rank| has(&experts, rank, name)), [false, false, true, true]);
    assert_eq!(part(&experts, 2, name), part(&experts, 3, name));
    assert_eq!(part(&experts, 3, "lm_head.weight").0, [40, 64]);
}

#[test]
fn mixtral_has_other_names_on_disk() {
    let case = Case::new(Llama { layers: 1, ..Llama::MIXTRAL_8X7B }.model());
    let expert = |part: &str| format!("model.layers.0.block_sparse_moe.experts.3.{part}.weight");
    let plan = json!({ "base_model_tp_plan": qwen3_moe(), "base_model_ep_plan": ep_plan() });
    let eight = case.plan(&plan, Mesh::tp(8));
    assert_range(&eight, 7, &expert("w1"), &[1792, 4096], 12_544 * 8192..14_336 * 8192);
    assert_range(&eight, 7, &expert("w3"), &[1792, 4096], 12_544 * 8192..14_336 * 8192);
    assert_eq!(part(&eight, 7, &expert("w2")), (vec![4096, 1792], vec![(25_088, 4096, 28_672, 3584)]));
    assert_range(&case.plan(&plan, ep(4, 4)), 1, &expert("w2"), &[4096, 14_336], 0..4096 * 28_672);

    // 4.57 looks for `w*`, so these keys of its own name nothing.
    let legacy = json!({
        "version": "4.57",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.block_sparse_moe.gate": "colwise_rep",
        "layers.*.block_sparse_moe.experts.*.w1": "colwise",
        "layers.*.block_sparse_moe.experts.*.w*": "rowwise",
    });
    for plan in [legacy.clone(), without_version(legacy)] {
        let eight = case.plan(&plan, Mesh::tp(8));
        assert_eq!(part(&eight, 1, &expert("w1")).0, [14_336, 512], "by the second key");
        assert_range(&eight, 1, "model.layers.0.block_sparse_moe.gate.weight", &[1, 4096], 8192..16_384);
    }
}

/// One number for all of an expert's matrix, stored with a dimension or without one, is of every part of it.
#[test]
fn scales_of_all_of_an_expert_are_not_cut() {
    let rows = json!({
        "layers.*.mlp.experts.gate_up_proj": "colwise",
        "layers.*.mlp.experts.down_proj": "colwise",
    });
    for dims in [&[][..], &[1]] {
        let mut model = Llama { scheme: Scheme::Fp8Tensor, ..Llama::tiny(Kind::Mixtral) }.model();
        for tensor in model.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("_scale")) {
            tensor.shape = dims.to_vec();
        }
        let case = Case::new(model);
        let name = |part: &str, what: &str| format!("model.layers.1.block_sparse_moe.experts.5.{part}.{what}");
        for (plan, down) in [(qwen3_moe(), [64, 64]), (with(qwen3_moe(), rows.clone()), [32, 128])] {
            let two = case.plan(&plan, Mesh::tp(2));
            assert_eq!(part(&two, 1, &name("w1", "weight")).0, [64, 64], "{dims:?}");
            assert_eq!(part(&two, 1, &name("w2", "weight")).0, down, "{dims:?}");
            for of in ["w1", "w2", "w3"] {
                assert_whole(&two, &name(of, "weight_scale"));
                assert_whole(&two, &name(of, "input_scale"));
            }
            assert_whole(&two, "model.layers.1.self_attn.q_proj.weight_scale");
        }
        // Where whole experts are divided a scale is only where its expert is.
        let plan = json!({ "base_model_tp_plan": qwen3_moe(), "base_model_ep_plan": ep_plan() });
        let groups = case.plan(&plan, ep(2, 2));
        for what in ["weight", "weight_scale", "input_scale"] {
            assert_eq!([0, 1].map(|rank| has(&groups, rank, &name("w1", what))), [false, true], "{dims:?} {what}");
        }
    }
}

/// The plan, whose keys then say what it is for.
fn without_version(mut plan: Value) -> Value {
    plan.as_object_mut().unwrap().remove("version");
    plan
}

#[test]
fn llama_4_packs_the_last_dimension() {
    let case = Case::new(Llama4 { layers: 2, moe_step: 1, ..Llama4::LLAMA_4_SCOUT }.model());
    let plan = json!({
        "base_model_tp_plan": {
            "layers.*.self_attn.q_proj": "colwise",
            "layers.*.self_attn.k_proj": "colwise",
            "layers.*.self_attn.v_proj": "colwise",
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.feed_forward.shared_expert.gate_proj": "colwise",
            "layers.*.feed_forward.shared_expert.up_proj": "colwise",
            "layers.*.feed_forward.shared_expert.down_proj": "rowwise",
            "layers.*.feed_forward.experts.gate_up_proj": "packed_rowwise",
            "layers.*.feed_forward.experts.down_proj": "colwise",
            "layers.*.feed_forward.experts": "moe_tp_experts",
        },
        "_tp_plan": { "lm_head": HEAD },
    });
    let eight = case.plan(&plan, Mesh::tp(8));
    let layer = "language_model.model.layers.1.feed_forward";
    // Columns 2048..3072 of gate, and of up behind its 8192.
    let rows = 16 * 5120;
    assert_eq!(
        part(&eight, 2, &format!("{layer}.experts.gate_up_proj")),
        (vec![16, 5120, 2048], vec![(4096, rows, 32_768, 2048), (20_480, rows, 32_768, 2048)])
    );
    assert_eq!(
        part(&eight, 2, &format!("{layer}.experts.down_proj")),
        (vec![16, 1024, 5120], vec![(20_971_520, 16, 83_886_080, 10_485_760)])
    );
    assert_range(&eight, 2, "language_model.lm_head.weight", &[25_256, 5120], 50_512 * 10_240..75_768 * 10_240);
    assert_whole(&eight, &format!("{layer}.router.weight"));
    // The tower's layers have the same names below another prefix.
    assert_whole(&eight, "vision_model.model.layers.0.self_attn.q_proj.weight");
}

#[test]
fn gpt_neox_has_digits_in_its_names() {
    let case = Case::new(GptNeox::GPT_NEOX_20B.model());
    let plan = |version: &str| {
        json!({
            "version": version,
            "base_model_tp_plan": {
                "layers.*.attention.query_key_value": "colwise",
                "layers.*.attention.dense": "rowwise",
                "layers.*.mlp.dense_h_to_4h": "colwise",
                "layers.*.mlp.dense_4h_to_h": "rowwise",
            },
            "_tp_plan": { "lm_head": "colwise_rep" },
        })
    };
    let (old, new) = (case.plan(&plan("4.57"), Mesh::tp(5)), case.plan(&plan("5.23"), Mesh::tp(5)));
    let layer = |rest: &str| format!("gpt_neox.layers.43.{rest}");
    for plan in [&old, &new] {
        // 18432 rows are four times 3687 and 3684.
        let name = layer("attention.query_key_value.weight");
        assert_range(plan, 4, &name, &[3684, 6144], 14_748 * 12_288..18_432 * 12_288);
        assert_range(plan, 4, &layer("attention.query_key_value.bias"), &[3684], 29_496..36_864);
        assert_eq!(
            part(plan, 4, &layer("attention.dense.weight")),
            (vec![6144, 1228], vec![(9832, 6144, 12_288, 2456)])
        );
        assert_whole(plan, &layer("attention.dense.bias"));
        assert_whole(plan, &layer("attention.bias"));
    }
    // 4.57 looks for `dense_h_to_*h`, and knows the head by the name that it has in the file.
    for name in ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"] {
        assert_whole(&old, &layer(name));
    }
    assert_whole(&old, "embed_out.weight");
    assert_range(&new, 4, &layer("mlp.dense_h_to_4h.bias"), &[4912], 19_664 * 2..24_576 * 2);
    assert_range(&new, 4, "embed_out.weight", &[10_084, 6144], 40_348 * 12_288..50_432 * 12_288);
}

#[test]
fn gpt_oss_of_both_versions() {
    let case = Case::new(GptOss { layers: 2, ..GptOss::GPT_OSS_20B }.model());
    let experts = "model.layers.1.mlp.experts";
    let own = json!({
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.gate_up_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
    });
    let new = json!({
        "base_model_ep_plan": with(own.clone(), json!({ "layers.*.mlp.experts": "ep_dispatch_experts" })),
        "_tp_plan": { "lm_head": HEAD },
    });
    let names = ["gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj_blocks"];
    let four = case.plan(&new, ep(4, 4));
    let blocks = 8 * 5760 * 90 * 16;
    assert_range(&four, 1, &format!("{experts}.gate_up_proj_blocks"), &[8, 5760, 90, 16], blocks..2 * blocks);
    assert_range(&four, 3, &format!("{experts}.down_proj_scales"), &[8, 2880, 90], 6_220_800..8_294_400);
    assert_range(&four, 3, &format!("{experts}.down_proj_bias"), &[8, 2880], 138_240..184_320);
    assert_whole(&four, "model.layers.1.self_attn.sinks");
    assert_range(&four, 1, "lm_head.weight", &[50_272, 2880], 50_272 * 5760..100_544 * 5760);
    let without = case.plan(&new, Mesh::tp(4));
    names.iter().for_each(|name| assert_whole(&without, &format!("{experts}.{name}")));

    // 4.57 has the experts in the plan for tensors, over the same ranks; its styles say that it is meant.
    let legacy = json!({
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.sinks": "local_rowwise",
        "layers.*.mlp.experts": "gather",
        "layers.*.mlp.router": "ep_router",
    });
    let eight = case.plan(&json!({ "base_model_tp_plan": with(legacy.clone(), own) }), Mesh::tp(8));
    assert_range(&eight, 7, "model.layers.1.self_attn.sinks", &[8], 112..128);
    assert_range(&eight, 1, &format!("{experts}.gate_up_proj_blocks"), &[4, 5760, 90, 16], blocks / 2..blocks);
    assert_range(&eight, 1, "model.layers.0.self_attn.q_proj.bias", &[512], 1024..2048);
    assert_whole(&eight, "model.layers.0.self_attn.o_proj.bias");
    assert_whole(&eight, "model.layers.0.mlp.router.weight");

    let refused = case.refused(json!({ "version": "5", "base_model_tp_plan": legacy }), Mesh::tp(8));
    assert!(refused.expected().unwrap().contains("packed_colwise"), "{refused}");
    let blocks = json!({ "layers.*.mlp.experts.gate_up_proj": "packed_colwise" });
    let refused = case.refused(blocks, Mesh::tp(2));
    assert_eq!(refused.tensor(), Some("model.layers.0.mlp.experts.gate_up_proj_blocks"));
}

#[test]
fn scales_go_with_what_they_scale() {
    let case = Case::new(DeepSeek { layers: 5, ..DeepSeek::V3 }.model());
    let plan = json!({
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    });
    // 16 blocks of 128 are 6, 6 and 4; torch would cut the rows at 683 and 1366.
    let three = case.plan(&plan, Mesh::tp(3));
    for module in ["shared_experts.gate_proj", "experts.9.up_proj"] {
        let name = format!("model.layers.4.mlp.{module}.weight");
        assert_range(&three, 2, &name, &[512, 7168], 1536 * 7168..2048 * 7168);
        assert_range(&three, 2, &format!("{name}_scale_inv"), &[4, 56], 12 * 224..16 * 224);
    }
    let name = "model.layers.4.mlp.experts.255.down_proj.weight";
    assert_eq!(part(&three, 1, name), (vec![7168, 768], vec![(768, 7168, 2048, 768)]));
    assert_eq!(part(&three, 1, &format!("{name}_scale_inv")), (vec![56, 6], vec![(24, 56, 64, 24)]));
    assert_whole(&three, "model.layers.4.self_attn.q_b_proj.weight");
    assert_whole(&three, "model.layers.4.mlp.gate.e_score_correction_bias");

    // Layouts that pack elements are refused; all others are cut with their scales.
    for scheme in released::schemes(32) {
        let case = Case::new(Llama { scheme, ..Llama::TINY }.model());
        let name = "model.layers.1.mlp.down_proj.weight";
        if case.checkpoint.tensor(name).is_none_or(|tensor| matches!(tensor.dtype, shardlift::Dtype::U8)) {
            let refused = case.refused(llama(), Mesh::tp(3));
            assert!(refused.message().contains("packed") && refused.tensor().is_some(), "{scheme:?}: {refused}");
            continue;
        }
        let plan = case.plan(&llama(), Mesh::tp(3));
        let columns = |name: &str| part(&plan, 2, name).0[1];
        match scheme {
            Scheme::Fp8Block { .. } => assert_eq!((columns(name), columns(&format!("{name}_scale_inv"))), (64, 2)),
            Scheme::Mxfp8 => assert_eq!((columns(name), columns(&format!("{name}_scale"))), (64, 2)),
            _ => assert_eq!(columns(name), 84, "{scheme:?}"),
        }
        if scheme == Scheme::Fp8Channel {
            assert_whole(&plan, &format!("{name}_scale"));
        }
    }
}

#[test]
fn layers_of_different_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [0; 10 * 2];
    let view = |rows: usize| TensorView::new(Dtype::F8_E4M3, vec![rows, 2], &bytes[..rows * 2]).unwrap();
    let tensors =
        [("l.0.up", view(6)), ("l.1.up", view(10)), ("l.2.up", view(6)), ("l.x.up", view(6)), ("up", view(1))];
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    let case = Case { checkpoint: Checkpoint::open(folder.path()).unwrap(), folder };
    let plan = case.plan(&json!({ "l.*.up": "packed_colwise", "up": "colwise" }), Mesh::tp(2));
    // Halves of 3 are 2 and 1, halves of 5 are 3 and 2.
    for name in ["l.0.up", "l.2.up"] {
        assert_eq!(part(&plan, 1, name), (vec![2, 2], vec![(4, 1, 0, 2), (10, 1, 0, 2)]));
    }
    assert_eq!(part(&plan, 1, "l.1.up"), (vec![4, 2], vec![(6, 1, 0, 4), (16, 1, 0, 4)]));
    assert_whole(&plan, "l.x.up");
    assert_whole(&plan, "up");
}

#[test]
fn plans_that_are_none() {
    let case = Case::new(Llama::TINY.model());
    let message = |plan: Value| case.refused(plan, Mesh::tp(2)).to_string();
    assert!(message(json!([])).contains("no JSON object"));
    assert!(message(json!({ "base_model_tp_plan": "colwise" })).contains("no dictionary"));
    assert!(message(json!({ "layers.*.mlp.up_proj": 1 })).contains("no style"));
    assert!(message(json!({ "layers.*.mlp.up_proj": "diagonal" })).contains("`diagonal`"));
    assert!(message(json!({ "transformer.h.*.mlp": "colwise" })).contains("no key of the plan"));
    assert!(message(json!({})).contains("no key of the plan"));
    assert!(message(json!({ "version": "3.0", "lm_head": "colwise" })).contains("`3.0`"));
    let file = case.folder.path().join("plan.json");
    std::fs::write(&file, "{").unwrap();
    let error = Rules::from_hf_plan(&file, &case.checkpoint, Mesh::tp(2)).unwrap_err();
    assert_eq!((error.kind(), error.file()), (ErrorKind::Rules, Some(&*file)));
    let missing = Rules::from_hf_plan("no/such/plan.json", &case.checkpoint, Mesh::tp(2)).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[cfg(feature = "cli")]
#[test]
fn plans_on_the_command_line() {
    let case = Case::new(Llama::TINY.model());
    let file = case.folder.path().join("plan.json");
    std::fs::write(&file, llama().to_string()).unwrap();
    let rules = format!("hf-plan:{}", file.display());
    let run = |rules: &str| {
        let folder = case.folder.path().to_str().unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_shardlift"))
            .args(["load", folder, "--tp", "3", "--check", "--json", "--rules", rules])
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, loaded) = run(&rules);
    assert_eq!(code, Some(0), "{loaded}");
    let (code, refused) = run(&format!("hf-plan:{}", case.folder.path().join("config.json").display()));
    assert_eq!(code, Some(2), "{refused}");
}
