//! Benchmarks of decoding: steps, prompts, widths, sampling, and the memory of the cache.

use super::{Bench, Figure, Limit, Unit, machine};
use crate::args::{Decoding, DecodingArgs};
use crate::console;
use serde_json::json;
use setun_backend::cpu::Pool;
use setun_backend::philox::Philox;
use setun_backend::topk::softmax_topk;
use setun_backend::{CACHE_BLOCK, CacheKind, CacheShape};
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_infer::{Chunk, CostModel, Engine, EngineOptions, Sequence, Wanted, exact_cache};
use setun_io::OpenModel;
use setun_model::{ModelSpec, Scheme};
use setun_ternary::{Numerics, PackedMatrix, ScaleRule, packed_row_bytes};
use std::error::Error;
use std::hint::black_box;

/// Figures, or why there are none.
type Figures = Result<Vec<Figure>, Box<dyn Error>>;

pub(super) fn run(bench: &Bench, args: &DecodingArgs) -> Figures {
    match args.what {
        Decoding::Decode => decode(bench, args),
        Decoding::Prefill => prefill(bench, args),
        Decoding::VerifyWidth => verify_width(bench, args),
        Decoding::SoftmaxTopk => topk(bench, args),
        Decoding::Kv => unreachable!("a formula, printed before"),
    }
}

/// Median time of a step that can fail, in seconds.
fn median(
    bench: &Bench,
    mut run: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut failed = None;
    let seconds = bench.median(|| {
        if let Err(error) = run() {
            failed.get_or_insert(error);
        }
    });
    failed.map_or(Ok(seconds), Err)
}

