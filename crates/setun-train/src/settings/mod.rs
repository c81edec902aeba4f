//! Settings of a training run: a TOML recipe, then flags on top, then checks.
//!
//! [`schema`] is the one table of keys; [`value`] the types that they can have;
//! `validate` the combinations that are refused. Relative paths in a recipe are
//! taken from the recipe's folder, in flags from the current directory; once loaded
//! every path is absolute.

pub mod schema;
mod validate;
pub mod value;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use setun_formats::TernaryInfo;
use setun_formats::config::Qwen3Config;
use setun_model::Scheme;
use setun_ternary::{Numerics, ScaleRule};
use toml::Value;
use toml::de::DeTable;

pub use crate::data::SplitOn;
pub use schema::{
    CheckpointSettings, DataSettings, DistillSettings, DrafterSettings, EvalSettings,
    ExportSettings, LogSettings, ModelSettings, RunSettings, SampleSettings, TokenizerSettings,
    TrainSettings,
};
pub(crate) use validate::allow_only;
pub use value::{
    Choice, NumericsChoice, OptimizerKind, OptimizerState, ScaleRounding, ScheduleKind, Ste,
};

use schema::Key;

/// File in a run directory that holds its resolved settings.
pub const SETTINGS_FILE: &str = "settings.toml";

/// All settings of a run, one field per section of a recipe.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `[run]`: The run and its directory.
    pub run: RunSettings,
    /// `[data]`: Text to learn from.
    pub data: DataSettings,
    /// `[tokenizer]`: Text to tokens.
    pub tokenizer: TokenizerSettings,
    /// `[model]`: Shape and number format of the model.
    pub model: ModelSettings,
    /// `[train]`: Optimization.
    pub train: TrainSettings,
    /// `[distill]`: Learning from another model's distribution.
    pub distill: DistillSettings,
    /// `[drafter]`: A block drafter.
    pub drafter: DrafterSettings,
    /// `[eval]`: Held-out loss.
    pub eval: EvalSettings,
    /// `[checkpoint]`: Checkpoints to resume from.
    pub checkpoint: CheckpointSettings,
    /// `[sample]`: Sample texts in the report.
    pub sample: SampleSettings,
    /// `[export]`: The finished model.
    pub export: ExportSettings,
    /// `[log]`: Progress.
    pub log: LogSettings,
    /// Paths of the keys that the recipe or a flag gave.
    given: BTreeSet<&'static str>,
}

/// A key and its value as text, from a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Key, as `train.lr`; kebab-case is accepted.
    pub key: String,
    /// Value; lists are comma separated.
    pub value: String,
}

