//! NaN or infinity anywhere in a step: nothing of it reaches weights or moments, one step
//! is skipped, and the run goes on as one that was told to skip it.

mod tiny;

use half::bf16;
use setun_backend::ops::{
    ActBuf, AdamW, Attention, AttentionBackward, AttnBuf, CrossEntropy, Distillation, Dropout,
    LayerNorm, LayerNormBackward, NormRope, RmsNorm, TernaryBuf, WeightBuf,
};
use setun_backend::ops::{ProjectError, ProjectStats};
use setun_backend::topk::{Kept, TopK};
use setun_backend::{Backend, Buf, CacheBuf, CacheStore, CachedAttention, Host, PackedBuf};
use setun_ternary::{PackedMatrix, ScaleRule};
use setun_train::trainer::Trainer;
use tiny::{Random, Scratch, State};

/// An output of an operation.
#[derive(Clone, Copy)]
enum Output {
    Real(Buf<f32>),
    Bf16(Buf<bf16>),
}

impl From<ActBuf<f32>> for Output {
    fn from(act: ActBuf<f32>) -> Self {
        match act {
            ActBuf::Real(x) => Self::Real(x),
            ActBuf::Bf16(x) => Self::Bf16(x),
            // The integers cannot be bad.
            ActBuf::Int8 { scales, .. } => Self::Real(scales),
        }
    }
}

impl From<AttnBuf<f32>> for Output {
    fn from(x: AttnBuf<f32>) -> Self {
        match x {
            AttnBuf::Real(x) => Self::Real(x),
            AttnBuf::Bf16(x) => Self::Bf16(x),
        }
    }
}

/// A point in a step: the operation with this number leaves `value` in one of its outputs.
#[derive(Clone, Copy, Debug)]
struct Point {
    operation: u64,
    output: u64,
    place: u64,
    value: f32,
}

/// The host, which puts a bad number at one point of forward or backward.
struct Poisoned {
    host: Host<f32>,
    operations: u64,
    point: Option<Point>,
    /// Name of the operation that was hit.
    hit: Option<&'static str>,
}

impl Poisoned {
    fn after(&mut self, name: &'static str, outputs: &[Output]) {
        let number = self.operations;
        self.operations += 1;
        let Some(point) = self.point.filter(|point| point.operation == number) else {
            return;
        };
        let place = |len: usize| (point.place % len as u64) as usize;
        match outputs[(point.output % outputs.len() as u64) as usize] {
            Output::Real(x) => self.host.write(x.part(place(x.len()), 1), &[point.value]),
            Output::Bf16(x) => {
                let value = bf16::from_f32(point.value);
                self.host.write(x.part(place(x.len()), 1), &[value]);
            }
        }
        self.hit = Some(name);
    }
}

macro_rules! poisoned {
    ($( $name:ident ( $($arg:ident : $type:ty),* ) => [ $($output:expr),+ ]; )+) => {$(
        fn $name(&mut self, $($arg: $type),*) {
            self.host.$name($($arg),*);
            self.after(stringify!($name), &[$(Output::from($output)),+]);
        }
    )+};
}

impl From<Buf<f32>> for Output {
    fn from(x: Buf<f32>) -> Self {
        Self::Real(x)
    }
}

impl Backend for Poisoned {
    type Real = f32;
    type Shared = setun_backend::Shared;

