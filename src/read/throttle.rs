//! An engine that reads no faster than a given rate: for tests of back-pressure, and to leave a disk to others.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::{Engine, Next, Registrar, Request, Work};
use crate::error::Result;
use crate::limits;
use crate::sync::lock;

/// Wraps an engine and delays the requests that it gets so that it moves at most `bytes_per_second`, apart from the
/// first request of each thread.
#[derive(Debug)]
pub struct Throttled {
    engine: Arc<dyn Engine>,
    bytes_per_second: f64,
    /// When the next request may start.
    due: Mutex<Option<Instant>>,
}

impl Throttled {
    /// Limits `engine`; the rate is at least one byte per second.
    pub fn new(engine: Arc<dyn Engine>, bytes_per_second: u64) -> Throttled {
        Throttled { engine, bytes_per_second: bytes_per_second.max(1) as f64, due: Mutex::new(None) }
    }
}

// SAFETY: the engine inside answers for all of it; `Delayed` hands requests through as they are.
#[deny(clippy::missing_trait_methods)]
unsafe impl Engine for Throttled {
    fn name(&self) -> &'static str {
        self.engine.name()
    }

    fn threads(&self) -> usize {
        self.engine.threads()
    }

    fn alignment(&self) -> u64 {
        self.engine.alignment()
    }

    fn lends(&self) -> bool {
        self.engine.lends()
    }

    fn registrar(&self) -> Option<Arc<dyn Registrar>> {
        self.engine.registrar()
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        self.engine.run(&Delayed { work, throttle: self })
    }
}

struct Delayed<'a> {
    work: &'a dyn Work,
    throttle: &'a Throttled,
}

impl Delayed<'_> {
    /// How long until the next request may start.
    fn early(&self) -> Duration {
        lock(&self.throttle.due).map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()))
    }

    fn charge(&self, bytes: usize) {
        let share = Duration::from_secs_f64(bytes as f64 / self.throttle.bytes_per_second);
        let mut due = lock(&self.throttle.due);
        let now = Instant::now();
        // A little lateness is made up for: otherwise every pause of a busy machine would lower the rate.
        let earliest = now.checked_sub(limits::THROTTLE_CREDIT).unwrap_or(now);
        *due = Some(due.map_or(now, |due| due.max(earliest)) + share);
    }
}

#[deny(clippy::missing_trait_methods)]
impl Work for Delayed<'_> {
    fn next(&self, may_wait: bool) -> Next {
        loop {
            let early = self.early();
            if early.is_zero() || self.work.stopped() {
                break;
            }
            if !may_wait {
                return Next::Later;
            }
            thread::sleep(early.min(limits::THROTTLE_SLEEP));
        }
        let next = self.work.next(may_wait);
        if let Next::Request(request) = &next {
            self.charge(request.bytes);
        }
        next
    }

    fn stopped(&self) -> bool {
        self.work.stopped()
    }

    fn done(&self, request: Request, outcome: io::Result<usize>) {
        self.work.done(request, outcome);
    }

    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        // SAFETY: the same duties.
        unsafe { self.work.lent(request, mapping, keep) }
    }
}
