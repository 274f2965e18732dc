//! Reads every byte once: the same way for all loaders, so that what a lazy one has put off is in its seconds.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

/// What a thread takes at once.
const PIECE: usize = 4 << 20;

/// As many threads as this process may run at once.
pub fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The wrapping sum of all little-endian 64-bit words, those at the ends of slices padded with zeros: equal for equal
/// bytes. Reads on all processors.
pub fn touch(slices: &[&[u8]]) -> u64 {
    let pieces: Vec<&[u8]> = slices.iter().flat_map(|bytes| bytes.chunks(PIECE)).collect();
    let (next, sum) = (AtomicUsize::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..threads().min(pieces.len()) {
            scope.spawn(|| {
                let mut own = 0u64;
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    own = own.wrapping_add(sum_of(piece));
                }
                sum.fetch_add(own, Ordering::Relaxed); // wraps
            });
        }
    });
    sum.into_inner()
}

fn sum_of(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    words.iter().fold(u64::from_le_bytes(last), |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
}

/// [`touch`] for Python, which finds no fault with a pointer.
///
/// # Safety
/// - `addresses` and `lengths` point at `count` each.
/// - At each address so many bytes can be read, and nobody writes them meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compare_touch(addresses: *const *const u8, lengths: *const usize, count: usize) -> u64 {
    if count == 0 {
        return 0;
    }
    // SAFETY: the caller's first duty.
    let (addresses, lengths) =
        unsafe { (std::slice::from_raw_parts(addresses, count), std::slice::from_raw_parts(lengths, count)) };
    let slices: Vec<&[u8]> = addresses
        .iter()
        .zip(lengths)
        .filter(|(_, length)| **length > 0) // nothing may have no address
        // SAFETY: the caller's second duty.
        .map(|(address, length)| unsafe { std::slice::from_raw_parts(*address, *length) })
        .collect();
    touch(&slices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts_once_wherever_slices_end() {
        let bytes: Vec<u8> = (0..PIECE + 13).map(|at| (at * 31 % 251) as u8).collect();
        let whole = touch(&[&bytes]);
        let words = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        assert_eq!(whole, words.fold(0u64, u64::wrapping_add));
        assert_eq!(touch(&[&bytes[..4096], &bytes[4096..]]), whole);
        for at in [0, 4095, PIECE, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_ne!(touch(&[&changed]), whole, "byte {at}");
        }
        assert_eq!(touch(&[]), 0);
    }

    #[test]
    fn python_may_hand_over_what_has_no_address() {
        let bytes = [1u8, 2, 3];
        let (addresses, lengths) = ([bytes.as_ptr(), std::ptr::null()], [bytes.len(), 0]);
        // SAFETY: two of each; the first has three bytes, the second none.
        let sum = unsafe { compare_touch(addresses.as_ptr(), lengths.as_ptr(), 2) };
        assert_eq!(sum, touch(&[&bytes]));
    }
}
