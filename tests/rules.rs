//! Rules files as they are documented, and what the command line makes of rules that do not fit.
#![cfg(feature = "cli")]

#[path = "support/released/mod.rs"]
mod released;
#[path = "support/worked.rs"]
mod worked;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use shardlift::plan::{Ax, Coord, Mesh};
use shardlift::{Checkpoint, Plan, Rank, Rules, World};

use self::worked::Case;

#[test]
fn every_documented_example_fits_a_model() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let world = World::host(1).with_mesh(Mesh { cp: 2, ..Mesh::tp(4) });
    let (grammar, _) = page();
    assert_eq!(blocks(&grammar).len(), 18);
    for example in blocks(&grammar) {
        plan(&checkpoint, &parsed(&example), &world, &example);
    }
    // Its heads are a real model's.
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    blocks(&readme).iter().for_each(|example| drop(parsed(example)));
}

/// The worked files are about the models that they name, and mean what their expressions in Rust do.
#[test]
fn every_worked_file_means_its_expression() {
    let (_, worked) = page();
    let mut cases = worked::cases();
    assert_eq!(cases.len(), 26);
    for section in worked.split("\n### ").skip(1) {
        let (title, text) = section.split_once('\n').unwrap();
        let found = cases.iter().position(|case| case.title == title);
        let Case { model, mesh, rules, last: (name, shape), .. } =
            cases.swap_remove(found.unwrap_or_else(|| panic!("no case `{title}`")));
        let folder = tempfile::tempdir().unwrap();
        released::write(folder.path(), &model).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let world = World::host(1).with_mesh(mesh);
        let [text] = &blocks(text)[..] else { panic!("one file in {title}") };
        let file = plan(&checkpoint, &parsed(text), &world, title);
        let rust = plan(&checkpoint, &rules, &world, title);
        assert_eq!(file.digest(), rust.digest(), "{title}");
        let param = file.params().iter().position(|param| param.name == name).unwrap_or_else(|| panic!("no {name}"));
        let last = file.ranks().last().unwrap();
        let dest = last.dests.iter().find(|dest| dest.param as usize == param).unwrap();
        assert_eq!(dest.shape.dims(), shape, "{title}");
    }
    assert!(cases.is_empty());
}

/// As the page says: GPTQ and AWQ differ in one word.
#[test]
fn a_quantised_layer_may_be_of_either_method() {
    let folder = tempfile::tempdir().unwrap();
    let model =
        released::Llama { layers: 1, scheme: released::Scheme::Awq { group: 128 }, ..released::Llama::LLAMA_2_7B };
    released::write(folder.path(), &model.model()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = blocks(&page().1).into_iter().find(|example| example.contains("gptq")).unwrap();
    let plan = plan(&checkpoint, &parsed(&file.replace("gptq", "awq")), &World::host(2), "awq");
    for (name, shape) in [
        ("down_proj.qweight", [5504, 512]),
        ("down_proj.qzeros", [43, 512]),
        ("up_proj.qweight", [4096, 688]),
        ("up_proj.scales", [32, 5504]),
    ] {
        let name = format!("model.layers.0.mlp.{name}");
        let param = plan.params().iter().position(|param| param.name == name).unwrap() as u32;
        let dest = plan.rank(Rank(1)).dests.iter().find(|dest| dest.param == param).unwrap();
        assert_eq!(dest.shape.dims(), shape, "{name}");
    }
}

#[test]
fn what_does_not_fit_the_mesh_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for (rest, rule, what) in [
        ("shard = { dim = 0, split = { table = [['0..500'], ['500..1000']] } }", "table", "expected 4, found 2"),
        ("shard = { dim = 0, split = { table = [[], [], [], ['0..999']] } }", "table", "none of 999..1000"),
        ("replicate = true\nwhere = { by = 'tp', part = 4 }", "coordinate", "expected one below 4, found 4"),
        ("replicate = true\nwhere = { by = { div = 'tp', by = 3 }, part = 0 }", "coordinate", "a divisor of 4 parts"),
        ("expr = { stack = [{ select = { split = { table = [[0], [1]] }, of = [{}, {}] } }] }", "table", "found 2"),
    ] {
        let text = format!("[[rule]]\nmatch = '*.embed_tokens.*'\n{rest}\n[[rule]]\nmatch = '**'\nreplicate = true");
        let error = Plan::new(&checkpoint, &parsed(&text), &World::host(4)).unwrap_err();
        let said = error.to_string();
        assert_eq!(error.rule(), Some(rule), "{said}");
        assert!(said.starts_with("rule `*.embed_tokens.*`: ") && said.contains(what), "{said}");
        assert_eq!(error.tensor(), Some("model.embed_tokens.weight"));
    }
}

