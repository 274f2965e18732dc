//! One local file: opened once, read at positions, compared with the identity it had when its header was parsed.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::source::system::{self, DirectAlignment, DirectReads, FileSystem};

/// What makes a file the same file: compared at every further open and after the last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The device number of the file system.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
    /// The size in bytes.
    pub size: u64,
    /// The time of the last change of the contents, in nanoseconds since 1970.
    pub modified_ns: i128,
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity { device, inode, size, modified_ns: _ } = self;
        write!(f, "inode {device}:{inode} of {size} bytes")
    }
}

/// An open file.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    file: File,
    identity: Identity,
    /// A second descriptor, which reads past the page cache; `None` inside where the file does not allow that. Stays
    /// open after a refusal: reads of it may be queued.
    direct: OnceLock<Option<File>>,
    direct_refused: AtomicBool,
    forget_pages: AtomicBool,
}

impl SourceFile {
    /// Opens `path` for reading and takes its identity from the descriptor.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] as the system says; [`ErrorKind::Usage`] if it is no regular file.
    pub fn open(path: impl Into<PathBuf>) -> Result<SourceFile> {
        let path = path.into();
        // Opening a FIFO would wait for a writer, so the type is asked for first.
        let metadata = std::fs::metadata(&path).map_err(|error| Error::io("cannot open", &path, error))?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::Usage, "not a regular file").with_file(path));
        }
        let file = File::open(&path).map_err(|error| Error::io("cannot open", &path, error))?;
        let metadata = file.metadata().map_err(|error| Error::io("cannot stat", &path, error))?;
        Ok(SourceFile {
            identity: Identity::of(&metadata),
            path,
            file,
            direct: OnceLock::new(),
            direct_refused: AtomicBool::new(false),
            forget_pages: AtomicBool::new(false),
        })
    }

    /// Opens a file once more that had this identity when its header was parsed.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`] if it is another file by now or no regular one, [`ErrorKind::Truncated`] if it is shorter,
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] as the system says.
    pub fn reopen(path: impl Into<PathBuf>, identity: Identity) -> Result<SourceFile> {
        let file = SourceFile::open(path).map_err(|error| match (error.kind(), error.file()) {
            (ErrorKind::Usage, Some(path)) => {
                Error::new(ErrorKind::Changed, "file is no regular file any more").with_file(path)
            }
            _ => error,
        })?;
        file.verify_identity(identity)?;
        Ok(file)
    }

    /// The path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The identity that the descriptor had when it was opened.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills `into` with the bytes from `offset` on: short reads are continued, interrupted ones repeated.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] if the file ends before, [`ErrorKind::Io`] as the system says; both name the file and
    /// the bytes.
    pub fn read_exact_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        let mut done = 0;
        while done < into.len() {
            let at = offset.saturating_add(done as u64);
            match self.file.read_at(&mut into[done..], at) {
                Ok(0) => {
                    return Err(Error::new(ErrorKind::Truncated, "file ends before the bytes that were asked for")
                        .with_expected(format!("{} bytes", into.len()), format!("{done} bytes"))
                        .with_file(&self.path)
                        .with_bytes(offset, end));
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == IoKind::Interrupted => {}
                Err(error) => return Err(Error::io("cannot read", &self.path, error).with_bytes(at, end)),
            }
        }
        Ok(())
    }

    /// Compares what the descriptor says now with `expected`.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] if it is the same file and shorter, else [`ErrorKind::Changed`] if anything differs.
    pub fn verify_identity(&self, expected: Identity) -> Result<()> {
        let metadata = self.file.metadata().map_err(|error| Error::io("cannot stat", &self.path, error))?;
        compare(&self.path, expected, Identity::of(&metadata))
    }

    /// What a read comes to of a page that storage does not give although the file had it when it was opened: to nothing where
    /// the file is shorter by now, or was for a moment, as one that is written anew.
    ///
    /// # Errors
    /// Where it has not changed, that of storage that fails; or the system does not say.
    pub(crate) fn without_page(&self) -> std::io::Result<()> {
        match Identity::of(&self.file.metadata()?) == self.identity {
            true => Err(rustix::io::Errno::IO.into()),
            false => Ok(()),
        }
    }

    /// Checks that a path names a file with this identity, unchanged.
    ///
    /// # Errors
    /// As [`verify_identity`](SourceFile::verify_identity); a path that is gone is [`ErrorKind::Changed`] too.
    pub fn verify_path(path: &Path, expected: Identity) -> Result<()> {
        match std::fs::metadata(path) {
            Ok(metadata) => compare(path, expected, Identity::of(&metadata)),
            Err(error) if error.kind() == IoKind::NotFound => Err(Error::new(ErrorKind::Changed, "file was removed")
                .with_expected(expected, "nothing")
                .with_file(path)
                .with_source(error)),
            Err(error) => Err(Error::io("cannot stat", path, error)),
        }
    }

    /// The kind of file system that the file lies on.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the system does not say.
    pub fn file_system(&self) -> Result<FileSystem> {
        system::file_system(&self.file).map_err(|error| Error::io("cannot statfs", &self.path, error))
    }

    /// What O_DIRECT reads of this file must be multiples of; `None` if the system does not say or refuses such reads.
    pub fn direct_alignment(&self) -> Option<DirectAlignment> {
        match system::direct_reads(&self.file) {
            DirectReads::Of(alignment) => Some(alignment),
            DirectReads::Unknown | DirectReads::Refused => None,
        }
    }

    /// Opens the same file once more, past the page cache, and compares its identity.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the file system or platform has no such reads, [`ErrorKind::Changed`] or
    /// [`ErrorKind::Truncated`] if the path names another file by now, else as the system says.
    pub fn open_direct(&self) -> Result<File> {
        let file = system::open_direct(&self.path).map_err(|error| match error.kind() {
            IoKind::InvalidInput | IoKind::Unsupported => {
                Error::new(ErrorKind::Unsupported, "the file system refuses O_DIRECT")
                    .with_file(&self.path)
                    .with_source(error)
            }
            _ => Error::io("cannot open with O_DIRECT", &self.path, error),
        })?;
        let metadata = file.metadata().map_err(|error| Error::io("cannot stat", &self.path, error))?;
        compare(&self.path, self.identity, Identity::of(&metadata))?;
        Ok(file)
    }

    /// A descriptor for reads past the page cache whose offsets, lengths and addresses are multiples of `alignment`, if
    /// the file allows them. Opened at the first call, and shared.
    pub fn direct(&self, alignment: u64) -> Option<&File> {
        let open = || {
            let told = system::direct_reads(&self.file);
            if told.may_be(alignment) { self.open_direct().ok() } else { None }
        };
        self.direct.get_or_init(open).as_ref().filter(|_| !self.direct_refused.load(Ordering::Relaxed))
    }

    /// From now on there is no descriptor for reads past the page cache: one was refused.
    pub fn refuse_direct(&self) {
        self.direct_refused.store(true, Ordering::Relaxed);
    }

    /// The share, 0 to 1, of these byte ranges `(from, to)` that the page cache holds, from a few samples spread over
    /// them; `None` if the system does not say or there are no bytes.
    pub fn resident_fraction(&self, ranges: &[(u64, u64)]) -> Option<f64> {
        let total: u64 = ranges.iter().map(|&(from, to)| to.saturating_sub(from)).sum();
        let samples = SAMPLES.min(total);
        let mut resident = 0;
        // Sample i lies in the middle of the i-th of equal parts; ranges are walked once, in their order.
        let mut ranges = ranges.iter().copied();
        let (mut from, mut to, mut before) = (0, 0, 0);
        for i in 0..samples {
            let wanted = (u128::from(total) * u128::from(2 * i + 1) / u128::from(2 * samples)) as u64;
            while wanted - before >= u64::saturating_sub(to, from) {
                before += u64::saturating_sub(to, from);
                (from, to) = ranges.next()?;
            }
            resident += u64::from(system::is_resident(&self.file, from + (wanted - before))?);
        }
        (samples > 0).then(|| resident as f64 / samples as f64)
    }

    /// When the file is closed, advises the system to forget its cached pages. All at once, because advice about a part
    /// of a large folio (the page cache's unit) does nothing; those that are mapped at that moment stay.
    pub fn forget_pages_when_closed(&self) {
        self.forget_pages.store(true, Ordering::Relaxed);
    }
}

