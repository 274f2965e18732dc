//! Plans of model families over released models and tiny ones of the same kinds: target `plain`, which keeps names and
//! layouts of the disk. Ranges are those of sharding.md section 15, worked out by hand, from the tensor's first byte.

#[path = "support/released/mod.rs"]
mod released;

use std::collections::BTreeMap;

use released::{Bloom, Dbrx, Falcon, Gemma, Gpt2, GptNeox, InternLm2, Model, Mpt, Phi3};
use serde_json::json;
use shardlift::plan::{Mesh, Plan, Rules, World};
use shardlift::{Checkpoint, Rank, Result};

fn plan(model: &Model, mesh: Mesh) -> Result<Plan> {
    let folder = tempfile::tempdir().unwrap();
    released::write(folder.path(), model).unwrap();
    let checkpoint = Checkpoint::open(folder.path())?;
    Plan::new(&checkpoint, &Rules::for_model(&checkpoint)?, &World::host(1).with_mesh(mesh))
}

/// The rule that an error of a plan for so many ranks names, what it expected, and what it found.
fn refusal(model: &Model, tp: u32) -> (String, String, String) {
    let error = plan(model, Mesh::tp(tp)).unwrap_err();
    let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
    (text(error.rule()), text(error.expected()), text(error.found()))
}

/// The bytes that a rank reads of a tensor, in the order of its destination: (first, length), neighbours as one.
fn runs(plan: &Plan, rank: u32, name: &str) -> Vec<(u64, u64)> {
    let rank = plan.rank(Rank(rank));
    let dest = rank.dests.iter().find(|dest| plan.params()[dest.param as usize].name == name).expect(name);
    let mut runs = BTreeMap::new();
    for copy in &rank.pieces[dest.pieces.start as usize..dest.pieces.end as usize] {
        let start = plan.tensor(copy.tensor).start;
        for step in 0..copy.loops.iter().map(|inner| inner.count).product() {
            let (mut left, mut src, mut dst): (u64, _, _) = (step, copy.src - start, copy.dst);
            for inner in copy.loops.iter().rev() {
                src += left % inner.count * inner.src_stride;
                dst += left % inner.count * inner.dst_stride;
                left /= inner.count;
            }
            runs.insert(dst, (src, copy.run));
        }
    }
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for run in runs.into_values() {
        match joined.last_mut() {
            Some(last) if last.0 + last.1 == run.0 => last.1 += run.1,
            _ => joined.push(run),
        }
    }
    joined
}

/// The same of a tensor whose rows have so many bytes, as rows: (first, end).
fn rows(plan: &Plan, rank: u32, name: &str, row: u64) -> Vec<(u64, u64)> {
    runs(plan, rank, name).into_iter().map(|(start, len)| (start / row, (start + len) / row)).collect()
}

fn shape(plan: &Plan, rank: u32, name: &str) -> Vec<u64> {
    let dests = &plan.rank(Rank(rank)).dests;
    let dest = dests.iter().find(|dest| plan.params()[dest.param as usize].name == name).expect(name);
    dest.shape.dims().to_vec()
}

