//! Single requests that every engine passes: one list, and a test for each engine that runs it.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use super::{Engine, Mmap, Next, Pending, Pread, Request, Throttled, Work};
use crate::extent::{Extent, FileId};
use crate::plan::ReadOp;
use crate::source::SourceFile;
use crate::stage::{Lend, Ring};

/// Everything that is asked of an engine.
pub(super) fn conforms(engine: &dyn Engine) {
    let folder = tempfile::tempdir().unwrap();
    nothing_to_do_ends_at_once(engine);
    reads(engine, folder.path());
    dependent_requests(engine, folder.path());
    requests_beyond_the_end(engine, folder.path());
    a_file_cut_short(engine, folder.path());
    #[cfg(target_os = "linux")]
    a_file_that_cannot_be_read(engine, folder.path());
}

#[test]
fn pread() {
    for threads in [1, 3] {
        conforms(&Pread::new(threads));
    }
}

#[test]
fn mmap() {
    for threads in [1, 3] {
        conforms(&Mmap::new(threads));
    }
}

#[test]
fn throttled() {
    for threads in [1, 3] {
        conforms(&Throttled::new(Arc::new(Pread::new(threads)), 1 << 30));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn uring() {
    // The kernel has no rings of the last depth.
    for (threads, depth) in [(1, 1), (1, 8), (3, 4), (1, 40_000)] {
        for direct in [false, true] {
            let Some(engine) = ring(threads, depth, direct) else { return };
            conforms(&engine);
        }
    }
}

/// tmpfs and the file systems of the kernel itself refuse O_DIRECT, or take it and read through the cache all the same.
#[cfg(target_os = "linux")]
#[test]
fn uring_reads_through_the_cache_where_it_must() {
    let Some(engine) = ring(1, 4, true) else { return };
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => reads(&engine, folder.path()),
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        Err(error) => eprintln!("SKIPPED: reads of a file in /dev/shm: {error}"),
    }
    let version = std::fs::read("/proc/version").unwrap();
    let file = Arc::new(SourceFile::open("/proc/version").unwrap());
    assert!(file.open_direct().is_err(), "/proc takes O_DIRECT: this tests nothing");
    let [done] = &exercise(&engine, vec![Read::new(0, &file, 0, 4096)])[..] else { panic!("one request") };
    assert_eq!((done.count(), done.head()), (version.len(), &version[..]));
}

#[cfg(target_os = "linux")]
#[test]
fn uring_reads_refused_in_flight_all_go_through_the_cache() {
    // What is not aligned is refused at the read, not when the file is opened (where the file system is one like ext4).
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), LARGE);
    let Some(engine) = ring(1, 4, true) else { return };
    for count in 1..=4 {
        let list = (0..count).map(|id| Read::new(LARGE, &file, 1 + 5000 * id, 100)).collect();
        for done in exercise(&engine, list) {
            done.holds_the_file(SIZES[LARGE]);
        }
    }
}

/// io_uring, where the system has it: filters of containers refuse it.
#[cfg(target_os = "linux")]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn ring(threads: usize, depth: u32, direct: bool) -> Option<super::Uring> {
    match super::Uring::new(threads, depth, direct) {
        Ok(engine) => Some(engine),
        // Whether there are rings does not depend on how deep they are, but for the memory of the deepest.
        Err(error) if depth == 1 || error.to_string().contains("memory") => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => ring(threads, 1, direct).map(|_| panic!("depth {depth}: {error}")),
    }
}

fn nothing_to_do_ends_at_once(engine: &dyn Engine) {
    assert!(exercise(engine, Vec::new()).is_empty());
}

/// Reads of every size and place, of several files, in random order, more than fit into the ring or the engine's depth:
/// into slots, and where the engine needs no alignment straight into memory.
fn reads(engine: &dyn Engine, folder: &Path) {
    let files: Vec<_> = (0..SIZES.len()).map(|file| write(folder, file)).collect();
    let mut random = 1;
    let mut list = Vec::new();
    for (file, &size) in SIZES.iter().enumerate() {
        // The whole file; its first, middle and last byte; what surrounds each boundary of a page; anything.
        list.extend([(file, 0, size), (file, 0, 1), (file, size / 2, 1), (file, size - 1, 1)]);
        for page in (4096..size).step_by(4096).take(4) {
            list.extend([(file, page - 1, 2), (file, page, 1), (file, page - 100, 4096 + 200)]);
        }
        for _ in 0..12 {
            let offset = next(&mut random) % size;
            list.push((file, offset, 1 + next(&mut random) % (size - offset)));
        }
    }
    for at in (1..list.len()).rev() {
        list.swap(at, next(&mut random) as usize % (at + 1));
    }
    let list: Vec<_> = list
        .into_iter()
        .enumerate()
        .map(|(id, (file, offset, bytes))| {
            let (offset, bytes) = aligned(engine, offset, bytes.min(SIZES[file] - offset));
            Read { direct: engine.alignment() == 1 && id % 2 == 0, ..Read::new(file, &files[file], offset, bytes) }
        })
        .collect();
    let asked = list.len();
    let done = exercise(engine, list);
    assert_eq!(done.len(), asked);
    for done in &done {
        done.holds_the_file(SIZES[done.read.number]);
    }
}

