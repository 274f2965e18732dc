//! Who a process is, from environments that launchers made: `tests/data/launch` holds them as they were recorded, less what
//! is private to the machine.

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use std::{fs, thread};

use super::connection::Connection;
use super::rendezvous::Place;
use super::wire::{Hello, Message};
use super::{Group, GroupOptions, Launch, LaunchOptions, Meeting};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::plan::DeviceSpec;

fn recorded(name: &str) -> BTreeMap<String, String> {
    let path = format!("{}/tests/data/launch/{name}.env", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).unwrap();
    let variables = text.lines().filter(|line| !line.starts_with('#'));
    variables.map(|line| line.split_once('=').unwrap()).map(|(name, value)| (name.into(), value.into())).collect()
}

fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn launch(variables: &BTreeMap<String, String>, options: &LaunchOptions) -> Result<Option<Launch>> {
    Launch::from_vars(&|name| variables.get(name).cloned(), options)
}

fn of(name: &str) -> Launch {
    launch(&recorded(name), &LaunchOptions::default()).unwrap().unwrap()
}

fn refused(variables: &BTreeMap<String, String>, options: &LaunchOptions) -> Error {
    let error = launch(variables, options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    error
}

/// Launcher, rank, size, local rank and size.
fn who(launch: &Launch) -> (&str, u32, u32, Option<u32>, Option<u32>) {
    (launch.launcher(), launch.rank().0, launch.size(), launch.local_rank(), launch.local_size())
}

fn meets(launch: &Launch) -> (String, String) {
    let (place, session) = Place::of(launch).unwrap();
    (place.to_string(), session)
}

#[test]
fn torchrun() {
    let launch = of("torchrun-1.13-two-nodes-3of4");
    assert_eq!(who(&launch), ("torchrun", 3, 4, Some(1), Some(2)));
    assert_eq!(launch.node(), "1");
    assert_eq!(meets(&launch), ("tcp://127.0.0.1:29612-29627".into(), "torchrun/none/29611".into()));

    let launch = of("torchrun-1.13-standalone-1of2");
    assert_eq!(who(&launch), ("torchrun", 1, 2, Some(1), Some(2)));
    let (place, session) = meets(&launch);
    assert_eq!(place, "tcp://localhost:33122-33137");
    assert!(session.starts_with("torchrun/bd3af4cc-") && session.ends_with("/33121"), "{session}");

    let launch = of("torchrun-2.15-standalone-1of2");
    assert_eq!(who(&launch), ("torchrun", 1, 2, Some(1), Some(2)));
    assert_eq!(meets(&launch).0, "tcp://localhost:44440-44455");
}

/// Only the agent whose rank crashed counts; those of the other nodes restart theirs, too, and all meet again.
#[test]
fn restarts_that_agents_count_each_for_itself_are_one_session() {
    let mut variables = recorded("torchrun-1.13-two-nodes-3of4");
    let not_counted = meets(&launch(&variables, &LaunchOptions::default()).unwrap().unwrap());
    variables.insert("TORCHELASTIC_RESTART_COUNT".into(), "1".into());
    assert_eq!(meets(&launch(&variables, &LaunchOptions::default()).unwrap().unwrap()), not_counted);
}

#[test]
fn open_mpi() {
    let launch = of("openmpi-4.1.4-1of2");
    assert_eq!(who(&launch), ("Open MPI", 1, 2, Some(1), Some(2)));
    let (place, session) = meets(&launch);
    assert!(place.starts_with("tcp://127.0.0.1:6"), "{place}");
    assert_eq!(session, "openmpi/783941633");
}

#[test]
fn mpich() {
    let launch = of("mpich-4.0.2-1of2");
    assert_eq!(who(&launch), ("PMI", 1, 2, Some(1), Some(2)));
    // The proxy of its job is looked for among the ancestors, and this process has none.
    let error = Place::of(&launch).unwrap_err();
    assert_eq!(error.expected(), Some("--rendezvous tcp://host:port or file:///path"), "{error}");
}

#[test]
fn slurm_steps() {
    let launch = of("srun-22.05-2of3");
    assert_eq!(who(&launch), ("Slurm", 2, 3, Some(0), Some(1)));
    assert_eq!(launch.node(), "1");
    let (place, session) = meets(&launch);
    assert!(place.starts_with("tcp://node01:6"), "{place}");
    assert_eq!(session, "slurm/1.0");

    let launch = of("sbatch-srun-22.05-cyclic-3of5");
    assert_eq!(who(&launch), ("Slurm", 3, 5, Some(1), Some(2)));
    assert_eq!((launch.node(), launch.session()), ("0", Some("slurm/3.0")));

    // PMI names rank and size, and the step that knows the rest.
    let launch = of("sbatch-srun-22.05-pmi2-3of4");
    assert_eq!(who(&launch), ("Slurm", 3, 4, Some(1), Some(2)));
    assert_eq!((launch.node(), launch.session()), ("1", Some("slurm/3.1")));

    // PMIx names nothing that is asked for here.
    let launch = of("srun-22.05-pmix-1of2");
    assert_eq!(who(&launch), ("Slurm", 1, 2, Some(1), Some(2)));
    assert_eq!((launch.node(), launch.session()), ("0", Some("slurm/2.0")));
}

#[test]
fn an_allocation_is_no_step() {
    assert_eq!(launch(&recorded("sbatch-22.05-no-step"), &LaunchOptions::default()).unwrap(), None);
    let mut variables = recorded("srun-22.05-2of3");
    variables.insert("SLURM_STEP_ID".into(), "4294967291".into()); // what a batch script is
    assert_eq!(launch(&variables, &LaunchOptions::default()).unwrap(), None);
}

#[test]
fn outer_launchers_are_not_asked() {
    assert_eq!(who(&of("srun-22.05-torchrun-1of2")), ("torchrun", 1, 2, Some(1), Some(2)));
    assert_eq!(who(&of("srun-22.05-openmpi-1of2")), ("Open MPI", 1, 2, Some(1), Some(2)));
    assert_eq!(who(&of("srun-22.05-mpich-1of2")), ("PMI", 1, 2, Some(1), Some(2)));
}

/// The step that Slurm's variables are of has a daemon on each node, which knows the hosts, and the ranks are the daemons'.
#[test]
fn an_mpirun_over_the_nodes_of_an_allocation_needs_a_rendezvous() {
    for (name, launcher) in
        [("salloc-22.05-openmpi-two-nodes-1of2", "Open MPI"), ("salloc-22.05-mpich-two-nodes-1of2", "PMI")]
    {
        let launch = of(name);
        assert_eq!(who(&launch), (launcher, 1, 2, Some(0), Some(1)));
        let error = Place::of(&launch).unwrap_err();
        assert_eq!(error.expected(), Some("--rendezvous tcp://host:port or file:///path"), "{error}");
    }
}

#[test]
fn sets_that_are_not_complete_do_not_count() {
    let mut variables = recorded("openmpi-4.1.4-1of2");
    variables.extend(self::variables(&[("RANK", "7"), ("WORLD_SIZE", "8"), ("PMI_RANK", "x"), ("SLURM_PROCID", "y")]));
    assert_eq!(launch(&variables, &LaunchOptions::default()).unwrap().unwrap().launcher(), "Open MPI");
    let empty = self::variables(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "")]);
    assert_eq!(launch(&empty, &LaunchOptions::default()).unwrap(), None);
    assert_eq!(launch(&BTreeMap::new(), &LaunchOptions::default()).unwrap(), None);
}

