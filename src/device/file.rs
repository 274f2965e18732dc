//! Files as a device: its address space is the bytes of one output file. This is how `reshard` writes partitions
//! through the same pipeline that loads them.

use std::any::Any;
use std::cmp::Reverse;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::host::ThreadQueue;
use super::{Allocation, Device, Feed, Queue, RawCopy, copy_now};
use crate::cast::Cast;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::stride::{Loop, Loops, bytes_moved, for_each_run};

/// One output file that copies land in.
#[derive(Debug)]
pub(crate) struct FileDevice {
    path: PathBuf,
    file: Arc<File>,
}

impl FileDevice {
    /// A device over a file that is open for writing; errors name it `path`, and the bytes of it.
    pub(crate) fn new(path: PathBuf, file: Arc<File>) -> FileDevice {
        FileDevice { path, file }
    }

    fn is_no_memory(&self) -> Error {
        Error::new(ErrorKind::Unsupported, "an output file is no memory").with_file(&self.path)
    }
}

impl Device for FileDevice {
    fn name(&self) -> String {
        format!("file:{}", self.path.display())
    }

    fn block(&self, _: usize) -> Result<Allocation> {
        Err(self.is_no_memory())
    }

    fn tensor(&self, _: usize, _: usize) -> Result<Allocation> {
        Err(self.is_no_memory())
    }

    unsafe fn lent(&self, address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        // SAFETY: the same duties.
        unsafe { Allocation::lent(address, keep) }
    }

    fn queue(&self, _: Feed) -> Result<Option<Box<dyn Queue>>> {
        let mut writer = Writer::new(self.path.clone(), Arc::clone(&self.file));
        Ok(Some(Box::new(ThreadQueue::new("shardlift-write", move |copy| writer.write(copy))?)))
    }
}

/// Writes long runs from where they lie, and gathers short ones that are neighbours in the file.
#[derive(Debug)]
struct Writer {
    path: PathBuf,
    file: Arc<File>,
    gathered: Vec<u8>,
    /// What elements are cast or permuted into.
    formed: Vec<u8>,
    /// Where in the file what is gathered begins.
    start: u64,
}

impl Writer {
    fn new(path: PathBuf, file: Arc<File>) -> Writer {
        Writer { path, file, gathered: Vec::new(), formed: Vec::new(), start: 0 }
    }

    fn write(&mut self, copy: &RawCopy) -> Result<()> {
        let mut loops = copy.loops.clone();
        loops.sort_by_key(|inner| Reverse(inner.dst_stride));
        if copy.cast.is_some() || loops != copy.loops {
            self.transform(copy.src, copy.dst, &loops, copy)?;
            return self.flush();
        }
        let mut outcome = Ok(());
        for_each_run(&copy.loops, 0, 0, &mut |src, dst| {
            if outcome.is_ok() {
                // SAFETY: `Queue::submit`'s caller keeps the source readable and unwritten until the copy is done.
                let run = unsafe { std::slice::from_raw_parts(copy.src.add(src as usize), copy.run as usize) };
                outcome = self.push(run, copy.dst + dst);
            }
        });
        outcome.and_then(|()| self.flush())
    }

    /// Writes a copy whose elements are cast or come in another order, from memory where a part of it after the other
    /// gets its form. `loops` are some of its loops, the destination's outermost first.
    fn transform(&mut self, src: *const u8, dst: u64, loops: &[Loop], copy: &RawCopy) -> Result<()> {
        let landed = |bytes| copy.cast.map_or(bytes, |cast| cast.converted(bytes));
        let gather = limits::WRITE_GATHER as u64;
        let Some((outer, inner)) = loops.split_first() else {
            let step = copy.cast.map_or(1, |cast| cast.source_bytes() as u64);
            let most = gather / landed(step) * step;
            return (0..copy.run).step_by(most as usize).try_for_each(|from| {
                let part =
                    Loop { count: (copy.run - from).min(most) / step, src_stride: step, dst_stride: landed(step) };
                self.form(src.wrapping_add(from as usize), dst + landed(from), &[part], step, copy.cast)
            });
        };
        let each = landed(bytes_moved(inner, copy.run));
        let at_once = (gather / each).min(outer.count);
        if at_once == 0 {
            return (0..outer.count).try_for_each(|step| {
                let src = src.wrapping_add((step * outer.src_stride) as usize);
                self.transform(src, dst + step * outer.dst_stride, inner, copy)
            });
        }
        (0..outer.count).step_by(at_once as usize).try_for_each(|step| {
            let mut part = Loops::from_slice(loops);
            part[0].count = at_once.min(outer.count - step);
            let src = src.wrapping_add((step * outer.src_stride) as usize);
            self.form(src, dst + step * outer.dst_stride, &part, copy.run, copy.cast)
        })
    }

    /// Writes at most [`limits::WRITE_GATHER`] bytes of such a copy.
    fn form(&mut self, src: *const u8, dst: u64, loops: &[Loop], run: u64, cast: Option<Cast>) -> Result<()> {
        let landed = |bytes| cast.map_or(bytes, |cast| cast.converted(bytes));
        // The same in memory without what lies between the runs of the file.
        let mut dense = Loops::from_slice(loops);
        let mut bytes = landed(run);
        for inner in dense.iter_mut().rev() {
            inner.dst_stride = bytes;
            bytes *= inner.count;
        }
        let mut formed = std::mem::take(&mut self.formed);
        formed.resize(bytes as usize, 0);
        let mut copied = dense.clone();
        copied.sort_by_key(|inner| Reverse(inner.src_stride));
        let address = formed.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: `Queue::submit`'s caller keeps the source readable and unwritten until the copy is done; what the
        // loops fill is `formed`.
        unsafe { copy_now(&RawCopy { src, dst: address, loops: copied, run, cast }) };
        let mut outcome = Ok(());
        let landing =
            |(&to, &at): (&Loop, &Loop)| Loop { count: at.count, src_stride: at.dst_stride, dst_stride: to.dst_stride };
        let mut landing: Loops = loops.iter().zip(&dense).map(landing).collect();
        let mut run = landed(run);
        while let Some(&Loop { count, dst_stride, .. }) = landing.last()
            && dst_stride == run
        {
            run *= count;
            landing.pop();
        }
        for_each_run(&landing, 0, 0, &mut |at, to| {
            if outcome.is_ok() {
                outcome = self.push(&formed[at as usize..(at + run) as usize], dst + to);
            }
        });
        self.formed = formed;
        outcome
    }

