//! Types that a setting can have: how each is read from TOML and from a flag, and
//! how it is written back. Reading what was written gives an equal value.

use std::path::{Path, PathBuf};

use setun_io::Format;
use setun_ternary::{Numerics, ScaleRule};
use toml::Value;

use crate::data::{DataFormat, SplitOn};

/// A type that a setting can have.
pub trait SettingValue: Sized {
    /// Stands for the value in the help text, as `N` in `--train.steps N`.
    const PLACEHOLDER: &'static str;

    /// Whether it holds several values.
    const IS_LIST: bool = false;

    /// Whether the bare flag, without a value, means true.
    const IS_SWITCH: bool = false;

    /// What a recipe may hold here, for error messages: "true or false".
    fn expected() -> String;

    /// The allowed names when there is a closed list of them.
    fn choices() -> Vec<&'static str> {
        Vec::new()
    }

    /// The value in a recipe; `None` if it has the wrong type or is not allowed.
    /// Relative paths are taken from `base`.
    fn from_toml(value: &Value, base: &Path) -> Option<Self>;

    /// The TOML value that the text of a flag stands for. Text that does not fit
    /// becomes a string, which [`SettingValue::from_toml`] then refuses.
    fn flag_to_toml(text: &str) -> Value {
        Value::String(text.to_owned())
    }

    /// The value as it is written to `settings.toml`.
    fn to_toml(&self) -> Value;
}

impl SettingValue for bool {
    const PLACEHOLDER: &'static str = "true|false";
    const IS_SWITCH: bool = true;

    fn expected() -> String {
        "true or false".to_owned()
    }

    fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
        value.as_bool()
    }

    fn flag_to_toml(text: &str) -> Value {
        parsed_or_text(text, text.parse().ok().map(Value::Boolean))
    }

    fn to_toml(&self) -> Value {
        Value::Boolean(*self)
    }
}

/// TOML integers are `i64`, so nothing larger is accepted: it could not be written back.
macro_rules! whole_number {
    ($($type:ty),*) => {$(
        impl SettingValue for $type {
            const PLACEHOLDER: &'static str = "N";

            fn expected() -> String {
                "a whole number from 0 to 9223372036854775807".to_owned()
            }

            fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
                value.as_integer()?.try_into().ok()
            }

            fn flag_to_toml(text: &str) -> Value {
                // Underscores between digits, as TOML allows them.
                let digits = text.replace('_', "");
                parsed_or_text(text, digits.parse().ok().map(Value::Integer))
            }

            fn to_toml(&self) -> Value {
                Value::Integer(i64::try_from(*self).unwrap_or(i64::MAX))
            }
        }
    )*};
}

whole_number!(usize, u64);

impl SettingValue for f64 {
    const PLACEHOLDER: &'static str = "X";

    fn expected() -> String {
        "a finite number".to_owned()
    }

    fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
        let number = match value {
            Value::Float(number) => *number,
            Value::Integer(number) => *number as f64,
            _ => return None,
        };
        number.is_finite().then_some(number)
    }

    fn flag_to_toml(text: &str) -> Value {
        parsed_or_text(text, text.parse().ok().map(Value::Float))
    }

    fn to_toml(&self) -> Value {
        Value::Float(*self)
    }
}

impl SettingValue for String {
    const PLACEHOLDER: &'static str = "TEXT";

    fn expected() -> String {
        "a string".to_owned()
    }

    fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }

    fn to_toml(&self) -> Value {
        Value::String(self.clone())
    }
}

impl SettingValue for Vec<String> {
    const PLACEHOLDER: &'static str = "NAMES";
    const IS_LIST: bool = true;

    fn expected() -> String {
        "a list of names".to_owned()
    }

    fn flag_to_toml(text: &str) -> Value {
        let names = text.split(',').map(str::trim).filter(|s| !s.is_empty());
        Value::Array(names.map(|s| Value::String(s.to_owned())).collect())
    }

    fn from_toml(value: &Value, _: &Path) -> Option<Self> {
        let names = value.as_array()?.iter();
        names.map(|v| v.as_str().map(str::to_owned)).collect()
    }

    fn to_toml(&self) -> Value {
        Value::Array(self.iter().cloned().map(Value::String).collect())
    }
}

/// A path; the empty string means none.
impl SettingValue for Option<PathBuf> {
    const PLACEHOLDER: &'static str = "PATH";

    fn expected() -> String {
        "a path in quotes".to_owned()
    }

    fn from_toml(value: &Value, base: &Path) -> Option<Self> {
        match value.as_str()? {
            "" => Some(None),
            path => Some(Some(base.join(path))),
        }
    }

    fn to_toml(&self) -> Value {
        Value::String(self.as_deref().map(path_text).unwrap_or_default())
    }
}