/// The 0.6B shape, or that of a model.
fn config_of(args: &DecodingArgs) -> Result<Qwen3Config, Box<dyn Error>> {
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
    bench: &Bench,
    args: &DecodingArgs,
    sequences: usize,
    positions: usize,
) -> Result<Engine, Box<dyn Error>> {
    let options = EngineOptions {
        cache: args.kv,
        cache_tokens: Some(sequences * (positions + 2 * CACHE_BLOCK)),
        ..EngineOptions::new(positions, bench.threads, bench.isa)
    };
    if let Some(path) = &args.model {
        let model = OpenModel::open(path)?;
        let longest = model.config().max_position_embeddings;
        if positions > longest {
            let path = path.display();
            let problem =
                format!("{path} has {longest} positions, not {positions}; lower --tokens");
            return Err(problem.into());
        }
        return Ok(Engine::load(&model, options)?);
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

/// Sequences that hold `tokens` tokens each, the same ones if they are forked.
fn filled(
    engine: &mut Engine,
    (sequences, forked): (usize, bool),
    tokens: usize,
) -> Result<Vec<Sequence>, Box<dyn Error>> {
    let vocab_size = engine.spec().config.vocab_size;
    let mut all = Vec::new();
    for s in 0..sequences {
        if let (true, Some(&first)) = (forked, all.first()) {
            all.push(engine.fork(first)?);
            continue;
        }
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

fn decode(bench: &Bench, args: &DecodingArgs) -> Figures {
    let mut engine = engine(bench, args, args.batch, args.tokens + 1)?;
    let sequences = filled(&mut engine, (args.batch, args.forked), args.tokens)?;
    let seconds = median(bench, || step(&mut engine, &sequences, 1))?;
    let weights = weight_bytes(&mut engine) as f64;
    let kind = args.kv.unwrap_or(exact_cache(engine.spec().numerics));
    let shape = cache_shape(&engine.spec().config, kind);
    let cache = shape.token_bytes() * engine.spec().config.num_hidden_layers;
    let texts = if args.forked { 1 } else { args.batch };
    let cache = (cache * args.tokens * texts) as f64;
    let bandwidth = machine::bandwidth(bench).rate();
    let tokens = args.batch as f64;
    Ok(vec![Figure {
        name: match args.forked {
            true => format!("decode, {} at the same {} tokens", args.batch, args.tokens),
            false => format!("decode, {} at {} tokens", args.batch, args.tokens),
        },
        seconds,
        work: tokens,
        unit: Unit::Tokens,
        limit: Some(Limit {
            name: "reading weights and cache",
            rate: tokens * bandwidth / (weights + cache),
        }),
        facts: vec![("weights_mb", weights / 1e6), ("cache_mb", cache / 1e6)],
    }])
}

fn prefill(bench: &Bench, args: &DecodingArgs) -> Figures {
    let tokens = args.tokens.max(1);
    let mut engine = engine(bench, args, args.batch, tokens)?;
    let texts: Vec<Vec<u32>> = (0..args.batch as u64)
        .map(|s| random_tokens(s, tokens, engine.spec().config.vocab_size))
        .collect();
    let seconds = median(bench, || {
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
    Ok(vec![Figure {
        name: format!("prefill, {} of {tokens} tokens", args.batch),
        seconds,
        work: (args.batch * tokens) as f64,
        unit: Unit::Tokens,
        limit: None,
        facts: Vec::new(),
    }])
}

fn verify_width(bench: &Bench, args: &DecodingArgs) -> Figures {
    let mut engine = engine(bench, args, 1, args.tokens + 64)?;
    let sequences = filled(&mut engine, (1, false), args.tokens)?;
    let mut times = Vec::new();
    for width in [1, 2, 4, 8, 16, 32, 64] {
        let seconds = median(bench, || step(&mut engine, &sequences, width))?;
        times.push((width, seconds));
    }
    let figure = |&(width, seconds): &(usize, f64)| Figure {
        name: format!("step of {width} at {} tokens", args.tokens),
        seconds,
        work: width as f64,
        unit: Unit::Tokens,
        limit: None,
        facts: vec![
            ("against_one", seconds / times[0].1),
            ("predicted_ms", 1e3 * predicted(&times, width)),
        ],
    };
    Ok(times.iter().map(figure).collect())
}

/// What the cost model of drafting says of a width from the times of all others.
fn predicted(times: &[(usize, f64)], width: usize) -> f64 {
    let mut cost = CostModel::new();
    let others: Vec<_> = times.iter().filter(|(rows, _)| *rows != width).collect();
    // It trusts what it has seen three times.
    for &&(rows, seconds) in others.repeat(3).iter() {
        cost.observe(rows, seconds);
    }
    cost.predict(width)
}

fn topk(bench: &Bench, args: &DecodingArgs) -> Figures {
    let vocab_size = config_of(args)?.vocab_size;
    let (rows, k) = (args.batch, args.k);
    let random = Philox::new(4, 0);
    let logits: Vec<f32> = (0..(rows * vocab_size) as u64)
        .map(|i| 3.0 * random.normal_pair(i).0 as f32)
        .collect();
    let (mut p, mut ids) = (vec![0.0; rows * k], vec![0; rows * k]);
    let pool = Pool::new(bench.threads);
    let seconds = median(bench, || {
        let out = (&mut p[..], &mut ids[..]);
        let shape = (rows, 1, vocab_size);
        Ok(softmax_topk(&pool, bench.isa, shape, &logits, k, out)?)
    })?;
    Ok(vec![Figure {
        name: format!("softmax + top-{k} of [{rows}, {vocab_size}]"),
        seconds,
        work: (4 * rows * vocab_size) as f64,
        unit: Unit::Bytes,
        limit: Some(machine::memory_limit(bench)),
        facts: Vec::new(),
    }])
}

fn cache_shape(config: &Qwen3Config, kind: CacheKind) -> CacheShape {
    CacheShape {
        kind,
        num_blocks: 0,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// Prints the memory of a cache: `2 layers kv_heads (head_dim b + s)` bytes per token, `b`
/// bytes for a number and `s` for the scale of a token and head, in whole blocks.
///
/// # Errors
/// A model that cannot be opened; output that cannot be written.
pub(super) fn print_memory(args: &DecodingArgs, json: bool) -> Result<(), Box<dyn Error>> {
    let config = config_of(args)?;
    let kinds = CacheKind::ALL.into_iter();
    let kinds = kinds.filter(|&kind| args.kv.is_none_or(|wanted| wanted == kind));
    let mut all = Vec::new();
    for kind in kinds {
        let layer = cache_shape(&config, kind).token_bytes();
        let token = layer * config.num_hidden_layers;
        let lengths = [128usize, 1024, 4096, 32_768];
        let bytes = lengths.map(|len| len.div_ceil(CACHE_BLOCK) * CACHE_BLOCK * token);
        // A sequence of random length leaves half of its last block unused on average.
        let waste = (CACHE_BLOCK - 1) * token / 2;
        all.push(json!({
            "kind": kind.name(),
            "bytes_per_token_and_layer": layer,
            "bytes_per_token": token,
            "bytes_per_block": CACHE_BLOCK * token,
            "tokens": lengths,
            "bytes": bytes,
            "mean_waste_bytes": waste,
        }));
        if json {
            continue;
        }
        say!(
            "{}: {token} bytes per token, {} per block of {CACHE_BLOCK}, mean waste {waste}",
            kind.name(),
            CACHE_BLOCK * token
        );
        for (len, bytes) in lengths.iter().zip(bytes) {
            say!(
                "  {len:>6} tokens {:>10.1} MiB",
                bytes as f64 / f64::from(1 << 20)
            );
        }
    }
    if json {
        say!("{}", serde_json::to_string_pretty(&all)?);
    }
    Ok(())
}
