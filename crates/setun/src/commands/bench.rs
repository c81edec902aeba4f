//! `setun bench`: speed and memory of this machine, one line per figure.
//!
//! Every time is the median of its runs. The read bandwidth of memory is measured in the
//! same run, with the same threads, because a decode step is a walk through all weights.

use crate::args::{Bench, BenchArgs};
use crate::console;
use crate::environment::Environment;
use crate::{CommandResult, Outcome};
use setun_backend::cpu::Pool;
use setun_backend::philox::Philox;
use setun_backend::topk::softmax_topk;
use setun_backend::{CACHE_BLOCK, CacheKind, CacheShape, Isa};
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_infer::{Chunk, Engine, EngineOptions, Sequence, Wanted, load_parameters, spec_of};
use setun_io::OpenModel;
use setun_model::{ModelSpec, Scheme};
use setun_ternary::{Numerics, PackedMatrix, ScaleRule, packed_row_bytes};
use setun_train::machine;
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

/// Bytes that the bandwidth is measured over: more than any cache holds.
const BANDWIDTH_BYTES: usize = 256 << 20;

/// A result.
struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
}

/// Results as they come in.
#[derive(Default)]
struct Figures(Vec<Figure>);

impl Figures {
    fn add(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        let name = name.into();
        self.0.push(Figure { name, value, unit });
    }

    fn print(&self, json: bool) -> std::io::Result<()> {
        if json {
            let one = |f: &Figure| serde_json::json!({ "name": f.name, "value": f.value, "unit": f.unit });
            let all: Vec<_> = self.0.iter().map(one).collect();
            return console::print(format_args!("{}\n", serde_json::Value::Array(all)));
        }
        for f in &self.0 {
            console::print(format_args!(
                "{:<44} {:>14.3} {}\n",
                f.name, f.value, f.unit
            ))?;
        }
        Ok(())
    }
}

/// `setun bench`
pub fn bench(args: BenchArgs, environment: &Environment) -> CommandResult {
    let isa = super::isa(environment)?;
    let mut figures = Figures::default();
    match args.what {
        Bench::Decode => decode(&args, isa, &mut figures)?,
        Bench::Prefill => prefill(&args, isa, &mut figures)?,
        Bench::VerifyWidth => verify_width(&args, isa, &mut figures)?,
        Bench::SoftmaxTopk => topk(&args, isa, &mut figures)?,
        Bench::Kv => kv(&args, &mut figures)?,
    }
    figures.print(args.json)?;
    Ok(Outcome::Success)
}

/// Median seconds of `n` runs, after one that is not counted.
fn median(
    n: usize,
    mut run: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    run()?;
    let mut seconds = Vec::with_capacity(n);
    for _ in 0..n {
        let start = Instant::now();
        run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[n / 2])
}

/// Bytes per second that `threads` threads read from memory.
fn read_bandwidth(threads: usize) -> Result<f64, Box<dyn Error>> {
    let memory = vec![1u64; BANDWIDTH_BYTES / 8];
    let pool = Pool::new(threads);
    let part = memory.len().div_ceil(threads);
    let seconds = median(7, || {
        pool.run(threads, &|task, _| {
            let end = memory.len().min((task + 1) * part);
            let mut lanes = [0u64; 16];
            for chunk in memory[task * part..end].chunks_exact(16) {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *lane = lane.wrapping_add(*x);
                }
            }
            black_box(lanes);
        });
        Ok(())
    })?;
    Ok(BANDWIDTH_BYTES as f64 / seconds)
}

