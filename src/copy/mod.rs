//! Filled slots -> bytes on a device. Knows neither files nor engines.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use crate::device::{Queue, RawCopy};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::stage::Staged;

/// A filled slot and the copies that one device takes from it.
#[derive(Debug)]
pub(crate) struct Filled {
    /// Held until the copies are done.
    #[expect(dead_code, reason = "its lifetime is its use")]
    pub(crate) staged: Staged,
    pub(crate) copies: Vec<RawCopy>,
    pub(crate) landing: Vec<Landing>,
}

/// Bytes of a destination that arrive with a copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Landing {
    pub(crate) rank: Rank,
    /// Position in the rank's destinations.
    pub(crate) dest: u32,
    pub(crate) bytes: u64,
}

/// What a copier reports to.
pub(crate) trait Landed {
    /// The bytes have landed and are visible.
    fn landed(&self, landing: Landing);
    /// Time spent with copies under way, and waiting for filled slots.
    fn spent(&self, busy: Duration, waiting: Duration);
    /// Whether new copies are no longer wanted.
    fn stopped(&self) -> bool;
}

/// Feeds filled slots to a device's queue until the inbox closes, then drains it. A slot is in the list of copies in
/// flight before its copies are submitted, and leaves it only when they are done (design invariant 7).
///
/// # Errors
/// A copy failed, or none completed for `stall`. The slots in flight are then kept for ever: the device may still
/// read them.
pub(crate) fn run(
    mut queue: Box<dyn Queue>,
    inbox: &Receiver<Filled>,
    landed: &dyn Landed,
    stall: Duration,
) -> Result<()> {
    let mut in_flight = VecDeque::new();
    let outcome = feed(&mut *queue, &mut in_flight, inbox, landed, stall);
    if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Stalled) {
        abandon(queue, in_flight);
    } else {
        // The queue first: dropping it ends its copies, and only then may the slots go back.
        drop(queue);
        drop(in_flight);
    }
    outcome
}

fn feed(
    queue: &mut dyn Queue,
    in_flight: &mut VecDeque<(u64, Filled)>,
    inbox: &Receiver<Filled>,
    landed: &dyn Landed,
    stall: Duration,
) -> Result<()> {
    let mut open = true;
    let mut progress = Instant::now();
    loop {
        let began = Instant::now();
        let mut arrived = None;
        if open && in_flight.is_empty() {
            match inbox.recv_timeout(limits::LOOK_AGAIN) {
                Ok(filled) => arrived = Some(filled),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            landed.spent(Duration::ZERO, began.elapsed());
            progress = Instant::now();
        } else if open {
            match inbox.try_recv() {
                Ok(filled) => arrived = Some(filled),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => open = false,
            }
        }
        if let Some(mut filled) = arrived {
            if !landed.stopped() {
                let copies = std::mem::take(&mut filled.copies);
                in_flight.push_back((u64::MAX, filled));
                // SAFETY: the slot is in `in_flight` until its ticket is done, so nobody writes to it; the plan's
                // audit proved that no other copy names these destination bytes, which the load keeps alive.
                let ticket = unsafe { queue.submit(copies)? };
                in_flight.back_mut().expect("bug in shardlift: pushed above").0 = ticket;
            }
            continue;
        }
        if in_flight.is_empty() {
            if open {
                continue;
            }
            return Ok(());
        }
        let began = Instant::now();
        let done = queue.wait(limits::COPY_WAIT)?;
        while in_flight.front().is_some_and(|(ticket, _)| *ticket <= done) {
            let (_, filled) = in_flight.pop_front().expect("bug in shardlift: front was there");
            filled.landing.iter().for_each(|&landing| landed.landed(landing));
            progress = Instant::now();
        }
        landed.spent(began.elapsed(), Duration::ZERO);
        if progress.elapsed() > stall {
            return Err(Error::new(ErrorKind::Stalled, format!("no copy completed for {stall:?}")));
        }
    }
}

/// Keeps what the device may still use for ever.
#[expect(
    clippy::mem_forget,
    reason = "a stalled device may still read these slots: freeing them is worse than leaking"
)]
fn abandon(queue: Box<dyn Queue>, in_flight: VecDeque<(u64, Filled)>) {
    std::mem::forget((queue, in_flight));
}
