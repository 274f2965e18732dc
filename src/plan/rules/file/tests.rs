use super::grammar::Part;
use super::*;
use crate::dtype::Dtype;
use crate::limits::{EXPRESSION_DEPTH, EXPRESSIONS_MAX};
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Fill;
use crate::plan::world::{Ax, Coord};

fn refused(text: &str) -> (Option<&'static str>, String) {
    let error = Rules::from_toml(text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rules);
    (error.rule(), error.to_string())
}

#[test]
fn the_documented_file_parses() {
    let rules = Rules::from_toml(
        r#"
        rule = [
          { match = "**.{q,k,v}_proj.weight", shard = { dim = 0, split = "even", unit = 128 } },
          { match = "**.{o,down}_proj.weight", shard = { dim = 1, by = ["cp", "tp"] } },
          { match = "head.*", only = 0, rename = "heads.{1}", optional = true },
          { match = "**.rotary_emb.inv_freq", skip = true },
          { match = "**", replicate = true },
        ]
        alias = [{ name = "lm_head.weight", of = "model.embed_tokens.weight" }]
        "#,
    )
    .unwrap();
    assert_eq!(rules.rules.len(), 5);
    assert_eq!(rules.aliases.len(), 1);
}

#[test]
fn what_is_not_understood_is_refused() {
    assert_eq!(refused("rule = [{ match = \"**\", replicat = true }]").0, Some("rules-file"));
    assert_eq!(refused("rules = []").0, Some("rules-file"));
    assert_eq!(refused("rule = [{ match = \"**\" }]").0, Some("rules-file"));
    assert_eq!(refused("rule = [{ match = \"**\", skip = false }]").0, Some("rules-file"));
    assert_eq!(refused("rule = [{ match = \"**\", skip = true, only = 1 }]").0, Some("rules-file"));
    assert!(refused("rule = [{ match = \"a\", only = -1 }]").1.contains("rule `a`: line 1: only: out of range"));
    assert_eq!(refused("rule = [{ match = \"a**\", skip = true }]").0, Some("pattern"));
    assert_eq!(refused("rule = [{ match = \"*\", replicate = true, rename = \"{2}\" }]").0, Some("rename"));
    assert!(refused("\n\nrule = 1").1.contains("line 3"));
}

#[test]
fn a_shard_that_makes_no_sense_is_refused_with_its_rule() {
    for (shard, rule, what) in [
        ("dim = -1", "rules-file", "line 1: shard.dim: out of range: expected 0 or more, found -1"),
        ("dim = 0, unit = 0", "rules-file", "shard.unit: out of range: expected 1 or more, found 0"),
        ("dim = 0, units = -8", "rules-file", "shard.units: out of range: expected 0 or more, found -8"),
        ("dim = 0, by = 'xx'", "rules-file", "expected one of dp, pp, cp, tp, ep, etp, or a list of them, found `xx`"),
        ("dim = 0, by = ['tp', 'one']", "rules-file", "found `one`"),
        ("dim = 0, by = { div = 'tp' }", "rules-file", "or { mod = COORDINATE, by = N }, found a table of div"),
        ("dim = 0, by = { div = 'tp', mod = 'tp', by = 2 }", "rules-file", "not a coordinate"),
        ("dim = 0, by = { div = 'tp', by = 0 }", "rules-file", "shard.by: out of range: expected 1 or more, found 0"),
        ("dim = 0, by = { mod = { div = 'x', by = 2 }, by = 2 }", "rules-file", "found `x`"),
        ("dim = 0, by = ['tp', 'ep']", "coordinate", "axes ep and tp name the same ranks"),
        ("dim = 0, by = { div = [], by = 2 }", "coordinate", "no axis"),
        ("dim = 0, by = 3", "rules-file", "found integer"),
        ("dim = 0, by = ['tp', 'tp']", "coordinate", "axis tp is named twice"),
        ("dim = 0, by = []", "coordinate", "no axis"),
    ] {
        let refused = refused(&format!("rule = [{{ match = '**.w', shard = {{ {shard} }} }}]"));
        assert_eq!(refused.0, Some(rule), "{shard}");
        assert!(refused.1.starts_with("rule `**.w`: ") && refused.1.contains(what), "{refused:?}");
    }
}

