//! Where the time of a training step goes, operation by operation: `setun train --profile`.
//!
//! [`Profiled`] stands between a trainer and its backend. Switched off it costs one branch
//! an operation; switched on, two readings of the clock. It changes no result.

use serde::Serialize;
use setun_backend::topk::{Kept, TopK};
use setun_backend::{
    ActBuf, AdamW, Attention, AttentionBackward, AttnBuf, Backend, Buf, CacheBuf, CacheStore,
    CachedAttention, CrossEntropy, Distillation, Dropout, Extent, LayerNorm, LayerNormBackward,
    NormRope, PackedBuf, ProjectError, ProjectStats, RmsNorm, Segment, TernaryBuf, WeightBuf,
};
use setun_ternary::{PackedMatrix, ScaleRule};
use std::fmt;
use std::time::Instant;

/// Name of the file in the run directory.
pub const PROFILE_FILE: &str = "profile.json";

/// The operations that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Zero,
    CopyAdd,
    Project,
    Embedding,
    EmbeddingBackward,
    RmsNorm,
    RmsNormBackward,
    LayerNorm,
    LayerNormBackward,
    NormRope,
    NormRopeBackward,
    Round,
    Linear,
    LinearDx,
    LinearDw,
    Attention,
    AttentionBackward,
    Swiglu,
    SwigluBackward,
    CrossEntropy,
    Distill,
    Blend,
    Dropout,
    GradientNorm,
    AdamW,
}

/// Names in the order of [`Op`].
const NAMES: [&str; 25] = [
    "zero gradients",
    "copy, add",
    "project",
    "embedding",
    "embedding backward",
    "rms norm",
    "rms norm backward",
    "layer norm",
    "layer norm backward",
    "norm + rope",
    "norm + rope backward",
    "round",
    "linear",
    "linear dx",
    "linear dw",
    "attention",
    "attention backward",
    "swiglu",
    "swiglu backward",
    "cross entropy",
    "distill",
    "blend",
    "dropout",
    "gradient norm",
    "adamw",
];

/// What one operation did.
#[derive(Clone, Copy, Default)]
struct Entry {
    calls: u64,
    seconds: f64,
    multiply_adds: f64,
}

/// A backend whose operations can be timed.
pub struct Profiled<B> {
    inner: B,
    /// One for each operation; none where nothing is profiled.
    entries: Option<Box<[Entry; NAMES.len()]>>,
    /// Whether a step is in progress: evaluations are not counted.
    in_step: Option<Instant>,
    steps: u64,
    seconds: f64,
}

impl<B> Profiled<B> {
    /// Wraps a backend; `enabled` decides for the whole run.
    pub fn new(inner: B, enabled: bool) -> Self {
        Self {
            inner,
            entries: enabled.then(|| Box::new([Entry::default(); NAMES.len()])),
            in_step: None,
            steps: 0,
            seconds: 0.0,
        }
    }

    /// From here on operations count.
    pub fn begin_step(&mut self) {
        self.in_step = self.entries.is_some().then(Instant::now);
    }

    /// From here on they do not.
    pub fn end_step(&mut self) {
        if let Some(start) = self.in_step.take() {
            self.seconds += start.elapsed().as_secs_f64();
            self.steps += 1;
        }
    }

    /// What was measured, if anything.
    pub fn profile(&self) -> Option<Profile> {
        let entries = self.entries.as_ref().filter(|_| self.steps > 0)?;
        let mut operations: Vec<OperationTime> = entries
            .iter()
            .zip(NAMES)
            .filter(|(entry, _)| entry.calls > 0)
            .map(|(entry, name)| OperationTime::new(name, *entry, self.seconds))
            .collect();
        operations.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let inside: f64 = operations.iter().map(|op| op.seconds).sum();
        let outside = Entry {
            calls: self.steps,
            seconds: (self.seconds - inside).max(0.0),
            multiply_adds: 0.0,
        };
        operations.push(OperationTime::new("everything else", outside, self.seconds));
        Some(Profile {
            steps: self.steps,
            seconds_per_step: self.seconds / self.steps as f64,
            operations,
        })
    }

    /// Runs one operation of `work` multiply-adds.
    #[inline]
    fn timed<T>(&mut self, op: Op, work: impl FnOnce() -> f64, run: impl FnOnce(&mut B) -> T) -> T {
        let (Some(entries), Some(_)) = (&mut self.entries, self.in_step) else {
            return run(&mut self.inner);
        };
        let start = Instant::now();
        let result = run(&mut self.inner);
        let entry = &mut entries[op as usize];
        entry.seconds += start.elapsed().as_secs_f64();
        entry.calls += 1;
        entry.multiply_adds += work();
        result
    }
}

