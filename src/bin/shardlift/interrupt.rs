//! Ctrl-C and SIGTERM: the load that is running is cancelled, and the command ends with 130 or 143.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use shardlift::{Error, ErrorKind, Monitor, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::output::Failure;

/// The signals of this process from now on.
#[derive(Debug)]
pub(crate) struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The first signal; 0 before it came.
    signal: AtomicI32,
    monitor: Mutex<Option<Monitor>>,
}

impl Interrupt {
    pub(crate) fn install() -> Result<Interrupt> {
        let shared = Arc::new(Shared::default());
        let failed = |error| Error::new(ErrorKind::Io, "install signal handlers").with_source(error);
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
        let theirs = Arc::clone(&shared);
        let watch = move || {
            for signal in signals.forever() {
                if theirs.signal.swap(signal, Ordering::SeqCst) != 0 {
                    // Asked twice: whoever asks does not want to wait for the drain.
                    std::process::exit(128 + signal);
                }
                if let Some(monitor) = &*theirs.monitor.lock().unwrap_or_else(PoisonError::into_inner) {
                    monitor.cancel();
                }
            }
        };
        std::thread::Builder::new().name("shardlift-signals".into()).spawn(watch).map_err(failed)?;
        Ok(Interrupt { shared })
    }

    /// Lets a signal cancel this load; one that has come already does so now.
    pub(crate) fn cancels(&self, monitor: Monitor) {
        let mut slot = self.shared.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        if self.signal().is_some() {
            monitor.cancel();
        }
        *slot = Some(monitor);
    }

    /// The signal that came, if one did.
    pub(crate) fn signal(&self) -> Option<i32> {
        match self.shared.signal.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal),
        }
    }

    /// An error if a signal came.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.signal() {
            None => Ok(()),
            signal => Err(Failure::from(Error::new(ErrorKind::Cancelled, "interrupted")).with_signal(signal)),
        }
    }
}
