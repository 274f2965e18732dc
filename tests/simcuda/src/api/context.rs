//! Primary contexts and what is current.

use crate::abi::Out;
use crate::code::{
    Code, INVALID_CONTEXT, INVALID_DEVICE, PEER_ACCESS_ALREADY_ENABLED, PEER_ACCESS_NOT_ENABLED, Result,
};
use crate::context::{STACK, top};
use crate::handle::{Handle, Kind};
use crate::sim::{Guard, call, release};

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: i32) -> Code {
    call("cuDevicePrimaryCtxRetain", |sim| {
        let index = sim.device(device)?;
        if let Some(handle) = sim.devices[index].context {
            sim.not_lost(handle)?;
        }
        let number = sim.number();
        let handle = sim.retain(index, number);
        context.set(handle)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> Code {
    release("cuDevicePrimaryCtxRelease_v2", |sim| {
        let index = sim.device(device)?;
        if sim.devices[index].retained.pop().is_none() {
            sim.violation("the primary context was not retained");
            return Err(INVALID_CONTEXT);
        }
        if sim.devices[index].retained.is_empty()
            && let Some(handle) = sim.devices[index].context
        {
            sim.destroy_context(handle);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) -> Code {
    call("cuDevicePrimaryCtxGetState", |sim| {
        let index = sim.device(device)?;
        flags.set(0)?;
        active.set(i32::from(sim.devices[index].context.is_some()))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: Out<Handle>) -> Code {
    call("cuCtxGetCurrent", |_| context.set(top()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Handle) -> Code {
    call("cuCtxSetCurrent", |sim| {
        if context != 0 {
            sim.live(context)?;
        }
        STACK.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> Code {
    call("cuCtxPushCurrent_v2", |sim| {
        sim.live(context)?;
        STACK.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPopCurrent_v2(context: Out<Handle>) -> Code {
    call("cuCtxPopCurrent_v2", |_| {
        let popped = STACK.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)?;
        context.set_if(popped)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetDevice(device: Out<i32>) -> Code {
    call("cuCtxGetDevice", |sim| {
        let index = sim.current_device()?;
        device.set(index as i32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Code {
    call("cuCtxSynchronize", |sim| {
        let context = sim.context()?;
        sim.drain_context(context)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> Code {
    call("cuCtxGetStreamPriorityRange", |sim| {
        sim.context()?;
        least.set_if(0)?;
        greatest.set_if(-5)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxEnablePeerAccess(peer: Handle, _flags: u32) -> Code {
    call("cuCtxEnablePeerAccess", |sim| {
        let context = sim.context()?;
        let device = sim.live(peer)?;
        if device == sim.contexts.get(context)?.device {
            return Err(INVALID_DEVICE);
        }
        if sim.contexts.get_mut(context)?.peers.insert(peer) { Ok(()) } else { Err(PEER_ACCESS_ALREADY_ENABLED) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDisablePeerAccess(peer: Handle) -> Code {
    call("cuCtxDisablePeerAccess", |sim| {
        let context = sim.context()?;
        if sim.contexts.get_mut(context)?.peers.remove(&peer) { Ok(()) } else { Err(PEER_ACCESS_NOT_ENABLED) }
    })
}

impl Guard {
    /// The device of a context that the caller names.
    pub(crate) fn live(&mut self, context: Handle) -> Result<usize> {
        let found = self.contexts.get(context).map(|context| context.device);
        self.found(Kind::Context, found)
    }
}
