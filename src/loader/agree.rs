//! What ranks of several processes make sure of before anything moves: that they are about to load the same, the same way.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use crate::collective::{Nccl, UniqueId};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{FileId, Rank};
use crate::launch::Group;
#[cfg(feature = "cuda")]
use crate::pipeline::Meeting;
use crate::pipeline::Peers;
use crate::plan::{Exchange, Plan, Processes};

/// What a rank is about to load, as it tells the others.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    version: String,
    files: Vec<FileClaim>,
    plan: u64,
    /// Who reads what for whom.
    reading: u64,
    node: String,
    /// The most bytes that it reads for a round, as far as its staging memory goes.
    chunk: u64,
}

/// A file of the checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct FileClaim {
    size: u64,
    header: u64,
    path: String,
    device: u64,
    inode: u64,
    modified_ns: i128,
}

/// Compares what the ranks of a group load; `None` without a group.
///
/// # Errors
/// [`ErrorKind::Peer`] at all ranks if they disagree, saying which ones about what; the group's failure;
/// [`ErrorKind::Usage`] if the plan is not for a process of this group.
pub(super) fn agree(group: Option<&Arc<Group>>, plan: &Plan, slot_bytes: usize) -> Result<Option<Peers>> {
    if plan.world().processes() == Processes::PerRank && plan.world().driven().len() != 1 {
        return Err(Error::new(ErrorKind::Usage, "a plan of many processes is to look at: each loads one of its own"));
    }
    match group {
        Some(group) => peers(group, plan, slot_bytes).map(Some),
        None => alone(plan).map(|()| None),
    }
}

/// That a process can carry this plan out without a group.
///
/// # Errors
/// [`ErrorKind::Usage`] if others read for it.
pub(super) fn alone(plan: &Plan) -> Result<()> {
    if plan.exchanges() {
        return Err(Error::new(ErrorKind::Usage, "ranks that read together load as a group"));
    }
    Ok(())
}

fn peers(group: &Arc<Group>, plan: &Plan, slot_bytes: usize) -> Result<Peers> {
    let (world, rank) = (plan.world(), group.rank());
    if world.processes() != Processes::PerRank || world.driven() != [rank] || world.size() != group.size() {
        let driven: Vec<String> = world.driven().iter().map(ToString::to_string).collect();
        let found = format!("rank {} of {}", driven.join(","), world.size());
        return Err(Error::new(ErrorKind::Usage, "the plan is for another process than this one of the group")
            .with_expected(format!("rank {rank} of {}", group.size()), found));
    }
    if cfg!(not(feature = "cuda")) && plan.exchanges() {
        return Err(Error::new(ErrorKind::Unsupported, "not in this build: reading together needs the feature cuda"));
    }
    let members = plan.partners(rank).len();
    let mine = Claim {
        version: env!("CARGO_PKG_VERSION").into(),
        files: plan.checkpoint().files().iter().map(FileClaim::of).collect(),
        plan: plan.digest(),
        reading: plan.reading_digest(),
        node: group.node().into(),
        chunk: Exchange::chunk(members, slot_bytes),
    };
    let all = told_by_all(group, "what is loaded", &mine)?;
    compare(&all, plan)?;
    Ok(Peers {
        group: Arc::clone(group),
        #[cfg(feature = "cuda")]
        meeting: meeting(group, plan, all.iter().map(|claim| claim.chunk).min().unwrap_or(mine.chunk))?,
    })
}

/// What every rank tells the others, in their order; this one tells `mine`.
pub(super) fn told_by_all<T: Serialize + DeserializeOwned>(group: &Group, what: &str, mine: &T) -> Result<Vec<T>> {
    let text = |error: serde_json::Error| Error::new(ErrorKind::Peer, format!("cannot tell or read {what}: {error}"));
    let all = group.exchange(what, serde_json::to_vec(mine).map_err(text)?)?;
    all.iter().map(|told| serde_json::from_slice(told).map_err(text)).collect()
}

