//! Why a training cannot go on.

use crate::data::DataError;
use crate::report::record::MetricsError;
use crate::settings::SettingsError;
use setun_formats::{ConfigError, TokenizerError};
use setun_infer::EngineError;
use setun_io::IoError;
use setun_model::{ProjectFailure, SetError};
use thiserror::Error;

/// Why a training cannot start or go on; each message names the place and the remedy.
#[derive(Debug, Error)]
pub enum TrainError {
    /// Settings that cannot be run.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Text or tokens.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Files of the run.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The shape of the model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Values for a parameter.
    #[error(transparent)]
    Set(#[from] SetError),
    /// A scale that cannot be shipped.
    #[error(transparent)]
    Project(#[from] ProjectFailure),
    /// Running the model for samples.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The metrics of an earlier session.
    #[error("metrics.jsonl: {0}")]
    Metrics(#[from] MetricsError),
    /// Anything else, with its remedy in the text.
    #[error("{0}")]
    Refused(String),
}

impl TrainError {
    pub(crate) fn refused(text: impl Into<String>) -> Self {
        Self::Refused(text.into())
    }
}
