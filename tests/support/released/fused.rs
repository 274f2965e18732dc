//! Models that store q, k and v as one tensor without biases: Phi-3, InternLM2, Falcon, MPT, DBRX.

use serde_json::json;
use shardlift::Dtype;

use super::{Experts, Model, Scheme, Tensors};

/// `Phi3Config`: `qkv_proj` is [q; k; v], `gate_up_proj` is [gate; up].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Phi3 {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) files: usize,
}

impl Phi3 {
    /// microsoft/Phi-3-medium-4k-instruct
    pub(crate) const PHI_3_MEDIUM: Phi3 =
        Phi3 { layers: 40, hidden: 5120, heads: 40, kv_heads: 10, intermediate: 17_920, vocab: 32_064, files: 6 };

    pub(crate) const TINY: Phi3 =
        Phi3 { layers: 2, hidden: 64, heads: 8, kv_heads: 2, intermediate: 96, vocab: 160, files: 1 };

    pub(crate) fn model(&self) -> Model {
        let &Phi3 { layers, hidden, heads, kv_heads, intermediate, vocab, files } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("model.embed_tokens", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("model.layers.{layer}");
            let rows = (heads + 2 * kv_heads) * (hidden / heads);
            tensors.linear(format!("{layer}.self_attn.qkv_proj"), rows, hidden, false);
            tensors.linear(format!("{layer}.self_attn.o_proj"), hidden, hidden, false);
            tensors.linear(format!("{layer}.mlp.gate_up_proj"), 2 * intermediate, hidden, false);
            tensors.linear(format!("{layer}.mlp.down_proj"), hidden, intermediate, false);
            tensors.norm(format!("{layer}.input_layernorm"), hidden, false);
            tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, false);
        }
        tensors.norm("model.norm", hidden, false);
        tensors.dense("lm_head", vocab, hidden, false);
        let config = json!({
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_hidden_layers": layers,
            "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate, "vocab_size": vocab, "tie_word_embeddings": false,
        });
        tensors.model(config, files)
    }
}

/// `InternLM2Config`, a class beside the model (internlm/internlm2-7b, `modeling_internlm2.py`): in `wqkv` every
/// key-value head follows its query heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InternLm2 {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) files: usize,
}

impl InternLm2 {
    /// internlm/internlm2-7b
    pub(crate) const INTERNLM_2_7B: InternLm2 =
        InternLm2 { layers: 32, hidden: 4096, heads: 32, kv_heads: 8, intermediate: 14_336, vocab: 92_544, files: 8 };

    pub(crate) const TINY: InternLm2 =
        InternLm2 { layers: 2, hidden: 64, heads: 16, kv_heads: 4, intermediate: 96, vocab: 160, files: 1 };

    pub(crate) fn model(&self) -> Model {
        let &InternLm2 { layers, hidden, heads, kv_heads, intermediate, vocab, files } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("model.tok_embeddings", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("model.layers.{layer}");
            let rows = (heads + 2 * kv_heads) * (hidden / heads);
            tensors.linear(format!("{layer}.attention.wqkv"), rows, hidden, false);
            tensors.linear(format!("{layer}.attention.wo"), hidden, hidden, false);
            // Gate, down, up.
            tensors.linear(format!("{layer}.feed_forward.w1"), intermediate, hidden, false);
            tensors.linear(format!("{layer}.feed_forward.w2"), hidden, intermediate, false);
            tensors.linear(format!("{layer}.feed_forward.w3"), intermediate, hidden, false);
            tensors.norm(format!("{layer}.attention_norm"), hidden, false);
            tensors.norm(format!("{layer}.ffn_norm"), hidden, false);
        }
        tensors.norm("model.norm", hidden, false);
        tensors.dense("output", vocab, hidden, false);
        let config = json!({
            "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "num_hidden_layers": layers,
            "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate, "vocab_size": vocab, "bias": false, "tie_word_embeddings": false,
        });
        tensors.model(config, files)
    }
}

