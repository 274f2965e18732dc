//! Where in a rules file an error is: the line, the rule, and the keys that lead there.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::refuse;
use crate::error::Error;

/// What the parser says about `text`, with its place.
pub(super) fn located(text: &str, error: &toml::de::Error) -> Error {
    let span = error.span().unwrap_or_default();
    let line = 1 + text[..span.start.min(text.len())].matches('\n').count();
    let said = said(error.message());
    let Some((rule, keys)) = DeTable::parse(text).ok().and_then(|file| keys(file.get_ref(), span.start)) else {
        return said.in_context(format_args!("rules file, line {line}"));
    };
    let said = if keys.is_empty() { said } else { said.in_context(keys) };
    let said = said.in_context(format_args!("line {line}"));
    match rule {
        Some(pattern) => said.in_context(format_args!("rule `{pattern}`")),
        None => said.in_context("rules file"),
    }
}

/// Serde's messages are `what: found, expected this` or ``what `found`, expected this``.
fn said(message: &str) -> Error {
    let message = message.lines().next().unwrap_or_default();
    let Some((what, expected)) = message.split_once(", expected ") else { return refuse(message.into()) };
    let found = what.split_once(": ").or_else(|| what.find('`').map(|at| (what[..at].trim_end(), &what[at..])));
    match found {
        Some((what, found)) => refuse(what.into()).with_expected(expected, found),
        None => refuse(message.into()),
    }
}

/// The pattern of the rule that `at` is in, and the keys from there: `steps[1].slice.len`.
fn keys(file: &DeTable<'_>, at: usize) -> Option<(Option<String>, String)> {
    let rules = file.get("rule").and_then(|rules| rules.get_ref().as_array());
    for rule in rules.into_iter().flatten() {
        let named = ["match", "module"].into_iter().find_map(|key| rule.get_ref().get(key));
        let Some(pattern) = named.and_then(|pattern| pattern.get_ref().as_str()) else { continue };
        let mut keys = String::new();
        if find(rule.get_ref(), rule.span(), at, &mut keys) {
            return Some((Some(pattern.to_owned()), keys.trim_start_matches('.').to_owned()));
        }
    }
    let mut keys = String::new();
    in_table(file, at, &mut keys).then(|| (None, keys.trim_start_matches('.').to_owned()))
}

/// Whether `at` is in the value, and if so appends the keys that lead there.
fn find(value: &DeValue<'_>, span: Range<usize>, at: usize, keys: &mut String) -> bool {
    let inner = match value {
        DeValue::Table(table) => in_table(table, at, keys),
        DeValue::Array(list) => list.iter().enumerate().any(|(index, item)| {
            let length = keys.len();
            keys.push_str(&format!("[{index}]"));
            let found = find(item.get_ref(), item.span(), at, keys);
            if !found {
                keys.truncate(length);
            }
            found
        }),
        _ => false,
    };
    inner || span.contains(&at)
}

fn in_table(table: &DeTable<'_>, at: usize, keys: &mut String) -> bool {
    table.iter().any(|(key, value)| {
        if key.span().contains(&at) {
            // A key that should not be there is what was found, not where.
            return true;
        }
        let length = keys.len();
        keys.push('.');
        keys.push_str(key.get_ref());
        let found = find(value.get_ref(), value.span(), at, keys);
        if !found {
            keys.truncate(length);
        }
        found
    })
}
