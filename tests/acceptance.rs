//! The cases that a planner must get right, with numbers worked out by hand from what engines do with released models:
//! through the command line, over headers without data. Conventions of engines that are no target are written as rules.
#![cfg(feature = "cli")]

mod support {
    pub(crate) mod acceptance;
    pub(crate) mod released;
}

use serde_json::{Value, json};
use support::acceptance::{check, dense, experts, further, fused, quantised, refusals, written};
use support::released::{Experts, Falcon, GptOss, Kind, Llama, Model, Scheme};

#[test]
fn linear_layers() {
    check(dense::linear());
}

#[test]
fn biases_that_are_added_once() {
    check(dense::biases());
}

#[test]
fn vocabularies() {
    check(dense::vocabularies());
}

#[test]
fn tied_heads_adapters_and_partitions() {
    check(dense::others());
}

#[test]
fn inputs_before_outputs() {
    check(dense::transposed());
}

#[test]
fn fused_tensors() {
    check(fused::cases());
}

#[test]
fn gated_heads_and_linear_attention() {
    check(fused::qwen3_next());
}

#[test]
fn experts_of_their_own() {
    check(experts::separate());
}

#[test]
fn flat_and_stacked_experts() {
    check(experts::flat_and_stacked());
}

#[test]
fn gpt_oss() {
    check(experts::gpt_oss_rules());
    check(experts::gpt_oss_vllm());
}

#[test]
fn which_experts_a_rank_has() {
    check(experts::placed());
}

#[test]
fn blocks_of_fp8() {
    check(quantised::fp8_blocks());
}

#[test]
fn packed_layouts() {
    check(quantised::packed());
}

#[test]
fn groups_of_heads_on_more_ranks() {
    check(further::groups());
}

#[test]
fn older_families() {
    check(further::classics());
}

#[test]
fn experts_and_what_is_beside_them() {
    check(further::experts());
    check(further::empty_parts());
}

#[test]
fn further_layouts() {
    check(further::quantised());
}

#[test]
fn targets_and_stages() {
    check(further::placed());
}

#[test]
fn refusals() {
    check(refusals::cases());
}

/// The sizes of a model that only some numbers of ranks divide, without anything else that would refuse: `units` heads.
fn of_heads(units: u64) -> Llama {
    Llama { layers: 1, heads: units, kv_heads: units, intermediate: 64 * units, ..Llama::TINY }
}

/// Section 4: the unit of vLLM's padding is 64, however many ranks there are.
#[test]
fn padded_vocabularies_divide_or_do_not() {
    let all = [1, 2, 3, 4, 5, 6, 7, 8, 12];
    for (vocab, fails) in [
        (151_936, &[3, 5, 6, 7, 12][..]),
        (201_088, &[3, 5, 6, 7, 12]),
        (262_208, &[3, 5, 6, 7, 12]),
        (32_064, &[5, 7]),
        (128_256, &[5, 7]),
    ] {
        for ranks in all {
            let written = written(Llama { vocab, ..of_heads(ranks) }.model(), "");
            let flags = format!("--target vllm --tp {ranks}");
            match fails.contains(&ranks) {
                false => drop(written.plan(&flags, 0)),
                true => {
                    let error = written.plan(&flags, 2)["error"].take();
                    let padded: u64 = vocab.next_multiple_of(64);
                    assert_eq!(error["rule"], "not-divisible", "{vocab} on {ranks}: {error}");
                    assert_eq!(error["tensor"], "lm_head.weight", "{vocab} on {ranks}");
                    assert_eq!(error["found"], format!("{ranks} parts"));
                    let expected = error["expected"].as_str().unwrap();
                    assert!(expected.starts_with(&format!("a divisor of {padded} units: 1, 2, ")), "{expected}");
                }
            }
        }
    }
}

