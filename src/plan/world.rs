//! Ranks, the mesh that names their coordinates, and which of them this process drives. Plain data.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};
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

/// An axis of a [`Mesh`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ax {
    /// Data parallel.
    Dp,
    /// Pipeline parallel.
    Pp,
    /// Context parallel.
    Cp,
    /// Tensor parallel.
    Tp,
}

/// Which part of a division a rank gets, as a function of its place in the mesh: `(i, n)`, part `i` of `n`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Coord {
    /// Part 0 of 1: the same on all ranks.
    One,
    /// The coordinate on one axis.
    Axis(Ax),
    /// The axes as one, slowest first.
    Flat(Vec<Ax>),
    /// Neighbours share a part: `(i / k, n / k)`. `k` must divide `n`.
    Div(Box<Coord>, u32),
    /// Parts repeat: `(i % k, k)`. `k` must divide `n`.
    Mod(Box<Coord>, u32),
}

impl World {
    /// One process that drives `ranks` tensor-parallel ranks in host memory.
    pub fn host(ranks: u32) -> World {
        World {
            mesh: Mesh::tp(ranks),
            processes: Processes::One,
            driven: (0..ranks).map(Rank).collect(),
            device: DeviceSpec::Host,
        }
    }

    /// One process that drives `ranks` tensor-parallel ranks in host memory that is reached through the staging
    /// ring, the way a GPU is.
    pub fn host_staged(ranks: u32) -> World {
        World { device: DeviceSpec::HostStaged, ..World::host(ranks) }
    }

    /// One process per rank: this one drives `rank` of `size` tensor-parallel ranks, in this kind of memory.
    pub fn member(rank: Rank, size: u32, device: DeviceSpec) -> World {
        World { mesh: Mesh::tp(size), processes: Processes::PerRank, driven: vec![rank], device }
    }

    /// The same world with its ranks arranged in `mesh`. One process that drove all ranks drives all of the mesh's.
    pub fn with_mesh(self, mesh: Mesh) -> World {
        let driven = match self.processes {
            Processes::One => (0..mesh.checked_size().unwrap_or(0)).map(Rank).collect(),
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
        self.mesh.size()
    }

    /// Refuses a world that nobody can load into: an axis of size 0, too many ranks, a driven rank outside of it.
    pub(super) fn check(&self) -> Result<()> {
        let usage = |message: &str| Error::new(ErrorKind::Usage, message);
        let Some(size) = self.mesh.checked_size().filter(|&size| size > 0 && size <= RANKS_MAX) else {
            return Err(
                usage("number of ranks out of range").with_expected(format!("1 to {RANKS_MAX}"), self.mesh.to_string())
            );
        };
        if self.mesh.pp > 1 {
            return Err(Error::new(ErrorKind::Unsupported, "pipeline stages are not in this build")
                .with_expected("pp 1", format!("pp {}", self.mesh.pp)));
        }
        match self.driven.iter().find(|rank| rank.0 >= size) {
            Some(&rank) => Err(usage("no such rank").with_expected(format!("a rank below {size}"), rank)),
            None => Ok(()),
        }
    }
}

impl Mesh {
    /// A mesh of `tp` tensor-parallel ranks.
    pub fn tp(tp: u32) -> Mesh {
        Mesh { dp: 1, pp: 1, cp: 1, tp }
    }

    /// The number of ranks.
    pub fn size(self) -> u32 {
        self.dp * self.pp * self.cp * self.tp
    }

    /// The size of an axis.
    pub fn axis(self, ax: Ax) -> u32 {
        match ax {
            Ax::Dp => self.dp,
            Ax::Pp => self.pp,
            Ax::Cp => self.cp,
            Ax::Tp => self.tp,
        }
    }

