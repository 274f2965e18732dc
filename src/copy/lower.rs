//! Which way each piece takes to a device that cannot make every copy itself: straight, as rows, packed by the CPU, or
//! landed raw and cut by a kernel. The choice rests on the costs in `limits.rs`.

use smallvec::SmallVec;

use crate::device::{Op, RawCopy};
use crate::limits::{self, CopyCosts};
use crate::stride::{Loop, Loops, bytes_moved, for_each_run, is_rows, source_span};

/// Copies of rows from one slot that are listed without an allocation: most slots have fewer.
const FEW: usize = 4;

/// A copy, and which allocation it goes to: what lies in several may not be one copy, also where they are neighbours.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) copy: RawCopy,
    /// Equal for copies into one allocation.
    pub(crate) allocation: u64,
}

/// What a device has to do for the copies that it takes from one filled slot.
///
/// `packable` says that nobody else reads the slot, so that it may be packed in place.
///
/// # Safety
/// - every source byte that the copies name is readable, and nobody writes it;
/// - if `packable`, the whole of what they name in the source is writable too, and nobody else reads it.
pub(crate) unsafe fn lower(mut parts: Vec<Part>, packable: bool, costs: &CopyCosts) -> Vec<Op> {
    let (mut strided, mut kernel) = (SmallVec::<[RawCopy; FEW]>::new(), Vec::new());
    let packable = packable && parts.windows(2).all(|pair| pair[0].allocation == pair[1].allocation);
    parts.iter_mut().for_each(|part| part.copy.loops.retain(|inner| inner.count != 1));
    let bent = |part: &mut Part| part.copy.cast.is_some() || !part.copy.loops.is_empty();
    for Part { copy, .. } in parts.extract_if(.., bent) {
        if copy.cast.is_none() && is_rows(&copy.loops, copy.run) {
            strided.push(copy);
        } else {
            kernel.push(copy);
        }
    }
    let mut straight = parts;
    let by_rows: f64 = strided.iter().map(|copy| rows_cost(copy, costs)).sum();
    let cut = cut_cost(kernel.iter(), costs);
    let cut_all = cut_cost(kernel.iter().chain(&strided), costs) - cut;
    if packable && straight.is_empty() && kernel.is_empty() && pack_cost(&strided, costs) < by_rows.min(cut_all) {
        // SAFETY: the caller's duties.
        if let Some(packed) = unsafe { pack(&mut strided) } {
            return vec![Op::Copy(packed)];
        }
    }
    merge(&mut straight);
    put_in_rows(&mut straight);
    let mut ops: Vec<Op> = straight.into_iter().map(|part| Op::Copy(part.copy)).collect();
    if cut_all < by_rows {
        kernel.extend(strided.drain(..));
    }
    ops.extend(strided.iter().flat_map(rows).map(Op::Copy));
    ops.extend(raw(kernel));
    ops
}

/// Makes one of contiguous copies that are neighbours on both sides, and sorts them by source.
fn merge(parts: &mut Vec<Part>) {
    parts.sort_unstable_by_key(|Part { copy, .. }| (copy.src.addr(), copy.dst));
    parts.dedup_by(|Part { copy, allocation }, Part { copy: last, allocation: of_last }| {
        let after = |start: u64, next: u64| start + last.run == next;
        let neighbours = after(last.src.addr() as u64, copy.src.addr() as u64) && after(last.dst, copy.dst);
        let one = *allocation == *of_last && neighbours;
        last.run += if one { copy.run } else { 0 };
        one
    });
}

/// Of contiguous copies, sorted by source, makes equal ones at equal distances the rows of one: the parts of many small
/// tensors of one shape, for instance.
fn put_in_rows(parts: &mut Vec<Part>) {
    parts.dedup_by(|Part { copy, allocation }, Part { copy: last, allocation: of_last }| {
        if *allocation != *of_last || copy.run != last.run {
            return false;
        }
        let src = copy.src.addr().wrapping_sub(last.src.addr()) as u64;
        let dst = copy.dst.wrapping_sub(last.dst);
        let pitches = copy.run..=limits::PITCH_MAX;
        match last.loops.first_mut() {
            None if pitches.contains(&src) && pitches.contains(&dst) => {
                last.loops.push(Loop { count: 2, src_stride: src, dst_stride: dst });
                true
            }
            Some(rows) if src == rows.count * rows.src_stride && dst == rows.count * rows.dst_stride => {
                rows.count += 1;
                true
            }
            _ => false,
        }
    });
}

