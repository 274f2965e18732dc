//! Element types: the only table of element sizes.

use std::fmt;

macro_rules! dtypes {
    ($($variant:ident $name:literal $bits:literal $doc:literal,)*) => {
        /// The element type of a tensor: all 22 of safetensors 0.8.0 (`src/tensor.rs`, `enum Dtype`).
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Dtype {
            $(#[doc = $doc] $variant,)*
        }

        impl Dtype {
            /// Every dtype, in the order of the reference implementation.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// The name in a safetensors header, for instance `"BF16"`.
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Bits of one element; less than 8 for packed types.
            pub const fn bits(self) -> u32 {
                match self { $(Dtype::$variant => $bits,)* }
            }

            /// The dtype with this header name, if there is one. Case matters.
            pub fn from_name(name: &str) -> Option<Dtype> {
                match name { $($name => Some(Dtype::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    Bool "BOOL" 8 "Boolean, one byte each.",
    F4 "F4" 4 "4-bit float (MXF4, E2M1), two per byte.",
    F6E2M3 "F6_E2M3" 6 "6-bit float (MXF6), four per three bytes.",
    F6E3M2 "F6_E3M2" 6 "6-bit float (MXF6), four per three bytes.",
    U8 "U8" 8 "Unsigned byte.",
    I8 "I8" 8 "Signed byte.",
    F8E5M2 "F8_E5M2" 8 "8-bit float with 5 exponent bits (OCP FP8).",
    F8E4M3 "F8_E4M3" 8 "8-bit float with 4 exponent bits (OCP FP8).",
    F8E8M0 "F8_E8M0" 8 "8-bit power of two: the scale of MX blocks.",
    F8E4M3Fnuz "F8_E4M3FNUZ" 8 "8-bit float, finite, unsigned zero, 4 exponent bits.",
    F8E5M2Fnuz "F8_E5M2FNUZ" 8 "8-bit float, finite, unsigned zero, 5 exponent bits.",
    I16 "I16" 16 "Signed 16-bit integer.",
    U16 "U16" 16 "Unsigned 16-bit integer.",
    F16 "F16" 16 "IEEE half precision.",
    Bf16 "BF16" 16 "Brain float: the upper half of an f32.",
    I32 "I32" 32 "Signed 32-bit integer.",
    U32 "U32" 32 "Unsigned 32-bit integer.",
    F32 "F32" 32 "IEEE single precision.",
    C64 "C64" 64 "Complex number of two f32.",
    F64 "F64" 64 "IEEE double precision.",
    I64 "I64" 64 "Signed 64-bit integer.",
    U64 "U64" 64 "Unsigned 64-bit integer.",
}

impl Dtype {
    /// Bytes that `elements` elements take, or `None` if the product overflows or is not a whole number of bytes.
    pub const fn bytes_of(self, elements: u64) -> Option<u64> {
        match elements.checked_mul(self.bits() as u64) {
            Some(bits) if bits % 8 == 0 => Some(bits / 8),
            _ => None,
        }
    }

    /// The alignment in bytes that the Rust type of one element has (1 for packed types, 4 for [`Dtype::C64`]).
    pub const fn alignment(self) -> usize {
        match self {
            Dtype::C64 => 4,
            other if other.bits() < 8 => 1,
            other => other.bits() as usize / 8,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_are_22() {
        assert_eq!(Dtype::ALL.len(), 22);
        for &dtype in Dtype::ALL {
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("bf16"), None);
    }

    #[test]
    fn packed_totals_are_whole_bytes() {
        assert_eq!(Dtype::F4.bytes_of(3), None);
        assert_eq!(Dtype::F4.bytes_of(4), Some(2));
        assert_eq!(Dtype::F6E2M3.bytes_of(4), Some(3));
        assert_eq!(Dtype::F64.bytes_of(u64::MAX), None);
    }
}
