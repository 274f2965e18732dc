//! Conversions between floating-point types, element by element: what host copies do, and the oracle of the kernels.
//!
//! Rounding is to nearest even, overflow gives infinity, and a NaN becomes a quiet one of the same sign. Between types
//! of 16 bits and more it keeps the top bits of its payload; that of an F8 has none left.

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};

/// A conversion of elements from one dtype to another while they are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cast {
    from: Dtype,
    to: Dtype,
}

impl Cast {
    /// The types that elements can be converted to.
    pub const TARGETS: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

    /// The conversion of this pair.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`], rule `cast`, for pairs that there is none of: other types than F16, BF16 and F32, F8_E4M3
    /// and F8_E5M2 as anything but the source, and a type to itself.
    pub fn new(from: Dtype, to: Dtype) -> Result<Cast> {
        use Dtype::{Bf16, F8E4M3, F8E5M2, F16, F32};
        if from != to && matches!(from, F16 | Bf16 | F32 | F8E4M3 | F8E5M2) && Cast::TARGETS.contains(&to) {
            return Ok(Cast { from, to });
        }
        let casts = "F16, BF16 or F32 to another of them, F8_E4M3 or F8_E5M2 to one of them";
        let error = Error::new(ErrorKind::Rules, "no such cast").with_rule("cast");
        Err(error.with_expected(casts, format!("{from} to {to}")))
    }

    /// The type in the file.
    pub fn from(self) -> Dtype {
        self.from
    }

    /// The type at the destination.
    pub fn to(self) -> Dtype {
        self.to
    }

    /// Bytes that `bytes` of the source become.
    pub fn converted(self, bytes: u64) -> u64 {
        bytes / self.source_bytes() as u64 * self.destination_bytes() as u64
    }

    /// Bytes of an element of the source.
    pub(crate) fn source_bytes(self) -> usize {
        self.from.bits() as usize / 8
    }

    /// Bytes of an element of the destination.
    pub(crate) fn destination_bytes(self) -> usize {
        self.to.bits() as usize / 8
    }

    /// Converts the little-endian elements of `src`.
    ///
    /// # Panics
    /// If `src` is not a whole number of elements, or `dst` has not the size that they become.
    pub fn convert(self, src: &[u8], dst: &mut [u8]) {
        let count = src.len() / self.source_bytes();
        assert_eq!(src.len(), count * self.source_bytes(), "part of an element");
        assert_eq!(dst.len(), count * self.destination_bytes(), "another number of elements");
        // SAFETY: the slices have room for these elements, and do not overlap.
        unsafe { self.convert_raw(src.as_ptr(), dst.as_mut_ptr(), count) }
    }

    /// Converts `count` elements, at whatever alignment.
    ///
    /// # Safety
    /// - `count` elements of the source type are readable at `src`;
    /// - as many of the destination type are writable at `dst`; they need not be initialised;
    /// - the two do not overlap, and nobody else writes the one or uses the other meanwhile.
    pub(crate) unsafe fn convert_raw(self, src: *const u8, dst: *mut u8, count: usize) {
        use Dtype::{Bf16, F8E4M3, F8E5M2, F16, F32};
        // SAFETY: the caller's duties are those of `each`, whose types are those of the pair.
        unsafe {
            match (self.from, self.to) {
                (F32, Bf16) => each(src, dst, count, bf16_of_f32),
                (F32, F16) => each(src, dst, count, f16_of_f32),
                (Bf16, F32) => each(src, dst, count, f32_of_bf16),
                (Bf16, F16) => each(src, dst, count, |element| f16_of_f32(f32_of_bf16(element))),
                (F16, F32) => each(src, dst, count, f32_of_f16),
                (F16, Bf16) => each(src, dst, count, |element| bf16_of_f32(f32_of_f16(element))),
                (F8E4M3, F32) => each(src, dst, count, f32_of_e4m3),
                (F8E4M3, Bf16) => each(src, dst, count, |element| upper_half(f32_of_e4m3(element))),
                (F8E4M3, F16) => each(src, dst, count, |element| f16_of_f32(f32_of_e4m3(element))),
                (F8E5M2, F32) => each(src, dst, count, |element| f32_of_f16(f16_of_e5m2(element))),
                (F8E5M2, Bf16) => each(src, dst, count, |element| upper_half(f32_of_f16(f16_of_e5m2(element)))),
                (F8E5M2, F16) => each(src, dst, count, f16_of_e5m2),
                (from, to) => unreachable!("bug in shardlift: no cast of {from} to {to}"),
            }
        }
    }
}

/// A loop that the compiler turns into vector instructions: `one` has no branches.
///
/// # Safety
/// As [`Cast::convert_raw`], with elements of `S` and `D`.
#[inline(always)]
unsafe fn each<S: Copy, D>(src: *const u8, dst: *mut u8, count: usize, one: impl Fn(S) -> D) {
    let (src, dst) = (src.cast::<S>(), dst.cast::<D>());
    for at in 0..count {
        // SAFETY: the caller answers for `count` elements on both sides. S and D are plain unsigned numbers.
        unsafe { dst.add(at).write_unaligned(one(src.add(at).read_unaligned())) }
    }
}

