//! What rules and requests say about the tensors of a checkpoint: one list of destinations.

use rayon::prelude::*;

use super::module::Modules;
use super::pattern::Template;
use super::{Placement, Request, Rule, Rules, Scope, broken, unmatched};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::limits::PARTS_MAX;
use crate::plan::expr::Expr;
use crate::plan::quant::SUFFIXES;
use crate::plan::world::Mesh;

/// What becomes of a tensor that a rule matches, or of a request.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Placed {
    /// Who says so.
    pub(in crate::plan) origin: Origin,
    /// What the destination is made of.
    pub(in crate::plan) expr: Expr,
    /// Whether it is cast with the model.
    pub(super) casts: bool,
}

/// Who asks for a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::plan) enum Origin {
    Rule {
        /// Position of the rule.
        rule: u32,
        /// What the tensor's name has after that of the module, if the rule is one of modules.
        suffix: Option<&'static str>,
    },
    /// Position of the request.
    Request(u32),
}

/// A destination, whoever asks for it.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Made {
    /// The tensor that the rule matched; none of a request.
    pub(in crate::plan) tensor: Option<u32>,
    /// What becomes of it: a position in [`Matches::placed`].
    pub(in crate::plan) placed: u32,
    /// The tensors that the expression names.
    pub(in crate::plan) named: Box<[u32]>,
}

/// What rules and requests make of a checkpoint's tensors.
pub(in crate::plan) struct Matches {
    /// All that becomes of tensors.
    pub(in crate::plan) placed: Vec<Placed>,
    /// The destinations, also those that filters leave out: of tensors in their order, then of requests.
    pub(in crate::plan) made: Vec<Made>,
}

/// The rule that matches a tensor, and what its name has after the module's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Match {
    pub(super) rule: u32,
    pub(super) suffix: Option<&'static str>,
}

impl Match {
    /// What the rule's pattern matched: the tensor's name, or the module's.
    pub(super) fn subject<'a>(&self, name: &'a str) -> &'a str {
        &name[..name.len() - self.suffix.map_or(0, str::len)]
    }
}

impl Placed {
    /// What the rule's pattern matched of a tensor's name.
    pub(in crate::plan) fn subject<'a>(&self, name: &'a str) -> &'a str {
        match self.origin {
            Origin::Rule { rule, suffix } => Match { rule, suffix }.subject(name),
            Origin::Request(_) => name,
        }
    }
}

impl Rules {
    /// All destinations, whether they are filtered out or not.
    ///
    /// # Errors
    /// What makes no sense for any checkpoint, and what does not for this one.
    pub(in crate::plan) fn matches(&self, checkpoint: &Checkpoint, mesh: Mesh) -> Result<Matches> {
        self.check()?;
        let tensors = checkpoint.tensors();
        let matched: Vec<Option<Match>> =
            tensors.par_iter().with_min_len(TENSORS_PER_TASK).map(|tensor| self.matching(&tensor.name)).collect();
        self.refuse_unused(tensors, &matched)?;
        self.check_parts(&matched)?;

        let mut placed: Vec<Placed> = Vec::with_capacity(self.rules.len() + self.requests.len());
        for (rule, entry) in (0..).zip(&self.rules) {
            let expr = entry.placement.expr().cloned().unwrap_or(Expr::Source);
            placed.push(Placed { origin: Origin::Rule { rule, suffix: None }, expr, casts: !entry.keep_dtype });
        }
        let mut modules = Modules::new(self, checkpoint, mesh, &matched)?;
        let mut positions = vec![0; tensors.len()];
        for (tensor, found) in matched.iter().enumerate() {
            let Some(found) = found else { continue };
            positions[tensor] = match found.suffix {
                Some(_) => modules.placed(tensor, found, &mut placed)?,
                None => found.rule,
            };
        }

        let templates = placed.iter().map(|placed| templates(&placed.expr)).collect::<Result<Vec<_>>>()?;
        let mut made = Vec::with_capacity(tensors.len() + self.requests.len());
        let mut is_part = vec![false; tensors.len()];
        for (tensor, found) in matched.iter().enumerate() {
            let Some(found) = found else { continue };
            if let Placement::Place { .. } = self.rules[found.rule as usize].placement {
                let placed = positions[tensor];
                let named = self.sources(found, &templates[placed as usize], &tensors[tensor].name, checkpoint)?;
                named.iter().for_each(|&source| is_part[source as usize] = true);
                made.push(Made { tensor: Some(tensor as u32), placed, named });
            }
        }
        for (at, request) in (0..).zip(&self.requests) {
            let named = request.sources(checkpoint)?;
            named.iter().for_each(|&source| is_part[source as usize] = true);
            made.push(Made { tensor: None, placed: placed.len() as u32, named });
            placed.push(Placed { origin: Origin::Request(at), expr: request.expr.clone(), casts: false });
        }
        for ((tensor, matched), is_part) in tensors.iter().zip(&matched).zip(is_part) {
            match matched.map(|matched| (matched.rule, &self.rules[matched.rule as usize].placement)) {
                Some((rule, Placement::Part)) if !is_part => {
                    let what = format!("rule `{}`: no destination has this part", self.pattern(rule));
                    return Err(broken("unused-part", what).with_tensor(tensor.name.as_str()));
                }
                None if !is_part && self.wants(&[&tensor.name]) => return Err(unmatched(tensor)),
                _ => {}
            }
        }
        Ok(Matches { placed, made })
    }

