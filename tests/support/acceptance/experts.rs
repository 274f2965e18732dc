//! Mixtures of experts: one tensor for each, stacks, flat ones, and which ranks have which.

use super::{Case, Runs, absent, byte, case, dest, made, run, runs};
use crate::support::released::{Dbrx, DeepSeek, Experts, GptOss, Kind, Llama, Llama4, Model, Scheme};

fn qwen_30b() -> Model {
    Llama { layers: 1, ..Llama::QWEN_3_30B_A3B }.model()
}

fn tiny(count: u64) -> Model {
    let experts = Some(Experts { count, per_token: 2, intermediate: 64 });
    Llama { layers: 1, kv_heads: 8, experts, ..Llama::tiny(Kind::Qwen3Moe) }.model()
}

fn gpt_oss() -> Model {
    GptOss { layers: 1, ..GptOss::GPT_OSS_20B }.model()
}

fn scout() -> Model {
    Llama4 { layers: 1, files: 3, ..Llama4::LLAMA_4_SCOUT }.model()
}

pub(crate) fn separate() -> Vec<Case> {
    const DOWN: &str = "model.layers.0.mlp.experts.0.down_proj.weight";
    const GATE_UP: &str = "model.layers.0.mlp.experts.gate_up_proj";
    let qwen_235b = Llama {
        layers: 1,
        experts: Some(Experts { count: 2, per_token: 2, intermediate: 1536 }),
        ..Llama::QWEN_3_235B_A22B
    };
    vec![
        case("31", qwen_30b(), "--tp 8 --ep 8 --target vllm").on(
            3,
            [dest("model.layers.0.mlp.experts.routed_experts.w13_weight", "BF16", [16, 1536, 2048])
                .landing(gates_and_ups(48))],
        ),
        case("31, rules", qwen_30b(), "--tp 8 --ep 8")
            .rules(
                r#"{ match = "**.experts.0.gate_proj.weight", rename = "{1}.experts.gate_up_proj", expr.stack = [
                    { select = { by = "ep", count = 128, each = { concat = { dim = 0, parts = [
                        { tensor = "{1}.experts.{e}.gate_proj.weight" },
                        { tensor = "{1}.experts.{e}.up_proj.weight" } ] } } } } ] },
                   { match = "**.experts.*.down_proj.weight", skip = true },
                   { match = "**.experts.**", part = true },"#,
            )
            .on(3, [dest(GATE_UP, "BF16", [16, 1536, 2048]).landing(gates_and_ups(48))]),
        case("31, separate", qwen_30b(), "--tp 8 --ep 8").on(
            3,
            [
                absent("model.layers.0.mlp.experts.47.gate_proj.weight"),
                dest("model.layers.0.mlp.experts.48.gate_proj.weight", "BF16", [768, 2048]).file([run(0, 3_145_728)]),
                absent("model.layers.0.mlp.experts.64.gate_proj.weight"),
            ],
        ),
        case("32", qwen_235b.model(), "--tp 8")
            .on(5, [dest(DOWN, "BF16", [4096, 192]).file([runs(4096, 384, 1920, 3072)])]),
    ]
}

/// The runs of 16 experts from `first` on, of each its gate and its up.
fn gates_and_ups(first: u64) -> [Runs; 32] {
    std::array::from_fn(|at| {
        let (expert, part) = (first + at as u64 / 2, ["gate_proj", "up_proj"][at % 2]);
        run(0, 3_145_728).of(format!("model.layers.0.mlp.experts.{expert}.{part}.weight"))
    })
}