#[inline(always)]
fn bf16_of_f32(bits: u32) -> u16 {
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x0040;
    (if is_nan_f32(bits) { quiet } else { rounded }) as u16
}

#[inline(always)]
fn f32_of_bf16(bits: u16) -> u32 {
    let wide = u32::from(bits) << 16;
    if is_nan_f32(wide) { wide | QUIET } else { wide }
}

#[inline(always)]
fn f16_of_f32(bits: u32) -> u16 {
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7FFF_FFFF;
    // The exponent has another bias; what then is out of range is infinity.
    let moved = magnitude.wrapping_sub(112 << 23);
    let normal = (moved.wrapping_add(0xFFF + ((moved >> 13) & 1)) >> 13).min(0x7C00);
    // Below the smallest normal number: in the sum with 0.5 the last bit is worth as much as that of a subnormal f16.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let quiet = 0x7E00 | ((magnitude >> 13) & 0x3FF);
    let finite = if magnitude < (113 << 23) { subnormal } else { normal };
    (sign | if is_nan_f32(bits) { quiet } else { finite }) as u16
}

#[inline(always)]
fn f32_of_f16(bits: u16) -> u32 {
    let bits = u32::from(bits);
    let sign = (bits & 0x8000) << 16;
    let shifted = (bits & 0x7FFF) << 13;
    let normal = shifted + (112 << 23);
    // The mantissa as that of a number with a leading one, which is then taken away again.
    let one = 113 << 23;
    let subnormal = (f32::from_bits(shifted | one) - f32::from_bits(one)).to_bits();
    let infinite = shifted | 0x7F80_0000;
    let infinite = if is_nan_f32(infinite) { infinite | QUIET } else { infinite };
    let finite = if shifted < (1 << 23) { subnormal } else { normal };
    sign | if shifted >= (31 << 23) { infinite } else { finite }
}

/// OCP E4M3: bias 7, no infinities, and the largest magnitude is NaN.
#[inline(always)]
fn f32_of_e4m3(bits: u8) -> u32 {
    let bits = u32::from(bits);
    let sign = (bits & 0x80) << 24;
    let shifted = (bits & 0x7F) << 20;
    let normal = shifted + (120 << 23);
    let one = 121 << 23;
    let subnormal = (f32::from_bits(shifted | one) - f32::from_bits(one)).to_bits();
    let finite = if shifted < (1 << 23) { subnormal } else { normal };
    sign | if bits & 0x7F == 0x7F { 0x7F80_0000 | QUIET } else { finite }
}

/// OCP E5M2: the upper half of an f16.
#[inline(always)]
fn f16_of_e5m2(bits: u8) -> u16 {
    let wide = u16::from(bits) << 8;
    if wide & 0x7FFF > 0x7C00 { wide & 0x8000 | 0x7E00 } else { wide }
}

/// The bf16 of an f32 that is one.
#[inline(always)]
fn upper_half(bits: u32) -> u16 {
    (bits >> 16) as u16
}

#[inline(always)]
fn is_nan_f32(bits: u32) -> bool {
    bits & 0x7FFF_FFFF > 0x7F80_0000
}

