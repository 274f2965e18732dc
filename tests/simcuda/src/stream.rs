//! Streams: a queue and a thread each.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crate::code::{HANGS, ILLEGAL_ADDRESS, INVALID_HANDLE, Result};
use crate::crash::watched;
use crate::device_memory::Use;
use crate::faults::hang;
use crate::handle::Handle;
use crate::hazard::{Clock, FlightId, QueueId, merge};
use crate::host_memory;
use crate::link::{Direction, Span};
use crate::sim::{Guard, Sim, lock, notify};
use crate::work::{Foreign, Region, Work, hash};

/// How a stream is ordered with the legacy default stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// It is that stream.
    Legacy,
    Blocking,
    NonBlocking,
}

/// What one stream has to do.
pub(crate) struct Queue {
    pub(crate) context: Handle,
    pub(crate) device: usize,
    pub(crate) order: Order,
    pub(crate) flags: u32,
    pub(crate) priority: i32,
    ops: VecDeque<Op>,
    pub(crate) submitted: u64,
    pub(crate) completed: u64,
    /// Somebody waits for operations up to this one: they need not be late.
    urgent: u64,
    /// Its thread waits for another stream.
    stuck: bool,
    closed: bool,
    clock: Clock,
    /// When its last operation ends in the model's time, as far as that is known.
    model_end: u64,
    /// When the last one that has finished did.
    ended: u64,
    /// Its last operation whose end is not known yet, because it comes after one of another library.
    unknown: u64,
    /// Of its thread, once there is one.
    wake: Option<Arc<Condvar>>,
}

struct Op {
    seq: u64,
    request: Request,
    /// Not to run before, in nanoseconds.
    due: u64,
    submitted: u64,
    /// Without a model of the links all zeros; with one `None` until the ends of all before are known.
    span: Option<Span>,
    /// What the source's bytes hashed to at the call.
    hash: Option<u64>,
    flights: Vec<FlightId>,
}

/// An operation as a call asks for it.
pub(crate) struct Request {
    pub(crate) call: &'static str,
    pub(crate) work: Work,
    /// Streams and operations that must finish first.
    pub(crate) after: Vec<(QueueId, u64)>,
    pub(crate) clock: Clock,
    pub(crate) reads: Option<Region>,
    pub(crate) writes: Option<Region>,
    /// More regions, and whether they are written.
    pub(crate) touched: Vec<(Region, bool)>,
    pub(crate) device_uses: Vec<Use>,
    pub(crate) host_uses: Vec<(u64, u64)>,
    /// Memory of the host that must not change before it is read.
    pub(crate) source: Option<Region>,
    /// Memory of the host that must be mapped when it runs.
    pub(crate) host_region: Option<Region>,
    pub(crate) traffic: Option<Traffic>,
}

/// What a copy moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Traffic {
    In(u64),
    Out(u64),
    /// Within a device or between two.
    Device(u64),
    Kernel(&'static str),
}

impl Request {
    pub(crate) fn new(call: &'static str, work: Work) -> Request {
        Request {
            call,
            work,
            after: Vec::new(),
            clock: Clock::new(),
            reads: None,
            writes: None,
            touched: Vec::new(),
            device_uses: Vec::new(),
            host_uses: Vec::new(),
            source: None,
            host_region: None,
            traffic: None,
        }
    }
}

impl Sim {
    /// Makes a stream.
    pub(crate) fn queue(&mut self, context: Handle, device: usize, order: Order) -> QueueId {
        let id = self.next_queue;
        self.next_queue += 1;
        let queue = Queue {
            context,
            device,
            order,
            flags: 0,
            priority: 0,
            ops: VecDeque::new(),
            submitted: 0,
            completed: 0,
            urgent: 0,
            stuck: false,
            closed: false,
            clock: Clock::new(),
            model_end: 0,
            ended: 0,
            unknown: 0,
            wake: None,
        };
        self.queues.insert(id, queue);
        id
    }

