//! The driver and its devices.

use std::ffi::{CStr, c_char, c_void};

use crate::abi::{In, Out, Uuid};
use crate::code::{self, Code, INVALID_VALUE, NO_DEVICE, NOT_FOUND, NOT_SUPPORTED, SUCCESS};
use crate::sim::{Sim, call, lock};

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: u32) -> Code {
    call("cuInit", |sim| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if sim.devices.is_empty() {
            return Err(NO_DEVICE);
        }
        sim.initialised = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: Out<i32>) -> Code {
    call("cuDriverGetVersion", |sim| version.set(sim.config.driver_version))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: Out<i32>) -> Code {
    call("cuDeviceGetCount", |sim| count.set(sim.devices.len() as i32))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> Code {
    call("cuDeviceGet", |sim| {
        sim.device(ordinal)?;
        device.set(ordinal)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: Out<c_char>, capacity: i32, device: i32) -> Code {
    call("cuDeviceGetName", |sim| {
        sim.device(device)?;
        name.set_text("simcuda", capacity)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid(uuid: Out<Uuid>, device: i32) -> Code {
    call("cuDeviceGetUuid", |sim| {
        let index = sim.device(device)?;
        let board = sim.config.visible[index] as u8;
        uuid.set(Uuid {
            bytes: *b"simcuda-device--"
                .map(|byte| if byte == b'-' { board + 1 } else { byte })
                .first_chunk()
                .expect("16 bytes"),
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid_v2(uuid: Out<Uuid>, device: i32) -> Code {
    cuDeviceGetUuid(uuid, device)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> Code {
    call("cuDeviceTotalMem_v2", |sim| {
        sim.device(device)?;
        bytes.set(sim.config.memory_bytes as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: Out<i32>, attribute: u32, device: i32) -> Code {
    call("cuDeviceGetAttribute", |sim| {
        let index = sim.device(device)?;
        value.set(sim.attribute(attribute, index))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetPCIBusId(id: Out<c_char>, capacity: i32, device: i32) -> Code {
    call("cuDeviceGetPCIBusId", |sim| {
        let index = sim.device(device)?;
        id.set_text(&format!("{DOMAIN:04X}:{:02X}:00.0", bus(sim.config.visible[index])), capacity)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) -> Code {
    call("cuDeviceCanAccessPeer", |sim| {
        let (device, peer) = (sim.device(device)?, sim.device(peer)?);
        can.set(i32::from(device != peer))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetP2PAttribute(value: Out<i32>, attribute: u32, device: i32, peer: i32) -> Code {
    call("cuDeviceGetP2PAttribute", |sim| {
        let (device, peer) = (sim.device(device)?, sim.device(peer)?);
        if device == peer || attribute == 0 {
            return Err(if device == peer { code::INVALID_DEVICE } else { INVALID_VALUE });
        }
        // Rank of the path, access, atomics, arrays.
        value.set(match attribute {
            1 => 0,
            2 | 3 => 1,
            _ => 0,
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: Code, name: Out<*const c_char>) -> Code {
    describe(error, name, |(known, _)| known)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(error: Code, text: Out<*const c_char>) -> Code {
    describe(error, text, |(_, known)| known)
}

fn describe(error: Code, out: Out<*const c_char>, part: fn((&'static CStr, &'static CStr)) -> &'static CStr) -> Code {
    let known = code::text(error).map(part);
    let set = out.set(known.map_or(std::ptr::null(), CStr::as_ptr));
    if known.is_none() { INVALID_VALUE } else { set.err().unwrap_or(SUCCESS) }
}

/// NVRTC looks for it and carries on without.
#[unsafe(no_mangle)]
pub extern "C" fn cuGetExportTable(table: Out<*const c_void>, _id: In<Uuid>) -> Code {
    table.set_if(std::ptr::null()).ok();
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetProcAddress_v2(
    symbol: In<c_char>,
    address: Out<*mut c_void>,
    version: i32,
    _flags: u64,
    status: Out<u32>,
) -> Code {
    let Ok(name) = symbol.text() else { return INVALID_VALUE };
    let driver = lock().config.driver_version;
    let found = own_symbol(&name);
    // 1: not there; 2: there, but not in the version that was asked for.
    let (found, what) = match found {
        _ if version > driver => (None, 2),
        Some(found) => (Some(found), 0),
        None => (None, 1),
    };
    if address.set(found.unwrap_or(std::ptr::null_mut())).is_err() {
        return INVALID_VALUE;
    }
    status.set_if(what).ok();
    if found.is_some() { SUCCESS } else { NOT_FOUND }
}

/// The exported function of this name; the newest one, as programs name it without a suffix.
fn own_symbol(name: &str) -> Option<*mut c_void> {
    // SAFETY: asks the loader about the library that this function is in, which stays loaded.
    let library = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(cuInit as *const c_void, &mut info) == 0 {
            return None;
        }
        libc::dlopen(info.dli_fname, libc::RTLD_NOW | libc::RTLD_NOLOAD)
    };
    [format!("{name}_v2\0"), format!("{name}\0")].into_iter().find_map(|name| {
        // SAFETY: a live library and a C string.
        let found = unsafe { libc::dlsym(library, name.as_ptr().cast()) };
        (!found.is_null()).then_some(found)
    })
}

/// A PCI domain that no machine has, so that nobody finds a real device under the twin's addresses.
const DOMAIN: i32 = 0x51C0;

/// The bus of a device.
fn bus(index: usize) -> usize {
    index + 0x17
}

impl Sim {
    /// Attributes as an H200 has them, where a loader may ask; 0 for all others.
    fn attribute(&self, attribute: u32, device: usize) -> i32 {
        match attribute {
            1 => 1024,         // threads per block
            2 | 3 => 1024,     // block x and y
            4 => 64,           // block z
            5 => i32::MAX,     // grid x
            6 | 7 => 65535,    // grid y and z
            8 => 48 << 10,     // shared memory per block
            9 => 64 << 10,     // constant memory
            10 => 32,          // warp
            11 => i32::MAX,    // pitch
            12 | 82 => 65536,  // registers
            13 => 1_980_000,   // kHz
            14 => 512,         // texture alignment
            15 | 19 | 31 => 1, // overlap, mapped host memory, concurrent kernels
            16 => 2,           // multiprocessors: few, since their threads run one after the other
            32 => 1,           // ECC
            33 => bus(self.config.visible[device]) as i32,
            36 => 3_201_000, // memory, kHz
            37 => 6144,      // bits
            38 => 50 << 20,  // L2
            39 => 2048,      // threads per multiprocessor
            40 => 3,         // copy engines
            41 => 1,         // unified addresses
            50 => DOMAIN,
            75 => 9, // compute capability
            76 => 0,
            78..=80 => 1,    // priorities, caches
            81 => 228 << 10, // shared memory per multiprocessor
            83 => 0,         // managed memory: none here
            88 => i32::from(self.config.host_page_tables),
            90 | 91 | 95 => 1, // preemption, host pointers of registered memory, cooperative launch
            97 => 227 << 10,   // shared memory per block, opted in
            99 => 1,           // host memory can be registered
            100 => i32::from(self.config.host_page_tables),
            102 | 103 => 1, // virtual memory, POSIX descriptors
            106 => 32,      // blocks per multiprocessor
            113 => i32::from(self.config.read_only),
            115 => 1,        // pools
            119 => 1,        // handles of pools: POSIX descriptors
            120 => 1,        // clusters
            131 | 134 => -1, // NUMA nodes
            _ => 0,
        }
    }
}
