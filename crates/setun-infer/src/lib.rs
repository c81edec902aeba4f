//! Running a model: the engine with its cache of keys and values, sampling, stop rules.
//! Speaks token ids only.
#![forbid(unsafe_code)]

mod engine;
pub mod sampler;
pub mod stop;

pub use engine::{Engine, EngineError, EngineOptions, Generation, load_parameters, spec_of};
pub use sampler::{Sampler, SamplerError, SamplerOptions, uniform_at};
pub use stop::{FinishReason, StopRules};
