//! How a dimension is cut into parts, in units that stay together (sharding.md sections 1 and 5).

use std::fmt;
use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::world::{Ax, Coord, Mesh, divisor_of};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::UNROLL_MAX;

/// How a dimension is cut into parts.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cut {
    /// Which part each rank gets.
    pub by: Coord,
    /// Which units each part has.
    pub how: Split,
    /// Indices that stay together: a head, a group, a block. 1 or more. The last unit of the dimension may have fewer,
    /// unless the split is even.
    pub unit: u64,
    /// How many units the dimension must have, where the configuration says so.
    pub units: Option<u64>,
    /// With more ranks than units, each unit goes to `ranks / units` neighbouring ranks (key and value heads of
    /// grouped-query attention) instead of being an error.
    pub replicate_units: bool,
}

/// Which units each part has (sharding.md section 1: engines differ, so the rule is part of the plan).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Split {
    /// The same number for each part, else it is an error.
    #[default]
    Even,
    /// `ceil(units / n)` for each part; the last one that gets any may get fewer, the parts after it get none.
    Ceil,
    /// The first `units % n` parts get one more than the others.
    Balanced,
    /// `units / n` for each part, and the last gets the remainder, too.
    LastTakesRest,
    /// Unit `u` is of part `u % n`; each part has its units in ascending order.
    RoundRobin,
    /// For each part its units, in the order of the destination. Every unit is of a part, and may be of several
    /// (redundant experts).
    Table(Vec<Vec<Range<u64>>>),
}

/// Some indices of a dimension: `len` from `start` on, every `step`-th.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    /// The first index.
    pub(super) start: u64,
    /// How many indices.
    pub(super) len: u64,
    /// From one index to the next, at least 1.
    pub(super) step: u64,
}

impl Taken {
    /// Whether an index is one of them.
    pub(super) fn has(&self, index: u64) -> bool {
        let Taken { start, len, step } = *self;
        index.checked_sub(start).is_some_and(|from| from.is_multiple_of(step) && from / step < len)
    }
}

impl Default for Cut {
    fn default() -> Cut {
        Cut { by: Coord::Axis(Ax::Tp), how: Split::Even, unit: 1, units: None, replicate_units: false }
    }
}

impl Cut {
    /// The part of `rank`, and how many parts there are.
    pub(super) fn part(&self, size: u64, mesh: Mesh, rank: Rank) -> Result<(u64, u64)> {
        let (i, n) = self.by.of(mesh, rank)?;
        let (i, n) = (u64::from(i), u64::from(n));
        let units = size.div_ceil(self.unit.max(1));
        if !self.replicate_units || n <= units || units == 0 {
            return Ok((i, n));
        }
        if !n.is_multiple_of(units) {
            return Err(self.not_divisible(units, n));
        }
        Ok((i / (n / units), units))
    }

    /// The indices that `rank` gets of a dimension of `size`, in the order of its destination: at least one run, which
    /// may be empty, and only one unless a table or a round of larger units says so.
    pub(super) fn take(&self, size: u64, mesh: Mesh, rank: Rank) -> Result<SmallVec<[Taken; 1]>> {
        let unit = self.unit;
        if unit == 0 {
            return Err(broken("unit", "unit of a cut is 0"));
        }
        self.check_units(size)?;
        let (i, n) = self.part(size, mesh, rank)?;
        if self.how == Split::Even && n > 1 && !size.is_multiple_of(unit) {
            return Err(broken("unit", "dimension is not a whole number of units")
                .with_expected(format!("a multiple of {unit}, or 1 part"), format!("{size} in {n} parts")));
        }
        let units = size.div_ceil(unit);
        let runs = match &self.how {
            Split::Even if !units.is_multiple_of(n) => return Err(self.not_divisible(units, n)),
            Split::Table(parts) => listed(parts, units, i, n)?,
            Split::RoundRobin => {
                let len = units.saturating_sub(i).div_ceil(n);
                smallvec![Taken { start: i.min(units), len, step: if len > 1 { n } else { 1 } }]
            }
            how => {
                let start = how.before(i, units, n);
                smallvec![Taken { start, len: how.before(i + 1, units, n) - start, step: 1 }]
            }
        };
        self.indices(size, runs)
    }

