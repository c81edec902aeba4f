//! `setun generate`: one text as it comes, or many in a batch.

use crate::args::{Drafting, GenerateArgs};
use crate::console;
use crate::environment::Environment;
use crate::{CommandResult, Outcome, WrongUsage};
use drafts::Decoder;
use setun_backend::Isa;
use setun_formats::Tokenizer;
use setun_infer::{
    BeamOptions, BeamRequest, Engine, EngineError, EngineOptions, FinishReason, Hypothesis,
    LengthPenalty, Request, SamplerOptions, StopRules, TokenLogprobs,
};
use setun_io::OpenModel;
use std::error::Error;
use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

pub(super) mod drafts;
mod room;

/// `setun generate`
pub fn generate(args: GenerateArgs, environment: &Environment) -> CommandResult {
    check_beams(&args)?;
    let prompts = prompts(&args)?;
    let start = Instant::now();
    let model = super::open(&args.model, args.checkpoint)?;
    let isa = super::isa(environment)?;
    let (early, tokenizer, tokenizing) = read_together(&args, &model, &prompts.texts, isa)?;
    // The process ends with the text: to free each word of a vocabulary first takes longer than
    // the first token.
    let tokenizer = ManuallyDrop::new(tokenizer);
    let encode = |text: &str| tokenizer.encode_with_special(text);
    let requests = requests(&args, &prompts.texts, &model, encode)?;
    let options = room::engine_options(&args, &model, &requests, isa)?;
    let early = early.filter(|(guess, _)| room::holds(guess, &options));
    if early.is_none() {
        room::check_room(&args, &model, &options)?;
    }
    let target = (&model, early.map(|(_, engine)| engine));
    let (mut engine, mut drafter) =
        drafts::engine_and_drafter(&args.draft, target, &tokenizer, options)?;
    // Before anything is printed.
    let checked = engine.check_requests(&requests);
    checked.map_err(|error| with_line(error, &args, &prompts))?;
    let loading = start.elapsed();
    let start = Instant::now();
    let mut clock = || start.elapsed().as_secs_f64();
    let mut decoder = Decoder::new(drafter.as_deref_mut(), &mut clock);
    let mut timer = Timer::new(&requests, args.beams > 0);
    match (args.beams, args.prompts.is_some()) {
        (0, false) => {
            let prompt = (prompts.texts[0].as_str(), &requests[0]);
            stream(&mut engine, &mut decoder, &tokenizer, prompt, &mut timer)?;
        }
        (0, true) => {
            let prompts = (prompts.texts.as_slice(), requests.as_slice());
            batch(&mut engine, &mut decoder, &tokenizer, prompts, &mut timer)?;
        }
        _ => beams(
            &mut engine,
            &tokenizer,
            &prompts.texts,
            &requests,
            &args,
            &mut timer,
        )?,
    }
    if args.stats {
        let [loading, tokenizing] = [loading, tokenizing].map(|t| t.as_secs_f64());
        console::tell(format_args!(
            "loaded in {loading:.2} s; reading the tokenizer took {tokenizing:.2} s"
        ));
        timer.tell(engine.reused());
        decoder.tell();
    }
    Ok(Outcome::Success)
}

/// Refuses what a beam search would ignore, and what is for beams only.
fn check_beams(args: &GenerateArgs) -> Result<(), WrongUsage> {
    let error = if args.beams == 0 {
        match args.length_penalty {
            None => return Ok(()),
            Some(_) => "--length-penalty is for a beam search; add --beams or leave it out".into(),
        }
    } else if args.draft != Drafting::None {
        "a beam search has no drafts; leave out --beams or --draft".to_owned()
    } else if args.logprobs.is_some() {
        "the results of a beam search have scores; leave out --beams or --logprobs".to_owned()
    } else if let Some(flag) = args.sampling.first() {
        format!("a beam search samples nothing; leave out --beams or --{flag}")
    } else {
        return Ok(());
    };
    Err(WrongUsage(error))
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

/// What is continued.
struct Prompts {
    texts: Vec<String>,
    /// Where each one stands in the file, counted from 1; nothing without a file.
    lines: Vec<usize>,
}

/// The prompt, or the lines of the file.
fn prompts(args: &GenerateArgs) -> Result<Prompts, Box<dyn Error>> {
    let Some(path) = &args.prompts else {
        let text = args.prompt.clone().unwrap_or_default();
        if text.is_empty() {
            let problem = "--prompt is empty; give it at least a character".to_owned();
            return Err(Box::new(WrongUsage(problem)));
        }
        return Ok(Prompts {
            texts: vec![text],
            lines: Vec::new(),
        });
    };
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("{}: {e}; give a UTF-8 text file", path.display()))?;
    let lines = text.lines().zip(1..).filter(|(text, _)| !text.is_empty());
    let (texts, lines): (Vec<String>, Vec<usize>) =
        lines.map(|(text, line)| (text.to_owned(), line)).unzip();
    match lines.is_empty() {
        true => Err(Box::new(WrongUsage(format!(
            "{} has no prompts; write one on each line",
            path.display()
        )))),
        false => Ok(Prompts { texts, lines }),
    }
}

