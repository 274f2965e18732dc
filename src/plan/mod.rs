//! Checkpoint x Rules x World -> [`Plan`]. Pure: knows no open files, no devices, no time.

#![forbid(unsafe_code)]

mod audit;
mod build;
mod complete;
mod cover;
mod cut;
mod digest;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only GPUs exchange with others"))]
mod exchange;
mod explain;
mod expr;
mod extents;
mod family;
mod form;
mod holders;
mod leaf;
mod lowering;
mod memory;
mod multiplicity;
mod quant;
mod reads;
mod report;
mod rules;
mod shared;
mod show;
mod stages;
#[cfg(test)]
mod tests;
mod traffic;
mod uses;
mod who;
mod world;

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use self::build::Declared;
use self::rules::Placed;
use crate::cast::Cast;
use crate::checkpoint::{Checkpoint, CheckpointFile, TensorMeta};
use crate::dtype::Dtype;
use crate::extent::{FileId, Rank};
use crate::shape::Shape;

pub use crate::stride::{Loop, Loops};
pub use cut::{Cut, Split};
pub(crate) use exchange::Exchange;
#[cfg(feature = "cuda")]
pub(crate) use exchange::{Parcel, Received, Round};
pub use expr::{Expr, Fill};
pub use family::{ModelOptions, Target};
pub(crate) use form::{BoxOf, Boxes};
pub use leaf::{Factor, Leaf};
pub use lowering::{Lowering, Reading};
pub use memory::{Layout, Location};
pub use multiplicity::Multiplicity;
pub use quant::{Orientation, Packed, Quantization};
pub(crate) use reads::{Cursor, Cutting, Piece, ReadOp, Reads};
pub use report::{ClassReport, PlanReport};
pub(crate) use rules::Buffer;
pub use rules::{Request, Rules, ShardRule, Stage};
pub use stages::StageSplit;
pub use traffic::Traffic;
pub use world::{Ax, Cooperate, Coord, DeviceSpec, Mesh, MeshOrder, Processes, World};

/// What moves where, for all ranks at once. Immutable, cheap to clone, and valid: every plan has passed the audit.
#[derive(Debug, Clone)]
pub struct Plan {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    checkpoint: Checkpoint,
    world: World,
    rules: Rules,
    /// All that rules make of tensors.
    placed: Vec<Placed>,
    params: Vec<Param>,
    /// What each parameter that is no alias is made of, sorted by parameter.
    declared: Vec<Declared>,
    ranks: Vec<RankPlan>,
    extents: Vec<ReadExtent>,
    consumers: Vec<Consumer>,
    order: ReadOrder,
    digest: u64,
}

/// What all ranks' destinations of one name have in common.
#[derive(Debug, Clone)]
pub struct Param {
    /// The name of the destination.
    pub name: String,
    /// The element type at the destination.
    pub dtype: Dtype,
    /// How elements are converted to it, if they are.
    pub cast: Option<Cast>,
    /// The other destination whose memory this one shares (tied weights); it has no bytes of its own.
    pub alias_of: Option<u32>,
}

/// One rank's partition.
#[derive(Debug, Clone)]
pub struct RankPlan {
    /// The rank.
    pub rank: Rank,
    /// The destinations, sorted by `param`; ranks that do not hold a parameter have no entry for it.
    pub dests: Vec<Dest>,
    /// The copies of all destinations; each destination owns a range of them.
    pub pieces: Vec<BoxCopy>,
    /// The fills of all destinations; each destination owns a range of them.
    pub fills: Vec<BoxFill>,
}

/// One tensor in the memory of one rank.
#[derive(Debug, Clone)]
pub struct Dest {
    /// Position in [`Plan::params`].
    pub param: u32,
    /// The shape of this rank's part. May have zero elements.
    pub shape: Shape,
    /// Bytes of memory; 0 for an alias.
    pub bytes: u64,
    /// Range in [`RankPlan::pieces`].
    pub pieces: Range<u32>,
    /// Range in [`RankPlan::fills`].
    pub fills: Range<u32>,
}

/// Bytes of a destination that no tensor fills. All numbers are bytes of the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoxFill {
    /// The first byte.
    pub dst: u64,
    /// The strided loops, outermost first, collapsed: (count, stride).
    pub loops: SmallVec<[(u64, u64); 4]>,
    /// Contiguous bytes at each step of the innermost loop.
    pub run: u64,
    /// The value.
    pub fill: Fill,
    /// The bytes of one element that has it; a run is a whole number of them.
    pub element: SmallVec<[u8; 8]>,
}

/// A strided copy from one tensor of the checkpoint into one destination. All numbers are bytes: those of the source in
/// the file's type, those of the destination in its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoxCopy {
    /// Position in [`Checkpoint::tensors`].
    pub tensor: u32,
    /// The first source byte, counted from byte 0 of the file.
    pub src: u64,
    /// The first destination byte, counted from byte 0 of the destination.
    pub dst: u64,
    /// The strided loops, those with larger source strides first, collapsed; at most
    /// [`LOOPS_MAX`](crate::limits::LOOPS_MAX).
    pub loops: Loops,
    /// Contiguous source bytes at each step of the innermost loop.
    pub run: u64,
    /// How elements are converted, if they are.
    pub cast: Option<Cast>,
}

