//! What an address is.

use crate::abi::{In, Out};
use crate::code::{Code, INVALID_VALUE, NOT_SUPPORTED, Result};
use crate::device_memory::Kind;
use crate::handle::Handle;
use crate::sim::{Guard, call};

#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttribute(value: Out<u8>, attribute: u32, address: u64) -> Code {
    call("cuPointerGetAttribute", |sim| {
        let known = describe(sim, address)?.ok_or(INVALID_VALUE)?;
        known.answer(attribute, value)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttributes(count: u32, attributes: In<u32>, values: In<Out<u8>>, address: u64) -> Code {
    call("cuPointerGetAttributes", |sim| {
        let known = describe(sim, address)?;
        for index in 0..count as usize {
            let (attribute, value) = (attributes.at(index)?, values.at(index)?);
            match &known {
                Some(known) => known.answer(attribute, value)?,
                // Memory that the driver does not know is no error here.
                None => Known::default().answer(attribute, value)?,
            }
        }
        Ok(())
    })
}

#[derive(Default)]
struct Known {
    context: Handle,
    /// 1 for memory of the host, 2 for a device's, 0 for unknown.
    kind: u32,
    device: i32,
    address: u64,
    start: u64,
    bytes: u64,
    id: u64,
    exportable: bool,
}

fn describe(sim: &mut Guard, address: u64) -> Result<Option<Known>> {
    sim.context()?;
    if let Some((start, range)) = sim.memory.find(address) {
        let (context, device, bytes, id) = (range.context, range.device as i32, range.bytes, range.id);
        let exportable = range.kind == Kind::Plain;
        return Ok(Some(Known { context, kind: 2, device, address, start, bytes, id, exportable }));
    }
    let Some((start, range)) = sim.host.find(address) else { return Ok(None) };
    let device = sim.contexts.get(range.context).map_or(0, |context| context.device) as i32;
    let (context, bytes, id) = (range.context, range.bytes, range.id);
    Ok(Some(Known { context, kind: 1, device, address, start, bytes, id, exportable: false }))
}

impl Known {
    fn answer(&self, attribute: u32, value: Out<u8>) -> Result {
        match attribute {
            1 => value.cast().set(self.context),
            2 => value.cast().set(self.kind),
            3 => value.cast().set(self.address),
            4 => value.cast().set(if self.kind == 1 { self.address } else { 0 }),
            6 => value.cast().set(0_u32),
            7 => value.cast().set(self.id),
            8 => value.cast().set(0_u32),
            9 => value.cast().set(if self.kind == 0 { -2 } else { self.device }),
            10 => value.cast().set(i32::from(self.exportable)),
            11 => value.cast().set(self.start),
            12 => value.cast().set(self.bytes),
            13 => value.cast().set(u32::from(self.kind != 0)),
            14 | 15 => value.cast().set(0_u64),
            16 => value.cast().set(3_u32),
            17 => value.cast().set(0_u64),
            5 => Err(NOT_SUPPORTED),
            _ => Err(INVALID_VALUE),
        }
    }
}
