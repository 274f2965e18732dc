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
use self::grammar::{Alias, Entry, File};
use super::pattern::Template;
use super::{Owner, Placement, Rule, Rules};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::RULES_MAX;
use crate::plan::expr::Expr;

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
    /// all that an [`Expr`] can. `docs/rules.md` has the whole grammar.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`], with rule `rules-file` for TOML that does not parse, unknown keys and values, else `pattern`,
    /// `rename`, `alias` or `coordinate` for what makes no sense in whatever checkpoint.
    pub fn from_toml(text: &str) -> Result<Rules> {
        let File { rule, alias } = toml::from_str(text).map_err(|error| place::located(text, &error))?;
        let mut compiler = Compiler::new();
        let mut rules = Rules::new();
        for entry in rule {
            let pattern = entry.r#match.clone();
            let of_rule = |error: Error| error.in_context(format_args!("rule `{pattern}`"));
            rules = entry.add(rules, &mut compiler).map_err(of_rule)?;
        }
        for Alias { name, of } in alias {
            rules = rules.alias(name, of);
        }
        rules.check()?;
        Ok(rules)
    }
}

impl Entry {
    /// Adds the rule to those before it.
    fn add(self, rules: Rules, compiler: &mut Compiler) -> Result<Rules> {
        let Entry { r#match, replicate, shard, skip, only, part, steps, expr, .. } = &self;
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
        let mut rule = Rule::new(r#match, placement);
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
        if let Some(of) = self.r#where {
            rules = rules.held_by(of.by.0, of.part.0);
        }
        Ok(rules)
    }

    /// Refuses keys that make no sense beside `key`, which says who gets what.
    fn refuse_changes(&self, key: &str) -> Result<()> {
        let Entry { r#where, cast, transpose, permute, .. } = self;
        if transpose.is_some() && permute.is_some() {
            return Err(refuse("has both transpose and permute".into()));
        }
        let changes = [
            cast.map(|_| "cast"),
            transpose.map(|_| "transpose"),
            permute.as_ref().map(|_| "permute"),
            r#where.as_ref().map(|_| "where"),
        ];
        let wrong = |what: &&str| match key {
            "skip" | "part" => true,
            "steps" | "expr" => *what != "where",
            "only" => *what == "where",
            _ => false,
        };
        match (changes.into_iter().flatten().find(wrong), key) {
            (None, _) => Ok(()),
            (Some(what), "skip") => Err(refuse(format!("{what} of a tensor that is skipped"))),
            (Some(what), "part") => Err(refuse(format!("{what} of a part of other destinations"))),
            (Some(what), "only") => Err(refuse(format!("has both only and {what}"))),
            (Some(what), key) => Err(refuse(format!("{what} beside {key}, where it is a step"))),
        }
    }
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule("rules-file")
}
