//! What goes to stdout and how the process ends: text or exactly one JSON object, and the exit status.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use shardlift::{Error, ErrorKind, OneLine};

use crate::plan::Planned;

/// The version of every JSON object.
const VERSION: u32 = 1;

/// The output of one command.
#[derive(Debug)]
pub(crate) struct Output {
    command: &'static str,
    json: bool,
    stdout: BufWriter<Stdout>,
    written: io::Result<()>,
    warnings: Warnings,
}

/// Where it goes.
#[derive(Debug)]
enum Stdout {
    Everybodys(io::Stdout),
    Own(&'static File),
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stdout::Everybodys(stdout) => stdout.write(bytes),
            Stdout::Own(stdout) => stdout.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stdout::Everybodys(stdout) => stdout.flush(),
            Stdout::Own(stdout) => stdout.flush(),
        }
    }
}

/// The process's stdout, if it was taken from everybody else.
static OWN: OnceLock<File> = OnceLock::new();

/// What libraries print goes to stderr from now on, as cuFile does when it cannot open: an object is all that stdout gets.
pub(crate) fn keep_stdout() {
    // Where stdout is closed nobody reads it, and without stderr it stays everybody's.
    if let Ok(own) = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)
        && rustix::stdio::dup2_stdout(io::stderr()).is_ok()
    {
        let _ = OWN.set(own.into());
    }
}

/// What a command adds to its object.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Answer {
    Fields(Map<String, Value>),
    /// Too large for a tree of values.
    Planned(Box<Planned>),
}

/// The object of a command.
#[derive(Serialize)]
struct Object<'a> {
    version: u32,
    command: &'static str,
    ok: bool,
    warnings: &'a [String],
    #[serde(flatten)]
    answer: Option<&'a Answer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
}

/// An array that is written element by element.
pub(crate) struct Array<F>(pub(crate) F);

impl<F: Fn() -> I, I: IntoIterator<Item: Serialize>> Serialize for Array<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// What is odd but no error, from any thread of the command: on stderr at once, or in the object.
#[derive(Debug, Clone)]
pub(crate) struct Warnings {
    json: bool,
    told: Arc<Mutex<Vec<String>>>,
}

impl Warnings {
    pub(crate) fn warn(&self, warnings: &[String]) {
        for warning in warnings {
            if !self.json {
                note(format_args!("warning: {warning}"));
            }
            self.told().push(warning.clone());
        }
    }

    fn told(&self) -> MutexGuard<'_, Vec<String>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An error with what the exit status depends on besides its kind.
#[derive(Debug)]
pub(crate) struct Failure {
    error: Error,
    /// Whether tensor data was being read: from here on a missing file is no longer a wrong argument.
    started: bool,
    /// The signal that cancelled the load.
    signal: Option<i32>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, started: false, signal: None }
    }
}

impl Failure {
    /// An error after the load had started.
    pub(crate) fn started(error: Error) -> Failure {
        Failure { error, started: true, signal: None }
    }

    /// Names the signal that was behind it, if there was one.
    pub(crate) fn with_signal(self, signal: Option<i32>) -> Failure {
        Failure { signal, ..self }
    }

    /// What went wrong.
    pub(crate) fn error(&self) -> &Error {
        &self.error
    }

    fn status(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::Cancelled => match self.signal {
                Some(signal) => 128 + u8::try_from(signal).unwrap_or(2),
                None => 130,
            },
            ErrorKind::Rules | ErrorKind::Unsupported | ErrorKind::Usage => 2,
            ErrorKind::DeviceMemory => 4,
            ErrorKind::Device if !self.started => 4,
            ErrorKind::NotFound if !self.started => 2,
            // A file of the command line that does not open, as one that is not there; a read that failed has bytes.
            ErrorKind::Io if !self.started && self.error.file().is_some() && self.error.at().bytes.is_none() => 2,
            ErrorKind::Format | ErrorKind::Index if !self.started => 3,
            _ => 1,
        }
    }
}

impl Output {
    pub(crate) fn new(command: &'static str, json: bool) -> Output {
        let warnings = Warnings { json, told: Arc::default() };
        let stdout = OWN.get().map_or_else(|| Stdout::Everybodys(io::stdout()), Stdout::Own);
        Output { command, json, stdout: BufWriter::new(stdout), written: Ok(()), warnings }
    }

    /// One line of text; nothing with `--json`.
    pub(crate) fn line(&mut self, line: fmt::Arguments<'_>) {
        if !self.json && self.written.is_ok() {
            self.written = writeln!(self.stdout, "{}", OneLine(line));
        }
    }

    /// What is odd but no error.
    pub(crate) fn warn(&mut self, warnings: &[String]) {
        self.warnings.warn(warnings);
    }

    /// A handle for warnings from other threads.
    pub(crate) fn warnings(&self) -> Warnings {
        self.warnings.clone()
    }

