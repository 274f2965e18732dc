//! One variant per rule of the format.

use std::fmt;

use super::Header;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, OneLine};
use crate::limits;
use crate::shape::Shape;

macro_rules! rules {
    ($($(#[doc = $doc:literal])* $variant:ident { $($(#[doc = $field_doc:literal])* $field:ident: $type:ty,)* } $rule:literal $message:literal;)*) => {
        /// A broken rule of the format: one variant per rule.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum FormatError {
            $($(#[doc = $doc])* $variant { $($(#[doc = $field_doc])* $field: $type,)* },)*
        }

        impl FormatError {
            /// The names of all rules, as [`rule`](FormatError::rule) gives them.
            pub const RULES: &'static [&'static str] = &[$($rule,)*];

            /// The rule in lower case with dashes, for instance `"header-too-large"`.
            pub fn rule(&self) -> &'static str {
                match self { $(FormatError::$variant { .. } => $rule,)* }
            }

            /// What is wrong, in words, without the place.
            fn message(&self) -> &'static str {
                match self { $(FormatError::$variant { .. } => $message,)* }
            }
        }
    };
}

rules! {
    /// The file is shorter than the 8 bytes that hold the header's length.
    LengthMissing {
        /// The length of the file in bytes.
        file_len: u64,
    } "length-missing" "file is too short for the header's length";
    /// The header is larger than [`limits::HEADER_MAX`].
    HeaderTooLarge {
        /// The length in the first 8 bytes.
        length: u64,
    } "header-too-large" "header is too large";
    /// The header ends outside the file.
    HeaderOutsideFile {
        /// Where the header ends, in bytes from the start of the file.
        header_end: u64,
        /// The length of the file in bytes.
        file_len: u64,
    } "header-outside-file" "header ends outside the file";
    /// The header is not UTF-8.
    HeaderNotUtf8 {
        /// The byte of the file that is wrong.
        at: u64,
    } "header-not-utf8" "header is not utf-8";
    /// The header is not JSON.
    JsonSyntax {
        /// What the JSON parser says, with line and column.
        message: String,
    } "json-syntax" "header is not json";
    /// The header's JSON is nested [`limits::JSON_DEPTH`] deep or deeper.
    JsonTooDeep {
    } "json-too-deep" "header's json is nested too deep";
    /// The header's JSON is not an object.
    HeaderNotObject {
        /// What it is.
        found: String,
    } "header-not-object" "header is not a json object";
    /// `__metadata__` appears twice.
    MetadataTwice {
    } "metadata-twice" "__metadata__ appears twice";
    /// `__metadata__` is neither an object nor null.
    MetadataNotObject {
        /// What it is.
        found: String,
    } "metadata-not-object" "__metadata__ is not an object";
    /// A key of `__metadata__` appears twice.
    MetadataKeyTwice {
        /// The key.
        key: String,
    } "metadata-key-twice" "a key of __metadata__ appears twice";
    /// A value of `__metadata__` is not a string.
    MetadataNotString {
        /// The key.
        key: String,
        /// What the value is.
        found: String,
    } "metadata-not-string" "a value of __metadata__ is not a string";
    /// A tensor's name appears twice.
    TensorTwice {
        /// The tensor.
        tensor: String,
    } "tensor-twice" "tensor appears twice";
    /// A tensor's entry is not an object.
    TensorNotObject {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
    } "tensor-not-object" "tensor's entry is not an object";
    /// A field of a tensor's entry appears twice.
    FieldTwice {
        /// The tensor.
        tensor: String,
        /// The field.
        field: String,
    } "field-twice" "a field of the tensor appears twice";
    /// A tensor's entry lacks `dtype`, `shape` or `data_offsets`.
    FieldMissing {
        /// The tensor.
        tensor: String,
        /// The field.
        field: &'static str,
    } "field-missing" "a field of the tensor is missing";
    /// `dtype` is not a string.
    DtypeNotString {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
    } "dtype-not-string" "dtype is not a string";
    /// `dtype` is none of [`Dtype::ALL`].
    DtypeUnknown {
        /// The tensor.
        tensor: String,
        /// The name.
        found: String,
    } "dtype-unknown" "unknown dtype";
    /// `shape` is not an array.
    ShapeNotArray {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
    } "shape-not-array" "shape is not an array";
    /// A dimension is not a whole number from 0 to 2^64 - 1.
    DimensionNotCount {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
    } "dimension-not-count" "a dimension is not a count";
    /// `data_offsets` is not an array of two.
    OffsetsNotPair {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
    } "offsets-not-pair" "data_offsets is not a pair";
    /// A data offset is not a whole number from 0 to 2^64 - 1.
    OffsetNotCount {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
    } "offset-not-count" "a data offset is not a count";
    /// The bits of a tensor do not fit 64 bits.
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Shape,
    } "shape-overflow" "size of the tensor overflows";
    /// A tensor of a packed type does not end with a whole byte.
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Shape,
        /// Its size in bits.
        bits: u64,
    } "partial-byte" "tensor is not a whole number of bytes";
    /// A tensor ends before it starts.
    OffsetsReversed {
        /// The tensor.
        tensor: String,
        /// Its first byte, from the start of the data.
        start: u64,
        /// The byte after its last, from the start of the data.
        end: u64,
    } "offsets-reversed" "tensor ends before it starts";
    /// A tensor's offsets and its shape and dtype disagree.
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// The bytes that shape and dtype take.
        expected: u64,
        /// The bytes between the offsets.
        found: u64,
    } "size-mismatch" "offsets do not match shape and dtype";
    /// Bytes before a tensor belong to none.
    Hole {
        /// The tensor after the hole.
        tensor: String,
        /// The first byte of the data, from the start of the file.
        data_start: u64,
        /// Where the tensor before ends, from the start of the data.
        expected: u64,
        /// Where the tensor starts, from the start of the data.
        found: u64,
    } "hole" "bytes before the tensor belong to none";
    /// Two tensors share bytes.
    Overlap {
        /// The later tensor.
        tensor: String,
        /// The first byte of the data, from the start of the file.
        data_start: u64,
        /// Where the tensor before ends, from the start of the data.
        expected: u64,
        /// Where the tensor starts, from the start of the data.
        found: u64,
    } "overlap" "tensor overlaps the one before";
    /// The tensors end outside the file: it was cut short.
    DataOutsideFile {
        /// The first tensor that does not fit.
        tensor: String,
        /// Where the tensors end, in bytes from the start of the file.
        expected: u64,
        /// The length of the file in bytes.
        file_len: u64,
    } "data-outside-file" "file is shorter than its tensors";
    /// There are bytes after the last tensor.
    TrailingBytes {
        /// Where the tensors end, in bytes from the start of the file.
        expected: u64,
        /// The length of the file in bytes.
        file_len: u64,
    } "trailing-bytes" "bytes after the last tensor";
}

