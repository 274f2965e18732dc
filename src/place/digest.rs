//! The digest of a tensor: a sum, so pieces can be added in any order, on any thread or device.

/// The digest of a tensor's bytes, in the making: the wrapping sum over i of
/// splitmix64(word_i xor (i + 1) * 0x9E3779B97F4A7C15), where word_i is the i-th little-endian u64 of the tensor, the
/// last one padded with zeros. No bytes have the digest 0.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// The digest of a whole tensor.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut digest = Digest::default();
        digest.add(0, bytes);
        digest.value()
    }

    /// Adds bytes that lie at `offset` of the tensor. Pieces may come in any order.
    ///
    /// # Panics
    /// If `offset` is no multiple of 8. The length of each piece but the tensor's last must be one too: its last word
    /// is padded as if the tensor ended there.
    pub fn add(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset.is_multiple_of(8), "a piece must start on a word of the tensor");
        let (words, rest) = bytes.as_chunks::<8>();
        self.0 = self.0.wrapping_add(sum(words, offset / 8));
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.0 = self.0.wrapping_add(sum_here(&[word], offset / 8 + words.len() as u64));
        }
    }

    /// The digest of the pieces so far.
    pub fn value(self) -> u64 {
        self.0
    }
}

/// What a load has digested of a destination, all of it, while its bytes moved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moved {
    /// Of what was read, where the declared cut has it.
    pub(crate) read: u64,
    /// Of the memory where it landed; not known if that is behind a queue.
    pub(crate) landed: Option<u64>,
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The sum over words of a tensor, the first of which has this index: with the widest multiplications that the processor
/// has (`docs/performance.md`).
fn sum(words: &[[u8; 8]], first: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512dq") {
            // SAFETY: the processor has what the function needs; AVX-512DQ implies AVX-512F.
            return unsafe { sum_avx512(words, first) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has what the function needs.
            return unsafe { sum_avx2(words, first) };
        }
    }
    sum_here(words, first)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum_avx512(words: &[[u8; 8]], first: u64) -> u64 {
    sum_here(words, first)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[[u8; 8]], first: u64) -> u64 {
    sum_here(words, first)
}

/// Compiled into each caller, with its instructions.
#[inline(always)]
fn sum_here(words: &[[u8; 8]], first: u64) -> u64 {
    let mut position = first.wrapping_mul(GOLDEN);
    words.iter().fold(0, |sum: u64, word| {
        position = position.wrapping_add(GOLDEN);
        sum.wrapping_add(splitmix64(u64::from_le_bytes(*word) ^ position))
    })
}

/// The finaliser of the SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014).
#[inline(always)]
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
        let bytes: Vec<u8> = (0..=255).cycle().take(1003).collect();
        let whole = Digest::of(&bytes);
        for words in [1, 3, 8, 100, 200] {
            let mut parts = Digest::default();
            for (piece, bytes) in bytes.chunks(words * 8).enumerate().rev() {
                parts.add((piece * words * 8) as u64, bytes);
            }
            assert_eq!(parts.value(), whole, "pieces of {words} words");
        }
        assert_ne!(whole, Digest::of(&bytes[..1002]));
        assert_eq!(Digest::of(&[]), 0);
    }

    #[test]
    fn every_width_of_multiplication_sums_alike() {
        let bytes: Vec<u8> = (0..=255).cycle().map(|byte: u8| byte.wrapping_mul(31)).take(8 * 1001).collect();
        let (words, _) = bytes.as_chunks();
        for (first, len) in [(0, 1001), (5, 1000), (u64::MAX - 3, 17), (1, 0)] {
            let words = &words[..len];
            let expected = (1..).zip(words).fold(0, |sum: u64, (at, word)| {
                let position = first.wrapping_add(at).wrapping_mul(GOLDEN);
                sum.wrapping_add(splitmix64(u64::from_le_bytes(*word) ^ position))
            });
            assert_eq!(sum_here(words, first), expected);
            assert_eq!(sum(words, first), expected);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has what the function needs.
                assert_eq!(unsafe { sum_avx2(words, first) }, expected);
            }
        }
    }

    #[test]
    fn position_matters() {
        let mut swapped = [0u8; 16];
        swapped[8] = 1;
        let mut plain = [0u8; 16];
        plain[0] = 1;
        assert_ne!(Digest::of(&swapped), Digest::of(&plain));
    }

    #[test]
    fn splitmix64_is_the_published_one() {
        assert_eq!(splitmix64(0), 0xE220_A839_7B1D_CDAF);
    }
}
