//! Groups: what a thread collects between `ncclGroupStart` and `ncclGroupEnd`, and what it does then.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::abi::{Code, IN_PROGRESS, INVALID_USAGE, Result, SUCCESS, UniqueId};
use crate::comm::Comm;
use crate::sim::{dawdle, fail};
use crate::transfer::{self, Op};

#[derive(Default)]
struct Group {
    depth: u32,
    inits: Vec<Init>,
    ops: Vec<(Arc<Comm>, Op)>,
    /// Of the first call in it that failed: then nothing of it happens.
    failed: Option<Code>,
}

/// A communicator to be made.
pub(crate) struct Init {
    pub(crate) comm: Arc<Comm>,
    pub(crate) id: UniqueId,
    pub(crate) hangs: bool,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

pub(crate) fn start() {
    GROUP.with_borrow_mut(|group| group.depth += 1);
}

/// Notes that a call in a group failed, if there is a group.
pub(crate) fn failed(code: Code) {
    GROUP.with_borrow_mut(|group| {
        if group.depth > 0 {
            group.failed.get_or_insert(code);
        }
    });
}

/// Makes a communicator, now or at the end of the group.
pub(crate) fn init(init: Init) -> Result<Code> {
    if let Some(init) = collect(init, |group, init| group.inits.push(init)) { meet(vec![init]) } else { Ok(SUCCESS) }
}

/// Launches an operation, now or at the end of the group.
pub(crate) fn operation(comm: Arc<Comm>, op: Op) -> Result<Code> {
    match collect((comm, op), |group, op| group.ops.push(op)) {
        Some((comm, op)) => launch(comm, vec![op]),
        None => Ok(SUCCESS),
    }
}

fn collect<T>(item: T, into: impl FnOnce(&mut Group, T)) -> Option<T> {
    GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            return Some(item);
        }
        into(group, item);
        None
    })
}

/// Waits until a communicator of the group is aborted, which is then what failed in it.
pub(crate) fn until_aborted() {
    let comms: Vec<Arc<Comm>> = GROUP.with_borrow(|group| group.ops.iter().map(|(comm, _)| Arc::clone(comm)).collect());
    while !comms.iter().any(|comm| comm.is_aborted()) {
        thread::sleep(Duration::from_millis(2));
    }
    failed(fail(INVALID_USAGE, "the communicator was aborted"));
}

/// Ends a group: the outermost one does what was collected.
pub(crate) fn end() -> Result<Code> {
    let group = GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            return Err(fail(INVALID_USAGE, "ncclGroupEnd: not in a group call."));
        }
        group.depth -= 1;
        Ok((group.depth == 0).then(|| std::mem::take(group)))
    })?;
    let Some(group) = group else { return Ok(SUCCESS) };
    if let Some(code) = group.failed {
        return Err(code);
    }
    let mut all = SUCCESS;
    if !group.inits.is_empty() {
        all = meet(group.inits)?;
    }
    let mut comms: Vec<(Arc<Comm>, Vec<Op>)> = Vec::new();
    for (comm, op) in group.ops {
        match comms.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &comm)) {
            Some((_, ops)) => ops.push(op),
            None => comms.push((comm, vec![op])),
        }
    }
    for (comm, ops) in comms {
        if launch(comm, ops)? == IN_PROGRESS {
            all = IN_PROGRESS;
        }
    }
    Ok(all)
}

/// Lets communicators meet their peers, each on a thread of its own; waits for those that block.
fn meet(inits: Vec<Init>) -> Result<Code> {
    let comms: Vec<Arc<Comm>> = inits.iter().map(|init| Arc::clone(&init.comm)).collect();
    let threads: Vec<_> =
        inits.into_iter().map(|init| thread::spawn(move || init.comm.meet(&init.id, init.hangs))).collect();
    let mut all = SUCCESS;
    for (comm, thread) in comms.iter().zip(threads) {
        if !comm.blocking {
            all = IN_PROGRESS;
        } else if thread.join().is_ok() && comm.status() != SUCCESS {
            return Err(comm.status());
        }
    }
    Ok(all)
}

/// Puts operations of a communicator into their stream: at once if its calls block, else after the call.
fn launch(comm: Arc<Comm>, ops: Vec<Op>) -> Result<Code> {
    comm.ready()?;
    if comm.blocking {
        return transfer::launch(&comm, ops).map(|()| SUCCESS);
    }
    comm.set_status(IN_PROGRESS);
    let later = move || {
        dawdle();
        let outcome = transfer::launch(&comm, ops);
        // Unless the operation has failed meanwhile.
        comm.launched(outcome.err().unwrap_or(SUCCESS));
    };
    thread::spawn(later);
    Ok(IN_PROGRESS)
}
