//! Whether pages of a file are cached, without having the system read them.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;

use rustix::io::{Errno, ReadWriteFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Whether the page that holds the byte at `offset`, which is in the file, is cached; `None` if the system does not say.
pub(super) fn is_resident(file: &File, offset: u64) -> Option<bool> {
    counted(file, offset).or_else(|| mapped(file, offset)).or_else(|| read(file, offset))
}

/// By cachestat(2), of Linux 6.5 and later; newer kernels answer only those who own the file or may write to it.
fn counted(file: &File, offset: u64) -> Option<bool> {
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    /// The same of all processors but Alpha; not every libc names it.
    const CACHESTAT: libc::c_long = 451;

    let (range, mut counts) = (Range { offset, length: 1 }, Counts::default());
    // SAFETY: both are laid out as the system has them, live and only of this call; a system that does not know it writes nothing.
    let failed = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut counts, 0) };
    (failed == 0).then_some(counts.cached > 0)
}

/// By mincore(2), which tells those who neither own the file nor may write to it that all of it is there (Linux 5.2 and later).
fn mapped(file: &File, offset: u64) -> Option<bool> {
    if rustix::fs::fstat(file).ok()?.st_uid != rustix::process::geteuid().as_raw() {
        return None;
    }
    let page = rustix::param::page_size();
    let mut resident = 0u8;
    // SAFETY: a new mapping of one page that nobody else knows of and nothing reads, and so never a signal; mincore writes one
    // byte for it.
    unsafe {
        let start = offset - offset % page as u64;
        let address =
            rustix::mm::mmap(std::ptr::null_mut(), page, ProtFlags::READ, MapFlags::SHARED, file, start).ok()?;
        let failed = libc::mincore(address, page, &raw mut resident);
        let _ = rustix::mm::munmap(address, page);
        (failed == 0).then_some(resident & 1 == 1)
    }
}

/// By a read that does not wait. Since Linux 5.10 the system begins to read what it does not find, and some pages behind it.
fn read(file: &File, offset: u64) -> Option<bool> {
    let mut byte = [0];
    loop {
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => return Some(read == 1),
            Err(Errno::AGAIN) => return Some(false),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::source::{FileSystem, system};

    const PAGES: u64 = 64;

    fn share(file: &File, ask: impl Fn(&File, u64) -> Option<bool>) -> Option<u64> {
        (0..PAGES).map(|page| ask(file, page * 4096 + 17).map(u64::from)).sum()
    }

    #[test]
    fn asking_reads_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; (PAGES * 4096) as usize]).unwrap();
        file.sync_all().unwrap(); // what is not written yet cannot be forgotten
        assert_eq!(share(&file, mapped), Some(PAGES));
        assert_eq!(share(&file, counted).unwrap_or(PAGES), PAGES);
        if matches!(system::file_system(&file), Ok(FileSystem::Memory(_))) {
            return; // it is nowhere else
        }
        system::forget_pages(&file).unwrap();
        for ask in [mapped, counted, is_resident] {
            let once = share(&file, ask);
            thread::sleep(Duration::from_millis(100)); // what was begun to be read is there
            assert_eq!(share(&file, ask), once);
            assert!(once.is_none_or(|pages| pages < PAGES / 2), "{once:?}"); // the system keeps what it is busy with
        }
    }
}
