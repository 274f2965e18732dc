//! NVIDIA's GPUDirect Storage: from storage into memory of a GPU, through no memory of the host. Knows no devices: a slot is
//! an address, and a context is current.

mod driver;
mod library;
#[cfg(test)]
pub(super) mod tests;

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::library::{Library, RawHandle};
use super::{Engine, Next, Registrar, Request, Work};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::observe::Direct;
use crate::source::{Identity, SourceFile};
use crate::sync::lock;

/// Reads through cuFile into registered slots in the memory of a GPU, always whole blocks of a file opened with O_DIRECT: what
/// is not aligned or not registered the library would pass through buffers of its own. Each of its threads waits for one read.
#[derive(Debug)]
pub struct Cufile {
    threads: usize,
    library: Library,
    direct: Direct,
    /// By file, the one wanted first in front.
    handles: Mutex<VecDeque<(Identity, Entry)>>,
}

/// A file's handle, once it is registered; locked by whoever does that.
type Entry = Arc<Mutex<Option<Arc<Handle>>>>;

impl Cufile {
    /// Reads on this many threads (at least one). The first that is made in a process opens cuFile's driver, which takes
    /// seconds, and waits for that for at most `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if there is no cuFile or its driver does not open, [`ErrorKind::Stalled`] if it takes longer.
    pub fn new(threads: usize, deadline: Duration) -> Result<Cufile> {
        let (library, direct) = driver::open(deadline)?;
        Ok(Cufile { threads: threads.max(1), library, direct, handles: Mutex::default() })
    }

    /// Whether its reads are known to pass through no memory of the host.
    pub fn direct(&self) -> Direct {
        self.direct
    }

    /// Whether it can read this file at all, as far as can be known without reading.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with cuFile's reason, or the system's where it does not open past the page cache.
    pub(crate) fn try_out(&self, file: &Arc<SourceFile>) -> Result<()> {
        self.handle(file).map(drop).map_err(|error| error.with_file(file.path()))
    }

    /// The handle of a request's file, registered if it is not yet.
    fn handle(&self, file: &Arc<SourceFile>) -> Result<Arc<Handle>> {
        let (entry, spare) = self.entry(file.identity());
        // Deregistered with nothing locked, and registered with no other file's entry: either may take its time.
        drop(spare);
        let mut registered = lock(&entry);
        if let Some(handle) = &*registered {
            return Ok(Arc::clone(handle));
        }
        let direct = file.direct(limits::DIRECT_ALIGNMENT).ok_or_else(|| match file.open_direct() {
            Ok(_) => {
                Error::new(ErrorKind::Unsupported, "the file takes no O_DIRECT reads, or wants a larger alignment")
            }
            Err(error) => error,
        })?;
        // SAFETY: the handle keeps the file, which stays open as long as that.
        let raw = unsafe { self.library.register_file(direct.as_fd()) };
        let raw = raw.map_err(|failure| Error::new(ErrorKind::Unsupported, failure.to_string()))?;
        Ok(Arc::clone(registered.insert(Arc::new(Handle { library: self.library, raw, _file: Arc::clone(file) }))))
    }

    /// The entry of a file, and another one's that made room for it.
    fn entry(&self, identity: Identity) -> (Entry, Option<Entry>) {
        let mut handles = lock(&self.handles);
        if let Some((_, entry)) = handles.iter().find(|(of, _)| *of == identity) {
            return (Arc::clone(entry), None);
        }
        let entry = Entry::default();
        handles.push_back((identity, Arc::clone(&entry)));
        let spare = if handles.len() > limits::OPEN_FILES { handles.pop_front() } else { None };
        (entry, spare.map(|(_, entry)| entry))
    }

    fn read(&self, request: &Request) -> io::Result<usize> {
        let Some((slot, place)) = request.device_buffer() else {
            return Err(io::Error::other("engine cufile reads into memory of a GPU only"));
        };
        // The file is named by whoever tells of the read.
        let handle = self.handle(&request.file).map_err(|error| io::Error::other(error.message().to_owned()))?;
        let (bytes, offset) = (request.bytes(), request.offset());
        // Not asked of cuFile, which says nothing of what is behind the end.
        if offset >= request.file().identity().size {
            return Ok(0);
        }
        // SAFETY: a slot is registered for as long as it lives, and the request's alone; its GPU's context is current on
        // threads of engines with a registrar.
        unsafe { self.library.read(handle.raw, slot, place, bytes, offset) }
    }
}

// SAFETY: cuFile counts what it wrote, and `cuFileRead` returns when that is done; a request goes back before the next is taken.
unsafe impl Engine for Cufile {
    fn name(&self) -> &'static str {
        "cufile"
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn alignment(&self) -> u64 {
        limits::DIRECT_ALIGNMENT
    }

    fn registrar(&self) -> Option<Arc<dyn Registrar>> {
        Some(Arc::new(Buffers(self.library)))
    }

    fn run(&self, work: &dyn Work) -> Result<()> {
        while let Next::Request(request) = work.next(true) {
            let outcome = self.read(&request);
            work.done(request, outcome);
        }
        Ok(())
    }
}

/// A registered file, which stays open.
#[derive(Debug)]
struct Handle {
    library: Library,
    raw: RawHandle,
    _file: Arc<SourceFile>,
}

// SAFETY: cuFile's handles may be used from every thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: registered, and every read held the handle.
        unsafe { self.library.deregister_file(self.raw) };
    }
}

/// Registers slots.
#[derive(Debug)]
struct Buffers(Library);

impl Registrar for Buffers {
    fn register(&self, address: u64, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        self.0.register_memory(address, bytes)?;
        Ok(Box::new(Registered { library: self.0, address }))
    }
}

/// Memory that is registered with cuFile.
#[derive(Debug)]
struct Registered {
    library: Library,
    address: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered when this was made, and whoever read into it held the slot.
        if let Err(failure) = unsafe { self.library.deregister_memory(self.address) } {
            tracing::warn!("{failure}");
        }
    }
}

/// What there is of cuFile on this machine, without opening its driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CufileFacts {
    /// For instance (1, 14), if the library says it.
    pub version: Option<(u32, u32)>,
    /// Whether reads would be known to pass through no memory of the host, because the library can be told to fail instead.
    pub direct: Direct,
}

/// The cuFile of this machine, which is loaded.
///
/// # Errors
/// [`ErrorKind::Device`] if there is none.
pub fn cufile_facts() -> Result<CufileFacts> {
    let library = Library::load()?;
    let direct = if library.can_forbid_compat() { Direct::Known } else { Direct::Unknown };
    Ok(CufileFacts { version: library.version(), direct })
}
