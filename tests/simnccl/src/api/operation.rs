//! Messages, collectives and groups.

use std::ffi::{CStr, c_int};

use crate::abi::{Code, Handle, INVALID_ARGUMENT, Result, SUCCESS, element_bytes};
use crate::faults::Due;
use crate::group;
use crate::segment::Kind;
use crate::sim::{call, comm, count, fail};
use crate::transfer::Op;

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> Code {
    call("ncclGroupStart", || {
        group::start();
        Ok(SUCCESS)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> Code {
    let due = count("ncclGroupEnd");
    match due {
        // It ends all the same, and does nothing of what was collected.
        Some(Due::Code(code)) => group::failed(fail(code, "a test wants this call to fail")),
        Some(Due::Hang) => group::until_aborted(),
        None => {}
    }
    group::end().unwrap_or_else(|code| code)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(
    from: u64,
    elements: usize,
    data_type: c_int,
    peer: c_int,
    comm: Handle,
    stream: u64,
) -> Code {
    let memory = Memory { from, to: from, elements, data_type };
    operation(c"ncclSend", Some(Kind::Send), memory, peer, 0, comm, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(to: u64, elements: usize, data_type: c_int, peer: c_int, comm: Handle, stream: u64) -> Code {
    let memory = Memory { from: to, to, elements, data_type };
    operation(c"ncclRecv", None, memory, peer, 0, comm, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclBroadcast(
    from: u64,
    to: u64,
    elements: usize,
    data_type: c_int,
    root: c_int,
    comm: Handle,
    stream: u64,
) -> Code {
    let memory = Memory { from, to, elements, data_type };
    operation(c"ncclBroadcast", Some(Kind::Broadcast), memory, root, 0, comm, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllGather(
    from: u64,
    to: u64,
    elements: usize,
    data_type: c_int,
    comm: Handle,
    stream: u64,
) -> Code {
    let memory = Memory { from, to, elements, data_type };
    operation(c"ncclAllGather", Some(Kind::AllGather), memory, 0, 0, comm, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllReduce(
    from: u64,
    to: u64,
    elements: usize,
    data_type: c_int,
    reduction: c_int,
    comm: Handle,
    stream: u64,
) -> Code {
    let memory = Memory { from, to, elements, data_type };
    operation(c"ncclAllReduce", Some(Kind::AllReduce), memory, 0, reduction, comm, stream)
}

struct Memory {
    from: u64,
    to: u64,
    elements: usize,
    data_type: c_int,
}

fn operation(
    call: &'static CStr,
    kind: Option<Kind>,
    memory: Memory,
    peer: c_int,
    reduction: c_int,
    handle: Handle,
    stream: u64,
) -> Code {
    let name = call.to_str().expect("names of functions");
    let checked = || -> Result<Code> {
        let comm = comm(name, handle)?;
        let entered = comm.enter(name);
        comm.ready()?;
        let Memory { from, to, elements, data_type } = memory;
        let bytes = element_bytes(data_type)?.checked_mul(elements as u64);
        let bytes = bytes.ok_or_else(|| fail(INVALID_ARGUMENT, "more bytes than there are addresses"))?;
        let peer = usize::try_from(peer).ok().filter(|peer| *peer < comm.size);
        let peer = peer.ok_or_else(|| fail(INVALID_ARGUMENT, &format!("{name} : invalid peer or root")))?;
        let gives = kind.is_some_and(|kind| kind != Kind::Broadcast || peer == comm.rank);
        let gets = kind != Some(Kind::Send);
        if bytes > 0 && (gives && from == 0 || gets && to == 0) {
            return Err(fail(INVALID_ARGUMENT, &format!("{name} : invalid buffer (NULL)")));
        }
        let op = Op { call, kind, peer, from, to, bytes, data_type, reduction, stream, ordinal: 0 };
        drop(entered);
        group::operation(comm, op)
    };
    let code = crate::sim::call(name, checked);
    if code != SUCCESS {
        group::failed(code);
    }
    code
}