/// Section 7: groups of 128 inputs of released sizes, and the numbers of ranks that have whole ones.
#[test]
fn groups_divide_or_do_not() {
    for (intermediate, works) in [(11_008, &[1, 2][..]), (18_944, &[1, 2, 4]), (29_568, &[1, 3, 7])] {
        for ranks in 1..=8 {
            let scheme = Scheme::Gptq { group: 128, act_order: false, bias: false };
            let model = Llama { intermediate, scheme, hidden: 128, head_dim: 128, ..of_heads(ranks) };
            let written = written(model.model(), "");
            let flags = format!("--tp {ranks}");
            match works.contains(&ranks) {
                true => drop(written.plan(&flags, 0)),
                false => {
                    let error = written.plan(&flags, 2)["error"].take();
                    assert_eq!(error["rule"], "not-divisible", "{intermediate} on {ranks}: {error}");
                    assert!(error["tensor"].as_str().unwrap().contains(".mlp."), "{error}");
                    assert_eq!(error["found"], format!("{ranks} parts"), "{error}");
                }
            }
        }
    }
}

/// Case 15: 71 heads on any number of ranks up to 16.
#[test]
fn a_prime_number_of_heads() {
    let written = written(Falcon { layers: 1, ..Falcon::FALCON_7B }.model(), "");
    for ranks in 2..=16 {
        let error = written.plan(&format!("--tp {ranks}"), 2)["error"].take();
        assert_eq!((&error["kind"], &error["rule"]), (&json!("rules"), &json!("not-divisible")), "{error}");
    }
}

/// Section 6: layers of each stage.
#[test]
fn uneven_pipelines() {
    for (layers, stages, split, expected) in [
        (80, 3, "vllm", &[27, 27, 26][..]),
        (80, 3, "hf", &[26, 26, 28]),
        (80, 3, "trt", &[27, 27, 26]),
        (61, 4, "vllm", &[15, 15, 16, 15]),
        (61, 4, "hf", &[15, 15, 15, 16]),
        (61, 4, "trt", &[16, 15, 15, 15]),
        (61, 8, "vllm", &[7, 7, 8, 8, 8, 8, 8, 7]),
        (61, 8, "hf", &[7, 7, 7, 7, 7, 7, 7, 12]),
        (61, 8, "trt", &[8, 8, 8, 8, 8, 7, 7, 7]),
    ] {
        let written = written(Llama { layers, ..Llama::TINY }.model(), "");
        let mut flags = vec![format!("--pp {stages} --pp-split {split}")];
        if split != "trt" {
            flags.push(format!("--pp {stages} --target {split}"));
        }
        for flags in flags {
            let object = written.plan(&flags, 0);
            let held = |rank: &Value, name: &str| {
                let list = rank["destinations"].as_array().unwrap().iter();
                list.filter(|dest| dest["name"].as_str().unwrap().ends_with(name)).count()
            };
            let ranks = object["ranks"].as_array().unwrap();
            let counts: Vec<usize> = ranks.iter().map(|rank| held(rank, ".input_layernorm.weight")).collect();
            assert_eq!(counts, expected, "{layers} layers, {flags}");
            for (name, first, last) in
                [("embed_tokens.weight", 1, 0), ("model.norm.weight", 0, 1), ("lm_head.weight", 0, 1)]
            {
                assert_eq!((held(&ranks[0], name), held(&ranks[expected.len() - 1], name)), (first, last), "{name}");
            }
        }
        let error = written.plan(&format!("--pp {stages} --pp-split even"), 2)["error"].take();
        assert_eq!(error["kind"], "rules", "{error}");
    }
}

