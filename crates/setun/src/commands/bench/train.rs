//! `setun bench train`: whole steps on random tokens.

use super::machine::Limits as Peaks;
use super::{Bench, Figure, Limit, Unit};
use crate::args::Shape;
use setun_backend::Host;
use setun_backend::philox::Philox;
use setun_train::prepare::model_config;
use setun_train::profile::Profiled;
use setun_train::settings::{Override, Settings};
use setun_train::trainer::{Layout, Trainer};
use std::error::Error;

/// What the recipes of the shapes say; a test compares them.
const QUICKSTART: &[(&str, usize)] = &[
    ("tokenizer.vocab_size", 1024),
    ("model.hidden_size", 256),
    ("model.intermediate_size", 768),
    ("model.num_hidden_layers", 4),
    ("model.num_attention_heads", 4),
    ("model.num_key_value_heads", 2),
    ("model.head_dim", 64),
    ("train.batch_size", 16),
    ("train.micro_batch_size", 16),
    ("train.seq_len", 128),
];
const PATH_B: &[(&str, usize)] = &[
    ("tokenizer.vocab_size", 8192),
    ("model.hidden_size", 512),
    ("model.intermediate_size", 1536),
    ("model.num_hidden_layers", 8),
    ("model.num_attention_heads", 8),
    ("model.num_key_value_heads", 4),
    ("model.head_dim", 64),
    ("train.batch_size", 16),
    ("train.micro_batch_size", 4),
    ("train.seq_len", 256),
];
const QWEN3: &[(&str, usize)] = &[
    ("tokenizer.vocab_size", 151_936),
    ("model.hidden_size", 1024),
    ("model.intermediate_size", 3072),
    ("model.num_hidden_layers", 28),
    ("model.num_attention_heads", 16),
    ("model.num_key_value_heads", 8),
    ("model.head_dim", 128),
    ("train.batch_size", 16),
    ("train.micro_batch_size", 2),
    ("train.seq_len", 512),
    ("train.head_chunk", 256),
];

/// Settings of a shape, with another batch size or window where one is given.
pub(super) fn settings(
    shape: Shape,
    (batch_size, seq_len): (Option<usize>, Option<usize>),
) -> Result<Settings, Box<dyn Error>> {
    let keys = match shape {
        Shape::Quickstart => QUICKSTART,
        Shape::PathB => PATH_B,
        Shape::Qwen3 => QWEN3,
    };
    let set = |key: &str, value: String| Override {
        key: key.to_owned(),
        value,
    };
    let mut overrides: Vec<Override> = keys
        .iter()
        .map(|(key, value)| set(key, value.to_string()))
        .collect();
    // Never read: the tokens are random.
    overrides.push(set("data.train", "none.tokens".to_owned()));
    if let Some(batch_size) = batch_size {
        overrides.push(set("train.batch_size", batch_size.to_string()));
        let usual = keys
            .iter()
            .find(|(key, _)| *key == "train.micro_batch_size");
        let fits = usual.is_some_and(|(_, micro)| batch_size % micro == 0);
        if !fits {
            overrides.push(set("train.micro_batch_size", "1".to_owned()));
        }
    }
    if let Some(seq_len) = seq_len {
        overrides.push(set("train.seq_len", seq_len.to_string()));
        overrides.push(set(
            "model.max_position_embeddings",
            seq_len.max(1024).to_string(),
        ));
    }
    Ok(Settings::load(None, &overrides)?)
}

/// Multiply-adds of one token in a step; what is recomputed does not count.
struct Work {
    /// Forward products of ternary matrices.
    int8: f64,
    /// Their backward products, and attention.
    float: f64,
}

impl Work {
    fn new(settings: &Settings) -> Self {
        let m = &settings.model;
        let query = m.num_attention_heads * m.head_dim;
        let key = m.num_key_value_heads * m.head_dim;
        let layer = m.hidden_size * (2 * query + 2 * key + 3 * m.intermediate_size);
        let head = m.hidden_size * settings.tokenizer.vocab_size;
        let matrices = (m.num_hidden_layers * layer + head) as f64;
        let visible = (settings.train.seq_len + 1) as f64 / 2.0;
        // Two products forward, four backward.
        let attention = 6.0 * visible * (m.num_hidden_layers * query) as f64;
        Self {
            int8: matrices,
            float: 2.0 * matrices + attention,
        }
    }
}

