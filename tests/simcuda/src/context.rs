//! Devices and their primary contexts.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::thread::ThreadId;

use crate::code::{CONTEXT_IS_DESTROYED, Code, INVALID_CONTEXT, INVALID_DEVICE, Result};
use crate::handle::Handle;
use crate::hazard::QueueId;
use crate::sim::{Guard, Sim};
use crate::stream::Order;

/// One GPU.
#[derive(Default)]
pub(crate) struct Device {
    /// The primary context, while it is retained.
    pub(crate) context: Option<Handle>,
    /// Numbers of the calls that retained it.
    pub(crate) retained: Vec<u64>,
    /// Bytes taken, and the most there were.
    pub(crate) used: u64,
    pub(crate) peak: u64,
    /// The default memory pool, and its settings by attribute.
    pub(crate) pool: Handle,
    pub(crate) pool_settings: HashMap<u32, u64>,
}

/// A primary context.
pub(crate) struct Context {
    pub(crate) device: usize,
    /// Since an error that stays: what every call answers.
    pub(crate) lost: Option<Code>,
    /// The stream that is named 0.
    pub(crate) legacy: QueueId,
    /// The streams that are named 2, one per thread.
    pub(crate) per_thread: HashMap<ThreadId, QueueId>,
    /// Contexts whose memory this one's kernels may use.
    pub(crate) peers: HashSet<Handle>,
}

thread_local! {
    /// The contexts that the thread has pushed; the last one is current.
    pub(crate) static STACK: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// What is current on this thread, live or not; 0 for nothing.
pub(crate) fn top() -> Handle {
    STACK.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

impl Sim {
    /// The device with this ordinal.
    pub(crate) fn device(&self, ordinal: i32) -> Result<usize> {
        usize::try_from(ordinal).ok().filter(|index| *index < self.devices.len()).ok_or(INVALID_DEVICE)
    }

    /// One more holder of a device's primary context, which the first one makes.
    pub(crate) fn retain(&mut self, device: usize, made: u64) -> Handle {
        self.devices[device].retained.push(made);
        if let Some(context) = self.devices[device].context {
            return context;
        }
        let context = Context { device, lost: None, legacy: 0, per_thread: HashMap::new(), peers: HashSet::new() };
        let handle = self.contexts.insert(made, context);
        let legacy = self.queue(handle, device, Order::Legacy);
        self.contexts.get_mut(handle).expect("just made").legacy = legacy;
        self.devices[device].context = Some(handle);
        handle
    }

    pub(crate) fn is_lost(&self, context: Handle) -> bool {
        self.contexts.get(context).is_ok_and(|context| context.lost.is_some())
    }

    /// After an error that stays, a context answers nothing else; what it has queued never runs.
    pub(crate) fn lose(&mut self, context: Handle, code: Code) {
        if let Ok(context) = self.contexts.get_mut(context) {
            context.lost.get_or_insert(code);
        }
        self.wake_all();
    }
}

impl Guard {
    /// The current context: live and, unless something is being released, not lost.
    pub(crate) fn context(&mut self) -> Result<Handle> {
        let handle = top();
        if handle == 0 {
            return Err(INVALID_CONTEXT);
        }
        let context = self.contexts.get(handle).map_err(|_| CONTEXT_IS_DESTROYED)?;
        match context.lost {
            Some(code) if !self.releasing() => Err(code),
            _ => Ok(handle),
        }
    }

    /// The device of the current context.
    pub(crate) fn current_device(&mut self) -> Result<usize> {
        let context = self.context()?;
        Ok(self.contexts.get(context)?.device)
    }

    /// The last release: what the context still holds goes with it, which its owner should not have left there.
    pub(crate) fn destroy_context(&mut self, handle: Handle) {
        let queues = self.queues_of(handle);
        for queue in &queues {
            self.drain(*queue).ok();
            self.close_queue(*queue);
        }
        let call = self.call();
        let mut left = Vec::new();
        let streams = self.streams.iter().filter(|(_, _, queue)| queues.contains(queue));
        left.extend(streams.map(|(stream, made, _)| ("stream", made, stream)));
        left.extend(
            self.events.iter().filter(|(_, _, event)| event.context == handle).map(|(h, made, _)| ("event", made, h)),
        );
        left.extend(
            self.modules
                .iter()
                .filter(|(_, _, module)| module.context == handle)
                .map(|(h, made, _)| ("module", made, h)),
        );
        left.extend(
            self.memory
                .iter()
                .filter(|(_, range)| range.context == handle)
                .map(|(at, range)| ("device memory", range.made, at)),
        );
        let device = self.contexts.get(handle).map_or(0, |context| context.device);
        for (kind, made, what) in left {
            self.ledger.abandoned(kind, made);
            match kind {
                "stream" => drop(self.streams.remove(what)),
                "event" => drop(self.events.remove(what)),
                "module" => self.remove_module(what),
                _ => self.remove_memory(call, what),
            }
        }
        self.devices[device].context = None;
        self.contexts.remove(handle).ok();
    }
}