#[test]
fn released_and_tiny_models_plan_where_heads_divide() {
    let all = [1, 2, 4, 8];
    for (name, model, legal) in [
        ("gemma-2-9b", Gemma::GEMMA_2_9B.model(), &all[..]),
        ("gemma-3-1b", Gemma::GEMMA_3_1B.model(), &[1, 2, 4]),
        ("gemma-3-4b", Gemma::GEMMA_3_4B.model(), &all),
        ("gemma-3-27b", Gemma::GEMMA_3_27B.model(), &all),
        ("phi-3-medium", Phi3::PHI_3_MEDIUM.model(), &[1, 2]),
        ("gpt2", Gpt2::GPT_2.model(), &[1, 2, 4]),
        ("gpt-neox-20b", GptNeox::GPT_NEOX_20B.model(), &all),
        ("falcon-7b", Falcon::FALCON_7B.model(), &[1]),
        ("falcon-40b", Falcon::FALCON_40B.model(), &all),
        ("mpt-7b", Mpt::MPT_7B.model(), &all),
        ("dbrx", Dbrx::DBRX.model(), &all),
        ("internlm2-7b", InternLm2::INTERNLM_2_7B.model(), &all),
        ("tiny gemma2", Gemma::TINY_2.model(), &all),
        ("tiny gemma3", Gemma::TINY_3.model(), &all),
        ("tiny gemma3 with vision", Gemma::TINY_3_VISION.model(), &all),
        ("tiny phi3", Phi3::TINY.model(), &all),
        ("tiny gpt2", Gpt2::TINY.model(), &all),
        ("tiny gpt2, later", Gpt2 { later: true, ..Gpt2::TINY }.model(), &all),
        ("tiny gpt_neox", GptNeox::TINY.model(), &all),
        ("tiny falcon, old", Falcon::TINY_OLD.model(), &all),
        ("tiny falcon, new", Falcon::TINY_NEW.model(), &[1, 2, 4]),
        ("tiny falcon, rw", Falcon::TINY_RW.model(), &all),
        ("tiny mpt", Mpt::TINY.model(), &all),
        ("tiny dbrx", Dbrx::TINY.model(), &all),
        ("tiny internlm2", InternLm2::TINY.model(), &[1, 2, 4]),
    ] {
        for ranks in all {
            match plan(&model, Mesh::tp(ranks)) {
                Ok(_) => assert!(legal.contains(&ranks), "{name}: {ranks} ranks"),
                Err(error) if legal.contains(&ranks) => panic!("{name}: {ranks} ranks: {error}"),
                Err(error) => assert_eq!(error.rule(), Some("not-divisible"), "{name}: {error}"),
            }
        }
    }
}

/// Cases 7, 9, 10 and 11.
#[test]
fn bloom_is_cut_between_heads() {
    let plan = plan(&Bloom::BLOOM_176B.model(), Mesh::tp(8)).unwrap();
    let attention = "h.69.self_attention";
    assert_eq!(runs(&plan, 2, &format!("{attention}.query_key_value.weight")), [(308_281_344, 154_140_672)]);
    assert_eq!(runs(&plan, 2, &format!("{attention}.query_key_value.bias")), [(21_504, 10_752)]);
    for rank in [0, 1] {
        assert_eq!(runs(&plan, rank, &format!("{attention}.dense.bias")), [(0, 28_672)]);
    }
    // `plain` has embeddings whole.
    assert_eq!(runs(&plan, 3, "word_embeddings.weight"), [(0, 250_880 * 14_336 * 2)]);
}

/// Cases 13, as it lies on disk, and 15.
#[test]
fn falcon_is_cut_between_groups_or_query_heads() {
    let query_key_value = "transformer.h.0.self_attention.query_key_value.weight";
    let new = plan(&Falcon::FALCON_40B.model(), Mesh::tp(4)).unwrap();
    assert_eq!(rows(&new, 3, query_key_value, 8192 * 2), [(6912, 9216)]);
    let (rule, expected, found) = refusal(&Falcon::FALCON_40B.model(), 16);
    assert_eq!((rule.as_str(), found.as_str()), ("not-divisible", "16 parts"));
    assert_eq!(expected, "a divisor of 8 units: 1, 2, 4, 8");

    for ranks in 2..=16 {
        assert_eq!(refusal(&Falcon::FALCON_7B.model(), ranks).0, "not-divisible");
    }
    // Of other numbers of ranks the MLP says so first.
    assert_eq!(refusal(&Falcon::FALCON_7B.model(), 2).1, "a divisor of 71 units: 1, 71");
    // 8 query heads of 8, one key and one value head.
    let old = plan(&Falcon::TINY_OLD.model(), Mesh::tp(4)).unwrap();
    for rank in 0..4 {
        let first = u64::from(rank) * 16;
        let queries_and_others = [(first, first + 16), (64, 80)];
        let joined = [(48, 80)];
        let expected = if rank == 3 { &joined[..] } else { &queries_and_others };
        assert_eq!(rows(&old, rank, query_key_value, 64 * 2), expected);
    }
    let rw = plan(&Falcon::TINY_RW.model(), Mesh::tp(8)).unwrap();
    assert_eq!(rows(&rw, 5, query_key_value, 64 * 2), [(5 * 24, 6 * 24)]);
    assert_eq!(runs(&rw, 5, &query_key_value.replace("weight", "bias")), [(5 * 48, 48)]);
    assert_eq!(runs(&rw, 5, "transformer.h.0.self_attention.dense.bias"), [(0, 128)]);
    // The class ties the head, and one is stored all the same.
    assert_eq!(runs(&rw, 5, "lm_head.weight"), []);
}

