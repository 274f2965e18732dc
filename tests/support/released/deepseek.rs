//! DeepSeek V2 and V3: latent attention, shared and routed experts after some dense layers, FP8 blocks, a layer for
//! multi-token prediction behind the last.

use serde_json::{Value, json};
use shardlift::Dtype;

use super::{Experts, Model, Scheme, Tensors};

/// `DeepseekV2Config` or `DeepseekV3Config`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeepSeek {
    /// V3: router biases `e_score_correction_bias`.
    pub(crate) three: bool,
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `q_lora_rank`: without it `q_proj` takes the place of `q_a_proj` and `q_b_proj`.
    pub(crate) q_rank: Option<u64>,
    /// `kv_lora_rank`
    pub(crate) kv_rank: u64,
    /// `qk_nope_head_dim`
    pub(crate) nope: u64,
    /// `qk_rope_head_dim`
    pub(crate) rope: u64,
    /// `v_head_dim`
    pub(crate) value: u64,
    /// `intermediate_size`, of dense layers
    pub(crate) intermediate: u64,
    /// `first_k_dense_replace`
    pub(crate) dense_layers: u64,
    /// `n_routed_experts`, `num_experts_per_tok`, `moe_intermediate_size`
    pub(crate) experts: Experts,
    /// `n_shared_experts`, stored as one MLP that is as many times as wide
    pub(crate) shared: u64,
    /// `num_nextn_predict_layers`
    pub(crate) mtp_layers: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) scheme: Scheme,
    pub(crate) files: usize,
}

impl DeepSeek {
    /// deepseek-ai/DeepSeek-V2-Lite
    pub(crate) const V2_LITE: DeepSeek = DeepSeek {
        three: false,
        layers: 27,
        hidden: 2048,
        heads: 16,
        q_rank: None,
        intermediate: 10_944,
        dense_layers: 1,
        experts: Experts { count: 64, per_token: 6, intermediate: 1408 },
        shared: 2,
        mtp_layers: 0,
        vocab: 102_400,
        scheme: Scheme::None,
        files: 4,
        ..DeepSeek::V3
    };

    /// deepseek-ai/DeepSeek-V3. The names of layer 61 that other layers do not have are those of its README_WEIGHTS.md;
    /// it stores copies of the embeddings and of the head.
    pub(crate) const V3: DeepSeek = DeepSeek {
        three: true,
        layers: 61,
        hidden: 7168,
        heads: 128,
        q_rank: Some(1536),
        kv_rank: 512,
        nope: 128,
        rope: 64,
        value: 128,
        intermediate: 18_432,
        dense_layers: 3,
        experts: Experts { count: 256, per_token: 8, intermediate: 2048 },
        shared: 1,
        mtp_layers: 1,
        vocab: 129_280,
        scheme: Scheme::Fp8Block { size: 128 },
        files: 163,
    };

    /// V3 with blocks of 8: up to 8 ranks all cuts by head and of intermediate sizes are on blocks. As in the released one
    /// the last block of `kv_a_proj_with_mqa` is half a block.
    pub(crate) const TINY_V3: DeepSeek = DeepSeek {
        layers: 2,
        hidden: 64,
        heads: 8,
        q_rank: Some(32),
        kv_rank: 20,
        nope: 16,
        rope: 8,
        value: 16,
        intermediate: 128,
        dense_layers: 1,
        experts: Experts { count: 8, per_token: 2, intermediate: 64 },
        vocab: 160,
        scheme: Scheme::Fp8Block { size: 8 },
        files: 1,
        ..DeepSeek::V3
    };

    pub(crate) const TINY_V2: DeepSeek =
        DeepSeek { three: false, q_rank: None, shared: 2, mtp_layers: 0, scheme: Scheme::None, ..DeepSeek::TINY_V3 };