    /// Refuses a dimension that is not what the configuration says.
    pub(super) fn check_units(&self, size: u64) -> Result<()> {
        match self.units {
            Some(units) if units.checked_mul(self.unit) != Some(size) => {
                Err(broken("units", "dimension is not what the configuration says")
                    .with_expected(format!("{units} units of {}", self.unit), size))
            }
            _ => Ok(()),
        }
    }

    /// The indices of these units.
    fn indices(&self, size: u64, units: SmallVec<[Taken; 1]>) -> Result<SmallVec<[Taken; 1]>> {
        let unit = self.unit;
        if unit == 1 {
            return Ok(units);
        }
        let at = |unit_at: u64| unit_at.saturating_mul(unit).min(size);
        let run = |first: u64, units: u64| Taken { start: at(first), len: at(first + units) - at(first), step: 1 };
        let mut runs: SmallVec<[Taken; 1]> = SmallVec::new();
        for Taken { start, len, step } in units {
            if step == 1 {
                runs.push(run(start, len));
                continue;
            }
            if len > UNROLL_MAX {
                return Err(broken("cut", "units of a part are too many runs of indices")
                    .with_expected(format!("at most {UNROLL_MAX}, or units of 1"), len));
            }
            runs.extend((0..len).map(|unit_at| run(start + unit_at * step, 1)));
        }
        let (_, before) = runs.split_last().expect("bug in shardlift: a part without runs");
        match before.iter().find(|run| !run.len.is_multiple_of(unit)) {
            Some(run) => Err(broken("unit", "partial unit is not the last of its part")
                .with_expected(format!("a multiple of {unit}"), run.len)),
            None => Ok(runs),
        }
    }

    fn not_divisible(&self, units: u64, n: u64) -> Error {
        let or = if self.replicate_units { "a multiple or " } else { "" };
        broken("not-divisible", format!("units of {} do not divide evenly", self.unit))
            .with_expected(format!("{or}{}", divisor_of(units, "units")), format!("{n} parts"))
    }
}

impl Split {
    /// Those that a name says.
    pub(super) const NAMED: [Split; 5] =
        [Split::Even, Split::Ceil, Split::Balanced, Split::LastTakesRest, Split::RoundRobin];

    /// The split of this name, as it is displayed; a table has none.
    pub fn named(name: &str) -> Option<Split> {
        Split::NAMED.into_iter().find(|split| split.to_string() == name)
    }

    /// Parses a [`Split::Table`]: a line for each part, on it units `7` and ranges of units `252..256` between blanks or
    /// commas; a part without units is `0..0`. From `#` on a line is a comment, and lines without anything else do not
    /// count.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] for anything else, with the line.
    pub fn from_table(text: &str) -> Result<Split> {
        let mut parts = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let words = line.split([' ', '\t', ',']).filter(|word| !word.is_empty());
            let part: Vec<Range<u64>> = words.map(|word| on_line(word, at + 1)).collect::<Result<_>>()?;
            if !part.is_empty() {
                parts.push(part);
            }
        }
        Ok(Split::Table(parts))
    }

    /// How many of the `units` are of parts before `part` of `n`, where each part is one range of them.
    fn before(&self, part: u64, units: u64, n: u64) -> u64 {
        let (each, rest) = (units / n, units % n);
        match self {
            Split::Ceil => part.saturating_mul(units.div_ceil(n)).min(units),
            Split::Balanced => part * each + part.min(rest),
            Split::LastTakesRest if part == n => units,
            Split::Even | Split::LastTakesRest => part * each,
            Split::RoundRobin | Split::Table(_) => panic!("bug in shardlift: parts are not ranges"),
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Split::Even => f.write_str("even"),
            Split::Ceil => f.write_str("ceil"),
            Split::Balanced => f.write_str("balanced"),
            Split::LastTakesRest => f.write_str("last-takes-rest"),
            Split::RoundRobin => f.write_str("round-robin"),
            Split::Table(parts) => write!(f, "table of {} parts", parts.len()),
        }
    }
}