/// A model's engine and what it was loaded with.
type Early = (EngineOptions, Engine);

/// The tokenizer, the time that it took, and the engine, unless that has to wait for the number
/// of tokens or for a model that drafts.
fn read_together(
    args: &GenerateArgs,
    model: &OpenModel,
    texts: &[String],
    isa: Isa,
) -> Result<(Option<Early>, Tokenizer, Duration), Box<dyn Error>> {
    let guess = match args.draft {
        Drafting::Model(_) => None,
        Drafting::None | Drafting::Ngram => room::guess(args, model, texts, isa)?,
    };
    let load = |options| Engine::load(model, options).map(|engine| (options, engine));
    std::thread::scope(|scope| {
        // The tokenizer stays on this thread: it allocates hundreds of thousands of words, and
        // glibc's heap of any other thread grows by a page at a time.
        let early = scope.spawn(|| guess.map(load).transpose());
        let start = Instant::now();
        let tokenizer = super::tokenizer_of(model);
        let time = start.elapsed();
        let joined = early.join();
        let early = joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let tokenizer = tokenizer?;
        Ok((early?, tokenizer, time))
    })
}

/// A request for each prompt, with the tokens that `encode` makes of it.
fn requests<E>(
    args: &GenerateArgs,
    texts: &[String],
    model: &OpenModel,
    encode: impl Fn(&str) -> Result<Vec<u32>, E>,
) -> Result<Vec<Request>, E> {
    let stop = StopRules {
        end_tokens: model.config().eos_token_ids.clone(),
        max_tokens: args.max_tokens,
    };
    let mut requests = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        requests.push(Request {
            prompt: encode(text)?,
            sampler: sampler_options(args),
            stop: stop.clone(),
            seed: (args.seed, i as u64),
            logprobs: args.logprobs,
        });
    }
    Ok(requests)
}

