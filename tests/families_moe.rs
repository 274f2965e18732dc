//! Plans of mixtures of experts over released models and tiny ones of the same kinds, on meshes with expert and pipeline
//! parallelism: target `plain`. Ranges are those of sharding.md section 15, worked out by hand, from the tensor's first
//! byte.

#[path = "support/released/mod.rs"]
mod released;

use std::collections::BTreeSet;
use std::ops::Range;

use released::{DeepSeek, Experts, GptOss, Kind, Llama, Llama4, Model, Qwen3Next};
use shardlift::plan::{Dest, Mesh, ModelOptions, Plan, Rules, Split, StageSplit, World};
use shardlift::{Checkpoint, Rank, Result};

fn plan_with(model: &Model, mesh: Mesh, set: impl Fn(&mut ModelOptions)) -> Result<Plan> {
    let folder = tempfile::tempdir().unwrap();
    released::write(folder.path(), model).unwrap();
    plan_of(&Checkpoint::open(folder.path())?, mesh, set)
}

fn plan_of(checkpoint: &Checkpoint, mesh: Mesh, set: impl Fn(&mut ModelOptions)) -> Result<Plan> {
    let mut options = ModelOptions::default();
    set(&mut options);
    Plan::new(checkpoint, &Rules::for_model_with(checkpoint, &options)?, &World::host(1).with_mesh(mesh))
}

fn plan(model: &Model, mesh: Mesh) -> Result<Plan> {
    plan_with(model, mesh, |_| {})
}

fn dest<'a>(plan: &'a Plan, rank: u32, name: &str) -> Option<&'a Dest> {
    plan.rank(Rank(rank)).dests.iter().find(|dest| plan.params()[dest.param as usize].name == name)
}

fn shape(plan: &Plan, rank: u32, name: &str) -> Vec<u64> {
    dest(plan, rank, name).expect(name).shape.dims().to_vec()
}

/// The bytes that a rank reads of a tensor, in the order of its destination: (first, length), neighbours as one.
fn runs(plan: &Plan, rank: u32, name: &str) -> Vec<(u64, u64)> {
    let dest = dest(plan, rank, name).expect(name);
    let mut runs = Vec::new();
    for copy in &plan.rank(Rank(rank)).pieces[dest.pieces.start as usize..dest.pieces.end as usize] {
        let start = plan.tensor(copy.tensor).start;
        for step in 0..copy.loops.iter().map(|inner| inner.count).product() {
            let (mut left, mut src, mut dst): (u64, _, _) = (step, copy.src - start, copy.dst);
            for inner in copy.loops.iter().rev() {
                src += left % inner.count * inner.src_stride;
                dst += left % inner.count * inner.dst_stride;
                left /= inner.count;
            }
            runs.push((dst, src, copy.run));
        }
    }
    runs.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (_, src, len) in runs {
        match joined.last_mut() {
            Some(last) if last.0 + last.1 == src => last.1 += len,
            _ => joined.push((src, len)),
        }
    }
    joined
}

/// Equal runs at equal distances: (first, distance, length, how many).
fn strided(plan: &Plan, rank: u32, name: &str) -> (u64, u64, u64, usize) {
    let runs = runs(plan, rank, name);
    let (first, len) = runs[0];
    let pitch = runs[1].0 - first;
    assert!(runs.windows(2).all(|pair| pair[0].0 + pitch == pair[1].0 && pair[1].1 == len), "{name}");
    (first, pitch, len, runs.len())
}

/// The experts that a rank holds tensors of whose names have the number after `prefix`.
fn experts(plan: &Plan, rank: u32, prefix: &str) -> BTreeSet<u64> {
    let names = plan.rank(Rank(rank)).dests.iter().map(|dest| &plan.params()[dest.param as usize].name);
    names.filter_map(|name| name.strip_prefix(prefix)?.split('.').next()?.parse().ok()).collect()
}

