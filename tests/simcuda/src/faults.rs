//! Calls that fail because a test asked for it.

use std::thread;

use crate::code::{Code, HANGS, INVALID_DEVICE, is_sticky};

/// The faults that are still to come.
pub(crate) type Faults = twins::faults::Faults<Due>;

/// A call that must fail now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) code: Code,
    /// The device is lost with it.
    pub(crate) sticky: bool,
}

impl Due {
    /// Reads `code[!]`, with `hang` as a code, too.
    pub(crate) fn read(text: &str) -> Option<Due> {
        let (code, lost) = text.strip_suffix('!').map_or((text, false), |code| (code, true));
        let code = if code == "hang" { HANGS } else { code.parse().ok()? };
        // A device that has gone shows as an ordinal that is invalid.
        Some(Due { code, sticky: lost || is_sticky(code) || code == INVALID_DEVICE })
    }
}

/// What a call or an operation does that never comes back; the lock is open.
pub(crate) fn hang() -> ! {
    loop {
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_failures_take_the_device_with_them() {
        let read = |text| Due::read(text).map(|due| (due.code, due.sticky));
        assert_eq!(read("2"), Some((2, false)));
        assert_eq!(read("2!"), Some((2, true)));
        assert_eq!(read("700"), Some((700, true)));
        assert_eq!(read("hang"), Some((HANGS, false)));
        assert_eq!(read("x"), None);
    }
}