/// Names the line of the file in place of the number of the request.
fn with_line(error: EngineError, args: &GenerateArgs, prompts: &Prompts) -> Box<dyn Error> {
    match error {
        EngineError::Request { number, source } => {
            let line = prompts.lines.get(number.wrapping_sub(1));
            match (&args.prompts, line) {
                (Some(path), Some(line)) => format!("{}:{line}: {source}", path.display()).into(),
                _ => source,
            }
        }
        other => other.into(),
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
    let mut failed = None;
    let generation = decoder.generate(engine, request, &mut |token| {
        timer.token();
        let Some(text) = stream.push(token) else {
            return ControlFlow::Continue(());
        };
        console::print_to_reader(format_args!("{text}")).unwrap_or_else(|error| {
            failed = Some(error);
            ControlFlow::Break(())
        })
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
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
    warn_if_cut(generation.reason, engine.context());
    Ok(())
}

fn warn_if_cut(reason: FinishReason, context: usize) {
    if reason == FinishReason::ContextFull {
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
        warn_if_cut(generation.reason, engine.context());
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

fn beam_request(request: &Request) -> BeamRequest {
    BeamRequest {
        prompt: request.prompt.clone(),
        end_tokens: request.stop.end_tokens.clone(),
        max_tokens: request.stop.max_tokens,
    }
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
    let searched: Vec<BeamRequest> = requests.iter().map(beam_request).collect();
    let mut options = BeamOptions::new(args.beams);
    if let Some(exponent) = args.length_penalty {
        options.length_penalty = LengthPenalty::Power(exponent);
    }
    let all = engine.beam_search(&searched, options)?;
    for ((prompt, request), found) in texts.iter().zip(requests).zip(&all) {
        found.iter().for_each(|h| timer.add(h.tokens.len()));
        let shown = match args.prompts {
            None => 1,
            Some(_) => found.len(),
        };
        for (i, hypothesis) in found.iter().take(shown).enumerate() {
            let ends = &request.stop.end_tokens;
            let tokens = hypothesis.tokens.iter().filter(|t| !ends.contains(t));
            let text = tokenizer.decode(&tokens.copied().collect::<Vec<_>>());
            if args.prompts.is_none() {
                console::print(format_args!("{prompt}{text}\n"))?;
                continue;
            }
            let line = serde_json::json!({
                "prompt": prompt, "text": text, "rank": i, "score": hypothesis.score,
            });
            console::print(format_args!("{line}\n"))?;
        }
        let (context, num_prompt) = (engine.context(), request.prompt.len());
        let is_cut = |h: &Hypothesis| {
            let reason = request.stop.finish_reason(&h.tokens, num_prompt, context);
            reason == Some(FinishReason::ContextFull)
        };
        if found.iter().take(shown).any(is_cut) {
            warn_if_cut(FinishReason::ContextFull, context);
        }
    }
    Ok(())
}

/// What `--stats` tells: of one text, the time to the first token is that of the prompt.
struct Timer {
    num_requests: usize,
    searches: bool,
    num_prompt: usize,
    num_new: usize,
    start: Instant,
    first: Option<Duration>,
}

impl Timer {
    fn new(requests: &[Request], searches: bool) -> Self {
        Self {
            num_requests: requests.len(),
            searches,
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

    /// `reused` tokens of prompts were found in the cache.
    fn tell(&self, reused: usize) {
        let all = self.start.elapsed().as_secs_f64();
        let (num_prompt, num_new) = (self.num_prompt, self.num_new);
        let rate = num_new as f64 / all;
        if self.searches {
            console::tell(format_args!(
                "{num_new} tokens of results, {rate:.1} tokens/s"
            ));
            return;
        }
        if self.num_requests > 1 {
            let found = match reused {
                0 => String::new(),
                _ => format!(" ({reused} of them computed for another prompt)"),
            };
            console::tell(format_args!(
                "{num_prompt} prompt tokens{found} and {num_new} new tokens in {all:.2} s, {rate:.1} new \
                 tokens/s"
            ));
            return;
        }
        // A text may end before it begins.
        let first = self.first.map_or(all, |f| f.as_secs_f64());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};
    use std::ffi::OsString;

    fn args(flags: &[&str]) -> GenerateArgs {
        let start = ["setun", "generate", "--model", "m"];
        match parse(start.iter().chain(flags).map(OsString::from)) {
            Ok(Command::Generate(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_beam_search_would_ignore_is_refused_by_name() {
        let beams = ["--prompt", "a", "--beams", "2"];
        assert_eq!(check_beams(&args(&beams)), Ok(()));
        for flag in [
            "--draft=ngram",
            "--logprobs=2",
            "--temperature=0.8",
            "--seed=1",
        ] {
            let given = [&beams[..], &[flag]].concat();
            let error = check_beams(&args(&given)).unwrap_err().to_string();
            let name = flag.split('=').next().unwrap();
            assert!(
                error.ends_with(&format!("leave out --beams or {name}")),
                "{error}"
            );
            assert_eq!(check_beams(&args(&["--prompt", "a", flag])), Ok(()));
        }
        let penalty = "--length-penalty=1";
        let with =
            |more: &[&str]| check_beams(&args(&[&["--prompt", "a", penalty], more].concat()));
        assert_eq!(with(&["--beams=2"]), Ok(()));
        assert!(with(&[]).unwrap_err().to_string().contains("add --beams"));
    }

    #[test]
    fn errors_name_the_line_of_the_file() {
        let file = std::env::temp_dir().join(format!("setun-prompts-{}.txt", std::process::id()));
        std::fs::write(&file, "one\n\n\ntwo\n").unwrap();
        let path = file.to_str().unwrap();
        let from_file = args(&["--prompts", path]);
        let found = prompts(&from_file);
        std::fs::remove_file(&file).unwrap();
        let found = found.unwrap();
        assert_eq!(found.texts, ["one", "two"]);
        assert_eq!(found.lines, [1, 4]);
        let second = || EngineError::Request {
            number: 2,
            source: Box::new(EngineError::EmptyPrompt),
        };
        let error = with_line(second(), &from_file, &found).to_string();
        assert_eq!(error, format!("{path}:4: {}", EngineError::EmptyPrompt));
        let alone = args(&["--prompt", "a"]);
        let error = with_line(second(), &alone, &prompts(&alone).unwrap()).to_string();
        assert_eq!(error, EngineError::EmptyPrompt.to_string());
    }
}
