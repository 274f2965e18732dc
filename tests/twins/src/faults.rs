//! Calls, and operations that run, of which a test wants something else than usual.

/// The faults that are still to come: each, what must happen (`D`) instead of the n-th of its calls.
#[derive(Debug)]
pub struct Faults<D> {
    list: Vec<Fault<D>>,
}

#[derive(Debug)]
struct Fault<D> {
    call: String,
    /// Counts down; at 0 it is due.
    left: u64,
    due: D,
}

impl<D: Copy> Faults<D> {
    /// Reads `call@n=what`, comma-separated, of which there may be none; counting starts now. `read` knows what there is.
    pub fn parse(text: &str, read: impl Fn(&str) -> Option<D>) -> Option<Faults<D>> {
        let fault = |text: &str| {
            let (call, rest) = text.split_once('@')?;
            let (left, due) = rest.split_once('=')?;
            Some(Fault { call: call.into(), left: left.parse().ok().filter(|n| *n > 0)?, due: read(due)? })
        };
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(fault).collect::<Option<Vec<_>>>().map(|list| Faults { list })
    }

    /// Counts a call (or, as `run:copy`, an operation that runs) and says what must become of it.
    pub fn due(&mut self, call: &str) -> Option<D> {
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

impl<D> Fault<D> {
    /// Any call is `*`, any operation `run:*`; a driver's `_v2` needs not be said.
    fn names(&self, call: &str) -> bool {
        match self.call.as_str() {
            "*" => !call.starts_with("run:"),
            "run:*" => call.starts_with("run:"),
            name => name == call || call.strip_suffix("_v2") == Some(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails_once() {
        let mut faults =
            Faults::parse("cuMemAlloc@2=2, *@4=1,run:copy@1=700,run:*@2=9", |due| due.parse().ok()).unwrap();
        let mut due = |call| faults.due(call);
        assert_eq!(due("cuMemAlloc_v2"), None);
        assert_eq!(due("cuMemAlloc_v2"), Some(2));
        assert_eq!(due("run:copy"), Some(700));
        assert_eq!(due("cuMemAlloc_v2"), None);
        assert_eq!(due("cuInit"), Some(1));
        assert_eq!(due("cuInit"), None);
        assert_eq!(due("run:kernel"), Some(9));
        for wrong in ["cuInit", "cuInit@0=1", "cuInit@1", "cuInit@x=1", "cuInit@1=x"] {
            assert!(Faults::parse(wrong, |due| due.parse::<u32>().ok()).is_none(), "{wrong}");
        }
    }
}
