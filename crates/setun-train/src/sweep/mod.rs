//! Many runs that differ in a few settings, one after the other, and what they came to.
//!
//! The runs of one seed share initial weights (drawn by name and shape of a parameter) and
//! the order of the data: both follow from `run.seed`. So differences are taken between
//! runs of the same seed, and their spread over the seeds is that of the difference.

mod spec;
mod table;

pub use spec::{Cell, Spec, Twin};
pub use table::{CellRow, Difference, Row, SweepTable};

use crate::TrainError;
use crate::models::{open_init, open_teacher};
use crate::results::{RunResults, is_finished};
use crate::run::{Observer, RunEnd, RunOptions, dry_run, train};
use crate::settings::{
    Assignment, DistillSettings, Override, SETTINGS_FILE, Settings, SettingsError,
};
use setun_io::{IoError, RunLock, write_atomic};
use setun_ternary::Numerics;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use toml::Value;

/// Keys that mean nothing to a dense model.
const TERNARY_ONLY: [&str; 8] = [
    "model.ternary",
    "model.ternary_embedding",
    "model.group_size",
    "model.scale_rule",
    "model.scale_rounding",
    "model.learned_scales",
    "train.ste",
    "train.blend_steps",
];
/// Keys that may differ between a run that exists and the cell that it belongs to.
const FREE_KEYS: [&str; 2] = ["run.output", "run.threads"];

/// A sweep whose settings have all been checked.
pub struct Sweep {
    /// Directory of the sweep.
    pub output: PathBuf,
    /// The seeds of every cell.
    pub seeds: Vec<u64>,
    /// Index of the cell that the others are paired with.
    pub base: usize,
    /// The cells of the file, then the dense runs beside them.
    pub cells: Vec<PlannedCell>,
}

/// A cell with its runs.
pub struct PlannedCell {
    /// Name.
    pub name: String,
    /// Keys and values that this cell sets.
    pub set: Vec<(String, String)>,
    /// Whether its model is ternary.
    pub ternary: bool,
    /// [`Settings::experiment`]
    pub experiment: Option<&'static str>,
    /// Index of the dense cell that it is compared with.
    pub twin: Option<usize>,
    /// One for each seed.
    pub runs: Vec<PlannedRun>,
}

/// One training of a sweep.
pub struct PlannedRun {
    /// Its seed.
    pub seed: u64,
    /// The run directory.
    pub directory: PathBuf,
    /// Its settings.
    pub settings: Settings,
    /// How far it is.
    pub state: RunState,
    /// Whether its teacher is a run of another cell.
    taught_by_cell: bool,
}

/// How far a run of a sweep is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// There is nothing yet.
    New,
    /// It was begun; it goes on from its newest checkpoint.
    Interrupted,
    /// Its report is there.
    Finished,
}

impl RunState {
    /// A word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Interrupted => "interrupted",
            Self::Finished => "finished",
        }
    }
}

/// What a user says about a sweep besides its file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SweepOptions {
    /// Directory instead of the file's.
    pub output: Option<PathBuf>,
    /// Seeds instead of the file's; empty for those.
    pub seeds: Vec<u64>,
    /// Names of the cells to run, besides the base, dense twins and teachers; empty for all.
    pub cells: Vec<String>,
    /// Settings of all runs, over file and recipe.
    pub overrides: Vec<Override>,
}

/// How a sweep ended.
pub struct SweepEnd {
    /// What has been measured so far.
    pub table: SweepTable,
    /// Whether the user stopped it.
    pub stopped: bool,
}

/// What a sweep would do.
pub struct SweepPlan {
    /// Parameters and training tokens of each cell's runs.
    pub sizes: Vec<(usize, u64)>,
    /// Training tokens of the runs that are not finished.
    pub tokens_left: u64,
}

