//! `--draft`: where guesses come from, and decoding with them.

use crate::args::Drafting;
use crate::console;
use setun_formats::Tokenizer;
use setun_infer::{
    BlockGuesses, Clock, Drafter, Engine, EngineError, EngineOptions, Generation, ModelDrafter,
    PromptLookup, Request, Speculator, spec_of,
};
use setun_io::{OpenDrafter, OpenModel, find_drafter};
use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

/// The target's engine with what drafts for it.
type Drafted = (Engine, Option<Box<dyn Drafter>>);

/// The target's engine, unless it is `loaded` already, and the drafter that was asked for.
pub(in crate::commands) fn engine_and_drafter(
    drafting: &Drafting,
    (target, loaded): (&OpenModel, Option<Engine>),
    tokenizer: &Tokenizer,
    options: EngineOptions,
) -> Result<Drafted, Box<dyn Error>> {
    let plain = || loaded.map_or_else(|| Engine::load(target, options), Ok);
    let path = match drafting {
        Drafting::None => return Ok((plain()?, None)),
        Drafting::Ngram => return Ok((plain()?, Some(Box::new(PromptLookup::new())))),
        Drafting::Model(path) => path,
    };
    if let Some(file) = find_drafter(path) {
        let drafter = OpenDrafter::open(&file)?;
        let engine = Engine::load_with_drafter(target, &drafter, options)?;
        return Ok((engine, Some(Box::new(BlockGuesses))));
    }
    let helper = model_drafter(path, target, tokenizer, options)?;
    Ok((plain()?, Some(Box::new(helper))))
}

/// A smaller model with the same tokenizer.
fn model_drafter(
    path: &Path,
    target: &OpenModel,
    tokenizer: &Tokenizer,
    options: EngineOptions,
) -> Result<ModelDrafter, Box<dyn Error>> {
    let model = OpenModel::open(path)?;
    let own = super::super::tokenizer_of(&model)?;
    if let Some(id) = own.first_difference(tokenizer) {
        let error = format!(
            "--draft {}: its tokenizer is not the model's: token {id} is {:?} there and {:?} here; \
             drafts are tokens, so both models need the same ones",
            path.display(),
            own.decode(&[id]),
            tokenizer.decode(&[id]),
        );
        return Err(error.into());
    }
    // One sequence; two blocks are room to write while others are kept.
    let context = options.context.min(model.config().max_position_embeddings);
    let options = EngineOptions {
        context,
        cache: None,
        cache_tokens: Some(context.saturating_add(32)),
        ..options
    };
    let engine = Engine::load(&model, options)?;
    Ok(ModelDrafter::new(engine, &spec_of(target, None)?)?)
}

/// Decoding, with drafts if there is a drafter.
pub(super) struct Decoder<'a>(Option<Speculator<'a>>);

impl<'a> Decoder<'a> {
    /// With the times of `clock`, in seconds.
    pub fn new(drafter: Option<&'a mut (dyn Drafter + 'static)>, clock: &'a mut Clock<'a>) -> Self {
        Self(drafter.map(|drafter| Speculator::new(drafter, clock)))
    }

    /// One text.
    pub fn generate(
        &mut self,
        engine: &mut Engine,
        request: &Request,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, EngineError> {
        match &mut self.0 {
            None => engine.generate(request, on_token),
            Some(speculator) => engine.speculate(request, speculator, on_token),
        }
    }

    /// All texts: together, or one after the other where drafts fill the steps.
    pub fn generate_all(
        &mut self,
        engine: &mut Engine,
        requests: &[Request],
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Vec<Generation>, EngineError> {
        if self.0.is_none() {
            return engine.generate_batch(requests, |_, token| on_token(token));
        }
        engine.check_requests(requests)?;
        let mut told = |token| {
            on_token(token);
            ControlFlow::Continue(())
        };
        let one = |request| self.generate(engine, request, &mut told);
        requests.iter().map(one).collect()
    }

    /// What became of the drafts.
    pub fn tell(&self) {
        let Some(stats) = self.0.as_ref().map(|s| s.stats) else {
            return;
        };
        console::tell(format_args!(
            "{} tokens drafted, {} accepted ({:.1} %), {:.2} tokens per step",
            stats.drafted,
            stats.accepted,
            100.0 * stats.acceptance(),
            stats.tokens_per_step()
        ));
    }
}
