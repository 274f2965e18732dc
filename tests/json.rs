//! Every object of the command line against `docs/json.schema.json`, and the exit status beside it; what people read.
#![cfg(feature = "cli")]

#[path = "support/schema.rs"]
mod schema;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

#[test]
fn inspect() {
    let model = model();
    let object = run(&["inspect", path(model.path())], 0);
    assert_eq!(object["checkpoint_bytes"], 4 * 8 * 4 + 8);
    assert_eq!(object["tensors"][0]["name"], "a.weight");
    assert_eq!(object["files"][0]["metadata"]["format"], "pt");
    let object = run(&["inspect", path(model.path()), "--filter", "b.*", "--sort", "name"], 0);
    assert_eq!(object["tensors"].as_array().unwrap().len(), 1);
}

#[test]
fn verify() {
    let model = model();
    let object = run(&["verify", path(model.path())], 0);
    assert_eq!(object["tensors"], Value::Null);
    let object = run(&["verify", path(model.path()), "--deep"], 0);
    assert_eq!(object["tensors"].as_array().unwrap().len(), 2);
    assert_eq!(object["files"][0]["sha256"].as_str().unwrap().len(), 64);

    // Files with none, with one and with several of the tensors.
    let folder = tempfile::tempdir().unwrap();
    for (file, names) in [("0", &[][..]), ("1", &["d"]), ("2", &[]), ("3", &["b", "a", "c"])] {
        let tensors = names.iter().map(|name| (*name, TensorView::new(Dtype::U8, vec![2], &[1, 2]).unwrap()));
        let file = folder.path().join(file).with_extension("safetensors");
        safetensors::serialize_to_file(tensors, None, &file).unwrap();
    }
    let object = run(&["verify", path(folder.path()), "--deep"], 0);
    let files: Vec<_> = object["files"].as_array().unwrap().iter().map(|file| file["tensors"].clone()).collect();
    let tensors: Vec<_> = object["tensors"].as_array().unwrap().iter().map(|tensor| tensor["name"].clone()).collect();
    assert_eq!((json!(files), json!(tensors)), (json!([0, 1, 0, 3]), json!(["d", "a", "b", "c"])));
}

