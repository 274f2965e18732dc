//! Lists: a small model of every family, and every quantised layout.

use super::{
    Bert, Bloom, Dbrx, DeepSeek, Falcon, Gemma, Gpt2, GptNeox, GptOss, InternLm2, Kind, Llama, Llama4, Model, Mpt,
    Phi3, Qwen3Next, Scheme,
};

/// A small model of every family, and the kinds of quantised layers as tiny Llamas.
pub(crate) fn tiny() -> Vec<(String, Model)> {
    let named = |(name, model): (&str, Model)| (name.to_owned(), model);
    let families = [
        ("qwen3-next", Qwen3Next::TINY.model()),
        ("gemma2", Gemma::TINY_2.model()),
        ("gemma3", Gemma::TINY_3.model()),
        ("gemma3 with vision", Gemma::TINY_3_VISION.model()),
        ("phi3", Phi3::TINY.model()),
        ("gpt2", Gpt2::TINY.model()),
        ("gpt2, later", Gpt2 { later: true, ..Gpt2::TINY }.model()),
        ("gpt_neox", GptNeox::TINY.model()),
        ("bloom", Bloom::TINY.model()),
        ("falcon, old", Falcon::TINY_OLD.model()),
        ("falcon, new", Falcon::TINY_NEW.model()),
        ("falcon, rw", Falcon::TINY_RW.model()),
        ("mpt", Mpt::TINY.model()),
        ("dbrx", Dbrx::TINY.model()),
        ("internlm2", InternLm2::TINY.model()),
        ("deepseek_v2", DeepSeek::TINY_V2.model()),
        ("deepseek_v3", DeepSeek::TINY_V3.model()),
        ("gpt_oss", GptOss::TINY.model()),
        ("gpt_oss in BF16", GptOss { mxfp4: false, ..GptOss::TINY }.model()),
        ("llama4", Llama4::TINY.model()),
        ("bert", Bert::TINY.model()),
    ];
    let kinds = [Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3, Kind::Mixtral, Kind::Qwen3Moe];
    let kinds = kinds.map(|kind| (format!("{kind:?}"), Llama::tiny(kind).model()));
    let schemes = schemes(16).map(|scheme| (format!("{scheme:?}"), Llama { scheme, ..Llama::TINY }.model()));
    families.map(named).into_iter().chain(kinds).chain(schemes).collect()
}

/// Every quantised layout, with groups of this size where there is a choice.
pub(crate) fn schemes(group: u64) -> [Scheme; 13] {
    [
        Scheme::Gptq { group, act_order: false, bias: false },
        Scheme::Gptq { group, act_order: true, bias: true },
        Scheme::Awq { group },
        Scheme::Packed { group, symmetric: true },
        Scheme::Packed { group, symmetric: false },
        Scheme::Fp8Tensor,
        Scheme::Fp8Channel,
        Scheme::Fbgemm { layers: 32 },
        Scheme::Fp8Block { size: group },
        Scheme::Nvfp4 { kv_scales: true },
        Scheme::Nvfp4Packed,
        Scheme::Mxfp8,
        Scheme::Nf4,
    ]
}
