//! Memory -> tensors the caller owns. Knows not how the bytes came.

mod again;
mod destinations;
mod digest;
mod tensor;

pub(crate) use destinations::{Destinations, Place};
pub use digest::Digest;
pub(crate) use digest::Moved;
pub use tensor::{Element, Tensor, Weights};
