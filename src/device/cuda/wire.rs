//! Memory and streams of a GPU for what it exchanges with those of other processes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::Context;
use super::driver::{self, RawEvent, RawStream};
use super::kernels;
use super::memory::Memory;
use super::queue::Lane;
use crate::device::{Arrived, Home, Op, Wire, WireSize};
use crate::error::Result;
use crate::limits;

/// A stream for each step of a round: bytes land, travel, and are put in place. Each waits on the device for the step
/// before it and for whoever had the round's buffers last; the host only asks whether they are done.
#[derive(Debug)]
pub(super) struct CudaWire {
    context: Arc<Context>,
    size: WireSize,
    /// The buffers of all rounds, those that are sent first.
    memory: Memory,
    landing: Lane,
    /// The streams of travelling and placing.
    streams: Vec<RawStream>,
    /// For each round the events behind its three steps.
    events: Vec<RawEvent>,
}

/// Positions among a round's events.
const LANDED: usize = 0;
const TRAVELLED: usize = 1;
const PLACED: usize = 2;

/// Positions among the streams.
const TRAVELLING: usize = 0;
const PLACING: usize = 1;

// SAFETY: handles of the driver, which may be used from every thread; each method enters the context.
unsafe impl Send for CudaWire {}

/// Scratch memory for what a kernel has to pack.
pub(super) fn scratch_bytes(size: WireSize) -> usize {
    size.slot_bytes + limits::KERNEL_ACCESS
}

impl CudaWire {
    pub(super) fn new(context: &Arc<Context>, size: WireSize) -> Result<CudaWire> {
        let memory = Memory::plain(context, size.bytes() as usize)?;
        let landing = Lane::new(context, scratch_bytes(size))?;
        // From here on dropping it gives back what was made.
        let (streams, events) = (Vec::new(), Vec::new());
        let mut wire = CudaWire { context: Arc::clone(context), size, memory, landing, streams, events };
        for _ in [TRAVELLING, PLACING] {
            // SAFETY: the context is current, here and below.
            wire.streams.push(context.with(|| unsafe { driver::create_stream() })?);
        }
        for _ in 0..size.rounds * (PLACED + 1) {
            // SAFETY: as above.
            wire.events.push(context.with(|| unsafe { driver::create_event() })?);
        }
        Ok(wire)
    }

    fn event(&self, round: usize, step: usize) -> RawEvent {
        self.events[round * (PLACED + 1) + step]
    }

    /// Lets a stream wait for a step of a round, as it was queued last.
    fn wait(&self, stream: RawStream, round: usize, step: usize) -> Result<()> {
        // SAFETY: both are live, and of this context.
        self.context.with(|| unsafe { driver::wait_event(stream, self.event(round, step)) })
    }

    /// Marks the end of a step of a round, which was queued on this stream.
    fn mark(&self, stream: RawStream, round: usize, step: usize) -> Result<()> {
        // SAFETY: both are live, and of this context.
        self.context.with(|| unsafe { driver::record_event(self.event(round, step), stream) })
    }

    fn is_done(&self, round: usize, step: usize) -> Result<bool> {
        // SAFETY: the event is live.
        self.context.with(|| unsafe { driver::event_is_done(self.event(round, step)) })
    }
}

impl Wire for CudaWire {
    fn buffers(&self, round: usize) -> (u64, u64) {
        let (round, first) = (round as u64, self.memory.address());
        let received = first + self.size.sent * self.size.rounds as u64;
        (first + self.size.sent * round, received + self.size.received * round)
    }

    unsafe fn land(&mut self, round: usize, ops: Vec<Op>, from: Home) -> Result<()> {
        let stream = self.landing.stream;
        self.wait(stream, round, TRAVELLED)?;
        {
            let _entered = self.context.enter()?;
            // SAFETY: the caller's duties; the context is current.
            unsafe { self.landing.take(&self.context, &ops, from) }?;
        }
        self.mark(stream, round, LANDED)
    }

    fn has_landed(&mut self, round: usize) -> Result<bool> {
        self.is_done(round, LANDED)
    }

    fn travel(&mut self, round: usize, messages: &mut dyn FnMut(usize) -> Result<()>) -> Result<()> {
        let stream = self.streams[TRAVELLING];
        self.wait(stream, round, LANDED)?;
        self.wait(stream, round, PLACED)?;
        {
            let _entered = self.context.enter()?;
            messages(stream.addr())?;
        }
        self.mark(stream, round, TRAVELLED)
    }

    unsafe fn place(&mut self, round: usize, arrived: Vec<Arrived>) -> Result<()> {
        let stream = self.streams[PLACING];
        self.wait(stream, round, TRAVELLED)?;
        {
            let _entered = self.context.enter()?;
            for Arrived { from, copy } in &arrived {
                // SAFETY: the caller's duties; the context is current, and the stream its own.
                unsafe { kernels::copy(&self.context, copy, *from, stream) }?;
            }
        }
        self.mark(stream, round, PLACED)
    }

    fn is_placed(&mut self, round: usize) -> Result<bool> {
        self.is_done(round, PLACED)
    }

    fn settle(&mut self, bound: Duration) -> bool {
        let began = Instant::now();
        let over = |stream| self.context.settle(stream, bound.saturating_sub(began.elapsed())).is_some();
        self.streams.iter().copied().chain([self.landing.stream]).all(over)
    }
}

impl Drop for CudaWire {
    fn drop(&mut self) {
        for &stream in &self.streams {
            // SAFETY: the stream is live, and not used again.
            self.context.give_back(|| unsafe { driver::synchronize(stream) });
        }
        self.landing.give_back(&self.context);
        for &stream in &self.streams {
            // SAFETY: as above.
            self.context.give_back(|| unsafe { driver::destroy_stream(stream) });
        }
        for &event in &self.events {
            // SAFETY: the event is live, and not used again.
            self.context.give_back(|| unsafe { driver::destroy_event(event) });
        }
    }
}
