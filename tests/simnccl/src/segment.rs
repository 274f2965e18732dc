//! What the ranks of a communicator share: an anonymous file that each of them maps. It has a name only while the process
//! that made the id keeps it open, under `/proc`, so nothing is left behind however a process ends.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;
use std::{io, process, thread};

use crate::abi::UniqueId;

/// Most ranks of a communicator, and most operations of a group.
pub(crate) const MAX_RANKS: usize = 64;
pub(crate) const MAX_ENTRIES: usize = 1024;

/// How long a wait sleeps before it looks at what nobody rings for.
const LOOK: Duration = Duration::from_millis(20);

/// Everything the ranks share; all zeros at first.
#[repr(C)]
pub(crate) struct Layout {
    /// From the id: the file is the one it names.
    nonce: AtomicU64,
    /// How many ranks there are to be, as the first one said.
    pub(crate) ranks: AtomicU32,
    /// How many ranks have arrived.
    pub(crate) attached: AtomicU32,
    /// Held while links are booked.
    booking: AtomicU32,
    pub(crate) members: [Member; MAX_RANKS],
    /// How many messages from the first rank the second has taken, and when the last one ended in the model's time.
    pub(crate) taken: [[AtomicU64; MAX_RANKS]; MAX_RANKS],
    pub(crate) taken_end: [[AtomicU64; MAX_RANKS]; MAX_RANKS],
    /// How many collectives have a known end in the model's time, and that of the last one.
    pub(crate) timed: AtomicU64,
    pub(crate) timed_end: AtomicU64,
    boards: [[[AtomicU64; WORDS]; MAX_ENTRIES]; MAX_RANKS],
}

/// What a rank says of itself.
#[repr(C)]
pub(crate) struct Member {
    /// Its process; 0 until it has arrived.
    pub(crate) process: AtomicU32,
    pub(crate) finalized: AtomicU32,
    pub(crate) aborted: AtomicU32,
    /// Changes when something did that it may wait for.
    bell: AtomicU32,
    /// Which of the machine's devices it is on.
    pub(crate) board: AtomicU64,
    /// How many collectives it has published, and how many it has finished reading.
    arrived: AtomicU64,
    done: AtomicU64,
    /// When its links, in and out, are free in the model's time.
    links: [AtomicU64; 2],
    /// Odd while its board changes.
    generation: AtomicU64,
    entries: AtomicU32,
    /// Threads of its own process that read memory its board names.
    readers: AtomicU32,
}

/// What an operation is; only equal ones meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Kind {
    Send = 1,
    Broadcast,
    AllGather,
    AllReduce,
}

/// What a rank publishes for others to take while one of its operations runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    /// Who is to take a message; the root of a broadcast.
    pub(crate) peer: u32,
    /// Which message to that peer, or which collective, it is.
    pub(crate) ordinal: u64,
    pub(crate) bytes: u64,
    pub(crate) data_type: u32,
    pub(crate) reduction: u32,
    /// Of the bytes, for ranks of the same process; for others they are in a file of the publisher's.
    pub(crate) address: u64,
    pub(crate) file: i32,
    /// When its rank's operation could start in the model's time.
    pub(crate) ready: u64,
}

const WORDS: usize = 7;

impl Entry {
    fn words(self) -> [u64; WORDS] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            pair(self.kind as u32, self.peer),
            self.ordinal,
            self.bytes,
            pair(self.data_type, self.reduction),
            self.address,
            self.file as u64,
            self.ready,
        ]
    }

    fn from(words: [u64; WORDS]) -> Option<Entry> {
        let kinds = [Kind::Send, Kind::Broadcast, Kind::AllGather, Kind::AllReduce];
        let kind = kinds.into_iter().find(|kind| *kind as u32 == words[0] as u32)?;
        Some(Entry {
            kind,
            peer: (words[0] >> 32) as u32,
            ordinal: words[1],
            bytes: words[2],
            data_type: words[3] as u32,
            reduction: (words[3] >> 32) as u32,
            address: words[4],
            file: words[5] as i32,
            ready: words[6],
        })
    }
}

