//! Nodes of a test: network name spaces of one machine, each with an address of its own behind a bridge. They need root and
//! the `ip` command; without these a test says that it was skipped.

#![allow(dead_code, reason = "each test uses its own part")]

use std::io::Write;
use std::process::Command;

use crate::ranks::{Process, Setup, tell_all};

/// Nodes that see each other, until this is dropped.
pub(crate) struct Network {
    name: String,
    nodes: u32,
}

impl Network {
    /// `None`, and a line that says so, where this machine does not let us. `test` is a letter of the test's own.
    pub(crate) fn of(nodes: u32, test: char) -> Option<Network> {
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

    pub(crate) fn address(node: u32) -> String {
        format!("10.77.0.{}", node + 1)
    }

    fn space(&self, node: u32) -> String {
        format!("{}n{node}", self.name)
    }

    fn cable(&self, node: u32) -> String {
        format!("{}c{node}", self.name)
    }

    pub(crate) fn cut(&self, node: u32) {
        ip(&format!("-n {} link set {} down", self.name, self.cable(node))).unwrap();
    }

    /// What a shell does on a node.
    pub(crate) fn run(&self, node: u32, command: &str) -> Result<(), String> {
        words(&["netns", "exec", &self.space(node), "sh", "-c", command])
    }

    /// `per_node` ranks on each node.
    pub(crate) fn started(&self, per_node: u32, setup: &Setup) -> Vec<Process> {
        let start = |rank: u32| {
            let words = ["ip", "netns", "exec", &self.space(rank / per_node)].map(str::to_owned);
            Setup { within: words.into(), ..setup.clone() }.start(rank)
        };
        (0..self.nodes * per_node).map(start).collect()
    }

    /// The same, joined.
    pub(crate) fn joined(&self, per_node: u32, setup: &Setup) -> Vec<Process> {
        let mut ranks = self.started(per_node, setup);
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
    words(&arguments.split(' ').collect::<Vec<_>>())
}

fn words(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}