#[test]
fn plan() {
    let (model, rules) = (model(), rules());
    let rules = path(rules.path());
    let object = run(&["plan", path(model.path()), "--tp", "2", "--rules", rules, "--audit"], 0);
    assert_eq!(object["predicted_seconds"], Value::Null);
    let ranks = object["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 2);
    assert_eq!(ranks[1]["coord"], json!({ "dp": 0, "pp": 0, "cp": 0, "tp": 1, "ep": 0 }));
    let args =
        ["plan", path(model.path()), "--tp", "2", "--rules", rules, "--rank", "1", "--storage", "1", "--link", "2"];
    let one = run(&args, 0);
    assert_eq!(one["ranks"].as_array().unwrap().len(), 1);
    assert_eq!(one["ranks"][0], ranks[1]);
    assert_eq!(one["plan_digest"], object["plan_digest"]);
    assert!(one["predicted_seconds"].as_f64().unwrap() > 0.0);
    // With one rate the other side takes no time.
    let storage = run(&["plan", path(model.path()), "--storage", "1"], 0);
    assert_eq!(storage["predicted_seconds"].as_f64().unwrap(), (4.0 * 8.0 * 4.0 + 8.0) / 1e9);
    let object = run(&["plan", path(model.path()), "--explain", "a.weight"], 0);
    assert!(object["explain"].as_str().unwrap().contains("a.weight"));
}

#[test]
fn plan_tells_its_sizes_and_what_the_audit_counted() {
    let (model, rules) = (model(), rules());
    let args = ["plan", path(model.path()), "--tp", "2", "--rules", path(rules.path()), "--audit"];
    let object = run(&args, 0);
    assert_eq!((&object["needed_bytes"], &object["read_bytes"]), (&json!(136), &json!(136)));
    assert_eq!((&object["over_read"], &object["reads"], &object["pieces"]), (&json!(1.0), &json!(2), &json!(4)));
    let expected = json!({
        "class": "a.weight", "tensors": 1, "needed_bytes": 128, "read_bytes": 128, "over_read": 1.0,
        "lowering": ["contiguous"], "reading": ["fan-out"], "reads": 1, "pieces": 2, "kernel_launches": 0,
    });
    assert_eq!(object["classes"][0], expected);
    let audit = &object["audit"];
    assert_eq!((&audit["destinations"], &audit["pieces"]), (&json!(4), &json!(4)));
    let held = |class: usize| {
        let held = &audit["classes"][class];
        (held["class"].as_str().unwrap(), held["holders"].as_u64().unwrap(), held["multiplicity"].clone())
    };
    let times = |times: u64, bytes: u64, meaning: &str| json!([{ "times": times, "bytes": bytes, "meaning": meaning }]);
    assert_eq!(held(0), ("a.weight", 2, times(1, 128, "sharded over 2 ranks")));
    assert_eq!(held(1), ("b.bias", 2, times(2, 8, "replicated on all 2 ranks")));
    let one = run(&[&args[..], &["--rank", "1"]].concat(), 0);
    assert_eq!((&one["needed_bytes"], &one["classes"][0]["reading"]), (&json!(64 + 8), &json!(["contiguous"])));

    let text = String::from_utf8(shardlift(&args).stdout).unwrap();
    for words in ["a.weight: contiguous, covered once, fanned out", "a.weight: {1} 128 B sharded over 2 ranks"] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn plan_tells_each_value_of_what_no_tensor_fills() {
    let model = model();
    let rules = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    let pads = "{ pad = { dim = 0, to = 10, fill = 'zero' } }, { pad = { dim = 0, to = 12, fill = 'one' } }";
    let columns = "{ pad = { dim = 1, to = 5, fill = '-inf' } }";
    let other = "{ match = 'b.bias', replicate = true }";
    let fills = |steps: &str| {
        fs::write(rules.path(), format!("rule = [{{ match = 'a.weight', steps = [{steps}] }}, {other}]")).unwrap();
        let object = run(&["plan", path(model.path()), "--rules", path(rules.path())], 0);
        let [padded, whole] = &object["ranks"][0]["destinations"].as_array().unwrap()[..] else { panic!("{object}") };
        assert_eq!((&whole["prefill"], &whole["fills"]), (&Value::Null, &json!([])));
        (padded["prefill"].clone(), padded["fills"].clone())
    };
    let expected = json!([
        { "value": "zero", "dst_offset": 128, "loops": [], "run": 32 },
        { "value": "one", "dst_offset": 160, "loops": [], "run": 32 },
    ]);
    assert_eq!(fills(pads), (json!("zero"), expected));
    let expected = json!([{ "value": "-inf", "dst_offset": 16, "loops": [[8, 20]], "run": 4 }]);
    assert_eq!(fills(columns), (json!("-inf"), expected));
}

#[test]
fn plan_tells_what_ranks_pass_on() {
    let (model, rules) = (model(), rules());
    let args = ["plan", path(model.path()), "--tp", "2", "--rules", path(rules.path())];
    let with = |more: &[&str]| run(&[&args[..], more].concat(), 0);
    let of = |rank: &Value| ["sent_bytes", "received_bytes"].map(|field| rank[field].as_u64().unwrap());
    let together = with(&["--cooperate", "always", "--link", "1"]);
    let ranks: Vec<_> = together["ranks"].as_array().unwrap().iter().map(of).collect();
    assert_eq!((&ranks[..], of(&together)), (&[[8, 0], [0, 8]][..], [8, 8]));
    assert_eq!((&together["storage_bytes"], &together["plan_digest"]), (&json!(136), &with(&[])["plan_digest"]));
    // The first takes what both want to its device twice: to its place, and to where it is sent from.
    assert_eq!(together["predicted_seconds"].as_f64().unwrap(), (64.0 + 8.0 + 8.0) / 1e9);
    let one = with(&["--cooperate", "cluster", "--rank", "1"]);
    assert_eq!((&one["ranks"][0], of(&one), &one["storage_bytes"]), (&together["ranks"][1], [0, 8], &json!(64)));
    // So little is not worth it.
    for (choice, more) in [("auto", &[][..]), ("never", &[]), ("never", &["--rank", "0"])] {
        let alone = with(&[&["--cooperate", choice], more].concat());
        let bytes = if more.is_empty() { 2 * (64 + 8) } else { 64 + 8 };
        assert_eq!((of(&alone), &alone["storage_bytes"]), ([0, 0], &json!(bytes)), "{choice} {more:?}");
    }
    let text = String::from_utf8(shardlift(&[&args[..], &["--cooperate", "always"]].concat()).stdout).unwrap();
    for words in ["136 B asked for by all processes", "sent to other processes 8 B, received 8 B", "sent    received"] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn plan_predicts_from_what_doctor_measured() {
    let model = model();
    let file = model.path().join("doctor.out");
    let predicted = |args: &[&str]| {
        let args = [&["plan", path(model.path()), "--doctor", path(&file)], args].concat();
        run(&args, 0)["predicted_seconds"].clone()
    };
    let doctor =
        Command::new(env!("CARGO_BIN_EXE_shardlift")).args(["doctor", path(model.path()), "--json"]).output().unwrap();
    fs::write(&file, doctor.stdout).unwrap();
    predicted(&[]);
    let device = json!({ "h2d_gb_per_s": 2.0, "h2d_together_gb_per_s": 0.5 });
    let measured = json!({ "command": "doctor", "ok": true, "storage_gb_per_s": 1.0, "cuda": { "devices": [device] } });
    fs::write(&file, measured.to_string()).unwrap();
    assert_eq!(predicted(&[]), 136.0 / 0.5e9);
    assert_eq!(predicted(&["--link", "4"]), 136.0 / 1e9);
    assert_eq!(predicted(&["--storage", "0.125"]), 136.0 / 0.125e9);
    fs::write(&file, "{}").unwrap();
    let error = &run(&["plan", path(model.path()), "--doctor", path(&file)], 2)["error"];
    assert_eq!((&error["kind"], &error["file"]), (&json!("usage"), &json!(path(&file))));
}

#[test]
fn load() {
    let (model, rules) = (model(), rules());
    let args = ["load", path(model.path()), "--tp", "2", "--rules", path(rules.path()), "--check"];
    let mut digests = Vec::new();
    for more in [&[][..], &["--devices", "host:staged"], &["--engine", "mmap"], &["--memory", "per-tensor"]] {
        let object = run(&[&args[..], more].concat(), 0);
        assert_eq!(object["needed_bytes"], 4 * 8 * 4 + 8);
        assert_eq!(object["landed_bytes"], 4 * 8 * 4 + 2 * 8);
        let ranks = object["ranks"].as_array().unwrap();
        digests.push(ranks.iter().map(|rank| rank["digest"].as_str().unwrap().to_owned()).collect::<Vec<_>>());
    }
    assert!(digests.iter().all(|other| *other == digests[0]), "{digests:?}");
    let object = run(&["load", path(model.path())], 0);
    assert_eq!(object["ranks"][0]["digest"], Value::Null);
}

#[test]
fn loads_are_repeated_and_the_median_is_told() {
    let (model, trace) = (model(), tempfile::NamedTempFile::new().unwrap());
    let args = ["load", path(model.path()), "--check", "--trace", path(trace.path()), "--repeat"];
    for times in [1, 2, 5] {
        let object = run(&[&args[..], &[&times.to_string()]].concat(), 0);
        let runs = object["runs"].as_array().unwrap();
        assert_eq!(runs.len(), times);
        let mut seconds: Vec<f64> = runs.iter().map(|run| run["seconds"].as_f64().unwrap()).collect();
        seconds.sort_by(f64::total_cmp);
        assert_eq!(object["seconds"], seconds[(times - 1) / 2]);
        let median = runs.iter().find(|run| run["seconds"] == object["seconds"]).unwrap();
        assert!(median.as_object().unwrap().iter().all(|(field, value)| object[field] == *value));
        assert!(object["ranks"][0]["digest"].is_string());
        // One file has all runs.
        let events: Vec<Value> = serde_json::from_slice(&fs::read(trace.path()).unwrap()).unwrap();
        let loads = events.iter().filter(|event| event["name"] == "process_name").count();
        let read: u64 = runs.iter().map(|run| run["storage_bytes_read"].as_u64().unwrap()).sum();
        let reads = events.iter().filter(|event| event["ph"] == "X" && event["name"] == "read");
        let traced: u64 = reads.map(|read| read["args"]["bytes"].as_u64().unwrap()).sum();
        assert_eq!((loads, traced), (times, read));
    }
    assert_eq!(run(&["load", path(model.path())], 0)["runs"], Value::Null);
    let text = String::from_utf8(shardlift(&["load", path(model.path()), "--repeat", "3"]).stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("3 runs: min ")).unwrap();
    assert!(line.contains(" s, median ") && line.contains(" s, max "), "{text}");
}

#[test]
fn a_trace_that_cannot_be_written_is_an_error_before_the_load() {
    let model = model();
    for file in [model.path().to_owned(), model.path().join("none").join("trace.json")] {
        let error = &run(&["load", path(model.path()), "--trace", path(&file)], 2)["error"];
        assert_eq!(error["file"], path(&file), "{error}");
    }
    let full = Path::new("/dev/full");
    if full.exists() {
        let error = &run(&["load", path(model.path()), "--trace", path(full)], 1)["error"];
        assert_eq!((&error["kind"], &error["file"]), (&json!("io"), &json!("/dev/full")));
    }
    // One of a load that fails is JSON, too.
    let trace = model.path().join("trace.json");
    run(&["load", path(model.path()), "--trace", path(&trace), "--devices", "cuda:77"], 4);
    serde_json::from_slice::<Vec<Value>>(&fs::read(&trace).unwrap()).unwrap();
}

#[test]
fn a_trace_takes_the_place_of_nothing_that_is_read() {
    let (model, rules) = (model(), rules());
    let at = |name: &str| model.path().join(name);
    let adapter = at("adapter");
    fs::create_dir(&adapter).unwrap();
    fs::write(adapter.join("adapter_config.json"), r#"{"peft_type":"LORA"}"#).unwrap();
    let data: Vec<u8> = br#"{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.to_vec();
    let weights = [&(data.len() as u64).to_le_bytes()[..], &data].concat();
    fs::write(adapter.join("adapter_model.safetensors"), weights).unwrap();
    fs::write(at("config.json"), "{}").unwrap();
    let index = r#"{"weight_map":{"a.weight":"model.safetensors","b.bias":"model.safetensors"}}"#;
    fs::write(at("model.safetensors.index.json"), index).unwrap();
    symlink("model.safetensors", at("link")).unwrap();
    fs::hard_link(at("config.json"), at("again")).unwrap();
    let measured = at("measured.json");
    fs::write(&measured, r#"{"command":"doctor","ok":true}"#).unwrap();
    let [dir, adapter_dir] = [model.path(), &adapter].map(|folder| path(folder).to_owned());
    let args = ["--rules", path(rules.path()), "--adapter", &adapter_dir, "--doctor", path(&measured), "--trace"];
    let inputs = [
        at("model.safetensors"),
        at("link"),
        at("model.safetensors.index.json"),
        at("config.json"),
        at("again"),
        adapter.join("adapter_config.json"),
        adapter.join("adapter_model.safetensors"),
        rules.path().to_owned(),
        measured.clone(),
    ];
    for file in &inputs {
        let before = fs::read(file).unwrap();
        let object = run(&[&["load", &dir][..], &args, &[path(file)]].concat(), 2);
        assert_eq!(
            (&object["error"]["rule"], &object["error"]["file"]),
            (&json!("trace-is-input"), &json!(path(file)))
        );
        assert!(fs::read(file).unwrap() == before, "{}", file.display());
    }
    // Of a single file what lies beside it, too.
    let single = at("model.safetensors");
    run(&["load", path(&single), "--rules", path(rules.path()), "--trace", path(&at("config.json"))], 2);
    assert_eq!(fs::read(at("config.json")).unwrap(), b"{}");
    // Nor of what would be read if it were there.
    for name in ["model.safetensors.index.json", "config.json"] {
        fs::remove_file(at(name)).unwrap();
        run(&["load", path(&single), "--rules", path(rules.path()), "--trace", path(&at(name))], 2);
        assert!(!at(name).exists(), "{name}");
    }
    run(&[&["load", &dir][..], &args, &[path(&at("trace.json"))]].concat(), 0);
}

#[test]
fn a_rendezvous_takes_the_place_of_nothing_but_another() {
    let (model, folder) = (model(), tempfile::tempdir().unwrap());
    let load = |file: &Path, status| {
        let meet = format!("file://{}", path(file));
        let args =
            ["load", path(model.path()), "--dp", "2", "--rank", "0", "--rendezvous", &meet, "--join-timeout", "0.5"];
        run(&args, status)["error"].clone()
    };
    let text = folder.path().join("text");
    fs::write(&text, "shard").unwrap();
    for file in [model.path().join("model.safetensors"), text] {
        let before = fs::read(&file).unwrap();
        let error = load(&file, 2);
        assert_eq!((&error["kind"], &error["file"]), (&json!("usage"), &json!(path(&file))), "{error}");
        assert!(fs::read(&file).unwrap() == before);
    }
    for (name, text) in [("new", None), ("empty", Some("")), ("old", Some("shardlift rendezvous 0\n"))] {
        let file = folder.path().join(name);
        text.iter().for_each(|text| fs::write(&file, text).unwrap());
        // Nobody comes.
        assert_eq!(load(&file, 1)["kind"], "peer", "{name}");
    }
}

#[test]
fn what_is_cast_says_so() {
    let model = model();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(
        file.path(),
        "rule = [ { match = \"a.weight\", replicate = true, cast = \"bf16\", transpose = true }, \
        { match = \"**\", replicate = true } ]",
    )
    .unwrap();
    let object = run(&["plan", path(model.path()), "--rules", path(file.path())], 0);
    let destinations = object["ranks"][0]["destinations"].as_array().unwrap();
    assert_eq!(destinations[0]["cast"], json!({ "from": "F32", "to": "BF16" }));
    assert_eq!((&destinations[0]["dtype"], &destinations[0]["bytes"]), (&json!("BF16"), &json!(4 * 8 * 2)));
}

#[test]
fn reshard_and_open_what_it_wrote() {
    let (model, rules, out) = (model(), rules(), tempfile::tempdir().unwrap());
    let out = out.path().join("out");
    let args = ["reshard", path(model.path()), path(&out), "--tp", "2", "--rules", path(rules.path())];
    let object = run(&args, 0);
    for rank in object["ranks"].as_array().unwrap() {
        let file = out.join(rank["file"].as_str().unwrap());
        let object = run(&["verify", path(&file)], 0);
        assert_eq!(object["checkpoint_bytes"], rank["bytes"]);
    }
    assert_eq!(run(&args, 2)["error"]["kind"], "usage");
    run(&[&args[..], &["--force"]].concat(), 0);

    // What is divided already is not divided once more, whatever the configuration of the whole model says.
    fs::write(out.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let partition = out.join("model-rank-0-part-0.safetensors");
    assert_eq!(run(&["load", path(&partition), "--check"], 0)["landed_bytes"], 4 * 8 * 4 / 2 + 8);
    let error = &run(&["load", path(&partition), "--tp", "2"], 2)["error"];
    assert!(error["message"].as_str().unwrap().contains("partition of rank 0"), "{error}");
    let told = |ranks: &str| {
        let error = &run(&["load", path(&out)], 2)["error"];
        assert!(error["message"].as_str().unwrap().contains(&format!(", of {ranks}: open one")), "{error}");
    };
    told("ranks 0 to 1");
    for rank in [3, 5] {
        fs::copy(&partition, out.join(format!("model-rank-{rank}-part-0.safetensors"))).unwrap();
    }
    told("ranks 0 to 1, 3, 5");
    for rank in [1, 3, 5] {
        fs::remove_file(out.join(format!("model-rank-{rank}-part-0.safetensors"))).unwrap();
    }
    told("rank 0");
}

#[test]
fn a_config_that_cannot_be_used_says_why() {
    let model = model();
    let config = model.path().join("config.json");
    let refused = |reason: &str| {
        run(&["load", path(model.path())], 0);
        let error = &run(&["load", path(model.path()), "--tp", "2"], 2)["error"];
        assert_eq!((&error["kind"], &error["file"]), (&json!("rules"), &json!(path(&config))));
        assert!(error["message"].as_str().unwrap().contains(reason), "{error}");
    };
    fs::write(&config, "{").unwrap();
    refused("not json");
    fs::remove_file(&config).unwrap();
    symlink("config.json", &config).unwrap();
    refused("cannot open");
}

/// Only where nothing has the path is it the name of a model in the cache.
#[test]
fn a_path_that_cannot_be_looked_at_says_why() {
    let folder = tempfile::tempdir().unwrap();
    symlink("loop", folder.path().join("loop")).unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let long = format!("{}/model", "x".repeat(256));
    for (model, kind) in [("loop/model", "io"), (long.as_str(), "io"), ("file/model", "not-found")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
        command.current_dir(folder.path()).env("HF_HUB_CACHE", folder.path());
        let error = &schema::run(&mut command, &["inspect", model], 2)["error"];
        let in_cache = error["message"].as_str().unwrap().contains("is not in the cache");
        assert_eq!((&error["kind"], in_cache), (&json!(kind), kind == "not-found"), "{error}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn rules_are_read_from_pipes_and_not_without_end() {
    let model = model();
    let args = ["load", path(model.path()), "--tp", "2", "--rules"];
    let error = &run(&[&args[..], &["/dev/zero"]].concat(), 2)["error"];
    assert_eq!((&error["kind"], &error["expected"]), (&json!("rules"), &json!("at most 16777216 bytes")));
    let shell = "cat \"$0\" | \"$@\" /dev/stdin";
    let rules = rules();
    let mut command = Command::new("sh");
    command.args(["-c", shell, path(rules.path()), env!("CARGO_BIN_EXE_shardlift")]).args(args);
    assert!(command.output().unwrap().status.success());
}

#[test]
fn doctor() {
    let model = model();
    let doctor = || run(&["doctor", path(model.path())], 0);
    let object = doctor();
    assert_eq!(object["auto"]["engine"], "pread");
    let reason = object["auto"]["reason"].as_str().unwrap();
    assert!(reason.starts_with("136 bytes to read"), "{reason}");
    assert!(object["memcpy_gb_per_s"].as_f64().unwrap() > 0.0);

    // A small tensor is no reason in a model that is large, though it be holes only.
    const LARGE: u64 = 128 << 20;
    let large = json!({
        "a.small": { "dtype": "U8", "shape": [136], "data_offsets": [0, 136] },
        "b.large": { "dtype": "U8", "shape": [LARGE], "data_offsets": [136, 136 + LARGE] },
    });
    write(model.path(), &large);
    let file = fs::OpenOptions::new().write(true).open(model.path().join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() + LARGE).unwrap();
    let object = doctor();
    let reason = object["auto"]["reason"].as_str().unwrap();
    assert!(object["auto"]["engine"].is_string() && !reason.contains("bytes to read"), "{reason}");

    fs::remove_file(model.path().join("model.safetensors")).unwrap();
    assert_eq!(doctor()["auto"]["engine"], Value::Null);
}

#[test]
fn failures() {
    let model = model();
    let model = path(model.path());
    let error = |args: &[&str], status: i32, kind: &str| {
        let object = run(args, status);
        assert_eq!(object["error"]["kind"], kind, "{args:?}: {object}");
    };
    error(&["load", "no-such-model"], 2, "not-found");
    error(&["load", "no-such-org/no-such-model"], 2, "not-found");
    error(&["load", model, "--tp", "0"], 2, "usage");
    error(&["load", model, "--staging", "1"], 2, "usage");
    error(&["load", model, "--tp", "2", "--rank", "2"], 2, "usage");
    error(&["load"], 2, "usage");
    error(&["frobnicate"], 2, "usage");
    error(&["load", model, "--tp", "2"], 2, "rules");
    error(&["plan", model, "--explain", "no.such.tensor"], 2, "not-found");
    error(&["load", model, "--engine", "cufile"], 2, "unsupported");
    #[cfg(not(feature = "cuda"))]
    error(&["load", model, "--devices", "cuda:0,1"], 2, "unsupported");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    fs::write(&file, b"\x02\0\0\0\0\0\0\0{]").unwrap();
    error(&["verify", path(&file)], 3, "format");
    fs::remove_file(&file).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "gone.safetensors"}}"#)
        .unwrap();
    error(&["verify", path(folder.path())], 3, "index");
}

#[test]
fn what_does_not_open_is_a_wrong_argument_or_a_broken_checkpoint() {
    let model = model();
    let at = |name: &str| path(&model.path().join(name)).to_owned();
    let error = |args: &[&str], status: i32| {
        let object = run(args, status);
        assert!(object["error"]["file"].is_string(), "{args:?}: {object}");
    };
    for (link, to) in [("loop", "loop"), ("nothing", "no such file")] {
        symlink(to, at(link)).unwrap();
        error(&["inspect", &at(link)], 2);
    }
    error(&["inspect", &at("model.safetensors/")], 2);
    error(&["load", &at(""), "--rules", &at("")], 2);
    fs::write(at("rules.toml"), b"# \xff").unwrap();
    error(&["load", &at(""), "--rules", &at("rules.toml")], 2);
    fs::write(at("model.safetensors.index.json"), r#"{"weight_map": {"a.weight": "folder"}}"#).unwrap();
    fs::create_dir(at("folder")).unwrap();
    error(&["inspect", &at("")], 3);
    fs::remove_file(at("model.safetensors.index.json")).unwrap();
    symlink("../blobs/0", at("model.safetensors.index.json")).unwrap();
    error(&["load", &at("")], 3);
}

#[test]
#[cfg(target_os = "linux")]
fn words_that_are_not_utf8() {
    let (model, folder) = (model(), tempfile::tempdir().unwrap());
    let odd = folder.path().join(OsStr::from_bytes(b"m\xff"));
    fs::create_dir(&odd).unwrap();
    let file = odd.join("model.safetensors");
    fs::copy(model.path().join("model.safetensors"), &file).unwrap();
    let rules_file = odd.join("rules.toml");
    fs::copy(rules().path(), &rules_file).unwrap();
    let word = OsStr::new;
    run(&[word("load"), file.as_os_str(), word("--rules"), rules_file.as_os_str(), word("--tp"), word("2")], 0);
    run(&[word("reshard"), odd.as_os_str(), odd.join("out").as_os_str()], 0);
    for flag in ["--filter", "--sort"] {
        let object = run(&[word("inspect"), file.as_os_str(), word(flag), OsStr::from_bytes(b"\xff")], 2);
        assert_eq!((&object["command"], &object["error"]["kind"]), (&json!("inspect"), &json!("usage")));
    }
}

#[test]
fn names_end_no_line_and_speak_to_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let name = "a\n\u{1b}[31m\u{9b}b";
    write(folder.path(), &json!({ name: { "dtype": "U8", "shape": [136], "data_offsets": [0, 136] } }));
    let model = path(folder.path());
    assert_eq!(run(&["inspect", model], 0)["tensors"][0]["name"], name);
    let escaped = r"a\n\u{1b}[31m\u{9b}b";
    let rules = folder.path().join("rules.toml");
    fs::write(&rules, "rule = [{ match = \"**\", shard = { dim = 0 } }]").unwrap();
    for args in [
        &["inspect", model][..],
        &["verify", model, "--deep"],
        &["plan", model, "--explain", name],
        &["plan", model, "--explain", "\u{1b}[31m\n"],
        &["plan", model, "--tp", "3", "--rules", path(&rules)],
    ] {
        let Output { stdout, stderr, .. } = shardlift(args);
        let text = String::from_utf8([stdout, stderr].concat()).unwrap();
        assert!(text.contains(escaped) || args.contains(&"\u{1b}[31m\n"), "{args:?}: {text}");
        assert!(!text.contains(|char: char| char.is_control() && char != '\n'), "{args:?}: {text:?}");
        let failed = text.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(failed == 0 || text.lines().count() == 1, "{args:?}: {text:?}");
    }
    let text = String::from_utf8(shardlift(&["inspect", model]).stdout).unwrap();
    assert!(text.contains("1 file, 1 tensor, 136 B"), "{text}");
}

/// Two tensors in one file, and no config.json: `a.weight` of [8, 4] F32 and `b.bias` of [4] F16.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let header = json!({
        "__metadata__": { "format": "pt" },
        "a.weight": { "dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128] },
        "b.bias": { "dtype": "F16", "shape": [4], "data_offsets": [128, 136] },
    });
    write(folder.path(), &header);
    folder
}

/// Writes `model.safetensors` with this header and 136 bytes of data.
fn write(folder: &Path, header: &Value) {
    let mut header = header.to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(0..136u8);
    fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn rules() -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    let text = "rule = [ { match = \"**.weight\", shard = { dim = 0 } }, { match = \"**\", replicate = true } ]\n";
    fs::write(file.path(), text).unwrap();
    file
}

/// Runs a command with `--json`, and holds its one object against the schema.
fn run<W: AsRef<OsStr> + std::fmt::Debug>(args: &[W], status: i32) -> Value {
    schema::run(&mut Command::new(env!("CARGO_BIN_EXE_shardlift")), args, status)
}

fn shardlift<W: AsRef<OsStr>>(args: &[W]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shardlift")).args(args).output().unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