/// Several paths; a single string is a list of one.
impl SettingValue for Vec<PathBuf> {
    const PLACEHOLDER: &'static str = "PATH[,PATH...]";
    const IS_LIST: bool = true;

    fn expected() -> String {
        "a list of paths, such as [\"a.txt\", \"texts/*.txt\"]".to_owned()
    }

    fn from_toml(value: &Value, base: &Path) -> Option<Self> {
        let paths = strings(value)?;
        if paths.contains(&"") {
            return None;
        }
        Some(paths.into_iter().map(|path| base.join(path)).collect())
    }

    fn flag_to_toml(text: &str) -> Value {
        split_list(text)
    }

    fn to_toml(&self) -> Value {
        let text = |path: &PathBuf| Value::String(path_text(path));
        Value::Array(self.iter().map(text).collect())
    }
}

/// A closed list of names.
pub trait Choice: Copy + 'static {
    /// Every choice, in the order in which help and errors list them.
    const ALL: &'static [Self];

    /// The name in recipes and flags.
    fn name(self) -> &'static str;

    /// The choice called `name`, if there is one.
    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|item| item.name() == name)
    }
}

impl<T: Choice> SettingValue for T {
    const PLACEHOLDER: &'static str = "NAME";

    fn expected() -> String {
        format!("one of {}", quoted_names::<T>())
    }

    fn choices() -> Vec<&'static str> {
        T::ALL.iter().map(|item| item.name()).collect()
    }

    fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
        T::from_name(value.as_str()?)
    }

    fn to_toml(&self) -> Value {
        Value::String(self.name().to_owned())
    }
}

impl<T: Choice> SettingValue for Vec<T> {
    const PLACEHOLDER: &'static str = "NAME[,NAME...]";
    const IS_LIST: bool = true;

    fn expected() -> String {
        format!("a list of any of {}", quoted_names::<T>())
    }

    fn choices() -> Vec<&'static str> {
        T::choices()
    }

    fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
        strings(value)?.into_iter().map(T::from_name).collect()
    }

    fn flag_to_toml(text: &str) -> Value {
        split_list(text)
    }

    fn to_toml(&self) -> Value {
        Value::Array(self.iter().map(SettingValue::to_toml).collect())
    }
}

/// Defines an enum whose variants have the given names in recipes.
macro_rules! choice {
    (
        #[doc = $enum_doc:literal]
        $name:ident { $( #[doc = $doc:literal] $variant:ident = $text:literal, )+ }
    ) => {
        #[doc = $enum_doc]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $( #[doc = $doc] $variant, )+
        }

        impl Choice for $name {
            const ALL: &'static [Self] = &[ $( Self::$variant, )+ ];

            fn name(self) -> &'static str {
                match self {
                    $( Self::$variant => $text, )+
                }
            }
        }
    };
}

choice! {
    /// How the learning rate moves; the formulas are in [`crate::schedule`].
    ScheduleKind {
        /// Linear decay, a lower second peak at half, no weight decay after two thirds.
        TwoStage = "two-stage",
        /// Half a cosine from the peak to the floor.
        Cosine = "cosine",
        /// A line from the peak to the floor.
        Linear = "linear",
        /// The peak throughout.
        Constant = "constant",
        /// The peak, then a line to the floor from `decay_start` on.
        Wsd = "wsd",
    }
}

choice! {
    /// What the scales of groups are rounded to.
    ScaleRounding {
        /// bf16: what every file format holds.
        Bf16 = "bf16",
        /// f16, an experiment: no export.
        F16 = "f16",
    }
}

choice! {
    /// How the gradient passes the projection.
    Ste {
        /// As it is.
        Identity = "identity",
        /// Not where the projection clips: `|w| > 1.5 s`.
        Clipped = "clipped",
    }
}

choice! {
    /// What updates the weights.
    OptimizerKind {
        /// AdamW for all parameters.
        Adamw = "adamw",
        /// Muon for the matrices of the layers, AdamW for embedding, head and norms.
        Muon = "muon",
    }
}

choice! {
    /// How the optimizer's moments are stored.
    OptimizerState {
        /// f32.
        F32 = "f32",
        /// bf16, rounded by chance: half the memory.
        Bf16 = "bf16",
    }
}

choice! {
    /// Arithmetic of the products as a recipe asks for it.
    NumericsChoice {
        /// `int8` for ternary models, `bf16` for dense ones.
        Auto = "auto",
        /// int8 activations, exact integer sums.
        Int8 = "int8",
        /// bf16 operands.
        Bf16 = "bf16",
        /// f32 operands.
        F32 = "f32",
    }
}

impl NumericsChoice {
    /// The mode for a model that is ternary or not.
    pub fn resolve(self, ternary: bool) -> Numerics {
        match self {
            Self::Auto if ternary => Numerics::Int8,
            Self::Auto | Self::Bf16 => Numerics::Bf16,
            Self::Int8 => Numerics::Int8,
            Self::F32 => Numerics::F32,
        }
    }
}