/// Meshes that every family here may be asked for: `tp` with all ways to place experts, stages, replicas.
fn meshes() -> Vec<Mesh> {
    let mut meshes = Vec::new();
    for tp in [1, 2, 4, 8] {
        for ep in BTreeSet::from([1, 2, tp]).into_iter().filter(|&ep| ep <= tp) {
            meshes.push(Mesh { ep, ..Mesh::tp(tp) });
        }
    }
    let two = Mesh { pp: 2, ..Mesh::tp(2) };
    meshes.extend([two, Mesh { ep: 2, ..two }, Mesh { dp: 2, ep: 4, ..two }, Mesh { dp: 2, ep: 2, ..two }]);
    meshes
}

/// How often the ranks of `mesh` hold each byte of a tensor: what the issue says of `plain`, told from its name.
fn copies(model: &Model, name: &str, mesh: Mesh) -> u64 {
    let text = model.config.get("text_config").unwrap_or(&model.config);
    let number = |key: &str| text[key].as_u64();
    let layers = number("num_hidden_layers").unwrap();
    let is_after =
        |rest: &str| rest.split('.').next().and_then(|at| at.parse().ok()).is_some_and(|at: u64| at >= layers);
    if name.starts_with("mtp.") || name.strip_prefix("model.layers.").is_some_and(is_after) {
        return 0;
    }
    let [dp, tp, ep] = [mesh.dp, mesh.tp, mesh.ep].map(u64::from);
    let has = |part: &str| name.contains(part);
    let kv = number("num_key_value_heads").unwrap_or(tp);
    if has("vision_model.") || has("multi_modal_projector.") {
        return dp * tp;
    }
    if has(".experts.") {
        // Only a bias that no cut divides is there more often than once.
        return if name.ends_with("down_proj_bias") { dp * tp / ep } else { 1 };
    }
    let whole =
        ["norm", "embed_tokens", "lm_head", "_a_proj", "o_proj.bias", ".router", ".gate.", "shared_expert_gate"];
    if has("linear_attn") && has("norm") || whole.iter().any(|part| has(part)) {
        return dp * tp;
    }
    if has("self_attn.k_proj") || has("self_attn.v_proj") {
        return dp * (tp / kv).max(1);
    }
    dp
}

/// The bytes that all ranks hold are those of each tensor as often as it should be held.
fn sums(name: &str, model: &Model, plan: &Plan) {
    let mesh = plan.world().mesh();
    let declared: u64 = model.tensors.iter().map(|tensor| tensor.bytes() * copies(model, &tensor.name, mesh)).sum();
    let held: u64 = plan.ranks().iter().map(|rank| plan.bytes_on(rank.rank)).sum();
    // A dense tensor in FP8 that heads share has scales that are held as often.
    assert_eq!(held, declared, "{name} on {mesh}");
}

/// The same, byte for byte.
fn counts(name: &str, model: &Model, plan: &Plan) {
    let mut held: Vec<Vec<u64>> =
        plan.checkpoint().tensors().iter().map(|tensor| vec![0; tensor.bytes() as usize]).collect();
    for rank in plan.ranks() {
        for dest in &rank.dests {
            for (start, len) in runs(plan, rank.rank.0, &plan.params()[dest.param as usize].name) {
                let copy = &rank.pieces[dest.pieces.start as usize];
                held[copy.tensor as usize][start as usize..][..len as usize].iter_mut().for_each(|times| *times += 1);
            }
        }
    }
    let mesh = plan.world().mesh();
    for (tensor, held) in plan.checkpoint().tensors().iter().zip(held) {
        let should = copies(model, &tensor.name, mesh);
        assert!(held.iter().all(|&times| times == should), "{name} on {mesh}: {}: {should} times", tensor.name);
    }
}