#[test]
fn coordinates_are_written_as_they_are_displayed() {
    for text in [
        "\"one\"",
        "\"etp\"",
        "[\"pp\", \"ep\"]",
        "{ div = \"tp\", by = 4 }",
        "{ mod = { div = [\"cp\", \"tp\"], by = 4 }, by = 2 }",
    ] {
        let table: toml::Table = format!("by = {text}").parse().unwrap();
        assert_eq!(Part::try_from(table["by"].clone()).ok().unwrap().0.to_string(), text);
    }
}

#[test]
fn names_that_no_file_can_hold_are_refused() {
    for (rest, rule) in [
        ("replicate = true, rename = '__metadata__'", "rename"),
        ("replicate = true, rename = ''", "rename"),
        ("replicate = true, rename = 'x.{0}'", "rename"),
        ("replicate = true, rename = 'x.{3}'", "rename"),
        ("replicate = true, rename = 'x.{y}'", "rename"),
        ("skip = true, rename = 'x'", "rename"),
    ] {
        let refused = refused(&format!("rule = [{{ match = 'a.*.*', {rest} }}]"));
        assert_eq!(refused.0, Some(rule), "{rest}");
        assert!(refused.1.starts_with("rule `a.*.*`: "), "{}", refused.1);
    }
    let alias = |name: &str, of: &str| refused(&format!("alias = [{{ name = '{name}', of = '{of}' }}]"));
    for name in ["", "__metadata__"] {
        let refused = alias(name, "a");
        assert!(refused.0 == Some("alias") && refused.1.contains("alias of `a`"), "{refused:?}");
    }
    assert_eq!(alias("a", "a").0, Some("alias"));
}

/// The expression of the rule `{ match = '*.w', REST }`.
fn made(rest: &str) -> Expr {
    let rules = Rules::from_toml(&format!("[[rule]]\nmatch = '*.w'\n{rest}")).unwrap_or_else(|error| panic!("{error}"));
    let Placement::Place { expr, .. } = &rules.rules[0].placement else { panic!("places nothing") };
    expr.clone()
}

fn tensor(name: &str) -> Expr {
    Expr::Tensor(name.into())
}

fn boxed(expr: Expr) -> Box<Expr> {
    Box::new(expr)
}

#[test]
fn steps_are_done_in_their_order() {
    let x = boxed(Expr::View { x: boxed(Expr::Source), dims: vec![4, 2, 8] });
    let x = boxed(Expr::Slice { x, dim: 1, start: 1, len: 1, step: 1 });
    let x = boxed(Expr::Slice { x, dim: 0, start: 0, len: 2, step: 2 });
    let cut = Cut { by: Coord::Axis(Ax::Ep), how: Split::Balanced, unit: 2, units: Some(4), replicate_units: true };
    let x = boxed(Expr::Shard { x, dim: 2, cut });
    let x = boxed(Expr::Permute { x, order: vec![2, 0, 1] });
    let x = boxed(Expr::Cast { x, to: Dtype::Bf16 });
    let x = boxed(Expr::Pad { x, dim: 0, to: 9, fill: Fill::NegInf });
    let x = boxed(Expr::Repeat { x, dim: 1, times: 3 });
    let x = boxed(Expr::Permute { x, order: vec![1, 0] });
    let expected = Expr::On { x, by: Coord::Flat(vec![Ax::Cp, Ax::Tp]), part: 1, fill: Fill::Bytes(vec![0x80, 0x3F]) };
    let steps = "steps = [
        { view = [4, 2, 8] },
        { slice = { dim = 1, start = 1, len = 1 } },
        { slice = { dim = 0, start = 0, len = 2, step = 2 } },
        { shard = { dim = 2, by = 'ep', split = 'balanced', unit = 2, units = 4, replicate_units = true } },
        { permute = [2, 0, 1] },
        { cast = 'bf16' },
        { pad = { dim = 0, to = 9, fill = '-inf' } },
        { repeat = { dim = 1, times = 3 } },
        { transpose = true },
        { on = { by = ['cp', 'tp'], part = 1, fill = 'hex:803f' } },
    ]";
    assert_eq!(made(steps), expected);
    assert_eq!(made(&format!("[rule.expr]\n{steps}")), expected);
    assert_eq!(made("expr = {}"), Expr::Source);
}