/// What cases 17 and 18 read, which keeps its layout here.
#[test]
fn gpt2_is_cut_along_the_other_dimensions() {
    for (model, prefix) in [(Gpt2::GPT_2.model(), ""), (Gpt2 { later: true, ..Gpt2::GPT_2 }.model(), "transformer.")] {
        let plan = plan(&model, Mesh::tp(2)).unwrap();
        let layer = format!("{prefix}h.11");
        let attention = runs(&plan, 1, &format!("{layer}.attn.c_attn.weight"));
        let blocks = |row: u64| (0..3).map(move |block| (row * 9216 + block * 3072 + 1536, 1536));
        assert_eq!(attention, (0..768).flat_map(blocks).collect::<Vec<_>>());
        assert_eq!(attention.len(), 2304);
        assert_eq!(shape(&plan, 1, &format!("{layer}.attn.c_attn.weight")), [768, 1152]);
        let bias = runs(&plan, 1, &format!("{layer}.attn.c_attn.bias"));
        assert_eq!(bias, [(1536, 1536), (4608, 1536), (7680, 1536)]);
        assert_eq!(runs(&plan, 1, &format!("{layer}.attn.c_proj.weight")), [(1_179_648, 1_179_648)]);
        assert_eq!(runs(&plan, 1, &format!("{layer}.attn.c_proj.bias")), [(0, 3072)]);
        assert_eq!(shape(&plan, 1, &format!("{layer}.mlp.c_fc.weight")), [768, 1536]);
        assert_eq!(shape(&plan, 1, &format!("{layer}.mlp.c_proj.weight")), [1536, 768]);
        let masks = [".attn.bias", ".attn.masked_bias"];
        assert!(plan.params().iter().all(|param| masks.iter().all(|mask| !param.name.ends_with(mask))));
        assert_eq!(shape(&plan, 1, "lm_head.weight"), [50_257, 768]);
    }
}

/// Cases 19, 21 and 22.
#[test]
fn fused_blocks_are_cut_one_by_one() {
    let phi = plan(&Phi3::PHI_3_MEDIUM.model(), Mesh::tp(2)).unwrap();
    let fused = "model.layers.39.self_attn.qkv_proj.weight";
    assert_eq!(rows(&phi, 1, fused, 10_240), [(2560, 5120), (5760, 6400), (7040, 7680)]);
    // Its 10 key and value heads are not for 4 ranks; the MLP does not depend on them.
    let phi = plan(&Phi3 { kv_heads: 40, ..Phi3::PHI_3_MEDIUM }.model(), Mesh::tp(4)).unwrap();
    let gate_up = "model.layers.39.mlp.gate_up_proj.weight";
    assert_eq!(rows(&phi, 2, gate_up, 10_240), [(8960, 13_440), (26_880, 31_360)]);
    assert_eq!(runs(&phi, 2, gate_up).iter().map(|run| run.1).collect::<Vec<_>>(), [45_875_200; 2]);

    let mpt = plan(&Mpt::MPT_7B.model(), Mesh::tp(2)).unwrap();
    let fused = "transformer.blocks.31.attn.Wqkv.weight";
    assert_eq!(rows(&mpt, 0, fused, 8192), [(0, 2048), (4096, 6144), (8192, 10_240)]);
}

/// Case 24.
#[test]
fn dbrx_cuts_each_of_the_experts_of_a_tensor() {
    let name = |part: &str| format!("transformer.blocks.0.ffn.experts.mlp.{part}");
    let expert = 132_120_576;
    let eight = plan(&Dbrx::DBRX.model(), Mesh::tp(8)).unwrap();
    for part in ["w1", "v1", "w2"] {
        let expected: Vec<_> = (0..16).map(|at| (at * expert + 16_515_072, 16_515_072)).collect();
        assert_eq!(runs(&eight, 1, &name(part)), expected);
        assert_eq!(shape(&eight, 1, &name(part)), [16 * 1344, 6144]);
    }
    // Whole experts, which lie one after the other; and 4 groups of 2 ranks that divide each of their experts.
    let whole = plan(&Dbrx::DBRX.model(), Mesh { ep: 8, ..Mesh::tp(8) }).unwrap();
    assert_eq!(runs(&whole, 3, &name("w2")), [(6 * expert, 2 * expert)]);
    let both = plan(&Dbrx::DBRX.model(), Mesh { ep: 4, ..Mesh::tp(8) }).unwrap();
    let expected: Vec<_> = (8..12).map(|at| (at * expert + expert / 2, expert / 2)).collect();
    assert_eq!(runs(&both, 5, &name("v1")), expected);
    assert_eq!(runs(&both, 5, "transformer.blocks.0.ffn.router.layer.weight"), [(0, 16 * 6144 * 2)]);
}

