//! Loads over several nodes, which are network name spaces of this machine with addresses of their own. What ranks send each
//! other over NCCL goes through memory that they share, so that a cut link cuts the connections of their groups and nothing else.
#![cfg(all(feature = "cuda", target_os = "linux"))]

#[path = "support/network.rs"]
mod network;
#[path = "support/rank_loads.rs"]
mod rank_loads;
#[path = "support/ranks.rs"]
mod ranks;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use network::Network;
use ranks::{Process, Setup, free_port, tell_all};

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    rank_loads::run();
}

const PER_NODE: u32 = 2;
const LONG: Duration = Duration::from_secs(60);

fn setup(nodes: u32, rendezvous: String) -> Setup {
    let settings = vec![("SIMCUDA_DEVICES", "8".to_owned())];
    Setup { rendezvous, settings, fail_timeout: Duration::from_secs(4), ..Setup::new(nodes * PER_NODE) }
}

fn at_address() -> String {
    format!("tcp://{}:{}", Network::address(0), free_port())
}

fn model() -> (tempfile::TempDir, u64) {
    let folder = tempfile::tempdir().unwrap();
    rank_loads::write(folder.path());
    let bytes = shardlift::Checkpoint::open(folder.path()).unwrap().bytes();
    (folder, bytes)
}

fn are_ok(ranks: &[Process]) {
    ranks.iter().for_each(Process::is_ok);
}

/// All load, sharing their reading like this: what each node read from storage, and how much ranks received.
fn load(ranks: &mut [Process], how: &str, folder: &Path, host: &[String]) -> (Vec<u64>, u64) {
    tell_all(ranks, &format!("share {how} {}", folder.display()));
    are_ok(ranks);
    tell_all(ranks, "load");
    let traffic: Vec<[u64; 3]> = ranks.iter().map(|rank| rank_loads::traffic(&rank.answer(LONG).text)).collect();
    tell_all(ranks, "check");
    let digests: Vec<String> = ranks.iter().map(|rank| rank.answer(LONG).text).collect();
    assert_eq!(digests, host, "{how}");
    let (sent, received) = traffic.iter().fold((0, 0), |(sent, received), it| (sent + it[1], received + it[2]));
    assert_eq!(sent, received, "{how}");
    (traffic.chunks(PER_NODE as usize).map(|node| node.iter().map(|it| it[0]).sum()).collect(), received)
}

#[test]
fn storage_is_read_once_per_node_and_once_per_cluster() {
    for (nodes, test) in [(2, 'g'), (3, 'h')] {
        let Some(network) = Network::of(nodes, test) else { return };
        let (folder, checkpoint) = model();
        let host = rank_loads::host_digests(folder.path(), nodes * PER_NODE);
        let meeting = tempfile::tempdir().unwrap();
        let at_file = format!("file://{}/meet", meeting.path().display());
        for rendezvous in [at_address(), at_file] {
            let mut ranks = network.joined(PER_NODE, &setup(nodes, rendezvous));
            let most = checkpoint * 101 / 100;

            let (read, received) = load(&mut ranks, "cluster", folder.path(), &host);
            assert!((checkpoint..=most).contains(&read.iter().sum()), "of {checkpoint} in the cluster {read:?}");
            assert!(received > 0);

            let (read, received) = load(&mut ranks, "always", folder.path(), &host);
            // What only ranks of other nodes want is not read here.
            assert!(read.iter().all(|node| *node <= most), "of {checkpoint} on a node {read:?}");
            assert!(received > 0 && read.iter().sum::<u64>() > most, "of {checkpoint} on all nodes {read:?}");

            // Everything is in the page cache.
            let (_, received) = load(&mut ranks, "auto", folder.path(), &host);
            assert_eq!(received, 0);

            tell_all(&mut ranks, "finish");
            are_ok(&ranks);
            tell_all(&mut ranks, "drop");
            tell_all(&mut ranks, "left");
            for rank in &ranks {
                rank.answer(LONG);
                assert_eq!(rank.answer(LONG).text, "[0, 0, 0, 0]", "rank {}", rank.rank);
            }
        }
        assert_eq!(fs::read_dir(meeting.path()).unwrap().count(), 0);
    }
}

/// A node is cut off in the middle of a load, which the last rank holds up.
fn cut(nodes: u32, node: u32, test: char, how: &str) {
    let Some(network) = Network::of(nodes, test) else { return };
    let (folder, _) = model();
    let setup = setup(nodes, at_address());
    let mut ranks = network.joined(PER_NODE, &setup);
    let what = format!("{how}, node {node} of {nodes}");
    let gate = folder.path().join("gate");
    ranks.last_mut().unwrap().tell(&format!("read 2 wait after {}", gate.display()));
    ranks.last().unwrap().is_ok();
    tell_all(&mut ranks, &format!("share {how} {}", folder.path().display()));
    are_ok(&ranks);
    tell_all(&mut ranks, "load");
    std::thread::sleep(Duration::from_millis(500)); // they come to where they wait for the last one
    assert!(ranks.iter().all(Process::is_silent), "{what}");
    network.cut(node);
    let began = Instant::now();
    for rank in &ranks {
        let error = rank.error(LONG);
        let took = error.at - began;
        let (_, named) = error.text.rsplit_once(", rank ").unwrap_or_else(|| panic!("{what}: {}", error.text));
        let named_node = named.parse::<u32>().unwrap() / PER_NODE;
        let is_cut = rank.rank / PER_NODE == node;
        let right = match (is_cut, node) {
            (true, 0) => named_node != 0, // beside rank 0: one beyond
            (true, _) => named == "0",
            (false, _) => named_node == node,
        };
        assert!(right && error.text.starts_with("peer "), "{what}: rank {}: {}", rank.rank, error.text);
        assert!(took < setup.fail_timeout, "{what}: rank {} took {took:?}", rank.rank);
    }
    tell_all(&mut ranks, "drop");
    tell_all(&mut ranks, "left");
    for rank in &ranks {
        rank.answer(LONG);
        assert_eq!(rank.answer(LONG).text, "[0, 0, 0, 0]", "{what}: rank {}", rank.rank);
    }
}

#[test]
fn a_cut_link_ends_a_load_on_both_sides() {
    std::thread::scope(|scope| {
        scope.spawn(|| cut(2, 1, 'i', "cluster"));
        scope.spawn(|| cut(3, 2, 'j', "cluster"));
        scope.spawn(|| cut(3, 1, 'k', "always"));
        scope.spawn(|| cut(3, 0, 'l', "cluster"));
    });
}