#[test]
fn origins_and_selections_are_expressions() {
    let how = Split::Table(vec![vec![7..8, 252..256], vec![0..5], vec![]]);
    let pair = |e| Expr::Stack { parts: vec![tensor(&format!("{{1}}.{e}.up")), tensor(&format!("{{1}}.{e}.down"))] };
    let select = Expr::Select { by: Cut { how, ..Cut::default() }, of: (0..3).map(pair).collect() };
    let one = Expr::Const { dtype: Dtype::U8, dims: vec![1, 2], fill: Fill::One };
    let expected = Expr::Concat { dim: 1, parts: vec![Expr::Source, select, one] };
    let text = "[rule.expr.concat]
        dim = 1
        parts = [
            {},
            { select = { split = { table = [[7, '252..256'], ['0..5'], []] }, count = 3, each = { stack = [
                { tensor = '{1}.{e}.up' },
                { tensor = '{1}.{e}.down' },
            ] } } },
            { const = { dtype = 'u8', dims = [1, 2], fill = 'one' } },
        ]";
    assert_eq!(made(text), expected);
    let of = made("expr = { stack = [{ select = { of = [{ tensor = 'a' }, { tensor = 'b' }] } }] }");
    assert_eq!(
        of,
        made("expr = { stack = [{ select = { of = [{ tensor = 'a' }, { tensor = 'b' }], split = 'even' } }] }")
    );
}

#[test]
fn ranks_that_hold_a_parameter_are_a_part_of_a_division() {
    let owner = |rest: &str| {
        let rules = Rules::from_toml(&format!("[[rule]]\nmatch = '*.w'\n{rest}")).unwrap();
        let Placement::Place { owner, .. } = rules.rules[0].placement.clone() else { panic!("places nothing") };
        owner
    };
    let last = Owner::Where(Coord::Axis(Ax::Pp), 3);
    assert_eq!(owner("shard = { dim = 0 }\nwhere = { by = 'pp', part = 3 }"), last);
    assert_eq!(owner("replicate = true\nwhere = { by = 'pp', part = 3 }\ncast = 'bf16'"), last);
    assert_eq!(owner("steps = []"), Owner::All);
}

#[test]
fn modules_are_said_as_in_rust() {
    let rules = Rules::from_toml(
        "[[rule]]
        module = '**.o_proj'
        shard = { dim = 1, unit = 8 }
        orientation = 'in-out'
        bias = { by = 'tp', part = 0, fill = 'zero' }
        suffix = { '.weight' = '.kernel', '' = '.whole' }
        rename = '{1}.o'

        [[rule]]
        module = '**.experts.*.{w1,w2}'
        expr = { tensor = '{1}.w3', steps = [{ shard = { dim = 0 } }] }
        among = { wildcard = 2, count = 8, by = 'ep', split = 'balanced' }
        stage = 'last'

        [[rule]]
        module = '**.{k,v}_proj'
        part = true

        [quantization]
        method = 'awq'
        bits = 8
        group = 64
        act_order = true
        block = [64, 32]
        refine = true

        [pipeline]
        layers = 'model.layers.*.**'
        count = 12
        split = [5, 7]",
    )
    .unwrap();
    let fill = Fill::Zero;
    let named = Expr::Shard { x: boxed(tensor("{1}.w3")), dim: 0, cut: Cut::default() };
    let among = Cut { by: Coord::Axis(Ax::Ep), how: Split::Balanced, ..Cut::default() };
    let rust = Rules::new()
        .module("**.o_proj", crate::plan::ShardRule::dim(1).unit(8).expr())
        .orientation(crate::plan::Orientation::InOut)
        .bias_on(Coord::Axis(Ax::Tp), 0, fill)
        .suffix("", ".whole")
        .suffix(".weight", ".kernel")
        .rename("{1}.o")
        .module("**.experts.*.{w1,w2}", named)
        .among(2, 8, among)
        .stage(crate::plan::Stage::Last)
        .module_part("**.{k,v}_proj")
        .pipeline("model.layers.*.**", 12, crate::plan::StageSplit::Counts(vec![5, 7]))
        .quantization(Quantization {
            packed: Some(crate::plan::Packed::Awq),
            bits: 8,
            group: Some(64),
            act_order: true,
            block: [64, 32],
            refine: true,
        });
    assert_eq!(format!("{rules:?}"), format!("{rust:?}"));

    let said = |text: &str| format!("{:?}", Rules::from_toml(text).unwrap());
    let rust = Rules::new().pipeline("h.*.**", None, crate::plan::StageSplit::Vllm);
    assert_eq!(said("pipeline = { layers = 'h.*.**', split = 'vllm' }"), format!("{rust:?}"));
    let aliased = Rules::new().alias_on(crate::plan::Stage::Ends, "a", "b");
    assert_eq!(said("alias = [{ name = 'a', of = 'b', stage = 'ends' }]"), format!("{aliased:?}"));
    let listed = Rules::new().replicate("a").stage(crate::plan::Stage::Listed(vec![0, 2]));
    assert_eq!(said("rule = [{ match = 'a', replicate = true, stage = [0, 2] }]"), format!("{listed:?}"));
}

