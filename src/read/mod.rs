//! Engines: requests in, filled buffers out. Knows no devices.
//!
//! An engine is dumb on purpose: it reports how many bytes arrived. That short reads are continued, interrupted
//! ones repeated, and an early end noticed, is decided in one place above all engines.

mod auto;
#[cfg(test)]
mod conformance;
#[cfg(feature = "cuda")]
mod cufile;
mod mmap;
mod pread;
mod throttle;
#[cfg(target_os = "linux")]
mod uring;

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;

use crate::error::Result;
use crate::source::SourceFile;
use crate::stage::{Home, Slot};

pub(crate) use auto::{Choice, choose, choose_cold};
#[cfg(feature = "cuda")]
pub use cufile::{Cufile, CufileFacts, cufile_facts};
pub use mmap::Mmap;
pub use pread::Pread;
pub use throttle::Throttled;
#[cfg(target_os = "linux")]
pub use uring::Uring;

/// Which engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EngineChoice {
    /// The one that suits file system, page cache and size best.
    #[default]
    Auto,
    /// Copies out of memory-mapped files.
    Mmap,
    /// Buffered positional reads on several threads.
    Pread,
    /// io_uring, past the page cache where files allow it.
    Uring,
    /// NVIDIA's GPUDirect Storage: into memory of the one GPU that all ranks of the process are on.
    Cufile,
}

/// A way to read files. Every thread of a load that reads calls [`run`](Engine::run) once.
///
/// # Safety
/// Callers get what landed as initialised memory, and free it when the load is over. Therefore an engine
/// - reports only bytes that it has written, from the start of the buffer on: so many, and no more than the buffer has;
/// - hands every request back to the [`Work`] that it came from, and keeps none beyond [`run`](Engine::run), whichever
///   way that ends;
/// - lets nobody write to a buffer, a kernel or device included, whose request it has handed back or dropped.
pub unsafe trait Engine: Debug + Send + Sync {
    /// The name in reports.
    fn name(&self) -> &'static str;

    /// How many threads should call [`run`](Engine::run); no more than there are reads do.
    fn threads(&self) -> usize;

    /// What offsets and lengths of requests must be a multiple of: a power of two, at most
    /// [`limits::DIRECT_ALIGNMENT`](crate::limits::DIRECT_ALIGNMENT). Above 1 every read goes through a slot, because
    /// tensors start anywhere; requests may then reach past the end of the file.
    fn alignment(&self) -> u64 {
        1
    }

    /// Whether it can lend bytes from where they are instead of filling a buffer, so that a device copies them from
    /// there. Then some requests [ask for that](Request::asks_to_lend).
    fn lends(&self) -> bool {
        false
    }

    /// Makes slots known to what reads into them, if it reads into memory of a GPU rather than the host's: then every request
    /// is for a [slot there](Request::device_buffer), and all ranks of the process are on that one GPU, whose context is current
    /// on the threads of [`run`](Engine::run).
    fn registrar(&self) -> Option<Arc<dyn Registrar>> {
        None
    }

    /// Takes requests from `work` and completes each one exactly once, until there are no more. The thread has a CUDA
    /// context current between calls of `work`, which an engine that makes another one current leaves as it was.
    ///
    /// # Errors
    /// Only if the engine itself cannot go on; failed reads are reported through [`Work::done`].
    fn run(&self, work: &dyn Work) -> Result<()>;
}

/// Makes memory of a GPU known to what reads into it.
pub trait Registrar: Debug + Send + Sync {
    /// Makes `bytes` at an address of the GPU known, until what this returns is dropped; both with its context current.
    ///
    /// # Errors
    /// It is refused: then the memory is no slot.
    fn register(&self, address: u64, bytes: usize) -> Result<Box<dyn Any + Send + Sync>>;
}

/// Where an engine gets its requests from.
pub trait Work: Sync {
    /// The next request. With `may_wait` this waits for one, and never answers [`Next::Later`]; an engine that has
    /// requests in flight asks without and completes those first.
    fn next(&self, may_wait: bool) -> Next;