/// Tokens a second of whole steps.
pub(super) fn run(
    bench: &Bench,
    shape: Shape,
    sizes: (Option<usize>, Option<usize>),
    profile: bool,
) -> Result<Vec<Figure>, Box<dyn Error>> {
    let settings = settings(shape, sizes)?;
    let peaks = Peaks::measure(bench);
    let config = model_config(&settings, settings.tokenizer.vocab_size, None)?;
    let layout = Layout::new(&settings, &config, None, bench.threads);
    let planned = layout.plan.total_bytes();
    let backend = Host::new(&layout.plan, layout.workspace, bench.isa);
    let backend = Profiled::new(backend, profile);
    let train = &settings.train;
    let parts = (layout.model, layout.optimizer, None);
    let mut trainer = Trainer::with_segments(backend, parts, &settings, train.batch_size);
    let scale = (2.0 * config.num_hidden_layers as f64).sqrt().recip();
    let parameters = &trainer.model.parameters;
    parameters.initialize(&mut trainer.backend, 1, 0.0, scale)?;
    trainer.project()?;

    let random = Philox::new(1, 0);
    let vocab = config.vocab_size as u32;
    let mut counter = 0;
    let mut failure = None;
    let mut loss = f64::NAN;
    let seconds = bench.median(|| {
        let step = trainer.step;
        // The first step warms up.
        if step > 0 {
            trainer.backend.begin_step();
        }
        let outcome = trainer.step_on(|inputs, targets| {
            for (input, target) in inputs.iter_mut().zip(targets) {
                let words = random.block(counter);
                (*input, *target) = (words[0] % vocab, words[1] % vocab);
                counter += 1;
            }
        });
        trainer.backend.end_step();
        match outcome {
            Ok(outcome) => loss = outcome.loss,
            Err(error) => failure = Some(error),
        }
    });
    if let Some(error) = failure {
        return Err(error.into());
    }
    if let Some(profile) = trainer.backend.profile() {
        super::console::tell(format_args!("{profile}"));
    }
    let work = Work::new(&settings);
    let limit = Limit {
        name: "int8 and bf16 peaks",
        rate: 1.0 / (work.int8 / peaks.int8.rate + work.float / peaks.bf16.rate),
    };
    let mib = f64::from(1 << 20);
    let mut facts = vec![("loss", loss), ("plan_MiB", planned as f64 / mib)];
    if let Some(bytes) = setun_train::machine::anonymous_bytes() {
        facts.push(("resident_MiB", bytes as f64 / mib));
    }
    Ok(vec![Figure {
        name: format!(
            "train {}, {} x {}, {} at a time",
            shape.name(),
            train.batch_size,
            train.seq_len,
            train.micro_batch_size
        ),
        seconds,
        work: (train.batch_size * train.seq_len) as f64,
        unit: Unit::Tokens,
        limit: Some(limit),
        facts,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn shapes_are_those_of_their_recipes() {
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
        for shape in Shape::ALL {
            let recipe = recipes.join(format!("{}.toml", shape.name()));
            let any = Override {
                key: "data.train".to_owned(),
                value: "none.tokens".to_owned(),
            };
            let recipe = Settings::load(Some(&recipe), &[any]).expect("a recipe that is valid");
            let ours = settings(shape, (None, None)).expect("settings that are valid");
            let sizes = |s: &Settings| {
                let m = &s.model;
                [
                    m.hidden_size,
                    m.intermediate_size,
                    m.num_hidden_layers,
                    m.num_attention_heads,
                    m.num_key_value_heads,
                    m.head_dim,
                    s.train.batch_size,
                    s.train.micro_batch_size,
                    s.train.seq_len,
                    usize::from(s.train.recompute),
                    s.train.head_chunk,
                ]
            };
            assert_eq!(sizes(&ours), sizes(&recipe), "{}", shape.name());
        }
    }

    #[test]
    fn the_large_shape_fits_into_its_memory() {
        use setun_train::settings::OptimizerState;
        let mut settings = settings(Shape::Qwen3, (None, None)).expect("a shape");
        for (state, gib) in [(OptimizerState::F32, 12), (OptimizerState::Bf16, 10)] {
            settings.train.optimizer_state = state;
            let vocab = settings.tokenizer.vocab_size;
            let config = model_config(&settings, vocab, None).expect("a shape");
            let planned = Layout::new(&settings, &config, None, 2).plan.total_bytes();
            assert!(planned <= gib << 30, "{state:?}: {planned} bytes");
        }
    }

    #[test]
    fn work_of_a_token_counts_every_matrix() {
        let settings = settings(Shape::Qwen3, (None, None)).expect("a shape");
        let work = Work::new(&settings);
        // Qwen3-0.6B has 440.4 M weights in its layers and 155.6 M in its tied embedding.
        assert_eq!(work.int8, 440_401_920.0 + 155_582_464.0);
        let attention = 6.0 * 256.5 * (28 * 2048) as f64;
        assert_eq!(work.float, 2.0 * work.int8 + attention);
    }
}