/// Where the ranks that read together meet; those who exchange nothing with each other have different places.
#[cfg(feature = "cuda")]
fn meeting(group: &Group, plan: &Plan, chunk: u64) -> Result<Option<Meeting>> {
    // Of other groups, which only need to know that all are equal in this.
    if plan.world().groups().is_empty() {
        return Ok(None);
    }
    let members = plan.partners(group.rank());
    let nccl = if members.is_empty() { None } else { Some(Nccl::open()?) };
    let id = match nccl {
        Some(nccl) if members[0] == group.rank() => nccl.unique_id()?.as_bytes().to_vec(),
        _ => Vec::new(),
    };
    let ids = group.exchange("where ranks meet", id)?;
    let Some(nccl) = nccl else { return Ok(None) };
    let of_first = |_| Error::new(ErrorKind::Peer, "gave no id to meet at").with_rank(members[0]);
    let id = <[u8; UniqueId::BYTES]>::try_from(&ids[members[0].index()][..]).map_err(of_first)?;
    Ok(Some(Meeting { nccl, id: UniqueId::from_bytes(id), chunk }))
}

impl FileClaim {
    fn of(file: &crate::checkpoint::CheckpointFile) -> FileClaim {
        let identity = &file.identity;
        FileClaim {
            size: identity.size,
            header: file.header_hash,
            path: file.path.to_string_lossy().into_owned(),
            device: identity.device,
            inode: identity.inode,
            modified_ns: identity.modified_ns,
        }
    }
}

/// The first thing that ranks disagree about.
fn compare(all: &[Claim], plan: &Plan) -> Result<()> {
    differ(all, "the version of shardlift", |claim| claim.version.clone())?;
    differ(all, "the number of files", |claim| claim.files.len())?;
    for (at, file) in plan.checkpoint().files().iter().enumerate() {
        let named = |error: Error| error.with_file(&plan.file(FileId(at as u32)).path);
        let name = &file.name;
        differ(all, &format!("the size of {name}"), |claim| claim.files[at].size).map_err(named)?;
        differ(all, &format!("the header of {name}"), |claim| format!("{:016x}", claim.files[at].header))
            .map_err(named)?;
        same_file(all, at, name).map_err(named)?;
    }
    differ(all, "the plan", |claim| format!("{:016x}", claim.plan))?;
    differ(all, "who reads what", |claim| format!("{:016x}", claim.reading))
}

/// An error that names the ranks with the rarest of several values.
pub(super) fn differ<C, T: PartialEq + std::fmt::Display>(
    all: &[C],
    what: &str,
    value: impl Fn(&C) -> T,
) -> Result<()> {
    let values: Vec<T> = all.iter().map(value).collect();
    if values.windows(2).all(|pair| pair[0] == pair[1]) {
        return Ok(());
    }
    let times = |value: &T| values.iter().filter(|other| *other == value).count();
    let most = values.iter().rev().max_by_key(|value| times(value)).expect("bug in shardlift: a group of no ranks");
    let odd = values.iter().find(|value| *value != most).expect("bug in shardlift: all are equal");
    let holders = |value: &T| numbered(&values, |other| other == value);
    Err(Error::new(ErrorKind::Peer, format!("ranks disagree about {what}"))
        .with_rank(Rank(values.iter().position(|value| value == odd).unwrap_or(0) as u32))
        .with_expected(format!("{most} ({})", holders(most)), format!("{odd} ({})", holders(odd))))
}

/// Ranks of a node that have a file under one name on one device have the same file, and it does not change.
fn same_file(all: &[Claim], at: usize, name: &str) -> Result<()> {
    for (rank, claim) in (0..).zip(all) {
        let mine = &claim.files[at];
        let same = |other: &Claim| {
            let theirs = &other.files[at];
            other.node == claim.node && theirs.device == mine.device && theirs.path == mine.path
        };
        let Some(first) = all.iter().position(same) else { continue };
        let theirs = &all[first].files[at];
        if (theirs.inode, theirs.modified_ns) != (mine.inode, mine.modified_ns) {
            let is = |file: &FileClaim, rank: usize| {
                format!("inode {} changed at {} ns (rank {rank})", file.inode, file.modified_ns)
            };
            return Err(Error::new(ErrorKind::Peer, format!("ranks disagree about the file {name}"))
                .with_rank(Rank(rank as u32))
                .with_expected(is(theirs, first), is(mine, rank)));
        }
    }
    Ok(())
}

/// The ranks for which `has` holds, as a few words.
fn numbered<T>(values: &[T], has: impl Fn(&T) -> bool) -> String {
    let ranks: Vec<String> =
        values.iter().enumerate().filter(|(_, value)| has(value)).map(|(rank, _)| rank.to_string()).collect();
    let shown = ranks.iter().take(crate::limits::SPANS_SHOWN).cloned().collect::<Vec<_>>().join(",");
    let more = if ranks.len() > crate::limits::SPANS_SHOWN { ",.." } else { "" };
    format!("rank{} {shown}{more}", if ranks.len() == 1 { "" } else { "s" })
}