/// Time of a training step by operation.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Steps that were measured.
    pub steps: u64,
    /// Mean time of a step, in seconds.
    pub seconds_per_step: f64,
    /// Operations, the most expensive first, and last what no operation accounts for.
    pub operations: Vec<OperationTime>,
}

/// Time of one operation over all steps.
#[derive(Clone, Debug, Serialize)]
pub struct OperationTime {
    /// Name.
    pub name: &'static str,
    /// How often it ran.
    pub calls: u64,
    /// Seconds in all.
    pub seconds: f64,
    /// Share of the steps' time.
    pub share: f64,
    /// Multiply-adds of products, in all; 0 where memory is the limit.
    pub multiply_adds: f64,
    /// Multiply-adds a second.
    pub multiply_adds_per_second: Option<f64>,
}

impl OperationTime {
    fn new(name: &'static str, entry: Entry, all: f64) -> Self {
        let rate = (entry.multiply_adds > 0.0).then(|| entry.multiply_adds / entry.seconds);
        Self {
            name,
            calls: entry.calls,
            seconds: entry.seconds,
            share: entry.seconds / all,
            multiply_adds: entry.multiply_adds,
            multiply_adds_per_second: rate.filter(|rate| rate.is_finite()),
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = self.steps as f64;
        let each = self.seconds_per_step * 1e3;
        writeln!(f, "profile: {} steps of {each:.1} ms", self.steps)?;
        write!(
            f,
            "{:<22}{:>8}{:>12}{:>8}{:>12}",
            "operation", "calls", "ms a step", "share", "G MAC/s"
        )?;
        for op in &self.operations {
            let rate = op.multiply_adds_per_second;
            let rate = rate.map_or(String::new(), |rate| format!("{:.1}", rate * 1e-9));
            write!(
                f,
                "\n{:<22}{:>8}{:>12.2}{:>7.1}%{rate:>12}",
                op.name,
                op.calls / self.steps,
                op.seconds * 1e3 / steps,
                op.share * 100.0
            )?;
        }
        Ok(())
    }
}

/// Multiply-adds of one product with every visible pair of an attention.
fn attention_work<R>(op: &Attention<'_, R>) -> f64 {
    let pairs = |s: &Segment| {
        let (q, kv) = (s.q_len as f64, s.kv_len as f64);
        q * (kv - q) + q * (q + 1.0) / 2.0
    };
    op.segments.iter().map(pairs).sum::<f64>() * (op.num_heads * op.head_dim) as f64
}

fn product(outputs: usize, depth: usize) -> f64 {
    outputs as f64 * depth as f64
}

fn none() -> f64 {
    0.0
}

impl<B: Backend> Backend for Profiled<B> {
    type Real = B::Real;
    type Shared = B::Shared;

    fn threads(&self) -> usize {
        self.inner.threads()
    }

    fn read<T: bytemuck::Pod>(&self, buf: Buf<T>, out: &mut [T]) {
        self.inner.read(buf, out);
    }

    fn write<T: bytemuck::Pod>(&mut self, buf: Buf<T>, values: &[T]) {
        self.inner.write(buf, values);
    }

    fn share(&mut self, extents: &[Extent]) -> B::Shared {
        self.inner.share(extents)
    }

    // Decoding has no part in a training step.
    fn packed_len(out: usize, inp: usize, group_size: usize) -> usize {
        B::packed_len(out, inp, group_size)
    }

    fn write_packed(&mut self, to: PackedBuf, rows: (usize, usize), matrix: &PackedMatrix) {
        self.inner.write_packed(to, rows, matrix);
    }

    fn linear_topk(
        &mut self,
        x: ActBuf<B::Real>,
        w: WeightBuf<B::Real>,
        logits: Buf<B::Real>,
        wanted: TopK<'_>,
        kept: &mut Kept,
    ) {
        self.inner.linear_topk(x, w, logits, wanted, kept);
    }

    fn cache_store(&mut self, op: CacheStore<'_, B::Real>) {
        self.inner.cache_store(op);
    }

    fn cache_move(&mut self, cache: CacheBuf, moves: &[(u32, u32)]) {
        self.inner.cache_move(cache, moves);
    }

    fn cached_attention(&mut self, op: CachedAttention<'_, B::Real>) {
        self.inner.cached_attention(op);
    }

