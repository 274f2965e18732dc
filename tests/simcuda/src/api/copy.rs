//! Copies and fills.

use crate::abi::{Copy2D, In, given};
use crate::code::{Code, INVALID_CONTEXT, INVALID_VALUE, Result};
use crate::device_memory::{Kind, Use};
use crate::handle::Handle;
use crate::hazard::QueueId;
use crate::host_memory::Place;
use crate::sim::{Guard, call};
use crate::stream::{Request, Traffic};
use crate::work::{Region, Source, Work, rows, stage};

/// One side of a copy.
#[derive(Clone, Copy)]
enum Side {
    Host(Region),
    Device(Region),
}

/// Which side a region is on.
type MakeSide = fn(Region) -> Side;

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> Code {
    call("cuMemcpyHtoDAsync_v2", |sim| plain(sim, from, to, bytes, (Side::Host, Side::Device), Some(stream)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> Code {
    call("cuMemcpyDtoHAsync_v2", |sim| plain(sim, from, to, bytes, (Side::Device, Side::Host), Some(stream)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> Code {
    call("cuMemcpyDtoDAsync_v2", |sim| plain(sim, from, to, bytes, (Side::Device, Side::Device), Some(stream)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) -> Code {
    call("cuMemcpyHtoD_v2", |sim| plain(sim, from, to, bytes, (Side::Host, Side::Device), None))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) -> Code {
    call("cuMemcpyDtoH_v2", |sim| plain(sim, from, to, bytes, (Side::Device, Side::Host), None))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> Code {
    call("cuMemcpyDtoD_v2", |sim| plain(sim, from, to, bytes, (Side::Device, Side::Device), None))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: Handle,
    from: u64,
    from_context: Handle,
    bytes: usize,
    stream: Handle,
) -> Code {
    call("cuMemcpyPeerAsync", |sim| {
        for (address, context) in [(to, to_context), (from, from_context)] {
            let device = sim.live(given(context).map_err(|_| INVALID_CONTEXT)?)?;
            if sim.memory.find(address).is_some_and(|(_, range)| range.device != device) {
                return Err(INVALID_VALUE);
            }
        }
        plain(sim, from, to, bytes, (Side::Device, Side::Device), Some(stream))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2DAsync_v2(copy: In<Copy2D>, stream: Handle) -> Code {
    call("cuMemcpy2DAsync_v2", |sim| strided(sim, copy.get()?, Some(stream)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2D_v2(copy: In<Copy2D>) -> Code {
    call("cuMemcpy2D_v2", |sim| strided(sim, copy.get()?, None))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: Handle) -> Code {
    call("cuMemsetD8Async", |sim| fill(sim, to, vec![byte], bytes, Some(stream)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8_v2(to: u64, byte: u8, bytes: usize) -> Code {
    call("cuMemsetD8_v2", |sim| fill(sim, to, vec![byte], bytes, None))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(to: u64, word: u32, words: usize, stream: Handle) -> Code {
    call("cuMemsetD32Async", |sim| fill(sim, to, word.to_le_bytes().to_vec(), words * 4, Some(stream)))
}

fn plain(
    sim: &mut Guard,
    from: u64,
    to: u64,
    bytes: usize,
    sides: (MakeSide, MakeSide),
    stream: Option<Handle>,
) -> Result {
    let region = |start| Region::flat(start, bytes as u64);
    transfer(sim, sides.0(region(from)), sides.1(region(to)), stream)
}

fn strided(sim: &mut Guard, copy: Copy2D, stream: Option<Handle>) -> Result {
    let side = |sim: &Guard, kind, host, device, x, y, pitch| {
        let region = |base| rows(base, x, y, pitch, copy.width, copy.height);
        match kind {
            1 => Ok(Side::Host(region(host)?)),
            2 => Ok(Side::Device(region(device)?)),
            4 if sim.memory.owns(device) => Ok(Side::Device(region(device)?)),
            4 => Ok(Side::Host(region(device)?)),
            _ => Err(INVALID_VALUE),
        }
    };
    let from = side(sim, copy.src_type, copy.src_host, copy.src_device, copy.src_x, copy.src_y, copy.src_pitch)?;
    let to = side(sim, copy.dst_type, copy.dst_host, copy.dst_device, copy.dst_x, copy.dst_y, copy.dst_pitch)?;
    transfer(sim, from, to, stream)
}

/// Any copy; without a stream it is over when the call returns.
fn transfer(sim: &mut Guard, from: Side, to: Side, stream: Option<Handle>) -> Result {
    if let (Side::Host(_), Side::Device(region)) | (Side::Device(region), Side::Host(_)) = (from, to) {
        sim.reachable(region)?;
    }
    // A copy may go to a stream of another context than the current one, as the programming guide says.
    let queue = sim.stream(stream.unwrap_or(0))?;
    let context = sim.queues[&queue].context;
    let bytes = match from {
        Side::Host(region) | Side::Device(region) => region.bytes(),
    };
    if bytes == 0 {
        return Ok(());
    }
    let mut request = Request::new(sim.call(), Work::Nothing);
    let mut waits = stream.is_none();
    // First, since staging opens the lock.
    let source = match from {
        Side::Device(region) => {
            request.device_uses.extend(sim.device_region(context, region)?);
            request.reads = Some(region);
            Source::At(region)
        }
        Side::Host(region) => {
            let place = sim.host_region(context, region)?;
            if let Place::Pinned(start, id) = place {
                request.host_uses.push((start, id));
            }
            if matches!(place, Place::Pinned(..)) || sim.config.host_page_tables {
                request.reads = Some(region);
                request.source = Some(region);
                request.host_region = Some(region);
                Source::At(region)
            } else {
                Source::Staged(sim.outside(|| stage(region)))
            }
        }
    };
    let target = match to {
        Side::Device(region) => {
            request.device_uses.extend(sim.device_region(context, region)?);
            region
        }
        Side::Host(region) => {
            match sim.host_region(context, region)? {
                Place::Pinned(start, id) => {
                    if sim.host.get(start).is_some_and(|range| range.is_read_only()) {
                        sim.violation("writes to memory that is registered read-only");
                        return Err(INVALID_VALUE);
                    }
                    request.host_uses.push((start, id));
                }
                // The driver returns when the bytes are there.
                Place::Pageable | Place::Foreign => waits |= !sim.config.host_page_tables,
            }
            request.host_region = Some(region);
            region
        }
    };
    request.writes = Some(target);
    request.work = Work::Copy { source, to: target };
    request.traffic = Some(match (from, to) {
        (Side::Host(_), Side::Device(_)) => Traffic::In(bytes),
        (Side::Device(_), Side::Host(_)) => Traffic::Out(bytes),
        _ => Traffic::Device(bytes),
    });
    submit(sim, queue, request, waits)
}

fn fill(sim: &mut Guard, to: u64, pattern: Vec<u8>, bytes: usize, stream: Option<Handle>) -> Result {
    // A copy may go to a stream of another context than the current one, as the programming guide says.
    let queue = sim.stream(stream.unwrap_or(0))?;
    let context = sim.queues[&queue].context;
    if bytes == 0 {
        return Ok(());
    }
    let region = Region::flat(to, bytes as u64);
    let mut request = Request::new(sim.call(), Work::Nothing);
    request.device_uses = sim.device_region(context, region)?;
    request.writes = Some(region);
    request.work = Work::Copy { source: Source::Fill(pattern), to: region };
    request.traffic = Some(Traffic::Device(bytes as u64));
    submit(sim, queue, request, false)
}

fn submit(sim: &mut Guard, queue: QueueId, request: Request, waits: bool) -> Result {
    let seq = sim.submit(queue, request)?;
    if waits { sim.finish(queue, seq) } else { Ok(()) }
}

impl Guard {
    /// The allocations that a region of device memory lies in, which the context's device may access.
    pub(crate) fn device_region(&mut self, context: Handle, region: Region) -> Result<Vec<Use>> {
        let device = self.contexts.get(context)?.device;
        match self.memory.resolve(region.start, region.span()) {
            Ok(uses) => {
                let closed = |used: &&Use| {
                    self.memory.get(used.0).is_some_and(|range| range.access & (1 << device | 1 << range.device) == 0)
                };
                if let Some((start, _)) = uses.iter().find(closed) {
                    let what = format!("no device may access the mapping at {start:#x}: cuMemSetAccess comes first");
                    self.violation(&what);
                    return Err(INVALID_VALUE);
                }
                Ok(uses)
            }
            Err(what) => {
                self.violation(&what);
                Err(INVALID_VALUE)
            }
        }
    }

    /// Whether the device of the current context may access a region of device memory: drivers ask that of mapped memory
    /// and of pools, whatever context the stream is of (NVIDIA/cccl#9997).
    fn reachable(&mut self, region: Region) -> Result {
        let device = self.current_device()?;
        let uses = self.memory.resolve(region.start, region.span()).unwrap_or_default();
        let foreign = |used: &Use| {
            self.memory.get(used.0).is_some_and(|range| match range.kind {
                Kind::Plain => false,
                Kind::Pool => range.device != device,
                Kind::Mapped(_) => range.access != 0 && range.access & 1 << device == 0,
            })
        };
        if uses.iter().any(foreign) { Err(INVALID_VALUE) } else { Ok(()) }
    }

    fn host_region(&mut self, context: Handle, region: Region) -> Result<Place> {
        if region.start == 0 || self.memory.owns(region.start) {
            return Err(INVALID_VALUE);
        }
        let place = self.host.place(region.start, region.span(), context)?;
        match place {
            Place::Pinned(..) => {}
            Place::Pageable => self.ledger.pageable_copies += 1,
            Place::Foreign => self.ledger.foreign_copies += 1,
        }
        Ok(place)
    }
}
