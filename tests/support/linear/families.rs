//! How each family's linear maps are divided for target plain: a table from the models' public definitions (their classes
//! in transformers 4.57.6, for InternLM2 the class beside the model), not from the planner's families.

use super::features::Features::{self, Blocks, Grouped, Heads, Shared, Whole};
use crate::released::{
    Bert, Bloom, Dbrx, DeepSeek, Experts, Falcon, Gemma, Gpt2, GptNeox, GptOss, InternLm2, Kind, Llama, Llama4, Model,
    Mpt, Phi3, Qwen3Next, Scheme,
};

/// A tiny model and the table of its modules.
pub(crate) struct Family {
    /// Its `model_type`.
    pub(crate) name: &'static str,
    pub(crate) model: Model,
    pub(crate) scheme: Scheme,
    /// Patterns of modules, in the order in which they are tried, and what becomes of them. In a pattern `*` is a number;
    /// it matches at the end of a name, `name.**` at its beginning, and `+norm` anything that ends so.
    pub(crate) rows: Vec<(&'static str, Map)>,
    /// Destinations that are no tensors of the model, which share the memory of one (tied embeddings).
    pub(crate) tied: Vec<(&'static str, &'static str)>,
}

/// What becomes of a module.
#[derive(Debug, Clone)]
pub(crate) enum Map {
    /// Divided along these dimensions, none if it is replicated. `input` is the dimension that is multiplied with the
    /// inputs, if it is a linear map.
    Shared { input: Option<usize>, cuts: Vec<Cut> },
    /// One of so many experts, on the ranks that have it.
    Expert(u64, Box<Map>),
    /// So many experts behind each other in dimension 0, seen as a dimension of their own before what this says.
    Flat(u64, Box<Map>),
    /// Not loaded.
    Skipped,
    /// No weight: loaded whole or not at all.
    Buffer,
}

/// A dimension and what it consists of.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    pub(crate) dim: usize,
    pub(crate) of: Features,
    pub(crate) by: By,
}

/// Who divides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// All ranks.
    Tp,
    /// The groups of ranks that have different experts.
    Ep,
    /// The ranks of such a group.
    Etp,
}

/// Outputs divided: [out, in].
fn column(of: Features) -> Map {
    Map::Shared { input: Some(1), cuts: vec![Cut { dim: 0, of, by: By::Tp }] }
}

/// Inputs divided.
fn row(of: Features) -> Map {
    Map::Shared { input: Some(1), cuts: vec![Cut { dim: 1, of, by: By::Tp }] }
}

/// No map, but divided along its first dimension with what one gives.
fn along(of: Features) -> Map {
    Map::Shared { input: None, cuts: vec![Cut { dim: 0, of, by: By::Tp }] }
}

fn whole() -> Map {
    Map::Shared { input: None, cuts: Vec::new() }
}

/// The same among the ranks that share an expert.
fn expert(count: u64, map: Map) -> Map {
    let Map::Shared { input, cuts } = map else { panic!("no linear map") };
    let cuts = cuts.into_iter().map(|cut| Cut { by: By::Etp, ..cut }).collect();
    Map::Expert(count, Box::new(Map::Shared { input, cuts }))
}

/// Experts stacked along dimension 0; `dim` of the tensor consists of `of`, `input` takes the inputs.
fn stacked(count: u64, input: Option<usize>, dim: Option<(usize, Features)>) -> Map {
    let experts = Cut { dim: 0, of: Features::even(count), by: By::Ep };
    let inner = dim.map(|(dim, of)| Cut { dim, of, by: By::Etp });
    Map::Shared { input, cuts: [experts].into_iter().chain(inner).collect() }
}

/// `gate_proj`, `up_proj` and `down_proj` of so many features below a module.
fn gated(size: u64) -> [Map; 3] {
    [column(Features::even(size)), column(Features::even(size)), row(Features::even(size))]
}

