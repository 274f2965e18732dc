//! gpt-oss: stacked experts in MXFP4, attention sinks, biases everywhere.

use serde_json::json;
use shardlift::Dtype;

use super::{Experts, Model, Scheme, Tensors};

/// `GptOssConfig`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GptOss {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `head_dim`
    pub(crate) head_dim: u64,
    /// `num_local_experts`, `num_experts_per_tok`, `intermediate_size`
    pub(crate) experts: Experts,
    /// `vocab_size`
    pub(crate) vocab: u64,
    /// MXFP4 blocks and scales of [experts, out, in / 32, ..], or BF16 of [experts, in, out]. In both gate and up
    /// alternate along the output.
    pub(crate) mxfp4: bool,
    pub(crate) files: usize,
}

impl GptOss {
    /// openai/gpt-oss-20b
    pub(crate) const GPT_OSS_20B: GptOss = GptOss {
        layers: 24,
        hidden: 2880,
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        experts: Experts { count: 32, per_token: 4, intermediate: 2880 },
        vocab: 201_088,
        mxfp4: true,
        files: 3,
    };

    /// openai/gpt-oss-120b
    pub(crate) const GPT_OSS_120B: GptOss = GptOss {
        layers: 36,
        experts: Experts { count: 128, per_token: 4, intermediate: 2880 },
        files: 15,
        ..GptOss::GPT_OSS_20B
    };

    /// 8 blocks of 32 along the intermediate size.
    pub(crate) const TINY: GptOss = GptOss {
        layers: 2,
        hidden: 64,
        heads: 8,
        kv_heads: 2,
        head_dim: 16,
        experts: Experts { count: 8, per_token: 2, intermediate: 256 },
        vocab: 160,
        mxfp4: true,
        files: 1,
    };

    pub(crate) fn model(&self) -> Model {
        let &GptOss { layers, hidden, heads, kv_heads, head_dim, experts, vocab, .. } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        tensors.dense("model.embed_tokens", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("model.layers.{layer}");
            let attention = format!("{layer}.self_attn");
            tensors.linear(format!("{attention}.q_proj"), heads * head_dim, hidden, true);
            tensors.linear(format!("{attention}.k_proj"), kv_heads * head_dim, hidden, true);
            tensors.linear(format!("{attention}.v_proj"), kv_heads * head_dim, hidden, true);
            tensors.linear(format!("{attention}.o_proj"), hidden, heads * head_dim, true);
            tensors.plain(format!("{attention}.sinks"), &[heads]);
            tensors.norm(format!("{layer}.input_layernorm"), hidden, false);
            tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, false);
            tensors.dense(format!("{layer}.mlp.router"), experts.count, hidden, true);
            for (part, rows, columns) in
                [("gate_up_proj", 2 * experts.intermediate, hidden), ("down_proj", hidden, experts.intermediate)]
            {
                let name = format!("{layer}.mlp.experts.{part}");
                match self.mxfp4 {
                    true => {
                        let blocks = [experts.count, rows, columns / 32, 16];
                        tensors.typed(format!("{name}_blocks"), Dtype::U8, &blocks);
                        tensors.typed(format!("{name}_scales"), Dtype::U8, &blocks[..3]);
                    }
                    false => tensors.plain(&name, &[experts.count, columns, rows]),
                }
                tensors.plain(format!("{name}_bias"), &[experts.count, rows]);
            }
        }
        tensors.norm("model.norm", hidden, false);
        tensors.dense("lm_head", vocab, hidden, false);
        let mut config = json!({
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": layers,
            "hidden_size": hidden, "intermediate_size": experts.intermediate, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "num_local_experts": experts.count,
            "num_experts_per_tok": experts.per_token, "attention_bias": true, "vocab_size": vocab,
            "tie_word_embeddings": false,
        });
        if self.mxfp4 {
            let kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];
            config["quantization_config"] = json!({ "quant_method": "mxfp4", "modules_to_not_convert": kept });
        }
        tensors.model(config, self.files)
    }
}
