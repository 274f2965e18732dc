//! Meeting at an address: one port, or one of several in a row.

use std::fmt;
use std::io;
#[cfg(target_os = "linux")]
use std::net::SocketAddrV6;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::time::Instant;

use super::spread;
use crate::error::{Error, ErrorKind, Result};
use crate::launch::group::Membership;
use crate::launch::shared::Shared;
use crate::limits;

/// Ports of a host, of which rank 0 takes the first that is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::launch) struct Ports {
    host: String,
    first: u16,
    last: u16,
}

impl Ports {
    /// `host:port`, where an IPv6 address is in brackets.
    pub(super) fn parse(text: &str) -> Option<Ports> {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let host = match host.strip_prefix('[') {
            Some(address) => address.strip_suffix(']')?,
            None => Some(host).filter(|host| !host.contains(':'))?,
        };
        let fits = !host.is_empty() && !host.contains(|char: char| char.is_whitespace() || "/[]".contains(char));
        fits.then(|| Ports { host: host.into(), first: port, last: port })
    }

    /// Those after a port that somebody else owns.
    pub(super) fn after(host: &str, port: u16) -> Result<Ports> {
        match port.checked_add(1) {
            Some(first) => Ok(Ports { host: host.into(), first, last: port.saturating_add(limits::RENDEZVOUS_PORTS) }),
            None => {
                Err(Error::new(ErrorKind::Usage, "no port is above MASTER_PORT").with_expected("at most 65534", port))
            }
        }
    }

    /// Those that the name of a session chooses.
    pub(super) fn of(host: &str, session: &str) -> Ports {
        let groups = (u16::MAX - limits::RENDEZVOUS_FIRST_PORT + 1) / limits::RENDEZVOUS_PORTS;
        let group = (spread(session) % u64::from(groups)) as u16;
        let first = limits::RENDEZVOUS_FIRST_PORT + group * limits::RENDEZVOUS_PORTS;
        Ports { host: host.into(), first, last: first + (limits::RENDEZVOUS_PORTS - 1) }
    }

    /// Rank 0: listens on the first free port. Where all are taken it waits a little for a group that is ending.
    pub(super) fn listen(&self, shared: &Shared, membership: &Membership) -> Result<TcpListener> {
        let until = Instant::now() + membership.fail_timeout.min(membership.join_timeout);
        loop {
            let error = match self.try_listen(membership.one_node) {
                Ok(listener) => return Ok(listener),
                Err(error) => error,
            };
            let busy = error.kind() == io::ErrorKind::AddrInUse;
            if !busy || Instant::now() >= until || shared.lock().stop {
                let message = format!("rank 0 cannot listen at {self}: {error}");
                return Err(Error::new(ErrorKind::Io, message).with_source(error));
            }
            let state = shared.lock();
            drop(shared.wait(state, Some(Instant::now() + limits::RENDEZVOUS_RETRY)));
        }
    }

    fn try_listen(&self, one_node: bool) -> io::Result<TcpListener> {
        let mut last = None;
        for port in self.first..=self.last {
            match self.bind(port, one_node) {
                Ok(listener) => return Ok(listener),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
    }

    /// Nobody beyond this machine is let in where all ranks are on it. Otherwise the name of the host may mean an address here
    /// that others do not see (many hosts call themselves 127.0.1.1), so that all addresses listen.
    fn bind(&self, port: u16, one_node: bool) -> io::Result<TcpListener> {
        let is_loopback = self.host == "localhost" || self.host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        if !one_node && !is_loopback {
            return bind_all(port);
        }
        let addresses: Vec<SocketAddr> = (self.host.as_str(), port).to_socket_addrs()?.collect();
        match TcpListener::bind(&addresses[..]) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && !is_loopback => bind_all(port),
            bound => bound,
        }
    }

    /// Every address of every port, the likeliest first.
    pub(super) fn candidates(&self) -> io::Result<Vec<SocketAddr>> {
        let mut found: Vec<SocketAddr> = (self.host.as_str(), self.first).to_socket_addrs()?.collect();
        found.dedup();
        let at = |port| found.iter().map(move |address| SocketAddr::new(address.ip(), port));
        Ok((self.first..=self.last).flat_map(at).collect())
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "tcp://[{}]:{}", self.host, self.first)?,
            false => write!(f, "tcp://{}:{}", self.host, self.first)?,
        }
        if self.last > self.first { write!(f, "-{}", self.last) } else { Ok(()) }
    }
}

/// Listens on all addresses of this machine, on any port.
pub(super) fn bind_any() -> io::Result<TcpListener> {
    bind_all(0)
}

/// IPv6 sockets take IPv4, too, where the system has IPv6.
fn bind_all(port: u16) -> io::Result<TcpListener> {
    match bind_both(port) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        bound => bound,
    }
}

/// As the standard library does, but for both kinds of addresses also where sockets are for one kind unless they are told
/// otherwise (`net.ipv6.bindv6only`).
#[cfg(target_os = "linux")]
fn bind_both(port: u16) -> io::Result<TcpListener> {
    use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

    let socket = net::socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_ipv6_v6only(&socket, false)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    net::bind(&socket, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0))?;
    net::listen(&socket, limits::RANKS_MAX as i32)?; // the system takes no more than it keeps
    Ok(socket.into())
}

#[cfg(not(target_os = "linux"))]
fn bind_both(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_people_write_them() {
        let shown = |text| Ports::parse(text).map(|ports| ports.to_string());
        assert_eq!(shown("node01:5000").as_deref(), Some("tcp://node01:5000"));
        assert_eq!(shown("[::1]:5000").as_deref(), Some("tcp://[::1]:5000"));
        for bad in
            ["", "node01", "node01:", ":5000", "::1:5000", "node01:0", "node01:65536", "a/b:5000", "[::1:5000", "a b:1"]
        {
            assert_eq!(shown(bad), None, "{bad}");
        }
    }

    #[test]
    fn ports_stay_ports() {
        assert_eq!(Ports::after("h", 29500).unwrap().to_string(), "tcp://h:29501-29516");
        assert_eq!(Ports::after("h", 65530).unwrap().to_string(), "tcp://h:65531-65535");
        assert_eq!(Ports::after("h", 65534).unwrap().to_string(), "tcp://h:65535");
        assert_eq!(Ports::after("h", 65535).unwrap_err().found(), Some("65535"));
        for job in 0..1000 {
            let Ports { first, last, .. } = Ports::of("h", &format!("slurm/{job}.0"));
            assert!(first >= limits::RENDEZVOUS_FIRST_PORT && last - first == limits::RENDEZVOUS_PORTS - 1);
        }
    }
}