/// The greatest common divisor.
pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The least common multiple, as far as it can be counted.
pub(super) fn lcm(a: u64, b: u64) -> u64 {
    if a == 0 || b == 0 { 0 } else { (a / gcd(a, b)).saturating_mul(b) }
}

/// The units that a table lists for part `i`, neighbouring ranges as one.
fn listed(parts: &[Vec<Range<u64>>], units: u64, i: u64, n: u64) -> Result<SmallVec<[Taken; 1]>> {
    if parts.len() as u64 != n {
        return Err(broken("table", "table has another number of parts").with_expected(n, parts.len()));
    }
    let mut all: Vec<&Range<u64>> = parts.iter().flatten().collect();
    if let Some(range) = all.iter().find(|range| range.start > range.end || range.end > units) {
        return Err(broken("table", "table lists units that the dimension does not have")
            .with_expected(format!("ranges of 0..{units}"), format!("{range:?}")));
    }
    all.sort_unstable_by_key(|range| range.start);
    let mut covered = 0;
    for next in all.into_iter().chain([&(units..units)]) {
        if next.start > covered {
            return Err(broken("table", "table has units in no part")
                .with_expected(format!("each of 0..{units}"), format!("none of {covered}..{}", next.start)));
        }
        covered = covered.max(next.end);
    }
    let mut runs: SmallVec<[Taken; 1]> = SmallVec::new();
    for range in parts[i as usize].iter().filter(|range| !range.is_empty()) {
        let len = range.end - range.start;
        match runs.last_mut() {
            Some(run) if run.start + run.len == range.start => run.len += len,
            _ => runs.push(Taken { start: range.start, len, step: 1 }),
        }
    }
    if runs.is_empty() {
        runs.push(Taken { start: 0, len: 0, step: 1 });
    }
    if runs.len() as u64 > UNROLL_MAX {
        return Err(broken("table", "part is too many ranges of units")
            .with_expected(format!("at most {UNROLL_MAX}"), runs.len()));
    }
    Ok(runs)
}

/// A unit `7` or a range of units `252..256`.
pub(super) fn unit_range(word: &str) -> Option<Range<u64>> {
    let number = |digits: &str| digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
    match word.split_once("..") {
        Some((from, to)) => number(from).zip(number(to)).map(|(from, to)| from..to).filter(|it| it.start <= it.end),
        None => number(word).and_then(|unit: u64| Some(unit..unit.checked_add(1)?)),
    }
}

