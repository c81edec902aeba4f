//! Values as Python prints them, within a limit.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Text that cannot grow beyond a limit.
pub(super) struct Limited {
    text: String,
    max: usize,
}

impl Limited {
    pub fn new(max: usize) -> Self {
        let text = String::new();
        Self { text, max }
    }

    /// Appends `part`.
    ///
    /// # Errors
    /// [`ErrorKind::WriteFailure`] where the limit is passed.
    pub fn push(&mut self, part: &str) -> Result<(), Error> {
        if part.len() > self.max - self.text.len() {
            return Err(Error::from(ErrorKind::WriteFailure));
        }
        self.text.push_str(part);
        Ok(())
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

/// Appends `str(value)`; nothing for an undefined value, as Jinja has it.
///
/// # Errors
/// More text than `out` takes.
pub(super) fn write_str(value: &Value, out: &mut Limited) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.push(text),
        None if value.is_undefined() => Ok(()),
        None => write_repr(value, out),
    }
}

/// Appends `repr(value)`. Its depth was bounded when the value was made.
fn write_repr(value: &Value, out: &mut Limited) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if !value.is_integer() => {
            out.push(&float_text(f64::try_from(value.clone())?))
        }
        ValueKind::String => write_quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let is_tuple = value.is_tuple();
            out.push(if is_tuple { "(" } else { "[" })?;
            for (i, item) in value.try_iter()?.checked().enumerate() {
                out.push(if i > 0 { ", " } else { "" })?;
                write_repr(&item?, out)?;
            }
            let single = is_tuple && value.len() == Some(1);
            out.push(if single { "," } else { "" })?;
            out.push(if is_tuple { ")" } else { "]" })
        }
        ValueKind::Map => {
            out.push("{")?;
            for (i, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                out.push(if i > 0 { ", " } else { "" })?;
                write_repr(&key, out)?;
                out.push(": ")?;
                write_repr(&value.get_item(&key)?, out)?;
            }
            out.push("}")
        }
        _ => out.push(&value.to_string()),
    }
}

fn write_quoted(text: &str, out: &mut Limited) -> Result<(), Error> {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut push = |c: char| out.push(c.encode_utf8(&mut [0; 4]));
    push(quote)?;
    for c in text.chars() {
        let escape = match c {
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            c if c == quote => format!("\\{c}"),
            c if c.is_control() => format!("\\x{:02x}", u32::from(c)),
            c => c.to_string(),
        };
        escape.chars().try_for_each(&mut push)?;
    }
    push(quote)
}

/// `repr` of a float: the shortest digits that give it back, with an exponent where
/// Python has one.
pub(super) fn float_text(x: f64) -> String {
    if !x.is_finite() {
        return x.to_string().to_lowercase();
    }
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = x.to_string();
    if text.contains('.') {
        return text;
    }
    format!("{text}.0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_in_python() {
        for (x, expected) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e300, "-2.5e+300"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float_text(x), expected);
        }
    }

    #[test]
    fn values_print_as_in_python() {
        let list = Value::from(vec![
            Value::from("it's"),
            Value::from("a\"'\n\\"),
            Value::from(true),
            Value::from(()),
            Value::from(2.0),
            Value::from_pairs([("é", Value::from(7))]),
        ]);
        let mut out = Limited::new(100);
        write_str(&list, &mut out).unwrap();
        let expected = r#"["it's", 'a"\'\n\\', True, None, 2.0, {'é': 7}]"#;
        assert_eq!(out.into_text(), expected);
        assert!(write_str(&list, &mut Limited::new(20)).is_err());
    }
}
