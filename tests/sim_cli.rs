//! The command line with GPUs of the driver twin: what it prints, and its exit status.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;
#[path = "support/schema.rs"]
mod schema;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// A model of 13 MB and rules for it.
struct Model {
    folder: tempfile::TempDir,
}

impl Model {
    fn new() -> Model {
        let folder = tempfile::tempdir().unwrap();
        model::write(folder.path(), 1);
        fs::write(folder.path().join("rules.toml"), model::RULES).unwrap();
        Model { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Loads it with these settings of the twin.
    fn load(&self, settings: &[(&str, &str)], args: &[&str], status: i32) -> Value {
        let rules = self.path().join("rules.toml");
        let first = ["load", self.path().to_str().unwrap(), "--rules", rules.to_str().unwrap()];
        run(settings, &[&first[..], args].concat(), status)
    }

    /// Digests of the ranks.
    fn digests(&self, settings: &[(&str, &str)], args: &[&str]) -> Vec<Value> {
        let object = self.load(settings, &[args, &["--check"]].concat(), 0);
        object["ranks"].as_array().unwrap().iter().map(|rank| rank["digest"].clone()).collect()
    }

    fn ledger(&self) -> PathBuf {
        self.path().join("ledger.json")
    }
}

fn run(settings: &[(&str, &str)], args: &[&str], status: i32) -> Value {
    let mut command = twins::cuda::command(env!("CARGO_BIN_EXE_shardlift"));
    command.env("SIMCUDA_LEAKS", "abort").envs(settings.iter().copied());
    schema::run(&mut command, args, status)
}

/// What a message is made of, in one string.
fn error(object: &Value) -> String {
    ["message", "expected", "found"].map(|part| object["error"][part].as_str().unwrap_or_default()).join(" ")
}

#[test]
fn ranks_name_their_devices_and_hold_what_they_hold_on_the_host() {
    let model = Model::new();
    for (ranks, devices, expected) in [
        ("1", "cuda:2", &["cuda:2"][..]),
        ("4", "cuda", &["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ("4", "cuda:0,0,0,0", &["cuda:0"; 4]),
        ("2", "cuda:3,1", &["cuda:3", "cuda:1"]),
    ] {
        let object = model.load(&[], &["--tp", ranks, "--devices", devices], 0);
        let found: Vec<&str> =
            object["ranks"].as_array().unwrap().iter().map(|rank| rank["device"].as_str().unwrap()).collect();
        assert_eq!(found, expected);
        assert!(object["peak_pinned_bytes"].as_u64().unwrap() > 0, "{object}");
        let host = model.digests(&[], &["--tp", ranks]);
        for engine in ["auto", "pread", "mmap", "uring"] {
            let with = ["--tp", ranks, "--devices", devices, "--engine", engine];
            assert_eq!(model.digests(&[], &with), host, "{devices} {engine}");
        }
        let more = ["--tp", ranks, "--devices", devices, "--memory", "per-tensor", "--staging", "2M"];
        assert_eq!(model.digests(&[], &more), host, "{devices}");
    }
    assert_eq!(model.load(&[], &["--devices", "host:staged"], 0)["peak_pinned_bytes"], 0);
}

#[test]
fn cufile_reads_into_one_gpu_and_says_how() {
    let model = Model::new();
    let on = ["--tp", "2", "--devices", "cuda:1,1", "--engine", "cufile"];
    assert_eq!(model.digests(&[], &on), model.digests(&[], &["--tp", "2"]));
    let object = model.load(&[], &on, 0);
    assert_eq!(
        (&object["engine"], &object["direct"], &object["peak_pinned_bytes"]),
        (&json!("cufile"), &json!("known"), &json!(0))
    );
    let old = [("SIMCUFILE_PARAMETERS", "0")];
    assert_eq!(model.load(&old, &on, 0)["direct"], "unknown");
    assert_eq!(model.load(&[], &["--devices", "cuda:1"], 0)["direct"], Value::Null);
    // Asked for, and not to be had.
    let refused = model.load(&[("SIMCUFILE_MODE", "compat")], &on, 4);
    assert!(error(&refused).contains("nvidia-fs"), "{refused}");
    let several = model.load(&[], &["--tp", "2", "--devices", "cuda", "--engine", "cufile"], 2);
    assert!(error(&several).contains("cuda:0, cuda:1"), "{several}");
    let planned = run(&[], &["plan", model.path().to_str().unwrap(), "--rules", "replicate"], 0);
    assert_eq!(planned["direct"], "known");
}

#[expect(clippy::print_stdout, reason = "a skip says so")]
#[test]
fn what_the_doctor_measured_of_cufile_is_what_auto_goes_by() {
    let folder = tempfile::tempdir().unwrap();
    let [model, measured] = ["model.safetensors", "doctor.json"].map(|name| folder.path().join(name));
    let bytes = vec![7; 70_000_000];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], &bytes).unwrap();
    safetensors::serialize_to_file([("a", view)], None, &model).unwrap();
    // Clean pages can be forgotten.
    fs::File::open(&model).unwrap().sync_all().unwrap();
    let model = model.to_str().unwrap();
    let load = |args: &[&str]| {
        run(&[], &["load", model, "--page-cache", "drop"], 0);
        run(&[], &[&["load", model, "--page-cache", "drop", "--staging", "16M"], args].concat(), 0)
    };

    let mut doctor = run(&[("SIMCUDA_DEVICES", "2")], &["doctor", model], 0);
    let found = doctor["cufile"]["measured"].as_array_mut().unwrap();
    assert_eq!(found.len(), 2, "{found:?}");
    for (one, gpu) in found.iter_mut().zip(0..) {
        assert_eq!(one["gpu"], gpu);
        // Which of them is faster depends on the machine.
        (one["cufile_gb_per_s"], one["staged_gb_per_s"]) = (json!(6 - 2 * gpu), json!(5));
    }
    assert_eq!(doctor["cufile"]["measured_why"], Value::Null);
    fs::write(&measured, doctor.to_string()).unwrap();
    let measured = ["--doctor", measured.to_str().unwrap()];
    let on = |gpu, more: &[&str]| load(&[&["--devices", gpu], more].concat());
    let without = on("cuda:0", &[]);
    if without["engine"] != "uring" {
        println!("SKIPPED: this file system is not read past the page cache");
        return;
    }
    let with = on("cuda:0", &measured);
    assert_eq!((&with["engine"], &with["direct"], &with["warnings"]), (&json!("cufile"), &json!("known"), &json!([])));
    assert!(with["engine_reason"].as_str().unwrap().ends_with("6.00 GB/s where staging had 5.00"), "{with}");
    for (gpu, why) in [("cuda:1", "; cufile was no faster"), ("cuda:2", "; cufile was measured elsewhere")] {
        let with = on(gpu, &measured);
        assert_eq!(with["engine"], "uring");
        assert!(with["engine_reason"].as_str().unwrap().ends_with(why), "{with}");
    }
    // Without nvidia-fs it is tried, and done without.
    run(&[], &["load", model, "--page-cache", "drop"], 0);
    let args = [&["load", model, "--page-cache", "drop", "--devices", "cuda:0"], &measured[..]].concat();
    let failed = run(&[("SIMCUFILE_MODE", "compat")], &args, 0);
    assert_eq!((&failed["engine"], &failed["direct"]), (&json!("uring"), &Value::Null));
    assert!(failed["warnings"][0].as_str().unwrap().contains("cufile is not used"), "{failed}");
    let wrong = run(&[], &["load", model, "--doctor", model], 2);
    assert!(error(&wrong).contains("no rates in this file"), "{wrong}");
}

#[test]
fn one_rank_of_several_takes_the_device_that_it_is_given() {
    let model = Model::new();
    let host = model.digests(&[], &["--tp", "4"]);
    let on = |settings: &[(&str, &str)], rank: &str, devices: &str, expected: &str| {
        let args = ["--tp", "4", "--rank", rank, "--devices", devices, "--check"];
        let object = model.load(settings, &args, 0);
        assert_eq!(object["ranks"].as_array().unwrap().len(), 1);
        let found = &object["ranks"][0];
        assert_eq!((&found["device"], &found["rank"]), (&json!(expected), &json!(rank.parse::<u32>().unwrap())));
        assert_eq!(found["digest"], host[rank.parse::<usize>().unwrap()]);
    };
    on(&[], "2", "cuda:1", "cuda:1");
    on(&[], "3", "cuda", "cuda:3");
    on(&[], "1", "cuda:3,2,1,0", "cuda:2");
    // The only one that a launcher shows.
    on(&[("SIMCUDA_DEVICES", "1")], "3", "cuda", "cuda:0");
}

#[test]
fn too_little_device_memory_is_told_with_what_is_needed_and_free() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = 100u64 << 20;
    let header = json!({ "a": { "dtype": "U8", "shape": [bytes], "data_offsets": [0, bytes] } }).to_string();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
    for memory in ["blocks", "per-tensor"] {
        let args = ["load", path.to_str().unwrap(), "--devices", "cuda:1", "--memory", memory];
        let object = run(&[("SIMCUDA_MEMORY", "64M")], &args, 4);
        assert_eq!(object["error"]["kind"], "device-memory");
        let error = error(&object);
        let told = |what: &str| error.contains(what);
        assert!(told("cuda:1") && told("104857600 bytes") && told("67108864 bytes"), "{error}");
    }
    // The ranks of one device need it together.
    let args = ["load", path.to_str().unwrap(), "--rules", "replicate", "--tp", "2", "--devices", "cuda:0,0"];
    assert!(error(&run(&[("SIMCUDA_MEMORY", "150M")], &args, 4)).contains("209715200 bytes"));
    run(&[("SIMCUDA_MEMORY", "300M")], &args, 0);
}

#[test]
fn what_is_not_there_is_told() {
    let model = Model::new();
    let refused = |settings: &[(&str, &str)], devices: &str, what: &[&str]| {
        let object = model.load(settings, &["--devices", devices], 4);
        assert_eq!(object["error"]["kind"], "device", "{object}");
        assert!(what.iter().all(|what| error(&object).contains(what)), "{object}");
    };
    refused(&[], "cuda:9", &["no such device", "a device below 4", "cuda:9"]);
    refused(&[("SIMCUDA_DEVICES", "0")], "cuda", &["CUDA_ERROR_NO_DEVICE"]);
    let doctor = run(&[("SIMCUDA_DEVICES", "0")], &["doctor", model.path().to_str().unwrap()], 0);
    assert_eq!((&doctor["cuda"]["usable"], &doctor["cuda"]["devices"]), (&json!(false), &json!([])));
    assert!(doctor["cuda"]["why"].is_string());
}

#[test]
fn no_driver_is_an_ordinary_error() {
    // SAFETY: the driver may be loaded into any process.
    let found = ["libcuda.so", "libcuda.so.1"].map(|name| unsafe { libloading::Library::new(name) });
    if found.iter().any(Result::is_ok) {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        return eprintln!("SKIPPED: this machine has a driver");
    }
    let model = Model::new();
    let load = ["load", model.path().to_str().unwrap(), "--devices", "cuda"];
    let object = schema::run(&mut Command::new(env!("CARGO_BIN_EXE_shardlift")), &load, 4);
    assert_eq!(object["error"]["message"], "no NVIDIA driver: libcuda.so.1 not found");
    let doctor = ["doctor", model.path().to_str().unwrap()];
    let object = schema::run(&mut Command::new(env!("CARGO_BIN_EXE_shardlift")), &doctor, 0);
    assert_eq!(object["cuda"]["why"], "no NVIDIA driver: libcuda.so.1 not found");
}

#[test]
fn wrong_arguments_move_nothing() {
    let model = Model::new();
    for args in [
        &["--tp", "2", "--devices", "cuda:0,1,2"][..],
        &["--tp", "4", "--devices", "cuda:0,1"],
        &["--devices", "cuda:"],
        &["--devices", "cuda:a"],
        &["--devices", "cuda", "--residency", "mapped"],
        &["--devices", "cuda:0", "--tp", "2", "--rank", "2"],
    ] {
        let object = model.load(&[], args, 2);
        assert_eq!(object["error"]["kind"], "usage", "{object}");
    }
}

#[test]
fn mappings_are_registered_only_where_the_device_wants_it() {
    let model = Model::new();
    let ledger = model.ledger();
    let host = model.digests(&[], &["--tp", "2"]);
    let registered = |settings: &[(&str, &str)]| {
        let settings = [settings, &[("SIMCUDA_LEDGER", ledger.to_str().unwrap())]].concat();
        let args = ["--tp", "2", "--devices", "cuda", "--engine", "mmap", "--staging", "4M", "--check"];
        let object = model.load(&settings, &args, 0);
        assert_eq!(object["engine"], "mmap");
        let digests: Vec<Value> =
            object["ranks"].as_array().unwrap().iter().map(|rank| rank["digest"].clone()).collect();
        assert_eq!(digests, host, "{settings:?}");
        let ledger: Value = serde_json::from_slice(&fs::read(&ledger).unwrap()).unwrap();
        let calls = ledger["calls_by_function"]["cuMemHostRegister_v2"].as_u64().unwrap();
        // Not counted are the pages of each GPU through which digests come back to --check.
        (calls - 2, object["peak_pinned_bytes"].as_u64().unwrap())
    };
    // Windows of the files, more than fit at a time; or slots, twice; or nothing, for the device reads on its own.
    let (windows, bytes) = registered(&[]);
    assert!(windows > 2 && bytes > 0 && bytes <= 4 << 20, "{windows} windows, {bytes} bytes");
    let (slots, bytes) = registered(&[("SIMCUDA_READ_ONLY", "0")]);
    assert!((1..=2).contains(&slots) && bytes > 0 && bytes <= 4 << 20, "{slots} slots, {bytes} bytes");
    assert_eq!(registered(&[("SIMCUDA_HOST_PAGE_TABLES", "1")]), (0, 0));
}

#[test]
fn the_oldest_driver_will_do() {
    let model = Model::new();
    let (settings, args) = ([("SIMCUDA_DRIVER_VERSION", "12000")], ["--tp", "2", "--devices", "cuda"]);
    assert_eq!(model.digests(&settings, &args), model.digests(&[], &["--tp", "2"]));
    let doctor = run(&settings, &["doctor", model.path().to_str().unwrap()], 0);
    assert_eq!(doctor["cuda"]["driver_version"], "12.0");
}

#[test]
fn the_doctor_looks_at_every_device() {
    let model = Model::new();
    let doctor = run(&[("SIMCUDA_DEVICES", "2")], &["doctor", model.path().to_str().unwrap()], 0);
    assert_eq!((&doctor["cuda"]["usable"], &doctor["cuda"]["why"]), (&json!(true), &Value::Null));
    let devices = doctor["cuda"]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    for (device, ordinal) in devices.iter().zip(0..) {
        assert_eq!((&device["ordinal"], &device["peers"]), (&json!(ordinal), &json!([1 - ordinal])));
        assert_eq!((&device["memory_bytes"], &device["why"]), (&json!(1 << 30), &Value::Null));
        assert!(device["h2d_gb_per_s"].as_f64() > Some(0.0) && device["h2d_together_gb_per_s"].as_f64() > Some(0.0));
        assert_eq!(device["registered_mappings"], json!({ "usable": true, "why": null }));
    }
    assert_eq!(doctor["nccl"], json!({ "usable": true, "why": null, "version": "2.30.3" }));
    let why = "less than 67108864 bytes of tensors";
    let cufile = json!({
        "usable": true, "why": null, "version": "1.14", "direct": "known", "measured": [], "measured_why": why,
    });
    assert_eq!(doctor["cufile"], cufile);
    let without = run(&[("SIMCUFILE_MODE", "compat")], &["doctor", model.path().to_str().unwrap()], 0);
    assert_eq!(without["cufile"]["usable"], false);
    assert!(without["cufile"]["why"].as_str().unwrap().contains("nvidia-fs"), "{without}");
    let old = run(&[("SIMNCCL_VERSION", "21208")], &["doctor", model.path().to_str().unwrap()], 0);
    let why = "NCCL too old: expected 2.14.0 or newer, found 2.12.8";
    assert_eq!(old["nccl"], json!({ "usable": false, "why": why, "version": null }));
    // A device without room to measure says so, and the others are shown all the same.
    let small = run(&[("SIMCUDA_MEMORY", "16M")], &["doctor", model.path().to_str().unwrap()], 0);
    assert!(small["cuda"]["devices"][3]["why"].as_str().unwrap().contains("cuda:3"), "{small}");
}
