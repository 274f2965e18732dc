//! Where ranks meet: rank 0 listens there, and the others try until somebody answers to the name of their session.

mod file;
mod tcp;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64;

use super::connection::Connection;
use super::failure::Failure;
use super::group::Membership;
use super::shared::Shared;
use super::wire::{Hello, Message};
use super::{Launch, Meeting, control, node};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;

pub(super) use file::Token;

use file::Published;
use tcp::Ports;

/// Where the ranks of a group meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Tcp(Ports),
    File(PathBuf),
}

/// Rank 0's ear, until all ranks are there.
#[derive(Debug)]
pub(super) struct Listening {
    listener: TcpListener,
    /// Gone with this.
    _published: Option<Published>,
}

impl Place {
    /// Where the ranks of this launch meet, and the name of their session there.
    pub(super) fn of(launch: &Launch) -> Result<(Place, String)> {
        let Meeting { rendezvous, master, first_host } = &launch.meeting;
        let session = launch.session.clone();
        let (place, session) = if let Some(text) = rendezvous {
            (Place::parse(text)?, session.unwrap_or_else(|| text.clone()))
        } else if let Some((host, port)) = master {
            let ports = Ports::after(host, *port)?;
            (Place::Tcp(ports), session.unwrap_or_else(|| format!("{host}:{port}")))
        } else {
            let session = session.or_else(|| (launch.launcher == "PMI").then(node::hydra_job)?);
            match (session, first_host) {
                (Some(session), _) if launch.is_one_node() => (Place::Tcp(Ports::of("127.0.0.1", &session)), session),
                (Some(session), Some(host)) => (Place::Tcp(Ports::of(host, &session)), session),
                _ => {
                    let message = format!("nothing says where the ranks meet: {} does not", launch.launcher);
                    return Err(Error::new(ErrorKind::Usage, message)
                        .with_expected("--rendezvous tcp://host:port or file:///path", "none"));
                }
            }
        };
        if session.is_empty() || session.len() > limits::SESSION_MAX || session.contains(char::is_control) {
            return Err(Error::new(ErrorKind::Usage, "no name for a session").with_expected(
                format!("1 to {} bytes without control characters", limits::SESSION_MAX),
                format!("{session:?}"),
            ));
        }
        Ok((place, session))
    }

    fn parse(text: &str) -> Result<Place> {
        let wrong = || {
            Error::new(ErrorKind::Usage, "no rendezvous")
                .with_expected("tcp://host:port or file:///path", format!("{text:?}"))
        };
        if let Some(path) = text.strip_prefix("file://") {
            let path = Path::new(path);
            return if path.is_absolute() && path.file_name().is_some() {
                Ok(Place::File(path.into()))
            } else {
                Err(wrong())
            };
        }
        let ports = text.strip_prefix("tcp://").and_then(Ports::parse);
        ports.map(Place::Tcp).ok_or_else(wrong)
    }

    /// Rank 0: listens here.
    pub(super) fn listen(&self, shared: &Shared, membership: &Membership) -> Result<Listening> {
        let (listener, published) = match self {
            Place::Tcp(ports) => (ports.listen(shared, membership)?, None),
            Place::File(path) => {
                let listener = tcp::bind_any().map_err(|error| Error::io("cannot listen", path, error))?;
                let published = Published::new(path, &listener, membership)?;
                (listener, Some(published))
            }
        };
        listener.set_nonblocking(true).map_err(|error| {
            Error::new(ErrorKind::Io, format!("cannot listen without blocking: {error}")).with_source(error)
        })?;
        Ok(Listening { listener, _published: published })
    }

    /// What a rank tries now, one after the other.
    fn candidates(&self, membership: &Membership) -> io::Result<(Vec<SocketAddr>, Option<Token>)> {
        match self {
            Place::Tcp(ports) => Ok((ports.candidates()?, None)),
            Place::File(path) => file::candidates(path, membership).map(|(found, token)| (found, Some(token))),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Tcp(ports) => ports.fmt(f),
            Place::File(path) => write!(f, "file://{}", path.display()),
        }
    }
}

