//! Where each destination of the ranks of this process lies, and who owns that memory.

use std::any::Any;
use std::sync::Arc;

use crate::device::Allocation;
use crate::error::Result;
use crate::extent::Rank;
use crate::limits;
use crate::plan::{Layout, Plan};

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
    /// Memory that `keep` keeps alive. If it is `lent`, its bytes are there already and nothing is copied to it.
    ///
    /// # Safety
    /// - the destination's bytes at `address` are readable for as long as `keep` lives;
    /// - unless it is `lent`, they are writable too, and nobody else uses them until they have landed.
    pub(crate) unsafe fn borrowed(address: *mut u8, keep: Arc<dyn Any + Send + Sync>, lent: bool) -> Place {
        // SAFETY: the same duties.
        let owner = unsafe { Allocation::lent(address, keep) };
        Place { address: address.expose_provenance() as u64, owner: Some(Arc::new(owner)), lent }
    }
}

impl Destinations {
    /// Few large blocks for each rank (`Memory::Blocks`).
    pub(crate) fn in_blocks(plan: &Plan) -> Result<Destinations> {
        Destinations::for_each_rank(plan, |rank| {
            let layout = Layout::in_blocks(plan.rank(rank), plan.params(), limits::TENSOR_ALIGNMENT, limits::BLOCK_MAX);
            let blocks = layout
                .blocks
                .iter()
                .map(|&bytes| Ok(Arc::new(Allocation::pages(bytes as usize)?)))
                .collect::<Result<Vec<_>>>()
                .map_err(|error| error.with_rank(rank))?;
            Ok(layout
                .locations
                .iter()
                .map(|location| {
                    let block = &blocks[location.block as usize];
                    Place {
                        address: block.address().expose_provenance() as u64 + location.offset,
                        owner: Some(Arc::clone(block)),
                        lent: false,
                    }
                })
                .collect())
        })
    }

    /// An allocation of its own for each tensor, such that a `Vec` can take it over (`Memory::PerTensor`).
    pub(crate) fn per_tensor(plan: &Plan) -> Result<Destinations> {
        Destinations::for_each_rank(plan, |rank| {
            let ranked = plan.rank(rank);
            let mut places = Vec::with_capacity(ranked.dests.len());
            for dest in &ranked.dests {
                let param = &plan.params()[dest.param as usize];
                let owner = Allocation::heap(dest.bytes as usize, param.dtype.alignment())
                    .map(Arc::new)
                    .map_err(|error| error.with_tensor(&param.name).with_rank(rank))?;
                places.push(Place {
                    address: owner.address().expose_provenance() as u64,
                    owner: Some(owner),
                    lent: false,
                });
            }
            Ok(places)
        })
    }

    /// Each rank's tensors at these offsets of its own output file.
    pub(crate) fn in_files(plan: &Plan, mut offsets: impl FnMut(Rank) -> Vec<u64>) -> Result<Destinations> {
        Destinations::for_each_rank(plan, |rank| {
            Ok(offsets(rank).into_iter().map(|address| Place { address, owner: None, lent: false }).collect())
        })
    }

    fn for_each_rank(plan: &Plan, mut places: impl FnMut(Rank) -> Result<Vec<Place>>) -> Result<Destinations> {
        let mut ranks = vec![Vec::new(); plan.world().size() as usize];
        for &rank in plan.world().driven() {
            ranks[rank.index()] = places(rank)?;
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
        self.ranks[rank.index()].get(dest as usize)
    }

    /// Whether what lands takes memory of this process.
    pub(crate) fn in_memory(&self) -> bool {
        self.ranks.iter().flatten().any(|place| place.owner.is_some())
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