#[test]
fn only_what_all_ranks_hold_is_held_by_some() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tp = || Coord::Axis(Ax::Tp);
    for rules in [
        Rules::new(),
        Rules::new().skip("**"),
        Rules::new().only("**", Rank(0)),
        Rules::new().part("**"),
        Rules::new().replicate("**").held_by(tp(), 0),
    ] {
        let error = Plan::new(&checkpoint, &rules.held_by(tp(), 1), &World::host(2)).unwrap_err();
        assert_eq!(error.rule(), Some("where"));
    }
}

/// A destination has the type of what it is made of, whatever the tensor is of that the rule matched.
#[test]
fn types_are_those_of_what_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = released::Llama { inv_freq: true, layers: 1, ..released::Llama::TINY }.model();
    released::write(folder.path(), &model).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let dtype = |expr: &str| {
        let text =
            format!("[[rule]]\nmatch = '**.inv_freq'\nexpr = {{ {expr} }}\n[[rule]]\nmatch = '**'\nreplicate = true");
        let plan = plan(&checkpoint, &parsed(&text), &World::host(2), expr);
        let param = plan.params().iter().find(|param| param.name.ends_with("inv_freq")).unwrap();
        param.dtype
    };
    assert_eq!(dtype(""), shardlift::Dtype::F32);
    assert_eq!(dtype("tensor = 'model.norm.weight'"), shardlift::Dtype::Bf16);
    assert_eq!(dtype("tensor = 'model.norm.weight', steps = [{ cast = 'f16' }]"), shardlift::Dtype::F16);
    assert_eq!(dtype("const = { dtype = 'i8', dims = [4], fill = 'one' }"), shardlift::Dtype::I8);
}

/// Ranks of other parts do not have the destination, nor do they have its aliases.
#[test]
fn a_part_of_a_division_holds_a_destination() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let text = "rule = [
        { match = 'model.norm.weight', replicate = true, where = { by = { mod = 'tp', by = 2 }, part = 1 } },
        { match = '**.o_proj.weight', shard = { dim = 1 }, where = { by = 'cp', part = 1 } },
        { match = '**', replicate = true },
    ]
    alias = [{ name = 'norm', of = 'model.norm.weight' }]";
    let world = World::host(1).with_mesh(Mesh { cp: 2, ..Mesh::tp(4) });
    let plan = plan(&checkpoint, &parsed(text), &world, text);
    for rank in plan.ranks() {
        let names: Vec<&str> = rank.dests.iter().map(|dest| &*plan.params()[dest.param as usize].name).collect();
        let odd = rank.rank.0 % 2 == 1;
        assert_eq!((names.contains(&"model.norm.weight"), names.contains(&"norm")), (odd, odd));
        assert_eq!(names.contains(&"model.layers.0.self_attn.o_proj.weight"), rank.rank.0 >= 4);
    }
}

#[test]
fn a_renamed_model_is_named_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let renaming = blocks(&page().0).into_iter().find(|example| example.contains("rename = \"blocks")).unwrap();
    let plan = Plan::new(&checkpoint, &Rules::from_toml(&renaming).unwrap(), &World::host(1)).unwrap();
    for name in ["blocks.1.attention.wq", "embed_tokens.weight", "layers.0.mlp.up_proj.weight"] {
        assert!(plan.params().iter().any(|param| param.name == name), "{name}");
    }
}

