//! The one state of the twin, its lock, and what surrounds every call.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use twins::settings::die;

use crate::code::{Code, HANGS, INVALID_CONTEXT, INVALID_HANDLE, NOT_INITIALIZED, OUT_OF_MEMORY, Result, SUCCESS};
use crate::config::Config;
use crate::context::{Context, Device, top};
use crate::device_memory::{self, DeviceMemory, Kind as MemoryKind, Use};
use crate::faults::{Due, Faults, hang};
use crate::handle::{Handle, Kind, Missing, Table};
use crate::hazard::{Clock, FlightId, Flights, QueueId};
use crate::host_memory::HostMemory;
use crate::kernels::{Function, Module};
use crate::ledger::{CALL_CPU_NS, Ledger};
use crate::link::Links;
use crate::stream::{Queue, asking_ns, thread_cpu_ns};

/// Everything there is.
pub(crate) struct Sim {
    pub(crate) config: Config,
    pub(crate) initialised: bool,
    pub(crate) faults: Faults,
    pub(crate) ledger: Ledger,
    pub(crate) devices: Vec<Device>,
    pub(crate) contexts: Table<Context>,
    pub(crate) streams: Table<QueueId>,
    pub(crate) events: Table<Event>,
    pub(crate) modules: Table<Module>,
    pub(crate) functions: Table<Function>,
    pub(crate) physicals: Table<u64>,
    pub(crate) pools: Table<usize>,
    pub(crate) queues: std::collections::HashMap<QueueId, Queue>,
    pub(crate) next_queue: QueueId,
    pub(crate) memory: DeviceMemory,
    pub(crate) host: HostMemory,
    pub(crate) flights: Flights,
    /// Writes of other libraries that are in no stream, by a number that no stream has.
    pub(crate) writes: std::collections::HashMap<QueueId, (FlightId, Vec<Use>)>,
    pub(crate) links: Option<Links>,
    random: u64,
}

/// An event: the place in a stream where it was last recorded.
pub(crate) struct Event {
    pub(crate) context: Handle,
    pub(crate) timed: bool,
    pub(crate) at: Option<(QueueId, u64)>,
    /// What has happened when it has.
    pub(crate) clock: Clock,
    /// When it last happened, in nanoseconds, and as which operation.
    pub(crate) time: Option<(u64, u64)>,
}

struct Shared {
    sim: Mutex<Sim>,
    /// Some operation has finished, or a context was lost.
    done: Condvar,
}

fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| Shared { sim: Mutex::new(Sim::new(Config::from_env())), done: Condvar::new() })
}