#[test]
fn contradictions_show_both_values() {
    let mut variables = recorded("torchrun-1.13-two-nodes-3of4");
    let flags = LaunchOptions { rank: Some(Rank(2)), ..LaunchOptions::default() };
    let error = refused(&variables, &flags);
    assert_eq!((error.expected(), error.found()), (Some("as --rank 2"), Some("RANK=3")));
    let flags = LaunchOptions { size: Some(8), ..LaunchOptions::default() };
    let error = refused(&variables, &flags);
    assert_eq!((error.expected(), error.found()), (Some("as size 8"), Some("WORLD_SIZE=4")));
    let flags = LaunchOptions { local_rank: Some(0), ..LaunchOptions::default() };
    assert_eq!(refused(&variables, &flags).found(), Some("LOCAL_RANK=1"));

    variables.insert("WORLD_SIZE".into(), "3".into());
    let error = refused(&variables, &LaunchOptions::default());
    assert_eq!((error.expected(), error.found()), (Some("below WORLD_SIZE=3"), Some("RANK=3")));
    variables.insert("WORLD_SIZE".into(), "four".into());
    assert_eq!(refused(&variables, &LaunchOptions::default()).found(), Some("\"four\""));

    let mut variables = recorded("sbatch-srun-22.05-pmi2-3of4");
    variables.insert("PMI_RANK".into(), "1".into());
    let error = refused(&variables, &LaunchOptions::default());
    assert_eq!((error.expected(), error.found()), (Some("as SLURM_PROCID=3"), Some("PMI_RANK=1")));
}

