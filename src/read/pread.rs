//! Buffered positional reads on several threads: the engine that works everywhere.

use std::io;
use std::mem::MaybeUninit;

use super::{Engine, Next, Work};
use crate::error::Result;
use crate::source::SourceFile;

/// Buffered positional reads.
#[derive(Debug)]
pub struct Pread {
    threads: usize,
}

impl Pread {
    /// Reads on this many threads (at least one).
    pub fn new(threads: usize) -> Pread {
        Pread { threads: threads.max(1) }
    }
}

// SAFETY: `pread` counts what it wrote; a request goes back before the next is taken.
unsafe impl Engine for Pread {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        run(work)
    }
}

/// Reads one request after the other.
pub(super) fn run(work: &dyn Work) -> Result<()> {
    while let Next::Request(mut request) = work.next(true) {
        let offset = request.offset();
        let file = std::sync::Arc::clone(&request.file);
        let outcome = read_at(&file, request.buffer(), offset);
        work.done(request, outcome);
    }
    Ok(())
}

/// One `pread`: how many bytes arrived.
fn read_at(file: &SourceFile, buffer: &mut [MaybeUninit<u8>], offset: u64) -> io::Result<usize> {
    let (filled, _) = rustix::io::pread(file.file(), buffer, offset)?;
    Ok(filled.len())
}
