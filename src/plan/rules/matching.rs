//! What rules say about the tensors of a checkpoint.

use rayon::prelude::*;

use super::module::Modules;
use super::pattern::Template;
use super::{Placement, Rule, Rules, Scope, broken, unmatched};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::expr::Expr;
use crate::plan::quant::SUFFIXES;
use crate::plan::world::Mesh;

/// What the rules say about one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::plan) enum Verdict {
    /// It is placed so: a position in [`Matches::placed`].
    Placed(u32),
    /// Destinations of other rules name it.
    Part,
    /// It is left out.
    Skipped,
}

/// What a rule makes of a tensor that it matches.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Placed {
    /// Position of the rule.
    pub(in crate::plan) rule: u32,
    /// What the tensor's name has after that of the module, if the rule is one of modules.
    pub(in crate::plan) suffix: Option<&'static str>,
    /// What its destination is made of.
    pub(in crate::plan) expr: Expr,
}

/// What the rules say about a checkpoint's tensors.
pub(in crate::plan) struct Matches {
    /// About each of them.
    pub(in crate::plan) verdicts: Vec<Verdict>,
    /// All that rules make of tensors.
    pub(in crate::plan) placed: Vec<Placed>,
    /// What the expression of its rule names, for each tensor whose rule names any: sorted by the tensor that it matched.
    pub(in crate::plan) named: Vec<(u32, Box<[u32]>)>,
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
        Match { rule: self.rule, suffix: self.suffix }.subject(name)
    }
}

impl Rules {
    /// What the rules say about each tensor, whether it is filtered out or not.
    ///
    /// # Errors
    /// What makes no sense for any checkpoint, and what does not for this one.
    pub(in crate::plan) fn matches(&self, checkpoint: &Checkpoint, mesh: Mesh) -> Result<Matches> {
        self.check()?;
        let tensors = checkpoint.tensors();
        let matched: Vec<Option<Match>> =
            tensors.par_iter().with_min_len(TENSORS_PER_TASK).map(|tensor| self.matching(&tensor.name)).collect();
        self.refuse_unused(tensors, &matched)?;

        let mut placed: Vec<Placed> = Vec::with_capacity(self.rules.len());
        for (rule, entry) in (0..).zip(&self.rules) {
            let expr = entry.placement.expr().cloned().unwrap_or(Expr::Source);
            placed.push(Placed { rule, suffix: None, expr });
        }
        let mut modules = Modules::new(self, checkpoint, mesh, &matched);
        let mut positions = vec![0; tensors.len()];
        for (tensor, found) in matched.iter().enumerate() {
            let Some(found) = found else { continue };
            positions[tensor] = match found.suffix {
                Some(_) => modules.placed(tensor, found, &mut placed)?,
                None => found.rule,
            };
        }

        let naming: Vec<bool> = placed.iter().map(|placed| placed.expr.names() > 0).collect();
        let mut named = Vec::new();
        let mut is_part = vec![false; if naming.contains(&true) { tensors.len() } else { 0 }];
        for (tensor, found) in matched.iter().enumerate() {
            let Some(found) = found.filter(|_| naming[positions[tensor] as usize]) else { continue };
            let expr = &placed[positions[tensor] as usize].expr;
            let sources = self.sources(&found, expr, &tensors[tensor].name, checkpoint)?;
            sources.iter().for_each(|&source| is_part[source as usize] = true);
            named.push((tensor as u32, sources));
        }
        let is_part = |at: usize| is_part.get(at).copied().unwrap_or(false);
        let verdict = |(at, (tensor, matched)): (usize, (&TensorMeta, Option<Match>))| {
            let Some(Match { rule, .. }) = matched else {
                return match is_part(at) {
                    true => Ok(Verdict::Part),
                    false if !self.wants(&[&tensor.name]) => Ok(Verdict::Skipped),
                    false => Err(unmatched(tensor)),
                };
            };
            match self.rules[rule as usize].placement {
                Placement::Skip => Ok(Verdict::Skipped),
                Placement::Place { .. } => Ok(Verdict::Placed(positions[at])),
                Placement::Part if is_part(at) => Ok(Verdict::Part),
                Placement::Part => {
                    let what = format!("rule `{}`: no destination has this part", self.pattern(rule));
                    Err(broken("unused-part", what).with_tensor(tensor.name.as_str()))
                }
            }
        };
        let verdicts = tensors.iter().zip(matched).enumerate().map(verdict).collect::<Result<_>>()?;
        Ok(Matches { verdicts, placed, named })
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

    /// The tensors that an expression names for the tensor of this name.
    fn sources(&self, found: &Match, expr: &Expr, name: &str, checkpoint: &Checkpoint) -> Result<Box<[u32]>> {
        let Rule { pattern: Ok(pattern), .. } = &self.rules[found.rule as usize] else { return Ok(Box::default()) };
        let subject = found.subject(name);
        let captures = pattern.captures(subject).unwrap_or_default();
        let mut sources = Vec::new();
        expr.for_each_name(&mut |template| {
            let wrong = |what: String| broken("source", format!("rule `{}`: {what}", pattern.text())).with_tensor(name);
            let source = Template::new(template).map_err(wrong)?.fill(subject, &captures);
            match checkpoint.position(&source) {
                Some(position) => sources.push(position as u32),
                None => return Err(wrong(format!("no tensor `{source}` for its destination"))),
            }
            Ok(())
        })?;
        Ok(sources.into())
    }

    /// The destination's name for a tensor that is placed so.
    pub(in crate::plan) fn destination(&self, placed: &Placed, name: &str) -> Result<String> {
        let Rule { pattern: Ok(pattern), rename, .. } = &self.rules[placed.rule as usize] else {
            return Ok(name.to_owned());
        };
        if rename.is_none() && placed.suffix.is_none() {
            return Ok(name.to_owned());
        }
        let subject = placed.subject(name);
        let mut filled = match rename {
            Some(Ok(template)) => {
                pattern.captures(subject).map_or_else(|| subject.to_owned(), |found| template.fill(subject, &found))
            }
            _ => subject.to_owned(),
        };
        filled.push_str(self.renamed_suffix(placed.rule, placed.suffix.unwrap_or_default()));
        match super::unusable(&filled) {
            None => Ok(filled),
            Some(what) => {
                Err(broken("rename", format!("rule `{}` renames to {what}", pattern.text())).with_tensor(name))
            }
        }
    }

    /// The type of the first elements that a destination is made of, and its own: `matched` is that of the tensor that the
    /// rule matched, `named` that of the first that the expression names.
    pub(in crate::plan) fn dtypes(&self, placed: &Placed, matched: Dtype, named: Option<Dtype>) -> (Dtype, Dtype) {
        match placed.expr.first() {
            Expr::Const { dtype, .. } => (*dtype, placed.expr.cast_to().unwrap_or(*dtype)),
            first => {
                let from = if matches!(first, Expr::Source) { matched } else { named.unwrap_or(matched) };
                (from, self.cast_to(placed, from).unwrap_or(from))
            }
        }
    }

    /// What a tensor of type `from` is cast to where it is placed so.
    pub(in crate::plan) fn cast_to(&self, placed: &Placed, from: Dtype) -> Option<Dtype> {
        let all = self.casting.filter(|_| matches!(from, Dtype::Bf16 | Dtype::F16 | Dtype::F32));
        placed.expr.cast_to().or(all)
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

/// Fewest tensors whose names one task of the pool looks at: matching this many costs far more than handing them over.
pub(in crate::plan) const TENSORS_PER_TASK: usize = 512;
