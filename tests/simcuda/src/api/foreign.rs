//! What the twins of other libraries ask of this one: operations of theirs on its streams, and writes to its memory. Neither
//! counted nor failed here: that is for the twin whose function was called.

use std::ffi::{CStr, c_char};

use crate::abi::{ForeignFn, HostData, In, Out, SkipFn};
use crate::code::{Code, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, NOT_INITIALIZED, SUCCESS};
use crate::context::top;
use crate::handle::{Handle, Kind};
use crate::hazard::Clock;
use crate::sim::{notify, uncounted};
use crate::stream::Request;
use crate::work::{Foreign, Region, Work};

/// Bytes of device memory that such an operation touches.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Touched {
    start: u64,
    bytes: u64,
    /// Not 0: they are written.
    writes: u32,
}

/// An operation for a stream. Exactly one of `run` and `skip` is called, once, on a thread of the stream.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Operation {
    /// A C string that is never freed: what violations name.
    call: In<c_char>,
    touched: In<Touched>,
    touched_count: usize,
    /// Gets `data` and the instant at which it may start in the model's time; gives the one at which it ends. Without a
    /// model both are 0. Returns when what comes next in the stream may start.
    run: ForeignFn,
    /// Gets `data` when the operation never runs.
    skip: SkipFn,
    data: HostData,
    /// What `simcuda_submit` gave for an operation that must end before, on whatever stream; zeros for none.
    after: [u64; 2],
}

/// Puts an operation into a stream of a device, and says where it is. It is late like any other, its memory is watched like
/// that of a copy.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_submit(device: i32, stream: Handle, operation: In<Operation>, place: Out<[u64; 2]>) -> Code {
    let Ok(operation) = operation.get() else { return INVALID_VALUE };
    let Some(call) = name(operation.call) else { return INVALID_VALUE };
    uncounted(call, |sim| {
        if !sim.initialised {
            return Err(NOT_INITIALIZED);
        }
        let device = sim.device(device)?;
        let context = sim.devices[device].context.ok_or(INVALID_CONTEXT)?;
        sim.not_lost(context)?;
        let queue = match stream {
            0 | 1 => sim.contexts.get(context)?.legacy,
            _ => {
                let found = sim.streams.get(stream).copied();
                sim.found(Kind::Stream, found)?
            }
        };
        if sim.queues.get(&queue).is_none_or(|queue| queue.context != context) {
            return Err(INVALID_HANDLE);
        }
        let Operation { run, skip, data, .. } = operation;
        let mut request = Request::new(call, Work::Foreign(Foreign { run, skip, data }));
        for index in 0..operation.touched_count {
            let touched = operation.touched.at(index)?;
            let region = Region::flat(touched.start, touched.bytes);
            let uses = sim.device_region(context, region)?;
            let away = |used: &&(u64, u64)| sim.memory.get(used.0).is_some_and(|range| range.device != device);
            if let Some((start, _)) = uses.iter().find(away) {
                sim.violation(&format!("touches memory at {start:#x}, which is another device's"));
                return Err(INVALID_VALUE);
            }
            request.device_uses.extend(uses);
            request.touched.push((region, touched.writes != 0));
        }
        let [other, seq] = operation.after;
        if other != 0 {
            request.after.push((other, seq));
            request.clock.insert(other, seq);
        }
        let seq = sim.submit(queue, request)?;
        place.set([queue, seq])
    })
}

/// Begins a write to memory of the current context's device that is in no stream: nobody else may touch that until it ends.
/// `call` is never freed; `id` is for `simcuda_end_write`.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_begin_write(call: In<c_char>, start: u64, bytes: u64, id: Out<u64>) -> Code {
    let Some(call) = name(call) else { return INVALID_VALUE };
    uncounted(call, |sim| {
        if !sim.initialised {
            return Err(NOT_INITIALIZED);
        }
        let context = sim.context()?;
        let device = sim.current_device()?;
        if !sim.memory.owns(start) {
            return Err(INVALID_VALUE);
        }
        let region = Region::flat(start, bytes);
        let uses = sim.device_region(context, region)?;
        if uses.iter().any(|used| sim.memory.get(used.0).is_some_and(|range| range.device != device)) {
            return Err(INVALID_CONTEXT);
        }
        let queue = sim.next_queue;
        sim.next_queue += 1;
        if let Some(other) = sim.flights.conflict(queue, &Clock::new(), region, true) {
            sim.violation(&format!("writes {bytes} bytes at {start:#x}, which {other} uses that has not finished"));
        }
        let flight = sim.flights.add(queue, 1, call, region, true);
        uses.iter().for_each(|(start, _)| sim.memory.get_mut(*start).expect("resolved just before").uses += 1);
        sim.writes.insert(queue, (flight, uses));
        id.set(queue)
    })
}

/// Ends it.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_end_write(id: u64) {
    uncounted("simcuda_end_write", |sim| {
        let (flight, uses) = sim.writes.remove(&id).ok_or(INVALID_VALUE)?;
        sim.flights.remove(flight);
        for (start, used) in uses {
            if let Some(range) = sim.memory.get_mut(start).filter(|range| range.id == used) {
                range.uses -= 1;
            }
        }
        notify();
        Ok(())
    });
}

/// Whether all of this memory is there.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_is_live(start: u64, bytes: u64) -> i32 {
    let mut live = 0;
    uncounted("simcuda_is_live", |sim| {
        live = i32::from(sim.memory.resolve(start, bytes).is_ok());
        Ok(())
    });
    live
}

/// The device of the context that is current on this thread; -1 for none.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_current_device() -> i32 {
    let mut device = -1;
    let found = uncounted("simcuda_current_device", |sim| {
        device = sim.contexts.get(top()).map_err(|_| INVALID_CONTEXT)?.device as i32;
        Ok(())
    });
    if found == SUCCESS { device } else { -1 }
}

/// Which of the machine's devices one of this process is; -1 for none of either.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_board(device: i32) -> i32 {
    let mut board = -1;
    uncounted("simcuda_board", |sim| {
        board = sim.config.visible[sim.device(device)?] as i32;
        Ok(())
    });
    board
}

/// A string that lives for ever, by the contract of [`Operation`].
fn name(text: In<c_char>) -> Option<&'static str> {
    text.address().and_then(|address| {
        // SAFETY: not null, a C string, and never freed by the contract.
        unsafe { CStr::from_ptr(address) }.to_str().ok()
    })
}
