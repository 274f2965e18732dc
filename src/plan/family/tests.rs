//! Families over synthetic headers.

use serde_json::{Value, json};

use crate::dtype::Dtype;
use crate::error::ErrorKind;
use crate::extent::Rank;
use crate::plan::tests::checkpoint;
use crate::plan::{Mesh, ModelOptions, Plan, Rules, Split, Target, World};

type Named<'a> = (&'a str, &'a [u64]);

const LLAMA: &[Named] = &[
    ("model.embed_tokens.weight", &[100, 64]),
    ("model.layers.0.input_layernorm.weight", &[64]),
    ("model.layers.0.mlp.down_proj.weight", &[64, 96]),
    ("model.layers.0.mlp.gate_proj.weight", &[96, 64]),
    ("model.layers.0.mlp.up_proj.weight", &[96, 64]),
    ("model.layers.0.post_attention_layernorm.weight", &[64]),
    ("model.layers.0.self_attn.k_proj.bias", &[16]),
    ("model.layers.0.self_attn.k_proj.weight", &[16, 64]),
    ("model.layers.0.self_attn.o_proj.weight", &[64, 64]),
    ("model.layers.0.self_attn.q_proj.weight", &[64, 64]),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", &[4]),
    ("model.layers.0.self_attn.v_proj.weight", &[16, 64]),
    ("model.norm.weight", &[64]),
];

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 96, "tie_word_embeddings": true
    })
}

