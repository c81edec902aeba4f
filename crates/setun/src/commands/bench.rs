//! `setun bench`: rates, the machine's own limits in the same run, and their ratio.

mod attention;
mod decode;
mod machine;
mod matmul;
mod norm;
mod speculate;
mod train;

use crate::args::{BenchArgs, Benchmark, Decoding};
use crate::environment::Environment;
use crate::{CommandResult, Outcome};
use serde_json::{Value, json};
use setun_backend::{Isa, Limits, Plan};
use std::error::Error;
use std::time::Instant;

pub(super) use super::console;

/// One line of a benchmark.
struct Figure {
    name: String,
    /// Median time of one measurement, in seconds.
    seconds: f64,
    /// Work of one measurement, in units of `unit`.
    work: f64,
    unit: Unit,
    /// What the machine could do at most, in the same unit a second.
    limit: Option<Limit>,
    /// What else is worth knowing, by name.
    facts: Vec<(&'static str, f64)>,
}

/// A limit of the machine.
#[derive(Clone, Copy)]
struct Limit {
    name: &'static str,
    rate: f64,
}

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    MultiplyAdds,
    Bytes,
    Tokens,
}

impl Unit {
    /// How many make the unit that is printed, and its name.
    fn printed(self) -> (f64, &'static str) {
        match self {
            Self::MultiplyAdds => (1e9, "G MAC/s"),
            Self::Bytes => (1e9, "GB/s"),
            Self::Tokens => (1.0, "tokens/s"),
        }
    }
}

impl Figure {
    fn rate(&self) -> f64 {
        self.work / self.seconds
    }

    fn to_json(&self) -> Value {
        let (scale, unit) = self.unit.printed();
        let mut figure = json!({
            "name": self.name,
            "seconds": self.seconds,
            "rate": self.rate() / scale,
            "unit": unit,
        });
        if let Some(limit) = self.limit {
            figure["limit"] = json!(limit.rate / scale);
            figure["limit_name"] = json!(limit.name);
            figure["ratio"] = json!(self.rate() / limit.rate);
        }
        for (name, fact) in &self.facts {
            figure[*name] = json!(fact);
        }
        figure
    }

    fn print(&self) -> std::io::Result<()> {
        let (scale, unit) = self.unit.printed();
        let mut line = format!(
            "{:<44}{:>9.2} ms{:>10.1} {unit}",
            self.name,
            self.seconds * 1e3,
            self.rate() / scale
        );
        if let Some(limit) = self.limit {
            let share = 100.0 * self.rate() / limit.rate;
            let most = limit.rate / scale;
            line += &format!("  {share:>5.1} % of {most:.1} ({})", limit.name);
        }
        for (name, fact) in &self.facts {
            line += &match fact.abs() {
                1e-3.. => format!("  {name} {fact:.3}"),
                _ => format!("  {name} {fact:.1e}"),
            };
        }
        say!("{line}");
        Ok(())
    }
}

/// What every benchmark runs with.
struct Bench {
    isa: Isa,
    threads: usize,
    repeat: usize,
}

impl Bench {
    /// Median time of `run`, in seconds, after one run that warms up.
    fn median(&self, mut run: impl FnMut()) -> f64 {
        run();
        let mut times: Vec<f64> = (0..self.repeat)
            .map(|_| {
                let start = Instant::now();
                run();
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let middle = times.len() / 2;
        match times.len() % 2 {
            0 => (times[middle - 1] + times[middle]) / 2.0,
            _ => times[middle],
        }
    }

    /// A backend for `plan`.
    fn host(&self, plan: &mut Plan, limits: Limits) -> setun_backend::Host<f32> {
        let workspace = setun_backend::HostWorkspace::reserve(plan, self.threads, limits);
        setun_backend::Host::new(plan, workspace, self.isa)
    }
}

/// Values from -1 up to 1, the same in every run: a hash of the index (Wellons, 2018,
/// "lowbias32"), simple enough that `bench/compare_torch.py` has it too.
fn uniform(stream: u32, len: usize) -> Vec<f32> {
    let value = |i: usize| {
        let mut x = (i as u32).wrapping_add(stream.wrapping_mul(0x9e37_79b9));
        x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
        x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(value).collect()
}

/// `setun bench`
pub fn bench(args: BenchArgs, environment: &Environment) -> CommandResult {
    let bench = Bench {
        isa: super::isa(environment)?,
        threads: setun_train::machine::threads(args.threads),
        repeat: args.repeat,
    };
    if let Benchmark::Decoding(decoding) = &args.benchmark
        && decoding.what == Decoding::Kv
    {
        decode::print_memory(decoding, args.json)?;
        return Ok(Outcome::Success);
    }
    let figures = run(&bench, &args.benchmark)?;
    if args.json {
        let machine = setun_train::machine::describe(bench.isa, bench.threads);
        let figures: Vec<Value> = figures.iter().map(Figure::to_json).collect();
        let record = json!({
            "code_version": setun_train::machine::code_version(),
            "machine": machine,
            "repeat": bench.repeat,
            "figures": figures,
        });
        say!("{}", serde_json::to_string_pretty(&record)?);
        return Ok(Outcome::Success);
    }
    say!("{}, {} threads", bench.isa.name(), bench.threads);
    for figure in &figures {
        figure.print()?;
    }
    Ok(Outcome::Success)
}

fn run(bench: &Bench, benchmark: &Benchmark) -> Result<Vec<Figure>, Box<dyn Error>> {
    Ok(match benchmark {
        Benchmark::Peak => machine::peaks(bench),
        Benchmark::Bandwidth => vec![machine::bandwidth(bench)],
        Benchmark::Matmul { shape } => matmul::run(bench, *shape)?,
        Benchmark::Attention {
            seq,
            head_dim,
            heads,
        } => attention::run(bench, seq, head_dim, *heads),
        Benchmark::LayerNorm { rows, widths } => norm::run(bench, *rows, widths),
        Benchmark::Train {
            shape,
            batch_size,
            seq_len,
            profile,
        } => train::run(bench, *shape, (*batch_size, *seq_len), *profile)?,
        Benchmark::Speculate(args) => speculate::run(bench, args)?,
        Benchmark::Decoding(args) => decode::run(bench, args)?,
    })
}