    fn zero<T: bytemuck::Pod>(&mut self, buf: Buf<T>) {
        self.timed(Op::Zero, none, |b| b.zero(buf));
    }

    fn copy(&mut self, from: Buf<B::Real>, to: Buf<B::Real>) {
        self.timed(Op::CopyAdd, none, |b| b.copy(from, to));
    }

    fn add(&mut self, from: Buf<B::Real>, to: Buf<B::Real>) {
        self.timed(Op::CopyAdd, none, |b| b.add(from, to));
    }

    fn lerp(&mut self, from: Buf<B::Real>, share: f64, to: Buf<B::Real>) {
        self.timed(Op::CopyAdd, none, |b| b.lerp(from, share, to));
    }

    fn project(
        &mut self,
        latent: Buf<B::Real>,
        cols: usize,
        rule: ScaleRule,
        to: TernaryBuf,
    ) -> Result<ProjectStats, ProjectError> {
        self.timed(Op::Project, none, |b| b.project(latent, cols, rule, to))
    }

    fn embedding(&mut self, ids: Buf<u32>, weight: WeightBuf<B::Real>, y: Buf<B::Real>) {
        self.timed(Op::Embedding, none, |b| b.embedding(ids, weight, y));
    }

    fn embedding_backward(&mut self, ids: Buf<u32>, dy: Buf<B::Real>, dweight: Buf<B::Real>) {
        self.timed(Op::EmbeddingBackward, none, |b| {
            b.embedding_backward(ids, dy, dweight);
        });
    }

    fn rms_norm(&mut self, norm: RmsNorm<B::Real>, y: ActBuf<B::Real>) {
        self.timed(Op::RmsNorm, none, |b| b.rms_norm(norm, y));
    }

    fn rms_norm_backward(
        &mut self,
        norm: RmsNorm<B::Real>,
        dy: Buf<B::Real>,
        dx: Buf<B::Real>,
        dweight: Buf<B::Real>,
    ) {
        self.timed(Op::RmsNormBackward, none, |b| {
            b.rms_norm_backward(norm, dy, dx, dweight);
        });
    }

    fn layer_norm(&mut self, op: LayerNorm<B::Real>, y: ActBuf<B::Real>) {
        self.timed(Op::LayerNorm, none, |b| b.layer_norm(op, y));
    }

    fn layer_norm_backward(&mut self, op: LayerNormBackward<B::Real>) {
        self.timed(Op::LayerNormBackward, none, |b| b.layer_norm_backward(op));
    }

    fn norm_rope(&mut self, op: NormRope<B::Real>, y: AttnBuf<B::Real>) {
        self.timed(Op::NormRope, none, |b| b.norm_rope(op, y));
    }

    fn norm_rope_backward(
        &mut self,
        op: NormRope<B::Real>,
        dy: Buf<B::Real>,
        dweight: Buf<B::Real>,
    ) {
        self.timed(Op::NormRopeBackward, none, |b| {
            b.norm_rope_backward(op, dy, dweight);
        });
    }

    fn round_activation(&mut self, x: Buf<B::Real>, width: usize, y: ActBuf<B::Real>) {
        self.timed(Op::Round, none, |b| b.round_activation(x, width, y));
    }

    fn round_attention(&mut self, x: Buf<B::Real>, y: AttnBuf<B::Real>) {
        self.timed(Op::Round, none, |b| b.round_attention(x, y));
    }

    fn linear(&mut self, x: ActBuf<B::Real>, w: WeightBuf<B::Real>, y: Buf<B::Real>) {
        let work = || product(y.len(), w.inp);
        self.timed(Op::Linear, work, |b| b.linear(x, w, y));
    }

    fn linear_dx(
        &mut self,
        dy: Buf<B::Real>,
        w: WeightBuf<B::Real>,
        dx: Buf<B::Real>,
        numerics_f32: bool,
        accumulate: bool,
    ) {
        let work = || product(dx.len(), w.out);
        self.timed(Op::LinearDx, work, |b| {
            b.linear_dx(dy, w, dx, numerics_f32, accumulate);
        });
    }

    fn linear_dw(
        &mut self,
        dy: Buf<B::Real>,
        x: ActBuf<B::Real>,
        out: usize,
        inp: usize,
        dw: Buf<B::Real>,
    ) {
        let work = || product(dy.len(), inp);
        self.timed(Op::LinearDw, work, |b| b.linear_dw(dy, x, out, inp, dw));
    }

