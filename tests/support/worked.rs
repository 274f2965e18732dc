//! The worked files of `docs/rules.md` as expressions: for each the model that it is about, a mesh, and the same rules.

use shardlift::Rules;
use shardlift::plan::{Ax, Coord, Cut, Expr, Fill, Mesh, Packed, Quantization, ShardRule, Split, Stage, StageSplit};

use crate::released::{Bloom, DeepSeek, Experts, Falcon, Gpt2, GptNeox, GptOss, Llama, Llama4, Model, Phi3, Scheme};

pub(crate) struct Case {
    /// The heading.
    pub(crate) title: &'static str,
    pub(crate) model: Model,
    pub(crate) mesh: Mesh,
    pub(crate) rules: Rules,
    /// A destination and its shape on the last rank.
    pub(crate) last: (&'static str, &'static [u64]),
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |title, model, mesh, rules: Rules, name, shape| Case {
        title,
        model,
        mesh,
        rules: rules.replicate("**"),
        last: (name, shape),
    };
    let llama = || Llama { layers: 2, ..Llama::LLAMA_3_1_8B }.model();
    let bloom = || Bloom { layers: 2, ..Bloom::BLOOM_176B }.model();
    let phi = || Phi3 { layers: 2, ..Phi3::PHI_3_MEDIUM }.model();
    let gpt2 = || Gpt2 { layers: 2, ..Gpt2::GPT_2 }.model();
    let mixtral = || Llama { layers: 1, ..Llama::MIXTRAL_8X7B }.model();
    let ep = |ep| Mesh { ep, ..Mesh::tp(ep) };
    vec![
        case(
            "Columns and rows",
            llama(),
            Mesh::tp(8),
            columns_and_rows(),
            "model.layers.1.self_attn.o_proj.weight",
            &[4096, 512],
        ),
        case(
            "Key and value heads on more ranks than heads",
            llama(),
            Mesh::tp(16),
            shared_heads(),
            "model.layers.1.self_attn.v_proj.weight",
            &[1, 128, 4096],
        ),
        case(
            "Queries, keys and values of each head together",
            bloom(),
            Mesh::tp(8),
            heads(false),
            "h.1.self_attention.query_key_value.bias",
            &[14, 3, 128],
        ),
        case(
            "Queries, keys and values of each head, regrouped",
            bloom(),
            Mesh::tp(8),
            heads(true),
            "h.1.self_attention.query_key_value.weight",
            &[3, 14, 128, 14_336],
        ),
        case(
            "Queries, keys and values of each group together",
            Falcon { layers: 2, ..Falcon::FALCON_40B }.model(),
            Mesh::tp(4),
            groups(),
            "transformer.h.1.self_attention.query_key_value.weight",
            &[2 * 18 * 64, 8192],
        ),
        case(
            "Queries, keys and values behind each other",
            phi(),
            Mesh::tp(20),
            phi_qkv(),
            "model.layers.1.self_attn.qkv_proj.weight",
            &[4 * 128, 5120],
        ),
        case(
            "Gate and up in one tensor",
            phi(),
            Mesh::tp(20),
            fused_gate_up(),
            "model.layers.1.mlp.gate_up_proj.weight",
            &[2, 896, 5120],
        ),
        case(
            "Gate and up merged",
            llama(),
            Mesh::tp(8),
            merged_gate_up(),
            "model.layers.1.mlp.gate_up_proj.weight",
            &[2 * 1792, 4096],
        ),
        case("Inputs before outputs", gpt2(), Mesh::tp(4), inputs_first(), "h.1.attn.c_attn.weight", &[3, 192, 768]),
        case(
            "Each rank its experts",
            Llama { layers: 1, ..Llama::QWEN_3_30B_A3B }.model(),
            ep(8),
            experts(Coord::Axis(Ax::Ep), 128),
            "model.layers.0.mlp.experts.gate_up_proj",
            &[16, 2 * 768, 2048],
        ),
        case(
            "Each rank a part of every expert",
            mixtral(),
            Mesh::tp(8),
            cut_experts(),
            "model.layers.0.block_sparse_moe.experts.w2",
            &[8, 4096, 1792],
        ),
        case(
            "Experts in one tensor, inputs before outputs",
            Llama4 { layers: 1, ..Llama4::LLAMA_4_SCOUT }.model(),
            Mesh::tp(8),
            stored_experts(),
            "language_model.model.layers.0.feed_forward.experts.gate_up_proj",
            &[16, 2, 1024, 5120],
        ),
        case("A padded vocabulary", gpt2(), Mesh::tp(8), padded_vocabulary(), "wte.weight", &[6288, 768]),
        case(
            "Added tokens",
            Llama { layers: 1, vocab: 32_019, ..Llama::LLAMA_2_7B }.model(),
            Mesh::tp(8),
            added_tokens(),
            "model.embed_tokens.weight",
            &[4008 + 8, 4096],
        ),
        case("One row more", gpt2(), Mesh::tp(8), one_row_more(), "wte.weight", &[6284, 768]),
        case(
            "Finer scales",
            Llama {
                layers: 1,
                experts: Some(Experts { count: 4, per_token: 1, intermediate: 1536 }),
                scheme: Scheme::Fp8Block { size: 128 },
                ..Llama::QWEN_3_235B_A22B
            }
            .model(),
            Mesh::tp(8),
            finer_scales(),
            "model.layers.0.mlp.experts.3.down_proj.weight_scale_inv",
            &[64, 3],
        ),
        case(
            "Padded heads",
            GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model(),
            Mesh::tp(6),
            padded_heads(),
            "model.layers.0.self_attn.sinks",
            &[11],
        ),
        case(
            "Biases that are added once",
            GptNeox { layers: 2, ..GptNeox::GPT_NEOX_20B }.model(),
            Mesh::tp(8),
            biases(),
            "gpt_neox.layers.1.mlp.dense_4h_to_h.bias",
            &[6144],
        ),
        case(
            "Tied weights",
            Llama { layers: 2, ..Llama::QWEN_2_5_0_5B }.model(),
            Mesh { pp: 2, ..Mesh::tp(1) },
            Rules::new()
                .replicate("model.norm.weight")
                .held_by(Coord::Axis(Ax::Pp), 1)
                .alias("lm_head.weight", "model.embed_tokens.weight"),
            "lm_head.weight",
            &[151_936, 896],
        ),
        case(
            "Experts on several ranks",
            mixtral(),
            ep(4),
            redundant_experts(),
            "model.layers.0.block_sparse_moe.experts.w13",
            &[3, 2 * 14_336, 4096],
        ),
        case(
            "Rows in the order of other rotary embeddings",
            as_meta_stores_it(llama()),
            Mesh::tp(8),
            rotary(),
            "model.layers.1.self_attn.k_proj.weight",
            &[1, 2, 64, 4096],
        ),
        case(
            "A quantised layer",
            Llama {
                layers: 2,
                scheme: Scheme::Gptq { group: 128, act_order: false, bias: false },
                ..Llama::LLAMA_2_7B
            }
            .model(),
            Mesh::tp(2),
            gptq(),
            "model.layers.1.mlp.down_proj.qzeros",
            &[43, 512],
        ),
        case(
            "Two projections merged with their blocks",
            DeepSeek { layers: 1, mtp_layers: 0, ..DeepSeek::V3 }.model(),
            Mesh::tp(8),
            Rules::new()
                .module("**.q_a_proj", concat(0, vec![x(), tensor("{1}.kv_a_proj_with_mqa")]))
                .rename("{1}.fused_qkv_a_proj")
                .module_part("**.kv_a_proj_with_mqa"),
            "model.layers.0.self_attn.fused_qkv_a_proj.weight_scale_inv",
            &[17, 56],
        ),
        case(
            "Experts in blocks",
            GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model(),
            Mesh::tp(4),
            blocks_of_experts(),
            "model.layers.0.mlp.experts.down_proj_weight",
            &[32, 2880, 21, 16],
        ),
        case(
            "Pipeline stages with tied embeddings",
            Llama::QWEN_2_5_0_5B.model(),
            Mesh { pp: 5, ..Mesh::tp(2) },
            Rules::new()
                .shard("model.embed_tokens.weight", 0)
                .stage(Stage::Ends)
                .replicate("model.norm.weight")
                .stage(Stage::Last)
                .alias_on(Stage::Last, "lm_head.weight", "model.embed_tokens.weight")
                .pipeline("model.layers.*.**", 24, StageSplit::Vllm),
            "lm_head.weight",
            &[75_968, 896],
        ),
        case(
            "Experts by rank, one by one",
            mixtral(),
            ep(4),
            Rules::new().replicate("**.experts.*.*.weight").among(2, 8, cut(Coord::Axis(Ax::Ep), Split::Even, 1)),
            "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            &[4096, 14_336],
        ),
    ]
}

