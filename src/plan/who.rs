//! Who holds what, for people: the place of each rank in the mesh, its layers and its experts.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::cut::{Cut, Taken};
use super::expr::Expr;
use super::rules::{Origin, Rule};
use super::world::{Ax, Mesh};
use super::{Inner, Plan};
use crate::checkpoint::TensorMeta;
use crate::extent::Rank;
use crate::limits::SPANS_SHOWN;

/// Columns of a table with a row for each rank; none on a mesh of neither stages nor expert-parallel groups.
pub(super) struct Who<'a> {
    plan: &'a Plan,
    axes: Vec<Ax>,
    /// Where parameters belong, by position; that of an alias is of no layer.
    of: Vec<Belongs<'a>>,
}

/// The layer that a parameter is of, and the experts.
#[derive(Default)]
struct Belongs<'a> {
    layer: Option<u64>,
    experts: Option<Experts<'a>>,
}

enum Experts<'a> {
    One(u64),
    /// Those that each rank gets of a dimension of this size.
    Cut(&'a Cut, u64),
}

impl<'a> Who<'a> {
    pub(super) fn of(plan: &'a Plan) -> Who<'a> {
        let Inner { checkpoint, rules, placed, params, declared, world, .. } = &*plan.inner;
        let mesh = world.mesh();
        if mesh.pp == 1 && mesh.ep == 1 {
            return Who { plan, axes: Vec::new(), of: Vec::new() };
        }
        let mut of: Vec<Belongs<'_>> = params.iter().map(|_| Belongs::default()).collect();
        for entry in declared {
            let placed = &placed[entry.placed as usize];
            // What an engine asks for itself is of no layer.
            let (Origin::Rule { rule, .. }, Some(tensor)) = (placed.origin, entry.tensor) else { continue };
            let (rule, tensor): (&Rule, _) = (&rules.rules[rule as usize], &checkpoint.tensors()[tensor as usize]);
            let one = rule.among.as_ref().and_then(|among| rule.number(among, placed.subject(&tensor.name)).ok());
            let layer = rules.pipeline.as_ref().and_then(|pipeline| pipeline.layer(&tensor.name).ok().flatten());
            let experts = one.map(|(number, _)| Experts::One(number)).or_else(|| expert_cut(&placed.expr, tensor));
            of[entry.param as usize] = Belongs { layer, experts };
        }
        let axes = Ax::ALL.into_iter().filter(|&ax| mesh.axis(ax) > 1).collect();
        Who { plan, axes, of }
    }

    /// What stands above the columns.
    pub(super) fn header(&self) -> String {
        if self.of.is_empty() {
            return String::new();
        }
        let axes: String = self.axes.iter().map(|ax| format!("  {:>3}", ax.name())).collect();
        format!("{axes}  {:<12}  experts", "layers")
    }

    /// A rank's row.
    pub(super) fn row(&self, rank: Rank) -> String {
        let mut row = String::new();
        if self.of.is_empty() {
            return row;
        }
        let mesh = self.plan.world().mesh();
        for &ax in &self.axes {
            _ = write!(row, "  {:>3}", mesh.coordinate(rank, ax));
        }
        let (mut layers, mut experts) = (Numbers::default(), Numbers::default());
        for dest in &self.plan.rank(rank).dests {
            let Belongs { layer, experts: of } = &self.of[dest.param as usize];
            layer.iter().for_each(|&layer| layers.add(layer, 1, 1));
            of.iter().for_each(|of| of.add(mesh, rank, &mut experts));
        }
        _ = write!(row, "  {:<12}  {}", layers.spans(), experts.spans());
        row
    }
}

impl Experts<'_> {
    /// Those of a rank.
    fn add(&self, mesh: Mesh, rank: Rank, to: &mut Numbers) {
        match *self {
            Experts::One(number) => to.add(number, 1, 1),
            Experts::Cut(cut, size) => {
                for Taken { start, len, step } in cut.take(size, mesh, rank).unwrap_or_default() {
                    match (len.checked_sub(1), step) {
                        (None, _) => {}
                        (Some(last), 1) => {
                            let first = start / cut.unit;
                            to.add(first, (start + last) / cut.unit - first + 1, 1);
                        }
                        // Only units of one index are taken in steps.
                        (Some(_), step) => to.add(start, len, step),
                    }
                }
            }
        }
    }
}

