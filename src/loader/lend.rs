//! Memory that is not ours: tensors lent from mapped files, and destinations that the caller supplies.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::{FileId, Rank};
use crate::pipeline::Device;
use crate::place::{Destinations, Place};
use crate::plan::{Buffer, Dest, DeviceSpec, Plan, Request};
use crate::source::{Mapping, SourceFile};

/// Memory of the caller for one destination.
#[derive(Debug, Clone)]
pub struct CallerMemory {
    /// The rank.
    pub rank: Rank,
    /// The name of the destination.
    pub name: String,
    /// The first byte, in the address space of the rank's device: for a GPU its device pointer, as a number.
    pub address: *mut u8,
    /// The size, which must be that of the destination.
    pub bytes: usize,
}

impl CallerMemory {
    /// The memory that a request carries.
    pub(super) fn of(request: &Request) -> impl Iterator<Item = CallerMemory> {
        request.buffers().iter().map(|&Buffer { rank, address, bytes }| CallerMemory {
            rank,
            name: request.name().to_owned(),
            address: std::ptr::with_exposed_provenance_mut(address),
            bytes,
        })
    }
}

/// Refuses ranks whose memory cannot be a mapping of a file.
pub(super) fn check_mappable(plan: &Plan) -> Result<()> {
    let world = plan.world();
    match world.driven().iter().find(|rank| matches!(world.device(**rank), DeviceSpec::Cuda(_))) {
        Some(&rank) => {
            let message = format!("{} cannot be lent from a mapping of a file", world.device(rank));
            Err(Error::new(ErrorKind::Usage, message).with_rank(rank))
        }
        None => Ok(()),
    }
}

/// Lends every destination that is a whole, untransformed tensor from a mapping of its file, and returns the files.
pub(super) fn lend_mapped(
    plan: &Plan,
    destinations: &mut Destinations,
    devices: &[Arc<dyn Device>],
) -> Result<Vec<FileId>> {
    let mut files: Vec<Option<Arc<Mapping>>> = vec![None; plan.checkpoint().files().len()];
    for (&rank, device) in plan.world().driven().iter().zip(devices) {
        for (position, dest) in plan.rank(rank).dests.iter().enumerate() {
            let Some((id, start)) = whole_tensor(plan, rank, dest) else { continue };
            let mapping = match &files[id.0 as usize] {
                Some(mapping) => Arc::clone(mapping),
                None => {
                    let planned = plan.file(id);
                    let _span = planned.span().entered();
                    let file = SourceFile::reopen(&planned.path, planned.identity)?;
                    let mapping = Arc::new(Mapping::new(&file)?);
                    files[id.0 as usize] = Some(Arc::clone(&mapping));
                    mapping
                }
            };
            let address = mapping.address().wrapping_add(start as usize).cast_mut();
            // SAFETY: the range lies in the mapping (the header was checked against the file's size), which `keep`
            // holds; a lent place is never copied to.
            let place = unsafe { Place::borrowed(&**device, address, mapping, true) };
            destinations.replace(rank, position as u32, place);
        }
    }
    let ids = (0..).map(FileId).zip(files);
    Ok(ids.filter_map(|(id, mapping)| mapping.map(|_| id)).collect())
}

/// The file and offset of the tensor that this destination is, if it is one unchanged.
fn whole_tensor(plan: &Plan, rank: Rank, dest: &Dest) -> Option<(FileId, u64)> {
    let [piece] = &plan.rank(rank).pieces[dest.pieces.start as usize..dest.pieces.end as usize] else { return None };
    let tensor = plan.tensor(piece.tensor);
    let whole = !piece.is_transformed()
        && piece.loops.is_empty()
        && (piece.run, dest.bytes) == (tensor.bytes(), tensor.bytes());
    whole.then_some((tensor.file, tensor.start))
}

/// A destination that is the caller's memory: the position of its rank's device, the rank, and its position there.
pub(super) type Lent = (usize, Rank, u32);

