//! Calls and operations that fail, or never end, because a test asked for it.

use crate::abi::Code;

/// The faults that are still to come.
pub(crate) type Faults = twins::faults::Faults<Due>;

/// What must happen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Code(Code),
    Hang,
}

impl Due {
    /// Reads a code of NCCL's, or `hang`.
    pub(crate) fn read(text: &str) -> Option<Due> {
        match text {
            "hang" => Some(Due::Hang),
            code => code.parse().ok().filter(|code| *code > 0).map(Due::Code),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_code_is_0() {
        assert_eq!(["6", "hang", "0", "x"].map(Due::read), [Some(Due::Code(6)), Some(Due::Hang), None, None]);
    }
}
