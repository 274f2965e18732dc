//! [`Rules`]: patterns over tensor names -> placement. First match wins, and nothing is placed by default.

mod file;
mod pattern;

use std::path::PathBuf;

use rayon::prelude::*;

use self::pattern::{Pattern, Template};
use super::cut::{Cut, Split};
use super::expr::{Expr, castable};
use super::world::Coord;
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// How the tensors of a checkpoint are divided over the ranks: a list of patterns with a placement each. The first
/// one that matches a tensor's name decides.
///
/// In a pattern `*` is one dot-separated segment or a part of one, `**` any number of segments (also none), `{a,b}`
/// alternatives, and `\` takes the next character as it is. A tensor that no rule matches is an error, and so is a
/// rule that matches no tensor unless it is [`optional`](Rules::optional): a typo must not silently replicate a model.
/// Patterns are checked when a plan is made.
///
/// ```
/// use shardlift::plan::{Rules, ShardRule};
///
/// let rules = Rules::new()
///     .shard("**.{q,k,v}_proj.weight", ShardRule::dim(0).unit(128))
///     .shard("**.{o,down}_proj.weight", 1)
///     .skip("**.rotary_emb.inv_freq").optional()
///     .replicate("**");
/// # let _ = rules;
/// ```
#[derive(Debug, Clone, Default)]
pub struct Rules {
    pub(super) rules: Vec<Rule>,
    pub(super) aliases: Vec<AliasRule>,
    keep: Vec<Filter>,
    drop: Vec<Filter>,
    /// What floats of 16 bits and more are cast to whose rule does not say.
    casting: Option<Dtype>,
    /// The file that the rules are from.
    file: Option<PathBuf>,
    /// The first mistake made while building; builders cannot fail half way.
    mistake: Option<(&'static str, String)>,
}

/// How a dimension is sharded: [`Rules::shard`] takes one, or a plain dimension.
#[derive(Debug, Clone)]
pub struct ShardRule {
    dim: usize,
    cut: Cut,
}

#[derive(Debug, Clone)]
pub(super) struct Rule {
    pattern: Result<Pattern, String>,
    pub(super) placement: Placement,
    rename: Option<Result<Template, String>>,
    optional: bool,
}

/// Who gets what of a matched tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placement {
    /// The owner gets what the expression says.
    Place { owner: Owner, expr: Expr },
    /// It is a part of other destinations only, whose rules name it.
    Part,
    /// Nobody gets anything.
    Skip,
}

/// Which ranks hold a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    All,
    Only(Rank),
}

#[derive(Debug, Clone)]
pub(super) struct AliasRule {
    pub(super) name: String,
    pub(super) of: String,
}

#[derive(Debug, Clone)]
struct Filter {
    glob: String,
    pattern: Result<Pattern, String>,
}

/// What the rules say about one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// This rule places it.
    Rule(u32),
    /// Destinations of other rules name it.
    Part,
    /// It is left out.
    Skipped,
}

/// What the rules say about a checkpoint's tensors.
pub(super) struct Matches {
    /// About each of them.
    pub(super) verdicts: Vec<Verdict>,
    /// What the expression of its rule names, for each tensor whose rule names any: sorted by the tensor that it matched.
    pub(super) named: Vec<(u32, Box<[u32]>)>,
}

impl Rules {
    /// No rules yet: every tensor is unmatched.
    pub fn new() -> Rules {
        Rules::default()
    }

    /// Every tensor whole on every rank.
    pub fn replicate_all() -> Rules {
        Rules::new().replicate("**").optional()
    }

