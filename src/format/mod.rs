//! Bytes in, [`Header`] out: every rule of the safetensors format. Knows no files, paths or clocks.

#![forbid(unsafe_code)]

mod write;
pub(crate) use write::NewHeader;
