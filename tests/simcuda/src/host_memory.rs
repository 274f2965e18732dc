//! Host memory that the driver knows: allocated by it, or registered.

use std::collections::BTreeMap;
use std::fs;

use crate::code::{Code, HOST_MEMORY_ALREADY_REGISTERED, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Result};
use crate::device_memory::PAGE;
use crate::handle::Handle;

/// `CU_MEMHOSTALLOC_PORTABLE` and `CU_MEMHOSTREGISTER_PORTABLE`.
pub(crate) const PORTABLE: u32 = 1;
/// `CU_MEMHOSTREGISTER_READ_ONLY`.
const READ_ONLY: u32 = 8;

/// All pinned memory.
#[derive(Default)]
pub(crate) struct HostMemory {
    ranges: BTreeMap<u64, HostRange>,
    pub(crate) bytes: u64,
    next_id: u64,
}

/// Pinned bytes.
pub(crate) struct HostRange {
    pub(crate) bytes: u64,
    pub(crate) registered: bool,
    pub(crate) flags: u32,
    pub(crate) context: Handle,
    pub(crate) id: u64,
    pub(crate) made: u64,
    pub(crate) uses: u32,
}

/// What memory of the host is to a copy in one context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Pageable,
    /// Start and id of the range.
    Pinned(u64, u64),
    /// Pinned in another context and not for all: as slow as pageable memory.
    Foreign,
}

impl HostRange {
    pub(crate) fn is_read_only(&self) -> bool {
        self.registered && self.flags & READ_ONLY != 0
    }

    pub(crate) fn is_portable(&self) -> bool {
        self.flags & PORTABLE != 0
    }
}

impl HostMemory {
    pub(crate) fn allocate(&mut self, bytes: u64, flags: u32, context: Handle, made: u64) -> Result<u64> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the system's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes as usize, protection, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        self.insert(start as u64, bytes, false, flags, context, made);
        Ok(start as u64)
    }

    pub(crate) fn register(
        &mut self,
        start: u64,
        bytes: u64,
        flags: u32,
        context: Handle,
        made: u64,
        read_only: bool,
    ) -> Result {
        let end = start.checked_add(bytes).filter(|_| start != 0 && bytes > 0).ok_or(INVALID_VALUE)?;
        if flags & READ_ONLY != 0 && !read_only {
            return Err(NOT_SUPPORTED);
        }
        // Pages are what is pinned: two ranges may not share one.
        let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
        let before = self.ranges.range(..last).next_back();
        if before.is_some_and(|(start, range)| (start + range.bytes).next_multiple_of(PAGE) > first) {
            return Err(HOST_MEMORY_ALREADY_REGISTERED);
        }
        match writable(first, last) {
            Some(true) => {}
            Some(false) if flags & READ_ONLY != 0 => {}
            _ => return Err(INVALID_VALUE),
        }
        self.insert(start, bytes, true, flags, context, made);
        Ok(())
    }

    fn insert(&mut self, start: u64, bytes: u64, registered: bool, flags: u32, context: Handle, made: u64) {
        self.next_id += 1;
        let id = self.next_id;
        self.ranges.insert(start, HostRange { bytes, registered, flags, context, id, made, uses: 0 });
        self.bytes += bytes;
    }

    /// The pinned range that has this address.
    pub(crate) fn find(&self, address: u64) -> Option<(u64, &HostRange)> {
        let (start, range) = self.ranges.range(..=address).next_back()?;
        (address - start < range.bytes).then_some((*start, range))
    }

    pub(crate) fn get(&self, start: u64) -> Option<&HostRange> {
        self.ranges.get(&start)
    }

    pub(crate) fn get_mut(&mut self, start: u64) -> Option<&mut HostRange> {
        self.ranges.get_mut(&start)
    }

    /// What these bytes are to a copy in `context`; partly pinned ones are an invalid value.
    pub(crate) fn place(&self, start: u64, bytes: u64, context: Handle) -> Result<Place> {
        let end = start + bytes.max(1);
        match self.ranges.range(..end).next_back() {
            Some((first, range)) if first + range.bytes > start => {
                if *first > start || end > first + range.bytes {
                    Err(INVALID_VALUE)
                } else if range.is_portable() || range.context == context {
                    Ok(Place::Pinned(*first, range.id))
                } else {
                    Ok(Place::Foreign)
                }
            }
            _ => Ok(Place::Pageable),
        }
    }

    pub(crate) fn lives(&self, start: u64, id: u64) -> bool {
        self.ranges.get(&start).is_some_and(|range| range.id == id)
    }

    pub(crate) fn remove(&mut self, start: u64) -> Option<HostRange> {
        let range = self.ranges.remove(&start)?;
        self.bytes -= range.bytes;
        if !range.registered {
            // SAFETY: mapped by `allocate`, and given back by its owner.
            unsafe { libc::munmap(start as *mut _, range.bytes as usize) };
        }
        Some(range)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &HostRange)> {
        self.ranges.iter().map(|(start, range)| (*start, range))
    }
}