    /// Matching tensors lie whole on every rank.
    pub fn replicate(self, pattern: impl AsRef<str>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::replicate()))
    }

    /// Matching tensors are divided along a dimension: `shard("**.q_proj.weight", 0)`, or a [`ShardRule`].
    pub fn shard(self, pattern: impl AsRef<str>, shard: impl Into<ShardRule>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::from(shard.into())))
    }

    /// Matching tensors are what the expression says, on every rank.
    pub fn place(self, pattern: impl AsRef<str>, expr: Expr) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::Place { owner: Owner::All, expr }))
    }

    /// Matching tensors lie whole on one rank and nowhere else.
    pub fn only(self, pattern: impl AsRef<str>, rank: Rank) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::only(rank)))
    }

    /// Matching tensors are parts of other destinations, whose expressions [name](Expr::Tensor) them, and no destinations
    /// of their own.
    pub fn part(self, pattern: impl AsRef<str>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::Part))
    }

    /// Matching tensors are not loaded.
    pub fn skip(self, pattern: impl AsRef<str>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::Skip))
    }

    /// The rule added last may match nothing.
    pub fn optional(mut self) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.optional = true,
            None => self.mistake("optional", "optional() before any rule"),
        }
        self
    }

    /// Destinations of the rule added last get this name, in which `{1}` is what the first wildcard of the pattern
    /// matched, `{2}` the second, and so on; `\` takes the next character as it is.
    pub fn rename(mut self, template: impl AsRef<str>) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.rename = Some(Template::new(template.as_ref())),
            None => self.mistake("rename", "rename() before any rule"),
        }
        self
    }

    /// Tensors of the rule added last are cast: their elements become of type `to`, which is BF16, F16 or F32. They
    /// must be of one of these, or of F8_E4M3 or F8_E5M2 without a tensor of scales beside them.
    pub fn cast(self, to: Dtype) -> Rules {
        self.wrap("cast", |x| Expr::Cast { x, to })
    }

    /// Dimensions of the tensors of the rule added last come in another order: `order` says for each dimension of the
    /// destination which one of the tensor it is. What a rule shards are dimensions of the tensor. Only floats of 16
    /// bits and more are permuted, and an F8 that is [cast](Rules::cast).
    pub fn permute(self, order: &[usize]) -> Rules {
        self.wrap("permute", |x| Expr::Permute { x, order: order.to_vec() })
    }

    /// Tensors of the rule added last are transposed; they must have two dimensions.
    pub fn transpose(self) -> Rules {
        self.permute(&[1, 0])
    }

    /// Casts all tensors of type BF16, F16 and F32 to `to`, which is one of these, unless their rule has a
    /// [`cast`](Rules::cast) of its own. Tensors of other types stay as they are.
    pub fn casting(mut self, to: Dtype) -> Rules {
        self.casting = Some(to);
        self
    }

    /// A further destination `name` that shares the memory of the destination `of` (tied weights), which is no alias
    /// itself. If `of` is left out by [`keeping`](Rules::keeping) or [`skipping`](Rules::skipping), its first alias
    /// that is not holds its bytes instead.
    pub fn alias(mut self, name: impl Into<String>, of: impl Into<String>) -> Rules {
        self.aliases.push(AliasRule { name: name.into(), of: of.into() });
        self
    }

    /// Only destinations that match `glob`, by their own name or by that of their tensor in the checkpoint, are loaded
    /// (those that match any, if called repeatedly). Does not say where to; the rules do.
    pub fn keeping(mut self, glob: impl AsRef<str>) -> Rules {
        self.keep.push(Filter::new(glob.as_ref()));
        self
    }

    /// Destinations that match `glob`, by their own name or by that of their tensor in the checkpoint, are not loaded,
    /// whatever the rules say.
    pub fn skipping(mut self, glob: impl AsRef<str>) -> Rules {
        self.drop.push(Filter::new(glob.as_ref()));
        self
    }

    /// Makes what the rule added last places a part of another expression.
    fn wrap(mut self, what: &'static str, expr: impl FnOnce(Box<Expr>) -> Expr) -> Rules {
        match self.rules.last_mut().map(|rule| &mut rule.placement) {
            Some(Placement::Place { expr: placed, .. }) => {
                *placed = expr(Box::new(std::mem::replace(placed, Expr::Source)));
            }
            Some(Placement::Part) => self.mistake(what, &format!("{what} of a part of other destinations")),
            Some(Placement::Skip) => self.mistake(what, &format!("{what} of a tensor that is skipped")),
            None => self.mistake(what, &format!("{what}() before any rule")),
        }
        self
    }

    pub(super) fn push(mut self, rule: Rule) -> Rules {
        self.rules.push(rule);
        self
    }

    fn mistake(&mut self, rule: &'static str, message: &str) {
        self.mistake.get_or_insert_with(|| (rule, message.to_owned()));
    }

    /// Refuses what makes no sense for any checkpoint.
    fn check(&self) -> Result<()> {
        if let Some((rule, message)) = &self.mistake {
            return Err(broken(rule, message.clone()));
        }
        self.rules.iter().try_for_each(Rule::check)?;
        self.casting.map_or(Ok(()), castable)?;
        for AliasRule { name, of } in &self.aliases {
            let wrong = |what: String| broken("alias", what).with_tensor(name.as_str());
            if let Some(what) = unusable(name) {
                return Err(wrong(format!("alias of `{of}` is {what}")));
            }
            if self.aliases.iter().any(|other| other.name == *of) {
                return Err(wrong(format!("alias of `{of}`, which is an alias itself")));
            }
        }
        Ok(())
    }

    /// What all floats of 16 and 32 bits are cast to.
    pub(super) fn casts_to(&self) -> Option<Dtype> {
        self.casting
    }

    /// The type of what `rule` places, where its expression says that.
    pub(super) fn dtype(&self, rule: u32) -> Option<Dtype> {
        match &self.rules[rule as usize].placement {
            Placement::Place { expr, .. } => expr.dtype(),
            Placement::Part | Placement::Skip => None,
        }
    }

    /// What the rules say about each tensor, whether it is filtered out or not.
    ///
    /// # Errors
    /// What makes no sense for any checkpoint, and what does not for this one.
    pub(super) fn matches(&self, checkpoint: &Checkpoint) -> Result<Matches> {
        self.check()?;
        let tensors = checkpoint.tensors();
        let matched: Vec<Option<u32>> =
            tensors.par_iter().with_min_len(TENSORS_PER_TASK).map(|tensor| self.first_match(&tensor.name)).collect();
        self.refuse_unused(tensors, &matched)?;
        let naming: Vec<bool> = self.rules.iter().map(|rule| rule.placement.names() > 0).collect();
        let mut named = Vec::new();
        let mut is_part = vec![false; if naming.contains(&true) { tensors.len() } else { 0 }];
        for (tensor, rule) in (0..).zip(&matched) {
            let Some(rule) = rule.filter(|&rule| naming[rule as usize]) else { continue };
            let sources = self.sources(rule, &tensors[tensor as usize].name, checkpoint)?;
            sources.iter().for_each(|&source| is_part[source as usize] = true);
            named.push((tensor, sources));
        }
        let is_part = |at: usize| is_part.get(at).copied().unwrap_or(false);
        let verdict = |(at, (tensor, matched)): (usize, (&TensorMeta, Option<u32>))| {
            let Some(rule) = matched else {
                return match is_part(at) {
                    true => Ok(Verdict::Part),
                    false if !self.wants(&[&tensor.name]) => Ok(Verdict::Skipped),
                    false => Err(unmatched(tensor)),
                };
            };
            match self.rules[rule as usize].placement {
                Placement::Skip => Ok(Verdict::Skipped),
                Placement::Place { .. } => Ok(Verdict::Rule(rule)),
                Placement::Part if is_part(at) => Ok(Verdict::Part),
                Placement::Part => {
                    let what = format!("rule `{}`: no destination has this part", self.pattern(rule));
                    Err(broken("unused-part", what).with_tensor(tensor.name.as_str()))
                }
            }
        };
        let verdicts = tensors.iter().zip(matched).enumerate().map(verdict).collect::<Result<_>>()?;
        Ok(Matches { verdicts, named })
    }

    /// The tensors that the expression of `rule` names for the tensor of this name.
    fn sources(&self, rule: u32, name: &str, checkpoint: &Checkpoint) -> Result<Box<[u32]>> {
        let Rule { pattern: Ok(pattern), placement: Placement::Place { expr, .. }, .. } = &self.rules[rule as usize]
        else {
            return Ok(Box::default());
        };
        let captures = pattern.captures(name).unwrap_or_default();
        let mut sources = Vec::new();
        expr.for_each_name(&mut |template| {
            let wrong = |what: String| broken("source", format!("rule `{}`: {what}", pattern.text())).with_tensor(name);
            let source = Template::new(template).map_err(wrong)?.fill(name, &captures);
            match checkpoint.position(&source) {
                Some(position) => sources.push(position as u32),
                None => return Err(wrong(format!("no tensor `{source}` for its destination"))),
            }
            Ok(())
        })?;
        Ok(sources.into())
    }

    /// The destination's name for a tensor that `rule` matched.
    pub(super) fn destination(&self, rule: u32, name: &str) -> Result<String> {
        let Rule { pattern: Ok(pattern), rename: Some(Ok(template)), .. } = &self.rules[rule as usize] else {
            return Ok(name.to_owned());
        };
        let filled = pattern.captures(name).map_or_else(|| name.to_owned(), |found| template.fill(name, &found));
        match unusable(&filled) {
            None => Ok(filled),
            Some(what) => {
                Err(broken("rename", format!("rule `{}` renames to {what}", pattern.text())).with_tensor(name))
            }
        }
    }

    /// What a tensor of type `from` is cast to that `rule` places.
    pub(super) fn cast_to(&self, rule: u32, from: Dtype) -> Option<Dtype> {
        match &self.rules[rule as usize].placement {
            Placement::Place { expr, .. } => {
                let all = self.casting.filter(|_| matches!(from, Dtype::Bf16 | Dtype::F16 | Dtype::F32));
                expr.cast_to().or(all)
            }
            Placement::Part | Placement::Skip => None,
        }
    }

    /// Whether a destination is loaded that goes by these names.
    pub(super) fn wants(&self, names: &[&str]) -> bool {
        let matches = |filter: &Filter| names.iter().any(|name| filter.matches(name));
        (self.keep.is_empty() || self.keep.iter().any(matches)) && !self.drop.iter().any(matches)
    }

    /// Refuses filters that make no sense, or that match none of the tensors and destinations with these names.
    pub(super) fn check_filters<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        for Filter { glob, pattern } in self.keep.iter().chain(&self.drop) {
            let pattern = compiled("pattern", pattern)?;
            if !names.clone().any(|name| pattern.matches(name)) {
                return Err(broken("unused-rule", format!("no tensor and no destination matches `{glob}`")));
            }
        }
        Ok(())
    }

    /// Names the rules file in an error of the rules.
    pub(super) fn located(&self, error: Error) -> Error {
        match &self.file {
            Some(file) if error.kind() == ErrorKind::Rules => error.with_file(file),
            _ => error,
        }
    }

    /// The rule that decides about the tensor of this name.
    pub(super) fn first_match(&self, name: &str) -> Option<u32> {
        self.rules.iter().position(|rule| rule.matches(name)).map(|rule| rule as u32)
    }

    /// The pattern of a rule, as it was written.
    pub(super) fn pattern(&self, rule: u32) -> &str {
        self.rules[rule as usize].text()
    }

    fn refuse_unused(&self, tensors: &[TensorMeta], matched: &[Option<u32>]) -> Result<()> {
        let mut used = vec![false; self.rules.len()];
        for rule in matched.iter().flatten() {
            used[*rule as usize] = true;
        }
        for (rule, used) in self.rules.iter().zip(used) {
            if !used && !rule.optional {
                let text = rule.text();
                let shadowed = tensors.iter().any(|tensor| rule.matches(&tensor.name));
                let why = if shadowed { "earlier rules leave nothing to rule" } else { "no tensor matches rule" };
                return Err(broken("unused-rule", format!("{why} `{text}`")));
            }
        }
        Ok(())
    }
}

