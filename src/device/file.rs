//! Files as a device: its address space is the bytes of one output file. This is how `reshard` writes partitions
//! through the same pipeline that loads them.

use std::any::Any;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::host::ThreadQueue;
use super::{Allocation, Device, Queue, RawCopy};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::stride::for_each_run;

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

    fn queue(&self) -> Result<Option<Box<dyn Queue>>> {
        let mut writer =
            Writer { path: self.path.clone(), file: Arc::clone(&self.file), gathered: Vec::new(), start: 0 };
        Ok(Some(Box::new(ThreadQueue::new("shardlift-write", move |copy| writer.write(copy))?)))
    }
}

/// Writes long runs from where they lie, and gathers short ones that are neighbours in the file.
#[derive(Debug)]
struct Writer {
    path: PathBuf,
    file: Arc<File>,
    gathered: Vec<u8>,
    /// Where in the file what is gathered begins.
    start: u64,
}

impl Writer {
    fn write(&mut self, copy: &RawCopy) -> Result<()> {
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
    use crate::stride::{Loop, Loops};

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
            let mut writer = Writer { path: "out".into(), file: Arc::clone(&file), gathered: Vec::new(), start: 0 };
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
}
