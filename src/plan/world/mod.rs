//! Ranks, the mesh that names their coordinates, and which of them this process drives. Plain data.

mod coord;
mod mesh;
mod together;

use std::fmt;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

pub use coord::Coord;
pub(super) use mesh::divisor_of;
pub use mesh::{Ax, Mesh, MeshOrder};
pub use together::Cooperate;
use together::Together;

/// Who takes part in a load: the mesh of ranks, how they are spread over processes, and the ranks and devices that
/// this process drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    mesh: Mesh,
    processes: Processes,
    driven: Vec<Rank>,
    devices: Devices,
    together: Together,
}

/// Which device each rank lives on.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Devices {
    /// Every rank on the same kind.
    Same(DeviceSpec),
    /// Ranks 0, 1, 2... on the GPUs of these numbers.
    Cuda(Vec<u32>),
}

/// How ranks are spread over processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Processes {
    /// One process drives all ranks: a byte is read once and goes to every rank that wants it.
    One,
    /// One process per rank: each reads exactly its own bytes, unless some [read together](World::reading_together).
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
    /// The memory of the GPU with this number.
    Cuda(u32),
}

impl World {
    /// One process that drives `ranks` tensor-parallel ranks in host memory.
    pub fn host(ranks: u32) -> World {
        let mesh = Mesh::tp(ranks);
        World {
            mesh,
            processes: Processes::One,
            driven: mesh.ranks(),
            devices: Devices::Same(DeviceSpec::Host),
            together: Together::default(),
        }
    }

    /// One process that drives a tensor-parallel rank on each of these GPUs: `World::local(0..4)`. A GPU may be named
    /// several times; then it holds several ranks.
    pub fn local(gpus: impl IntoIterator<Item = u32>) -> World {
        let gpus: Vec<u32> = gpus.into_iter().collect();
        World { devices: Devices::Cuda(gpus.clone()), ..World::host(u32::try_from(gpus.len()).unwrap_or(u32::MAX)) }
    }

    /// One process that drives `ranks` tensor-parallel ranks in host memory that is reached through the staging
    /// ring, the way a GPU is.
    pub fn host_staged(ranks: u32) -> World {
        World { devices: Devices::Same(DeviceSpec::HostStaged), ..World::host(ranks) }
    }

    /// One process per rank: this one drives `rank` of `size` tensor-parallel ranks, in this kind of memory.
    pub fn member(rank: Rank, size: u32, device: DeviceSpec) -> World {
        World {
            mesh: Mesh::tp(size),
            processes: Processes::PerRank,
            driven: vec![rank],
            devices: Devices::Same(device),
            together: Together::default(),
        }
    }

    /// The same world with its ranks arranged in `mesh`. One process that drove all ranks drives all of the mesh's; GPUs
    /// of [`local`](World::local) must be as many as these.
    pub fn with_mesh(self, mesh: Mesh) -> World {
        let driven = match self.processes {
            Processes::One => mesh.ranks(),
            Processes::PerRank => self.driven,
        };
        World { mesh, driven, ..self }
    }

    /// The same world seen by a process that drives only `rank`; the other ranks belong to other processes.
    pub fn driving(self, rank: Rank) -> World {
        World { processes: Processes::PerRank, driven: vec![rank], ..self }
    }

    /// The sizes of the parallel axes.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// How the ranks are spread over processes.
    pub fn processes(&self) -> Processes {
        self.processes
    }

    /// The ranks that this process drives, ascending. Empty where it would be all of more than
    /// [`RANKS_MAX`](crate::limits::RANKS_MAX), which no plan accepts.
    pub fn driven(&self) -> &[Rank] {
        &self.driven
    }

    /// Whether this process drives `rank`.
    pub(super) fn drives(&self, rank: Rank) -> bool {
        self.driven.binary_search(&rank).is_ok()
    }

    /// The device of a rank of this process; host memory for a rank that the world does not have.
    pub fn device(&self, rank: Rank) -> DeviceSpec {
        match &self.devices {
            Devices::Same(device) => *device,
            Devices::Cuda(gpus) => gpus.get(rank.index()).map_or(DeviceSpec::Host, |&gpu| DeviceSpec::Cuda(gpu)),
        }
    }

