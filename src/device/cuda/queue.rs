//! Copies to a GPU: streams that do not wait for each other, an event for each mark, scratch memory for what a kernel has
//! to cut.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::Context;
use super::driver::{self, RawEvent, RawStream, Rect, Status};
use super::kernels;
use super::memory::Memory;
use crate::device::{Feed, Home, Op, Queue, RawCopy};
use crate::error::Result;
use crate::limits;

/// Bytes of scratch memory of a lane: what a cut may need, which may begin before its slot's first needed byte.
pub(super) fn scratch_bytes(feed: Feed) -> usize {
    feed.slot_bytes + limits::KERNEL_ACCESS
}

/// The copies of one device, spread over a few streams.
#[derive(Debug)]
pub(super) struct CudaQueue {
    context: Arc<Context>,
    lanes: Vec<Lane>,
    /// Which lane takes what comes next: from mark to mark it is the same.
    lane: usize,
    spare_events: Vec<RawEvent>,
    /// Marks that are not known to be reached, oldest first: the last ticket before each, and its event.
    marks: VecDeque<(u64, RawEvent)>,
    submitted: u64,
    finished: u64,
}

/// A stream and the memory in which bytes land that a kernel puts in place. The stream's order protects it: the next
/// bytes land when the kernels before have run.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) stream: RawStream,
    scratch: Option<Memory>,
    scratch_bytes: usize,
}

// SAFETY: handles of the driver, which may be used from every thread; each method enters the context.
unsafe impl Send for CudaQueue {}

impl CudaQueue {
    /// A queue; with scratch memory from the start if there will be cuts.
    pub(super) fn new(context: &Arc<Context>, feed: Feed) -> Result<CudaQueue> {
        let mut queue = CudaQueue {
            context: Arc::clone(context),
            lanes: Vec::new(),
            lane: 0,
            spare_events: Vec::new(),
            marks: VecDeque::new(),
            submitted: 0,
            finished: 0,
        };
        for _ in 0..limits::STREAMS {
            queue.lanes.push(Lane::new(context, scratch_bytes(feed))?);
            if feed.cuts {
                queue.lanes.last_mut().map_or(Ok(0), |lane| lane.scratch(context))?;
            }
        }
        Ok(queue)
    }
}

impl CudaQueue {
    /// Where the marks from `first` on end that are reached, one after the other; the context is current.
    fn done_from(&self, first: usize) -> Result<usize> {
        for (at, &(_, event)) in self.marks.iter().enumerate().skip(first) {
            // SAFETY: the event is live, the context current.
            if !unsafe { driver::event_is_done(event) }.map_err(|failure| self.context.error(failure))? {
                return Ok(at);
            }
        }
        Ok(self.marks.len())
    }
}

impl Queue for CudaQueue {
    unsafe fn submit(&mut self, ops: Vec<Op>, from: Home) -> Result<u64> {
        let _entered = self.context.enter()?;
        let lane = &mut self.lanes[self.lane];
        // SAFETY: the caller's duties; the context is current.
        unsafe { lane.take(&self.context, &ops, from) }?;
        self.submitted += 1;
        Ok(self.submitted)
    }

    fn mark(&mut self) -> Result<()> {
        let _entered = self.context.enter()?;
        let event = match self.spare_events.pop() {
            Some(event) => event,
            // SAFETY: the context is current.
            None => unsafe { driver::create_event() }.map_err(|failure| self.context.error(failure))?,
        };
        // Entered first: if recording fails it is destroyed with the others.
        self.marks.push_back((self.submitted, event));
        // SAFETY: event and stream are live and of the current context.
        unsafe { driver::record_event(event, self.lanes[self.lane].stream) }
            .map_err(|failure| self.context.error(failure))?;
        self.lane = (self.lane + 1) % self.lanes.len();
        Ok(())
    }

    fn finished(&mut self) -> Result<u64> {
        let _entered = self.context.enter()?;
        // Marks go round the streams, so the last one of each stands for all before. Where links are fast they are done.
        let last = self.marks.len().saturating_sub(self.lanes.len());
        let done = match last {
            0 => self.done_from(0)?,
            _ if self.done_from(last)? == self.marks.len() => self.marks.len(),
            _ => self.done_from(0)?,
        };
        for (ticket, event) in self.marks.drain(..done) {
            self.finished = ticket;
            self.spare_events.push(event);
        }
        Ok(self.finished)
    }

