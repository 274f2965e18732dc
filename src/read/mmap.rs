//! Copies out of guarded mappings: for those who ask for it. Warm it is no faster than reading into prepared memory, and
//! cold it is slower (`docs/performance.md`), so `auto` never chooses it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::{Engine, Next, Request, Work};
use crate::error::Result;
use crate::source::{Identity, Mapping};
use crate::sync::lock;

/// Copies out of memory-mapped files, or lends from them to devices that can copy from there themselves: to one load at a
/// time, because a driver registers a mapping once; what another load wants meanwhile is copied, which its report warns of.
/// A file that is cut short while it is mapped is an error, not a signal.
#[derive(Debug)]
pub struct Mmap {
    threads: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mappings: HashMap<Identity, Arc<Mapping>, foldhash::fast::FixedState>,
    /// Threads that read. With the last one the mappings go, for they keep files that were deleted.
    reading: usize,
}

/// A thread that reads.
struct Active<'a>(&'a Mmap);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let spare = {
            let mut state = lock(&self.0.state);
            state.reading -= 1;
            if state.reading == 0 { std::mem::take(&mut state.mappings) } else { HashMap::default() }
        };
        drop(spare); // with nothing locked
    }
}

impl Mmap {
    /// Copies on this many threads (at least one).
    pub fn new(threads: usize) -> Mmap {
        Mmap { threads: threads.max(1), state: Mutex::default() }
    }

    fn mapping(&self, request: &Request) -> Result<Arc<Mapping>> {
        let identity = request.file().identity();
        let mut state = lock(&self.state);
        if let Some(mapping) = state.mappings.get(&identity) {
            return Ok(Arc::clone(mapping));
        }
        let mapping = Arc::new(Mapping::new(request.file())?);
        state.mappings.insert(identity, Arc::clone(&mapping));
        Ok(mapping)
    }

    /// The mapping of a request's file with the request's pages in it; `None` if the file has not all of them.
    ///
    /// # Errors
    /// The system's; of storage that does not give a page which the file has.
    fn populated(&self, request: &Request) -> io::Result<Option<Arc<Mapping>>> {
        let (offset, bytes) = (request.offset(), there(request));
        if bytes == 0 {
            return Ok(None); // no page of the mapping, which must not be spoken of to the system
        }
        let mapping = self.mapping(request).map_err(io::Error::other)?;
        match mapping.populate(offset, bytes) {
            Ok(()) if !mapping.broken() => Ok(Some(mapping)),
            Ok(()) => request.file().without_page().map(|()| None),
            // EFAULT is how the system says that there is no such page, whatever the reason.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => request.file().without_page().map(|()| None),
            Err(error) => Err(error),
        }
    }

    fn read(&self, request: &mut Request) -> io::Result<usize> {
        let (offset, bytes) = (request.offset(), there(request));
        let Some(mapping) = self.populated(request)? else { return Ok(0) };
        // SAFETY: the range lies in the mapping, which the guard keeps readable also when the file shrinks; the
        // buffer belongs to the request and is no part of a mapping of ours.
        unsafe {
            let source = mapping.address().add(offset as usize);
            std::ptr::copy_nonoverlapping(source, request.buffer().as_mut_ptr().cast(), bytes);
        }
        if mapping.broken() { request.file().without_page().map(|()| 0) } else { Ok(bytes) }
    }
}

/// How many of the bytes that are asked for the file had when it was opened.
fn there(request: &Request) -> usize {
    let size = request.file().identity().size;
    request.bytes.min(size.saturating_sub(request.offset()) as usize)
}

// SAFETY: what is counted was copied; a request goes back before the next is taken.
unsafe impl Engine for Mmap {
    fn name(&self) -> &'static str {
        "mmap"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn lends(&self) -> bool {
        true
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        lock(&self.state).reading += 1;
        let _active = Active(self);
        while let Next::Request(mut request) = work.next(true) {
            if request.asks_to_lend() {
                match self.populated(&request) {
                    // SAFETY: a mapping of the whole file as it was when it was opened, which the handle keeps.
                    Ok(Some(mapping)) => unsafe { work.lent(request, mapping.address(), mapping) },
                    Ok(None) => work.done(request, Ok(0)),
                    Err(error) => work.done(request, Err(error)),
                }
                continue;
            }
            let outcome = self.read(&mut request);
            work.done(request, outcome);
        }
        Ok(())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs::OpenOptions;
    use std::time::Duration;

    use super::super::conformance::{LARGE, Read, SIZES, exercise, write};
    use super::*;

    /// A page that is gone, of a file that is as long as ever, stands for one that a disk does not give.
    #[test]
    fn a_page_that_storage_does_not_give_is_no_end_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = write(folder.path(), LARGE);
        let engine = Mmap::new(1);
        lock(&engine.state).reading += 1;
        let _active = Active(&engine);
        let mapping = Arc::new(Mapping::new(&file).unwrap());
        lock(&engine.state).mappings.insert(file.identity(), Arc::clone(&mapping));
        let outcome = || {
            let [done] = &exercise(&engine, vec![Read::new(LARGE, &file, 0, 4096)])[..] else { panic!("one request") };
            done.outcome.as_ref().map(|&bytes| bytes).map_err(|error| error.raw_os_error())
        };
        assert_eq!(outcome(), Ok(4096));
        let again = OpenOptions::new().write(true).open(file.path()).unwrap();
        let modified = again.metadata().unwrap().modified().unwrap();
        again.set_len(8192).unwrap();
        // SAFETY: it lies in the mapping, which its guard keeps readable.
        assert_eq!(unsafe { mapping.address().add(16384).read_volatile() }, 0);
        assert_eq!(outcome(), Ok(0));
        again.set_len(SIZES[LARGE]).unwrap();
        again.set_modified(modified + Duration::from_secs(1)).unwrap();
        assert_eq!(outcome(), Ok(0), "it is another file by now");
        again.set_modified(modified).unwrap();
        assert_eq!(outcome(), Err(Some(libc::EIO)));
    }
}
