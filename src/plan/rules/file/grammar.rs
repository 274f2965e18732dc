//! What stands in a rules file, table by table. What one value can get wrong is refused here, with its place.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;

use crate::cast::Cast;
use crate::dtype::Dtype;
use crate::plan::cut::{Cut, Split, unit_range};
use crate::plan::expr::Fill;
use crate::plan::quant::{Orientation, Packed};
use crate::plan::rules::Stage;
use crate::plan::stages::StageSplit;
use crate::plan::world::{Ax, Coord};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub(super) rule: Vec<Entry>,
    #[serde(default)]
    pub(super) alias: Vec<Alias>,
    pub(super) pipeline: Option<Pipeline>,
    pub(super) quantization: Option<Quantized>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Alias {
    pub(super) name: String,
    pub(super) of: String,
    pub(super) stage: Option<On>,
}

/// The layers of pipeline stages.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pipeline {
    pub(super) layers: String,
    pub(super) count: Option<Number<u64, 1>>,
    pub(super) split: Option<Stages>,
}

/// How modules that a quantiser made are stored.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quantized {
    pub(super) method: Option<Method>,
    pub(super) bits: Option<Number<u64, 1>>,
    pub(super) group: Option<Number<u64, 1>>,
    pub(super) act_order: Option<Yes>,
    pub(super) block: Option<[Number<u64, 1>; 2]>,
    pub(super) refine: Option<Yes>,
}

/// A rule: the first two say what it is about, one of the next seven who gets what.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) r#match: Option<String>,
    pub(super) module: Option<String>,
    pub(super) replicate: Option<Yes>,
    pub(super) shard: Option<Shard>,
    pub(super) skip: Option<Yes>,
    pub(super) only: Option<Number<u32, 0>>,
    pub(super) part: Option<Yes>,
    pub(super) steps: Option<Vec<Step>>,
    pub(super) expr: Option<Made>,
    pub(super) r#where: Option<Where>,
    pub(super) among: Option<Among>,
    pub(super) stage: Option<On>,
    pub(super) orientation: Option<Order>,
    pub(super) bias: Option<Filled>,
    pub(super) suffix: Option<BTreeMap<String, String>>,
    pub(super) cast: Option<Target>,
    pub(super) keep_dtype: Option<Yes>,
    pub(super) transpose: Option<Yes>,
    pub(super) permute: Option<Vec<Number<usize, 0>>>,
    pub(super) rename: Option<String>,
    pub(super) optional: Option<Yes>,
}

