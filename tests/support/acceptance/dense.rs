//! Linear layers, heads, norms, biases, vocabularies, and what is loaded beside a model.

use super::{Case, absent, byte, case, dest, made, run, runs};
use crate::support::released::{Bloom, Gpt2, Llama, Model};

fn llama_8b() -> Model {
    Llama { layers: 1, ..Llama::LLAMA_3_1_8B }.model()
}

fn bloom() -> Model {
    Bloom { layers: 1, files: 3, ..Bloom::BLOOM_176B }.model()
}

fn gpt2() -> Model {
    Gpt2 { layers: 1, ..Gpt2::GPT_2 }.model()
}

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const K: &str = "model.layers.0.self_attn.k_proj.weight";
const V: &str = "model.layers.0.self_attn.v_proj.weight";
const O: &str = "model.layers.0.self_attn.o_proj.weight";
const GATE: &str = "model.layers.0.mlp.gate_proj.weight";
const UP: &str = "model.layers.0.mlp.up_proj.weight";
const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
const NORM: &str = "model.layers.0.input_layernorm.weight";

pub(crate) fn linear() -> Vec<Case> {
    let kv = |name| dest(name, "BF16", [128, 4096]).file([run(2_097_152, 1_048_576)]);
    let norm = || [dest(NORM, "BF16", [8192]).file([run(0, 16_384)])];
    let large = || Llama { layers: 1, ..Llama::LLAMA_3_1_70B }.model();
    vec![
        case("1", llama_8b(), "--tp 4").on(1, [dest(Q, "BF16", [1024, 4096]).file([run(8_388_608, 8_388_608)])]),
        // Two neighbours share a head.
        case("2", llama_8b(), "--tp 16").on(4, [kv(K), kv(V)]).on(5, [kv(K), kv(V)]),
        case("4", llama_8b(), "--tp 4")
            .on(3, [dest(O, "BF16", [4096, 1024]).file([runs(4096, 2048, 6144, 8192).last(33_552_384, 33_554_432)])]),
        case("5", large(), "--tp 8").on(
            7,
            [dest(DOWN, "BF16", [8192, 3584]).file([runs(8192, 7168, 50_176, 57_344).last(469_754_880, 469_762_048)])],
        ),
        case("6", large(), "--tp 8").on(0, norm()).on(3, norm()).on(7, norm()),
        case("6, other axes", large(), "--tp 2 --dp 2 --cp 2").on(0, norm()).on(5, norm()),
        // Section 3: gate and up, then queries, keys and values, in one destination each.
        case("merged", llama_8b(), "--tp 4 --target vllm").on(
            1,
            [
                dest("model.layers.0.self_attn.qkv_proj.weight", "BF16", [1536, 4096]).landing([
                    run(1024 * 8192, 1024 * 8192).of(Q),
                    run(256 * 8192, 256 * 8192).of(K),
                    run(256 * 8192, 256 * 8192).of(V),
                ]),
                dest("model.layers.0.mlp.gate_up_proj.weight", "BF16", [7168, 4096])
                    .landing([run(3584 * 8192, 3584 * 8192).of(GATE), run(3584 * 8192, 3584 * 8192).of(UP)]),
            ],
        ),
        // Each part has its own coordinate: 5 / 2 of the keys, 5 of the queries.
        case("merged, shared heads", llama_8b(), "--tp 16 --target vllm").on(
            5,
            [dest("model.layers.0.self_attn.qkv_proj.weight", "BF16", [512, 4096]).landing([
                run(1280 * 8192, 256 * 8192).of(Q),
                run(256 * 8192, 128 * 8192).of(K),
                run(256 * 8192, 128 * 8192).of(V),
            ])],
        ),
        // Section 1: uneven rules. Phi-3-medium's keys are 10 heads of 128.
        made("ceil of rows", [("k", "BF16", &[1280, 5120])], "--tp 4")
            .rules(r#"{ match = "k", shard = { dim = 0, split = "ceil" } },"#)
            .on(2, [dest("k", "BF16", [320, 5120]).file([run(640 * 10_240, 320 * 10_240)])]),
        made("balanced heads", [("k", "BF16", &[1280, 5120])], "--tp 4")
            .rules(r#"{ match = "k", shard = { dim = 0, split = "balanced", unit = 128 } },"#)
            .on(0, [dest("k", "BF16", [384, 5120]).file([run(0, 384 * 10_240)])])
            .on(1, [dest("k", "BF16", [384, 5120]).file([run(384 * 10_240, 384 * 10_240)])])
            .on(2, [dest("k", "BF16", [256, 5120]).file([run(768 * 10_240, 256 * 10_240)])])
            .on(3, [dest("k", "BF16", [256, 5120]).file([run(1024 * 10_240, 256 * 10_240)])]),
        // Meta's rows of a head are pairs; engines have the first of all pairs before the second.
        made("rope", [("layers.0.attention.wk.weight", "BF16", &[1024, 4096])], "--tp 4")
            .rules(
                r#"{ match = "layers.*.attention.wk.weight", steps = [
                    { view = [8, 64, 2, 4096] }, { shard = { dim = 0 } }, { permute = [0, 2, 1, 3] },
                    { merge = { dim = 0, count = 3 } } ] },"#,
            )
            .on(
                1,
                [dest("layers.0.attention.wk.weight", "BF16", [256, 4096])
                    .file([run(2_097_152, 2_097_152)])
                    .landing([runs(64, 8192, 2_097_152, 16_384).times(2, 8192).times(2, 1_048_576)])],
            ),
        case("49, ceil", Gpt2 { layers: 1, hidden: 9, heads: 9, ..Gpt2::GPT_2 }.model(), "--tp 4")
            .rules(r#"{ match = "ln_f.weight", shard = { dim = 0, split = "ceil" } },"#)
            .on(2, [dest("ln_f.weight", "F32", [3]).file([run(24, 12)])])
            .on(3, [dest("ln_f.weight", "F32", [0]).file([])]),
        made("49, columns", [("w", "F4", &[4, 6])], "--tp 1")
            .rules(r#"{ match = "w", steps = [{ slice = { dim = 1, start = 2, len = 2 } }] },"#)
            .on(0, [dest("w", "F4", [4, 2]).file([runs(4, 1, 1, 3)])]),
        made("49, rows", [("w", "F4", &[4, 3])], "--tp 1")
            .rules(r#"{ match = "w", steps = [{ slice = { dim = 0, start = 2, len = 2 } }] },"#)
            .on(0, [dest("w", "F4", [2, 3]).file([run(3, 3)])]),
    ]
}

pub(crate) fn biases() -> Vec<Case> {
    const BIAS: &str = "h.0.self_attention.dense.bias";
    let whole = || dest(BIAS, "BF16", [14_336]).file([run(0, 28_672)]);
    vec![
        case("10, everywhere", bloom(), "--tp 8").on(0, [whole()]).on(1, [whole()]),
        case("10, rank 0", bloom(), "--tp 8")
            .rules(r#"{ match = "h.*.self_attention.dense.bias", replicate = true, where = { by = "tp", part = 0 } },"#)
            .on(0, [whole()])
            .on(1, [absent(BIAS)]),
        case("10, zeros", bloom(), "--tp 8")
            .rules(
                r#"{ match = "h.*.self_attention.dense.bias", steps = [
                    { on = { by = "tp", part = 0, fill = "zero" } } ] },"#,
            )
            .on(0, [whole()])
            .on(1, [dest(BIAS, "BF16", [14_336]).file([]).fill("zero", 28_672)]),
    ]
}

pub(crate) fn vocabularies() -> Vec<Case> {
    const EMBEDDING: &str = "word_embeddings.weight";
    const WTE: &str = "wte.weight";
    let row = 768 * 4;
    vec![
        case("11", bloom(), "--tp 8")
            .rules(
                r#"{ match = "word_embeddings.weight", steps = [
                    { pad = { dim = 0, to = 250880, fill = "zero" } }, { shard = { dim = 0 } } ] },"#,
            )
            .on(3, [dest(EMBEDDING, "BF16", [31_360, 14_336]).file([run(2_697_461_760, 899_153_920)])]),
        case("42, vLLM", gpt2(), "--tp 8")
            .rules(
                r#"{ match = "wte.weight", steps = [
                    { pad = { dim = 0, to = 50304, fill = "zero" } }, { shard = { dim = 0 } } ] },"#,
            )
            .on(0, [dest(WTE, "F32", [6288, 768]).file([run(0, 6288 * row)])])
            .on(
                7,
                [dest(WTE, "F32", [6288, 768])
                    .file([run(44_016 * row, 6241 * row)])
                    .fill("zero", 47 * row)
                    .element([6240, 0], byte(50_256 * row))
                    .filled([6241, 0])],
            ),
        case("42, HF", gpt2(), "--tp 8")
            .rules(r#"{ match = "wte.weight", shard = { dim = 0, split = "ceil" } },"#)
            .on(7, [dest(WTE, "F32", [6276, 768]).file([run(43_981 * row, 6276 * row)])]),
        case("42, TGI", gpt2(), "--tp 8")
            .rules(
                r#"{ match = "wte.weight", expr.concat = { dim = 0, parts = [
                    { steps = [{ shard = { dim = 0, split = "ceil" } }] },
                    { const = { dtype = "f32", dims = [1, 768], fill = "zero" } } ] } },"#,
            )
            .on(0, [dest(WTE, "F32", [6284, 768]).file([run(0, 6283 * row)]).fill("zero", row)])
            .on(
                7,
                [dest(WTE, "F32", [6277, 768])
                    .file([run(43_981 * row, 6276 * row)])
                    .fill("zero", row)
                    .element([6275, 1], byte(50_256 * row + 4))
                    .filled([6276, 1])],
            ),
        // SGLang pads to 64 rows for each rank where the ranks do not divide what is padded to 64.
        case("SGLang", gpt2(), "--tp 5")
            .rules(
                r#"{ match = "wte.weight", steps = [
                    { pad = { dim = 0, to = 50560, fill = "zero" } }, { shard = { dim = 0 } } ] },"#,
            )
            .on(4, [dest(WTE, "F32", [10_112, 768]).file([run(40_448 * row, 9809 * row)]).fill("zero", 303 * row)]),
        // DeepSpeed divides embeddings along the hidden size.
        case("DeepSpeed", gpt2(), "--tp 4")
            .rules(r#"{ match = "wte.weight", shard = { dim = 1 } },"#)
            .on(1, [dest(WTE, "F32", [50_257, 192]).file([runs(50_257, 768, 768, row)])]),
        // Rows that an adapter adds are padded and cut by themselves.
        made("added tokens", [("embed", "BF16", &[32_019, 4096])], "--tp 8")
            .rules(
                r#"{ match = "embed", expr.concat = { dim = 0, parts = [
                    { steps = [{ slice = { dim = 0, start = 0, len = 32003 } },
                        { pad = { dim = 0, to = 32064, fill = "zero" } }, { shard = { dim = 0 } }] },
                    { steps = [{ slice = { dim = 0, start = 32003, len = 16 } },
                        { pad = { dim = 0, to = 64, fill = "zero" } }, { shard = { dim = 0 } }] } ] } },"#,
            )
            .on(
                1,
                [dest("embed", "BF16", [4016, 4096])
                    .landing([run(4008 * 8192, 4008 * 8192), run(32_011 * 8192, 8 * 8192)])],
            )
            .on(
                7,
                [dest("embed", "BF16", [4016, 4096])
                    .landing([run(28_056 * 8192, 3947 * 8192)])
                    .fill("zero", (61 + 8) * 8192)
                    .filled([3947, 0])],
            ),
    ]
}

