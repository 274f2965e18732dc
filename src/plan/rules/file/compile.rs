//! Expressions of a rules file -> [`Expr`], with bounds on what a short file can make of itself.

use super::grammar::{Concat, Const, Filled, Made, Merge, Pad, Repeat, Select, Slice, Step};
use super::refuse;
use crate::error::Result;
use crate::limits::{EXPRESSION_DEPTH, EXPRESSIONS_MAX};
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Expr;

/// Compiles the expressions of one file.
pub(super) struct Compiler {
    /// How many more expressions the file may have.
    left: usize,
    /// Which one of a selection is compiled: `{e}` in the names of its tensors.
    each: Option<u64>,
}

impl Compiler {
    pub(super) fn new() -> Compiler {
        Compiler { left: EXPRESSIONS_MAX, each: None }
    }

    /// A rule's expression.
    pub(super) fn expr(&mut self, made: &Made) -> Result<Expr> {
        self.made(made, 1)
    }

    /// What `steps` make of the matched tensor.
    pub(super) fn steps(&mut self, steps: &[Step]) -> Result<Expr> {
        below(1, steps)?;
        self.done_to(Expr::Source, steps)
    }

    /// `depth` counts the expressions from the outermost down to this one.
    fn made(&mut self, made: &Made, depth: usize) -> Result<Expr> {
        let Made { tensor, concat, stack, select, r#const, steps } = made;
        let depth = below(depth, steps)?;
        let named = [
            tensor.as_ref().map(|_| "tensor"),
            concat.as_ref().map(|_| "concat"),
            stack.as_ref().map(|_| "stack"),
            select.as_ref().map(|_| "select"),
            r#const.as_ref().map(|_| "const"),
        ];
        let origins: Vec<&str> = named.into_iter().flatten().collect();
        if origins.len() > 1 {
            return Err(refuse("an expression begins with one thing".into())
                .with_expected("one of tensor, concat, stack, select, const", origins.join(" and ")));
        }
        let origin = if let Some(name) = tensor {
            self.spend(name.len())?;
            Expr::Tensor(match self.each {
                Some(at) => numbered(name, at),
                None => name.clone(),
            })
        } else if let Some(Concat { dim, parts }) = concat {
            Expr::Concat { dim: dim.0, parts: self.parts("concat.parts", parts, depth)? }
        } else if let Some(parts) = stack {
            Expr::Stack { parts: self.parts("stack", parts, depth)? }
        } else if let Some(select) = select {
            self.select(select, depth)?
        } else if let Some(Const { dtype, dims, fill }) = r#const {
            self.spend(dims.len())?;
            Expr::Const { dtype: dtype.0, dims: dims.iter().map(|dim| dim.0).collect(), fill: fill.0.clone() }
        } else {
            Expr::Source
        };
        self.done_to(origin, steps)
    }

    fn parts(&mut self, key: &str, parts: &[Made], depth: usize) -> Result<Vec<Expr>> {
        let part = |(at, part): (usize, &Made)| {
            self.made(part, depth + 1).map_err(|error| error.in_context(format_args!("{key}[{at}]")))
        };
        parts.iter().enumerate().map(part).collect()
    }

    fn select(&mut self, select: &Select, depth: usize) -> Result<Expr> {
        let by = select.cut();
        self.spend_cut(&by)?;
        let of = match (&select.of, &select.each, select.count) {
            (Some(of), None, None) => self.parts("select.of", of, depth)?,
            (None, Some(each), Some(count)) => {
                let outer = self.each;
                let nth = |at| {
                    self.each = Some(at);
                    self.made(each, depth + 1).map_err(|error| error.in_context("select.each"))
                };
                let of = (0..count.0).map(nth).collect::<Result<_>>()?;
                self.each = outer;
                of
            }
            (of, each, count) => {
                let keys = [of.as_ref().map(|_| "of"), each.as_ref().map(|_| "each"), count.map(|_| "count")];
                let keys: Vec<&str> = keys.into_iter().flatten().collect();
                let found = if keys.is_empty() { "neither".into() } else { keys.join(" and ") };
                return Err(
                    refuse("select: no list to select from".into()).with_expected("of, or each and count", found)
                );
            }
        };
        Ok(Expr::Select { by, of })
    }

