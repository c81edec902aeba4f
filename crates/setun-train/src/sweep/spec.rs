//! The file that describes a sweep.
//!
//! ```toml
//! recipe = "base.toml"            # what all cells share; paths are relative to this file
//! output = "../../runs/rates"     # a directory for each cell and seed, and the table
//! seeds = [1, 2, 3, 4]            # run.seed: initial weights and order of the data
//! base = "lr-0.002"               # the cell that others are paired with; else the first
//! dense_twin = true               # a dense run beside every ternary cell, or a cell's name
//!
//! [set]                           # settings of all cells, over the recipe
//! "train.steps" = 640
//!
//! [grid]                          # a cell for each combination
//! "train.lr" = [1e-3, 2e-3]
//!
//! [[cell]]                        # and cells one by one
//! name = "slow"
//! set = { "train.lr" = 1e-4 }
//!
//! [[cell]]
//! name = "taught"
//! teacher = "slow"                # distill.teacher: that cell's run of the same seed
//! set = { "distill.weight" = 0.5 }
//! ```

use crate::settings::{Assignment, SettingsError, nearest, place_in, schema};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

const KEYS: [&str; 8] = [
    "recipe",
    "output",
    "seeds",
    "base",
    "dense_twin",
    "set",
    "grid",
    "cell",
];
const CELL_KEYS: [&str; 4] = ["name", "set", "dense_twin", "teacher"];
/// Keys that a sweep sets for each of its runs.
const OWN_KEYS: [&str; 3] = ["run.name", "run.output", "run.seed"];

/// A sweep as its file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The recipe of all cells.
    pub recipe: PathBuf,
    /// Directory of the sweep.
    pub output: PathBuf,
    /// Seeds of the runs of each cell; none for the recipe's.
    pub seeds: Vec<u64>,
    /// Name of the cell that others are paired with.
    pub base: Option<String>,
    /// Dense runs beside all cells.
    pub twin: Twin,
    /// Settings of all cells.
    pub set: Vec<Assignment>,
    /// The cells: the grid's, then those with names.
    pub cells: Vec<Cell>,
}

/// One point of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Name, and name of its directory.
    pub name: String,
    /// Its settings, over those of all cells.
    pub set: Vec<Assignment>,
    /// Its dense run; none for what the sweep says.
    pub twin: Option<Twin>,
    /// The cell, before this one, whose run of the same seed is the teacher.
    pub teacher: Option<String>,
}

/// Which dense run a ternary cell is compared with.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Twin {
    /// None.
    #[default]
    None,
    /// One with the same settings.
    Own,
    /// The cell of this name.
    Named(String),
}

/// Where a value stands in the file.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Spec {
    /// Reads a file.
    ///
    /// # Errors
    /// No TOML, unknown keys, values of another type, cells that cannot be told apart.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        let table: Table = toml::from_str(&text).map_err(|source| SettingsError::Syntax {
            path: path.to_path_buf(),
            source: Box::new(source),
        })?;
        let source = Source { path, text: &text };
        let place = |key: &str| place_in(path, &text, key, None);
        check_keys(&table, &KEYS, "a sweep", place)?;
        let seeds = match table.get("seeds") {
            Some(seeds) => read_seeds(seeds, &place("seeds"))?,
            None => Vec::new(),
        };
        let set = match table.get("set") {
            Some(set) => source.assignments("set", set)?,
            None => Vec::new(),
        };
        let mut cells = match table.get("grid") {
            Some(grid) => source.grid(grid)?,
            None => Vec::new(),
        };
        if let Some(list) = table.get("cell") {
            cells.extend(source.cells(list)?);
        }
        let spec = Self {
            recipe: source.path_of(&table, "recipe")?,
            output: source.path_of(&table, "output")?,
            seeds,
            base: table
                .get("base")
                .map(|v| text_of(v, "base", &place("base")))
                .transpose()?,
            twin: read_twin(table.get("dense_twin"), &place("dense_twin"))?.unwrap_or_default(),
            set,
            cells,
        };
        spec.check(path)?;
        Ok(spec)
    }

    /// Keeps the cells that `names` lists with their dense twins, the base, and the teachers of
    /// all these; every cell for an empty list.
    ///
    /// # Errors
    /// A name that no cell has.
    pub fn select(&mut self, names: &[String]) -> Result<(), SettingsError> {
        if names.is_empty() {
            return Ok(());
        }
        let known: Vec<String> = self.cells.iter().map(|cell| cell.name.clone()).collect();
        if let Some(name) = names.iter().find(|name| !known.contains(name)) {
            return Err(impossible(
                format!("there is no cell {name}"),
                &format!("the cells are {}", known.join(", ")),
            ));
        }
        let base = self.base.get_or_insert_with(|| known[0].clone()).clone();
        let mut wanted: Vec<String> = names.iter().cloned().chain([base]).collect();
        let chosen = self.cells.iter().filter(|c| names.contains(&c.name));
        let twins = chosen.filter_map(|cell| match cell.twin.as_ref().unwrap_or(&self.twin) {
            Twin::Named(name) => Some(name.clone()),
            Twin::None | Twin::Own => None,
        });
        let twins: Vec<String> = twins.collect();
        wanted.extend(twins);
        // Teachers stand before those whom they teach.
        for cell in self.cells.iter().rev() {
            if wanted.contains(&cell.name) {
                wanted.extend(cell.teacher.clone());
            }
        }
        self.cells.retain(|cell| wanted.contains(&cell.name));
        for cell in &mut self.cells {
            if !names.contains(&cell.name) {
                cell.twin = Some(Twin::None);
            }
        }
        Ok(())
    }

    fn check(&self, path: &Path) -> Result<(), SettingsError> {
        let file = path.display();
        if self.cells.is_empty() {
            return Err(impossible(
                format!("{file} has no cells"),
                "add a [grid] with lists of values, or [[cell]] entries",
            ));
        }
        let names: Vec<&str> = self.cells.iter().map(|cell| cell.name.as_str()).collect();
        for (i, name) in names.iter().enumerate() {
            if names[..i].contains(name) {
                return Err(impossible(
                    format!("{file} has two cells called {name}"),
                    "give each cell its own name",
                ));
            }
        }
        let twins = self.cells.iter().filter_map(|cell| cell.twin.as_ref());
        let twins = twins.chain([&self.twin]).filter_map(|twin| match twin {
            Twin::Named(name) => Some(("dense_twin", name)),
            Twin::None | Twin::Own => None,
        });
        let base = self.base.iter().map(|name| ("base", name));
        for (key, name) in twins.chain(base) {
            if !names.contains(&name.as_str()) {
                return Err(impossible(
                    format!("{file}: {key} names {name}, which is no cell"),
                    &format!("the cells are {}", names.join(", ")),
                ));
            }
        }
        for (i, cell) in self.cells.iter().enumerate() {
            let Some(teacher) = cell.teacher.as_deref().filter(|t| !names[..i].contains(t)) else {
                continue;
            };
            return Err(impossible(
                format!(
                    "{file}: the teacher of {} is {teacher}, no cell before it",
                    cell.name
                ),
                "name a cell that stands further up",
            ));
        }
        Ok(())
    }
}