fn gptq() -> Rules {
    let mut quantization = Quantization::default();
    (quantization.packed, quantization.group) = (Some(Packed::Gptq), Some(128));
    Rules::new()
        .module("**.{q,k,v}_proj", ShardRule::dim(0).unit(128).expr())
        .module("**.{gate,up}_proj", shard(x(), 0))
        .module("**.{o,down}_proj", shard(x(), 1))
        .quantization(quantization)
}

fn blocks_of_experts() -> Rules {
    let by = || Coord::Axis(Ax::Tp);
    Rules::new()
        .module("**.experts.gate_up_proj", shard_by(x(), 1, cut(by(), Split::Ceil, 64)))
        .suffix("_blocks", "_weight")
        .suffix("_scales", "_weight_scale")
        .module("**.experts.down_proj", shard_by(x(), 2, cut(by(), Split::Ceil, 1)))
        .bias_on(by(), 0, Fill::Zero)
        .suffix("_blocks", "_weight")
        .suffix("_scales", "_weight_scale")
}

fn columns_and_rows() -> Rules {
    Rules::new().shard("**.{q,k,v,gate,up}_proj.weight", 0).shard("**.{o,down}_proj.weight", 1)
}

fn shared_heads() -> Rules {
    let by = Coord::Div(Box::new(Coord::Axis(Ax::Tp)), 2);
    Rules::new().place("**.{k,v}_proj.weight", shard_by(view(x(), &[8, 128, 4096]), 0, cut(by, Split::Even, 1)))
}

