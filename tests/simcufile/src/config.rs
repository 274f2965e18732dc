//! The settings, read from the environment once.

use std::time::Duration;

use twins::settings::{die, number, text};

/// What the environment asks for; the table is in the crate's documentation.
pub(crate) struct Config {
    pub(crate) compat: bool,
    pub(crate) parameters: bool,
    pub(crate) version: i32,
    pub(crate) open: Duration,
    pub(crate) register_max: u64,
    pub(crate) short: u64,
    pub(crate) fault: String,
    pub(crate) strict: bool,
    pub(crate) ledger: Option<String>,
}

impl Config {
    pub(crate) fn from_env() -> Config {
        Config {
            compat: match text("SIMCUFILE_MODE").as_deref() {
                None | Some("direct") => false,
                Some("compat") => true,
                Some(other) => die("SIMCUFILE_MODE", other, "direct or compat"),
            },
            parameters: number("SIMCUFILE_PARAMETERS") != Some(0),
            version: number("SIMCUFILE_VERSION").unwrap_or(1140) as i32,
            open: Duration::from_millis(number("SIMCUFILE_OPEN_MS").unwrap_or(0)),
            register_max: number("SIMCUFILE_REGISTER_MAX").unwrap_or(u64::MAX),
            short: number("SIMCUFILE_SHORT").unwrap_or(0),
            fault: text("SIMCUFILE_FAULT").unwrap_or_default(),
            strict: number("SIMCUFILE_STRICT") != Some(0),
            ledger: text("SIMCUFILE_LEDGER"),
        }
    }
}
