//! Virtual memory management: memory, addresses, and what lies where.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crate::abi::{AccessDesc, AllocationProp, In, Out};
use crate::code::{Code, INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Result};
use crate::context::top;
use crate::device_memory::{FRESH, GRANULARITY, Kind, Physical, Range, Reservation, allow, map_file, populate};
use crate::handle::{self, Handle};
use crate::sim::{Guard, call, release};

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const POSIX_FD: u32 = 1;

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAllocationGranularity(bytes: Out<usize>, prop: In<AllocationProp>, _option: u32) -> Code {
    call("cuMemGetAllocationGranularity", |sim| {
        device_of(sim, prop.get()?)?;
        bytes.set(GRANULARITY as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemCreate(physical: Out<Handle>, bytes: usize, prop: In<AllocationProp>, flags: u64) -> Code {
    call("cuMemCreate", |sim| {
        let device = device_of(sim, prop.get()?)?;
        let bytes = bytes as u64;
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || flags != 0 || physical.is_null() {
            return Err(INVALID_VALUE);
        }
        sim.take(device, bytes)?;
        let made = memory_file(device, bytes, sim.config.poison);
        let file = made.inspect_err(|_| sim.devices[device].used -= bytes)?;
        let (id, number) = (sim.memory.id(), sim.number());
        sim.memory.physicals.insert(id, Physical { file, bytes, device, holders: 1 });
        physical.set(sim.physicals.insert(number, id))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemRelease(physical: Handle) -> Code {
    release("cuMemRelease", |sim| {
        let removed = sim.physicals.remove(physical);
        let id = sim.found(handle::Kind::Physical, removed)?;
        sim.drop_physical(id);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressReserve(address: Out<u64>, bytes: usize, align: usize, _wish: u64, flags: u64) -> Code {
    call("cuMemAddressReserve", |sim| {
        sim.not_lost(top())?;
        let (bytes, align) = (bytes as u64, (align as u64).max(GRANULARITY));
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || !align.is_power_of_two() || flags != 0 {
            return Err(INVALID_VALUE);
        }
        let start = sim.memory.addresses(bytes, align)?;
        let made = sim.number();
        sim.memory.reservations.insert(start, Reservation { bytes, made });
        address.set(start)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> Code {
    release("cuMemAddressFree", |sim| {
        match sim.memory.reservations.get(&address) {
            Some(reservation) if reservation.bytes == bytes as u64 => {}
            _ => return Err(INVALID_VALUE),
        }
        if sim.mappings(address, bytes as u64).next().is_some() {
            sim.violation("memory is still mapped at these addresses");
            return Err(INVALID_VALUE);
        }
        sim.memory.reservations.remove(&address);
        let call = sim.call();
        sim.memory.bury(address, bytes as u64, call);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemMap(address: u64, bytes: usize, offset: usize, physical: Handle, flags: u64) -> Code {
    call("cuMemMap", |sim| {
        sim.not_lost(top())?;
        let found = sim.physicals.get(physical).copied();
        let id = sim.found(handle::Kind::Physical, found)?;
        let bytes = bytes as u64;
        let memory = &sim.memory;
        let reserved = memory.reservations.range(..=address).next_back().is_some_and(|(start, reservation)| {
            address.checked_add(bytes).is_some_and(|end| end <= start + reservation.bytes)
        });
        let held = memory.physicals.get(&id).is_some_and(|physical| bytes <= physical.bytes);
        let whole = [address, bytes].iter().all(|value| value.is_multiple_of(GRANULARITY)) && bytes > 0;
        if !reserved || !held || !whole || offset != 0 || flags != 0 || sim.mappings(address, bytes).next().is_some() {
            return Err(INVALID_VALUE);
        }
        let physical = sim.memory.physicals.get_mut(&id).expect("found above");
        map_file(address, bytes, &physical.file)?;
        physical.holders += 1;
        let (device, made) = (physical.device, sim.number());
        let (kind, range_id) = (Kind::Mapped(id), sim.memory.id());
        let context = 0; // of no context: it outlives them
        let range = Range { bytes, kind, device, context, id: range_id, made, uses: 0, access: 0, freed: false };
        sim.memory.insert(address, range);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemUnmap(address: u64, bytes: usize) -> Code {
    release("cuMemUnmap", |sim| {
        let context = top();
        if sim.is_lost(context) {
            sim.drain_context(context)?;
        }
        let starts = sim.whole_mappings(address, bytes as u64)?;
        if starts.iter().any(|start| sim.memory.get(*start).is_some_and(|range| range.uses > 0)) {
            sim.violation("an operation that touches this memory has not finished");
        }
        let call = sim.call();
        starts.into_iter().for_each(|start| sim.remove_memory(call, start));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemSetAccess(address: u64, bytes: usize, access: In<AccessDesc>, count: usize) -> Code {
    call("cuMemSetAccess", |sim| {
        sim.not_lost(top())?;
        let starts = sim.whole_mappings(address, bytes as u64)?;
        for index in 0..count {
            let access = access.at(index)?;
            let device = sim.device(access.location.id)?;
            // None, read, read and write.
            if access.location.kind != 1 || !matches!(access.flags, 0 | 1 | 3) {
                return Err(INVALID_VALUE);
            }
            for start in &starts {
                let range = sim.memory.get_mut(*start).expect("found above");
                let bit = 1 << device;
                range.access = if access.flags == 0 { range.access & !bit } else { range.access | bit };
                let (bytes, access) = (range.bytes, range.access != 0);
                allow(*start, bytes, access)?;
                if access && sim.config.populate {
                    populate(*start, bytes);
                }
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemExportToShareableHandle(out: Out<i32>, physical: Handle, kind: u32, flags: u64) -> Code {
    call("cuMemExportToShareableHandle", |sim| {
        let found = sim.physicals.get(physical).copied();
        let id = sim.found(handle::Kind::Physical, found)?;
        if kind != POSIX_FD || flags != 0 || out.is_null() {
            return Err(INVALID_VALUE);
        }
        let physical = sim.memory.physicals.get(&id).ok_or(INVALID_VALUE)?;
        let copy = physical.file.try_clone().map_err(|_| OUT_OF_MEMORY)?;
        out.set(copy.into_raw_fd())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemImportFromShareableHandle(physical: Out<Handle>, file: usize, kind: u32) -> Code {
    call("cuMemImportFromShareableHandle", |sim| {
        if kind != POSIX_FD || physical.is_null() {
            return Err(INVALID_VALUE);
        }
        let path = format!("/proc/self/fd/{file}");
        let name = fs::read_link(&path).map_err(|_| INVALID_VALUE)?;
        let device = name.to_str().and_then(device_of_file).ok_or(INVALID_VALUE)?;
        let file = File::options().read(true).write(true).open(path).map_err(|_| INVALID_VALUE)?;
        let metadata = file.metadata().map_err(|_| INVALID_VALUE)?;
        let device = sim.device(device).map_err(|_| INVALID_DEVICE)?;
        let known = sim.memory.physicals.iter_mut().find(|(_, physical)| inode(&physical.file) == Some(metadata.ino()));
        let id = match known {
            Some((id, physical)) => {
                physical.holders += 1;
                *id
            }
            None => {
                let (id, bytes) = (sim.memory.id(), metadata.len());
                sim.take(device, bytes)?;
                sim.memory.physicals.insert(id, Physical { file: file.into(), bytes, device, holders: 1 });
                id
            }
        };
        let number = sim.number();
        physical.set(sim.physicals.insert(number, id))
    })
}

fn device_of(sim: &mut Guard, prop: AllocationProp) -> Result<usize> {
    sim.not_lost(top())?;
    match prop {
        // Pinned memory of a device, to be shared as a descriptor or not at all.
        AllocationProp { kind: 1, handle_types: 0 | POSIX_FD, location, .. } if location.kind == 1 => {
            sim.device(location.id)
        }
        AllocationProp { handle_types: 2.., .. } => Err(NOT_SUPPORTED),
        _ => Err(INVALID_VALUE),
    }
}

/// Memory that has a name by which another process knows its device.
fn memory_file(device: usize, bytes: u64, fill: bool) -> Result<OwnedFd> {
    let name = format!("simcuda:{device}\0");
    // SAFETY: a C string; the descriptor is new and this function's own.
    let file = unsafe {
        let file = libc::memfd_create(name.as_ptr().cast(), libc::MFD_CLOEXEC);
        if file < 0 {
            return Err(OUT_OF_MEMORY);
        }
        File::from_raw_fd(file)
    };
    file.set_len(bytes).map_err(|_| OUT_OF_MEMORY)?;
    if fill {
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of the file, written to its end and unmapped.
        unsafe {
            let start =
                libc::mmap(std::ptr::null_mut(), bytes as usize, read_write, libc::MAP_SHARED, file.as_raw_fd(), 0);
            if start == libc::MAP_FAILED {
                return Err(OUT_OF_MEMORY);
            }
            start.cast::<u8>().write_bytes(FRESH, bytes as usize);
            libc::munmap(start, bytes as usize);
        }
    }
    Ok(file.into())
}

fn device_of_file(name: &str) -> Option<i32> {
    name.strip_prefix("/memfd:simcuda:")?.split(' ').next()?.parse().ok()
}

fn inode(file: &OwnedFd) -> Option<u64> {
    fs::metadata(format!("/proc/self/fd/{}", file.as_raw_fd())).ok().map(|metadata| metadata.ino())
}

impl Guard {
    /// The starts of the mappings that meet these addresses.
    fn mappings(&self, address: u64, bytes: u64) -> impl Iterator<Item = u64> {
        let meets = move |(start, range): &(u64, &Range)| *start < address + bytes && address < start + range.bytes;
        self.memory.iter().filter(meets).map(|(start, _)| start)
    }

    /// Likewise, if they fill these addresses exactly.
    fn whole_mappings(&self, address: u64, bytes: u64) -> Result<Vec<u64>> {
        let mut starts = Vec::new();
        let mut at = address;
        while at < address.checked_add(bytes).ok_or(INVALID_VALUE)? {
            let range =
                self.memory.get(at).filter(|range| matches!(range.kind, Kind::Mapped(_))).ok_or(INVALID_VALUE)?;
            starts.push(at);
            at += range.bytes;
        }
        if at == address + bytes && bytes > 0 { Ok(starts) } else { Err(INVALID_VALUE) }
    }
}