/// Which destinations the caller's memory is for, one for each entry.
///
/// # Errors
/// [`ErrorKind::NotFound`] and [`ErrorKind::Usage`] for memory that fits none, and that overlaps other of the same device.
pub(super) fn destinations_of(plan: &Plan, memory: &[CallerMemory]) -> Result<Vec<Lent>> {
    let place = |CallerMemory { rank, name, address, bytes }: &CallerMemory| {
        let at = |error: Error| error.with_tensor(name).with_rank(*rank);
        let params = plan.params();
        let device = plan.world().driven().iter().position(|driven| driven == rank);
        let param = params.binary_search_by(|param| param.name.as_str().cmp(name)).ok();
        let (device, param, found) = device
            .zip(param)
            .and_then(|(device, param)| {
                let dests = &plan.rank(*rank).dests;
                Some((device, param, dests.binary_search_by_key(&(param as u32), |dest| dest.param).ok()?))
            })
            .ok_or_else(|| at(Error::new(ErrorKind::NotFound, "no such tensor")))?;
        let dest = &plan.rank(*rank).dests[found];
        if dest.bytes != *bytes as u64 {
            return Err(at(Error::new(ErrorKind::Usage, "the caller's memory has another size")
                .with_expected(format!("{} bytes", dest.bytes), format!("{bytes} bytes"))));
        }
        let alignment = params[param].dtype.alignment();
        if !address.addr().is_multiple_of(alignment) && *bytes > 0 {
            // Whoever reads elements there has undefined behaviour, and a kernel that stores there costs the process its
            // context.
            return Err(at(Error::new(ErrorKind::Usage, "the caller's memory does not start on an element")
                .with_expected(format!("a multiple of {alignment}"), format!("{address:?}"))));
        }
        Ok((device, *rank, found as u32))
    };
    let lent = memory.iter().map(place).collect::<Result<Vec<Lent>>>()?;
    refuse_overlaps(plan, memory)?;
    Ok(lent)
}

/// Refuses memory of which bytes are for two destinations, and two memories for one.
fn refuse_overlaps(plan: &Plan, memory: &[CallerMemory]) -> Result<()> {
    let space = |rank: Rank| match plan.world().device(rank) {
        DeviceSpec::Cuda(ordinal) => Some(ordinal),
        DeviceSpec::Host | DeviceSpec::HostStaged => None,
    };
    let overlap = |one: &CallerMemory, other: &CallerMemory, message: String| {
        let error = Error::new(ErrorKind::Usage, message).with_tensor(&other.name).with_rank(other.rank);
        Err(error
            .with_expected(format!("not {:?} and {} bytes", one.address, one.bytes), format!("{:?}", other.address)))
    };
    let mut sorted: Vec<&CallerMemory> = memory.iter().collect();
    sorted.sort_by(|a, b| (a.rank, &a.name).cmp(&(b.rank, &b.name)));
    if let Some(&[one, other]) =
        sorted.windows(2).find(|pair| (pair[0].rank, &pair[0].name) == (pair[1].rank, &pair[1].name))
    {
        return overlap(one, other, "the caller gives two memories for one destination".into());
    }
    sorted.retain(|entry| entry.bytes > 0);
    sorted.sort_by_key(|entry| (space(entry.rank), entry.address.addr()));
    match sorted.windows(2).find(|pair| {
        space(pair[0].rank) == space(pair[1].rank) && pair[1].address.addr() - pair[0].address.addr() < pair[0].bytes
    }) {
        Some(&[one, other]) => {
            overlap(one, other, format!("the caller's memory overlaps that of `{}` on rank {}", one.name, one.rank))
        }
        _ => Ok(()),
    }
}

/// Replaces destinations by the caller's memory.
///
/// # Safety
/// As [`Loader::start_into`](crate::Loader::start_into).
pub(super) unsafe fn place_into(
    destinations: &mut Destinations,
    devices: &[Arc<dyn Device>],
    memory: &[CallerMemory],
    lent: &[Lent],
) {
    for (CallerMemory { address, .. }, &(device, rank, dest)) in memory.iter().zip(lent) {
        // SAFETY: the caller of this function answers for the memory.
        let place = unsafe { Place::borrowed(&*devices[device], *address, Arc::new(()), false) };
        destinations.replace(rank, dest, place);
    }
}