impl From<Numerics> for NumericsChoice {
    fn from(numerics: Numerics) -> Self {
        match numerics {
            Numerics::Int8 => Self::Int8,
            Numerics::Bf16 => Self::Bf16,
            Numerics::F32 => Self::F32,
        }
    }
}

impl Choice for Format {
    const ALL: &'static [Self] = &Format::ALL;

    fn name(self) -> &'static str {
        Format::name(self)
    }

    fn from_name(name: &str) -> Option<Self> {
        Format::from_name(name)
    }
}

impl Choice for ScaleRule {
    const ALL: &'static [Self] = &ScaleRule::ALL;

    fn name(self) -> &'static str {
        ScaleRule::name(self)
    }
}

impl Choice for DataFormat {
    const ALL: &'static [Self] = &[Self::Auto, Self::Text, Self::Chat];

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Text => "text",
            Self::Chat => "chat",
        }
    }
}

impl SettingValue for SplitOn {
    const PLACEHOLDER: &'static str = "RULE";

    fn expected() -> String {
        "\"blank-lines\", \"file\" or \"regex:PATTERN\"".to_owned()
    }

    fn choices() -> Vec<&'static str> {
        vec!["blank-lines", "file", "regex:PATTERN"]
    }

    fn from_toml(value: &Value, _base: &Path) -> Option<Self> {
        // A pattern is compiled by `validate`, which can say what is wrong with it.
        let text = value.as_str()?;
        match text.strip_prefix("regex:") {
            Some(pattern) => Some(Self::Regex(pattern.to_owned())),
            None => text.parse().ok(),
        }
    }

    fn to_toml(&self) -> Value {
        Value::String(self.to_string())
    }
}

fn parsed_or_text(text: &str, parsed: Option<Value>) -> Value {
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

/// `a,b` as a list; the empty text is the empty list.
fn split_list(text: &str) -> Value {
    let items = text.split(',').filter(|_| !text.is_empty());
    Value::Array(
        items
            .map(|item| Value::String(item.trim().to_owned()))
            .collect(),
    )
}

fn strings(value: &Value) -> Option<Vec<&str>> {
    match value {
        Value::String(text) => Some(vec![text]),
        Value::Array(items) => items.iter().map(Value::as_str).collect(),
        _ => None,
    }
}

fn quoted_names<T: Choice>() -> String {
    let names = T::ALL.iter().map(|item| format!("\"{}\"", item.name()));
    names.collect::<Vec<_>>().join(", ")
}

/// Loading refuses paths that are not UTF-8, so nothing is lost here.
fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag<T: SettingValue>(text: &str) -> Option<T> {
        T::from_toml(&T::flag_to_toml(text), Path::new("base"))
    }

    #[test]
    fn flags_read_every_type() {
        assert_eq!(flag::<bool>("true"), Some(true));
        assert_eq!(flag::<usize>("10_000"), Some(10_000));
        assert_eq!(flag::<f64>("1e-3"), Some(1e-3));
        assert_eq!(flag::<f64>("2"), Some(2.0));
        assert_eq!(flag::<String>("12"), Some("12".to_owned()));
        assert_eq!(
            flag::<Option<PathBuf>>("m"),
            Some(Some(PathBuf::from("base/m")))
        );
        assert_eq!(flag::<Option<PathBuf>>(""), Some(None));
        let paths = vec![PathBuf::from("base/a"), PathBuf::from("/b")];
        assert_eq!(flag::<Vec<PathBuf>>("a, /b"), Some(paths));
        assert_eq!(flag::<Vec<PathBuf>>(""), Some(Vec::new()));
        let formats = vec![Format::Packed, Format::Mlx];
        assert_eq!(flag::<Vec<Format>>("packed,mlx"), Some(formats));
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        assert_eq!(flag::<bool>("yes"), None);
        assert_eq!(flag::<usize>("-1"), None);
        assert_eq!(flag::<usize>("1.5"), None);
        assert_eq!(flag::<u64>("9223372036854775808"), None);
        assert_eq!(flag::<f64>("nan"), None);
        assert_eq!(flag::<f64>("inf"), None);
        assert_eq!(flag::<Vec<PathBuf>>("a,,b"), None);
        assert_eq!(flag::<ScheduleKind>("cosin"), None);
        assert_eq!(flag::<Vec<Format>>("hf,q4_k"), None);
        assert_eq!(flag::<SplitOn>("lines"), None);
    }

    #[test]
    fn every_choice_reads_back_from_its_name() {
        fn check<T: Choice + PartialEq + std::fmt::Debug>() {
            for &item in T::ALL {
                assert_eq!(T::from_name(item.name()), Some(item));
            }
        }
        check::<ScheduleKind>();
        check::<NumericsChoice>();
        check::<Format>();
        check::<ScaleRule>();
    }
}