/// The locked state; a panic elsewhere does not take it away, since what follows is only reporting.
pub(crate) fn lock() -> MutexGuard<'static, Sim> {
    shared().sim.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sim {
    fn new(config: Config) -> Sim {
        let expected = "call@n=code[!], comma-separated; hang is a code";
        let faults =
            Faults::parse(&config.fault, Due::read).unwrap_or_else(|| die("SIMCUDA_FAULT", &config.fault, expected));
        let mut pools = Table::new(Kind::Pool);
        let devices = (0..config.devices)
            .map(|index| Device { pool: pools.insert(0, index), ..Device::default() })
            .collect::<Vec<_>>();
        Sim {
            initialised: false,
            faults,
            ledger: Ledger::new(config.devices),
            links: config.link.map(|rates| Links::new(rates, config.devices)),
            random: config.seed ^ 0x9E37_79B9_7F4A_7C15,
            devices,
            contexts: Table::new(Kind::Context),
            streams: Table::new(Kind::Stream),
            events: Table::new(Kind::Event),
            modules: Table::new(Kind::Module),
            functions: Table::new(Kind::Function),
            physicals: Table::new(Kind::Physical),
            pools,
            queues: std::collections::HashMap::new(),
            next_queue: 1,
            memory: DeviceMemory::new(),
            host: HostMemory::default(),
            flights: Flights::default(),
            writes: std::collections::HashMap::new(),
            config,
        }
    }

    /// A defect of the caller's that a GPU may not show.
    pub(crate) fn violate(&mut self, call: &str, what: &str) {
        let text = format!("{call}: {what}");
        eprintln!("simcuda: VIOLATION {text}");
        self.ledger.violations.push(text);
        if self.config.strict {
            std::process::abort();
        }
    }

    /// The next number of the seeded sequence.
    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.random;
        word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ word >> 31
    }

    /// Takes quota of a device.
    pub(crate) fn take(&mut self, device: usize, bytes: u64) -> Result {
        let used = self.devices[device].used.checked_add(bytes).filter(|used| *used <= self.config.memory_bytes);
        let used = used.ok_or(OUT_OF_MEMORY)?;
        self.devices[device].used = used;
        self.devices[device].peak = self.devices[device].peak.max(used);
        Ok(())
    }

    /// Drops one holder of a physical allocation; the last one gives its memory back.
    pub(crate) fn drop_physical(&mut self, id: u64) {
        let Some(physical) = self.memory.physicals.get_mut(&id) else { return };
        physical.holders -= 1;
        if physical.holders == 0 {
            self.devices[physical.device].used -= physical.bytes;
            self.memory.physicals.remove(&id);
        }
    }

    /// Takes an allocation away.
    pub(crate) fn remove_memory(&mut self, call: &'static str, start: u64) {
        if let Some(range) = self.memory.get(start)
            && matches!(range.kind, MemoryKind::Plain | MemoryKind::Pool)
            && device_memory::overrun(start, range.bytes)
        {
            self.violate(call, "somebody wrote behind the end of this memory");
        }
        let Some(range) = self.memory.remove(start, call) else { return };
        match range.kind {
            MemoryKind::Mapped(physical) => self.drop_physical(physical),
            MemoryKind::Plain | MemoryKind::Pool => {
                self.devices[range.device].used -= DeviceMemory::quota(range.bytes);
            }
        }
    }
}

/// The locked state during one call.
pub(crate) struct Guard {
    sim: Option<MutexGuard<'static, Sim>>,
    call: &'static str,
    number: u64,
    releasing: bool,
    /// The thread of a stream that this call gave something to do.
    to_wake: Option<Arc<Condvar>>,
}

impl Deref for Guard {
    type Target = Sim;
    fn deref(&self) -> &Sim {
        self.sim.as_ref().expect("only absent while it waits")
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Sim {
        self.sim.as_mut().expect("only absent while it waits")
    }
}

/// A driver function: counted, may be made to fail, runs under the lock.
pub(crate) fn call(name: &'static str, body: impl FnOnce(&mut Guard) -> Result) -> Code {
    enter(name, false, body)
}

/// A driver function that gives something back. That happens even if the function reports an error: with a lost
/// device, or one that a test asked for, the driver reports what went wrong earlier.
pub(crate) fn release(name: &'static str, body: impl FnOnce(&mut Guard) -> Result) -> Code {
    enter(name, true, body)
}

/// A call of another library's twin: that one counts it and makes it fail.
pub(crate) fn uncounted(name: &'static str, body: impl FnOnce(&mut Guard) -> Result) -> Code {
    let mut guard = Guard { sim: Some(lock()), call: name, number: 0, releasing: false, to_wake: None };
    let code = body(&mut guard).err().unwrap_or(SUCCESS);
    guard.end();
    code
}

fn enter(name: &'static str, releasing: bool, body: impl FnOnce(&mut Guard) -> Result) -> Code {
    let began = thread_cpu_ns();
    let mut guard = Guard { sim: Some(lock()), call: name, number: 0, releasing, to_wake: None };
    guard.number = guard.ledger.count(name);
    let code = run(&mut guard, body);
    guard.end();
    // The last asking and the first one's return are outside, about one whole asking.
    CALL_CPU_NS.fetch_add(thread_cpu_ns() - began + asking_ns(), Ordering::Relaxed);
    code
}

fn run(guard: &mut Guard, body: impl FnOnce(&mut Guard) -> Result) -> Code {
    let (name, releasing) = (guard.call, guard.releasing);
    let due = guard.faults.due(name);
    if due.is_some_and(|due| due.code == HANGS) {
        return guard.outside(|| hang());
    }
    if let Some(due) = due.filter(|due| due.sticky) {
        guard.lose(top(), due.code);
    }
    let lost = guard.contexts.get(top()).ok().and_then(|context| context.lost);
    match due {
        Some(due) if !releasing => return due.code,
        None if !guard.initialised && !matches!(name, "cuInit" | "cuDriverGetVersion") => return NOT_INITIALIZED,
        _ => {}
    }
    let result = body(guard);
    let reported = due.map(|due| due.code).or(lost.filter(|_| releasing));
    reported.unwrap_or(result.err().unwrap_or(SUCCESS))
}

impl Guard {
    pub(crate) fn call(&self) -> &'static str {
        self.call
    }