impl Sweep {
    /// Reads a sweep and checks the settings of every run.
    ///
    /// # Errors
    /// A file that is no sweep, settings that cannot be run, a directory that holds a run
    /// with other settings.
    pub fn load(path: &Path, options: &SweepOptions) -> Result<Self, TrainError> {
        let mut spec = Spec::read(path)?;
        spec.select(&options.cells)?;
        check_overrides(&spec, &options.overrides)?;
        check_seeds(&options.seeds)?;
        let output = options.output.as_ref().unwrap_or(&spec.output);
        let output =
            std::path::absolute(output).map_err(|e| IoError::file("resolve", output, e))?;
        let mut planner = Planner {
            spec: &spec,
            overrides: &options.overrides,
            output: &output,
            seeds: match options.seeds.is_empty() {
                true => spec.seeds.clone(),
                false => options.seeds.clone(),
            },
        };
        if planner.seeds.is_empty() {
            let first = planner.settings(&spec.cells[0].name, &spec.cells[0].set, None)?;
            planner.seeds = vec![first.run.seed];
        }
        let cells = planner.cells()?;
        let base = spec.base.as_ref().and_then(|name| index_of(&cells, name));
        Ok(Self {
            seeds: planner.seeds,
            base: base.unwrap_or(0),
            cells,
            output,
        })
    }

    /// What is to be done, without doing it.
    ///
    /// # Errors
    /// A tokenizer or a model that cannot be opened.
    pub fn plan(&self) -> Result<SweepPlan, TrainError> {
        let (mut sizes, mut tokens_left) = (Vec::new(), 0);
        for cell in &self.cells {
            let mut settings = cell.runs[0].settings.clone();
            if cell.runs[0].taught_by_cell && teacher_is_missing(&settings) {
                // Its model does not change the sizes of this one.
                settings.distill = DistillSettings::default();
            }
            let layout = dry_run(settings.clone())?;
            let parameters = layout.model.parameters.list.iter().map(|p| p.numel());
            let train = &settings.train;
            let tokens = train.steps * (train.batch_size * train.seq_len) as u64;
            sizes.push((parameters.sum(), tokens));
            let open = |run: &&PlannedRun| run.state != RunState::Finished;
            tokens_left += tokens * cell.runs.iter().filter(open).count() as u64;
        }
        Ok(SweepPlan { sizes, tokens_left })
    }

    /// Writes the table of the runs that are finished, and makes none.
    ///
    /// # Errors
    /// Files that cannot be read or written.
    pub fn summarize(&self) -> Result<SweepTable, TrainError> {
        std::fs::create_dir_all(&self.output)
            .map_err(|e| IoError::file("create", &self.output, e))?;
        self.write_table(&[])
    }

