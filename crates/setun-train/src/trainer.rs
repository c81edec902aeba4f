//! One training step, from a batch to new weights.

use crate::TrainError;
use crate::average::Average;
use crate::clip::Clip;
use crate::data::{self, Batches};
use crate::evaluate::{Evaluation, Evaluator};
use crate::guard::{Guard, Skip, SpikeRule};
use crate::learned_scales::{self, LearnedScales};
use crate::muon::MuonOptions;
use crate::optimizer::{AdamWOptions, Optimizer};
use crate::schedule::Schedule;
use crate::settings::{OptimizerKind, Settings, Ste, TrainSettings};
use setun_backend::ops::IGNORE_TARGET;
use setun_backend::{Backend, Category, HostWorkspace, Plan, ProjectStats, Segment};
use setun_formats::Qwen3Config;
use setun_model::{
    Form, ModelSpec, ParameterUse, Purpose, Qwen3, StepDropout, Teacher, TrainShape,
};
use std::sync::mpsc::Receiver;

/// Bytes of logits that exist at a time when `train.head_chunk` is automatic.
const LOGITS_BYTES: usize = 16 << 20;

/// Everything of a training that lies in the plan.
pub struct Layout {
    /// The plan.
    pub plan: Plan,
    /// Scratch memory of the host.
    pub workspace: HostWorkspace<f32>,
    /// The model.
    pub model: Qwen3<f32>,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The model that is learned from.
    pub teacher: Option<Qwen3<f32>>,
}

impl Layout {
    /// Lays out the memory of a training of `config`, with a teacher that computes what
    /// `teacher` says.
    pub fn new(
        settings: &Settings,
        config: &Qwen3Config,
        teacher: Option<ModelSpec>,
        threads: usize,
    ) -> Self {
        let train = &settings.train;
        let windows = train.micro_batch_size.max(settings.eval.batch_size);
        let chunk = match train.head_chunk {
            0 => (LOGITS_BYTES / 4 / config.vocab_size).clamp(1, 512),
            rows => rows,
        };
        let rows = windows * train.seq_len;
        let shape = TrainShape {
            rows,
            positions: train.seq_len,
            recompute: train.recompute,
            head_chunk: chunk.min(rows),
        };
        let numerics = settings.numerics();
        let spec = ModelSpec {
            config: config.clone(),
            scheme: settings.scheme(),
            numerics,
        };
        let own = spec.limits();
        let limits = teacher.as_ref().map_or(own, |t| own.and(t.limits()));
        let mut plan = Plan::new();
        let parameters = ParameterUse {
            train: true,
            blend: train.blend_steps > 0,
            packed: None,
            dense_embedding: !settings.model.ternary_embedding,
            freeze: &train.freeze,
        };
        let mut model = Qwen3::reserve_with(&mut plan, spec, Purpose::Train(shape), parameters);
        if settings.model.learned_scales {
            for (name, len) in learned_scales::factors(&model.parameters) {
                model.parameters.add_vector(&mut plan, name, len);
            }
        }
        let teacher = teacher.map(|spec| {
            let purpose = Purpose::Infer {
                rows,
                context: rows,
                head_chunk: shape.head_chunk,
            };
            Qwen3::reserve(&mut plan, spec, purpose)
        });
        let options = AdamWOptions {
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            state: train.optimizer_state,
        };
        let muon = muon_options(train);
        let mut optimizer = Optimizer::reserve_with(&mut plan, &model.parameters, options, muon);
        if train.ema_decay > 0.0 {
            let average = Average::reserve(&mut plan, &model.parameters, train.ema_decay);
            optimizer.average = Some(average);
        }
        let workspace = HostWorkspace::reserve(&mut plan, threads, limits);
        Self {
            plan,
            workspace,
            model,
            optimizer,
            teacher,
        }
    }

    /// The table of `--dry-run`: bytes for each category, and in all.
    pub fn table(&self) -> Vec<(&'static str, usize)> {
        let rows = Category::ALL
            .iter()
            .map(|&c| (c.name(), self.plan.category_bytes(c)));
        let mut rows: Vec<_> = rows.filter(|(_, bytes)| *bytes > 0).collect();
        rows.push(("total", self.plan.total_bytes()));
        rows
    }
}

