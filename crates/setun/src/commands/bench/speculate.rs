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
/// Tokens of its own, or as many as fit, behind which a model's greedy text repeats itself.
const BEHIND: usize = 400;
/// Tokens that have been there before where a text repeats.
const RUN: usize = 5;

/// What texts are like.
#[derive(Clone, Copy)]
enum Kind {
    /// Far behind a passage, greedily, where a model has come to repeat itself.
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
}

/// `tokens` tokens behind `prompt`.
fn request(prompt: Vec<u32>, temperature: f32, tokens: usize, number: u64) -> Request {
    Request {
        prompt,
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

/// An engine with drafts and one without.
struct Pair<'a> {
    drafting: Engine,
    plain: Engine,
    /// Positions of a text.
    context: usize,
    /// Tokens that are generated.
    tokens: usize,
    /// Turns, without the one that warms up.
    turns: usize,
    /// The text that passages are taken from.
    text: &'a [u32],
}

/// What the turns of a kind have given.
#[derive(Default)]
struct Turns {
    seconds: Vec<f64>,
    ratios: Vec<f64>,
    repeated: Vec<f64>,
    tokens: usize,
}

impl Pair<'_> {
    fn request(&mut self, kind: Kind, turn: usize) -> Result<Request, Box<dyn Error>> {
        let start = self.text.len() / (self.turns + 1) * turn;
        let mut prompt = self.text[start..start + PASSAGE].to_vec();
        let temperature = match kind {
            Kind::Adversarial => 1.3,
            Kind::Repeating | Kind::Prose => 0.0,
        };
        if let Kind::Repeating = kind {
            let behind = self.context.saturating_sub(PASSAGE + self.tokens);
            let own = request(prompt.clone(), 0.0, behind.min(BEHIND), 0);
            prompt.extend(self.plain.generate(&own, |_| {})?.tokens);
        }
        Ok(request(prompt, temperature, self.tokens, turn as u64))
    }

    /// One text: without drafts, with them, and without. Its prompt is in both caches.
    fn turn(
        &mut self,
        request: &Request,
        speculator: &mut Speculator<'_>,
        turns: &mut Turns,
    ) -> Result<(), Box<dyn Error>> {
        let mut prompt = request.clone();
        prompt.stop.max_tokens = 1;
        self.plain.generate(&prompt, |_| {})?;
        self.drafting.generate(&prompt, |_| {})?;
        let seconds = |start: Instant| start.elapsed().as_secs_f64();
        let before = Instant::now();
        let expected = self.plain.generate(request, |_| {})?;
        let before = seconds(before);
        let with = Instant::now();
        let found = self.drafting.speculate(request, speculator, |_| {})?;
        let with = seconds(with);
        let behind = Instant::now();
        self.plain.generate(request, |_| {})?;
        let without = (before + seconds(behind)) / 2.0;
        if found.tokens != expected.tokens {
            return Err("drafts have changed a text; please report this".into());
        }
        turns.seconds.push(with);
        turns.ratios.push(without / with);
        turns
            .repeated
            .push(repeated(&request.prompt, &found.tokens));
        // The same in every turn, and fewer than wanted where the context is full.
        turns.tokens = found.tokens.len();
        Ok(())
    }
}

/// Share of the tokens behind a prompt that end a run of [`RUN`] which was there before.
fn repeated(prompt: &[u32], tokens: &[u32]) -> f64 {
    let all = [prompt, tokens].concat();
    let mut seen = std::collections::HashSet::new();
    let mut hits = 0;
    for (end, run) in (RUN..).zip(all.windows(RUN)) {
        let is_new = seen.insert(run);
        hits += usize::from(!is_new && end > prompt.len());
    }
    hits as f64 / tokens.len().max(1) as f64
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
    if PASSAGE >= longest {
        let problem = format!(
            "{} has {longest} positions, too few for passages of {PASSAGE} tokens",
            args.model.display(),
        );
        return Err(problem.into());
    }
    let tokenizer = tokenizer_of(&model)?;
    let context = (PASSAGE + BEHIND).saturating_add(args.tokens).min(longest);
    let options = EngineOptions {
        cache_tokens: Some(2 * context + 64),
        ..EngineOptions::new(context, bench.threads, bench.isa)
    };
    let text = text_tokens(&args.text, &tokenizer, bench.repeat + 1)?;
    let (drafting, mut drafter) =
        engine_and_drafter(&args.draft, (&model, None), &tokenizer, options)?;
    let drafter = drafter.as_deref_mut().ok_or("no drafter")?;
    let mut pair = Pair {
        drafting,
        plain: Engine::load(&model, options)?,
        context,
        tokens: args.tokens,
        turns: bench.repeat,
        text: &text,
    };
    let start = Instant::now();
    let mut figures = Vec::new();
    for kind in [Kind::Repeating, Kind::Prose, Kind::Adversarial] {
        let mut clock = || start.elapsed().as_secs_f64();
        let mut speculator = Speculator::new(drafter, &mut clock);
        let mut turns = Turns::default();
        for turn in 0..=bench.repeat {
            let request = pair.request(kind, turn)?;
            pair.turn(&request, &mut speculator, &mut turns)?;
            if turn == 0 {
                // It has warmed up.
                turns = Turns::default();
            }
        }
        figures.push(Figure {
            name: format!("{} tokens of {}", turns.tokens, kind.name()),
            seconds: middle(&mut turns.seconds),
            work: turns.tokens as f64,
            unit: Unit::Tokens,
            limit: None,
            facts: vec![
                ("ratio", middle(&mut turns.ratios)),
                ("least", turns.ratios[0]),
                ("tokens_per_step", speculator.stats.tokens_per_step()),
                ("accepted", speculator.stats.acceptance()),
                ("repeated", middle(&mut turns.repeated)),
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
