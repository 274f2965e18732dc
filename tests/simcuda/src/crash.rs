//! An operation that touches memory it must not dies with its name.

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    /// What this thread runs: the call, and of a kernel its name.
    static RUNNING: Cell<Option<(&'static str, &'static str)>> = const { Cell::new(None) };
}

/// Runs a part of an operation; a fault in it is reported under these names.
pub(crate) fn watched(call: &'static str, kernel: &'static str, part: impl FnOnce()) {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(install);
    RUNNING.set(Some((call, kernel)));
    part();
    RUNNING.set(None);
}

/// The handler that was there before.
static EARLIER: AtomicUsize = AtomicUsize::new(0);

fn install() {
    // SAFETY: the handler only writes, and passes on what is not the twin's; the structure is filled whole.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGSEGV, std::ptr::null(), &mut action);
        EARLIER.store(action.sa_sigaction, Ordering::Relaxed);
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut());
    }
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    if let Some((call, kernel)) = RUNNING.get() {
        let parts = ["simcuda: VIOLATION ", call, ": ", kernel, " touched memory that is not there\n"];
        for part in parts {
            // SAFETY: write is allowed in a handler.
            unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
        }
        // SAFETY: allowed in a handler.
        unsafe { libc::abort() }
    }
    match EARLIER.load(Ordering::Relaxed) {
        // SAFETY: the default action, which the instruction meets when it is tried again.
        libc::SIG_DFL | libc::SIG_IGN => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
        earlier => {
            // SAFETY: an address that sigaction gave as a handler. One without SA_SIGINFO ignores what it gets more.
            let earlier: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(earlier) };
            earlier(signal, info, context);
        }
    }
}
