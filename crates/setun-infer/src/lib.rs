//! Running a model: the engine with its cache of keys and values, sampling, stop rules.
//! Speaks token ids only.
#![forbid(unsafe_code)]

pub mod beam;
mod engine;
mod generate;
pub mod kept;
pub mod kv;
pub mod sampler;
pub mod stop;

pub use beam::{BeamOptions, BeamRequest, EarlyStopping, Hypothesis, LengthPenalty, Ranking};
pub use engine::{
    Chunk, Engine, EngineError, EngineOptions, OnLogits, OnTopK, Shaped, Wanted, load_parameters,
    spec_of,
};
pub use generate::{Generation, Request};
pub use kv::{KvError, KvTables, Sequence};
pub use sampler::{Sampler, SamplerError, SamplerOptions, uniform_at};
pub use stop::{FinishReason, StopRules};
