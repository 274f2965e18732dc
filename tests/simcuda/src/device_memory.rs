//! Device memory: mappings of the host at addresses that are never used twice, with gaps between them.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::Ordering;

use crate::code::{Code, INVALID_VALUE, OUT_OF_MEMORY, Result};
use crate::handle::Handle;
use crate::ledger::POPULATE_NS;
use crate::stream::monotonic_ns;

/// Smallest unit of an allocation's quota, as devices have it.
const UNIT: u64 = 512;
/// Host pages; what is between an allocation's end and its page's is filled with `SLACK` and checked.
pub(crate) const PAGE: u64 = 4096;
/// Inaccessible bytes after every allocation.
const GUARD: u64 = 64 << 10;
/// Granularity of virtual memory management, and alignment of large allocations.
pub(crate) const GRANULARITY: u64 = 2 << 20;
/// What fresh memory holds.
pub(crate) const FRESH: u8 = 0xCD;
/// What lies between the end of an allocation and the end of its page.
const SLACK: u8 = 0xFD;

/// The memory of all devices.
pub(crate) struct DeviceMemory {
    base: u64,
    next: u64,
    end: u64,
    ranges: BTreeMap<u64, Range>,
    pub(crate) reservations: BTreeMap<u64, Reservation>,
    pub(crate) physicals: HashMap<u64, Physical>,
    /// What was given back: end, and the call that did.
    dead: BTreeMap<u64, (u64, &'static str)>,
    next_id: u64,
}

/// Where the memory of a range comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// `cuMemAlloc`.
    Plain,
    /// `cuMemAllocAsync`.
    Pool,
    /// `cuMemMap` of the physical allocation with this number.
    Mapped(u64),
}

/// Bytes that copies and kernels may touch.
pub(crate) struct Range {
    pub(crate) bytes: u64,
    pub(crate) kind: Kind,
    pub(crate) device: usize,
    pub(crate) context: Handle,
    /// Never used twice, unlike the address of a mapping.
    pub(crate) id: u64,
    /// Number of the call that made it.
    pub(crate) made: u64,
    /// Operations in flight that touch it.
    pub(crate) uses: u32,
    /// Bit per device that may access it.
    pub(crate) access: u64,
    /// A stream is going to give it back.
    pub(crate) freed: bool,
}

/// Address space without memory.
pub(crate) struct Reservation {
    pub(crate) bytes: u64,
    pub(crate) made: u64,
}

/// Memory without an address.
pub(crate) struct Physical {
    pub(crate) file: OwnedFd,
    pub(crate) bytes: u64,
    pub(crate) device: usize,
    /// Handles and mappings that hold it.
    pub(crate) holders: u32,
}

/// A range that an operation touches: start and id.
pub(crate) type Use = (u64, u64);

impl DeviceMemory {
    pub(crate) fn new() -> DeviceMemory {
        // Address space only. Less where the process may not have that much.
        let (mut start, mut bytes) = (libc::MAP_FAILED, 1_u64 << 43);
        while start == libc::MAP_FAILED && bytes >= 1 << 30 {
            start = map(0, bytes, libc::PROT_NONE, libc::MAP_NORESERVE, -1);
            bytes /= 2;
        }
        let (next, end) = if start == libc::MAP_FAILED { (0, 0) } else { (start as u64, start as u64 + bytes * 2) };
        DeviceMemory {
            base: next,
            next,
            end,
            ranges: BTreeMap::new(),
            reservations: BTreeMap::new(),
            physicals: HashMap::new(),
            dead: BTreeMap::new(),
            next_id: 1,
        }
    }

    /// What an allocation of `bytes` takes of its device.
    pub(crate) fn quota(bytes: u64) -> u64 {
        bytes.next_multiple_of(UNIT)
    }

    pub(crate) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Fresh addresses, inaccessible.
    pub(crate) fn addresses(&mut self, bytes: u64, align: u64) -> Result<u64> {
        let start = self.next.checked_next_multiple_of(align).ok_or(OUT_OF_MEMORY)?;
        let span =
            bytes.checked_next_multiple_of(PAGE).and_then(|span| span.checked_add(GUARD)).ok_or(OUT_OF_MEMORY)?;
        let end = start.checked_add(span).filter(|end| *end <= self.end).ok_or(OUT_OF_MEMORY)?;
        self.next = end;
        Ok(start)
    }

