//! Files on disk: opening, exporting and verifying models, and committing directories
//! so that nothing that was committed is ever lost.
//!
//! - [`DirWriter`] writes a directory that appears whole or not at all, with a manifest
//!   of sizes and hashes; [`newest_valid_checkpoint`] and [`retire`] live off it.
//! - [`OpenModel`] reads a model from a run, a checkpoint, a packed file, a Hugging Face,
//!   compressed-tensors or MLX directory, or a GGUF file, a few rows at a time.
//! - [`export_huggingface`], [`export_packed`] and [`convert`] write what the ecosystem
//!   loads; [`inspect`] says what a file holds.
//! - [`verify`] proves that a file is ternary and undamaged, or names the place.
//!
//! Invariants: no training, no `unsafe`, and so no memory maps: a file that is
//! rewritten under a reader gives an error, never undefined behaviour. Results depend
//! on file contents only, never on directory order or time.
#![forbid(unsafe_code)]

mod checkpoints;
mod commit;
mod convert;
mod drafter;
mod encode;
mod error;
mod export;
mod faults;
mod file_ops;
#[cfg(test)]
mod fixture;
mod gguf_file;
mod hash;
mod huggingface;
mod inspect;
mod layout;
mod manifest;
mod open;
mod regroup;
mod source;
mod tensor_file;
mod verify;
mod weights;

pub use checkpoints::{
    Retention, RunLock, checkpoint_name, checkpoints, newest_valid_checkpoint,
    parse_checkpoint_name, remove_checkpoint, retire,
};
pub use commit::{DirWriter, output_path, write_atomic, write_atomic_with};
pub use convert::{ConvertOptions, ConvertSummary, Format, convert};
pub use drafter::{DRAFTER_DIRECTORY, OpenDrafter, export_drafter, find_drafter};
pub use error::IoError;
pub use export::{
    ExportDtype, GgufWeights, MAX_SHARD_BYTES, export_huggingface, export_packed, write_packed,
};
pub use faults::{Fault, FaultyOps};
pub use file_ops::{FileOps, OutputFile, RealOps};
pub use hash::TernaryHasher;
pub use inspect::{InspectedFile, InspectedTensor, Inspection, inspect};
pub use layout::{SCALE_FACTOR, is_run};
pub use manifest::{FileEntry, MANIFEST, Manifest, verify_manifest, verify_manifest_with};
pub use open::{Matrix, ModelKind, OpenModel, Which};
pub use source::{BlockSink, Progress, TensorSource};
pub use tensor_file::TensorFile;
pub use verify::{MIN_GROUP_SIZE, ModelReport, TensorReport, VerifyReport, verify};
