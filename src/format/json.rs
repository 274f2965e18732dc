//! The header's JSON: visitors over serde_json that see every key, so that none can hide another.
//!
//! serde carries errors as text; a visitor that finds a broken rule leaves the [`FormatError`] in a slot and answers
//! serde with a placeholder.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;

use foldhash::fast::RandomState;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use smallvec::SmallVec;

use crate::dtype::Dtype;
use crate::format::error::NAME_SHOWN;
use crate::format::{FormatError, HeaderTensor, Text};
use crate::limits;
use crate::shape::Shape;

/// What the JSON says. Tensors are in the order of the header, their offsets count from the start of the data, and
/// neither names nor offsets are checked yet.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) tensors: Vec<HeaderTensor>,
    pub(super) metadata: Vec<(String, String)>,
}

/// Parses the header, the white space around it included.
pub(super) fn parse(text: &str) -> Result<Parsed, FormatError> {
    let slot = Slot::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed = json.deserialize_any(Root { slot: &slot }).and_then(|parsed| json.end().map(|()| parsed));
    parsed.map_err(|error| slot.0.take().unwrap_or_else(|| syntax(text, &error)))
}

/// Where a visitor leaves the rule that it found broken.
#[derive(Default)]
struct Slot(Cell<Option<FormatError>>);

impl Slot {
    fn refuse<T, E: serde::de::Error>(&self, error: FormatError) -> Result<T, E> {
        self.0.set(Some(error));
        Err(E::custom("broken rule"))
    }
}

/// The kinds of JSON values that a visitor has no use for: all lead to its `other`, which names the broken rule.
macro_rules! refuse {
    ($($kind:ident)*) => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("something else")
        }
        $(refuse!(@ $kind);)*
    };
    (@ null) => {
        fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            self.other("null".into())
        }
    };
    (@ boolean) => {
        fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Self::Value, E> {
            self.other(value.to_string())
        }
    };
    (@ count) => {
        fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
            self.other(value.to_string())
        }
    };
    (@ number) => {
        fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
            self.other(value.to_string())
        }
        fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Self::Value, E> {
            self.other(format!("{value:?}"))
        }
    };
    (@ string) => {
        fn visit_str<E: serde::de::Error>(self, _value: &str) -> Result<Self::Value, E> {
            self.other("a string".into())
        }
    };
    (@ array) => {
        fn visit_seq<A: SeqAccess<'de>>(self, _items: A) -> Result<Self::Value, A::Error> {
            self.other("an array".into())
        }
    };
    (@ object) => {
        fn visit_map<A: MapAccess<'de>>(self, _entries: A) -> Result<Self::Value, A::Error> {
            self.other("an object".into())
        }
    };
}

/// A visitor whose seed is itself.
macro_rules! seed {
    ($seed:ident -> $value:ty) => {
        impl<'de> DeserializeSeed<'de> for $seed<'_> {
            type Value = $value;
            fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<$value, D::Error> {
                json.deserialize_any(self)
            }
        }
    };
}

struct Root<'a> {
    slot: &'a Slot,
}

impl Root<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::HeaderNotObject { found })
    }
}

impl<'de> Visitor<'de> for Root<'_> {
    type Value = Parsed;
    refuse!(null boolean count number string array);

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Parsed, A::Error> {
        let slot = self.slot;
        let mut parsed = Parsed::default();
        let mut metadata = None;
        while let Some(name) = entries.next_key_seed(Text)? {
            if name == "__metadata__" {
                if metadata.is_some() {
                    return slot.refuse(FormatError::MetadataTwice {});
                }
                metadata = Some(entries.next_value_seed(Metadata { slot })?);
            } else {
                let entry = entries.next_value_seed(Entry { slot, name: &name })?;
                let Fields { dtype, shape, offsets: (start, end) } = entry;
                parsed.tensors.push(HeaderTensor { name: name.into_owned(), dtype, shape, start, end });
            }
        }
        parsed.metadata = metadata.unwrap_or_default();
        Ok(parsed)
    }
}

