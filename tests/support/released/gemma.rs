//! Gemma 2, Gemma 3, and Gemma 3 with its vision tower (SigLIP).

use serde_json::{Value, json};
use shardlift::Dtype;

use super::{Model, Scheme, Tensors};

/// `Gemma2Config`, `Gemma3TextConfig` or `Gemma3Config`. Embeddings are tied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemma {
    /// Gemma 3 has norms of q and k for each head.
    pub(crate) three: bool,
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `num_key_value_heads`
    pub(crate) kv_heads: u64,
    /// `head_dim`, which does not follow from the others.
    pub(crate) head_dim: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) vision: Option<Siglip>,
    /// Whether `text_config` leaves out head counts, head size and vocabulary: those of the class then hold.
    pub(crate) defaults: bool,
    pub(crate) files: usize,
}

/// `SiglipVisionConfig` with `vision_use_head` false.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Siglip {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `image_size`
    pub(crate) image: u64,
    /// `patch_size`
    pub(crate) patch: u64,
}

impl Gemma {
    /// google/gemma-2-9b-it
    pub(crate) const GEMMA_2_9B: Gemma = Gemma {
        three: false,
        layers: 42,
        hidden: 3584,
        heads: 16,
        kv_heads: 8,
        head_dim: 256,
        intermediate: 14_336,
        vocab: 256_000,
        vision: None,
        defaults: false,
        files: 4,
    };

    /// google/gemma-3-1b-it: text only, one key-value head.
    pub(crate) const GEMMA_3_1B: Gemma = Gemma {
        three: true,
        layers: 26,
        hidden: 1152,
        heads: 4,
        kv_heads: 1,
        intermediate: 6912,
        vocab: 262_144,
        files: 1,
        ..Gemma::GEMMA_2_9B
    };

    /// google/gemma-3-4b-it. Its `text_config` names only hidden and intermediate size and the number of layers.
    pub(crate) const GEMMA_3_4B: Gemma = Gemma {
        layers: 34,
        hidden: 2560,
        heads: 8,
        kv_heads: 4,
        intermediate: 10_240,
        vocab: 262_208,
        vision: Some(Siglip { layers: 27, hidden: 1152, heads: 16, intermediate: 4304, image: 896, patch: 14 }),
        defaults: true,
        files: 2,
        ..Gemma::GEMMA_3_1B
    };

    /// google/gemma-3-27b-it
    pub(crate) const GEMMA_3_27B: Gemma = Gemma {
        layers: 62,
        hidden: 5376,
        heads: 32,
        kv_heads: 16,
        head_dim: 128,
        intermediate: 21_504,
        defaults: false,
        files: 12,
        ..Gemma::GEMMA_3_4B
    };

    pub(crate) const TINY_2: Gemma = Gemma {
        layers: 2,
        hidden: 64,
        heads: 8,
        kv_heads: 4,
        head_dim: 16,
        intermediate: 96,
        vocab: 160,
        files: 1,
        ..Gemma::GEMMA_2_9B
    };

    pub(crate) const TINY_3: Gemma = Gemma { three: true, ..Gemma::TINY_2 };

    /// With a vision tower of 3 heads, which nobody divides.
    pub(crate) const TINY_3_VISION: Gemma = Gemma {
        vision: Some(Siglip { layers: 2, hidden: 36, heads: 3, intermediate: 44, image: 28, patch: 14 }),
        ..Gemma::TINY_3
    };

    pub(crate) fn model(&self) -> Model {
        let mut tensors = Tensors::new(Dtype::Bf16, Scheme::None);
        match self.vision {
            Some(vision) => {
                vision.push(&mut tensors, "vision_tower.vision_model");
                let projector = "multi_modal_projector";
                // A parameter, not a layer: [in, out].
                tensors.plain(format!("{projector}.mm_input_projection_weight"), &[vision.hidden, self.hidden]);
                tensors.norm(format!("{projector}.mm_soft_emb_norm"), vision.hidden, false);
                self.push(&mut tensors, "language_model.");
            }
            None => self.push(&mut tensors, ""),
        }
        tensors.model(self.config(), self.files)
    }

    fn push(&self, tensors: &mut Tensors, prefix: &str) {
        let &Gemma { hidden, heads, kv_heads, head_dim, intermediate, .. } = self;
        tensors.dense(format!("{prefix}model.embed_tokens"), self.vocab, hidden, false);
        for layer in 0..self.layers {
            let layer = format!("{prefix}model.layers.{layer}");
            let attention = format!("{layer}.self_attn");
            tensors.linear(format!("{attention}.q_proj"), heads * head_dim, hidden, false);
            tensors.linear(format!("{attention}.k_proj"), kv_heads * head_dim, hidden, false);
            tensors.linear(format!("{attention}.v_proj"), kv_heads * head_dim, hidden, false);
            tensors.linear(format!("{attention}.o_proj"), hidden, heads * head_dim, false);
            if self.three {
                tensors.norm(format!("{attention}.q_norm"), head_dim, false);
                tensors.norm(format!("{attention}.k_norm"), head_dim, false);
            }
            tensors.gated_mlp(format!("{layer}.mlp"), hidden, intermediate);
            let norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"];
            for norm in norms {
                tensors.norm(format!("{layer}.{norm}_layernorm"), hidden, false);
            }
        }
        tensors.norm(format!("{prefix}model.norm"), hidden, false);
    }

    fn config(&self) -> Value {
        let mut text = json!({
            "model_type": if self.three { "gemma3_text" } else { "gemma2" }, "num_hidden_layers": self.layers,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "sliding_window": 1024,
        });
        if !self.defaults {
            text["num_attention_heads"] = json!(self.heads);
            text["num_key_value_heads"] = json!(self.kv_heads);
            text["head_dim"] = json!(self.head_dim);
            text["vocab_size"] = json!(self.vocab);
        }
        let Some(vision) = self.vision else {
            let class = if self.three { "Gemma3ForCausalLM" } else { "Gemma2ForCausalLM" };
            text["architectures"] = json!([class]);
            return text;
        };
        json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
            "mm_tokens_per_image": 256,
            "vision_config": {
                "model_type": "siglip_vision_model", "num_hidden_layers": vision.layers, "hidden_size": vision.hidden,
                "num_attention_heads": vision.heads, "intermediate_size": vision.intermediate,
                "image_size": vision.image, "patch_size": vision.patch, "vision_use_head": false,
            },
        })
    }
}

impl Siglip {
    fn push(&self, tensors: &mut Tensors, prefix: &str) {
        let &Siglip { hidden, intermediate, image, patch, .. } = self;
        let embeddings = format!("{prefix}.embeddings");
        tensors.plain(format!("{embeddings}.patch_embedding.weight"), &[hidden, 3, patch, patch]);
        tensors.plain(format!("{embeddings}.patch_embedding.bias"), &[hidden]);
        tensors.dense(format!("{embeddings}.position_embedding"), (image / patch).pow(2), hidden, false);
        for layer in 0..self.layers {
            let layer = format!("{prefix}.encoder.layers.{layer}");
            for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                tensors.dense(format!("{layer}.self_attn.{projection}"), hidden, hidden, true);
            }
            tensors.dense(format!("{layer}.mlp.fc1"), intermediate, hidden, true);
            tensors.dense(format!("{layer}.mlp.fc2"), hidden, intermediate, true);
            tensors.norm(format!("{layer}.layer_norm1"), hidden, true);
            tensors.norm(format!("{layer}.layer_norm2"), hidden, true);
        }
        tensors.norm(format!("{prefix}.post_layernorm"), hidden, true);
    }
}
