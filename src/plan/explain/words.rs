//! Numbers, ranges and lines as `explain` words them.

use crate::dtype::Dtype;
use crate::plan::expr::Fill;

/// The lines of a text that should not be longer than a screen.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<String>);

impl Lines {
    /// The first line.
    pub(super) fn title(&mut self, line: String) {
        self.0.push(line);
    }

    /// A line with what it is about.
    pub(super) fn add(&mut self, about: &str, line: String) {
        self.extend(wrapped(&format!("  {about:<8}"), &line, 10));
    }

    /// The same of what may be long: its beginning.
    pub(super) fn add_some(&mut self, about: &str, line: String) {
        let mut lines = wrapped(&format!("  {about:<8}"), &line, 10);
        if lines.len() > SOME {
            lines.truncate(SOME);
            lines[SOME - 1] += "...";
        }
        self.extend(lines);
    }

    pub(super) fn extend(&mut self, lines: Vec<String>) {
        self.0.extend(lines);
    }

    /// Whether so many more lines fit.
    pub(super) fn has_room(&self, lines: usize) -> bool {
        self.0.len() + lines < SCREEN
    }

    pub(super) fn done(self) -> String {
        self.0.into_iter().map(|line| line + "\n").collect()
    }
}

/// Lines about some ranks, the first not so far in as the others.
pub(super) fn group_lines(words: &[String]) -> Vec<String> {
    let line = |(at, line)| wrapped(if at == 0 { "  " } else { "    " }, line, 6);
    words.iter().map(String::as_str).enumerate().flat_map(line).collect()
}

/// A line, broken between words; what goes on begins `further` columns in.
fn wrapped(before: &str, line: &str, further: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let (mut current, mut empty) = (before.to_owned(), true);
    for word in line.split(' ') {
        if !empty && current.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines.push(std::mem::replace(&mut current, " ".repeat(further)));
            empty = true;
        }
        current.push_str(if empty { "" } else { " " });
        current.push_str(word);
        empty = false;
    }
    lines.push(current);
    lines
}

/// Indices of a dimension of `size`.
pub(super) fn indices(start: u64, len: u64, step: u64, size: u64) -> String {
    match (len, step) {
        (0, _) => "none".into(),
        _ if len == size => "all".into(),
        (1, _) => format!("{start}"),
        (_, 1) => format!("{start}..{}", start + len),
        _ => format!("{start}..{} by {step}", start + (len - 1) * step + 1),
    }
}

/// Numbers, neighbours as ranges: `0-3, 8`; of many ranges the first and the last.
pub(super) fn numbers(all: impl Iterator<Item = u32>) -> String {
    let mut all: Vec<u32> = all.collect();
    all.sort_unstable();
    all.dedup();
    let runs: Vec<String> = all
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    match &runs[..] {
        [first @ .., last] if first.len() > RUNS => {
            format!("{}, ... {last} ({} in all)", first[..RUNS].join(", "), all.len())
        }
        runs => runs.join(", "),
    }
}

/// An element by its name, or as it lies in memory.
pub(super) fn value(element: &[u8], dtype: Dtype) -> String {
    let named = [Fill::Zero, Fill::One, Fill::NegInf];
    let is = |fill: &Fill| fill.element(dtype).is_ok_and(|it| it[..] == *element);
    named.into_iter().find(is).unwrap_or_else(|| Fill::Bytes(element.to_vec())).to_string()
}

/// Columns of a line.
const COLUMNS: usize = 100;

/// Lines of a screen.
const SCREEN: usize = 40;

/// Lines of what may be long.
const SOME: usize = 4;

/// Ranges of numbers that are told one by one.
const RUNS: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_short() {
        let word = |numbers_of: &[u32]| numbers(numbers_of.iter().copied());
        assert_eq!(word(&[3, 1, 2, 8, 8]), "1-3, 8");
        assert_eq!(word(&[0]), "0");
        let odd: Vec<u32> = (0..20).map(|at| at * 2).collect();
        assert_eq!(word(&odd), "0, 2, 4, 6, 8, 10, ... 38 (20 in all)");
        assert_eq!([indices(0, 8, 1, 8), indices(4, 4, 1, 8), indices(1, 3, 2, 8)], ["all", "4..8", "1..6 by 2"]);
        assert_eq!([indices(7, 1, 1, 8), indices(0, 0, 1, 8)], ["7", "none"]);
    }

    #[test]
    fn long_lines_are_broken() {
        let mut lines = Lines::default();
        lines.add("from", ["0123456789"; 20].join(" "));
        let text = lines.done();
        assert!(text.lines().count() == 3 && text.lines().all(|line| line.len() <= COLUMNS), "{text}");
    }
}
