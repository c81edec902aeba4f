//! A run from settings to report: the story of `setun train`.

use crate::TrainError;
use crate::checkpoint::{self, DataIdentity, SmallFiles, TrainState, small_files};
use crate::evaluate::{Evaluation, Evaluator};
use crate::finish::{self, Finished};
use crate::machine::{self, RunClock};
use crate::metrics::{self, MetricsWriter};
use crate::models::{
    check_exports, check_names, check_teacher, final_config, open_init, open_teacher, teacher_spec,
};
use crate::prepare::{self, Prepared};
use crate::profile::{PROFILE_FILE, Profiled};
use crate::report::record::{
    EarlyStop, EvalRecord, MemoryFacts, MemoryRow, Metric, ModelFacts, RunRecord, StepRecord,
    TernaryRecord,
};
use crate::settings::{SETTINGS_FILE, Settings};
use crate::trainer::{Layout, StepOutcome, Trainer};
use setun_backend::memory::{release_freed, return_large_blocks};
use setun_backend::{Host, Isa};
use setun_formats::{Qwen3Config, TernaryInfo, Tokenizer};
use setun_infer::load_parameters;
use setun_io::{
    FileOps, IoError, OpenModel, RealOps, RunLock, Which, checkpoints, newest_valid_checkpoint,
    write_atomic_with,
};
use setun_model::{Parameters, is_embedding};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

mod recovery;
mod saving;
mod start;

use saving::PendingSave;

/// Where progress goes: a terminal, a log, nowhere.
pub trait Observer {
    /// A line for the user.
    fn message(&mut self, text: &str);
    /// `done` of `total` units of `stage`; `detail` changes from call to call.
    fn progress(&mut self, stage: &str, done: u64, total: u64, detail: &str);
}

/// What is not in the settings.
pub struct RunOptions<'a> {
    /// Instruction set; results do not depend on it.
    pub isa: Isa,
    /// Run to go on with.
    pub resume: Option<&'a Path>,
    /// Set when the user asks to stop: the step is finished, the state is saved.
    pub stop: &'a AtomicBool,
    /// Whether to measure the time of each operation of a step.
    pub profile: bool,
    /// Operations under checkpoints and records: [`RealOps`], but for tests.
    pub files: Arc<dyn FileOps>,
}

impl<'a> RunOptions<'a> {
    /// A new run on the files of this machine.
    pub fn new(isa: Isa, stop: &'a AtomicBool) -> Self {
        Self {
            isa,
            resume: None,
            stop,
            profile: false,
            files: Arc::new(RealOps),
        }
    }
}

/// How a run ended.
pub enum RunEnd {
    /// All steps are done, or it stopped early on purpose; everything is written.
    Finished(Box<Finished>),
    /// Stopped by the user; resume with this directory.
    Stopped {
        /// The run directory.
        run: PathBuf,
        /// Finished steps.
        step: u64,
    },
}

