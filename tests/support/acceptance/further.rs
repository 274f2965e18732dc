//! Cases that the table does not list: other families, numbers of ranks and layouts, worked out by hand from what the same
//! text says engines do.

use super::{Case, Refusal, absent, byte, case, dest, made, run, runs};
use crate::support::released::{
    Bert, Bloom, Dbrx, DeepSeek, Falcon, Gemma, Gpt2, GptNeox, GptOss, InternLm2, Llama, Llama4, Phi3, Qwen3Next,
    Scheme,
};

/// Heads that lie together in groups, on ranks that share and ranks that divide a group.
pub(crate) fn groups() -> Vec<Case> {
    const FALCON: &str = "transformer.h.0.self_attention.query_key_value.weight";
    const WQKV: &str = "model.layers.0.attention.wqkv.weight";
    const DBRX: &str = "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight";
    const PHI: &str = "model.layers.0.self_attn.qkv_proj.weight";
    let falcon = || Falcon { layers: 1, ..Falcon::FALCON_40B }.model();
    let internlm = || InternLm2 { layers: 1, ..InternLm2::INTERNLM_2_7B }.model();
    let phi = || Phi3 { layers: 1, ..Phi3::PHI_3_MEDIUM }.model();
    let rows = |from: u64, to: u64, row: u64| run(from * row, (to - from) * row);
    vec![
        // 8 groups of 1152 rows: ranks 4 and 5 have half of the 16 queries of group 2 each, and its key and value.
        case("falcon, 16 ranks", falcon(), "--tp 16")
            .on(4, [dest(FALCON, "BF16", [640, 8192]).landing([rows(2304, 2816, 16_384), rows(3328, 3456, 16_384)])])
            .on(5, [dest(FALCON, "BF16", [640, 8192]).landing([rows(2816, 3456, 16_384)])]),
        // One query head for each of 16 ranks that share a group.
        case("falcon, 128 ranks", falcon(), "--tp 128")
            .on(17, [dest(FALCON, "BF16", [192, 8192]).landing([rows(1216, 1280, 16_384), rows(2176, 2304, 16_384)])]),
        case("falcon, 8 ranks", falcon(), "--tp 8")
            .on(5, [dest(FALCON, "BF16", [1152, 8192]).file([rows(5760, 6912, 16_384)])]),
        case("internlm2, 16 ranks", internlm(), "--tp 16").on(
            2,
            [
                dest(WQKV, "BF16", [512, 4096]).landing([rows(768, 1024, 8192), rows(1280, 1536, 8192)]),
                dest("model.layers.0.attention.wo.weight", "BF16", [4096, 256]).file([runs(4096, 512, 1024, 8192)]),
            ],
        ),
        // [q; k; v]: 3 of 48 query heads, and the third of 8 key-value heads, which two ranks share.
        case("dbrx, 16 ranks", Dbrx { layers: 1, ..Dbrx::DBRX }.model(), "--tp 16").on(
            5,
            [dest(DBRX, "BF16", [640, 6144]).landing([
                rows(1920, 2304, 12_288),
                rows(6400, 6528, 12_288),
                rows(7424, 7552, 12_288),
            ])],
        ),
        case("phi-3, 10 ranks", phi(), "--tp 10").on(
            3,
            [
                dest(PHI, "BF16", [768, 5120]).landing([
                    rows(1536, 2048, 10_240),
                    rows(5504, 5632, 10_240),
                    rows(6784, 6912, 10_240),
                ]),
                dest("model.layers.0.mlp.gate_up_proj.weight", "BF16", [3584, 5120])
                    .landing([rows(5376, 7168, 10_240), rows(23_296, 25_088, 10_240)]),
            ],
        ),
        case("phi-3, 20 ranks", phi(), "--tp 20").on(
            5,
            [
                dest(PHI, "BF16", [512, 5120]).landing([
                    rows(1280, 1536, 10_240),
                    rows(5376, 5504, 10_240),
                    rows(6656, 6784, 10_240),
                ]),
                dest("model.layers.0.self_attn.o_proj.weight", "BF16", [5120, 256])
                    .file([runs(5120, 512, 2560, 10_240)]),
            ],
        ),
    ]
}

