//! Calls that fail, fall short or never end, because a test asked for it.

/// The faults that are still to come.
pub(crate) type Faults = twins::faults::Faults<Due>;

/// What must happen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Status(i32),
    Errno(i32),
    Short,
    Hang,
}

impl Due {
    /// Reads a status of cuFile's, a negative errno, `short` or `hang`.
    pub(crate) fn read(text: &str) -> Option<Due> {
        match text {
            "hang" => Some(Due::Hang),
            "short" => Some(Due::Short),
            code => match code.parse().ok()? {
                0 => None,
                status @ 1.. => Some(Due::Status(status)),
                errno => Some(Due::Errno(-errno)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sign_tells_an_errno_from_a_status() {
        assert_eq!(["5030", "-5"].map(Due::read), [Some(Due::Status(5030)), Some(Due::Errno(5))]);
        assert_eq!(["short", "hang"].map(Due::read), [Some(Due::Short), Some(Due::Hang)]);
        assert_eq!(["0", "x", ""].map(Due::read), [None; 3]);
    }
}
