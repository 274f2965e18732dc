//! cuFile's driver: opened when an engine is first made, once, on a thread that nobody has to wait for.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::library::{Failure, Library};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::Direct;
use crate::sync::lock;

/// How far opening is.
#[derive(Debug, Clone, Copy)]
enum State {
    Closed,
    /// A thread is in the library.
    Opening,
    Open(Direct),
    /// Whoever comes next tries again.
    Failed(Failure),
}

static STATE: Mutex<State> = Mutex::new(State::Closed);
static CHANGED: Condvar = Condvar::new();

/// What is known of a library whose driver is open, and which was or was not told in time to read directly or fail: what it says
/// itself, where it says that, also if somebody else has opened it.
fn direct(library: Library, told: bool) -> Direct {
    let indirect = library.allows_compat().unwrap_or(!told);
    if indirect { Direct::Unknown } else { Direct::Known }
}

/// The library with its driver open, and whether it is known to read directly. One that does not open in time goes on doing
/// so, and whoever asks next waits for that.
///
/// # Errors
/// [`ErrorKind::Device`] if there is no library or it refuses, [`ErrorKind::Stalled`] past the deadline.
pub(super) fn open(deadline: Duration) -> Result<(Library, Direct)> {
    let library = Library::load()?;
    let began = Instant::now();
    let mut state = lock(&STATE);
    if matches!(*state, State::Closed | State::Failed(_)) {
        let thread = thread::Builder::new().name("shardlift-cufile".into()).spawn(move || {
            // Before it opens: afterwards it would be too late.
            let told = library.forbid_compat();
            let opened = library.open_driver();
            *lock(&STATE) = opened.map_or_else(State::Failed, |()| State::Open(direct(library, told)));
            CHANGED.notify_all();
        });
        thread.map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a thread: {error}")))?;
        *state = State::Opening;
    }
    loop {
        match *state {
            State::Open(direct) => return Ok((library, direct)),
            State::Failed(failure) => return Err(failure.into()),
            State::Opening | State::Closed => {}
        }
        let left = deadline.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Err(Error::new(ErrorKind::Stalled, format!("cuFileDriverOpen did not come back for {deadline:?}")));
        }
        state = CHANGED.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}