/// Section 14: how many ranks have the bytes of each class.
#[test]
fn as_many_ranks_have_a_byte_as_the_rules_say() {
    let audited = |model: Model, flags: &str, rules: &'static str| {
        let object = written(model, rules).plan(&format!("{flags} --audit"), 0);
        assert_eq!(object["audit"]["passed"], true);
        object["audit"]["classes"].as_array().unwrap().clone()
    };
    let llama = Llama { layers: 1, ..Llama::LLAMA_3_1_8B };
    let shared = audited(llama.model(), "--tp 16", "");
    let experts = Some(Experts { count: 8, per_token: 2, intermediate: 128 });
    let qwen = Llama { layers: 1, experts, ..Llama::tiny(Kind::Qwen3Moe) };
    let grouped = audited(qwen.model(), "--tp 8 --ep 4", "");
    let replicas = audited(qwen.model(), "--tp 2 --dp 2 --ep 4", "");
    let slots = audited(
        Llama { layers: 1, ..Llama::LLAMA_3_1_8B }.model(),
        "--tp 4",
        r#"{ match = "**.q_proj.weight", shard = { dim = 0, unit = 1024, split = { table = [[0, 1], [1], [2], [3, 1]] } } },
           { match = "lm_head.weight", skip = true },"#,
    );
    for (classes, class, expected) in [
        (&shared, "model.layers.*.self_attn.q_proj.weight", vec![(1, 33_554_432)]),
        (&shared, "model.layers.*.self_attn.k_proj.weight", vec![(2, 8_388_608)]),
        (&shared, "model.layers.*.input_layernorm.weight", vec![(16, 8192)]),
        (&grouped, "model.layers.*.mlp.experts.*.down_proj.weight", vec![(1, 8 * 64 * 128 * 2)]),
        (&grouped, "model.layers.*.mlp.gate.weight", vec![(8, 8 * 64 * 2)]),
        // Dense layers are there for each of the replicas, experts are not.
        (&replicas, "model.layers.*.self_attn.q_proj.weight", vec![(2, 256 * 64 * 2)]),
        (&replicas, "model.layers.*.mlp.experts.*.down_proj.weight", vec![(1, 8 * 64 * 128 * 2)]),
        (&slots, "model.layers.*.self_attn.q_proj.weight", vec![(1, 25_165_824), (3, 8_388_608)]),
        (&slots, "lm_head.weight", vec![(0, 128_256 * 8192)]),
    ] {
        let found = classes.iter().find(|it| it["class"] == class).unwrap_or_else(|| panic!("no {class}"));
        let times = found["multiplicity"].as_array().unwrap().iter();
        let times: Vec<_> = times.map(|it| (it["times"].as_u64().unwrap(), it["bytes"].as_u64().unwrap())).collect();
        assert_eq!(times, expected, "{class}");
    }
}

/// Even, ceil, and ceil in blocks: the parts that ranks have of gpt-oss' 90 blocks.
#[test]
fn blocks_of_gpt_oss_on_any_ranks() {
    let model = GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model();
    for split in ["even", "ceil"] {
        let rules = match split {
            "even" => r#"{ match = "**.down_proj_blocks", shard = { dim = 2 } },"#,
            _ => r#"{ match = "**.down_proj_blocks", shard = { dim = 2, split = "ceil" } },"#,
        };
        let written = written(model.clone(), rules);
        for ranks in [1, 2, 3, 4, 5, 6, 8] {
            let flags = format!("--tp {ranks}");
            if split == "even" && [4, 8].contains(&ranks) {
                let error = written.plan(&flags, 2)["error"].take();
                assert_eq!(
                    (&error["rule"], &error["found"]),
                    (&json!("not-divisible"), &json!(format!("{ranks} parts")))
                );
                continue;
            }
            let object = written.plan(&flags, 0);
            let blocks = object["ranks"].as_array().unwrap().iter().map(|rank| {
                let mut list = rank["destinations"].as_array().unwrap().iter();
                list.find(|dest| dest["name"].as_str().unwrap().ends_with("down_proj_blocks")).unwrap()["shape"][2]
                    .as_u64()
                    .unwrap()
            });
            let blocks: Vec<u64> = blocks.collect();
            match ranks {
                4 => assert_eq!(blocks, [23, 23, 23, 21]),
                8 => assert_eq!(blocks, [12, 12, 12, 12, 12, 12, 12, 6]),
                _ => assert_eq!(blocks, vec![90 / ranks; ranks as usize]),
            }
        }
    }
}