/// Muon's constants, where it is asked for.
pub(crate) fn muon_options(train: &TrainSettings) -> Option<MuonOptions> {
    (train.optimizer == OptimizerKind::Muon).then(|| MuonOptions {
        momentum: train.muon_momentum,
        adamw_share: match train.adamw_lr {
            0.0 => 1.0,
            lr => lr / train.lr,
        },
    })
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct StepOutcome {
    /// Mean loss of the batch in nats per token, before the update.
    pub loss: f64,
    /// Mean divergence from the teacher in nats per token, where there is one.
    pub divergence: Option<f64>,
    /// 2-norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Whether the gradient was scaled down.
    pub clipped: bool,
    /// Epochs that the data had gone through before the step.
    pub epoch: f64,
    /// Set if nothing was changed.
    pub skipped: Option<Skip>,
    /// What the projection after the update did.
    pub projection: ProjectStats,
}

/// A model in training.
pub struct Trainer<B: Backend<Real = f32>> {
    /// The device.
    pub backend: B,
    /// The model.
    pub model: Qwen3<f32>,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The model that is learned from.
    pub teacher: Option<Qwen3<f32>>,
    /// Steps that are finished, skipped ones included.
    pub step: u64,
    /// Batches that were passed over: step `s` reads the batch `s + data_offset`.
    pub data_offset: u64,
    /// Judges steps before the optimizer does anything.
    pub guard: Guard,
    /// Open while a checkpoint is written from the live weights: the update waits for it.
    saver: Option<Receiver<()>>,
    schedule: Schedule,
    options: StepOptions,
    /// Set where gradients do not pass the projection as they are.
    clip: Option<Clip>,
    /// Set where scales are learned.
    scales: Option<LearnedScales>,
    batch: BatchBuffers,
}

/// Settings that a step reads.
#[derive(Clone, Copy)]
struct StepOptions {
    seq_len: usize,
    micro_rows: usize,
    grad_clip: f64,
    document_mask: bool,
    blend_steps: u64,
    spike_sigma: f64,
    teacher_weight: f64,
    temperature: f64,
    dropout: f64,
    seed: u64,
}

/// The batch on the host; reused, so that a step allocates nothing.
pub(crate) struct BatchBuffers {
    pub inputs: Vec<u32>,
    pub targets: Vec<u32>,
    pub positions: Vec<u32>,
    pub losses: Vec<f32>,
    pub ranges: Vec<data::Segment>,
    pub segments: Vec<Segment>,
}

impl BatchBuffers {
    pub fn new(rows: usize, max_segments: usize) -> Self {
        Self {
            inputs: vec![0; rows],
            targets: vec![0; rows],
            positions: vec![0; rows],
            losses: vec![0.0; rows],
            ranges: Vec::with_capacity(max_segments),
            segments: Vec::with_capacity(max_segments),
        }
    }

    /// Segments and positions of the rows `start..start + rows`, counted from `start`.
    pub fn select(&mut self, start: usize, rows: usize) {
        self.segments.clear();
        for range in &self.ranges {
            if range.start < start || range.start >= start + rows {
                continue;
            }
            let first = range.start - start;
            self.segments.push(Segment::own(first, range.len));
            for (i, position) in self.positions[first..first + range.len]
                .iter_mut()
                .enumerate()
            {
                *position = i as u32;
            }
        }
    }
}

impl<B: Backend<Real = f32>> Trainer<B> {
    /// Puts the parts together; the weights are still to be set.
    pub fn new(
        backend: B,
        parts: (Qwen3<f32>, Optimizer, Option<Qwen3<f32>>),
        settings: &Settings,
        batches: &Batches,
    ) -> Self {
        Self::with_segments(backend, parts, settings, batches.max_segments())
    }

    /// As [`new`](Self::new), for batches of at most `max_segments` segments.
    pub fn with_segments(
        backend: B,
        (model, optimizer, teacher): (Qwen3<f32>, Optimizer, Option<Qwen3<f32>>),
        settings: &Settings,
        max_segments: usize,
    ) -> Self {
        let train = &settings.train;
        let rows = train.batch_size * train.seq_len;
        let clipped = train.ste == Ste::Clipped;
        let mut trainer = Self {
            backend,
            clip: clipped.then(|| Clip::new(&model.parameters)),
            scales: (settings.model.learned_scales).then(|| LearnedScales::new(&model.parameters)),
            model,
            optimizer,
            teacher,
            step: 0,
            data_offset: 0,
            guard: Guard::default(),
            saver: None,
            schedule: Schedule::new(train),
            options: StepOptions {
                seq_len: train.seq_len,
                micro_rows: train.micro_batch_size * train.seq_len,
                grad_clip: train.grad_clip,
                document_mask: settings.data.document_mask,
                blend_steps: train.blend_steps,
                spike_sigma: train.spike_sigma,
                teacher_weight: settings.distill.weight,
                temperature: settings.distill.temperature,
                dropout: train.dropout,
                seed: settings.run.seed,
            },
            batch: BatchBuffers::new(rows, max_segments),
        };
        trainer.model.z_loss = train.z_loss;
        trainer.model.softcap = settings.model.logit_softcap;
        trainer.model.prepare(&mut trainer.backend);
        if let Some(teacher) = &trainer.teacher {
            teacher.prepare(&mut trainer.backend);
        }
        trainer
    }

    /// Projects the latents, as after every update.
    ///
    /// # Errors
    /// A scale that cannot be shipped.
    pub fn project(&mut self) -> Result<ProjectStats, TrainError> {
        let parameters = &self.model.parameters;
        if let (0, Some(average)) = (self.optimizer.updates, &self.optimizer.average) {
            // These are the first weights.
            average.start(&mut self.backend, parameters);
        }
        match &mut self.scales {
            Some(scales) => scales.project(&mut self.backend, parameters),
            None => Ok(parameters.project(&mut self.backend)?),
        }
    }

    /// Projects the average, if there is one, as it is now.
    ///
    /// # Errors
    /// A scale that cannot be shipped.
    pub(crate) fn project_average(&mut self) -> Result<(), TrainError> {
        // Somebody may still read the projection of an earlier one.
        if self.optimizer.average.is_some() {
            self.wait_for_saver();
        }
        match &self.optimizer.average {
            Some(average) => average.project(&mut self.backend),
            None => Ok(()),
        }
    }

    /// Held-out loss of the weights that are shipped: the average, or else the latents, both
    /// behind their projection.
    ///
    /// # Errors
    /// Tokens that cannot be read; a scale that cannot be shipped.
    pub fn evaluate(&mut self, evaluator: &mut Evaluator) -> Result<Evaluation, TrainError> {
        self.project_average()?;
        self.swap_average();
        let evaluation = evaluator.run(&mut self.backend, &self.model);
        self.swap_average();
        evaluation
    }

    /// Exchanges what the model reads: latents and average.
    fn swap_average(&mut self) {
        if let Some(average) = &mut self.optimizer.average {
            std::mem::swap(&mut average.parameters, &mut self.model.parameters);
        }
    }

    /// Makes the next update wait until the other end of `saver` is gone.
    pub(crate) fn set_saver(&mut self, saver: Receiver<()>) {
        self.saver = Some(saver);
    }

    /// Waits until nobody reads weights and moments any more.
    pub(crate) fn wait_for_saver(&mut self) {
        if let Some(saver) = self.saver.take() {
            // Nothing is ever sent: it ends with the sender.
            let _ = saver.recv();
        }
    }

    /// Passes a step over: schedule and data go on, nothing else changes. This is what a
    /// step that the guard refuses comes down to.
    pub fn skip_step(&mut self) {
        self.step += 1;
    }

    /// One step: batch, forward, loss, backward, guard, update, projection. A step that the
    /// guard refuses changes nothing but the step count, as [`Trainer::skip_step`].
    ///
    /// # Errors
    /// Data that cannot be read; a scale that cannot be shipped.
    pub fn step(&mut self, batches: &Batches) -> Result<StepOutcome, TrainError> {
        let step = self.step;
        let batch = step + self.data_offset;
        let info = batches.fill(batch, &mut self.batch.inputs, &mut self.batch.targets)?;
        batches.segments(batch, self.options.document_mask, &mut self.batch.ranges);
        self.step_on_batch(info.epoch)
    }

    /// As [`step`](Self::step), on a batch from elsewhere: `fill` writes inputs and targets,
    /// `[batch_size, seq_len]` each, and every window is a segment.
    ///
    /// # Errors
    /// A scale that cannot be shipped.
    pub fn step_on(
        &mut self,
        fill: impl FnOnce(&mut [u32], &mut [u32]),
    ) -> Result<StepOutcome, TrainError> {
        let batch = &mut self.batch;
        fill(&mut batch.inputs, &mut batch.targets);
        let len = self.options.seq_len;
        batch.ranges.clear();
        let starts = (0..batch.inputs.len()).step_by(len);
        let windows = starts.map(|start| data::Segment { start, len });
        batch.ranges.extend(windows);
        self.step_on_batch(0.0)
    }

    /// The step on the batch that is in the buffers.
    fn step_on_batch(&mut self, epoch: f64) -> Result<StepOutcome, TrainError> {
        let step = self.step;
        if step < self.options.blend_steps {
            let share = step as f64 / self.options.blend_steps as f64;
            self.model.parameters.blend(&mut self.backend, share);
        }
        let (loss, divergence) = self.accumulate();
        self.model.parameters.set_form(Form::Ternary);
        if let Some(scales) = &mut self.scales {
            scales.gradients(&mut self.backend, &self.model.parameters)?;
        }
        if let Some(clip) = &mut self.clip {
            clip.apply(&mut self.backend, &self.model.parameters);
        }
        let grad_norm = Optimizer::gradient_norm(&mut self.backend, &self.model.parameters);
        let (lr, decay) = (self.schedule.lr(step), self.schedule.weight_decay(step));
        let rule = SpikeRule {
            sigma: self.options.spike_sigma,
            grad_clip: self.options.grad_clip,
        };
        let skipped = self.guard.inspect(loss + divergence, grad_norm, rule).err();
        let scale = clip_scale(grad_norm, self.options.grad_clip);
        let mut projection = ProjectStats::default();
        if skipped.is_none() {
            self.wait_for_saver();
            let parameters = &self.model.parameters;
            self.optimizer
                .step(&mut self.backend, parameters, lr, decay, scale);
            projection = self.project()?;
        }
        self.step += 1;
        let clipped = scale < 1.0;
        Ok(StepOutcome {
            loss,
            divergence: self.teacher.is_some().then_some(divergence),
            grad_norm,
            lr,
            clipped,
            epoch,
            skipped,
            projection,
        })
    }

    /// Forward and backward over all micro-batches; returns the mean loss and the mean
    /// divergence from the teacher (0 without one) over the targets that count, and leaves
    /// the gradients of their mix.
    fn accumulate(&mut self) -> (f64, f64) {
        for gradient in self.model.parameters.list.iter().filter_map(|p| p.grad) {
            self.backend.zero(gradient);
        }
        let rows = self.batch.inputs.len();
        debug_assert!(self.options.micro_rows.is_multiple_of(self.options.seq_len));
        let counts = |target: &&u32| **target != IGNORE_TARGET;
        // A batch without any target that counts has no loss and teaches nothing.
        let num_targets = self.batch.targets.iter().filter(counts).count().max(1) as f64;
        let (mut total, mut divergence) = (0.0, 0.0);
        for start in (0..rows).step_by(self.options.micro_rows) {
            let n = self.options.micro_rows.min(rows - start);
            let batch = &mut self.batch;
            batch.select(start, n);
            let (inputs, targets) = (
                &batch.inputs[start..start + n],
                &batch.targets[start..start + n],
            );
            let b = &mut self.backend;
            self.model.dropout = (self.options.dropout > 0.0).then_some(StepDropout {
                share: self.options.dropout,
                seed: self.options.seed,
                step: self.step,
                first_row: start,
            });
            self.model
                .write_batch(b, inputs, &batch.positions[..n], targets);
            self.model.forward(b, n, &batch.segments);
            let scale = Some(1.0 / num_targets);
            let teacher = self.teacher.as_ref().map(|model| {
                model.write_batch(b, inputs, &batch.positions[..n], &[]);
                model.forward(b, n, &batch.segments);
                Teacher {
                    model,
                    weight: self.options.teacher_weight,
                    temperature: self.options.temperature,
                }
            });
            let segments = &batch.segments;
            self.model.loss_and_backward(b, n, segments, scale, teacher);
            let sum = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>();
            self.model.read_losses(b, &mut batch.losses[..n]);
            total += sum(&batch.losses[..n]);
            if teacher.is_some() {
                self.model.read_divergences(b, &mut batch.losses[..n]);
                divergence += sum(&batch.losses[..n]);
            }
        }
        // Evaluations leave nothing out.
        self.model.dropout = None;
        (total / num_targets, divergence / num_targets)
    }
}

/// Factor that brings the norm down to `clip` (0: off), as PyTorch's `clip_grad_norm_`.
pub(crate) fn clip_scale(grad_norm: f64, clip: f64) -> f64 {
    if clip > 0.0 {
        (clip / (grad_norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}
