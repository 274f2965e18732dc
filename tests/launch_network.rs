//! Groups over several nodes: network name spaces of one machine, each with an address of its own behind a bridge. They need
//! root and the `ip` command; without these the tests say that they were skipped.

#[path = "support/ranks.rs"]
mod ranks;

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use ranks::{Process, Setup, free_port, tell_all};

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    ranks::run();
}

const SOON: Duration = Duration::from_secs(30);

/// Nodes that see each other, until this is dropped.
struct Network {
    name: String,
    nodes: u32,
}

impl Network {
    /// `None`, and a line that says so, where this machine does not let us. `test` is a letter of the test's own.
    fn of(nodes: u32, test: char) -> Option<Network> {
        let name = format!("sl{test}{}", std::process::id() % 1_000_000);
        let network = Network { name, nodes };
        match network.make() {
            Ok(()) => Some(network),
            Err(why) => {
                // The test harness keeps what it prints itself from being hidden.
                let line = format!("SKIPPED: no network name spaces here: {why}\n");
                std::io::stderr().write_all(line.as_bytes()).unwrap();
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let bridge = &self.name;
        ip(&format!("netns add {bridge}"))?;
        ip(&format!("-n {bridge} link add {bridge} type bridge"))?;
        ip(&format!("-n {bridge} link set {bridge} up"))?;
        for node in 0..self.nodes {
            let (space, cable) = (self.space(node), self.cable(node));
            ip(&format!("netns add {space}"))?;
            ip(&format!("-n {bridge} link add {cable} type veth peer name eth0 netns {space}"))?;
            ip(&format!("-n {bridge} link set {cable} master {bridge} up"))?;
            ip(&format!("-n {space} addr add {}/24 dev eth0", Network::address(node)))?;
            ip(&format!("-n {space} link set eth0 up"))?;
            ip(&format!("-n {space} link set lo up"))?;
        }
        Ok(())
    }

    fn address(node: u32) -> String {
        format!("10.77.0.{}", node + 1)
    }

    fn space(&self, node: u32) -> String {
        format!("{}n{node}", self.name)
    }

    fn cable(&self, node: u32) -> String {
        format!("{}c{node}", self.name)
    }

    fn cut(&self, node: u32) {
        ip(&format!("-n {} link set {} down", self.name, self.cable(node))).unwrap();
    }

    /// `per_node` ranks on each node, joined.
    fn joined(&self, per_node: u32, setup: &Setup) -> Vec<Process> {
        let mut ranks: Vec<Process> = (0..self.nodes * per_node)
            .map(|rank| {
                let words = ["ip", "netns", "exec", &self.space(rank / per_node)].map(str::to_owned);
                Setup { within: words.into(), ..setup.clone() }.start(rank)
            })
            .collect();
        tell_all(&mut ranks, "join");
        ranks.iter().for_each(|rank| rank.is_ok());
        ranks
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Those that were not made are not there.
        for space in (0..self.nodes).map(|node| self.space(node)).chain([self.name.clone()]) {
            let _ = ip(&format!("netns del {space}"));
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

fn finish(mut ranks: Vec<Process>) {
    tell_all(&mut ranks, "exchange plan x");
    let all = vec!["x"; ranks.len()].join(",");
    ranks.iter().for_each(|rank| assert_eq!(rank.answer(SOON).text, all));
    tell_all(&mut ranks, "finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    ranks.into_iter().for_each(Process::quit);
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