/// Trains, evaluates, verifies, generates, exports and reports.
///
/// # Errors
/// Anything that keeps the run from going on; what was committed stays valid.
pub fn train(
    mut settings: Settings,
    options: &RunOptions<'_>,
    observer: &mut dyn Observer,
) -> Result<RunEnd, TrainError> {
    let start = Instant::now();
    machine::reset_peak();
    return_large_blocks();
    let run = run_directory(&settings, options.resume.is_some())?;
    settings.run.output = Some(run.clone());
    let lock = options.resume.map(|_| RunLock::acquire(&run)).transpose()?;
    // Stopped before its first checkpoint, a run begins anew.
    let resumed = options.resume.is_some() && !checkpoints(&run)?.is_empty();
    if resumed {
        start::check_unchanged(&run, &settings)?;
    }
    if options.resume.is_some() && !resumed {
        observer.message("there is no checkpoint yet: the run begins anew");
    }
    // A resumed run goes on from its own files; the model that it began with may be gone.
    let init = match resumed {
        true => Some(OpenModel::open_with(&run, Which::Newest)?),
        false => open_init(&mut settings)?,
    };
    let teacher = open_teacher(&mut settings)?;
    let prepared = prepare::prepare(&settings, init.as_ref(), &run, observer)?;
    let config = final_config(&settings, init.as_ref(), &prepared.tokenizer)?;
    if let Some(teacher) = &teacher {
        check_teacher(teacher, &prepared.tokenizer)?;
    }
    check_names(&settings, &config)?;
    check_exports(&settings, &config)?;
    let layout = layout_of(&settings, &config, teacher.as_ref())?;
    machine::check_memory(layout.plan.total_bytes() as u64, machine::free_bytes())?;
    std::fs::create_dir_all(&run).map_err(|e| IoError::file("create", &run, e))?;
    let lock = match lock {
        Some(lock) => lock,
        None => RunLock::acquire(&run)?,
    };
    lock.remove_leftovers_with(options.files.as_ref())?;
    observer.message(&describe_data(&prepared));
    let baselines = prepare::baselines(&prepared)?;
    release_freed();
    let begin = Beginning {
        small_files: small_files(&config, &prepared.tokenizer, init.as_ref())?,
        settings,
        config,
        prepared,
        layout,
        run,
        teacher,
        resumed,
        start,
    };
    let mut session = Session::start(begin, options, observer)?;
    session.record.baselines = baselines;
    if !resumed {
        session.initialize(init.as_ref(), observer)?;
    }
    let stopped = session.train(options.stop, observer);
    // However it ended, nobody may write behind the lock.
    session.join_saver();
    session.write_profile(observer)?;
    if stopped? {
        return Ok(RunEnd::Stopped {
            step: session.trainer.step,
            run: session.run,
        });
    }
    session
        .finish(observer)
        .map(|finished| RunEnd::Finished(Box::new(finished)))
}

/// The memory that `settings` need, without reading data: `--dry-run`.
///
/// # Errors
/// A tokenizer or a model that cannot be opened.
pub fn dry_run(mut settings: Settings) -> Result<Layout, TrainError> {
    let init = open_init(&mut settings)?;
    let teacher = open_teacher(&mut settings)?;
    let vocab_size = match (&init, &settings.tokenizer.path) {
        (Some(model), _) => model.config().vocab_size,
        (None, Some(path)) => {
            let bytes = std::fs::read(path).map_err(|e| IoError::file("read", path, e))?;
            Tokenizer::from_bytes(&bytes)?.vocab_size()
        }
        (None, None) => settings.tokenizer.vocab_size,
    };
    let config = match &init {
        Some(model) => model.config().clone(),
        None => prepare::model_config(&settings, vocab_size, None)?,
    };
    check_names(&settings, &config)?;
    check_exports(&settings, &config)?;
    layout_of(&settings, &config, teacher.as_ref())
}

fn layout_of(
    settings: &Settings,
    config: &Qwen3Config,
    teacher: Option<&OpenModel>,
) -> Result<Layout, TrainError> {
    let spec = teacher.map(|t| teacher_spec(t, config)).transpose()?;
    let threads = machine::threads(settings.run.threads);
    Ok(Layout::new(settings, config, spec, threads))
}

/// The directory of the run: one that is named must be new; the default one gets a number.
fn run_directory(settings: &Settings, resume: bool) -> Result<PathBuf, TrainError> {
    let wanted = settings.output().to_path_buf();
    if resume || !wanted.join(SETTINGS_FILE).exists() {
        return Ok(wanted);
    }
    if settings.is_given("run.output") {
        return Err(TrainError::refused(format!(
            "{} holds a run already; go on with it (--resume {0}), or name another \
             directory with --run.output",
            wanted.display()
        )));
    }
    let name = wanted
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let free = (2..).map(|i| wanted.with_file_name(format!("{name}-{i}")));
    Ok(free
        .into_iter()
        .find(|path| !path.join(SETTINGS_FILE).exists())
        .unwrap_or(wanted))
}

fn describe_data(prepared: &Prepared) -> String {
    let f = &prepared.facts;
    let shared = match f.checked_duplicates() {
        None => "text on both sides was not looked for: the data are token files".to_owned(),
        Some(found) => {
            let left_out = match found.exact_left_out() + found.near_left_out() {
                0 => String::new(),
                count => format!(", {count} training documents that did were left out"),
            };
            let left = found.across_split;
            format!("{left} held-out documents share text with training{left_out}")
        }
    };
    format!(
        "data: {} training documents ({} tokens), {} held out ({} tokens, {} bytes), \
         vocabulary {}; {shared}",
        f.train_documents,
        f.train_tokens,
        f.valid_documents,
        f.valid_tokens,
        f.valid_bytes,
        f.vocab_size
    )
}

