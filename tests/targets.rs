//! Targets against numbers worked out by hand from the engines' own conventions (sharding.md sections 1 to 6).

mod support {
    pub(crate) mod released;
}

use shardlift::plan::{Mesh, ModelOptions, RankPlan, Split, StageSplit, Target};
use shardlift::{Checkpoint, Dtype, Plan, Rank, Result, Rules, World};
use support::released::{self, DeepSeek, GptOss, Kind, Llama, Model, Qwen3Next, Scheme};

struct Planned(Plan);

fn plan(model: &Model, target: Target, mesh: Mesh) -> Result<Planned> {
    plan_with(model, target, mesh, |_| {})
}

fn plan_with(model: &Model, target: Target, mesh: Mesh, change: impl FnOnce(&mut ModelOptions)) -> Result<Planned> {
    let folder = tempfile::tempdir().unwrap();
    released::write(folder.path(), model).unwrap();
    let checkpoint = Checkpoint::open(folder.path())?;
    let mut options = ModelOptions::default();
    (options.target, options.mesh) = (target, mesh);
    change(&mut options);
    let rules = Rules::for_model_with(&checkpoint, &options)?;
    Plan::new(&checkpoint, &rules, &World::host(1).with_mesh(mesh)).map(Planned)
}

impl Planned {
    fn find(&self, rank: u32, name: &str) -> Option<(&RankPlan, usize)> {
        let param = self.0.params().iter().position(|param| param.name == name)? as u32;
        let rank = self.0.rank(Rank(rank));
        rank.dests.iter().position(|dest| dest.param == param).map(|dest| (rank, dest))
    }

    fn shape(&self, rank: u32, name: &str) -> Vec<u64> {
        let (rank, dest) = self.find(rank, name).unwrap_or_else(|| panic!("no {name}"));
        rank.dests[dest].shape.dims().to_vec()
    }

    /// The source of each piece: tensor, first byte in it, and bytes of a run.
    fn pieces(&self, rank: u32, name: &str) -> Vec<(String, u64, u64)> {
        let (rank, dest) = self.find(rank, name).unwrap_or_else(|| panic!("no {name}"));
        let range = rank.dests[dest].pieces.clone();
        let pieces = &rank.pieces[range.start as usize..range.end as usize];
        let tell = |piece: &shardlift::plan::BoxCopy| {
            let tensor = self.0.tensor(piece.tensor);
            (tensor.name.clone(), piece.src - tensor.start, piece.run)
        };
        pieces.iter().map(tell).collect()
    }

    fn filled(&self, rank: u32, name: &str) -> u64 {
        let (rank, dest) = self.find(rank, name).unwrap_or_else(|| panic!("no {name}"));
        let fills = rank.dests[dest].fills.clone();
        let fills = &rank.fills[fills.start as usize..fills.end as usize];
        fills.iter().map(|fill| fill.run * fill.loops.iter().map(|(count, _)| count).product::<u64>()).sum()
    }

    fn has(&self, rank: u32, name: &str) -> bool {
        self.find(rank, name).is_some()
    }
}

const LAYER: &str = "model.layers.0";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

#[test]
fn vllm_merges_and_pads_the_llama_kind() {
    let model = Llama::LLAMA_3_1_8B.model();
    let four = plan(&model, Target::Vllm, Mesh::tp(4)).unwrap();
    let qkv = format!("{LAYER}.self_attn.qkv_proj.weight");
    assert_eq!(four.shape(1, &qkv), [(8 + 2 + 2) * 128, 4096]);
    let part = |name: &str, row: u64, rows: u64| (format!("{LAYER}.{name}.weight"), row * 8192, rows * 8192);
    assert_eq!(
        four.pieces(1, &qkv),
        [part("self_attn.q_proj", 1024, 1024), part("self_attn.k_proj", 256, 256), part("self_attn.v_proj", 256, 256)]
    );
    let gate_up = format!("{LAYER}.mlp.gate_up_proj.weight");
    assert_eq!(four.shape(3, &gate_up), [2 * 3584, 4096]);
    assert_eq!(four.pieces(3, &gate_up), [part("mlp.gate_proj", 10752, 3584), part("mlp.up_proj", 10752, 3584)]);
    assert_eq!(four.shape(3, &format!("{LAYER}.mlp.down_proj.weight")), [4096, 3584]);
    assert!(!four.has(0, &format!("{LAYER}.self_attn.q_proj.weight")));
    // 128256 rows are 2004 units of 64.
    assert_eq!(four.shape(2, "model.embed_tokens.weight"), [32064, 4096]);
    assert_eq!(four.filled(3, "lm_head.weight"), 0);
    // 16 ranks share 8 key-value heads.
    let sixteen = plan(&model, Target::Vllm, Mesh::tp(16)).unwrap();
    assert_eq!(sixteen.shape(5, &qkv), [(2 + 1 + 1) * 128, 4096]);
    assert_eq!(sixteen.pieces(5, &qkv)[1], part("self_attn.k_proj", 256, 128));
    for refused in [3, 5, 12] {
        assert_eq!(plan(&model, Target::Vllm, Mesh::tp(refused)).err().unwrap().rule(), Some("not-divisible"));
    }
}

