//! Counts the system calls of a process, each thread's apart, by tracing it (ptrace): nothing else has to be installed,
//! and no rights are needed for a process of one's own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, c_void, pid_t};

/// What a traced process calls to begin a part that is counted, and again to end it: nothing else asks for this.
pub(crate) const MARK: i64 = libc::SYS_getppid;

/// Calls of a traced process: thread name, number of the call, how often.
pub(crate) type Calls = BTreeMap<(String, i64), u64>;

/// Begins, or ends, the part of this process whose calls are counted.
pub(crate) fn mark() {
    let _parent = rustix::process::getppid();
}

/// Runs a command to its end and counts its calls: between its [marks](mark), or all of them.
///
/// # Errors
/// The system's own, also where it allows no tracing; and a command that failed.
pub(crate) fn count(command: &mut Command, between_marks: bool) -> io::Result<Calls> {
    let traced = || match request(libc::PTRACE_TRACEME, 0, 0) {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: between fork and exec it makes one call of the system, and no other.
    let child = unsafe { command.pre_exec(traced) }.spawn()?;
    let child = child.id() as pid_t;
    let mut trace = Trace { counted: !between_marks, threads: BTreeMap::new(), calls: Calls::new() };
    loop {
        let mut status = 0;
        // SAFETY: a place for the status.
        let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        match thread {
            -1 => return Err(io::Error::last_os_error()),
            _ if libc::WIFSTOPPED(status) => trace.stopped(thread, status, child)?,
            _ if thread != child => {}
            _ if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 => return Ok(trace.calls),
            _ => return Err(io::Error::other(format!("the traced process ended with status {status:#x}"))),
        }
    }
}

struct Trace {
    counted: bool,
    /// Threads that run, and what they called.
    threads: BTreeMap<pid_t, BTreeMap<i64, u64>>,
    calls: Calls,
}

impl Trace {
    /// Notes why a thread has stopped, and lets it go on.
    fn stopped(&mut self, thread: pid_t, status: c_int, child: pid_t) -> io::Result<()> {
        let known = self.threads.contains_key(&thread);
        let calls = self.threads.entry(thread).or_default();
        let mut signal = 0;
        match (libc::WSTOPSIG(status), status >> 16) {
            (libc::SIGTRAP, 0) if !known => {
                let options = libc::PTRACE_O_TRACESYSGOOD
                    | libc::PTRACE_O_TRACECLONE
                    | libc::PTRACE_O_TRACEEXIT
                    | libc::PTRACE_O_EXITKILL;
                if request(libc::PTRACE_SETOPTIONS, thread, options as usize) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // A thread's first stop.
            (libc::SIGSTOP, _) if !known => {}
            (libc::SIGTRAP, libc::PTRACE_EVENT_EXIT) => {
                let calls = mem::take(calls);
                let name = fs::read_to_string(format!("/proc/{child}/task/{thread}/comm"));
                let name = name.as_deref().map_or("unknown", str::trim_end);
                for (call, count) in calls {
                    *self.calls.entry((name.into(), call)).or_default() += count;
                }
            }
            (libc::SIGTRAP, event) if event > 0 => {}
            (stop, _) if stop == libc::SIGTRAP | 0x80 => match entered(thread)? {
                Some(MARK) => self.counted = !self.counted,
                Some(call) if self.counted => *calls.entry(call).or_default() += 1,
                _ => {}
            },
            (other, _) => signal = other,
        }
        // A thread that was killed meanwhile does not go on, and that is told by the next wait.
        request(libc::PTRACE_SYSCALL, thread, signal as usize);
        Ok(())
    }
}

/// The number of the call that a stopped thread makes, if it begins one.
fn entered(thread: pid_t) -> io::Result<Option<i64>> {
    // SAFETY: integers, for which zeros are values.
    let mut info: libc::ptrace_syscall_info = unsafe { mem::zeroed() };
    let size = size_of_val(&info);
    // SAFETY: the thread is stopped; the kernel writes at most so many bytes.
    let told = unsafe {
        libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size as *mut c_void, (&raw mut info).cast::<c_void>())
    };
    if told < 0 {
        return Err(io::Error::last_os_error());
    }
    match info.op {
        // SAFETY: the union has this member for this kind of stop.
        libc::PTRACE_SYSCALL_INFO_ENTRY => Ok(Some(unsafe { info.u.entry.nr as i64 })),
        _ => Ok(None),
    }
}

/// A request with a number.
fn request(request: libc::c_uint, thread: pid_t, number: usize) -> i64 {
    // SAFETY: none of the requests made here takes a pointer.
    unsafe { libc::ptrace(request, thread, std::ptr::null_mut::<c_void>(), number as *mut c_void) }
}
