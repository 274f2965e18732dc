//! How many files a process may have open: rank 0 has a connection for each rank, and systems often allow 1024.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, ErrorKind, Result};
use crate::limits;

/// Sees to it that this process may open as many connections as it needs with so many ranks. The limit that the system lets a
/// process raise itself is raised where it is too low, and no further than is needed: programs may rely on small numbers.
///
/// # Errors
/// [`ErrorKind::Io`] if more are not allowed.
pub(super) fn make_room(ranks: u32) -> Result<()> {
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
    let needed = open + u64::from(ranks); // the one that listens, and one for each but this
    let wanted = needed + limits::STRANGERS as u64 + limits::DESCRIPTORS_SPARE;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let Some(mut allowed) = current.filter(|current| *current < wanted) else { return Ok(()) };
    let raised = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if raised > allowed && setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }).is_ok() {
        allowed = raised;
    }
    if allowed < needed {
        let message = "rank 0 has a connection to each rank, and may not open so many";
        let found = format!("{allowed} (ulimit -n)");
        return Err(Error::new(ErrorKind::Io, message).with_expected(format!("at least {needed} files"), found));
    }
    Ok(())
}
