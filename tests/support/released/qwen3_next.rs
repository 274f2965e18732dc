//! Qwen3-Next: three layers of linear attention, then one of gated full attention; experts in all of them.

use serde_json::json;
use shardlift::Dtype;

use super::{Experts, Model, Scheme, Tensors};

/// `Qwen3NextConfig`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Qwen3Next {
    /// `num_hidden_layers`; every `full_attention_interval`th (4) has full attention.
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`; `q_proj` gives each its queries, then its gate.
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `head_dim`
    pub(crate) head_dim: u64,
    /// `linear_num_key_heads`: the groups of `in_proj_qkvz` and `in_proj_ba`.
    pub(crate) linear_key_heads: u64,
    /// `linear_num_value_heads`
    pub(crate) linear_value_heads: u64,
    /// `linear_key_head_dim` and `linear_value_head_dim`
    pub(crate) linear_head_dim: u64,
    /// `linear_conv_kernel_dim`
    pub(crate) kernel: u64,
    /// `num_experts`, `num_experts_per_tok`, `moe_intermediate_size`
    pub(crate) experts: Experts,
    /// `shared_expert_intermediate_size`
    pub(crate) shared: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    /// Whether `mtp.*` is stored, a layer for multi-token prediction that the model's class ignores.
    pub(crate) mtp: bool,
    pub(crate) files: usize,
}

/// `full_attention_interval`
const INTERVAL: u64 = 4;

impl Qwen3Next {
    /// Qwen/Qwen3-Next-80B-A3B-Instruct. The class has no names for `mtp.*`; these are Qwen's in later models, and with
    /// them the sum is the hub's.
    pub(crate) const QWEN_3_NEXT_80B_A3B: Qwen3Next = Qwen3Next {
        layers: 48,
        hidden: 2048,
        heads: 16,
        kv_heads: 2,
        head_dim: 256,
        linear_key_heads: 16,
        linear_value_heads: 32,
        linear_head_dim: 128,
        kernel: 4,
        experts: Experts { count: 512, per_token: 10, intermediate: 512 },
        shared: 512,
        vocab: 151_936,
        mtp: true,
        files: 41,
    };

    pub(crate) const TINY: Qwen3Next = Qwen3Next {
        layers: 4,
        hidden: 64,
        heads: 8,
        kv_heads: 2,
        head_dim: 16,
        linear_key_heads: 8,
        linear_value_heads: 16,
        linear_head_dim: 8,
        kernel: 4,
        experts: Experts { count: 8, per_token: 2, intermediate: 32 },
        shared: 32,
        vocab: 160,
        mtp: true,
        files: 1,
    };

    pub(crate) fn model(&self) -> Model {
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("model.embed_tokens", self.vocab, self.hidden, false);
        for layer in 0..self.layers {
            let name = format!("model.layers.{layer}");
            match (layer + 1).is_multiple_of(INTERVAL) {
                true => self.full_attention(&mut tensors, &name),
                false => self.linear_attention(&mut tensors, &name),
            }
            self.rest(&mut tensors, &name);
        }
        tensors.norm("model.norm", self.hidden, false);
        tensors.dense("lm_head", self.vocab, self.hidden, false);
        if self.mtp {
            self.full_attention(&mut tensors, "mtp.layers.0");
            self.rest(&mut tensors, "mtp.layers.0");
            tensors.dense("mtp.fc", self.hidden, 2 * self.hidden, false);
            for norm in ["norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"] {
                tensors.norm(format!("mtp.{norm}"), self.hidden, false);
            }
        }
        tensors.model(self.config(), self.files)
    }

    fn full_attention(&self, tensors: &mut Tensors, layer: &str) {
        let &Qwen3Next { hidden, heads, kv_heads, head_dim, .. } = self;
        let attention = format!("{layer}.self_attn");
        tensors.linear(format!("{attention}.q_proj"), heads * 2 * head_dim, hidden, false);
        tensors.linear(format!("{attention}.k_proj"), kv_heads * head_dim, hidden, false);
        tensors.linear(format!("{attention}.v_proj"), kv_heads * head_dim, hidden, false);
        tensors.linear(format!("{attention}.o_proj"), hidden, heads * head_dim, false);
        tensors.norm(format!("{attention}.q_norm"), head_dim, false);
        tensors.norm(format!("{attention}.k_norm"), head_dim, false);
    }

    fn linear_attention(&self, tensors: &mut Tensors, layer: &str) {
        let (keys, values) =
            (self.linear_key_heads * self.linear_head_dim, self.linear_value_heads * self.linear_head_dim);
        let attention = format!("{layer}.linear_attn");
        tensors.linear(format!("{attention}.in_proj_qkvz"), 2 * keys + 2 * values, self.hidden, false);
        tensors.linear(format!("{attention}.in_proj_ba"), 2 * self.linear_value_heads, self.hidden, false);
        tensors.plain(format!("{attention}.conv1d.weight"), &[2 * keys + values, 1, self.kernel]);
        tensors.plain(format!("{attention}.dt_bias"), &[self.linear_value_heads]);
        tensors.plain(format!("{attention}.A_log"), &[self.linear_value_heads]);
        tensors.norm(format!("{attention}.norm"), self.linear_head_dim, false);
        tensors.linear(format!("{attention}.out_proj"), self.hidden, values, false);
    }

    /// Norms and experts.
    fn rest(&self, tensors: &mut Tensors, layer: &str) {
        let &Qwen3Next { hidden, experts, shared, .. } = self;
        tensors.norm(format!("{layer}.input_layernorm"), hidden, false);
        tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, false);
        tensors.dense(format!("{layer}.mlp.gate"), experts.count, hidden, false);
        for expert in 0..experts.count {
            tensors.gated_mlp(format!("{layer}.mlp.experts.{expert}"), hidden, experts.intermediate);
        }
        tensors.gated_mlp(format!("{layer}.mlp.shared_expert"), hidden, shared);
        tensors.dense(format!("{layer}.mlp.shared_expert_gate"), 1, hidden, false);
    }

    fn config(&self) -> serde_json::Value {
        json!({
            "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": self.layers,
            "full_attention_interval": INTERVAL, "hidden_size": self.hidden, "intermediate_size": 5120,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "linear_num_key_heads": self.linear_key_heads, "linear_num_value_heads": self.linear_value_heads,
            "linear_key_head_dim": self.linear_head_dim, "linear_value_head_dim": self.linear_head_dim,
            "linear_conv_kernel_dim": self.kernel, "num_experts": self.experts.count,
            "num_experts_per_tok": self.experts.per_token, "moe_intermediate_size": self.experts.intermediate,
            "shared_expert_intermediate_size": self.shared, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "vocab_size": self.vocab, "tie_word_embeddings": false, "attention_bias": false,
        })
    }
}