pub(crate) fn flat_and_stacked() -> Vec<Case> {
    const W1: &str = "transformer.blocks.0.ffn.experts.mlp.w1";
    const W2: &str = "transformer.blocks.0.ffn.experts.mlp.w2";
    const DOWN: &str = "language_model.model.layers.0.feed_forward.experts.down_proj";
    const GATE_UP: &str = "language_model.model.layers.0.feed_forward.experts.gate_up_proj";
    let dbrx = || Dbrx { layers: 1, ..Dbrx::DBRX }.model();
    let slices = || runs(16, 16_515_072, 16_515_072, 132_120_576);
    vec![
        case("24", dbrx(), "--tp 8").on(1, [dest(W1, "BF16", [21_504, 6144]).file([slices()])]),
        case("24, w2", dbrx(), "--tp 8")
            .rules(
                r#"{ match = "**.experts.mlp.w2", steps = [
                    { view = [16, 10752, 6144] }, { shard = { dim = 1 } }, { permute = [0, 2, 1] } ] },"#,
            )
            .on(
                1,
                [dest(W2, "BF16", [16, 6144, 1344])
                    .file([slices()])
                    .element([0, 0, 0], byte(16_515_072))
                    .element([15, 7, 9], byte(15 * 132_120_576 + 16_515_072 + 9 * 12_288 + 14))],
            ),
        case("37, plain", scout(), "--tp 8").on(
            2,
            [
                dest(DOWN, "BF16", [16, 1024, 5120]).file([runs(16, 10_485_760, 20_971_520, 83_886_080)]),
                dest(GATE_UP, "BF16", [16, 5120, 2048])
                    .file([runs(2, 2048, 4096, 16_384).times(5120, 32_768).times(16, 167_772_160)]),
            ],
        ),
        case("37", scout(), "--tp 8")
            .rules(
                r#"{ match = "**.experts.down_proj", steps = [{ shard = { dim = 1 } }, { permute = [0, 2, 1] }] },
                   { match = "**.experts.gate_up_proj", steps = [
                    { view = [16, 5120, 2, 8192] }, { shard = { dim = 3 } }, { permute = [0, 2, 3, 1] },
                    { merge = { dim = 1, count = 2 } } ] },"#,
            )
            .on(
                2,
                [
                    dest(DOWN, "BF16", [16, 5120, 1024])
                        .file([runs(16, 10_485_760, 20_971_520, 83_886_080)])
                        .element([3, 5, 7], byte(3 * 83_886_080 + (2048 + 7) * 10_240 + 10)),
                    // Of each of 5120 inputs the outputs 2048..3072 of gate and of up.
                    dest(GATE_UP, "BF16", [16, 2048, 5120])
                        .file([runs(2, 2048, 4096, 16_384).times(5120, 32_768).times(16, 167_772_160)])
                        .element([1, 1024 + 3, 9], byte(167_772_160 + 9 * 32_768 + 16_384 + 4096 + 6)),
                ],
            ),
    ]
}

