//! The launch scripts, and the example that a launcher starts: on host devices, and on the twins. A launcher that is not
//! installed is said so.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;
#[path = "support/twin.rs"]
mod twin;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const RANKS: &str = "2";

/// A model of 13 MB and rules for it.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 1);
    fs::write(folder.path().join("rules.toml"), model::RULES).unwrap();
    folder
}

/// A script of `scripts/launch` that starts the binary of the tests, on the twins if it asks for GPUs.
fn script(name: &str, model: &Path, flags: &[&str]) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/launch").join(name);
    let mut command = twin::command(path);
    command.env("SHARDLIFT", env!("CARGO_BIN_EXE_shardlift")).env("SIMCUDA_LEAKS", "abort");
    // Both refuse to run as root unless told.
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.arg(RANKS).arg(model).arg("--rules").arg(model.join("rules.toml")).args(["--json", "--check"]).args(flags);
    command.stdin(Stdio::null());
    command
}

/// The objects that the ranks of a script printed, each on a line of its own or over several.
fn objects(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    serde_json::Deserializer::from_str(&text).into_iter::<Value>().map(|object| object.expect(&text)).collect()
}

/// Digests of both ranks, in whatever order they ended.
fn digests(objects: &[Value]) -> BTreeSet<String> {
    let ranks = objects.iter().flat_map(|object| object["ranks"].as_array().unwrap());
    ranks.map(|rank| format!("{} {}", rank["rank"], rank["digest"])).collect()
}

fn host_digests(model: &Path) -> BTreeSet<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
    command
        .arg("load")
        .arg(model)
        .arg("--rules")
        .arg(model.join("rules.toml"))
        .args(["--tp", RANKS, "--json", "--check"]);
    digests(&objects(&command.output().unwrap()))
}

fn skip(what: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {what}");
}

fn is_installed(program: &str) -> bool {
    Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success()
}

#[test]
fn plain_processes_load_on_the_host_and_together_on_gpus() {
    let model = model();
    let host = host_digests(model.path());
    assert_eq!(host.len(), 2);
    let alone = objects(&script("plain", model.path(), &[]).output().unwrap());
    assert_eq!(digests(&alone), host);
    let gpus = ["--devices", "cuda", "--cooperate", "always"];
    let together = objects(&script("plain", model.path(), &gpus).output().unwrap());
    assert_eq!(digests(&together), host);
    assert!(together.iter().all(|object| object["received_bytes"].as_u64().unwrap() > 0), "{together:#?}");
    let refused = script("plain", model.path(), &["--no-such-flag"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn launchers_that_are_here_start_ranks_that_find_each_other() {
    let model = model();
    let host = host_digests(model.path());
    for launcher in ["mpirun.openmpi", "mpirun.mpich"] {
        if !is_installed(launcher) {
            skip(&format!("{launcher} is not installed"));
            continue;
        }
        let mpirun =
            if launcher.ends_with("openmpi") { format!("{launcher} --oversubscribe") } else { launcher.into() };
        for flags in [&[][..], &["--devices", "cuda", "--cooperate", "always"]] {
            let output = script("mpirun", model.path(), flags).env("MPIRUN", &mpirun).output().unwrap();
            assert_eq!(digests(&objects(&output)), host, "{launcher} {flags:?}");
        }
    }
    // Some packages of it do not run on the Python beside them.
    let alone = ["--no_python", "--standalone", "--nproc_per_node", "1", "true"];
    if Command::new("torchrun").args(alone).output().is_ok_and(|output| output.status.success()) {
        let output =
            script("torchrun", model.path(), &["--devices", "cuda", "--cooperate", "always"]).output().unwrap();
        assert_eq!(digests(&objects(&output)), host, "torchrun");
    } else {
        skip("torchrun is not installed, or does not run");
    }
    if !is_installed("sbatch") || !Command::new("sinfo").output().is_ok_and(|output| output.status.success()) {
        skip("no Slurm cluster answers here: sbatch was not tried");
    }
}

/// What torchrun sets, without torchrun.
#[test]
fn the_example_of_several_processes() {
    let folder = tempfile::tempdir().unwrap();
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-llama");
    assert!(Command::new(make).arg(folder.path()).output().unwrap().status.success());
    for (devices, settings) in [("host", None), ("cuda", Some(("SIMCUDA_LEAKS", "abort")))] {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ranks: Vec<_> = (0..2)
            .map(|rank: u32| {
                let mut command = twin::command(example());
                command.arg(folder.path()).arg(devices).envs(settings);
                let rank = rank.to_string();
                command.envs([
                    ("RANK", &*rank),
                    ("LOCAL_RANK", &*rank),
                    ("WORLD_SIZE", "2"),
                    ("LOCAL_WORLD_SIZE", "2"),
                ]);
                command.envs([("MASTER_ADDR", "127.0.0.1"), ("GROUP_RANK", "0"), ("TORCHELASTIC_RUN_ID", "test")]);
                command.env("MASTER_PORT", port.to_string()).stdin(Stdio::null());
                command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for (rank, process) in ranks.into_iter().enumerate() {
            let output = process.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{devices}: {text} {}", String::from_utf8_lossy(&output.stderr));
            assert!(text.starts_with(&format!("rank {rank} of 2: 39 tensors, ")), "{text}");
        }
    }
}

/// Where cargo puts examples for tests.
fn example() -> PathBuf {
    let binary = std::env::current_exe().unwrap();
    let folder = binary.ancestors().nth(2).unwrap().join("examples/04_multi_process");
    assert!(folder.exists(), "no example at {}", folder.display());
    folder
}