/// Tied heads, adapters, partitions that are divided already.
pub(crate) fn others() -> Vec<Case> {
    const A: &str = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let tied = || Llama { layers: 2, ..Llama::QWEN_2_5_0_5B }.model();
    let embedding = "model.embed_tokens.weight";
    let row = 896 * 2;
    let partition = || {
        made("50", [("model.norm.weight", "BF16", &[4096]), ("lm_head.weight", "BF16", &[16_000, 4096])], "--tp 1")
            .file("model-rank-1-part-0.safetensors")
    };
    vec![
        // The embedding is on the first stage and, as the head, on the last.
        case("tied", tied(), "--pp 2")
            .on(0, [dest(embedding, "BF16", [151_936, 896]).file([run(0, 151_936 * row)]), absent("lm_head.weight")])
            .on(
                1,
                [
                    dest(embedding, "BF16", [151_936, 896]).file([run(0, 151_936 * row)]),
                    dest("lm_head.weight", "BF16", [151_936, 896]).alias_of(embedding),
                ],
            ),
        case("48", llama_8b().adapter(16, &["q_proj", "o_proj"]), "--tp 4")
            .rules(
                r#"{ match = "**.q_proj.lora_B.weight", shard = { dim = 0 } },
                   { match = "**.o_proj.lora_A.weight", shard = { dim = 1 } },"#,
            )
            .on(
                1,
                [
                    dest(B, "F32", [1024, 16]).file([run(65_536, 65_536)]),
                    dest(A, "F32", [16, 1024]).file([runs(16, 4096, 4096, 16_384)]),
                    dest("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "F32", [16, 4096])
                        .file([run(0, 262_144)]),
                ],
            ),
        partition().on(
            0,
            [
                dest("model.norm.weight", "BF16", [4096]).file([run(0, 8192)]),
                dest("lm_head.weight", "BF16", [16_000, 4096]).file([run(0, 131_072_000)]),
            ],
        ),
        partition()
            .rules(r#"{ match = "lm_head.weight", steps = [{ pad = { dim = 0, to = 16032, fill = "zero" } }] },"#)
            .on(0, [dest("lm_head.weight", "BF16", [16_032, 4096]).file([run(0, 131_072_000)]).fill("zero", 262_144)]),
    ]
}

/// GPT-2 stores its matrices with the inputs outside.
pub(crate) fn transposed() -> Vec<Case> {
    const C_ATTN: &str = "h.0.attn.c_attn.weight";
    const C_PROJ: &str = "h.0.attn.c_proj.weight";
    let file = || runs(768, 1536, 1536, 9216).times(3, 3072);
    vec![
        case("17", gpt2(), "--tp 2")
            .rules(
                r#"{ match = "h.*.attn.c_attn.weight", steps = [
                    { view = [768, 3, 768] }, { shard = { dim = 2 } }, { permute = [1, 2, 0] },
                    { merge = { dim = 0, count = 2 } } ] },"#,
            )
            .on(
                1,
                [dest(C_ATTN, "F32", [1152, 768])
                    .file([file()])
                    // Row 384 is the first of the keys that are this rank's, column 5 the input.
                    .element([0, 0], byte(1536))
                    .element([384, 5], byte(5 * 9216 + 3072 + 1536))
                    .element([1151, 767], byte(767 * 9216 + 9212))],
            ),
        // As it lies on disk.
        case("17, plain", gpt2(), "--tp 2").on(1, [dest(C_ATTN, "F32", [768, 1152]).file([file()])]),
        case("18", gpt2(), "--tp 2")
            .rules(r#"{ match = "h.*.attn.c_proj.weight", shard = { dim = 0 }, transpose = true },"#)
            .on(
                1,
                [dest(C_PROJ, "F32", [768, 384])
                    .file([run(1_179_648, 1_179_648)])
                    .element([1, 0], byte(1_179_652))
                    .element([2, 3], byte(1_179_648 + 3 * 3072 + 8))],
            ),
    ]
}
