//! Ranks that real launchers start, where these are installed; the tests say which were not.

use std::env;
use std::io::{self, Write};
use std::process::Command;
use std::time::Duration;

use shardlift::{Group, GroupOptions, Launch, LaunchOptions, World};

/// What a launcher starts: joins as the environment says, and tells who it is.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    let launch = Launch::from_env(&LaunchOptions::default()).unwrap().unwrap();
    let world = World::from_env().unwrap();
    assert_eq!((world.size(), world.driven()), (launch.size(), &[launch.rank()][..]));
    let mut options = GroupOptions::default();
    options.join_timeout = Duration::from_secs(60);
    let group = Group::join(&launch, &options).unwrap();
    let me = format!("{}/{}", launch.rank(), launch.local_rank().unwrap());
    let all = group.exchange("who", me.into_bytes()).unwrap();
    let all: Vec<String> = all.into_iter().map(|part| String::from_utf8(part).unwrap()).collect();
    group.finish().unwrap();
    let line = format!("\n@ {} {} of {}: {}\n", launch.launcher(), launch.rank(), launch.size(), all.join(" "));
    io::stdout().write_all(line.as_bytes()).unwrap();
}

/// Whether a launcher can be run here; a line says it if not.
fn is_there(name: &str, probe: &[&str]) -> bool {
    let why = match Command::new(name).args(probe).output() {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    io::stderr().write_all(format!("SKIPPED: no ranks of {name}: {why}\n").as_bytes()).unwrap();
    false
}

/// Starts four ranks with these words before the program, and holds what they tell.
fn start(name: &str, arguments: &[&str], launcher: &str) {
    let mut command = Command::new(name);
    command.args(arguments).arg(env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "rank", "--nocapture"]);
    // This machine's GPUs are not the ranks', and `mpirun` of Open MPI asks twice whether it may run as root.
    command.env_remove("CUDA_VISIBLE_DEVICES");
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
    let mut told: Vec<&str> = text.lines().filter_map(|line| line.split_once("@ ").map(|(_, told)| told)).collect();
    told.sort_unstable();
    let expected: Vec<String> = (0..4).map(|rank| format!("{launcher} {rank} of 4: 0/0 1/1 2/2 3/3")).collect();
    assert_eq!(told, expected, "{name}");
}

#[test]
fn open_mpi() {
    if is_there("mpirun.openmpi", &["--version"]) {
        start("mpirun.openmpi", &["--oversubscribe", "-np", "4"], "Open MPI");
    }
}

#[test]
fn mpich() {
    if is_there("mpirun.mpich", &["--version"]) {
        start("mpirun.mpich", &["-np", "4"], "PMI");
        // Behind a shell that stays their parents are not the same.
        start("mpirun.mpich", &["-np", "4", "sh", "-c", "\"$0\" \"$@\"; exit $?"], "PMI");
    }
}

#[test]
fn torchrun() {
    // `--help` is answered by versions that start nothing.
    if is_there("torchrun", &["--standalone", "--nproc_per_node", "1", "--no_python", "true"]) {
        start("torchrun", &["--standalone", "--nproc_per_node", "4", "--no_python"], "torchrun");
    }
}

#[test]
fn slurm() {
    if is_there("srun", &["-N", "1", "-n", "1", "--immediate=5", "true"]) {
        start("srun", &["-N", "1", "-n", "4", "--overcommit"], "Slurm");
    }
}