    /// Fresh memory that only its maker knows until `insert`; not yet filled.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Result<u64> {
        let start = self.addresses(bytes, if bytes >= GRANULARITY { GRANULARITY } else { PAGE })?;
        let (read_write, fixed) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_NORESERVE);
        let mapped = map(start, bytes.next_multiple_of(PAGE), read_write, fixed, -1);
        if mapped == libc::MAP_FAILED { Err(OUT_OF_MEMORY) } else { Ok(start) }
    }

    pub(crate) fn insert(&mut self, start: u64, range: Range) {
        self.ranges.insert(start, range);
    }

    /// The range that has this address.
    pub(crate) fn find(&self, address: u64) -> Option<(u64, &Range)> {
        let (start, range) = self.ranges.range(..=address).next_back()?;
        (address - start < range.bytes).then_some((*start, range))
    }

    pub(crate) fn get(&self, start: u64) -> Option<&Range> {
        self.ranges.get(&start)
    }

    pub(crate) fn get_mut(&mut self, start: u64) -> Option<&mut Range> {
        self.ranges.get_mut(&start)
    }

    /// Whether the address is one of a device's, live or not.
    pub(crate) fn owns(&self, address: u64) -> bool {
        (self.base..self.next).contains(&address)
    }

    /// The ranges that hold all of these bytes, or what is wrong with them.
    pub(crate) fn resolve(&self, start: u64, bytes: u64) -> std::result::Result<Vec<Use>, String> {
        let mut uses = Vec::new();
        let mut at = start;
        loop {
            let Some((first, range)) = self.find(at) else {
                return Err(self.explain(start, bytes, at));
            };
            if range.freed {
                return Err(format!("touches {bytes} bytes at {start:#x}, which cuMemFreeAsync gave back"));
            }
            uses.push((first, range.id));
            at = first + range.bytes;
            if at >= start + bytes {
                return Ok(uses);
            }
        }
    }

    fn explain(&self, start: u64, bytes: u64, at: u64) -> String {
        let dead = self.dead.range(..=at).next_back().filter(|(_, (end, _))| at < *end);
        match (dead, self.ranges.range(..=at).next_back()) {
            (Some((_, (_, call))), _) => format!("touches {bytes} bytes at {start:#x}, which {call} gave back"),
            (None, Some((first, range))) => format!(
                "touches {bytes} bytes at {start:#x}, outside every allocation: the nearest is {first:#x} with {} bytes",
                range.bytes
            ),
            (None, None) => format!("touches {bytes} bytes at {start:#x}, where no allocation is"),
        }
    }

    /// Whether the same range is still there.
    pub(crate) fn lives(&self, (start, id): Use) -> bool {
        self.ranges.get(&start).is_some_and(|range| range.id == id)
    }

    /// Takes a range away: nothing may touch its addresses again.
    pub(crate) fn remove(&mut self, start: u64, call: &'static str) -> Option<Range> {
        let range = self.ranges.remove(&start)?;
        close(start, range.bytes.next_multiple_of(PAGE));
        if !matches!(range.kind, Kind::Mapped(_)) {
            self.dead.insert(start, (start + range.bytes, call));
        }
        Some(range)
    }

    /// Marks addresses as given back.
    pub(crate) fn bury(&mut self, start: u64, bytes: u64, call: &'static str) {
        self.dead.insert(start, (start + bytes, call));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Range)> {
        self.ranges.iter().map(|(start, range)| (*start, range))
    }
}

/// Fills fresh memory, and what lies behind it on its last page.
pub(crate) fn poison(start: u64, bytes: u64, whole: bool) {
    let slack = bytes.next_multiple_of(PAGE) - bytes;
    // SAFETY: the memory was mapped by `allocate`, to the end of its last page, and nobody else knows it yet.
    unsafe {
        if whole {
            ptr::write_bytes(start as *mut u8, FRESH, bytes as usize);
        }
        ptr::write_bytes((start + bytes) as *mut u8, SLACK, slack as usize);
    }
}

/// Whether somebody wrote behind the end of an allocation.
pub(crate) fn overrun(start: u64, bytes: u64) -> bool {
    let slack = bytes.next_multiple_of(PAGE) - bytes;
    // SAFETY: mapped with the allocation, which is live; filled by `poison`.
    let slack = unsafe { std::slice::from_raw_parts((start + bytes) as *const u8, slack as usize) };
    slack.iter().any(|byte| *byte != SLACK)
}

/// Makes addresses inaccessible and gives their memory back.
pub(crate) fn close(start: u64, bytes: u64) {
    map(start, bytes, libc::PROT_NONE, libc::MAP_FIXED | libc::MAP_NORESERVE, -1);
}

/// Maps a file's memory at reserved addresses, not accessible before `allow`.
pub(crate) fn map_file(start: u64, bytes: u64, file: &OwnedFd) -> Result {
    let mapped = map(start, bytes, libc::PROT_NONE, libc::MAP_FIXED, file.as_raw_fd());
    if mapped == libc::MAP_FAILED { Err(OUT_OF_MEMORY) } else { Ok(()) }
}

/// Gives memory that may be written all its pages. Where the system cannot, they come when they are first touched.
pub(crate) fn populate(start: u64, bytes: u64) {
    let began = monotonic_ns();
    // SAFETY: addresses of the twin's own arena; contents stay as they are.
    unsafe { libc::madvise(start as *mut _, bytes as usize, libc::MADV_POPULATE_WRITE) };
    POPULATE_NS.fetch_add(monotonic_ns() - began, Ordering::Relaxed);
}

/// Makes mapped memory readable and writable, or neither.
pub(crate) fn allow(start: u64, bytes: u64, access: bool) -> Result {
    let protection = if access { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
    // SAFETY: addresses of the twin's own arena, which no reference of Rust's points into.
    let failed = unsafe { libc::mprotect(start as *mut _, bytes as usize, protection) } != 0;
    if failed { Err(INVALID_VALUE as Code) } else { Ok(()) }
}

fn map(start: u64, bytes: u64, protection: i32, flags: i32, file: i32) -> *mut libc::c_void {
    let kind = if file < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: a new mapping, or (fixed) one over addresses of the twin's own arena that nobody may use.
    unsafe { libc::mmap(start as *mut _, bytes as usize, protection, kind | flags, file, 0) }
}
