//! Streams.

use std::ffi::c_void;
use std::thread;

use crate::abi::{HostData, HostFn, Out};
use crate::code::{Code, INVALID_CONTEXT, INVALID_VALUE, NOT_READY, Result};
use crate::handle::{Handle, Kind};
use crate::hazard::{QueueId, merge};
use crate::sim::{Guard, call, release};
use crate::stream::{Order, Request};
use crate::work::Work;

/// `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`.
const LEGACY: Handle = 1;
const PER_THREAD: Handle = 2;

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: u32) -> Code {
    call("cuStreamCreate", |sim| create(sim, stream, flags, 0))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, priority: i32) -> Code {
    call("cuStreamCreateWithPriority", |sim| create(sim, stream, flags, priority))
}

fn create(sim: &mut Guard, stream: Out<Handle>, flags: u32, priority: i32) -> Result {
    let order = match flags {
        0 => Order::Blocking,
        1 => Order::NonBlocking,
        _ => return Err(INVALID_VALUE),
    };
    let context = sim.context()?;
    let device = sim.contexts.get(context)?.device;
    if stream.is_null() {
        return Err(INVALID_VALUE);
    }
    let queue = sim.queue(context, device, order);
    let made = sim.queues.get_mut(&queue).expect("just made");
    (made.flags, made.priority) = (flags, priority.clamp(-5, 0));
    let number = sim.number();
    let handle = sim.streams.insert(number, queue);
    stream.set(handle)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Code {
    release("cuStreamDestroy_v2", |sim| {
        let removed = sim.streams.remove(stream);
        let queue = sim.found(Kind::Stream, removed)?;
        sim.close_queue(queue);
        sim.context().map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Handle) -> Code {
    call("cuStreamSynchronize", |sim| {
        let queue = sim.stream(stream)?;
        sim.drain(queue)?;
        sim.queue_not_lost(queue)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: Handle) -> Code {
    call("cuStreamQuery", |sim| {
        let queue = sim.stream(stream)?;
        sim.queue_not_lost(queue)?;
        let last = sim.queues[&queue].submitted;
        if sim.is_done(queue, last) { Ok(()) } else { Err(NOT_READY) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) -> Code {
    call("cuStreamWaitEvent", |sim| {
        let queue = sim.stream(stream)?;
        sim.event(event)?;
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let event = sim.events.get(event)?;
        let Some(at) = event.at else { return Ok(()) };
        let mut request = Request::new(sim.call(), Work::Nothing);
        request.after.push(at);
        merge(&mut request.clock, &event.clock);
        sim.submit(queue, request).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchHostFunc(stream: Handle, function: Option<HostFn>, data: *mut c_void) -> Code {
    call("cuLaunchHostFunc", |sim| {
        let queue = sim.own_stream(stream)?;
        let function = function.ok_or(INVALID_VALUE)?;
        let request = Request::new(sim.call(), Work::Host(function, HostData(data)));
        sim.submit(queue, request).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) -> Code {
    call("cuStreamGetCtx", |sim| {
        let queue = sim.stream(stream)?;
        context.set(sim.queues[&queue].context)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) -> Code {
    call("cuStreamGetFlags", |sim| {
        let queue = sim.stream(stream)?;
        flags.set(sim.queues[&queue].flags)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) -> Code {
    call("cuStreamGetPriority", |sim| {
        let queue = sim.stream(stream)?;
        priority.set(sim.queues[&queue].priority)
    })
}

impl Guard {
    /// The stream of a handle, of any context.
    pub(crate) fn stream(&mut self, stream: Handle) -> Result<QueueId> {
        let context = self.context()?;
        match stream {
            0 | LEGACY => Ok(self.contexts.get(context)?.legacy),
            PER_THREAD => {
                let thread = thread::current().id();
                if let Some(queue) = self.contexts.get(context)?.per_thread.get(&thread) {
                    return Ok(*queue);
                }
                let device = self.contexts.get(context)?.device;
                let queue = self.queue(context, device, Order::Blocking);
                self.contexts.get_mut(context)?.per_thread.insert(thread, queue);
                Ok(queue)
            }
            _ => {
                let found = self.streams.get(stream).copied();
                self.found(Kind::Stream, found)
            }
        }
    }

    /// The stream of a handle, which must be of the current context: for what is submitted.
    pub(crate) fn own_stream(&mut self, stream: Handle) -> Result<QueueId> {
        let context = self.context()?;
        let queue = self.stream(stream)?;
        if self.queues[&queue].context == context { Ok(queue) } else { Err(INVALID_CONTEXT) }
    }

    fn queue_not_lost(&self, queue: QueueId) -> Result {
        self.queues.get(&queue).map_or(Ok(()), |queue| self.not_lost(queue.context))
    }
}