/// The copies of rows, one loop each, that a strided copy [is](is_rows).
fn rows(copy: &RawCopy) -> SmallVec<[RawCopy; 1]> {
    let mut all = SmallVec::new();
    if let Some((inner, outer)) = copy.loops.split_last() {
        for_each_run(outer, 0, copy.dst, &mut |src, dst| {
            let src = copy.src.wrapping_add(src as usize);
            all.push(RawCopy { src, dst, loops: Loops::from_slice(&[*inner]), run: copy.run, cast: None });
        });
    }
    all
}

/// All copies as one that lands their sources' whole span in the device's scratch memory.
fn raw(copies: Vec<RawCopy>) -> Option<Op> {
    let (start, end) = span(copies.iter())?;
    // Sources keep their place relative to whole accesses of a kernel; what is added lies in the same page.
    let start = start - start % limits::KERNEL_ACCESS;
    let src = copies[0].src.with_addr(start);
    Some(Op::Cut { src, bytes: end - start, copies })
}

/// The first source address, and the one after the last.
fn span<'a>(copies: impl Iterator<Item = &'a RawCopy>) -> Option<(usize, usize)> {
    let range = |copy: &RawCopy| (copy.src.addr(), copy.src.addr() + source_span(&copy.loops, copy.run) as usize);
    copies.map(range).reduce(|all, next| (all.0.min(next.0), all.1.max(next.1)))
}

/// Packs rows to the front of their span, if together they are one dense range of their destination in the same order.
///
/// # Safety
/// As [`lower`] with `packable`.
unsafe fn pack(copies: &mut [RawCopy]) -> Option<RawCopy> {
    copies.sort_by_key(|copy| copy.src.addr());
    let first = copies.first()?;
    let (to, dst) = (first.src.cast_mut(), first.dst);
    let mut filled = 0;
    for copy in copies.iter() {
        // Dense, and in the order of the source, so that nothing is overwritten before it was moved.
        let dense = copy.loops.iter().rev().try_fold(copy.run, |bytes, inner| {
            (inner.dst_stride == bytes && inner.src_stride >= bytes).then(|| bytes * inner.count)
        })?;
        if copy.dst != dst + filled || copy.src.addr() < to.addr() + filled as usize {
            return None;
        }
        filled += dense;
    }
    let mut at = 0;
    for copy in copies.iter() {
        for_each_run(&copy.loops, 0, 0, &mut |src, _| {
            // SAFETY: the caller's duties; a run moves towards the front of its slot, over bytes that were moved.
            unsafe { std::ptr::copy(copy.src.add(src as usize), to.add(at), copy.run as usize) };
            at += copy.run as usize;
        });
    }
    Some(RawCopy { src: to, dst, loops: Loops::new(), run: filled, cast: None })
}

/// Nanoseconds of the link for copies of rows.
fn rows_cost(copy: &RawCopy, costs: &CopyCosts) -> f64 {
    let bytes = bytes_moved(&copy.loops, copy.run) as f64;
    let count = bytes / copy.run as f64;
    let calls = count / copy.loops.last().map_or(1.0, |inner| inner.count as f64);
    costs.call_ns * calls + (bytes / costs.link_gb_per_s).max(count * costs.row_ns)
}

/// Nanoseconds of link and device for landing raw and cutting with kernels.
fn cut_cost<'a>(copies: impl Iterator<Item = &'a RawCopy> + Clone, costs: &CopyCosts) -> f64 {
    let Some((start, end)) = span(copies.clone()) else { return 0.0 };
    let kernels: f64 =
        copies.map(|copy| costs.call_ns + bytes_moved(&copy.loops, copy.run) as f64 / costs.kernel_gb_per_s).sum();
    costs.call_ns + (end - start) as f64 / costs.link_gb_per_s + kernels
}