/// An entry that somebody published, and of which state of the board it was.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub(crate) from: usize,
    pub(crate) entry: Entry,
    generation: u64,
}

/// The shared file, mapped.
pub(crate) struct Segment {
    layout: NonNull<Layout>,
}

// SAFETY: only atomics are reached through it.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// Makes a file for a new communicator, and the id that leads to it while the file is open.
pub(crate) fn create(nonce: u64) -> io::Result<(OwnedFd, UniqueId)> {
    let file = anonymous_file()?;
    file.set_len(size_of::<Layout>() as u64)?;
    let file = OwnedFd::from(file);
    let segment = Segment::map(&file)?;
    segment.nonce.store(nonce, SeqCst);
    let mut bytes = [0; 128];
    bytes[..8].copy_from_slice(MARK);
    bytes[8..12].copy_from_slice(&process::id().to_le_bytes());
    bytes[12..16].copy_from_slice(&file.as_raw_fd().to_le_bytes());
    bytes[16..24].copy_from_slice(&nonce.to_le_bytes());
    Ok((file, UniqueId { bytes }))
}

const MARK: &[u8; 8] = b"simnccl\0";

/// The number of an id; `None` if it is none of this library's.
pub(crate) fn nonce(id: &UniqueId) -> Option<u64> {
    id.bytes.starts_with(MARK).then(|| u64::from_le_bytes(id.bytes[16..24].try_into().expect("8 bytes")))
}

/// The file that an id names; `None` if whoever made it is gone.
pub(crate) fn open(id: &UniqueId) -> Option<Segment> {
    let word = |at: usize| u32::from_le_bytes(id.bytes[at..at + 4].try_into().expect("4 bytes"));
    let path = format!("/proc/{}/fd/{}", word(8), word(12));
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    if file.metadata().ok()?.len() != size_of::<Layout>() as u64 {
        return None;
    }
    let segment = Segment::map(&OwnedFd::from(file)).ok()?;
    (Some(segment.nonce.load(SeqCst)) == nonce(id)).then_some(segment)
}

/// A file without a name, for what one rank has for those of other processes.
pub(crate) fn anonymous_file() -> io::Result<File> {
    // SAFETY: a C string; the descriptor is new and belongs to nobody else.
    unsafe {
        match libc::memfd_create(c"simnccl".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            descriptor => Ok(File::from_raw_fd(descriptor)),
        }
    }
}

impl std::ops::Deref for Segment {
    type Target = Layout;

    fn deref(&self) -> &Layout {
        // SAFETY: mapped, as large as the file, and only atomics: other processes may change them.
        unsafe { self.layout.as_ref() }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; no reference outlives `self`.
        unsafe { libc::munmap(self.layout.as_ptr().cast(), size_of::<Layout>()) };
    }
}