impl BoxCopy {
    /// The loops in the order of the destination, outermost first.
    pub fn destination_loops(&self) -> Loops {
        let mut loops = self.loops.clone();
        loops.sort_by_key(|inner| Reverse(inner.dst_stride));
        loops
    }

    /// Whether elements are cast, or come in another order than that of the file.
    pub(crate) fn is_transformed(&self) -> bool {
        self.cast.is_some() || !self.loops.is_sorted_by_key(|inner| Reverse(inner.dst_stride))
    }

    /// Destination bytes of this many source bytes.
    fn landed(&self, bytes: u64) -> u64 {
        self.cast.map_or(bytes, |cast| cast.converted(bytes))
    }
}

/// Source bytes that one reader reads, and who gets them. With `outer` loops it is a strided set of equal ranges
/// `start + sum(i * stride) .. + run`; without, the one range `start..start + run`.
///
/// The extents of one reader do not overlap, and are in the plan's order of reads. Where ranks of several processes read
/// together an extent may be a stripe of what its consumers want, of which others read the rest.
#[derive(Debug, Clone)]
pub struct ReadExtent {
    /// Position in [`Checkpoint::tensors`].
    pub tensor: u32,
    /// The file.
    pub file: FileId,
    /// The rank whose process reads these bytes. Its consumers may be ranks of other processes.
    pub reader: Rank,
    /// The first byte, counted from byte 0 of the file.
    pub start: u64,
    /// Strided repetition, outermost first: (count, stride in bytes).
    pub outer: SmallVec<[(u64, u64); 1]>,
    /// Contiguous bytes of each range.
    pub run: u64,
    /// Range in [`Plan::consumers`].
    pub consumers: Range<u32>,
}

/// Who wants bytes of an extent.
#[derive(Debug, Clone, Copy)]
pub struct Consumer {
    /// The rank.
    pub rank: Rank,
    /// Position in [`RankPlan::dests`].
    pub dest: u32,
    /// Position in [`RankPlan::pieces`].
    pub piece: u32,
}

/// The order in which a process reads its extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ReadOrder {
    /// By file and offset: sequential on storage.
    #[default]
    File,
    /// By layer (the first number in the tensor's name), then by file and offset; tensors of no layer come first.
    Layer,
}

impl Plan {
    /// The checkpoint that was planned.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.inner.checkpoint
    }

    /// The world that it was planned for.
    pub fn world(&self) -> &World {
        &self.inner.world
    }

    /// The names and types of all destinations, sorted by name.
    pub fn params(&self) -> &[Param] {
        &self.inner.params
    }

    /// All ranks' partitions; a [`Rank`] is a position in this list.
    pub fn ranks(&self) -> &[RankPlan] {
        &self.inner.ranks
    }

    /// The partition of one rank, whichever process drives it.
    ///
    /// # Panics
    /// If the world has no such rank; [`ranks`](Plan::ranks) is the list to `get` from.
    pub fn rank(&self, rank: Rank) -> &RankPlan {
        &self.inner.ranks[rank.index()]
    }

    /// All reads of all processes, in order.
    pub fn extents(&self) -> &[ReadExtent] {
        &self.inner.extents
    }

    /// The consumers of an extent.
    ///
    /// # Panics
    /// It may, if the extent is another plan's.
    pub fn consumers(&self, extent: &ReadExtent) -> &[Consumer] {
        &self.inner.consumers[extent.consumers.start as usize..extent.consumers.end as usize]
    }

    /// A fingerprint of who reads what, of all ranks.
    pub(crate) fn reading_digest(&self) -> u64 {
        digest::reading(self.world().groups(), &self.inner.extents)
    }

    /// Whether ranks of other processes than the reader's want some of an extent: then it is read for all of them, and
    /// passed on.
    pub(crate) fn is_shared(&self, extent: &ReadExtent) -> bool {
        let elsewhere = |consumer: &Consumer| consumer.rank != extent.reader;
        self.world().processes() == Processes::PerRank && self.consumers(extent).iter().any(elsewhere)
    }

    /// The order of reads.
    pub fn order(&self) -> ReadOrder {
        self.inner.order
    }

    /// The file with this id.
    ///
    /// # Panics
    /// If the checkpoint has no such file.
    pub fn file(&self, id: FileId) -> &CheckpointFile {
        self.inner.checkpoint.file(id)
    }

    /// The tensor of the checkpoint at this position.
    ///
    /// # Panics
    /// If the checkpoint has no such tensor.
    pub fn tensor(&self, position: u32) -> &TensorMeta {
        &self.inner.checkpoint.tensors()[position as usize]
    }

    /// A fingerprint of what is read and where it goes: equal on every rank and across releases, and independent of
    /// the local rank, devices, addresses and engine.
    pub fn digest(&self) -> u64 {
        self.inner.digest
    }
}
