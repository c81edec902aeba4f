//! `setun bench matmul`: the three products of each matrix of a model.

use super::machine::Limits as Peaks;
use super::{Bench, Figure, Limit, Unit, train, uniform};
use crate::args::Shape;
use setun_backend::{ActBuf, Backend, Buf, Category, Host, Limits, Plan, TernaryBuf};
use setun_backend::{WeightBuf, WeightData};
use setun_ternary::{ScaleRule, groups_per_row};
use std::error::Error;

const GROUP: usize = 128;

/// Products `[rows, inp] x [out, inp]`.
struct Matrix {
    name: &'static str,
    rows: usize,
    out: usize,
    inp: usize,
}

/// The matrices of a layer and the head, with the rows of a micro-batch.
pub(super) fn run(bench: &Bench, shape: Shape) -> Result<Vec<Figure>, Box<dyn Error>> {
    let settings = train::settings(shape, (None, None))?;
    let model = &settings.model;
    let rows = settings.train.micro_batch_size * settings.train.seq_len;
    let query = model.num_attention_heads * model.head_dim;
    let key = model.num_key_value_heads * model.head_dim;
    let (hidden, inner) = (model.hidden_size, model.intermediate_size);
    let vocab = settings.tokenizer.vocab_size;
    // Logits exist for a chunk of rows at a time.
    let chunk = match settings.train.head_chunk {
        0 => ((16 << 20) / 4 / vocab).clamp(1, 512),
        rows => rows,
    };
    let matrix = |name, out, inp| Matrix {
        name,
        rows,
        out,
        inp,
    };
    let matrices = [
        matrix("q_proj", query, hidden),
        matrix("k_proj", key, hidden),
        matrix("o_proj", hidden, query),
        matrix("gate_proj", inner, hidden),
        matrix("down_proj", hidden, inner),
        Matrix {
            rows: chunk.min(rows),
            ..matrix("lm_head", vocab, hidden)
        },
    ];
    let peaks = Peaks::measure(bench);
    let figures = matrices.iter().flat_map(|m| products(bench, m, &peaks));
    Ok(figures.collect())
}

/// Buffers of one matrix.
struct Products {
    x: ActBuf<f32>,
    weight: WeightBuf<f32>,
    y: Buf<f32>,
    dx: Buf<f32>,
    dw: Buf<f32>,
}

fn prepare(bench: &Bench, m: &Matrix) -> (Host<f32>, Products) {
    let mut plan = Plan::new();
    let mut real = |n| plan.alloc::<f32>(Category::Activations, "values", n);
    let (dx, y) = (real(m.rows * m.inp), real(m.rows * m.out));
    let dw = real(m.out * m.inp);
    let groups = groups_per_row(m.inp, GROUP);
    let x = ActBuf::Int8 {
        q: plan.alloc(Category::Activations, "x", m.rows * m.inp),
        scales: plan.alloc(Category::Activations, "x scales", m.rows * groups),
        group_size: GROUP,
    };
    let ternary = TernaryBuf {
        trits: plan.alloc(Category::Parameters, "trits", m.out * m.inp),
        scales: plan.alloc(Category::Parameters, "scales", m.out * groups),
        group_size: GROUP,
    };
    let limits = Limits {
        width: m.inp,
        head_dim: 1,
        group_size: GROUP,
    };
    let mut host = bench.host(&mut plan, limits);
    host.write(dx, &uniform(1, m.rows * m.inp));
    host.round_activation(dx, m.inp, x);
    host.write(dw, &uniform(2, m.out * m.inp));
    host.project(dw, m.inp, ScaleRule::Mean, ternary)
        .expect("values below 1 have scales");
    host.zero(dw);
    let weight = WeightBuf {
        out: m.out,
        inp: m.inp,
        data: WeightData::Ternary(ternary),
    };
    let products = Products {
        x,
        weight,
        y,
        dx,
        dw,
    };
    (host, products)
}

fn products(bench: &Bench, m: &Matrix, peaks: &Peaks) -> [Figure; 3] {
    let (mut host, p) = prepare(bench, m);
    let figure = |kind, seconds, limit: Limit| Figure {
        name: format!("{} {kind} {} x {} x {}", m.name, m.rows, m.out, m.inp),
        seconds,
        work: m.rows as f64 * m.out as f64 * m.inp as f64,
        unit: Unit::MultiplyAdds,
        limit: Some(limit),
        facts: Vec::new(),
    };
    let forward = bench.median(|| host.linear(p.x, p.weight, p.y));
    // Random numbers, so that the gradients are what backward products meet.
    host.write(p.y, &uniform(3, m.rows * m.out));
    let dx = bench.median(|| host.linear_dx(p.y, p.weight, p.dx, false, false));
    let dw = bench.median(|| host.linear_dw(p.y, p.x, m.out, m.inp, p.dw));
    [
        figure("int8 forward", forward, peaks.int8),
        figure("bf16 dx", dx, peaks.bf16),
        figure("bf16 dw", dw, peaks.bf16),
    ]
}
