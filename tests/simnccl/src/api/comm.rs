//! Communicators.

use std::ffi::{c_char, c_int};
use std::process;
use std::sync::Arc;
use std::thread;

use crate::abi::{
    CONFIG_MAGIC, Code, Config, Handle, IN_PROGRESS, INVALID_ARGUMENT, In, Out, Result, SUCCESS, SYSTEM_ERROR,
    UNDEFINED, UniqueId, text,
};
use crate::comm::Comm;
use crate::driver::current_device;
use crate::faults::Due;
use crate::group::{self, Init};
use crate::segment;
use crate::sim::{call, comm, config, count, dawdle, fail, last_text, lock, release};

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetVersion(version: Out<c_int>) -> Code {
    call("ncclGetVersion", || version.set(config().version).map(|()| SUCCESS))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    text(code).as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: Handle) -> *const c_char {
    last_text()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetUniqueId(id: Out<UniqueId>) -> Code {
    call("ncclGetUniqueId", || id.set(new_id()?).map(|()| SUCCESS))
}

fn new_id() -> Result<UniqueId> {
    // Two processes with one seed still need different numbers.
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure only.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    let mut sim = lock();
    let nonce = sim.random() ^ (u64::from(process::id()) << 32) ^ (time.tv_sec as u64) << 30 ^ time.tv_nsec as u64;
    let made = segment::create(nonce);
    let (file, id) = made.map_err(|error| fail(SYSTEM_ERROR, &format!("no memory to share: {error}")))?;
    sim.files.insert(nonce, file);
    Ok(id)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommInitRank(comm: Out<Handle>, size: c_int, id: UniqueId, rank: c_int) -> Code {
    let body = |hangs| make(comm, size, id, rank, current_device()?, true, hangs);
    init("ncclCommInitRank", body)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommInitRankConfig(
    comm: Out<Handle>,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    config: In<Config>,
) -> Code {
    let body = |hangs| make(comm, size, id, rank, current_device()?, blocks(config)?, hangs);
    init("ncclCommInitRankConfig", body)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommInitAll(comms: Out<Handle>, count: c_int, devices: In<c_int>) -> Code {
    init("ncclCommInitAll", |hangs| {
        let id = new_id()?;
        group::start();
        for rank in 0..count {
            let device = devices.at(rank as usize).unwrap_or(rank);
            let made = usize::try_from(device).map_err(|_| fail(INVALID_ARGUMENT, "invalid device"));
            let made = made.and_then(|device| make_at(comms, rank as usize, count, id, rank, device, true, hangs));
            made.unwrap_or_else(|code| {
                group::failed(code);
                code
            });
        }
        group::end()
    })
}

/// A call that makes communicators: if it is to hang, they never meet their peers.
fn init(name: &'static str, body: impl FnOnce(bool) -> Result<Code>) -> Code {
    let due = count(name);
    let result = match due {
        Some(Due::Code(code)) => Err(fail(code, "a test wants this call to fail")),
        _ => body(due == Some(Due::Hang)),
    };
    result.unwrap_or_else(|code| {
        group::failed(code);
        code
    })
}

/// Whether calls block, as a configuration says.
fn blocks(config: In<Config>) -> Result<bool> {
    let Some(config) = config.get() else { return Ok(true) };
    if config.magic != CONFIG_MAGIC || config.size < size_of::<Config>() {
        return Err(fail(INVALID_ARGUMENT, "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER"));
    }
    match config.blocking {
        0 => Ok(false),
        // Before 2.14 there was no such field.
        1 | UNDEFINED => Ok(true),
        _ if config.version < 21400 => Ok(true),
        other => Err(fail(INVALID_ARGUMENT, &format!("Invalid config blocking attribute value {other}"))),
    }
}

fn make(
    place: Out<Handle>,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    device: usize,
    blocking: bool,
    hangs: bool,
) -> Result<Code> {
    make_at(place, 0, size, id, rank, device, blocking, hangs)
}

#[expect(clippy::too_many_arguments, reason = "those of the call")]
fn make_at(
    place: Out<Handle>,
    index: usize,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    device: usize,
    blocking: bool,
    hangs: bool,
) -> Result<Code> {
    if segment::nonce(&id).is_none() {
        return Err(fail(INVALID_ARGUMENT, "not an id of ncclGetUniqueId"));
    }
    let number = |value: c_int| usize::try_from(value).map_err(|_| fail(INVALID_ARGUMENT, "invalid rank or size"));
    let comm = Comm::new(number(size)?, number(rank)?, device, blocking)?;
    place.set_at(index, comm.handle)?;
    group::init(Init { comm, id, hangs })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommGetAsyncError(handle: Handle, status: Out<Code>) -> Code {
    const NAME: &str = "ncclCommGetAsyncError";
    call(NAME, || {
        let comm = comm(NAME, handle)?;
        let _entered = comm.enter(NAME);
        status.set(comm.status()).map(|()| SUCCESS)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommCount(handle: Handle, count: Out<c_int>) -> Code {
    ask("ncclCommCount", handle, count, |comm| comm.size)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommUserRank(handle: Handle, rank: Out<c_int>) -> Code {
    ask("ncclCommUserRank", handle, rank, |comm| comm.rank)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommCuDevice(handle: Handle, device: Out<c_int>) -> Code {
    ask("ncclCommCuDevice", handle, device, |comm| comm.device)
}

fn ask(name: &'static str, handle: Handle, place: Out<c_int>, what: impl FnOnce(&Comm) -> usize) -> Code {
    call(name, || {
        let comm = comm(name, handle)?;
        let _entered = comm.enter(name);
        comm.ready()?;
        place.set(what(&comm) as c_int).map(|()| SUCCESS)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(handle: Handle) -> Code {
    const NAME: &str = "ncclCommFinalize";
    call(NAME, || {
        let comm = comm(NAME, handle)?;
        let _entered = comm.enter(NAME);
        comm.ready()?;
        if comm.is_finalized() {
            return Err(fail(INVALID_ARGUMENT, "the communicator was finalized before"));
        }
        comm.set_status(IN_PROGRESS);
        if comm.blocking {
            comm.finalize();
            return Ok(comm.status());
        }
        let later = Arc::clone(&comm);
        thread::spawn(move || {
            dawdle();
            later.finalize();
        });
        Ok(IN_PROGRESS)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(handle: Handle) -> Code {
    const NAME: &str = "ncclCommDestroy";
    release(NAME, || {
        if handle == 0 {
            return Ok(SUCCESS);
        }
        let comm = comm(NAME, handle)?;
        let _entered = comm.enter(NAME);
        comm.ready()?;
        comm.finalize();
        let mut sim = lock();
        sim.comms.remove(&handle);
        sim.ledger.destroyed += 1;
        Ok(comm.status())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(handle: Handle) -> Code {
    const NAME: &str = "ncclCommAbort";
    release(NAME, || {
        if handle == 0 {
            return Ok(SUCCESS);
        }
        // Unlike any other call it may come from a thread of its own.
        let comm = comm(NAME, handle)?;
        comm.abort();
        let mut sim = lock();
        sim.comms.remove(&handle);
        sim.ledger.aborted += 1;
        Ok(SUCCESS)
    })
}
