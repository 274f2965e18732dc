//! Rank 0's control thread: the middle of the star. It lets ranks in, passes on what they exchange, and tells everyone of
//! the first failure.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::connection::Connection;
use super::control::{self, Pulse};
use super::descriptors;
use super::failure::{Failure, Missing};
use super::group::Membership;
use super::rendezvous::Listening;
use super::shared::Shared;
use super::steps::Steps;
use super::wire::{Hello, Message};
use crate::error::ErrorKind;
use crate::extent::Rank;
use crate::limits;

/// Runs until the group is dropped.
pub(super) fn run(shared: &Shared, bell: &UnixStream, membership: &Membership) {
    let listening = descriptors::make_room(membership.size).and_then(|()| membership.place.listen(shared, membership));
    match listening {
        Ok(listening) => Hub::new(shared, membership, listening).run(bell),
        Err(error) => shared.fail(Failure::said(&error, shared.rank)),
    }
}

struct Hub<'a> {
    shared: &'a Shared,
    membership: &'a Membership,
    /// Until all are there.
    listening: Option<Listening>,
    strangers: VecDeque<Stranger>,
    /// By rank; there is none with rank 0.
    ranks: Vec<Option<Peer>>,
    steps: Steps,
    pulse: Pulse,
    joined: bool,
    /// All said that they are done.
    finished: bool,
    /// The failure was passed on.
    told: bool,
}

/// Somebody who connected and has not said who it is.
struct Stranger {
    connection: Connection,
    until: Instant,
}

struct Peer {
    connection: Connection,
    nonce: u64,
    /// It has answered to its welcome, and so does not try again.
    here: bool,
}

