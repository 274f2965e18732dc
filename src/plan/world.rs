//! Ranks, the mesh that names their coordinates, and which of them this process drives. Plain data.

use crate::extent::Rank;

/// Who takes part in a load: the mesh of ranks, how they are spread over processes, and the ranks and devices that
/// this process drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    mesh: Mesh,
    processes: Processes,
    driven: Vec<Rank>,
    device: DeviceSpec,
}

/// Sizes of the parallel axes, slowest to fastest: rank = ((dp * PP + pp) * CP + cp) * TP + tp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mesh {
    /// Data parallel.
    pub dp: u32,
    /// Pipeline parallel.
    pub pp: u32,
    /// Context parallel.
    pub cp: u32,
    /// Tensor parallel.
    pub tp: u32,
}

/// How ranks are spread over processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Processes {
    /// One process drives all ranks: a byte is read once and goes to every rank that wants it.
    One,
    /// One process per rank: each reads exactly its own bytes.
    PerRank,
}

/// What kind of memory the ranks of this process live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DeviceSpec {
    /// Host memory; reads go straight into it where they fit.
    #[default]
    Host,
    /// Host memory behind a queue of its own, the way a GPU is reached: every byte goes through the staging ring.
    HostStaged,
}

impl World {
    /// One process that drives `ranks` tensor-parallel ranks in host memory.
    pub fn host(ranks: u32) -> World {
        World {
            mesh: Mesh { dp: 1, pp: 1, cp: 1, tp: ranks },
            processes: Processes::One,
            driven: (0..ranks).map(Rank).collect(),
            device: DeviceSpec::Host,
        }
    }

    /// The ranks that this process drives, ascending.
    pub fn driven(&self) -> &[Rank] {
        &self.driven
    }

    /// The kind of memory of this process's ranks.
    pub fn device(&self) -> DeviceSpec {
        self.device
    }

    /// The number of ranks.
    pub fn size(&self) -> u32 {
        self.mesh.dp * self.mesh.pp * self.mesh.cp * self.mesh.tp
    }
}
