//! JSON whose objects keep their order, as Python's dicts do, and `json.dumps`.

use super::text::{Limited, float_text};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::HashMap;
use std::fmt;

/// A JSON value; the keys of objects keep the order in which they first appear.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number without a fraction, of at most 64 bits.
    Integer(i128),
    /// Any other number.
    Float(f64),
    /// A string.
    String(String),
    /// A list.
    Array(Vec<Json>),
    /// Keys and values; each key once.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of a key, if this is an object that has it.
    pub fn field(&self, key: &str) -> Option<&Json> {
        match self {
            Self::Object(fields) => fields.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// The text, if this is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }
}

impl From<&Json> for Value {
    /// Serde_json nests at most 128 levels, so the recursion ends.
    fn from(json: &Json) -> Self {
        match json {
            Json::Null => Value::from(()),
            Json::Bool(x) => Value::from(*x),
            Json::Integer(x) => Value::from(*x),
            Json::Float(x) => Value::from(*x),
            Json::String(text) => Value::from(text.as_str()),
            Json::Array(items) => Value::from(items.iter().map(Value::from).collect::<Vec<_>>()),
            Json::Object(fields) => {
                Value::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), Value::from(v))))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, x: bool) -> Result<Json, E> {
        Ok(Json::Bool(x))
    }

    fn visit_i64<E>(self, x: i64) -> Result<Json, E> {
        Ok(Json::Integer(x.into()))
    }

    fn visit_u64<E>(self, x: u64) -> Result<Json, E> {
        Ok(Json::Integer(x.into()))
    }

    fn visit_f64<E>(self, x: f64) -> Result<Json, E> {
        Ok(Json::Float(x))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(Json::String(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Json, E> {
        Ok(Json::String(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields: Vec<(String, Json)> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        while let Some((key, value)) = map.next_entry::<String, Json>()? {
            // A repeated key keeps its place and takes the new value, as in Python.
            match places.get(&key) {
                Some(&place) => fields[place].1 = value,
                None => {
                    places.insert(key.clone(), fields.len());
                    fields.push((key, value));
                }
            }
        }
        Ok(Json::Object(fields))
    }
}

/// The arguments of `json.dumps` that templates may set.
#[derive(Clone, Debug)]
pub(super) struct JsonStyle {
    pub ensure_ascii: bool,
    /// What a level is indented by; `None` for one line.
    pub indent: Option<String>,
    /// Between items, and between a key and its value.
    pub separators: (String, String),
    pub sort_keys: bool,
}

impl Default for JsonStyle {
    /// What transformers uses.
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            indent: None,
            separators: (", ".to_owned(), ": ".to_owned()),
            sort_keys: false,
        }
    }
}

/// Writes `value` as `json.dumps` does; `depth` is how deep it lies.
///
/// # Errors
/// A value that has no JSON form, or more text than `out` takes.
pub(super) fn write_json(
    value: &Value,
    style: &JsonStyle,
    depth: usize,
    out: &mut Limited,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push("null"),
        ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => out.push(&value.to_string()),
        ValueKind::Number => {
            let text = float_text(f64::try_from(value.clone())?);
            out.push(match text.as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                text => text,
            })
        }
        ValueKind::String => write_string(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
            write_items("[]", items.len(), style, depth, out, &mut |i, out| {
                write_json(&items[i], style, depth + 1, out)
            })
        }
        ValueKind::Map => {
            let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
            if style.sort_keys {
                keys.sort();
            }
            write_items("{}", keys.len(), style, depth, out, &mut |i, out| {
                let key = keys[i].to_string();
                write_string(&key, style, out)?;
                out.push(&style.separators.1)?;
                write_json(&value.get_item(&keys[i])?, style, depth + 1, out)
            })
        }
        kind => Err(Error::new(
            ErrorKind::BadSerialization,
            format!("tojson cannot write {kind}"),
        )),
    }
}

/// The brackets of a list or an object with what is between them.
fn write_items(
    brackets: &str,
    len: usize,
    style: &JsonStyle,
    depth: usize,
    out: &mut Limited,
    item: &mut dyn FnMut(usize, &mut Limited) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(&brackets[..1])?;
    let new_line = |depth: usize, out: &mut Limited| -> Result<(), Error> {
        let Some(indent) = &style.indent else {
            return Ok(());
        };
        out.push("\n")?;
        (0..depth).try_for_each(|_| out.push(indent))
    };
    for i in 0..len {
        if i > 0 {
            out.push(&style.separators.0)?;
        }
        new_line(depth + 1, out)?;
        item(i, out)?;
    }
    if len > 0 {
        new_line(depth, out)?;
    }
    out.push(&brackets[1..])
}

fn write_string(text: &str, style: &JsonStyle, out: &mut Limited) -> Result<(), Error> {
    out.push("\"")?;
    for c in text.chars() {
        match c {
            '"' => out.push("\\\"")?,
            '\\' => out.push("\\\\")?,
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\u{8}' => out.push("\\b")?,
            '\u{c}' => out.push("\\f")?,
            c if c < ' ' || (style.ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push(&format!("\\u{unit:04x}"))?;
                }
            }
            c => out.push(c.encode_utf8(&mut [0; 4]))?,
        }
    }
    out.push("\"")
}
