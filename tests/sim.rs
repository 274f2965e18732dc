//! Loads into GPUs of the driver twin: what the driver is asked for, what it gets back, and every one of its calls
//! failing in turn. One test function for each process that is needed: faults and counts are of the whole process.

#[path = "support/twin.rs"]
mod twin;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Loader, Memory, Plan, Result, Rules, World};

const RULES: &str = r#"
rule = [
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**.cast", cast = "bf16", replicate = true },
  { match = "**.transposed", transpose = true, replicate = true },
  { match = "**", replicate = true },
]
"#;

/// A model of two files in which every way to a device occurs.
fn write(folder: &Path) {
    let shapes: [(&str, Dtype, &[usize]); 6] = [
        ("a.rows", Dtype::BF16, &[64, 64]),
        ("b.columns", Dtype::BF16, &[64, 1024]),
        ("c.cast", Dtype::F32, &[33, 7]),
        ("d.transposed", Dtype::BF16, &[40, 24]),
        ("e.whole", Dtype::U8, &[1001]),
        ("f.columns", Dtype::BF16, &[512, 32]),
    ];
    let mut state = 7u32;
    let mut bytes = |count: usize| -> Vec<u8> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..count).map(next).collect()
    };
    for (file, part) in [("one", &shapes[..3]), ("two", &shapes[3..])] {
        let size = |dtype, shape: &[usize]| shape.iter().product::<usize>() * if dtype == Dtype::F32 { 4 } else { 2 };
        let data: BTreeMap<&str, (Dtype, &[usize], Vec<u8>)> = part
            .iter()
            .map(|&(name, dtype, shape)| {
                let count = if dtype == Dtype::U8 { shape[0] } else { size(dtype, shape) };
                (name, (dtype, shape, bytes(count)))
            })
            .collect();
        let views = data
            .iter()
            .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join(format!("{file}.safetensors"))).unwrap();
    }
}

/// One way to load that is swept for faults.
#[derive(Debug, Clone, Copy)]
struct Way {
    gpus: &'static [u32],
    memory: Memory,
    engine: EngineChoice,
}

const WAYS: [Way; 3] = [
    Way { gpus: &[0], memory: Memory::Blocks, engine: EngineChoice::Pread },
    Way { gpus: &[0, 1, 2, 3], memory: Memory::Blocks, engine: EngineChoice::Pread },
    Way { gpus: &[2, 2], memory: Memory::PerTensor, engine: EngineChoice::Mmap },
];

/// Loads and checks, and gives everything back.
fn load(plan: &Plan, way: Way) -> Result<()> {
    let loader = Loader::new().engine(way.engine).memory(way.memory).staging(2 << 20);
    let loader = loader.stall(Duration::from_secs(1), Duration::from_secs(10));
    let (weights, _) = loader.load(plan)?;
    weights.check()?;
    Ok(())
}

/// Calls that may fail without an error: those that only give back, when nobody is left to tell, and the questions
/// what a device can do, which then is taken to be able to do less.
const QUIET: [&str; 14] = [
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRelease_v2",
    "cuEventDestroy_v2",
    "cuMemAddressFree",
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemHostUnregister",
    "cuMemRelease",
    "cuMemUnmap",
    "cuModuleUnload",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
];

/// Calls that are made as often as time passes; the first of them stand for all.
const ASKED_OFTEN: [&str; 4] = ["cuEventQuery", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuDeviceGetAttribute"];

/// Invalid value, out of memory, illegal address, and a device that is gone.
const CODES: [(u32, &str); 4] = [(1, ""), (2, ""), (700, "!"), (46, "!")];

/// In a process of its own, by `every_call_of_a_load_can_fail`.
#[test]
#[ignore = "run by another test"]
fn sweep() {
    let way = WAYS[std::env::var("SWEEP_WAY").unwrap().parse::<usize>().unwrap()];
    let (code, lost) = CODES[std::env::var("SWEEP_CODE").unwrap().parse::<usize>().unwrap()];
    twin::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let world = World::local(way.gpus.iter().copied());
    let plan = Plan::new(&checkpoint, &Rules::from_toml(RULES).unwrap(), &world).unwrap();
    // The first initialises the driver.
    load(&plan, way).unwrap();
    twin::reset_counts();
    load(&plan, way).unwrap();
    assert_eq!((twin::live(), twin::violations()), (0, 0));
    let ledger = folder.path().join("ledger.json");
    twin::ledger(&ledger);
    let ledger: Value = serde_json::from_slice(&std::fs::read(&ledger).unwrap()).unwrap();
    let calls: BTreeMap<String, u64> = serde_json::from_value(ledger["calls_by_function"].clone()).unwrap();
    let (mut tried, mut failed) = (0, 0);
    let mut problems = Vec::new();
    for (call, &count) in &calls {
        let count = if ASKED_OFTEN.contains(&call.as_str()) { count.min(12) } else { count };
        for n in 1..=count {
            twin::reset_counts();
            twin::fault(&format!("{call}@{n}={code}{lost}"));
            let began = Instant::now();
            let outcome = load(&plan, way);
            let fired = twin::calls(Some(call)) >= n;
            twin::fault("");
            tried += 1;
            failed += usize::from(outcome.is_err());
            let problem = if began.elapsed() > Duration::from_secs(30) {
                "took too long"
            } else if twin::violations() > 0 {
                "broke a rule of the driver"
            } else if twin::live() > 0 {
                "something was not given back"
            } else {
                told(&outcome, call, fired, !lost.is_empty())
            };
            if !problem.is_empty() {
                problems.push(format!("call {n} of {call} answers {code}: {problem}: {outcome:?}"));
            }
        }
    }
    assert!(problems.is_empty(), "{way:?}: {}", problems.join("\n"));
    assert!(failed * 2 > tried, "{failed} of {tried} faults were told");
    println_result(&format!("{way:?} {code}: {tried} faults, {failed} told"));
}

/// What is wrong with how a load ended in which `call` failed, if it was made; nothing if all is well.
fn told(outcome: &Result<()>, call: &str, fired: bool, lost: bool) -> &'static str {
    let Err(error) = outcome else {
        return if !fired || QUIET.contains(&call) { "" } else { "nobody was told" };
    };
    let message = error.to_string();
    // A lost device may show at whichever call comes next.
    let names_call = message.contains(call) || lost;
    let of_copy = ["cuMemcpyHtoDAsync_v2", "cuMemcpy2DAsync_v2", "cuLaunchKernel", "cuEventRecord"].contains(&call);
    match error.tensor() {
        _ if !message.contains("cuda:") => "the error names no device",
        _ if !names_call => "the error names no call",
        None if of_copy => "the error names no tensor",
        _ => "",
    }
}

#[expect(clippy::print_stdout, reason = "figures for whoever reads the test's output")]
fn println_result(text: &str) {
    println!("{text}");
}

/// Runs an ignored test of this file in a process of its own.
fn child(test: &str, env: &[(&str, String)]) {
    let mut command = twin::command(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", test, "--nocapture"]);
    command.envs(env.iter().map(|(name, value)| (*name, value.as_str())));
    let output = command.output().unwrap();
    let text = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    assert!(output.status.success(), "{test} {env:?}: {text}");
    assert!(text.contains("1 passed"), "{test}: {text}");
    println_result(&text);
}

#[test]
fn every_call_of_a_load_can_fail() {
    for way in 0..WAYS.len() {
        for code in 0..CODES.len() {
            child("sweep", &[("SWEEP_WAY", way.to_string()), ("SWEEP_CODE", code.to_string())]);
        }
    }
}
