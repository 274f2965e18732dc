//! What a twin's environment says.

use std::env;
use std::str::FromStr;

/// What happens at exit when something was not given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaks {
    /// Nothing.
    Ignore,
    /// A line on stderr.
    Report,
    /// That, and an end that tests notice.
    Abort,
}

impl Leaks {
    /// What the variable says: `ignore`, `abort`, or nothing.
    pub fn of(name: &str) -> Leaks {
        match text(name).as_deref() {
            None => Leaks::Report,
            Some("ignore") => Leaks::Ignore,
            Some("abort") => Leaks::Abort,
            Some(other) => die(name, other, "ignore or abort"),
        }
    }
}

/// A variable, unless it is empty.
#[expect(clippy::disallowed_methods, reason = "a twin is set up by its environment, as what it stands for is")]
pub fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

/// A variable that is a number.
pub fn number<T: FromStr>(name: &str) -> Option<T> {
    text(name).map(|text| text.parse().unwrap_or_else(|_| die(name, &text, "a number")))
}

/// A variable that is a number with an optional suffix K, M or G.
pub fn bytes(name: &str) -> Option<u64> {
    text(name).map(|text| parse_bytes(&text).unwrap_or_else(|| die(name, &text, "a number, with K, M or G")))
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A setting that means nothing would make a test prove nothing.
pub fn die(name: &str, found: &str, expected: &str) -> ! {
    eprintln!("{name}={found}: expected {expected}");
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_may_have_a_suffix() {
        assert_eq!(["7", "2K", "3m", "1G"].map(parse_bytes), [7, 2 << 10, 3 << 20, 1 << 30].map(Some));
        assert_eq!(["", "K", "1T", "-1", "99999999999G"].map(parse_bytes), [None; 5]);
    }
}