    /// A destroyed stream still does what it has to.
    pub(crate) fn close_queue(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        queue.closed = true;
        match &queue.wake {
            Some(wake) => wake.notify_all(),
            None => drop(self.queues.remove(&id)),
        }
    }

    pub(crate) fn queues_of(&self, context: Handle) -> Vec<QueueId> {
        self.queues.iter().filter(|(_, queue)| queue.context == context).map(|(id, _)| *id).collect()
    }

    /// Whether an operation has finished; those of a stream that is gone have.
    pub(crate) fn is_done(&self, queue: QueueId, seq: u64) -> bool {
        self.queues.get(&queue).is_none_or(|queue| queue.completed >= seq)
    }

    /// What has happened once all that is in the stream has.
    pub(crate) fn clock_of(&self, queue: QueueId) -> Clock {
        self.queues.get(&queue).map(|queue| queue.clock.clone()).unwrap_or_default()
    }

    pub(crate) fn wake_all(&mut self) {
        self.queues.values().filter_map(|queue| queue.wake.as_ref()).for_each(|wake| wake.notify_all());
        notify();
    }

    fn hurry(&mut self, id: QueueId, seq: u64) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        if queue.urgent < seq {
            queue.urgent = seq;
            queue.wake.iter().for_each(|wake| wake.notify_all());
        }
    }
}

impl Guard {
    /// Puts an operation into a stream.
    pub(crate) fn submit(&mut self, id: QueueId, mut request: Request) -> Result<u64> {
        let queue = self.queues.get(&id).ok_or(INVALID_HANDLE)?;
        let (context, device, order) = (queue.context, queue.device, queue.order);
        self.not_lost(context)?;
        for other in self.queues_of(context) {
            let queue = &self.queues[&other];
            let ordered = match order {
                Order::Legacy => queue.order == Order::Blocking,
                Order::Blocking => queue.order == Order::Legacy,
                Order::NonBlocking => false,
            };
            if ordered && queue.completed < queue.submitted {
                request.after.push((other, queue.submitted));
                merge(&mut request.clock, &queue.clock);
            }
        }
        let now = monotonic_ns();
        // When what it waits for ends, in the model's time.
        let waits =
            request.after.iter().filter_map(|(other, _)| self.queues.get(other)).map(|queue| queue.model_end).max();
        request.after.retain(|(other, seq)| !self.is_done(*other, *seq));
        let foreign = matches!(request.work, Work::Foreign(_));
        let unknown = |queue: &Queue| queue.unknown > queue.completed;
        let after_unknown = unknown(&self.queues[&id])
            || request.after.iter().filter_map(|(other, _)| self.queues.get(other)).any(unknown);

        let mut clock = std::mem::take(&mut self.queues.get_mut(&id).expect("found above").clock);
        merge(&mut clock, &request.clock);
        let of_copy = request.reads.map(|region| (region, false)).into_iter();
        let of_copy = of_copy.chain(request.writes.map(|region| (region, true)));
        let regions: Vec<(Region, bool)> = of_copy.chain(request.touched.iter().copied()).collect();
        for &(region, write) in &regions {
            if let Some(other) = self.flights.conflict(id, &clock, region, write) {
                let what = format!(
                    "{} {} bytes at {:#x}, which {other} on another stream touches too, without an event between them",
                    if write { "writes" } else { "reads" },
                    region.bytes(),
                    region.start
                );
                self.violation(&what);
            }
        }
        let pending_host = self.queues[&id].ops.iter().any(|op| matches!(op.request.work, Work::Host(..)));
        let check = self.config.check;
        let source = request.source.filter(|region| check > 0 && !pending_host && !self.flights.written(*region));
        let hash = source.map(|region| hash(region, check > 1));

        let seq = self.queues[&id].submitted + 1;
        clock.insert(id, seq);
        let flights =
            regions.iter().map(|&(region, write)| self.flights.add(id, seq, request.call, region, write)).collect();
        for (start, _) in &request.device_uses {
            self.memory.get_mut(*start).expect("resolved just before").uses += 1;
        }
        for (start, _) in &request.host_uses {
            self.host.get_mut(*start).expect("resolved just before").uses += 1;
        }
        let after = self.queues[&id].model_end.max(waits.unwrap_or(0));
        let known = self.links.is_none() || !foreign && !after_unknown;
        let span = known.then(|| self.span(device, request.traffic, now, after));
        let late = request.traffic.is_some() || foreign;
        let due = if late { now + self.delay_ns() } else { 0 };
        let queue = self.queues.get_mut(&id).expect("found above");
        queue.clock = clock;
        queue.submitted = seq;
        match span {
            Some(span) => queue.model_end = span.end,
            None => queue.unknown = seq,
        }
        queue.ops.push_back(Op { seq, request, due, submitted: now, span, hash, flights });
        match queue.wake.clone() {
            Some(wake) => self.wake_later(wake),
            None => {
                let wake = Arc::new(Condvar::new());
                queue.wake = Some(Arc::clone(&wake));
                let worker = move || work(id, &wake);
                thread::Builder::new().name("simcuda".into()).spawn(worker).expect("a thread for a stream");
            }
        }
        Ok(seq)
    }

