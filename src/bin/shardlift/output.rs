//! What goes to stdout and how the process ends: text or exactly one JSON object, and the exit status.

use std::fmt;
use std::io::{self, BufWriter, Stdout, Write};

use serde_json::{Map, Value, json};
use shardlift::{Error, ErrorKind};

/// The version of every JSON object.
const VERSION: u32 = 1;

/// The output of one command.
#[derive(Debug)]
pub(crate) struct Output {
    command: &'static str,
    json: bool,
    stdout: BufWriter<Stdout>,
    written: io::Result<()>,
    warnings: Vec<String>,
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

    fn status(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::Cancelled => match self.signal {
                Some(signal) => 128 + u8::try_from(signal).unwrap_or(2),
                None => 130,
            },
            ErrorKind::Rules | ErrorKind::Unsupported | ErrorKind::Usage => 2,
            ErrorKind::Device | ErrorKind::DeviceMemory => 4,
            ErrorKind::NotFound if !self.started => 2,
            ErrorKind::Format | ErrorKind::Index if !self.started => 3,
            _ => 1,
        }
    }
}

impl Output {
    pub(crate) fn new(command: &'static str, json: bool) -> Output {
        Output { command, json, stdout: BufWriter::new(io::stdout()), written: Ok(()), warnings: Vec::new() }
    }

    /// One line of text; nothing with `--json`.
    pub(crate) fn line(&mut self, line: fmt::Arguments<'_>) {
        if !self.json && self.written.is_ok() {
            self.written = writeln!(self.stdout, "{line}");
        }
    }

    /// What is odd but no error: on stderr, or in the object.
    pub(crate) fn warn(&mut self, warnings: &[String]) {
        for warning in warnings {
            if !self.json {
                note(format_args!("warning: {warning}"));
            }
            self.warnings.push(warning.clone());
        }
    }

    /// Writes the object or the error line, and gives the exit status.
    pub(crate) fn finish(mut self, result: Result<Map<String, Value>, Failure>) -> u8 {
        let status = match &result {
            Ok(_) => 0,
            Err(failure) => failure.status(),
        };
        if self.json {
            let object = self.object(result);
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

    fn object(&self, result: Result<Map<String, Value>, Failure>) -> Value {
        let mut object = Map::new();
        object.insert("version".into(), VERSION.into());
        object.insert("command".into(), self.command.into());
        object.insert("ok".into(), result.is_ok().into());
        object.insert("warnings".into(), json!(self.warnings));
        match result {
            Ok(fields) => object.extend(fields),
            Err(failure) => {
                object.insert("error".into(), error_object(&failure.error));
            }
        }
        Value::Object(object)
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
    let _ = writeln!(io::stderr(), "{line}");
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
        assert_eq!(status(ErrorKind::Device), [4, 4]);
        assert_eq!(status(ErrorKind::DeviceMemory), [4, 4]);
        for kind in [ErrorKind::Io, ErrorKind::Truncated, ErrorKind::Changed, ErrorKind::Mismatch, ErrorKind::Audit] {
            assert_eq!(status(kind), [1, 1]);
        }
        let cancelled = |signal| Failure::from(Error::new(ErrorKind::Cancelled, "x")).with_signal(signal).status();
        assert_eq!([cancelled(Some(2)), cancelled(Some(15))], [130, 143]);
    }

    #[test]
    fn sizes() {
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(90_868_376), "90.87 MB");
        assert_eq!(human_bytes(1_400_000_000_000), "1.40 TB");
    }
}
