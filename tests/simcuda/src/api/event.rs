//! Events.

use crate::abi::Out;
use crate::code::{Code, INVALID_HANDLE, INVALID_VALUE, NOT_READY, Result};
use crate::handle::{Handle, Kind};
use crate::hazard::Clock;
use crate::sim::{Event, Guard, call, release};
use crate::stream::Request;
use crate::work::Work;

/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: Out<Handle>, flags: u32) -> Code {
    call("cuEventCreate", |sim| {
        let context = sim.context()?;
        if flags > 7 || event.is_null() {
            return Err(INVALID_VALUE);
        }
        let number = sim.number();
        let timed = flags & DISABLE_TIMING == 0;
        let made = Event { context, timed, at: None, clock: Clock::new(), time: None };
        event.set(sim.events.insert(number, made))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: Handle) -> Code {
    release("cuEventDestroy_v2", |sim| {
        let removed = sim.events.remove(event);
        sim.found(Kind::Event, removed)?;
        sim.context().map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Code {
    call("cuEventRecord", |sim| {
        let context = sim.event(event)?;
        let queue = sim.stream(stream)?;
        if sim.queues[&queue].context != context {
            return Err(INVALID_HANDLE);
        }
        let request = Request::new(sim.call(), Work::Record(event));
        let seq = sim.submit(queue, request)?;
        let clock = sim.clock_of(queue);
        let recorded = sim.events.get_mut(event)?;
        (recorded.at, recorded.clock, recorded.time) = (Some((queue, seq)), clock, None);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> Code {
    call("cuEventQuery", |sim| {
        sim.event(event)?;
        match sim.events.get(event)?.at {
            Some((queue, seq)) if !sim.is_done(queue, seq) => Err(NOT_READY),
            _ => Ok(()),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> Code {
    call("cuEventSynchronize", |sim| {
        let context = sim.event(event)?;
        if let Some((queue, seq)) = sim.events.get(event)?.at {
            sim.finish(queue, seq)?;
        }
        sim.not_lost(context)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) -> Code {
    call("cuEventElapsedTime", |sim| {
        let (start, end) = (time(sim, start)?, time(sim, end)?);
        milliseconds.set((end as f64 - start as f64) as f32 / 1e6)
    })
}

fn time(sim: &mut Guard, event: Handle) -> Result<u64> {
    sim.event(event)?;
    let event = sim.events.get(event)?;
    let (Some((_, seq)), true) = (event.at, event.timed) else { return Err(INVALID_HANDLE) };
    event.time.filter(|(_, at)| *at == seq).map(|(time, _)| time).ok_or(NOT_READY)
}