    /// Who asks for a destination: what that is, and its pattern or name.
    pub(in crate::plan) fn said_by(&self, placed: &Placed) -> (&'static str, &str) {
        match placed.origin {
            Origin::Rule { rule, .. } => ("rule", self.pattern(rule)),
            Origin::Request(at) => ("request", self.requests[at as usize].name()),
        }
    }

    /// The request for a destination, if it is one.
    pub(in crate::plan) fn request(&self, placed: &Placed) -> Option<&Request> {
        match placed.origin {
            Origin::Rule { .. } => None,
            Origin::Request(at) => Some(&self.requests[at as usize]),
        }
    }

    /// Refuses expressions of many parts for many tensors.
    fn check_parts(&self, matched: &[Option<Match>]) -> Result<()> {
        let parts: Vec<u64> = self.rules.iter().map(|rule| rule.placement.expr().map_or(0, Expr::parts)).collect();
        let mut all = 0;
        for found in matched.iter().flatten() {
            // One is as many as without an expression.
            all += Some(parts[found.rule as usize]).filter(|&parts| parts > 1).unwrap_or(0);
            if all > PARTS_MAX {
                let what = format!("rule `{}`: destinations have too many parts", self.pattern(found.rule));
                return Err(broken("parts", what).with_expected(format!("at most {PARTS_MAX} of all rules"), "more"));
            }
        }
        Ok(())
    }

    /// The rule that decides about the tensor of this name.
    pub(in crate::plan) fn first_match(&self, name: &str) -> Option<u32> {
        self.matching(name).map(|found| found.rule)
    }

    /// The first rule that matches a tensor of this name.
    fn matching(&self, name: &str) -> Option<Match> {
        let suffix = SUFFIXES.iter().copied().find(|suffix| name.ends_with(suffix));
        (0..).zip(&self.rules).find_map(|(rule, entry)| match entry.scope {
            Scope::Tensors => entry.matches(name).then_some(Match { rule, suffix: None }),
            Scope::Module(_) => {
                let suffix = suffix.filter(|suffix| entry.matches(&name[..name.len() - suffix.len()]));
                let suffix = suffix.or_else(|| entry.matches(name).then_some(""));
                suffix.map(|suffix| Match { rule, suffix: Some(suffix) })
            }
        })
    }

    /// The tensors that the templates of an expression name for the tensor of this name.
    fn sources(
        &self,
        found: &Match,
        templates: &[Template],
        name: &str,
        checkpoint: &Checkpoint,
    ) -> Result<Box<[u32]>> {
        let Rule { pattern: Ok(pattern), .. } = &self.rules[found.rule as usize] else { return Ok(Box::default()) };
        if templates.is_empty() {
            return Ok(Box::default());
        }
        let subject = found.subject(name);
        let captures = pattern.captures(subject).unwrap_or_default();
        let source = |template: &Template| {
            let source = template.fill(subject, &captures);
            checkpoint.position(&source).map(|position| position as u32).ok_or_else(|| {
                let what = format!("rule `{}`: no tensor `{source}` for its destination", pattern.text());
                broken("source", what).with_tensor(name)
            })
        };
        templates.iter().map(source).collect()
    }

