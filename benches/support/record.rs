//! The record of what is counted, `benches/record/counts.json`: one object of figures for each kind of count.

#![allow(dead_code, reason = "each bench uses its own part")]

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};

pub(crate) const RECORD: &str = "benches/record/counts.json";

/// Counts by name.
pub(crate) type Figures = BTreeMap<String, f64>;

/// How much more than recorded a count may be: so much of it, and so many. Those that depend on how threads happen to meet
/// repeat less well than others.
#[derive(Clone, Copy)]
pub(crate) struct Slack {
    pub(crate) share: f64,
    pub(crate) count: f64,
}

/// The whole record.
pub(crate) fn read() -> io::Result<Value> {
    match std::fs::read_to_string(RECORD) {
        Ok(text) => Ok(serde_json::from_str(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(json!({})),
        Err(error) => Err(error),
    }
}

/// Replaces one kind of count in the record.
pub(crate) fn write(kind: &str, figures: Value) -> io::Result<()> {
    let mut record = read()?;
    record[kind] = figures;
    std::fs::write(RECORD, format!("{record:#}\n"))?;
    writeln!(io::stdout(), "{RECORD}: {kind}: {:#}", record[kind])
}

/// Records the figures of this kind, or else holds them against those recorded; whether they are within.
pub(crate) fn settle(kind: &str, figures: &Figures, slack: Slack, record: bool) -> io::Result<bool> {
    if record {
        return write(kind, json!(figures)).map(|()| true);
    }
    let recorded = &read()?[kind];
    let mut within = true;
    for (name, &count) in figures {
        let known = recorded[name].as_f64();
        let known = known.ok_or_else(|| io::Error::other(format!("{RECORD} has no {kind}, {name}")))?;
        let most = known * (1.0 + slack.share) + slack.count;
        let verdict = match count {
            count if count > most => "FAILED: more than recorded",
            count if count < known - slack.count - known * slack.share => {
                "ok, less than recorded: record it (--record)"
            }
            _ => "ok",
        };
        within &= count <= most;
        writeln!(io::stdout(), "{kind}, {name}: {count}, recorded {known}, at most {most:.1}: {verdict}")?;
    }
    Ok(within)
}
