//! `setun train --drafter-for`: a block drafter for a model that is there already.
//!
//! The target stays as it is. It first writes the text that the drafter learns from
//! (`text.rs`), since a draft is to say what the target would; then each step runs it over
//! some windows of that text, and the drafter over blocks in them. There is no resume: a
//! drafter takes minutes, and a stopped training ends with the drafter that it has.

mod text;

use crate::TrainError;
use crate::guard::{Guard, SpikeRule};
use crate::optimizer::{AdamWOptions, Optimizer};
use crate::prepare;
use crate::run::{Observer, RunOptions};
use crate::schedule::Schedule;
use crate::settings::{
    Assignment, DrafterSettings, Override, SETTINGS_FILE, Settings, SettingsError, allow_only,
};
use crate::trainer::{clip_scale, muon_options};
use setun_backend::ops::IGNORE_TARGET;
use setun_backend::philox::Philox;
use setun_backend::{Host, HostWorkspace, Plan, Segment};
use setun_formats::{DrafterHeader, Qwen3Config};
use setun_infer::{
    BlockGuesses, DraftStats, Engine, EngineOptions, Request, SamplerOptions, Speculator,
    StopRules, load_parameters, spec_of,
};
use setun_io::{
    DRAFTER_DIRECTORY, IoError, Matrix, OpenDrafter, OpenModel, TensorSource, export_drafter,
    find_drafter,
};
use setun_model::{
    BlockDrafter, DraftBatch, DrafterSpec, ParameterUse, Parameters, Purpose, Qwen3, TrainShape,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;
use text::{Texts, Windows};

/// Bytes of logits that exist at a time.
const LOGITS_BYTES: usize = 16 << 20;
/// Most layers of a drafter: with more it would not be much cheaper than its target.
const MAX_LAYERS: usize = 8;
/// Stream of the random numbers that place anchors.
const ANCHOR_STREAM: u64 = 0x0d_af_7e;
/// Held-out texts on which the finished drafter is timed.
const TIMED: usize = 6;

/// Sections and keys that the training of a drafter reads.
const SECTIONS: [&str; 4] = ["data", "tokenizer", "drafter", "sample"];
const KEYS: [&str; 23] = [
    "run.seed",
    "run.threads",
    "train.steps",
    "train.batch_size",
    "train.seq_len",
    "train.optimizer",
    "train.lr",
    "train.adamw_lr",
    "train.muon_momentum",
    "train.min_lr_ratio",
    "train.warmup_steps",
    "train.schedule",
    "train.second_peak_ratio",
    "train.decay_start",
    "train.weight_decay",
    "train.beta1",
    "train.beta2",
    "train.eps",
    "train.optimizer_state",
    "train.grad_clip",
    "train.spike_sigma",
    "eval.every",
    "eval.batch_size",
];

/// Settings of a drafter for the model at `target`: those of its run, with other defaults
/// for the training, and `overrides` on top.
///
/// # Errors
/// As [`Settings::load`]; an override that a drafter has no use for.
pub fn drafter_settings(target: &Path, overrides: &[Override]) -> Result<Settings, SettingsError> {
    let wrong = |key: &str| format!("the training of a drafter does not read --{key}");
    let remedy = "leave it out; setun train --help lists what [drafter] has";
    allow_only(overrides, (&SECTIONS, &KEYS), wrong, remedy)?;
    const DEFAULTS: &str = r#"
        "model.init_from" = ""
        "train.steps" = 600
        "train.batch_size" = 8
        "train.micro_batch_size" = 0
        "train.optimizer" = "adamw"
        "train.adamw_lr" = 0.0
        "train.lr" = 2e-3
        "train.warmup_steps" = 30
        "train.schedule" = "cosine"
        "train.min_lr_ratio" = 0.05
        "train.muon_momentum" = 0.95
        "train.weight_decay" = 0.0
        "train.blend_steps" = 0
        "train.freeze" = []
        "distill.weight" = 0.0
        "distill.teacher" = ""
        "eval.every" = 100
        "eval.batch_size" = 0
    "#;
    let defaults: toml::Table = toml::from_str(DEFAULTS).unwrap_or_default();
    let assignments: Vec<Assignment> = defaults
        .into_iter()
        .map(|(key, value)| Assignment {
            key,
            value,
            base: PathBuf::new(),
            place: "the defaults of --drafter-for".to_owned(),
        })
        .collect();
    let recipe = target.join(SETTINGS_FILE);
    let recipe = recipe.is_file().then_some(recipe);
    Settings::load_with(recipe.as_deref(), &assignments, overrides)
}

/// A drafter that has been trained.
pub struct TrainedDrafter {
    /// Its directory.
    pub path: PathBuf,
    /// Finished steps.
    pub steps: u64,
    /// Mean held-out loss of each guess of a block, in nats.
    pub losses: Vec<f64>,
    /// What became of its drafts on held-out text.
    pub stats: DraftStats,
    /// Tokens a second with drafts, relative to those without.
    pub speed: f64,
}

/// Trains a drafter for the model at `target`, writes it beside that, and times it.
///
/// # Errors
/// A target that is dense or has a drafter already; data that cannot be used.
pub fn train_drafter(
    mut settings: Settings,
    target: &Path,
    options: &RunOptions<'_>,
    observer: &mut dyn Observer,
) -> Result<TrainedDrafter, TrainError> {
    let model = OpenModel::open(target)?;
    let parent = match (target.is_dir(), target.parent()) {
        (true, _) => target.to_owned(),
        // The parent of a bare name is empty, which is no directory.
        (false, Some(parent)) if parent != Path::new("") => parent.to_owned(),
        (false, _) => PathBuf::from("."),
    };
    let place = parent.join(DRAFTER_DIRECTORY);
    if place.exists() {
        return Err(TrainError::refused(format!(
            "{} is there already; remove it to train another one",
            place.display()
        )));
    }
    let header = header(&mut settings, &model)?;
    let settings = &settings;
    let prepared = prepare::prepare(settings, Some(&model), &parent, observer)?;
    let texts = Texts::write(settings, &model, &prepared, options, observer)?;
    let mut trainer = DrafterTrainer::new(settings, &model, &header, options)?;
    trainer.train(&texts, options, observer)?;
    if trainer.step == 0 {
        return Err(stopped());
    }
    let losses = trainer.evaluate(&texts.valid);
    let path = export_drafter(&parent, &header, &trainer.source()?)?;
    let steps = trainer.step;
    drop(trainer);
    let (stats, speed) = time(settings, &model, &path, &texts.valid, options)?;
    Ok(TrainedDrafter {
        path,
        steps,
        losses,
        stats,
        speed,
    })
}

/// What the file of the drafter will say.
fn stopped() -> TrainError {
    TrainError::refused("stopped before the first step; there is no drafter".to_owned())
}

fn header(settings: &mut Settings, model: &OpenModel) -> Result<DrafterHeader, TrainError> {
    let (seq_len, c) = (settings.train.seq_len, model.config());
    settings.drafter.resolve(seq_len, c.num_hidden_layers);
    let s = &settings.drafter;
    let Some(ternary) = model.ternary() else {
        return Err(TrainError::refused(format!(
            "{} is a dense model, and drafters are ternary as their targets are; train a \
             ternary one from it with --init first",
            model.directory().display()
        )));
    };
    let range = |key: &str, value: usize, (low, high): (usize, usize)| {
        let fine = (low..=high).contains(&value);
        fine.then_some(()).ok_or_else(|| {
            TrainError::refused(format!(
                "drafter.{key} = {value} must be from {low} to {high}"
            ))
        })
    };
    range("num_hidden_layers", s.num_hidden_layers, (1, MAX_LAYERS))?;
    range("block_size", s.block_size, (2, 64))?;
    range(
        "num_target_layers",
        s.num_target_layers,
        (1, c.num_hidden_layers),
    )?;
    range("prompt_tokens", s.prompt_tokens, (1, seq_len - 1))?;
    range("anchors", s.anchors, (1, seq_len - s.prompt_tokens))?;
    range("windows", s.windows, (1, 1 << 24))?;
    range("valid_windows", s.valid_windows, (1, 1 << 16))?;
    if seq_len > c.max_position_embeddings {
        return Err(TrainError::refused(format!(
            "train.seq_len = {seq_len} is longer than the model's max_position_embeddings = {}",
            c.max_position_embeddings
        )));
    }
    Ok(DrafterHeader {
        config: Qwen3Config {
            vocab_size: 1,
            num_hidden_layers: s.num_hidden_layers,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            ..c.clone()
        },
        ternary: *ternary,
        block_size: s.block_size,
        target_layer_ids: spread_layers(s.num_target_layers, c.num_hidden_layers),
    })
}

impl DrafterSettings {
    /// Puts what they stand for in the place of zeros.
    fn resolve(&mut self, seq_len: usize, num_layers: usize) {
        let fill = |value: &mut usize, default: usize| {
            if *value == 0 {
                *value = default.max(1);
            }
        };
        fill(&mut self.num_target_layers, num_layers.min(3));
        fill(&mut self.prompt_tokens, seq_len / 8);
        fill(&mut self.anchors, seq_len / 8);
    }
}

/// `n` of `num_layers` layers at equal distances, the last one among them.
fn spread_layers(n: usize, num_layers: usize) -> Vec<usize> {
    (1..=n).map(|i| i * num_layers / n - 1).collect()
}

/// A drafter in training beside its target.
struct DrafterTrainer {
    backend: Host<f32>,
    target: Qwen3<f32>,
    drafter: BlockDrafter<f32>,
    optimizer: Optimizer,
    schedule: Schedule,
    guard: Guard,
    step: u64,
    steps: u64,
    batch_size: usize,
    eval_every: u64,
    grad_clip: f64,
    spike_sigma: f64,
    blocks: Blocks,
}

/// How anchors lie in windows.
#[derive(Clone, Copy)]
struct Blocks {
    seq_len: usize,
    size: usize,
    anchors: usize,
    first: usize,
    seed: u64,
}

/// Anchors of a window, with their tokens and what the rows behind them are to say.
struct Anchored {
    anchors: Vec<u32>,
    tokens: Vec<u32>,
    targets: Vec<u32>,
}

impl Blocks {
    /// Blocks of the `draw`-th visit of a window: one anchor at a random place of each of
    /// as many equal parts.
    fn place(&self, window: &[u32], draw: u64) -> Anchored {
        let random = Philox::new(self.seed, ANCHOR_STREAM);
        let room = self.seq_len - 1 - self.first;
        let n = self.anchors;
        let mut anchored = Anchored {
            anchors: Vec::with_capacity(n),
            tokens: Vec::with_capacity(n),
            targets: Vec::with_capacity(n * self.size),
        };
        for i in 0..n {
            let (low, high) = (i * room / n, (i + 1) * room / n);
            let number = random.block(draw * n as u64 + i as u64)[0] as usize;
            let at = self.first + low + number % (high - low);
            anchored.anchors.push(at as u32);
            anchored.tokens.push(window[at]);
            anchored.targets.push(IGNORE_TARGET);
            let behind = (at + 1..).take(self.size - 1);
            let target = |i| window.get(i).copied().unwrap_or(IGNORE_TARGET);
            anchored.targets.extend(behind.map(target));
        }
        anchored
    }
}

impl DrafterTrainer {
    fn new(
        settings: &Settings,
        model: &OpenModel,
        header: &DrafterHeader,
        options: &RunOptions<'_>,
    ) -> Result<Self, TrainError> {
        let (train, c) = (&settings.train, model.config());
        let s = &settings.drafter;
        let rows = train.seq_len;
        let mut plan = Plan::new();
        let spec = spec_of(model, None)?;
        let limits = spec.limits();
        let of_drafter = DrafterSpec::new(header, spec.numerics);
        let purpose = Purpose::Infer {
            rows,
            context: rows,
            head_chunk: (LOGITS_BYTES / 4 / c.vocab_size).clamp(1, rows),
        };
        let mut target = Qwen3::reserve(&mut plan, spec, purpose);
        let purpose = Purpose::Train(TrainShape {
            rows: rows + s.anchors * s.block_size,
            positions: rows + s.block_size,
            recompute: false,
            head_chunk: 1,
        });
        let parameters = ParameterUse {
            train: true,
            ..ParameterUse::default()
        };
        let drafter =
            BlockDrafter::reserve(&mut plan, &of_drafter, (purpose, parameters), &mut target);
        let constants = AdamWOptions {
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            state: train.optimizer_state,
        };
        let parameters = &drafter.body.parameters;
        let optimizer =
            Optimizer::reserve_with(&mut plan, parameters, constants, muon_options(train));
        let threads = crate::machine::threads(settings.run.threads);
        let workspace = HostWorkspace::reserve(&mut plan, threads, limits);
        let mut backend = Host::new(&plan, workspace, options.isa);
        target.prepare(&mut backend);
        drafter.prepare(&mut backend);
        load_parameters(model, &target.parameters, &mut backend)?;
        let depth = (2.0 * s.num_hidden_layers as f64).sqrt().recip();
        let own = &drafter.body.parameters;
        own.initialize(&mut backend, settings.run.seed, 0.0, depth)?;
        own.project(&mut backend)?;
        Ok(Self {
            backend,
            target,
            drafter,
            optimizer,
            schedule: Schedule::new(train),
            guard: Guard::default(),
            step: 0,
            steps: train.steps,
            batch_size: train.batch_size,
            eval_every: settings.eval.every,
            grad_clip: train.grad_clip,
            spike_sigma: train.spike_sigma,
            blocks: Blocks {
                seq_len: train.seq_len,
                size: s.block_size,
                anchors: s.anchors,
                first: s.prompt_tokens - 1,
                seed: settings.run.seed,
            },
        })
    }

    fn train(
        &mut self,
        texts: &Texts,
        options: &RunOptions<'_>,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let start = Instant::now();
        while self.step < self.steps && !options.stop.load(Ordering::Relaxed) {
            let loss = self.train_step(&texts.train)?;
            let tokens = self.step as f64 * (self.batch_size * self.blocks.seq_len) as f64;
            let rate = tokens / start.elapsed().as_secs_f64();
            let detail = format!("loss {loss:.4}  {rate:.0} tokens/s");
            observer.progress("drafter", self.step, self.steps, &detail);
            let every = self.eval_every;
            if every > 0 && self.step.is_multiple_of(every) && self.step < self.steps {
                let losses = self.evaluate(&texts.valid);
                observer.message(&describe(self.step, &losses));
            }
        }
        Ok(())
    }

    /// One update; returns the mean loss of the guesses before it.
    fn train_step(&mut self, windows: &Windows) -> Result<f64, TrainError> {
        for gradient in self
            .drafter
            .body
            .parameters
            .list
            .iter()
            .filter_map(|p| p.grad)
        {
            setun_backend::Backend::zero(&mut self.backend, gradient);
        }
        let first = self.step * self.batch_size as u64;
        let visits = (0..self.batch_size as u64).map(|row| {
            let window = windows.visit(first + row, self.blocks.seed);
            (window, self.blocks.place(window, first + row))
        });
        let visits: Vec<_> = visits.collect();
        let counts = |targets: &[u32]| targets.iter().filter(|t| **t != IGNORE_TARGET).count();
        let num_targets: usize = visits.iter().map(|(_, a)| counts(&a.targets)).sum();
        let scale = 1.0 / num_targets.max(1) as f64;
        let mut total = 0.0;
        for (window, anchored) in &visits {
            let losses = self.run(window, anchored, Some(scale));
            total += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
        let parameters = &self.drafter.body.parameters;
        let norm = Optimizer::gradient_norm(&mut self.backend, parameters);
        let loss = total * scale;
        let rule = SpikeRule {
            sigma: self.spike_sigma,
            grad_clip: self.grad_clip,
        };
        if self.guard.inspect(loss, norm, rule).is_ok() {
            let (lr, decay) = (
                self.schedule.lr(self.step),
                self.schedule.weight_decay(self.step),
            );
            let clip = clip_scale(norm, self.grad_clip);
            self.optimizer
                .step(&mut self.backend, parameters, lr, decay, clip);
            parameters.project(&mut self.backend)?;
        }
        self.step += 1;
        Ok(loss)
    }

    /// Losses of all rows of a window's blocks; with `scale` their gradients.
    fn run(&mut self, window: &[u32], anchored: &Anchored, scale: Option<f64>) -> Vec<f32> {
        let positions: Vec<u32> = (0..window.len() as u32).collect();
        let b = &mut self.backend;
        self.target.write_batch(b, window, &positions, &[]);
        self.target
            .forward(b, window.len(), &[Segment::own(0, window.len())]);
        let batch = DraftBatch {
            context: window.len(),
            anchors: &anchored.anchors,
            tokens: &anchored.tokens,
            targets: &anchored.targets,
        };
        self.drafter.train(b, &self.target, batch, scale);
        let mut losses = vec![0.0; anchored.targets.len()];
        self.drafter.read_losses(b, window.len(), &mut losses);
        losses
    }

    /// Mean loss of each guess of a block, at fixed places of held-out text.
    fn evaluate(&mut self, windows: &Windows) -> Vec<f64> {
        let size = self.blocks.size;
        let mut sums = vec![(0.0, 0usize); size];
        for (draw, window) in windows.iter().enumerate() {
            let anchored = self.blocks.place(window, draw as u64);
            let losses = self.run(window, &anchored, None);
            for (row, (&loss, &target)) in losses.iter().zip(&anchored.targets).enumerate() {
                if target != IGNORE_TARGET {
                    let (sum, n) = &mut sums[row % size];
                    (*sum, *n) = (*sum + f64::from(loss), *n + 1);
                }
            }
        }
        let means = sums[1..].iter();
        means.map(|(sum, n)| sum / (*n).max(1) as f64).collect()
    }

    /// The weights as the last forward pass used them.
    fn source(&self) -> Result<LiveDrafter, TrainError> {
        let parameters: &Parameters<f32> = &self.drafter.body.parameters;
        let mut live = LiveDrafter::default();
        for p in &parameters.list {
            let name = p.name.clone();
            match parameters.read_ternary(&self.backend, p) {
                Some(matrix) => {
                    live.matrices.insert(name, matrix);
                }
                None => {
                    let values = parameters.read_values(&self.backend, p);
                    live.norms.insert(name, values);
                }
            }
        }
        Ok(live)
    }
}

/// `step 100: held-out loss of guess 1 2.13, 2 2.90, ...`
fn describe(step: u64, losses: &[f64]) -> String {
    let each: Vec<String> = (1..)
        .zip(losses)
        .map(|(i, loss)| format!("{i}: {loss:.3}"))
        .collect();
    format!("step {step}: held-out loss by guess {}", each.join(", "))
}

/// Weights of a drafter, to be written.
#[derive(Default)]
struct LiveDrafter {
    matrices: BTreeMap<String, setun_ternary::PackedMatrix>,
    norms: BTreeMap<String, Vec<f32>>,
}

impl TensorSource for LiveDrafter {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        let matrix = self.matrices.get(name).cloned().map(Matrix::Ternary);
        matrix.ok_or_else(|| missing(name))
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        self.norms.get(name).cloned().ok_or_else(|| missing(name))
    }
}

fn missing(name: &str) -> IoError {
    IoError::Invalid {
        path: DRAFTER_DIRECTORY.into(),
        problem: format!("it has no {name}"),
    }
}

/// Acceptance and speed of the drafter at `path` behind the beginnings of held-out texts.
fn time(
    settings: &Settings,
    model: &OpenModel,
    path: &Path,
    windows: &Windows,
    options: &RunOptions<'_>,
) -> Result<(DraftStats, f64), TrainError> {
    let file = find_drafter(path).ok_or_else(|| missing("file"))?;
    let drafter = OpenDrafter::open(&file)?;
    let seq_len = settings.train.seq_len;
    let threads = crate::machine::threads(settings.run.threads);
    let engine_options = EngineOptions {
        cache_tokens: Some(2 * seq_len + 64),
        ..EngineOptions::new(seq_len, threads, options.isa)
    };
    let mut engine = Engine::load_with_drafter(model, &drafter, engine_options)?;
    let mut plain = Engine::load(model, engine_options)?;
    let begin = Instant::now();
    let mut clock = || begin.elapsed().as_secs_f64();
    let mut guesses = BlockGuesses;
    let mut speculator = Speculator::new(&mut guesses, &mut clock);
    let prompt = settings.drafter.prompt_tokens;
    let (mut with, mut without) = (0.0, 0.0);
    for window in windows.iter().take(TIMED) {
        let request = Request {
            prompt: window[..prompt].to_vec(),
            sampler: SamplerOptions {
                temperature: 0.0,
                ..SamplerOptions::default()
            },
            stop: StopRules {
                end_tokens: Vec::new(),
                max_tokens: seq_len - prompt,
            },
            seed: (settings.run.seed, 0),
            logprobs: None,
        };
        let start = Instant::now();
        let expected = plain.generate(&request, |_| {})?;
        without += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let found = engine.speculate(&request, &mut speculator, |_| {})?;
        with += start.elapsed().as_secs_f64();
        if expected.tokens != found.tokens {
            return Err(TrainError::refused(
                "decoding with the drafter gave another text than decoding without it; \
                 please report this",
            ));
        }
    }
    Ok((speculator.stats, without / with))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_any_run_do() {
        let target = std::env::temp_dir().join(format!("setun-drafter-{}", std::process::id()));
        std::fs::create_dir_all(&target).unwrap();
        let recipe = r#"
            [data]
            train = ["text.txt"]
            [model]
            init_from = "dense"
            [train]
            optimizer = "muon"
            lr = 8e-3
            adamw_lr = 32e-3
            [distill]
            weight = 0.5
            teacher = "teacher"
        "#;
        std::fs::write(target.join(SETTINGS_FILE), recipe).unwrap();
        let settings = drafter_settings(&target, &[]);
        std::fs::remove_dir_all(&target).unwrap();
        let settings = settings.unwrap();
        assert_eq!((settings.distill.teacher, settings.train.lr), (None, 2e-3));
    }

    #[test]
    fn layers_are_spread_and_end_with_the_last() {
        assert_eq!(spread_layers(1, 8), [7]);
        assert_eq!(spread_layers(3, 8), [1, 4, 7]);
        assert_eq!(spread_layers(4, 4), [0, 1, 2, 3]);
        assert_eq!(spread_layers(5, 28), [4, 10, 15, 21, 27]);
    }

    #[test]
    fn anchors_ascend_within_the_window_and_targets_follow_them() {
        let window: Vec<u32> = (100..120).collect();
        for anchors in [1, 4, 13] {
            let blocks = Blocks {
                seq_len: 20,
                size: 4,
                anchors,
                first: 6,
                seed: 3,
            };
            for draw in 0..50 {
                let placed = blocks.place(&window, draw);
                assert_eq!(placed.anchors.len(), anchors);
                assert!(placed.anchors.is_sorted_by(|a, b| a < b));
                assert!(placed.anchors.iter().all(|a| (6..19).contains(a)));
                for (i, &at) in placed.anchors.iter().enumerate() {
                    assert_eq!(placed.tokens[i], 100 + at);
                    let targets = &placed.targets[4 * i..4 * i + 4];
                    assert_eq!(targets[0], IGNORE_TARGET);
                    for (j, &target) in targets.iter().enumerate().skip(1) {
                        let position = at as usize + j;
                        let beyond = position >= window.len();
                        let expected = if beyond {
                            IGNORE_TARGET
                        } else {
                            window[position]
                        };
                        assert_eq!(target, expected);
                    }
                }
            }
        }
    }
}