    fn threads(&self) -> usize {
        self.host.threads()
    }
    fn read<T: bytemuck::Pod>(&self, buf: Buf<T>, out: &mut [T]) {
        self.host.read(buf, out);
    }
    fn write<T: bytemuck::Pod>(&mut self, buf: Buf<T>, values: &[T]) {
        self.host.write(buf, values);
    }
    fn share(&mut self, extents: &[setun_backend::Extent]) -> Self::Shared {
        self.host.share(extents)
    }
    fn zero<T: bytemuck::Pod>(&mut self, buf: Buf<T>) {
        self.host.zero(buf);
    }
    fn project(
        &mut self,
        latent: Buf<f32>,
        cols: usize,
        rule: ScaleRule,
        to: TernaryBuf,
    ) -> Result<ProjectStats, ProjectError> {
        self.host.project(latent, cols, rule, to)
    }
    fn blend(&mut self, from: Buf<f32>, cols: usize, t: TernaryBuf, share: f64, to: Buf<f32>) {
        self.host.blend(from, cols, t, share, to);
    }
    fn dropout(&mut self, op: Dropout<f32>) {
        self.host.dropout(op);
    }
    fn lerp(&mut self, from: Buf<f32>, share: f64, to: Buf<f32>) {
        self.host.lerp(from, share, to);
    }
    // No part of Qwen3.
    fn layer_norm(&mut self, op: LayerNorm<f32>, y: ActBuf<f32>) {
        self.host.layer_norm(op, y);
    }
    fn layer_norm_backward(&mut self, op: LayerNormBackward<f32>) {
        self.host.layer_norm_backward(op);
    }
    // Decoding has no part in a training step.
    fn packed_len(out: usize, inp: usize, group_size: usize) -> usize {
        Host::<f32>::packed_len(out, inp, group_size)
    }

    fn write_packed(&mut self, to: PackedBuf, rows: (usize, usize), matrix: &PackedMatrix) {
        self.host.write_packed(to, rows, matrix);
    }

    fn linear_topk(
        &mut self,
        x: ActBuf<f32>,
        w: WeightBuf<f32>,
        logits: Buf<f32>,
        wanted: TopK<'_>,
        kept: &mut Kept,
    ) {
        self.host.linear_topk(x, w, logits, wanted, kept);
    }

    fn cache_store(&mut self, op: CacheStore<'_, f32>) {
        self.host.cache_store(op);
    }

    fn cache_move(&mut self, cache: CacheBuf, moves: &[(u32, u32)]) {
        self.host.cache_move(cache, moves);
    }

    fn cached_attention(&mut self, op: CachedAttention<'_, f32>) {
        self.host.cached_attention(op);
    }

    fn sum_squares(&mut self, x: Buf<f32>) -> f64 {
        self.host.sum_squares(x)
    }
    fn adamw(&mut self, op: AdamW<f32>) {
        self.host.adamw(op);
    }