#[test]
fn flags_go_before_launchers() {
    let flags = LaunchOptions {
        rank: Some(Rank(1)),
        size: Some(3),
        node: Some("n".into()),
        rendezvous: Some("tcp://[fd00::1]:5000".into()),
        ..LaunchOptions::default()
    };
    let launched = launch(&recorded("srun-22.05-2of3"), &flags).unwrap().unwrap();
    assert_eq!(who(&launched), ("flags", 1, 3, None, None));
    assert_eq!(launched.node(), "n");
    assert_eq!(meets(&launched), ("tcp://[fd00::1]:5000".into(), "tcp://[fd00::1]:5000".into()));

    let named = LaunchOptions { session: Some("s".into()), rendezvous: Some("file:///a/b".into()), ..flags.clone() };
    assert_eq!(meets(&launch(&BTreeMap::new(), &named).unwrap().unwrap()), ("file:///a/b".into(), "s".into()));
    for wrong in ["", "tcp://x", "udp://x:1", "file://a", "file:///"] {
        let wrong = LaunchOptions { rendezvous: Some(wrong.into()), ..flags.clone() };
        assert!(Place::of(&launch(&BTreeMap::new(), &wrong).unwrap().unwrap()).is_err(), "{wrong:?}");
    }
    for session in ["", "a\nb", &"x".repeat(300)] {
        let wrong = LaunchOptions { session: Some(session.into()), ..flags.clone() };
        assert!(Place::of(&launch(&BTreeMap::new(), &wrong).unwrap().unwrap()).is_err(), "{session:?}");
    }

    let alone = LaunchOptions { rank: Some(Rank(1)), ..LaunchOptions::default() };
    assert_eq!(refused(&BTreeMap::new(), &alone).message(), "--rank without the number of ranks");
    let beyond = LaunchOptions { rank: Some(Rank(3)), ..flags.clone() };
    assert_eq!(refused(&BTreeMap::new(), &beyond).found(), Some("--rank 3"));
    let many = LaunchOptions { size: Some(100_000), ..flags };
    assert_eq!(refused(&BTreeMap::new(), &many).expected(), Some("at most 8192"));
}

#[test]
fn the_master_is_where_ranks_of_any_launcher_meet() {
    let mut variables = recorded("srun-22.05-2of3");
    variables.extend(self::variables(&[("MASTER_ADDR", "node02"), ("MASTER_PORT", "29500")]));
    let launched = launch(&variables, &LaunchOptions::default()).unwrap().unwrap();
    assert_eq!(meets(&launched), ("tcp://node02:29501-29516".into(), "slurm/1.0".into()));
    variables.insert("MASTER_PORT".into(), "70000".into());
    assert_eq!(refused(&variables, &LaunchOptions::default()).found(), Some("70000"));
}

/// Kubernetes gives the ports of a service that is called so to all pods.
#[test]
fn a_port_of_a_master_that_nobody_meets_at_is_not_looked_at() {
    let mut variables = recorded("srun-22.05-2of3");
    let place = meets(&launch(&variables, &LaunchOptions::default()).unwrap().unwrap());
    variables.insert("MASTER_PORT".into(), "tcp://10.0.0.1:29500".into());
    assert_eq!(meets(&launch(&variables, &LaunchOptions::default()).unwrap().unwrap()), place);
    variables.insert("MASTER_ADDR".into(), "node02".into());
    let elsewhere = LaunchOptions { rendezvous: Some("tcp://node03:5000".into()), ..LaunchOptions::default() };
    assert_eq!(meets(&launch(&variables, &elsewhere).unwrap().unwrap()).0, "tcp://node03:5000");
    assert_eq!(refused(&variables, &LaunchOptions::default()).found(), Some("\"tcp://10.0.0.1:29500\""));
}