    fn push(&mut self, run: &[u8], dst: u64) -> Result<()> {
        let end = self.start + self.gathered.len() as u64;
        if dst != end || self.gathered.len() + run.len() > limits::WRITE_GATHER {
            self.flush()?;
            self.start = dst;
        }
        if run.len() > limits::WRITE_GATHER {
            return self.write_at(run, dst);
        }
        self.gathered.extend_from_slice(run);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let outcome = if self.gathered.is_empty() { Ok(()) } else { self.write_at(&self.gathered, self.start) };
        self.gathered.clear();
        outcome
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| {
            Error::io("cannot write", &self.path, error).with_bytes(offset, offset + bytes.len() as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stride::source_span;

    #[test]
    fn runs_of_every_length_and_order_land_where_they_belong() {
        let gather = limits::WRITE_GATHER as u64;
        for (run, gap) in [(1, 0), (3, 2), (1000, 0), (gather - 1, 1), (gather, 0), (gather + 1, 0), (2 * gather, 5)] {
            // Rows of the source backwards in the destination, each of two halves.
            let rows = (3 * gather / run).clamp(3, 500);
            let half = run + gap;
            let source: Vec<u8> = (0..rows * 2 * run).map(|at| (at * 31 + at / 251) as u8).collect();
            let mut expected = vec![0; (7 + rows * 2 * half) as usize];
            let file = Arc::new(tempfile::tempfile().unwrap());
            file.set_len(expected.len() as u64).unwrap();
            let mut writer = Writer::new("out".into(), Arc::clone(&file));
            for row in (0..rows).rev() {
                let halves = Loop { count: 2, src_stride: run, dst_stride: half };
                let (src, dst) = ((row * 2 * run) as usize, 7 + (rows - 1 - row) * 2 * half);
                let loops = Loops::from_slice(&[halves]);
                writer.write(&RawCopy { src: source[src..].as_ptr(), dst, loops, run, cast: None }).unwrap();
                for step in 0..2 {
                    let to = (dst + step * half) as usize;
                    let from = src + (step * run) as usize;
                    expected[to..to + run as usize].copy_from_slice(&source[from..from + run as usize]);
                }
            }
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "runs of {run}, {gap} apart");
            assert!(writer.gathered.capacity() as u64 <= 2 * gather);
        }
    }

    #[test]
    fn elements_that_are_cast_or_permuted_land_where_they_belong() {
        let source: Vec<u8> = (0..1 << 20).map(|at: u32| (at * 37 + at / 251) as u8).collect();
        let to = |from, to| Some(Cast::new(from, to).unwrap());
        use crate::dtype::Dtype::{Bf16, F8E5M2, F32};
        // Rows, columns, bytes of an element, cast, whether it is transposed.
        for (rows, columns, element, cast, transposed) in [
            (3, 40_000, 4, None, true),
            (40_000, 3, 2, None, true),
            (500, 500, 4, None, true),
            (500, 500, 4, to(F32, Bf16), true),
            (1, 200_000, 4, to(F32, Bf16), false),
            (7, 30_000, 2, to(Bf16, F32), false),
            (700, 1000, 1, to(F8E5M2, F32), true),
        ] {
            let landed = cast.map_or(element, |cast| cast.converted(element));
            // Rows of the file are longer than those that are taken, as with columns of a matrix.
            let row = if transposed {
                Loop { count: rows, src_stride: columns * element, dst_stride: landed }
            } else {
                Loop { count: rows, src_stride: columns * element, dst_stride: columns * landed + 8 }
            };
            let column = Loop { count: columns, src_stride: element, dst_stride: rows * landed + 8 };
            let (loops, run) = if transposed { (vec![row, column], element) } else { (vec![row], columns * element) };
            let copy = |dst| RawCopy { src: source.as_ptr(), dst, loops: Loops::from_vec(loops.clone()), run, cast };
            let end =
                source_span(&loops.iter().map(|l| Loop { src_stride: l.dst_stride, ..*l }).collect::<Vec<_>>(), 0);
            let end = (end + cast.map_or(run, |cast| cast.converted(run))) as usize;
            let mut expected = vec![0u8; end];
            // SAFETY: the loops stay within both.
            unsafe { copy_now(&copy(expected.as_mut_ptr().expose_provenance() as u64)) };
            let file = Arc::new(tempfile::tempfile().unwrap());
            file.set_len(end as u64 + 5).unwrap();
            let mut writer = Writer::new("out".into(), Arc::clone(&file));
            writer.write(&copy(5)).unwrap();
            let mut found = vec![0; end];
            file.read_exact_at(&mut found, 5).unwrap();
            assert!(found == expected, "{rows} x {columns}, {cast:?}");
            assert!(writer.formed.capacity() <= 2 * limits::WRITE_GATHER);
        }
    }
}
