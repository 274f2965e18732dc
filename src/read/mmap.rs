//! Copies out of guarded mappings: for those who ask for it. Warm it is no faster than reading into prepared memory, and
//! cold it is slower (`docs/performance.md`), so `auto` never chooses it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::{Engine, Next, Request, Work};
use crate::error::Result;
use crate::source::{Identity, Mapping};
use crate::sync::lock;

/// Copies out of memory-mapped files. A file that is cut short while it is mapped is an error, not a signal.
#[derive(Debug)]
pub struct Mmap {
    threads: usize,
    mappings: Mutex<HashMap<Identity, Arc<Mapping>, foldhash::fast::FixedState>>,
}

impl Mmap {
    /// Copies on this many threads (at least one).
    pub fn new(threads: usize) -> Mmap {
        Mmap { threads: threads.max(1), mappings: Mutex::default() }
    }

    fn mapping(&self, request: &Request) -> Result<Arc<Mapping>> {
        let identity = request.file().identity();
        let mut mappings = lock(&self.mappings);
        if let Some(mapping) = mappings.get(&identity) {
            return Ok(Arc::clone(mapping));
        }
        let mapping = Arc::new(Mapping::new(request.file())?);
        mappings.insert(identity, Arc::clone(&mapping));
        Ok(mapping)
    }

    fn read(&self, request: &mut Request) -> io::Result<usize> {
        let size = request.file().identity().size;
        let offset = request.offset();
        let bytes = request.bytes.min(size.saturating_sub(offset) as usize);
        if bytes == 0 {
            return Ok(0); // no page of the mapping, which must not be spoken of to the system
        }
        let mapping = self.mapping(request).map_err(io::Error::other)?;
        if let Err(error) = mapping.populate(offset, bytes) {
            // EFAULT is how the system says that storage has no such page.
            return if error.raw_os_error() == Some(libc::EFAULT) { Ok(0) } else { Err(error) };
        }
        // SAFETY: the range lies in the mapping, which the guard keeps readable also when the file shrinks; the
        // buffer belongs to the request and is no part of a mapping of ours.
        unsafe {
            let source = mapping.address().add(offset as usize);
            std::ptr::copy_nonoverlapping(source, request.buffer().as_mut_ptr().cast(), bytes);
        }
        if mapping.broken() { Ok(0) } else { Ok(bytes) }
    }
}

// SAFETY: what is counted was copied; a request goes back before the next is taken.
unsafe impl Engine for Mmap {
    fn name(&self) -> &'static str {
        "mmap"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        while let Next::Request(mut request) = work.next(true) {
            let outcome = self.read(&mut request);
            work.done(request, outcome);
        }
        Ok(())
    }
}