    /// The coordinate of `rank` on an axis.
    pub fn coordinate(self, rank: Rank, ax: Ax) -> u32 {
        match ax {
            Ax::Tp => rank.0 % self.tp,
            Ax::Cp => rank.0 / self.tp % self.cp,
            Ax::Pp => rank.0 / self.tp / self.cp % self.pp,
            Ax::Dp => rank.0 / self.tp / self.cp / self.pp,
        }
    }

    fn checked_size(self) -> Option<u32> {
        self.dp.checked_mul(self.pp)?.checked_mul(self.cp)?.checked_mul(self.tp)
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dp {} pp {} cp {} tp {}", self.dp, self.pp, self.cp, self.tp)
    }
}

impl Coord {
    /// The part `(i, n)` of `rank`: `i < n`.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] if a divisor does not divide the number of parts.
    pub fn of(&self, mesh: Mesh, rank: Rank) -> Result<(u32, u32)> {
        let divides = |k: u32, n: u32| {
            if k > 0 && n.is_multiple_of(k) {
                return Ok(());
            }
            Err(Error::new(ErrorKind::Rules, "coordinate does not divide the ranks")
                .with_rule("coordinate")
                .with_expected(format!("a divisor of {n}"), k))
        };
        match self {
            Coord::One => Ok((0, 1)),
            Coord::Axis(ax) => Ok((mesh.coordinate(rank, *ax), mesh.axis(*ax))),
            Coord::Flat(axes) => Ok(axes.iter().fold((0, 1), |(i, n), &ax| {
                let size = mesh.axis(ax);
                (i * size + mesh.coordinate(rank, ax), n * size)
            })),
            Coord::Div(inner, k) => {
                let (i, n) = inner.of(mesh, rank)?;
                divides(*k, n)?;
                Ok((i / k, n / k))
            }
            Coord::Mod(inner, k) => {
                let (i, n) = inner.of(mesh, rank)?;
                divides(*k, n)?;
                Ok((i % k, *k))
            }
        }
    }
}

/// Most ranks of a world: far beyond any deployment of one model, and small enough for products in 64 bits.
const RANKS_MAX: u32 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_parallel_is_the_fastest_axis() {
        let mesh = Mesh { dp: 2, pp: 3, cp: 4, tp: 5 };
        let rank = Rank(((3 + 2) * 4 + 3) * 5 + 4);
        let at = |ax| mesh.coordinate(rank, ax);
        assert_eq!((at(Ax::Dp), at(Ax::Pp), at(Ax::Cp), at(Ax::Tp)), (1, 2, 3, 4));
        assert_eq!(mesh.size(), 120);
        assert_eq!(Coord::Flat(vec![Ax::Cp, Ax::Tp]).of(mesh, rank).unwrap(), (19, 20));
    }

    #[test]
    fn coordinates_divide_and_repeat() {
        let mesh = Mesh::tp(16);
        let tp = || Box::new(Coord::Axis(Ax::Tp));
        assert_eq!(Coord::Div(tp(), 2).of(mesh, Rank(5)).unwrap(), (2, 8));
        assert_eq!(Coord::Mod(tp(), 4).of(mesh, Rank(5)).unwrap(), (1, 4));
        assert_eq!(Coord::Div(tp(), 3).of(mesh, Rank(5)).unwrap_err().rule(), Some("coordinate"));
    }

    #[test]
    fn a_world_nobody_can_load_into_is_refused() {
        assert_eq!(World::host(0).check().unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(World::host(2).driving(Rank(2)).check().unwrap_err().kind(), ErrorKind::Usage);
        let pipeline = World::host(2).with_mesh(Mesh { dp: 1, pp: 2, cp: 1, tp: 1 });
        assert_eq!(pipeline.check().unwrap_err().kind(), ErrorKind::Unsupported);
        let huge = World::host(1).with_mesh(Mesh { dp: u32::MAX, pp: 2, cp: 1, tp: 1 });
        assert_eq!(huge.check().unwrap_err().kind(), ErrorKind::Usage);
    }
}
