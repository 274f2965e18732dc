//! The files of a load: opened at first use, few at a time, and all compared again at the end.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::Result;
use crate::extent::FileId;
use crate::limits;
use crate::plan::Plan;
use crate::source::SourceFile;
use crate::sync::lock;

/// Files by id. A request holds its file; those that no request holds may be closed to make room for others.
#[derive(Debug)]
pub(super) struct Files {
    plan: Plan,
    /// Whether the page cache should forget a file when it is closed.
    forget_pages: bool,
    slots: Vec<Slot>,
    /// Open files, the one opened first in front.
    open: Mutex<VecDeque<FileId>>,
}

#[derive(Debug, Default)]
struct Slot {
    file: Mutex<Option<Arc<SourceFile>>>,
    /// Whether bytes of it are in destinations, or will be.
    used: AtomicBool,
}

impl Files {
    /// The files of a plan, some of which are in use already.
    pub(super) fn new(plan: &Plan, used: &[FileId], forget_pages: bool) -> Files {
        let slots: Vec<Slot> = plan.checkpoint().files().iter().map(|_| Slot::default()).collect();
        for id in used {
            slots[id.0 as usize].used.store(true, Ordering::Relaxed);
        }
        Files { plan: plan.clone(), forget_pages, slots, open: Mutex::default() }
    }

    /// A file, opened and compared with the identity that it had when its header was parsed.
    pub(super) fn get(&self, id: FileId) -> Result<Arc<SourceFile>> {
        let file = {
            let slot = &self.slots[id.0 as usize];
            let mut opened = lock(&slot.file);
            if let Some(file) = &*opened {
                return Ok(Arc::clone(file));
            }
            let planned = self.plan.file(id);
            let _span = planned.span().entered();
            let file = Arc::new(SourceFile::reopen(&planned.path, planned.identity)?);
            if self.forget_pages {
                file.forget_pages_when_closed();
            }
            slot.used.store(true, Ordering::Relaxed);
            *opened = Some(Arc::clone(&file));
            file
        };
        // With no slot locked, for two threads may make room for each other's file.
        let spare = {
            let mut open = lock(&self.open);
            open.push_back(id);
            if open.len() > limits::OPEN_FILES { open.pop_front() } else { None }
        };
        if let Some(spare) = spare {
            lock(&self.slots[spare.0 as usize].file).take();
        }
        Ok(file)
    }

    /// Compares every file that was used with the identity that it had when its header was parsed: its path, and its
    /// descriptor if that is still open.
    pub(super) fn verify(&self) -> Result<()> {
        for (planned, slot) in self.plan.checkpoint().files().iter().zip(&self.slots) {
            if let Some(file) = &*lock(&slot.file) {
                file.verify_identity(planned.identity)?;
            }
            if slot.used.load(Ordering::Relaxed) {
                SourceFile::verify_path(&planned.path, planned.identity)?;
            }
        }
        Ok(())
    }
}
