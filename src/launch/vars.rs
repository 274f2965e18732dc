//! Environment variables as numbers and text, with errors that show what was found.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// The variables of a process, asked for by name. An empty one counts as unset, as shells make them.
#[derive(Clone, Copy)]
pub(super) struct Vars<'a>(&'a dyn Fn(&str) -> Option<String>);

/// A number and what named it: a variable or a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) value: u32,
    pub(super) name: &'static str,
}

impl<'a> Vars<'a> {
    pub(super) fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Vars<'a> {
        Vars(lookup)
    }

    pub(super) fn text(self, name: &str) -> Option<String> {
        (self.0)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// The value as it is set, also if it is empty.
    pub(super) fn raw(self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    pub(super) fn has(self, names: &[&str]) -> bool {
        names.iter().all(|name| self.text(name).is_some())
    }

    pub(super) fn number(self, name: &'static str) -> Result<Option<Named>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(Named { value, name })),
            Err(_) => Err(Error::new(ErrorKind::Usage, format!("{name} is no number"))
                .with_expected("a number of 32 bits", format!("{text:?}"))),
        }
    }

    /// The first of these variables that is set.
    pub(super) fn first(self, names: &[&'static str]) -> Result<Option<Named>> {
        for name in names {
            if let Some(number) = self.number(name)? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}

/// Refuses `low`, if it is known, unless it is below `high`.
pub(super) fn below(low: Option<Named>, high: Option<Named>) -> Result<()> {
    match (low, high) {
        (Some(low), Some(high)) if low.value >= high.value => Err(contradiction(low, "below", high)),
        _ => Ok(()),
    }
}

/// Refuses `few` if there are more of them than `many`.
pub(super) fn at_most(few: Option<Named>, many: Option<Named>) -> Result<()> {
    match (few, many) {
        (Some(few), Some(many)) if few.value > many.value => Err(contradiction(few, "at most", many)),
        _ => Ok(()),
    }
}

/// Refuses two sources that say different numbers.
pub(super) fn agree(one: Option<Named>, other: Option<Named>) -> Result<()> {
    match (one, other) {
        (Some(one), Some(other)) if one.value != other.value => Err(contradiction(one, "as", other)),
        _ => Ok(()),
    }
}

fn contradiction(one: Named, relation: &str, other: Named) -> Error {
    Error::new(ErrorKind::Usage, format!("{} contradicts {}", one.name, other.name))
        .with_expected(format!("{relation} {other}"), one)
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_variable = self.name.starts_with(|first: char| first.is_ascii_uppercase());
        write!(f, "{}{}{}", self.name, if is_variable { '=' } else { ' ' }, self.value)
    }
}