fn tiny() -> Vec<(&'static str, Model)> {
    vec![
        ("mixtral", Llama::tiny(Kind::Mixtral).model()),
        ("qwen3-moe", Llama::tiny(Kind::Qwen3Moe).model()),
        ("deepseek v2", DeepSeek::TINY_V2.model()),
        ("deepseek v3", DeepSeek::TINY_V3.model()),
        ("gpt-oss", GptOss::TINY.model()),
        ("gpt-oss in BF16", GptOss { mxfp4: false, ..GptOss::TINY }.model()),
        ("llama 4", Llama4::TINY.model()),
        ("qwen3-next", Qwen3Next::TINY.model()),
    ]
}

#[test]
fn tiny_models_plan_on_every_mesh_and_hold_each_byte_as_often_as_declared() {
    for (name, model) in tiny() {
        let folder = tempfile::tempdir().unwrap();
        released::write(folder.path(), &model).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        for mesh in meshes() {
            let plan = plan_of(&checkpoint, mesh, |_| {}).unwrap_or_else(|error| panic!("{name} on {mesh}: {error}"));
            sums(name, &model, &plan);
            counts(name, &model, &plan);
        }
    }
}

/// Plans of a released model on all of the meshes that are legal, and why the others are not.
fn released(name: &str, model: &Model, illegal: &[(u32, u32)]) {
    let folder = tempfile::tempdir().unwrap();
    released::write(folder.path(), model).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for mesh in meshes() {
        // 61 and 27 layers are not even.
        let found = plan_of(&checkpoint, mesh, |options| options.stages = Some(StageSplit::Vllm));
        match found {
            Ok(plan) => {
                assert!(!illegal.contains(&(mesh.tp, mesh.ep)), "{name} on {mesh}");
                sums(name, model, &plan);
            }
            Err(error) if !illegal.contains(&(mesh.tp, mesh.ep)) => panic!("{name} on {mesh}: {error}"),
            Err(error) => assert_eq!(error.rule(), Some("not-divisible"), "{name} on {mesh}: {error}"),
        }
    }
}

#[test]
fn released_mixtral_and_qwen3_moe_plan() {
    released("mixtral-8x7b", &Llama::MIXTRAL_8X7B.model(), &[]);
    released("qwen3-30b-a3b", &Llama::QWEN_3_30B_A3B.model(), &[]);
    released("qwen3-235b-a22b", &Llama::QWEN_3_235B_A22B.model(), &[]);
}

#[test]
fn released_deepseek_plans() {
    released("deepseek-v2-lite", &DeepSeek::V2_LITE.model(), &[]);
    released("deepseek-v3", &DeepSeek::V3.model(), &[]);
}

#[test]
fn released_gpt_oss_plans_where_blocks_divide() {
    let experts = Experts { count: 128, ..GptOss::GPT_OSS_20B.experts };
    let illegal = [(4, 1), (8, 1), (8, 2)];
    released("gpt-oss-20b", &GptOss::GPT_OSS_20B.model(), &illegal);
    released("gpt-oss-120b", &GptOss::GPT_OSS_120B.model(), &illegal);
    released("gpt-oss-120b in BF16", &GptOss { experts, mxfp4: false, ..GptOss::GPT_OSS_120B }.model(), &[]);
}

#[test]
fn released_llama_4_and_qwen3_next_plan() {
    let scout = Llama4::LLAMA_4_SCOUT;
    // meta-llama/Llama-4-Maverick-17B-128E: `interleave_moe_layer_step` 2, `num_local_experts` 128.
    let maverick = Llama4 { moe_step: 2, experts: Experts { count: 128, ..scout.experts }, ..scout };
    released("llama-4-scout", &scout.model(), &[]);
    released("llama-4-maverick", &maverick.model(), &[]);
    released("qwen3-next-80b-a3b", &Qwen3Next::QWEN_3_NEXT_80B_A3B.model(), &[]);
}