impl Source<'_> {
    /// The path under `key`, relative to the file.
    fn path_of(&self, table: &Table, key: &'static str) -> Result<PathBuf, SettingsError> {
        let place = place_in(self.path, self.text, key, None);
        match table.get(key) {
            Some(value) => Ok(self.folder().join(text_of(value, key, &place)?)),
            None => Err(impossible(
                format!("{} has no {key}", self.path.display()),
                &format!("add {key} = \"PATH\", relative to that file"),
            )),
        }
    }

    fn folder(&self) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).to_path_buf()
    }

    fn assignment(&self, key: &str, value: &Value, place: String) -> Assignment {
        Assignment {
            key: key.to_owned(),
            value: value.clone(),
            base: self.folder(),
            place,
        }
    }

    /// The settings of the table `section`: `"train.lr" = 1e-3`, or `train.lr = 1e-3`.
    fn assignments(&self, section: &str, value: &Value) -> Result<Vec<Assignment>, SettingsError> {
        let place = |key: &str| place_in(self.path, self.text, section, Some(key));
        let mut found = Vec::new();
        for (key, value) in flat(value, section, &place(""))? {
            let place = place(&key);
            refuse_own(&key, &place)?;
            found.push(self.assignment(&key, &value, place));
        }
        Ok(found)
    }

    /// A cell for each combination of the values; the last key changes fastest.
    fn grid(&self, grid: &Value) -> Result<Vec<Cell>, SettingsError> {
        let place = |key: &str| place_in(self.path, self.text, "grid", Some(key));
        let axes = flat(grid, "grid", &place(""))?;
        let mut cells = vec![Cell {
            name: String::new(),
            set: Vec::new(),
            twin: None,
            teacher: None,
        }];
        for (key, values) in &axes {
            refuse_own(key, &place(key))?;
            let values = values.as_array().filter(|values| !values.is_empty());
            let values = values.ok_or_else(|| {
                let problem = format!("{}: {key} of a grid must be a list", place(key));
                impossible(problem, "write [a, b], or move the key to [set]")
            })?;
            let axis = axis_name(key, &axes);
            cells = cells
                .iter()
                .flat_map(|cell| {
                    values.iter().map(|value| {
                        let mut cell = cell.clone();
                        let part = format!("{axis}-{}", value_name(value));
                        let sep = if cell.name.is_empty() { "" } else { "_" };
                        cell.name = format!("{}{sep}{part}", cell.name);
                        cell.set.push(self.assignment(key, value, place(key)));
                        cell
                    })
                })
                .collect();
        }
        Ok(if axes.is_empty() { Vec::new() } else { cells })
    }

    fn cells(&self, list: &Value) -> Result<Vec<Cell>, SettingsError> {
        let place = place_in(self.path, self.text, "cell", None);
        let tables = list.as_array().filter(|l| l.iter().all(Value::is_table));
        let tables = tables.ok_or_else(|| {
            impossible(
                format!("{place}: cell must be a list of tables"),
                "write [[cell]] above each",
            )
        })?;
        let tables = tables.iter().filter_map(Value::as_table);
        let cells = tables.map(|table| {
            check_keys(table, &CELL_KEYS, "a cell", |_| place.clone())?;
            let Some(name) = table.get("name") else {
                let problem = format!("{place}: a cell has no name");
                return Err(impossible(
                    problem,
                    "add name = \"NAME\" below each [[cell]]",
                ));
            };
            let name = text_of(name, "name", &place)?;
            let place = format!("{}, cell {name}", self.path.display());
            if name.is_empty() || value_name(&Value::String(name.clone())) != name {
                return Err(impossible(
                    format!("{place}: the name is not the name of a directory"),
                    "use letters, digits, dots, dashes and underscores",
                ));
            }
            let mut set = Vec::new();
            if let Some(value) = table.get("set") {
                for (key, value) in flat(value, "set", &place)? {
                    refuse_own(&key, &place)?;
                    set.push(self.assignment(&key, &value, place.clone()));
                }
            }
            let twin = read_twin(table.get("dense_twin"), &place)?;
            let teacher = table.get("teacher");
            let teacher = teacher.map(|v| text_of(v, "teacher", &place)).transpose()?;
            Ok(Cell {
                name,
                set,
                twin,
                teacher,
            })
        });
        cells.collect()
    }
}

