//! The one error type: what went wrong and where.

#![forbid(unsafe_code)]

use std::error::Error as StdError;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

use crate::extent::Rank;

/// The result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error, one pointer wide: its [kind](Error::kind), a message, the [place](Error::at) as far as it is known,
/// and what was expected and found where there is such a pair.
///
/// It displays as one short line in a fixed order: what, then file, tensor, bytes, rank.
pub struct Error(Box<Inner>);

const _: () = assert!(size_of::<Error>() == size_of::<usize>());

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    rule: Option<&'static str>,
    message: String,
    at: At,
    expected: Option<String>,
    found: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Where an error happened: as much as was known at the place that noticed it and its callers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct At {
    /// The file, as it was opened.
    pub file: Option<PathBuf>,
    /// The tensor's name.
    pub tensor: Option<String>,
    /// The byte range `from..to` of the file.
    pub bytes: Option<(u64, u64)>,
    /// The rank whose partition it concerns.
    pub rank: Option<Rank>,
}

/// What kind of failure an [`Error`] is. The command line derives its exit status from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The plan breaks one of its invariants: a gap, an overlap, a range outside its tensor.
    Audit,
    /// The load was cancelled.
    Cancelled,
    /// A file is not the one whose header was parsed: another inode, size or time of change.
    Changed,
    /// The device or its driver is missing or refused an operation.
    Device,
    /// The destination does not fit the memory of the device.
    DeviceMemory,
    /// A file breaks a rule of the safetensors format; the source is a [`FormatError`](crate::format::FormatError).
    Format,
    /// The checkpoint breaks a rule of its index or of the directory layout.
    Index,
    /// The operating system refused an operation on a file.
    Io,
    /// What landed differs from what is on disk.
    Mismatch,
    /// The model, file or tensor is not there.
    NotFound,
    /// A thread of the load panicked.
    Panicked,
    /// Another rank of the group is missing, gone or silent, or does not do what the others do.
    Peer,
    /// The rules do not fit the checkpoint or the mesh.
    Rules,
    /// A read did not finish within the stall bound.
    Stalled,
    /// A file ended before the bytes that its header promises.
    Truncated,
    /// This build or platform cannot do what was asked.
    Unsupported,
    /// An argument that makes no sense.
    Usage,
}

impl ErrorKind {
    /// Every kind, for those who read names of them.
    const ALL: [ErrorKind; 17] = [
        ErrorKind::Audit,
        ErrorKind::Cancelled,
        ErrorKind::Changed,
        ErrorKind::Device,
        ErrorKind::DeviceMemory,
        ErrorKind::Format,
        ErrorKind::Index,
        ErrorKind::Io,
        ErrorKind::Mismatch,
        ErrorKind::NotFound,
        ErrorKind::Panicked,
        ErrorKind::Peer,
        ErrorKind::Rules,
        ErrorKind::Stalled,
        ErrorKind::Truncated,
        ErrorKind::Unsupported,
        ErrorKind::Usage,
    ];

    /// The kind of this [`name`](ErrorKind::name).
    pub(crate) fn named(name: &str) -> Option<ErrorKind> {
        ErrorKind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The kind in lower case with dashes, as in the JSON of the command line.
    pub const fn name(self) -> &'static str {
        match self {
            ErrorKind::Audit => "audit",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::Changed => "changed",
            ErrorKind::Device => "device",
            ErrorKind::DeviceMemory => "device-memory",
            ErrorKind::Format => "format",
            ErrorKind::Index => "index",
            ErrorKind::Io => "io",
            ErrorKind::Mismatch => "mismatch",
            ErrorKind::NotFound => "not-found",
            ErrorKind::Panicked => "panicked",
            ErrorKind::Peer => "peer",
            ErrorKind::Rules => "rules",
            ErrorKind::Stalled => "stalled",
            ErrorKind::Truncated => "truncated",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::Usage => "usage",
        }
    }
}

