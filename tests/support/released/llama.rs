//! The Llama kind: Llama 2 and 3, Mistral, Qwen2.5, Qwen3, and the mixtures of experts with the same attention.

use serde_json::json;
use shardlift::Dtype;

use super::{Model, Scheme, Tensors};

/// Which config class and module names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Llama,
    Mistral,
    /// Biases of q, k and v.
    Qwen2,
    /// Norms of q and k for each head.
    Qwen3,
    /// Experts `block_sparse_moe.experts.E.{w1,w3,w2}`: gate, up, down.
    Mixtral,
    /// As Qwen3, with experts `mlp.experts.E.{gate,up,down}_proj`.
    Qwen3Moe,
}

/// Routed experts of every layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Experts {
    /// `num_local_experts` (Mixtral), `num_experts` (Qwen3).
    pub(crate) count: u64,
    /// `num_experts_per_tok`
    pub(crate) per_token: u64,
    /// `intermediate_size` (Mixtral), `moe_intermediate_size` (Qwen3).
    pub(crate) intermediate: u64,
}

/// `LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config`, `MixtralConfig` or `Qwen3MoeConfig`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Llama {
    pub(crate) kind: Kind,
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `head_dim`, which older configs leave out: hidden / heads.
    pub(crate) head_dim: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    pub(crate) experts: Option<Experts>,
    /// `vocab_size`
    pub(crate) vocab: u64,
    /// `tie_word_embeddings`: no `lm_head.weight`.
    pub(crate) tied: bool,
    /// Whether `rotary_emb.inv_freq` is stored, a buffer of older models.
    pub(crate) inv_freq: bool,
    pub(crate) dtype: Dtype,
    pub(crate) scheme: Scheme,
    pub(crate) files: usize,
}

impl Llama {
    /// meta-llama/Llama-2-7b-hf; the buffers in F32 are why the hub shows 6,738,417,664 elements.
    pub(crate) const LLAMA_2_7B: Llama = Llama {
        kind: Kind::Llama,
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        intermediate: 11_008,
        experts: None,
        vocab: 32_000,
        tied: false,
        inv_freq: true,
        dtype: Dtype::F16,
        scheme: Scheme::None,
        files: 2,
    };

    /// meta-llama/Llama-3.1-8B
    pub(crate) const LLAMA_3_1_8B: Llama = Llama {
        kv_heads: 8,
        intermediate: 14_336,
        vocab: 128_256,
        inv_freq: false,
        dtype: Dtype::Bf16,
        files: 4,
        ..Llama::LLAMA_2_7B
    };

    /// meta-llama/Llama-3.1-70B
    pub(crate) const LLAMA_3_1_70B: Llama =
        Llama { layers: 80, hidden: 8192, heads: 64, intermediate: 28_672, files: 30, ..Llama::LLAMA_3_1_8B };

    /// meta-llama/Llama-3.1-405B, with 8 key-value heads as since its second upload.
    pub(crate) const LLAMA_3_1_405B: Llama =
        Llama { layers: 126, hidden: 16_384, heads: 128, intermediate: 53_248, files: 191, ..Llama::LLAMA_3_1_8B };

    /// mistralai/Mistral-7B-v0.1
    pub(crate) const MISTRAL_7B: Llama = Llama { kind: Kind::Mistral, vocab: 32_000, files: 2, ..Llama::LLAMA_3_1_8B };

    /// mistralai/Mixtral-8x7B-v0.1
    pub(crate) const MIXTRAL_8X7B: Llama = Llama {
        kind: Kind::Mixtral,
        experts: Some(Experts { count: 8, per_token: 2, intermediate: 14_336 }),
        files: 19,
        ..Llama::MISTRAL_7B
    };

    /// Qwen/Qwen2.5-0.5B: tied, and 14 heads, which divide by 2 and 7 alone.
    pub(crate) const QWEN_2_5_0_5B: Llama = Llama {
        layers: 24,
        hidden: 896,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 4864,
        vocab: 151_936,
        tied: true,
        files: 1,
        ..Llama::QWEN_2_5_7B
    };

    /// Qwen/Qwen2.5-7B
    pub(crate) const QWEN_2_5_7B: Llama = Llama {
        kind: Kind::Qwen2,
        layers: 28,
        hidden: 3584,
        heads: 28,
        kv_heads: 4,
        intermediate: 18_944,
        vocab: 152_064,
        ..Llama::LLAMA_3_1_8B
    };

    /// Qwen/Qwen2.5-72B
    pub(crate) const QWEN_2_5_72B: Llama = Llama {
        layers: 80,
        hidden: 8192,
        heads: 64,
        kv_heads: 8,
        intermediate: 29_568,
        files: 37,
        ..Llama::QWEN_2_5_7B
    };

    /// Qwen/Qwen3-8B
    pub(crate) const QWEN_3_8B: Llama =
        Llama { kind: Kind::Qwen3, layers: 36, intermediate: 12_288, vocab: 151_936, files: 5, ..Llama::LLAMA_3_1_8B };

    /// Qwen/Qwen3-30B-A3B
    pub(crate) const QWEN_3_30B_A3B: Llama = Llama {
        kind: Kind::Qwen3Moe,
        layers: 48,
        hidden: 2048,
        kv_heads: 4,
        intermediate: 6144,
        experts: Some(Experts { count: 128, per_token: 8, intermediate: 768 }),
        files: 16,
        ..Llama::QWEN_3_8B
    };

