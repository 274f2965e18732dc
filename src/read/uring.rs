//! io_uring: many large reads in flight from few threads, past the page cache (O_DIRECT) where the file system
//! allows it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use super::{Engine, Next, Request, Work};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::source::{Identity, SourceFile};

/// Reads through io_uring, one ring for each thread.
#[derive(Debug)]
pub struct Uring {
    threads: usize,
    depth: u32,
    direct: bool,
}

impl Uring {
    /// Rings of `depth` reads on this many threads; with `direct` past the page cache where files allow it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the system refuses io_uring (an old kernel, a container's filter, no locked
    /// memory).
    pub fn new(threads: usize, depth: u32, direct: bool) -> Result<Uring> {
        IoUring::new(depth.max(1)).map_err(|error| {
            Error::new(ErrorKind::Unsupported, format!("io_uring is refused: {error}")).with_source(error)
        })?;
        Ok(Uring { threads: threads.max(1), depth: depth.max(1), direct })
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "uring"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn alignment(&self) -> u64 {
        if self.direct { limits::DIRECT_ALIGNMENT } else { 1 }
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        let ring = IoUring::new(self.depth)
            .map_err(|error| Error::new(ErrorKind::Io, format!("io_uring is refused: {error}")).with_source(error))?;
        let requests = (0..self.depth).map(|_| None).collect();
        let mut flights = Flights { ring, requests, in_flight: 0, direct: HashMap::default() };
        loop {
            while flights.in_flight < flights.requests.len() {
                match work.next(flights.in_flight == 0) {
                    Next::Request(request) => flights.submit(request, self.direct)?,
                    Next::Later => break,
                    Next::Finished if flights.in_flight == 0 => return Ok(()),
                    Next::Finished => break,
                }
            }
            flights.reap(work)?;
        }
    }
}

/// A ring and the requests that the kernel has. The kernel may write to their buffers until they complete, so
/// dropping this waits for them.
struct Flights {
    ring: IoUring,
    requests: Vec<Option<Request>>,
    in_flight: usize,
    /// The descriptor to read each file with past the page cache; `None` where that is refused.
    direct: HashMap<Identity, Option<File>, foldhash::fast::FixedState>,
}

impl Flights {
    fn submit(&mut self, request: Request, direct: bool) -> Result<()> {
        let position = self.requests.iter().position(Option::is_none).expect("bug in shardlift: the ring is full");
        self.requests[position] = Some(request);
        self.in_flight += 1;
        self.push(position, direct)
    }

    fn push(&mut self, position: usize, direct: bool) -> Result<()> {
        let request = self.requests[position].as_mut().expect("bug in shardlift: no such request");
        let past_cache = if direct {
            let file: &SourceFile = &request.file;
            self.direct.entry(file.identity()).or_insert_with(|| file.open_direct().ok()).as_ref()
        } else {
            None
        };
        let descriptor = past_cache.map_or_else(|| request.file.file().as_raw_fd(), |file| file.as_raw_fd());
        let (offset, buffer) = (request.offset, request.buffer());
        // One completion counts at most i32::MAX bytes; buffers are slots and far smaller.
        let bytes = u32::try_from(buffer.len()).unwrap_or(1 << 30);
        let entry = opcode::Read::new(types::Fd(descriptor), buffer.as_mut_ptr().cast(), bytes)
            .offset(offset)
            .build()
            .user_data(position as u64);
        // SAFETY: the buffer belongs to the request, which stays in `requests` until its completion was seen (also
        // when this is dropped), and the descriptor is open for as long as the request's file or `direct` lives.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // Nothing was handed to the kernel: the request is free to be dropped.
            self.requests[position] = None;
            self.in_flight -= 1;
            return Err(Error::new(ErrorKind::Io, "the submission queue is full"));
        }
        Ok(())
    }

    /// Submits what was pushed, waits for at least one completion, and hands all back that there are.
    fn reap(&mut self, work: &dyn Work) -> Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(error) => return Err(Error::new(ErrorKind::Io, format!("io_uring: {error}")).with_source(error)),
        }
        while let Some((position, result)) = self.completed() {
            let refused = result == -libc::EINVAL || result == -libc::EOPNOTSUPP;
            let request = self.requests[position].as_ref().expect("bug in shardlift: a completion of nothing");
            let past_cache = self.direct.get(&request.file.identity()).is_some_and(Option::is_some);
            if refused && past_cache {
                // This file system opens files for O_DIRECT but does not read them: read it through the cache.
                self.direct.insert(request.file.identity(), None);
                self.push(position, true)?;
                continue;
            }
            let request = self.requests[position].take().expect("bug in shardlift: a completion of nothing");
            self.in_flight -= 1;
            let outcome = match usize::try_from(result) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(-result)),
            };
            work.done(request, outcome);
        }
        Ok(())
    }

    fn completed(&mut self) -> Option<(usize, i32)> {
        let entry = self.ring.completion().next()?;
        Some((entry.user_data() as usize, entry.result()))
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            let _ = self.ring.submit_and_wait(1);
            while let Some((position, _)) = self.completed() {
                self.requests[position] = None;
                self.in_flight -= 1;
            }
        }
    }
}