    fn settle(&mut self, bound: Duration) -> bool {
        let began = Instant::now();
        let over = |lane: &Lane| self.context.settle(lane.stream, bound.saturating_sub(began.elapsed())).is_some();
        self.lanes.iter().all(over)
    }
}

impl Drop for CudaQueue {
    fn drop(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.give_back(&self.context));
        let marked = self.marks.drain(..).map(|(_, event)| event);
        for event in marked.chain(self.spare_events.drain(..)) {
            // SAFETY: the event is live, and not used again.
            self.context.give_back(|| unsafe { driver::destroy_event(event) });
        }
    }
}

/// Queues a copy of at most one loop.
///
/// # Safety
/// As [`Queue::submit`]; the context is current and the stream its own.
unsafe fn straight(copy: &RawCopy, from: Home, stream: RawStream) -> Status<()> {
    // SAFETY: the same duties.
    unsafe {
        match copy.loops[..] {
            [] if from == Home::Device => {
                driver::copy_on_device(copy.dst, copy.src.addr() as u64, copy.run as usize, stream)
            }
            [] => driver::copy_to_device(copy.dst, copy.src, copy.run as usize, stream),
            [inner] => driver::copy_rect_to_device(
                &Rect {
                    from: copy.src,
                    from_device: from == Home::Device,
                    from_pitch: inner.src_stride as usize,
                    to: copy.dst,
                    to_pitch: inner.dst_stride as usize,
                    width: copy.run as usize,
                    rows: inner.count as usize,
                },
                stream,
            ),
            _ => unreachable!("bug in shardlift: a copy of several loops was not cut by a kernel"),
        }
    }
}

impl Lane {
    /// A stream, without scratch memory yet.
    pub(super) fn new(context: &Context, scratch_bytes: usize) -> Result<Lane> {
        // SAFETY: the context is current.
        let stream = context.with(|| unsafe { driver::create_stream() })?;
        Ok(Lane { stream, scratch: None, scratch_bytes })
    }

    /// Queues operations.
    ///
    /// # Safety
    /// As [`Queue::submit`]; the context is current, and the one of the lane.
    pub(super) unsafe fn take(&mut self, context: &Arc<Context>, ops: &[Op], from: Home) -> Result<()> {
        for op in ops {
            // SAFETY: the same duties.
            unsafe {
                match op {
                    Op::Copy(copy) => straight(copy, from, self.stream).map_err(|failure| context.error(failure))?,
                    // Nothing has to land first.
                    Op::Cut { copies, .. } if from == Home::Device => copies
                        .iter()
                        .try_for_each(|copy| kernels::copy(context, copy, copy.src.addr() as u64, self.stream))?,
                    Op::Cut { src, bytes, copies } => self.cut(context, *src, *bytes, copies)?,
                }
            }
        }
        Ok(())
    }

    /// Gives stream and scratch memory back, after what is queued has ended.
    pub(super) fn give_back(&mut self, context: &Context) {
        let stream = self.stream;
        // Copies that nobody waited for end before their memory goes.
        // SAFETY: the stream is live, and not used again.
        context.give_back(|| unsafe { driver::synchronize(stream) });
        self.scratch = None;
        // SAFETY: as above.
        context.give_back(|| unsafe { driver::destroy_stream(stream) });
    }

    /// Lands `bytes` as they are and queues the kernels that put them in place.
    ///
    /// # Safety
    /// As [`Queue::submit`]; the context is current.
    unsafe fn cut(&mut self, context: &Arc<Context>, src: *const u8, bytes: usize, copies: &[RawCopy]) -> Result<()> {
        assert!(bytes <= self.scratch_bytes, "bug in shardlift: a cut larger than a slot");
        let base = self.scratch(context)?;
        // SAFETY: the scratch memory is large enough, the stream's order keeps others from it; the caller's duties.
        unsafe {
            driver::copy_to_device(base, src, bytes, self.stream).map_err(|failure| context.error(failure))?;
            for copy in copies {
                let offset = copy.src.addr() - src.addr();
                kernels::copy(context, copy, base + offset as u64, self.stream)?;
            }
        }
        Ok(())
    }

    /// The address of the scratch memory.
    fn scratch(&mut self, context: &Arc<Context>) -> Result<u64> {
        let memory = match self.scratch.take() {
            Some(memory) => memory,
            None => Memory::plain(context, self.scratch_bytes)?,
        };
        Ok(self.scratch.insert(memory).address())
    }
}