/// How the experts of a tensor that has several are divided.
fn expert_cut<'a>(expr: &'a Expr, tensor: &TensorMeta) -> Option<Experts<'a>> {
    match expr {
        Expr::Shard { x, dim, cut } if **x == Expr::Source && cut.by.names(Ax::Ep) => {
            Some(Experts::Cut(cut, *tensor.shape.dims().get(*dim)?))
        }
        Expr::Select { by, of } if by.by.names(Ax::Ep) => Some(Experts::Cut(by, of.len() as u64)),
        _ => expr.inner().iter().find_map(|inner| expert_cut(inner, tensor)),
    }
}

/// Numbers, however many: a rank's part of a dimension is a few ranges, or many numbers in equal steps.
#[derive(Default)]
struct Numbers {
    /// First and last.
    ranges: BTreeSet<(u64, u64)>,
    /// First, last and step, of more than are told apart.
    steps: BTreeSet<(u64, u64, u64)>,
}

impl Numbers {
    /// Adds `len` numbers from `first` on, every `step`-th.
    fn add(&mut self, first: u64, len: u64, step: u64) {
        match step {
            1 => drop(self.ranges.insert((first, first + len - 1))),
            _ if len <= APART => self.ranges.extend((0..len).map(|at| first + at * step).map(|one| (one, one))),
            _ => drop(self.steps.insert((first, first + (len - 1) * step, step))),
        }
    }

    /// A few of them, as ranges.
    fn spans(&self) -> String {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for &(first, last) in &self.ranges {
            match ranges.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => ranges.push((first, last)),
            }
        }
        let by = |(first, last, step): (u64, u64, u64)| format!("{first}..{} by {step}", last + 1);
        if let ([(first, _), (second, _), .., (_, last)], true) = (&ranges[..], self.steps.is_empty())
            && ranges.iter().all(|(first, last)| first == last)
            && ranges.windows(2).all(|pair| pair[1].0 - pair[0].0 == second - first)
        {
            return by((*first, *last, second - first));
        }
        let spans = ranges.iter().map(|&(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}..{}", last + 1),
        });
        let mut spans: Vec<String> = spans.chain(self.steps.iter().copied().map(by)).collect();
        if spans.is_empty() {
            return "-".into();
        }
        if spans.len() > SPANS_SHOWN {
            spans.truncate(SPANS_SHOWN);
            spans.push(match self.steps.is_empty() {
                true => format!("... {} in all", ranges.iter().map(|(first, last)| last - first + 1).sum::<u64>()),
                // Those in steps may be among the others.
                false => "...".into(),
            });
        }
        spans.join(", ")
    }
}

/// Numbers in equal steps that are told apart, so that those of several tensors are put together: more experts than
/// models have.
const APART: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_as_ranges() {
        let told = |numbers: &[u64]| {
            let mut all = Numbers::default();
            numbers.iter().for_each(|&number| all.add(number, 1, 1));
            all.spans()
        };
        assert_eq!(told(&[]), "-");
        assert_eq!(told(&[7]), "7");
        assert_eq!(told(&[0, 1, 2, 3]), "0..4");
        assert_eq!(told(&[0, 1, 2, 252, 253]), "0..3, 252..254");
        assert_eq!(told(&[3, 11, 19]), "3..20 by 8");
        assert_eq!(told(&[0, 2, 3, 5, 8, 12]), "0, 2..4, 5, 8, ... 6 in all");
    }

    #[test]
    fn many_numbers_are_not_told_apart() {
        let told = |runs: &[(u64, u64, u64)]| {
            let mut all = Numbers::default();
            runs.iter().for_each(|&(first, len, step)| all.add(first, len, step));
            all.spans()
        };
        let many = 1 << 60;
        assert_eq!(told(&[(0, many, 1), (5, many, 1)]), format!("0..{}", many + 5));
        assert_eq!(told(&[(1, 4, 2), (9, 2, 2)]), "1..12 by 2");
        assert_eq!(told(&[(1, many, 2)]), format!("1..{} by 2", 2 * many));
        assert_eq!(told(&[(1, many, 2), (0, 3, 1)]), format!("0..3, 1..{} by 2", 2 * many));
        assert_eq!(told(&[(0, many, 1), (u64::MAX - 1, 1, 1)]), format!("0..{many}, {}", u64::MAX - 1));
        let apart: Vec<_> = (0..9).map(|at| (many + 2 * at * at, 1, 1)).chain([(0, many / 4, 4)]).collect();
        assert!(told(&apart).ends_with(", ..."), "{}", told(&apart));
    }
}
