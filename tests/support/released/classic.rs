//! Models with biases everywhere: GPT-2, GPT-NeoX, BLOOM, BERT.

use serde_json::json;
use shardlift::Dtype;

use super::{Model, Scheme, Tensors};

/// `GPT2Config`: weights of `Conv1D` are [in, out], the head is tied to `wte`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gpt2 {
    /// `n_layer`
    pub(crate) layers: u64,
    /// `n_embd`
    pub(crate) hidden: u64,
    /// `n_head`
    pub(crate) heads: u64,
    /// `n_positions`; also the sides of the mask that is stored as `attn.bias`.
    pub(crate) positions: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    /// Whether names start with `transformer.`, and the scalar `attn.masked_bias` is stored, as later writers did.
    pub(crate) later: bool,
}

impl Gpt2 {
    /// openai-community/gpt2
    pub(crate) const GPT_2: Gpt2 =
        Gpt2 { layers: 12, hidden: 768, heads: 12, positions: 1024, vocab: 50_257, later: false };

    /// The vocabulary does not divide, as in the released one.
    pub(crate) const TINY: Gpt2 = Gpt2 { layers: 2, hidden: 64, heads: 8, positions: 16, vocab: 157, later: false };

    pub(crate) fn model(&self) -> Model {
        let &Gpt2 { layers, hidden, heads, positions, vocab, later } = self;
        let mut tensors = Tensors::new(Dtype::F32, Scheme::None);
        let prefix = if later { "transformer." } else { "" };
        tensors.dense(format!("{prefix}wte"), vocab, hidden, false);
        tensors.dense(format!("{prefix}wpe"), positions, hidden, false);
        for layer in 0..layers {
            let layer = format!("{prefix}h.{layer}");
            tensors.plain(format!("{layer}.attn.bias"), &[1, 1, positions, positions]);
            if later {
                tensors.plain(format!("{layer}.attn.masked_bias"), &[]);
            }
            for (module, inputs, outputs) in [
                ("attn.c_attn", hidden, 3 * hidden),
                ("attn.c_proj", hidden, hidden),
                ("mlp.c_fc", hidden, 4 * hidden),
                ("mlp.c_proj", 4 * hidden, hidden),
            ] {
                tensors.plain(format!("{layer}.{module}.weight"), &[inputs, outputs]);
                tensors.plain(format!("{layer}.{module}.bias"), &[outputs]);
            }
            tensors.norm(format!("{layer}.ln_1"), hidden, true);
            tensors.norm(format!("{layer}.ln_2"), hidden, true);
        }
        tensors.norm(format!("{prefix}ln_f"), hidden, true);
        let config = json!({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": layers, "n_embd": hidden,
            "n_head": heads, "n_positions": positions, "n_ctx": positions, "vocab_size": vocab,
        });
        tensors.model(config, 1)
    }
}

/// `GPTNeoXConfig`: q, k and v interleaved by head in `query_key_value`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GptNeox {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `max_position_embeddings`: the sides of the stored mask.
    pub(crate) positions: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) files: usize,
}

impl GptNeox {
    /// EleutherAI/gpt-neox-20b: `rotary_pct` 0.25, so `inv_freq` has an eighth of the head size.
    pub(crate) const GPT_NEOX_20B: GptNeox = GptNeox {
        layers: 44,
        hidden: 6144,
        heads: 64,
        intermediate: 24_576,
        positions: 2048,
        vocab: 50_432,
        files: 46,
    };

    pub(crate) const TINY: GptNeox =
        GptNeox { layers: 2, hidden: 64, heads: 8, intermediate: 256, positions: 16, vocab: 160, files: 1 };

    pub(crate) fn model(&self) -> Model {
        let &GptNeox { layers, hidden, heads, intermediate, positions, vocab, files } = self;
        let mut tensors = Tensors::new(Dtype::F16, Scheme::None);
        tensors.dense("gpt_neox.embed_in", vocab, hidden, false);
        for layer in 0..layers {
            let layer = format!("gpt_neox.layers.{layer}");
            tensors.typed(format!("{layer}.attention.bias"), Dtype::U8, &[1, 1, positions, positions]);
            tensors.plain(format!("{layer}.attention.rotary_emb.inv_freq"), &[hidden / heads / 8]);
            tensors.linear(format!("{layer}.attention.query_key_value"), 3 * hidden, hidden, true);
            tensors.linear(format!("{layer}.attention.dense"), hidden, hidden, true);
            tensors.linear(format!("{layer}.mlp.dense_h_to_4h"), intermediate, hidden, true);
            tensors.linear(format!("{layer}.mlp.dense_4h_to_h"), hidden, intermediate, true);
            tensors.norm(format!("{layer}.input_layernorm"), hidden, true);
            tensors.norm(format!("{layer}.post_attention_layernorm"), hidden, true);
        }
        tensors.norm("gpt_neox.final_layer_norm", hidden, true);
        tensors.dense("embed_out", vocab, hidden, false);
        let config = json!({
            "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "num_hidden_layers": layers,
            "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate,
            "max_position_embeddings": positions, "rotary_pct": 0.25, "use_parallel_residual": true,
            "vocab_size": vocab, "tie_word_embeddings": false,
        });
        tensors.model(config, files)
    }
}