/// `FalconConfig`. The new architecture interleaves by key-value head and has two norms; the old one has all query
/// heads, then one key and one value head, or without `multi_query` interleaves by head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Falcon {
    /// `new_decoder_architecture`
    pub(crate) new: bool,
    /// `multi_query`. Models without it are of the kind falcon-rw: ALiBi, biases, and the MLP after the attention.
    pub(crate) multi_query: bool,
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_kv_heads`, which the old architecture's configs name and its class ignores.
    pub(crate) kv_heads: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) files: usize,
}

impl Falcon {
    /// tiiuae/falcon-7b: 71 heads, which nothing divides.
    pub(crate) const FALCON_7B: Falcon = Falcon {
        new: false,
        multi_query: true,
        layers: 32,
        hidden: 4544,
        heads: 71,
        kv_heads: 71,
        vocab: 65_024,
        files: 2,
    };

    /// tiiuae/falcon-40b
    pub(crate) const FALCON_40B: Falcon =
        Falcon { new: true, layers: 60, hidden: 8192, heads: 128, kv_heads: 8, files: 9, ..Falcon::FALCON_7B };

    pub(crate) const TINY_OLD: Falcon =
        Falcon { layers: 2, hidden: 64, heads: 8, kv_heads: 8, vocab: 160, files: 1, ..Falcon::FALCON_7B };

    pub(crate) const TINY_NEW: Falcon = Falcon { new: true, heads: 16, kv_heads: 4, ..Falcon::TINY_OLD };

    pub(crate) const TINY_RW: Falcon = Falcon { multi_query: false, ..Falcon::TINY_OLD };

    pub(crate) fn model(&self) -> Model {
        let &Falcon { new, multi_query, layers, hidden, heads, kv_heads, vocab, files } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("transformer.word_embeddings", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("transformer.h.{layer}");
            let key_values = if new || !multi_query { kv_heads } else { 1 };
            let rows = (heads + 2 * key_values) * (hidden / heads);
            tensors.linear(format!("{layer}.self_attention.query_key_value"), rows, hidden, !multi_query);
            tensors.linear(format!("{layer}.self_attention.dense"), hidden, hidden, !multi_query);
            tensors.linear(format!("{layer}.mlp.dense_h_to_4h"), 4 * hidden, hidden, !multi_query);
            tensors.linear(format!("{layer}.mlp.dense_4h_to_h"), hidden, 4 * hidden, !multi_query);
            let norms = match (new, multi_query) {
                (true, _) => &["ln_attn", "ln_mlp"][..],
                (false, true) => &["input_layernorm"],
                (false, false) => &["input_layernorm", "post_attention_layernorm"],
            };
            for norm in norms {
                tensors.norm(format!("{layer}.{norm}"), hidden, true);
            }
        }
        tensors.norm("transformer.ln_f", hidden, true);
        // Stored although the class ties it to the embeddings where the config is silent.
        tensors.dense("lm_head", vocab, hidden, false);
        let config = json!({
            "architectures": ["FalconForCausalLM"], "model_type": "falcon", "num_hidden_layers": layers,
            "hidden_size": hidden, "num_attention_heads": heads, "num_kv_heads": kv_heads, "vocab_size": vocab,
            "new_decoder_architecture": new, "multi_query": multi_query, "parallel_attn": multi_query,
            "bias": !multi_query, "alibi": !multi_query,
        });
        tensors.model(config, files)
    }
}

/// `MptConfig`: `Wqkv` is [q; k; v], `no_bias`, the head tied to `wte`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mpt {
    /// `n_layers`
    pub(crate) layers: u64,
    /// `d_model`
    pub(crate) hidden: u64,
    /// `n_heads`
    pub(crate) heads: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) files: usize,
}

impl Mpt {
    /// mosaicml/mpt-7b
    pub(crate) const MPT_7B: Mpt = Mpt { layers: 32, hidden: 4096, heads: 32, vocab: 50_432, files: 2 };

    pub(crate) const TINY: Mpt = Mpt { layers: 2, hidden: 64, heads: 8, vocab: 160, files: 1 };

    pub(crate) fn model(&self) -> Model {
        let &Mpt { layers, hidden, heads, vocab, files } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("transformer.wte", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("transformer.blocks.{layer}");
            tensors.linear(format!("{layer}.attn.Wqkv"), 3 * hidden, hidden, false);
            tensors.linear(format!("{layer}.attn.out_proj"), hidden, hidden, false);
            tensors.linear(format!("{layer}.ffn.up_proj"), 4 * hidden, hidden, false);
            tensors.linear(format!("{layer}.ffn.down_proj"), hidden, 4 * hidden, false);
            tensors.norm(format!("{layer}.norm_1"), hidden, false);
            tensors.norm(format!("{layer}.norm_2"), hidden, false);
        }
        tensors.norm("transformer.norm_f", hidden, false);
        let config = json!({
            "architectures": ["MPTForCausalLM"], "model_type": "mpt", "n_layers": layers, "d_model": hidden,
            "n_heads": heads, "expansion_ratio": 4, "vocab_size": vocab, "no_bias": true,
            "attn_config": { "attn_type": "multihead_attention", "alibi": true, "qk_ln": false },
        });
        tensors.model(config, files)
    }
}

/// `DbrxConfig`: `Wqkv` is [q; k; v], experts lie one after the other in `w1`, `v1` and `w2`, all of [experts x
/// intermediate, hidden]: gate, up, and down transposed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dbrx {
    /// `n_layers`
    pub(crate) layers: u64,
    /// `d_model`
    pub(crate) hidden: u64,
    /// `n_heads`
    pub(crate) heads: u64,
    /// `attn_config.kv_n_heads`
    pub(crate) kv_heads: u64,
    /// `ffn_config`: `moe_num_experts`, `moe_top_k`, `ffn_hidden_size`
    pub(crate) experts: Experts,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) files: usize,
}

impl Dbrx {
    /// databricks/dbrx-instruct
    pub(crate) const DBRX: Dbrx = Dbrx {
        layers: 40,
        hidden: 6144,
        heads: 48,
        kv_heads: 8,
        experts: Experts { count: 16, per_token: 4, intermediate: 10_752 },
        vocab: 100_352,
        files: 61,
    };

    pub(crate) const TINY: Dbrx = Dbrx {
        layers: 2,
        hidden: 64,
        heads: 8,
        kv_heads: 2,
        experts: Experts { count: 8, per_token: 2, intermediate: 32 },
        vocab: 160,
        files: 1,
    };

    pub(crate) fn model(&self) -> Model {
        let &Dbrx { layers, hidden, heads, kv_heads, experts, vocab, files } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("transformer.wte", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("transformer.blocks.{layer}");
            let attention = format!("{layer}.norm_attn_norm");
            let rows = (heads + 2 * kv_heads) * (hidden / heads);
            tensors.linear(format!("{attention}.attn.Wqkv"), rows, hidden, false);
            tensors.linear(format!("{attention}.attn.out_proj"), hidden, hidden, false);
            tensors.norm(format!("{attention}.norm_1"), hidden, false);
            tensors.norm(format!("{attention}.norm_2"), hidden, false);
            tensors.dense(format!("{layer}.ffn.router.layer"), experts.count, hidden, false);
            for part in ["w1", "v1", "w2"] {
                let shape = [experts.count * experts.intermediate, hidden];
                tensors.plain(format!("{layer}.ffn.experts.mlp.{part}"), &shape);
            }
        }
        tensors.norm("transformer.norm_f", hidden, false);
        tensors.dense("lm_head", vocab, hidden, false);
        let config = json!({
            "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "n_layers": layers, "d_model": hidden,
            "n_heads": heads, "vocab_size": vocab, "tie_word_embeddings": false,
            "attn_config": { "kv_n_heads": kv_heads, "clip_qkv": 8, "rope_theta": 500_000 },
            "ffn_config": {
                "ffn_hidden_size": experts.intermediate, "moe_num_experts": experts.count,
                "moe_top_k": experts.per_token,
            },
        });
        tensors.model(config, files)
    }
}