    /// Makes or finishes every run, the first seed of all cells before the second; after
    /// each of them the table is written. A run that fails is noted, and the next one
    /// begins.
    ///
    /// # Errors
    /// Files that cannot be written, settings or data that no run can use.
    pub fn run(
        &mut self,
        options: &RunOptions<'_>,
        observer: &mut dyn Observer,
    ) -> Result<SweepEnd, TrainError> {
        std::fs::create_dir_all(&self.output)
            .map_err(|e| IoError::file("create", &self.output, e))?;
        let _lock = RunLock::acquire(&self.output)?;
        let num_runs = self.seeds.len() * self.cells.len();
        let mut failures = Vec::new();
        let mut stopped = false;
        'all: for seed in 0..self.seeds.len() {
            for cell in 0..self.cells.len() {
                if options.stop.load(Ordering::Relaxed) {
                    stopped = true;
                    break 'all;
                }
                let number = seed * self.cells.len() + cell + 1;
                let name = self.cells[cell].name.clone();
                let run = &mut self.cells[cell].runs[seed];
                if run.state == RunState::Finished {
                    continue;
                }
                observer.message(&format!(
                    "== {name}, seed {} (run {number} of {num_runs})",
                    run.seed
                ));
                if run.taught_by_cell && teacher_is_missing(&run.settings) {
                    let failure = format!("{name}, seed {}: its teacher has no end", run.seed);
                    observer.message(&failure);
                    failures.push(failure);
                    continue;
                }
                match run.train(options, observer) {
                    Ok(RunEnd::Finished(_)) => {}
                    Ok(RunEnd::Stopped { .. }) => stopped = true,
                    Err(error @ (TrainError::Refused(_) | TrainError::Project(_))) => {
                        let failure = format!("{name}, seed {}: {error}", run.seed);
                        observer.message(&failure);
                        failures.push(failure);
                    }
                    Err(error) => return Err(error),
                }
                if stopped {
                    break 'all;
                }
                self.write_table(&failures)?;
            }
        }
        let table = self.write_table(&failures)?;
        Ok(SweepEnd { table, stopped })
    }

    /// Reads the finished runs and writes `sweep.md` and `sweep.json`. A run whose model files
    /// do not hold what they should is a failure, too.
    fn write_table(&self, failures: &[String]) -> Result<SweepTable, TrainError> {
        let mut failures = failures.to_vec();
        let mut results: Vec<Vec<Option<RunResults>>> = Vec::new();
        for cell in &self.cells {
            let runs = cell.runs.iter().map(|run| {
                let finished = run.state == RunState::Finished;
                finished
                    .then(|| RunResults::read(&run.directory))
                    .transpose()
            });
            results.push(runs.collect::<Result<Vec<_>, _>>()?);
            let done = results.last().into_iter().flatten().flatten();
            failures.extend(done.filter(|run| run.verified == Some(false)).map(|run| {
                let run = run.path.display();
                format!("{run}: a model file is not what it should be; see setun verify {run}")
            }));
        }
        let table = SweepTable::new(self, &results, &failures);
        write_atomic(
            &self.output.join("sweep.md"),
            table.to_markdown().as_bytes(),
        )?;
        write_atomic(&self.output.join("sweep.json"), table.to_json().as_bytes())?;
        Ok(table)
    }
}

impl PlannedRun {
    fn train(
        &mut self,
        options: &RunOptions<'_>,
        observer: &mut dyn Observer,
    ) -> Result<RunEnd, TrainError> {
        let resume = self.state == RunState::Interrupted;
        let mut settings = self.settings.clone();
        if resume {
            settings = Settings::load_run(&self.directory, &[])?;
            settings.run.threads = self.settings.run.threads;
            if self.taught_by_cell {
                let here = self.settings.distill.teacher.clone();
                settings.distill.teacher = here;
            }
        }
        let options = RunOptions {
            resume: resume.then_some(self.directory.as_path()),
            profile: options.profile,
            files: options.files.clone(),
            ..RunOptions::new(options.isa, options.stop)
        };
        self.state = RunState::Interrupted;
        let end = train(settings, &options, observer)?;
        if matches!(end, RunEnd::Finished(_)) {
            self.state = RunState::Finished;
        }
        Ok(end)
    }
}

/// Makes runs of a sweep's cells.
struct Planner<'a> {
    spec: &'a Spec,
    overrides: &'a [Override],
    output: &'a Path,
    seeds: Vec<u64>,
}

