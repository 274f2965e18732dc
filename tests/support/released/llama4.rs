//! Llama 4: stacked experts of [experts, in, out], a shared expert, and a vision tower.

use serde_json::{Value, json};
use shardlift::Dtype;

use super::{Experts, Model, Scheme, Tensors};

/// `Llama4Config` with its `text_config`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Llama4 {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `interleave_moe_layer_step`: every such layer has experts.
    pub(crate) moe_step: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `head_dim`
    pub(crate) head_dim: u64,
    /// `num_local_experts`, `num_experts_per_tok`, `intermediate_size`; the shared expert is as wide.
    pub(crate) experts: Experts,
    /// `intermediate_size_mlp`, of layers without experts
    pub(crate) intermediate_mlp: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) vision: Llama4Vision,
    pub(crate) files: usize,
}

/// `Llama4VisionConfig`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Llama4Vision {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `projector_input_dim`, `projector_output_dim` and `vision_output_dim`
    pub(crate) output: u64,
    /// `image_size`
    pub(crate) image: u64,
    /// `patch_size`
    pub(crate) patch: u64,
}

impl Llama4 {
    /// meta-llama/Llama-4-Scout-17B-16E-Instruct
    pub(crate) const LLAMA_4_SCOUT: Llama4 = Llama4 {
        layers: 48,
        moe_step: 1,
        hidden: 5120,
        heads: 40,
        kv_heads: 8,
        head_dim: 128,
        experts: Experts { count: 16, per_token: 1, intermediate: 8192 },
        intermediate_mlp: 16_384,
        vocab: 202_048,
        vision: Llama4Vision {
            layers: 34,
            hidden: 1408,
            heads: 16,
            intermediate: 5632,
            output: 4096,
            image: 336,
            patch: 14,
        },
        files: 50,
    };

    /// A dense layer, then one of experts; the vision tower's 3 heads divide by nothing.
    pub(crate) const TINY: Llama4 = Llama4 {
        layers: 2,
        moe_step: 2,
        hidden: 64,
        heads: 8,
        kv_heads: 2,
        head_dim: 16,
        experts: Experts { count: 8, per_token: 1, intermediate: 32 },
        intermediate_mlp: 96,
        vocab: 160,
        vision: Llama4Vision { layers: 2, hidden: 36, heads: 3, intermediate: 144, output: 40, image: 28, patch: 14 },
        files: 1,
    };

    pub(crate) fn model(&self) -> Model {
        let &Llama4 { hidden, heads, kv_heads, head_dim, experts, .. } = self;
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        self.vision.push(&mut tensors);
        tensors.dense("multi_modal_projector.linear_1", hidden, self.vision.output, false);
        tensors.dense("language_model.model.embed_tokens", self.vocab, hidden, false);
        for layer in 0..self.layers {
            let has_experts = (layer + 1).is_multiple_of(self.moe_step);
            let layer = format!("language_model.model.layers.{layer}");
            let attention = format!("{layer}.self_attn");
            tensors.linear(format!("{attention}.q_proj"), heads * head_dim, hidden, false);
            tensors.linear(format!("{attention}.k_proj"), kv_heads * head_dim, hidden, false);
            tensors.linear(format!("{attention}.v_proj"), kv_heads * head_dim, hidden, false);
            tensors.linear(format!("{attention}.o_proj"), hidden, heads * head_dim, false);
            tensors.norm(format!("{layer}.input_layernorm"), hidden, false);
            tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, false);
            let mlp = format!("{layer}.feed_forward");
            if has_experts {
                let Experts { count, intermediate, .. } = experts;
                tensors.plain(format!("{mlp}.experts.gate_up_proj"), &[count, hidden, 2 * intermediate]);
                tensors.plain(format!("{mlp}.experts.down_proj"), &[count, intermediate, hidden]);
                tensors.dense(format!("{mlp}.router"), count, hidden, false);
                tensors.gated_mlp(format!("{mlp}.shared_expert"), hidden, intermediate);
            } else {
                tensors.gated_mlp(mlp, hidden, self.intermediate_mlp);
            }
        }
        tensors.norm("language_model.model.norm", hidden, false);
        tensors.dense("language_model.lm_head", self.vocab, hidden, false);
        tensors.model(self.config(), self.files)
    }

    fn config(&self) -> Value {
        let moe_layers: Vec<u64> = (0..self.layers).filter(|layer| (layer + 1).is_multiple_of(self.moe_step)).collect();
        let vision = &self.vision;
        json!({
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "tie_word_embeddings": false,
            "text_config": {
                "model_type": "llama4_text", "num_hidden_layers": self.layers,
                "interleave_moe_layer_step": self.moe_step, "moe_layers": moe_layers, "hidden_size": self.hidden,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
                "num_local_experts": self.experts.count, "num_experts_per_tok": self.experts.per_token,
                "intermediate_size": self.experts.intermediate, "intermediate_size_mlp": self.intermediate_mlp,
                "vocab_size": self.vocab, "use_qk_norm": true, "attention_bias": false,
            },
            "vision_config": {
                "model_type": "llama4_vision_model", "num_hidden_layers": vision.layers, "hidden_size": vision.hidden,
                "num_attention_heads": vision.heads, "intermediate_size": vision.intermediate,
                "projector_input_dim": vision.output, "projector_output_dim": vision.output,
                "vision_output_dim": vision.output, "image_size": vision.image, "patch_size": vision.patch,
                "num_channels": 3, "pixel_shuffle_ratio": 0.5,
            },
        })
    }
}

impl Llama4Vision {
    fn push(&self, tensors: &mut Tensors) {
        let &Llama4Vision { hidden, intermediate, output, image, patch, .. } = self;
        tensors.plain("vision_model.class_embedding", &[hidden]);
        tensors.plain("vision_model.positional_embedding_vlm", &[(image / patch).pow(2) + 1, hidden]);
        tensors.dense("vision_model.patch_embedding.linear", hidden, 3 * patch * patch, false);
        tensors.norm("vision_model.layernorm_pre", hidden, true);
        tensors.norm("vision_model.layernorm_post", hidden, true);
        for layer in 0..self.layers {
            let layer = format!("vision_model.model.layers.{layer}");
            for projection in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                tensors.dense(format!("{layer}.self_attn.{projection}"), hidden, hidden, true);
            }
            tensors.dense(format!("{layer}.mlp.fc1"), intermediate, hidden, true);
            tensors.dense(format!("{layer}.mlp.fc2"), hidden, intermediate, true);
            tensors.norm(format!("{layer}.input_layernorm"), hidden, true);
            tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, true);
        }
        // The pixel shuffle makes one patch of four, so its channels are the intermediate size.
        tensors.dense("vision_model.vision_adapter.mlp.fc1", output, intermediate, false);
        tensors.dense("vision_model.vision_adapter.mlp.fc2", output, output, false);
    }
}
