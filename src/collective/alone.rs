//! Whether NCCL works with a GPU: one rank that passes bytes to itself.

use std::time::Instant;

use super::{Comm, Nccl, NcclVersion, Wait};
use crate::device::{Allocation, Cuda, CudaStream, Device, Feed, Home, Op, RawCopy};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;

/// Makes a communicator of one rank on this GPU, through which bytes take each way that loads use, and ends it; the version
/// that did. What it asks for has the bounds of a load.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without NCCL, or with one that is too old; [`ErrorKind::Device`] if it fails or moves other bytes
/// than it was given; [`ErrorKind::Stalled`] if it does not answer.
pub fn nccl_alone(gpu: u32) -> Result<NcclVersion> {
    let (nccl, device) = (Nccl::open()?, Cuda::open(gpu, limits::STALL_ERROR)?);
    let stream = device.stream()?;
    let wait = Wait { deadline: Instant::now() + limits::STALL_ERROR, stop: &|| Ok(()) };
    let bytes: Vec<u8> = (0..BYTES).map(|at| (at * 13 + at / 255) as u8).collect();
    let memory = [write(&device, &bytes)?, write(&device, &vec![0; BYTES])?];
    let mut comm = Comm::meet(nccl, &device, nccl.unique_id()?, Rank(0), 1, &wait)?;
    if let Err(error) = pass(&mut comm, &stream, &memory, &wait) {
        if comm.abort().is_err() || !stream.settle(limits::STALL_ERROR).unwrap_or(false) {
            keep_for_ever(memory);
        }
        return Err(error);
    }
    let mut found = vec![0; BYTES];
    let [_, last] = &memory;
    // SAFETY: as long as that, written above, and the stream is idle.
    last.device().map_or(Ok(()), |device| unsafe { device.read(last.address(), &mut found) })?;
    comm.finish(&wait)?;
    match found == bytes {
        true => nccl.version(),
        false => Err(Error::new(ErrorKind::Device, "NCCL moved other bytes than it was given")),
    }
}

/// Passes the first memory's bytes to the second and back: as a message, gathered, and broadcast.
fn pass(comm: &mut Comm, stream: &CudaStream, memory: &[Allocation; 2], wait: &Wait<'_>) -> Result<()> {
    let ([one, other], handle) = (memory.each_ref().map(Allocation::address), stream.handle());
    // SAFETY: memory of this device, as long as that, which lives until the stream is idle; whoever does not get there keeps it.
    unsafe {
        comm.grouped(handle, wait, |group| {
            group.send(Rank(0), one, BYTES)?;
            group.recv(Rank(0), other, BYTES)
        })?;
        comm.all_gather([other, one], BYTES, handle, wait)?;
        comm.broadcast(Rank(0), [one, other], BYTES, handle, wait)?;
    }
    match stream.settle(limits::STALL_ERROR)? {
        true => comm.check(),
        false => Err(Error::new(ErrorKind::Stalled, "what NCCL was asked for was not done in time")),
    }
}

/// Memory of the GPU that holds these bytes.
fn write(device: &Cuda, bytes: &[u8]) -> Result<Allocation> {
    let memory = device.block(bytes.len())?;
    let feed = Feed { slot_bytes: bytes.len(), cuts: false, slots: 0, wire: None };
    let nothing = || Error::new(ErrorKind::Unsupported, format!("{} has no queue", device.name()));
    let mut queue = device.queue(feed)?.ok_or_else(nothing)?;
    let (src, dst, run) = (bytes.as_ptr(), memory.address(), bytes.len() as u64);
    let copy = RawCopy { src, dst, loops: Default::default(), run, cast: None };
    // SAFETY: both sides are that long; the source is not pinned, so it has been read when the call returns, and dropping the
    // queue waits for the rest.
    unsafe { queue.submit(vec![Op::Copy(copy)], Home::Host) }?;
    match queue.settle(limits::STALL_ERROR) {
        true => Ok(memory),
        false => {
            keep_for_ever(memory);
            Err(Error::new(ErrorKind::Stalled, "a copy to the GPU was not done in time"))
        }
    }
}

/// Something may still write to it.
#[expect(clippy::mem_forget, reason = "freeing memory that a device may still write to is worse than leaking it")]
fn keep_for_ever<T>(memory: T) {
    std::mem::forget(memory);
}

/// More than NCCL takes for one of its own messages.
const BYTES: usize = 4_000_003;
