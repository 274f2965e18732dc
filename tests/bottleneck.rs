//! What a report says held a load up, where one thing surely did: throttled storage, work for the processor, slow links of
//! the driver twin, a caller that takes its time.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use shardlift::{Checkpoint, Loader, Rules, World};

/// Loads 13 MB by the command line, on GPUs with links of so many GB/s.
fn load(folder: &Path, link: &str, args: &[&str]) -> Value {
    let rules = folder.join("rules.toml");
    let output = twins::cuda::command(env!("CARGO_BIN_EXE_shardlift"))
        .args(["load", "--json", "--engine", "pread", "--rules"])
        .args([&rules, folder])
        .args(args)
        .envs([("SIMCUDA_LINK", link), ("SIMCUDA_DEVICES", "2"), ("SIMCUDA_CHECK", "0"), ("SIMCUDA_POISON", "0")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_held_a_load_up_is_named() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 8);
    for (rule, link, args, expected) in [
        // Slow storage, whoever takes the bytes; also where a link is not much faster.
        ("replicate = true", "10", &["--throttle", "20M"][..], "storage"),
        ("replicate = true", "10", &["--throttle", "20M", "--devices", "host:staged"], "storage"),
        ("replicate = true", "0.06", &["--throttle", "20M", "--devices", "cuda:0,1", "--tp", "2"], "storage"),
        // Out of the page cache, where a processor is all that it takes; and cut and cast by it.
        ("replicate = true", "10", &[], "cpu"),
        ("replicate = true, cast = \"f32\", transpose = true", "10", &[], "cpu"),
        ("shard = { dim = 1, split = \"ceil\" }", "10", &["--tp", "4"], "cpu"),
        // Slow links, with more slots than the model has bytes and with few; one link of two, the storage being slow too.
        ("replicate = true", "0.02", &["--devices", "cuda:0"], "link"),
        ("replicate = true", "0.02", &["--devices", "cuda:0,1", "--tp", "2", "--staging", "2M"], "link"),
        ("replicate = true", "0.02", &["--devices", "cuda:1", "--throttle", "60M", "--staging", "4M"], "link"),
    ] {
        let scalars = "{ match = \"{h,i,j}.*\", replicate = true }";
        let rules = format!("rule = [{scalars}, {{ match = \"**\", {rule} }}]");
        fs::write(folder.path().join("rules.toml"), rules).unwrap();
        let object = load(folder.path(), link, args);
        assert_eq!(object["bottleneck"], expected, "{rule} {link} {args:?}: {object:#}");
        // What was named is much of the time, and all together no more than there was.
        let spent = object["spent"].as_object().unwrap();
        let all: f64 = spent.values().map(|seconds| seconds.as_f64().unwrap()).sum();
        let seconds = object["seconds"].as_f64().unwrap();
        assert!(all < seconds * 1.2 + 0.1, "{all}: {object:#}");
        let named = spent[&format!("{expected}_seconds")].as_f64().unwrap();
        assert!(expected == "cpu" || named > seconds / 3.0, "{named}: {object:#}");
    }
}

#[test]
fn a_caller_that_takes_its_time_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 9).len() as u32;
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().throttle(Some(60 << 20));
    for world in [World::host(1), World::host_staged(1)] {
        let plan = loader.plan(&checkpoint, &Rules::replicate_all(), &world).unwrap();
        for (pause, expected) in [(Duration::from_millis(100), "consumer"), (Duration::ZERO, "storage")] {
            let mut load = loader.start(&plan).unwrap();
            for tensor in &mut load {
                tensor.unwrap();
                thread::sleep(pause);
            }
            let (_, report) = load.finish().unwrap();
            assert_eq!(report.bottleneck, expected, "{report:?}");
            assert!(report.spent.consumer >= (pause * tensors).as_secs_f64());
        }
        // Who does not ask for tensors keeps nobody waiting.
        let (_, report) = loader.load(&plan).unwrap();
        assert_eq!((report.bottleneck.as_str(), report.spent.consumer), ("storage", 0.0));
    }
}