type Rows = Vec<(&'static str, Map)>;

/// q, k, v and o of grouped-query attention.
fn attention(heads: u64, kv_heads: u64, size: u64) -> Rows {
    vec![
        ("self_attn.q_proj", column(Heads(heads, size))),
        ("self_attn.k_proj", column(Shared(kv_heads, size))),
        ("self_attn.v_proj", column(Shared(kv_heads, size))),
        ("self_attn.o_proj", row(Heads(heads, size))),
    ]
}

fn mlp(names: [&'static str; 3], size: u64) -> Rows {
    names.into_iter().zip(gated(size)).collect()
}

fn experts(names: [&'static str; 3], of: Experts) -> Rows {
    names.into_iter().zip(gated(of.intermediate).map(|map| expert(of.count, map))).collect()
}

fn rows(lists: impl IntoIterator<Item = Rows>) -> Rows {
    lists.into_iter().flatten().collect()
}

fn replicated(names: &[&'static str]) -> Rows {
    names.iter().map(|&name| (name, whole())).collect()
}

const MLP: [&str; 3] = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
const EXPERTS: [&str; 3] = ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"];

/// The table for models without anything tied.
fn family(name: &'static str, model: Model, lists: impl IntoIterator<Item = Rows>) -> Family {
    Family { name, model, scheme: Scheme::None, rows: rows(lists), tied: Vec::new() }
}

fn llama(llama: Llama) -> Family {
    let name = match llama.kind {
        Kind::Llama => "llama",
        Kind::Mistral => "mistral",
        Kind::Qwen2 => "qwen2",
        Kind::Qwen3 => "qwen3",
        Kind::Mixtral => "mixtral",
        Kind::Qwen3Moe => "qwen3_moe",
    };
    let feed_forward = match (llama.kind, llama.experts) {
        (Kind::Mixtral, Some(of)) => {
            let names = ["experts.*.w1", "experts.*.w3", "experts.*.w2"];
            rows([experts(names, of), replicated(&["block_sparse_moe.gate"])])
        }
        (_, Some(of)) => rows([experts(EXPERTS, of), replicated(&["mlp.gate"])]),
        (_, None) => mlp(MLP, llama.intermediate),
    };
    let attention = attention(llama.heads, llama.kv_heads, llama.head_dim);
    let rest = replicated(&["+norm", "embed_tokens", "lm_head"]);
    Family { scheme: llama.scheme, ..family(name, llama.model(), [attention, feed_forward, rest]) }
}

/// A Llama as this scheme stores it.
pub(crate) fn quantised(scheme: Scheme) -> Family {
    llama(Llama { scheme, ..Llama::TINY })
}

fn gemma(gemma: Gemma) -> Family {
    let name = match (gemma.three, gemma.vision) {
        (false, _) => "gemma2",
        (true, None) => "gemma3_text",
        (true, Some(_)) => "gemma3",
    };
    let prefix = if gemma.vision.is_some() { "language_model." } else { "" };
    let tied = match prefix {
        "" => ("lm_head.weight", "model.embed_tokens.weight"),
        _ => ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    };
    let vision = replicated(&["vision_tower.**", "multi_modal_projector.**"]);
    let attention = attention(gemma.heads, gemma.kv_heads, gemma.head_dim);
    let rest = replicated(&["+norm", "embed_tokens"]);
    let lists = [vision, attention, mlp(MLP, gemma.intermediate), rest];
    Family { tied: vec![tied], ..family(name, gemma.model(), lists) }
}

fn phi3(phi: Phi3) -> Family {
    let size = phi.hidden / phi.heads;
    let qkv = Blocks(vec![Heads(phi.heads, size), Shared(phi.kv_heads, size), Shared(phi.kv_heads, size)]);
    let gate_up = Blocks(vec![Features::even(phi.intermediate), Features::even(phi.intermediate)]);
    let cut = vec![
        ("self_attn.qkv_proj", column(qkv)),
        ("self_attn.o_proj", row(Heads(phi.heads, size))),
        ("mlp.gate_up_proj", column(gate_up)),
        ("mlp.down_proj", row(Features::even(phi.intermediate))),
    ];
    family("phi3", phi.model(), [cut, replicated(&["+norm", "embed_tokens", "lm_head"])])
}

/// `Conv1D` is [in, out].
fn gpt2(gpt: Gpt2) -> Family {
    let size = gpt.hidden / gpt.heads;
    let conv = |dim, of| Map::Shared { input: Some(0), cuts: vec![Cut { dim, of, by: By::Tp }] };
    let cut = vec![
        ("attn.c_attn", conv(1, Blocks(vec![Heads(gpt.heads, size); 3]))),
        ("attn.c_proj", conv(0, Heads(gpt.heads, size))),
        ("mlp.c_fc", conv(1, Features::even(4 * gpt.hidden))),
        ("mlp.c_proj", conv(0, Features::even(4 * gpt.hidden))),
        ("attn", Map::Buffer), // a mask, called `attn.bias`
        ("attn.masked_bias", Map::Buffer),
    ];
    let embeddings = if gpt.later { "transformer.wte.weight" } else { "wte.weight" };
    let lists = [cut, replicated(&["wte", "wpe", "ln_1", "ln_2", "ln_f"])];
    Family { tied: vec![("lm_head.weight", embeddings)], ..family("gpt2", gpt.model(), lists) }
}

fn gpt_neox(neox: GptNeox) -> Family {
    let size = neox.hidden / neox.heads;
    let cut = vec![
        ("attention.query_key_value", column(Heads(neox.heads, 3 * size))),
        ("attention.dense", row(Heads(neox.heads, size))),
        ("mlp.dense_h_to_4h", column(Features::even(neox.intermediate))),
        ("mlp.dense_4h_to_h", row(Features::even(neox.intermediate))),
        ("attention", Map::Buffer), // a mask, called `attention.bias`
        ("attention.rotary_emb.inv_freq", Map::Buffer),
    ];
    family("gpt_neox", neox.model(), [cut, replicated(&["+norm", "embed_in", "embed_out"])])
}

fn bloom(bloom: Bloom) -> Family {
    let size = bloom.hidden / bloom.heads;
    let cut = vec![
        ("self_attention.query_key_value", column(Heads(bloom.heads, 3 * size))),
        ("self_attention.dense", row(Heads(bloom.heads, size))),
        ("mlp.dense_h_to_4h", column(Features::even(4 * bloom.hidden))),
        ("mlp.dense_4h_to_h", row(Features::even(4 * bloom.hidden))),
    ];
    let lists = [cut, replicated(&["+norm", "ln_f", "word_embeddings"])];
    Family { tied: vec![("lm_head.weight", "word_embeddings.weight")], ..family("bloom", bloom.model(), lists) }
}

/// The new architecture has every key-value head behind its query heads.
fn falcon(falcon: Falcon) -> Family {
    let size = falcon.hidden / falcon.heads;
    let qkv = match falcon.new {
        true => Grouped(falcon.kv_heads, falcon.heads / falcon.kv_heads, size),
        false => Blocks(vec![Heads(falcon.heads, size), Whole(size), Whole(size)]),
    };
    let cut = vec![
        ("self_attention.query_key_value", column(qkv)),
        ("self_attention.dense", row(Heads(falcon.heads, size))),
        ("mlp.dense_h_to_4h", column(Features::even(4 * falcon.hidden))),
        ("mlp.dense_4h_to_h", row(Features::even(4 * falcon.hidden))),
    ];
    // The class ties the head to the embeddings, whatever is stored under its name.
    let head = vec![("lm_head", Map::Skipped)];
    let lists = [cut, head, replicated(&["+norm", "ln_attn", "ln_mlp", "ln_f", "word_embeddings"])];
    let tied = vec![("lm_head.weight", "transformer.word_embeddings.weight")];
    Family { tied, ..family("falcon", falcon.model(), lists) }
}

fn mpt(mpt: Mpt) -> Family {
    let size = mpt.hidden / mpt.heads;
    let cut = vec![
        ("attn.Wqkv", column(Blocks(vec![Heads(mpt.heads, size); 3]))),
        ("attn.out_proj", row(Heads(mpt.heads, size))),
        ("ffn.up_proj", column(Features::even(4 * mpt.hidden))),
        ("ffn.down_proj", row(Features::even(4 * mpt.hidden))),
    ];
    let lists = [cut, replicated(&["norm_1", "norm_2", "norm_f", "wte"])];
    Family { tied: vec![("lm_head.weight", "transformer.wte.weight")], ..family("mpt", mpt.model(), lists) }
}

/// Experts one after the other in [experts x intermediate, hidden]; `w2` is used transposed, so that its rows are inputs.
fn dbrx(dbrx: Dbrx) -> Family {
    let (size, of) = (dbrx.hidden / dbrx.heads, dbrx.experts);
    let qkv = Blocks(vec![Heads(dbrx.heads, size), Shared(dbrx.kv_heads, size), Shared(dbrx.kv_heads, size)]);
    let rows = |input| {
        Map::Flat(of.count, Box::new(stacked(of.count, Some(input), Some((1, Features::even(of.intermediate))))))
    };
    let cut = vec![
        ("attn.Wqkv", column(qkv)),
        ("attn.out_proj", row(Heads(dbrx.heads, size))),
        ("ffn.experts.mlp.w1", rows(2)),
        ("ffn.experts.mlp.v1", rows(2)),
        ("ffn.experts.mlp.w2", rows(1)),
    ];
    let lists = [cut, replicated(&["norm_1", "norm_2", "norm_f", "router.layer", "wte", "lm_head"])];
    family("dbrx", dbrx.model(), lists)
}

fn internlm2(model: InternLm2) -> Family {
    let size = model.hidden / model.heads;
    let groups = Grouped(model.kv_heads, model.heads / model.kv_heads, size);
    let cut = vec![("attention.wqkv", column(groups)), ("attention.wo", row(Heads(model.heads, size)))];
    let names = ["feed_forward.w1", "feed_forward.w3", "feed_forward.w2"];
    let rest = replicated(&["+norm", "tok_embeddings", "output"]);
    family("internlm2", model.model(), [cut, mlp(names, model.intermediate), rest])
}

/// Latent attention: what is shared by all heads is replicated.
fn deepseek(model: DeepSeek) -> Family {
    let &DeepSeek { heads, nope, rope, value, .. } = &model;
    let skipped = match model.mtp_layers {
        0 => Vec::new(),
        _ => vec![(
            if model.layers == 2 { "model.layers.2.**" } else { panic!("another number of layers") },
            Map::Skipped,
        )],
    };
    let attention = vec![
        ("self_attn.q_proj", column(Heads(heads, nope + rope))),
        ("self_attn.q_b_proj", column(Heads(heads, nope + rope))),
        ("self_attn.kv_b_proj", column(Heads(heads, nope + value))),
        ("self_attn.o_proj", row(Heads(heads, value))),
    ];
    let latent = replicated(&["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]);
    let shared = ["shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"];
    let shared = mlp(shared, model.shared * model.experts.intermediate);
    let rest = replicated(&["mlp.gate", "gate.e_score_correction_bias", "+norm", "embed_tokens", "lm_head"]);
    let name = if model.three { "deepseek_v3" } else { "deepseek_v2" };
    let lists =
        [skipped, attention, latent, experts(EXPERTS, model.experts), shared, mlp(MLP, model.intermediate), rest];
    Family { scheme: model.scheme, ..family(name, model.model(), lists) }
}

/// Gate and up alternate along the outputs; in MXFP4 inputs of `down_proj` stay in blocks of 32.
fn gpt_oss(model: GptOss) -> Family {
    let of = model.experts;
    let unit = if model.mxfp4 { 32 } else { 1 };
    let pairs = Heads(of.intermediate / unit, 2 * unit);
    let inputs = Heads(of.intermediate / unit, unit);
    // [experts, out, in] or [experts, in, out]
    let (input, output) = if model.mxfp4 { (2, 1) } else { (1, 2) };
    let cut = vec![
        ("self_attn.sinks", along(Heads(model.heads, 1))),
        ("mlp.experts.gate_up_proj", stacked(of.count, Some(input), Some((output, pairs)))),
        ("mlp.experts.down_proj", stacked(of.count, Some(input), Some((input, inputs)))),
    ];
    let attention = attention(model.heads, model.kv_heads, model.head_dim);
    let rest = replicated(&["+norm", "mlp.router", "embed_tokens", "lm_head"]);
    family("gpt_oss", model.model(), [attention, cut, rest])
}

/// Gate, then up, along the outputs of [experts, in, out].
fn llama4(model: Llama4) -> Family {
    let of = model.experts;
    let halves = Blocks(vec![Features::even(of.intermediate); 2]);
    let shared = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"];
    let dense = ["feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"];
    let stacks = vec![
        ("experts.gate_up_proj", stacked(of.count, Some(1), Some((2, halves)))),
        ("experts.down_proj", stacked(of.count, Some(1), Some((1, Features::even(of.intermediate))))),
    ];
    let vision = replicated(&["vision_model.**", "multi_modal_projector.**"]);
    let attention = attention(model.heads, model.kv_heads, model.head_dim);
    let rest = replicated(&["+norm", "router", "embed_tokens", "lm_head"]);
    let lists = [vision, attention, stacks, mlp(shared, of.intermediate), mlp(dense, model.intermediate_mlp), rest];
    family("llama4", model.model(), lists)
}

/// Queries with their gates by head; linear attention by key head, its convolution over [q; k; v].
fn qwen3_next(model: Qwen3Next) -> Family {
    let &Qwen3Next { heads, kv_heads, head_dim, linear_key_heads: keys, linear_head_dim: size, .. } = &model;
    let values = model.linear_value_heads / keys; // of each key head
    let attention = vec![
        ("self_attn.q_proj", column(Heads(heads, 2 * head_dim))),
        ("self_attn.k_proj", column(Shared(kv_heads, head_dim))),
        ("self_attn.v_proj", column(Shared(kv_heads, head_dim))),
        ("self_attn.o_proj", row(Heads(heads, head_dim))),
        ("linear_attn.in_proj_qkvz", column(Heads(keys, 2 * size + 2 * values * size))),
        ("linear_attn.in_proj_ba", column(Heads(keys, 2 * values))),
        ("linear_attn.conv1d", along(Blocks(vec![Heads(keys, size), Heads(keys, size), Heads(keys, values * size)]))),
        ("linear_attn.dt_bias", along(Heads(keys, values))),
        ("linear_attn.A_log", along(Heads(keys, values))),
        ("linear_attn.out_proj", row(Heads(keys, values * size))),
    ];
    let shared = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"];
    let rest = replicated(&["mlp.gate", "shared_expert_gate", "+norm", "embed_tokens", "lm_head"]);
    let mtp = vec![("mtp.**", Map::Skipped)];
    let lists = [mtp, attention, experts(EXPERTS, model.experts), mlp(shared, model.shared), rest];
    family("qwen3_next", model.model(), lists)
}

fn bert(bert: Bert) -> Family {
    let size = bert.hidden / bert.heads;
    let by_head = || column(Heads(bert.heads, size));
    let cut = vec![
        ("attention.self.query", by_head()),
        ("attention.self.key", by_head()),
        ("attention.self.value", by_head()),
        ("attention.output.dense", row(Heads(bert.heads, size))),
        ("intermediate.dense", column(Features::even(bert.intermediate))),
        ("output.dense", row(Features::even(bert.intermediate))),
    ];
    let rest = replicated(&["LayerNorm", "bert.embeddings.**", "bert.pooler.**", "cls.**"]);
    let tied = vec![
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ];
    Family { tied, ..family("bert", bert.model(), [cut, rest]) }
}

/// Every family, and one of each that divides by 3.
pub(crate) fn all() -> Vec<Family> {
    let three = |of: Experts| Experts { count: 6, intermediate: 48, ..of };
    let mut families = Vec::new();
    for kind in [Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3, Kind::Mixtral, Kind::Qwen3Moe] {
        let tiny = Llama::tiny(kind);
        let by_three = Llama { heads: 6, kv_heads: 3, intermediate: 288, experts: tiny.experts.map(three), ..tiny };
        families.extend([tiny, by_three].map(llama));
    }
    for tiny in [Gemma::TINY_2, Gemma::TINY_3, Gemma::TINY_3_VISION] {
        families.extend([tiny, Gemma { heads: 6, kv_heads: 3, ..tiny }].map(gemma));
    }
    families.extend([Phi3::TINY, Phi3 { hidden: 96, heads: 6, kv_heads: 3, ..Phi3::TINY }].map(phi3));
    let by_three = Gpt2 { hidden: 96, heads: 6, ..Gpt2::TINY };
    families.extend([Gpt2::TINY, Gpt2 { later: true, ..Gpt2::TINY }, by_three].map(gpt2));
    families
        .extend([GptNeox::TINY, GptNeox { hidden: 96, heads: 6, intermediate: 288, ..GptNeox::TINY }].map(gpt_neox));
    families.extend([Bloom::TINY, Bloom { hidden: 96, heads: 6, ..Bloom::TINY }].map(bloom));
    families.extend([Falcon::TINY_OLD, Falcon { hidden: 96, heads: 6, kv_heads: 6, ..Falcon::TINY_OLD }].map(falcon));
    families.extend([Falcon::TINY_NEW, Falcon { hidden: 96, heads: 12, kv_heads: 3, ..Falcon::TINY_NEW }].map(falcon));
    families.extend([Mpt::TINY, Mpt { hidden: 96, heads: 6, ..Mpt::TINY }].map(mpt));
    let by_three = Dbrx { hidden: 96, heads: 6, kv_heads: 3, experts: three(Dbrx::TINY.experts), ..Dbrx::TINY };
    families.extend([Dbrx::TINY, by_three].map(dbrx));
    let by_three = InternLm2 { hidden: 96, heads: 12, kv_heads: 3, ..InternLm2::TINY };
    families.extend([InternLm2::TINY, by_three].map(internlm2));
    for tiny in [DeepSeek::TINY_V2, DeepSeek::TINY_V3] {
        let by_three = DeepSeek { heads: 6, intermediate: 96, experts: three(tiny.experts), ..tiny };
        families.extend([tiny, by_three].map(deepseek));
    }
    let of_three = Experts { count: 6, intermediate: 288, ..GptOss::TINY.experts };
    for tiny in [GptOss::TINY, GptOss { mxfp4: false, ..GptOss::TINY }] {
        families.extend([tiny, GptOss { heads: 6, kv_heads: 3, experts: of_three, ..tiny }].map(gpt_oss));
    }
    let by_three = Llama4 { heads: 6, kv_heads: 3, experts: three(Llama4::TINY.experts), ..Llama4::TINY };
    families.extend([Llama4::TINY, by_three].map(llama4));
    let by_three = Qwen3Next {
        heads: 6,
        kv_heads: 3,
        linear_key_heads: 6,
        linear_value_heads: 12,
        experts: three(Qwen3Next::TINY.experts),
        shared: 48,
        ..Qwen3Next::TINY
    };
    families.extend([Qwen3Next::TINY, by_three].map(qwen3_next));
    families.extend([Bert::TINY, Bert { hidden: 96, heads: 6, intermediate: 288, ..Bert::TINY }].map(bert));
    families
}
