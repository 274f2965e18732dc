//! The header of a new file.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::dtype::Dtype;
use crate::format::FormatError;
use crate::limits;
use crate::shape::Shape;

/// A header to be written, and where each tensor goes.
#[derive(Debug)]
pub(crate) struct NewHeader {
    /// The 8 length bytes and the header, padded with spaces so that the data starts on a multiple of 8.
    pub(crate) bytes: Vec<u8>,
    /// The first byte of each tensor, counted from byte 0 of the file, in the order given.
    pub(crate) offsets: Vec<u64>,
    /// The size of the whole file.
    pub(crate) file_bytes: u64,
}

impl NewHeader {
    /// Lays tensors out without holes, those with the widest elements first (then by name), so that each is aligned
    /// to its elements; the reference implementation writes them in the same order.
    ///
    /// # Errors
    /// [`FormatError::HeaderTooLarge`], which every reader of the file would answer.
    pub(crate) fn new(
        tensors: &[(&str, Dtype, &Shape)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<NewHeader, FormatError> {
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|&position| {
            let (name, dtype, _) = tensors[position];
            (std::cmp::Reverse(dtype.alignment()), name)
        });
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let mut starts = vec![0; tensors.len()];
        let mut end = 0;
        for position in order {
            let (name, dtype, shape) = tensors[position];
            let bytes = shape.bytes(dtype).expect("bug in shardlift: a planned shape overflows");
            starts[position] = end;
            let entry = json!({
                "dtype": dtype.name(),
                "shape": shape.dims(),
                "data_offsets": [end, end + bytes],
            });
            header.insert(name.into(), entry);
            end += bytes;
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let length = text.len() as u64;
        if length > limits::HEADER_MAX {
            return Err(FormatError::HeaderTooLarge { length });
        }
        let data_start = 8 + length;
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.append(&mut text);
        Ok(NewHeader {
            bytes,
            offsets: starts.into_iter().map(|start| data_start + start).collect(),
            file_bytes: data_start + end,
        })
    }
}