/// Whether these addresses are mapped at all; cheap.
pub(crate) fn is_mapped(start: u64, bytes: u64) -> bool {
    let first = start / PAGE * PAGE;
    let pages = (start + bytes - first).div_ceil(PAGE);
    let mut resident = vec![0_u8; pages as usize];
    // SAFETY: only asks about the addresses; one byte of the result per page.
    unsafe { libc::mincore(first as *mut _, (start + bytes - first) as usize, resident.as_mut_ptr()) == 0 }
}

/// Whether all of these pages may be read and written, or only read; `None` if one may not even be read.
fn writable(first: u64, last: u64) -> Option<bool> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let mut at = first;
    let mut writable = true;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        if end <= at || start >= last {
            continue;
        }
        let rights = words.next()?;
        if start > at || !rights.starts_with('r') {
            return None;
        }
        writable &= rights[1..].starts_with('w');
        at = end;
    }
    (at >= last).then_some(writable)
}

/// The flags that one of the two calls knows.
pub(crate) fn flags(flags: u32, known: u32) -> std::result::Result<u32, Code> {
    if flags & !known == 0 { Ok(flags) } else { Err(INVALID_VALUE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registered_pages_belong_to_one_range() {
        let pages = vec![0_u8; 5 * PAGE as usize];
        let start = (pages.as_ptr() as u64).next_multiple_of(PAGE);
        let mut host = HostMemory::default();
        host.register(start, PAGE, 0, 7, 1, true).unwrap();
        assert_eq!(host.register(start, PAGE, 0, 7, 1, true), Err(HOST_MEMORY_ALREADY_REGISTERED));
        assert_eq!(host.register(start + PAGE, 10, PORTABLE, 7, 1, true), Ok(()));
        assert_eq!(host.register(start + PAGE + 100, 10, 0, 7, 1, true), Err(HOST_MEMORY_ALREADY_REGISTERED));
        assert_eq!(host.place(start, PAGE, 7), Ok(Place::Pinned(start, 1)));
        assert_eq!(host.place(start, PAGE, 8), Ok(Place::Foreign));
        assert_eq!(host.place(start + PAGE, 5, 8), Ok(Place::Pinned(start + PAGE, 2)));
        assert_eq!(host.place(start + PAGE, 50, 8), Err(INVALID_VALUE));
        assert_eq!(host.place(start + 2 * PAGE, 5, 8), Ok(Place::Pageable));
        assert_eq!(host.register(start + 2 * PAGE, 5, READ_ONLY, 7, 1, false), Err(NOT_SUPPORTED));
        assert_eq!(host.bytes, PAGE + 10);
        assert!(is_mapped(start, 2 * PAGE) && !is_mapped(PAGE, 8));
    }
}