    /// Whether the load has ended early, so that a wrapper that waits should stop doing so.
    fn stopped(&self) -> bool;

    /// Takes a request back with the number of bytes that arrived at the start of its buffer.
    fn done(&self, request: Request, outcome: io::Result<usize>);

    /// Takes a request back that [asks to lend](Request::asks_to_lend): its bytes lie in a mapping of all of its file.
    ///
    /// # Safety
    /// `mapping` is the address of the file's first byte in memory that is readable, as long as the file was when it was
    /// opened and to the end of its last page, for as long as `keep` lives.
    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>);
}

/// The answer to [`Work::next`].
#[derive(Debug)]
pub enum Next {
    /// Read this.
    Request(Request),
    /// Nothing can start until a request in flight has completed.
    Later,
    /// There are no more. An engine with requests in flight asks again when one has come back: what a short read left
    /// is a request of its own.
    Finished,
}

/// One read: fill the buffer from `offset` of the file. The request owns its buffer until it is handed back.
#[derive(Debug)]
pub struct Request {
    pub(crate) id: u64,
    pub(crate) file: Arc<SourceFile>,
    pub(crate) offset: u64,
    pub(crate) address: *mut u8,
    pub(crate) bytes: usize,
    pub(crate) slot: Option<Slot>,
    /// Instead of a buffer: the right to pin what is lent.
    pub(crate) permit: Option<Box<dyn Any + Send>>,
    pub(crate) pending: Box<Pending>,
}

/// What the pipeline remembers of a request while it is in flight.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) op: crate::plan::ReadOp,
    /// File offset that the first byte of the (whole) buffer stands for.
    pub(crate) base: u64,
    /// Destinations of a direct read; the first is the one it lands in.
    pub(crate) pieces: Vec<crate::plan::Piece>,
    /// Of a read that other ranks want too, its number among those of this process.
    pub(crate) exchanged: Option<u64>,
    /// Room for the order in which pieces go to their devices.
    pub(crate) order: Vec<u64>,
    /// Whether the last attempt brought less than one aligned block.
    pub(crate) repeated: bool,
    /// When it last made progress: an interruption is none.
    pub(crate) since: std::time::Instant,
}

// SAFETY: the buffer belongs to the request alone (a slot that it holds, or a destination range that no other
// request of the load names), so it may move to and be written from any thread.
unsafe impl Send for Request {}

impl Request {
    /// The file.
    pub fn file(&self) -> &SourceFile {
        &self.file
    }

    /// The first byte of the file to read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the bytes are to be lent, through [`Work::lent`]. There is no buffer then.
    pub fn asks_to_lend(&self) -> bool {
        self.permit.is_some()
    }

    /// The number of bytes that are asked for, at least one.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the bytes go that a GPU's memory is read into: the address of the slot, which is
    /// [registered](Registrar::register), and the place in it. The next [`bytes`](Request::bytes) may be written.
    pub fn device_buffer(&self) -> Option<(u64, usize)> {
        let slot = self.slot.as_ref().filter(|slot| slot.home() == Home::Device)?;
        let start = slot.address().addr();
        Some((start as u64, self.address.addr() - start))
    }

    /// The buffer to fill, at least one byte long; none for a request that [asks to lend](Request::asks_to_lend), or has a
    /// [buffer on a device](Request::device_buffer).
    pub fn buffer(&mut self) -> &mut [MaybeUninit<u8>] {
        if self.permit.is_some() || self.device_buffer().is_some() {
            return &mut [];
        }
        // SAFETY: the pipeline makes requests only over memory that is writable for `bytes` bytes, lives until the
        // request came back (engines answer for bringing it back before `run` ends), and is named by no other request.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }
}

/// How many threads read by default: those that the machine grants this process, within bounds.
pub(crate) fn default_threads() -> usize {
    use crate::limits::{READ_THREADS_MAX, READ_THREADS_MIN};
    std::thread::available_parallelism().map_or(READ_THREADS_MIN, usize::from).clamp(READ_THREADS_MIN, READ_THREADS_MAX)
}