/// What a session starts from.
struct Beginning {
    settings: Settings,
    config: Qwen3Config,
    small_files: SmallFiles,
    prepared: Prepared,
    layout: Layout,
    run: PathBuf,
    teacher: Option<OpenModel>,
    resumed: bool,
    start: Instant,
}

/// A run in progress.
pub(crate) struct Session {
    pub settings: Settings,
    pub config: Qwen3Config,
    pub run: PathBuf,
    pub trainer: Trainer<Profiled<Host<f32>>>,
    pub tokenizer: Tokenizer,
    pub record: RunRecord,
    pub isa: Isa,
    pub threads: usize,
    small_files: SmallFiles,
    batches: crate::data::Batches,
    pub evaluator: Evaluator,
    metrics: MetricsWriter,
    clock: RunClock,
    state: TrainState,
    num_weights: u64,
    files: Arc<dyn FileOps>,
    failed_saves: u32,
    pending: Option<PendingSave>,
}

impl Session {
    fn start(
        begin: Beginning,
        options: &RunOptions<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let Beginning {
            settings,
            config,
            small_files,
            prepared,
            layout,
            run,
            teacher: open_teacher,
            resumed,
            start,
        } = begin;
        let threads = machine::threads(settings.run.threads);
        let mut record = new_record(&settings, &config, &prepared, options.isa, threads);
        record.memory = planned_memory(&layout, observer);
        let Layout {
            plan,
            workspace,
            model,
            optimizer,
            teacher,
        } = layout;
        let rows = model.max_rows();
        let host = Host::new(&plan, workspace, options.isa);
        let mut backend = Profiled::new(host, options.profile);
        if let (Some(open), Some(teacher)) = (&open_teacher, &teacher) {
            load_parameters(open, &teacher.parameters, &mut backend)?;
        }
        let parts = (model, optimizer, teacher);
        let mut trainer = Trainer::new(backend, parts, &settings, &prepared.batches);
        // Before anything is written, so that a refused resume changes nothing.
        let (state, earlier) = match resumed {
            true => restore(
                &run,
                &mut trainer,
                &prepared.identity,
                &mut record,
                observer,
            )?,
            false => (TrainState::new(prepared.identity), Vec::new()),
        };
        let tensorboard = settings.log.tensorboard.then(machine::now);
        let mut session = Self {
            num_weights: num_ternary_weights(&trainer.model.parameters),
            small_files,
            tokenizer: prepared.tokenizer,
            batches: prepared.batches,
            evaluator: Evaluator::new(prepared.windows, rows, settings.data.document_mask),
            metrics: MetricsWriter::create(&run, &earlier, tensorboard)?,
            clock: RunClock::new(record.seconds, start),
            settings,
            config,
            run,
            trainer,
            record,
            isa: options.isa,
            threads,
            state,
            files: Arc::clone(&options.files),
            failed_saves: 0,
            pending: None,
        };
        session.write_first_files()?;
        Ok(session)
    }

    /// Makes the directory a run, if there is room for its checkpoints.
    fn write_first_files(&mut self) -> Result<(), TrainError> {
        self.check_space()?;
        let path = self.run.join(SETTINGS_FILE);
        let toml = self.settings.to_toml();
        write_atomic_with(self.files.as_ref(), &path, toml.as_bytes())?;
        self.write_record()?;
        // The end of the earlier session may have come between a checkpoint and this file.
        self.write_best(self.state.best)
    }