/// Families of older models, with their biases.
pub(crate) fn classics() -> Vec<Case> {
    let bloom = || Bloom { layers: 1, files: 3, ..Bloom::BLOOM_176B }.model();
    let neox = || GptNeox { layers: 1, ..GptNeox::GPT_NEOX_20B }.model();
    let gpt2 = || Gpt2 { layers: 1, ..Gpt2::GPT_2 }.model();
    let gemma = || Gemma { layers: 1, ..Gemma::GEMMA_2_9B }.model();
    vec![
        case("bloom, inputs", bloom(), "--tp 8").on(
            7,
            [
                dest("h.0.mlp.dense_4h_to_h.weight", "BF16", [14_336, 7168])
                    .file([runs(14_336, 14_336, 100_352, 114_688).last(1_644_152_832, 1_644_167_168)]),
                dest("h.0.self_attention.dense.weight", "BF16", [14_336, 1792])
                    .file([runs(14_336, 3584, 25_088, 28_672)]),
            ],
        ),
        // 8 heads of 3 x 96 rows each.
        case("gpt-neox", neox(), "--tp 8").on(
            5,
            [
                dest("gpt_neox.layers.0.attention.query_key_value.weight", "F16", [2304, 6144])
                    .file([run(11_520 * 12_288, 2304 * 12_288)]),
                dest("gpt_neox.layers.0.attention.query_key_value.bias", "F16", [2304]).file([run(23_040, 4608)]),
                dest("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "F16", [6144, 3072])
                    .file([runs(6144, 6144, 30_720, 49_152)]),
                dest("gpt_neox.layers.0.mlp.dense_4h_to_h.bias", "F16", [6144]).file([run(0, 12_288)]),
            ],
        ),
        case("gpt-2, biases", gpt2(), "--tp 2").on(
            1,
            [
                dest("h.0.attn.c_attn.bias", "F32", [1152]).landing([
                    run(1536, 1536),
                    run(4608, 1536),
                    run(7680, 1536),
                ]),
                dest("h.0.mlp.c_fc.weight", "F32", [768, 1536]).file([runs(768, 6144, 6144, 12_288)]),
                dest("h.0.mlp.c_fc.bias", "F32", [1536]).file([run(6144, 6144)]),
                dest("h.0.mlp.c_proj.bias", "F32", [768]).file([run(0, 3072)]),
            ],
        ),
        case("bert", Bert { layers: 1, ..Bert::BERT_BASE }.model(), "--tp 4").on(
            1,
            [
                dest("bert.encoder.layer.0.attention.self.query.weight", "F32", [192, 768])
                    .file([run(192 * 3072, 192 * 3072)]),
                dest("bert.encoder.layer.0.output.dense.weight", "F32", [768, 768])
                    .file([runs(768, 3072, 3072, 12_288)]),
            ],
        ),
        // Heads of 256, whatever the hidden size; two ranks share a key head.
        case("gemma 2", gemma(), "--tp 16").on(
            3,
            [
                dest("model.layers.0.self_attn.q_proj.weight", "BF16", [256, 3584]).file([run(768 * 7168, 256 * 7168)]),
                dest("model.layers.0.self_attn.k_proj.weight", "BF16", [256, 3584]).file([run(256 * 7168, 256 * 7168)]),
                dest("model.layers.0.self_attn.o_proj.weight", "BF16", [3584, 256]).file([runs(3584, 512, 1536, 8192)]),
                dest("lm_head.weight", "BF16", [256_000, 3584]).alias_of("model.embed_tokens.weight"),
            ],
        ),
        case("gemma 3, one key head", Gemma { layers: 1, ..Gemma::GEMMA_3_1B }.model(), "--tp 4")
            .on(2, [dest("model.layers.0.self_attn.k_proj.weight", "BF16", [256, 1152]).file([run(0, 589_824)])]),
    ]
}

/// Experts, with the layers beside them.
pub(crate) fn experts() -> Vec<Case> {
    let mixtral = || Llama { layers: 1, ..Llama::MIXTRAL_8X7B }.model();
    let scout = || Llama4 { layers: 1, files: 3, ..Llama4::LLAMA_4_SCOUT }.model();
    let mut qwen = Qwen3Next { layers: 4, mtp: false, files: 1, ..Qwen3Next::QWEN_3_NEXT_80B_A3B };
    qwen.experts.count = 8;
    let of = |expert: u64, part: &str| format!("model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight");
    let quarter = |expert| ["w1", "w3"].map(|part| run(3584 * 8192, 3584 * 8192).of(of(expert, part)));
    let [[a, b], [c, d], [e, f], [g, h]] = [4, 5, 6, 7].map(quarter);
    let whole = |expert, part| run(0, 14_336 * 8192).of(of(expert, part));
    const GATE_UP: &str = "language_model.model.layers.0.feed_forward.experts.gate_up_proj";
    vec![
        // Two groups of four ranks: half of the experts, a quarter of each.
        case("mixtral, vLLM", mixtral(), "--tp 8 --ep 2 --target vllm").on(
            5,
            [
                dest("model.layers.0.block_sparse_moe.experts.routed_experts.w13_weight", "BF16", [4, 7168, 4096])
                    .landing([a, b, c, d, e, f, g, h]),
                dest("model.layers.0.block_sparse_moe.experts.routed_experts.w2_weight", "BF16", [4, 4096, 3584])
                    .landing([4, 5, 6, 7].map(|expert| runs(4096, 7168, 7168, 28_672).of(of(expert, "w2")))),
            ],
        ),
        case("mixtral, HF", mixtral(), "--tp 4 --ep 4 --target hf").on(
            3,
            [dest("model.layers.0.mlp.experts.gate_up_proj", "BF16", [2, 28_672, 4096]).landing([
                whole(6, "w1"),
                whole(6, "w3"),
                whole(7, "w1"),
                whole(7, "w3"),
            ])],
        ),
        // The third of four groups, and the second of its two ranks: of each input half of gate and half of up.
        case("llama 4, groups", scout(), "--tp 8 --ep 4").on(
            5,
            [
                dest(GATE_UP, "BF16", [4, 5120, 8192])
                    .landing([runs(2, 8192, 8 * 167_772_160 + 8192, 16_384).times(5120, 32_768).times(4, 167_772_160)]),
                dest("language_model.model.layers.0.feed_forward.experts.down_proj", "BF16", [4, 4096, 5120])
                    .landing([runs(4, 41_943_040, 8 * 83_886_080 + 41_943_040, 83_886_080)]),
            ],
        ),
        case("dbrx, groups", Dbrx { layers: 1, ..Dbrx::DBRX }.model(), "--tp 8 --ep 8").on(
            3,
            [dest("transformer.blocks.0.ffn.experts.mlp.w1", "BF16", [21_504, 6144])
                .landing([run(6 * 132_120_576, 2 * 132_120_576)])],
        ),
        // Two key heads and the four value heads that share them.
        case("linear attention", qwen.model(), "--tp 8").on(
            3,
            [
                dest("model.layers.0.linear_attn.in_proj_ba.weight", "BF16", [8, 2048])
                    .file([run(24 * 4096, 8 * 4096)]),
                dest("model.layers.0.linear_attn.A_log", "BF16", [4]).file([run(24, 8)]),
                dest("model.layers.0.linear_attn.out_proj.weight", "BF16", [2048, 512])
                    .file([runs(2048, 1024, 3072, 8192)]),
            ],
        ),
    ]
}

/// gpt-oss on as many ranks as leave the last without blocks: 90 of 6 each are 15.
pub(crate) fn empty_parts() -> Vec<Case> {
    const EXPERTS: &str = "model.layers.0.mlp.experts";
    const QKV: &str = "model.layers.0.attn.qkv_proj.weight";
    let of = |part: &str| format!("model.layers.0.self_attn.{part}_proj.weight");
    vec![
        case("gpt-oss, 16 ranks", GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model(), "--tp 16 --target vllm")
            .on(
                14,
                [dest("model.layers.0.mlp.experts.routed_experts.w2_weight", "U8", [32, 2880, 96]).file([runs(
                    92_160,
                    96,
                    84 * 16,
                    1440,
                )
                .of(format!("{EXPERTS}.down_proj_blocks"))])],
            )
            .on(
                15,
                [
                    dest("model.layers.0.mlp.experts.routed_experts.w2_weight", "U8", [32, 2880, 0]).file([]),
                    dest("model.layers.0.mlp.experts.routed_experts.w13_weight", "U8", [32, 0, 1440]).file([]),
                    dest("model.layers.0.mlp.experts.routed_experts.w2_bias", "BF16", [32, 2880])
                        .file([])
                        .fill("zero", 184_320),
                    dest(QKV, "BF16", [384, 2880]).landing([
                        run(3840 * 5760, 256 * 5760).of(of("q")),
                        run(448 * 5760, 64 * 5760).of(of("k")),
                        run(448 * 5760, 64 * 5760).of(of("v")),
                    ]),
                    dest("model.layers.0.attn.sinks", "BF16", [4])
                        .file([run(120, 8).of("model.layers.0.self_attn.sinks")]),
                    dest("model.embedding.weight", "BF16", [12_568, 2880]).file([run(
                        15 * 12_568 * 5760,
                        12_568 * 5760,
                    )
                    .of("model.embed_tokens.weight")]),
                ],
            ),
    ]
}

/// Weights and what scales them.
pub(crate) fn quantised() -> Vec<Case> {
    const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
    const GATE_SCALE: &str = "model.layers.0.mlp.gate_proj.weight_scale_inv";
    let mut deepseek = DeepSeek { layers: 1, dense_layers: 0, mtp_layers: 0, files: 1, ..DeepSeek::V3 };
    deepseek.experts.count = 2;
    let gptq = Scheme::Gptq { group: 128, act_order: false, bias: false };
    let llama_2 = |scheme| Llama { layers: 1, scheme, ..Llama::LLAMA_2_7B }.model();
    let fp8 = || Llama { layers: 1, scheme: Scheme::Fp8Block { size: 128 }, ..Llama::LLAMA_3_1_8B }.model();
    let mxfp8 = Llama { layers: 1, scheme: Scheme::Mxfp8, ..Llama::LLAMA_3_1_8B };
    vec![
        case("deepseek, 16 ranks", deepseek.model(), "--tp 16").on(
            3,
            [
                dest("model.layers.0.self_attn.o_proj.weight", "F8_E4M3", [7168, 1024])
                    .file([runs(7168, 1024, 3072, 16_384)]),
                dest("model.layers.0.self_attn.o_proj.weight_scale_inv", "F32", [56, 8]).file([runs(56, 32, 96, 512)]),
                // 8 heads of 192 are 12 blocks.
                dest("model.layers.0.self_attn.q_b_proj.weight_scale_inv", "F32", [12, 12]).file([run(1728, 576)]),
            ],
        ),
        // Inputs in groups: rows of words, of groups, and of group numbers.
        case("gptq, inputs", llama_2(gptq), "--tp 2").on(
            1,
            [
                dest("model.layers.0.mlp.down_proj.qweight", "I32", [688, 4096]).file([run(11_272_192, 11_272_192)]),
                dest("model.layers.0.mlp.down_proj.scales", "F16", [43, 4096]).file([run(352_256, 352_256)]),
                dest("model.layers.0.mlp.down_proj.qzeros", "I32", [43, 512]).file([run(88_064, 88_064)]),
                dest("model.layers.0.mlp.down_proj.g_idx", "I32", [5504]).file([run(22_016, 22_016)]),
            ],
        ),
        // Words of the three lie beside each other in each row; the inputs are the same, and so are their groups.
        case("gptq, merged", llama_2(gptq), "--tp 2 --target vllm").on(
            1,
            [
                dest("model.layers.0.self_attn.qkv_proj.qweight", "I32", [512, 6144])
                    .element([0, 0], byte(8192).of("model.layers.0.self_attn.q_proj.qweight"))
                    .element([0, 2053], byte(8212).of("model.layers.0.self_attn.k_proj.qweight"))
                    .element([511, 6143], byte(8_388_604).of("model.layers.0.self_attn.v_proj.qweight")),
                dest("model.layers.0.self_attn.qkv_proj.g_idx", "I32", [4096])
                    .file([run(0, 16_384).of("model.layers.0.self_attn.q_proj.g_idx")]),
            ],
        ),
        case("mxfp8, inputs", mxfp8.model(), "--tp 8").on(
            3,
            [
                dest(DOWN, "F8_E4M3", [4096, 1792]).file([runs(4096, 1792, 5376, 14_336)]),
                dest("model.layers.0.mlp.down_proj.weight_scale", "U8", [4096, 56]).file([runs(4096, 56, 168, 448)]),
            ],
        ),
        // 448 of 14,336 are three blocks and a half.
        case("blocks, 32 ranks", fp8(), "--tp 32").refused(Refusal {
            rule: "not-divisible",
            tensor: Some("model.layers.0.mlp.gate_proj.weight"),
            expected: Some("a divisor of 112 units: 1, 2, 4, 7, 8, 14, 16, 28, 56, 112"),
            found: Some("32 parts"),
            rank: None,
        }),
        case("blocks, refined", fp8(), "--tp 32 --refine-scales").on(
            5,
            [
                dest(GATE_SCALE, "F32", [7, 64])
                    .element([0, 0], byte(17 * 128))
                    .element([1, 0], byte(18 * 128))
                    .element([6, 63], byte(20 * 128 + 124)),
                // One head for each rank: whole blocks.
                dest("model.layers.0.self_attn.o_proj.weight_scale_inv", "F32", [32, 1]).file([runs(32, 4, 20, 128)]),
            ],
        ),
    ]
}

/// Targets' own ways, and stages.
pub(crate) fn placed() -> Vec<Case> {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    let llama = || Llama { layers: 1, ..Llama::LLAMA_3_1_8B }.model();
    let tied = || Llama { layers: 2, ..Llama::QWEN_2_5_0_5B }.model();
    let norms = || made("two stages", [("norm", "BF16", &[8]), ("rest", "BF16", &[8])], "--pp 4");
    vec![
        case("mistral.rs shares heads", llama(), "--tp 16 --target mistralrs").on(
            5,
            [
                dest("model.layers.0.self_attn.k_proj.weight", "BF16", [128, 4096]).file([run(2_097_152, 1_048_576)]),
                dest(EMBEDDING, "BF16", [128_256, 4096]).file([run(0, 1_050_673_152)]),
            ],
        ),
        case("HF divides its head", llama(), "--tp 8 --target hf").on(
            7,
            [
                dest("lm_head.weight", "BF16", [16_032, 4096]).file([run(919_339_008, 131_334_144)]),
                dest(EMBEDDING, "BF16", [128_256, 4096]).file([run(0, 1_050_673_152)]),
            ],
        ),
        // The last stage has the embedding as its head, and each of its ranks half of it.
        case("tied, vLLM", tied(), "--pp 2 --tp 2 --target vllm").on(
            3,
            [
                dest(EMBEDDING, "BF16", [75_968, 896]).file([run(136_134_656, 136_134_656)]),
                dest("lm_head.weight", "BF16", [75_968, 896]).alias_of(EMBEDDING),
                dest("model.norm.weight", "BF16", [896]).file([run(0, 1792)]),
            ],
        ),
        // TensorRT-LLM: a norm of one stage that the stage before it has, too.
        norms()
            .rules(r#"{ match = "norm", replicate = true, stage = [1, 2] },"#)
            .on(0, [absent("norm"), dest("rest", "BF16", [8])])
            .on(1, [dest("norm", "BF16", [8]).file([run(0, 16)])])
            .on(2, [dest("norm", "BF16", [8]).file([run(0, 16)])])
            .on(3, [absent("norm")]),
        norms().rules(r#"{ match = "norm", replicate = true, stage = [1, 4] },"#).refused(Refusal {
            rule: "stages",
            tensor: Some("norm"),
            expected: Some("stages below 4"),
            found: Some("4"),
            rank: None,
        }),
    ]
}
