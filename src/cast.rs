//! Conversions between floating-point types, by integer arithmetic on single elements: the oracle of the kernels.

use crate::dtype::Dtype;

/// A conversion of elements from one dtype to another while they are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cast {
    /// The type in the file.
    pub from: Dtype,
    /// The type at the destination.
    pub to: Dtype,
}