impl Planner<'_> {
    fn cells(&self) -> Result<Vec<PlannedCell>, TrainError> {
        let mut cells = Vec::new();
        for cell in &self.spec.cells {
            cells.push(self.cell(&cell.name, &cell.set, cell.teacher.as_deref())?);
        }
        for (index, cell) in self.spec.cells.iter().enumerate() {
            if !cells[index].ternary {
                continue;
            }
            cells[index].twin = match cell.twin.as_ref().unwrap_or(&self.spec.twin) {
                Twin::None => None,
                Twin::Named(name) => Some(self.named_twin(&cells, name)?),
                Twin::Own => {
                    let twin = self.own_twin(cell, &cells[index])?;
                    let same = cells.iter().position(|other| same_runs(other, &twin));
                    if same.is_none() {
                        check_new_name(&cells, &twin.name)?;
                        cells.push(twin);
                    }
                    Some(same.unwrap_or(cells.len() - 1))
                }
            };
        }
        Ok(cells)
    }

    fn named_twin(&self, cells: &[PlannedCell], name: &str) -> Result<usize, TrainError> {
        let twin = index_of(cells, name).filter(|&twin| !cells[twin].ternary);
        twin.ok_or_else(|| {
            let problem = format!("dense_twin names {name}, whose model is ternary");
            let remedy = "set \"model.ternary\" = false in that cell".to_owned();
            SettingsError::Impossible { problem, remedy }.into()
        })
    }

    /// The cell with the same settings and a dense model.
    fn own_twin(&self, cell: &Cell, planned: &PlannedCell) -> Result<PlannedCell, TrainError> {
        let settings = &planned.runs[0].settings;
        let mut set = cell.set.clone();
        set.retain(|a| !TERNARY_ONLY.contains(&a.key.as_str()));
        let mut add = |key: &str, value: Value| {
            set.push(Assignment {
                key: key.to_owned(),
                value,
                base: PathBuf::new(),
                place: format!("the dense twin of {}", cell.name),
            });
        };
        add("model.ternary", Value::Boolean(false));
        add("model.learned_scales", Value::Boolean(false));
        add("train.blend_steps", Value::Integer(0));
        add("train.ste", Value::String("identity".to_owned()));
        if settings.numerics() == Numerics::Int8 {
            add("model.numerics", Value::String("auto".to_owned()));
        }
        let formats = settings.export.formats.iter();
        let floats = formats.filter(|format| format.holds_floats());
        let floats = floats.map(|format| Value::String(format.name().to_owned()));
        add("export.formats", Value::Array(floats.collect()));
        let mut overrides = self.overrides.to_vec();
        overrides.retain(|o| set.iter().all(|a| !same_key(&a.key, &o.key)));
        let planner = Planner {
            overrides: &overrides,
            seeds: self.seeds.clone(),
            ..*self
        };
        let teacher = cell.teacher.as_deref();
        planner.cell(&format!("{}-dense", cell.name), &set, teacher)
    }

    fn cell(
        &self,
        name: &str,
        set: &[Assignment],
        teacher: Option<&str>,
    ) -> Result<PlannedCell, TrainError> {
        let mut runs = Vec::new();
        for &seed in &self.seeds {
            let mut settings = self.settings(name, set, Some((seed, teacher)))?;
            check_split(&settings, self.seeds.len())?;
            open_init(&mut settings)?;
            let taught_by_cell = teacher.is_some();
            if !(taught_by_cell && teacher_is_missing(&settings)) {
                open_teacher(&mut settings)?;
            }
            let directory = settings.output().to_path_buf();
            runs.push(PlannedRun {
                state: state_of(&directory, &settings, taught_by_cell)?,
                seed,
                directory,
                settings,
                taught_by_cell,
            });
        }
        let value = |a: &Assignment| (a.key.clone(), a.value.to_string());
        Ok(PlannedCell {
            name: name.to_owned(),
            set: set.iter().map(value).collect(),
            ternary: runs[0].settings.model.ternary,
            experiment: runs[0].settings.experiment(),
            twin: None,
            runs,
        })
    }

    fn settings(
        &self,
        name: &str,
        set: &[Assignment],
        run: Option<(u64, Option<&str>)>,
    ) -> Result<Settings, TrainError> {
        let assignments: Vec<_> = self.spec.set.iter().chain(set).cloned().collect();
        let mut overrides = self.overrides.to_vec();
        let mut add = |key: &str, value: String| {
            let key = key.to_owned();
            overrides.push(Override { key, value });
        };
        if let Some((seed, teacher)) = run {
            let run_of = |name: &str| {
                let run = self.output.join(name).join(format!("seed-{seed}"));
                run.to_string_lossy().into_owned()
            };
            add("run.name", format!("{name}-seed-{seed}"));
            add("run.output", run_of(name));
            add("run.seed", seed.to_string());
            if let Some(teacher) = teacher {
                add("distill.teacher", run_of(teacher));
            }
        }
        let recipe = Some(self.spec.recipe.as_path());
        Ok(Settings::load_with(recipe, &assignments, &overrides)?)
    }
}

fn index_of(cells: &[PlannedCell], name: &str) -> Option<usize> {
    cells.iter().position(|cell| cell.name == name)
}