/// Case 26.
#[test]
fn latent_attention_is_cut_between_heads_and_its_scales_with_it() {
    let plan = plan(&DeepSeek { layers: 4, ..DeepSeek::V3 }.model(), Mesh { ep: 8, ..Mesh::tp(8) }).unwrap();
    let attention = "model.layers.3.self_attn";
    // Rows 16384..20480 of 512 bytes, and 128..160 of 4 scales.
    assert_eq!(runs(&plan, 4, &format!("{attention}.kv_b_proj.weight")), [(16_384 * 512, 4096 * 512)]);
    assert_eq!(runs(&plan, 4, &format!("{attention}.kv_b_proj.weight_scale_inv")), [(2048, 512)]);
    // 16 heads of 192, and 24 of 192 blocks.
    assert_eq!(runs(&plan, 4, &format!("{attention}.q_b_proj.weight")), [(64 * 192 * 1536, 16 * 192 * 1536)]);
    assert_eq!(runs(&plan, 4, &format!("{attention}.q_b_proj.weight_scale_inv")), [(96 * 12 * 4, 24 * 12 * 4)]);
    // Columns 8192..10240 of 16384, and 64..80 of 128 blocks.
    assert_eq!(strided(&plan, 4, &format!("{attention}.o_proj.weight")), (8192, 16_384, 2048, 7168));
    assert_eq!(strided(&plan, 4, &format!("{attention}.o_proj.weight_scale_inv")), (256, 512, 64, 56));
    for (name, bytes) in [("q_a_proj.weight", 1536 * 7168), ("kv_a_proj_with_mqa.weight", 576 * 7168)] {
        assert_eq!(runs(&plan, 4, &format!("{attention}.{name}")), [(0, bytes)]);
    }
    assert_eq!(runs(&plan, 4, &format!("{attention}.kv_a_proj_with_mqa.weight_scale_inv")), [(0, 5 * 56 * 4)]);
    assert_eq!(experts(&plan, 4, "model.layers.3.mlp.experts."), (128..160).collect());
    assert!(plan.params().iter().all(|param| !param.name.starts_with("model.layers.4.")));
}

/// Case 29.
#[test]
fn blocks_that_a_cut_falls_inside_are_refused_or_refined() {
    // The dense layers' 18432 are 4.5 blocks for each of 32 ranks, so there are none here.
    let model = DeepSeek { layers: 1, dense_layers: 0, ..DeepSeek::V3 }.model();
    let error = plan(&model, Mesh::tp(32)).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("not-divisible"), Some("32 parts")));
    assert_eq!(error.expected(), Some("a divisor of 16 units: 1, 2, 4, 8, 16"));
    assert!(error.tensor().is_some_and(|name| name.contains("experts.")), "{error}");

    let plan = plan_with(&model, Mesh::tp(32), |options| options.refine_scales = true).unwrap();
    let gate = "model.layers.0.mlp.experts.7.gate_proj";
    assert_eq!(runs(&plan, 5, &format!("{gate}.weight")), [(5 * 64 * 7168, 64 * 7168)]);
    assert_eq!(shape(&plan, 5, &format!("{gate}.weight_scale_inv")), [1, 112]);
    // Row 2 of 56 scales, each of them twice.
    let scales = dest(&plan, 5, &format!("{gate}.weight_scale_inv")).unwrap();
    let landed =
        plan.rank(Rank(5)).pieces[scales.pieces.start as usize..scales.pieces.end as usize].iter().map(|copy| {
            let inner = copy.loops[0];
            let from = copy.src - plan.tensor(copy.tensor).start;
            (from, copy.dst, copy.run, inner.count, inner.src_stride, inner.dst_stride)
        });
    assert_eq!(landed.collect::<Vec<_>>(), [(448, 0, 4, 56, 4, 8), (448, 4, 4, 56, 4, 8)]);
}