struct Metadata<'a> {
    slot: &'a Slot,
}

seed!(Metadata -> Vec<(String, String)>);

impl Metadata<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::MetadataNotObject { found })
    }
}

impl<'de> Visitor<'de> for Metadata<'_> {
    type Value = Vec<(String, String)>;
    refuse!(boolean count number string array);

    /// The reference implementation takes null for "none".
    fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut keys = HashSet::with_hasher(RandomState::default());
        let mut metadata = Vec::new();
        while let Some(key) = entries.next_key_seed(Text)? {
            let value = entries.next_value_seed(MetadataValue { slot: self.slot, key: &key })?;
            metadata.push((key.as_ref().to_owned(), value));
            if let Some(key) = keys.replace(key) {
                return self.slot.refuse(FormatError::MetadataKeyTwice { key: key.into_owned() });
            }
        }
        Ok(metadata)
    }
}

struct MetadataValue<'a> {
    slot: &'a Slot,
    key: &'a str,
}

seed!(MetadataValue -> String);

impl MetadataValue<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::MetadataNotString { key: self.key.into(), found })
    }
}

impl<'de> Visitor<'de> for MetadataValue<'_> {
    type Value = String;
    refuse!(null boolean count number array object);

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }
}

/// A tensor's entry.
struct Entry<'a> {
    slot: &'a Slot,
    name: &'a str,
}

struct Fields {
    dtype: Dtype,
    shape: Shape,
    offsets: (u64, u64),
}

seed!(Entry -> Fields);

impl Entry<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::TensorNotObject { tensor: self.name.into(), found })
    }
}

impl<'de> Visitor<'de> for Entry<'_> {
    type Value = Fields;
    refuse!(null boolean count number string array);

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Fields, A::Error> {
        let Entry { slot, name: tensor } = self;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        let mut unknown = HashSet::with_hasher(RandomState::default());
        while let Some(field) = entries.next_key_seed(Text)? {
            let again = match &*field {
                "dtype" => dtype.replace(entries.next_value_seed(DtypeOf { slot, tensor })?).is_some(),
                "shape" => shape.replace(entries.next_value_seed(ShapeOf { slot, tensor })?).is_some(),
                "data_offsets" => offsets.replace(entries.next_value_seed(OffsetsOf { slot, tensor })?).is_some(),
                _ => {
                    entries.next_value::<Unknown>()?;
                    !unknown.insert(field.clone())
                }
            };
            if again {
                return slot.refuse(FormatError::FieldTwice { tensor: tensor.into(), field: field.into_owned() });
            }
        }
        let missing = |field| FormatError::FieldMissing { tensor: tensor.into(), field };
        match (dtype, shape, offsets) {
            (Some(dtype), Some(shape), Some(offsets)) => Ok(Fields { dtype, shape, offsets }),
            (None, _, _) => slot.refuse(missing("dtype")),
            (_, None, _) => slot.refuse(missing("shape")),
            (_, _, None) => slot.refuse(missing("data_offsets")),
        }
    }
}

struct DtypeOf<'a> {
    slot: &'a Slot,
    tensor: &'a str,
}

seed!(DtypeOf -> Dtype);

impl DtypeOf<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::DtypeNotString { tensor: self.tensor.into(), found })
    }
}

impl<'de> Visitor<'de> for DtypeOf<'_> {
    type Value = Dtype;
    refuse!(null boolean count number array object);

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Dtype, E> {
        match Dtype::from_name(name) {
            Some(dtype) => Ok(dtype),
            None => {
                let found = name.escape_debug().take(NAME_SHOWN).collect();
                self.slot.refuse(FormatError::DtypeUnknown { tensor: self.tensor.into(), found })
            }
        }
    }
}

struct ShapeOf<'a> {
    slot: &'a Slot,
    tensor: &'a str,
}

seed!(ShapeOf -> Shape);

impl ShapeOf<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::ShapeNotArray { tensor: self.tensor.into(), found })
    }
}