/// Nanoseconds of a reading thread's share, and of the link, for packing rows.
fn pack_cost(copies: &[RawCopy], costs: &CopyCosts) -> f64 {
    let cost = |copy: &RawCopy| {
        let bytes = bytes_moved(&copy.loops, copy.run) as f64;
        let cpu = bytes / copy.run as f64 * costs.pack_row_ns + bytes / costs.pack_gb_per_s;
        bytes / costs.link_gb_per_s + cpu
    };
    costs.call_ns + copies.iter().map(cost).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::copy_now;

    /// What a device does with an operation, on host memory.
    fn carry_out(ops: &[Op]) {
        for op in ops {
            match op {
                Op::Copy(copy) => {
                    assert!(copy.loops.len() <= 1 && copy.cast.is_none(), "not for a copy engine: {copy:?}");
                    // SAFETY: the test's buffers are as large as its copies say.
                    unsafe { copy_now(copy) };
                }
                Op::Cut { src, bytes, copies } => {
                    // SAFETY: as above.
                    let scratch = unsafe { std::slice::from_raw_parts(*src, *bytes) }.to_vec();
                    for copy in copies {
                        let at = copy.src.addr() - src.addr();
                        let end = at + source_span(&copy.loops, copy.run) as usize;
                        let landed = RawCopy {
                            src: scratch[at..end].as_ptr(),
                            dst: copy.dst,
                            loops: copy.loops.clone(),
                            run: copy.run,
                            cast: copy.cast,
                        };
                        // SAFETY: as above.
                        unsafe { copy_now(&landed) };
                    }
                }
            }
        }
    }

    const COPIES: usize = 0;
    /// The tests' destinations are allocations of this size.
    const ALLOCATION: usize = 1 << 19;

    /// Source offset, destination offset, loops, run.
    type Piece<'a> = (usize, usize, &'a [(u64, u64, u64)], u64);

    /// How many operations of each kind `pieces` become. Checks that they move the same bytes.
    fn ways(pieces: &[Piece<'_>], packable: bool, costs: &CopyCosts) -> [usize; 2] {
        let mut source: Vec<u8> = (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let make = |src: *const u8, dst: *mut u8| -> Vec<RawCopy> {
            let piece = |&(from, to, loops, run): &Piece<'_>| RawCopy {
                src: src.wrapping_add(from),
                dst: dst.wrapping_add(to).expose_provenance() as u64,
                loops: loops
                    .iter()
                    .map(|&(count, src_stride, dst_stride)| crate::stride::Loop { count, src_stride, dst_stride })
                    .collect(),
                run,
                cast: None,
            };
            pieces.iter().map(piece).collect()
        };
        let (mut expected, mut found) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
        let found_at = found.as_mut_ptr().expose_provenance() as u64;
        for copy in make(source.as_ptr(), expected.as_mut_ptr()) {
            // SAFETY: the pieces of the tests lie in a megabyte.
            unsafe { copy_now(&copy) };
        }
        let part = |copy: RawCopy| Part { allocation: (copy.dst - found_at) / ALLOCATION as u64, copy };
        let parts = make(source.as_mut_ptr(), found.as_mut_ptr()).into_iter().map(part).collect();
        // SAFETY: as above; nobody else uses the source.
        let ops = unsafe { lower(parts, packable, costs) };
        carry_out(&ops);
        assert!(found == expected, "{pieces:?} {ops:?}");
        let cuts = ops.iter().filter(|op| matches!(op, Op::Cut { .. })).count();
        [ops.len() - cuts, cuts]
    }

    const COSTS: CopyCosts = limits::COPY_COSTS;

    #[test]
    fn neighbours_on_both_sides_are_one_copy() {
        assert_eq!(ways(&[(100, 300, &[], 50), (0, 200, &[], 100), (150, 350, &[], 7)], true, &COSTS)[COPIES], 1);
        assert_eq!(ways(&[(0, 0, &[], 50), (50, 256, &[], 49)], true, &COSTS)[COPIES], 2);
    }

    #[test]
    fn nothing_is_one_copy_into_two_allocations() {
        let end = ALLOCATION;
        assert_eq!(ways(&[(0, end - 50, &[], 50), (50, end, &[], 50)], true, &COSTS)[COPIES], 2);
        let pieces: Vec<_> = (0..4).map(|at| (at * 100, end - 128 + at * 64, &[][..], 30)).collect();
        assert_eq!(ways(&pieces, true, &COSTS)[COPIES], 2);
        let narrow: &[(u64, u64, u64)] = &[(1000, 96, 16)];
        assert_ne!(ways(&[(0, end - 16_000, narrow, 16), (96_000, end, narrow, 16)], true, &COSTS), [1, 0]);
    }

    #[test]
    fn equal_ones_at_equal_distances_are_rows_of_one_copy() {
        let pieces: Vec<_> = (0..5).map(|at| (at * 100, at * 64, &[][..], 30)).collect();
        assert_eq!(ways(&pieces, true, &COSTS)[COPIES], 1);
        // The last is out of step, or longer, or goes before the others.
        for odd in [(501, 320, &[][..], 30), (500, 320, &[][..], 31), (500, 400, &[][..], 30)] {
            assert_eq!(ways(&[&pieces[..], &[odd]].concat(), true, &COSTS)[COPIES], 2);
        }
        let backwards: Vec<_> = (0..5).map(|at| (at * 100, 1000 - at * 64, &[][..], 30)).collect();
        assert_eq!(ways(&backwards, true, &COSTS)[COPIES], 5);
    }

    #[test]
    fn wide_rows_are_copied_straight_and_narrow_ones_packed() {
        let wide: &[(u64, u64, u64)] = &[(100, 8192, 4096)];
        assert_eq!(ways(&[(0, 0, wide, 4096)], true, &COSTS), [1, 0]);
        let narrow: &[(u64, u64, u64)] = &[(10_000, 96, 16)];
        assert_eq!(ways(&[(8, 0, narrow, 16)], true, &COSTS), [1, 0]);
        // Part of a row, whole rows, part of a row, as one range of the destination.
        let pieces: [Piece<'_>; 3] = [(4, 0, &[], 12), (96, 12, &[(1000, 96, 16)], 16), (96_096, 16_012, &[], 5)];
        ways(&pieces, true, &COSTS);
        let rows = CopyCosts { row_ns: 1000.0, kernel_gb_per_s: 0.001, ..COSTS };
        assert_eq!(ways(&pieces[1..2], true, &rows), [1, 0]);
    }

    #[test]
    fn what_no_copy_engine_can_do_is_cut_by_a_kernel() {
        let transposed: &[(u64, u64, u64)] = &[(100, 80, 2), (40, 2, 200)];
        assert_eq!(ways(&[(7, 0, transposed, 2)], false, &COSTS), [0, 1]);
        let deep: &[(u64, u64, u64)] = &[(100, 4000, 400), (10, 200, 40), (4, 20, 10)];
        assert_eq!(ways(&[(0, 0, deep, 10)], false, &COSTS), [0, 1]);
        let few: &[(u64, u64, u64)] = &[(4, 100_000, 40_960), (10, 8192, 4096)];
        assert_eq!(ways(&[(0, 0, few, 4096)], false, &COSTS), [4, 0]);
    }

    #[test]
    fn several_ranks_on_one_device_share_what_lands_raw() {
        let rows: &[(u64, u64, u64)] = &[(5000, 64, 16)];
        let of_ranks = [(0, 0, rows, 16), (16, 100_000, rows, 16), (32, 200_000, rows, 16), (48, 300_000, rows, 16)];
        assert_eq!(ways(&of_ranks, true, &COSTS), [0, 1]);
    }
}
