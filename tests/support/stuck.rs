//! An engine that takes requests and does not come back with them for a while.

use std::thread;
use std::time::Duration;

use shardlift::Result;
use shardlift::read::{Engine, Next, Work};

/// Keeps each request for this long and then brings nothing.
#[derive(Debug)]
pub(crate) struct Stuck(pub(crate) Duration);

// SAFETY: reports no bytes, and keeps no request.
unsafe impl Engine for Stuck {
    fn name(&self) -> &'static str {
        "stuck"
    }
    fn threads(&self) -> usize {
        2
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        while let Next::Request(request) = work.next(true) {
            thread::sleep(self.0);
            work.done(request, Ok(0));
        }
        Ok(())
    }
}
