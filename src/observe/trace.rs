//! What happened when: [`Trace`]. Recording takes no lock and no memory beyond a bound; off, it is one branch.

use std::cell::RefCell;
use std::fmt::Debug;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use super::chrome;
use crate::extent::{FileId, Rank};
use crate::limits;
use crate::sync::lock;

/// A timeline of loads, each of their threads and devices: give it to [`Loader::trace`](crate::Loader::trace), load, and
/// [write](Trace::write) it. Clones are handles to the same recording. `docs/trace.md` says how to read it.
///
/// Each thread records into memory of its own, which together is bounded by [`limits::TRACE_EVENTS`]; what comes after
/// that is [counted](Trace::dropped). Of each load that has events in it the plan is kept, for its names.
#[derive(Debug, Clone)]
pub struct Trace {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    origin: Instant,
    budget: Arc<Budget>,
    /// Those that recorded something.
    loads: Mutex<Vec<Arc<Recording>>>,
}

/// How much may still be recorded.
#[derive(Debug)]
struct Budget {
    chunks: AtomicUsize,
    dropped: AtomicU64,
}

impl Budget {
    /// The right to record one more chunk.
    fn take(&self) -> bool {
        let less = |chunks: usize| chunks.checked_sub(1);
        self.chunks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

impl Default for Trace {
    fn default() -> Trace {
        Trace::new()
    }
}

impl Trace {
    /// An empty recording, whose time 0 is now.
    pub fn new() -> Trace {
        Trace::of(limits::TRACE_EVENTS / limits::TRACE_CHUNK)
    }

    /// With room for so many chunks.
    pub(super) fn of(chunks: usize) -> Trace {
        let budget = Budget { chunks: AtomicUsize::new(chunks), dropped: AtomicU64::new(0) };
        let (budget, loads) = (Arc::new(budget), Mutex::default());
        Trace { shared: Arc::new(Shared { origin: Instant::now(), budget, loads }) }
    }

    /// Events that found no room any more.
    pub fn dropped(&self) -> u64 {
        self.shared.budget.dropped.load(Ordering::Relaxed)
    }

    /// Writes what was recorded so far as JSON, in the array format of Chrome's trace events, which
    /// <https://ui.perfetto.dev> opens. Loads may go on meanwhile.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: impl io::Write) -> io::Result<()> {
        let loads = lock(&self.shared.loads).clone();
        chrome::write(out, &loads, self.dropped())
    }

    /// The recording of one more load, which speaks of files, devices and tensors by these names.
    pub(crate) fn begin(&self, names: Box<dyn Names>) -> Arc<Recording> {
        let (trace, budget) = (Arc::downgrade(&self.shared), Arc::clone(&self.shared.budget));
        Arc::new(Recording { trace, origin: self.shared.origin, budget, tracks: Mutex::default(), names })
    }
}

/// What a recording writes instead of numbers.
pub(crate) trait Names: Debug + Send + Sync {
    fn file(&self, file: FileId) -> String;
    fn device(&self, device: usize) -> String;
    /// The name of a rank's destination.
    fn tensor(&self, rank: Rank, dest: u32) -> String;
}

/// What is recorded of one load.
#[derive(Debug)]
pub(crate) struct Recording {
    /// Where it is kept once it has recorded something; gone if nobody can write it any more.
    trace: Weak<Shared>,
    pub(super) origin: Instant,
    budget: Arc<Budget>,
    tracks: Mutex<Vec<Track>>,
    pub(super) names: Box<dyn Names>,
}

/// What one thread recorded.
#[derive(Debug)]
struct Track {
    thread: String,
    chunks: Vec<Arc<Chunk>>,
}

/// Room for some events of one thread, which alone writes there.
#[derive(Debug)]
struct Chunk {
    /// Events that are written.
    len: AtomicUsize,
    events: Box<[[AtomicU64; WORDS]]>,
}

/// Words of an event: begin, duration, bytes, offset, landed, and kind with number.
const WORDS: usize = 6;

impl Chunk {
    fn new() -> Chunk {
        let events = (0..limits::TRACE_CHUNK).map(|_| [const { AtomicU64::new(0) }; WORDS]).collect();
        Chunk { len: AtomicUsize::new(0), events }
    }
}

/// Where this thread records, and for which load.
struct Sink {
    /// Not kept alive: the thread may be the caller's.
    of: Weak<Recording>,
    /// Position in the tracks of the recording.
    track: usize,
    chunk: Arc<Chunk>,
    used: usize,
}

thread_local! {
    static SINK: RefCell<Option<Sink>> = const { RefCell::new(None) };
}

impl Recording {
    /// Records what this thread did, or saw.
    pub(crate) fn span(self: &Arc<Recording>, event: Event, began: Instant, ended: Instant) {
        let ns = |from: Instant, to: Instant| to.saturating_duration_since(from).as_nanos() as u64;
        let Event { kind, number, bytes, offset, landed } = event;
        let kind = u64::from(number) << 32 | kind as u64;
        let words = [ns(self.origin, began), ns(began, ended), bytes, offset, landed, kind];
        // A thread whose locals are gone ends.
        let _ = SINK.try_with(|sink| {
            let mut sink = sink.borrow_mut();
            match &mut *sink {
                Some(sink) if sink.used < limits::TRACE_CHUNK && sink.is_of(self) => sink.push(words),
                _ if !self.budget.take() => _ = self.budget.dropped.fetch_add(1, Ordering::Relaxed),
                sink => self.more(sink).push(words),
            }
        });
    }