#[test]
fn vllm_fills_the_padding_with_zeros_and_merges_biases() {
    let model = Llama { vocab: 150, ..Llama::tiny(Kind::Qwen2) }.model();
    let two = plan(&model, Target::Vllm, Mesh::tp(2)).unwrap();
    let hidden = model.tensor("model.embed_tokens.weight").shape[1];
    // 192 rows on 2 ranks: 96, and 54 with 42 of zeros.
    assert_eq!(two.shape(1, "model.embed_tokens.weight"), [96, hidden]);
    assert_eq!(two.pieces(1, "model.embed_tokens.weight")[0].1, 96 * hidden * 2);
    assert_eq!(
        (two.filled(0, "model.embed_tokens.weight"), two.filled(1, "model.embed_tokens.weight")),
        (0, 42 * hidden * 2)
    );
    assert_eq!(two.pieces(1, &format!("{LAYER}.self_attn.qkv_proj.bias")).len(), 3);
}

#[test]
fn vllm_stacks_experts() {
    let model = Llama::QWEN_3_30B_A3B.model();
    let mesh = Mesh { ep: 8, ..Mesh::tp(8) };
    let groups = plan(&model, Target::Vllm, mesh).unwrap();
    let (w13, w2) = (
        format!("{LAYER}.mlp.experts.routed_experts.w13_weight"),
        format!("{LAYER}.mlp.experts.routed_experts.w2_weight"),
    );
    // Case 31 of sharding.md section 15.
    assert_eq!(groups.shape(3, &w13), [16, 1536, 2048]);
    let pieces = groups.pieces(3, &w13);
    assert_eq!((pieces.len(), pieces[0].2), (32, 3_145_728));
    assert_eq!(pieces[0].0, format!("{LAYER}.mlp.experts.48.gate_proj.weight"));
    assert_eq!(pieces[31].0, format!("{LAYER}.mlp.experts.63.up_proj.weight"));
    assert_eq!(groups.shape(3, &w2), [16, 2048, 768]);
    let inside = plan(&model, Target::Vllm, Mesh::tp(8)).unwrap();
    assert_eq!((inside.shape(7, &w13), inside.shape(7, &w2)), (vec![128, 192, 2048], vec![128, 2048, 96]));
    // Experts that do not divide evenly are balanced.
    let six = plan(&model, Target::Vllm, Mesh { dp: 3, ep: 6, ..Mesh::tp(2) }).unwrap();
    let counts: Vec<u64> = (0..6).map(|rank| six.shape(rank, &w13)[0]).collect();
    assert_eq!(counts, [22, 22, 21, 21, 21, 21]);
    let robin = |options: &mut ModelOptions| options.experts = Some(Split::RoundRobin);
    let robin = plan_with(&model, Target::Vllm, mesh, robin).unwrap();
    assert_eq!(robin.pieces(3, &w2)[1].0, format!("{LAYER}.mlp.experts.11.down_proj.weight"));
}

