//! Bytes in, [`Header`] out: every rule of the safetensors format. Knows no files, paths or clocks.
//!
//! A file is 8 bytes with the length of the header (little endian), the header (a JSON object), and the data. The
//! rules are those of the reference implementation, safetensors 0.8.0, and a few more: see [`FormatError`].

#![forbid(unsafe_code)]

mod error;
mod json;
mod text;
mod write;

use std::collections::HashSet;
use std::fmt;

use foldhash::fast::RandomState;
use xxhash_rust::xxh3::xxh3_64;

use crate::dtype::Dtype;
use crate::limits;
use crate::shape::Shape;

pub use error::FormatError;
pub(crate) use json::Unknown;
pub(crate) use text::Text;
pub(crate) use write::NewHeader;

/// The header of one file. One that exists obeys every rule.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// The tensors, sorted by where their bytes lie.
    pub tensors: Vec<HeaderTensor>,
    /// `__metadata__`, sorted by key.
    pub metadata: Vec<(String, String)>,
    /// The first byte after the header, counted from byte 0 of the file.
    pub data_start: u64,
    /// xxh3-64 of the header bytes, without the 8 length bytes.
    pub hash: u64,
    /// What is odd but allowed.
    pub warnings: Vec<HeaderWarning>,
}

/// One tensor of a [`Header`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderTensor {
    /// The name, unique in the file.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, outermost dimension first.
    pub shape: Shape,
    /// The first byte, counted from byte 0 of the file.
    pub start: u64,
    /// The byte after the last, counted from byte 0 of the file.
    pub end: u64,
}

/// What is odd in a header but allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderWarning {
    /// White space before the JSON object, in bytes. Older readers refuse it.
    PaddingBefore(u64),
    /// More white space after the JSON object than aligning the data to 8 bytes takes, in bytes.
    PaddingAfter(u64),
    /// The data starts at this byte, which is no multiple of 8.
    DataUnaligned(u64),
}

impl Header {
    /// The bytes that hold the length of the header.
    pub const LENGTH_BYTES: u64 = 8;

    /// Parses a header and checks it against the rules.
    ///
    /// `prefix` holds the first bytes of the file, at least the 8 length bytes and the header (the caller learns from
    /// [`header_len`](Header::header_len) how many these are; more do no harm), and `file_len` is the length of the
    /// whole file in bytes.
    ///
    /// # Errors
    /// The first rule that is broken. A `prefix` that ends before the header does is
    /// [`FormatError::HeaderOutsideFile`].
    pub fn parse(prefix: &[u8], file_len: u64) -> Result<Header, FormatError> {
        let length = Header::header_len(prefix, file_len)?;
        let data_start = Header::LENGTH_BYTES + length;
        let bytes = prefix
            .get(Header::LENGTH_BYTES as usize..data_start as usize)
            .ok_or(FormatError::HeaderOutsideFile { header_end: data_start, file_len: prefix.len() as u64 })?;
        let text = std::str::from_utf8(bytes)
            .map_err(|error| FormatError::HeaderNotUtf8 { at: Header::LENGTH_BYTES + error.valid_up_to() as u64 })?;
        let json::Parsed { mut tensors, mut metadata } = json::parse(text)?;

        refuse_duplicates(&tensors)?;
        // A stable sort: tensors without bytes keep the order of the header.
        tensors.sort_by_key(|tensor| (tensor.start, tensor.end));
        let mut end = 0;
        for tensor in &mut tensors {
            check_bytes(tensor)?;
            end = check_position(tensor, end, data_start)?;
            tensor.end = end;
        }
        check_data_end(data_start, end, file_len, &tensors)?;
        for tensor in &mut tensors {
            tensor.start += data_start;
            tensor.end += data_start;
        }
        metadata.sort_unstable();
        let (hash, warnings) = (xxh3_64(bytes), warnings(text, data_start));
        Ok(Header { tensors, metadata, data_start, hash, warnings })
    }

