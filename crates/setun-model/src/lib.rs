//! Qwen3 on a [`Backend`](setun_backend::Backend): parameters, forward, backward.
//!
//! One definition of the architecture, dense and ternary, for training, evaluation,
//! prefill and decode. No files, sockets, clocks or state of random numbers in here.
//!
//! Shape suffixes and letters in comments: b batch, t tokens (rows), d `hidden_size`,
//! f `intermediate_size`, h query heads, k key heads, e `head_dim`, v vocabulary, l layers.
#![forbid(unsafe_code)]

mod block_drafter;
mod buffers;
mod dropout;
mod init;
mod parameters;
mod qwen3;
mod rope;

pub use block_drafter::{BlockDrafter, DraftBatch, DrafterSpec};
pub use buffers::{DecodeShape, Purpose, TrainShape};
pub use dropout::StepDropout;
pub use parameters::{
    Form, Parameter, ParameterUse, Parameters, ProjectFailure, Scheme, SetError, is_embedding,
    is_frozen,
};
pub use qwen3::{CachedRows, ModelSpec, Qwen3, Teacher};
pub use rope::{RopeTable, inverse_frequencies};
