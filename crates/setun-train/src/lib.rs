//! Training: data, optimizer, schedules, checkpoints, evaluation, the run and its report.
//!
//! [`run::train`] is the whole of `setun train`; [`trainer::Trainer::step`] is one step.
#![forbid(unsafe_code)]

pub mod average;
pub mod checkpoint;
pub mod clip;
pub mod data;
pub mod drafter;
pub mod evaluate;
pub mod finish;
pub mod guard;
mod learned_scales;
pub mod machine;
pub mod metrics;
pub mod muon;
pub mod optimizer;
pub mod prepare;
pub mod profile;
pub mod report;
pub mod results;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod sweep;
pub mod tensorboard;
pub mod trainer;

mod error;
mod models;

pub use error::TrainError;
