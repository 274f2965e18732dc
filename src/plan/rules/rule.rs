//! A rule: which names it is about, and who gets what of them.

use std::ops::Range;

use super::pattern::{Pattern, Template};
use super::{ShardRule, broken, compiled, unusable};
use crate::error::{Error, Result};
use crate::extent::Rank;
use crate::plan::cut::Cut;
use crate::plan::expr::{Expr, Fill};
use crate::plan::form::no_part;
use crate::plan::quant::{Orientation, Scalars, check_derivable};
use crate::plan::rules::Stage;
use crate::plan::stages::StageSplit;
use crate::plan::world::{Coord, Mesh};

#[derive(Debug, Clone)]
pub(in crate::plan) struct Rule {
    pub(super) pattern: Result<Pattern, String>,
    pub(super) scope: Scope,
    pub(in crate::plan) placement: Placement,
    pub(in crate::plan) stage: Option<Stage>,
    pub(in crate::plan) among: Option<Among>,
    pub(super) rename: Option<Result<Template, String>>,
    pub(super) optional: bool,
    /// Whether [`Rules::casting`](super::Rules::casting) leaves its tensors alone.
    pub(super) keep_dtype: bool,
}

/// What names a rule's pattern is about.
#[derive(Debug, Clone)]
pub(super) enum Scope {
    Tensors,
    Module(ModuleRule),
}

/// What holds for the tensors of a module.
#[derive(Debug, Clone, Default)]
pub(super) struct ModuleRule {
    pub(super) orientation: Orientation,
    /// Which ranks have the bias, and what the others have.
    pub(super) bias: Option<(Coord, u32, Fill)>,
    /// What becomes of tensors of one element.
    pub(super) scalars: Scalars,
    /// What destinations' names have after the module's instead.
    pub(super) suffixes: Vec<(&'static str, String)>,
}

/// Which of several like tensors each rank holds.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Among {
    /// The wildcard that matches the number of one, the first being 1.
    pub(super) wildcard: usize,
    pub(super) count: u64,
    pub(in crate::plan) cut: Cut,
}

/// The layers of pipeline stages.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Pipeline {
    /// Matches the tensors of layers; the first wildcard that is a number is the layer's.
    pub(super) pattern: Result<Pattern, String>,
    /// How many layers there are; nothing can be divided into stages without.
    pub(in crate::plan) layers: Option<u64>,
    pub(in crate::plan) how: StageSplit,
    /// Whether all layers must be there, and rules of other tensors must say on which stage they are.
    pub(in crate::plan) is_strict: bool,
}

/// Who gets what of a matched tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::plan) enum Placement {
    /// The owner gets what the expression says.
    Place { owner: Owner, expr: Expr },
    /// It is a part of other destinations only, whose rules name it.
    Part,
    /// Nobody gets anything.
    Skip,
}

/// Which ranks hold a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::plan) enum Owner {
    All,
    Only(Vec<Rank>),
    /// Those with this part of a division.
    Where(Coord, u32),
}

#[derive(Debug, Clone)]
pub(in crate::plan) struct AliasRule {
    pub(in crate::plan) name: String,
    pub(in crate::plan) of: String,
    /// The stages that have it; without, all that have the original.
    pub(in crate::plan) stage: Option<Stage>,
}

#[derive(Debug, Clone)]
pub(super) struct Filter {
    pub(super) glob: String,
    pub(super) pattern: Result<Pattern, String>,
}

impl From<ShardRule> for Placement {
    fn from(ShardRule { dim, cut }: ShardRule) -> Placement {
        Placement::Place { owner: Owner::All, expr: Expr::shard(dim, cut) }
    }
}

impl From<Expr> for Placement {
    fn from(expr: Expr) -> Placement {
        Placement::Place { owner: Owner::All, expr }
    }
}

impl Placement {
    /// What it makes of a tensor.
    pub(super) fn expr(&self) -> Option<&Expr> {
        match self {
            Placement::Place { expr, .. } => Some(expr),
            Placement::Part | Placement::Skip => None,
        }
    }

    /// Which ranks have it.
    pub(in crate::plan) fn owner(&self) -> Option<&Owner> {
        match self {
            Placement::Place { owner, .. } => Some(owner),
            Placement::Part | Placement::Skip => None,
        }
    }

    pub(super) fn replicate() -> Placement {
        Placement::Place { owner: Owner::All, expr: Expr::Source }
    }

    pub(super) fn only(rank: Rank) -> Placement {
        Placement::Place { owner: Owner::Only(vec![rank]), expr: Expr::Source }
    }
}

impl Owner {
    /// Whether `rank` holds the parameter.
    pub(in crate::plan) fn has(&self, mesh: Mesh, rank: Rank) -> Result<bool> {
        let size = mesh.size();
        match self {
            Owner::All => Ok(true),
            Owner::Only(owners) => match owners.iter().find(|owner| owner.0 >= size) {
                Some(owner) => Err(broken("rank", "no such rank").with_expected(format!("a rank below {size}"), owner)),
                None => Ok(owners.contains(&rank)),
            },
            Owner::Where(by, part) => match by.of(mesh, rank)? {
                (_, n) if *part >= n => Err(no_part(n, *part)),
                (i, _) => Ok(i == *part),
            },
        }
    }
}