/// Cases 31 and 32.
#[test]
fn experts_are_whole_on_one_rank_or_divided_over_all() {
    let plan = |llama: Llama, mesh| plan(&Llama { layers: 2, ..llama }.model(), mesh).unwrap();
    let whole = plan(Llama::QWEN_3_30B_A3B, Mesh { ep: 8, ..Mesh::tp(8) });
    for layer in 0..2 {
        assert_eq!(experts(&whole, 3, &format!("model.layers.{layer}.mlp.experts.")), (48..64).collect());
    }
    for part in ["gate", "up", "down"] {
        let name = format!("model.layers.1.mlp.experts.48.{part}_proj.weight");
        assert_eq!(runs(&whole, 3, &name), [(0, 3_145_728)]);
    }
    assert_eq!(runs(&whole, 3, "model.layers.1.mlp.gate.weight"), [(0, 128 * 2048 * 2)]);

    let divided = plan(Llama::QWEN_3_235B_A22B, Mesh::tp(8));
    let down = "model.layers.0.mlp.experts.9.down_proj.weight";
    assert_eq!(strided(&divided, 5, down), (1920, 3072, 384, 4096));
    assert_eq!(experts(&divided, 5, "model.layers.0.mlp.experts."), (0..128).collect());

    // 4 groups of 2 ranks.
    let both = plan(Llama::QWEN_3_235B_A22B, Mesh { ep: 4, ..Mesh::tp(8) });
    assert_eq!(experts(&both, 5, "model.layers.0.mlp.experts."), (64..96).collect());
    let down = "model.layers.0.mlp.experts.70.down_proj.weight";
    assert_eq!(strided(&both, 5, down), (1536, 3072, 1536, 4096));
}

/// Cases 34, as `plain` has it, and 35.
#[test]
fn gpt_oss_is_cut_between_blocks() {
    let model = GptOss { layers: 2, ..GptOss::GPT_OSS_20B }.model();
    let layer = "model.layers.1";
    let error = plan(&model, Mesh::tp(4)).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("not-divisible"), Some("4 parts")));
    let sizes = "a divisor of 90 units: 1, 2, 3, 5, 6, 9, 10, 15";
    assert!(error.expected().is_some_and(|expected| expected.starts_with(sizes)), "{error}");
    assert!(error.tensor().is_some_and(|name| name.contains(".experts.down_proj_")), "{error}");

    let eight = plan(&model, Mesh { ep: 8, ..Mesh::tp(8) }).unwrap();
    assert_eq!(runs(&eight, 7, &format!("{layer}.self_attn.sinks")), [(112, 16)]);
    assert_eq!(runs(&eight, 7, &format!("{layer}.self_attn.q_proj.bias")), [(7 * 512 * 2, 512 * 2)]);
    assert_eq!(runs(&eight, 7, &format!("{layer}.self_attn.o_proj.bias")), [(0, 2880 * 2)]);
    assert_eq!(runs(&eight, 7, &format!("{layer}.mlp.experts.down_proj_bias")), [(28 * 5760, 4 * 5760)]);
    assert_eq!(runs(&eight, 7, &format!("{layer}.mlp.router.weight")), [(0, 32 * 2880 * 2)]);
    let blocks = 2880 * 90 * 16;
    assert_eq!(runs(&eight, 7, &format!("{layer}.mlp.experts.down_proj_blocks")), [(28 * blocks, 4 * blocks)]);

    let two = plan(&model, Mesh::tp(2)).unwrap();
    let experts = format!("{layer}.mlp.experts");
    // 45 of 90 blocks of 16 bytes.
    assert_eq!(strided(&two, 1, &format!("{experts}.down_proj_blocks")), (720, 1440, 720, 92_160));
    assert_eq!(strided(&two, 1, &format!("{experts}.down_proj_scales")), (45, 90, 45, 92_160));
    assert_eq!(runs(&two, 1, &format!("{experts}.down_proj_bias")), [(0, 32 * 2880 * 2)]);
    // Rows 2880..5760: gate and up of 1440..2880.
    assert_eq!(
        strided(&two, 1, &format!("{experts}.gate_up_proj_blocks")),
        (2880 * 1440, 5760 * 1440, 2880 * 1440, 32)
    );
    assert_eq!(strided(&two, 1, &format!("{experts}.gate_up_proj_scales")), (2880 * 90, 5760 * 90, 2880 * 90, 32));
    assert_eq!(strided(&two, 1, &format!("{experts}.gate_up_proj_bias")), (2880 * 2, 5760 * 2, 2880 * 2, 32));
}