/// An expression: what it begins with, by default the matched tensor, and what is done to that.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Made {
    pub(super) tensor: Option<String>,
    pub(super) concat: Option<Concat>,
    pub(super) stack: Option<Vec<Made>>,
    pub(super) select: Option<Select>,
    pub(super) r#const: Option<Const>,
    #[serde(default)]
    pub(super) steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Concat {
    pub(super) dim: Number<usize, 0>,
    pub(super) parts: Vec<Made>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Select {
    pub(super) by: Option<Part>,
    pub(super) split: Option<How>,
    pub(super) unit: Option<Number<u64, 1>>,
    pub(super) units: Option<Number<u64, 0>>,
    pub(super) replicate_units: Option<Yes>,
    pub(super) of: Option<Vec<Made>>,
    pub(super) each: Option<Box<Made>>,
    pub(super) count: Option<Number<u64, 1>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Const {
    pub(super) dtype: Type,
    pub(super) dims: Vec<Number<u64, 0>>,
    pub(super) fill: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    View(Vec<Number<u64, 0>>),
    Merge(Merge),
    Slice(Slice),
    Shard(Shard),
    Permute(Vec<Number<usize, 0>>),
    Transpose(Yes),
    Cast(Target),
    Pad(Pad),
    Repeat(Repeat),
    On(Filled),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Merge {
    pub(super) dim: Number<usize, 0>,
    pub(super) count: Number<usize, 1>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Slice {
    pub(super) dim: Number<usize, 0>,
    pub(super) start: Number<u64, 0>,
    pub(super) len: Number<u64, 0>,
    pub(super) step: Option<Number<u64, 1>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shard {
    pub(super) dim: Number<usize, 0>,
    by: Option<Part>,
    split: Option<How>,
    unit: Option<Number<u64, 1>>,
    units: Option<Number<u64, 0>>,
    replicate_units: Option<Yes>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pad {
    pub(super) dim: Number<usize, 0>,
    pub(super) to: Number<u64, 0>,
    pub(super) fill: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Repeat {
    pub(super) dim: Number<usize, 0>,
    pub(super) times: Number<u64, 1>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filled {
    pub(super) by: Part,
    pub(super) part: Number<u32, 0>,
    pub(super) fill: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Where {
    pub(super) by: Part,
    pub(super) part: Number<u32, 0>,
}

/// Which of several like tensors each rank holds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Among {
    pub(super) wildcard: Number<usize, 1>,
    pub(super) count: Number<u64, 1>,
    by: Option<Part>,
    split: Option<How>,
    unit: Option<Number<u64, 1>>,
    units: Option<Number<u64, 0>>,
    replicate_units: Option<Yes>,
}

/// A key that is there or not.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "bool")]
pub(super) struct Yes;

/// A number of at least `LEAST`; TOML's are signed.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "i64", bound = "T: TryFrom<i64>")]
pub(super) struct Number<T, const LEAST: i64>(pub(super) T);

/// A type that elements can be cast to.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Target(pub(super) Dtype);

/// Any type.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Type(pub(super) Dtype);

#[derive(Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Value(pub(super) Fill);

/// Which part each rank gets: an axis, a list of axes, or a table that divides or repeats one of these.
#[derive(Deserialize)]
#[serde(try_from = "toml::Value")]
pub(super) struct Part(pub(super) Coord);

/// Which units each part has.
#[derive(Deserialize)]
#[serde(try_from = "toml::Value")]
pub(super) struct How(Split);

/// Pipeline stages: a name, or a list of numbers.
#[derive(Deserialize)]
#[serde(try_from = "toml::Value")]
pub(super) struct On(pub(super) Stage);

/// Which layers each pipeline stage has: a name, or a list of numbers of layers.
#[derive(Deserialize)]
#[serde(try_from = "toml::Value")]
pub(super) struct Stages(pub(super) StageSplit);

/// Which of a matrix's dimensions are the outputs.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Order(pub(super) Orientation);

/// Who packed a `qweight`.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Method(pub(super) Packed);

impl Among {
    pub(super) fn cut(&self) -> Cut {
        let Among { wildcard: _, count: _, by, split, unit, units, replicate_units } = self;
        cut(by, split, unit, units, replicate_units)
    }
}

impl Shard {
    pub(super) fn cut(&self) -> Cut {
        let Shard { dim: _, by, split, unit, units, replicate_units } = self;
        cut(by, split, unit, units, replicate_units)
    }
}

impl Select {
    pub(super) fn cut(&self) -> Cut {
        let Select { by, split, unit, units, replicate_units, .. } = self;
        cut(by, split, unit, units, replicate_units)
    }
}

fn cut(
    by: &Option<Part>,
    split: &Option<How>,
    unit: &Option<Number<u64, 1>>,
    units: &Option<Number<u64, 0>>,
    replicate_units: &Option<Yes>,
) -> Cut {
    let mut cut =
        Cut { replicate_units: replicate_units.is_some(), units: units.map(|units| units.0), ..Cut::default() };
    if let Some(Part(by)) = by {
        cut.by = by.clone();
    }
    if let Some(How(split)) = split {
        cut.how = split.clone();
    }
    if let Some(Number(unit)) = unit {
        cut.unit = *unit;
    }
    cut
}

impl TryFrom<bool> for Yes {
    type Error = String;

    fn try_from(yes: bool) -> Result<Yes, String> {
        if yes { Ok(Yes) } else { Err(unlike("says nothing", "`false`", "true")) }
    }
}

impl<T: TryFrom<i64>, const LEAST: i64> TryFrom<i64> for Number<T, LEAST> {
    type Error = String;

    fn try_from(value: i64) -> Result<Self, String> {
        let number = T::try_from(value).ok().filter(|_| value >= LEAST);
        number.map(Number).ok_or_else(|| unlike("out of range", value, &format!("{LEAST} or more")))
    }
}

impl TryFrom<String> for Target {
    type Error = String;

    fn try_from(name: String) -> Result<Target, String> {
        let no_target = || unlike("no such type to cast to", format!("`{name}`"), "one of bf16, f16, f32");
        Cast::TARGETS.into_iter().find(|to| lower(*to) == name).map(Target).ok_or_else(no_target)
    }
}

impl TryFrom<String> for Type {
    type Error = String;

    fn try_from(name: String) -> Result<Type, String> {
        let no_type = || unlike("no such type", format!("`{name}`"), "a type of safetensors in lower case");
        Dtype::from_name(&name.to_ascii_uppercase()).filter(|of| lower(*of) == name).map(Type).ok_or_else(no_type)
    }
}

impl TryFrom<String> for Value {
    type Error = String;

    fn try_from(text: String) -> Result<Value, String> {
        let named = [Fill::Zero, Fill::One, Fill::NegInf].into_iter().find(|fill| fill.to_string() == text);
        let value = named.or_else(|| text.strip_prefix("hex:").and_then(bytes).map(Fill::Bytes));
        let expected = "one of zero, one, -inf, hex:BYTES with the 1 to 8 bytes of an element";
        value.map(Value).ok_or_else(|| unlike("no such value", format!("`{text}`"), expected))
    }
}

impl TryFrom<toml::Value> for On {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<On, String> {
        let named = [("first", Stage::First), ("last", Stage::Last), ("ends", Stage::Ends), ("all", Stage::All)];
        let stage = |stage: &toml::Value| stage.as_integer().and_then(|stage| u32::try_from(stage).ok());
        let found = match &value {
            toml::Value::String(name) => named.into_iter().find(|(known, _)| known == name).map(|(_, stages)| stages),
            toml::Value::Array(list) if !list.is_empty() => {
                list.iter().map(stage).collect::<Option<_>>().map(Stage::Listed)
            }
            _ => None,
        };
        let expected = "one of first, last, ends, all, or a list of stages from 0 on";
        found.map(On).ok_or_else(|| unlike("no such stages", kind(&value), expected))
    }
}

impl TryFrom<String> for Order {
    type Error = String;

    fn try_from(name: String) -> Result<Order, String> {
        one_of("no such orientation", &name, &[("out-in", Orientation::OutIn), ("in-out", Orientation::InOut)])
            .map(Order)
    }
}

impl TryFrom<String> for Method {
    type Error = String;

    fn try_from(name: String) -> Result<Method, String> {
        one_of("no such method", &name, &[("gptq", Packed::Gptq), ("awq", Packed::Awq)]).map(Method)
    }
}

impl TryFrom<toml::Value> for Stages {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Stages, String> {
        let unknown = |found: String| {
            unlike("no such split", found, "one of even, vllm, hf, trt, or a list of numbers of layers")
        };
        let count = |count: &toml::Value| {
            count.as_integer().and_then(|count| u64::try_from(count).ok()).ok_or_else(|| unknown(kind(count)))
        };
        match &value {
            toml::Value::String(name) => {
                StageSplit::named(name).map(Stages).ok_or_else(|| unknown(format!("`{name}`")))
            }
            toml::Value::Array(counts) => {
                counts.iter().map(count).collect::<Result<_, _>>().map(StageSplit::Counts).map(Stages)
            }
            other => Err(unknown(kind(other))),
        }
    }
}

impl TryFrom<toml::Value> for Part {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Part, String> {
        coord(&value).map(Part)
    }
}

impl TryFrom<toml::Value> for How {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<How, String> {
        let names = Split::NAMED.map(|split| split.to_string()).join(", ");
        let unknown =
            |found: String| unlike("no such split", found, &format!("one of {names}, {{ table = [[UNITS...]...] }}"));
        match &value {
            toml::Value::String(name) => Split::named(name).map(How).ok_or_else(|| unknown(format!("`{name}`"))),
            toml::Value::Table(table) if table.keys().eq(["table"]) => match &table["table"] {
                toml::Value::Array(parts) => {
                    parts.iter().map(part).collect::<Result<_, _>>().map(Split::Table).map(How)
                }
                other => Err(unlike("no table of units", kind(other), "a list of units for each part")),
            },
            other => Err(unknown(kind(other))),
        }
    }
}

/// The units of one part of a table.
fn part(units: &toml::Value) -> Result<Vec<Range<u64>>, String> {
    let wrong =
        |found: String| unlike("no units of a table", found, "a list of units 7 and ranges \"252..256\" for each part");
    let range = |unit: &toml::Value| match unit {
        toml::Value::Integer(unit) => {
            u64::try_from(*unit).map(|unit| unit..unit + 1).map_err(|_| wrong(unit.to_string()))
        }
        toml::Value::String(range) => unit_range(range).ok_or_else(|| wrong(format!("`{range}`"))),
        other => Err(wrong(kind(other))),
    };
    units.as_array().ok_or_else(|| wrong(kind(units)))?.iter().map(range).collect()
}

fn coord(value: &toml::Value) -> Result<Coord, String> {
    let table = match value {
        toml::Value::Table(table) => table,
        toml::Value::Array(axes) => return Ok(Coord::Flat(axes.iter().map(axis).collect::<Result<_, _>>()?)),
        toml::Value::String(name) if name == "one" => return Ok(Coord::One),
        one => return Ok(Coord::Axis(axis(one)?)),
    };
    let inner = |of: &toml::Value| coord(of).map(Box::new);
    let by = |by: i64| Number::<u32, 1>::try_from(by).map(|by| by.0);
    match (table.get("div"), table.get("mod"), table.get("by").and_then(toml::Value::as_integer)) {
        (Some(of), None, Some(k)) if table.len() == 2 => Ok(Coord::Div(inner(of)?, by(k)?)),
        (None, Some(of), Some(k)) if table.len() == 2 => Ok(Coord::Mod(inner(of)?, by(k)?)),
        _ => {
            Err(unlike("not a coordinate", kind(value), "{ div = COORDINATE, by = N } or { mod = COORDINATE, by = N }"))
        }
    }
}

fn axis(value: &toml::Value) -> Result<Ax, String> {
    let names = Ax::ALL.map(Ax::name).join(", ");
    let none = || unlike("no such axis", kind(value), &format!("one of {names}, or a list of them"));
    value.as_str().and_then(Ax::named).ok_or_else(none)
}

/// What was found where something else should be.
fn kind(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => format!("`{text}`"),
        toml::Value::Table(table) => {
            let keys: Vec<&str> = table.keys().map(String::as_str).collect();
            format!("a table of {}", keys.join(", "))
        }
        other => other.type_str().into(),
    }
}

/// The bytes that hexadecimal digits say, as many as an element can have.
fn bytes(digits: &str) -> Option<Vec<u8>> {
    let digit = |digit: u8| (digit as char).to_digit(16);
    let byte = |two: &[u8]| Some((digit(two[0])? * 16 + digit(*two.get(1)?)?) as u8);
    (2..=16).contains(&digits.len()).then(|| digits.as_bytes().chunks(2).map(byte).collect())?
}

fn lower(dtype: Dtype) -> String {
    dtype.name().to_ascii_lowercase()
}

/// What has this name.
fn one_of<T: Copy>(what: &str, name: &str, all: &[(&str, T)]) -> Result<T, String> {
    let found = all.iter().find(|(known, _)| *known == name).map(|(_, it)| *it);
    found.ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|(known, _)| *known).collect();
        unlike(what, format!("`{name}`"), &format!("one of {}", names.join(", ")))
    })
}

/// A message as serde's own read.
fn unlike(what: &str, found: impl std::fmt::Display, expected: &str) -> String {
    format!("{what}: {found}, expected {expected}")
}