    pub(crate) fn model(&self) -> Model {
        let &DeepSeek { layers, hidden, vocab, .. } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, self.scheme);
        tensors.dense("model.embed_tokens", vocab, hidden, false);
        for layer in 0..layers + self.mtp_layers {
            let name = format!("model.layers.{layer}");
            if layer >= layers {
                tensors.dense(format!("{name}.embed_tokens"), vocab, hidden, false);
                tensors.norm(format!("{name}.enorm"), hidden, false);
                tensors.norm(format!("{name}.hnorm"), hidden, false);
                tensors.dense(format!("{name}.eh_proj"), hidden, 2 * hidden, false);
            }
            self.attention(&mut tensors, &format!("{name}.self_attn"));
            tensors.norm(format!("{name}.input_layernorm"), hidden, false);
            tensors.norm(format!("{name}.post_attention_layernorm"), hidden, false);
            match layer < self.dense_layers {
                true => tensors.gated_mlp(format!("{name}.mlp"), hidden, self.intermediate),
                false => self.experts(&mut tensors, &format!("{name}.mlp")),
            }
            if layer >= layers {
                tensors.norm(format!("{name}.shared_head.norm"), hidden, false);
                tensors.dense(format!("{name}.shared_head.head"), vocab, hidden, false);
            }
        }
        tensors.norm("model.norm", hidden, false);
        tensors.dense("lm_head", vocab, hidden, false);
        tensors.model(self.config(), self.files)
    }

    fn attention(&self, tensors: &mut Tensors, name: &str) {
        let &DeepSeek { hidden, heads, kv_rank, nope, rope, value, .. } = self;
        match self.q_rank {
            Some(rank) => {
                tensors.linear(format!("{name}.q_a_proj"), rank, hidden, false);
                tensors.norm(format!("{name}.q_a_layernorm"), rank, false);
                tensors.linear(format!("{name}.q_b_proj"), heads * (nope + rope), rank, false);
            }
            None => tensors.linear(format!("{name}.q_proj"), heads * (nope + rope), hidden, false),
        }
        tensors.linear(format!("{name}.kv_a_proj_with_mqa"), kv_rank + rope, hidden, false);
        tensors.norm(format!("{name}.kv_a_layernorm"), kv_rank, false);
        tensors.linear(format!("{name}.kv_b_proj"), heads * (nope + value), kv_rank, false);
        tensors.linear(format!("{name}.o_proj"), hidden, heads * value, false);
    }

    fn experts(&self, tensors: &mut Tensors, name: &str) {
        let &DeepSeek { hidden, experts, .. } = self;
        tensors.dense(format!("{name}.gate"), experts.count, hidden, false);
        if self.three {
            tensors.typed(format!("{name}.gate.e_score_correction_bias"), Dtype::F32, &[experts.count]);
        }
        tensors.gated_mlp(format!("{name}.shared_experts"), hidden, self.shared * experts.intermediate);
        for expert in 0..experts.count {
            tensors.gated_mlp(format!("{name}.experts.{expert}"), hidden, experts.intermediate);
        }
    }

    fn config(&self) -> Value {
        let (model_type, architecture) = match self.three {
            true => ("deepseek_v3", "DeepseekV3ForCausalLM"),
            false => ("deepseek_v2", "DeepseekV2ForCausalLM"),
        };
        let mut config = json!({
            "architectures": [architecture], "model_type": model_type, "num_hidden_layers": self.layers,
            "hidden_size": self.hidden, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_rank, "kv_lora_rank": self.kv_rank, "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope, "v_head_dim": self.value, "intermediate_size": self.intermediate,
            "first_k_dense_replace": self.dense_layers, "moe_layer_freq": 1, "n_routed_experts": self.experts.count,
            "n_shared_experts": self.shared, "num_experts_per_tok": self.experts.per_token,
            "moe_intermediate_size": self.experts.intermediate, "vocab_size": self.vocab,
            "tie_word_embeddings": false, "attention_bias": false,
        });
        if self.mtp_layers > 0 {
            config["num_nextn_predict_layers"] = json!(self.mtp_layers);
        }
        config
    }
}
