//! Memory -> tensors the caller owns. Knows not how the bytes came.

mod destinations;
mod digest;
mod tensor;

pub(crate) use destinations::{Destinations, Place};
pub use digest::Digest;
pub use tensor::{Element, Tensor, Weights};
