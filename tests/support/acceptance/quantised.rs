//! Quantised layers: weights, and what scales them, from one cut.

use super::{Case, Refusal, case, dest, run, runs};
use crate::support::released::{DeepSeek, Experts, Llama, Model, Scheme};

/// Without experts that nothing here is about.
fn deepseek() -> DeepSeek {
    let mut model = DeepSeek { layers: 1, dense_layers: 0, mtp_layers: 0, files: 1, ..DeepSeek::V3 };
    model.experts.count = 2;
    model
}

/// A layer of Llama-2-7B whose intermediate size has groups for 4 ranks, which the released one has not.
fn llama(scheme: Scheme) -> Model {
    Llama { layers: 1, intermediate: 12_288, scheme, ..Llama::LLAMA_2_7B }.model()
}

pub(crate) fn fp8_blocks() -> Vec<Case> {
    const KV_B: &str = "model.layers.0.self_attn.kv_b_proj.weight";
    const KV_B_SCALE: &str = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv";
    const GATE: &str = "model.layers.0.mlp.experts.0.gate_proj.weight";
    const GATE_SCALE: &str = "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv";
    const DOWN: &str = "model.layers.0.mlp.experts.0.down_proj.weight";
    const DOWN_SCALE: &str = "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv";
    let qwen = Llama {
        layers: 1,
        experts: Some(Experts { count: 2, per_token: 2, intermediate: 1536 }),
        scheme: Scheme::Fp8Block { size: 128 },
        ..Llama::QWEN_3_235B_A22B
    };
    let q_a = |name: &str| format!("model.layers.0.self_attn.q_a_proj.{name}");
    let kv_a = |name: &str| format!("model.layers.0.self_attn.kv_a_proj_with_mqa.{name}");
    let whole = || {
        [
            dest("model.layers.0.self_attn.fused_qkv_a_proj.weight", "F8_E4M3", [2112, 7168])
                .landing([run(0, 1536 * 7168).of(q_a("weight")), run(0, 576 * 7168).of(kv_a("weight"))]),
            dest("model.layers.0.self_attn.fused_qkv_a_proj.weight_scale_inv", "F32", [17, 56])
                .landing([run(0, 12 * 224).of(q_a("weight_scale_inv")), run(0, 5 * 224).of(kv_a("weight_scale_inv"))]),
        ]
    };
    vec![
        case("26", deepseek().model(), "--tp 8").on(
            4,
            [
                dest(KV_B, "F8_E4M3", [4096, 512]).file([run(16_384 * 512, 4096 * 512)]),
                dest(KV_B_SCALE, "F32", [32, 4]).file([run(2048, 512)]),
                // 3072 rows of 16 heads of 192.
                dest("model.layers.0.self_attn.q_b_proj.weight", "F8_E4M3", [3072, 1536])
                    .file([run(4 * 3072 * 1536, 3072 * 1536)]),
                dest("model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "F32", [5, 56])
                    .file([run(0, 1120)]),
                dest("model.layers.0.self_attn.o_proj.weight_scale_inv", "F32", [56, 16])
                    .file([runs(56, 64, 256, 512)]),
            ],
        ),
        case("27", deepseek().model(), "--tp 8 --target vllm").on(0, whole()).on(5, whole()),
        case("27, rules", deepseek().model(), "--tp 8")
            .rules(
                r#"{ module = "**.q_a_proj", rename = "{1}.fused_qkv_a_proj",
                    expr.concat = { dim = 0, parts = [{}, { tensor = "{1}.kv_a_proj_with_mqa" }] } },
                   { module = "**.kv_a_proj_with_mqa", part = true },"#,
            )
            .on(5, whole()),
        // Half a block of the keys and values would be followed by others.
        case("27, reversed", deepseek().model(), "--tp 8")
            .rules(
                r#"{ module = "**.kv_a_proj_with_mqa", rename = "{1}.fused_qkv_a_proj",
                    expr.concat = { dim = 0, parts = [{}, { tensor = "{1}.q_a_proj" }] } },
                   { module = "**.q_a_proj", part = true },"#,
            )
            .refused(Refusal {
                rule: "unit",
                tensor: Some("model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
                expected: Some("a multiple of 128"),
                found: Some("576 indices"),
                rank: None,
            }),
        // Both halves of a block of 128 rows have its scale.
        case("29, refined", deepseek().model(), "--tp 32 --refine-scales")
            .on(
                2,
                [
                    dest(GATE, "F8_E4M3", [64, 7168]).file([run(128 * 7168, 64 * 7168)]),
                    dest(GATE_SCALE, "F32", [1, 112])
                        .element([0, 0], run(224, 0))
                        .element([0, 111], run(224 + 55 * 4, 0)),
                ],
            )
            .on(
                3,
                [
                    dest(GATE, "F8_E4M3", [64, 7168]).file([run(192 * 7168, 64 * 7168)]),
                    dest(GATE_SCALE, "F32", [1, 112]).element([0, 0], run(224, 0)).element([0, 1], run(224, 0)),
                    dest(DOWN_SCALE, "F32", [112, 1]).element([2, 0], run(64 + 4, 0)),
                ],
            ),
        // 192 rows are one block and a half.
        case("refined", qwen.model(), "--tp 8 --refine-scales").on(
            1,
            [
                dest(GATE, "F8_E4M3", [192, 4096]).file([run(192 * 4096, 192 * 4096)]),
                dest(GATE_SCALE, "F32", [3, 64])
                    .element([0, 0], run(128, 0))
                    .element([1, 2], run(256 + 4, 0))
                    .element([2, 63], run(256 + 124, 0)),
                dest(DOWN, "F8_E4M3", [4096, 192]).file([runs(4096, 192, 192, 1536)]),
                dest(DOWN_SCALE, "F32", [64, 3])
                    .element([0, 0], run(4, 0))
                    .element([1, 1], run(8, 0))
                    .element([63, 2], run(31 * 48 + 8, 0)),
            ],
        ),
    ]
}