/// MXFP4 in units of 32 inputs, which 4 and 8 ranks do not divide, and what belongs to it.
pub(crate) fn gpt_oss_rules() -> Vec<Case> {
    const BLOCKS: &str = "model.layers.0.mlp.experts.down_proj_blocks";
    const SCALES: &str = "model.layers.0.mlp.experts.down_proj_scales";
    const BIAS: &str = "model.layers.0.mlp.experts.down_proj_bias";
    const SINKS: &str = "model.layers.0.self_attn.sinks";
    const RULES: &str = r#"
        { match = "**.down_proj_{blocks,scales}", shard = { dim = 2, split = "ceil" } },
        { match = "**.down_proj_bias", steps = [{ on = { by = "tp", part = 0, fill = "zero" } }] },
        { match = "**.sinks", shard = { dim = 0, unit = 1, units = 64 } },"#;
    let down = |first: u64, blocks: u64| {
        [
            dest(BLOCKS, "U8", [32, 2880, blocks, 16]).file([runs(92_160, blocks * 16, first * 16, 1440)]),
            dest(SCALES, "U8", [32, 2880, blocks]).file([runs(92_160, blocks, first, 90)]),
        ]
    };
    let none = || [dest(BIAS, "BF16", [32, 2880]).file([]).fill("zero", 184_320)];
    vec![
        case("34", gpt_oss(), "--tp 4")
            .rules(RULES)
            .on(0, down(0, 23))
            .on(1, [
                dest(BLOCKS, "U8", [32, 2880, 23, 16]).file([runs(92_160, 368, 368, 1440)]),
                dest(SCALES, "U8", [32, 2880, 23]).file([runs(92_160, 23, 23, 90)]),
            ])
            .on(2, down(46, 23))
            .on(3, down(69, 21)),
        case("34, 8 ranks", gpt_oss(), "--tp 8").rules(RULES).on(0, down(0, 12)).on(6, down(72, 12)).on(7, down(84, 6)),
        case("35", gpt_oss(), "--tp 8").rules(RULES).on(7, [dest(SINKS, "BF16", [8]).file([run(112, 16)])]),
        case("35, bias", gpt_oss(), "--tp 4")
            .rules(RULES)
            .on(0, [dest(BIAS, "BF16", [32, 2880]).file([run(0, 184_320)])])
            .on(1, none())
            .on(3, none()),
        // Heads that are not there attend to nothing: 64 become 66 on 6 ranks.
        case("padded heads", gpt_oss(), "--tp 6")
            .rules(r#"{ match = "**.sinks", steps = [{ pad = { dim = 0, to = 66, fill = "-inf" } }, { shard = { dim = 0 } }] },"#)
            .on(5, [dest(SINKS, "BF16", [11]).file([run(110, 18)]).fill("-inf", 4).filled([9])]),
    ]
}

/// The same as vLLM has it: blocks and their bytes are one dimension.
pub(crate) fn gpt_oss_vllm() -> Vec<Case> {
    const W2: &str = "model.layers.0.mlp.experts.routed_experts.w2_weight";
    const SCALES: &str = "model.layers.0.mlp.experts.routed_experts.w2_weight_scale";
    const BIAS: &str = "model.layers.0.mlp.experts.routed_experts.w2_bias";
    let disk = |name: &str| format!("model.layers.0.mlp.experts.down_proj_{name}");
    let down = |first: u64, blocks: u64| {
        [
            dest(W2, "U8", [32, 2880, blocks * 16])
                .file([runs(92_160, blocks * 16, first * 16, 1440).of(disk("blocks"))]),
            dest(SCALES, "U8", [32, 2880, blocks]).file([runs(92_160, blocks, first, 90).of(disk("scales"))]),
        ]
    };
    let none = || [dest(BIAS, "BF16", [32, 2880]).file([]).fill("zero", 184_320)];
    vec![
        case("34", gpt_oss(), "--tp 4 --target vllm")
            .on(0, down(0, 23))
            .on(1, down(23, 23))
            .on(2, down(46, 23))
            .on(3, down(69, 21)),
        case("34, 8 ranks", gpt_oss(), "--tp 8 --target vllm").on(0, down(0, 12)).on(7, down(84, 6)),
        case("35", gpt_oss(), "--tp 8 --target vllm").on(
            7,
            [dest("model.layers.0.attn.sinks", "BF16", [8]).file([run(112, 16).of("model.layers.0.self_attn.sinks")])],
        ),
        case("35, plain", gpt_oss(), "--tp 8 --ep 8")
            .on(7, [dest("model.layers.0.self_attn.sinks", "BF16", [8]).file([run(112, 16)])]),
        case("35, bias", gpt_oss(), "--tp 4 --target vllm")
            .on(0, [dest(BIAS, "BF16", [32, 2880]).file([run(0, 184_320).of(disk("bias"))])])
            .on(1, none())
            .on(3, none()),
        // Rows of gate and up alternate and stay so: pairs of 23 blocks of 32.
        case("interleaved", gpt_oss(), "--tp 4 --target vllm").on(
            1,
            [dest("model.layers.0.mlp.experts.routed_experts.w13_bias", "BF16", [32, 1472])
                .file([runs(32, 2944, 2944, 11_520).of("model.layers.0.mlp.experts.gate_up_proj_bias")])],
        ),
        // The released MXFP4 has whole experts where they are divided over the groups.
        case("groups", gpt_oss(), "--tp 8 --ep 8").on(
            7,
            [dest("model.layers.0.mlp.experts.down_proj_blocks", "U8", [4, 2880, 90, 16])
                .file([run(28 * 2880 * 1440, 4 * 2880 * 1440)])],
        ),
    ]
}

/// Case 46 and section 6: which experts a rank has.
pub(crate) fn placed() -> Vec<Case> {
    const W2: &str = "model.layers.0.mlp.experts.routed_experts.w2_weight";
    let deepseek = || {
        let one =
            DeepSeek { layers: 1, dense_layers: 0, mtp_layers: 0, files: 1, scheme: Scheme::None, ..DeepSeek::V3 };
        one.model()
    };
    let downs = |experts: [u64; 10]| {
        experts.map(|at| run(0, 29_360_128).of(format!("model.layers.0.mlp.experts.{at}.down_proj.weight")))
    };
    let nine = [252, 253, 254, 255, 0, 1, 2, 3, 4]
        .map(|at| run(0, 29_360_128).of(format!("model.layers.0.mlp.experts.{at}.down_proj.weight")));
    let tiny_downs = |experts: [u64; 2]| {
        experts.map(|at| run(0, 64 * 64 * 2).of(format!("model.layers.0.mlp.experts.{at}.down_proj.weight")))
    };
    let quarter = |experts: [u64; 4], half: u64| {
        let part = |at| runs(64, 64, 64 * half, 128).of(format!("model.layers.0.mlp.experts.{at}.down_proj.weight"));
        experts.map(part)
    };
    vec![
        case("46, balanced", deepseek(), "--dp 24 --ep 24 --target vllm").on(
            16,
            [dest(W2, "BF16", [10, 7168, 2048]).landing(downs([176, 177, 178, 179, 180, 181, 182, 183, 184, 185]))],
        ),
        case("46, balanced by name", deepseek(), "--dp 24 --ep 24 --ep-split balanced").on(
            16,
            [
                absent("model.layers.0.mlp.experts.175.down_proj.weight"),
                dest("model.layers.0.mlp.experts.176.down_proj.weight", "BF16", [7168, 2048])
                    .file([run(0, 29_360_128)]),
                dest("model.layers.0.mlp.experts.185.down_proj.weight", "BF16", [7168, 2048])
                    .file([run(0, 29_360_128)]),
                absent("model.layers.0.mlp.experts.186.down_proj.weight"),
            ],
        ),
        case("46, table", deepseek(), "--dp 32 --ep 32 --target vllm --ep-split slots.txt")
            .beside("slots.txt", SLOTS)
            .on(
                27,
                [dest(W2, "BF16", [9, 7168, 2048]).landing(std::array::from_fn::<_, 9, _>(|at| {
                    run(0, 29_360_128).of(format!("model.layers.0.mlp.experts.{}.down_proj.weight", 243 + at))
                }))],
            )
            .on(28, [dest(W2, "BF16", [9, 7168, 2048]).landing(nine)]),
        case("round robin", tiny(16), "--tp 8 --ep 8 --target vllm --ep-split round-robin")
            .on(3, [dest(W2, "BF16", [2, 64, 64]).landing(tiny_downs([3, 11]))]),
        // vLLM counts expert-parallel ranks over data and tensor parallelism.
        case("flattened", tiny(16), "--dp 2 --tp 4 --ep 8 --target vllm")
            .on(5, [dest(W2, "BF16", [2, 64, 64]).landing(tiny_downs([10, 11]))]),
        // 4 groups of 2 neighbours that divide their experts, and TensorRT-LLM's order, in which neighbours differ in
        // their experts.
        case("groups", tiny(16), "--tp 8 --ep 4 --target vllm")
            .on(5, [dest(W2, "BF16", [4, 64, 32]).landing(quarter([8, 9, 10, 11], 1))]),
        case("groups, TensorRT-LLM", tiny(16), "--tp 8 --ep 4 --target vllm --order dp,pp,cp,tp,etp,ep")
            .on(5, [dest(W2, "BF16", [4, 64, 32]).landing(quarter([4, 5, 6, 7], 1))]),
        // Without expert parallelism experts are divided over all ranks of the same group.
        case("inside", tiny(2), "--dp 2 --tp 4 --target vllm").on(
            5,
            [dest(W2, "BF16", [2, 64, 8]).file([
                runs(64, 16, 80, 128).of("model.layers.0.mlp.experts.0.down_proj.weight"),
                runs(64, 16, 80, 128).of("model.layers.0.mlp.experts.1.down_proj.weight"),
            ])],
        ),
        made("EPLB in rules", [("experts", "BF16", &[8, 64])], "--tp 4 --ep 4")
            .rules(
                r#"{ match = "experts", shard = { dim = 0, by = "ep",
                    split = { table = [["0..3"], ["3..6"], [6, 7, 0], ["1..4"]] } } },"#,
            )
            .on(2, [dest("experts", "BF16", [3, 64]).landing([run(768, 256), run(0, 128)])])
            .on(3, [dest("experts", "BF16", [3, 64]).landing([run(128, 384)])]),
    ]
}

/// 256 experts and the first 32 again on 32 ranks.
const SLOTS: &str = "\
0..9\n9..18\n18..27\n27..36\n36..45\n45..54\n54..63\n63..72\n72..81\n81..90\n90..99\n99..108\n108..117\n117..126\n126..135
135..144\n144..153\n153..162\n162..171\n171..180\n180..189\n189..198\n198..207\n207..216\n216..225\n225..234\n234..243
243..252\n252..256 0..5\n5..14\n14..23\n23..32\n";