impl Listening {
    /// The next who connected; `None` if there is none now.
    pub(super) fn accept(&self) -> io::Result<Option<TcpStream>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // Somebody went away before being asked who it is.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// What trying one address gave.
enum Tried {
    /// The hub of this session.
    Hub(Connection),
    /// Somebody else, or nobody: why.
    Other(String),
    /// The hub, and it refuses.
    Refused(Box<Failure>),
}

/// Every other rank: tries until the hub answers, the time to join is over, or nobody wants it any more.
pub(super) fn find(shared: &Shared, membership: &Membership) -> Result<(Connection, Option<Token>), Box<Failure>> {
    let until = membership.started + membership.join_timeout;
    let is_over = || Instant::now() >= until || shared.lock().stop;
    let mut last = None;
    let mut used = None;
    loop {
        match membership.place.candidates(membership) {
            Ok((candidates, token)) => {
                for address in candidates {
                    match try_one(address, membership, until) {
                        Tried::Hub(connection) => return Ok((connection, token)),
                        Tried::Refused(failure) => return Err(failure),
                        // An attempt that the end of the time cut short says less than the one before.
                        Tried::Other(why) if last.is_none() || !is_over() => last = Some(format!("{address}: {why}")),
                        Tried::Other(_) => {}
                    }
                    if is_over() {
                        break;
                    }
                }
                used = token;
            }
            Err(error) => last = Some(error.to_string()),
        }
        if is_over() {
            if let Some(token) = used {
                token.forget(); // of a hub that is no more
            }
            let Membership { place, join_timeout, .. } = membership;
            let waited = join_timeout.as_secs_f64();
            let message = format!("rank 0 missing: it did not answer at {place} within {waited:.1} s");
            let message = match last {
                Some(last) => format!("{message} ({last})"),
                None => message,
            };
            return Err(Failure::of(Rank(0), ErrorKind::Peer, message).into());
        }
        let state = shared.lock();
        drop(shared.wait(state, Some(Instant::now() + limits::RENDEZVOUS_RETRY)));
    }
}

fn try_one(address: SocketAddr, membership: &Membership, until: Instant) -> Tried {
    let now = Instant::now();
    let until = until.min(now + limits::HANDSHAKE);
    let left = until.saturating_duration_since(now).max(Duration::from_millis(1));
    let connected = TcpStream::connect_timeout(&address, left).and_then(|stream| {
        // A port of one's own can answer where nobody listens.
        match stream.local_addr()? == stream.peer_addr()? {
            true => Err(io::ErrorKind::ConnectionRefused.into()),
            false => Connection::new(stream),
        }
    });
    let mut connection = match connected {
        Ok(connection) => connection,
        Err(error) => return Tried::Other(error.to_string()),
    };
    connection.send(&Message::Hello(Hello {
        session: membership.session.clone(),
        rank: membership.rank,
        size: membership.size,
        nonce: membership.nonce,
        fail_timeout: membership.fail_timeout,
    }));
    // A refusal may carry an error's text.
    connection.trust(limits::HELLO_MAX + 8 * limits::CONTROL_TEXT);
    loop {
        let now = Instant::now();
        connection.flush();
        connection.receive(now);
        match connection.next() {
            Ok(Some(Message::Welcome { session })) if session == membership.session => return Tried::Hub(connection),
            Ok(Some(Message::Failed(failure))) => return Tried::Refused(failure.into()),
            Ok(Some(Message::OtherSession)) => return Tried::Other("rank 0 of another session".into()),
            Ok(Some(_)) | Err(_) => return Tried::Other("somebody else".into()),
            Ok(None) if !connection.is_open() => return Tried::Other("closed the connection".into()),
            Ok(None) if now >= until => return Tried::Other("no answer".into()),
            Ok(None) => control::wait(&[], [&mut connection].into_iter(), until),
        }
    }
}

/// A number that spreads sessions over ports.
fn spread(session: &str) -> u64 {
    xxh3_64(session.as_bytes())
}