#[test]
fn gpt_oss_in_bf16_is_stored_the_other_way_round() {
    let plan = plan(&GptOss { layers: 2, mxfp4: false, ..GptOss::GPT_OSS_20B }.model(), Mesh::tp(4)).unwrap();
    let experts = "model.layers.1.mlp.experts";
    // [32, 2880, 5760]: columns 1440..2880. [32, 2880, 2880]: rows 720..1440.
    assert_eq!(shape(&plan, 1, &format!("{experts}.gate_up_proj")), [32, 2880, 1440]);
    assert_eq!(strided(&plan, 1, &format!("{experts}.gate_up_proj")), (2880, 11_520, 2880, 32 * 2880));
    assert_eq!(shape(&plan, 1, &format!("{experts}.down_proj")), [32, 720, 2880]);
    assert_eq!(strided(&plan, 1, &format!("{experts}.down_proj")), (720 * 5760, 2880 * 5760, 720 * 5760, 32));
    assert_eq!(strided(&plan, 1, &format!("{experts}.gate_up_proj_bias")), (2880, 11_520, 2880, 32));
}

/// Case 37.
#[test]
fn llama_4_divides_both_halves_of_stacked_experts() {
    let model = Llama4 { layers: 1, ..Llama4::LLAMA_4_SCOUT }.model();
    let plan = |mesh| plan(&model, mesh).unwrap();
    let eight = plan(Mesh::tp(8));
    let mlp = "language_model.model.layers.0.feed_forward";
    assert_eq!(shape(&eight, 2, &format!("{mlp}.experts.down_proj")), [16, 1024, 5120]);
    assert_eq!(strided(&eight, 2, &format!("{mlp}.experts.down_proj")), (20_971_520, 8192 * 5120 * 2, 10_485_760, 16));
    // Columns 2048..3072 and 10240..11264 of each of 16 x 5120 rows.
    assert_eq!(shape(&eight, 2, &format!("{mlp}.experts.gate_up_proj")), [16, 5120, 2048]);
    assert_eq!(
        strided(&eight, 2, &format!("{mlp}.experts.gate_up_proj")),
        (2048 * 2, 8192 * 2, 1024 * 2, 2 * 16 * 5120)
    );
    assert_eq!(runs(&eight, 2, &format!("{mlp}.shared_expert.up_proj.weight")), [(2048 * 10_240, 1024 * 10_240)]);
    assert_eq!(runs(&eight, 2, &format!("{mlp}.router.weight")), [(0, 16 * 5120 * 2)]);
    let vision = "vision_model.model.layers.3.self_attn.q_proj.weight";
    assert_eq!(runs(&eight, 2, vision), [(0, 1408 * 1408 * 2)]);

    let apart = plan(Mesh { ep: 8, ..Mesh::tp(8) });
    let expert = 8192 * 5120 * 2;
    assert_eq!(runs(&apart, 2, &format!("{mlp}.experts.down_proj")), [(4 * expert, 2 * expert)]);
    assert_eq!(runs(&apart, 2, &format!("{mlp}.experts.gate_up_proj")), [(8 * expert, 4 * expert)]);
}

