//! Names that have one hash under a seed that everybody knows: foldhash's `FixedState`.
//!
//! A long string is hashed in chunks of 96 bytes, in six lanes of two words each: `state = fold(a ^ state, b ^ SEED)`.
//! `fold` multiplies, so that words which are exchanged, each with `state ^ SEED` over it, leave the lane as it was. Where
//! that mask has no high bits, both ways are ASCII: each lane of each chunk but the first is a bit that the hash does not see.

use std::hash::BuildHasher;

use foldhash::fast::FixedState;

/// At most six for each of [`CHUNKS`].
pub(crate) const BITS: usize = 15;
/// Bytes of each name: the last ones are hashed in another way, and are equal.
pub(crate) const LEN: usize = 96 * (1 + CHUNKS) + 161;

const CHUNKS: usize = 3;

/// What foldhash begins with: digits of pi.
const ACCUMULATOR: u64 = 0x082e_fa98_ec4e_6c89;
const SEED: u64 = 0xc0ac_29b7_c97c_50dd;
const LANES: [u64; 6] = [
    0,
    0x3f84_d5b5_b547_0917,
    0x9216_d5d9_8979_fb1b,
    0xd131_0ba6_98df_b5ac,
    0x2ffd_72db_d01a_dfb7,
    0xb8e1_afed_6a26_7e96,
];

/// 2^[`BITS`] names of [`LEN`] bytes, of letters that JSON takes as they are.
pub(crate) fn names() -> Vec<String> {
    let mut dice = 1u64;
    let mut states = LANES.map(|lane| ACCUMULATOR.rotate_right(LEN as u32).wrapping_add(lane));
    // For each chunk and lane a pair of words, and the mask with which it may be exchanged.
    let mut chunks: Vec<[(u64, u64, u64); 6]> = Vec::new();
    for chunk in 0..=CHUNKS {
        let lanes = states.map(|state| lane(state, chunk > 0, &mut dice));
        for (state, (a, b, _)) in states.iter_mut().zip(lanes) {
            *state = fold(a ^ *state, b ^ SEED);
        }
        chunks.push(lanes);
    }
    let name = |bits: usize| {
        let mut bytes = Vec::with_capacity(LEN);
        for (chunk, lanes) in chunks.iter().enumerate() {
            let pairs = lanes.iter().enumerate().map(|(lane, &(a, b, mask))| {
                let is_exchanged = chunk > 0 && bits >> (6 * (chunk - 1) + lane) & 1 == 1;
                if is_exchanged { (b ^ mask, a ^ mask) } else { (a, b) }
            });
            let (first, second): (Vec<u64>, Vec<u64>) = pairs.unzip();
            bytes.extend(first.into_iter().chain(second).flat_map(u64::to_le_bytes));
        }
        bytes.resize(LEN, b'x');
        String::from_utf8(bytes).unwrap()
    };
    let names: Vec<String> = (0..1 << BITS).map(name).collect();
    let hash = |name: &String| FixedState::default().hash_one(name);
    assert!(names.iter().all(|name| hash(name) == hash(&names[0])), "foldhash is another: make names for that");
    names
}

/// Words of a lane, and `state ^ SEED`: if they are to be exchanged, both ways are letters. The mask of the next chunk has no
/// high bits.
fn lane(state: u64, is_exchanged: bool, dice: &mut u64) -> (u64, u64, u64) {
    let mask = state ^ SEED;
    loop {
        let (mut a, mut b) = (0, 0);
        for byte in 0..8 {
            let mask = if is_exchanged { (mask >> (8 * byte)) as u8 } else { 0 };
            let [one, other] = [letter(mask, dice), letter(mask, dice)];
            a |= u64::from(one) << (8 * byte);
            b |= u64::from(other) << (8 * byte);
        }
        if (fold(a ^ state, b ^ SEED) ^ SEED) & 0x8080_8080_8080_8080 == 0 {
            return (a, b, mask);
        }
    }
}

/// A byte that is printable with and without the mask.
fn letter(mask: u8, dice: &mut u64) -> u8 {
    let is_plain = |byte: u8| (b' '..0x7f).contains(&byte) && !matches!(byte, b'"' | b'\\' | b'/' | b'.');
    loop {
        // Knuth's multiplier; the high bits are the good ones.
        *dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let byte = (*dice >> 56) as u8;
        if is_plain(byte) && is_plain(byte ^ mask) {
            return byte;
        }
    }
}

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}
