//! The settings, read from the environment once.

use std::time::Duration;

use twins::settings::{Leaks, die, number, text};

/// What the environment asks for; the table is in the crate's documentation.
pub(crate) struct Config {
    pub(crate) version: i32,
    pub(crate) shared_gpus: bool,
    pub(crate) link: Option<Rate>,
    pub(crate) fault: String,
    pub(crate) timeout: Option<Duration>,
    pub(crate) abort: Abort,
    pub(crate) seed: u64,
    pub(crate) jitter_us: u64,
    pub(crate) strict: bool,
    pub(crate) ledger: Option<String>,
    pub(crate) leaks: Leaks,
}

/// What the peers have to do with a rank's abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abort {
    /// Nothing: they wait until they abort, too.
    Alone,
    /// They hear of it, as over a network whose connections end.
    Tells,
    /// It ends when all of them abort or have gone, as within a node.
    Waits,
}

/// Of each rank's link to its peers, in each direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate {
    /// Which is GB/s.
    pub(crate) bytes_per_ns: f64,
    pub(crate) latency_ns: u64,
}

impl Config {
    pub(crate) fn from_env() -> Config {
        let link = text("SIMNCCL_LINK")
            .map(|text| Rate::parse(&text).unwrap_or_else(|| die("SIMNCCL_LINK", &text, "GB/s[,latency_us]")));
        let abort = match text("SIMNCCL_ABORT").as_deref() {
            None => Abort::Alone,
            Some("tell") => Abort::Tells,
            Some("wait") => Abort::Waits,
            Some(other) => die("SIMNCCL_ABORT", other, "tell or wait"),
        };
        Config {
            abort,
            version: number("SIMNCCL_VERSION").unwrap_or(23003) as i32,
            shared_gpus: number("NCCL_MULTI_RANK_GPU_ENABLE") == Some(1),
            // Under a model of the links the times are the model's alone.
            jitter_us: if link.is_some() { 0 } else { number("SIMNCCL_JITTER").unwrap_or(300) },
            link,
            fault: text("SIMNCCL_FAULT").unwrap_or_default(),
            timeout: number("SIMNCCL_TIMEOUT").map(Duration::from_millis),
            seed: number("SIMNCCL_SEED").unwrap_or(0),
            strict: number("SIMNCCL_STRICT") != Some(0),
            ledger: text("SIMNCCL_LEDGER"),
            leaks: Leaks::of("SIMNCCL_LEAKS"),
        }
    }
}

impl Rate {
    fn parse(text: &str) -> Option<Rate> {
        let (rate, latency) = text.split_once(',').unwrap_or((text, "0"));
        let bytes_per_ns = rate.trim().parse().ok().filter(|rate: &f64| *rate > 0.0 && rate.is_finite())?;
        Some(Rate { bytes_per_ns, latency_ns: (latency.trim().parse::<f64>().ok()? * 1e3) as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_has_a_latency_or_none() {
        assert_eq!(Rate::parse("2"), Some(Rate { bytes_per_ns: 2.0, latency_ns: 0 }));
        assert_eq!(Rate::parse("0.5, 7"), Some(Rate { bytes_per_ns: 0.5, latency_ns: 7000 }));
        for wrong in ["", "x", "-1", "0", "1,x"] {
            assert_eq!(Rate::parse(wrong), None, "{wrong}");
        }
    }
}