impl ShardRule {
    /// Even shards of whole indices of dimension `dim` (0 the outermost), over the tensor-parallel ranks.
    pub fn dim(dim: usize) -> ShardRule {
        ShardRule { dim, cut: Cut::default() }
    }

    /// What happens when the units do not divide evenly.
    pub fn split(mut self, how: Split) -> ShardRule {
        self.cut.how = how;
        self
    }

    /// So many indices stay together: a head, a group, a block.
    pub fn unit(mut self, unit: u64) -> ShardRule {
        self.cut.unit = unit;
        self
    }

    /// The dimension must have exactly so many units.
    pub fn units(mut self, units: u64) -> ShardRule {
        self.cut.units = Some(units);
        self
    }

    /// With more ranks than units, neighbouring ranks share a unit.
    pub fn replicate_units(mut self) -> ShardRule {
        self.cut.replicate_units = true;
        self
    }

    /// Which part each rank gets.
    pub fn by(mut self, by: Coord) -> ShardRule {
        self.cut.by = by;
        self
    }
}

impl From<usize> for ShardRule {
    fn from(dim: usize) -> ShardRule {
        ShardRule::dim(dim)
    }
}

impl From<ShardRule> for Placement {
    fn from(ShardRule { dim, cut }: ShardRule) -> Placement {
        Placement::Place { owner: Owner::All, expr: Expr::shard(dim, cut) }
    }
}

