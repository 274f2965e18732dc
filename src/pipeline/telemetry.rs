//! What a load tells whoever subscribed to `tracing`: a span for the load, and events at its end. Nothing for each read, and
//! without a subscriber a branch for each of these.

use std::fmt::Display;

use tracing::field::Empty;
use tracing::{Span, debug, error, info, info_span, warn};

use super::Job;
use crate::error::{Error, ErrorKind};
use crate::extent::Rank;
use crate::observe::{Report, StageTime};
use crate::plan::Plan;

/// The span of a load of this plan, below that of its caller.
pub(crate) fn span(plan: &Plan) -> Span {
    let ranks = |driven: &[Rank]| driven.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    info_span!(
        "load",
        plan = format!("{:016x}", plan.digest()),
        model = %plan.checkpoint().path().display(),
        world = plan.world().size(),
        ranks = ranks(plan.world().driven()),
        engine = Empty,
        bytes = Empty,
        outcome = Empty,
        seconds = Empty,
    )
}

/// What was not known when the span began.
pub(super) fn begins(job: &Job) {
    let span = &job.setup.span;
    span.record("engine", job.setup.engine.name());
    span.record("bytes", job.totals.bytes);
}

/// A load that did not come to its end.
pub(crate) fn failed(span: &Span, error: &Error) {
    failed_by(span, error.kind(), error);
}

fn failed_by(span: &Span, kind: ErrorKind, why: &dyn Display) {
    match kind {
        ErrorKind::Cancelled => {
            span.record("outcome", "cancelled");
            info!(parent: span, "load cancelled");
        }
        kind => {
            span.record("outcome", "failed");
            error!(parent: span, kind = kind.name(), error = %why, "load failed");
        }
    }
}

/// The end of a load: its stages, and what came of it.
pub(super) fn ended(job: &Job, report: &Report) {
    let span = &job.setup.span;
    span.record("seconds", report.seconds);
    let Report { stages, storage_bytes_read, reads, landed_bytes, sent_bytes, received_bytes, .. } = report;
    let StageTime { busy, waiting } = stages.read;
    debug!(parent: span, stage = "read", busy, waiting, bytes = storage_bytes_read, reads, "stage");
    let StageTime { busy, waiting } = stages.copy;
    debug!(parent: span, stage = "copy", busy, waiting, bytes = landed_bytes, "stage");
    if sent_bytes + received_bytes > 0 {
        debug!(parent: span, stage = "exchange", sent_bytes, received_bytes, "stage");
    }
    if let Some((kind, why)) = job.failure() {
        return failed_by(span, kind, &why);
    }
    span.record("outcome", "loaded");
    let Report { seconds, engine, bottleneck, .. } = report;
    info!(parent: span, seconds, engine, read_bytes = storage_bytes_read, landed_bytes, bottleneck, "loaded");
}

/// What the caller did with the tensors that it was given.
pub(crate) fn consumed(span: &Span, StageTime { busy, waiting }: StageTime) {
    debug!(parent: span, stage = "consume", busy, waiting, "stage");
}

impl Job {
    /// Adds a warning to the report, once.
    pub(super) fn warn(&self, warning: String) {
        warn!(parent: &self.setup.span, "{warning}");
        self.counters.warn(warning);
    }
}