pub(crate) fn packed() -> Vec<Case> {
    let gptq = |act_order| Scheme::Gptq { group: 128, act_order, bias: false };
    const QWEIGHT: &str = "model.layers.0.self_attn.q_proj.qweight";
    const DOWN: &str = "model.layers.0.mlp.down_proj.qweight";
    vec![
        case("38", llama(gptq(false)), "--tp 4").on(
            1,
            [
                dest(QWEIGHT, "I32", [512, 1024]).file([runs(512, 4096, 4096, 16_384)]),
                dest("model.layers.0.self_attn.q_proj.scales", "F16", [32, 1024]).file([runs(32, 2048, 2048, 8192)]),
                dest("model.layers.0.self_attn.q_proj.qzeros", "I32", [32, 128]).file([runs(32, 512, 512, 2048)]),
                dest("model.layers.0.self_attn.q_proj.g_idx", "I32", [4096]).file([run(0, 16_384)]),
            ],
        ),
        // Section 7: inputs in the order of their activations need all groups.
        case("38, act-order", llama(gptq(true)), "--tp 4").on(
            1,
            [
                dest(DOWN, "I32", [384, 4096]).file([run(384 * 16_384, 384 * 16_384)]),
                dest("model.layers.0.mlp.down_proj.scales", "F16", [96, 4096]).file([run(0, 96 * 8192)]),
                dest("model.layers.0.mlp.down_proj.qzeros", "I32", [96, 512]).file([run(0, 96 * 2048)]),
                dest("model.layers.0.mlp.down_proj.g_idx", "I32", [3072]).file([run(3072 * 4, 3072 * 4)]),
            ],
        ),
        case("40", llama(Scheme::Awq { group: 128 }), "--tp 4")
            .on(1, [dest(QWEIGHT, "I32", [4096, 128]).file([runs(4096, 512, 512, 2048)])]),
        case(
            "40, down",
            Llama { layers: 1, scheme: Scheme::Awq { group: 128 }, ..Llama::LLAMA_2_7B }.model(),
            "--tp 2",
        )
        .on(1, [dest(DOWN, "I32", [5504, 512]).file([run(11_272_192, 11_272_192)])]),
        case(
            "41",
            Llama { layers: 1, scheme: Scheme::Nvfp4 { kv_scales: false }, ..Llama::LLAMA_3_1_8B }.model(),
            "--tp 8",
        )
        .on(
            1,
            [
                dest("model.layers.0.mlp.down_proj.weight", "U8", [4096, 896]).file([runs(4096, 896, 896, 7168)]),
                dest("model.layers.0.mlp.down_proj.weight_scale", "F8_E4M3", [4096, 112])
                    .file([runs(4096, 112, 112, 896)]),
                dest("model.layers.0.mlp.down_proj.weight_scale_2", "F32", []).file([run(0, 4)]),
            ],
        ),
        // Zero points are packed along the outputs, and the shape stays that of the whole.
        case("packed", llama(Scheme::Packed { group: 128, symmetric: false }), "--tp 4").on(
            1,
            [
                dest("model.layers.0.self_attn.q_proj.weight_packed", "I32", [1024, 512])
                    .file([run(2_097_152, 2_097_152)]),
                dest("model.layers.0.self_attn.q_proj.weight_zero_point", "I32", [128, 32]).file([run(16_384, 16_384)]),
                dest("model.layers.0.self_attn.q_proj.weight_shape", "I64", [2]).file([run(0, 16)]),
                dest("model.layers.0.mlp.down_proj.weight_packed", "I32", [4096, 384])
                    .file([runs(4096, 1536, 1536, 6144)]),
            ],
        ),
        case("per tensor", llama(Scheme::Fp8Tensor), "--tp 4 --target vllm").on(
            1,
            [
                // One scale for each part of what is merged.
                dest("model.layers.0.self_attn.qkv_proj.weight_scale", "F32", [3]),
                dest("model.layers.0.mlp.gate_up_proj.weight_scale", "F32", [2]),
                dest("model.layers.0.mlp.down_proj.weight_scale", "F32", [1]).file([run(0, 4)]),
            ],
        ),
        case("per channel", llama(Scheme::Fp8Channel), "--tp 4").on(
            1,
            [
                dest("model.layers.0.self_attn.q_proj.weight_scale", "F16", [1024, 1]).file([run(2048, 2048)]),
                dest("model.layers.0.mlp.down_proj.weight_scale", "F16", [4096, 1]).file([run(0, 8192)]),
            ],
        ),
        case("flat", Llama { layers: 1, scheme: Scheme::Nf4, ..Llama::TINY }.model(), "--tp 1")
            .on(0, [dest("model.layers.0.mlp.down_proj.weight", "U8", [8192, 1]).file([run(0, 8192)])]),
    ]
}