#[test]
fn mistakes_outside_of_rules_are_named_with_their_keys() {
    for (text, message) in [
        (
            "pipeline = { layers = 'h.*.**', split = 'fair' }",
            "rules file: line 1: pipeline.split: no such split: expected one of even, vllm, hf, trt, or a list of numbers of layers, found `fair`",
        ),
        ("pipeline = { layers = 'h.*.**', split = [-1] }", "found integer"),
        ("pipeline = { layers = 'h.*.**', count = 0 }", "pipeline.count: out of range: expected 1 or more, found 0"),
        ("pipeline = { count = 2 }", "missing field `layers`"),
        ("pipeline = { layers = 'h**' }", "`**` that is not a whole segment"),
        ("quantization = { method = 'gguf' }", "no such method: expected one of gptq, awq, found `gguf`"),
        ("quantization = { bits = 33 }", "expected 1 to 32 bits, found 33"),
        ("quantization = { group = 0 }", "quantization.group: out of range"),
        ("quantization = { block = [0, 128] }", "quantization.block: out of range"),
        ("quantization = { act_order = false }", "says nothing: expected true, found `false`"),
        (
            "alias = [{ name = 'a', of = 'b', stage = 'middle' }]",
            "alias[0].stage: no such stages: expected one of first",
        ),
    ] {
        let error = refused(text).1;
        assert!(error.contains(message), "{text}\n{error}\n{message}");
    }
}

