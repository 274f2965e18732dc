//! What cannot be: the data of each error.

use super::{Case, Refusal, case, made};
use crate::support::released::{DeepSeek, Experts, Falcon, Llama, Phi3, Scheme};

fn refusal(rule: &'static str, tensor: &'static str, expected: &'static str, found: &'static str) -> Refusal<'static> {
    Refusal { rule, tensor: Some(tensor), expected: Some(expected), found: Some(found), rank: None }
}

pub(crate) fn cases() -> Vec<Case> {
    const FALCON: &str = "transformer.h.0.self_attention.query_key_value.weight";
    const DOWN: &str = "model.layers.0.mlp.down_proj.qweight";
    const GATE: &str = "model.layers.0.mlp.experts.0.gate_proj.weight";
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
            FALCON,
            "a divisor of 71 units: 1, 71",
            "2 parts",
        )),
        case("15", falcon(), "--tp 16").refused(refusal(
            "not-divisible",
            FALCON,
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
            "",
            "4 parts",
        )),
        case("29", deepseek.model(), "--tp 32").refused(refusal(
            "not-divisible",
            GATE,
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
        case("42, HF heads", Llama { layers: 1, ..Llama::LLAMA_3_1_8B }.model(), "--tp 16 --target hf")
            .refused(refusal("", "", "", "")),
        made("49, columns", [("w", "F4", &[4, 6])], "--tp 1")
            .rules(r#"{ match = "w", steps = [{ slice = { dim = 1, start = 1, len = 2 } }] },"#)
            .refused(refusal("cut-not-on-bytes", "w", "", "")),
        made("49, rows", [("w", "F4", &[4, 3])], "--tp 1")
            .rules(r#"{ match = "w", steps = [{ slice = { dim = 0, start = 1, len = 1 } }] },"#)
            .refused(refusal("cut-not-on-bytes", "w", "", "")),
    ]
}
