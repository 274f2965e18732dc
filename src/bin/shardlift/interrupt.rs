//! Ctrl-C, SIGTERM and SIGHUP: a load that is running is cancelled and drained, as is what waits for other ranks; anything else
//! ends at once; the exit status is 130, 143 or 129.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use shardlift::{Error, ErrorKind, Group, Monitor, Partial, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use crate::output::{Failure, Output};

/// The signals of this process from now on.
#[derive(Debug)]
pub(crate) struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    command: &'static str,
    json: bool,
    /// The first signal; 0 before it came.
    signal: AtomicI32,
    then: Mutex<Then>,
    /// The other ranks, which are to hear of a signal. Locked while they are told.
    group: Mutex<Option<Arc<Group>>>,
    made: Mutex<Made>,
    /// Told when what is made becomes known.
    known: Condvar,
}

/// What would stay on disk if the process ended now.
#[derive(Debug)]
enum Made {
    Nothing,
    /// Something that is not known yet.
    Soon,
    Known(Partial),
}

/// What a signal does.
#[derive(Debug)]
enum Then {
    /// Cancels the load; its error ends the command.
    Cancel(Monitor),
    /// Ends the process: nothing needs to be drained or removed.
    Exit,
    /// Nothing: the command asks.
    Note,
    /// Nothing: the command has begun to say how it ended.
    Ended,
}

impl Interrupt {
    /// Watches for signals; until something else is said they end the process.
    pub(crate) fn install(command: &'static str, json: bool) -> Result<Interrupt> {
        let shared = Arc::new(Shared::new(command, json));
        let failed = |error| Error::new(ErrorKind::Io, "install signal handlers").with_source(error);
        let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
        let mut signals = Signals::new([SIGINT, SIGTERM].into_iter().chain(hangup)).map_err(failed)?;
        // A handler, whatever it does: then a file beyond `ulimit -f` is an error of its write.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(failed)?;
        let theirs = Arc::clone(&shared);
        let watch = move || {
            let mut first: Option<Instant> = None;
            for signal in signals.forever() {
                match first {
                    // Launchers signal a process and then its group: that is asked once.
                    Some(first) if first.elapsed() < TWICE => continue,
                    // Asked twice: whoever asks does not want to wait for the drain.
                    Some(_) => theirs.end_now(signal),
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
                if matches!(*then, Then::Exit) {
                    drop((then, group));
                    // Not here: where nobody reads the output a second signal is still to be heard.
                    let theirs = Arc::clone(&theirs);
                    let tell = move || {
                        let then = theirs.then();
                        if matches!(*then, Then::Exit) {
                            theirs.tell_and_exit(signal);
                        }
                    };
                    if thread::Builder::new().name("shardlift-end".into()).spawn(tell).is_err() {
                        std::process::exit(128 + signal);
                    }
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

    /// From now on something is made which is to be removed even if the process ends at once: what, [`removes`] says.
    ///
    /// [`removes`]: Interrupt::removes
    pub(crate) fn makes(&self) {
        *self.shared.made() = Made::Soon;
    }

    /// This is to be removed even if the process ends at once.
    pub(crate) fn removes(&self, partial: Partial) {
        *self.shared.made() = Made::Known(partial);
        self.shared.known.notify_all();
    }

    /// From now on a signal ends the process; one that has come already is an error.
    pub(crate) fn exits(&self) -> Result<(), Failure> {
        *self.shared.then() = Then::Exit;
        self.check()
    }

    /// From now on a signal is only noted.
    pub(crate) fn waits(&self) {
        *self.shared.then() = Then::Note;
    }

    /// The end of this command is decided, and is said now: one object, not two. Does not return if a signal has said another.
    pub(crate) fn ends(&self) {
        *self.shared.then() = Then::Ended;
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
    fn new(command: &'static str, json: bool) -> Shared {
        let (signal, then, group) = (AtomicI32::new(0), Mutex::new(Then::Exit), Mutex::default());
        Shared { command, json, signal, then, group, made: Mutex::new(Made::Nothing), known: Condvar::new() }
    }

    fn then(&self) -> MutexGuard<'_, Then> {
        self.then.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self) -> MutexGuard<'_, Option<Arc<Group>>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the process was interrupted, and ends it. Called with [`Then`] locked, so that the command says nothing.
    fn tell_and_exit(&self, signal: i32) -> ! {
        let status = Output::new(self.command, self.json).finish(Err(interrupted(signal)));
        std::process::exit(status.into())
    }

    /// Ends the process whatever is under way. Storage that hangs and an output that nobody reads must not keep one that was
    /// told twice.
    fn end_now(self: &Arc<Shared>, signal: i32) -> ! {
        let theirs = Arc::clone(self);
        within(REMOVE, move || theirs.remove_made());
        let theirs = Arc::clone(self);
        within(TELL, move || {
            let then = theirs.then();
            // What the command has begun to say is cut off here, if it takes that long.
            if theirs.json && !matches!(*then, Then::Ended) {
                theirs.tell_and_exit(signal);
            }
        });
        std::process::exit(128 + signal)
    }

    /// Removes what would stay on disk, once it is known.
    fn remove_made(&self) {
        let soon = |made: &mut Made| matches!(made, Made::Soon);
        let made = self.known.wait_while(self.made(), soon).unwrap_or_else(PoisonError::into_inner);
        if let Made::Known(partial) = &*made {
            partial.remove();
        }
    }
}

/// Waits until this is done, but no longer than the bound.
fn within(bound: Duration, work: impl FnOnce() + Send + 'static) {
    let (done, told) = mpsc::channel();
    let work = move || {
        work();
        let _ = done.send(());
    };
    if thread::Builder::new().name("shardlift-end".into()).spawn(work).is_ok() {
        let _ = told.recv_timeout(bound);
    }
}

/// Whether whoever started this process wants a signal to be ignored, as nohup does.
fn is_ignored(signal: i32) -> bool {
    // SAFETY: zeros are a `sigaction`, and without a new one the call writes to it and changes nothing.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut now) == 0 && now.sa_sigaction == libc::SIG_IGN
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

/// How long it may take then to say so.
const TELL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use shardlift::{Checkpoint, Loader, Plan, Rules, World};

    use super::*;

    /// Between the folder of a reshard and the moment in which the command line knows of it.
    #[test]
    fn what_is_being_made_is_removed_when_it_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let (model, out) = (folder.path().join("model.safetensors"), folder.path().join("new/out"));
        let header = br#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        std::fs::write(&model, [&(header.len() as u64).to_le_bytes()[..], header, &[1]].concat()).unwrap();
        let plan = Plan::new(&Checkpoint::open(&model).unwrap(), &Rules::replicate_all(), &World::host(1)).unwrap();

        let interrupt = Interrupt { shared: Arc::new(Shared::new("reshard", false)) };
        interrupt.makes();
        let shared = Arc::clone(&interrupt.shared);
        let remover = thread::spawn(move || shared.remove_made());
        let reshard = Loader::new().start_reshard(&plan, &out, false).unwrap();
        interrupt.removes(reshard.partial());
        remover.join().unwrap();
        assert!(!folder.path().join("new").exists());
        reshard.finish().unwrap_err();
    }
}
