//! Rules files: TOML, first match wins.

mod compile;
mod grammar;
mod place;
#[cfg(test)]
mod tests;

use std::fs::File as Input;
use std::io::{self, Read};
use std::path::Path;

use self::compile::Compiler;
use self::grammar::{Alias, Entry, File, Filled, Pipeline, Quantized};
use super::pattern::Template;
use super::rule::{ModuleRule, Scope};
use super::{Owner, Placement, Rule, Rules};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::RULES_MAX;
use crate::plan::expr::Expr;
use crate::plan::quant::Quantization;

impl Rules {
    /// Reads a rules file; see [`Rules::from_toml`] for what is in it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] if it cannot be read, [`ErrorKind::Rules`] if it is larger than
    /// [`RULES_MAX`], and those of [`Rules::from_toml`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Rules> {
        let path = path.as_ref();
        let read = || -> io::Result<Option<String>> {
            let mut bytes = Vec::new();
            // Not by its size: a pipe has none.
            Input::open(path)?.take(RULES_MAX + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > RULES_MAX {
                return Ok(None);
            }
            String::from_utf8(bytes).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        };
        let text = read().map_err(|error| Error::io("cannot read rules", path, error))?.ok_or_else(|| {
            refuse("rules file is too large".into())
                .with_expected(format!("at most {RULES_MAX} bytes"), "more")
                .with_file(path)
        })?;
        let rules = Rules::from_toml(&text).map_err(|error| error.with_file(path))?;
        Ok(Rules { file: Some(path.to_owned()), ..rules })
    }

    /// Parses rules, first match first:
    ///
    /// ```toml
    /// rule = [
    ///   { match = "**.q_proj.weight", shard = { dim = 0, unit = 128 } },
    ///   { match = "**.{k,v}_proj.weight", shard = { dim = 0, unit = 128, replicate_units = true } },
    ///   { match = "**.gate_up_proj.weight", steps = [{ view = [2, 14336, 4096] }, { shard = { dim = 1 } }] },
    ///   { match = "head.*", only = 0, rename = "heads.{1}", optional = true },
    ///   { match = "**.rotary_emb.inv_freq", skip = true },
    ///   { match = "**", replicate = true },
    /// ]
    /// alias = [{ name = "lm_head.weight", of = "model.embed_tokens.weight" }]
    /// ```
    ///
    /// Each rule has exactly one of `replicate`, `shard`, `skip`, `only`, `part`, `steps` and `expr`; the last two say
    /// all that an [`Expr`] can. With `module` in place of `match` it is one of [modules](Rules::module). The tables
    /// `pipeline` and `quantization` are [`Rules::pipeline`] and [`Rules::quantization`]. `docs/rules.md` has the whole
    /// grammar.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`], with rule `rules-file` for TOML that does not parse, unknown keys and values, else `pattern`,
    /// `rename`, `alias` or `coordinate` for what makes no sense in whatever checkpoint.
    pub fn from_toml(text: &str) -> Result<Rules> {
        let File { rule, alias, pipeline, quantization } =
            toml::from_str(text).map_err(|error| place::located(text, &error))?;
        let mut compiler = Compiler::new();
        let mut rules = Rules::new();
        for (at, entry) in rule.into_iter().enumerate() {
            let (pattern, scope) = entry.scope().map_err(|error| error.in_context(format_args!("rule[{at}]")))?;
            let of_rule = |error: Error| error.in_context(format_args!("rule `{pattern}`"));
            rules = entry.add(&pattern, scope, rules, &mut compiler).map_err(of_rule)?;
        }
        for Alias { name, of, stage } in alias {
            rules = match stage {
                Some(stage) => rules.alias_on(stage.0, name, of),
                None => rules.alias(name, of),
            };
        }
        if let Some(Pipeline { layers, count, split }) = pipeline {
            rules = rules.pipeline(layers, count.map(|count| count.0), split.map_or_else(Default::default, |it| it.0));
        }
        rules = rules.quantization(quantization.map_or_else(Quantization::default, Quantization::from));
        rules.check()?;
        Ok(rules)
    }
}

impl Entry {
    /// The pattern, and what names it is about.
    fn scope(&self) -> Result<(String, Scope)> {
        match (&self.r#match, &self.module) {
            (Some(pattern), None) => Ok((pattern.clone(), Scope::Tensors)),
            (None, Some(pattern)) => Ok((pattern.clone(), Scope::Module(ModuleRule::default()))),
            (tensors, _) => {
                let found = if tensors.is_some() { "both" } else { "neither" };
                Err(refuse("does not say what it is about".into()).with_expected("one of match, module", found))
            }
        }
    }

