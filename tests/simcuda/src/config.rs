//! The settings, read from the environment once.

use twins::settings::{self, Leaks, die, text};

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

impl Config {
    pub(crate) fn from_env() -> Config {
        let link = text("SIMCUDA_LINK").map(|text| {
            Rates::parse(&text).unwrap_or_else(|| die("SIMCUDA_LINK", &text, "GB/s[,latency_us][,root=GB/s]"))
        });
        let visible: Vec<usize> = match text("SIMCUDA_VISIBLE") {
            Some(text) => text
                .split(',')
                .map(|number| number.trim().parse().unwrap_or_else(|_| die("SIMCUDA_VISIBLE", &text, "numbers")))
                .collect(),
            None => (0..number("SIMCUDA_DEVICES", 4) as usize).collect(),
        };
        Config {
            devices: visible.len(),
            visible,
            memory_bytes: number("SIMCUDA_MEMORY", 1 << 30),
            pinned_bytes: number("SIMCUDA_PINNED", u64::MAX),
            driver_version: number("SIMCUDA_DRIVER_VERSION", 12090) as i32,
            read_only: number("SIMCUDA_READ_ONLY", 1) != 0,
            host_page_tables: number("SIMCUDA_HOST_PAGE_TABLES", 0) != 0,
            seed: number("SIMCUDA_SEED", 0),
            // Under a model of the links the times are the model's alone.
            jitter_us: if link.is_some() { 0 } else { number("SIMCUDA_JITTER", 300) },
            link,
            fault: text("SIMCUDA_FAULT").unwrap_or_default(),
            check: number("SIMCUDA_CHECK", 1) as u8,
            poison: number("SIMCUDA_POISON", 1) != 0,
            populate: number("SIMCUDA_POPULATE", 0) != 0,
            strict: number("SIMCUDA_STRICT", 1) != 0,
            ledger: text("SIMCUDA_LEDGER"),
            leaks: Leaks::of("SIMCUDA_LEAKS"),
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    settings::bytes(name).unwrap_or(default)
}
