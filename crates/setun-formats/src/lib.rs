//! Bytes to typed views and back: `config.json`, safetensors, the packed ternary file,
//! the tokenizer.
//!
//! Nothing here opens a file or knows what a tensor is for. Every parser takes bytes
//! from a stranger: it checks sizes before it allocates, never panics on what it reads,
//! and refuses with an error that names the key, tensor or token and the remedy. The
//! caller adds the path.
#![forbid(unsafe_code)]

pub mod chat;
pub mod config;
pub mod drafter;
pub mod generation_config;
pub mod gguf;
pub mod packed;
pub mod tensors;
pub mod tokenizer;

pub use chat::{ChatError, ChatLimits, ChatRequest, ChatTemplate, Clock, Message};
pub use config::{ConfigError, ParameterInfo, Qwen3Config, RopeConfig, YarnConfig};
pub use drafter::{DrafterFile, DrafterHeader, drafter_parameters};
pub use gguf::{GgufError, GgufHeader, GgufLimits, GgufTensorInfo, GgufType, GgufValue};
pub use packed::{PackedError, PackedFile, PackedHeader, TernaryInfo};
pub use tensors::{Dtype, SafeTensors, TensorInfo, TensorView, TensorsError};
pub use tokenizer::{DecodeStream, END_OF_TEXT, Tokenizer, TokenizerError};