impl<'a> Hub<'a> {
    fn new(shared: &'a Shared, membership: &'a Membership, listening: Listening) -> Hub<'a> {
        Hub {
            shared,
            membership,
            listening: Some(listening),
            strangers: VecDeque::new(),
            ranks: (0..membership.size).map(|_| None).collect(),
            steps: Steps::new(membership.size),
            pulse: Pulse::new(membership.fail_timeout),
            joined: false,
            finished: false,
            told: false,
        }
    }

    fn run(mut self, bell: &UnixStream) {
        loop {
            let now = Instant::now();
            if self.pulse.slept(now) {
                self.ranks.iter_mut().flatten().for_each(|peer| peer.connection.forgive(now));
            }
            self.accept(now);
            self.hear_strangers(now);
            self.hear_ranks(now);
            if self.obey(now) {
                break;
            }
            self.watch(now);
            self.beat(now);
            self.wait(bell);
        }
        self.leave();
    }

    /// Takes what the threads of this rank want; true if they want no more.
    fn obey(&mut self, now: Instant) -> bool {
        let (to_tell, offer, stop) = {
            let mut state = self.shared.lock();
            (state.to_tell.take(), state.offer.take(), state.stop)
        };
        if let Some(failure) = to_tell {
            self.shared.fail(failure);
        }
        if let Some(offer) = offer {
            self.offered(Rank(0), offer, now);
        }
        self.pass_on_failure();
        stop
    }

    fn accept(&mut self, now: Instant) {
        let Some(listening) = &self.listening else { return };
        // Each connection is looked at before the next turn; of a flood some wait in the system's queue.
        for _ in 0..limits::STRANGERS {
            match listening.accept() {
                Ok(Some(stream)) => {
                    if let Ok(connection) = Connection::new(stream) {
                        self.strangers.push_back(Stranger { connection, until: now + limits::HANDSHAKE });
                    }
                }
                Ok(None) => break,
                Err(_) if !self.strangers.is_empty() => {
                    self.strangers.pop_front(); // no more descriptors, for instance: somebody who says nothing has one
                }
                Err(error) => {
                    let message = format!("rank 0 cannot accept connections: {error}");
                    self.shared.fail(Failure::of(Rank(0), ErrorKind::Io, message));
                    break;
                }
            }
        }
        while self.strangers.len() > limits::STRANGERS + self.ranks.len() {
            self.strangers.pop_front();
        }
    }

    /// Strangers who say the right thing become ranks; the others are sent away.
    fn hear_strangers(&mut self, now: Instant) {
        for mut stranger in std::mem::take(&mut self.strangers) {
            if stranger.connection.is_ready() {
                stranger.connection.receive(now);
            }
            match stranger.connection.next() {
                // Who has gone again may have tried several times while this rank did not look; the last attempt counts.
                Ok(Some(Message::Hello(hello))) if stranger.connection.is_open() => {
                    self.admit(hello, stranger.connection)
                }
                Ok(None) if stranger.connection.is_open() && now < stranger.until => self.strangers.push_back(stranger),
                _ => {} // nobody of ours; dropping it closes the connection
            }
        }
    }

    fn admit(&mut self, hello: Hello, mut connection: Connection) {
        let Membership { session, size, fail_timeout, .. } = self.membership;
        if hello.session != *session {
            return connection.send(&Message::OtherSession);
        }
        let rank = hello.rank;
        let twice = |rank| Failure::of(rank, ErrorKind::Usage, format!("two processes say that they are rank {rank}"));
        let refusal = if hello.size != *size {
            let message = "ranks disagree about how many they are";
            Some(Failure::of(rank, ErrorKind::Usage, message).with_expected(size, hello.size))
        } else if hello.fail_timeout.as_millis() != fail_timeout.as_millis() {
            let message = "ranks disagree about how soon a silent one has failed";
            let seconds = |time: std::time::Duration| format!("{} s", time.as_secs_f64());
            let failure = Failure::of(rank, ErrorKind::Usage, message);
            Some(failure.with_expected(seconds(*fail_timeout), seconds(hello.fail_timeout)))
        } else if rank.0 >= *size {
            Some(Failure::of(rank, ErrorKind::Usage, "no such rank").with_expected(format!("below {size}"), rank))
        } else if rank.0 == 0 {
            Some(twice(rank))
        } else {
            // A rank that gave up waiting for its welcome comes again.
            let other = self.ranks[rank.index()].as_ref().is_some_and(|peer| peer.nonce != hello.nonce);
            other.then(|| twice(rank))
        };
        if let Some(failure) = refusal {
            self.shared.fail(failure.clone());
            return connection.send(&Message::Failed(failure));
        }
        connection.trust(limits::EXCHANGE_PART + limits::CONTROL_TEXT + limits::HELLO_MAX);
        connection.send(&Message::Welcome { session: session.clone() });
        if self.told
            && let Some(failure) = self.shared.lock().failure.clone()
        {
            connection.send(&Message::Failed(failure));
        }
        self.ranks[rank.index()] = Some(Peer { connection, nonce: hello.nonce, here: false });
    }

    /// The ranks that are not here yet.
    fn absent(&self) -> impl Iterator<Item = u32> {
        let is_here = |peer: &Option<Peer>| peer.as_ref().is_some_and(|peer| peer.here);
        (0..).zip(&self.ranks).skip(1).filter(move |(_, peer)| !is_here(peer)).map(|(rank, _)| rank)
    }

    /// Tells all that all are here, once they are.
    fn join(&mut self) {
        if self.joined || self.absent().next().is_some() {
            return;
        }
        self.joined = true;
        self.listening = None;
        self.strangers.clear();
        self.tell_all(&Message::Joined);
        self.shared.change(|state| state.joined = true);
    }

    fn hear_ranks(&mut self, now: Instant) {
        for rank in (1..self.membership.size).map(Rank) {
            let Some(peer) = &mut self.ranks[rank.index()] else { continue };
            if peer.connection.is_ready() {
                peer.connection.receive(now);
            }
            // Taken out, so that all of the hub can act on what it says.
            let Some(mut peer) = self.ranks[rank.index()].take() else { continue };
            if self.hear(rank, &mut peer, now) && peer.connection.is_open() {
                self.ranks[rank.index()] = Some(peer);
            } else if peer.here && !self.finished {
                self.shared.fail(Failure::gone(rank));
            } // else it gave up waiting for its welcome, and comes again
        }
        self.join();
        if self.finished && self.ranks.iter().all(Option::is_none) {
            self.shared.change(|state| state.all_left = true);
        }
    }

    /// Acts on what a rank said; false if it says no more.
    fn hear(&mut self, rank: Rank, Peer { connection, here, .. }: &mut Peer, now: Instant) -> bool {
        loop {
            let heard = connection.next();
            *here |= matches!(heard, Ok(Some(_)));
            match heard {
                Ok(None) => return true,
                Ok(Some(Message::Beat)) => {}
                Ok(Some(Message::Offer { step, kind, what, part })) => {
                    let completed = self.offered(rank, super::shared::Offer { step, kind, what, part }, now);
                    if let Some(frame) = completed {
                        connection.send_frame(frame); // the one that was taken out
                    }
                }
                Ok(Some(Message::Failed(failure))) => self.shared.fail(failure),
                Ok(Some(Message::Leave)) => {
                    self.shared.fail(Failure::left(rank));
                    return false;
                }
                Ok(Some(_)) | Err(_) => {
                    self.shared.fail(Failure::malformed(rank));
                    return false;
                }
            }
        }
    }

    /// A rank's part of a step. What completes it is sent to all that have a connection, and returned.
    fn offered(&mut self, rank: Rank, offer: super::shared::Offer, now: Instant) -> Option<Arc<[u8]>> {
        let complete = match self.steps.offer(rank, offer, now) {
            Ok(complete) => complete?,
            Err(failure) => {
                self.shared.fail(*failure);
                return None;
            }
        };
        // What failed before has come before.
        if self.shared.has_failed() || complete.end && !self.shared.finish() {
            return None;
        }
        self.finished = complete.end;
        let message = Message::Gathered { step: complete.step, parts: complete.parts };
        let frame = self.tell_all(&message);
        if let Message::Gathered { step, parts } = message {
            self.shared.change(|state| state.gathered = Some((step, parts)));
        }
        Some(frame)
    }

    /// Judges who is late, silent or missing.
    fn watch(&mut self, now: Instant) {
        let Membership { join_timeout, started, .. } = self.membership;
        if self.finished || self.told {
            return;
        }
        if !self.joined && now >= *started + *join_timeout {
            self.shared.fail(Failure::missing(&Missing::of(self.absent()), *join_timeout));
        }
        let silent = (0..).zip(&self.ranks).find_map(|(rank, peer)| {
            let silence = self.pulse.silent_for(&peer.as_ref()?.connection, now)?;
            Some(Failure::silent(Rank(rank), silence))
        });
        if let Some(failure) = silent {
            self.shared.fail(failure);
        }
        if let Some((what, since)) = self.steps.waiting()
            && now >= since + *join_timeout
        {
            let missing = self.steps.missing();
            let message = format!("not all ranks came to {what:?} within {:.1} s", join_timeout.as_secs_f64());
            let failure = Failure::of(missing.first(), ErrorKind::Peer, message);
            self.shared.fail(failure.with_expected("all ranks", format!("{missing} missing")));
        }
        self.pass_on_failure();
    }

    /// Tells everyone of the failure, once.
    fn pass_on_failure(&mut self) {
        if self.told {
            return;
        }
        let failure = self.shared.lock().failure.clone();
        if let Some(failure) = failure {
            self.told = true;
            self.tell_all(&Message::Failed(failure));
        }
    }

    fn tell_all(&mut self, message: &Message) -> Arc<[u8]> {
        let frame: Arc<[u8]> = message.frame().into();
        for peer in self.ranks.iter_mut().flatten() {
            peer.connection.send_frame(Arc::clone(&frame));
        }
        frame
    }

    fn beat(&mut self, now: Instant) {
        if !self.pulse.is_due(now) {
            return;
        }
        let message = if self.joined { Message::Beat } else { Message::Missing(Missing::of(self.absent())) };
        let frame: Arc<[u8]> = message.frame().into();
        // Who has not taken the last one hears nothing new.
        for peer in self.ranks.iter_mut().flatten().filter(|peer| peer.connection.is_flushed()) {
            peer.connection.send_frame(Arc::clone(&frame));
        }
    }

    fn wait(&mut self, bell: &UnixStream) {
        let peers = self.ranks.iter().flatten().map(|peer| &peer.connection);
        let mut until =
            if self.told || self.finished { self.pulse.next_turn([].into_iter()) } else { self.pulse.next_turn(peers) };
        until = self.strangers.iter().map(|stranger| stranger.until).fold(until, Instant::min);
        let mut others: Vec<BorrowedFd<'_>> = vec![bell.as_fd()];
        others.extend(self.listening.iter().map(AsFd::as_fd));
        let strangers = self.strangers.iter_mut().map(|stranger| &mut stranger.connection);
        let peers = self.ranks.iter_mut().flatten().map(|peer| &mut peer.connection);
        for connection in strangers.chain(peers) {
            connection.flush();
        }
        let strangers = self.strangers.iter_mut().map(|stranger| &mut stranger.connection);
        let peers = self.ranks.iter_mut().flatten().map(|peer| &mut peer.connection);
        control::wait(&others, strangers.chain(peers), until);
        control::silence_bell(bell);
    }

    fn leave(mut self) {
        if !self.told && !self.finished {
            self.tell_all(&Message::Leave);
        }
        self.listening = None;
        control::leave(self.ranks.into_iter().flatten().map(|peer| peer.connection).collect());
    }
}
