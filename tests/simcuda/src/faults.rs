//! Calls that fail because a test asked for it.

use std::thread;

use crate::code::{Code, HANGS, INVALID_DEVICE, is_sticky};

/// The faults that are still to come.
#[derive(Default)]
pub(crate) struct Faults {
    list: Vec<Fault>,
}

struct Fault {
    call: String,
    /// Counts down; at 0 the call fails.
    left: u64,
    code: Code,
    sticky: bool,
}

/// A call that must fail now.
#[derive(Clone, Copy)]
pub(crate) struct Due {
    pub(crate) code: Code,
    /// The device is lost with it.
    pub(crate) sticky: bool,
}

impl Faults {
    /// Reads `call@n=code[!]`, comma-separated, with `hangs` as a code, too; counting starts now.
    pub(crate) fn parse(text: &str) -> Option<Faults> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(Fault::parse).collect::<Option<Vec<_>>>().map(|list| Faults { list })
    }

    /// Counts a call (or, as `run:copy`, an operation that runs) and says whether it must fail.
    pub(crate) fn due(&mut self, call: &str) -> Option<Due> {
        let mut due = None;
        for fault in self.list.iter_mut().filter(|fault| fault.left > 0 && fault.names(call)) {
            fault.left -= 1;
            if fault.left == 0 {
                due = due.or(Some(Due { code: fault.code, sticky: fault.sticky }));
            }
        }
        due
    }
}

/// What a call or an operation does that never comes back; the lock is open.
pub(crate) fn hang() -> ! {
    loop {
        thread::park();
    }
}

impl Fault {
    fn parse(text: &str) -> Option<Fault> {
        let (call, rest) = text.split_once('@')?;
        let (left, code) = rest.split_once('=')?;
        let (code, lost) = code.strip_suffix('!').map_or((code, false), |code| (code, true));
        let code = if code == "hangs" { HANGS } else { code.parse().ok()? };
        // A device that has gone shows as an ordinal that is invalid.
        let sticky = lost || is_sticky(code) || code == INVALID_DEVICE;
        Some(Fault { call: call.into(), left: left.parse().ok().filter(|n| *n > 0)?, code, sticky })
    }

    fn names(&self, call: &str) -> bool {
        match self.call.as_str() {
            "*" => !call.starts_with("run:"),
            name => name == call || call.strip_suffix("_v2") == Some(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails_once() {
        let mut faults = Faults::parse("cuMemAlloc@2=2, *@4=1,run:copy@1=700").unwrap();
        let mut codes = |call| faults.due(call).map(|due| (due.code, due.sticky));
        assert_eq!(codes("cuMemAlloc_v2"), None);
        assert_eq!(codes("cuMemAlloc_v2"), Some((2, false)));
        assert_eq!(codes("run:copy"), Some((700, true)));
        assert_eq!(codes("cuMemAlloc_v2"), None);
        assert_eq!(codes("cuInit"), Some((1, false)));
        assert_eq!(codes("cuInit"), None);
        assert_eq!(Faults::parse("cuInit@1=hangs").unwrap().due("cuInit").map(|due| due.code), Some(HANGS));
        for wrong in ["cuInit", "cuInit@0=1", "cuInit@1", "cuInit@x=1", "cuInit@1=x"] {
            assert!(Faults::parse(wrong).is_none(), "{wrong}");
        }
    }
}
