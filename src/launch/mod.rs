//! One process per GPU: who this process is among the ranks, and how the ranks find and hear of each other.
//!
//! [`Launch`] is what a launcher said (torchrun, Open MPI, PMI, Slurm, or flags); [`Group`] is all ranks, connected. Rank
//! 0 is the hub of a star: what any rank says, it tells the others. `docs/launch.md` is the whole story.

#![forbid(unsafe_code)]

mod connection;
mod control;
mod descriptors;
mod env;
mod failure;
mod group;
mod hosts;
mod hub;
mod member;
mod node;
mod rendezvous;
mod shared;
mod steps;
mod vars;
mod wire;

#[cfg(test)]
mod tests;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::plan::{DeviceSpec, World};

pub use group::{Group, GroupOptions};

use env::Found;
use vars::{Named, Vars, agree, at_most, below};

/// Who this process is among the ranks, as its launcher or its flags say, and where the ranks meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    launcher: &'static str,
    rank: Rank,
    size: u32,
    local_rank: Option<u32>,
    local_size: Option<u32>,
    node: String,
    visible_gpus: Option<u32>,
    session: Option<String>,
    meeting: Meeting,
}

/// What was said about where the ranks meet, the first that is there counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Meeting {
    rendezvous: Option<String>,
    master: Option<(String, u16)>,
    first_host: Option<String>,
}

/// What flags say about this process. They go before what a launcher says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchOptions {
    /// The rank of this process. With [`size`](LaunchOptions::size) no launcher is asked.
    pub rank: Option<Rank>,
    /// The number of ranks, one for each process.
    pub size: Option<u32>,
    /// The number of this process among those of its node.
    pub local_rank: Option<u32>,
    /// The number of processes on its node.
    pub local_size: Option<u32>,
    /// What ranks of one node have in common, and others have not.
    pub node: Option<String>,
    /// Where the ranks meet: `tcp://host:port`, an address of rank 0, or `file:///path` on a file system that they share.
    pub rendezvous: Option<String>,
    /// What tells this group from others that may meet at the same place.
    pub session: Option<String>,
}

impl Launch {
    /// What the environment of this process and these flags say; `None` where nobody said anything about ranks.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where they contradict each other; the error shows both values.
    pub fn from_env(options: &LaunchOptions) -> Result<Option<Launch>> {
        #[expect(clippy::disallowed_methods, reason = "the environment of `World::from_env`, asked for when called")]
        Launch::from_vars(&|name| std::env::var(name).ok(), options)
    }

    /// As [`from_env`](Launch::from_env), of an environment that `lookup` knows. The first complete set wins: flags,
    /// torchrun, Open MPI, PMI, Slurm. Other sets are an outer launcher's, and are not looked at.
    ///
    /// # Errors
    /// As [`from_env`](Launch::from_env).
    pub fn from_vars(lookup: &dyn Fn(&str) -> Option<String>, options: &LaunchOptions) -> Result<Option<Launch>> {
        let vars = Vars::new(lookup);
        let LaunchOptions { rank, size, local_rank, local_size, node, rendezvous, session } = options;
        let flag = |value: Option<u32>, name| value.map(|value| Named { value, name });
        let (rank, size) = (flag(rank.map(|rank| rank.0), "--rank"), flag(*size, "size"));
        let (local_rank, local_size) = (flag(*local_rank, "--local-rank"), flag(*local_size, "--local-size"));
        let found = match (rank, size) {
            (Some(rank), Some(size)) => Found {
                launcher: "flags",
                rank,
                size,
                local_rank: None,
                local_size: None,
                node: None,
                session: None,
                first_host: None,
            },
            _ => match env::find(vars)? {
                Some(found) => found,
                None if rank.is_some() => {
                    return Err(Error::new(ErrorKind::Usage, "--rank without the number of ranks"));
                }
                None => return Ok(None),
            },
        };
        agree(Some(found.rank), rank)?;
        agree(Some(found.size), size)?;
        agree(found.local_rank, local_rank)?;
        agree(found.local_size, local_size)?;
        let (local_rank, local_size) = (local_rank.or(found.local_rank), local_size.or(found.local_size));
        below(Some(found.rank), Some(found.size))?;
        below(local_rank, local_size)?;
        at_most(local_size, Some(found.size))?;
        if found.size.value > limits::RANKS_MAX {
            return Err(Error::new(ErrorKind::Usage, "too many ranks")
                .with_expected(format!("at most {}", limits::RANKS_MAX), found.size));
        }
        let node = match (node, found.node) {
            (Some(node), _) => node.clone(),
            (None, Some(number)) => number.to_string(),
            (None, None) => node::identity(),
        };
        Ok(Some(Launch {
            launcher: found.launcher,
            rank: Rank(found.rank.value),
            size: found.size.value,
            local_rank: local_rank.map(|named| named.value),
            local_size: local_size.map(|named| named.value),
            node,
            visible_gpus: vars.raw("CUDA_VISIBLE_DEVICES").map(|list| visible(&list)),
            session: session.clone().or(found.session),
            meeting: Meeting {
                rendezvous: rendezvous.clone(),
                master: if rendezvous.is_none() { master(vars)? } else { None },
                first_host: found.first_host,
            },
        }))
    }