    /// The name of a destination; `name` is that of the tensor that its rule matched.
    pub(in crate::plan) fn destination(&self, placed: &Placed, name: Option<&str>) -> Result<String> {
        let (rule, suffix, name) = match (placed.origin, name) {
            (Origin::Rule { rule, suffix }, Some(name)) => (rule, suffix, name),
            _ => return Ok(self.said_by(placed).1.to_owned()),
        };
        let Rule { pattern: Ok(pattern), rename, .. } = &self.rules[rule as usize] else {
            return Ok(name.to_owned());
        };
        if rename.is_none() && suffix.is_none() {
            return Ok(name.to_owned());
        }
        let subject = Match { rule, suffix }.subject(name);
        let mut filled = match rename {
            Some(Ok(template)) => {
                pattern.captures(subject).map_or_else(|| subject.to_owned(), |found| template.fill(subject, &found))
            }
            _ => subject.to_owned(),
        };
        filled.push_str(self.renamed_suffix(rule, suffix.unwrap_or_default()));
        match super::unusable(&filled) {
            None => Ok(filled),
            Some(what) => {
                Err(broken("rename", format!("rule `{}` renames to {what}", pattern.text())).with_tensor(name))
            }
        }
    }

    /// The type of the first elements that a destination is made of, and its own: `matched` is that of the tensor that the
    /// rule matched, `named` that of the first that the expression names.
    pub(in crate::plan) fn dtypes(
        &self,
        placed: &Placed,
        matched: Option<Dtype>,
        named: Option<Dtype>,
    ) -> (Dtype, Dtype) {
        let from = match placed.expr.first() {
            Expr::Const { dtype, .. } => return (*dtype, placed.expr.cast_to().unwrap_or(*dtype)),
            Expr::Source => matched,
            _ => named.or(matched),
        };
        let from = from.expect("bug in shardlift: a destination of nothing");
        (from, self.cast_to(placed, from).unwrap_or(from))
    }

    /// What a tensor of type `from` is cast to where it is placed so.
    pub(in crate::plan) fn cast_to(&self, placed: &Placed, from: Dtype) -> Option<Dtype> {
        let all = self.casting_of(placed).filter(|_| matches!(from, Dtype::Bf16 | Dtype::F16 | Dtype::F32));
        placed.expr.cast_to().or(all)
    }

    /// What floats of 16 and 32 bits are cast to that are placed so; a request says itself of which type it is, and what is
    /// stored beside a weight has a type of its own.
    pub(in crate::plan) fn casting_of(&self, placed: &Placed) -> Option<Dtype> {
        self.casting.filter(|_| placed.casts)
    }

    fn refuse_unused(&self, tensors: &[TensorMeta], matched: &[Option<Match>]) -> Result<()> {
        let mut used = vec![false; self.rules.len()];
        for found in matched.iter().flatten() {
            used[found.rule as usize] = true;
        }
        for (rule, used) in self.rules.iter().zip(used) {
            if !used && !rule.optional {
                let text = rule.text();
                let shadowed = tensors.iter().any(|tensor| match rule.scope {
                    Scope::Tensors => rule.matches(&tensor.name),
                    Scope::Module(_) => SUFFIXES
                        .iter()
                        .filter_map(|suffix| tensor.name.strip_suffix(suffix))
                        .any(|module| rule.matches(module)),
                });
                let why = if shadowed { "earlier rules leave nothing to rule" } else { "no tensor matches rule" };
                return Err(broken("unused-rule", format!("{why} `{text}`")));
            }
        }
        Ok(())
    }
}

/// The names in an expression of a rule, compiled.
pub(super) fn templates(expr: &Expr) -> Result<Vec<Template>> {
    let mut templates = Vec::new();
    expr.for_each_name(&mut |name| {
        templates.push(Template::new(name).map_err(|what| broken("source", what))?);
        Ok(())
    })?;
    Ok(templates)
}

/// Fewest tensors whose names one task of the pool looks at: matching this many costs far more than handing them over.
pub(in crate::plan) const TENSORS_PER_TASK: usize = 512;
