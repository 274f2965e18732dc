//! Ctrl-C and SIGTERM: a load that is running is cancelled and drained, as is what waits for other ranks; anything else ends
//! at once; the exit status is 130 or 143.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use shardlift::{Error, ErrorKind, Group, Monitor, Partial, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::output::{Failure, Output};

/// The signals of this process from now on.
#[derive(Debug)]
pub(crate) struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The first signal; 0 before it came.
    signal: AtomicI32,
    then: Mutex<Then>,
    /// The other ranks, which are to hear of a signal. Locked while they are told.
    group: Mutex<Option<Arc<Group>>>,
    /// What would stay on disk if the process ended now.
    partial: Mutex<Option<Partial>>,
}

/// What a signal does.
#[derive(Debug)]
enum Then {
    /// Cancels the load; its error ends the command.
    Cancel(Monitor),
    /// Ends the process: nothing needs to be drained or removed.
    Exit { command: &'static str, json: bool },
    /// Nothing: the command asks, or is about to end anyway.
    Note,
}

impl Interrupt {
    /// Watches for signals; until something else is said they end the process.
    pub(crate) fn install(command: &'static str, json: bool) -> Result<Interrupt> {
        let then = Mutex::new(Then::Exit { command, json });
        let (signal, group, partial) = (AtomicI32::new(0), Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { signal, then, group, partial });
        let failed = |error| Error::new(ErrorKind::Io, "install signal handlers").with_source(error);
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
        let theirs = Arc::clone(&shared);
        let watch = move || {
            let mut first: Option<Instant> = None;
            for signal in signals.forever() {
                match first {
                    // Launchers signal a process and then its group: that is asked once.
                    Some(first) if first.elapsed() < TWICE => continue,
                    // Asked twice: whoever asks does not want to wait for the drain.
                    Some(_) => {
                        theirs.remove_partial();
                        std::process::exit(128 + signal)
                    }
                    None => first = Some(Instant::now()),
                }
                theirs.signal.store(signal, Ordering::SeqCst);
                let (then, group) = (theirs.then(), theirs.group());
                if let Then::Cancel(monitor) = &*then {
                    monitor.cancel(); // before others: then it ends as cancelled, not as failed elsewhere
                }
                if let Some(group) = &*group {
                    cancel(group); // whatever this process waits for them for, or they for it, ends
                    continue;
                }
                match &*then {
                    Then::Cancel(_) => {}
                    Then::Exit { command, json } => {
                        let status = Output::new(command, *json).finish(Err(interrupted(signal)));
                        std::process::exit(status.into());
                    }
                    Then::Note => {}
                }
            }
        };
        thread::Builder::new().name("shardlift-signals".into()).spawn(watch).map_err(failed)?;
        Ok(Interrupt { shared })
    }

    /// From now on a signal cancels what this group does, too, and never ends the process before the others were told; one that
    /// has come already does so now.
    pub(crate) fn joined(&self, group: &Arc<Group>) {
        let mut shared = self.shared.group();
        if self.signal().is_some() {
            cancel(group);
        }
        *shared = Some(Arc::clone(group));
    }

    /// The others need not hear of a signal any more. Once this returns nobody here tells them.
    pub(crate) fn parted(&self) {
        *self.shared.group() = None;
    }

    /// From now on a signal cancels this load; one that has come already does so now.
    pub(crate) fn cancels(&self, monitor: Monitor) {
        let mut then = self.shared.then();
        if self.signal().is_some() {
            monitor.cancel();
        }
        *then = Then::Cancel(monitor);
    }

    /// This is to be removed even if the process ends at once.
    pub(crate) fn removes(&self, partial: Partial) {
        *self.shared.partial.lock().unwrap_or_else(PoisonError::into_inner) = Some(partial);
    }

    /// From now on a signal ends the process; one that has come already is an error.
    pub(crate) fn exits(&self, command: &'static str, json: bool) -> Result<(), Failure> {
        *self.shared.then() = Then::Exit { command, json };
        self.check()
    }

    /// From now on a signal is only noted.
    pub(crate) fn waits(&self) {
        *self.shared.then() = Then::Note;
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
            Some(signal) => Err(interrupted(signal)),
        }
    }
}

impl Shared {
    fn then(&self) -> MutexGuard<'_, Then> {
        self.then.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self) -> MutexGuard<'_, Option<Arc<Group>>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what would stay on disk, or gives up: storage that hangs must not keep a process that was told twice.
    fn remove_partial(&self) {
        let Some(partial) = self.partial.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let (done, removed) = mpsc::channel();
        let remove = move || {
            partial.remove();
            let _ = done.send(());
        };
        if thread::Builder::new().name("shardlift-remove".into()).spawn(remove).is_ok() {
            let _ = removed.recv_timeout(REMOVE);
        }
    }
}

fn cancel(group: &Group) {
    group.fail(&Error::new(ErrorKind::Cancelled, "the load was cancelled"));
}

fn interrupted(signal: i32) -> Failure {
    Failure::from(Error::new(ErrorKind::Cancelled, "interrupted")).with_signal(Some(signal))
}

/// Signals nearer to the first than this are the same request.
const TWICE: Duration = Duration::from_secs(1);

/// How long a process that was told twice to end may take to remove what it has written.
const REMOVE: Duration = Duration::from_secs(2);
