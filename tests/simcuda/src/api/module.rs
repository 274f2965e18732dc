//! Modules and kernel launches.

use std::ffi::{c_char, c_void};

use crate::abi::{In, Out};
use crate::code::{
    Code, INVALID_CONTEXT, INVALID_HANDLE, INVALID_IMAGE, INVALID_VALUE, NO_BINARY_FOR_GPU, NOT_FOUND, Result,
    UNSUPPORTED_PTX_VERSION,
};
use crate::handle::{self, Handle};
use crate::kernels::{Function, Kernel, Launch, Module, entry, newest_version, version};
use crate::sim::{Guard, call, release};
use crate::stream::{Request, Traffic};
use crate::work::Work;

/// Dynamic shared memory of a launch, by default and at most.
const SHARED_BYTES: u32 = 48 << 10;
const MOST_SHARED_BYTES: u32 = 227 << 10;
const MAX_THREADS: u32 = 1024;

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(module: Out<Handle>, image: In<c_char>) -> Code {
    call("cuModuleLoadData", |sim| load(sim, module, image))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadDataEx(
    module: Out<Handle>,
    image: In<c_char>,
    _count: u32,
    _options: In<u32>,
    _values: In<*mut c_void>,
) -> Code {
    call("cuModuleLoadDataEx", |sim| load(sim, module, image))
}

fn load(sim: &mut Guard, module: Out<Handle>, image: In<c_char>) -> Result {
    let context = sim.context()?;
    let ptx = image.text().map_err(|_| NO_BINARY_FOR_GPU)?;
    let version = version(&ptx).ok_or(INVALID_IMAGE)?;
    if version > newest_version(sim.config.driver_version) {
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    if module.is_null() {
        return Err(INVALID_VALUE);
    }
    let number = sim.number();
    module.set(sim.modules.insert(number, Module { context, ptx }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: Handle) -> Code {
    release("cuModuleUnload", |sim| {
        let context = sim.context()?;
        let found = sim.modules.get(module).map(drop);
        sim.found(handle::Kind::Module, found)?;
        // Its kernels end first.
        sim.drain_context(context)?;
        sim.remove_module(module);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: In<c_char>) -> Code {
    call("cuModuleGetFunction", |sim| {
        sim.context()?;
        let found = sim.modules.get(module).map(drop);
        sim.found(handle::Kind::Module, found)?;
        let name = name.text()?;
        let parameters = entry(&sim.modules.get(module)?.ptx, &name).ok_or(NOT_FOUND)?;
        let Some(kernel) = Kernel::find(&name) else {
            eprintln!("simcuda: {name} is in the PTX, but no kernel of that name was compiled for the host");
            return Err(NOT_FOUND);
        };
        if parameters != kernel.param_bytes().len() {
            let expected = kernel.param_bytes().len();
            sim.violation(&format!("{name} takes {parameters} parameters in the PTX, {expected} in its source"));
        }
        if function.is_null() {
            return Err(INVALID_VALUE);
        }
        let number = sim.number();
        function.set(sim.functions.insert(number, Function { module, kernel, shared_bytes: SHARED_BYTES }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetAttribute(value: Out<i32>, attribute: u32, function: Handle) -> Code {
    call("cuFuncGetAttribute", |sim| {
        let shared = sim.function(function)?.2;
        value.set(match attribute {
            0 => MAX_THREADS as i32,
            1..=3 | 7 => 0,
            4 => 32, // registers
            5 => 70, // PTX for compute capability 7.0
            6 => 90,
            8 => shared as i32,
            _ => return Err(INVALID_VALUE),
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: Handle, attribute: u32, value: i32) -> Code {
    call("cuFuncSetAttribute", |sim| {
        sim.function(function)?;
        let bytes = u32::try_from(value).map_err(|_| INVALID_VALUE)?;
        if attribute != 8 || bytes > MOST_SHARED_BYTES {
            return Err(INVALID_VALUE);
        }
        sim.functions.get_mut(function)?.shared_bytes = bytes;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    stream: Handle,
    parameters: In<In<u8>>,
    extra: In<*mut c_void>,
) -> Code {
    call("cuLaunchKernel", |sim| {
        let context = sim.context()?;
        let queue =
            sim.own_stream(stream).map_err(|code| if code == INVALID_CONTEXT { INVALID_HANDLE } else { code })?;
        let (module_context, kernel, most_shared) = sim.function(function)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads = block.iter().try_fold(1_u32, |all, side| all.checked_mul(*side)).unwrap_or(u32::MAX);
        let fits = grid.iter().all(|side| *side > 0)
            && grid_x <= i32::MAX as u32
            && grid_y.max(grid_z) <= 65535
            && (1..=MAX_THREADS).contains(&threads)
            && block_z <= 64
            && shared_bytes <= most_shared;
        if !fits || !extra.is_null() {
            return Err(INVALID_VALUE);
        }
        if module_context != context {
            return Err(INVALID_HANDLE);
        }
        let mut arguments = Vec::new();
        for (index, bytes) in kernel.param_bytes().iter().enumerate() {
            arguments.push(argument(parameters.at(index)?, *bytes as usize)?);
        }
        let mut request = Request::new(sim.call(), Work::Nothing);
        sim.pointers(context, kernel, &arguments, &mut request)?;
        request.work = Work::Kernel(Launch { kernel, arguments, grid, block, shared_bytes });
        request.traffic = Some(Traffic::Kernel(kernel.name()));
        sim.submit(queue, request).map(drop)
    })
}

/// A parameter, copied as the launch does, in words so that it is aligned.
fn argument(from: In<u8>, bytes: usize) -> Result<Vec<u64>> {
    let mut words = vec![0_u64; bytes.div_ceil(8)];
    for index in 0..bytes {
        words[index / 8] |= u64::from(from.at(index)?) << (index % 8 * 8);
    }
    Ok(words)
}

impl Guard {
    /// The context, kernel and shared memory of a function.
    fn function(&mut self, function: Handle) -> Result<(Handle, Kernel, u32)> {
        self.context()?;
        let found =
            self.functions.get(function).map(|function| (function.module, function.kernel, function.shared_bytes));
        let (module, kernel, shared) = self.found(handle::Kind::Function, found)?;
        Ok((self.modules.get(module)?.context, kernel, shared))
    }

    /// What the arguments of a kernel point to must be there until it has run.
    fn pointers(&mut self, context: Handle, kernel: Kernel, arguments: &[Vec<u64>], request: &mut Request) -> Result {
        let device = self.contexts.get(context)?.device;
        for word in arguments.iter().flatten() {
            if !self.memory.owns(*word) {
                if let Some((start, range)) = self.host.find(*word) {
                    request.host_uses.push((start, range.id));
                }
                continue;
            }
            match self.memory.resolve(*word, 1) {
                Ok(uses) => {
                    let (start, _) = uses[0];
                    let range = self.memory.get(start).expect("resolved just before");
                    let owner = self.devices[range.device].context.unwrap_or(0);
                    let shared = range.access != u64::MAX && range.access & 1 << device != 0
                        || range.access == u64::MAX && self.contexts.get(context)?.peers.contains(&owner);
                    if range.device != device && !shared || range.access == 0 {
                        self.violation(&format!("{} gets {word:#x}, which its device may not access", kernel.name()));
                    }
                    request.device_uses.extend(uses);
                }
                Err(what) => self.violation(&format!("{} {what}", kernel.name())),
            }
        }
        Ok(())
    }
}