fn heads(regrouped: bool) -> Rules {
    let weight = shard(view(x(), &[112, 3, 128, 14_336]), 0);
    let bias = shard(view(x(), &[112, 3, 128]), 0);
    let (weight, bias) = match regrouped {
        true => (permute(weight, &[1, 0, 2, 3]), permute(bias, &[1, 0, 2])),
        false => (weight, bias),
    };
    Rules::new()
        .place("h.*.self_attention.query_key_value.weight", weight)
        .place("h.*.self_attention.query_key_value.bias", bias)
}

/// A group is 16 queries, a key and a value, 64 rows each.
fn groups() -> Rules {
    let part = |start, len| {
        let x = Expr::View { x: Box::new(Expr::Source), dims: vec![8, 18, 64, 8192] };
        let x = Expr::Shard { x: Box::new(x), dim: 0, cut: Cut::default() };
        let x = Expr::Slice { x: Box::new(x), dim: 1, start, len, step: 1 };
        Expr::Merge { x: Box::new(x), dim: 0, count: 3 }
    };
    let expr = Expr::Concat { dim: 0, parts: vec![part(0, 16), part(16, 1), part(17, 1)] };
    Rules::new().place("transformer.h.*.self_attention.query_key_value.weight", expr)
}

fn phi_qkv() -> Rules {
    let pairs = || cut(Coord::Div(Box::new(Coord::Axis(Ax::Tp)), 2), Split::Even, 128);
    let parts = vec![
        shard_by(slice(x(), 0, 0, 40 * 128), 0, cut(Coord::Axis(Ax::Tp), Split::Even, 128)),
        shard_by(slice(x(), 0, 40 * 128, 10 * 128), 0, pairs()),
        shard_by(slice(x(), 0, 50 * 128, 10 * 128), 0, pairs()),
    ];
    Rules::new().place("**.qkv_proj.weight", concat(0, parts))
}

