//! `model.safetensors.index.json`: which tensor lies in which file. Every rule of the index alone; what it says of
//! the files is checked where these are opened.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;

use foldhash::fast::RandomState;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Text, Unknown};

/// A parsed index.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Index {
    /// The files, relative to the index, sorted; each once.
    pub files: Vec<String>,
    /// Per tensor its name and the position of its file in `files`, in the order of the index.
    pub tensors: Vec<(String, u32)>,
    /// `metadata.total_size`, which published indexes get wrong; an array or an object without what is in it.
    pub total_size: Option<Value>,
}

impl Index {
    /// Parses an index.
    ///
    /// # Errors
    /// [`ErrorKind::Index`] with the broken rule: `index-not-json`, `index-not-object`, `index-duplicate-key`,
    /// `index-weight-map-missing`, `index-weight-map-not-object`, `index-empty`, `index-file-not-string`,
    /// `index-path-outside`.
    pub fn parse(bytes: &[u8]) -> Result<Index> {
        let text = std::str::from_utf8(bytes).map_err(|error| not_json(&error))?;
        let slot = Slot::default();
        let mut json = serde_json::Deserializer::from_str(text);
        let parsed = Root { slot: &slot }.deserialize(&mut json).and_then(|parsed| json.end().map(|()| parsed));
        let (weight_map, total_size) = parsed.map_err(|error| slot.take().unwrap_or_else(|| not_json(&error)))?;
        let weight_map = weight_map.ok_or_else(|| {
            rule("index-weight-map-missing", "index has no weight_map").with_expected("weight_map", "none")
        })?;
        // Nothing to load is never what somebody wanted.
        if weight_map.is_empty() {
            return Err(rule("index-empty", "index names no tensor")
                .with_expected("a tensor and its file", "an empty weight_map"));
        }
        let mut files: Vec<String> = Vec::new();
        let mut seen = HashSet::with_hasher(RandomState::default());
        for (tensor, file) in &weight_map {
            if seen.insert(&**file) {
                check_path(tensor, file)?;
                files.push(file.to_string());
            }
        }
        files.sort_unstable();
        let position = |file: &str| files.partition_point(|known| known.as_str() < file) as u32;
        let tensors = weight_map.iter().map(|(tensor, file)| (tensor.to_string(), position(file))).collect();
        Ok(Index { files, tensors, total_size })
    }
}

/// A rule of the index or the directory that is broken.
pub(super) fn rule(rule: &'static str, message: &str) -> Error {
    Error::new(ErrorKind::Index, message).with_rule(rule)
}

fn not_json(error: &dyn fmt::Display) -> Error {
    rule("index-not-json", "index is not json").with_expected("json", error)
}

/// A file of the index lies in its directory or below, and has one spelling.
fn check_path(tensor: &str, file: &str) -> Result<()> {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', '\0']);
    match file.split('/').all(plain) {
        true => Ok(()),
        false => Err(rule("index-path-outside", "index names a file outside its directory")
            .with_expected("a relative path without dots", format!("{file:?}"))
            .with_tensor(tensor)),
    }
}

/// serde carries errors as text; the broken rule waits here.
type Slot = Cell<Option<Error>>;
type WeightMap<'de> = Vec<(Cow<'de, str>, Cow<'de, str>)>;

fn refuse<T, E: serde::de::Error>(slot: &Slot, error: Error) -> Result<T, E> {
    slot.set(Some(error));
    Err(E::custom("broken rule"))
}

struct Root<'a> {
    slot: &'a Slot,
}

impl<'de> DeserializeSeed<'de> for Root<'_> {
    type Value = (Option<WeightMap<'de>>, Option<Value>);
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        let slot = self.slot;
        let broken =
            || rule("index-not-object", "index is not a json object").with_expected("an object", "another value");
        named(slot, broken, json.deserialize_map(self))
    }
}

/// Names the rule for a value of the wrong type: serde calls it a data error, and no visitor left another rule.
fn named<T, E: serde::de::Error>(slot: &Slot, broken: impl Fn() -> Error, result: Result<T, E>) -> Result<T, E> {
    result.inspect_err(|error| {
        let left = slot.take();
        slot.set(left.or_else(|| error.to_string().starts_with("invalid type").then(broken)));
    })
}

impl<'de> Visitor<'de> for Root<'_> {
    type Value = (Option<WeightMap<'de>>, Option<Value>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let slot = self.slot;
        let (mut weight_map, mut total_size) = (None, None);
        let mut keys = HashSet::with_hasher(RandomState::default());
        while let Some(key) = entries.next_key_seed(Text)? {
            match &*key {
                "weight_map" => weight_map = Some(entries.next_value_seed(WeightMapOf { slot })?),
                "metadata" => total_size = entries.next_value_seed(Metadata)?,
                _ => {
                    entries.next_value::<Unknown>()?;
                }
            }
            if let Some(key) = keys.replace(key) {
                return refuse(slot, twice(&key));
            }
        }
        Ok((weight_map, total_size))
    }
}

/// The `total_size` of whatever `metadata` is. A tree of the rest would take many times the bytes of its text.
struct Metadata;

impl<'de> DeserializeSeed<'de> for Metadata {
    type Value = Option<Value>;
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Metadata {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, _value: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _value: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _value: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _value: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, _value: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Self::Value, A::Error> {
        Unknown.visit_seq(items).map(|Unknown| None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut total_size = None;
        while let Some(key) = entries.next_key_seed(Text)? {
            match &*key {
                "total_size" => total_size = Some(entries.next_value_seed(Shallow)?),
                _ => {
                    entries.next_value::<Unknown>()?;
                }
            }
        }
        Ok(total_size)
    }
}

/// A value; an array or an object without what is in it.
struct Shallow;

impl<'de> DeserializeSeed<'de> for Shallow {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Shallow {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Value, A::Error> {
        Unknown.visit_seq(items).map(|Unknown| Value::Array(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Value, A::Error> {
        Unknown.visit_map(entries).map(|Unknown| Value::Object(Map::new()))
    }
}

fn twice(key: &str) -> Error {
    rule("index-duplicate-key", "a key of the index appears twice")
        .with_expected("distinct keys", format!("{key:?} twice"))
}

struct WeightMapOf<'a> {
    slot: &'a Slot,
}

impl<'de> DeserializeSeed<'de> for WeightMapOf<'_> {
    type Value = WeightMap<'de>;
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        let slot = self.slot;
        let broken = || {
            rule("index-weight-map-not-object", "weight_map is not an object")
                .with_expected("an object", "another value")
        };
        named(slot, broken, json.deserialize_map(self))
    }
}

impl<'de> Visitor<'de> for WeightMapOf<'_> {
    type Value = WeightMap<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut names = HashSet::with_hasher(RandomState::default());
        let mut map = Vec::new();
        while let Some(name) = entries.next_key_seed(Text)? {
            let broken = || {
                rule("index-file-not-string", "index names a file that is not a string")
                    .with_expected("a string", "another value")
                    .with_tensor(&*name)
            };
            let file = named(self.slot, broken, entries.next_value_seed(Text))?;
            if !names.insert(name.clone()) {
                return refuse(self.slot, twice(&name).with_tensor(&*name));
            }
            map.push((name, file));
        }
        Ok(map)
    }
}
