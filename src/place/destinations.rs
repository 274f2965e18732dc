//! Where each destination of the ranks of this process lies, and who owns that memory.

use std::any::Any;
use std::collections::HashSet;
use std::sync::Arc;

use crate::device::{Allocation, Device, Feed};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::plan::{Dest, Layout, Plan, RankPlan};

/// The memory of all ranks that this process drives.
#[derive(Debug)]
pub(crate) struct Destinations {
    /// One per rank of the world; empty for ranks of other processes.
    ranks: Vec<Vec<Place>>,
}

/// The memory of one destination.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The first byte, in the address space of the rank's device.
    pub(crate) address: u64,
    /// What keeps it alive; `None` where the address space is a file.
    pub(crate) owner: Option<Arc<Allocation>>,
    /// Lent from a mapping: the bytes are there already and nothing is copied.
    pub(crate) lent: bool,
}

impl Place {
    /// The address of the allocation that it lies in.
    pub(crate) fn allocation(&self) -> u64 {
        self.owner.as_ref().map_or(0, |owner| owner.base())
    }

    /// All of an allocation.
    fn whole(owner: Allocation) -> Place {
        Place { address: owner.address(), owner: Some(Arc::new(owner)), lent: false }
    }

    /// Memory of `device` that `keep` keeps alive. If it is `lent`, its bytes are there already and nothing is copied to
    /// it.
    ///
    /// # Safety
    /// - the destination's bytes at `address` are readable for as long as `keep` lives;
    /// - unless it is `lent`, they are writable too, and nobody else uses them until they have landed.
    pub(crate) unsafe fn borrowed(
        device: &dyn Device,
        address: *mut u8,
        keep: Arc<dyn Any + Send + Sync>,
        lent: bool,
    ) -> Place {
        // SAFETY: the same duties.
        Place { lent, ..Place::whole(unsafe { device.lent(address, keep) }) }
    }
}

impl Destinations {
    /// Few large blocks for each rank (`Memory::Blocks`); `devices` are those of the driven ranks, fed like this. What is `lent` gets no
    /// memory: it is [replaced](Destinations::replace) later.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceMemory`] naming the device, what is needed and what is free, before anything is allocated; what
    /// the device says when it is.
    pub(crate) fn in_blocks(
        plan: &Plan,
        devices: &[Arc<dyn Device>],
        feed: Feed,
        lent: &HashSet<(Rank, u32)>,
    ) -> Result<Destinations> {
        let layout = |rank| {
            let RankPlan { dests, .. } = plan.rank(rank);
            let ours = |(at, dest): (u32, &Dest)| Dest {
                bytes: if lent.contains(&(rank, at)) { 0 } else { dest.bytes },
                ..dest.clone()
            };
            let dests = (0..).zip(dests).map(ours).collect();
            let ranked = RankPlan { rank, dests, pieces: Vec::new(), fills: Vec::new() };
            Layout::in_blocks(&ranked, plan.params(), limits::TENSOR_ALIGNMENT, limits::BLOCK_MAX)
        };
        fits(plan, devices, feed, |rank, device| {
            layout(rank).blocks.iter().map(|&bytes| device.taken_by(bytes)).sum()
        })?;
        Destinations::for_each_rank(plan, devices, |rank, device| {
            let layout = layout(rank);
            let blocks = layout
                .blocks
                .iter()
                .map(|&bytes| Ok(Arc::new(device.block(bytes as usize)?)))
                .collect::<Result<Vec<_>>>()
                .map_err(|error| error.with_rank(rank))?;
            Ok(layout
                .locations
                .iter()
                .map(|location| {
                    let block = &blocks[location.block as usize];
                    let address = block.address() + location.offset;
                    Place { address, owner: Some(Arc::clone(block)), lent: false }
                })
                .collect())
        })
    }

    /// An allocation of its own for each tensor, such that its owner can take it over (`Memory::PerTensor`), but for what
    /// is `lent`.
    ///
    /// # Errors
    /// As [`in_blocks`](Destinations::in_blocks).
    pub(crate) fn per_tensor(
        plan: &Plan,
        devices: &[Arc<dyn Device>],
        feed: Feed,
        lent: &HashSet<(Rank, u32)>,
    ) -> Result<Destinations> {
        let ours = |rank, dest| !lent.contains(&(rank, dest));
        fits(plan, devices, feed, |rank, device| {
            let dests = (0..).zip(&plan.rank(rank).dests).filter(|(dest, _)| ours(rank, *dest));
            device.taken_by(dests.map(|(_, dest)| dest.bytes).sum())
        })?;
        Destinations::for_each_rank(plan, devices, |rank, device| {
            let ranked = plan.rank(rank);
            let mut places = Vec::with_capacity(ranked.dests.len());
            for (position, dest) in (0..).zip(&ranked.dests) {
                if !ours(rank, position) {
                    places.push(Place { address: 0, owner: None, lent: false });
                    continue;
                }
                let param = &plan.params()[dest.param as usize];
                let owner = device
                    .tensor(dest.bytes as usize, param.dtype.alignment())
                    .map_err(|error| error.with_tensor(&param.name).with_rank(rank))?;
                places.push(Place::whole(owner));
            }
            Ok(places)
        })
    }