    fn done_to(&mut self, origin: Expr, steps: &[Step]) -> Result<Expr> {
        self.spend(0)?;
        steps.iter().try_fold(origin, |x, step| self.step(Box::new(x), step))
    }

    fn step(&mut self, x: Box<Expr>, step: &Step) -> Result<Expr> {
        self.spend(match step {
            Step::View(dims) => dims.len(),
            Step::Permute(order) => order.len(),
            _ => 0,
        })?;
        Ok(match step {
            Step::View(dims) => Expr::View { x, dims: dims.iter().map(|dim| dim.0).collect() },
            Step::Merge(Merge { dim, count }) => Expr::Merge { x, dim: dim.0, count: count.0 },
            Step::Slice(Slice { dim, start, len, step }) => {
                Expr::Slice { x, dim: dim.0, start: start.0, len: len.0, step: step.map_or(1, |step| step.0) }
            }
            Step::Shard(shard) => {
                let cut = shard.cut();
                self.spend_cut(&cut)?;
                Expr::Shard { x, dim: shard.dim.0, cut }
            }
            Step::Permute(order) => Expr::Permute { x, order: order.iter().map(|dim| dim.0).collect() },
            Step::Transpose(_) => Expr::Permute { x, order: vec![1, 0] },
            Step::Cast(to) => Expr::Cast { x, to: to.0 },
            Step::Pad(Pad { dim, to, fill }) => Expr::Pad { x, dim: dim.0, to: to.0, fill: fill.0.clone() },
            Step::Repeat(Repeat { dim, times }) => Expr::Repeat { x, dim: dim.0, times: times.0 },
            Step::On(Filled { by, part, fill }) => Expr::On { x, by: by.0.clone(), part: part.0, fill: fill.0.clone() },
        })
    }

    /// Counts the units of a table.
    pub(super) fn spend_cut(&mut self, cut: &Cut) -> Result<()> {
        match &cut.how {
            Split::Table(parts) => self.spend(parts.iter().map(|part| 1 + part.len()).sum()),
            _ => Ok(()),
        }
    }

    /// Counts an expression with a name or a list of this length: the long ones as more than one.
    fn spend(&mut self, length: usize) -> Result<()> {
        let left = self.left.checked_sub(1 + length / LENGTH);
        self.left = left.ok_or_else(|| {
            refuse("rules file has too many expressions".into())
                .with_expected(format!("at most {EXPRESSIONS_MAX}"), "more")
        })?;
        Ok(())
    }
}

/// How deep what `steps` are done to is, where the last of them is `depth` deep.
fn below(depth: usize, steps: &[Step]) -> Result<usize> {
    let deep = depth + steps.len();
    if deep <= EXPRESSION_DEPTH {
        return Ok(deep);
    }
    Err(refuse("expressions and their steps are nested too deep".into())
        .with_expected(format!("at most {EXPRESSION_DEPTH}"), deep))
}

/// Length of a name or a list that takes about as much memory as an expression.
const LENGTH: usize = 64;

/// A template with the number `at` for each `{e}` in it.
fn numbered(template: &str, at: u64) -> String {
    let mut name = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(next) = rest.find(['\\', '{']) {
        name.push_str(&rest[..next]);
        rest = &rest[next..];
        let whole = match rest.strip_prefix("{e}") {
            Some(after) => {
                name.push_str(&at.to_string());
                rest = after;
                continue;
            }
            // The escaped character is one of the rest's, whatever it is.
            None if rest.starts_with('\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            None => 1,
        };
        name.push_str(&rest[..whole]);
        rest = &rest[whole..];
    }
    name + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_placeholder_is_numbered() {
        for (template, name) in [
            ("{1}.experts.{e}.up", "{1}.experts.7.up"),
            ("{e}{e}", "77"),
            (r"\{e}{e}\", r"\{e}7\"),
            (r"\é{ee}", r"\é{ee}"),
            ("plain", "plain"),
        ] {
            assert_eq!(numbered(template, 7), name);
        }
    }
}