    /// Records what ends now.
    pub(crate) fn since(self: &Arc<Recording>, event: Event, began: Instant) {
        self.span(event, began, Instant::now());
    }

    /// Records a wait, if it was one.
    pub(crate) fn unless_short(self: &Arc<Recording>, event: Event, began: Instant, ended: Instant) {
        if ended.saturating_duration_since(began) >= limits::TRACE_WAIT_MIN {
            self.span(event, began, ended);
        }
    }

    /// Gives this thread room for more events, for which there is a budget.
    #[cold]
    fn more<'a>(self: &Arc<Recording>, sink: &'a mut Option<Sink>) -> &'a mut Sink {
        let chunk = Arc::new(Chunk::new());
        let mut tracks = lock(&self.tracks);
        if tracks.is_empty()
            && let Some(trace) = self.trace.upgrade()
        {
            lock(&trace.loads).push(Arc::clone(self));
        }
        let track = match sink {
            Some(sink) if sink.is_of(self) => sink.track,
            _ => {
                let thread = std::thread::current().name().unwrap_or("caller").to_owned();
                tracks.push(Track { thread, chunks: Vec::new() });
                tracks.len() - 1
            }
        };
        tracks[track].chunks.push(Arc::clone(&chunk));
        sink.insert(Sink { of: Arc::downgrade(self), track, chunk, used: 0 })
    }

    /// The threads that recorded something, by name, with their events in the order in which they ended.
    pub(super) fn tracks(&self) -> Vec<(String, Vec<Recorded>)> {
        let tracks = lock(&self.tracks);
        let events = |track: &Track| track.chunks.iter().flat_map(|chunk| chunk.recorded()).collect();
        tracks.iter().map(|track| (track.thread.clone(), events(track))).collect()
    }
}

impl Sink {
    fn is_of(&self, recording: &Arc<Recording>) -> bool {
        std::ptr::eq(self.of.as_ptr(), Arc::as_ptr(recording))
    }

    fn push(&mut self, words: [u64; WORDS]) {
        for (to, word) in self.chunk.events[self.used].iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
        self.used += 1;
        // Whoever sees this sees the words before it.
        self.chunk.len.store(self.used, Ordering::Release);
    }
}

impl Chunk {
    fn recorded(&self) -> impl Iterator<Item = Recorded> {
        self.events[..self.len.load(Ordering::Acquire)].iter().map(|event| {
            let word = |at: usize| event[at].load(Ordering::Relaxed);
            let (kind, number) = (Kind::ALL[word(5) as u32 as usize], (word(5) >> 32) as u32);
            let event = Event { kind, number, bytes: word(2), offset: word(3), landed: word(4) };
            Recorded { event, start: word(0), end: word(0) + word(1) }
        })
    }
}

/// What happened; what of the fields means something depends on the kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub(crate) kind: Kind,
    /// Of the file, device or rank.
    pub(crate) number: u32,
    pub(crate) bytes: u64,
    /// In the file; for a [tensor](Kind::Tensor) the destination, for a [transfer](Kind::Transfer) its kernels.
    pub(crate) offset: u64,
    /// Bytes that were in their destination after it.
    pub(crate) landed: u64,
}

impl Event {
    /// Something of which nothing else is known.
    pub(crate) fn of(kind: Kind) -> Event {
        Event { kind, number: 0, bytes: 0, offset: 0, landed: 0 }
    }
}

/// An event with its times, in nanoseconds from the trace's begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recorded {
    pub(super) event: Event,
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Devices get their contexts.
    Devices,
    /// Destinations get their memory.
    Allocate,
    /// Devices get their queues.
    Queues,
    /// A file is opened and compared.
    Open,
    /// A read that an engine has.
    Read,
    /// A read that the load no longer waits for.
    Stalled,
    /// A reading thread has no slot.
    WaitForSlot,
    /// A slot or window is pinned.
    Pin,
    /// A device makes its kernels ready.
    Kernels,
    /// Bytes are put in place by the thread that has them.
    Copy,
    /// The same, for places that no tensor fills.
    Fill,
    /// Copies are handed to a device.
    Submit,
    /// Another thread does so.
    WaitForQueue,
    /// What a device copies, from when it was submitted until somebody saw it done.
    Transfer,
    /// A destination is complete.
    Tensor,
    /// The caller waits for a tensor.
    WaitForTensor,
    /// Files are compared with what they were.
    Verify,
}

impl Kind {
    const ALL: [Kind; 17] = [
        Kind::Devices,
        Kind::Allocate,
        Kind::Queues,
        Kind::Open,
        Kind::Read,
        Kind::Stalled,
        Kind::WaitForSlot,
        Kind::Pin,
        Kind::Kernels,
        Kind::Copy,
        Kind::Fill,
        Kind::Submit,
        Kind::WaitForQueue,
        Kind::Transfer,
        Kind::Tensor,
        Kind::WaitForTensor,
        Kind::Verify,
    ];
}
