//! Device memory and pinned memory.

use crate::abi::{In, Out};
use crate::code::{Code, HOST_MEMORY_NOT_REGISTERED, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Result};
use crate::device_memory::{DeviceMemory, Kind, Range, poison, populate};
use crate::handle::{self, Handle};
use crate::host_memory::flags as known_flags;
use crate::sim::{Guard, call, release};
use crate::stream::Request;
use crate::work::Work;

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) -> Code {
    call("cuMemAlloc_v2", |sim| {
        let start = allocate(sim, bytes as u64, Kind::Plain)?;
        address.set(start)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocAsync(address: Out<u64>, bytes: usize, stream: Handle) -> Code {
    call("cuMemAllocAsync", |sim| {
        let queue = sim.own_stream(stream)?;
        let start = match allocate(sim, bytes as u64, Kind::Pool) {
            // What the stream is about to give back may be enough.
            Err(OUT_OF_MEMORY) => {
                sim.drain(queue)?;
                allocate(sim, bytes as u64, Kind::Pool)?
            }
            other => other?,
        };
        address.set(start)
    })
}

fn allocate(sim: &mut Guard, bytes: u64, kind: Kind) -> Result<u64> {
    let context = sim.context()?;
    let device = sim.contexts.get(context)?.device;
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    let quota = DeviceMemory::quota(bytes);
    sim.take(device, quota)?;
    let start = sim.memory.allocate(bytes).inspect_err(|_| sim.devices[device].used -= quota)?;
    let whole = sim.config.poison;
    let populated = sim.config.populate;
    sim.outside(|| {
        if populated {
            populate(start, bytes);
        }
        poison(start, bytes, whole);
    });
    let (id, made) = (sim.memory.id(), sim.number());
    sim.memory.insert(start, Range { bytes, kind, device, context, id, made, uses: 0, access: u64::MAX, freed: false });
    Ok(start)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Code {
    release("cuMemFree_v2", |sim| {
        if address == 0 {
            return Ok(());
        }
        own_memory(sim, address)?;
        let context = sim.context()?;
        sim.drain_context(context)?;
        // Streams of other contexts that use it, too.
        while sim.memory.get(address).is_some_and(|range| range.uses > 0) {
            sim.wait();
        }
        let call = sim.call();
        sim.remove_memory(call, address);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, stream: Handle) -> Code {
    release("cuMemFreeAsync", |sim| {
        let queue = sim.own_stream(stream)?;
        own_memory(sim, address)?;
        let range = sim.memory.get_mut(address).expect("found above");
        range.freed = true;
        let id = range.id;
        let request = Request::new(sim.call(), Work::Free { start: address, id });
        sim.submit(queue, request).map(drop)
    })
}

/// The address must be the start of an allocation that is still there.
fn own_memory(sim: &mut Guard, address: u64) -> Result {
    match sim.memory.get(address) {
        Some(range) if range.freed => {
            sim.violation("the memory was already given back by cuMemFreeAsync");
            Err(INVALID_VALUE)
        }
        Some(range) if matches!(range.kind, Kind::Plain | Kind::Pool) => Ok(()),
        _ => {
            sim.violation(&format!("{address:#x} is not the start of a live allocation"));
            Err(INVALID_VALUE)
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> Code {
    call("cuMemGetInfo_v2", |sim| {
        let device = sim.current_device()?;
        let bytes = sim.config.memory_bytes;
        free.set((bytes - sim.devices[device].used) as usize)?;
        total.set(bytes as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: i32) -> Code {
    call("cuDeviceGetDefaultMemPool", |sim| {
        let index = sim.device(device)?;
        pool.set(sim.devices[index].pool)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetMemPool(pool: Out<Handle>, device: i32) -> Code {
    call("cuDeviceGetMemPool", |sim| {
        let index = sim.device(device)?;
        pool.set(sim.devices[index].pool)
    })
}

/// Attributes 1 to 3 are switches of 32 bits, the others counts of 64.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: In<u64>) -> Code {
    call("cuMemPoolSetAttribute", |sim| {
        let device = pool_device(sim, pool)?;
        let value = match attribute {
            1..=3 => u64::from(value.cast::<u32>().get()?),
            4..=8 => value.get()?,
            _ => return Err(INVALID_VALUE),
        };
        sim.devices[device].pool_settings.insert(attribute, value);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: Out<u64>) -> Code {
    call("cuMemPoolGetAttribute", |sim| {
        let device = pool_device(sim, pool)?;
        let set = sim.devices[device].pool_settings.get(&attribute).copied();
        let in_pool = sim.memory.iter().filter(|(_, range)| range.kind == Kind::Pool && range.device == device);
        let used: u64 = in_pool.map(|(_, range)| range.bytes).sum();
        match attribute {
            1..=3 => value.cast::<u32>().set(set.unwrap_or(1) as u32),
            4 => value.set(set.unwrap_or(0)),
            5 | 7 => value.set(used),
            6 | 8 => value.set(sim.devices[device].peak),
            _ => Err(INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(pool: Handle, _bytes: usize) -> Code {
    call("cuMemPoolTrimTo", |sim| pool_device(sim, pool).map(drop))
}

fn pool_device(sim: &mut Guard, pool: Handle) -> Result<usize> {
    let found = sim.pools.get(pool).copied();
    sim.found(handle::Kind::Pool, found)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(address: Out<u64>, bytes: usize, flags: u32) -> Code {
    call("cuMemHostAlloc", |sim| {
        let context = sim.context()?;
        let flags = known_flags(flags, 7)?;
        if bytes == 0 || address.is_null() {
            return Err(INVALID_VALUE);
        }
        pin(sim, bytes as u64)?;
        let number = sim.number();
        let start = sim.host.allocate(bytes as u64, flags, context, number)?;
        pinned(sim);
        address.set(start)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: u64) -> Code {
    release("cuMemFreeHost", |sim| unpin(sim, address, false, INVALID_VALUE))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(address: u64, bytes: usize, flags: u32) -> Code {
    call("cuMemHostRegister_v2", |sim| {
        let context = sim.context()?;
        let flags = known_flags(flags, 15)?;
        pin(sim, bytes as u64)?;
        let (number, read_only) = (sim.number(), sim.config.read_only);
        sim.host.register(address, bytes as u64, flags, context, number, read_only)?;
        pinned(sim);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(address: u64) -> Code {
    release("cuMemHostUnregister", |sim| unpin(sim, address, true, HOST_MEMORY_NOT_REGISTERED))
}

fn pin(sim: &mut Guard, bytes: u64) -> Result {
    let enough = sim.host.bytes.checked_add(bytes).is_some_and(|all| all <= sim.config.pinned_bytes);
    if enough { Ok(()) } else { Err(OUT_OF_MEMORY) }
}

fn pinned(sim: &mut Guard) {
    sim.ledger.peak_pinned_bytes = sim.ledger.peak_pinned_bytes.max(sim.host.bytes);
}

fn unpin(sim: &mut Guard, address: u64, registered: bool, missing: Code) -> Result {
    let context = sim.context()?;
    if sim.is_lost(context) {
        sim.drain_context(context)?; // nothing of it runs any more, but something may be running
    }
    match sim.host.get(address) {
        Some(range) if range.registered == registered => {
            if range.uses > 0 {
                sim.violation("a copy that uses this memory has not finished");
            }
            sim.host.remove(address);
            Ok(())
        }
        _ => Err(missing),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostGetDevicePointer_v2(device: Out<u64>, host: u64, flags: u32) -> Code {
    call("cuMemHostGetDevicePointer_v2", |sim| {
        sim.context()?;
        if flags != 0 || sim.host.find(host).is_none() {
            return Err(INVALID_VALUE);
        }
        device.set(host)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostGetFlags(flags: Out<u32>, address: u64) -> Code {
    call("cuMemHostGetFlags", |sim| {
        sim.context()?;
        let (_, range) = sim.host.find(address).ok_or(INVALID_VALUE)?;
        flags.set(range.flags)
    })
}

/// The twin has no managed memory; attribute 83 says so.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocManaged(_address: Out<u64>, _bytes: usize, _flags: u32) -> Code {
    call("cuMemAllocManaged", |_| Err(NOT_SUPPORTED))
}
