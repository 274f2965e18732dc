//! Files as a device: its address space is the bytes of one output file. This is how `reshard` writes partitions
//! through the same pipeline that loads them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::host::ThreadQueue;
use super::{Device, Queue, RawCopy};
use crate::error::{Error, Result};
use crate::stride::{bytes_moved, for_each_run};

/// One output file that copies land in.
#[derive(Debug)]
pub(crate) struct FileDevice {
    path: PathBuf,
    file: Arc<File>,
}

impl FileDevice {
    /// A device over a file that is open for writing.
    pub(crate) fn new(path: PathBuf, file: Arc<File>) -> FileDevice {
        FileDevice { path, file }
    }
}

impl Device for FileDevice {
    fn queue(&self) -> Result<Option<Box<dyn Queue>>> {
        let (path, file) = (self.path.clone(), Arc::clone(&self.file));
        let mut packed = Vec::new();
        Ok(Some(Box::new(ThreadQueue::new("shardlift-write", move |copy| write(copy, &file, &path, &mut packed))?)))
    }
}

/// Writes one copy, with one system call if its destination is contiguous.
fn write(copy: &RawCopy, file: &File, path: &PathBuf, packed: &mut Vec<u8>) -> Result<()> {
    let failed =
        |error, offset: u64, bytes: u64| Error::io("cannot write", path, error).with_bytes(offset, offset + bytes);
    let run = |offset: u64| {
        // SAFETY: `Queue::submit`'s caller keeps the source readable and unwritten until the copy is done.
        unsafe { std::slice::from_raw_parts(copy.src.add(offset as usize), copy.run as usize) }
    };
    let mut expected = 0;
    let mut dense = true;
    for_each_run(&copy.loops, 0, 0, &mut |_, dst| {
        dense &= dst == expected;
        expected = dst + copy.run;
    });
    if dense {
        packed.clear();
        packed.reserve(bytes_moved(&copy.loops, copy.run) as usize);
        for_each_run(&copy.loops, 0, 0, &mut |src, _| packed.extend_from_slice(run(src)));
        return file.write_all_at(packed, copy.dst).map_err(|error| failed(error, copy.dst, packed.len() as u64));
    }
    let mut outcome = Ok(());
    for_each_run(&copy.loops, 0, 0, &mut |src, dst| {
        if outcome.is_ok() {
            let offset = copy.dst + dst;
            outcome = file.write_all_at(run(src), offset).map_err(|error| failed(error, offset, copy.run));
        }
    });
    outcome
}