    /// How late an operation is: mostly up to the jitter, now and then much later.
    fn delay_ns(&mut self) -> u64 {
        let most = self.config.jitter_us * 1000;
        if most == 0 {
            return 0;
        }
        let word = self.random();
        if word & 15 == 0 { word % (8 * most) } else { word % most }
    }

    /// Waits for an operation. An error that stays ends it early, unless something is being released.
    pub(crate) fn finish(&mut self, queue: QueueId, seq: u64) -> Result {
        while let Some(context) =
            self.queues.get(&queue).filter(|queue| queue.completed < seq).map(|queue| queue.context)
        {
            self.not_lost(context)?;
            self.hurry(queue, seq);
            self.wait();
        }
        Ok(())
    }

    /// Waits for everything in a stream.
    pub(crate) fn drain(&mut self, queue: QueueId) -> Result {
        let Some(last) = self.queues.get(&queue).map(|queue| queue.submitted) else { return Ok(()) };
        self.finish(queue, last)
    }

    /// Waits for everything in all streams of a context.
    pub(crate) fn drain_context(&mut self, context: Handle) -> Result {
        self.queues_of(context).into_iter().try_for_each(|queue| self.drain(queue))?;
        self.not_lost(context)
    }
}

/// What the thread of a stream does.
fn work(id: QueueId, wake: &Condvar) {
    let mut sim = lock();
    let mut cpu_ns = 0;
    loop {
        let Some(queue) = sim.queues.get(&id) else { return };
        let context = queue.context;
        let Some(op) = queue.ops.front() else {
            if queue.closed {
                sim.queues.remove(&id);
                return;
            }
            sim = wake.wait(sim).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let lost = sim.is_lost(context);
        if !lost {
            let (urgent, due) = (op.seq <= queue.urgent, op.due);
            if let Some((other, seq)) = op.request.after.iter().copied().find(|(other, seq)| !sim.is_done(*other, *seq))
            {
                sim.queues.get_mut(&id).expect("found above").stuck = true;
                if urgent {
                    sim.hurry(other, seq);
                }
                sim = wake.wait(sim).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let Some(span) = op.span.or_else(|| sim.span_now(id)) else { unreachable!("the queue has an operation") };
            let start = if urgent { span.start } else { span.start.max(due) };
            let now = monotonic_ns();
            if now < start {
                let left = Duration::from_nanos(start - now);
                sim = wake.wait_timeout(sim, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
        }
        let queue = sim.queues.get_mut(&id).expect("found above");
        queue.stuck = false;
        let mut op = queue.ops.pop_front().expect("looked at above");
        let fate = if lost { Fate::Fails } else { sim.fate(context, &op) };
        if fate == Fate::Hangs {
            drop(sim);
            hang();
        }
        let runs = fate == Fate::Runs;
        let (mut begin, mut copy_ns) = (0, 0);
        if let (Work::Foreign(foreign), false) = (&op.request.work, runs) {
            let (skip, data) = (foreign.skip, foreign.data);
            drop(sim);
            skip(data);
            sim = lock();
        } else if runs {
            drop(sim);
            begin = monotonic_ns();
            let span = op.span.get_or_insert_default();
            if let Work::Foreign(Foreign { run, data, .. }) = op.request.work {
                watched(op.request.call, "an operation", || span.end = run(data, span.start).max(span.start));
            } else if let Some(traffic) = op.request.traffic {
                let kernel = if let Traffic::Kernel(name) = traffic { name } else { "a copy" };
                let before = thread_cpu_ns();
                watched(op.request.call, kernel, || op.request.work.run());
                copy_ns = thread_cpu_ns() - before;
            } else {
                op.request.work.run();
            }
            sleep_until(span.end);
            sim = lock();
        }
        sim.complete(id, op, runs, begin);
        let cpu = thread_cpu_ns();
        sim.ledger.worked(copy_ns, cpu - cpu_ns);
        cpu_ns = cpu;
    }
}

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Runs,
    Fails,
    Hangs,
}

impl Sim {
    /// When an operation runs in the model's time, if there is a model; its link is booked.
    fn span(&mut self, device: usize, traffic: Option<Traffic>, submitted: u64, after: u64) -> Span {
        let at = |instant| Span { start: instant, end: instant, busy: 0 };
        match (&mut self.links, traffic) {
            (Some(links), Some(Traffic::In(bytes))) => links.book(device, Direction::In, bytes, submitted, after),
            (Some(links), Some(Traffic::Out(bytes))) => links.book(device, Direction::Out, bytes, submitted, after),
            (Some(_), _) => at(after.max(submitted)),
            (None, _) => Span::default(),
        }
    }

    /// When the operation at the head of a queue runs, now that all it waits for has ended: its link is booked. `None`
    /// without one.
    fn span_now(&mut self, id: QueueId) -> Option<Span> {
        let queue = self.queues.get(&id)?;
        let op = queue.ops.front()?;
        let (device, submitted, traffic) = (queue.device, op.submitted, op.request.traffic);
        let others = op.request.after.iter().filter_map(|(other, _)| self.queues.get(other)).map(|queue| queue.ended);
        let after = others.max().unwrap_or(0).max(queue.model_end);
        let span = self.span(device, traffic, submitted, after);
        let queue = self.queues.get_mut(&id)?;
        queue.model_end = span.end;
        queue.ops.front_mut()?.span = Some(span);
        Some(span)
    }

    /// It runs if everything that it touches is still there, and no test wants something else.
    fn fate(&mut self, context: Handle, op: &Op) -> Fate {
        let call = op.request.call;
        let copies = matches!(op.request.work, Work::Copy { .. });
        let kind = match op.request.traffic {
            // The other library's twin makes its own fail.
            None if matches!(op.request.work, Work::Foreign(_)) => "run:foreign",
            Some(Traffic::Kernel(_)) => "run:kernel",
            Some(_) if copies => "run:copy",
            _ => "run:other",
        };
        match self.faults.due(kind) {
            Some(due) if due.code == HANGS => return Fate::Hangs,
            Some(due) => {
                self.lose(context, due.code);
                return Fate::Fails;
            }
            None => {}
        }
        let device = op.request.device_uses.iter().find(|used| !self.memory.lives(**used));
        let problem = if let Some((start, _)) = device {
            Some(format!("device memory at {start:#x} was given back before this ran"))
        } else if let Some((start, _)) = op.request.host_uses.iter().find(|(start, id)| !self.host.lives(*start, *id)) {
            Some(format!("pinned memory at {start:#x} was given back before this ran"))
        } else if op.request.host_region.is_some_and(|region| !host_memory::is_mapped(region.start, region.span())) {
            Some("the memory of the host was unmapped before this ran".to_string())
        } else {
            let all = self.config.check > 1;
            let changed = op.request.source.zip(op.hash).filter(|(region, before)| hash(*region, all) != *before);
            if let Some((region, _)) = changed {
                let what = format!("source {:#x} changed while a copy was queued", region.start);
                self.violate(call, &what); // the copy goes on, with wrong bytes, as it would on a device
            }
            None
        };
        let Some(problem) = problem else { return Fate::Runs };
        self.violate(call, &problem);
        self.lose(context, ILLEGAL_ADDRESS);
        Fate::Fails
    }

    /// Writes down what an operation did and tells who waits for it.
    fn complete(&mut self, id: QueueId, op: Op, ran: bool, begin: u64) {
        for (start, used) in &op.request.device_uses {
            if let Some(range) = self.memory.get_mut(*start).filter(|range| range.id == *used) {
                range.uses -= 1;
            }
        }
        for (start, used) in &op.request.host_uses {
            if let Some(range) = self.host.get_mut(*start).filter(|range| range.id == *used) {
                range.uses -= 1;
            }
        }
        op.flights.iter().for_each(|flight| self.flights.remove(*flight));
        let span = op.span.unwrap_or_default();
        let end = if span.end > 0 { span.end } else { monotonic_ns() };
        match op.request.work {
            Work::Record(event) if ran => {
                if let Ok(event) = self.events.get_mut(event) {
                    event.time = Some((end, op.seq));
                }
            }
            Work::Free { start, id } if self.memory.lives((start, id)) => {
                if self.memory.get(start).is_some_and(|range| range.uses > 0) {
                    self.violate(op.request.call, "another stream still touches this memory");
                }
                self.remove_memory(op.request.call, start);
            }
            _ => {}
        }
        let Some(queue) = self.queues.get_mut(&id) else { return };
        queue.completed = op.seq;
        queue.ended = end;
        queue.model_end = queue.model_end.max(span.end);
        let device = queue.device;
        if ran && matches!(op.request.work, Work::Foreign(_)) {
            self.ledger.moved(Span { start: if span.start > 0 { span.start } else { begin }, end, busy: 0 });
        }
        if let Some(traffic) = op.request.traffic.filter(|_| ran) {
            let start = if span.start > 0 { span.start } else { begin };
            let strided = op.request.reads.into_iter().chain(op.request.writes).any(|region| region.rows > 1);
            let busy = if span.end > 0 { span.busy } else { end - start };
            self.ledger.copied(device, traffic, strided, Span { start, end, busy });
        }
        self.queues
            .values()
            .filter(|queue| queue.stuck)
            .filter_map(|queue| queue.wake.as_ref())
            .for_each(|wake| wake.notify_all());
        notify();
    }
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// Processor time of this thread, in nanoseconds.
pub(crate) fn thread_cpu_ns() -> u64 {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// What asking for that takes itself.
pub(crate) fn asking_ns() -> u64 {
    static ASKING: OnceLock<u64> = OnceLock::new();
    *ASKING.get_or_init(|| {
        let began = thread_cpu_ns();
        for _ in 0..255 {
            thread_cpu_ns();
        }
        (thread_cpu_ns() - began) / 256
    })
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure only.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// An absolute instant: how long the thread was kept from running does not add up.
fn sleep_until(end: u64) {
    while monotonic_ns() < end {
        let time = libc::timespec { tv_sec: (end / 1_000_000_000) as i64, tv_nsec: (end % 1_000_000_000) as i64 };
        // SAFETY: reads the structure only.
        unsafe {
            libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &time, std::ptr::null_mut());
        }
    }
}