fn plan(tensors: &[Named<'_>], config: Value, ranks: u32) -> crate::Result<Plan> {
    let tensors: Vec<_> = tensors.iter().map(|&(name, dims)| (name, Dtype::Bf16, dims)).collect();
    let checkpoint = checkpoint(&tensors, Some(config));
    Plan::new(&checkpoint, &Rules::for_model(&checkpoint)?, &World::host(ranks))
}

fn shape(plan: &Plan, rank: u32, name: &str) -> Vec<u64> {
    let param = plan.params().iter().position(|param| param.name == name).expect(name) as u32;
    let dest = plan.rank(Rank(rank)).dests.iter().find(|dest| dest.param == param).expect(name);
    dest.shape.dims().to_vec()
}

#[test]
fn llama_divides_heads_and_ties_the_head() {
    let two = plan(LLAMA, llama(), 2).unwrap();
    assert_eq!(shape(&two, 1, "model.layers.0.self_attn.q_proj.weight"), [32, 64]);
    assert_eq!(shape(&two, 1, "model.layers.0.self_attn.k_proj.weight"), [8, 64]);
    assert_eq!(shape(&two, 1, "model.layers.0.self_attn.o_proj.weight"), [64, 32]);
    assert_eq!(shape(&two, 1, "model.layers.0.mlp.down_proj.weight"), [64, 48]);
    assert_eq!(shape(&two, 0, "lm_head.weight"), [100, 64]);
    assert!(two.params().iter().all(|param| !param.name.ends_with("inv_freq")));
}

#[test]
fn more_ranks_than_kv_heads_share_them() {
    let eight = plan(LLAMA, llama(), 8).unwrap();
    let name = "model.layers.0.self_attn.v_proj.weight";
    assert_eq!(shape(&eight, 7, name), [8, 64]);
    let source = |rank: u32| {
        let rank = eight.rank(Rank(rank));
        let dest = rank.dests.iter().find(|dest| eight.params()[dest.param as usize].name == name).unwrap();
        rank.pieces[dest.pieces.start as usize].src
    };
    assert_eq!(source(0), source(3));
    assert_eq!(source(4), source(0) + 8 * 64 * 2);
    assert_eq!(plan(LLAMA, llama(), 3).unwrap_err().rule(), Some("not-divisible"));
}

#[test]
fn a_config_that_disagrees_is_an_error_with_both_numbers() {
    let mut config = llama();
    config["num_key_value_heads"] = json!(4);
    let error = plan(LLAMA, config, 2).unwrap_err();
    assert_eq!((error.kind(), error.rule(), error.found()), (ErrorKind::Rules, Some("units"), Some("16")));
    let mut config = llama();
    config["num_attention_heads"] = json!(0);
    assert_eq!(plan(LLAMA, config, 2).unwrap_err().rule(), Some("config"));
}

#[test]
fn bert_with_and_without_prefix() {
    let config = json!({
        "model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256
    });
    let bare: &[Named] = &[
        ("embeddings.LayerNorm.bias", &[64]),
        ("embeddings.position_ids", &[1, 512]),
        ("embeddings.word_embeddings.weight", &[100, 64]),
        ("encoder.layer.0.attention.output.LayerNorm.weight", &[64]),
        ("encoder.layer.0.attention.output.dense.bias", &[64]),
        ("encoder.layer.0.attention.output.dense.weight", &[64, 64]),
        ("encoder.layer.0.attention.self.key.bias", &[64]),
        ("encoder.layer.0.attention.self.query.weight", &[64, 64]),
        ("encoder.layer.0.intermediate.dense.weight", &[256, 64]),
        ("encoder.layer.0.output.dense.bias", &[64]),
        ("encoder.layer.0.output.dense.weight", &[64, 256]),
        ("pooler.dense.weight", &[64, 64]),
    ];
    let four = plan(bare, config.clone(), 4).unwrap();
    assert_eq!(shape(&four, 3, "encoder.layer.0.attention.self.query.weight"), [16, 64]);
    assert_eq!(shape(&four, 3, "encoder.layer.0.attention.self.key.bias"), [16]);
    assert_eq!(shape(&four, 3, "encoder.layer.0.attention.output.dense.weight"), [64, 16]);
    assert_eq!(shape(&four, 3, "encoder.layer.0.output.dense.weight"), [64, 64]);
    assert_eq!(shape(&four, 3, "encoder.layer.0.output.dense.bias"), [64]);
    assert_eq!(shape(&four, 3, "pooler.dense.weight"), [64, 64]);
    let names: Vec<String> = bare.iter().map(|(name, _)| format!("bert.{name}")).collect();
    let prefixed: Vec<Named<'_>> = names.iter().zip(bare).map(|(name, &(_, dims))| (name.as_str(), dims)).collect();
    let prefixed = plan(&prefixed, config, 4).unwrap();
    assert_eq!(shape(&prefixed, 0, "bert.encoder.layer.0.intermediate.dense.weight"), [64, 64]);
}

const BLOOM: &[Named] = &[
    ("h.0.input_layernorm.bias", &[64]),
    ("h.0.mlp.dense_4h_to_h.bias", &[64]),
    ("h.0.mlp.dense_4h_to_h.weight", &[64, 256]),
    ("h.0.mlp.dense_h_to_4h.bias", &[256]),
    ("h.0.self_attention.dense.bias", &[64]),
    ("h.0.self_attention.dense.weight", &[64, 64]),
    ("h.0.self_attention.query_key_value.bias", &[192]),
    ("h.0.self_attention.query_key_value.weight", &[192, 64]),
    ("ln_f.weight", &[64]),
    ("word_embeddings.weight", &[100, 64]),
    ("word_embeddings_layernorm.weight", &[64]),
];

#[test]
fn bloom_keeps_the_interleave() {
    let config = json!({ "architectures": ["BloomModel"], "n_embed": 64, "n_head": 4 });
    let two = plan(BLOOM, config, 2).unwrap();
    assert_eq!(shape(&two, 1, "h.0.self_attention.query_key_value.weight"), [96, 64]);
    assert_eq!(shape(&two, 1, "h.0.self_attention.dense.weight"), [64, 32]);
    assert_eq!(shape(&two, 1, "word_embeddings.weight"), [100, 64]);
}

/// The destinations of these names, each with its bytes on one rank and what it is an alias of.
fn heads(plan: &Plan, names: &[&str]) -> Vec<Option<(u64, Option<String>)>> {
    let dests = &plan.rank(Rank(0)).dests;
    let head = |name: &&str| {
        let dest = dests.iter().find(|dest| plan.params()[dest.param as usize].name == **name)?;
        let of = plan.params()[dest.param as usize].alias_of;
        Some((dest.bytes, of.map(|of| plan.params()[of as usize].name.clone())))
    };
    names.iter().map(head).collect()
}

fn alias(of: &str) -> Option<(u64, Option<String>)> {
    Some((0, Some(of.into())))
}

#[test]
fn a_stored_head_of_tied_weights_is_skipped() {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    let stored = [LLAMA, &[(HEAD, &[100, 64])]].concat();
    for model_type in ["llama", "mistral", "qwen2", "qwen3"] {
        let config = |tie: Value| {
            let mut config = llama();
            config["model_type"] = json!(model_type);
            config["tie_word_embeddings"] = tie;
            config
        };
        let tied = plan(&stored, config(json!(true)), 1).unwrap();
        assert_eq!(heads(&tied, &[HEAD]), [alias(EMBEDDING)]);
        assert!(
            tied.to_string().contains("14 tensors, 2 of them skipped (12.8 kB); 13 destinations, 1 of them aliases")
        );
        // Neither read nor needed.
        assert_eq!(tied.storage_bytes(), tied.checkpoint().bytes() - 100 * 64 * 2 - 4 * 2);
        assert!(tied.explain(HEAD).unwrap().contains("the checkpoint's tensor of this name is skipped"));
        assert!(!tied.explain(EMBEDDING).unwrap().contains("skipped"));
        for tie in [json!(false), Value::Null] {
            let own = plan(&stored, config(tie), 1).unwrap();
            assert_eq!(heads(&own, &[HEAD]), [Some((100 * 64 * 2, None))]);
        }
        assert_eq!(heads(&plan(LLAMA, config(Value::Null), 1).unwrap(), &[HEAD]), [None]);
    }
    let error = plan(
        &stored,
        {
            let mut config = llama();
            config["tie_word_embeddings"] = json!("yes");
            config
        },
        1,
    );
    assert_eq!(error.unwrap_err().rule(), Some("config"));
    let other = [LLAMA, &[(HEAD, &[101, 64])]].concat();
    let error = plan(&other, llama(), 1).unwrap_err();
    assert_eq!((error.rule(), error.tensor(), error.found()), (Some("config"), Some(HEAD), Some("BF16 [101,64]")));
}

#[test]
fn names_without_prefix_are_tied_unless_the_class_has_no_head() {
    let bare: Vec<Named> = LLAMA.iter().map(|&(name, dims)| (name.strip_prefix("model.").unwrap(), dims)).collect();
    let bloom: Vec<Named> = BLOOM.to_vec();
    for (tensors, config, embedding, class) in [
        (&bare, llama(), "embed_tokens.weight", "Llama"),
        (&bloom, json!({ "model_type": "bloom", "n_embed": 64, "n_head": 4 }), "word_embeddings.weight", "Bloom"),
    ] {
        let head = |architectures: Value| {
            let mut config = config.clone();
            config["architectures"] = architectures;
            heads(&plan(tensors, config, 1).unwrap(), &["lm_head.weight"]).remove(0)
        };
        assert_eq!(head(Value::Null), alias(embedding));
        assert_eq!(head(json!([format!("{class}ForCausalLM")])), alias(embedding));
        assert_eq!(head(json!([format!("{class}Model")])), None);
        assert_eq!(head(json!([format!("{class}ForSequenceClassification")])), None);
    }
}

#[test]
fn bert_ties_its_masked_language_head() {
    let config = json!({
        "model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256
    });
    let bert: &[Named] = &[
        ("bert.embeddings.LayerNorm.weight", &[64]),
        ("bert.embeddings.word_embeddings.weight", &[100, 64]),
        ("bert.encoder.layer.0.attention.output.dense.bias", &[64]),
        ("bert.encoder.layer.0.attention.output.dense.weight", &[64, 64]),
        ("bert.encoder.layer.0.attention.self.query.weight", &[64, 64]),
        ("bert.encoder.layer.0.intermediate.dense.weight", &[256, 64]),
        ("bert.encoder.layer.0.output.dense.weight", &[64, 256]),
    ];
    let head = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"];
    let tied = [alias("bert.embeddings.word_embeddings.weight"), alias("cls.predictions.bias")];
    let bias: Named = ("cls.predictions.bias", &[100]);
    let decoder: [Named; 2] = [(head[0], &[100, 64]), (head[1], &[100])];
    let of = |tensors: &[Named], config: &Value| heads(&plan(tensors, config.clone(), 1).unwrap(), &head);
    assert_eq!(of(&[bert, &[bias]].concat(), &config), tied);
    assert_eq!(of(&[bert, &[bias], &decoder].concat(), &config), tied);
    assert_eq!(of(bert, &config), [None, None]);
    let mut untied = config;
    untied["tie_word_embeddings"] = json!(false);
    let own = [Some((100 * 64 * 2, None)), Some((200, None))];
    assert_eq!(of(&[bert, &[bias], &decoder].concat(), &untied), own);
}

#[test]
fn classes_without_model_type_are_known_with_their_heads() {
    let gpt2: &[Named] = &[
        ("h.0.attn.bias", &[1, 1, 16, 16]),
        ("h.0.attn.c_attn.weight", &[64, 192]),
        ("h.0.attn.c_proj.weight", &[64, 64]),
        ("h.0.ln_1.weight", &[64]),
        ("h.0.mlp.c_fc.weight", &[64, 256]),
        ("h.0.mlp.c_proj.weight", &[256, 64]),
        ("ln_f.weight", &[64]),
        ("wpe.weight", &[16, 64]),
        ("wte.weight", &[157, 64]),
    ];
    for (class, head) in [("GPT2LMHeadModel", alias("wte.weight")), ("GPT2Model", None)] {
        let config = json!({ "architectures": [class], "n_embd": 64, "n_head": 8 });
        assert_eq!(heads(&plan(gpt2, config, 1).unwrap(), &["lm_head.weight"]), [head], "{class}");
    }
}

/// What a quantiser or an adapter has once for all of `[q; k; v]` stays so, and the rest is cut in blocks.
#[test]
fn fused_blocks_of_a_quantised_module_are_one_module() {
    use Dtype::{Bf16, F8E4M3, F16, F32, I32, U8};
    let rest: &[(&str, Dtype, &[u64])] = &[
        ("model.embed_tokens.weight", Bf16, &[100, 512]),
        ("model.layers.0.input_layernorm.weight", Bf16, &[512]),
        ("model.layers.0.mlp.down_proj.weight", Bf16, &[512, 64]),
        ("model.layers.0.mlp.gate_up_proj.weight", Bf16, &[128, 512]),
        ("model.layers.0.self_attn.o_proj.weight", Bf16, &[512, 512]),
        ("model.norm.weight", Bf16, &[512]),
    ];
    type Kept<'a> = (&'a str, Dtype, &'a [u64], &'a [u64]);
    let layouts: [(Value, &[Kept<'_>]); 4] = [
        (
            json!({ "quant_method": "fp8" }),
            &[
                ("weight", F8E4M3, &[768, 512], &[384, 512]),
                ("weight_scale", F32, &[], &[]),
                ("input_scale", F32, &[1], &[1]),
            ],
        ),
        (
            json!({ "quant_method": "bitsandbytes" }),
            &[
                ("weight", U8, &[196_608, 1], &[98_304, 1]),
                ("weight.absmax", U8, &[6144], &[3072]),
                ("weight.nested_absmax", F32, &[24], &[12]),
                ("weight.quant_map", F32, &[16], &[16]),
            ],
        ),
        (
            json!({ "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false }),
            &[
                ("g_idx", I32, &[512], &[512]),
                ("qweight", I32, &[64, 768], &[64, 384]),
                ("qzeros", I32, &[4, 96], &[4, 48]),
                ("scales", F16, &[4, 768], &[4, 384]),
            ],
        ),
        (
            Value::Null,
            &[
                ("weight", Bf16, &[768, 512], &[384, 512]),
                ("lora_A.weight", F32, &[16, 512], &[16, 512]),
                ("lora_B.weight", F32, &[768, 16], &[384, 16]),
            ],
        ),
    ];
    for (quantization, kept) in layouts {
        let config = json!({
            "model_type": "phi3", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 64, "quantization_config": quantization
        });
        let name = |suffix: &str| format!("model.layers.0.self_attn.qkv_proj.{suffix}");
        let names: Vec<String> = kept.iter().map(|(suffix, ..)| name(suffix)).collect();
        let fused = names.iter().zip(kept).map(|(name, &(_, dtype, dims, _))| (name.as_str(), dtype, dims));
        let tensors: Vec<_> = rest.iter().copied().chain(fused).collect();
        let checkpoint = checkpoint(&tensors, Some(config));
        let two = Plan::new(&checkpoint, &Rules::for_model(&checkpoint).unwrap(), &World::host(2)).unwrap();
        for (name, (.., part)) in names.iter().zip(kept) {
            assert_eq!(shape(&two, 1, name), *part, "{name}");
        }
    }
}

/// Names of the activation order of compressed-tensors: `dynamic` is another for `group`.
#[test]
fn groups_in_the_order_of_activations_are_whole_under_every_name_of_it() {
    use Dtype::{Bf16, I32};
    let down = "model.layers.0.mlp.down_proj";
    let names = ["weight_g_idx", "weight_packed", "weight_scale"].map(|suffix| format!("{down}.{suffix}"));
    let stored = |with_groups: bool| {
        let rest = LLAMA.iter().filter(|(name, _)| !name.contains("down_proj"));
        let mut tensors: Vec<(&str, Dtype, &[u64])> = rest.map(|&(name, dims)| (name, Bf16, dims)).collect();
        tensors.extend([(names[1].as_str(), I32, &[64, 12][..]), (names[2].as_str(), Bf16, &[64, 6])]);
        tensors.extend(with_groups.then_some((names[0].as_str(), I32, &[96][..])));
        tensors
    };
    let scales = |first: Value, second: Value, with_groups: bool| {
        let weights = |order: Value| json!({ "weights": { "num_bits": 4, "group_size": 16, "actorder": order } });
        let mut config = llama();
        config["quantization_config"] = json!({
            "quant_method": "compressed-tensors",
            "config_groups": { "group_0": weights(first), "group_1": weights(second) }
        });
        let checkpoint = checkpoint(&stored(with_groups), Some(config));
        let two = Plan::new(&checkpoint, &Rules::for_model(&checkpoint).unwrap(), &World::host(2)).unwrap();
        [0, 1].map(|rank| shape(&two, rank, &names[2]))
    };
    let (whole, parts) = ([vec![64, 6], vec![64, 6]], [vec![64, 3], vec![64, 3]]);
    for order in [json!("group"), json!("dynamic")] {
        assert_eq!(scales(order.clone(), Value::Null, true), whole, "{order}");
        assert_eq!(scales(order.clone(), Value::Null, false), whole, "{order}");
        // Said of another group of modules than the first.
        assert_eq!(scales(Value::Null, order.clone(), true), whole, "{order}");
    }
    for order in [json!("weight"), json!("static"), Value::Null] {
        assert_eq!(scales(order.clone(), Value::Null, false), parts, "{order}");
    }
}

/// Tensors of two layers.
fn two_layers(change: impl Fn(String) -> String) -> Vec<(String, Vec<u64>)> {
    let second = LLAMA.iter().filter(|(name, _)| name.contains("layers.0"));
    let second = second.map(|&(name, dims)| (name.replace("layers.0", "layers.1"), dims.to_vec()));
    let first = LLAMA.iter().map(|&(name, dims)| (name.to_owned(), dims.to_vec()));
    first.chain(second).map(|(name, dims)| (change(name), dims)).collect()
}

fn on_mesh(tensors: &[(String, Vec<u64>)], config: Value, mesh: Mesh, experts: Option<Split>) -> crate::Result<Plan> {
    let tensors: Vec<_> = tensors.iter().map(|(name, dims)| (name.as_str(), Dtype::Bf16, &dims[..])).collect();
    let checkpoint = checkpoint(&tensors, Some(config));
    let options = ModelOptions { mesh, experts, ..ModelOptions::default() };
    let rules = Rules::for_model_with(&checkpoint, &options)?;
    Plan::new(&checkpoint, &rules, &World::host(1).with_mesh(mesh))
}

#[test]
fn stages_need_all_layers_and_a_place_for_all_else() {
    let stages = Mesh { pp: 2, ..Mesh::tp(1) };
    let of = |tensors: &[(String, Vec<u64>)], layers: u64, mesh| {
        let mut config = llama();
        config["num_hidden_layers"] = json!(layers);
        config["tie_word_embeddings"] = json!(false);
        on_mesh(tensors, config, mesh, None)
    };
    let two = two_layers(|name| name);
    let plan = of(&two, 2, stages).unwrap();
    let on = |rank: u32| plan.rank(Rank(rank)).dests.len();
    assert_eq!((on(0), on(1)), (11, 11));
    let elsewhere = two_layers(|name| name.replace("model.", "model.language_model."));
    let error = of(&elsewhere, 2, stages).unwrap_err();
    assert_eq!(error.rule(), Some("stages"), "{error}");
    let mut more = two.clone();
    more.push(("model.extra.self_attn.q_norm.weight".into(), vec![8]));
    let error = of(&more, 2, stages).unwrap_err();
    assert_eq!((error.rule(), error.tensor()), (Some("stages"), Some("model.extra.self_attn.q_norm.weight")));
    let error = of(&two, 4, stages).unwrap_err();
    assert_eq!((error.rule(), error.expected(), error.found()), (Some("stages"), Some("4 layers"), Some("2")));
    for one_stage in [&two, &elsewhere, &more] {
        of(one_stage, 4, Mesh::tp(2)).unwrap();
    }
}

fn qwen3_moe(experts: u64) -> Value {
    let mut config = llama();
    let more = json!({ "model_type": "qwen3_moe", "num_experts": experts, "moe_intermediate_size": 32 });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn with_experts(mut experts: Vec<(String, Vec<u64>)>, gate: &str) -> Vec<(String, Vec<u64>)> {
    let rest = LLAMA.iter().filter(|(name, _)| !name.contains(".mlp."));
    experts.extend(rest.map(|&(name, dims)| (name.to_owned(), dims.to_vec())));
    experts.push((format!("model.layers.0.{gate}.gate.weight"), vec![4, 64]));
    experts
}

#[test]
fn groups_need_all_experts_and_each_some() {
    let groups = Mesh { ep: 2, ..Mesh::tp(2) };
    let experts = |numbers: &[u64]| {
        let of = |number: &u64| {
            let name = |part: &str| format!("model.layers.0.mlp.experts.{number}.{part}_proj.weight");
            [(name("gate"), vec![32, 64]), (name("up"), vec![32, 64]), (name("down"), vec![64, 32])]
        };
        with_experts(numbers.iter().flat_map(of).collect(), "mlp")
    };
    on_mesh(&experts(&[0, 1, 2, 3]), qwen3_moe(4), groups, None).unwrap();
    on_mesh(&experts(&[0, 2, 3]), qwen3_moe(4), Mesh::tp(2), None).unwrap();
    let error = on_mesh(&experts(&[0, 2, 3]), qwen3_moe(4), groups, None).unwrap_err();
    assert_eq!((error.rule(), error.expected(), error.found()), (Some("experts"), Some("4 experts"), Some("3")));
    assert!(error.message().contains("the first of them 1"), "{error}");
    let one = Some(Split::Table(vec![vec![0..4], vec![]]));
    let error = on_mesh(&experts(&[0, 1, 2, 3]), qwen3_moe(4), groups, one).unwrap_err();
    assert_eq!(error.rule(), Some("experts"));
    let error = on_mesh(&experts(&[0]), qwen3_moe(1 << 31), Mesh::tp(1), None).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("config"), Some("2147483648")));
}

/// transformers 5 stores them so.
#[test]
fn experts_may_be_stacked_on_disk() {
    for (model_type, key, intermediate, gate) in [
        ("qwen3_moe", "num_experts", "moe_intermediate_size", "mlp"),
        ("mixtral", "num_local_experts", "intermediate_size", "mlp"),
        ("mixtral", "num_local_experts", "intermediate_size", "block_sparse_moe"),
    ] {
        let name = |part: &str| format!("model.layers.0.{gate}.experts.{part}_proj");
        let (gate_up, down) = (name("gate_up"), name("down"));
        let experts = vec![(gate_up.clone(), vec![4, 64, 64]), (down.clone(), vec![4, 64, 32])];
        let tensors = with_experts(experts, gate);
        let mut config = llama();
        (config["model_type"], config[key], config[intermediate]) = (json!(model_type), json!(4), json!(32));
        config["intermediate_size"] = json!(32);
        let two = on_mesh(&tensors, config.clone(), Mesh::tp(2), None).unwrap();
        assert_eq!((shape(&two, 1, &gate_up), shape(&two, 1, &down)), (vec![4, 32, 64], vec![4, 64, 16]));
        let groups = on_mesh(&tensors, config, Mesh { ep: 2, ..Mesh::tp(2) }, None).unwrap();
        assert_eq!((shape(&groups, 1, &gate_up), shape(&groups, 1, &down)), (vec![2, 64, 64], vec![2, 64, 32]));
    }
}

#[test]
fn tensors_beside_the_model_are_known() {
    let beside: &[Named] = &[
        ("model.layers.0.self_attn.k_scale", &[1]),
        ("model.layers.0.self_attn.attn.v_scale", &[1]),
        ("model.layers.0.self_attn.prob_scale", &[1]),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", &[4, 4]),
        ("model.layers.0.self_attn.rotary_emb.sin_cached", &[4, 4]),
        ("qa_outputs.bias", &[2]),
        ("score.weight", &[2, 64]),
        ("v_head.summary.weight", &[1, 64]),
    ];
    let two = plan(&[LLAMA, beside].concat(), llama(), 2).unwrap();
    assert_eq!(shape(&two, 1, "score.weight"), [2, 64]);
    assert_eq!(shape(&two, 1, "model.layers.0.self_attn.k_scale"), [1]);
    assert!(two.params().iter().all(|param| !param.name.ends_with("_cached")));
}

#[test]
fn numbers_that_make_no_sense_are_errors() {
    let mut config = llama();
    config["quantization_config"] = json!({ "quant_method": "awq", "version": "GEMM" });
    plan(LLAMA, config.clone(), 1).unwrap();
    config["quantization_config"]["version"] = json!("GEMV");
    assert_eq!(plan(LLAMA, config, 1).unwrap_err().rule(), Some("quantization"));
    let deepseek = json!({
        "model_type": "deepseek_v3", "num_hidden_layers": 1, "moe_intermediate_size": 8, "n_routed_experts": 1,
        "num_attention_heads": 1, "qk_nope_head_dim": u64::MAX, "qk_rope_head_dim": 2, "v_head_dim": u64::MAX,
        "intermediate_size": 8
    });
    assert!(plan(LLAMA, deepseek, 1).is_err());
    let many = "{ const = { dtype = 'bf16', dims = [9223372036854775807, 0], fill = 'zero' } }";
    for expr in [
        "steps = [{ pad = { dim = 0, to = 4611686018427387904, fill = 'zero' } }]",
        "expr = { const = { dtype = 'bf16', dims = [4294967296, 4294967296], fill = 'zero' } }",
        "expr = { concat = { dim = 0, parts = [MANY, MANY, MANY] } }",
    ] {
        let rules = Rules::from_toml(&format!("rule = [{{ match = 'w', {expr} }}]").replace("MANY", many));
        let checkpoint = checkpoint(&[("w", Dtype::Bf16, &[4, 4])], None);
        let error = Plan::new(&checkpoint, &rules.unwrap(), &World::host(2)).unwrap_err();
        assert!(matches!(error.rule(), Some("shape" | "cut-not-on-bytes")), "{error}");
    }
}

#[test]
fn what_is_not_known_is_said() {
    let error = plan(LLAMA, json!({ "model_type": "rwkv" }), 1).unwrap_err();
    assert!(error.message().contains("--rules replicate") && error.message().contains("rules file"), "{error}");
    assert_eq!((error.rule(), error.found()), (Some("unknown-architecture"), Some("rwkv")));
    assert!(error.expected().unwrap().contains("qwen3"));
    let checkpoint = checkpoint(&[("w", Dtype::F32, &[1])], None);
    assert_eq!(Rules::for_model(&checkpoint).unwrap_err().rule(), Some("no-config"));
}

#[test]
fn a_vocabulary_that_cannot_be_padded_is_refused() {
    let mut config = llama();
    config["vocab_size"] = json!(u64::MAX);
    let named: Vec<_> = LLAMA[1..].iter().map(|&(name, dims)| (name, Dtype::Bf16, dims)).collect();
    let checkpoint = checkpoint(&named, Some(config));
    let options = ModelOptions { target: Target::Vllm, ..ModelOptions::default() };
    let error = Rules::for_model_with(&checkpoint, &options).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("config"), Some("18446744073709551615")), "{error}");
}
