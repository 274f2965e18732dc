//! The processes of other ranks, as a load sees them.

use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use crate::collective::{Nccl, UniqueId};
use crate::error::{Error, Result};
use crate::launch::Group;

/// Who loads the other ranks: tells of this one's failure, and knows of theirs.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    pub(crate) group: Arc<Group>,
    /// Where ranks that read together meet on their devices; `None` where the plan has nothing to exchange.
    #[cfg(feature = "cuda")]
    pub(crate) meeting: Option<Meeting>,
}

/// What ranks that read together have agreed on.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone)]
pub(crate) struct Meeting {
    pub(crate) nccl: Nccl,
    pub(crate) id: UniqueId,
    /// Most bytes of what each of them reads for one round.
    pub(crate) chunk: u64,
}

impl Peers {
    /// Tells the others, once it is called, that this rank has failed, unless they know of a failure already.
    pub(super) fn telling(&self, error: &Error) -> impl FnOnce() + use<'_> {
        self.group.failing(error)
    }

    /// The failure of another rank, or of this one, if there is any.
    pub(super) fn failure(&self) -> Option<Error> {
        self.group.failure()
    }

    /// What failed, here or at another rank, if that comes to be known within a time and before this load has `stopped`, else
    /// `error`, which may be nothing but its consequence.
    #[cfg(feature = "cuda")]
    pub(super) fn cause_of(&self, error: Error, within: Duration, stopped: impl Fn() -> bool) -> Error {
        let until = Instant::now() + within;
        loop {
            match self.failure() {
                Some(cause) => return cause,
                None if stopped() || Instant::now() >= until => return error,
                None => std::thread::sleep(crate::limits::EVENT_POLL),
            }
        }
    }

    /// Waits until all ranks have loaded.
    pub(super) fn finish(&self) -> Result<()> {
        self.group.await_all("loaded")
    }
}
