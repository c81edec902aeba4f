//! `setun bench peak` and `bandwidth`, and the limits beside other figures.

use super::{Bench, Figure, Limit, Unit};
use setun_backend::cpu::{Pool, peak};

/// Rounds of a measurement: some 20 milliseconds.
const ROUNDS: usize = 400_000;
/// Bytes that are read: more than any cache of this decade's processors.
const BYTES: usize = 512 << 20;

/// Peaks on one thread and on all.
pub(super) fn peaks(bench: &Bench) -> Vec<Figure> {
    let mut threads = vec![1];
    if bench.threads > 1 {
        threads.push(bench.threads);
    }
    let pairs = threads.into_iter().flat_map(|threads| {
        let pool = Pool::new(threads);
        [fma(bench, &pool), bf16(bench, &pool), int8(bench, &pool)]
    });
    pairs.collect()
}

fn fma(bench: &Bench, pool: &Pool) -> Figure {
    let mut work = 0.0;
    let seconds = bench.median(|| work = peak::fma(pool, bench.isa, ROUNDS));
    figure("f32 peak", pool, seconds, work, Unit::MultiplyAdds)
}

fn bf16(bench: &Bench, pool: &Pool) -> Figure {
    let mut work = 0.0;
    let seconds = bench.median(|| work = peak::bf16(pool, bench.isa, ROUNDS));
    figure("bf16 peak", pool, seconds, work, Unit::MultiplyAdds)
}

fn int8(bench: &Bench, pool: &Pool) -> Figure {
    let mut work = 0.0;
    let seconds = bench.median(|| work = peak::int8(pool, bench.isa, ROUNDS));
    figure("int8 peak", pool, seconds, work, Unit::MultiplyAdds)
}

/// Reading main memory.
pub(super) fn bandwidth(bench: &Bench) -> Figure {
    let pool = Pool::new(bench.threads);
    // Not zero, or the system might map every page to the same one.
    let values = vec![1u64; BYTES / 8];
    let seconds = bench.median(|| {
        std::hint::black_box(peak::read(&pool, bench.isa, &values));
    });
    figure("read bandwidth", &pool, seconds, BYTES as f64, Unit::Bytes)
}

fn figure(name: &str, pool: &Pool, seconds: f64, work: f64, unit: Unit) -> Figure {
    Figure {
        name: format!("{name}, {} threads", pool.threads()),
        seconds,
        work,
        unit,
        limit: None,
        facts: Vec::new(),
    }
}

/// What the machine can do at most on the threads of a benchmark.
pub(super) struct Limits {
    /// Products of bf16 values.
    pub bf16: Limit,
    /// Products of bytes.
    pub int8: Limit,
}

impl Limits {
    pub(super) fn measure(bench: &Bench) -> Self {
        let pool = Pool::new(bench.threads);
        let limit = |name, figure: Figure| Limit {
            name,
            rate: figure.rate(),
        };
        Self {
            bf16: limit("bf16 peak", bf16(bench, &pool)),
            int8: limit("int8 peak", int8(bench, &pool)),
        }
    }
}

/// The limit of what memory feeds.
pub(super) fn memory_limit(bench: &Bench) -> Limit {
    Limit {
        name: "read bandwidth",
        rate: bandwidth(bench).rate(),
    }
}
