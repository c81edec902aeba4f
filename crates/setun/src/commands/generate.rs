//! `setun generate`: one text as it comes, or many in a batch.

use crate::args::{Drafting, GenerateArgs};
use crate::console;
use crate::environment::Environment;
use crate::{CommandResult, Outcome, WrongUsage};
use drafts::Decoder;
use setun_formats::Tokenizer;
use setun_infer::{
    BeamOptions, BeamRequest, Engine, EngineOptions, FinishReason, Generation, LengthPenalty,
    Request, SamplerOptions, StopRules, TokenLogprobs,
};
use setun_io::OpenModel;
use setun_train::machine;
use std::error::Error;
use std::io::Write;
use std::time::{Duration, Instant};

pub(super) mod drafts;

/// Most sequences that are decoded together.
const MAX_SEQUENCES: usize = 64;

/// `setun generate`
pub fn generate(args: GenerateArgs, environment: &Environment) -> CommandResult {
    if args.beams > 0 && args.draft != Drafting::None {
        let error = "a beam search has no drafts; leave out --beams or --draft";
        return Err(Box::new(WrongUsage(error.to_owned())));
    }
    if args.beams > 0 && args.logprobs.is_some() {
        let error = "the results of a beam search have scores; leave out --beams or --logprobs";
        return Err(Box::new(WrongUsage(error.to_owned())));
    }
    let sampler = sampler_options(&args);
    sampler.validate()?;
    let texts = prompts(&args)?;
    let start = Instant::now();
    let model = super::open(&args.model, args.checkpoint)?;
    let opening = start.elapsed();
    let tokenizer = super::tokenizer_of(&model)?;
    let tokenizing = start.elapsed() - opening;
    let stop = StopRules {
        end_tokens: model.config().eos_token_ids.clone(),
        max_tokens: args.max_tokens,
    };
    let mut requests = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        requests.push(Request {
            prompt: tokenizer.encode_with_special(text)?,
            sampler,
            stop: stop.clone(),
            seed: (args.seed, i as u64),
            logprobs: args.logprobs,
        });
    }
    let options = engine_options(&args, &model, &requests, super::isa(environment)?);
    let (mut engine, mut drafter) =
        drafts::engine_and_drafter(&args.draft, &model, &tokenizer, options)?;
    let loading = start.elapsed() - tokenizing;
    let start = Instant::now();
    let mut clock = || start.elapsed().as_secs_f64();
    let mut decoder = Decoder::new(drafter.as_deref_mut(), &mut clock);
    let mut timer = Timer::new(&requests);
    match (args.beams, args.prompts.is_some()) {
        (0, false) => {
            let prompt = (texts[0].as_str(), &requests[0]);
            stream(&mut engine, &mut decoder, &tokenizer, prompt, &mut timer)?;
        }
        (0, true) => {
            let prompts = (texts.as_slice(), requests.as_slice());
            batch(&mut engine, &mut decoder, &tokenizer, prompts, &mut timer)?;
        }
        _ => beams(
            &mut engine,
            &tokenizer,
            &texts,
            &requests,
            &args,
            &mut timer,
        )?,
    }
    if args.stats {
        let [loading, tokenizing] = [loading, tokenizing].map(|t| t.as_secs_f64());
        console::tell(format_args!(
            "loaded in {loading:.2} s, its tokenizer in {tokenizing:.2} s"
        ));
        timer.tell();
        decoder.tell();
    }
    Ok(Outcome::Success)
}

fn sampler_options(args: &GenerateArgs) -> SamplerOptions {
    SamplerOptions {
        temperature: args.temperature as f32,
        top_k: args.top_k,
        top_p: args.top_p as f32,
        min_p: args.min_p as f32,
        repetition_penalty: args.repetition_penalty as f32,
        presence_penalty: args.presence_penalty as f32,
        frequency_penalty: args.frequency_penalty as f32,
    }
}

/// The prompt, or the lines of the file.
fn prompts(args: &GenerateArgs) -> Result<Vec<String>, Box<dyn Error>> {
    let Some(path) = &args.prompts else {
        return Ok(vec![args.prompt.clone().unwrap_or_default()]);
    };
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("{}: {e}; give a UTF-8 text file", path.display()))?;
    let lines: Vec<String> = text
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    match lines.is_empty() {
        true => Err(Box::new(WrongUsage(format!(
            "{} has no prompts; write one on each line",
            path.display()
        )))),
        false => Ok(lines),
    }
}

fn engine_options(
    args: &GenerateArgs,
    model: &OpenModel,
    requests: &[Request],
    isa: setun_backend::Isa,
) -> EngineOptions {
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
    let wanted = longest.saturating_add(args.max_tokens);
    let context = wanted.clamp(1, model.config().max_position_embeddings.max(1));
    let sequences = requests.len().min(MAX_SEQUENCES) * args.beams.max(1);
    // A block is 16 tokens; each beam may write one aside.
    let tokens = sequences.min(MAX_SEQUENCES.max(args.beams)) * (context + 32);
    EngineOptions {
        cache: args.kv,
        cache_tokens: Some(tokens),
        ..EngineOptions::new(context, machine::threads(args.threads), isa)
    }
}