/// Whether two cells train the same thing under different names.
fn same_runs(a: &PlannedCell, b: &PlannedCell) -> bool {
    let values = |cell: &PlannedCell| {
        let mut values = cell.runs[0].settings.values();
        values.retain(|(key, _)| !key.starts_with("run."));
        if !cell.ternary {
            values.retain(|(key, _)| !TERNARY_ONLY.contains(key));
        }
        values
    };
    a.ternary == b.ternary && values(a) == values(b)
}

fn check_new_name(cells: &[PlannedCell], name: &str) -> Result<(), SettingsError> {
    match index_of(cells, name) {
        None => Ok(()),
        Some(_) => Err(SettingsError::Impossible {
            problem: format!("{name} is a cell, and the name of another cell's dense twin"),
            remedy: "give it another name, or name it in dense_twin if it is that twin".to_owned(),
        }),
    }
}

/// Whether two names of a setting mean the same one: flags may have dashes.
fn same_key(a: &str, b: &str) -> bool {
    a.replace('-', "_") == b.replace('-', "_")
}

fn check_seeds(seeds: &[u64]) -> Result<(), SettingsError> {
    let repeated = (1..seeds.len()).find(|&i| seeds[..i].contains(&seeds[i]));
    match repeated {
        None => Ok(()),
        Some(i) => Err(SettingsError::Impossible {
            problem: format!("--seeds has {} twice", seeds[i]),
            remedy: "a seed is one run of each cell; leave out the second one".to_owned(),
        }),
    }
}

fn check_overrides(spec: &Spec, overrides: &[Override]) -> Result<(), SettingsError> {
    for Override { key, .. } in overrides {
        let key = key.replace('-', "_");
        let mut varied = spec.cells.iter().flat_map(|cell| &cell.set);
        let taught = || spec.cells.iter().any(|cell| cell.teacher.is_some());
        let problem =
            if varied.any(|a| same_key(&a.key, &key)) || key == "distill.teacher" && taught() {
                format!("--{key} would take away what the cells differ in")
            } else if key == "run.name" || key == "run.output" || key == "run.seed" {
                format!("--{key} belongs to a single run")
            } else {
                continue;
            };
        let remedy = "leave it out; --output names the directory of the sweep".to_owned();
        return Err(SettingsError::Impossible { problem, remedy });
    }
    Ok(())
}

/// Seeds can only be paired if they are judged on the same text.
fn check_split(settings: &Settings, num_seeds: usize) -> Result<(), SettingsError> {
    if num_seeds == 1 || !settings.data.valid.is_empty() {
        return Ok(());
    }
    Err(SettingsError::Impossible {
        problem: "data.valid is empty, so that every seed would hold out other documents".into(),
        remedy: "name held-out files in data.valid, or use one seed".to_owned(),
    })
}

/// Whether the teacher, a run of the sweep, is still to be made.
fn teacher_is_missing(settings: &Settings) -> bool {
    !settings.distill.teacher.as_deref().is_some_and(is_finished)
}

/// How far the run in `directory` is, which must have these settings; a teacher that is a run
/// of the sweep may have moved with it.
fn state_of(
    directory: &Path,
    settings: &Settings,
    taught_by_cell: bool,
) -> Result<RunState, TrainError> {
    if !directory.join(SETTINGS_FILE).exists() {
        return Ok(RunState::New);
    }
    let found = Settings::load_run(directory, &[])?.values();
    let pairs = found.into_iter().zip(settings.values());
    let moved = |key: &str| taught_by_cell && key == "distill.teacher";
    let mut pairs = pairs.filter(|((key, _), _)| !FREE_KEYS.contains(key) && !moved(key));
    if let Some(((key, found), (_, wanted))) = pairs.find(|(found, wanted)| found != wanted) {
        return Err(TrainError::refused(format!(
            "{} holds a run with {key} = {found}, but in this sweep the cell has {wanted}; \
             give the cell another name, or move that directory away",
            directory.display()
        )));
    }
    Ok(match is_finished(directory) {
        true => RunState::Finished,
        false => RunState::Interrupted,
    })
}

#[cfg(test)]
mod tests;
