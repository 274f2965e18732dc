//! An engine that reads no faster than a given rate: for tests of back-pressure, and to leave a disk to others.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::{Engine, Next, Request, Work};
use crate::error::Result;
use crate::limits;
use crate::sync::lock;

/// Wraps an engine and delays its completions so that it moves at most `bytes_per_second`.
#[derive(Debug)]
pub struct Throttled {
    engine: Arc<dyn Engine>,
    bytes_per_second: f64,
    /// When the bytes that were let through so far may have arrived.
    due: Mutex<Option<Instant>>,
}

impl Throttled {
    /// Limits `engine`; the rate is at least one byte per second.
    pub fn new(engine: Arc<dyn Engine>, bytes_per_second: u64) -> Throttled {
        Throttled { engine, bytes_per_second: bytes_per_second.max(1) as f64, due: Mutex::new(None) }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Engine for Throttled {
    fn name(&self) -> &'static str {
        self.engine.name()
    }

    fn threads(&self) -> usize {
        self.engine.threads()
    }

    fn alignment(&self) -> u64 {
        self.engine.alignment()
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        self.engine.run(&Delayed { work, throttle: self })
    }
}

struct Delayed<'a> {
    work: &'a dyn Work,
    throttle: &'a Throttled,
}

#[deny(clippy::missing_trait_methods)]
impl Work for Delayed<'_> {
    fn next(&self, may_wait: bool) -> Next {
        self.work.next(may_wait)
    }

    fn stopped(&self) -> bool {
        self.work.stopped()
    }

    fn done(&self, request: Request, outcome: io::Result<usize>) {
        if let Ok(bytes) = outcome {
            let mut due = lock(&self.throttle.due);
            let now = Instant::now();
            let share = Duration::from_secs_f64(bytes as f64 / self.throttle.bytes_per_second);
            let until = due.map_or(now, |due| due.max(now)) + share;
            *due = Some(until);
            drop(due);
            while Instant::now() < until && !self.work.stopped() {
                thread::sleep(limits::THROTTLE_SLEEP.min(until - Instant::now().min(until)));
            }
        }
        self.work.done(request, outcome);
    }
}
