//! A stream for operations of other libraries, which take it by its handle.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::context::Context;
use super::driver::{self, RawStream};
use crate::error::Result;
use crate::limits;

/// A stream that waits for no other. Dropping it lets what is queued run to its end, and does not wait for that.
#[derive(Debug)]
pub(crate) struct CudaStream {
    context: Arc<Context>,
    raw: RawStream,
}

// SAFETY: a handle of the driver, which may be used from every thread; each method enters the context.
unsafe impl Send for CudaStream {}
// SAFETY: as above.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    pub(super) fn new(context: &Arc<Context>) -> Result<CudaStream> {
        // SAFETY: the context is current.
        let raw = context.with(|| unsafe { driver::create_stream() })?;
        Ok(CudaStream { context: Arc::clone(context), raw })
    }

    /// The driver's handle, as a number.
    pub(crate) fn handle(&self) -> usize {
        self.raw.expose_provenance()
    }

    /// Whether all that was queued has run.
    pub(crate) fn is_done(&self) -> Result<bool> {
        // SAFETY: the stream is live, the context current.
        self.context.with(|| unsafe { driver::stream_is_done(self.raw) })
    }

    /// Waits until all that was queued has run, for at most so long; whether it has.
    pub(crate) fn settle(&self, bound: Duration) -> Result<bool> {
        let began = Instant::now();
        loop {
            match self.is_done()? {
                false if began.elapsed() < bound => thread::sleep(limits::EVENT_POLL),
                done => return Ok(done),
            }
        }
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        // SAFETY: the stream is live, and not used again.
        self.context.give_back(|| unsafe { driver::destroy_stream(self.raw) });
    }
}
