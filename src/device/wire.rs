//! What devices exchange with those of other processes.

use std::fmt::Debug;
use std::time::Duration;

use super::{Home, Op, RawCopy};
use crate::error::Result;

/// Memory and streams through which a device exchanges bytes with those of other processes, in rounds: bytes land in a
/// round's buffer, travel from there to the buffers of others, and are put in place. Rounds take turns with a few buffers;
/// whatever is queued waits on the device until its buffer is free.
pub(crate) trait Wire: Debug + Send {
    /// The addresses of a round's buffers: of what is sent, and of what is received.
    fn buffers(&self, round: usize) -> (u64, u64);

    /// Queues operations whose sources are in memory of `from`, and whose destinations lie in the round's buffer of what is
    /// sent.
    ///
    /// # Safety
    /// As [`Queue::submit`](super::Queue::submit), until the round [has landed](Wire::has_landed), or the wire
    /// [settled](Wire::settle) or was dropped.
    unsafe fn land(&mut self, round: usize, ops: Vec<Op>, from: Home) -> Result<()>;

    /// Whether what was queued of this round has landed.
    fn has_landed(&mut self, round: usize) -> Result<bool>;

    /// Lets the round's messages travel: `messages` queues them on the stream that it gets the number of, with the device's
    /// context current.
    fn travel(&mut self, round: usize, messages: &mut dyn FnMut(usize) -> Result<()>) -> Result<()>;

    /// Queues copies from the round's buffer of what is received, after its messages.
    ///
    /// # Safety
    /// Until the round [is placed](Wire::is_placed), or the wire settled or was dropped, every destination byte is writable
    /// memory of this device, and nobody else reads or writes it.
    unsafe fn place(&mut self, round: usize, arrived: Vec<Arrived>) -> Result<()>;

    /// Whether all that was queued of this round is done.
    fn is_placed(&mut self, round: usize) -> Result<bool>;

    /// As [`Queue::settle`](super::Queue::settle).
    fn settle(&mut self, bound: Duration) -> bool;
}

/// The buffers of a [`Wire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WireSize {
    /// Rounds that are under way at a time.
    pub(crate) rounds: usize,
    /// Bytes that each of them sends.
    pub(crate) sent: u64,
    /// Bytes that each of them receives.
    pub(crate) received: u64,
    /// Most bytes that one operation takes from.
    pub(crate) slot_bytes: usize,
}

impl WireSize {
    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> u64 {
        (self.sent + self.received) * self.rounds as u64
    }
}

/// A copy from a device's own memory, from this address on; the copy's source is not looked at.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) from: u64,
    pub(crate) copy: RawCopy,
}
