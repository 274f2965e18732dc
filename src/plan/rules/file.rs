//! Rules files: TOML, first match wins.

use std::path::Path;

use serde::Deserialize;

use super::{Placement, Rule, Rules, ShardRule};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::plan::expr::Split;
use crate::plan::world::{Ax, Coord};

impl Rules {
    /// Reads a rules file; see [`Rules::from_toml`] for what is in it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] if it cannot be read, and those of [`Rules::from_toml`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Rules> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("cannot read rules", path, error))?;
        Rules::from_toml(&text).map_err(|error| error.with_file(path))
    }

    /// Parses rules, first match first:
    ///
    /// ```toml
    /// rule = [
    ///   { match = "**.{q,k,v}_proj.weight", shard = { dim = 0, split = "even", unit = 128 } },
    ///   { match = "**.{o,down}_proj.weight", shard = { dim = 1 } },
    ///   { match = "head.*", only = 0, rename = "heads.{1}", optional = true },
    ///   { match = "**.rotary_emb.inv_freq", skip = true },
    ///   { match = "**", replicate = true },
    /// ]
    /// alias = [{ name = "lm_head.weight", of = "model.embed_tokens.weight" }]
    /// ```
    ///
    /// Each rule has exactly one of `shard`, `replicate`, `only` and `skip`. `shard` further takes `units` (how many
    /// units the dimension must have), `replicate_units` (see [`Cut`](crate::plan::Cut)) and `by`, one axis of the
    /// mesh or a list of them, slowest first (default `"tp"`).
    ///
    /// # Errors
    /// [`ErrorKind::Rules`], rule `rules-file`, for TOML that does not parse, unknown keys and values, and rule
    /// `pattern` for a pattern that makes no sense.
    pub fn from_toml(text: &str) -> Result<Rules> {
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count());
            refuse(format!("rules file, line {}: {}", line + 1, error.message().lines().next().unwrap_or_default()))
        })?;
        let File { rule, alias } = file;
        let mut rules = Rules::new();
        for entry in rule {
            rules = rules.push(entry.compile()?);
        }
        for Alias { name, of } in alias {
            rules = rules.alias(name, of);
        }
        rules.check()?;
        Ok(rules)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    rule: Vec<Entry>,
    #[serde(default)]
    alias: Vec<Alias>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Alias {
    name: String,
    of: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    r#match: String,
    shard: Option<Shard>,
    replicate: Option<bool>,
    skip: Option<bool>,
    only: Option<u32>,
    rename: Option<String>,
    #[serde(default)]
    optional: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shard {
    dim: usize,
    split: Option<How>,
    unit: Option<u64>,
    units: Option<u64>,
    #[serde(default)]
    replicate_units: bool,
    by: Option<By>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum How {
    Even,
    Ceil,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum By {
    One(Axis),
    Flat(Vec<Axis>),
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Axis {
    Dp,
    Pp,
    Cp,
    Tp,
}

impl Entry {
    fn compile(self) -> Result<Rule> {
        let Entry { r#match, shard, replicate, skip, only, rename, optional } = self;
        let mut placements = Vec::new();
        placements.extend(shard.map(|shard| Placement::from(shard.compile())));
        placements.extend(only.map(|rank| Placement::only(Rank(rank))));
        for (flag, placement) in [(replicate, Placement::replicate()), (skip, Placement::Skip)] {
            match flag {
                Some(true) => placements.push(placement),
                Some(false) => return Err(refuse(format!("rule for `{}`: false says nothing", r#match))),
                None => {}
            }
        }
        let count = placements.len();
        match placements.pop() {
            Some(placement) if count == 1 => {
                let mut rule = Rule::new(&r#match, placement);
                rule.rename = rename;
                rule.optional = optional;
                Ok(rule)
            }
            _ => Err(refuse(format!("rule for `{}` needs one of shard, replicate, only, skip", r#match))
                .with_expected(1, count)),
        }
    }
}

impl Shard {
    fn compile(self) -> ShardRule {
        let Shard { dim, split, unit, units, replicate_units, by } = self;
        let mut rule = ShardRule::dim(dim);
        if let Some(How::Ceil) = split {
            rule = rule.split(Split::Ceil);
        }
        if let Some(unit) = unit {
            rule = rule.unit(unit);
        }
        if let Some(units) = units {
            rule = rule.units(units);
        }
        if replicate_units {
            rule = rule.replicate_units();
        }
        match by {
            None => rule,
            Some(By::One(axis)) => rule.by(Coord::Axis(axis.ax())),
            Some(By::Flat(axes)) => rule.by(Coord::Flat(axes.into_iter().map(Axis::ax).collect())),
        }
    }
}

impl Axis {
    fn ax(self) -> Ax {
        match self {
            Axis::Dp => Ax::Dp,
            Axis::Pp => Ax::Pp,
            Axis::Cp => Ax::Cp,
            Axis::Tp => Ax::Tp,
        }
    }
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule("rules-file")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> (Option<&'static str>, String) {
        let error = Rules::from_toml(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rules);
        (error.rule(), error.to_string())
    }

    #[test]
    fn the_documented_file_parses() {
        let rules = Rules::from_toml(
            r#"
            rule = [
              { match = "**.{q,k,v}_proj.weight", shard = { dim = 0, split = "even", unit = 128 } },
              { match = "**.{o,down}_proj.weight", shard = { dim = 1, by = ["cp", "tp"] } },
              { match = "head.*", only = 0, rename = "heads.{1}", optional = true },
              { match = "**.rotary_emb.inv_freq", skip = true },
              { match = "**", replicate = true },
            ]
            alias = [{ name = "lm_head.weight", of = "model.embed_tokens.weight" }]
            "#,
        )
        .unwrap();
        assert_eq!(rules.rules.len(), 5);
        assert_eq!(rules.aliases.len(), 1);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert_eq!(refused("rule = [{ match = \"**\", replicat = true }]").0, Some("rules-file"));
        assert_eq!(refused("rules = []").0, Some("rules-file"));
        assert_eq!(refused("rule = [{ match = \"**\" }]").0, Some("rules-file"));
        assert_eq!(refused("rule = [{ match = \"**\", skip = false }]").0, Some("rules-file"));
        assert_eq!(refused("rule = [{ match = \"**\", skip = true, only = 1 }]").0, Some("rules-file"));
        assert_eq!(refused("rule = [{ match = \"a**\", skip = true }]").0, Some("pattern"));
        assert_eq!(refused("rule = [{ match = \"*\", replicate = true, rename = \"{2}\" }]").0, Some("rename"));
        assert!(refused("\n\nrule = 1").1.contains("line 3"));
    }
}