/// The 0.6B shape, or that of a model.
fn config_of(args: &BenchArgs) -> Result<Qwen3Config, Box<dyn Error>> {
    if let Some(path) = &args.model {
        return Ok(OpenModel::open(path)?.config().clone());
    }
    Ok(Qwen3Config {
        vocab_size: 151_936,
        hidden_size: 1024,
        intermediate_size: 3072,
        num_hidden_layers: 28,
        num_attention_heads: 16,
        num_key_value_heads: 8,
        head_dim: 128,
        max_position_embeddings: 40_960,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        rope: RopeConfig {
            rope_theta: 1e6,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: vec![151_645],
    })
}

/// An engine with room for `sequences` sequences of `positions` positions.
fn engine(
    args: &BenchArgs,
    isa: Isa,
    sequences: usize,
    positions: usize,
) -> Result<Engine, Box<dyn Error>> {
    let options = EngineOptions {
        cache: args.kv,
        cache_tokens: Some(sequences * (positions + 2 * CACHE_BLOCK)),
        ..EngineOptions::new(positions, machine::threads(args.threads), isa)
    };
    if let Some(path) = &args.model {
        let model = OpenModel::open(path)?;
        let mut engine = Engine::reserve(spec_of(&model, None)?, options);
        let (parameters, backend) = engine.parts();
        load_parameters(&model, parameters, backend)?;
        return Ok(engine);
    }
    let scheme = Some(Scheme {
        group_size: 128,
        scale_rule: ScaleRule::Mean,
    });
    let spec = ModelSpec {
        config: config_of(args)?,
        scheme,
        numerics: Numerics::Int8,
    };
    let mut engine = Engine::reserve(spec, options);
    let (parameters, backend) = engine.parts();
    for (stream, p) in (0u64..).zip(&parameters.list) {
        match p.is_matrix {
            true => {
                let matrix = random_matrix(stream, p.rows, p.cols, 128);
                parameters.set_ternary(backend, &p.name, &matrix)?;
            }
            false => parameters.set_values(backend, &p.name, &vec![1.0; p.cols])?,
        }
    }
    Ok(engine)
}

/// Random trits with scales that keep the size of activations.
fn random_matrix(stream: u64, rows: usize, cols: usize, group_size: usize) -> PackedMatrix {
    let random = Philox::new(1, stream);
    // A byte holds four digits of base 3.
    let bytes: Vec<u8> = (0..81u8)
        .map(|n| (0..4).fold(0, |byte, i| byte | (n / 3u8.pow(i) % 3) << (2 * i)))
        .collect();
    let trits = (0..rows * packed_row_bytes(cols, group_size)).map(|i| {
        let number = random.block(i as u64 / 64)[i % 4];
        bytes[number.rotate_left(i as u32 / 4 % 16) as usize % 81]
    });
    let trits = trits.collect();
    let scale = half::f16::from_f32(half::bf16::from_f64((cols as f64).powf(-0.5)).to_f32());
    PackedMatrix {
        rows,
        cols,
        group_size,
        trits,
        scales: vec![scale; rows * cols.div_ceil(group_size)],
    }
}

/// Bytes that a step reads of the weights: all but those of an embedding that is no head.
fn weight_bytes(engine: &mut Engine) -> usize {
    let tied = engine.spec().config.tie_word_embeddings;
    let (parameters, _) = engine.parts();
    let read = parameters.list.iter().skip(usize::from(!tied));
    let bytes = read.map(|p| match (p.packed, p.ternary) {
        (Some(packed), _) => packed.bytes.len(),
        (None, Some(ternary)) => ternary.trits.len() + 4 * ternary.scales.len(),
        (None, None) => 4 * p.numel(),
    });
    bytes.sum()
}

fn random_tokens(stream: u64, n: usize, vocab_size: usize) -> Vec<u32> {
    let random = Philox::new(2, stream);
    (0..n as u64)
        .map(|i| random.block(i)[0] % vocab_size as u32)
        .collect()
}

/// Sequences that hold `tokens` tokens each.
fn filled(
    engine: &mut Engine,
    sequences: usize,
    tokens: usize,
) -> Result<Vec<Sequence>, Box<dyn Error>> {
    let vocab_size = engine.spec().config.vocab_size;
    let mut all = Vec::new();
    for s in 0..sequences {
        let sequence = engine.start(&[]);
        let text = random_tokens(s as u64, tokens, vocab_size);
        let chunk = Chunk {
            sequence,
            tokens: &text,
            parents: None,
            logits: Wanted::Nothing,
        };
        if tokens > 0 {
            engine.step(&[chunk], &mut |_, _, _| {})?;
        }
        all.push(sequence);
    }
    Ok(all)
}

/// Adds `width` tokens to each sequence, with their logits, and takes them back.
fn step(engine: &mut Engine, sequences: &[Sequence], width: usize) -> Result<(), Box<dyn Error>> {
    let text = random_tokens(99, width, engine.spec().config.vocab_size);
    let chunk = |&sequence: &Sequence| Chunk {
        sequence,
        tokens: &text,
        parents: None,
        logits: Wanted::All,
    };
    let chunks: Vec<Chunk<'_>> = sequences.iter().map(chunk).collect();
    engine.step_topk(&chunks, 1, &[], &mut |_, _, best, _| {
        black_box(best);
    })?;
    for &sequence in sequences {
        let len = engine.len(sequence)? - width;
        engine.truncate(sequence, len)?;
    }
    Ok(())
}

fn decode(args: &BenchArgs, isa: Isa, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let mut engine = engine(args, isa, args.batch, args.tokens + 1)?;
    let sequences = filled(&mut engine, args.batch, args.tokens)?;
    let seconds = median(args.repeats, || step(&mut engine, &sequences, 1))?;
    let weights = weight_bytes(&mut engine) as f64;
    let shape = cache_shape(&engine.spec().config, kind(args));
    let cache = shape.token_bytes() * engine.spec().config.num_hidden_layers;
    let cache = (cache * args.tokens * args.batch) as f64;
    let bandwidth = read_bandwidth(machine::threads(args.threads))?;
    figures.add("decode step", 1e3 * seconds, "ms");
    figures.add("decode", args.batch as f64 / seconds, "tokens/s");
    figures.add("weights read by a step", weights / 1e6, "MB");
    figures.add("keys and values read by a step", cache / 1e6, "MB");
    figures.add("rate", (weights + cache) / seconds / 1e9, "GB/s");
    figures.add("read bandwidth", bandwidth / 1e9, "GB/s");
    let ratio = (weights + cache) / seconds / bandwidth;
    figures.add("share of the read bandwidth", ratio, "");
    Ok(())
}

fn prefill(args: &BenchArgs, isa: Isa, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let tokens = args.tokens.max(1);
    let mut engine = engine(args, isa, args.batch, tokens)?;
    let texts: Vec<Vec<u32>> = (0..args.batch as u64)
        .map(|s| random_tokens(s, tokens, engine.spec().config.vocab_size))
        .collect();
    let seconds = median(args.repeats, || {
        let sequences: Vec<Sequence> = texts.iter().map(|_| engine.start(&[])).collect();
        let each = sequences.iter().zip(&texts);
        let chunks: Vec<Chunk<'_>> = each
            .map(|(&sequence, tokens)| Chunk {
                sequence,
                tokens,
                parents: None,
                logits: Wanted::Last,
            })
            .collect();
        engine.step_topk(&chunks, 1, &[], &mut |_, _, best, _| {
            black_box(best);
        })?;
        for sequence in sequences {
            engine.free(sequence)?;
        }
        Ok(())
    })?;
    figures.add("prefill", 1e3 * seconds, "ms");
    figures.add(
        "prefill",
        (args.batch * tokens) as f64 / seconds,
        "tokens/s",
    );
    Ok(())
}

fn verify_width(args: &BenchArgs, isa: Isa, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let widths = [1, 2, 4, 8, 16, 32, 64];
    let mut engine = engine(args, isa, 1, args.tokens + 64)?;
    let sequences = filled(&mut engine, 1, args.tokens)?;
    let mut first = None;
    for width in widths {
        let seconds = median(args.repeats, || step(&mut engine, &sequences, width))?;
        let one = *first.get_or_insert(seconds);
        figures.add(format!("step of {width}"), 1e3 * seconds, "ms");
        figures.add(
            format!("step of {width} against a step of 1"),
            seconds / one,
            "x",
        );
    }
    Ok(())
}

fn topk(args: &BenchArgs, isa: Isa, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let vocab_size = config_of(args)?.vocab_size;
    let (rows, k) = (args.batch, args.k);
    let random = Philox::new(4, 0);
    let logits: Vec<f32> = (0..(rows * vocab_size) as u64)
        .map(|i| 3.0 * random.normal_pair(i).0 as f32)
        .collect();
    let (mut p, mut ids) = (vec![0.0; rows * k], vec![0; rows * k]);
    let threads = machine::threads(args.threads);
    let pool = Pool::new(threads);
    let seconds = median(args.repeats, || {
        let out = (&mut p[..], &mut ids[..]);
        Ok(softmax_topk(
            &pool,
            isa,
            (rows, 1, vocab_size),
            &logits,
            k,
            out,
        )?)
    })?;
    let bytes = (4 * rows * vocab_size) as f64;
    let bandwidth = read_bandwidth(threads)?;
    let name = format!("softmax + top-{k} of [{rows}, {vocab_size}]");
    figures.add(name, 1e3 * seconds, "ms");
    figures.add("rate", bytes / seconds / 1e9, "GB/s");
    figures.add("read bandwidth", bandwidth / 1e9, "GB/s");
    figures.add(
        "share of the read bandwidth",
        bytes / seconds / bandwidth,
        "",
    );
    Ok(())
}

fn kind(args: &BenchArgs) -> CacheKind {
    args.kv.unwrap_or_default()
}

fn cache_shape(config: &Qwen3Config, kind: CacheKind) -> CacheShape {
    CacheShape {
        kind,
        num_blocks: 0,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// The memory formula: `2 layers kv_heads (head_dim b + s)` bytes per token, `b` bytes for a
/// number and `s` for the scale of a token and head, rounded up to whole blocks.
fn kv(args: &BenchArgs, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let config = config_of(args)?;
    for kind in CacheKind::ALL {
        if args.kv.is_some_and(|wanted| wanted != kind) {
            continue;
        }
        let layer = cache_shape(&config, kind).token_bytes();
        let token = layer * config.num_hidden_layers;
        let name = kind.name();
        figures.add(
            format!("{name}: bytes per token and layer"),
            layer as f64,
            "B",
        );
        figures.add(format!("{name}: bytes per token"), token as f64, "B");
        let block = token * CACHE_BLOCK;
        figures.add(
            format!("{name}: bytes of a block of {CACHE_BLOCK}"),
            block as f64,
            "B",
        );
        for len in [128usize, 1024, 4096, 32_768] {
            let bytes = len.div_ceil(CACHE_BLOCK) * block;
            figures.add(
                format!("{name}: {len} tokens"),
                bytes as f64 / f64::from(1 << 20),
                "MiB",
            );
        }
        // A sequence of random length leaves half of its last block unused on average.
        let waste = (CACHE_BLOCK - 1) as f64 / 2.0 * token as f64;
        figures.add(
            format!("{name}: mean waste of a sequence"),
            waste / 1024.0,
            "KiB",
        );
    }
    Ok(())
}