/// As vLLM finds it in quantised models: modules for each expert.
#[test]
fn llama_4_may_have_modules_for_each_expert() {
    let Llama4 { hidden, experts: Experts { count, intermediate, .. }, .. } = Llama4::TINY;
    let mut model = Llama4::TINY.model();
    let mlp = "language_model.model.layers.1.feed_forward";
    model.tensors.retain(|tensor| !tensor.name.contains(".experts."));
    for expert in 0..count {
        for part in ["gate", "up", "down"] {
            let mut tensor = model.tensor(&format!("{mlp}.shared_expert.{part}_proj.weight")).clone();
            tensor.name = format!("{mlp}.experts.{expert}.{part}_proj.weight");
            model.tensors.push(tensor);
        }
    }
    let plan = plan(&model, Mesh { ep: 2, ..Mesh::tp(4) }).unwrap();
    assert_eq!(experts(&plan, 3, &format!("{mlp}.experts.")), (4..8).collect());
    let of = |part: &str| shape(&plan, 3, &format!("{mlp}.experts.5.{part}_proj.weight"));
    assert_eq!((of("gate"), of("down")), (vec![intermediate / 2, hidden], vec![hidden, intermediate / 2]));
}

#[test]
fn llama_4_alone_has_no_prefix() {
    let mut model = Llama4::TINY.model();
    model.config = model.config["text_config"].clone();
    model.tensors.retain(|tensor| tensor.name.starts_with("language_model."));
    for tensor in &mut model.tensors {
        tensor.name = tensor.name.replacen("language_model.", "", 1);
    }
    let plan = plan(&model, Mesh { pp: 2, ep: 2, ..Mesh::tp(2) }).unwrap();
    assert_eq!(shape(&plan, 3, "model.layers.1.feed_forward.experts.down_proj"), [4, 32, 64]);
    assert_eq!(shape(&plan, 0, "model.embed_tokens.weight"), [160, 64]);
    assert!(dest(&plan, 0, "lm_head.weight").is_none() && dest(&plan, 3, "lm_head.weight").is_some());
}

/// Case 44.
#[test]
fn qwen3_next_is_cut_between_key_heads_and_gated_heads() {
    let model = Qwen3Next { layers: 4, ..Qwen3Next::QWEN_3_NEXT_80B_A3B }.model();
    let [four, eight] = [4, 8].map(|tp| plan(&model, Mesh { ep: tp, ..Mesh::tp(tp) }).unwrap());
    let [linear, full] = ["model.layers.0.linear_attn", "model.layers.3.self_attn"];
    assert_eq!(runs(&four, 1, &format!("{linear}.in_proj_qkvz.weight")), [(12_582_912, 12_582_912)]);
    assert_eq!(runs(&eight, 3, &format!("{full}.q_proj.weight")), [(12_582_912, 4_194_304)]);
    assert_eq!(runs(&eight, 3, &format!("{full}.k_proj.weight")), [(0, 256 * 4096)]);
    // Rows of 8 bytes.
    let rows = |range: Range<u64>| (range.start * 8, (range.end - range.start) * 8);
    let conv = runs(&four, 1, &format!("{linear}.conv1d.weight"));
    assert_eq!(conv, [rows(512..1024), rows(2560..3072), rows(5120..6144)]);
    assert_eq!(shape(&four, 1, &format!("{linear}.conv1d.weight")), [2048, 1, 4]);
    // 4 groups of 4 rows; 8 value heads; 1024 of 4096 columns.
    assert_eq!(runs(&four, 1, &format!("{linear}.in_proj_ba.weight")), [(16 * 4096, 16 * 4096)]);
    for name in ["A_log", "dt_bias"] {
        assert_eq!(runs(&four, 1, &format!("{linear}.{name}")), [(16, 16)]);
    }
    assert_eq!(strided(&four, 1, &format!("{linear}.out_proj.weight")), (2048, 8192, 2048, 2048));
    assert_eq!(runs(&four, 1, &format!("{linear}.norm.weight")), [(0, 256)]);
    assert_eq!(strided(&eight, 3, &format!("{full}.o_proj.weight")), (3072, 8192, 1024, 2048));
    assert!(four.params().iter().all(|param| !param.name.starts_with("mtp.")));

    let error = plan(&model, Mesh { ep: 32, ..Mesh::tp(32) }).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("not-divisible"), Some("32 parts")));
    assert_eq!(error.expected(), Some("a divisor of 16 units: 1, 2, 4, 8, 16"));
}

