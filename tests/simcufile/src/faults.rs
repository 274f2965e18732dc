//! Calls that fail, fall short or never end, because a test asked for it.

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
    Status(i32),
    Errno(i32),
    Short,
    Hang,
}

impl Faults {
    /// Reads `call@n=code`, comma-separated; counting starts now.
    pub(crate) fn parse(text: &str) -> Option<Faults> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(Fault::parse).collect::<Option<Vec<_>>>().map(|list| Faults { list })
    }

    /// Counts a call, and says what must become of it.
    pub(crate) fn due(&mut self, call: &str) -> Option<Due> {
        let mut due = None;
        for fault in self.list.iter_mut().filter(|fault| fault.left > 0 && (fault.call == "*" || fault.call == call)) {
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
        let due = match code {
            "hang" => Due::Hang,
            "short" => Due::Short,
            code => match code.parse().ok()? {
                0 => return None,
                status @ 1.. => Due::Status(status),
                errno => Due::Errno(-errno),
            },
        };
        Some(Fault { call: call.into(), left: left.parse().ok().filter(|n| *n > 0)?, due })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails_once() {
        let mut faults = Faults::parse("cuFileRead@2=5030, *@4=hang,cuFileRead@4=-5").unwrap();
        assert_eq!(faults.due("cuFileRead"), None);
        assert_eq!(faults.due("cuFileRead"), Some(Due::Status(5030)));
        assert_eq!(faults.due("cuFileBufRegister"), None);
        assert_eq!(faults.due("cuFileRead"), Some(Due::Hang));
        assert_eq!(faults.due("cuFileRead"), Some(Due::Errno(5)));
        for wrong in ["cuFileRead", "cuFileRead@0=1", "cuFileRead@1", "cuFileRead@x=1", "cuFileRead@1=x", "a@1=0"] {
            assert!(Faults::parse(wrong).is_none(), "{wrong}");
        }
    }
}
