//! Running a model: the engine with its cache of keys and values, sampling, stop rules.
//! Speaks token ids only.
#![forbid(unsafe_code)]

pub mod beam;
mod distribution;
pub mod draft;
mod engine;
mod generate;
pub mod kept;
pub mod kv;
mod logprobs;
pub mod plan;
pub mod sampler;
mod speculate;
pub mod stop;
pub mod verify;

pub use beam::{BeamOptions, BeamRequest, EarlyStopping, Hypothesis, LengthPenalty, Ranking};
pub use distribution::Distribution;
pub use draft::{
    BlockGuesses, Budget, Draft, DraftTree, Drafter, ModelDrafter, PromptLookup, Target, TreeError,
};
pub use engine::{
    Chunk, Engine, EngineError, EngineOptions, OnLogits, OnTopK, Shaped, Wanted, exact_cache,
    load_parameters, occurrences, spec_of,
};
pub use generate::{Answer, Generation, Request};
pub use kv::{KvError, KvTables, Sequence};
pub use logprobs::TokenLogprobs;
pub use plan::{CostModel, Planner};
pub use sampler::{Sampler, SamplerError, SamplerOptions, uniform_at, uniform_draw};
pub use speculate::{Clock, Speculator, TreeSize};
pub use stop::{FinishReason, StopRules};
pub use verify::DraftStats;
