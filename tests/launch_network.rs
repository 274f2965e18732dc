//! Groups over several nodes, which are network name spaces of this machine.

#[path = "support/network.rs"]
mod network;
#[path = "support/ranks.rs"]
mod ranks;

use std::time::{Duration, Instant};

use network::Network;
use ranks::{Process, SOON, Setup, finish, free_port, tell_all};

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    ranks::run();
}

#[test]
fn nodes_meet_at_an_address_and_at_a_file() {
    for (nodes, test) in [(2, 'a'), (3, 'b')] {
        let Some(network) = Network::of(nodes, test) else { return };
        let at_address = format!("tcp://{}:{}", Network::address(0), free_port());
        finish(network.joined(2, &Setup { rendezvous: at_address, ..Setup::new(nodes * 2) }));

        let folder = tempfile::tempdir().unwrap();
        let at_file = format!("file://{}/meet", folder.path().display());
        finish(network.joined(2, &Setup { rendezvous: at_file, ..Setup::new(nodes * 2) }));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// Where sockets of IPv6 are made for IPv6 only, rank 0 still listens for all.
#[test]
fn ranks_of_ipv4_meet_where_ipv6_keeps_to_itself() {
    let Some(network) = Network::of(2, 'g') else { return };
    network.run(0, "echo 1 > /proc/sys/net/ipv6/bindv6only").unwrap();
    let at_address = format!("tcp://{}:{}", Network::address(0), free_port());
    let soon = Duration::from_secs(10);
    finish(network.joined(1, &Setup { rendezvous: at_address, join_timeout: soon, ..Setup::new(2) }));
    let folder = tempfile::tempdir().unwrap();
    let at_file = format!("file://{}/meet", folder.path().display());
    finish(network.joined(1, &Setup { rendezvous: at_file, join_timeout: soon, ..Setup::new(2) }));
}

/// A node is cut off: its ranks miss rank 0, and all others miss one of its ranks. Or it is the node of rank 0: then the others
/// miss rank 0, and the ranks beside it one of those beyond.
fn cut(nodes: u32, node: u32, test: char, command: &str) {
    const PER_NODE: u32 = 2;
    let Some(network) = Network::of(nodes, test) else { return };
    let rendezvous = format!("tcp://{}:{}", Network::address(0), free_port());
    let setup = Setup { rendezvous, ..Setup::new(nodes * PER_NODE) };
    let mut ranks = network.joined(PER_NODE, &setup);
    let (last, others) = ranks.split_last_mut().unwrap();
    tell_all(others, command);
    last.tell("await");
    std::thread::sleep(Duration::from_millis(500));
    network.cut(node);
    let began = Instant::now();
    for rank in &ranks {
        let error = rank.error(SOON);
        let took = error.at - began;
        let (_, named) = error.text.rsplit_once(", rank ").unwrap();
        let named_node = named.parse::<u32>().unwrap() / PER_NODE;
        let is_cut = rank.rank / PER_NODE == node;
        match (is_cut, node) {
            (true, 0) => assert_ne!(named_node, 0, "rank {}: {}", rank.rank, error.text),
            (true, _) => assert_eq!(named, "0", "rank {}: {}", rank.rank, error.text),
            (false, _) => assert_eq!(named_node, node, "rank {}: {}", rank.rank, error.text),
        }
        assert!(took < setup.fail_timeout, "rank {} took {took:?}", rank.rank);
    }
    ranks.into_iter().for_each(Process::quit);
}

#[test]
fn a_cut_link_is_noticed_on_both_sides() {
    cut(2, 1, 'c', "await");
    cut(3, 2, 'd', "exchange plan x");
    cut(3, 1, 'e', "finish");
    cut(3, 0, 'f', "await");
}