/// A key and its value from a file other than a recipe, such as a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Key, as `train.lr`.
    pub key: String,
    /// Its value.
    pub value: Value,
    /// Folder that a relative path is taken from.
    pub base: PathBuf,
    /// File and line, for errors.
    pub place: String,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A recipe cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The recipe.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A recipe is not TOML.
    #[error("{} is not valid TOML: {source}", path.display())]
    Syntax {
        /// The recipe.
        path: PathBuf,
        /// Place and problem.
        source: Box<toml::de::Error>,
    },
    /// A section or key that does not exist.
    #[error("{place}: {problem}; {remedy}")]
    Unknown {
        /// Recipe and line, or the flag.
        place: String,
        /// What is unknown.
        problem: String,
        /// The nearest known name.
        remedy: String,
    },
    /// A value of the wrong type, or not on the list.
    #[error("{place}: {key} must be {expected}, not {found}")]
    Type {
        /// Recipe and line, or the flag.
        place: String,
        /// The key.
        key: &'static str,
        /// What it must be.
        expected: String,
        /// What was given, and its TOML type.
        found: String,
    },
    /// Values that are out of range or do not go together.
    #[error("{problem}; {remedy}")]
    Impossible {
        /// The keys with their values, and why they cannot be.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

impl Settings {
    /// Reads a recipe (or starts from the defaults), puts `overrides` on top, checks
    /// everything and fills in what follows from other settings.
    ///
    /// The shape of the model is not checked here when `model.init_from` is given;
    /// [`Settings::adopt_model`] does it.
    ///
    /// # Errors
    /// Unknown keys, wrong types, and combinations that cannot be run.
    pub fn load(recipe: Option<&Path>, overrides: &[Override]) -> Result<Self, SettingsError> {
        Self::load_with(recipe, &[], overrides)
    }

    /// As [`Settings::load`], with `assignments` between the recipe and the overrides.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn load_with(
        recipe: Option<&Path>,
        assignments: &[Assignment],
        overrides: &[Override],
    ) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        if let Some(path) = recipe {
            settings.read_recipe(path)?;
        }
        for assignment in assignments {
            settings.assign(assignment)?;
        }
        settings.apply(overrides)?;
        settings.resolve(recipe)?;
        validate::validate(&settings)?;
        if settings.model.init_from.is_none() {
            validate::validate_shape(&settings)?;
        }
        Ok(settings)
    }

    /// Reads the settings of an earlier run, to resume it. Only settings that do not
    /// change what it computes may be overridden.
    ///
    /// # Errors
    /// As [`Settings::load`], and an override that would change the run.
    pub fn load_run(run: &Path, overrides: &[Override]) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        settings.read_recipe(&run.join(SETTINGS_FILE))?;
        validate::validate_resumed(overrides)?;
        settings.apply(overrides)?;
        // The run may have been moved since its settings were written.
        settings.run.output = Some(run.to_path_buf());
        settings.resolve(None)?;
        validate::validate(&settings)?;
        validate::validate_shape(&settings)?;
        Ok(settings)
    }

    /// Takes the shape of the model that training starts from, then checks it.
    /// `source` names that model in errors.
    ///
    /// # Errors
    /// A shape given in the recipe that differs, or one that does not suit the other
    /// settings.
    pub fn adopt_model(&mut self, config: &Qwen3Config, source: &str) -> Result<(), SettingsError> {
        let sizes = [
            ("model.hidden_size", config.hidden_size),
            ("model.intermediate_size", config.intermediate_size),
            ("model.num_hidden_layers", config.num_hidden_layers),
            ("model.num_attention_heads", config.num_attention_heads),
            ("model.num_key_value_heads", config.num_key_value_heads),
            ("model.head_dim", config.head_dim),
            (
                "model.max_position_embeddings",
                config.max_position_embeddings,
            ),
        ];
        for (key, size) in sizes {
            self.adopt(key, &size.to_string(), source)?;
        }
        let tied = config.tie_word_embeddings.to_string();
        self.adopt("model.tie_word_embeddings", &tied, source)?;
        self.adopt(
            "model.rope_theta",
            &config.rope.rope_theta.to_string(),
            source,
        )?;
        self.adopt(
            "model.rms_norm_eps",
            &config.rms_norm_eps.to_string(),
            source,
        )?;
        validate::validate_shape(self)
    }

    /// Sets `key` to a value that `source` (a model file) fixes, written as in a flag.
    ///
    /// # Errors
    /// The recipe or a flag gave another value; an unknown key or a value that does
    /// not fit it.
    pub fn adopt(&mut self, key: &str, value: &str, source: &str) -> Result<(), SettingsError> {
        let known = schema::find(key).ok_or_else(|| unknown_key(source.to_owned(), key))?;
        let before = (known.write)(self);
        self.set(known, &(known.flag_to_toml)(value), Path::new(""), || {
            source.to_owned()
        })?;
        let after = (known.write)(self);
        if before != after && self.is_given(known.path) {
            return Err(SettingsError::Impossible {
                problem: format!("{key} is set to {before}, but {source} has {after}"),
                remedy: format!("leave {key} out, or set it to {after}"),
            });
        }
        Ok(())
    }

    /// Whether the recipe or a flag gave this key, as `train.lr`.
    pub fn is_given(&self, key: &str) -> bool {
        self.given.contains(key)
    }

    /// The run directory.
    pub fn output(&self) -> &Path {
        self.run.output.as_deref().unwrap_or(Path::new(""))
    }

    /// The setting that makes the model an experiment, which is neither dense nor what
    /// files call ternary, so that nothing is exported.
    pub fn experiment(&self) -> Option<&'static str> {
        let model = &self.model;
        if model.logit_softcap > 0.0 {
            return Some("model.logit_softcap");
        }
        match (model.ternary_embedding, model.scale_rounding) {
            _ if !model.ternary => None,
            (false, _) => Some("model.ternary_embedding = false"),
            (true, ScaleRounding::F16) => Some("model.scale_rounding = \"f16\""),
            (true, ScaleRounding::Bf16) if model.learned_scales => {
                Some("model.learned_scales = true")
            }
            (true, ScaleRounding::Bf16) => None,
        }
    }

    /// How matrices become ternary; `None` for a dense model.
    pub fn scheme(&self) -> Option<Scheme> {
        let model = &self.model;
        model.ternary.then_some(Scheme {
            group_size: model.group_size,
            scale_rule: match model.scale_rounding {
                ScaleRounding::Bf16 => model.scale_rule,
                ScaleRounding::F16 => ScaleRule::MeanF16,
            },
        })
    }

    /// The number format of the matrices in files; `None` for a dense model, and for an
    /// experiment.
    pub fn ternary_info(&self) -> Option<TernaryInfo> {
        let has_format = self.model.ternary && self.experiment().is_none();
        has_format.then(|| TernaryInfo {
            group_size: self.model.group_size,
            scale_rule: self.model.scale_rule,
            numerics: self.numerics(),
        })
    }

    /// Arithmetic of the products.
    pub fn numerics(&self) -> Numerics {
        self.model.numerics.resolve(self.model.ternary)
    }

    /// The text of `settings.toml`: every key with its value. [`Settings::load`] on it
    /// gives equal settings.
    pub fn to_toml(&self) -> String {
        let mut text = String::from("# Written by setun: every setting of this run.\n");
        for (section, _) in schema::sections() {
            text.push_str(&format!("\n[{section}]\n"));
            for key in schema::keys().iter().filter(|key| key.section == *section) {
                text.push_str(&format!("{} = {}\n", key.name, (key.write)(self)));
            }
        }
        text
    }

    /// Every key with its value, in the order of the settings table.
    pub fn values(&self) -> Vec<(&'static str, Value)> {
        let keys = schema::keys().iter();
        keys.map(|key| (key.path, (key.write)(self))).collect()
    }

    fn read_recipe(&mut self, path: &Path) -> Result<(), SettingsError> {
        let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        self.apply_toml(&text, path)
    }

    fn apply_toml(&mut self, text: &str, path: &Path) -> Result<(), SettingsError> {
        let table: toml::Table = toml::from_str(text).map_err(|source| SettingsError::Syntax {
            path: path.to_path_buf(),
            source: Box::new(source),
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        for (section, entries) in &table {
            let place = || place_in(path, text, section, None);
            if !schema::sections().iter().any(|(name, _)| name == section) {
                return Err(unknown_section(place(), section));
            }
            let Value::Table(entries) = entries else {
                return Err(SettingsError::Unknown {
                    place: place(),
                    problem: format!("{section} is a section, not a key"),
                    remedy: format!("write [{section}] and its keys below"),
                });
            };
            for (name, value) in entries {
                let place = || place_in(path, text, section, Some(name));
                let key = format!("{section}.{name}");
                let known = schema::keys().iter().find(|known| known.path == key);
                let known = known.ok_or_else(|| unknown_key(place(), &key))?;
                self.set(known, value, base, place)?;
                self.given.insert(known.path);
            }
        }
        Ok(())
    }

    fn assign(&mut self, assignment: &Assignment) -> Result<(), SettingsError> {
        let place = || assignment.place.clone();
        let known = schema::find(&assignment.key);
        let known = known.ok_or_else(|| unknown_key(place(), &assignment.key))?;
        self.set(known, &assignment.value, &assignment.base, place)?;
        self.given.insert(known.path);
        Ok(())
    }

    fn apply(&mut self, overrides: &[Override]) -> Result<(), SettingsError> {
        for Override { key, value } in overrides {
            let place = || format!("--{key}");
            let known = schema::find(key).ok_or_else(|| unknown_key(place(), key))?;
            self.set(known, &(known.flag_to_toml)(value), Path::new(""), place)?;
            self.given.insert(known.path);
        }
        Ok(())
    }

    fn set(
        &mut self,
        key: &Key,
        value: &Value,
        base: &Path,
        place: impl Fn() -> String,
    ) -> Result<(), SettingsError> {
        if (key.read)(self, value, base) {
            return Ok(());
        }
        Err(SettingsError::Type {
            place: place(),
            key: key.path,
            expected: (key.expected)(),
            found: format!("{value} ({})", value.type_str()),
        })
    }

    /// Replaces "automatic" values by what they stand for, as far as they do not
    /// depend on the machine or the model file, and makes paths absolute.
    fn resolve(&mut self, recipe: Option<&Path>) -> Result<(), SettingsError> {
        if self.run.name.is_empty() {
            let stem = recipe
                .and_then(Path::file_stem)
                .map(|stem| stem.to_string_lossy());
            self.run.name = stem.unwrap_or("run".into()).into_owned();
        }
        let default_output = || Path::new("runs").join(&self.run.name);
        let output = self.run.output.take().unwrap_or_else(default_output);
        self.run.output = Some(output);
        if self.train.micro_batch_size == 0 {
            self.train.micro_batch_size = self.train.batch_size;
        }
        if self.eval.batch_size == 0 {
            self.eval.batch_size = self.train.micro_batch_size;
        }
        self.model.numerics = self.numerics().into();
        if !self.model.ternary && !self.is_given("export.formats") {
            self.export.formats.retain(|format| format.holds_floats());
        }
        if self.experiment().is_some() {
            if !self.is_given("export.formats") {
                self.export.formats.clear();
            }
            if !self.is_given("sample.prompts") {
                self.sample.prompts = 0;
            }
        }
        let single = [
            &mut self.run.output,
            &mut self.tokenizer.path,
            &mut self.model.init_from,
            &mut self.distill.teacher,
        ];
        let lists = [&mut self.data.train, &mut self.data.valid];
        let paths = single
            .into_iter()
            .flatten()
            .chain(lists.into_iter().flatten());
        for path in paths {
            *path = absolute(path)?;
        }
        Ok(())
    }
}

fn absolute(path: &Path) -> Result<PathBuf, SettingsError> {
    let absolute = std::path::absolute(path).map_err(|source| SettingsError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    if absolute.to_str().is_none() {
        return Err(SettingsError::Impossible {
            problem: format!("the path {} is not UTF-8", absolute.display()),
            remedy: "rename the folder or file: settings.toml must hold it".to_owned(),
        });
    }
    Ok(absolute)
}

fn unknown_section(place: String, section: &str) -> SettingsError {
    let names = schema::sections().iter().map(|(name, _)| *name);
    // A key written above the first section is the likelier mistake.
    let owner = schema::keys().iter().find(|key| key.name == section);
    let remedy = match owner {
        Some(key) => format!("{section} belongs in the section [{}]", key.section),
        None => format!("did you mean [{}]?", nearest(section, names)),
    };
    let problem = format!("there is no section [{section}]");
    SettingsError::Unknown {
        place,
        problem,
        remedy,
    }
}

fn unknown_key(place: String, path: &str) -> SettingsError {
    let snake = path.replace('-', "_");
    let (section, name) = snake.split_once('.').unwrap_or(("", &snake));
    let elsewhere = schema::keys().iter().find(|key| key.name == name);
    let same_section = || schema::keys().iter().filter(|key| key.section == section);
    let remedy = match elsewhere {
        Some(key) => format!("did you mean {}?", key.path),
        None if same_section().next().is_some() => {
            let name = nearest(name, same_section().map(|key| key.name));
            format!("did you mean {section}.{name}?")
        }
        None => {
            let paths = schema::keys().iter().map(|key| key.path);
            format!("did you mean {}?", nearest(&snake, paths))
        }
    };
    let problem = match section {
        "" => format!("there is no key {name}"),
        _ => format!("there is no key {name} in [{section}]"),
    };
    SettingsError::Unknown {
        place,
        problem,
        remedy,
    }
}

/// The candidate with the smallest edit distance to `name`, the first of equals.
pub(crate) fn nearest(name: &str, candidates: impl Iterator<Item = &'static str>) -> &'static str {
    candidates
        .min_by_key(|candidate| edit_distance(name, candidate))
        .unwrap_or_default()
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// `FILE:LINE` of a key, or of its section's first mention. Only errors need it, so the
/// text is parsed again here instead of carrying positions through every value.
pub(crate) fn place_in(path: &Path, text: &str, section: &str, key: Option<&str>) -> String {
    match span_of(text, section, key) {
        Some(span) => {
            let line = text[..span.start].matches('\n').count() + 1;
            format!("{}:{line}", path.display())
        }
        None => path.display().to_string(),
    }
}

fn span_of(text: &str, section: &str, key: Option<&str>) -> Option<Range<usize>> {
    let table = DeTable::parse(text).ok()?;
    let (name, entries) = table.get_ref().get_key_value(section)?;
    let Some(key) = key else {
        return Some(name.span());
    };
    let (name, _) = entries.get_ref().as_table()?.get_key_value(key)?;
    Some(name.span())
}

#[cfg(test)]
mod tests;