#[test]
fn a_mistake_is_named_with_its_rule_and_its_keys() {
    let mut wrong = Vec::new();
    for (rest, message) in [
        ("replicat = true", "rule `*.w`: line 3: unknown field: expected one of `match`"),
        (
            "steps = [{ view = [2, 2] }, { slice = { dim = 0, len = 1 } }]",
            "line 3: steps[1].slice: missing field `start`",
        ),
        (
            "steps = [{ slice = { dim = 0, start = 'x', len = 1 } }]",
            "steps[0].slice.start: invalid type: expected i64, found string \"x\"",
        ),
        ("steps = [{ sice = { dim = 0 } }]", "steps[0]: unknown variant: expected one of `view`, `merge`"),
        ("steps = [{ view = [1], permute = [0] }]", "steps[0]: wanted exactly 1 element"),
        ("steps = [{ transpose = false }]", "steps[0]: says nothing: expected true, found `false`"),
        (
            "steps = [{ cast = 'f64' }]",
            "steps[0]: no such type to cast to: expected one of bf16, f16, f32, found `f64`",
        ),
        (
            "expr = { concat = { dim = 0, parts = [{}, { tenor = 'x' }] } }",
            "expr.concat.parts[1]: unknown field: expected one of `tensor`",
        ),
        (
            "expr.concat = { dim = 0, parts = [{}, { tensor = 'x', stack = [] }] }",
            "expr: concat.parts[1]: an expression begins with one thing: expected one of tensor, concat, stack, select, const, found tensor and stack",
        ),
        (
            "expr = { const = { dtype = 'bf17', dims = [1], fill = 'one' } }",
            "expr.const.dtype: no such type: expected a type of safetensors in lower case, found `bf17`",
        ),
        ("expr = { const = { dtype = 'F32', dims = [1], fill = 'one' } }", "found `F32`"),
        (
            "expr = { const = { dtype = 'f32', dims = [1], fill = 'two' } }",
            "expr.const.fill: no such value: expected one of zero, one, -inf, hex:BYTES",
        ),
        ("expr = { const = { dtype = 'f32', dims = [1], fill = 'hex:' } }", "found `hex:`"),
        ("expr = { const = { dtype = 'f32', dims = [1], fill = 'hex:123' } }", "found `hex:123`"),
        (
            "expr = { stack = [{ select = { of = [], count = 1 } }] }",
            "expr: stack[0]: select: no list to select from: expected of, or each and count, found of and count",
        ),
        ("expr = { stack = [{ select = { each = {} } }] }", "found each"),
        ("expr = { stack = [{ select = {} }] }", "found neither"),
        ("expr = { select = { of = [{}] } }", "rule `*.w`: a selection is no part of a concat or a stack"),
        (
            "shard = { dim = 0, split = 'fair' }",
            "shard.split: no such split: expected one of even, ceil, balanced, last-takes-rest, round-robin, { table = [[UNITS...]...] }, found `fair`",
        ),
        ("shard = { dim = 0, split = { tables = [] } }", "found a table of tables"),
        (
            "shard = { dim = 0, split = { table = [7] } }",
            "shard.split: no units of a table: expected a list of units 7 and ranges \"252..256\" for each part, found integer",
        ),
        ("shard = { dim = 0, split = { table = [['5..4']] } }", "found `5..4`"),
        ("shard = { dim = 0, split = { table = [[-1]] } }", "found -1"),
        (
            "shard = { dim = 0 }\nsteps = []",
            "does not say who gets what: expected one of replicate, shard, skip, only, part, steps, expr, found shard and steps",
        ),
        ("optional = true", "part, steps, expr, found none"),
        ("only = 0\nwhere = { by = 'tp', part = 0 }", "rule `*.w`: has both only and where"),
        ("skip = true\nwhere = { by = 'tp', part = 0 }", "rule `*.w`: where of a tensor that is skipped"),
        ("part = true\ncast = 'bf16'", "rule `*.w`: cast of a part of other destinations"),
        ("steps = []\ntranspose = true", "rule `*.w`: transpose beside steps, where it is a step"),
        ("expr = {}\npermute = [0]", "rule `*.w`: permute beside expr, where it is a step"),
        (
            "replicate = true\nwhere = { by = 'tp', part = -1 }",
            "where.part: out of range: expected 0 or more, found -1",
        ),
        ("replicate = true\nwhere = { by = [], part = 0 }", "rule `*.w`: no axis"),
        ("part = true\nrename = 'x'", "rule `*.w`: a tensor that is skipped or a part"),
        ("part = true\nstage = 'last'", "rule `*.w`: stage of a part of other destinations"),
        ("skip = true\namong = { wildcard = 1, count = 2 }", "rule `*.w`: among of a tensor that is skipped"),
        ("only = 0\nstage = 'last'", "rule `*.w`: has both only and stage"),
        (
            "steps = []\nstage = 'none'",
            "stage: no such stages: expected one of first, last, ends, all, or a list of stages from 0 on, found `none`",
        ),
        (
            "steps = []\nstage = []",
            "stage: no such stages: expected one of first, last, ends, all, or a list of stages from 0 on, found array",
        ),
        (
            "steps = []\namong = { wildcard = 0, count = 2 }",
            "among.wildcard: out of range: expected 1 or more, found 0",
        ),
        ("steps = []\namong = { wildcard = 2, count = 2 }", "there is no such wildcard: expected 1 to 1, found 2"),
        ("steps = []\namong = { count = 2 }", "among: missing field `wildcard`"),
        ("steps = []\norientation = 'in-out'", "orientation beside match: expected a rule of modules"),
        ("steps = []\nbias = { by = 'tp', part = 0, fill = 'one' }", "bias beside match"),
        ("steps = []\nsuffix = { }", "suffix beside match"),
        ("expr = { tensor = '{2}.x' }", "rule `*.w`: source `{2}.x` asks for more"),
        ("expr = { tensor = '{e}.x' }", "rule `*.w`: "),
    ] {
        let refused = refused(&format!("[[rule]]\nmatch = '*.w'\n{rest}")).1;
        if !refused.contains(message) || !refused.starts_with("rule `*.w`: ") {
            wrong.push(format!("{rest}\n{refused}\n{message}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    for (rest, message) in [
        ("steps = [{ view = [2, 2] }]", "expected shard, slice, pad, on, cast, concat or stack, found view"),
        ("shard = { dim = 0 }\ntranspose = true", "found permute"),
        ("expr = { stack = [{ const = { dtype = 'u8', dims = [], fill = 'one' } }] }", "found const"),
        ("steps = [{ repeat = { dim = 0, times = 2 } }]", "found repeat"),
        ("expr = { tensor = '{2}.x' }", "source `{2}.x` asks for more"),
        ("steps = []\norientation = 'io'", "orientation: no such orientation: expected one of out-in, in-out"),
        ("steps = []\nbias = { by = [], part = 0, fill = 'one' }", "rule `*.w`: no axis"),
        ("steps = []\nsuffix = { 'weight' = 'w' }", "no tensor of a module ends in `weight`"),
        ("part = true\nsuffix = { '.weight' = '.w' }", "suffix of a part of other destinations"),
    ] {
        let refused = refused(&format!("[[rule]]\nmodule = '*.w'\n{rest}")).1;
        assert!(refused.contains(message), "{rest}\n{refused}\n{message}");
    }
    for (said, found) in [("", "found neither"), ("match = 'a'\nmodule = 'a'\n", "found both")] {
        let error = refused(&format!("[[rule]]\nmatch = '**'\nskip = true\n[[rule]]\n{said}skip = true")).1;
        assert_eq!(error, format!("rule[1]: does not say what it is about: expected one of match, module, {found}"));
    }
    assert!(
        refused("[[alias]]\nname = 3")
            .1
            .starts_with("rules file: line 2: alias[0].name: invalid type: expected a string")
    );
}

#[test]
fn a_short_file_cannot_say_too_much() {
    let each =
        |count: usize, each: &str| format!("{{ stack = [{{ select = {{ count = {count}, each = {each} }} }}] }}");
    let thousands = each(1000, &each(1000, "{ tensor = '{e}' }"));
    let error = refused(&format!("rule = [{{ match = '*.w', expr = {thousands} }}]"));
    assert!(error.1.contains("too many expressions") && error.1.contains(&EXPRESSIONS_MAX.to_string()), "{error:?}");
    let twice = each(EXPRESSIONS_MAX / 2 + 1, "{}");
    let rule = |at: usize| format!("{{ match = '{at}', expr = {twice} }}");
    assert!(refused(&format!("rule = [{}, {}]", rule(0), rule(1))).1.contains("rule `1`: expr: "));
    let long = each(EXPRESSIONS_MAX / 4, &format!("{{ tensor = '{}' }}", "x".repeat(1000)));
    assert!(refused(&format!("rule = [{{ match = '*.w', expr = {long} }}]")).1.contains("too many expressions"));

    let steps = |count: usize| format!("steps = [{}]", "{ cast = 'f32' },".repeat(count));
    assert!(refused(&format!("rule = [{{ match = 'w', {} }}]", steps(1 << 16))).1.contains("nested too deep"));
    let made = format!("{{ stack = [{{ {} }}] }}", steps(EXPRESSION_DEPTH));
    assert!(refused(&format!("rule = [{{ match = 'w', expr = {made} }}]")).1.contains("expr: stack[0]: expressions"));
    let nested = format!("{}{{}}{}", "{ stack = [".repeat(1000), "] }".repeat(1000));
    assert!(refused(&format!("rule = [{{ match = 'w', expr = {nested} }}]")).1.contains("rules file, line 1"));
}
