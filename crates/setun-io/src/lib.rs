//! Files on disk: opening, exporting and verifying models, and committing directories
//! so that nothing that was committed is ever lost.
//!
//! - [`DirWriter`] writes a directory that appears whole or not at all, with a manifest
//!   of sizes and hashes; [`newest_valid_checkpoint`] and [`retire`] live off it.
//! - [`OpenModel`] reads a model from a run, a checkpoint, a packed file or a Hugging
//!   Face directory, one tensor at a time.
//! - [`export_huggingface`] and [`export_packed`] write what the ecosystem loads.
//! - [`verify`] proves that a file is ternary and undamaged, or names the place.
//!
//! Invariants: no training, no `unsafe`, and so no memory maps: a file that is
//! rewritten under a reader gives an error, never undefined behaviour. Results depend
//! on file contents only, never on directory order or time.
#![forbid(unsafe_code)]

mod checkpoints;
mod commit;
mod error;
mod export;
#[cfg(test)]
mod fixture;
mod hash;
mod layout;
mod manifest;
mod open;
mod tensor_file;
mod verify;

pub use checkpoints::{
    RunLock, checkpoint_name, checkpoints, newest_valid_checkpoint, parse_checkpoint_name, retire,
};
pub use commit::{DirWriter, write_atomic};
pub use error::IoError;
pub use export::{ExportDtype, TensorSource, export_huggingface, export_packed, write_packed};
pub use hash::TernaryHasher;
pub use manifest::{FileEntry, MANIFEST, Manifest, verify_manifest};
pub use open::{Matrix, ModelKind, OpenModel, Which};
pub use tensor_file::TensorFile;
pub use verify::{ModelReport, TensorReport, VerifyReport, verify};