impl<'de> Visitor<'de> for ShapeOf<'_> {
    type Value = Shape;
    refuse!(null boolean count number string object);

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Shape, A::Error> {
        let ShapeOf { slot, tensor } = self;
        let refused = |found| FormatError::DimensionNotCount { tensor: tensor.into(), found };
        let mut dims = SmallVec::<[u64; 4]>::new();
        while let Some(dim) = items.next_element_seed(Count { slot, refused: &refused })? {
            dims.push(dim);
        }
        Ok(Shape::new(&dims))
    }
}

struct OffsetsOf<'a> {
    slot: &'a Slot,
    tensor: &'a str,
}

seed!(OffsetsOf -> (u64, u64));

impl OffsetsOf<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse(FormatError::OffsetsNotPair { tensor: self.tensor.into(), found })
    }
}

impl<'de> Visitor<'de> for OffsetsOf<'_> {
    type Value = (u64, u64);
    refuse!(null boolean count number string object);

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(u64, u64), A::Error> {
        let OffsetsOf { slot, tensor } = self;
        let refused = |found| FormatError::OffsetNotCount { tensor: tensor.into(), found };
        let mut next = || items.next_element_seed(Count { slot, refused: &refused });
        match (next()?, next()?) {
            (Some(start), Some(end)) => match items.next_element::<IgnoredAny>()? {
                None => Ok((start, end)),
                Some(_) => self.other("an array of more".into()),
            },
            (Some(_), None) => self.other("an array of one".into()),
            (None, _) => self.other("an empty array".into()),
        }
    }
}

/// A whole number from 0 to 2^64 - 1. As in the reference implementation `1.0`, `1e2` and `-0` are none.
struct Count<'a> {
    slot: &'a Slot,
    refused: &'a dyn Fn(String) -> FormatError,
}

seed!(Count -> u64);

impl Count<'_> {
    fn other<T, E: serde::de::Error>(self, found: String) -> Result<T, E> {
        self.slot.refuse((self.refused)(found))
    }
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = u64;
    refuse!(null boolean number string array object);

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }
}

/// A value that we do not know. Unlike `IgnoredAny` it is read as strictly as one that we do: strings and numbers must
/// be whole, and the nesting is bounded.
pub(crate) struct Unknown;

impl<'de> serde::Deserialize<'de> for Unknown {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Unknown, D::Error> {
        json.deserialize_any(Unknown)
    }
}

impl<'de> Visitor<'de> for Unknown {
    type Value = Unknown;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<Unknown, E> {
        Ok(Unknown)
    }

    fn visit_bool<E>(self, _value: bool) -> Result<Unknown, E> {
        Ok(Unknown)
    }

    fn visit_u64<E>(self, _value: u64) -> Result<Unknown, E> {
        Ok(Unknown)
    }

    fn visit_i64<E>(self, _value: i64) -> Result<Unknown, E> {
        Ok(Unknown)
    }

    fn visit_f64<E>(self, _value: f64) -> Result<Unknown, E> {
        Ok(Unknown)
    }

    fn visit_str<E>(self, _value: &str) -> Result<Unknown, E> {
        Ok(Unknown)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Unknown, A::Error> {
        while items.next_element::<Unknown>()?.is_some() {}
        Ok(Unknown)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Unknown, A::Error> {
        while entries.next_key_seed(Text)?.is_some() {
            entries.next_value::<Unknown>()?;
        }
        Ok(Unknown)
    }
}

/// The rule behind an error of serde_json itself. It has no kind for its recursion limit, so the nesting at the place
/// of the error is counted.
fn syntax(text: &str, error: &serde_json::Error) -> FormatError {
    let line_start = match error.line() {
        0 | 1 => 0,
        line => text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n').nth(line - 2).map_or(0, |(at, _)| at + 1),
    };
    let place = (line_start + error.column()).min(text.len());
    if nesting(&text.as_bytes()[..place]) >= limits::JSON_DEPTH {
        return FormatError::JsonTooDeep {};
    }
    FormatError::JsonSyntax { message: error.to_string() }
}

fn nesting(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}
