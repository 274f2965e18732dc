//! Strided copies of single elements in host memory: transposes, and casts of what is not contiguous.

use super::RawCopy;
use crate::cast::Cast;
use crate::stride::{Loop, for_each_run};

/// Bytes of a destination element, if the runs of `copy` are single elements that [`copy_elements`] can copy.
pub(super) fn element(copy: &RawCopy) -> Option<usize> {
    let bytes = match copy.cast {
        Some(cast) if copy.run == cast.source_bytes() as u64 => cast.destination_bytes(),
        Some(_) => return None,
        None => usize::try_from(copy.run).ok()?,
    };
    (matches!(bytes, 1 | 2 | 4 | 8) && !copy.loops.is_empty()).then_some(bytes)
}

/// Makes a copy whose runs are single elements that take `bytes` at the destination.
///
/// # Safety
/// - as [`copy_now`](super::copy_now);
/// - `bytes` is what [`element`] says of the copy.
pub(super) unsafe fn copy_elements(copy: &RawCopy, bytes: usize) {
    // SAFETY: the same duties, and each type has `bytes` bytes.
    unsafe {
        match bytes {
            1 => copy_as::<u8>(copy),
            2 => copy_as::<u16>(copy),
            4 => copy_as::<u32>(copy),
            8 => copy_as::<u64>(copy),
            _ => unreachable!("bug in shardlift: elements of {bytes} bytes"),
        }
    }
}

/// # Safety
/// As [`copy_elements`], with elements of `T` at the destination.
unsafe fn copy_as<T: Copy + Default>(copy: &RawCopy) {
    let dst = std::ptr::with_exposed_provenance_mut::<u8>(copy.dst as usize);
    // Tiles are read in rows that are neighbours in the source, and written in columns that are at the destination.
    let mut outer = copy.loops.clone();
    let along = outer.pop().expect("bug in shardlift: an element without loops");
    let nearest = (0..outer.len()).min_by_key(|&at| outer[at].dst_stride);
    let across = match nearest {
        Some(at) if outer[at].dst_stride < along.dst_stride => outer.remove(at),
        _ => Loop { count: 1, src_stride: 0, dst_stride: 0 },
    };
    let mut tile = [[T::default(); TILE]; TILE];
    for_each_run(&outer, 0, 0, &mut |src_offset, dst_offset| {
        // SAFETY: the caller answers for every element of the copy; these are some of them.
        unsafe {
            let (src, dst) = (copy.src.add(src_offset as usize), dst.add(dst_offset as usize));
            copy_tiles(src, dst, along, across, copy.cast, &mut tile);
        }
    });
}

/// # Safety
/// As [`copy_elements`], for the elements of these two loops.
unsafe fn copy_tiles<T: Copy>(
    src: *const u8,
    dst: *mut u8,
    along: Loop,
    across: Loop,
    cast: Option<Cast>,
    tile: &mut [[T; TILE]; TILE],
) {
    for column in (0..along.count).step_by(TILE) {
        let columns = (along.count - column).min(TILE as u64) as usize;
        for row in (0..across.count).step_by(TILE) {
            let rows = (across.count - row).min(TILE as u64) as usize;
            for (at, tile) in (row..).zip(&mut tile[..rows]) {
                let offset = at * across.src_stride + column * along.src_stride;
                // SAFETY: the caller answers for the elements of this row.
                unsafe { gather(src.add(offset as usize), along.src_stride as usize, cast, &mut tile[..columns]) }
            }
            let is_whole = rows == TILE && across.dst_stride == size_of::<T>() as u64;
            for (at, index) in (column..).zip(0..columns) {
                let offset = at * along.dst_stride + row * across.dst_stride;
                if is_whole {
                    let whole: [T; TILE] = std::array::from_fn(|at| tile[at][index]);
                    // SAFETY: the caller answers for the elements of this column, which are neighbours.
                    unsafe { dst.add(offset as usize).cast::<[T; TILE]>().write_unaligned(whole) }
                    continue;
                }
                for (at, tile) in tile[..rows].iter().enumerate() {
                    // SAFETY: the caller answers for the elements of this column.
                    unsafe {
                        let to = dst.add(offset as usize + at * across.dst_stride as usize);
                        to.cast::<T>().write_unaligned(tile[index]);
                    }
                }
            }
        }
    }
}