fn fused_gate_up() -> Rules {
    let both = shard(view(x(), &[2, 17_920, 5120]), 1);
    Rules::new().place("**.gate_up_proj.weight", both).shard("**.down_proj.weight", 1)
}

fn merged_gate_up() -> Rules {
    let both = concat(0, vec![shard(x(), 0), shard(tensor("{1}.up_proj.weight"), 0)]);
    Rules::new()
        .place("**.gate_proj.weight", both)
        .rename("{1}.gate_up_proj.weight")
        .part("**.up_proj.weight")
        .shard("**.down_proj.weight", 1)
}

fn inputs_first() -> Rules {
    Rules::new()
        .place("h.*.attn.c_attn.weight", permute(shard(view(x(), &[768, 3, 768]), 2), &[1, 2, 0]))
        .place("h.*.attn.c_attn.bias", shard(view(x(), &[3, 768]), 1))
        .shard("h.*.mlp.c_fc.weight", 1)
        .transpose()
        .shard("h.*.{attn,mlp}.c_proj.weight", 0)
        .transpose()
        .skip("h.*.attn.bias")
}

fn experts(by: Coord, count: u64) -> Rules {
    let name = |expert: u64, what: &str| tensor(&format!("{{1}}.experts.{expert}.{what}_proj.weight"));
    let gate_up = |expert: u64| concat(0, vec![name(expert, "gate"), name(expert, "up")]);
    let all = |of: Vec<Expr>| Expr::Stack { parts: vec![select(by.clone(), Split::Even, of)] };
    Rules::new()
        .place("**.experts.0.gate_proj.weight", all((0..count).map(gate_up).collect()))
        .rename("{1}.experts.gate_up_proj")
        .place("**.experts.0.down_proj.weight", all((0..count).map(|expert| name(expert, "down")).collect()))
        .rename("{1}.experts.down_proj")
        .part("**.experts.*.*.weight")
}

/// `w1`, `w2` or `w3` of one of Mixtral's experts.
fn mixtral(expert: u64, which: u64) -> Expr {
    tensor(&format!("{{1}}.experts.{expert}.w{which}.weight"))
}

fn cut_experts() -> Rules {
    let both = |expert| concat(0, vec![shard(mixtral(expert, 1), 0), shard(mixtral(expert, 3), 0)]);
    Rules::new()
        .place("**.experts.0.w1.weight", Expr::Stack { parts: (0..8).map(both).collect() })
        .rename("{1}.experts.w13")
        .place(
            "**.experts.0.w2.weight",
            Expr::Stack { parts: (0..8).map(|expert| shard(mixtral(expert, 2), 1)).collect() },
        )
        .rename("{1}.experts.w2")
        .part("**.experts.**")
}

fn redundant_experts() -> Rules {
    let both = |expert| concat(0, vec![mixtral(expert, 1), mixtral(expert, 3)]);
    let places = Split::Table(vec![vec![0..3], vec![3..6], vec![6..8, 0..1], vec![1..4]]);
    let all = select(Coord::Axis(Ax::Ep), places, (0..8).map(both).collect());
    Rules::new()
        .place("**.experts.0.w1.weight", Expr::Stack { parts: vec![all] })
        .rename("{1}.experts.w13")
        .skip("**.experts.*.w2.weight")
        .part("**.experts.**")
}

fn stored_experts() -> Rules {
    Rules::new()
        .place("**.experts.gate_up_proj", permute(shard(view(x(), &[16, 5120, 2, 8192]), 3), &[0, 2, 3, 1]))
        .place("**.experts.down_proj", permute(shard(x(), 1), &[0, 2, 1]))
}

fn padded_vocabulary() -> Rules {
    Rules::new().place("wte.weight", shard(pad(x(), 50_304, Fill::Zero), 0))
}

fn added_tokens() -> Rules {
    let base = shard(pad(slice(x(), 0, 0, 32_003), 32_064, Fill::Zero), 0);
    let added = shard(pad(slice(x(), 0, 32_003, 16), 64, Fill::Zero), 0);
    Rules::new().place("model.embed_tokens.weight", concat(0, vec![base, added]))
}