impl Error {
    /// An error of this kind; `message` is lower case and names no place.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            rule: None,
            message: message.into(),
            at: At::default(),
            expected: None,
            found: None,
            source: None,
        }))
    }

    /// An error of the operating system while doing `what` with `file`.
    pub fn io(what: impl Into<String>, file: impl Into<PathBuf>, source: std::io::Error) -> Error {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("{}: {source}", what.into())).with_file(file).with_source(source)
    }

    /// What a panic of one of the load's threads becomes.
    pub(crate) fn panicked(payload: Box<dyn std::any::Any + Send>) -> Error {
        let message = match payload.downcast::<String>() {
            Ok(message) => *message,
            Err(payload) => payload.downcast_ref::<&str>().map_or("no message", |message| *message).into(),
        };
        Error::new(ErrorKind::Panicked, format!("a thread of the load panicked: {message}"))
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The rule that was broken, in lower case with dashes, for instance `"header-too-large"`; `None` if it is not
    /// a matter of rules.
    pub fn rule(&self) -> Option<&'static str> {
        self.0.rule
    }

    /// What went wrong, without the place.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Where it went wrong.
    pub fn at(&self) -> &At {
        &self.0.at
    }

    /// What the broken rule expected.
    pub fn expected(&self) -> Option<&str> {
        self.0.expected.as_deref()
    }

    /// What was found instead.
    pub fn found(&self) -> Option<&str> {
        self.0.found.as_deref()
    }

    /// Puts what it is about before the message.
    pub(crate) fn in_context(mut self, context: impl fmt::Display) -> Error {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// Names the broken rule.
    pub fn with_rule(mut self, rule: &'static str) -> Error {
        self.0.rule = Some(rule);
        self
    }

    /// Adds what was expected and what was found.
    pub fn with_expected(mut self, expected: impl ToString, found: impl ToString) -> Error {
        self.0.expected = Some(expected.to_string());
        self.0.found = Some(found.to_string());
        self
    }

    /// Adds the cause.
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// Names the file, unless a place nearer to the failure did.
    pub fn with_file(mut self, file: impl Into<PathBuf>) -> Error {
        self.0.at.file.get_or_insert_with(|| file.into());
        self
    }

    /// Names the tensor, unless a place nearer to the failure did.
    pub fn with_tensor(mut self, tensor: impl Into<String>) -> Error {
        self.0.at.tensor.get_or_insert_with(|| tensor.into());
        self
    }

    /// Names the byte range of the file, unless a place nearer to the failure did.
    pub fn with_bytes(mut self, from: u64, to: u64) -> Error {
        self.0.at.bytes.get_or_insert((from, to));
        self
    }

    /// Names the rank, unless a place nearer to the failure did.
    pub fn with_rank(mut self, rank: Rank) -> Error {
        self.0.at.rank.get_or_insert(rank);
        self
    }

    /// The file, if it is known.
    pub fn file(&self) -> Option<&Path> {
        self.0.at.file.as_deref()
    }

    /// The tensor, if it is known.
    pub fn tensor(&self) -> Option<&str> {
        self.0.at.tensor.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&OneLine(&*self.0), f)
    }
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind: _, rule: _, message, at, expected, found, source: _ } = self;
        f.write_str(message)?;
        if let (Some(expected), Some(found)) = (expected, found) {
            write!(f, ": expected {expected}, found {found}")?;
        }
        if let Some(file) = &at.file {
            write!(f, ", file {}", file.display())?;
        }
        if let Some(tensor) = &at.tensor {
            write!(f, ", tensor {tensor}")?;
        }
        if let Some((from, to)) = at.bytes {
            write!(f, ", bytes {from}..{to}")?;
        }
        if let Some(rank) = at.rank {
            write!(f, ", rank {rank}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// Shows something on one line: its control characters are escaped, because names that come from files must neither end
/// a line nor speak to a terminal.
#[derive(Debug, Clone, Copy)]
pub struct OneLine<T>(pub T);

impl<T: fmt::Display> fmt::Display for OneLine<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(char::is_control) {
            match part.char_indices().next_back() {
                Some((at, control)) if control.is_control() => {
                    write!(self.0, "{}{}", &part[..at], control.escape_default())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_end_the_line() {
        let error = Error::new(ErrorKind::Format, "x").with_tensor("a\nb\u{1b}[31m\u{9b}\u{e9}").with_file("c\rd");
        assert_eq!(error.to_string(), r"x, file c\rd, tensor a\nb\u{1b}[31m\u{9b}é");
        assert_eq!(error.tensor(), Some("a\nb\u{1b}[31m\u{9b}\u{e9}"));
    }

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        assert!(ErrorKind::ALL.into_iter().all(|kind| ErrorKind::named(kind.name()) == Some(kind)));
        // The last one of the declaration; with it the list is as long as there are kinds.
        assert_eq!(ErrorKind::ALL.len(), ErrorKind::Usage as usize + 1);
    }

    #[test]
    fn one_line_in_a_fixed_order() {
        let error = Error::new(ErrorKind::Truncated, "file ended early")
            .with_rank(Rank(2))
            .with_bytes(8, 16)
            .with_tensor("w")
            .with_file("a.safetensors")
            .with_expected(16, 12);
        assert_eq!(
            error.to_string(),
            "file ended early: expected 16, found 12, file a.safetensors, tensor w, bytes 8..16, rank 2"
        );
    }

    #[test]
    fn the_nearest_place_wins() {
        let error = Error::new(ErrorKind::Io, "x").with_file("near").with_file("far");
        assert_eq!(error.file(), Some(Path::new("near")));
    }
}