/// Each request may only start when the one before has come back: the engine hears `Later`, and must neither wait for
/// more work with requests in flight nor ask again before one has completed.
fn dependent_requests(engine: &dyn Engine, folder: &Path) {
    let file = write(folder, LARGE);
    for together in [1, 3] {
        let list = (0..24)
            .map(|id| {
                let (offset, bytes) = aligned(engine, id * 5000, 6000);
                Read { after: (id / together * together).checked_sub(1), ..Read::new(LARGE, &file, offset, bytes) }
            })
            .collect();
        let done = exercise(engine, list);
        assert_eq!(done.len(), 24);
        for done in &done {
            done.holds_the_file(SIZES[LARGE]);
        }
    }
}

/// Requests that reach past the end get what there is, those behind it nothing.
fn requests_beyond_the_end(engine: &dyn Engine, folder: &Path) {
    let mut list = Vec::new();
    let files: Vec<_> = (0..SIZES.len()).map(|file| write(folder, file)).collect();
    for (number, file) in files.iter().enumerate() {
        let size = SIZES[number];
        let (last, _) = aligned(engine, size - 1, 1);
        let (behind, _) = aligned(engine, size + engine.alignment() - 1, 1);
        for (offset, bytes) in
            [(last, 16384), (0, size + 8192), (behind, 4096), (behind + 4096, 4096), (behind + (1 << 40), 8192)]
        {
            let (_, bytes) = aligned(engine, 0, bytes);
            list.push(Read::new(number, file, offset, bytes));
        }
    }
    for done in exercise(engine, list) {
        done.holds_the_file(SIZES[done.read.number]);
    }
}

/// A file that is cut short after it was opened ends where it ends now. An engine that maps may notice it by the page
/// and then give nothing at all; one that opens it once more, for cuFile, that it changed.
fn a_file_cut_short(engine: &dyn Engine, folder: &Path) {
    for left in [0, 8192] {
        let file = write(folder, LARGE);
        std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(left).unwrap();
        let list = [0, 4096, 8192, 65536].map(|offset| Read::new(LARGE, &file, offset, 4096)).into();
        for done in exercise(engine, list) {
            if engine.registrar().is_some() && done.outcome.is_err() {
                continue;
            }
            match done.count() {
                0 => assert!(done.read.offset >= left || engine.name() == "mmap", "{done:?}"),
                _ => done.holds_the_file(left),
            }
        }
    }
}

/// The system's error goes to the request that met it; the engine goes on with the others.
#[cfg(target_os = "linux")]
fn a_file_that_cannot_be_read(engine: &dyn Engine, folder: &Path) {
    // A regular file by its type; no process has memory at address 0.
    let bad = Arc::new(SourceFile::open("/proc/self/mem").unwrap());
    let good = write(folder, LARGE);
    let list = (0..12).map(|id| Read::new(LARGE, if id % 3 == 1 { &bad } else { &good }, 4096 * id, 4096)).collect();
    for done in exercise(engine, list) {
        match done.read.file.path() == bad.path() {
            // A mapping never goes beyond the size, which is 0.
            true => assert!(done.outcome.is_err() || (engine.name() == "mmap" && done.count() == 0), "{done:?}"),
            false => done.holds_the_file(SIZES[LARGE]),
        }
    }
}

/// The range as the pipeline would ask for it: on the engine's alignment.
fn aligned(engine: &dyn Engine, offset: u64, bytes: u64) -> (u64, u64) {
    let alignment = engine.alignment();
    let start = offset / alignment * alignment;
    (start, (offset + bytes).next_multiple_of(alignment) - start)
}

/// Sizes of the files of a test.
pub(super) const SIZES: [u64; 6] = [1, 4095, 4096, 4097, 3 * 4096 + 123, (1 << 20) + 17];

