//! Queries, keys and values, or gates and ups, in one tensor.

use super::{Case, case, dest, made, run, runs};
use crate::support::released::{Bloom, Falcon, Model, Mpt, Phi3, Qwen3Next};

fn bloom() -> Model {
    Bloom { layers: 1, files: 3, ..Bloom::BLOOM_176B }.model()
}

fn phi() -> Model {
    Phi3 { layers: 1, ..Phi3::PHI_3_MEDIUM }.model()
}

fn qwen() -> Model {
    let mut model = Qwen3Next { layers: 4, mtp: false, files: 1, ..Qwen3Next::QWEN_3_NEXT_80B_A3B };
    model.experts.count = 8;
    model.model()
}

pub(crate) fn cases() -> Vec<Case> {
    const BLOOM: &str = "h.0.self_attention.query_key_value.weight";
    const BLOOM_BIAS: &str = "h.0.self_attention.query_key_value.bias";
    const FALCON: &str = "transformer.h.0.self_attention.query_key_value.weight";
    let falcon = || Falcon { layers: 1, ..Falcon::FALCON_40B }.model();
    let (row, phi_row, mpt_row) = (16_384, 10_240, 8192);
    let rows = |from: u64, to: u64, row: u64| run(from * row, (to - from) * row);
    vec![
        case("7", bloom(), "--tp 8").on(2, [dest(BLOOM, "BF16", [5376, 14_336]).file([run(308_281_344, 154_140_672)])]),
        case("9", bloom(), "--tp 8").on(2, [dest(BLOOM_BIAS, "BF16", [5376]).file([run(21_504, 10_752)])]),
        case("9, grouped", bloom(), "--tp 8")
            .rules(
                r#"{ match = "h.*.self_attention.query_key_value.bias", steps = [
                    { view = [112, 3, 128] }, { shard = { dim = 0 } }, { permute = [1, 0, 2] },
                    { merge = { dim = 0, count = 3 } } ] },
                   { match = "h.*.self_attention.query_key_value.weight", steps = [
                    { view = [112, 3, 128, 14336] }, { shard = { dim = 0 } }, { permute = [1, 0, 2, 3] },
                    { merge = { dim = 0, count = 3 } } ] },"#,
            )
            .on(
                2,
                [
                    dest(BLOOM_BIAS, "BF16", [5376])
                        .file([run(21_504, 10_752)])
                        .landing([runs(14, 256, 21_504, 768).times(3, 256)]),
                    dest(BLOOM, "BF16", [5376, 14_336])
                        .landing([runs(14, 3_670_016, 308_281_344, 11_010_048).times(3, 3_670_016)]),
                ],
            ),
        case("13", falcon(), "--tp 4").rules(FALCON_REGROUPED).on(
            3,
            [dest(FALCON, "BF16", [2304, 8192]).landing([
                rows(6912, 7936, row),
                rows(8064, 9088, row),
                rows(7936, 8000, row),
                rows(9088, 9152, row),
                rows(8000, 8064, row),
                rows(9152, 9216, row),
            ])],
        ),
        case("13, as it lies", falcon(), "--tp 4")
            .on(3, [dest(FALCON, "BF16", [2304, 8192]).file([rows(6912, 9216, row)])]),
        case("19", phi(), "--tp 2").on(
            1,
            [dest("model.layers.0.self_attn.qkv_proj.weight", "BF16", [3840, 5120]).landing([
                rows(2560, 5120, phi_row),
                rows(5760, 6400, phi_row),
                rows(7040, 7680, phi_row),
            ])],
        ),
        // 10 key-value heads are not for 4 ranks; gates and ups do not depend on them.
        case("21", phi(), "--tp 4")
            .rules(
                r#"{ match = "**.gate_up_proj.weight", expr.concat = { dim = 0, parts = [
                    { steps = [{ slice = { dim = 0, start = 0, len = 17920 } }, { shard = { dim = 0 } }] },
                    { steps = [{ slice = { dim = 0, start = 17920, len = 17920 } }, { shard = { dim = 0 } }] },
                ] } },"#,
            )
            .on(
                2,
                [dest("model.layers.0.mlp.gate_up_proj.weight", "BF16", [8960, 5120])
                    .landing([run(8960 * phi_row, 45_875_200), run(26_880 * phi_row, 45_875_200)])],
            ),
        case("21, plain", phi(), "--tp 2").on(
            1,
            [dest("model.layers.0.mlp.gate_up_proj.weight", "BF16", [17_920, 5120])
                .landing([rows(8960, 17_920, phi_row), rows(26_880, 35_840, phi_row)])],
        ),
        case("22", Mpt { layers: 1, ..Mpt::MPT_7B }.model(), "--tp 2").on(
            0,
            [dest("transformer.blocks.0.attn.Wqkv.weight", "BF16", [6144, 4096]).landing([
                rows(0, 2048, mpt_row),
                rows(4096, 6144, mpt_row),
                rows(8192, 10_240, mpt_row),
            ])],
        ),
        // Queries, values and keys in each of 4 parts that CodeGen's training had: 16 heads of 256.
        made("CodeGen", [("qkv_proj.weight", "F16", &[12_288, 4096])], "--tp 2")
            .rules(
                r#"{ match = "qkv_proj.weight", steps = [
                    { view = [4, 3, 1024, 4096] }, { shard = { dim = 2, unit = 256 } },
                    { merge = { dim = 0, count = 3 } } ] },"#,
            )
            .on(1, [dest("qkv_proj.weight", "F16", [6144, 4096]).landing([runs(12, 4_194_304, 4_194_304, 8_388_608)])]),
    ]
}