    /// The number of ranks; see [`Mesh::size`].
    pub fn size(&self) -> u32 {
        self.mesh.size()
    }

    /// Refuses a world that nobody can load into: a mesh of no or too many ranks or whose experts do not divide, GPUs
    /// that are not as many as ranks, a driven rank outside of it.
    pub(super) fn check(&self) -> Result<()> {
        let usage = |message: &str| Error::new(ErrorKind::Usage, message);
        let size = self.size();
        self.mesh.check()?;
        if let Devices::Cuda(gpus) = &self.devices
            && gpus.len() != size as usize
        {
            let found = format!("{} GPUs", gpus.len());
            return Err(usage("every rank needs a GPU").with_expected(format!("{size} GPUs"), found));
        }
        self.together.check(size)?;
        match self.driven.iter().find(|rank| rank.0 >= size) {
            Some(&rank) => Err(usage("no such rank").with_expected(format!("a rank below {size}"), rank)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Host => f.write_str("host"),
            DeviceSpec::HostStaged => f.write_str("host:staged"),
            DeviceSpec::Cuda(gpu) => write!(f, "cuda:{gpu}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::RANKS_MAX;

    #[test]
    fn a_world_nobody_can_load_into_is_refused() {
        assert_eq!(World::host(0).check().unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(World::host(2).driving(Rank(2)).check().unwrap_err().kind(), ErrorKind::Usage);
        assert!(World::host(2).with_mesh(Mesh { pp: 2, ..Mesh::tp(1) }).check().is_ok());
        let experts = |ep| World::host(8).with_mesh(Mesh { pp: 2, cp: 2, ep, ..Mesh::tp(4) });
        assert!([1, 2, 4, 8].into_iter().all(|ep| experts(ep).check().is_ok()));
        let error = experts(3).check().unwrap_err();
        assert_eq!(
            (error.kind(), error.expected(), error.found()),
            (ErrorKind::Usage, Some("a divisor of 8 ranks: 1, 2, 4, 8"), Some("ep 3"))
        );
        assert_eq!(experts(16).check().unwrap_err().found(), Some("ep 16"));
        assert_eq!(experts(0).check().unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn every_rank_has_a_gpu_and_one_gpu_may_have_several() {
        let world = World::local([1, 1, 0]);
        assert_eq!(
            (world.size(), world.device(Rank(1)), world.device(Rank(2))),
            (3, DeviceSpec::Cuda(1), DeviceSpec::Cuda(0))
        );
        assert!(world.check().is_ok());
        let error = World::local(0..4).with_mesh(Mesh::tp(2)).check().unwrap_err();
        assert_eq!((error.kind(), error.expected(), error.found()), (ErrorKind::Usage, Some("2 GPUs"), Some("4 GPUs")));
        assert_eq!(World::local(0..4).driving(Rank(3)).device(Rank(3)), DeviceSpec::Cuda(3));
    }

    #[test]
    fn too_many_ranks_are_refused_before_anything_is_made_for_each() {
        let mesh = |dp, tp| Mesh { dp, ..Mesh::tp(tp) };
        for huge in [
            World::host(u32::MAX),
            World::host_staged(4_000_000_000),
            World::host(u32::MAX).with_mesh(mesh(2, u32::MAX)),
            World::host(1).with_mesh(mesh(u32::MAX, 2)),
            World::host(RANKS_MAX + 1),
            World::member(Rank(1), u32::MAX, DeviceSpec::Host),
        ] {
            assert!(huge.driven().len() <= 1, "{:?}", huge.mesh());
            let error = huge.check().unwrap_err();
            assert_eq!((error.kind(), error.expected()), (ErrorKind::Usage, Some("1 to 8192")));
        }
        assert_eq!(mesh(u32::MAX, 2).size(), u32::MAX);
        assert_eq!(mesh(u32::MAX, 0).size(), 0);
        let most = World::host(RANKS_MAX);
        assert_eq!((most.check().is_ok(), most.driven().len()), (true, RANKS_MAX as usize));
    }
}
