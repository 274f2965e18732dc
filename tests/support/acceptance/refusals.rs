//! What cannot be: the data of each error.

use super::{Case, Refusal, case, made};
use crate::support::released::{DeepSeek, Experts, Falcon, GptOss, Kind, Llama, Phi3, Qwen3Next, Scheme};

fn refusal(rule: &'static str, tensor: &'static str, expected: &'static str, found: &'static str) -> Refusal<'static> {
    Refusal { rule, tensor: Some(tensor), expected: Some(expected), found: Some(found), rank: None }
}

pub(crate) fn cases() -> Vec<Case> {
    const FALCON: &str = "transformer.h.0.self_attention.query_key_value.weight";
    const DOWN: &str = "model.layers.0.mlp.down_proj.qweight";
    const EXPERT: &str = "model.layers.0.mlp.experts.0.down_proj.weight";
    const GATE: &str = "model.layers.0.mlp.experts.0.gate_proj.weight";
    const DENSE: &str = "transformer.h.0.self_attention.dense.weight";
    let falcon = || Falcon { layers: 1, ..Falcon::FALCON_7B }.model();
    let phi = || Phi3 { layers: 1, ..Phi3::PHI_3_MEDIUM }.model();
    let gptq = Scheme::Gptq { group: 128, act_order: false, bias: false };
    let llama_2 = || Llama { layers: 1, scheme: gptq, ..Llama::LLAMA_2_7B }.model();
    let mut deepseek = DeepSeek { layers: 1, dense_layers: 0, mtp_layers: 0, files: 1, ..DeepSeek::V3 };
    deepseek.experts.count = 2;
    let qwen = Llama {
        layers: 1,
        experts: Some(Experts { count: 2, per_token: 2, intermediate: 1536 }),
        scheme: Scheme::Fp8Block { size: 128 },
        ..Llama::QWEN_3_235B_A22B
    };
    vec![
        case("15", falcon(), "--tp 2").refused(refusal(
            "not-divisible",
            DENSE,
            "a divisor of 71 units: 1, 71",
            "2 parts",
        )),
        case("15", falcon(), "--tp 16").refused(refusal(
            "not-divisible",
            DENSE,
            "a divisor of 71 units: 1, 71",
            "16 parts",
        )),
        case("15, heads", falcon(), "--tp 7")
            .rules(
                r#"{ match = "**.query_key_value.weight", expr.concat = { dim = 0, parts = [
                    { steps = [{ slice = { dim = 0, start = 0, len = 4544 } }, { shard = { dim = 0, unit = 64 } }] },
                    { steps = [{ slice = { dim = 0, start = 4544, len = 128 } }] } ] } },"#,
            )
            .refused(refusal("not-divisible", FALCON, "a divisor of 71 units: 1, 71", "7 parts")),
        case("19, 4 ranks", phi(), "--tp 4").refused(refusal(
            "not-divisible",
            "model.layers.0.self_attn.qkv_proj.weight",
            "a multiple or a divisor of 10 units: 1, 2, 5, 10",
            "4 parts",
        )),
        case("29", deepseek.model(), "--tp 32").refused(refusal(
            "not-divisible",
            EXPERT,
            "a divisor of 16 units: 1, 2, 4, 8, 16",
            "32 parts",
        )),
        case("192 rows", qwen.model(), "--tp 8").refused(refusal(
            "not-divisible",
            GATE,
            "a divisor of 12 units: 1, 2, 3, 4, 6, 12",
            "8 parts",
        )),
        case("38, groups", llama_2(), "--tp 4").refused(refusal(
            "not-divisible",
            DOWN,
            "a divisor of 86 units: 1, 2, 43, 86",
            "4 parts",
        )),
        case("shared heads, HF", Llama { layers: 1, ..Llama::LLAMA_3_1_8B }.model(), "--tp 16 --target hf").refused(
            refusal(
                "not-divisible",
                "model.layers.0.self_attn.k_proj.weight",
                "a divisor of 8 units: 1, 2, 4, 8",
                "16 parts",
            ),
        ),
        made("49, columns", [("w", "F4", &[4, 6])], "--tp 1")
            .rules(r#"{ match = "w", steps = [{ slice = { dim = 1, start = 1, len = 2 } }] },"#)
            .refused(refusal("cut-not-on-bytes", "w", "a multiple of 2 elements", "1")),
        made("49, rows", [("w", "F4", &[4, 3])], "--tp 1")
            .rules(r#"{ match = "w", steps = [{ slice = { dim = 0, start = 1, len = 1 } }] },"#)
            .refused(refusal("cut-not-on-bytes", "w", "a multiple of 2 elements", "3")),
        // The last of 4 ranks has nothing to take the first index of.
        made("one rank", [("w", "BF16", &[9])], "--tp 4")
            .rules(
                r#"{ match = "w", steps = [
                    { shard = { dim = 0, split = "ceil" } }, { slice = { dim = 0, start = 0, len = 1 } } ] },"#,
            )
            .refused(Refusal { rank: Some(3), ..refusal("slice", "w", "indices below 0", "1 from 0 by 1") }),
        made("wrong units", [("w", "BF16", &[2048, 64])], "--tp 2")
            .rules(r#"{ match = "w", shard = { dim = 0, unit = 128, units = 32 } },"#)
            .refused(refusal("units", "w", "32 units of 128", "2048")),
        made("partial unit", [("w", "BF16", &[1300, 64])], "--tp 2")
            .rules(r#"{ match = "w", shard = { dim = 0, unit = 128 } },"#)
            .refused(refusal("unit", "w", "a multiple of 128, or 1 part", "1300 in 2 parts")),
        made("unused", [("w", "BF16", &[4])], "--tp 2")
            .rules(r#"{ match = "v", replicate = true },"#)
            .refused(Refusal { tensor: None, expected: None, found: None, ..refusal("unused-rule", "", "", "") }),
        made("view", [("w", "BF16", &[30])], "--tp 2")
            .rules(r#"{ match = "w", steps = [{ view = [4, 7] }] },"#)
            .refused(refusal("view", "w", "a split of [30]", "[4,7]")),
        made("table", [("w", "BF16", &[4])], "--tp 2")
            .rules(r#"{ match = "w", shard = { dim = 0, split = { table = [[0, 1], [2]] } } },"#)
            .refused(refusal("table", "w", "each of 0..4", "none of 3..4")),
        made("no source", [("w", "BF16", &[4])], "--tp 2")
            .rules(r#"{ match = "w", expr.concat = { dim = 0, parts = [{}, { tensor = "v" }] } },"#)
            .refused(Refusal { expected: None, found: None, ..refusal("source", "w", "", "") }),
        made("two types", [("v", "F32", &[4]), ("w", "BF16", &[4])], "--tp 2")
            .rules(
                r#"{ match = "w", expr.concat = { dim = 0, parts = [{}, { tensor = "v" }] } },
                   { match = "v", part = true },"#,
            )
            .refused(refusal("concat", "w", "BF16", "F32")),
        made("cast of a packed type", [("w", "I32", &[4])], "--tp 2")
            .rules(r#"{ match = "w", replicate = true, cast = "bf16" },"#)
            .refused(refusal(
                "cast",
                "w",
                "F16, BF16 or F32 to another of them, F8_E4M3 or F8_E5M2 to one of them",
                "I32 to BF16",
            )),
        // Rows of bitsandbytes lie one after the other in a column of bytes.
        case("flat", Llama { scheme: Scheme::Nf4, ..Llama::TINY }.model(), "--tp 2").refused(refusal(
            "quantization",
            "model.layers.0.mlp.down_proj.weight",
            "1 part",
            "2 parts",
        )),
        // 90 blocks, of which 4 ranks have different numbers: only targets know what to do with them.
        case("34, plain", GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model(), "--tp 4").refused(refusal(
            "not-divisible",
            "model.layers.0.mlp.experts.down_proj_blocks",
            "a divisor of 90 units: 1, 2, 3, 5, 6, 9, 10, 15, 18, 30, 45, 90",
            "4 parts",
        )),
        case("44, key heads", Qwen3Next::TINY.model(), "--tp 16").refused(refusal(
            "not-divisible",
            "model.layers.0.linear_attn.conv1d.weight",
            "a divisor of 8 units: 1, 2, 4, 8",
            "16 parts",
        )),
        case("experts", Llama { kv_heads: 8, ..Llama::tiny(Kind::Qwen3Moe) }.model(), "--dp 16 --ep 16").refused(
            refusal(
                "not-divisible",
                "model.layers.0.mlp.experts.0.down_proj.weight",
                "a divisor of 8 units: 1, 2, 4, 8",
                "16 parts",
            ),
        ),
        case("stages", Llama { layers: 80, ..Llama::TINY }.model(), "--pp 3").refused(Refusal {
            tensor: None,
            ..refusal("stages", "", "a divisor of 80 layers: 1, 2, 4, 5, 8, 10, 16, 20, 40, 80", "3 stages")
        }),
    ]
}
