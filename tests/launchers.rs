//! Ranks that real launchers start, where these are installed; the tests say which were not.

#[path = "support/launchers.rs"]
mod launchers;

use std::env;
use std::io::{self, Write};
use std::process::Command;
use std::time::Duration;

use launchers::is_there;
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

/// Starts four ranks with these words before the program, and holds what they tell.
fn start(name: &str, arguments: &[&str], launcher: &str, ranks: &str) {
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
    let expected: Vec<String> = (0..4).map(|rank| format!("{launcher} {rank} of 4: {ranks}")).collect();
    assert_eq!(told, expected, "{name}");
}

/// Ranks and local ranks where all are on one node.
const ONE_NODE: &str = "0/0 1/1 2/2 3/3";

/// The same where two are on each of two.
const TWO_NODES: &str = "0/0 1/1 2/0 3/1";

#[test]
fn open_mpi() {
    if is_there("mpirun.openmpi", &["--version"]) {
        start("mpirun.openmpi", &["--oversubscribe", "-np", "4"], "Open MPI", ONE_NODE);
    }
}

#[test]
fn mpich() {
    if is_there("mpirun.mpich", &["--version"]) {
        start("mpirun.mpich", &["-np", "4"], "PMI", ONE_NODE);
        // Behind a shell that stays their parents are not the same.
        start("mpirun.mpich", &["-np", "4", "sh", "-c", "\"$0\" \"$@\"; exit $?"], "PMI", ONE_NODE);
    }
}

#[test]
fn torchrun() {
    if is_there("torchrun", &launchers::TORCHRUN) {
        start("torchrun", &["--standalone", "--nproc_per_node", "4", "--no_python"], "torchrun", ONE_NODE);
    }
}

#[test]
fn slurm() {
    if is_there("srun", &launchers::srun("1")) {
        start("srun", &["-N", "1", "-n", "4", "--overcommit"], "Slurm", ONE_NODE);
        start("srun", &["-N", "1", "-n", "4", "--overcommit", "--mpi=pmi2"], "Slurm", ONE_NODE);
    }
}

/// The first of their hosts is where they meet.
#[test]
fn slurm_on_two_nodes() {
    if is_there("srun", &launchers::srun("2")) {
        start("srun", &["-N", "2", "--ntasks-per-node", "2", "--overcommit"], "Slurm", TWO_NODES);
    }
}

/// Their ranks have two sets of variables, and the inner one is theirs.
#[test]
fn launchers_inside_an_allocation() {
    if !is_there("srun", &launchers::srun("1")) {
        return;
    }
    if is_there("torchrun", &launchers::TORCHRUN) {
        let torchrun = ["torchrun", "--standalone", "--nproc_per_node", "4", "--no_python"];
        start("srun", &[&["-N", "1", "-n", "1"], &torchrun[..]].concat(), "torchrun", ONE_NODE);
    }
    for (mpirun, launcher) in [("mpirun.openmpi", "Open MPI"), ("mpirun.mpich", "PMI")] {
        if is_there(mpirun, &["--version"]) {
            start("salloc", &["-N", "1", "-n", "4", "--overcommit", mpirun, "-np", "4"], launcher, ONE_NODE);
        }
    }
}