#[test]
fn gpus_of_ranks() {
    let with = |local: Option<u32>, size, list: Option<&str>| {
        let mut variables = BTreeMap::new();
        if let Some(list) = list {
            variables.insert("CUDA_VISIBLE_DEVICES".to_owned(), list.to_owned());
        }
        let flags =
            LaunchOptions { rank: Some(Rank(0)), size: Some(size), local_rank: local, ..LaunchOptions::default() };
        launch(&variables, &flags).unwrap().unwrap()
    };
    assert_eq!(with(Some(3), 8, None).gpu(None).unwrap(), 3);
    assert_eq!(with(Some(3), 8, Some("5")).gpu(None).unwrap(), 0);
    assert_eq!(with(Some(3), 8, Some("4,5,6,7")).gpu(None).unwrap(), 3);
    assert_eq!(with(Some(3), 8, None).gpu(Some(1)).unwrap(), 0);
    assert_eq!(with(None, 1, None).gpu(None).unwrap(), 0);
    let error = with(Some(3), 8, Some("GPU-1a,GPU-2b")).gpu(None).unwrap_err();
    assert_eq!((error.kind(), error.found()), (ErrorKind::Device, Some("2")));
    assert_eq!(error.expected(), Some("more than 3 for local rank 3"));
    for none in ["", "-1", "NoDevFiles"] {
        assert_eq!(with(Some(0), 8, Some(none)).gpu(None).unwrap_err().kind(), ErrorKind::Device, "{none}");
    }
    assert_eq!(with(Some(0), 8, Some("0,1,-1,2")).gpu(None).unwrap(), 0);
    assert_eq!(with(Some(2), 8, Some("0,1,-1,2")).gpu(None).unwrap_err().found(), Some("2"));
    assert_eq!(with(None, 8, None).gpu(None).unwrap_err().kind(), ErrorKind::Usage);

    let world = with(Some(3), 8, None).world(DeviceSpec::Cuda(3));
    assert_eq!((world.size(), world.driven()), (8, &[Rank(0)][..]));
}

#[test]
fn nothing_is_left_unsaid_about_the_meeting() {
    let Meeting { rendezvous, master, first_host } = of("srun-22.05-2of3").meeting;
    assert_eq!((rendezvous, master, first_host.as_deref()), (None, None, Some("node01")));
}

/// The welcome of an attempt comes too late by a moment; the next one finds rank 0 waiting, and not that its rank has gone.
#[test]
fn an_attempt_to_join_that_ends_at_its_welcome_is_nobodys() {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let rendezvous = format!("tcp://127.0.0.1:{port}");
    let options = GroupOptions { join_timeout: Duration::from_secs(30), fail_timeout: Duration::from_secs(2) };
    let join = |rank| {
        let who = LaunchOptions {
            rank: Some(Rank(rank)),
            size: Some(2),
            rendezvous: Some(rendezvous.clone()),
            ..LaunchOptions::default()
        };
        Group::join(&launch(&BTreeMap::new(), &who)?.unwrap(), &options)
    };
    thread::scope(|scope| {
        let first = scope.spawn(|| join(0));
        let until = Instant::now() + options.join_timeout;
        let attempt = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(attempt) => break attempt,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
        };
        let mut attempt = Connection::new(attempt).unwrap();
        let session = rendezvous.clone();
        let fail_timeout = options.fail_timeout;
        attempt.send(&Message::Hello(Hello { session, rank: Rank(1), size: 2, nonce: 1, fail_timeout }));
        while !matches!(attempt.next().unwrap(), Some(Message::Welcome { .. })) {
            attempt.receive(Instant::now());
            assert!(attempt.is_open() && Instant::now() < until, "no welcome");
        }
        thread::sleep(Duration::from_millis(100)); // nobody has joined by that
        assert!(!first.is_finished());
        drop(attempt);
        thread::sleep(Duration::from_millis(100));
        let second = join(1).unwrap();
        let first = first.join().unwrap().unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| second.finish());
            first.finish().unwrap();
            other.join().unwrap().unwrap();
        });
    });
}
