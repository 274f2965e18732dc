//! Who holds what, for people: the place of each rank in the mesh, its layers and its experts.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::cut::Cut;
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
        let (mut layers, mut experts) = (BTreeSet::new(), BTreeSet::new());
        for dest in &self.plan.rank(rank).dests {
            let Belongs { layer, experts: of } = &self.of[dest.param as usize];
            layers.extend(layer);
            of.iter().for_each(|of| of.add(mesh, rank, &mut experts));
        }
        _ = write!(row, "  {:<12}  {}", spans(&layers), spans(&experts));
        row
    }
}

impl Experts<'_> {
    /// Those of a rank.
    fn add(&self, mesh: Mesh, rank: Rank, to: &mut BTreeSet<u64>) {
        match *self {
            Experts::One(number) => drop(to.insert(number)),
            Experts::Cut(cut, size) => {
                for run in cut.take(size, mesh, rank).unwrap_or_default() {
                    to.extend((0..run.len).map(|at| (run.start + at * run.step) / cut.unit));
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

/// Numbers as ranges, a few of them.
fn spans(numbers: &BTreeSet<u64>) -> String {
    let list: Vec<u64> = numbers.iter().copied().collect();
    if let [first, second, .., last] = list[..]
        && second > first + 1
        && list.windows(2).all(|pair| pair[1] - pair[0] == second - first)
    {
        return format!("{first}..{} by {}", last + 1, second - first);
    }
    let spans = list.chunk_by(|a, b| a + 1 == *b).map(|span| match *span {
        [first, .., last] => format!("{first}..{}", last + 1),
        _ => span[0].to_string(),
    });
    let mut spans: Vec<String> = spans.collect();
    if spans.is_empty() {
        return "-".into();
    }
    if spans.len() > SPANS_SHOWN {
        spans.truncate(SPANS_SHOWN);
        spans.push(format!("... {} in all", list.len()));
    }
    spans.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_as_ranges() {
        let told = |numbers: &[u64]| spans(&numbers.iter().copied().collect());
        assert_eq!(told(&[]), "-");
        assert_eq!(told(&[7]), "7");
        assert_eq!(told(&[0, 1, 2, 3]), "0..4");
        assert_eq!(told(&[0, 1, 2, 252, 253]), "0..3, 252..254");
        assert_eq!(told(&[3, 11, 19]), "3..20 by 8");
        assert_eq!(told(&[0, 2, 3, 5, 8, 12]), "0, 2..4, 5, 8, ... 6 in all");
    }
}