/// `BloomConfig`: q, k and v interleaved by head, the head tied to `word_embeddings`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bloom {
    /// `n_layer`
    pub(crate) layers: u64,
    /// `hidden_size`, in older configs `n_embed`
    pub(crate) hidden: u64,
    /// `n_head`
    pub(crate) heads: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    pub(crate) dtype: Dtype,
    pub(crate) files: usize,
}

impl Bloom {
    /// bigscience/bloom
    pub(crate) const BLOOM_176B: Bloom =
        Bloom { layers: 70, hidden: 14_336, heads: 112, vocab: 250_880, dtype: Dtype::Bf16, files: 72 };

    /// bigscience/bloom-560m
    pub(crate) const BLOOM_560M: Bloom =
        Bloom { layers: 24, hidden: 1024, heads: 16, dtype: Dtype::F16, files: 1, ..Bloom::BLOOM_176B };

    pub(crate) const TINY: Bloom = Bloom { layers: 2, hidden: 64, heads: 8, vocab: 160, dtype: Dtype::Bf16, files: 1 };

    pub(crate) fn model(&self) -> Model {
        let &Bloom { layers, hidden, heads, vocab, .. } = self;
        let mut tensors = Tensors::new(self.dtype, Scheme::None);
        tensors.dense("word_embeddings", vocab, hidden, false);
        tensors.norm("word_embeddings_layernorm", hidden, true);
        for layer in 0..layers {
            tensors.norm(format!("h.{layer}.input_layernorm"), hidden, true);
            tensors.linear(format!("h.{layer}.self_attention.query_key_value"), 3 * hidden, hidden, true);
            tensors.linear(format!("h.{layer}.self_attention.dense"), hidden, hidden, true);
            tensors.norm(format!("h.{layer}.post_attention_layernorm"), hidden, true);
            tensors.linear(format!("h.{layer}.mlp.dense_h_to_4h"), 4 * hidden, hidden, true);
            tensors.linear(format!("h.{layer}.mlp.dense_4h_to_h"), hidden, 4 * hidden, true);
        }
        tensors.norm("ln_f", hidden, true);
        let config = json!({
            "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": layers, "hidden_size": hidden,
            "n_head": heads, "vocab_size": vocab, "apply_residual_connection_post_layernorm": false,
        });
        tensors.model(config, self.files)
    }
}

/// `BertConfig`, with both heads of the pretraining.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bert {
    /// `num_hidden_layers`
    pub(crate) layers: u64,
    /// `hidden_size`
    pub(crate) hidden: u64,
    /// `num_attention_heads`
    pub(crate) heads: u64,
    /// `intermediate_size`
    pub(crate) intermediate: u64,
    /// `max_position_embeddings`
    pub(crate) positions: u64,
    /// `vocab_size`
    pub(crate) vocab: u64,
    /// What parameters of norms are called: `gamma` and `beta` in what came from TensorFlow.
    pub(crate) norm: [&'static str; 2],
}

impl Bert {
    /// google-bert/bert-base-uncased
    pub(crate) const BERT_BASE: Bert = Bert {
        layers: 12,
        hidden: 768,
        heads: 12,
        intermediate: 3072,
        positions: 512,
        vocab: 30_522,
        norm: ["gamma", "beta"],
    };

    pub(crate) const TINY: Bert = Bert {
        layers: 2,
        hidden: 64,
        heads: 8,
        intermediate: 256,
        positions: 16,
        vocab: 157,
        norm: ["weight", "bias"],
    };

    pub(crate) fn model(&self) -> Model {
        let &Bert { layers, hidden, heads, intermediate, positions, vocab, norm } = self;
        let mut tensors = Tensors::new(Dtype::F32, Scheme::None);
        let layer_norm = |tensors: &mut Tensors, module: String| {
            norm.iter().for_each(|part| tensors.plain(format!("{module}.LayerNorm.{part}"), &[hidden]));
        };
        let embeddings = "bert.embeddings";
        tensors.dense(format!("{embeddings}.word_embeddings"), vocab, hidden, false);
        tensors.dense(format!("{embeddings}.position_embeddings"), positions, hidden, false);
        tensors.dense(format!("{embeddings}.token_type_embeddings"), 2, hidden, false);
        layer_norm(&mut tensors, embeddings.into());
        for layer in 0..layers {
            let layer = format!("bert.encoder.layer.{layer}");
            for part in ["query", "key", "value"] {
                tensors.linear(format!("{layer}.attention.self.{part}"), hidden, hidden, true);
            }
            tensors.linear(format!("{layer}.attention.output.dense"), hidden, hidden, true);
            layer_norm(&mut tensors, format!("{layer}.attention.output"));
            tensors.linear(format!("{layer}.intermediate.dense"), intermediate, hidden, true);
            tensors.linear(format!("{layer}.output.dense"), hidden, intermediate, true);
            layer_norm(&mut tensors, format!("{layer}.output"));
        }
        tensors.dense("bert.pooler.dense", hidden, hidden, true);
        tensors.plain("cls.predictions.bias", &[vocab]);
        tensors.dense("cls.predictions.transform.dense", hidden, hidden, true);
        layer_norm(&mut tensors, "cls.predictions.transform".into());
        tensors.dense("cls.seq_relationship", 2, hidden, true);
        let config = json!({
            "architectures": ["BertForMaskedLM"], "model_type": "bert", "num_hidden_layers": layers,
            "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate,
            "max_position_embeddings": positions, "type_vocab_size": 2, "vocab_size": vocab,
        });
        tensors.model(config, 1)
    }
}