#[test]
fn interleaved_groups_and_heads_stay_together() {
    let intern = plan(&InternLm2::INTERNLM_2_7B.model(), Mesh::tp(4)).unwrap();
    // 8 groups of 4 query heads, a key and a value head, each of 128.
    assert_eq!(rows(&intern, 1, "model.layers.0.attention.wqkv.weight", 8192), [(1536, 3072)]);
    assert_eq!(shape(&intern, 1, "model.layers.0.attention.wo.weight"), [4096, 1024]);
    assert_eq!(shape(&intern, 1, "model.layers.0.feed_forward.w2.weight"), [4096, 3584]);
    assert_eq!(shape(&intern, 1, "output.weight"), [92_544, 4096]);
    assert_eq!(refusal(&InternLm2::INTERNLM_2_7B.model(), 16).1, "a divisor of 8 units: 1, 2, 4, 8");

    let neox = plan(&GptNeox::GPT_NEOX_20B.model(), Mesh::tp(4)).unwrap();
    let layer = "gpt_neox.layers.43";
    assert_eq!(rows(&neox, 1, &format!("{layer}.attention.query_key_value.weight"), 12_288), [(4608, 9216)]);
    assert_eq!(runs(&neox, 1, &format!("{layer}.attention.query_key_value.bias")), [(9216, 9216)]);
    assert_eq!(runs(&neox, 1, &format!("{layer}.mlp.dense_4h_to_h.bias")), [(0, 12_288)]);
    let skipped = ["attention.bias", "attention.rotary_emb.inv_freq"].map(|name| format!("{layer}.{name}"));
    assert!(neox.params().iter().all(|param| !skipped.contains(&param.name)));
}

#[test]
fn gemma_knows_the_defaults_of_its_class() {
    let four = plan(&Gemma::GEMMA_3_4B.model(), Mesh::tp(4)).unwrap();
    let layer = "language_model.model.layers.33";
    assert_eq!(shape(&four, 3, &format!("{layer}.self_attn.q_proj.weight")), [512, 2560]);
    assert_eq!(rows(&four, 3, &format!("{layer}.self_attn.k_proj.weight"), 5120), [(768, 1024)]);
    assert_eq!(shape(&four, 3, &format!("{layer}.self_attn.q_norm.weight")), [256]);
    let vision = "vision_tower.vision_model.encoder.layers.26.self_attn.q_proj.weight";
    assert_eq!(shape(&four, 3, vision), [1152, 1152]);
    assert_eq!(shape(&four, 3, "multi_modal_projector.mm_input_projection_weight"), [1152, 2560]);
    assert_eq!(shape(&four, 3, "language_model.lm_head.weight"), [262_208, 2560]);
    // 4 key and value heads for 8 ranks.
    let eight = plan(&Gemma::GEMMA_3_4B.model(), Mesh::tp(8)).unwrap();
    assert_eq!(rows(&eight, 5, &format!("{layer}.self_attn.v_proj.weight"), 5120), [(512, 768)]);
    let text = plan(&Gemma::GEMMA_3_1B.model(), Mesh::tp(4)).unwrap();
    assert_eq!(shape(&text, 3, "model.layers.0.self_attn.k_proj.weight"), [256, 1152]);
    assert_eq!(shape(&text, 3, "lm_head.weight"), [262_144, 1152]);
}

