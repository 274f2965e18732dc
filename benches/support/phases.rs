//! How long the library's spans last, for benches that ask which part of an operation takes its time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Calls `run`, and tells the seconds between entering and leaving each of its spans, in the order in which they were
/// left. Spans of other threads do not count.
pub(crate) fn of<T>(run: impl FnOnce() -> T) -> (T, Vec<(&'static str, f64)>) {
    let clock = Clock::default();
    let spans = Arc::clone(&clock.0);
    let result = tracing::subscriber::with_default(clock, run);
    let spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
    (result, spans.iter().map(|span| (span.name, span.seconds)).collect())
}

/// An id is a position in the list, counted from 1.
#[derive(Default)]
struct Clock(Arc<Mutex<Vec<Span>>>);

struct Span {
    name: &'static str,
    entered: Instant,
    seconds: f64,
}

impl Clock {
    fn with<T>(&self, see: impl FnOnce(&mut Vec<Span>) -> T) -> T {
        see(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Subscriber for Clock {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let span = Span { name: span.metadata().name(), entered: Instant::now(), seconds: 0.0 };
        self.with(|spans| {
            spans.push(span);
            Id::from_u64(spans.len() as u64)
        })
    }

    fn enter(&self, id: &Id) {
        self.with(|spans| spans[id.into_u64() as usize - 1].entered = Instant::now());
    }

    fn exit(&self, id: &Id) {
        self.with(|spans| {
            let span = &mut spans[id.into_u64() as usize - 1];
            span.seconds += span.entered.elapsed().as_secs_f64();
        });
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}
}