    fn attention(&mut self, op: Attention<'_, B::Real>) {
        let work = || 2.0 * attention_work(&op);
        self.timed(Op::Attention, work, |b| b.attention(op));
    }

    // Five products: the scores again, dp, dq, dk and dv.
    fn attention_backward(&mut self, op: AttentionBackward<'_, B::Real>) {
        let work = || 5.0 * attention_work(&op.forward);
        self.timed(Op::AttentionBackward, work, |b| b.attention_backward(op));
    }

    fn swiglu(&mut self, gate: Buf<B::Real>, up: Buf<B::Real>, width: usize, y: ActBuf<B::Real>) {
        self.timed(Op::Swiglu, none, |b| b.swiglu(gate, up, width, y));
    }

    fn swiglu_backward(&mut self, dy: Buf<B::Real>, gate: Buf<B::Real>, up: Buf<B::Real>) {
        self.timed(Op::SwigluBackward, none, |b| {
            b.swiglu_backward(dy, gate, up)
        });
    }

    fn cross_entropy(&mut self, op: CrossEntropy<B::Real>) {
        self.timed(Op::CrossEntropy, none, |b| b.cross_entropy(op));
    }

    fn distill(&mut self, op: Distillation<B::Real>) {
        self.timed(Op::Distill, none, |b| b.distill(op));
    }

    fn blend(
        &mut self,
        latent: Buf<B::Real>,
        cols: usize,
        ternary: TernaryBuf,
        share: f64,
        to: Buf<B::Real>,
    ) {
        self.timed(Op::Blend, none, |b| {
            b.blend(latent, cols, ternary, share, to)
        });
    }

    fn dropout(&mut self, op: Dropout<B::Real>) {
        self.timed(Op::Dropout, none, |b| b.dropout(op));
    }

    fn sum_squares(&mut self, x: Buf<B::Real>) -> f64 {
        self.timed(Op::GradientNorm, none, |b| b.sum_squares(x))
    }

    fn adamw(&mut self, op: AdamW<B::Real>) {
        self.timed(Op::AdamW, none, |b| b.adamw(op));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_backend::{Category, Host, HostWorkspace, Isa, Limits, Plan};

    fn host(plan: &mut Plan) -> Host<f32> {
        let limits = Limits {
            width: 8,
            head_dim: 2,
            group_size: 8,
        };
        let workspace = HostWorkspace::reserve(plan, 1, limits);
        Host::new(plan, workspace, Isa::Reference)
    }

    #[test]
    fn only_the_operations_of_a_step_are_counted() {
        let mut plan = Plan::new();
        let [a, b] = ["a", "b"].map(|name| plan.alloc::<f32>(Category::Activations, name, 100));
        let mut backend = Profiled::new(host(&mut plan), true);
        backend.write(a, &[2.0; 100]);
        backend.add(a, b);
        assert!(backend.profile().is_none());
        for _ in 0..2 {
            backend.begin_step();
            backend.add(a, b);
            backend.add(a, b);
            backend.end_step();
        }
        assert_eq!(backend.sum_squares(b), 100.0 * 100.0);
        let profile = backend.profile().expect("two steps");
        let names: Vec<_> = profile
            .operations
            .iter()
            .map(|op| (op.name, op.calls))
            .collect();
        assert_eq!(names, [("copy, add", 4), ("everything else", 2)]);
        let shares: f64 = profile.operations.iter().map(|op| op.share).sum();
        assert!((shares - 1.0).abs() < 1e-9);
    }

    #[test]
    fn work_of_products_is_counted() {
        let mut plan = Plan::new();
        let buf = |plan: &mut Plan, n| plan.alloc::<f32>(Category::Activations, "values", n);
        let (dy, x, dw) = (buf(&mut plan, 30), buf(&mut plan, 40), buf(&mut plan, 12));
        let mut backend = Profiled::new(host(&mut plan), true);
        backend.begin_step();
        backend.linear_dw(dy, ActBuf::Real(x), 3, 4, dw);
        backend.end_step();
        let profile = backend.profile().expect("a step");
        assert_eq!(profile.operations[0].multiply_adds, 10.0 * 3.0 * 4.0);
        assert!(profile.to_string().contains("linear dw"));
    }

    #[test]
    fn switched_off_nothing_is_measured() {
        let mut plan = Plan::new();
        let a = plan.alloc::<f32>(Category::Activations, "a", 4);
        let mut backend = Profiled::new(host(&mut plan), false);
        backend.begin_step();
        backend.zero(a);
        backend.end_step();
        assert!(backend.profile().is_none());
    }
}