    /// Steps, evaluations and checkpoints; true if the user stopped it.
    fn train(
        &mut self,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let steps = self.settings.train.steps;
        if self.trainer.step == 0 {
            let first = self.evaluate(observer)?;
            let message = format!("before training: held-out loss {:.4}", first.loss);
            observer.message(&message);
        }
        while self.trainer.step < steps {
            // Here, so that a run that has stopped early does not go on when it is resumed.
            if self.stops_early(observer)? {
                break;
            }
            let start = Instant::now();
            self.trainer.backend.begin_step();
            let outcome = self.trainer.step(&self.batches)?;
            self.trainer.backend.end_step();
            let step = self.trainer.step;
            self.poll_save(observer)?;
            self.record_step(&outcome, start.elapsed().as_secs_f64(), observer)?;
            if self.trainer.step != step {
                // It went back: evaluation and checkpoint of that step are there already.
                continue;
            }
            let last = step == steps;
            let stopping = stop.load(Ordering::Relaxed) && !last;
            let mut improved = false;
            let best = self.state.best;
            // A stop waits for an evaluation that is due: the resumed run starts behind it.
            if last || due(step, self.settings.eval.every) {
                improved = self.evaluate_and_judge(observer)?;
            }
            if last || stopping {
                self.save_now(observer)?;
            } else if improved || due(step, self.settings.checkpoint.every) {
                self.save(best, observer)?;
            }
            if stopping {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn record_step(
        &mut self,
        outcome: &StepOutcome,
        seconds: f64,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let (train, step) = (&self.settings.train, self.trainer.step);
        let tokens = (train.batch_size * train.seq_len) as f64;
        let all_tokens = self.batches.tokens().num_tokens() as f64;
        let record = StepRecord {
            step,
            loss: outcome.loss,
            divergence: outcome.divergence,
            lr: outcome.lr,
            grad_norm: outcome.grad_norm,
            clipped: outcome.clipped,
            tokens_per_second: tokens / seconds,
            epoch: outcome.epoch + tokens / all_tokens,
            skipped: outcome.skipped.map(|skip| skip.reason().to_owned()),
        };
        let detail = format!(
            "loss {:.4}  {:.0} tokens/s",
            record.loss, record.tokens_per_second
        );
        observer.progress("training", step, train.steps, &detail);
        let every = self.settings.log.every.max(1);
        if due(step, every) || step == 1 || step == train.steps || outcome.skipped.is_some() {
            self.metrics.write(&Metric::Step(record), machine::now());
        }
        if outcome.skipped.is_none() {
            self.state.losses_since_eval.0 += outcome.loss;
            self.state.losses_since_eval.1 += 1;
            self.state.flips_since_record.0 += outcome.projection.flips;
            self.state.flips_since_record.1 += 1;
            let interval = (train.steps / 50).max(1);
            if self.settings.model.ternary && (due(step, interval) || step == train.steps) {
                self.record_ternary(outcome.projection.zeros);
            }
        }
        self.report_event_files(observer);
        self.judge_trouble(outcome, observer)
    }

    /// Tells, once, that there are no event files any more.
    fn report_event_files(&mut self, observer: &mut dyn Observer) {
        let Some(message) = self.metrics.take_warning() else {
            return;
        };
        observer.message(&format!("warning: {message}"));
        // A rewind must not begin them again.
        self.settings.log.tensorboard = false;
        let step = self.trainer.step;
        let event = Metric::Event { step, message };
        self.metrics.write(&event, machine::now());
    }

    fn record_ternary(&mut self, zeros: u64) {
        let (flips, steps) = std::mem::take(&mut self.state.flips_since_record);
        let mut scales = Vec::new();
        for p in &self.trainer.model.parameters.list {
            if let Some(ternary) = p.ternary {
                let start = scales.len();
                scales.resize(start + ternary.scales.len(), 0.0f32);
                setun_backend::Backend::read(
                    &self.trainer.backend,
                    ternary.scales,
                    &mut scales[start..],
                );
            }
        }
        let middle = scales.len() / 2;
        let (_, median, _) = scales.select_nth_unstable_by(middle, f32::total_cmp);
        let record = TernaryRecord {
            step: self.trainer.step,
            zero_share: zeros as f64 / self.num_weights as f64,
            flip_rate: flips as f64 / (self.num_weights * steps.max(1)) as f64,
            scale_median: f64::from(*median),
        };
        self.metrics.write(&Metric::Ternary(record), machine::now());
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Evaluation, TrainError> {
        let evaluation = self.trainer.evaluate(&mut self.evaluator)?;
        let (sum, count) = std::mem::take(&mut self.state.losses_since_eval);
        let record = EvalRecord {
            step: self.trainer.step,
            loss: evaluation.loss,
            perplexity: evaluation.perplexity,
            bits_per_byte: evaluation.bits_per_byte,
            tokens: evaluation.tokens,
            train_loss: if count > 0 {
                sum / count as f64
            } else {
                f64::NAN
            },
        };
        if count > 0 {
            observer.message(&format!(
                "step {}: training loss {:.4}, held-out loss {:.4} (perplexity {:.2}, {:.4} bits \
                 per byte)",
                record.step,
                record.train_loss,
                record.loss,
                record.perplexity,
                record.bits_per_byte
            ));
        }
        self.metrics.write(&Metric::Eval(record), machine::now());
        self.report_event_files(observer);
        Ok(evaluation)
    }

    /// Evaluates; true if it is the best so far.
    fn evaluate_and_judge(&mut self, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let loss = self.evaluate(observer)?.loss;
        let better = loss.is_finite() && self.state.best.is_none_or(|(_, best)| loss < best);
        if better {
            self.state.best = Some((self.trainer.step, loss));
            self.state.evaluations_since_best = 0;
        } else {
            self.state.evaluations_since_best += 1;
        }
        Ok(better)
    }

    fn write_best(&self, best: Option<(u64, f64)>) -> Result<(), TrainError> {
        if let Some((step, loss)) = best {
            let json = serde_json::json!({ "step": step, "loss": loss });
            let path = self.run.join("best.json");
            write_atomic_with(self.files.as_ref(), &path, json.to_string().as_bytes())?;
        }
        Ok(())
    }

    fn stops_early(&mut self, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let train = &self.settings.train;
        let waited = self.state.evaluations_since_best;
        if !train.early_stop || waited < train.early_stop_patience as u64 {
            return Ok(false);
        }
        let best = self.state.best.map_or(0, |(step, _)| step);
        let reason = format!("no better held-out loss in {waited} evaluations since step {best}");
        observer.message(&format!("stopping early: {reason}"));
        let step = self.trainer.step;
        if self.record.early_stop.is_some() {
            return Ok(true);
        }
        let event = Metric::Event {
            step,
            message: format!("early stop: {reason}"),
        };
        self.metrics.write(&event, machine::now());
        self.record.early_stop = Some(EarlyStop { step, reason });
        self.save_now(observer)?;
        Ok(true)
    }

    pub fn ternary_info(&self) -> Option<TernaryInfo> {
        self.settings.ternary_info()
    }

    /// Writes and prints where the time of this session's steps went, if it was measured.
    fn write_profile(&self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some(profile) = self.trainer.backend.profile() else {
            return Ok(());
        };
        for line in profile.to_string().lines() {
            observer.message(line);
        }
        let path = self.run.join(PROFILE_FILE);
        finish::write_json(self.files.as_ref(), &path, &profile)?;
        observer.message(&format!("profile: {}", path.display()));
        Ok(())
    }

    fn write_record(&mut self) -> Result<(), TrainError> {
        self.record.seconds = self.clock.seconds();
        let path = self.run.join("run.json");
        finish::write_json(self.files.as_ref(), &path, &self.record)
    }

    /// Everything behind the last step.
    fn finish(self, observer: &mut dyn Observer) -> Result<Finished, TrainError> {
        let Self {
            settings,
            run,
            trainer,
            tokenizer,
            record,
            isa,
            threads,
            batches,
            evaluator,
            clock,
            ..
        } = self;
        // The memory of training is not needed any more.
        drop(trainer);
        finish::Finish {
            settings,
            run,
            tokenizer,
            record,
            isa,
            threads,
            batches,
            evaluator,
            clock,
        }
        .run(observer)
    }
}

/// Restores the newest checkpoint of `run` that verifies, and what `run.json` says about
/// the time before it; returns its state and the metrics up to there.
fn restore(
    run: &Path,
    trainer: &mut Trainer<Profiled<Host<f32>>>,
    data: &DataIdentity,
    record: &mut RunRecord,
    observer: &mut dyn Observer,
) -> Result<(TrainState, Vec<Metric>), TrainError> {
    let (dir, step, skipped) = newest_valid_checkpoint(run)?;
    for why in &skipped {
        observer.message(why);
    }
    let state = checkpoint::restore(&dir, trainer, data)?;
    let metrics = metrics::read(run, step)?;
    let text = std::fs::read(run.join("run.json")).unwrap_or_default();
    record.seconds = None;
    if let Ok(earlier) = serde_json::from_slice::<RunRecord>(&text) {
        record.ternary_hashes = earlier.ternary_hashes;
        record.started = earlier.started;
        record.seconds = earlier.seconds;
        record.memory.peak_bytes = earlier.memory.peak_bytes;
        record.projection = earlier.projection;
        record.early_stop = earlier.early_stop.filter(|stop| stop.step <= step);
    }
    observer.message(&format!("resumed from {} after step {step}", dir.display()));
    Ok((state, metrics))
}

/// The plan for the record, which the user is told the size of.
fn planned_memory(layout: &Layout, observer: &mut dyn Observer) -> MemoryFacts {
    let total = layout.plan.total_bytes() as f64 / f64::from(1 << 20);
    observer.message(&format!("memory: {total:.0} MiB, all of it allocated now"));
    // Without the last row, the total.
    let mut rows = layout.table();
    rows.pop();
    let rows = rows.into_iter().map(|(category, bytes)| MemoryRow {
        category: category.to_owned(),
        bytes: bytes as u64,
    });
    MemoryFacts {
        plan: rows.collect(),
        peak_bytes: None,
    }
}

fn num_ternary_weights(parameters: &Parameters<f32>) -> u64 {
    let ternary = parameters.list.iter().filter(|p| p.ternary.is_some());
    ternary.map(|p| p.numel() as u64).sum()
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// The settings as `run.json` has them.
fn settings_json(settings: &Settings) -> serde_json::Value {
    let table = toml::from_str::<toml::Table>(&settings.to_toml()).ok();
    serde_json::to_value(table).unwrap_or_default()
}

fn new_record(
    settings: &Settings,
    config: &Qwen3Config,
    prepared: &Prepared,
    isa: Isa,
    threads: usize,
) -> RunRecord {
    let parameters = config.parameters();
    let count = |matrix: bool| {
        let some = parameters.iter().filter(|p| p.is_matrix() == matrix);
        some.map(|p| p.numel() as u64).sum::<u64>()
    };
    let (matrix_parameters, norm_parameters) = (count(true), count(false));
    let ternary = settings.model.ternary;
    let group = settings.model.group_size;
    let packed_bytes: u64 = parameters
        .iter()
        .map(|p| {
            let dense = is_embedding(&p.name) && !settings.model.ternary_embedding;
            packed_size(p, ternary.then_some(group).filter(|_| !dense))
        })
        .sum();
    RunRecord {
        name: settings.run.name.clone(),
        settings: settings_json(settings),
        seed: settings.run.seed,
        code_version: machine::code_version(),
        machine: machine::describe(isa, threads),
        data: prepared.facts.clone(),
        model: ModelFacts {
            config: serde_json::from_str(&config.to_json()).unwrap_or_default(),
            parameters: matrix_parameters + norm_parameters,
            matrix_parameters,
            norm_parameters,
            group_size: ternary.then_some(group),
            experiment: settings.experiment().map(str::to_owned),
            scale_rule: settings.model.scale_rule.name().to_owned(),
            numerics: settings.numerics().name().to_owned(),
            bits_per_weight: packed_bytes as f64 * 8.0
                / (matrix_parameters + norm_parameters) as f64,
            packed_bytes,
        },
        started: machine::now() as u64,
        memory: MemoryFacts::default(),
        baselines: Vec::new(),
        ternary_hashes: Default::default(),
        finished: None,
        seconds: Some(0.0),
        files: Vec::new(),
        results: None,
        samples: Vec::new(),
        compared_bytes: None,
        early_stop: None,
        projection: None,
    }
}

/// Bytes of a parameter in the packed file; of a dense model in f32.
fn packed_size(p: &setun_formats::ParameterInfo, group_size: Option<usize>) -> u64 {
    let Some(group_size) = group_size.filter(|_| p.is_matrix()) else {
        return 4 * p.numel() as u64;
    };
    let (rows, cols) = (p.shape[0], p.shape[1]);
    let groups = setun_ternary::groups_per_row(cols, group_size);
    (rows * (setun_ternary::packed_row_bytes(cols, group_size) + 2 * groups)) as u64
}