impl FormatError {
    /// The tensor that breaks the rule, if it is one tensor's matter.
    pub fn tensor(&self) -> Option<&str> {
        use FormatError::*;
        match self {
            LengthMissing { .. } | HeaderTooLarge { .. } | HeaderOutsideFile { .. } | HeaderNotUtf8 { .. } => None,
            JsonSyntax { .. } | JsonTooDeep {} | HeaderNotObject { .. } | TrailingBytes { .. } => None,
            MetadataTwice {} | MetadataNotObject { .. } | MetadataKeyTwice { .. } | MetadataNotString { .. } => None,
            TensorTwice { tensor }
            | TensorNotObject { tensor, .. }
            | FieldTwice { tensor, .. }
            | FieldMissing { tensor, .. }
            | DtypeNotString { tensor, .. }
            | DtypeUnknown { tensor, .. }
            | ShapeNotArray { tensor, .. }
            | DimensionNotCount { tensor, .. }
            | OffsetsNotPair { tensor, .. }
            | OffsetNotCount { tensor, .. }
            | ShapeOverflow { tensor, .. }
            | PartialByte { tensor, .. }
            | OffsetsReversed { tensor, .. }
            | SizeMismatch { tensor, .. }
            | Hole { tensor, .. }
            | Overlap { tensor, .. }
            | DataOutsideFile { tensor, .. } => Some(tensor),
        }
    }

    /// The bytes that break the rule, `from..to` from the start of the file, if they are one range: those that are
    /// missing, that belong to none or two tensors, or that are wrong.
    pub fn bytes(&self) -> Option<(u64, u64)> {
        use FormatError::*;
        match *self {
            LengthMissing { file_len } => Some((file_len, Header::LENGTH_BYTES)),
            HeaderTooLarge { .. } => Some((0, Header::LENGTH_BYTES)),
            HeaderOutsideFile { header_end, file_len } => Some((file_len, header_end)),
            HeaderNotUtf8 { at } => Some((at, at + 1)),
            // The offsets are whatever the header says.
            Hole { data_start, expected, found, .. } | Overlap { data_start, expected: found, found: expected, .. } => {
                Some((data_start.saturating_add(expected), data_start.saturating_add(found)))
            }
            DataOutsideFile { expected, file_len, .. } => Some((file_len, expected)),
            TrailingBytes { expected, file_len } => Some((expected, file_len)),
            _ => None,
        }
    }

