//! Whether ranks of several processes read together, and which of them: decided by all of them alike, before they plan.

use serde::{Deserialize, Serialize};

use super::Loader;
use super::agree::{differ, told_by_all};
use crate::checkpoint::Checkpoint;
#[cfg(feature = "cuda")]
use crate::collective::nccl_version;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::plan::{Cooperate, DeviceSpec, Processes, World};
use crate::source::{FileSystem, SourceFile};

/// What ranks of several processes share of their reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Sharing {
    /// Those of a node what costs less to pass on than to read again, if they all have NCCL and the files are not in the page
    /// cache anyway, where every rank reads them at the speed of memory.
    #[default]
    Auto,
    /// Those of a node all that more than one of them wants.
    Node,
    /// All ranks, on whatever nodes: for storage that is slow, and shared by nodes.
    Cluster,
    /// Nothing: each rank reads what it wants.
    Never,
}

/// What a rank tells the others of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Circumstances {
    sharing: String,
    node: String,
    /// On a GPU, where there is NCCL.
    able: bool,
    cached: bool,
}

impl Loader {
    /// The world in which the ranks of this loader's [group](Loader::group) share their reading like this. All of them call it,
    /// with the world of their own process. Ranks in host memory share nothing: they read from one page cache.
    ///
    /// # Errors
    /// The group's failure; [`ErrorKind::Peer`] if ranks want to share differently; with [`Sharing::Node`] and
    /// [`Sharing::Cluster`] also where there is no NCCL.
    pub fn sharing(&self, sharing: Sharing, checkpoint: &Checkpoint, world: World) -> Result<World> {
        self.share(sharing, checkpoint, world).inspect_err(|error| self.tell(error))
    }

    fn share(&self, sharing: Sharing, checkpoint: &Checkpoint, world: World) -> Result<World> {
        let (Some(group), Processes::PerRank, &[rank]) = (&self.group, world.processes(), world.driven()) else {
            return Ok(world);
        };
        let on_gpu = matches!(world.device(rank), DeviceSpec::Cuda(_));
        let nccl = if on_gpu { nccl() } else { Err(Error::new(ErrorKind::Unsupported, "not on a GPU")) };
        let mine = Circumstances {
            sharing: format!("{sharing:?}").to_lowercase(),
            node: group.node().into(),
            able: nccl.is_ok(),
            cached: sharing == Sharing::Auto && is_cached(checkpoint),
        };
        let all = told_by_all(group, "how reading is shared", &mine)?;
        differ(&all, "how reading is shared", |other| other.sharing.clone())?;
        let able = all.iter().all(|other| other.able);
        let cooperate = match sharing {
            Sharing::Never => return Ok(world),
            Sharing::Auto if !able || all.iter().all(|other| other.cached) => return Ok(world),
            Sharing::Auto => Cooperate::Auto,
            Sharing::Node | Sharing::Cluster if !on_gpu => return Ok(world),
            Sharing::Node | Sharing::Cluster => {
                nccl?;
                if let Some((other, _)) = (0..).zip(&all).find(|(_, other)| !other.able) {
                    let error = Error::new(ErrorKind::Peer, "a rank has no NCCL, or is not on a GPU");
                    return Err(error.with_rank(crate::extent::Rank(other)));
                }
                Cooperate::Always
            }
        };
        let node_of = |it: &Circumstances| all.iter().position(|other| other.node == it.node).unwrap_or(0) as u32;
        let groups = match sharing {
            Sharing::Cluster => vec![0; all.len()],
            _ => all.iter().map(node_of).collect(),
        };
        Ok(world.reading_together(groups, cooperate))
    }
}

#[cfg(feature = "cuda")]
fn nccl() -> Result<()> {
    nccl_version().map(drop)
}

#[cfg(not(feature = "cuda"))]
fn nccl() -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, "not in this build: NCCL needs the feature cuda"))
}

/// Whether most of the files, as far as a few of them tell, need not be read from storage.
fn is_cached(checkpoint: &Checkpoint) -> bool {
    let files = checkpoint.files();
    let step = files.len().div_ceil(limits::AUTO_FILES).max(1);
    let share = |file: &crate::checkpoint::CheckpointFile| {
        let opened = SourceFile::open(&file.path).ok()?;
        match opened.file_system() {
            Ok(FileSystem::Memory(_)) => Some(1.0),
            _ => opened.resident_fraction(&[(file.data_start, file.identity.size)]),
        }
    };
    let shares: Vec<f64> = files.iter().step_by(step).filter_map(share).collect();
    !shares.is_empty() && shares.iter().sum::<f64>() / shares.len() as f64 >= limits::AUTO_RESIDENT
}
