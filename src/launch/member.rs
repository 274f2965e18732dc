//! The control thread of every rank but 0: finds the hub, says that this rank lives, and hears what the others did.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::connection::Connection;
use super::control::{self, Pulse};
use super::failure::{Failure, Missing};
use super::group::Membership;
use super::rendezvous::{self, Token};
use super::shared::{Kind, Offer, Shared};
use super::wire::Message;
use crate::extent::Rank;
use crate::limits;

/// Runs until the group is dropped, or has failed or finished and there is nobody to speak to any more.
pub(super) fn run(shared: &Shared, bell: &UnixStream, membership: &Membership) {
    match rendezvous::find(shared, membership) {
        Ok((mut connection, token)) => {
            connection.trust(limits::EXCHANGE_MAX + limits::RANKS_MAX as usize * 4 + limits::HELLO_MAX);
            connection.send(&Message::Beat); // the welcome was heard: this is where it stays
            Member {
                shared,
                membership,
                connection,
                token,
                pulse: Pulse::new(membership.fail_timeout),
                missing: None,
                step: None,
                joined: false,
                finished: false,
                told: false,
            }
            .run(bell);
        }
        Err(failure) => shared.fail(*failure),
    }
}

struct Member<'a> {
    shared: &'a Shared,
    membership: &'a Membership,
    connection: Connection,
    /// The rendezvous file that led to the hub.
    token: Option<Token>,
    pulse: Pulse,
    /// Who the hub last said is missing.
    missing: Option<Missing>,
    /// The step that this rank waits for, and whether it is the end.
    step: Option<(u32, bool)>,
    joined: bool,
    finished: bool,
    /// The hub knows that this rank has failed, or told it so.
    told: bool,
}

impl Member<'_> {
    fn run(mut self, bell: &UnixStream) {
        loop {
            let now = Instant::now();
            if self.pulse.slept(now) {
                self.connection.forgive(now);
            }
            let speaks = self.hear(now);
            if self.obey() {
                break;
            }
            if !speaks {
                if !self.finished {
                    self.shared.fail(Failure::gone(Rank(0)));
                }
                break;
            }
            if self.finished {
                break;
            }
            self.watch(now);
            if self.pulse.is_due(now) && self.connection.is_flushed() {
                self.connection.send(&Message::Beat);
            }
            self.connection.flush();
            let until = match self.told {
                true => self.pulse.next_turn([].into_iter()),
                false => self.pulse.next_turn([&self.connection].into_iter()),
            };
            control::wait(&[bell.as_fd()], [&mut self.connection].into_iter(), until);
            control::silence_bell(bell);
        }
        self.leave();
    }

    /// Takes what the threads of this rank want; true if they want no more.
    fn obey(&mut self) -> bool {
        let (to_tell, offer, stop) = {
            let mut state = self.shared.lock();
            (state.to_tell.take(), state.offer.take(), state.stop)
        };
        if let Some(failure) = to_tell {
            self.tell(failure);
        }
        if let Some(Offer { step, kind, what, part }) = offer {
            self.step = Some((step, kind == Kind::End));
            self.connection.send(&Message::Offer { step, kind, what, part });
        }
        stop
    }

    /// Acts on what the hub said; false if it says no more.
    fn hear(&mut self, now: Instant) -> bool {
        if self.connection.is_ready() {
            self.connection.receive(now);
        }
        loop {
            let failure = match self.connection.next() {
                Ok(None) => return self.connection.is_open(),
                Ok(Some(Message::Beat)) => continue,
                Ok(Some(Message::Missing(missing))) => {
                    self.missing = Some(missing);
                    continue;
                }
                Ok(Some(Message::Joined)) => {
                    self.joined = true;
                    self.shared.change(|state| state.joined = true);
                    continue;
                }
                Ok(Some(Message::Gathered { step, parts })) if self.is_awaited(step, &parts) => {
                    let end = self.step.take().is_some_and(|(_, end)| end);
                    // The hub decides: what this rank has told since is too late, for the others, too.
                    if end {
                        self.finished = self.shared.finish();
                    }
                    self.shared.change(|state| state.gathered = Some((step, parts)));
                    if end {
                        return true;
                    }
                    continue;
                }
                Ok(Some(Message::Failed(failure))) => failure,
                Ok(Some(Message::Leave)) => Failure::left(Rank(0)),
                Ok(Some(_)) | Err(_) => {
                    self.shared.fail(Failure::malformed(Rank(0)));
                    return false;
                }
            };
            self.told = true;
            self.shared.fail(failure);
        }
    }

    fn is_awaited(&self, step: u32, parts: &[Vec<u8>]) -> bool {
        self.step.is_some_and(|(awaited, _)| awaited == step) && parts.len() == self.membership.size as usize
    }

    /// Judges whether the hub is silent, and others have come.
    fn watch(&mut self, now: Instant) {
        if self.told {
            return;
        }
        let Membership { join_timeout, started, .. } = self.membership;
        if let Some(silence) = self.pulse.silent_for(&self.connection, now) {
            self.tell(Failure::silent(Rank(0), silence));
        } else if !self.joined && now >= *started + *join_timeout {
            let missing = self.missing.clone().unwrap_or_else(|| Missing::of([0]));
            self.tell(Failure::missing(&missing, *join_timeout));
        }
    }

    /// Tells the hub what failed here. After the end was offered the hub answers which came first; silence of its own is
    /// not for it to judge.
    fn tell(&mut self, failure: Failure) {
        self.told = true;
        // First there: whoever acts on it here comes later.
        self.connection.send(&Message::Failed(failure.clone()));
        if !failure.said || !self.step.is_some_and(|(_, end)| end) {
            self.shared.fail(failure);
        }
    }

    fn leave(mut self) {
        let failed = self.shared.failure().is_some();
        if !failed {
            self.connection.send(&Message::Leave);
        }
        if !self.joined
            && let Some(token) = self.token
        {
            token.forget(); // nobody can join any more
        }
        control::leave(vec![self.connection]);
    }
}
