//! What copies to the GPUs of this machine cost: ceilings for reports, and the figures of
//! [`CopyCosts`](crate::limits::CopyCosts).

use std::mem::ManuallyDrop;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use super::context::Context;
use super::memory::Memory;
use super::pinned::CudaPinner;
use super::queue::CudaQueue;
use crate::device::{Feed, Home, Op, Pages, Pinned, Pinner, Queue, RawCopy};
use crate::error::{Error, ErrorKind, Result};
use crate::stride::{Loop, Loops};

/// Bytes of one copy: enough that its start does not count.
const BYTES: usize = 64 << 20;
/// Copies of one round; the first round warms up, and the best of the others counts.
const COPIES: usize = 4;
const ROUNDS: usize = 4;
/// How long a round may take before the device counts as stuck.
const BOUND: Duration = Duration::from_secs(20);

/// Copies from pinned memory to all of these GPUs at the same time: the bytes per nanosecond that each one gets.
///
/// # Errors
/// [`ErrorKind::Device`] and [`ErrorKind::DeviceMemory`].
pub fn pinned_gb_per_s(gpus: &[u32]) -> Result<Vec<f64>> {
    let mut benches = gpus.iter().map(|&gpu| Bench::new(gpu)).collect::<Result<Vec<_>>>()?;
    let together = Barrier::new(benches.len());
    thread::scope(|scope| {
        let threads: Vec<_> = benches
            .iter_mut()
            .map(|bench| {
                let together = &together;
                scope.spawn(move || {
                    let ops =
                        || (0..COPIES).map(|_| bench_op(bench.buffers.source.address(), bench.target(), &[], BYTES));
                    let ops: Vec<Vec<Op>> = (0..ROUNDS).map(|_| ops().collect()).collect();
                    let mut best = f64::INFINITY;
                    let mut outcome = Ok(());
                    for round in ops {
                        // Everyone comes here as often, failed or not.
                        together.wait();
                        if outcome.is_ok() {
                            outcome = bench.seconds(round).map(|seconds| best = best.min(seconds));
                        }
                    }
                    outcome.map(|()| (COPIES * BYTES) as f64 / best / 1e9)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(stuck()))).collect()
    })
}

/// What single kinds of copies cost on one GPU.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CopyMeasurements {
    /// Bytes per nanosecond of long copies.
    pub link_gb_per_s: f64,
    /// Nanoseconds of a copy of 4 KiB among many.
    pub call_ns: f64,
    /// For widths of rows in bytes, the bytes per nanosecond of 2-D copies of half of a buffer's columns.
    pub rows: Vec<(u64, f64)>,
    /// Bytes per nanosecond that a kernel cuts out of rows of 256 bytes.
    pub kernel_gb_per_s: f64,
}

/// Measures what [`CopyCosts`](crate::limits::CopyCosts) are made of.
///
/// # Errors
/// As [`pinned_gb_per_s`].
pub fn copy_measurements(gpu: u32) -> Result<CopyMeasurements> {
    let mut bench = Bench::new(gpu)?;
    let (source, target) = (bench.buffers.source.address(), bench.target());
    let link = bench.best(|| vec![bench_op(source, target, &[], BYTES)])?;
    const SMALL: usize = 4096;
    let calls = bench.best(|| (0..1000).map(|_| bench_op(source, target, &[], SMALL)).collect())?;
    let mut rows = Vec::new();
    for width in [32, 64, 128, 256, 512, 1024, 4096, 16384] {
        let halves = [Loop { count: BYTES as u64 / 2 / width, src_stride: 2 * width, dst_stride: width }];
        let seconds = bench.best(|| vec![bench_op(source, target, &halves, width as usize)])?;
        rows.push((width, BYTES as f64 / 2.0 / seconds / 1e9));
    }
    let halves = [Loop { count: BYTES as u64 / 512, src_stride: 512, dst_stride: 256 }];
    let cut = bench.best(|| vec![cut_op(source, target, &halves, 256)])?;
    let kernel = (cut - link).max(1e-9);
    Ok(CopyMeasurements {
        link_gb_per_s: BYTES as f64 / link / 1e9,
        call_ns: calls / 1000.0 * 1e9,
        rows,
        kernel_gb_per_s: BYTES as f64 / 2.0 / kernel / 1e9,
    })
}

/// A buffer on either side of a link, and a queue.
struct Bench {
    buffers: ManuallyDrop<Buffers>,
    /// Copies may be under way for ever.
    stuck: bool,
}

struct Buffers {
    // Before what its copies name.
    queue: CudaQueue,
    target: Memory,
    _pinned: Pinned,
    source: Pages,
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !self.stuck {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}

impl Bench {
    fn new(gpu: u32) -> Result<Bench> {
        let context: Arc<Context> = Context::open(gpu, BOUND)?;
        let source = Pages::new(BYTES)?;
        // SAFETY: the pages are `BYTES` long and nobody else has them.
        unsafe { std::ptr::write_bytes(source.address(), 0x5A, BYTES) };
        // SAFETY: the pages outlive what this returns: fields are dropped in order.
        let pinned = unsafe { CudaPinner::new(&context, None).pin(source.address(), BYTES) }?;
        let target = Memory::plain(&context, BYTES)?;
        let buffers = Buffers {
            queue: CudaQueue::new(&context, Feed { slot_bytes: BYTES, cuts: false, slots: 0, wire: None })?,
            target,
            _pinned: pinned,
            source,
        };
        Ok(Bench { buffers: ManuallyDrop::new(buffers), stuck: false })
    }

    fn target(&self) -> u64 {
        self.buffers.target.address()
    }

    fn best(&mut self, ops: impl Fn() -> Vec<Op>) -> Result<f64> {
        (0..ROUNDS).try_fold(f64::INFINITY, |best, _| Ok(best.min(self.seconds(ops())?)))
    }

    fn seconds(&mut self, ops: Vec<Op>) -> Result<f64> {
        let began = Instant::now();
        // SAFETY: all copies of this file lie in the two buffers, which outlive the queue.
        let ticket = unsafe { self.buffers.queue.submit(ops, Home::Host)? };
        self.buffers.queue.mark()?;
        while self.buffers.queue.finished()? < ticket {
            // What a sleep takes would be measured, too.
            std::thread::yield_now();
            if began.elapsed() >= BOUND {
                self.stuck = true;
                return Err(stuck());
            }
        }
        Ok(began.elapsed().as_secs_f64())
    }
}

fn bench_op(source: *mut u8, target: u64, loops: &[Loop], run: usize) -> Op {
    Op::Copy(RawCopy { src: source, dst: target, loops: Loops::from_slice(loops), run: run as u64, cast: None })
}

fn cut_op(source: *mut u8, target: u64, loops: &[Loop], run: usize) -> Op {
    let copy = RawCopy { src: source, dst: target, loops: Loops::from_slice(loops), run: run as u64, cast: None };
    Op::Cut { src: source, bytes: BYTES, copies: vec![copy] }
}

fn stuck() -> Error {
    Error::new(ErrorKind::Stalled, format!("no copy completed for {BOUND:?}"))
}
