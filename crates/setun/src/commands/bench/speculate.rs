//! Decoding with drafts against decoding without, in turns, on three kinds of text.

use super::{Bench, Figure, Unit};
use crate::WrongUsage;
use crate::args::{Drafting, SpeculateArgs};
use crate::commands::generate::drafts::engine_and_drafter;
use crate::commands::{open, tokenizer_of};
use setun_formats::Tokenizer;
use setun_infer::{Engine, EngineOptions, Request, SamplerOptions, Speculator, StopRules};
use std::error::Error;
use std::path::Path;
use std::time::Instant;

/// Tokens of a passage.
const PASSAGE: usize = 48;
/// How often the prompt of a text that repeats has its passage.
const REPEATED: usize = 4;

/// What texts are like.
#[derive(Clone, Copy)]
enum Kind {
    /// Behind a passage that was there several times, greedily.
    Repeating,
    /// Behind a passage, greedily.
    Prose,
    /// Behind a passage, drawn from all tokens at temperature 1.3: nothing can be guessed.
    Adversarial,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Repeating => "text that repeats",
            Self::Prose => "prose",
            Self::Adversarial => "adversarial text",
        }
    }

    fn request(self, passage: &[u32], tokens: usize, number: u64) -> Request {
        let (times, temperature) = match self {
            Self::Repeating => (REPEATED, 0.0),
            Self::Prose => (1, 0.0),
            Self::Adversarial => (1, 1.3),
        };
        Request {
            prompt: passage.repeat(times),
            sampler: SamplerOptions {
                temperature,
                ..SamplerOptions::default()
            },
            stop: StopRules {
                end_tokens: Vec::new(),
                max_tokens: tokens,
            },
            seed: (1, number),
            logprobs: None,
        }
    }
}

/// For each kind: the time of a text with drafts, and against the texts without right
/// before and behind it the median ratio. Each turn has another passage.
pub(super) fn run(bench: &Bench, args: &SpeculateArgs) -> Result<Vec<Figure>, Box<dyn Error>> {
    if args.draft == Drafting::None {
        let problem = "--draft none has nothing to measure; name a drafter".to_owned();
        return Err(Box::new(WrongUsage(problem)));
    }
    let model = open(&args.model, None)?;
    let longest = model.config().max_position_embeddings;
    if REPEATED * PASSAGE >= longest {
        let problem = format!(
            "{} has {longest} positions, too few for passages of {} tokens",
            args.model.display(),
            REPEATED * PASSAGE
        );
        return Err(problem.into());
    }
    let tokenizer = tokenizer_of(&model)?;
    let context = (REPEATED * PASSAGE).saturating_add(args.tokens);
    let context = context.min(longest);
    let options = EngineOptions {
        cache_tokens: Some(2 * context + 64),
        ..EngineOptions::new(context, bench.threads, bench.isa)
    };
    let all = text_tokens(&args.text, &tokenizer, bench.repeat + 1)?;
    let step = all.len() / (bench.repeat + 1);
    let (mut engine, mut drafter) =
        engine_and_drafter(&args.draft, (&model, None), &tokenizer, options)?;
    let drafter = drafter.as_deref_mut().ok_or("no drafter")?;
    let mut plain = Engine::load(&model, options)?;
    let start = Instant::now();
    let mut figures = Vec::new();
    for kind in [Kind::Repeating, Kind::Prose, Kind::Adversarial] {
        let mut clock = || start.elapsed().as_secs_f64();
        let mut speculator = Speculator::new(drafter, &mut clock);
        let (mut times, mut ratios, mut tokens) = (Vec::new(), Vec::new(), 0);
        // The first turn warms up.
        for turn in 0..=bench.repeat {
            let passage = &all[turn * step..turn * step + PASSAGE];
            let request = kind.request(passage, args.tokens, turn as u64);
            let seconds = |start: Instant| start.elapsed().as_secs_f64();
            let before = Instant::now();
            let expected = plain.generate(&request, |_| {})?;
            let before = seconds(before);
            let with = Instant::now();
            let found = engine.speculate(&request, &mut speculator, |_| {})?;
            let with = seconds(with);
            let behind = Instant::now();
            plain.generate(&request, |_| {})?;
            let without = (before + seconds(behind)) / 2.0;
            if found.tokens != expected.tokens {
                return Err("drafts have changed a text; please report this".into());
            }
            // The same in every turn, and fewer than wanted where the context is full.
            tokens = found.tokens.len();
            if turn > 0 {
                times.push(with);
                ratios.push(without / with);
            }
        }
        figures.push(Figure {
            name: format!("{tokens} tokens of {}", kind.name()),
            seconds: middle(&mut times),
            work: tokens as f64,
            unit: Unit::Tokens,
            limit: None,
            facts: vec![
                ("ratio", middle(&mut ratios)),
                ("least", ratios[0]),
                ("tokens_per_step", speculator.stats.tokens_per_step()),
                ("accepted", speculator.stats.acceptance()),
            ],
        });
    }
    Ok(figures)
}

/// The tokens of a text, a passage for each turn among them.
fn text_tokens(
    path: &Path,
    tokenizer: &Tokenizer,
    turns: usize,
) -> Result<Vec<u32>, Box<dyn Error>> {
    let place = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("{place}: {e}; give a UTF-8 text file"))?;
    let all = tokenizer.encode(&text)?;
    if all.len() / turns < PASSAGE {
        let (found, wanted) = (all.len(), PASSAGE.saturating_mul(turns));
        let error = format!("{place} has {found} tokens; give {wanted}, or lower --repeat");
        return Err(error.into());
    }
    Ok(all)
}

/// The median; leaves the values in order.
fn middle(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