    /// Writes the object or the error line, and gives the exit status.
    pub(crate) fn finish(mut self, result: Result<Answer, Failure>) -> u8 {
        let status = match &result {
            Ok(_) => 0,
            Err(failure) => failure.status(),
        };
        if self.json {
            let warnings = self.warnings.told();
            let object = object(self.command, &warnings, &result);
            self.written = serde_json::to_writer(&mut self.stdout, &object)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(self.stdout));
        } else if let Err(failure) = result {
            // What was printed before the error comes before it.
            self.written = self.written.and_then(|()| self.stdout.flush());
            note(format_args!("error: {}", failure.error));
        }
        match self.written.and_then(|()| self.stdout.flush()) {
            Ok(()) => status,
            // Who closed the pipe has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => status,
            Err(error) => {
                note(format_args!("error: write stdout: {error}"));
                status.max(1)
            }
        }
    }
}

fn object<'a>(command: &'static str, warnings: &'a [String], result: &'a Result<Answer, Failure>) -> Object<'a> {
    Object {
        version: VERSION,
        command,
        ok: result.is_ok(),
        warnings,
        answer: result.as_ref().ok(),
        error: result.as_ref().err().map(|failure| error_object(&failure.error)),
    }
}

fn error_object(error: &Error) -> Value {
    let at = error.at();
    json!({
        "kind": error.kind().name(),
        "rule": error.rule(),
        "message": error.message(),
        "file": at.file.as_ref().map(|file| file.to_string_lossy()),
        "tensor": at.tensor,
        "bytes": at.bytes.map(|(from, to)| [from, to]),
        "rank": at.rank.map(|rank| rank.0),
        "expected": error.expected(),
        "found": error.found(),
    })
}

/// One line on stderr. A closed stderr is nobody's error.
fn note(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{}", OneLine(line));
}

/// A number and what it counts.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Turns `json!({..})` into the fields of an object.
pub(crate) fn fields(object: Value) -> Map<String, Value> {
    match object {
        Value::Object(fields) => fields,
        other => panic!("bug in shardlift: {other} is not an object"),
    }
}

/// A size as people read it: powers of 1000, as disks and links are sold.
pub(crate) fn human_bytes(bytes: u64) -> String {
    let mut amount = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if amount < 1000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{amount:.2} {unit}") };
        }
        amount /= 1000.0;
    }
    format!("{amount:.2} TB")
}

/// A digest as 16 hex digits.
pub(crate) fn hex(digest: u64) -> String {
    format!("{digest:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(kind: ErrorKind) -> [u8; 2] {
        let error = || Error::new(kind, "x");
        [Failure::from(error()).status(), Failure::started(error()).status()]
    }

    #[test]
    fn exit_statuses() {
        assert_eq!(status(ErrorKind::Usage), [2, 2]);
        assert_eq!(status(ErrorKind::Rules), [2, 2]);
        assert_eq!(status(ErrorKind::Unsupported), [2, 2]);
        assert_eq!(status(ErrorKind::NotFound), [2, 1]);
        assert_eq!(status(ErrorKind::Format), [3, 1]);
        assert_eq!(status(ErrorKind::Index), [3, 1]);
        assert_eq!(status(ErrorKind::Device), [4, 1]);
        assert_eq!(status(ErrorKind::DeviceMemory), [4, 4]);
        for kind in [ErrorKind::Io, ErrorKind::Truncated, ErrorKind::Changed, ErrorKind::Mismatch, ErrorKind::Audit] {
            assert_eq!(status(kind), [1, 1]);
        }
        // Before the load a path that does not open is an argument; a read that fails is not.
        let closed = || Error::new(ErrorKind::Io, "x").with_file("model");
        assert_eq!([Failure::from(closed()).status(), Failure::started(closed()).status()], [2, 1]);
        assert_eq!(Failure::from(closed().with_bytes(0, 8)).status(), 1);
        let cancelled = |signal| Failure::from(Error::new(ErrorKind::Cancelled, "x")).with_signal(signal).status();
        assert_eq!([cancelled(Some(2)), cancelled(Some(15))], [130, 143]);
    }

    #[test]
    fn warnings_of_other_threads_are_in_the_object_of_a_failure() {
        let output = Output::new("load", true);
        output.warnings().warn(&["slow".into()]);
        let failure = Err(Failure::from(Error::new(ErrorKind::Stalled, "x")));
        let object = json!(object("load", &output.warnings.told(), &failure));
        assert_eq!((&object["warnings"], &object["ok"]), (&json!(["slow"]), &json!(false)));
    }

    #[test]
    fn sizes() {
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(90_868_376), "90.87 MB");
        assert_eq!(human_bytes(1_400_000_000_000), "1.40 TB");
    }
}