/// Case 44: linear attention and gated heads.
pub(crate) fn qwen3_next() -> Vec<Case> {
    let (qkvz, conv) = ("model.layers.0.linear_attn.in_proj_qkvz.weight", "model.layers.0.linear_attn.conv1d.weight");
    let (q, k) = ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight");
    let linear = || {
        [
            dest(qkvz, "BF16", [3072, 2048]).file([run(12_582_912, 12_582_912)]),
            dest(conv, "BF16", [2048, 1, 4]).landing([run(512 * 8, 4096), run(2560 * 8, 4096), run(5120 * 8, 8192)]),
        ]
    };
    let full = || {
        [
            dest(q, "BF16", [1024, 2048]).file([run(12_582_912, 4_194_304)]),
            dest(k, "BF16", [256, 2048]).file([run(0, 1_048_576)]),
        ]
    };
    const RULES: &str = r#"
        { match = "**.in_proj_qkvz.weight", shard = { dim = 0, unit = 768, units = 16 } },
        { match = "**.q_proj.weight", shard = { dim = 0, unit = 512, units = 16 } },
        { match = "**.k_proj.weight", shard = { dim = 0, unit = 256, units = 2, replicate_units = true } },
        { match = "**.conv1d.weight", expr.concat = { dim = 0, parts = [
            { steps = [{ slice = { dim = 0, start = 0, len = 2048 } }, { shard = { dim = 0, unit = 128 } }] },
            { steps = [{ slice = { dim = 0, start = 2048, len = 2048 } }, { shard = { dim = 0, unit = 128 } }] },
            { steps = [{ slice = { dim = 0, start = 4096, len = 4096 } }, { shard = { dim = 0, unit = 256 } }] } ] } },"#;
    vec![
        case("44", qwen(), "--tp 4").on(1, linear()),
        case("44", qwen(), "--tp 8").on(3, full()),
        case("44, rules", qwen(), "--tp 4").rules(RULES).on(1, linear()),
        case("44, rules", qwen(), "--tp 8").rules(RULES).on(3, full()),
    ]
}

/// 8 groups of 16 queries, a key and a value: all queries, then all keys, then all values.
const FALCON_REGROUPED: &str = r#"
{ match = "transformer.h.*.self_attention.query_key_value.weight", expr.concat = { dim = 0, parts = [
  { steps = [{ view = [8, 18, 64, 8192] }, { shard = { dim = 0 } }, { slice = { dim = 1, start = 0, len = 16 } },
    { merge = { dim = 0, count = 3 } }] },
  { steps = [{ view = [8, 18, 64, 8192] }, { shard = { dim = 0 } }, { slice = { dim = 1, start = 16, len = 1 } },
    { merge = { dim = 0, count = 3 } }] },
  { steps = [{ view = [8, 18, 64, 8192] }, { shard = { dim = 0 } }, { slice = { dim = 1, start = 17, len = 1 } },
    { merge = { dim = 0, count = 3 } }] },
] } },"#;