impl Placement {
    /// How many tensors it names besides the one that was matched.
    fn names(&self) -> usize {
        match self {
            Placement::Place { expr, .. } => expr.names(),
            Placement::Part | Placement::Skip => 0,
        }
    }

    fn replicate() -> Placement {
        Placement::Place { owner: Owner::All, expr: Expr::Source }
    }

    fn only(rank: Rank) -> Placement {
        Placement::Place { owner: Owner::Only(rank), expr: Expr::Source }
    }
}

impl Owner {
    /// Whether `rank` holds the parameter.
    pub(super) fn has(self, rank: Rank) -> bool {
        match self {
            Owner::All => true,
            Owner::Only(owner) => owner == rank,
        }
    }
}

impl Rule {
    fn new(pattern: &str, placement: Placement) -> Rule {
        Rule { pattern: Pattern::new(pattern), placement, rename: None, optional: false }
    }

    /// Refuses what makes no sense for any tensor.
    fn check(&self) -> Result<()> {
        let Rule { pattern, placement, rename, optional: _ } = self;
        let pattern = compiled("pattern", pattern)?;
        let of_rule = |error: Error| error.in_context(format_args!("rule `{}`", pattern.text()));
        if let Placement::Place { expr, .. } = placement {
            expr.check().map_err(of_rule)?;
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
    fn text(&self) -> &str {
        self.pattern.as_ref().map_or("", |pattern| pattern.text())
    }

    fn matches(&self, name: &str) -> bool {
        self.pattern.as_ref().is_ok_and(|pattern| pattern.matches(name))
    }
}

impl Filter {
    fn new(glob: &str) -> Filter {
        Filter { glob: glob.to_owned(), pattern: Pattern::new(glob) }
    }

    fn matches(&self, name: &str) -> bool {
        self.pattern.as_ref().is_ok_and(|pattern| pattern.matches(name))
    }
}

fn compiled<'a, T>(rule: &'static str, compiled: &'a Result<T, String>) -> Result<&'a T> {
    compiled.as_ref().map_err(|message| broken(rule, message.clone()))
}

/// Why no destination can have this name: the header of a safetensors file has its metadata there.
fn unusable(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("an empty name"),
        "__metadata__" => Some("`__metadata__`, which is no tensor in a safetensors file"),
        _ => None,
    }
}

fn unmatched(tensor: &TensorMeta) -> Error {
    // A JSON string is a TOML string, but for DEL.
    let pattern = serde_json::Value::from(Pattern::like(&tensor.name)).to_string().replace('\u{7f}', "\\u007f");
    let line = format!("{{ match = {pattern}, replicate = true }}");
    broken("unmatched-tensor", format!("no rule matches; to load it whole on every rank add {line}"))
        .with_tensor(tensor.name.as_str())
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}

/// Fewest tensors whose names one task of the pool looks at: matching this many costs far more than handing them over.
pub(super) const TENSORS_PER_TASK: usize = 512;