impl Drop for SourceFile {
    fn drop(&mut self) {
        if self.forget_pages.load(Ordering::Relaxed) {
            // Advice: where there is none to give, the pages stay.
            let _ = system::forget_pages(&self.file);
        }
    }
}

fn compare(path: &Path, expected: Identity, found: Identity) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let same = (found.device, found.inode) == (expected.device, expected.inode);
    let error = if same && found.size < expected.size {
        Error::new(ErrorKind::Truncated, "file became shorter since its header was parsed")
            .with_expected(format!("{} bytes", expected.size), format!("{} bytes", found.size))
            .with_bytes(found.size, expected.size)
    } else {
        let error = Error::new(ErrorKind::Changed, "file changed since its header was parsed");
        let modified = Identity { modified_ns: expected.modified_ns, ..found } == expected;
        match modified {
            true => error.with_expected("no change", Modified(found.modified_ns - expected.modified_ns)),
            false => error.with_expected(expected, found),
        }
    };
    Err(error.with_file(path))
}

/// How much later a file was modified, in nanoseconds.
struct Modified(i128);

impl fmt::Display for Modified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = Duration::from_nanos(u64::try_from(self.0.unsigned_abs()).unwrap_or(u64::MAX));
        write!(f, "modified {by:?} {}", if self.0 > 0 { "later" } else { "earlier" })
    }
}

