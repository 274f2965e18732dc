//! The digest of a tensor's bytes, and their sha256, as they stream past.

/// The wrapping sum over i of splitmix64(word_i xor (i + 1) * GOLDEN), word_i the i-th little-endian u64 of the
/// tensor, the last one padded with zeros.
#[derive(Debug, Default)]
pub(crate) struct TensorDigest {
    sum: u64,
    words: u64,
    rest: Vec<u8>,
}

impl TensorDigest {
    /// The next bytes of the tensor.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        if !self.rest.is_empty() {
            let fill = bytes.len().min(8 - self.rest.len());
            self.rest.extend_from_slice(&bytes[..fill]);
            bytes = &bytes[fill..];
            if self.rest.len() < 8 {
                return;
            }
            let word: [u8; 8] = self.rest[..].try_into().expect("bug in shardlift: a word has 8 bytes");
            self.rest.clear();
            self.word(word);
        }
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.word(*word));
        self.rest.extend_from_slice(rest);
    }

    /// The digest of all bytes so far.
    pub(crate) fn finish(mut self) -> u64 {
        if !self.rest.is_empty() {
            let mut word = [0; 8];
            word[..self.rest.len()].copy_from_slice(&self.rest);
            self.word(word);
        }
        self.sum
    }

    fn word(&mut self, word: [u8; 8]) {
        self.words += 1;
        let value = u64::from_le_bytes(word) ^ self.words.wrapping_mul(GOLDEN);
        self.sum = self.sum.wrapping_add(splitmix64(value));
    }
}

fn splitmix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_matter() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1003).collect();
        let whole = {
            let mut digest = TensorDigest::default();
            digest.update(&bytes);
            digest.finish()
        };
        for step in [1, 3, 7, 8, 9, 500] {
            let mut digest = TensorDigest::default();
            bytes.chunks(step).for_each(|chunk| digest.update(chunk));
            assert_eq!(digest.finish(), whole, "pieces of {step}");
        }
    }

    #[test]
    fn splitmix64_is_the_published_one() {
        assert_eq!(splitmix64(0), 0xE220_A839_7B1D_CDAF);
    }
}