    /// Adds the rule to those before it.
    fn add(self, pattern: &str, scope: Scope, rules: Rules, compiler: &mut Compiler) -> Result<Rules> {
        let Entry { replicate, shard, skip, only, part, steps, expr, .. } = &self;
        let everywhere = |expr| Placement::Place { owner: Owner::All, expr };
        let mut placements = Vec::new();
        let mut place = |key, placement| placements.push((key, placement));
        if replicate.is_some() {
            place("replicate", Placement::replicate());
        }
        if let Some(shard) = shard {
            place("shard", everywhere(Expr::shard(shard.dim.0, shard.cut())));
        }
        if skip.is_some() {
            place("skip", Placement::Skip);
        }
        if let Some(rank) = only {
            place("only", Placement::only(Rank(rank.0)));
        }
        if part.is_some() {
            place("part", Placement::Part);
        }
        if let Some(steps) = steps {
            place("steps", everywhere(compiler.steps(steps).map_err(|error| error.in_context("steps"))?));
        }
        if let Some(made) = expr {
            place("expr", everywhere(compiler.expr(made).map_err(|error| error.in_context("expr"))?));
        }
        if placements.len() != 1 {
            let keys: Vec<&str> = placements.iter().map(|(key, _)| *key).collect();
            let found = if keys.is_empty() { "none".into() } else { keys.join(" and ") };
            let expected = "one of replicate, shard, skip, only, part, steps, expr";
            return Err(refuse("does not say who gets what".into()).with_expected(expected, found));
        }
        let (key, placement) = placements.remove(0);
        self.refuse_changes(key)?;
        let mut rule = Rule { scope, ..Rule::new(pattern, placement) };
        rule.rename = self.rename.as_deref().map(Template::new);
        rule.optional = self.optional.is_some();
        let mut rules = rules.push(rule);
        if self.transpose.is_some() {
            rules = rules.transpose();
        }
        if let Some(order) = self.permute {
            rules = rules.permute(&order.iter().map(|dim| dim.0).collect::<Vec<_>>());
        }
        if let Some(to) = self.cast {
            rules = rules.cast(to.0);
        }
        if self.keep_dtype.is_some() {
            rules = rules.keep_dtype();
        }
        if let Some(of) = self.r#where {
            rules = rules.held_by(of.by.0, of.part.0);
        }
        if let Some(among) = self.among {
            let cut = among.cut();
            compiler.spend_cut(&cut)?;
            rules = rules.among(among.wildcard.0, among.count.0, cut);
        }
        if let Some(stage) = self.stage {
            rules = rules.stage(stage.0);
        }
        if let Some(order) = self.orientation {
            rules = rules.orientation(order.0);
        }
        if let Some(Filled { by, part, fill }) = self.bias {
            rules = rules.bias_on(by.0, part.0, fill.0);
        }
        for (from, to) in self.suffix.into_iter().flatten() {
            rules = rules.suffix(from, to);
        }
        Ok(rules)
    }

    /// Refuses keys that make no sense beside `key`, which says who gets what.
    fn refuse_changes(&self, key: &str) -> Result<()> {
        let Entry { r#where, among, stage, cast, keep_dtype, transpose, permute, .. } = self;
        if transpose.is_some() && permute.is_some() {
            return Err(refuse("has both transpose and permute".into()));
        }
        let changes = [cast.map(|_| "cast"), transpose.map(|_| "transpose"), permute.as_ref().map(|_| "permute")];
        if cast.is_some() && keep_dtype.is_some() {
            return Err(refuse("has both cast and keep_dtype".into()));
        }
        let holders =
            [r#where.as_ref().map(|_| "where"), among.as_ref().map(|_| "among"), stage.as_ref().map(|_| "stage")];
        let of_modules = [
            self.orientation.map(|_| "orientation"),
            self.bias.as_ref().map(|_| "bias"),
            self.suffix.as_ref().map(|_| "suffix"),
        ];
        let kept = [keep_dtype.map(|_| "keep_dtype")];
        if let Some(what) = of_modules.into_iter().flatten().next().filter(|_| self.module.is_none()) {
            return Err(refuse(format!("{what} beside match")).with_expected("a rule of modules", "one of tensors"));
        }
        let refused = match key {
            "skip" | "part" => [&changes[..], &holders, &of_modules, &kept].concat(),
            "steps" | "expr" => changes.to_vec(),
            "only" => holders.to_vec(),
            _ => Vec::new(),
        };
        match (refused.into_iter().flatten().next(), key) {
            (None, _) => Ok(()),
            (Some(what), "skip") => Err(refuse(format!("{what} of a tensor that is skipped"))),
            (Some(what), "part") => Err(refuse(format!("{what} of a part of other destinations"))),
            (Some(what), "only") => Err(refuse(format!("has both only and {what}"))),
            (Some(what), key) => Err(refuse(format!("{what} beside {key}, where it is a step"))),
        }
    }
}

impl From<Quantized> for Quantization {
    fn from(said: Quantized) -> Quantization {
        let Quantized { method, bits, group, act_order, block, refine } = said;
        let known = Quantization::default();
        Quantization {
            packed: method.map(|method| method.0),
            bits: bits.map_or(known.bits, |bits| bits.0),
            group: group.map(|group| group.0),
            act_order: act_order.is_some(),
            block: block.map_or(known.block, |block| block.map(|side| side.0)),
            refine: refine.is_some(),
        }
    }
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule("rules-file")
}
