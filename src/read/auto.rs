//! The engine that suits a plan: by file system, page cache and size, and the reason in words.

use super::EngineChoice;
use crate::extent::FileId;
use crate::limits::{self, AUTO_FILES, AUTO_RESIDENT, AUTO_SMALL};
use crate::plan::Plan;
use crate::source::{FileSystem, SourceFile};

/// What to read with, and why.
pub(crate) type Choice = (EngineChoice, String);

/// Chooses an engine for what this process reads of a plan: cuFile only with a reason why that is `faster`, and past the
/// page cache; then also what else, since looking again would find in the page cache what a look brings there. Looks at a few of
/// its files; a file that cannot be opened is no reason to fail here, the load itself will say so.
pub(crate) fn choose(plan: &Plan, faster: Option<String>) -> (Choice, Option<Choice>) {
    let bytes = plan.storage_bytes();
    if bytes < AUTO_SMALL {
        let reason = format!("{bytes} bytes to read: buffered reads have the least overhead");
        return ((EngineChoice::Pread, reason), None);
    }
    judge(seen(plan, true), faster)
}

/// The engine of much to read from the plan's files, if nothing of them was in the page cache.
pub(crate) fn choose_cold(plan: &Plan) -> EngineChoice {
    judge(seen(plan, false), None).0.0
}

/// What is seen of a few of a plan's files: the file system, and with a further look the share that the page cache holds, if
/// that is `asked` and known; nothing where the file cannot be read past it.
fn seen(plan: &Plan, asked: bool) -> impl Iterator<Item = (FileSystem, impl FnOnce() -> Option<Option<f64>>)> {
    let files = plan.checkpoint().files();
    let step = files.len().div_ceil(AUTO_FILES).max(1);
    files.iter().enumerate().step_by(step).filter_map(move |(id, planned)| {
        let file = SourceFile::open(&planned.path).ok()?;
        let file_system = file.file_system().unwrap_or(FileSystem::Unknown(0));
        let look = move || {
            file.direct(limits::DIRECT_ALIGNMENT)?;
            Some(if asked { file.resident_fraction(&ranges(plan, FileId(id as u32))) } else { None })
        };
        Some((file_system, look))
    })
}

/// Chooses by what is seen of files.
fn judge<L: FnOnce() -> Option<Option<f64>>>(
    files: impl Iterator<Item = (FileSystem, L)>,
    faster: Option<String>,
) -> (Choice, Option<Choice>) {
    let (mut resident, mut otherwise) = (Vec::new(), None);
    let mut name = "";
    for (file_system, look) in files {
        name = file_system.name();
        let buffered = match file_system {
            FileSystem::Local(_) => None,
            FileSystem::Memory(_) => return ((EngineChoice::Pread, format!("{name}: the files are in memory")), None),
            FileSystem::Network(_) => Some(format!("{name}: a file system of another machine")),
            FileSystem::Unknown(magic) => Some(format!("file system {magic:#x} is not known")),
        };
        // What was measured there counts more than what it is.
        if let Some(reason) = buffered {
            if faster.is_none() {
                return ((EngineChoice::Pread, reason), None);
            }
            otherwise.get_or_insert((EngineChoice::Pread, reason));
        }
        match look() {
            None => return ((EngineChoice::Pread, format!("{name} refuses O_DIRECT")), None),
            Some(share) => resident.extend(share),
        }
    }
    let share = if resident.is_empty() { 0.0 } else { resident.iter().sum::<f64>() / resident.len() as f64 };
    let percent = (share * 100.0).round();
    let cached = format!("{name}, {percent}% in the page cache");
    let uring = (EngineChoice::Uring, format!("{cached}: reads past it"));
    match faster {
        _ if share >= AUTO_RESIDENT => ((EngineChoice::Pread, cached), None),
        Some(reason) => ((EngineChoice::Cufile, format!("{cached}: {reason}")), Some(otherwise.unwrap_or(uring))),
        None => (uring, None),
    }
}

/// The data of a file, as one range.
fn ranges(plan: &Plan, id: FileId) -> [(u64, u64); 1] {
    let planned = plan.file(id);
    [(planned.data_start, planned.identity.size)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen for one file, of which the page cache holds this share, or which refuses O_DIRECT.
    fn chosen(file_system: FileSystem, look: Option<f64>, faster: bool) -> Choice {
        let files = [(file_system, || look.map(Some))];
        let (choice, otherwise) = judge(files.into_iter(), faster.then(|| "measured".into()));
        // Where it fails, what would have been chosen without.
        if let Some(otherwise) = otherwise {
            assert_eq!((choice.0, otherwise), (EngineChoice::Cufile, chosen(file_system, look, false)));
        }
        choice
    }

    #[test]
    fn what_was_measured_counts_wherever_the_files_are_but_in_memory() {
        let systems = [FileSystem::Local("ext4"), FileSystem::Network("lustre"), FileSystem::Unknown(0x18)];
        for file_system in systems {
            let (choice, reason) = chosen(file_system, Some(0.25), true);
            assert_eq!((choice, reason.contains("25% in the page cache: measured")), (EngineChoice::Cufile, true));
            // What is in the page cache is read from there.
            let (choice, reason) = chosen(file_system, Some(0.75), true);
            assert_eq!((choice, reason.contains("75% in the page cache")), (EngineChoice::Pread, true), "{reason}");
            assert_eq!(chosen(file_system, None, true).0, EngineChoice::Pread);
        }
        assert_eq!(chosen(FileSystem::Memory("tmpfs"), Some(0.0), true).0, EngineChoice::Pread);
    }

    #[test]
    fn without_a_measurement_files_of_other_machines_are_read_through_the_page_cache() {
        let engine = |file_system, look| chosen(file_system, look, false);
        assert_eq!(engine(FileSystem::Local("xfs"), Some(0.0)).0, EngineChoice::Uring);
        assert_eq!(engine(FileSystem::Local("xfs"), Some(0.5)).0, EngineChoice::Pread);
        assert_eq!(engine(FileSystem::Local("xfs"), None), (EngineChoice::Pread, "xfs refuses O_DIRECT".into()));
        for other in [FileSystem::Network("nfs"), FileSystem::Unknown(7)] {
            assert_eq!(engine(other, Some(0.0)).0, EngineChoice::Pread);
        }
    }
}