/// What its methods of quantised experts make (`create_weights`) of 8 experts of 128 on 2 ranks, for a hidden size of 64.
#[test]
fn vllm_stacks_quantised_experts_as_it_makes_them() {
    let gptq = |act_order| Scheme::Gptq { group: 16, act_order, bias: act_order };
    let whole: Shapes<'_> = &[("w13_weight", &[8, 128, 64]), ("w2_weight", &[8, 64, 64])];
    let expected: [(Scheme, &[Shapes<'_>]); 10] = [
        (Scheme::None, &[whole]),
        (
            gptq(false),
            &[
                &[("w13_g_idx", &[8, 64]), ("w13_qweight", &[8, 8, 128]), ("w13_qzeros", &[8, 4, 16])],
                &[("w13_scales", &[8, 4, 128]), ("w2_g_idx", &[8, 64]), ("w2_qweight", &[8, 8, 64])],
                &[("w2_qzeros", &[8, 4, 8]), ("w2_scales", &[8, 4, 64])],
            ],
        ),
        (
            gptq(true),
            &[
                &[("w13_bias", &[8, 128]), ("w13_g_idx", &[8, 64]), ("w13_qweight", &[8, 8, 128])],
                &[("w13_qzeros", &[8, 4, 16]), ("w13_scales", &[8, 4, 128]), ("w2_bias", &[8, 64])],
                &[("w2_g_idx", &[8, 64]), ("w2_qweight", &[8, 8, 64]), ("w2_qzeros", &[8, 8, 8])],
                &[("w2_scales", &[8, 8, 64])],
            ],
        ),
        (
            Scheme::Awq { group: 16 },
            &[
                &[("w13_qweight", &[8, 64, 16]), ("w13_qzeros", &[8, 4, 16]), ("w13_scales", &[8, 4, 128])],
                &[("w2_qweight", &[8, 64, 8]), ("w2_qzeros", &[8, 4, 8]), ("w2_scales", &[8, 4, 64])],
            ],
        ),
        (
            Scheme::Fp8Tensor,
            &[
                whole,
                &[("w13_input_scale", &[8]), ("w13_weight_scale", &[8, 2])],
                &[("w2_input_scale", &[8]), ("w2_weight_scale", &[8])],
            ],
        ),
        (Scheme::Fp8Channel, &[whole, &[("w13_weight_scale", &[8, 128, 1]), ("w2_weight_scale", &[8, 64, 1])]]),
        (
            Scheme::Fp8Block { size: 16 },
            &[whole, &[("w13_weight_scale_inv", &[8, 8, 4]), ("w2_weight_scale_inv", &[8, 4, 4])]],
        ),
        (
            Scheme::Nvfp4 { kv_scales: true },
            &[
                &[("w13_input_scale", &[8, 2]), ("w13_weight", &[8, 128, 32]), ("w13_weight_scale", &[8, 128, 4])],
                &[("w13_weight_scale_2", &[8, 2]), ("w2_input_scale", &[8]), ("w2_weight", &[8, 64, 32])],
                &[("w2_weight_scale", &[8, 64, 4]), ("w2_weight_scale_2", &[8])],
            ],
        ),
        (
            Scheme::Nvfp4Packed,
            &[
                &[("w13_input_global_scale", &[8, 2]), ("w13_weight_global_scale", &[8, 2])],
                &[("w13_weight_packed", &[8, 128, 32]), ("w13_weight_scale", &[8, 128, 4])],
                &[("w2_input_global_scale", &[8]), ("w2_weight_global_scale", &[8])],
                &[("w2_weight_packed", &[8, 64, 32]), ("w2_weight_scale", &[8, 64, 4])],
            ],
        ),
        (Scheme::Mxfp8, &[whole, &[("w13_weight_scale", &[8, 128, 2]), ("w2_weight_scale", &[8, 64, 2])]]),
    ];
    for (scheme, expected) in expected {
        let model = Llama { scheme, ..Llama::tiny(Kind::Qwen3Moe) }.model();
        // Scales of one element are stored with a dimension or without one.
        for dims in [&[][..], &[1]] {
            let two = plan(&with_scalars(model.clone(), dims), Target::Vllm, Mesh::tp(2)).unwrap();
            let mut expected: Vec<_> = expected.iter().copied().flatten().copied().collect();
            expected.sort_unstable();
            let found = routed(&two, 1);
            let found: Vec<_> = found.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
            assert_eq!(found, expected, "{scheme:?} {dims:?}");
        }
    }
}

#[test]
fn vllm_has_one_input_scale_of_gate_and_up() {
    let model = Llama { scheme: Scheme::Fp8Tensor, ..Llama::tiny(Kind::Mixtral) }.model();
    let experts = format!("{LAYER}.block_sparse_moe.experts");
    for dims in [&[][..], &[1]] {
        let two = plan(&with_scalars(model.clone(), dims), Target::Vllm, Mesh { ep: 2, ..Mesh::tp(2) }).unwrap();
        // Both are written to the place, and `w3` last; engines want them to be equal.
        for (stack, part) in [("w13_input_scale", "w3"), ("w2_input_scale", "w2")] {
            let expected: Vec<_> = (4..8).map(|at| (format!("{experts}.{at}.{part}.input_scale"), 0, 4)).collect();
            assert_eq!(two.pieces(1, &format!("{experts}.routed_experts.{stack}")), expected, "{dims:?}");
        }
        let both = (4..8).flat_map(|at| ["w1", "w3"].map(|part| (format!("{experts}.{at}.{part}.weight_scale"), 0, 4)));
        assert_eq!(
            two.pieces(1, &format!("{experts}.routed_experts.w13_weight_scale")),
            both.collect::<Vec<_>>(),
            "{dims:?}"
        );
    }
}

#[test]
fn vllm_turns_packed_experts_round_which_is_refused() {
    for symmetric in [false, true] {
        for kind in [Kind::Mixtral, Kind::Qwen3Moe] {
            let mut model = Llama { scheme: Scheme::Packed { group: 16, symmetric }, ..Llama::tiny(kind) }.model();
            let error = plan(&model, Target::Vllm, Mesh::tp(2)).err().unwrap();
            assert_eq!(error.rule(), Some("target"), "{error}");
            assert!(error.tensor().unwrap().ends_with(".weight_packed"), "{error}");
            assert!(error.expected().unwrap().contains("target plain"), "{error}");
            plan(&model, Target::Plain, Mesh::tp(2)).unwrap();
            // Where activations are FP8 they stay as they are stored.
            let group = &mut model.config["quantization_config"]["config_groups"]["group_0"];
            group["input_activations"] = serde_json::json!({ "num_bits": 8, "type": "float", "dynamic": true });
            let two = plan(&model, Target::Vllm, Mesh::tp(2)).unwrap();
            let packed = routed(&two, 1).into_iter().filter(|(name, _)| name.ends_with("_packed"));
            let packed: Vec<_> = packed.map(|(_, shape)| shape).collect();
            assert_eq!(packed, [[8, 128, 8], [8, 64, 8]]);
        }
    }
    let dense = Llama { scheme: Scheme::Packed { group: 16, symmetric: true }, ..Llama::TINY }.model();
    plan(&dense, Target::Vllm, Mesh::tp(2)).unwrap();
}

/// Names below the routed experts of a layer, and shapes.
type Shapes<'a> = &'a [(&'a str, &'a [u64])];

/// The stacks of a layer's routed experts that a rank has.
fn routed(planned: &Planned, rank: u32) -> Vec<(String, Vec<u64>)> {
    let names = planned.0.params().iter().map(|param| param.name.as_str()).filter(|name| name.starts_with(LAYER));
    let routed = names.filter_map(|name| Some((name, name.split_once(".routed_experts.")?.1.to_owned())));
    let mut routed: Vec<_> = routed.map(|(name, below)| (below, planned.shape(rank, name))).collect();
    routed.sort_unstable();
    routed
}

/// The model, with these dimensions of all that is one number.
fn with_scalars(mut model: Model, dims: &[u64]) -> Model {
    for tensor in model.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("scale") && tensor.elements() == 1) {
        tensor.shape = dims.to_vec();
    }
    model
}

#[test]
fn vllm_merges_what_deepseek_projects_down() {
    let model = DeepSeek::V3.model();
    let eight = plan(&model, Target::Vllm, Mesh { ep: 8, ..Mesh::tp(8) }).unwrap();
    // Case 27.
    let fused = format!("{LAYER}.self_attn.fused_qkv_a_proj.weight");
    assert_eq!(eight.shape(5, &fused), [2112, 7168]);
    assert_eq!(eight.shape(5, &format!("{fused}_scale_inv")), [17, 56]);
    // Case 26.
    let kv_b = format!("{LAYER}.self_attn.kv_b_proj.weight");
    assert_eq!(eight.pieces(4, &kv_b), [(kv_b.clone(), 16384 * 512, 4096 * 512)]);
    let scale = format!("{kv_b}_scale_inv");
    assert_eq!(eight.pieces(4, &scale), [(scale.clone(), 2048, 512)]);
    let experts = "model.layers.3.mlp.experts.routed_experts";
    assert_eq!(eight.shape(5, &format!("{experts}.w13_weight")), [32, 4096, 7168]);
    assert_eq!(eight.shape(5, &format!("{experts}.w13_weight_scale_inv")), [32, 32, 56]);
    assert_eq!(eight.shape(5, &format!("{experts}.w2_weight_scale_inv")), [32, 56, 16]);
    assert_eq!(eight.shape(5, "model.layers.3.mlp.shared_experts.gate_up_proj.weight"), [512, 7168]);
    assert!(!eight.has(0, "model.layers.61.self_attn.o_proj.weight"));
    // 64 rows of a block of 128.
    let wide = Mesh::tp(32);
    let error = plan(&DeepSeek { dense_layers: 0, ..DeepSeek::V3 }.model(), Target::Vllm, wide).err().unwrap();
    assert_eq!(
        (error.rule(), error.expected()),
        (Some("not-divisible"), Some("a divisor of 16 units: 1, 2, 4, 8, 16"))
    );
}

#[test]
fn vllm_cuts_gpt_oss_between_blocks() {
    let model = GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model();
    let four = plan(&model, Target::Vllm, Mesh::tp(4)).unwrap();
    let (experts, disk) = (format!("{LAYER}.mlp.experts.routed_experts"), format!("{LAYER}.mlp.experts"));
    // Case 34: 90 blocks are 23, 23, 23 and 21.
    let blocks = |rank| four.shape(rank, &format!("{experts}.w2_weight"));
    assert_eq!([0, 1, 3].map(blocks), [368, 368, 336].map(|bytes| vec![32, 2880, bytes]));
    assert_eq!(four.pieces(1, &format!("{experts}.w2_weight")), [(format!("{disk}.down_proj_blocks"), 368, 368)]);
    assert_eq!(four.pieces(1, &format!("{experts}.w2_weight_scale")), [(format!("{disk}.down_proj_scales"), 23, 23)]);
    assert_eq!(four.shape(3, &format!("{experts}.w13_weight")), [32, 2 * 32 * 21, 1440]);
    assert_eq!(four.shape(0, &format!("{experts}.w13_bias")), [32, 2 * 32 * 23]);
    // Case 35.
    let bias = format!("{experts}.w2_bias");
    assert_eq!((four.filled(0, &bias), four.filled(2, &bias)), (0, 32 * 2880 * 2));
    let eight = plan(&model, Target::Vllm, Mesh::tp(8)).unwrap();
    assert_eq!(eight.pieces(7, &format!("{LAYER}.attn.sinks")), [(format!("{LAYER}.self_attn.sinks"), 112, 16)]);
    assert_eq!(eight.shape(7, &format!("{experts}.w2_weight")), [32, 2880, 6 * 16]);
    assert_eq!(eight.shape(7, &format!("{LAYER}.attn.qkv_proj.bias")), [(8 + 1 + 1) * 64]);
    assert_eq!(eight.shape(7, "model.embedding.weight"), [201_088 / 8, 2880]);
    let groups = plan(&model, Target::Vllm, Mesh { ep: 8, ..Mesh::tp(8) }).unwrap();
    assert_eq!(groups.pieces(3, &format!("{experts}.w2_weight"))[0].1, 12 * 2880 * 90 * 16);
    let dense = GptOss { mxfp4: false, layers: 1, ..GptOss::GPT_OSS_20B }.model();
    let dense = plan(&dense, Target::Vllm, Mesh::tp(4)).unwrap();
    assert_eq!(dense.shape(1, &format!("{experts}.w13_weight")), [32, 1440, 2880]);
    assert_eq!(dense.shape(1, &format!("{experts}.w2_weight")), [32, 2880, 720]);
    // transformers divides nothing but its head.
    let hf = plan(&model, Target::Hf, Mesh::tp(4)).unwrap();
    assert_eq!(hf.shape(1, &format!("{disk}.down_proj_blocks")), [32, 2880, 90, 16]);
    assert_eq!(hf.shape(1, "lm_head.weight"), [201_088 / 4, 2880]);
    let rs = plan(&model, Target::MistralRs, Mesh::tp(4)).unwrap();
    assert_eq!(rs.shape(1, &format!("{disk}.down_proj_blocks")), [32, 2880, 90, 16]);
    assert_eq!(rs.shape(1, &format!("{LAYER}.self_attn.k_proj.bias")), [128]);
}

#[test]
fn vllm_keeps_a_scale_for_each_part() {
    let model = Llama { scheme: Scheme::Fp8Tensor, ..Llama::TINY }.model();
    let two = plan(&model, Target::Vllm, Mesh::tp(2)).unwrap();
    assert_eq!(two.shape(1, &format!("{LAYER}.self_attn.qkv_proj.weight_scale")), [3]);
    assert_eq!(two.shape(1, &format!("{LAYER}.mlp.gate_up_proj.weight_scale")), [2]);
    for scheme in released::schemes(16) {
        let model = Llama { scheme, ..Llama::TINY }.model();
        if scheme != Scheme::Nf4 {
            plan(&model, Target::Vllm, Mesh::tp(2)).unwrap_or_else(|error| panic!("{scheme:?}: {error}"));
        }
    }
}

#[test]
fn stages_are_those_of_the_target() {
    let model = Llama { layers: 5, tied: true, ..Llama::TINY }.model();
    let mesh = Mesh { pp: 2, ..Mesh::tp(1) };
    for (target, split) in [(Target::Vllm, [3, 2]), (Target::Hf, [2, 3])] {
        let plan = plan(&model, target, mesh).unwrap();
        for (rank, layers) in (0..).zip(split) {
            let held = (0..5).filter(|layer| plan.has(rank, &format!("model.layers.{layer}.input_layernorm.weight")));
            assert_eq!(held.count(), layers, "{target}");
        }
        assert!(plan.has(0, "model.embed_tokens.weight") && plan.has(1, "model.embed_tokens.weight"));
        assert!(!plan.has(0, "lm_head.weight") && plan.has(1, "lm_head.weight"));
        assert!(!plan.has(0, "model.norm.weight") && plan.has(1, "model.norm.weight"));
    }
    let counted = |options: &mut ModelOptions| options.stages = Some(StageSplit::Counts(vec![1, 4]));
    assert!(plan_with(&model, Target::Vllm, mesh, counted).unwrap().has(1, "model.layers.1.input_layernorm.weight"));
}

#[test]
fn hf_cuts_as_torch_chunks() {
    let model = Llama { intermediate: 130, kv_heads: 4, ..Llama::TINY }.model();
    let four = plan(&model, Target::Hf, Mesh::tp(4)).unwrap();
    let hidden = model.tensor("model.norm.weight").shape[0];
    let sizes = |name: &str, dim: usize| -> Vec<u64> {
        (0..4).map(|rank| four.shape(rank, &format!("{LAYER}.{name}.weight"))[dim]).collect()
    };
    assert_eq!(sizes("mlp.gate_proj", 0), [33, 33, 33, 31]);
    assert_eq!(sizes("mlp.down_proj", 1), [33, 33, 33, 31]);
    assert_eq!(four.shape(2, "model.embed_tokens.weight"), model.tensor("model.embed_tokens.weight").shape[..]);
    assert_eq!(four.shape(2, "lm_head.weight"), [model.tensor("lm_head.weight").shape[0].div_ceil(4), hidden]);
    // Key-value heads are not shared.
    assert_eq!(plan(&model, Target::Hf, Mesh::tp(16)).err().unwrap().rule(), Some("not-divisible"));
    let experts = plan(&Llama::QWEN_3_30B_A3B.model(), Target::Hf, Mesh::tp(4)).unwrap();
    assert_eq!(experts.shape(3, &format!("{LAYER}.mlp.experts.gate_up_proj")), [128, 384, 2048]);
    let groups = plan(&Llama::QWEN_3_30B_A3B.model(), Target::Hf, Mesh { ep: 4, ..Mesh::tp(4) }).unwrap();
    assert_eq!(groups.shape(3, &format!("{LAYER}.mlp.experts.down_proj")), [32, 2048, 768]);
    let deepseek = plan(&DeepSeek::V3.model(), Target::Hf, Mesh::tp(8)).unwrap();
    assert_eq!(deepseek.shape(1, &format!("{LAYER}.self_attn.o_proj.weight")), [7168, 16384]);
    assert_eq!(deepseek.shape(1, "model.layers.3.mlp.experts.gate_up_proj_scale_inv"), [256, 4, 56]);
    let mixtral = plan(&Llama::tiny(Kind::Mixtral).model(), Target::Hf, Mesh::tp(2)).unwrap();
    assert!(mixtral.has(1, &format!("{LAYER}.mlp.gate.weight")));
}

/// transformers 5 ties nothing that is stored with other values, and equal ones are the same tied or not.
#[test]
fn hf_has_a_stored_head_whatever_is_tied() {
    let mut model = Llama::TINY.model();
    model.config["tie_word_embeddings"] = true.into();
    let alias = |planned: &Planned| {
        let params = planned.0.params();
        params.iter().find(|param| param.name == HEAD).unwrap().alias_of.map(|of| params[of as usize].name.clone())
    };
    let hf = plan(&model, Target::Hf, Mesh::tp(2)).unwrap();
    assert_eq!(alias(&hf), None);
    assert_eq!(hf.shape(1, HEAD), [80, 64]);
    assert_eq!(hf.pieces(1, HEAD), [(HEAD.to_owned(), 80 * 64 * 2, 80 * 64 * 2)]);
    assert_eq!(hf.shape(1, EMBEDDING), [160, 64]);
    let stages = plan(&model, Target::Hf, Mesh { pp: 2, ..Mesh::tp(1) }).unwrap();
    assert_eq!(
        [0, 1].map(|rank| (stages.has(rank, EMBEDDING), stages.has(rank, HEAD))),
        [(true, false), (false, true)]
    );
    // The other engines leave it out, and nobody has one that is not there.
    for target in [Target::Plain, Target::Vllm, Target::MistralRs] {
        assert_eq!(alias(&plan(&model, target, Mesh::tp(2)).unwrap()).as_deref(), Some(EMBEDDING), "{target}");
    }
    let tied = Llama { tied: true, ..Llama::TINY }.model();
    assert_eq!(alias(&plan(&tied, Target::Hf, Mesh::tp(2)).unwrap()).as_deref(), Some(EMBEDDING));
}

#[test]
fn mistralrs_has_one_axis() {
    let eight = plan(&Llama::QWEN_3_30B_A3B.model(), Target::MistralRs, Mesh::tp(8)).unwrap();
    assert_eq!(eight.shape(7, &format!("{LAYER}.self_attn.k_proj.weight")), [128, 2048]);
    assert_eq!(eight.shape(7, &format!("{LAYER}.mlp.experts.gate_up_proj")), [128, 192, 2048]);
    assert_eq!(eight.shape(7, "lm_head.weight"), [151_936, 2048]);
    let quantised = plan(&DeepSeek::V3.model(), Target::MistralRs, Mesh::tp(8)).unwrap();
    assert_eq!(quantised.shape(7, "model.layers.3.mlp.experts.5.gate_proj.weight"), [2048, 7168]);
    for mesh in [Mesh { pp: 2, ..Mesh::tp(2) }, Mesh { ep: 2, ..Mesh::tp(2) }] {
        assert_eq!(plan(&Llama::TINY.model(), Target::MistralRs, mesh).err().unwrap().rule(), Some("target"));
    }
}

#[test]
fn every_target_plans_every_tiny_model_that_it_knows() {
    for target in [Target::Vllm, Target::Hf, Target::MistralRs] {
        for kind in [Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3, Kind::Mixtral, Kind::Qwen3Moe] {
            for tp in [1, 2] {
                let planned = plan(&Llama::tiny(kind).model(), target, Mesh::tp(tp));
                planned.unwrap_or_else(|error| panic!("{target} {kind:?} tp {tp}: {error}"));
            }
        }
        for model in [DeepSeek::TINY_V2.model(), DeepSeek::TINY_V3.model()] {
            plan(&model, target, Mesh::tp(2)).unwrap_or_else(|error| panic!("{target}: {error}"));
        }
        let error = plan(&released::Bloom::TINY.model(), target, Mesh::tp(2)).err().unwrap();
        assert_eq!(error.rule(), Some("target"));
        assert!(error.expected().unwrap().contains("deepseek_v3"), "{error}");
    }
}

/// What the layer's attention is named, whatever the family.
fn attention(model: &Model) -> &str {
    let names = model.tensors.iter().map(|tensor| tensor.name.as_str());
    let modules = [".self_attn.", ".self_attention.", ".attn.", ".attention."];
    let mut found =
        names.filter_map(|name| modules.iter().find_map(|module| Some(&name[..name.find(module)? + module.len() - 1])));
    found.find(|name| !name.contains("vision")).unwrap()
}

#[test]
fn tensors_beside_the_model_are_known_in_every_family() {
    let stages = Mesh { pp: 2, ..Mesh::tp(1) };
    for (name, mut model) in released::tiny() {
        // The same scales under other names.
        model
            .tensors
            .retain(|tensor| !tensor.name.ends_with("_proj.k_scale") && !tensor.name.ends_with("_proj.v_scale"));
        let scale = |of: &str| format!("{}.{of}_scale", attention(&model));
        let heads = ["score.weight", "classifier.bias", "qa_outputs.weight", "v_head.summary.weight"];
        let rotations = ["inv_freq", "cos_cached", "sin_cached"];
        let rotations = rotations.map(|what| format!("{}.rotary_emb.{what}", attention(&model)));
        let scales = [scale("k"), scale("v"), scale("q"), scale("attn.prob")];
        let like = model.tensors[0].clone();
        let beside = heads.iter().copied().chain(scales.iter().chain(&rotations).map(String::as_str));
        let beside: Vec<_> = beside.filter(|name| model.tensors.iter().all(|tensor| tensor.name != **name)).collect();
        for name in beside {
            let mut tensor = like.clone();
            (tensor.name, tensor.dtype, tensor.shape) = (name.to_owned(), Dtype::F32, vec![1]);
            model.tensors.push(tensor);
        }
        for target in [Target::Plain, Target::Vllm, Target::Hf, Target::MistralRs] {
            let mesh = if target == Target::MistralRs { Mesh::tp(1) } else { stages };
            let planned = match plan(&model, target, mesh) {
                Err(error) if target != Target::Plain && error.rule() == Some("target") => continue,
                // Blocks that are larger than what they are merged with.
                Err(_) if target == Target::Vllm && name == "Nf4" => continue,
                planned => planned.unwrap_or_else(|error| panic!("{target} {name}: {error}")),
            };
            let on = |name: &str| (0..mesh.size()).filter(|&rank| planned.has(rank, name)).collect::<Vec<_>>();
            for head in heads {
                assert_eq!(on(head), [mesh.size() - 1], "{target} {name} {head}");
            }
            for scale in &scales {
                let (module, of) = scale.rsplit_once('.').unwrap();
                let module = module.trim_end_matches(".attn");
                let module = match (target, name.as_str()) {
                    (Target::Vllm, "deepseek_v2" | "deepseek_v3") => format!("{module}.mla_attn.mla_attn"),
                    (Target::Vllm, name) if name.starts_with("gpt_oss") => module.replace("self_attn", "attn.attn"),
                    (Target::Vllm, _) => format!("{module}.attn"),
                    _ => scale.rsplit_once('.').unwrap().0.to_owned(),
                };
                assert_eq!(on(&format!("{module}.{of}")).len(), 1, "{target} {name} {module}.{of}");
            }
            assert!(planned.0.params().iter().all(|param| !param.name.contains("rotary_emb")), "{target} {name}");
        }
    }
}

/// Names of the parameters that are of another type where the model is cast.
fn cast(model: &Model, target: Target, to: Dtype) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    released::write(folder.path(), model).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut options = ModelOptions::default();
    options.target = target;
    let rules = Rules::for_model_with(&checkpoint, &options).unwrap();
    let plan = |rules: &Rules| Plan::new(&checkpoint, rules, &World::host(1)).unwrap_or_else(|error| panic!("{error}"));
    let (stored, cast) = (plan(&rules), plan(&rules.casting(to)));
    let changed = stored.params().iter().zip(cast.params()).filter(|(stored, cast)| stored.dtype != cast.dtype);
    changed.map(|(_, cast)| cast.name.clone()).collect()
}