    /// Each rank's tensors at these offsets of its own output file.
    pub(crate) fn in_files(plan: &Plan, mut offsets: impl FnMut(Rank) -> Vec<u64>) -> Destinations {
        let mut ranks = vec![Vec::new(); plan.world().size() as usize];
        for &rank in plan.world().driven() {
            let place = |address| Place { address, owner: None, lent: false };
            ranks[rank.index()] = offsets(rank).into_iter().map(place).collect();
        }
        let mut destinations = Destinations { ranks };
        destinations.share_aliases(plan);
        destinations
    }

    /// These places, of each rank of the world.
    pub(super) fn of_places(ranks: Vec<Vec<Place>>) -> Destinations {
        Destinations { ranks }
    }

    fn for_each_rank(
        plan: &Plan,
        devices: &[Arc<dyn Device>],
        mut places: impl FnMut(Rank, &dyn Device) -> Result<Vec<Place>>,
    ) -> Result<Destinations> {
        let mut ranks = vec![Vec::new(); plan.world().size() as usize];
        for (&rank, device) in plan.world().driven().iter().zip(devices) {
            ranks[rank.index()] = places(rank, &**device)?;
        }
        let mut destinations = Destinations { ranks };
        destinations.share_aliases(plan);
        Ok(destinations)
    }

    /// Gives every alias the memory of its original; to be repeated after the last [`replace`](Destinations::replace).
    pub(crate) fn share_aliases(&mut self, plan: &Plan) {
        for &rank in plan.world().driven() {
            let dests = &plan.rank(rank).dests;
            let places = &mut self.ranks[rank.index()];
            for (position, dest) in dests.iter().enumerate() {
                let Some(original) = plan.params()[dest.param as usize].alias_of else { continue };
                if let Ok(found) = dests.binary_search_by_key(&original, |dest| dest.param) {
                    places[position] = places[found].clone();
                }
            }
        }
    }

    /// The memory of a destination, or `None` if another process drives its rank.
    pub(crate) fn place(&self, rank: Rank, dest: u32) -> Option<&Place> {
        self.ranks.get(rank.index())?.get(dest as usize)
    }

    /// Whether what lands takes memory of this process.
    pub(crate) fn in_memory(&self) -> bool {
        let of_process = |place: &Place| place.owner.as_ref().is_some_and(|owner| owner.device().is_none());
        self.ranks.iter().flatten().any(of_process)
    }

    /// Whether what lands goes to files.
    pub(crate) fn are_files(&self) -> bool {
        self.ranks.iter().flatten().all(|place| place.owner.is_none())
    }

    /// Whether bytes are to be copied to a destination: it is here, and not lent with its bytes in it.
    pub(crate) fn waits(&self, rank: Rank, dest: u32) -> bool {
        self.place(rank, dest).is_some_and(|place| !place.lent)
    }

    /// Replaces the memory of a destination, before anything moves.
    pub(crate) fn replace(&mut self, rank: Rank, dest: u32, place: Place) {
        self.ranks[rank.index()][dest as usize] = place;
    }
}

/// Holds what all ranks of each device need, and its queue, against what it has free.
fn fits(plan: &Plan, devices: &[Arc<dyn Device>], feed: Feed, bytes: impl Fn(Rank, &dyn Device) -> u64) -> Result<()> {
    for (at, device) in devices.iter().enumerate() {
        let shares = |other: &Arc<dyn Device>| Arc::ptr_eq(other, device);
        if devices[..at].iter().any(shares) {
            continue;
        }
        let Some(free) = device.free_bytes()? else { continue };
        let ranks =
            || plan.world().driven().iter().zip(devices).filter(|(_, other)| shares(other)).map(|(&rank, _)| rank);
        let queue = device.taken_besides(Feed { cuts: plan.first_cut(ranks()).is_some(), ..feed });
        let needed = ranks().map(|rank| bytes(rank, &**device)).sum::<u64>() + queue;
        if needed > free {
            return Err(Error::new(ErrorKind::DeviceMemory, format!("too little free memory on {}", device.name()))
                .with_expected(format!("{needed} bytes"), format!("{free} bytes")));
        }
    }
    Ok(())
}
