//! The digest of a tensor: a sum, so pieces can be added in any order, on any thread or device.

/// A digest in the making: the wrapping sum over i of splitmix64(word_i ^ (i + 1) * 0x9E3779B97F4A7C15), where
/// word_i is the i-th little-endian u64 of the tensor, the last one zero-padded.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Digest(u64);

impl Digest {
    /// The digest of a whole tensor.
    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut digest = Digest::default();
        digest.add(0, bytes);
        digest.0
    }

    /// Adds bytes that lie at `offset` of the tensor, a multiple of 8; only the tensor's last bytes may be no
    /// multiple of 8.
    pub(crate) fn add(&mut self, offset: u64, bytes: &[u8]) {
        let mut index = offset / 8;
        let (words, rest) = bytes.as_chunks::<8>();
        let mut sum = self.0;
        for word in words {
            index += 1;
            sum = sum.wrapping_add(splitmix64(u64::from_le_bytes(*word) ^ index.wrapping_mul(GOLDEN)));
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            sum = sum.wrapping_add(splitmix64(u64::from_le_bytes(word) ^ (index + 1).wrapping_mul(GOLDEN)));
        }
        self.0 = sum;
    }
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of the SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014).
fn splitmix64(mut word: u64) -> u64 {
    word = word.wrapping_add(GOLDEN);
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_add_up_in_any_order() {
        let bytes: Vec<u8> = (0..107u8).collect();
        let mut parts = Digest::default();
        parts.add(64, &bytes[64..]);
        parts.add(0, &bytes[..8]);
        parts.add(8, &bytes[8..64]);
        assert_eq!(parts.0, Digest::of(&bytes));
        assert_ne!(Digest::of(&bytes), Digest::of(&bytes[..106]));
        assert_eq!(Digest::of(&[]), 0);
    }

    #[test]
    fn position_matters() {
        let mut swapped = [0u8; 16];
        swapped[8] = 1;
        let mut plain = [0u8; 16];
        plain[0] = 1;
        assert_ne!(Digest::of(&swapped), Digest::of(&plain));
    }
}