#[test]
fn a_config_that_disagrees_with_fused_tensors_is_an_error() {
    let with = |mut model: Model, path: &str, value: u64| {
        *model.config.pointer_mut(path).unwrap() = json!(value);
        refusal(&model, 1)
    };
    let units = |expected: &str, found: &str| ("units".to_owned(), expected.to_owned(), found.to_owned());
    // Too few heads would leave rows out, too many would find none.
    assert_eq!(with(Phi3::TINY.model(), "/num_key_value_heads", 1), units("80 units of 1", "96"));
    assert_eq!(with(Phi3::TINY.model(), "/num_key_value_heads", 4), units("128 units of 1", "96"));
    assert_eq!(with(Dbrx::TINY.model(), "/ffn_config/moe_num_experts", 4), units("128 units of 1", "256"));
    assert_eq!(with(Dbrx::TINY.model(), "/ffn_config/moe_num_experts", 1 << 40).0, "config");
    assert_eq!(with(InternLm2::TINY.model(), "/num_key_value_heads", 3).0, "config");
    assert_eq!(with(Falcon::TINY_NEW.model(), "/num_kv_heads", 8), units("8 units of 16", "96"));
}

/// Which stages hold what: layers their own, and the rest as the lists say.
#[test]
fn stages_begin_with_embeddings_and_end_with_the_head() {
    let both: &[u32] = &[0, 1];
    for (model, others) in [
        (
            Gemma::TINY_3_VISION.model(),
            vec![
                ("vision_tower.", &[0][..]),
                ("multi_modal_projector.", &[0]),
                ("language_model.model.embed_tokens.weight", both),
                ("language_model.model.norm.weight", &[1]),
                ("language_model.lm_head.weight", &[1]),
            ],
        ),
        (
            Gemma::TINY_2.model(),
            vec![("model.embed_tokens.weight", both), ("model.norm.weight", &[1]), ("lm_head.weight", &[1])],
        ),
        (
            Phi3::TINY.model(),
            vec![("model.embed_tokens.weight", &[0]), ("model.norm.weight", &[1]), ("lm_head.weight", &[1])],
        ),
        (
            Gpt2::TINY.model(),
            vec![("wte.weight", both), ("wpe.weight", &[0]), ("ln_f.", &[1]), ("lm_head.weight", &[1])],
        ),
        (
            Gpt2 { later: true, ..Gpt2::TINY }.model(),
            vec![
                ("transformer.wte.weight", both),
                ("transformer.wpe.weight", &[0]),
                ("transformer.ln_f.", &[1]),
                ("lm_head.weight", &[1]),
            ],
        ),
        (
            GptNeox::TINY.model(),
            vec![("gpt_neox.embed_in.weight", &[0]), ("gpt_neox.final_layer_norm.", &[1]), ("embed_out.weight", &[1])],
        ),
        (
            Falcon::TINY_RW.model(),
            vec![("transformer.word_embeddings.weight", both), ("transformer.ln_f.", &[1]), ("lm_head.weight", &[1])],
        ),
        (
            Mpt::TINY.model(),
            vec![("transformer.wte.weight", both), ("transformer.norm_f.weight", &[1]), ("lm_head.weight", &[1])],
        ),
        (
            Dbrx::TINY.model(),
            vec![("transformer.wte.weight", &[0]), ("transformer.norm_f.weight", &[1]), ("lm_head.weight", &[1])],
        ),
        (
            InternLm2::TINY.model(),
            vec![("model.tok_embeddings.weight", &[0]), ("model.norm.weight", &[1]), ("output.weight", &[1])],
        ),
    ] {
        let plan = plan(&model, Mesh { pp: 2, ..Mesh::tp(1) }).unwrap();
        let mut seen = vec![false; others.len()];
        for (param, name) in (0..).zip(plan.params().iter().map(|param| param.name.as_str())) {
            let stages: Vec<u32> =
                (0..2).filter(|&stage| plan.rank(Rank(stage)).dests.iter().any(|dest| dest.param == param)).collect();
            let other = others.iter().position(|(start, _)| name.starts_with(start));
            let layer = name.split('.').find_map(|segment| segment.parse::<u32>().ok());
            match (other, layer) {
                (Some(other), _) => {
                    seen[other] = true;
                    assert_eq!(stages, others[other].1, "{name}");
                }
                (None, Some(layer)) => assert_eq!(stages, [layer], "{name}"),
                (None, None) => panic!("{name} is on {stages:?}"),
            }
        }
        assert!(!seen.contains(&false), "{others:?}: {seen:?}");
    }
}
