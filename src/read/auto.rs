//! The engine that suits a plan: by file system, page cache and size, and the reason in words.

use super::EngineChoice;
use crate::extent::FileId;
use crate::limits::{self, AUTO_FILES, AUTO_RESIDENT, AUTO_SMALL};
use crate::plan::Plan;
use crate::source::{FileSystem, SourceFile};

/// Chooses an engine for what this process reads of a plan: cuFile only with a reason why that is `faster`, and past the
/// page cache. Looks at a few of its files; a file that cannot be opened is no reason to fail here, the load itself will say
/// so.
pub(crate) fn choose(plan: &Plan, faster: Option<String>) -> (EngineChoice, String) {
    let bytes = plan.storage_bytes();
    if bytes < AUTO_SMALL {
        return (EngineChoice::Pread, format!("{bytes} bytes to read: buffered reads have the least overhead"));
    }
    let files = plan.checkpoint().files();
    let step = files.len().div_ceil(AUTO_FILES).max(1);
    let mut resident = Vec::new();
    let mut name = "";
    for (id, planned) in files.iter().enumerate().step_by(step) {
        let Ok(file) = SourceFile::open(&planned.path) else { continue };
        let file_system = file.file_system().unwrap_or(FileSystem::Unknown(0));
        name = file_system.name();
        match file_system {
            FileSystem::Local(_) => {}
            FileSystem::Memory(_) => return (EngineChoice::Pread, format!("{name}: the files are in memory")),
            FileSystem::Network(_) => {
                if let Some(reason) = faster {
                    return (EngineChoice::Cufile, format!("{name}: {reason}"));
                }
                return (EngineChoice::Pread, format!("{name}: a file system of another machine"));
            }
            FileSystem::Unknown(magic) => {
                return (EngineChoice::Pread, format!("file system {magic:#x} is not known"));
            }
        }
        if file.direct(limits::DIRECT_ALIGNMENT).is_none() {
            return (EngineChoice::Pread, format!("{name} refuses O_DIRECT"));
        }
        resident.extend(file.resident_fraction(&ranges(plan, FileId(id as u32))));
    }
    let share = if resident.is_empty() { 0.0 } else { resident.iter().sum::<f64>() / resident.len() as f64 };
    let percent = (share * 100.0).round();
    if share >= AUTO_RESIDENT {
        return (EngineChoice::Pread, format!("{name}, {percent}% in the page cache"));
    }
    let cached = format!("{name}, {percent}% in the page cache");
    match faster {
        Some(reason) => (EngineChoice::Cufile, format!("{cached}: {reason}")),
        None => (EngineChoice::Uring, format!("{cached}: reads past it")),
    }
}

/// The data of a file, as one range.
fn ranges(plan: &Plan, id: FileId) -> [(u64, u64); 1] {
    let planned = plan.file(id);
    [(planned.data_start, planned.identity.size)]
}