impl Rule {
    pub(super) fn new(pattern: &str, placement: Placement) -> Rule {
        Rule {
            pattern: Pattern::new(pattern),
            scope: Scope::Tensors,
            placement,
            stage: None,
            among: None,
            rename: None,
            optional: false,
            keep_dtype: false,
        }
    }

    /// Refuses what makes no sense for any tensor.
    pub(super) fn check(&self) -> Result<()> {
        let Rule { pattern, scope, placement, rename, among, stage, .. } = self;
        let pattern = compiled("pattern", pattern)?;
        let of_rule = |error: Error| error.in_context(format_args!("rule `{}`", pattern.text()));
        if let Scope::Module(ModuleRule { bias: Some((by, ..)), .. }) = scope {
            by.check().map_err(of_rule)?;
        }
        if placement.expr().is_none() {
            let said = [("among", among.is_some()), ("stage", stage.is_some())];
            if let Some((what, _)) = said.into_iter().find(|(_, said)| *said) {
                return Err(of_rule(broken(what, format!("{what} of what no rank holds by itself"))));
            }
        }
        if let Placement::Place { owner, expr } = placement {
            expr.check().map_err(of_rule)?;
            if self.keep_dtype
                && let Some(to) = expr.cast_to()
            {
                return Err(of_rule(broken("cast", format!("casts to {to} what keeps its type"))));
            }
            if let Scope::Module(_) = scope {
                check_derivable(expr).map_err(of_rule)?;
            }
            if let Owner::Where(by, _) = owner {
                by.check().map_err(of_rule)?;
            }
        }
        let more = |what: &str, template: &Template| {
            let asks = format!("{what} `{}` asks for more than the pattern has", template.text());
            of_rule(broken("rename", asks))
                .with_expected(format!("at most {} wildcards", pattern.wildcards()), template.wildcards())
        };
        if let Placement::Place { expr, .. } = placement {
            expr.for_each_name(&mut |name| match Template::new(name) {
                Ok(template) if template.wildcards() > pattern.wildcards() => Err(more("source", &template)),
                Ok(_) => Ok(()),
                Err(what) => Err(of_rule(broken("source", what))),
            })?;
        }
        if let Some(Among { wildcard, cut, .. }) = among {
            cut.by.check().map_err(of_rule)?;
            if !(1..=pattern.wildcards()).contains(wildcard) {
                return Err(of_rule(broken("among", "there is no such wildcard"))
                    .with_expected(format!("1 to {}", pattern.wildcards()), wildcard));
            }
        }
        let Some(template) = rename else { return Ok(()) };
        let wrong = |what: String| of_rule(broken("rename", what));
        let template = compiled("rename", template).map_err(of_rule)?;
        if let Placement::Part | Placement::Skip = placement {
            return Err(wrong("a tensor that is skipped or a part has no name to change".into()));
        }
        if template.wildcards() > pattern.wildcards() {
            return Err(more("rename", template));
        }
        match unusable(template.text()) {
            Some(what) => Err(wrong(format!("renames to {what}"))),
            None => Ok(()),
        }
    }

    /// The pattern as it was written.
    pub(super) fn text(&self) -> &str {
        self.pattern.as_ref().map_or("", |pattern| pattern.text())
    }

    pub(super) fn matches(&self, name: &str) -> bool {
        self.pattern.as_ref().is_ok_and(|pattern| pattern.matches(name))
    }

    /// Which one of several like tensors this is, and where in the name that stands.
    pub(in crate::plan) fn number(&self, among: &Among, subject: &str) -> Result<(u64, Range<usize>)> {
        let captures = self.pattern.as_ref().ok().and_then(|pattern| pattern.captures(subject));
        let range = captures.as_ref().and_then(|captures| captures.get(among.wildcard - 1)).cloned();
        let text = range.as_ref().map(|range| &subject[range.clone()]);
        let number = text.and_then(|text| text.parse().ok()).filter(|number| *number < among.count);
        number.zip(range.clone()).ok_or_else(|| {
            broken("among", format!("rule `{}`: not the number of one", self.text()))
                .with_expected(format!("a number below {}", among.count), text.unwrap_or("nothing"))
        })
    }
}

impl Among {
    pub(in crate::plan) fn count(&self) -> u64 {
        self.count
    }
}

impl Pipeline {
    /// The pattern as it was written.
    pub(in crate::plan) fn text(&self) -> &str {
        self.pattern.as_ref().map_or("", |pattern| pattern.text())
    }

    /// The layer that a tensor is of.
    pub(in crate::plan) fn layer(&self, name: &str) -> Result<Option<u64>> {
        let Some(captures) = self.pattern.as_ref().ok().and_then(|pattern| pattern.captures(name)) else {
            return Ok(None);
        };
        match captures.iter().find_map(|range| name[range.clone()].parse().ok()) {
            Some(layer) if self.layers.is_some_and(|layers| layer >= layers) => Err(broken("stages", "no such layer")
                .with_expected(format!("a layer below {}", self.layers.unwrap_or_default()), layer)
                .with_tensor(name)),
            layer => Ok(layer),
        }
    }
}

impl Filter {
    pub(super) fn new(glob: &str) -> Filter {
        Filter { glob: glob.to_owned(), pattern: Pattern::new(glob) }
    }

    pub(super) fn matches(&self, name: &str) -> bool {
        self.pattern.as_ref().is_ok_and(|pattern| pattern.matches(name))
    }
}