#[test]
fn what_is_stored_beside_a_weight_is_not_cast() {
    let gptq = Scheme::Gptq { group: 16, act_order: false, bias: true };
    let schemes = [gptq, Scheme::Fp8Tensor, Scheme::Fp8Channel, Scheme::Fp8Block { size: 32 }, Scheme::Nf4];
    let schemes = schemes.into_iter().chain([Scheme::Nvfp4 { kv_scales: true }, Scheme::Awq { group: 16 }]);
    for scheme in schemes {
        let model = Llama { scheme, ..Llama::TINY }.model();
        for to in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            // Nested blocks of NF4 are larger than these projections: nothing can follow them in a merged one.
            let targets = [Target::Plain, Target::Vllm].into_iter().take(if scheme == Scheme::Nf4 { 1 } else { 2 });
            for target in targets {
                for name in cast(&model, target, to) {
                    let dense = ["norm.weight", "embed_tokens.weight", "lm_head.weight", ".bias"];
                    assert!(dense.iter().any(|end| name.ends_with(end)), "{scheme:?} {to} {name}");
                }
            }
        }
        assert!(cast(&model, Target::Plain, Dtype::F32).iter().any(|name| name == "model.norm.weight"));
    }
    // Biases, and a bfloat16 weight beside scales of the cache.
    let biases = cast(&Llama { scheme: gptq, ..Llama::TINY }.model(), Target::Plain, Dtype::F32);
    assert!(biases.iter().any(|name| name.ends_with("q_proj.bias")));
    let mut cached = Llama::TINY.model();
    for scale in ["k_proj.k_scale", "v_scale"] {
        let mut tensor = cached.tensors[0].clone();
        (tensor.name, tensor.dtype, tensor.shape) = (format!("{LAYER}.self_attn.{scale}"), Dtype::F32, vec![]);
        cached.tensors.push(tensor);
    }
    let of_layer = |names: Vec<String>| -> Vec<String> {
        names.into_iter().filter(|name| name.starts_with("model.layers.0.self_attn.k_")).collect()
    };
    assert_eq!(of_layer(cast(&cached, Target::Plain, Dtype::F16)), [format!("{LAYER}.self_attn.k_proj.weight")]);
    for target in [Target::Plain, Target::Vllm] {
        assert!(cast(&cached, target, Dtype::F16).iter().all(|name| !name.ends_with("_scale")), "{target}");
    }
    // What engines compute with in float32.
    for (model, kept) in [
        (DeepSeek::TINY_V3.model(), &["e_score_correction_bias"][..]),
        (Qwen3Next::TINY.model(), &["A_log", "dt_bias"]),
    ] {
        let names = [Dtype::Bf16, Dtype::F32].map(|to| cast(&model, Target::Plain, to)).concat();
        assert!(names.iter().any(|name| name.ends_with("norm.weight")));
        assert!(names.iter().all(|name| kept.iter().all(|kept| !name.ends_with(kept))), "{names:?}");
    }
}

#[test]
fn filters_that_name_only_parts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    released::write(folder.path(), &Llama::TINY.model()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut options = ModelOptions::default();
    options.target = Target::Vllm;
    let rules = Rules::for_model_with(&checkpoint, &options).unwrap();
    let plan = |rules: &Rules| Plan::new(&checkpoint, rules, &World::host(1));
    let glob = "**.k_proj.weight";
    for rules in [rules.clone().keeping(glob), rules.clone().skipping(glob)] {
        let error = plan(&rules).unwrap_err();
        assert_eq!((error.rule(), error.tensor()), (Some("filter"), Some("model.layers.0.self_attn.k_proj.weight")));
        assert!(error.expected().unwrap().contains("model.layers.0.self_attn.qkv_proj.weight"), "{error}");
    }
    assert_eq!(plan(&rules.clone().keeping("**.qkv_proj.weight")).unwrap().params().len(), 2);
    assert_eq!(plan(&rules.keeping("**.{k,o}_proj.weight")).unwrap().params().len(), 2);
}