fn one_row_more() -> Rules {
    let rows = shard_by(x(), 0, cut(Coord::Axis(Ax::Tp), Split::Ceil, 1));
    Rules::new().place("wte.weight", pad(rows, 50_257u64.div_ceil(8) + 1, Fill::Zero))
}

fn finer_scales() -> Rules {
    let twice = || repeat(repeat(x(), 0, 2), 1, 2);
    Rules::new()
        .shard("**.experts.*.{gate,up}_proj.weight", ShardRule::dim(0).unit(64))
        .place("**.experts.*.{gate,up}_proj.weight_scale_inv", shard(twice(), 0))
        .shard("**.experts.*.down_proj.weight", ShardRule::dim(1).unit(64))
        .place("**.experts.*.down_proj.weight_scale_inv", shard(twice(), 1))
}

fn padded_heads() -> Rules {
    let queries = || shard_by(pad(x(), 66 * 64, Fill::Zero), 0, cut(Coord::Axis(Ax::Tp), Split::Even, 64));
    Rules::new()
        .place("**.sinks", shard(pad(x(), 66, Fill::NegInf), 0))
        .place("**.q_proj.weight", queries())
        .place("**.q_proj.bias", queries())
}

fn biases() -> Rules {
    let tp = || Coord::Axis(Ax::Tp);
    Rules::new()
        .replicate("**.attention.dense.bias")
        .held_by(tp(), 0)
        .place("**.dense_4h_to_h.bias", Expr::On { x: Box::new(x()), by: tp(), part: 0, fill: Fill::Zero })
        .shard("**.{query_key_value,dense_h_to_4h}.*", 0)
        .shard("**.{attention.dense,dense_4h_to_h}.weight", 1)
}

fn rotary() -> Rules {
    let pairs = |heads: u64| permute(shard(view(x(), &[heads, 64, 2, 4096]), 0), &[0, 2, 1, 3]);
    Rules::new()
        .place("layers.*.attention.wq.weight", pairs(32))
        .rename("model.layers.{1}.self_attn.q_proj.weight")
        .place("layers.*.attention.wk.weight", pairs(8))
        .rename("model.layers.{1}.self_attn.k_proj.weight")
}

/// The names of Meta's own files.
fn as_meta_stores_it(mut model: Model) -> Model {
    for tensor in &mut model.tensors {
        let name = tensor.name.replace("model.layers", "layers").replace("self_attn.", "attention.w");
        tensor.name = name.replace("_proj", "");
    }
    model
}

fn x() -> Expr {
    Expr::Source
}

fn tensor(name: &str) -> Expr {
    Expr::Tensor(name.into())
}

fn view(x: Expr, dims: &[u64]) -> Expr {
    Expr::View { x: Box::new(x), dims: dims.into() }
}

fn slice(x: Expr, dim: usize, start: u64, len: u64) -> Expr {
    Expr::Slice { x: Box::new(x), dim, start, len, step: 1 }
}

fn cut(by: Coord, how: Split, unit: u64) -> Cut {
    let mut cut = Cut::default();
    (cut.by, cut.how, cut.unit) = (by, how, unit);
    cut
}

fn shard(x: Expr, dim: usize) -> Expr {
    shard_by(x, dim, Cut::default())
}

fn shard_by(x: Expr, dim: usize, cut: Cut) -> Expr {
    Expr::Shard { x: Box::new(x), dim, cut }
}

fn permute(x: Expr, order: &[usize]) -> Expr {
    Expr::Permute { x: Box::new(x), order: order.into() }
}

fn concat(dim: usize, parts: Vec<Expr>) -> Expr {
    Expr::Concat { dim, parts }
}

fn select(by: Coord, how: Split, of: Vec<Expr>) -> Expr {
    Expr::Select { by: cut(by, how, 1), of }
}

/// Rows up to so many.
fn pad(x: Expr, to: u64, fill: Fill) -> Expr {
    Expr::Pad { x: Box::new(x), dim: 0, to, fill }
}

fn repeat(x: Expr, dim: usize, times: u64) -> Expr {
    Expr::Repeat { x: Box::new(x), dim, times }
}
