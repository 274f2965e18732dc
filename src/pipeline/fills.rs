//! Places of destinations that no tensor fills: their values are copied there like bytes that were read.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use super::{Job, traced};
use crate::copy::{Filled, Landing, Part, lower};
use crate::device::{Op, RawCopy, copy_now};
use crate::limits;
use crate::observe::Kind;
use crate::plan::BoxFill;
use crate::stage::Staged;
use crate::stride::{Loop, Loops};

impl Job {
    /// Whether this process has anything to fill.
    pub(super) fn has_fills(&self) -> bool {
        let plan = &self.setup.plan;
        plan.world().driven().iter().any(|&rank| !plan.rank(rank).fills.is_empty())
    }

    /// Fills what this process has to.
    pub(super) fn fill(&self) {
        let plan = self.setup.plan.clone();
        for &rank in plan.world().driven() {
            let partition = plan.rank(rank);
            for (position, dest) in (0..).zip(&partition.dests) {
                if !self.setup.destinations.waits(rank, position) {
                    continue;
                }
                for fill in &partition.fills[dest.fills.start as usize..dest.fills.end as usize] {
                    let source: Source = Arc::new(pattern(&fill.element));
                    let mut landing = Landing { rank, dest: position, bytes: 0 };
                    pieces(fill, &mut |dst, loops, run| {
                        landing.bytes = loops.iter().fold(run, |bytes, inner| bytes * inner.count);
                        self.land_fill(landing, &source, dst, loops, run);
                    });
                }
            }
        }
    }

    fn land_fill(&self, landing: Landing, source: &Source, dst: u64, loops: Loops, run: u64) {
        if self.is_stopped() {
            return;
        }
        let place = self.setup.destinations.place(landing.rank, landing.dest);
        let place = place.expect("bug in shardlift: a fill for another process");
        let copy = RawCopy { src: source.as_ptr().cast(), dst: place.address + dst, loops, run, cast: None };
        let device = self.device_of[landing.rank.index()];
        if !self.copies.has_queue(device) {
            let began = self.trace().map(|trace| (trace, Instant::now()));
            // SAFETY: the source is as long as the copy and stays until then; the audit proved that nothing else names
            // the destination bytes; the job keeps them alive.
            unsafe { copy_now(&copy) };
            if let Some((trace, began)) = began {
                trace.since(traced::copied(Kind::Fill, landing.bytes), began);
            }
            return crate::copy::Landed::landed(self, landing);
        }
        // SAFETY: the staged bytes are the source's, which nobody writes to.
        let staged = unsafe { Staged::lent(copy.src, Arc::clone(source) as Arc<dyn Any + Send + Sync>) };
        let ops = if self.devices[device].0.copies_any() {
            vec![Op::Copy(copy)]
        } else {
            let part = Part { copy, allocation: place.allocation() };
            // SAFETY: the source is not to be written to.
            unsafe { lower(vec![part], false, &limits::COPY_COSTS) }
        };
        let id = self.request_id();
        self.begin_copies(id, device, None, false);
        self.hand_over(device, Filled { staged, ops, landing: vec![landing], shared: false, traced: None });
        self.end_copies(id);
    }
}

/// Memory that holds a value many times, aligned as kernels read it.
type Source = Arc<Vec<u128>>;

fn pattern(element: &[u8]) -> Vec<u128> {
    // Elements have 1, 2, 4 or 8 bytes.
    let word: Vec<u8> = element.iter().copied().cycle().take(size_of::<u128>()).collect();
    vec![u128::from_le_bytes(word.try_into().expect("16 bytes")); limits::FILL_BYTES / size_of::<u128>()]
}

/// Shows strided copies from dense memory of at most [`limits::FILL_BYTES`] that together fill a box: first byte of the
/// destination, loops, and run.
fn pieces(fill: &BoxFill, show: &mut impl FnMut(u64, Loops, u64)) {
    // All as loops, innermost last: a run is one of the largest part of the buffer and what is left.
    let most = limits::FILL_BYTES as u64;
    descend(fill.dst, &fill.loops, fill.run, most, show);
}

fn descend(dst: u64, loops: &[(u64, u64)], run: u64, most: u64, show: &mut impl FnMut(u64, Loops, u64)) {
    let inner = |from: usize| loops[from..].iter().map(|&(count, _)| count).product::<u64>().saturating_mul(run);
    let Some(&(count, stride)) = loops.first() else {
        for first in (0..run).step_by(most as usize) {
            show(dst + first, Loops::new(), most.min(run - first));
        }
        return;
    };
    let within = inner(1);
    if within > most {
        (0..count).for_each(|index| descend(dst + index * stride, &loops[1..], run, most, show));
        return;
    }
    let at_once = most / within;
    for first in (0..count).step_by(at_once as usize) {
        let mut dense = run;
        let mut strided: Vec<Loop> = Vec::new();
        for (at, &(count, dst_stride)) in loops.iter().enumerate().rev() {
            let count = if at == 0 { at_once.min(count - first) } else { count };
            strided.push(Loop { count, src_stride: dense, dst_stride });
            dense *= count;
        }
        strided.reverse();
        show(dst + first * stride, Loops::from_vec(strided), run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_fill_a_box_once_from_memory_of_a_bounded_size() {
        for (loops, run, most) in [
            (vec![], 10, 4),
            (vec![(5, 16)], 6, 8),
            (vec![(5, 16)], 6, 14),
            (vec![(3, 64), (4, 10)], 5, 8),
            (vec![(3, 64), (4, 10)], 5, 41),
            (vec![(3, 64), (4, 10)], 5, 1000),
        ] {
            let mut filled = vec![0; 256];
            descend(7, &loops, run, most, &mut |dst, inner, run| {
                let bytes = inner.iter().fold(run, |bytes, inner| bytes * inner.count);
                assert!(bytes <= most);
                crate::stride::for_each_run(&inner, 0, dst, &mut |src, to| {
                    assert!(src + run <= most);
                    filled[to as usize..(to + run) as usize].iter_mut().for_each(|times| *times += 1);
                });
            });
            let mut expected = vec![0; 256];
            let mut starts = vec![7];
            for &(count, stride) in &loops {
                starts = starts.iter().flat_map(|start| (0..count).map(move |index| start + index * stride)).collect();
            }
            starts.iter().for_each(|&start| expected[start as usize..(start + run) as usize].fill(1));
            assert_eq!(filled, expected, "{loops:?} {run} {most}");
        }
    }
}