#[test]
fn filters_on_the_command_line_reach_aliases() {
    let folder = tempfile::tempdir().unwrap();
    for stored_head in [false, true] {
        write(folder.path(), !stored_head);
        std::fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
        let load = |filters: &[&str]| {
            let object = run(&[&["load", path(folder.path()), "--check"], filters].concat(), 0);
            (object["landed_bytes"].as_u64().unwrap(), object["ranks"][0]["tensors"].as_u64().unwrap())
        };
        let embedding = 1000 * 64 * 4;
        let (bytes, tensors) = load(&[]);
        assert_eq!(load(&["--only", "lm_head.weight"]), (embedding, 1));
        assert_eq!(load(&["--skip", "lm_head.weight"]), (bytes, tensors - 1));
        assert_eq!(load(&["--skip", "model.embed_tokens.weight"]), (bytes, tensors - 1));
        assert_eq!(load(&["--skip", "{lm_head,model.embed_tokens}.weight"]), (bytes - embedding, tensors - 2));
    }
}

#[test]
fn casts_and_transposes_on_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    let model = path(folder.path());
    let loaded = |flags: &[&str]| {
        let object = run(&[&["load", model, "--check", "--rules", "replicate"], flags].concat(), 0);
        (object["landed_bytes"].as_u64().unwrap(), object["ranks"][0]["digest"].as_str().unwrap().to_owned())
    };
    let (bytes, plain) = loaded(&[]);
    for (to, landed) in [("f32", bytes), ("bf16", bytes / 2), ("f16", bytes / 2)] {
        let digests = [&["--devices", "host"][..], &["--devices", "host:staged", "--engine", "mmap"]].map(|flags| {
            let (found, digest) = loaded(&[&["--dtype", to], flags].concat());
            assert_eq!(found, landed, "{to}");
            digest
        });
        assert!(digests[0] == digests[1] && (digests[0] == plain) == (to == "f32"), "{to}");
    }

    let rules = folder.path().join("rules.toml");
    let text = "rule = [
        { match = '**.o_proj.weight', shard = { dim = 1 }, transpose = true, cast = 'f16' },
        { match = '**', replicate = true },
    ]";
    std::fs::write(&rules, text).unwrap();
    let name = "model.layers.0.self_attn.o_proj.weight";
    let object = run(&["plan", model, "--tp", "2", "--rules", path(&rules), "--explain", name], 0);
    let explained = object["explain"].as_str().unwrap();
    assert!(explained.contains("permuted to [1, 0]") && explained.contains("cast from F32 to F16"), "{explained}");
    let destinations = object["ranks"][1]["destinations"].as_array().unwrap();
    let cast = destinations.iter().find(|destination| destination["name"] == name).unwrap();
    assert_eq!((&cast["dtype"], &cast["shape"], &cast["bytes"]), (&json!("F16"), &json!([32, 64]), &json!(4096)));
    assert_eq!(cast["cast"], json!({ "from": "F32", "to": "F16" }));
    // In the order of the destination: its 32 rows, then what were rows in the file.
    assert_eq!(
        (&cast["pieces"][0]["loops"], &cast["pieces"][0]["run"]),
        (&json!([[32, 4, 128], [64, 256, 2]]), &json!(4))
    );
    assert!(destinations.iter().filter(|destination| destination["cast"] == Value::Null).count() > 10);
    run(&["load", model, "--tp", "2", "--rules", path(&rules), "--check", "--dtype", "bf16"], 0);
}