/// The largest of them.
pub(super) const LARGE: usize = 5;

/// A new file: engines may remember what they have seen.
pub(super) fn write(folder: &Path, number: usize) -> Arc<SourceFile> {
    let (mut file, path) = tempfile::NamedTempFile::new_in(folder).unwrap().keep().unwrap();
    let bytes: Vec<u8> = (0..SIZES[number]).map(|at| pattern(number, at)).collect();
    file.write_all(&bytes).unwrap();
    Arc::new(SourceFile::open(path).unwrap())
}

/// What a file holds: never 0, and no run of it twice.
fn pattern(file: usize, at: u64) -> u8 {
    (next(&mut (at << 8 | file as u64)) % 255 + 1) as u8
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 29)
}

/// One request of a script.
#[derive(Debug, Clone)]
pub(super) struct Read {
    number: usize,
    file: Arc<SourceFile>,
    offset: u64,
    bytes: usize,
    /// Into memory of the test rather than a slot.
    direct: bool,
    /// The request that must have come back before this one may start.
    after: Option<u64>,
}

impl Read {
    pub(super) fn new(number: usize, file: &Arc<SourceFile>, offset: u64, bytes: u64) -> Read {
        Read { number, file: Arc::clone(file), offset, bytes: bytes as usize, direct: false, after: None }
    }
}

/// A request that came back.
#[derive(Debug)]
pub(super) struct Done {
    read: Read,
    pub(super) outcome: io::Result<usize>,
    bytes: Vec<u8>,
}

impl Done {
    fn count(&self) -> usize {
        *self.outcome.as_ref().unwrap_or_else(|error| panic!("{:?}: {error}", self.read))
    }

    /// The bytes that arrived.
    fn head(&self) -> &[u8] {
        &self.bytes[..self.count()]
    }

    /// Whether all bytes arrived that a file of this size has there, and are the right ones.
    fn holds_the_file(&self, size: u64) {
        let Read { number, offset, bytes, .. } = self.read;
        assert_eq!(self.count() as u64, size.saturating_sub(offset).min(bytes as u64), "{:?}", self.read);
        let right = (offset..).zip(self.head()).all(|(at, &byte)| byte == pattern(number, at));
        assert!(right, "wrong bytes: {:?}", self.read);
    }
}