    /// The number of this call among all.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn releasing(&self) -> bool {
        self.releasing
    }

    pub(crate) fn violation(&mut self, what: &str) {
        let call = self.call;
        self.violate(call, what);
    }

    /// Wakes the thread of a stream when the lock is open: it would have to wait for that.
    pub(crate) fn wake_later(&mut self, wake: Arc<Condvar>) {
        self.wake_now();
        self.to_wake = Some(wake);
    }

    /// Opens the lock, and wakes whom that makes wait no longer.
    fn end(self) {
        let Guard { sim, to_wake, .. } = self;
        drop(sim);
        if let Some(wake) = to_wake {
            wake.notify_all();
        }
    }

    fn wake_now(&mut self) {
        if let Some(wake) = self.to_wake.take() {
            wake.notify_all();
        }
    }

    /// Waits until something has finished.
    pub(crate) fn wait(&mut self) {
        self.wake_now();
        let sim = self.sim.take().expect("only absent while it waits");
        self.sim = Some(shared().done.wait(sim).unwrap_or_else(PoisonError::into_inner));
    }

    /// Does something that takes time, with the lock open.
    pub(crate) fn outside<T>(&mut self, work: impl FnOnce() -> T) -> T {
        self.wake_now();
        self.sim = None;
        let result = work();
        self.sim = Some(lock());
        result
    }

    /// What a lookup of a handle found; one of something destroyed is a violation.
    pub(crate) fn found<T>(&mut self, kind: Kind, found: std::result::Result<T, Missing>) -> Result<T> {
        found.map_err(|missing| {
            if missing == Missing::Stale {
                self.violation(&format!("the {} was destroyed", kind.name()));
            }
            if kind == Kind::Context { INVALID_CONTEXT } else { INVALID_HANDLE }
        })
    }

    /// An event's context; looks at the loss of that, too.
    pub(crate) fn event(&mut self, handle: Handle) -> Result<Handle> {
        self.context()?;
        let found = self.events.get(handle).map(|event| event.context);
        let context = self.found(Kind::Event, found)?;
        self.not_lost(context)?;
        Ok(context)
    }

    /// The error of a context that was lost, unless something is being released.
    pub(crate) fn not_lost(&self, context: Handle) -> Result {
        match self.contexts.get(context).ok().and_then(|context| context.lost) {
            Some(code) if !self.releasing => Err(code),
            _ => Ok(()),
        }
    }

    pub(crate) fn remove_module(&mut self, module: Handle) {
        let functions: Vec<Handle> = self
            .functions
            .iter()
            .filter(|(_, _, function)| function.module == module)
            .map(|(handle, ..)| handle)
            .collect();
        for function in functions {
            self.functions.remove(function).ok();
        }
        self.modules.remove(module).ok();
    }
}

/// Tells everybody who waits that something has finished.
pub(crate) fn notify() {
    shared().done.notify_all();
}