/// The bit that makes a NaN of an f32 a quiet one.
const QUIET: u32 = 0x0040_0000;

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn cast(from: Dtype, to: Dtype) -> Cast {
        Cast::new(from, to).unwrap()
    }

    fn u16_of(cast: Cast, src: &[u8]) -> u16 {
        let mut dst = [0; 2];
        cast.convert(src, &mut dst);
        u16::from_le_bytes(dst)
    }

    fn u32_of(cast: Cast, src: &[u8]) -> u32 {
        let mut dst = [0; 4];
        cast.convert(src, &mut dst);
        u32::from_le_bytes(dst)
    }

    /// Every upper half with every pattern of the lower one that rounding can tell apart, and a sweep over the rest.
    fn f32s() -> impl Iterator<Item = u32> {
        let ends =
            [0, 1, 2, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xFFFF];
        let edges = (0..=0xFFFFu32).flat_map(move |upper| ends.map(|lower| upper << 16 | lower));
        edges.chain((0..=u32::MAX).step_by(251))
    }

    #[test]
    fn f32_is_rounded_as_half_does() {
        let (to_bf16, to_f16) = (cast(Dtype::F32, Dtype::Bf16), cast(Dtype::F32, Dtype::F16));
        let sources: Vec<u32> = f32s().collect();
        let bytes: Vec<u8> = sources.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let (mut bf16s, mut f16s) = (vec![0; bytes.len() / 2], vec![0; bytes.len() / 2]);
        to_bf16.convert(&bytes, &mut bf16s);
        to_f16.convert(&bytes, &mut f16s);
        for (at, bits) in sources.into_iter().enumerate() {
            let value = f32::from_bits(bits);
            let found = |all: &[u8]| u16::from_le_bytes([all[2 * at], all[2 * at + 1]]);
            assert_eq!(found(&bf16s), bf16::from_f32(value).to_bits(), "{bits:#010x} as bf16");
            // A NaN whose payload is in the lower bits alone is one all the same.
            assert_eq!(found(&f16s), f16::from_f32_const(value).to_bits(), "{bits:#010x} as f16");
        }
    }

    #[test]
    fn every_16_bit_number_is_widened_and_exchanged_as_half_does() {
        for bits in 0..=u16::MAX {
            let src = bits.to_le_bytes();
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert_eq!(u32_of(cast(Dtype::Bf16, Dtype::F32), &src), b.to_f32().to_bits(), "bf16 {bits:#06x}");
            assert_eq!(u32_of(cast(Dtype::F16, Dtype::F32), &src), h.to_f32_const().to_bits(), "f16 {bits:#06x}");
            let exchanged = f16::from_f32_const(b.to_f32()).to_bits();
            assert_eq!(u16_of(cast(Dtype::Bf16, Dtype::F16), &src), exchanged, "bf16 {bits:#06x}");
            let exchanged = bf16::from_f32(h.to_f32_const()).to_bits();
            assert_eq!(u16_of(cast(Dtype::F16, Dtype::Bf16), &src), exchanged, "f16 {bits:#06x}");
        }
    }

    /// What an F8 is worth by its definition; `None` for NaN.
    fn value(bits: u8, exponent_bits: u32, infinities: bool) -> Option<f64> {
        let mantissa_bits = 7 - exponent_bits;
        let bias = (1 << (exponent_bits - 1)) - 1;
        let exponent = i32::from(bits & 0x7F) >> mantissa_bits;
        let mantissa = f64::from(i32::from(bits) & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
        let last = exponent == (1 << exponent_bits) - 1;
        let magnitude = match exponent {
            _ if infinities && last && mantissa == 0.0 => f64::INFINITY,
            _ if infinities && last => return None,
            _ if bits & 0x7F == 0x7F => return None,
            0 => mantissa * 2f64.powi(1 - bias),
            _ => (1.0 + mantissa) * 2f64.powi(exponent - bias),
        };
        Some(if bits & 0x80 == 0 { magnitude } else { -magnitude })
    }

    #[test]
    fn every_f8_is_widened_exactly() {
        assert_eq!((value(0x7E, 4, false), value(0x7B, 5, true)), (Some(448.0), Some(57344.0)));
        for (from, exponent_bits, infinities) in [(Dtype::F8E4M3, 4, false), (Dtype::F8E5M2, 5, true)] {
            for bits in 0..=u8::MAX {
                let sign = u32::from(bits >> 7);
                let wide = u32_of(cast(from, Dtype::F32), &[bits]);
                let [b, h] = [Dtype::Bf16, Dtype::F16].map(|to| u16_of(cast(from, to), &[bits]));
                match value(bits, exponent_bits, infinities) {
                    None => {
                        assert_eq!(wide, sign << 31 | 0x7FC0_0000);
                        assert_eq!((b, h), (((sign << 15) | 0x7FC0) as u16, ((sign << 15) | 0x7E00) as u16));
                    }
                    Some(value) => {
                        let found =
                            [f32::from_bits(wide).into(), bf16::from_bits(b).to_f64(), f16::from_bits(h).to_f64()];
                        assert_eq!(found, [value; 3], "{from} {bits:#04x}");
                        assert_eq!([wide >> 31, u32::from(b >> 15), u32::from(h >> 15)], [sign; 3]);
                    }
                }
            }
        }
    }

    #[test]
    fn nans_stay_nans() {
        for (bits, bf16, f16) in
            [(0x7F80_0001, 0x7FC0, 0x7E00), (0xFFA0_0000, 0xFFE0, 0xFF00), (0x7FFF_FFFFu32, 0x7FFF, 0x7FFF)]
        {
            assert_eq!((bf16_of_f32(bits), f16_of_f32(bits)), (bf16, f16), "{bits:#010x}");
        }
        assert_eq!(
            (bf16_of_f32(0x7F7F_FFFF), f16_of_f32(0x477F_F000), f16_of_f32(0x477F_EFFF)),
            (0x7F80, 0x7C00, 0x7BFF)
        );
    }

    #[test]
    fn there_are_12_casts() {
        let pairs = Dtype::ALL.iter().flat_map(|&from| Dtype::ALL.iter().map(move |&to| (from, to)));
        let (casts, refused): (Vec<_>, Vec<_>) = pairs.map(|(from, to)| Cast::new(from, to)).partition(Result::is_ok);
        assert_eq!(casts.len(), 12);
        for cast in casts {
            let cast = cast.unwrap();
            let src = vec![1; 7 * cast.source_bytes()];
            cast.convert(&src, &mut vec![0; cast.converted(src.len() as u64) as usize]);
        }
        assert!(refused.into_iter().all(|cast| cast.unwrap_err().rule() == Some("cast")));
        assert_eq!(
            Cast::new(Dtype::F64, Dtype::F32).unwrap_err().to_string(),
            "no such cast: expected F16, BF16 or F32 to another of them, F8_E4M3 or F8_E5M2 to one of them, found F64 to F32"
        );
    }
}