#[test]
fn rules_that_do_not_fit_are_refused_with_their_place() {
    let (folder, file) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    write(folder.path(), true);
    let model = path(folder.path());
    let out = folder.path().join("out");
    let refused = |command: &[&str], rules: &str, rule: &str| {
        std::fs::write(file.path(), rules).unwrap();
        let error = run(&[command, &["--rules", path(file.path())]].concat(), 2)["error"].take();
        assert_eq!((&error["kind"], &error["rule"]), (&json!("rules"), &json!(rule)), "{error}");
        assert_eq!((&error["file"], &error["rank"]), (&json!(path(file.path())), &Value::Null), "{error}");
        error
    };
    for (rest, rule) in [
        ("replicate = true, rename = '__metadata__'", "rename"),
        ("shard = { dim = 0, by = ['tp', 'tp'] }", "coordinate"),
        ("shard = { dim = -1 }", "rules-file"),
        ("shard = { dim = 2 }", "dimension"),
        ("shard = { dim = 0 }, cast = 'f8'", "rules-file"),
        ("shard = { dim = 0 }, permute = [0, 1, 1]", "permute"),
        ("shard = { dim = 0 }, permute = [0, 1, 2]", "permute"),
    ] {
        let rules = format!("rule = [{{ match = '**.q_proj.weight', {rest} }}, {{ match = '**', replicate = true }}]");
        let error = refused(&["reshard", model, path(&out), "--tp", "2"], &rules, rule);
        assert!(error["message"].as_str().unwrap().contains("rule `**.q_proj.weight`: "), "{error}");
        assert!(!out.exists());
    }
    let chain = "rule = [{ match = '**', replicate = true }]
        alias = [{ name = 'l', of = 'm' }, { name = 'm', of = 'model.embed_tokens.weight' }]";
    refused(&["load", model, "--skip", "model.embed_tokens.weight"], chain, "alias");
}

#[test]
fn too_many_ranks_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), true);
    for ranks in [&["--tp", "4000000000"][..], &["--tp", "4294967295", "--dp", "2"], &["--tp", "8193"]] {
        let error = run(&[&["plan", path(folder.path()), "--rules", "replicate"], ranks].concat(), 2)["error"].take();
        assert_eq!(error["kind"], "usage", "{error}");
    }
}

/// What `docs/rules.md` says before its worked files, and these.
fn page() -> (String, String) {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/rules.md")).unwrap();
    let (grammar, worked) = text.split_once("\n## Worked files\n").expect("a section of worked files");
    (grammar.to_owned(), worked.to_owned())
}

/// The TOML blocks of a text.
fn blocks(text: &str) -> Vec<String> {
    let blocks = text.split("```toml\n").skip(1);
    blocks.map(|block| block.split_once("```").expect("a block ends").0.to_owned()).collect()
}

fn parsed(text: &str) -> Rules {
    Rules::from_toml(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn plan(checkpoint: &Checkpoint, rules: &Rules, world: &World, what: &str) -> Plan {
    Plan::new(checkpoint, rules, world).unwrap_or_else(|error| panic!("{error}\n{what}"))
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 96, "tie_word_embeddings": true
    })
}

/// A model of two layers, 8 query and 2 key and value heads of 8; its head is that of the embeddings or stored too.
fn write(folder: &Path, tied: bool) {
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| shapes.insert(name, shape.into());
    add("model.embed_tokens.weight".into(), &[1000, 64]);
    add("model.norm.weight".into(), &[64]);
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}.weight"), shape);
        for (name, rows) in [("q", 64), ("k", 16), ("v", 16), ("o", 64)] {
            add(&format!("self_attn.{name}_proj"), &[rows, 64]);
        }
        add("mlp.gate_proj", &[96, 64]);
        add("mlp.up_proj", &[96, 64]);
        add("mlp.down_proj", &[64, 96]);
        add("input_layernorm", &[64]);
        add("post_attention_layernorm", &[64]);
    }
    add("model.layers.0.self_attn.rotary_emb.inv_freq".into(), &[4]);
    if !tied {
        add("lm_head.weight".into(), &[1000, 64]);
    }
    let bytes: Vec<u8> = (0..1000 * 64 * 4).map(|at| (at % 251) as u8).collect();
    let views = shapes.iter().map(|(name, shape)| {
        let data = &bytes[..shape.iter().product::<usize>() * 4];
        (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

fn run(args: &[&str], status: i32) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_shardlift")).args(args).arg("--json").output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(status), "{args:?}\n{stdout}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&stdout).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
