//! Which machine this is: what ranks of one node have in common.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The host's name.
pub(super) fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A name that ranks share if they have the same host and network: host name, network name space, and the boot of the
/// kernel, without which equal names of two machines would make them one.
pub(super) fn identity() -> String {
    let mut name = hostname();
    if let Some(space) = network_space() {
        name = format!("{name}/{space}");
    }
    match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(boot) => format!("{name}/{}", boot.trim()),
        Err(_) => name,
    }
}

#[cfg(target_os = "linux")]
fn network_space() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(fs::metadata("/proc/self/ns/net").ok()?.ino())
}

#[cfg(not(target_os = "linux"))]
fn network_space() -> Option<u64> {
    None
}

/// The addresses under which others may reach this machine: the kernel's tables, which need no packet and no name server.
pub(super) fn addresses() -> Vec<IpAddr> {
    let mut found = Vec::new();
    if let Ok(tables) = fs::read_to_string("/proc/net/fib_trie") {
        found.extend(local_v4(&tables).into_iter().map(IpAddr::V4));
    }
    if let Ok(table) = fs::read_to_string("/proc/net/if_inet6") {
        found.extend(global_v6(&table).into_iter().map(IpAddr::V6));
    }
    found
}

/// The leaves of the routing tables that are addresses of this machine, each once.
fn local_v4(tables: &str) -> Vec<Ipv4Addr> {
    let mut found: Vec<Ipv4Addr> = Vec::new();
    let mut leaf = None;
    for line in tables.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
        } else if line == "/32 host LOCAL"
            && let Some(address) = leaf.filter(|address: &Ipv4Addr| !address.is_loopback())
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// Global addresses: those of a link alone mean nothing without the name of an interface.
fn global_v6(table: &str) -> Vec<Ipv6Addr> {
    let address = |line: &str| {
        let mut fields = line.split_whitespace();
        let digits = fields.next()?;
        let scope = fields.nth(2)?;
        (scope == "00" && digits.len() == 32).then(|| u128::from_str_radix(digits, 16).ok().map(Ipv6Addr::from))?
    };
    table.lines().filter_map(address).collect()
}

/// What the processes that one `mpirun` of MPICH's kind started on this machine have in common: it gives them no name of
/// their job, but one proxy of it is their ancestor.
pub(super) fn hydra_job() -> Option<String> {
    let mut process = std::process::id();
    for _ in 0..ANCESTORS_MAX {
        let (name, parent, start) = status_of(process)?;
        if name.starts_with("hydra_") {
            return Some(format!("hydra/{process}/{start}"));
        }
        process = parent;
    }
    None
}

/// Shells and wrappers between a launcher and what it starts; more is something else.
const ANCESTORS_MAX: usize = 64;

/// Name, parent and time of start of a process.
fn status_of(process: u32) -> Option<(String, u32, u64)> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name is in brackets and may have any character in it.
    let (name, rest) = text.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let parent = fields.nth(1)?.parse().ok().filter(|parent| *parent != 0)?;
    let start = fields.nth(17)?.parse().ok()?;
    Some((name.to_owned(), parent, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_kernels_tables() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.1.0.7\n        \
                    /32 host LOCAL\nLocal:\n     |-- 10.1.0.7\n        /32 host LOCAL\n     |-- 10.1.0.255\n        \
                    /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 192.0.2.2\n        /32 host LOCAL\n";
        assert_eq!(local_v4(trie), [Ipv4Addr::new(10, 1, 0, 7), Ipv4Addr::new(192, 0, 2, 2)]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fd000000000000000000000000000002 02 40 00 80     eth0\n\
                     fe800000000000000000000000000001 02 40 20 80     eth0\n";
        assert_eq!(global_v6(table), ["fd00::2".parse::<Ipv6Addr>().unwrap()]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_a_name_that_lasts() {
        assert!(!hostname().is_empty());
        assert_eq!(identity(), identity());
        assert!(identity().matches('/').count() == 2, "{}", identity());
        let (_, parent, start) = status_of(std::process::id()).unwrap();
        assert_eq!(parent, std::os::unix::process::parent_id());
        assert!(start > 0);
    }
}