/// Case 46.
#[test]
fn experts_are_balanced_taken_in_turn_or_listed() {
    let model = DeepSeek { layers: 4, ..DeepSeek::V3 }.model();
    let held = |ranks: u32, rank: u32, split: Split| {
        let mesh = Mesh { dp: ranks, ep: ranks, ..Mesh::tp(1) };
        let plan = plan_with(&model, mesh, |options| options.experts = Some(split.clone())).unwrap();
        experts(&plan, rank, "model.layers.3.mlp.experts.")
    };
    assert_eq!(held(24, 16, Split::Balanced), (176..186).collect());
    assert_eq!(held(24, 0, Split::Balanced), (0..11).collect());
    assert_eq!(held(8, 3, Split::RoundRobin), (0..32).map(|at| 8 * at + 3).collect());
    // 256 and 32 redundant ones, 9 for each of 32 ranks.
    let slots = |rank: u64| (9 * rank..9 * rank + 9).map(|slot| slot % 256..slot % 256 + 1);
    let table = Split::Table((0..32).map(|rank| slots(rank).collect()).collect());
    assert_eq!(held(32, 28, table.clone()), (252..256).chain(0..5).collect());
    assert_eq!(held(32, 0, table), (0..9).collect());
    let error = plan(&model, Mesh { dp: 24, ep: 24, ..Mesh::tp(1) }).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("not-divisible"), Some("24 parts")));
}

#[test]
fn configs_that_disagree_are_errors_with_both_numbers() {
    let broken = |model: Model, pointer: &str, value: u64| {
        let mut model = model;
        *model.config.pointer_mut(pointer).unwrap() = value.into();
        let error = plan(&model, Mesh::tp(2)).unwrap_err();
        let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
        (text(error.rule()), text(error.tensor()), text(error.found()))
    };
    for (model, pointer, value, tensor, found) in [
        (GptOss::TINY.model(), "/intermediate_size", 128, "down_proj_blocks", "256"),
        (GptOss::TINY.model(), "/num_local_experts", 4, "down_proj_blocks", "8"),
        (Llama4::TINY.model(), "/text_config/num_local_experts", 4, "experts.down_proj", "8"),
        (Qwen3Next::TINY.model(), "/linear_num_key_heads", 4, "conv1d.weight", "256"),
        (Qwen3Next::TINY.model(), "/head_dim", 32, "k_proj.weight", "32"),
    ] {
        let (rule, name, number) = broken(model, pointer, value);
        assert_eq!((rule.as_str(), number.as_str()), ("units", found), "{pointer}: {name}");
        assert!(name.ends_with(tensor), "{pointer}: {name}");
    }
    let mut model = Qwen3Next::TINY.model();
    model.config["linear_num_value_heads"] = 12.into();
    assert_eq!(plan(&model, Mesh::tp(1)).unwrap_err().rule(), Some("config"));
    // An expert that the config does not count, and one layer too many.
    let mut model = Llama::tiny(Kind::Qwen3Moe).model();
    model.config["num_experts"] = 7.into();
    let error = plan(&model, Mesh::tp(2)).unwrap_err();
    assert_eq!((error.rule(), error.expected(), error.found()), (Some("among"), Some("a number below 7"), Some("7")));
    model.config["num_experts"] = 8.into();
    model.config["num_hidden_layers"] = 1.into();
    let error = plan(&model, Mesh { pp: 2, ..Mesh::tp(1) }).unwrap_err();
    assert_eq!(error.rule(), Some("stages"));
}