    /// What the rule expects and what was found.
    pub fn expected_found(&self) -> (String, String) {
        use FormatError::*;
        let (expected, found): (&dyn fmt::Display, &dyn fmt::Display) = match self {
            LengthMissing { file_len } => return (bytes(Header::LENGTH_BYTES), bytes(*file_len)),
            HeaderTooLarge { length } => return (format!("at most {}", bytes(limits::HEADER_MAX)), bytes(*length)),
            HeaderOutsideFile { header_end, file_len } => return (bytes(*header_end), bytes(*file_len)),
            HeaderNotUtf8 { at } => return ("utf-8".into(), format!("another byte at {at}")),
            JsonSyntax { message } => (&"json", message),
            JsonTooDeep {} => return (format!("less than {} levels", limits::JSON_DEPTH), "more".into()),
            HeaderNotObject { found } | MetadataNotObject { found } | TensorNotObject { found, .. } => {
                (&"an object", found)
            }
            MetadataTwice {} => (&"one", &"two"),
            MetadataKeyTwice { key } => return ("distinct keys".into(), format!("{:?} twice", cut(key))),
            MetadataNotString { key, found } => return (format!("a string for {:?}", cut(key)), found.clone()),
            TensorTwice { .. } => (&"distinct names", &"one twice"),
            FieldTwice { field, .. } => return ("distinct fields".into(), format!("{:?} twice", cut(field))),
            FieldMissing { field, .. } => (field, &"nothing"),
            DtypeNotString { found, .. } => (&"a string", found),
            DtypeUnknown { found, .. } => (&"a dtype of safetensors 0.8", found),
            ShapeNotArray { found, .. } => (&"an array", found),
            DimensionNotCount { found, .. } | OffsetNotCount { found, .. } => (&"a whole number below 2^64", found),
            OffsetsNotPair { found, .. } => (&"an array of two", found),
            ShapeOverflow { dtype, shape, .. } => return ("bits below 2^64".into(), format!("{dtype} {}", few(shape))),
            PartialByte { dtype, shape, bits, .. } => {
                return ("a multiple of 8 bits".into(), format!("{bits} bits for {dtype} {}", few(shape)));
            }
            OffsetsReversed { start, end, .. } => return (format!("an end from {start} on"), end.to_string()),
            SizeMismatch { expected, found, .. } => return (bytes(*expected), bytes(*found)),
            Hole { expected, found, .. } | Overlap { expected, found, .. } => {
                return (format!("start {expected}"), format!("start {found}"));
            }
            DataOutsideFile { expected, file_len, .. } | TrailingBytes { expected, file_len } => {
                return (bytes(*expected), bytes(*file_len));
            }
        };
        (expected.to_string(), found.to_string())
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (expected, found) = self.expected_found();
        write!(f, "{}: expected {expected}, found {}", self.message(), OneLine(found))?;
        match self.tensor() {
            Some(tensor) => write!(f, ", tensor {}", OneLine(tensor)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for FormatError {}

impl From<FormatError> for Error {
    fn from(error: FormatError) -> Error {
        let (expected, found) = error.expected_found();
        let mut out = Error::new(ErrorKind::Format, error.message());
        out = out.with_rule(error.rule()).with_expected(expected, found);
        if let Some(tensor) = error.tensor() {
            out = out.with_tensor(tensor);
        }
        if let Some((from, to)) = error.bytes() {
            out = out.with_bytes(from, to);
        }
        out.with_source(error)
    }
}

fn bytes(count: u64) -> String {
    format!("{count} bytes")
}

/// The first characters of a name that the header makes up, which may be as long as the header.
fn cut(name: &str) -> String {
    name.chars().take(NAME_SHOWN).collect()
}

/// The first dimensions, likewise.
fn few(shape: &Shape) -> String {
    match shape.dims() {
        dims if dims.len() <= DIMS_SHOWN => shape.to_string(),
        dims => format!("{} and {} more dimensions", Shape::new(&dims[..DIMS_SHOWN]), dims.len() - DIMS_SHOWN),
    }
}

/// Characters of a name that an error repeats.
pub(super) const NAME_SHOWN: usize = 64;

/// Dimensions of a shape that an error repeats: no tensor of a model has more.
const DIMS_SHOWN: usize = 8;