    /// The launcher whose variables these are, or `flags`.
    pub fn launcher(&self) -> &'static str {
        self.launcher
    }

    /// The rank of this process.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The number of ranks.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The number of this process among those of its node, where somebody said it.
    pub fn local_rank(&self) -> Option<u32> {
        self.local_rank
    }

    /// The number of processes on its node, where somebody said it.
    pub fn local_size(&self) -> Option<u32> {
        self.local_size
    }

    /// The name of its node, which ranks of the same node have in common: as `--node` says, else the launcher's number of
    /// it, else host name, network name space and boot of the kernel.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What tells this group from others, where a flag or the launcher says it.
    pub fn session(&self) -> Option<&str> {
        self.session.as_deref()
    }

    /// The number of this rank's GPU among those that the driver shows: 0 if it shows one, else the local rank. `devices`
    /// is how many there are, if the driver was asked; else `CUDA_VISIBLE_DEVICES` may say it.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if there are too few, [`ErrorKind::Usage`] if nobody said which process of its node this is.
    pub fn gpu(&self, devices: Option<u32>) -> Result<u32> {
        let visible = devices.or(self.visible_gpus);
        let too_few = |message: &str, expected: String, found| {
            Err(Error::new(ErrorKind::Device, message).with_expected(expected, found).with_rank(self.rank))
        };
        match (visible, self.local_rank) {
            (Some(0), _) => too_few("no GPU is visible to this rank", "a GPU".into(), 0),
            (Some(1), _) => Ok(0),
            (Some(visible), Some(local)) if local >= visible => {
                too_few("this rank has no GPU", format!("more than {local} for local rank {local}"), visible)
            }
            (_, Some(local)) => Ok(local),
            (_, None) if self.size == 1 => Ok(0),
            (_, None) => {
                let message = format!("which GPU this rank has is not known: {} gave no local rank", self.launcher);
                Err(Error::new(ErrorKind::Usage, message).with_rank(self.rank))
            }
        }
    }

    /// The world of which this process drives one tensor-parallel rank, on this device.
    pub fn world(&self, device: DeviceSpec) -> World {
        World::member(self.rank, self.size, device)
    }

    /// Whether all ranks are known to be on this node.
    fn is_one_node(&self) -> bool {
        self.local_size == Some(self.size)
    }
}

impl World {
    /// The world as a launcher made it (torchrun, Open MPI, PMI, Slurm): this process drives one rank, on the GPU that is
    /// its own; see [`Launch`], which also tells how the ranks meet.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if no launcher started this process, or if its variables contradict each other;
    /// those of [`Launch::gpu`].
    pub fn from_env() -> Result<World> {
        let Some(launch) = Launch::from_env(&LaunchOptions::default())? else {
            return Err(Error::new(ErrorKind::Usage, "no launcher started this process")
                .with_expected("the variables of torchrun, Open MPI, PMI or a Slurm step", "none of them complete"));
        };
        Ok(launch.world(DeviceSpec::Cuda(launch.gpu(None)?)))
    }
}

/// How many GPUs such a list shows: the driver stops at the first entry that is none.
fn visible(list: &str) -> u32 {
    let entries = list.split(',').map(str::trim);
    let shown = entries.take_while(|entry| !entry.is_empty() && !entry.starts_with('-') && *entry != "NoDevFiles");
    u32::try_from(shown.count()).unwrap_or(u32::MAX)
}

/// `MASTER_ADDR` and `MASTER_PORT`, where both are set. Alone the latter may be anything: to a service that is called
/// `master`, Kubernetes gives a URL of that name.
fn master(vars: Vars<'_>) -> Result<Option<(String, u16)>> {
    let Some(host) = vars.text("MASTER_ADDR") else { return Ok(None) };
    let Some(port) = vars.number("MASTER_PORT")? else { return Ok(None) };
    match u16::try_from(port.value) {
        Ok(port) => Ok(Some((host, port))),
        Err(_) => {
            Err(Error::new(ErrorKind::Usage, "MASTER_PORT is no port").with_expected("at most 65535", port.value))
        }
    }
}