/// Lets the engine work off a list with as many threads as it wants, and gives back what came of each request, in
/// their order.
pub(super) fn exercise(engine: &dyn Engine, list: Vec<Read>) -> Vec<Done> {
    let asked = list.len();
    let waiting = (0..).zip(list).collect();
    let state = State { waiting, lent: BTreeMap::new(), done: BTreeMap::new(), laters: 0 };
    let (ring, lend) = slots(engine);
    let script = Script { state: Mutex::new(state), changed: Condvar::new(), ring, lend };
    thread::scope(|scope| {
        let run = || {
            #[cfg(feature = "cuda")]
            if engine.registrar().is_some() {
                super::cufile::tests::enter();
            }
            engine.run(&script)
        };
        let threads: Vec<_> = (0..engine.threads()).map(|_| scope.spawn(run)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
    let State { waiting, lent, done, .. } = script.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(waiting.is_empty() && lent.is_empty() && done.len() == asked, "{} of {asked} came back", done.len());
    done.into_values().collect()
}

/// The slots that an engine reads into: of the host, or of the twin's device, which the host reaches all the same.
fn slots(engine: &dyn Engine) -> (Ring, Lend) {
    #[cfg(feature = "cuda")]
    if engine.registrar().is_some() {
        return (super::cufile::tests::ring(SLOTS, SLOT), Lend::Pinned);
    }
    let _ = engine;
    (Ring::new(SLOTS * SLOT, SLOT), Lend::Any)
}

/// Fewer than the deepest engine has room for, so that slots run out.
const SLOTS: usize = 5;
const SLOT: usize = 2 << 20;

/// Room around memory of the test that no engine may touch, with what stands there.
const MARGIN: usize = 64;
const UNTOUCHED: u8 = 0;

/// No request of these tests takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Work from a list. Slots come from a real ring and go back to it.
struct Script {
    state: Mutex<State>,
    changed: Condvar,
    ring: Ring,
    lend: Lend,
}

struct State {
    waiting: VecDeque<(u64, Read)>,
    lent: BTreeMap<u64, Lent>,
    done: BTreeMap<u64, Done>,
    laters: usize,
}

/// What the script remembers of a request that an engine has.
struct Lent {
    read: Read,
    thread: ThreadId,
    address: *mut u8,
    /// The memory of a direct request, with its margins.
    memory: Vec<u8>,
}

// SAFETY: the address is only compared and, once the request came back, read.
unsafe impl Send for Lent {}

impl Script {
    /// The state; a thread that failed in the middle fails all others, so that none of them waits for it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("another thread of this test failed")
    }

    fn lend(&self, state: &mut State, id: u64, read: Read) -> Option<Request> {
        let (slot, mut memory) = match read.direct {
            true => (None, vec![UNTOUCHED; MARGIN + read.bytes + MARGIN]),
            false => (Some(self.ring.try_lend(self.lend).unwrap()?), Vec::new()),
        };
        assert!(read.direct || read.bytes < SLOT);
        let address = match &slot {
            Some(slot) => slot.address(),
            None => memory.as_mut_ptr().wrapping_add(MARGIN),
        };
        if slot.is_some() {
            // SAFETY: nobody else has this slot; slots are `SLOT` bytes.
            unsafe { address.write_bytes(UNTOUCHED, (read.bytes + MARGIN).min(SLOT)) };
        }
        let extent =
            Extent { file: FileId(read.number as u32), start: read.offset, end: read.offset + read.bytes as u64 };
        let op = ReadOp::alone(extent, read.direct);
        let request = Request {
            id,
            file: Arc::clone(&read.file),
            offset: read.offset,
            address,
            bytes: read.bytes,
            slot,
            permit: None,
            pending: Box::new(Pending {
                exchanged: None,
                op,
                base: read.offset,
                pieces: Vec::new(),
                order: Vec::new(),
                repeated: false,
                since: Instant::now(),
            }),
        };
        state.lent.insert(id, Lent { read, thread: thread::current().id(), address, memory });
        Some(request)
    }
}

impl Work for Script {
    fn next(&self, may_wait: bool) -> Next {
        let mut state = self.state();
        let me = thread::current().id();
        let holds = state.lent.values().any(|lent| lent.thread == me);
        assert!(!(may_wait && holds), "waits for work while it has requests in flight");
        loop {
            let Some((id, read)) = state.waiting.front().cloned() else { return Next::Finished };
            if read.after.is_none_or(|after| state.done.contains_key(&after))
                && let Some(request) = self.lend(&mut state, id, read)
            {
                state.waiting.pop_front();
                return Next::Request(request);
            }
            if !may_wait {
                state.laters += 1;
                // Only a thread with requests in flight asks this way, and next it must have completed one.
                assert!(state.laters <= state.done.len() + state.lent.len(), "asks again and again");
                return Next::Later;
            }
            let (after, timeout) = self.changed.wait_timeout(state, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "nothing came back");
            state = after;
        }
    }

    fn stopped(&self) -> bool {
        false
    }

    fn done(&self, mut request: Request, outcome: io::Result<usize>) {
        let mut state = self.state();
        let Lent { read, address, memory, .. } = state.lent.remove(&request.id).expect("a request that nobody lent");
        let (start, bytes) = match request.device_buffer() {
            Some((slot, place)) => (slot as usize + place, request.bytes()),
            None => (request.buffer().as_mut_ptr().addr(), request.buffer().len()),
        };
        assert_eq!((start, request.offset(), bytes), (address.addr(), read.offset, read.bytes));
        assert_eq!(request.slot.is_none(), read.direct);
        assert!(std::ptr::eq(request.file(), &*read.file));
        // SAFETY: the memory was filled when it was lent, and the engine that gave it back no longer writes it.
        let bytes = unsafe { std::slice::from_raw_parts(address, read.bytes) }.to_vec();
        let around = match &request.slot {
            // SAFETY: as above; `lend` filled this much of the slot.
            Some(slot) => unsafe {
                let behind = (read.bytes + MARGIN).min(SLOT) - read.bytes;
                std::slice::from_raw_parts(slot.address().add(read.bytes), behind).to_vec()
            },
            None => [&memory[..MARGIN], &memory[MARGIN + read.bytes..]].concat(),
        };
        assert!(around.iter().all(|&byte| byte == UNTOUCHED), "wrote outside of the buffer: {read:?}");
        let id = request.id;
        drop(request);
        state.done.insert(id, Done { read, outcome, bytes });
        self.changed.notify_all();
    }

    unsafe fn lent(&self, _: Request, _: *const u8, _: Arc<dyn Any + Send + Sync>) {
        unreachable!("no request asks to be lent")
    }
}
