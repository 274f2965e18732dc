//! How many calls of the driver a load makes while slots go by, on the driver twin: bounded for each slot and device, and
//! for each small tensor. One process for each number of devices.
#![cfg(feature = "cuda")]

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Plan, Rules, World};

const DEVICES: [u32; 3] = [1, 4, 8];

/// Sixteen slots, and tensors of one.
const STAGING: usize = 64 << 20;
const ROWS: u64 = 512;
const COLUMNS: u64 = 4096;

/// Most calls for each slot and device that takes from it.
const PER_SLOT: f64 = 3.0;
/// Most for each small tensor that lands.
const PER_SMALL: f64 = 1.5;

const WAYS: [&str; 3] = ["replicate = true", "shard = { dim = 0 }", "shard = { dim = 1 }"];

/// Writes BF16 matrices of zeros, which take no room.
fn write(folder: &Path, shapes: impl Iterator<Item = (u64, u64)>) {
    let (mut header, mut end) = (Map::new(), 0);
    for (at, (rows, columns)) in shapes.enumerate() {
        let start = end;
        end += rows * columns * 2;
        let tensor = json!({"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]});
        header.insert(format!("layers.{at:05}.weight"), tensor);
    }
    let header = Value::Object(header).to_string().into_bytes();
    fs::create_dir_all(folder).unwrap();
    let path = folder.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8 + header.len() as u64 + end).unwrap();
}

/// Calls of a load onto all devices, and copies among them; and how many tensors landed.
fn count(folder: &Path, way: &str, devices: u32) -> [u64; 3] {
    let rules = Rules::from_toml(&format!("rule = [{{ match = \"**\", {way} }}]")).unwrap();
    let plan = Plan::new(&Checkpoint::open(folder).unwrap(), &rules, &World::local(0..devices)).unwrap();
    let loader = Loader::new().engine(EngineChoice::Pread).staging(STAGING);
    // Slots are pinned and contexts made before anything is counted.
    drop(loader.load(&plan).unwrap());
    twins::cuda::reset_counts();
    let (weights, _) = loader.load(&plan).unwrap();
    let copies = ["cuMemcpyHtoDAsync_v2", "cuMemcpy2DAsync_v2"].map(|name| twins::cuda::calls(Some(name)));
    [twins::cuda::calls(None), copies.iter().sum(), weights.iter().count() as u64]
}

/// In a process of its own: what twice the tensors cost more is the cost of slots, without that of starting and ending.
#[test]
#[ignore = "run by another test"]
fn of_slots() {
    twins::cuda::load();
    let devices = told_by_parent();
    let folder = tempfile::tempdir().unwrap();
    let [few, many] = [8, 40].map(|tensors| (folder.path().join(tensors.to_string()), tensors));
    for (folder, tensors) in [&few, &many] {
        write(folder, (0..*tensors).map(|_| (ROWS, COLUMNS)));
    }
    for way in WAYS {
        let [less, more] = [&few, &many].map(|(folder, _)| count(folder, way, devices));
        let (calls, copies) = (more[0] - less[0], more[1] - less[1]);
        assert_eq!(copies, (many.1 - few.1) * u64::from(devices), "{way}: a slot and device is a copy");
        let each = calls as f64 / copies as f64;
        println_result(&format!("{devices} devices, {way}: {each:.2} calls for each slot and device"));
        assert!(each <= PER_SLOT, "{way}: {each} calls");
    }
}

/// In a process of its own: many small tensors, no two neighbours of one size and few on a multiple of what memory of the
/// device is aligned to.
#[test]
#[ignore = "run by another test"]
fn of_small_tensors() {
    twins::cuda::load();
    let devices = told_by_parent();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), (0..20_000).map(|at| (8 * (1 + at % 3), 24 + at % 7)));
    for way in &WAYS[..2] {
        let [calls, _, tensors] = count(folder.path(), way, devices);
        let each = calls as f64 / tensors as f64;
        println_result(&format!("{devices} devices, {way}: {each:.2} calls for each of {tensors} small tensors"));
        assert!(each <= PER_SMALL, "{way}: {each} calls");
    }
}

#[test]
fn a_slot_costs_few_calls() {
    DEVICES.iter().for_each(|&devices| child("of_slots", devices));
}

#[test]
fn a_small_tensor_costs_few_calls() {
    DEVICES.iter().for_each(|&devices| child("of_small_tensors", devices));
}

#[expect(clippy::print_stdout, reason = "figures for whoever reads the test's output")]
fn println_result(text: &str) {
    println!("{text}");
}

#[expect(clippy::disallowed_methods, reason = "tests speak to their children so")]
fn told_by_parent() -> u32 {
    std::env::var("SIMCUDA_DEVICES").unwrap().parse().unwrap()
}

/// Runs an ignored test of this file in a process of its own.
fn child(test: &str, devices: u32) {
    let devices = devices.to_string();
    // Late copies would keep slots, and what is checked of them takes time in which others are asked.
    let settings = [
        ("SIMCUDA_DEVICES", &*devices),
        ("SIMCUDA_JITTER", "0"),
        ("SIMCUDA_CHECK", "0"),
        ("SIMCUDA_POISON", "0"),
        ("SIMCUDA_LEAKS", "abort"),
        ("SIMCUDA_POPULATE", "1"),
    ];
    println_result(&twins::child::passes(test, &settings));
}