/// The same on a line of a table.
fn on_line(word: &str, line: usize) -> Result<Range<u64>> {
    unit_range(word).ok_or_else(|| {
        broken("table", format!("line {line} of a table of units"))
            .with_expected("units `7` and ranges `252..256`", format!("`{word}`"))
    })
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(cut: &Cut, size: u64, rank: u32, n: u32) -> Result<SmallVec<[Taken; 1]>> {
        cut.take(size, Mesh::tp(n), Rank(rank))
    }

    /// The indices of a part that is one range of neighbours.
    fn range(cut: &Cut, size: u64, rank: u32, n: u32) -> Range<u64> {
        let [Taken { start, len, step: 1 }] = take(cut, size, rank, n).unwrap()[..] else { panic!("not a range") };
        start..start + len
    }

    /// How many indices each part has.
    fn lens(how: Split, unit: u64, size: u64, n: u32) -> Vec<u64> {
        let cut = Cut { how, unit, ..Cut::default() };
        (0..n).map(|rank| take(&cut, size, rank, n).unwrap().iter().map(|run| run.len).sum()).collect()
    }

    fn indices(runs: &[Taken]) -> impl Iterator<Item = u64> {
        runs.iter().flat_map(|run| (0..run.len).map(|at| run.start + at * run.step))
    }

    #[test]
    fn ceil_leaves_trailing_ranks_empty() {
        let cut = Cut { how: Split::Ceil, ..Cut::default() };
        let of = |rank| range(&cut, 9, rank, 4);
        assert_eq!([of(0), of(1), of(2), of(3)], [0..3, 3..6, 6..9, 9..9]);
        // GPT-2's vocabulary in transformers and TGI.
        assert_eq!(range(&cut, 50257, 7, 8), 43981..50257);
    }

    #[test]
    fn even_is_strict_about_units() {
        let heads = Cut { unit: 128, ..Cut::default() };
        assert_eq!(range(&heads, 1280, 1, 2), 640..1280);
        let error = take(&heads, 1280, 1, 4).unwrap_err();
        assert_eq!((error.rule(), error.found()), (Some("not-divisible"), Some("4 parts")));
        assert_eq!(error.expected(), Some("a divisor of 10 units: 1, 2, 5, 10"));
        let error = take(&heads, 1300, 1, 2).unwrap_err();
        assert_eq!(
            (error.rule(), error.expected(), error.found()),
            (Some("unit"), Some("a multiple of 128, or 1 part"), Some("1300 in 2 parts"))
        );
        assert_eq!(range(&heads, 1300, 0, 1), 0..1300);
    }

    #[test]
    fn more_ranks_than_heads_share_them() {
        let kv = Cut { unit: 128, units: Some(8), replicate_units: true, ..Cut::default() };
        assert_eq!(range(&kv, 1024, 5, 16), 256..384);
        assert_eq!(range(&kv, 1024, 5, 8), 640..768);
        for n in [3, 12] {
            let error = take(&kv, 1024, 2, n).unwrap_err();
            assert_eq!(error.rule(), Some("not-divisible"));
            assert_eq!(error.expected(), Some("a multiple or a divisor of 8 units: 1, 2, 4, 8"));
        }
        let wrong = take(&kv, 2048, 0, 1).unwrap_err();
        assert_eq!((wrong.rule(), wrong.found()), (Some("units"), Some("2048")));
    }

    /// sharding.md sections 1 and 7: what works is what the error says.
    #[test]
    fn the_sizes_that_would_work_are_named() {
        for (size, unit, works) in [
            (11008, 128, "86 units: 1, 2, 43, 86"),
            (18944, 128, "148 units: 1, 2, 4, 37, 74, 148"),
            (29568, 128, "231 units: 1, 3, 7, 11, 21, 33, 77, 231"),
            (2880, 32, "90 units: 1, 2, 3, 5, 6, 9, 10, 15, 18, 30, 45, 90"),
            (71 * 64, 64, "71 units: 1, 71"),
            (2048, 128, "16 units: 1, 2, 4, 8, 16"),
        ] {
            let error = take(&Cut { unit, ..Cut::default() }, size, 0, 32).unwrap_err();
            assert_eq!(error.expected(), Some(&*format!("a divisor of {works}")), "{size}");
        }
    }

    /// The rules of sharding.md section 1 that are no error or padding, where they differ.
    #[test]
    fn uneven_parts_are_those_of_the_engines() {
        assert_eq!(lens(Split::Ceil, 32, 2880, 4), [23, 23, 23, 21].map(|blocks| blocks * 32));
        assert_eq!(lens(Split::Ceil, 32, 2880, 8), [12, 12, 12, 12, 12, 12, 12, 6].map(|blocks| blocks * 32));
        // Phi-3-medium's 10 heads of 128: transformers cuts through them, DeepSpeed does not.
        assert_eq!(lens(Split::Ceil, 1, 1280, 4), [320; 4]);
        assert_eq!(lens(Split::Balanced, 128, 1280, 4), [384, 384, 256, 256]);
        assert_eq!(lens(Split::LastTakesRest, 128, 1280, 4), [256, 256, 256, 512]);
        assert_eq!(lens(Split::RoundRobin, 128, 1280, 4), [384, 384, 256, 256]);
        assert_eq!(lens(Split::Even, 128, 1280, 5), [256; 5]);
    }

    /// The end of the dimension may be a partial block: 576 rows of DeepSeek-V3's `kv_a_proj_with_mqa` in blocks of 128.
    #[test]
    fn only_the_last_unit_of_a_part_is_partial() {
        assert_eq!(lens(Split::Ceil, 128, 576, 2), [384, 192]);
        assert_eq!(lens(Split::Balanced, 128, 576, 2), [384, 192]);
        assert_eq!(lens(Split::LastTakesRest, 128, 576, 2), [256, 320]);
        assert_eq!(lens(Split::RoundRobin, 128, 576, 2), [320, 256]);
        let table = |first| Cut { how: Split::Table(vec![first, vec![0..4]]), unit: 128, ..Cut::default() };
        assert_eq!(take(&table(vec![0..1, 4..5]), 576, 0, 2).unwrap().last().unwrap().len, 64);
        let error = take(&table(vec![4..5, 0..1]), 576, 0, 2).unwrap_err();
        assert_eq!(
            (error.rule(), error.expected(), error.found()),
            (Some("unit"), Some("a multiple of 128"), Some("64"))
        );
    }

    /// sharding.md section 5.
    #[test]
    fn experts_go_where_engines_put_them() {
        let balanced = Cut { how: Split::Balanced, ..Cut::default() };
        assert_eq!(range(&balanced, 256, 16, 24), 176..186);
        assert_eq!(lens(Split::Balanced, 1, 256, 24), [[11; 16].as_slice(), &[10; 8]].concat());
        let round = Cut { how: Split::RoundRobin, ..Cut::default() };
        assert_eq!(take(&round, 256, 16, 24).unwrap()[..], [Taken { start: 16, len: 10, step: 24 }]);
        assert_eq!(take(&round, 3, 3, 4).unwrap()[..], [Taken { start: 3, len: 0, step: 1 }]);
        // Redundant experts: 256 and 32 more slots, those of the first 32 experts again, on 32 ranks of 9.
        let slot = |slot: u64| slot % 256..slot % 256 + 1;
        let slots = (0..32).map(|rank| (rank * 9..(rank + 1) * 9).map(slot).collect()).collect();
        let redundant = Cut { how: Split::Table(slots), ..Cut::default() };
        let of_28 = [Taken { start: 252, len: 4, step: 1 }, Taken { start: 0, len: 5, step: 1 }];
        assert_eq!(take(&redundant, 256, 28, 32).unwrap()[..], of_28);
    }

    #[test]
    fn a_round_of_large_units_is_bounded() {
        let round = Cut { how: Split::RoundRobin, unit: 2, ..Cut::default() };
        let runs = take(&round, 7, 1, 2).unwrap();
        assert_eq!(indices(&runs).collect::<Vec<_>>(), [2, 3, 6]);
        assert_eq!(take(&round, 4 * UNROLL_MAX, 1, 2).unwrap().len() as u64, UNROLL_MAX);
        assert_eq!(take(&round, 4 * UNROLL_MAX + 4, 1, 2).unwrap_err().rule(), Some("cut"));
    }

    #[test]
    fn a_table_has_every_unit_and_no_other() {
        let refused = |parts: Vec<Vec<Range<u64>>>| {
            let error = take(&Cut { how: Split::Table(parts), ..Cut::default() }, 8, 0, 2).unwrap_err();
            assert_eq!(error.rule(), Some("table"));
            error.found().unwrap().to_owned()
        };
        assert_eq!(refused(vec![vec![0..8]]), "1");
        assert_eq!(refused(vec![vec![0..3], vec![5..8]]), "none of 3..5");
        assert_eq!(refused(vec![vec![0..3], vec![2..7]]), "none of 7..8");
        assert_eq!(refused(vec![vec![0..3], vec![2..9]]), "2..9");
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        let backwards = 3..2;
        assert_eq!(refused(vec![vec![0..8], vec![backwards]]), "3..2");
        let parts = vec![vec![4..6, 6..8, 0..4, 0..2], vec![]];
        let table = Cut { how: Split::Table(parts), ..Cut::default() };
        assert_eq!(indices(&take(&table, 8, 0, 2).unwrap()).collect::<Vec<_>>(), [4, 5, 6, 7, 0, 1, 2, 3, 0, 1]);
        assert_eq!(take(&table, 8, 1, 2).unwrap()[..], [Taken { start: 0, len: 0, step: 1 }]);
    }

    #[test]
    fn splits_have_names_and_tables_files() {
        for split in Split::NAMED {
            assert_eq!(Split::named(&split.to_string()), Some(split));
        }
        assert_eq!(Split::named("table of 2 parts"), None);
        let table = Split::from_table("# part 0\n252..256, 0..5\n\n7 9..9\t11 # 12\n0..0").unwrap();
        assert_eq!(table, Split::Table(vec![vec![252..256, 0..5], vec![7..8, 9..9, 11..12], vec![0..0]]));
        for wrong in ["x", "1..", "..1", "5..3", "1...3", "-1", "+1", "1..=2", "1;2", "18446744073709551615"] {
            let error = Split::from_table(&format!("0\n{wrong}")).unwrap_err();
            assert_eq!(error.rule(), Some("table"), "{wrong}");
            assert!(error.message().starts_with("line 2 ") && error.found().unwrap().contains(wrong), "{error}");
        }
    }

    #[test]
    fn nothing_overflows() {
        for split in Split::NAMED {
            for (unit, size) in [(1, u64::MAX), (7, u64::MAX), (u64::MAX, u64::MAX), (u64::MAX, 1), (3, 0)] {
                for n in [1, 3, 8192] {
                    let _ = take(&Cut { how: split.clone(), unit, ..Cut::default() }, size, n - 1, n);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn parts_have_each_index_once(
            how in prop::sample::select(&Split::NAMED[..]), unit in 1..6u64, size in 0..200u64, n in 1..14u32
        ) {
            let even = how == Split::Even;
            prop_assume!(!even || size.is_multiple_of(unit * u64::from(n)));
            let cut = Cut { how: how.clone(), unit, ..Cut::default() };
            let parts: Vec<_> = (0..n).map(|rank| take(&cut, size, rank, n).unwrap()).collect();
            let mut all: Vec<u64> = parts.iter().flat_map(|runs| indices(runs)).collect();
            for runs in &parts {
                prop_assert!(indices(runs).is_sorted() && (runs.len() == 1 || how == Split::RoundRobin && unit > 1));
            }
            if how == Split::RoundRobin {
                for (part, runs) in parts.iter().enumerate() {
                    prop_assert!(indices(runs).all(|index| index / unit % u64::from(n) == part as u64));
                }
                all.sort_unstable();
            }
            prop_assert!(all.into_iter().eq(0..size));
        }

        #[test]
        fn a_table_is_what_it_says(
            slots in prop::collection::vec(prop::collection::vec(0..12u64, 0..6), 1..5), unit in 1..4u64, tail in 0..4u64
        ) {
            // The units that no part has are of one more.
            let missing = (0..12).filter(|unit| !slots.concat().contains(unit)).collect();
            let slots = [slots, vec![missing]].concat();
            let parts = slots.iter().map(|part| part.iter().map(|&unit| unit..unit + 1).collect()).collect();
            let cut = Cut { how: Split::Table(parts), unit, ..Cut::default() };
            let size = 12 * unit - tail.min(unit - 1);
            for (rank, part) in slots.iter().enumerate() {
                let expected: Vec<u64> =
                    part.iter().flat_map(|slot| slot * unit..((slot + 1) * unit).min(size)).collect();
                match take(&cut, size, rank as u32, slots.len() as u32) {
                    Ok(runs) => prop_assert_eq!(indices(&runs).collect::<Vec<_>>(), expected),
                    Err(error) => {
                        prop_assert_eq!(error.rule(), Some("unit"));
                        prop_assert!(part.iter().rev().skip(1).any(|&slot| slot == 11));
                    }
                }
            }
        }
    }
}
