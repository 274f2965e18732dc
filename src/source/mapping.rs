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

/// An asynchronous note of broken memory that nobody touched yet (siginfo's `si_code` in Linux).
const BUS_MCEERR_AO: libc::c_int = 5;

/// Hands the signal to the handler that was there before ours.
///
/// # Safety
/// Called from a signal handler with its own arguments.
unsafe fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let action = EARLIER.get().map_or(libc::SIG_DFL, |earlier| earlier.sa_sigaction);
    let flags = EARLIER.get().map_or(0, |earlier| earlier.sa_flags);
    // SAFETY: a handler that somebody registered with these flags has this signature; `sigaction` and `raise` are
    // async-signal-safe.
    unsafe {
        // What was sent does not come again on return as a fault does, and the system never ignores a fault.
        let sent = (*info).si_code <= 0 || (*info).si_code == BUS_MCEERR_AO;
        match action {
            libc::SIG_IGN if sent => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
                if sent {
                    libc::raise(signal);
                }
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};
    use std::thread;

    use tempfile::NamedTempFile;

    use super::*;

    const PAGES: usize = 8;

    /// A file of [`PAGES`] pages, each full of its number counted from 1, and its mapping.
    fn mapped() -> (NamedTempFile, Mapping) {
        let file = NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (1..=PAGES as u8).flat_map(|number| vec![number; rustix::param::page_size()]).collect();
        std::fs::write(file.path(), bytes).unwrap();
        let mapping = Mapping::new(&SourceFile::open(file.path()).unwrap()).unwrap();
        (file, mapping)
    }

    /// The first and the last byte of a page, without [`Mapping::populate`].
    fn touch(mapping: &Mapping, page: usize) -> [u8; 2] {
        let size = rustix::param::page_size();
        // SAFETY: both lie in the mapping, which the guard keeps readable.
        [page * size, (page + 1) * size - 1].map(|at| unsafe { mapping.address().add(at).read_volatile() })
    }

    #[test]
    fn missing_pages_read_as_zeros_and_are_remembered() {
        let (file, mapping) = mapped();
        let (_intact_file, intact) = mapped();
        file.as_file().set_len(3 * rustix::param::page_size() as u64 + 100).unwrap();
        assert_eq!(touch(&mapping, 0), [1, 1]);
        assert_eq!(touch(&mapping, 3), [4, 0], "the system fills the last page up");
        assert!(!mapping.broken());
        for page in [7, 4, 5, 4] {
            assert_eq!(touch(&mapping, page), [0, 0]);
            assert!(mapping.broken());
        }
        assert_eq!(touch(&mapping, 2), [3, 3]);
        assert_eq!(touch(&intact, 7), [8, 8]);
        assert!(!intact.broken());
    }

    #[test]
    fn populating_missing_pages_is_an_error() {
        let (file, mapping) = mapped();
        let page = rustix::param::page_size();
        file.as_file().set_len(2 * page as u64).unwrap();
        mapping.populate(100, 2 * page - 100).unwrap();
        // Linux before 5.14 does not know how.
        if let Err(error) = mapping.populate(page as u64, 2 * page) {
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        }
        assert!(!mapping.broken());
    }

    #[test]
    fn threads_may_meet_at_a_missing_page() {
        for _ in 0..20 {
            let (file, mapping) = mapped();
            file.as_file().set_len(0).unwrap();
            thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| assert!((0..PAGES).all(|page| touch(&mapping, page) == [0, 0])));
                }
            });
            assert!(mapping.broken());
        }
    }

    #[test]
    fn guards_are_reused() {
        const AT_ONCE: usize = 100;
        let (file, _) = mapped();
        let source = SourceFile::open(file.path()).unwrap();
        let map = || Mapping::new(&source).unwrap();
        let mut mappings: Vec<_> = (0..AT_ONCE).map(|_| map()).collect();
        assert!(Guard::all().count() >= AT_ONCE);
        for at in (0..AT_ONCE).cycle().take(20 * AT_ONCE) {
            mappings[at] = map();
        }
        // Other tests of this process have a few.
        assert!(Guard::all().count() < 2 * AT_ONCE, "{} guards", Guard::all().count());
        file.as_file().set_len(0).unwrap();
        touch(&mappings[7], 0);
        assert_eq!(mappings.iter().filter(|mapping| mapping.broken()).count(), 1);
        drop(mappings);
        file.as_file().set_len((PAGES * rustix::param::page_size()) as u64).unwrap();
        let again: Vec<_> = (0..AT_ONCE).map(|_| map()).collect();
        assert!(!again.iter().any(Mapping::broken), "a guard remembers another mapping");
    }

    /// Runs itself in processes of their own, which fault at a mapping that is none of ours, or are sent the signal.
    #[test]
    fn a_signal_that_is_not_ours_is_the_earlier_handlers() {
        const CASE: &str = "SHARDLIFT_TEST_SIGBUS";
        #[expect(clippy::disallowed_methods, reason = "this test speaks to itself in another process")]
        if let Ok(case) = std::env::var(CASE) {
            let (earlier, cause) = case.split_once(", ").unwrap();
            in_child(earlier, cause);
        }
        let name = "source::mapping::tests::a_signal_that_is_not_ours_is_the_earlier_handlers";
        let exited = |code| (Some(code), None);
        let killed = (None, Some(libc::SIGBUS));
        // The system ignores what was sent, never a fault. Rust's own handler waits for the fault to come again.
        for (earlier, after_fault, after_sent) in [
            ("as Rust starts", killed, exited(0)),
            ("default", killed, killed),
            ("ignore", killed, exited(0)),
            ("plain", exited(42), exited(42)),
            ("with info", exited(43), exited(44)),
        ] {
            for (cause, expected) in [("fault", after_fault), ("sent", after_sent), ("memory error", after_sent)] {
                let mut child = Command::new(std::env::current_exe().unwrap());
                child.args(["--exact", name]).stdout(Stdio::null()).stderr(Stdio::null());
                child.env(CASE, format!("{earlier}, {cause}"));
                // A sanitizer would otherwise be the earlier handler, and end the process in its own way.
                let status = child.env("ASAN_OPTIONS", "handle_sigbus=0").status().unwrap();
                assert_eq!((status.code(), status.signal()), expected, "{earlier}, {cause}");
            }
        }
    }

    fn in_child(earlier: &str, cause: &str) -> ! {
        extern "C" fn plain(_signal: libc::c_int) {
            // SAFETY: ends the process; async-signal-safe.
            unsafe { libc::_exit(42) }
        }
        extern "C" fn with_info(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
            // SAFETY: ends the process; `info` is what the system passed to our handler, handed on.
            unsafe { libc::_exit(if (*info).si_code == BUS_ADRERR { 43 } else { 44 }) }
        }
        let (handler, flags) = match earlier {
            "plain" => (plain as *const () as usize, 0),
            "with info" => (with_info as *const () as usize, libc::SA_SIGINFO),
            "ignore" => (libc::SIG_IGN, 0),
            _ => (libc::SIG_DFL, 0),
        };
        // SAFETY: plain calls with valid pointers; the handlers fit their flags. No core is wanted of this death.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
            if earlier != "as Rust starts" {
                let mut action: libc::sigaction = std::mem::zeroed();
                (action.sa_sigaction, action.sa_flags) = (handler, flags);
                libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            }
        }
        let (file, ours) = mapped();
        let theirs = MmapOptions::new().map_raw_read_only(file.as_file()).unwrap();
        file.as_file().set_len(0).unwrap();
        file.close().unwrap(); // nobody else removes it
        assert_eq!(touch(&ours, 1), [0, 0]);
        match cause {
            // SAFETY: the address is mapped; the signal is what this is about.
            "fault" => drop(unsafe { theirs.as_ptr().read_volatile() }),
            "sent" => send(libc::SI_USER),
            _ => send(BUS_MCEERR_AO),
        }
        if earlier == "ignore" {
            assert_eq!(touch(&ours, 2), [0, 0], "the guard is still there");
        }
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) }
    }

    /// Sends SIGBUS with this `si_code` to this thread.
    fn send(code: libc::c_int) {
        // SAFETY: a `siginfo_t` of zeros is one; a process may send itself any code.
        let sent = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            info.si_code = code;
            let (process, thread) = (libc::getpid(), libc::gettid());
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, &info)
        };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
    }
}
