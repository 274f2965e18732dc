//! Families over synthetic headers.

use serde_json::{Value, json};

use crate::dtype::Dtype;
use crate::error::ErrorKind;
use crate::extent::Rank;
use crate::plan::tests::checkpoint;
use crate::plan::{Plan, Rules, World};

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

#[test]
fn bloom_keeps_the_interleave() {
    let tensors: &[Named] = &[
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
    let config = json!({ "architectures": ["BloomModel"], "n_embed": 64, "n_head": 4 });
    let two = plan(tensors, config, 2).unwrap();
    assert_eq!(shape(&two, 1, "h.0.self_attention.query_key_value.weight"), [96, 64]);
    assert_eq!(shape(&two, 1, "h.0.self_attention.dense.weight"), [64, 32]);
    assert_eq!(shape(&two, 1, "word_embeddings.weight"), [100, 64]);
}

#[test]
fn what_is_not_known_is_said() {
    let error = plan(LLAMA, json!({ "model_type": "gpt_neox" }), 1).unwrap_err();
    assert_eq!((error.rule(), error.found()), (Some("unknown-architecture"), Some("gpt_neox")));
    assert!(error.expected().unwrap().contains("qwen3"));
    let checkpoint = checkpoint(&[("w", Dtype::F32, &[1])], None);
    assert_eq!(Rules::for_model(&checkpoint).unwrap_err().rule(), Some("no-config"));
}