    /// Qwen/Qwen3-235B-A22B
    pub(crate) const QWEN_3_235B_A22B: Llama = Llama {
        layers: 94,
        hidden: 4096,
        heads: 64,
        intermediate: 12_288,
        experts: Some(Experts { count: 128, per_token: 8, intermediate: 1536 }),
        files: 118,
        ..Llama::QWEN_3_30B_A3B
    };

    /// 8 heads and 2 key-value heads, so 4 and 8 ranks share these. Every cut is of whole groups of 16 and 32 inputs, for
    /// any [`Scheme`] but [`Scheme::Nf4`].
    pub(crate) const TINY: Llama = Llama {
        layers: 2,
        hidden: 64,
        heads: 8,
        kv_heads: 2,
        head_dim: 32,
        intermediate: 256,
        vocab: 160,
        files: 1,
        ..Llama::LLAMA_3_1_8B
    };

    /// The same numbers as another kind, with small experts where it has them.
    pub(crate) const fn tiny(kind: Kind) -> Llama {
        let experts = match kind {
            Kind::Mixtral | Kind::Qwen3Moe => Some(Experts { count: 8, per_token: 2, intermediate: 128 }),
            _ => None,
        };
        Llama { kind, experts, ..Llama::TINY }
    }

    pub(crate) fn model(&self) -> Model {
        let &Llama { kind, layers, hidden, heads, kv_heads, head_dim, intermediate, experts, vocab, .. } = self;
        let qwen3 = matches!(kind, Kind::Qwen3 | Kind::Qwen3Moe);
        let bias = kind == Kind::Qwen2;
        let mut tensors = Tensors::new(self.dtype, self.scheme);
        tensors.dense("model.embed_tokens", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("model.layers.{layer}");
            let attention = format!("{layer}.self_attn");
            tensors.norm(format!("{layer}.input_layernorm"), hidden, false);
            tensors.linear(format!("{attention}.q_proj"), heads * head_dim, hidden, bias);
            tensors.linear(format!("{attention}.k_proj"), kv_heads * head_dim, hidden, bias);
            tensors.linear(format!("{attention}.v_proj"), kv_heads * head_dim, hidden, bias);
            tensors.linear(format!("{attention}.o_proj"), hidden, heads * head_dim, false);
            if qwen3 {
                tensors.norm(format!("{attention}.q_norm"), head_dim, false);
                tensors.norm(format!("{attention}.k_norm"), head_dim, false);
            }
            if self.inv_freq {
                tensors.typed(format!("{attention}.rotary_emb.inv_freq"), Dtype::F32, &[head_dim / 2]);
            }
            tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, false);
            match (kind, experts) {
                (Kind::Mixtral, Some(experts)) => {
                    let moe = format!("{layer}.block_sparse_moe");
                    tensors.dense(format!("{moe}.gate"), experts.count, hidden, false);
                    for expert in 0..experts.count {
                        for (name, rows, columns) in [
                            ("w1", experts.intermediate, hidden),
                            ("w2", hidden, experts.intermediate),
                            ("w3", experts.intermediate, hidden),
                        ] {
                            tensors.linear(format!("{moe}.experts.{expert}.{name}"), rows, columns, false);
                        }
                    }
                }
                (_, Some(experts)) => {
                    tensors.dense(format!("{layer}.mlp.gate"), experts.count, hidden, false);
                    for expert in 0..experts.count {
                        tensors.gated_mlp(format!("{layer}.mlp.experts.{expert}"), hidden, experts.intermediate);
                    }
                }
                (_, None) => tensors.gated_mlp(format!("{layer}.mlp"), hidden, intermediate),
            }
        }
        tensors.norm("model.norm", hidden, false);
        if !self.tied {
            tensors.dense("lm_head", vocab, hidden, false);
        }
        tensors.model(self.config(), self.files)
    }

    fn config(&self) -> serde_json::Value {
        let (model_type, architecture) = match self.kind {
            Kind::Llama => ("llama", "LlamaForCausalLM"),
            Kind::Mistral => ("mistral", "MistralForCausalLM"),
            Kind::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Kind::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Kind::Mixtral => ("mixtral", "MixtralForCausalLM"),
            Kind::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
        };
        let mut config = json!({
            "architectures": [architecture], "model_type": model_type, "num_hidden_layers": self.layers,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "tie_word_embeddings": self.tied,
        });
        let mut set = |key: &str, value| config[key] = value;
        if matches!(self.kind, Kind::Llama | Kind::Qwen3 | Kind::Qwen3Moe) {
            set("attention_bias", json!(false));
        }
        // Only Qwen3's configs have it where it follows from the others.
        if matches!(self.kind, Kind::Qwen3 | Kind::Qwen3Moe) || self.head_dim * self.heads != self.hidden {
            set("head_dim", json!(self.head_dim));
        }
        if let Some(experts) = self.experts {
            set("num_experts_per_tok", json!(experts.per_token));
            match self.kind {
                Kind::Mixtral => {
                    set("num_local_experts", json!(experts.count));
                    set("intermediate_size", json!(experts.intermediate));
                }
                _ => {
                    set("num_experts", json!(experts.count));
                    set("moe_intermediate_size", json!(experts.intermediate));
                    set("decoder_sparse_step", json!(1));
                    set("mlp_only_layers", json!([]));
                }
            }
        }
        config
    }
}
