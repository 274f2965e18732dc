//! The launch scripts, and the example that a launcher starts: on host devices, and on the twins. The tests say which
//! launchers are not here.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/launchers.rs"]
mod launchers;
#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use launchers::is_there;
use serde_json::Value;

const RANKS: &str = "2";

/// On host memory, and on GPUs that pass on what both want.
const WAYS: [&[&str]; 2] = [&[], &["--devices", "cuda", "--cooperate", "always"]];

/// A model of 13 MB and rules for it.
fn model() -> tempfile::TempDir {
    // Beside the program: where Slurm has other machines, they see both or none.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model::write(folder.path(), 1);
    fs::write(folder.path().join("rules.toml"), model::RULES).unwrap();
    folder
}

/// A script of `scripts/launch` that starts the binary of the tests, on the twins if it asks for GPUs.
fn script(name: &str, model: &Path, flags: &[&str]) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/launch").join(name);
    let mut command = twins::cuda::command(path);
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
fn mpirun_starts_ranks_that_find_each_other() {
    let model = model();
    let host = host_digests(model.path());
    for launcher in ["mpirun.openmpi", "mpirun.mpich"] {
        if !is_there(launcher, &["--version"]) {
            continue;
        }
        let mpirun =
            if launcher.ends_with("openmpi") { format!("{launcher} --oversubscribe") } else { launcher.into() };
        for flags in WAYS {
            let output = script("mpirun", model.path(), flags).env("MPIRUN", &mpirun).output().unwrap();
            assert_eq!(digests(&objects(&output)), host, "{launcher} {flags:?}");
        }
    }
}

#[test]
fn torchrun_starts_ranks_that_find_each_other() {
    if !is_there("torchrun", &launchers::TORCHRUN) {
        return;
    }
    let model = model();
    let host = host_digests(model.path());
    for flags in WAYS {
        let output = script("torchrun", model.path(), flags).output().unwrap();
        assert_eq!(digests(&objects(&output)), host, "{flags:?}");
    }
    let refused = script("torchrun", model.path(), &["--no-such-flag"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "torchrun has one status for all failures");
}

#[test]
fn a_job_starts_ranks_that_find_each_other() {
    if !is_there("srun", &launchers::srun("1")) {
        return;
    }
    let model = model();
    let host = host_digests(model.path());
    for flags in WAYS {
        assert_eq!(digests(&objects(&job(model.path(), "--nodes 1", flags))), host, "{flags:?}");
    }
    assert_eq!(job(model.path(), "--nodes 1", &["--no-such-flag"]).status.code(), Some(2));
    if is_there("srun", &launchers::srun("2")) {
        for flags in [&[][..], &["--devices", "cuda", "--cooperate", "cluster"]] {
            let ranks = objects(&job(model.path(), "--nodes 2 --ntasks-per-node 1", flags));
            assert_eq!(digests(&ranks), host, "two nodes, {flags:?}");
        }
    }
}

/// Waits for a job of the script, and tells what its ranks printed, each into files of its own.
fn job(model: &Path, flags: &str, load: &[&str]) -> Output {
    let file = |name: &str| model.join(name).display().to_string();
    let flags = format!("--wait --overcommit {flags} --output {}", file("job"));
    let mut sbatch = script("sbatch", model, load);
    sbatch.env("SBATCH", flags).env("SRUN", format!("--output {} --error {}", file("out.%t"), file("err.%t")));
    // Nodes of a test may be one machine, whose first GPU is then that of both.
    let mut output = sbatch.env("NCCL_MULTI_RANK_GPU_ENABLE", "1").output().unwrap();
    output.stdout = ["out.0", "out.1"].map(|name| fs::read(file(name)).unwrap_or_default()).concat();
    output.stderr.extend(["job", "err.0", "err.1"].map(|name| fs::read(file(name)).unwrap_or_default()).concat());
    output
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
                let mut command = twins::cuda::command(example());
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