/// Offsets that [`SourceFile::resident_fraction`] looks at: enough to tell warm from cold, few enough to cost
/// microseconds.
const SAMPLES: u64 = 32;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file_of(bytes: &[u8]) -> (tempfile::NamedTempFile, SourceFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let source = SourceFile::open(file.path()).unwrap();
        (file, source)
    }

    #[test]
    fn reads_are_exact_or_name_file_and_bytes() {
        let (file, source) = file_of(b"0123456789");
        let mut buffer = [0; 4];
        source.read_exact_at(&mut buffer, 6).unwrap();
        assert_eq!(&buffer, b"6789");
        let error = source.read_exact_at(&mut buffer, 8).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated);
        assert_eq!((error.file(), error.at().bytes), (Some(file.path()), Some((8, 12))));
        assert_eq!(error.found(), Some("2 bytes"));
    }

    #[test]
    fn changes_are_noticed() {
        let (mut file, source) = file_of(b"0123456789");
        source.verify_identity(source.identity()).unwrap();
        SourceFile::verify_path(file.path(), source.identity()).unwrap();
        file.as_file().set_len(4).unwrap();
        let error = source.verify_identity(source.identity()).unwrap_err();
        assert_eq!((error.kind(), error.at().bytes), (ErrorKind::Truncated, Some((4, 10))));
        file.write_all(b"and more than before").unwrap();
        assert_eq!(source.verify_identity(source.identity()).unwrap_err().kind(), ErrorKind::Changed);
    }

    #[test]
    fn what_changed_is_told_in_words() {
        let (file, source) = file_of(b"0123456789");
        let times = file.as_file().metadata().unwrap().modified().unwrap();
        file.as_file().set_modified(times + Duration::from_millis(1500)).unwrap();
        let error = source.verify_identity(source.identity()).unwrap_err();
        assert_eq!((error.kind(), error.found()), (ErrorKind::Changed, Some("modified 1.5s later")));
    }

    #[test]
    fn a_path_that_names_another_file_is_noticed() {
        let (file, source) = file_of(b"0123456789");
        let other = tempfile::NamedTempFile::new_in(file.path().parent().unwrap()).unwrap();
        std::fs::rename(other.path(), file.path()).unwrap();
        source.verify_identity(source.identity()).unwrap();
        assert_eq!(SourceFile::verify_path(file.path(), source.identity()).unwrap_err().kind(), ErrorKind::Changed);
        std::fs::remove_file(file.path()).unwrap();
        assert_eq!(SourceFile::verify_path(file.path(), source.identity()).unwrap_err().kind(), ErrorKind::Changed);
        std::fs::create_dir(file.path()).unwrap();
        assert_eq!(SourceFile::reopen(file.path(), source.identity()).unwrap_err().kind(), ErrorKind::Changed);
        std::fs::remove_dir(file.path()).unwrap();
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(SourceFile::open(folder.path()).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(SourceFile::open(folder.path().join("x")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_was_just_written_is_resident_where_the_system_says() {
        let (_file, source) = file_of(&vec![1; 1 << 20]);
        source.file_system().unwrap();
        if let Some(share) = source.resident_fraction(&[(0, 10), (20, 20), (4096, 1 << 20)]) {
            assert!((0.0..=1.0).contains(&share), "{share}");
        }
        assert_eq!(source.resident_fraction(&[(5, 5)]), None);
        if let Ok(direct) = source.open_direct() {
            assert_eq!(Identity::of(&direct.metadata().unwrap()), source.identity());
        }
    }
}
