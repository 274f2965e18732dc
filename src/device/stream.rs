//! Copies of plain bytes past the caches of the processor, for what nobody will look at soon.

/// Bytes of a cache line: what one write to memory takes. Half-filled ones cost a write each.
const LINE: usize = 64;

/// Copies bytes as `std::ptr::copy_nonoverlapping` does, all whole lines of the destination past the caches. Other threads
/// see them after [`fence`].
///
/// # Safety
/// - `src..src + bytes` is readable, `dst..dst + bytes` is writable, and they do not overlap.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn copy(src: *const u8, dst: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    const WORD: usize = size_of::<__m128i>();

    let head = dst.addr().wrapping_neg() % LINE;
    let head = head.min(bytes);
    let lines = (bytes - head) / LINE * LINE;
    // SAFETY: head, lines and tail are the bytes that the caller answers for; every processor of this architecture has
    // SSE2; lines of the destination start on a multiple of their length.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, head);
        for line in (head..head + lines).step_by(LINE) {
            let (src, dst) = (src.add(line).cast::<__m128i>(), dst.add(line).cast::<__m128i>());
            let words: [__m128i; LINE / WORD] = std::array::from_fn(|at| _mm_loadu_si128(src.add(at)));
            for (at, word) in words.into_iter().enumerate() {
                _mm_stream_si128(dst.add(at), word);
            }
        }
        let end = head + lines;
        std::ptr::copy_nonoverlapping(src.add(end), dst.add(end), bytes - end);
    }
}

/// Copies bytes; other processors decide themselves what to keep.
///
/// # Safety
/// - `src..src + bytes` is readable, `dst..dst + bytes` is writable, and they do not overlap.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy(src: *const u8, dst: *mut u8, bytes: usize) {
    // SAFETY: the same duties.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, bytes) }
}

/// What was copied here before is seen by whoever sees what this thread writes after.
pub(super) fn fence() {
    // SAFETY: every processor of this architecture has SSE.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_start_and_length() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1024).collect();
        for from in [0, 1, 15, 63] {
            for to in 0..80 {
                for len in (0..200).chain([511, 512, 513]) {
                    let mut copied = vec![0xA5; 1024];
                    // SAFETY: all of it lies in the two vectors.
                    unsafe { super::copy(bytes[from..].as_ptr(), copied[to..].as_mut_ptr(), len) };
                    super::fence();
                    assert_eq!(copied[to..to + len], bytes[from..from + len]);
                    assert!(copied[..to].iter().chain(&copied[to + len..]).all(|&byte| byte == 0xA5));
                }
            }
        }
    }
}
