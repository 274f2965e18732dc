//! A file mapped into memory, guarded: a page that storage no longer has becomes a zero page and a flag, never the
//! death of the process.
//!
//! Touching a mapped page behind the end of a file that was cut short raises SIGBUS. Engines populate the pages of a
//! chunk first with MADV_POPULATE_READ, which answers EFAULT instead; for the race that is left a handler is
//! installed once, at the first mapping, and never removed. It acts only on BUS_ADRERR inside our live mappings;
//! everything else goes to the handler that was there before.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

use memmap2::{MmapOptions, MmapRaw};

use super::SourceFile;
use crate::error::{Error, Result};

/// A read-only shared mapping of a whole file.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: MmapRaw,
    guard: &'static Guard,
}

impl Mapping {
    /// Maps the file as long as it was when it was opened.
    pub(crate) fn new(file: &SourceFile) -> Result<Mapping> {
        let bytes = file.identity().size as usize;
        let map = MmapOptions::new()
            .len(bytes)
            .map_raw_read_only(file.file())
            .map_err(|error| Error::io("cannot map", file.path(), error))?;
        let guard = Guard::claim(map.as_ptr().addr(), bytes);
        Ok(Mapping { map, guard })
    }

    /// The first byte of the file. Bytes may only be copied out of it as raw memory, never be a Rust slice, while
    /// the file may change.
    pub(crate) fn address(&self) -> *const u8 {
        self.map.as_ptr()
    }

    /// Brings pages in, where the system can without a signal; a page that storage does not have is an error.
    pub(crate) fn populate(&self, offset: u64, bytes: usize) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            let page = rustix::param::page_size();
            let start = offset as usize / page * page;
            let length = offset as usize + bytes - start;
            let address = self.map.as_mut_ptr().wrapping_add(start);
            // SAFETY: the range lies in this mapping; populating it changes no contents.
            let outcome = unsafe { rustix::mm::madvise(address.cast(), length, rustix::mm::Advice::LinuxPopulateRead) };
            match outcome {
                // Linux before 5.14 does not know the advice; then the handler alone guards the copy.
                Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (offset, bytes);
            Ok(())
        }
    }

    /// Whether a page was missing since the file was mapped: then copied bytes may be zeros that the file never had.
    pub(crate) fn broken(&self) -> bool {
        self.guard.broken.load(Ordering::Acquire)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard.release();
    }
}

/// What the handler knows of a mapping. Guards are never freed, only reused: the handler may look at any time.
#[derive(Debug, Default)]
struct Guard {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicBool,
    next: AtomicPtr<Guard>,
}

static GUARDS: AtomicPtr<Guard> = AtomicPtr::new(std::ptr::null_mut());

impl Guard {
    fn claim(start: usize, bytes: usize) -> &'static Guard {
        install_handler();
        let guard = Guard::all().find(|guard| !guard.taken.swap(true, Ordering::AcqRel)).unwrap_or_else(Guard::add);
        guard.broken.store(false, Ordering::Release);
        guard.start.store(start, Ordering::Release);
        guard.end.store(start + bytes.next_multiple_of(rustix::param::page_size()), Ordering::Release);
        guard
    }

    fn add() -> &'static Guard {
        let guard: &'static Guard = Box::leak(Box::new(Guard { taken: AtomicBool::new(true), ..Guard::default() }));
        let mut head = GUARDS.load(Ordering::Acquire);
        loop {
            guard.next.store(head, Ordering::Release);
            let new = std::ptr::from_ref(guard).cast_mut();
            match GUARDS.compare_exchange(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return guard,
                Err(now) => head = now,
            }
        }
    }

    fn all() -> impl Iterator<Item = &'static Guard> {
        let mut next = GUARDS.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            // SAFETY: guards are leaked boxes, never freed and only shared.
            let guard = unsafe { next.as_ref() }?;
            next = guard.next.load(Ordering::Acquire);
            Some(guard)
        })
    }

    fn release(&self) {
        self.end.store(0, Ordering::Release);
        self.start.store(0, Ordering::Release);
        self.taken.store(false, Ordering::Release);
    }
}

static EARLIER: OnceLock<libc::sigaction> = OnceLock::new();
static PAGE: AtomicUsize = AtomicUsize::new(4096);

fn install_handler() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        PAGE.store(rustix::param::page_size(), Ordering::Release);
        // SAFETY: plain calls with valid pointers; the handler below does only what a signal handler may.
        unsafe {
            let mut earlier: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut earlier);
            let _ = EARLIER.set(earlier);
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_bus_error as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut ours.sa_mask);
            libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut());
        }
    });
}

/// The address was valid to map but storage has nothing there (siginfo's `si_code` in POSIX `<signal.h>`).
const BUS_ADRERR: libc::c_int = 2;

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the system passes a valid `info`, and SIGBUS carries an address. Everything called here
    // is async-signal-safe: atomics, one mmap system call over a page of our own mapping, and the earlier handler.
    unsafe {
        if (*info).si_code == BUS_ADRERR {
            let address = (*info).si_addr().addr();
            let page = PAGE.load(Ordering::Acquire);
            let inside = |guard: &&Guard| {
                guard.start.load(Ordering::Acquire) <= address && address < guard.end.load(Ordering::Acquire)
            };
            if let Some(guard) = Guard::all().find(inside) {
                guard.broken.store(true, Ordering::Release);
                let mapped = libc::mmap(
                    std::ptr::without_provenance_mut(address / page * page),
                    page,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                );
                if mapped != libc::MAP_FAILED {
                    return;
                }
            }
        }
        forward(signal, info, context);
    }
}

/// Hands the signal to the handler that was there before ours.
///
/// # Safety
/// Called from a signal handler with its own arguments.
unsafe fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let action = EARLIER.get().map_or(libc::SIG_DFL, |earlier| earlier.sa_sigaction);
    let flags = EARLIER.get().map_or(0, |earlier| earlier.sa_flags);
    // SAFETY: a handler that somebody registered with these flags has this signature; the default is restored so
    // that the fault, raised again on return, ends the process as it would have without us.
    unsafe {
        match action {
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
            handler if flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
