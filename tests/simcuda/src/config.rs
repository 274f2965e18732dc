//! The settings, read from the environment once.

use std::env;

use crate::link::Rates;

/// What the environment asks for; the table is in the crate's documentation.
pub(crate) struct Config {
    pub(crate) devices: usize,
    /// Which of a machine's devices they are.
    pub(crate) visible: Vec<usize>,
    pub(crate) memory_bytes: u64,
    pub(crate) pinned_bytes: u64,
    pub(crate) driver_version: i32,
    pub(crate) read_only: bool,
    pub(crate) host_page_tables: bool,
    pub(crate) seed: u64,
    pub(crate) jitter_us: u64,
    pub(crate) link: Option<Rates>,
    pub(crate) fault: String,
    pub(crate) check: u8,
    pub(crate) poison: bool,
    pub(crate) populate: bool,
    pub(crate) strict: bool,
    pub(crate) ledger: Option<String>,
    pub(crate) leaks: Leaks,
}

/// What happens at exit when something was not returned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaks {
    Ignore,
    Report,
    Abort,
}

impl Config {
    pub(crate) fn from_env() -> Config {
        let link = setting("LINK").map(|text| {
            Rates::parse(&text).unwrap_or_else(|| die("SIMCUDA_LINK", &text, "GB/s[,latency_us][,root=GB/s]"))
        });
        let visible: Vec<usize> = match setting("VISIBLE") {
            Some(text) => text
                .split(',')
                .map(|number| number.trim().parse().unwrap_or_else(|_| die("SIMCUDA_VISIBLE", &text, "numbers")))
                .collect(),
            None => (0..number("DEVICES", 4) as usize).collect(),
        };
        Config {
            devices: visible.len(),
            visible,
            memory_bytes: number("MEMORY", 1 << 30),
            pinned_bytes: number("PINNED", u64::MAX),
            driver_version: number("DRIVER_VERSION", 12090) as i32,
            read_only: number("READ_ONLY", 1) != 0,
            host_page_tables: number("HOST_PAGE_TABLES", 0) != 0,
            seed: number("SEED", 0),
            // Under a model of the links the times are the model's alone.
            jitter_us: if link.is_some() { 0 } else { number("JITTER", 300) },
            link,
            fault: setting("FAULT").unwrap_or_default(),
            check: number("CHECK", 1) as u8,
            poison: number("POISON", 1) != 0,
            populate: number("POPULATE", 0) != 0,
            strict: number("STRICT", 1) != 0,
            ledger: setting("LEDGER"),
            leaks: match setting("LEAKS").as_deref() {
                None => Leaks::Report,
                Some("ignore") => Leaks::Ignore,
                Some("abort") => Leaks::Abort,
                Some(other) => die("SIMCUDA_LEAKS", other, "ignore or abort"),
            },
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the twin is set up by its environment, as drivers are")]
fn setting(name: &str) -> Option<String> {
    env::var(format!("SIMCUDA_{name}")).ok().filter(|text| !text.is_empty())
}

fn number(name: &str, default: u64) -> u64 {
    setting(name).map_or(default, |text| {
        bytes(&text).unwrap_or_else(|| die(&format!("SIMCUDA_{name}"), &text, "a number, with K, M or G"))
    })
}

/// A number with an optional suffix K, M or G.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A setting that means nothing would make a test prove nothing.
pub(crate) fn die(name: &str, found: &str, expected: &str) -> ! {
    eprintln!("simcuda: {name}={found}: expected {expected}");
    std::process::abort()
}
