//! Ranks, the mesh that names their coordinates, and which of them this process drives. Plain data.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::RANKS_MAX;

/// Who takes part in a load: the mesh of ranks, how they are spread over processes, and the ranks and devices that
/// this process drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    mesh: Mesh,
    processes: Processes,
    driven: Vec<Rank>,
    devices: Devices,
}

/// Which device each rank lives on.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Devices {
    /// Every rank on the same kind.
    Same(DeviceSpec),
    /// Ranks 0, 1, 2... on the GPUs of these numbers.
    Cuda(Vec<u32>),
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
    /// The memory of the GPU with this number.
    Cuda(u32),
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
        let mesh = Mesh::tp(ranks);
        World { mesh, processes: Processes::One, driven: mesh.ranks(), devices: Devices::Same(DeviceSpec::Host) }
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

    /// Refuses a world that nobody can load into: an axis of size 0, too many ranks, a driven rank outside of it.
    pub(super) fn check(&self) -> Result<()> {
        let usage = |message: &str| Error::new(ErrorKind::Usage, message);
        let size = self.size();
        if !(1..=RANKS_MAX).contains(&size) {
            return Err(usage("number of ranks out of range").with_expected(format!("1 to {RANKS_MAX}"), self.mesh));
        }
        if self.mesh.pp > 1 {
            return Err(Error::new(ErrorKind::Unsupported, "pipeline stages are not in this build")
                .with_expected("pp 1", format!("pp {}", self.mesh.pp)));
        }
        if let Devices::Cuda(gpus) = &self.devices
            && gpus.len() != size as usize
        {
            let found = format!("{} GPUs", gpus.len());
            return Err(usage("every rank needs a GPU").with_expected(format!("{size} GPUs"), found));
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

    /// The number of ranks; `u32::MAX` where it is more than that, which no plan accepts.
    pub fn size(self) -> u32 {
        self.dp.saturating_mul(self.pp).saturating_mul(self.cp).saturating_mul(self.tp)
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
    ///
    /// # Panics
    /// If an axis has size 0: such a mesh has no ranks.
    pub fn coordinate(self, rank: Rank, ax: Ax) -> u32 {
        match ax {
            Ax::Tp => rank.0 % self.tp,
            Ax::Cp => rank.0 / self.tp % self.cp,
            Ax::Pp => rank.0 / self.tp / self.cp % self.pp,
            Ax::Dp => rank.0 / self.tp / self.cp / self.pp,
        }
    }

    /// All ranks, unless there are more than any plan accepts.
    fn ranks(self) -> Vec<Rank> {
        let size = self.size();
        if size > RANKS_MAX { Vec::new() } else { (0..size).map(Rank).collect() }
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dp {} pp {} cp {} tp {}", self.dp, self.pp, self.cp, self.tp)
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

impl fmt::Display for Ax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ax::Dp => "dp",
            Ax::Pp => "pp",
            Ax::Cp => "cp",
            Ax::Tp => "tp",
        })
    }
}

impl Coord {
    /// Refuses what is no division of any mesh.
    pub(super) fn check(&self) -> Result<()> {
        let broken = |what: String| Err(Error::new(ErrorKind::Rules, what).with_rule("coordinate"));
        match self {
            Coord::One | Coord::Axis(_) => Ok(()),
            Coord::Div(inner, _) | Coord::Mod(inner, _) => inner.check(),
            Coord::Flat(axes) if axes.is_empty() => broken("no axis says which part a rank gets".into()),
            Coord::Flat(axes) => match axes.iter().enumerate().find(|(at, ax)| axes[..*at].contains(ax)) {
                Some((_, ax)) => broken(format!("axis {ax} is named twice")),
                None => Ok(()),
            },
        }
    }

    /// The part `(i, n)` of `rank`: `i < n`.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] if a divisor does not divide the number of parts, or axes taken as one repeat or are none.
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
            Coord::Flat(axes) => {
                self.check()?;
                Ok(axes.iter().fold((0, 1), |(i, n), &ax| {
                    let size = mesh.axis(ax);
                    (i * size + mesh.coordinate(rank, ax), n * size)
                }))
            }
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
        for (axes, what) in [(vec![Ax::Cp, Ax::Tp, Ax::Tp], "axis tp is named twice"), (vec![], "no axis")] {
            let error = Coord::Flat(axes).of(mesh, Rank(5)).unwrap_err();
            assert!(error.rule() == Some("coordinate") && error.message().contains(what), "{error}");
        }
    }

    #[test]
    fn a_world_nobody_can_load_into_is_refused() {
        assert_eq!(World::host(0).check().unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(World::host(2).driving(Rank(2)).check().unwrap_err().kind(), ErrorKind::Usage);
        let pipeline = World::host(2).with_mesh(Mesh { dp: 1, pp: 2, cp: 1, tp: 1 });
        assert_eq!(pipeline.check().unwrap_err().kind(), ErrorKind::Unsupported);
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
        let mesh = |dp, tp| Mesh { dp, pp: 1, cp: 1, tp };
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
