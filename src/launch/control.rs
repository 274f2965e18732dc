//! What the control threads of hub and members have in common: waiting for sockets, and the pulse.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::Connection;
use crate::limits;

/// When to say that this rank lives, and when others are dead.
#[derive(Debug)]
pub(super) struct Pulse {
    every: Duration,
    silence: Duration,
    next: Instant,
    last_turn: Instant,
}

impl Pulse {
    pub(super) fn new(fail_timeout: Duration) -> Pulse {
        let now = Instant::now();
        Pulse {
            every: limits::beat_every(fail_timeout),
            silence: limits::silence(fail_timeout),
            next: now,
            last_turn: now,
        }
    }

    /// Begins a turn. True if this thread did not run for a while, so that it cannot tell who was silent: a job that was
    /// stopped and continued as a whole goes on.
    pub(super) fn slept(&mut self, now: Instant) -> bool {
        let slept = now - self.last_turn > self.every + self.silence / 2;
        self.last_turn = now;
        slept
    }

    /// Whether it is time to say so; true once for each time.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.next;
        if due {
            self.next = now + self.every;
        }
        due
    }

    /// How long this connection has been silent, if that is too long.
    pub(super) fn silent_for(&self, connection: &Connection, now: Instant) -> Option<Duration> {
        let silence = now.saturating_duration_since(connection.heard());
        (silence >= self.silence).then_some(silence)
    }

    /// When the next turn is due although nothing comes.
    pub(super) fn next_turn<'a>(&self, connections: impl Iterator<Item = &'a Connection>) -> Instant {
        connections.map(|connection| connection.heard() + self.silence).fold(self.next, Instant::min)
    }
}

/// Waits until one of these is ready, the first kind to be read, the second as its connections want, or until then.
/// Tells the connections which of them are.
pub(super) fn wait<'a>(
    others: &[BorrowedFd<'_>],
    connections: impl Iterator<Item = &'a mut Connection>,
    until: Instant,
) {
    let mut connections: Vec<&mut Connection> = connections.collect();
    let mut sources: Vec<PollFd<'_>> = Vec::with_capacity(others.len() + connections.len());
    sources.extend(others.iter().map(|other| PollFd::from_borrowed_fd(*other, PollFlags::IN)));
    sources.extend(connections.iter().map(|connection| {
        let writes = if connection.is_flushed() { PollFlags::empty() } else { PollFlags::OUT };
        PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN | writes)
    }));
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos().into() };
    // Where it fails, for instance for want of memory, all are looked at.
    let failed = poll(&mut sources, Some(&left)).is_err();
    let readies: Vec<bool> =
        sources[others.len()..].iter().map(|source| failed || !source.revents().is_empty()).collect();
    drop(sources);
    for (connection, ready) in connections.iter_mut().zip(readies) {
        connection.set_ready(ready);
    }
}

/// Takes the rings of a bell.
pub(super) fn silence_bell(bell: &UnixStream) {
    let mut rings = [0; 64];
    let mut bell = bell;
    loop {
        match bell.read(&mut rings) {
            Ok(1..) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

/// Lets the others have the last words, and ends the connections: what is closed with something unread in it may take along
/// what was sent.
pub(super) fn leave(connections: Vec<Connection>) {
    let until = Instant::now() + limits::LEAVE;
    let mut leaving: Vec<(Connection, bool)> = connections.into_iter().map(|connection| (connection, false)).collect();
    loop {
        let now = Instant::now();
        for (connection, ended) in &mut leaving {
            connection.flush();
            if connection.is_flushed() && !*ended {
                connection.end();
                *ended = true;
            }
            connection.discard(now);
        }
        leaving.retain(|(connection, _)| connection.is_open());
        if leaving.is_empty() || now >= until {
            return;
        }
        wait(&[], leaving.iter_mut().map(|(connection, _)| connection), until);
    }
}