/// Fills `row` with elements that are `stride` bytes apart.
///
/// # Safety
/// As many source elements as `row` has are readable there; `T` is as large as an element of the destination.
unsafe fn gather<T: Copy>(src: *const u8, stride: usize, cast: Option<Cast>, row: &mut [T]) {
    let Some(cast) = cast else {
        for (at, element) in row.iter_mut().enumerate() {
            // SAFETY: without a cast the source's elements are of `T`'s size, too.
            *element = unsafe { src.add(at * stride).cast::<T>().read_unaligned() };
        }
        return;
    };
    let bytes = cast.source_bytes();
    let mut near = [0u8; TILE * 4];
    let mut from = src;
    if stride != bytes {
        for (at, element) in near.chunks_exact_mut(bytes).take(row.len()).enumerate() {
            // SAFETY: an element of the caller's, into as many bytes.
            unsafe { src.add(at * stride).copy_to_nonoverlapping(element.as_mut_ptr(), bytes) }
        }
        from = near.as_ptr();
    }
    // SAFETY: the elements are contiguous at `from`, and `row` has room for as many.
    unsafe { cast.convert_raw(from, row.as_mut_ptr().cast(), row.len()) }
}

/// Rows and columns of a tile: of elements of 2 bytes, a column fills a cache line, and a tile takes 2 KiB.
const TILE: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::copy_now;
    use crate::dtype::Dtype;
    use crate::stride::Loops;

    /// The destination of a copy, made one element after the other.
    fn expected(copy: &RawCopy, source: &[u8], len: usize) -> Vec<u8> {
        let mut dst = vec![0; len];
        let element = copy.cast.map_or(copy.run as usize, Cast::source_bytes);
        for_each_run(&copy.loops, 0, 0, &mut |from, to| {
            let (from, mut to) = (from as usize, to as usize);
            for element in source[from..from + copy.run as usize].chunks(element) {
                let landed = copy.cast.map_or(element.len(), Cast::destination_bytes);
                match copy.cast {
                    Some(cast) => cast.convert(element, &mut dst[to..to + landed]),
                    None => dst[to..to + landed].copy_from_slice(element),
                }
                to += landed;
            }
        });
        dst
    }

    #[test]
    fn every_order_and_size_of_elements() {
        let casts = [
            (Dtype::F32, Dtype::Bf16),
            (Dtype::Bf16, Dtype::F32),
            (Dtype::F16, Dtype::Bf16),
            (Dtype::F8E4M3, Dtype::F32),
        ];
        let casts = casts.map(|(from, to)| Some(Cast::new(from, to).unwrap()));
        let source: Vec<u8> = (0..200_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        for (cast, size) in casts.into_iter().map(|cast| (cast, 0)).chain([1, 2, 4, 8, 6].map(|size| (None, size))) {
            let (from, to) = cast.map_or((size, size), |c| (c.source_bytes(), c.destination_bytes()));
            let (from, to) = (from as u64, to as u64);
            for [a, b, c] in [[1, 1, 1], [3, 1, 70], [70, 5, 33], [2, 65, 31], [33, 64, 2], [5, 1, 3]] {
                // Each order of the destination's dimensions; also of every second element.
                for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
                    for (step, whole) in [(1, true), (1, false), (2, false)] {
                        let counts = [a, b, c];
                        let src = [b * c * step * from, c * step * from, step * from];
                        let mut dst = [0; 3];
                        let mut stride = to;
                        for dim in order.into_iter().rev() {
                            dst[dim] = stride;
                            stride *= counts[dim];
                        }
                        let mut loops: Loops = (0..3)
                            .map(|dim| Loop { count: counts[dim], src_stride: src[dim], dst_stride: dst[dim] })
                            .collect();
                        let mut run = from;
                        if whole && order[2] == 2 {
                            loops.pop();
                            run *= c;
                        }
                        let src = source[1..].as_ptr();
                        let mut found = vec![0; stride as usize + 1];
                        let address = found[1..].as_mut_ptr().expose_provenance() as u64;
                        let copy = RawCopy { src, dst: address, loops, run, cast };
                        // SAFETY: all strides stay within `source` and `found`.
                        unsafe { copy_now(&copy) };
                        let expected = expected(&copy, &source[1..], stride as usize);
                        assert!(found[1..] == expected, "{copy:?}");
                    }
                }
            }
        }
    }
}
