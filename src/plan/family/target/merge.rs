//! Modules that engines put together into one: expressions, and rules that rename.

use crate::plan::cut::Cut;
use crate::plan::expr::Expr;
use crate::plan::family::parts::Experts;
use crate::plan::quant::Scalars;
use crate::plan::rules::Rules;

/// Experts that are modules of their own, on disk.
#[derive(Clone, Copy)]
pub(super) struct Names {
    /// Of the module that has them: `mlp.experts`.
    pub(super) experts: &'static str,
    pub(super) gate: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
}

impl Names {
    /// Those of most families.
    pub(super) const PROJECTIONS: Names =
        Names { experts: "mlp.experts", gate: "gate_proj", up: "up_proj", down: "down_proj" };
    pub(super) const MIXTRAL: Names = Names { experts: "block_sparse_moe.experts", gate: "w1", up: "w3", down: "w2" };
}

/// How an expert is divided, and what the stack of all is named.
pub(super) struct Stacked<'a> {
    pub(super) experts: &'a Experts,
    /// How the intermediate dimension of each is cut; `None` where it is whole.
    pub(super) inner: Option<Cut>,
    /// The module of the stacked gates and ups, below the layer.
    pub(super) gate_up: &'a str,
    /// The module of the stacked downs.
    pub(super) down: &'a str,
    /// What their names have after the module's.
    pub(super) suffixes: &'a [(&'static str, &'static str)],
    /// What becomes of scales that are one number.
    pub(super) scalars: Scalars,
}

impl Rules {
    /// Modules of an adapter, which keep their names: it may be for some of the modules of which one is made only.
    pub(super) fn adapted(self, module: &str, dim: usize, cut: &Cut) -> Rules {
        self.module(format!("base_model.model.**.{module}"), Expr::shard(dim, cut.clone())).optional()
    }

    /// Modules of which one is made, where there are any: `parts` are the last segments of their names, each with its
    /// cut. The first of them is renamed to `into`. Those of an adapter stay apart.
    pub(super) fn merged(self, below: &str, parts: &[(&str, Cut)], into: &str) -> Rules {
        let Some((&(first, _), rest)) = parts.split_first() else { return self };
        let exprs = parts.iter().enumerate().map(|(at, (name, cut))| {
            let x = if at == 0 { Expr::Source } else { Expr::Tensor(format!("{{1}}.{below}.{name}")) };
            Expr::Shard { x: Box::new(x), dim: 0, cut: cut.clone() }
        });
        let apart = parts.iter().fold(self, |rules, (name, cut)| rules.adapted(&format!("{below}.{name}"), 0, cut));
        let others: Vec<&str> = rest.iter().map(|(name, _)| *name).collect();
        apart
            .module(format!("**.{below}.{first}"), Expr::Concat { dim: 0, parts: exprs.collect() })
            .rename(format!("{{1}}.{below}.{into}"))
            .optional()
            .module_part(format!("**.{below}.{{{}}}", others.join(",")))
            .optional()
    }

    /// Experts that become two stacks: gates and ups `[experts, 2 * intermediate, hidden]`, downs
    /// `[experts, hidden, intermediate]`. Those of an adapter stay apart.
    pub(super) fn stacked(self, names: &Names, stacked: &Stacked<'_>) -> Rules {
        let Names { experts: module, gate, up, down } = *names;
        let Stacked { experts, ref inner, gate_up, down: stacked_down, suffixes, scalars } = *stacked;
        let tensor = |expert: u64, name: &str, dim: usize| {
            let x = Expr::Tensor(format!("{{1}}.{module}.{expert}.{name}"));
            match inner {
                Some(cut) => Expr::Shard { x: Box::new(x), dim, cut: cut.clone() },
                None => x,
            }
        };
        let stack = |of: &dyn Fn(u64) -> Expr| {
            let of = (0..experts.count).map(of).collect();
            Expr::Stack { parts: vec![Expr::Select { by: experts.cut(), of }] }
        };
        let both =
            stack(&|expert| Expr::Concat { dim: 0, parts: vec![tensor(expert, gate, 0), tensor(expert, up, 0)] });
        let rows = stack(&|expert| tensor(expert, down, 1));
        let apart =
            [(format!("{{{gate},{up}}}"), 0), (down.to_owned(), 1)].into_iter().fold(self, |rules, (name, dim)| {
                let expr = inner.as_ref().map_or(Expr::Source, |cut| Expr::shard(dim, cut.clone()));
                rules
                    .module(format!("base_model.model.**.{module}.*.{name}"), expr)
                    .among(2, experts.count, experts.cut())
                    .optional()
            });
        let rules = apart
            .module(format!("**.{module}.0.{gate}"), both)
            .rename(format!("{{1}}.{gate_up}"))
            .suffixes(suffixes)
            .scalars(scalars)
            .module(format!("**.{module}.0.{down}"), rows)
            .rename(format!("{{1}}.{stacked_down}"))
            .suffixes(suffixes)
            .scalars(scalars);
        rules.module_part(format!("**.{module}.*.{{{gate},{up},{down}}}"))
    }

    pub(super) fn suffixes(self, suffixes: &[(&'static str, &'static str)]) -> Rules {
        suffixes.iter().fold(self, |rules, (from, to)| rules.suffix(from, *to))
    }
}
