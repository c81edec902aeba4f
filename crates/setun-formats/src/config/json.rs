//! JSON from strangers: no object may have the same key twice.
//!
//! Of two equal keys serde_json keeps the last one, other readers the first one, so such
//! a file would mean two different things to two programs.

use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, de};
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

/// Checks that `json` is one JSON value and that no object in it repeats a key.
///
/// Linear in time; the depth is bounded by serde_json, which refuses what nests deeper
/// than 128 levels.
///
/// # Errors
/// What serde_json refuses, and the repeated key, with line and column.
pub(crate) fn refuse_repeated_keys(json: &[u8]) -> serde_json::Result<()> {
    refuse_repeated_keys_but(json, &[])
}

/// [`refuse_repeated_keys`], but for the values at the ends of these `paths` of keys, whose
/// reader sees a repeated key sooner or takes no objects.
///
/// # Errors
/// As there.
pub(crate) fn refuse_repeated_keys_but(json: &[u8], paths: &[&[&str]]) -> serde_json::Result<()> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let but = paths.to_vec();
    UniqueKeys { but }.deserialize(&mut deserializer)?;
    deserializer.end()
}

/// Text of a stranger, cut to what fits into a message.
pub(crate) fn cut(text: &str) -> String {
    const MAX_CHARS: usize = 300;
    cut_at(text, MAX_CHARS)
}

/// The first `max_chars` characters of `text`, and dots where there are more.
pub(crate) fn cut_at(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Visits a value without keeping it.
#[derive(Default)]
struct UniqueKeys<'p> {
    /// From here the keys on the way to each value that is not looked at.
    but: Vec<&'p [&'p str]>,
}

impl<'p> UniqueKeys<'p> {
    /// What is left of the paths behind `key`.
    fn behind(&self, key: &str) -> Vec<&'p [&'p str]> {
        let paths = self.but.iter().filter_map(|path| path.split_first());
        paths
            .filter(|(first, _)| **first == key)
            .map(|(_, rest)| rest)
            .collect()
    }
}

/// A key, borrowed where it has no escapes: a vocabulary has very many.
#[derive(Deserialize, PartialEq, Eq, Hash)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for UniqueKeys<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(Key(key)) = map.next_key()? {
            let but = self.behind(&key);
            match but.iter().any(|path| path.is_empty()) {
                true => _ = map.next_value::<IgnoredAny>()?,
                false => map.next_value_seed(UniqueKeys { but })?,
            }
            if let Some(key) = seen.replace(key) {
                let key = cut(&key);
                return Err(A::Error::custom(format!("key {key:?} occurs twice")));
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        while values.next_element_seed(UniqueKeys::default())?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_objects_may_be_left_out() {
        let json = |inner: &str| format!(r#"{{"a": {{"b": {inner}, "c": {{"b": {inner}}}}}}}"#);
        let check = |inner: &str, path: &[&str]| {
            refuse_repeated_keys_but(json(inner).as_bytes(), &[path]).is_ok()
        };
        let (unique, repeated) = (r#"{"x": 1, "y": 2}"#, r#"{"x": 1, "x": 2}"#);
        for path in [&["a", "b"][..], &["a"], &["b"], &[]] {
            assert!(check(unique, path));
            assert_eq!(check(repeated, path), path == ["a"], "{path:?}");
        }
        let one = r#"{"a": {"b": {"x": 1, "x": 2}}, "b": {}}"#.as_bytes();
        assert!(refuse_repeated_keys_but(one, &[&["a", "b"]]).is_ok());
        assert!(refuse_repeated_keys_but(one, &[&["b"]]).is_err());
        let beside = r#"{"a": {"b": {}, "b": {}}}"#.as_bytes();
        assert!(refuse_repeated_keys_but(beside, &[&["a", "b"]]).is_err());
        let both: [&[&str]; 2] = [&["a", "b"], &["a", "c", "b"]];
        assert!(refuse_repeated_keys_but(json(repeated).as_bytes(), &both).is_ok());
    }

    #[test]
    fn a_repeated_key_is_found_at_any_depth() {
        for good in [
            "{}",
            " [1, -2, 3.5e300, true, null, \"x\"] ",
            r#"{"a": {"a": {"a": []}}, "b": [{"a": 1}, {"a": 1}]}"#,
        ] {
            assert!(refuse_repeated_keys(good.as_bytes()).is_ok(), "{good}");
        }
        for (bad, place) in [
            (r#"{"a": 1, "b": 2, "a": 1}"#, "line 1 column 24"),
            ("[{\"x\": {\n\"a\": 1, \"a\": 2}}]", "line 2"),
            (r#"{"a": 1, "\u0061": 2}"#, "column"),
        ] {
            let error = refuse_repeated_keys(bad.as_bytes()).unwrap_err();
            let message = error.to_string();
            assert!(message.contains("key \"a\" occurs twice"), "{message}");
            assert!(message.contains(place), "{message}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused_without_a_stack_overflow() {
        let bombs = ["[".repeat(1 << 20), "{\"a\":".repeat(1 << 20)];
        for bad in [
            "", "{", "[1] 2", "nan", "{a: 1}", "1e999", &bombs[0], &bombs[1],
        ] {
            assert!(refuse_repeated_keys(bad.as_bytes()).is_err());
        }
        assert!(refuse_repeated_keys(b"\"\xff\"").is_err());
    }
}