impl Segment {
    fn map(file: &OwnedFd) -> io::Result<Segment> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let (bytes, descriptor) = (size_of::<Layout>(), file.as_raw_fd());
        // SAFETY: a new mapping, as large as the file.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, rights, libc::MAP_SHARED, descriptor, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Segment { layout: NonNull::new(at.cast()).expect("mapped") })
    }

    /// Tells a rank that something has changed.
    pub(crate) fn ring(&self, rank: usize) {
        let bell = &self.members[rank].bell;
        bell.fetch_add(1, SeqCst);
        // SAFETY: an address that is mapped; nothing is written.
        unsafe { libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    pub(crate) fn ring_all(&self) {
        (0..self.size()).for_each(|rank| self.ring(rank));
    }

    fn size(&self) -> usize {
        (self.ranks.load(SeqCst) as usize).min(MAX_RANKS)
    }

    /// Waits until `look` finds something for this rank. It is also asked now and then without anybody having rung.
    pub(crate) fn wait<T>(&self, rank: usize, mut look: impl FnMut() -> Option<T>) -> T {
        let bell = &self.members[rank].bell;
        loop {
            let seen = bell.load(SeqCst);
            if let Some(found) = look() {
                return found;
            }
            let time = libc::timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
            // SAFETY: as in `ring`; the time is read only.
            unsafe { libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAIT, seen, &raw const time) };
        }
    }

    /// Counts something that all ranks do in turn; whoever is the last to do it tells all.
    fn reach(&self, rank: usize, count: u64, of: impl Fn(&Member) -> &AtomicU64) {
        let least = || self.members[..self.size()].iter().map(|member| of(member).load(SeqCst)).min();
        let before = of(&self.members[rank]).swap(count, SeqCst);
        if least() > Some(before) {
            self.ring_all();
        }
    }

    /// A rank has finished reading so many collectives.
    pub(crate) fn reach_done(&self, rank: usize, count: u64) {
        self.reach(rank, count, |member| &member.done);
    }

    /// Whether all ranks have finished reading so many.
    pub(crate) fn all_done(&self, count: u64) -> bool {
        self.members[..self.size()].iter().all(|member| member.done.load(SeqCst) >= count)
    }

    /// Shows `entries` to all, in the place of what was shown before.
    pub(crate) fn publish(&self, rank: usize, entries: &[Entry]) {
        let member = &self.members[rank];
        member.generation.fetch_add(1, SeqCst);
        for (place, entry) in self.boards[rank].iter().zip(entries) {
            place.iter().zip(entry.words()).for_each(|(place, word)| place.store(word, SeqCst));
        }
        member.entries.store(entries.len() as u32, SeqCst);
        member.generation.fetch_add(1, SeqCst);
        let collectives = entries.iter().filter(|entry| entry.kind != Kind::Send).map(|entry| entry.ordinal + 1);
        if let Some(arrived) = collectives.max() {
            self.reach(rank, arrived, |member| &member.arrived);
        }
        let messages = entries.iter().filter(|entry| entry.kind == Kind::Send).map(|entry| entry.peer as usize);
        let mut peers: Vec<usize> = messages.collect();
        peers.sort_unstable();
        peers.dedup();
        peers.into_iter().for_each(|peer| self.ring(peer));
    }

    /// Shows nothing any more; returns when nobody reads the memory that was named.
    pub(crate) fn retract(&self, rank: usize) {
        self.publish(rank, &[]);
        while self.members[rank].readers.load(SeqCst) > 0 {
            thread::sleep(Duration::from_micros(20));
        }
    }

    /// What `from` shows that `wanted` says is meant.
    pub(crate) fn find(&self, from: usize, wanted: impl Fn(&Entry) -> bool) -> Option<Found> {
        let member = &self.members[from];
        let generation = member.generation.load(SeqCst);
        let count = (member.entries.load(SeqCst) as usize).min(MAX_ENTRIES);
        let mut entries = self.boards[from][..count].iter();
        let entry = entries.find_map(|place| {
            Entry::from(std::array::from_fn(|word| place[word].load(SeqCst))).filter(|e| wanted(e))
        })?;
        let steady = generation.is_multiple_of(2) && member.generation.load(SeqCst) == generation;
        steady.then_some(Found { from, entry, generation })
    }

    /// Copies what somebody published to memory of this process. Not if it is not shown any more, or its process has gone.
    ///
    /// # Safety
    /// - `bytes` bytes at `to` are writable, and nobody else touches them;
    /// - what a rank of this process publishes is readable until it has retracted it.
    pub(crate) unsafe fn fetch(&self, found: &Found, to: u64, bytes: u64) -> bool {
        let member = &self.members[found.from];
        let process = member.process.load(SeqCst);
        if bytes == 0 {
            return true;
        }
        if process == process::id() {
            member.readers.fetch_add(1, SeqCst);
            let shown = member.generation.load(SeqCst) == found.generation;
            if shown {
                // SAFETY: the caller's duties: shown, so readable, and `retract` waits for this reader. They may overlap.
                unsafe { (to as *mut u8).copy_from(found.entry.address as *const u8, bytes as usize) };
            }
            member.readers.fetch_sub(1, SeqCst);
            return shown;
        }
        let Ok(file) = File::open(format!("/proc/{process}/fd/{}", found.entry.file)) else { return false };
        // SAFETY: the caller's duty.
        let into = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes as usize) };
        file.read_exact_at(into, 0).is_ok()
    }

    /// Takes a rank's link (0 in, 1 out) for so long, not before `from`; when that ends.
    pub(crate) fn book(&self, links: &[(usize, usize)], from: u64, length: u64) -> u64 {
        let me = process::id();
        while let Err(other) = self.booking.compare_exchange(0, me, SeqCst, SeqCst) {
            // SAFETY: asks only whether a process exists.
            if other != me && unsafe { libc::kill(other as i32, 0) } != 0 {
                // It died while it held the lock.
                self.booking.compare_exchange(other, 0, SeqCst, SeqCst).ok();
            }
            thread::yield_now();
        }
        let ends = links.iter().map(|(rank, way)| {
            let link = &self.members[*rank].links[*way];
            let end = link.load(SeqCst).max(from) + length;
            link.store(end, SeqCst);
            end
        });
        let end = ends.max().unwrap_or(from);
        self.booking.store(0, SeqCst);
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(ordinal: u64) -> Entry {
        let bytes = [7_u8; 100].to_vec().leak();
        Entry {
            kind: Kind::Send,
            peer: 3,
            ordinal,
            bytes: 100,
            data_type: 1,
            reduction: 0,
            address: bytes.as_ptr() as u64,
            file: -1,
            ready: u64::MAX,
        }
    }

    #[test]
    fn what_is_published_is_found_and_fetched_until_it_is_retracted() {
        let (_file, id) = create(42).unwrap();
        let (ours, theirs) = (open(&id).unwrap(), open(&id).unwrap());
        ours.members[1].process.store(process::id(), SeqCst);
        ours.publish(1, &[entry(5), entry(6)]);
        let found = theirs.find(1, |entry| entry.ordinal == 6).unwrap();
        assert_eq!(found.entry, Entry { address: found.entry.address, ..entry(6) });
        assert!(theirs.find(1, |entry| entry.ordinal == 7).is_none() && theirs.find(0, |_| true).is_none());
        let mut into = [0_u8; 100];
        // SAFETY: `into` is that long; the published bytes are never freed.
        assert!(unsafe { theirs.fetch(&found, into.as_mut_ptr() as u64, 100) });
        assert_eq!(into, [7; 100]);
        ours.retract(1);
        assert!(theirs.find(1, |_| true).is_none());
        // SAFETY: as above.
        assert!(!unsafe { theirs.fetch(&found, into.as_mut_ptr() as u64, 100) });
    }

    #[test]
    fn links_are_taken_one_after_the_other() {
        let (_file, id) = create(43).unwrap();
        let segment = open(&id).unwrap();
        assert_eq!(segment.book(&[(0, 1), (1, 0)], 100, 50), 150);
        assert_eq!(segment.book(&[(0, 1), (2, 0)], 100, 50), 200);
        assert_eq!(segment.book(&[(0, 0), (1, 1)], 100, 50), 150);
        assert_eq!(segment.book(&[(2, 0)], 500, 50), 550);
    }

    #[test]
    fn an_id_leads_nowhere_once_its_file_is_closed() {
        let (file, id) = create(44).unwrap();
        assert_eq!(nonce(&id), Some(44));
        drop(file);
        assert!(open(&id).is_none());
        assert_eq!(nonce(&UniqueId { bytes: [0; 128] }), None);
    }
}