    /// The length of the header in bytes, without the 8 length bytes, from the first 8 bytes of a file of `file_len`
    /// bytes.
    ///
    /// # Errors
    /// There are no 8 bytes, or the header would be larger than [`limits::HEADER_MAX`] or end outside the file.
    pub fn header_len(first: &[u8], file_len: u64) -> Result<u64, FormatError> {
        let length = match first.first_chunk::<8>() {
            Some(&bytes) if file_len >= Header::LENGTH_BYTES => u64::from_le_bytes(bytes),
            _ => return Err(FormatError::LengthMissing { file_len: file_len.min(first.len() as u64) }),
        };
        if length > limits::HEADER_MAX {
            return Err(FormatError::HeaderTooLarge { length });
        }
        let header_end = Header::LENGTH_BYTES + length;
        if header_end > file_len {
            return Err(FormatError::HeaderOutsideFile { header_end, file_len });
        }
        Ok(length)
    }
}

impl HeaderTensor {
    /// The size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

impl fmt::Display for HeaderWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeaderWarning::PaddingBefore(bytes) => write!(f, "{bytes} bytes of white space before the header's object"),
            HeaderWarning::PaddingAfter(bytes) => write!(f, "{bytes} bytes of white space after the header's object"),
            HeaderWarning::DataUnaligned(start) => write!(f, "data starts at byte {start}, no multiple of 8"),
        }
    }
}

/// Under a seed that the file's author does not know: with a known one all names may have one hash.
fn refuse_duplicates(tensors: &[HeaderTensor]) -> Result<(), FormatError> {
    let mut names = HashSet::with_capacity_and_hasher(tensors.len(), RandomState::default());
    match tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        Some(tensor) => Err(FormatError::TensorTwice { tensor: tensor.name.clone() }),
        None => Ok(()),
    }
}

/// The number of bytes is what shape and dtype say. Offsets still count from the start of the data.
fn check_bytes(tensor: &HeaderTensor) -> Result<(), FormatError> {
    let &HeaderTensor { ref name, dtype, ref shape, start, end } = tensor;
    let Some(bits) = shape.elements().and_then(|elements| elements.checked_mul(u64::from(dtype.bits()))) else {
        return Err(FormatError::ShapeOverflow { tensor: name.clone(), dtype, shape: shape.clone() });
    };
    if bits % 8 != 0 {
        return Err(FormatError::PartialByte { tensor: name.clone(), dtype, shape: shape.clone(), bits });
    }
    if end < start {
        return Err(FormatError::OffsetsReversed { tensor: name.clone(), start, end });
    }
    if end - start != bits / 8 {
        return Err(FormatError::SizeMismatch { tensor: name.clone(), expected: bits / 8, found: end - start });
    }
    Ok(())
}

/// The tensor starts where the one before ended; answers where it ends.
fn check_position(tensor: &HeaderTensor, expected: u64, data_start: u64) -> Result<u64, FormatError> {
    let &HeaderTensor { ref name, start: found, end, .. } = tensor;
    let tensor = || name.clone();
    match found.cmp(&expected) {
        std::cmp::Ordering::Equal => Ok(end),
        std::cmp::Ordering::Greater => Err(FormatError::Hole { tensor: tensor(), data_start, expected, found }),
        std::cmp::Ordering::Less => Err(FormatError::Overlap { tensor: tensor(), data_start, expected, found }),
    }
}

/// The tensors end where the file does. `data_end` counts from the start of the data.
fn check_data_end(data_start: u64, data_end: u64, file_len: u64, tensors: &[HeaderTensor]) -> Result<(), FormatError> {
    let data_len = file_len - data_start;
    if data_end > data_len {
        let outside = tensors.iter().find(|tensor| tensor.end > data_len);
        let tensor = outside.map(|tensor| tensor.name.clone()).unwrap_or_default();
        return Err(FormatError::DataOutsideFile { tensor, expected: data_start.saturating_add(data_end), file_len });
    }
    if data_end < data_len {
        return Err(FormatError::TrailingBytes { expected: data_start + data_end, file_len });
    }
    Ok(())
}

fn warnings(text: &str, data_start: u64) -> Vec<HeaderWarning> {
    let space = [' ', '\t', '\n', '\r'];
    let before = text.len() - text.trim_start_matches(space).len();
    let after = text.len() - text.trim_end_matches(space).len();
    let mut warnings = Vec::new();
    if before > 0 {
        warnings.push(HeaderWarning::PaddingBefore(before as u64));
    }
    // Writers pad with up to 7 spaces; that is no oddity.
    if after > 7 {
        warnings.push(HeaderWarning::PaddingAfter(after as u64));
    }
    if !data_start.is_multiple_of(8) {
        warnings.push(HeaderWarning::DataUnaligned(data_start));
    }
    warnings
}