/// Writes the text as it comes.
fn stream(
    engine: &mut Engine,
    decoder: &mut Decoder<'_>,
    tokenizer: &Tokenizer,
    (text, request): (&str, &Request),
    timer: &mut Timer,
) -> Result<(), Box<dyn Error>> {
    console::print(format_args!("{text}"))?;
    let mut stream = tokenizer.stream();
    let mut out = std::io::stdout();
    let generation = decoder.generate(engine, request, &mut |token| {
        timer.token();
        if let Some(text) = stream.push(token) {
            // A closed pipe ends the output, not the program's answer.
            let _ = write!(out, "{text}").and_then(|()| out.flush());
        }
    })?;
    console::print(format_args!("{}\n", stream.finish().unwrap_or_default()))?;
    for t in &generation.logprobs {
        let top = t
            .top
            .iter()
            .map(|&(id, p)| format!("{:?} {p:.3}", tokenizer.decode(&[id])));
        let (text, top) = (
            tokenizer.decode(&[t.token]),
            top.collect::<Vec<_>>().join("  "),
        );
        console::print(format_args!("{:>9.4}  {text:?}    {top}\n", t.logprob))?;
    }
    warn_if_cut(&generation, engine.context());
    Ok(())
}

fn warn_if_cut(generation: &Generation, context: usize) {
    if generation.reason == FinishReason::ContextFull {
        console::tell(format_args!("the context of {context} tokens is full"));
    }
}

/// All prompts together; each text on a line of JSON, in the order of the prompts.
fn batch(
    engine: &mut Engine,
    decoder: &mut Decoder<'_>,
    tokenizer: &Tokenizer,
    (texts, requests): (&[String], &[Request]),
    timer: &mut Timer,
) -> Result<(), Box<dyn Error>> {
    let all = decoder.generate_all(engine, requests, &mut |_| timer.token())?;
    for (prompt, generation) in texts.iter().zip(&all) {
        let text = tokenizer.decode(&generation.tokens);
        let mut line = serde_json::json!({ "prompt": prompt, "text": text });
        if requests[0].logprobs.is_some() {
            let of_token = |t| logprobs_json(tokenizer, t);
            line["logprobs"] = generation.logprobs.iter().map(of_token).collect();
        }
        console::print(format_args!("{line}\n"))?;
        warn_if_cut(generation, engine.context());
    }
    Ok(())
}

/// As OpenAI's interface has them.
fn logprobs_json(tokenizer: &Tokenizer, said: &TokenLogprobs) -> serde_json::Value {
    let of = |id: u32, logprob: f64| serde_json::json!({ "token": tokenizer.decode(&[id]), "id": id, "logprob": logprob });
    let top = said.top.iter().map(|&(id, logprob)| of(id, logprob));
    let mut value = of(said.token, said.logprob);
    value["top_logprobs"] = top.collect();
    value
}

/// Beams of all prompts; the best text as it is, or every result on a line of JSON.
fn beams(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    texts: &[String],
    requests: &[Request],
    args: &GenerateArgs,
    timer: &mut Timer,
) -> Result<(), Box<dyn Error>> {
    let of_request = |r: &Request| BeamRequest {
        prompt: r.prompt.clone(),
        end_tokens: r.stop.end_tokens.clone(),
        max_tokens: r.stop.max_tokens,
    };
    let searched: Vec<BeamRequest> = requests.iter().map(of_request).collect();
    let options = BeamOptions {
        length_penalty: LengthPenalty::Power(args.length_penalty),
        ..BeamOptions::new(args.beams)
    };
    let all = engine.beam_search(&searched, options)?;
    for ((prompt, request), found) in texts.iter().zip(requests).zip(&all) {
        for (i, hypothesis) in found.iter().enumerate() {
            timer.add(hypothesis.tokens.len());
            let ends = &request.stop.end_tokens;
            let shown = hypothesis.tokens.iter().filter(|t| !ends.contains(t));
            let text = tokenizer.decode(&shown.copied().collect::<Vec<_>>());
            if args.prompts.is_none() {
                if i == 0 {
                    console::print(format_args!("{prompt}{text}\n"))?;
                }
                continue;
            }
            let line = serde_json::json!({
                "prompt": prompt, "text": text, "rank": i, "score": hypothesis.score,
            });
            console::print(format_args!("{line}\n"))?;
        }
    }
    Ok(())
}

/// What `--stats` tells: the time to the first token is that of the prompts.
struct Timer {
    num_prompt: usize,
    num_new: usize,
    start: Instant,
    first: Option<Duration>,
}

impl Timer {
    fn new(requests: &[Request]) -> Self {
        Self {
            num_prompt: requests.iter().map(|r| r.prompt.len()).sum(),
            num_new: 0,
            start: Instant::now(),
            first: None,
        }
    }

    fn token(&mut self) {
        self.first.get_or_insert(self.start.elapsed());
        self.num_new += 1;
    }

    fn add(&mut self, tokens: usize) {
        self.num_new += tokens;
    }

    fn tell(&self) {
        let all = self.start.elapsed().as_secs_f64();
        let Some(first) = self.first.map(|f| f.as_secs_f64()) else {
            let (n, rate) = (self.num_new, self.num_new as f64 / all);
            console::tell(format_args!("{n} tokens of results, {rate:.1} tokens/s"));
            return;
        };
        let later = self.num_new.saturating_sub(1) as f64;
        console::tell(format_args!(
            "{} prompt tokens, {:.1} tokens/s; {} new tokens, {:.1} tokens/s",
            self.num_prompt,
            self.num_prompt as f64 / first.max(1e-9),
            self.num_new,
            later / (all - first).max(1e-9)
        ));
    }
}
