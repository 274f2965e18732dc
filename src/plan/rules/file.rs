//! Rules files: TOML, first match wins.

use std::fs::File as Input;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;

use super::pattern::Template;
use super::{Placement, Rule, Rules, ShardRule};
use crate::cast::Cast;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::RULES_MAX;
use crate::plan::cut::Split;
use crate::plan::world::{Ax, Coord};

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
    ///   { match = "**.{q,k,v}_proj.weight", shard = { dim = 0, split = "even", unit = 128 } },
    ///   { match = "**.{o,down}_proj.weight", shard = { dim = 1 } },
    ///   { match = "head.*", only = 0, rename = "heads.{1}", optional = true },
    ///   { match = "**.rotary_emb.inv_freq", skip = true },
    ///   { match = "**", replicate = true },
    /// ]
    /// alias = [{ name = "lm_head.weight", of = "model.embed_tokens.weight" }]
    /// ```
    ///
    /// Each rule has exactly one of `shard`, `replicate`, `only` and `skip`. All but `skip` take `cast`, and one of
    /// `transpose` and `permute` (see [`Rules::cast`] and [`Rules::permute`]). `shard` further takes `units` (how many
    /// units the dimension must have), `replicate_units` (see [`Cut`](crate::plan::Cut)) and `by`, one axis of the
    /// mesh, a list of them, slowest first, or a [`Coord`] as it is displayed (default `"tp"`). `docs/rules.md` has the whole grammar.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`], with rule `rules-file` for TOML that does not parse, unknown keys and values, else `pattern`,
    /// `rename`, `alias` or `coordinate` for what makes no sense in whatever checkpoint.
    pub fn from_toml(text: &str) -> Result<Rules> {
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count());
            refuse(format!("rules file, line {}: {}", line + 1, error.message().lines().next().unwrap_or_default()))
        })?;
        let File { rule, alias } = file;
        let mut rules = Rules::new();
        for entry in rule {
            rules = entry.add(rules)?;
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
    only: Option<i64>,
    cast: Option<String>,
    transpose: Option<bool>,
    permute: Option<Vec<i64>>,
    rename: Option<String>,
    #[serde(default)]
    optional: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shard {
    dim: i64,
    split: Option<How>,
    unit: Option<i64>,
    units: Option<i64>,
    #[serde(default)]
    replicate_units: bool,
    by: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum How {
    Even,
    Ceil,
}

impl Entry {
    /// Adds the rule to those before it.
    fn add(self, rules: Rules) -> Result<Rules> {
        let Entry { r#match, shard, replicate, skip, only, cast, transpose, permute, rename, optional } = self;
        let of_rule = |error: Error| error.in_context(format_args!("rule `{}`", r#match));
        let mut placements = Vec::new();
        if let Some(shard) = shard {
            placements.push(Placement::from(shard.compile().map_err(of_rule)?));
        }
        if let Some(rank) = only {
            placements.push(Placement::only(Rank(number("only", rank, 0).map_err(of_rule)?)));
        }
        for (flag, placement) in [(replicate, Placement::replicate()), (skip, Placement::Skip)] {
            if flag_of(flag).map_err(of_rule)? {
                placements.push(placement);
            }
        }
        let count = placements.len();
        let Some(placement) = placements.pop().filter(|_| count == 1) else {
            return Err(of_rule(refuse("needs one of shard, replicate, only, skip".into()).with_expected(1, count)));
        };
        let changes =
            [cast.as_ref().map(|_| "cast"), transpose.map(|_| "transpose"), permute.as_ref().map(|_| "permute")];
        if let (Placement::Skip, Some(what)) = (&placement, changes.into_iter().flatten().next()) {
            return Err(of_rule(refuse(format!("{what} of a tensor that is skipped"))));
        }
        let mut rule = Rule::new(&r#match, placement);
        rule.rename = rename.as_deref().map(Template::new);
        rule.optional = optional;
        let rules = rules.push(rule);
        let rules = match (flag_of(transpose).map_err(of_rule)?, permute) {
            (true, Some(_)) => return Err(of_rule(refuse("has both transpose and permute".into()))),
            (true, None) => rules.transpose(),
            (false, Some(order)) => {
                let dims = order.into_iter().map(|dim| number("permute", dim, 0));
                rules.permute(&dims.collect::<Result<Vec<_>>>().map_err(of_rule)?)
            }
            (false, None) => rules,
        };
        match cast {
            Some(name) => Ok(rules.cast(cast_target(&name).map_err(of_rule)?)),
            None => Ok(rules),
        }
    }
}

impl Shard {
    fn compile(self) -> Result<ShardRule> {
        let Shard { dim, split, unit, units, replicate_units, by } = self;
        let mut rule = ShardRule::dim(number("dim, which counts from the outermost,", dim, 0)?);
        if let Some(How::Ceil) = split {
            rule = rule.split(Split::Ceil);
        }
        if let Some(unit) = unit {
            rule = rule.unit(number("unit", unit, 1)?);
        }
        if let Some(units) = units {
            rule = rule.units(number("units", units, 0)?);
        }
        if replicate_units {
            rule = rule.replicate_units();
        }
        match by {
            None => Ok(rule),
            Some(by) => Ok(rule.by(coord(&by)?)),
        }
    }
}

/// A key that is there or not.
fn flag_of(flag: Option<bool>) -> Result<bool> {
    match flag {
        Some(false) => Err(refuse("false says nothing".into())),
        flag => Ok(flag.is_some()),
    }
}

/// A type that elements can be cast to, by its name in lower case.
fn cast_target(name: &str) -> Result<Dtype> {
    Cast::TARGETS.into_iter().find(|to| to.name().to_ascii_lowercase() == name).ok_or_else(|| {
        refuse("no such type to cast to".into()).with_expected("one of bf16, f16, f32", format!("`{name}`"))
    })
}

/// A number of the file as what it counts; TOML knows signed ones only.
fn number<T: TryFrom<i64>>(key: &str, value: i64, least: i64) -> Result<T> {
    let wrong = || refuse(format!("{key} is out of range")).with_expected(format!("{least} or more"), value);
    T::try_from(value).ok().filter(|_| value >= least).ok_or_else(wrong)
}

/// Which part each rank gets: an axis, a list of axes, or a table that divides or repeats one of these.
fn coord(value: &toml::Value) -> Result<Coord> {
    let table = match value {
        toml::Value::Table(table) => table,
        toml::Value::Array(axes) => return Ok(Coord::Flat(axes.iter().map(axis).collect::<Result<_>>()?)),
        toml::Value::String(name) if name == "one" => return Ok(Coord::One),
        one => return Ok(Coord::Axis(axis(one)?)),
    };
    let inner = |of: &toml::Value| coord(of).map(Box::new);
    match (table.get("div"), table.get("mod"), table.get("by").and_then(toml::Value::as_integer)) {
        (Some(of), None, Some(by)) if table.len() == 2 => Ok(Coord::Div(inner(of)?, number("by", by, 1)?)),
        (None, Some(of), Some(by)) if table.len() == 2 => Ok(Coord::Mod(inner(of)?, number("by", by, 1)?)),
        _ => {
            let keys: Vec<&str> = table.keys().map(String::as_str).collect();
            let expected = "{ div = COORDINATE, by = N } or { mod = COORDINATE, by = N }";
            Err(refuse("not a coordinate".into()).with_expected(expected, format!("a table of {}", keys.join(", "))))
        }
    }
}

fn axis(value: &toml::Value) -> Result<Ax> {
    value.as_str().and_then(Ax::named).ok_or_else(|| {
        let found = value.as_str().map_or_else(|| value.type_str().to_owned(), |name| format!("`{name}`"));
        let names = Ax::ALL.map(Ax::name).join(", ");
        refuse("no such axis".into()).with_expected(format!("one of {names}, or a list of them"), found)
    })
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
        assert!(refused("rule = [{ match = \"a\", only = -1 }]").1.contains("rule `a`: only is out of range"));
        assert_eq!(refused("rule = [{ match = \"a**\", skip = true }]").0, Some("pattern"));
        assert_eq!(refused("rule = [{ match = \"*\", replicate = true, rename = \"{2}\" }]").0, Some("rename"));
        assert!(refused("\n\nrule = 1").1.contains("line 3"));
    }

    #[test]
    fn a_shard_that_makes_no_sense_is_refused_with_its_rule() {
        for (shard, rule, what) in [
            (
                "dim = -1",
                "rules-file",
                "dim, which counts from the outermost, is out of range: expected 0 or more, found -1",
            ),
            ("dim = 0, unit = 0", "rules-file", "unit is out of range: expected 1 or more, found 0"),
            ("dim = 0, units = -8", "rules-file", "units is out of range: expected 0 or more, found -8"),
            (
                "dim = 0, by = 'xx'",
                "rules-file",
                "expected one of dp, pp, cp, tp, ep, etp, or a list of them, found `xx`",
            ),
            ("dim = 0, by = ['tp', 'one']", "rules-file", "found `one`"),
            ("dim = 0, by = { div = 'tp' }", "rules-file", "or { mod = COORDINATE, by = N }, found a table of div"),
            ("dim = 0, by = { div = 'tp', mod = 'tp', by = 2 }", "rules-file", "not a coordinate"),
            ("dim = 0, by = { div = 'tp', by = 0 }", "rules-file", "by is out of range: expected 1 or more, found 0"),
            ("dim = 0, by = { mod = { div = 'x', by = 2 }, by = 2 }", "rules-file", "found `x`"),
            ("dim = 0, by = ['tp', 'ep']", "coordinate", "axes ep and tp name the same ranks"),
            ("dim = 0, by = { div = [], by = 2 }", "coordinate", "no axis"),
            ("dim = 0, by = 3", "rules-file", "found integer"),
            ("dim = 0, by = ['tp', 'tp']", "coordinate", "axis tp is named twice"),
            ("dim = 0, by = []", "coordinate", "no axis"),
        ] {
            let refused = refused(&format!("rule = [{{ match = '**.w', shard = {{ {shard} }} }}]"));
            assert_eq!(refused.0, Some(rule), "{shard}");
            assert!(refused.1.starts_with("rule `**.w`: ") && refused.1.contains(what), "{refused:?}");
        }
    }

    #[test]
    fn coordinates_are_written_as_they_are_displayed() {
        for text in [
            "\"one\"",
            "\"etp\"",
            "[\"pp\", \"ep\"]",
            "{ div = \"tp\", by = 4 }",
            "{ mod = { div = [\"cp\", \"tp\"], by = 4 }, by = 2 }",
        ] {
            let table: toml::Table = format!("by = {text}").parse().unwrap();
            assert_eq!(coord(&table["by"]).unwrap().to_string(), text);
        }
    }

    #[test]
    fn names_that_no_file_can_hold_are_refused() {
        for (rest, rule) in [
            ("replicate = true, rename = '__metadata__'", "rename"),
            ("replicate = true, rename = ''", "rename"),
            ("replicate = true, rename = 'x.{0}'", "rename"),
            ("replicate = true, rename = 'x.{3}'", "rename"),
            ("replicate = true, rename = 'x.{y}'", "rename"),
            ("skip = true, rename = 'x'", "rename"),
        ] {
            let refused = refused(&format!("rule = [{{ match = 'a.*.*', {rest} }}]"));
            assert_eq!(refused.0, Some(rule), "{rest}");
            assert!(refused.1.starts_with("rule `a.*.*`: "), "{}", refused.1);
        }
        let alias = |name: &str, of: &str| refused(&format!("alias = [{{ name = '{name}', of = '{of}' }}]"));
        for name in ["", "__metadata__"] {
            let refused = alias(name, "a");
            assert!(refused.0 == Some("alias") && refused.1.contains("alias of `a`"), "{refused:?}");
        }
        assert_eq!(alias("a", "a").0, Some("alias"));
    }
}