    poisoned! {
        copy(from: Buf<f32>, to: Buf<f32>) => [to];
        add(from: Buf<f32>, to: Buf<f32>) => [to];
        embedding(ids: Buf<u32>, weight: WeightBuf<f32>, y: Buf<f32>) => [y];
        embedding_backward(ids: Buf<u32>, dy: Buf<f32>, dweight: Buf<f32>) => [dweight];
        rms_norm(norm: RmsNorm<f32>, y: ActBuf<f32>) => [norm.inv, y];
        rms_norm_backward(n: RmsNorm<f32>, dy: Buf<f32>, dx: Buf<f32>, dw: Buf<f32>) => [dx, dw];
        norm_rope(op: NormRope<f32>, y: AttnBuf<f32>) => [op.norm.inv, y];
        norm_rope_backward(op: NormRope<f32>, dy: Buf<f32>, dweight: Buf<f32>) => [dy, dweight];
        round_activation(x: Buf<f32>, width: usize, y: ActBuf<f32>) => [y];
        round_attention(x: Buf<f32>, y: AttnBuf<f32>) => [y];
        linear(x: ActBuf<f32>, w: WeightBuf<f32>, y: Buf<f32>) => [y];
        linear_dx(dy: Buf<f32>, w: WeightBuf<f32>, dx: Buf<f32>, f: bool, add: bool) => [dx];
        linear_dw(dy: Buf<f32>, x: ActBuf<f32>, out: usize, inp: usize, dw: Buf<f32>) => [dw];
        attention(op: Attention<'_, f32>) => [op.out, op.lse];
        attention_backward(op: AttentionBackward<'_, f32>) => [op.dq, op.dk, op.dv];
        swiglu(gate: Buf<f32>, up: Buf<f32>, width: usize, y: ActBuf<f32>) => [y];
        swiglu_backward(dy: Buf<f32>, gate: Buf<f32>, up: Buf<f32>) => [gate, up];
        cross_entropy(op: CrossEntropy<f32>) => [op.logits, op.losses];
        distill(op: Distillation<f32>) => [op.student.logits, op.divergences];
    }
}

/// Clean steps of which each is hit in turn.
const STEPS: usize = 5;

/// Steps behind the bad one that are compared.
const LATER: usize = 2;

/// Losses and gradient norms of a few steps, as bits, and the state behind them.
fn go_on(
    trainer: &mut Trainer<Poisoned>,
    batches: &setun_train::data::Batches,
) -> (Vec<u64>, State) {
    let mut curve = Vec::new();
    for _ in 0..LATER {
        let outcome = trainer.step(batches).unwrap();
        assert_eq!(outcome.skipped, None);
        curve.extend([outcome.loss.to_bits(), outcome.grad_norm.to_bits()]);
    }
    (curve, tiny::state(trainer))
}

/// Hits `wanted` points that matter; returns how many did not: a bad number that nothing
/// reads, or an infinity that an exponential turns into zero, leaves all results finite.
fn hit(numerics: &str, wanted: usize, random: &mut Random) -> usize {
    let scratch = Scratch::new(&format!("bad-{numerics}"));
    let corpus = scratch.join("corpus.txt");
    std::fs::write(&corpus, tiny::corpus()).unwrap();
    let settings = tiny::settings(&corpus, &[("model.numerics", numerics)]);
    let batches = tiny::batches(&settings);
    let wrap = |host| Poisoned {
        host,
        operations: 0,
        point: None,
        hit: None,
    };
    let mut trainer = tiny::trainer(&settings, &batches, 1, wrap);
    let mut before = Vec::new();
    for _ in 0..STEPS {
        before.push(tiny::state(&trainer));
        trainer.backend.operations = 0;
        assert_eq!(trainer.step(&batches).unwrap().skipped, None);
    }
    let operations = trainer.backend.operations;
    let told: Vec<_> = before
        .iter()
        .map(|state| {
            tiny::restore(&mut trainer, state);
            trainer.skip_step();
            go_on(&mut trainer, &batches)
        })
        .collect();
    let (mut hits, mut harmless) = (0, 0);
    while hits < wanted {
        let step = random.below(STEPS as u64) as usize;
        let point = Point {
            operation: random.below(operations),
            output: random.below(60),
            place: random.below(1 << 31),
            value: [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3) as usize],
        };
        tiny::restore(&mut trainer, &before[step]);
        (trainer.backend.operations, trainer.backend.point) = (0, Some(point));
        let outcome = trainer.step(&batches).unwrap();
        trainer.backend.point = None;
        let name = trainer
            .backend
            .hit
            .take()
            .expect("an operation of the step");
        if outcome.skipped.is_none() {
            assert!(outcome.loss.is_finite() && outcome.grad_norm.is_finite());
            harmless += 1;
            continue;
        }
        hits += 1;
        let mut expected = before[step].clone();
        expected.step += 1;
        assert!(tiny::state(&trainer) == expected, "{name}: {point:?}");
        assert!(
            go_on(&mut trainer, &batches) == told[step],
            "{name}: {point:?}"
        );
    }
    harmless
}

#[test]
fn a_bad_number_changes_nothing_but_the_step() {
    let mut random = Random::new(1);
    for numerics in ["int8", "bf16"] {
        let harmless = hit(numerics, 50, &mut random);
        println!("{numerics}: 50 points, {harmless} others without effect");
        assert!(harmless < 25, "{harmless} bad numbers had no effect");
    }
}
