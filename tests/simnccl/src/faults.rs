//! Calls and operations that fail, or never end, because a test asked for it.

use crate::abi::Code;

/// The faults that are still to come.
#[derive(Default)]
pub(crate) struct Faults {
    list: Vec<Fault>,
}

struct Fault {
    call: String,
    /// Counts down; at 0 the call fails.
    left: u64,
    due: Due,
}

/// What must happen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Code(Code),
    Hang,
}

impl Faults {
    /// Reads `call@n=code`, comma-separated; counting starts now.
    pub(crate) fn parse(text: &str) -> Option<Faults> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(Fault::parse).collect::<Option<Vec<_>>>().map(|list| Faults { list })
    }

    /// Counts a call (or, as `run:ncclSend`, an operation that runs) and says what must become of it.
    pub(crate) fn due(&mut self, call: &str) -> Option<Due> {
        let mut due = None;
        for fault in self.list.iter_mut().filter(|fault| fault.left > 0 && fault.names(call)) {
            fault.left -= 1;
            if fault.left == 0 {
                due = due.or(Some(fault.due));
            }
        }
        due
    }
}

impl Fault {
    fn parse(text: &str) -> Option<Fault> {
        let (call, rest) = text.split_once('@')?;
        let (left, code) = rest.split_once('=')?;
        let due = if code == "hang" { Due::Hang } else { Due::Code(code.parse().ok().filter(|code| *code > 0)?) };
        Some(Fault { call: call.into(), left: left.parse().ok().filter(|n| *n > 0)?, due })
    }

    fn names(&self, call: &str) -> bool {
        match self.call.as_str() {
            "*" => !call.starts_with("run:"),
            "run:*" => call.starts_with("run:"),
            name => name == call,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails_once() {
        let mut faults = Faults::parse("ncclSend@2=6, *@4=3,run:ncclRecv@1=hang").unwrap();
        assert_eq!(faults.due("ncclSend"), None);
        assert_eq!(faults.due("ncclSend"), Some(Due::Code(6)));
        assert_eq!(faults.due("run:ncclRecv"), Some(Due::Hang));
        assert_eq!(faults.due("ncclSend"), None);
        assert_eq!(faults.due("ncclRecv"), Some(Due::Code(3)));
        assert_eq!(faults.due("ncclRecv"), None);
        for wrong in ["ncclSend", "ncclSend@0=1", "ncclSend@1", "ncclSend@x=1", "ncclSend@1=x", "ncclSend@1=0"] {
            assert!(Faults::parse(wrong).is_none(), "{wrong}");
        }
    }
}