/// Keys and values of a table of settings, whose keys may be quoted paths or tables.
fn flat(value: &Value, what: &str, place: &str) -> Result<Vec<(String, Value)>, SettingsError> {
    let table = value.as_table().ok_or_else(|| {
        impossible(
            format!("{place}: {what} must be a table"),
            "write keys of recipes in it, as \"train.lr\" = 1e-3",
        )
    })?;
    let mut found = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                let inner = inner.iter();
                found.extend(inner.map(|(name, value)| (format!("{key}.{name}"), value.clone())));
            }
            value => found.push((key.clone(), value.clone())),
        }
    }
    Ok(found)
}

fn check_keys(
    table: &Table,
    known: &'static [&'static str],
    owner: &str,
    place: impl Fn(&str) -> String,
) -> Result<(), SettingsError> {
    let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else {
        return Ok(());
    };
    let remedy = match schema::find(key) {
        Some(_) => format!("settings go below [set], as \"{key}\" = VALUE"),
        None => format!("did you mean {}?", nearest(key, known.iter().copied())),
    };
    Err(SettingsError::Unknown {
        place: place(key),
        problem: format!("{owner} has no key {key}"),
        remedy,
    })
}

fn refuse_own(key: &str, place: &str) -> Result<(), SettingsError> {
    if !OWN_KEYS.contains(&key) {
        return Ok(());
    }
    Err(impossible(
        format!("{place}: a sweep sets {key} itself"),
        "leave it out; seeds, output and the names of cells decide it",
    ))
}

fn read_seeds(value: &Value, place: &str) -> Result<Vec<u64>, SettingsError> {
    let seeds = value.as_array().map(|seeds| {
        let seeds = seeds.iter().map(|seed| seed.as_integer()?.try_into().ok());
        seeds.collect::<Option<Vec<u64>>>()
    });
    let seeds = seeds.flatten().filter(|seeds| !seeds.is_empty());
    let distinct = seeds.filter(|s| (1..s.len()).all(|i| !s[..i].contains(&s[i])));
    distinct.ok_or_else(|| SettingsError::Type {
        place: place.to_owned(),
        key: "seeds",
        expected: "a list of different whole numbers".to_owned(),
        found: value.to_string(),
    })
}

fn read_twin(value: Option<&Value>, place: &str) -> Result<Option<Twin>, SettingsError> {
    match value {
        None => Ok(None),
        Some(Value::Boolean(true)) => Ok(Some(Twin::Own)),
        Some(Value::Boolean(false)) => Ok(Some(Twin::None)),
        Some(Value::String(name)) => Ok(Some(Twin::Named(name.clone()))),
        Some(other) => Err(SettingsError::Type {
            place: place.to_owned(),
            key: "dense_twin",
            expected: "true, false or the name of a cell".to_owned(),
            found: other.to_string(),
        }),
    }
}

fn text_of(value: &Value, key: &'static str, place: &str) -> Result<String, SettingsError> {
    let text = value.as_str().map(str::to_owned);
    text.ok_or_else(|| SettingsError::Type {
        place: place.to_owned(),
        key,
        expected: "a string".to_owned(),
        found: format!("{value} ({})", value.type_str()),
    })
}

/// The key's own name, with its section where another axis has the same name.
fn axis_name(key: &str, axes: &[(String, Value)]) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let name = last(key);
    let same = axes.iter().filter(|(other, _)| last(other) == name).count();
    if same > 1 { key.to_owned() } else { name }
}

/// A value as a part of a directory's name.
fn value_name(value: &Value) -> String {
    let text = value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned);
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let text: String = text
        .chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .collect();
    text.trim_matches(['-', '.']).to_owned()
}

fn impossible(problem: String, remedy: &str) -> SettingsError {
    SettingsError::Impossible {
        problem,
        remedy: remedy.to_owned(),
    }
}
