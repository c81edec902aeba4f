//! The number format of Setun: weights in {-s, 0, +s} with one scale per group.
//!
//! A weight matrix has shape `[out, in]`. Along `in`, each run of `group_size`
//! weights shares one scale; a last, shorter group is allowed. This crate holds the
//! only quantizer ([`project_group`]), its inverse for training on
//! ([`reconstruct_latents`]), the packed bytes ([`PackedMatrix`]), and the codecs of the
//! formats of others that hold the same weights ([`blocks`], [`words`]).
//! No threads, no files, no `unsafe`.
#![forbid(unsafe_code)]

pub mod blocks;
mod codes;
mod packed;
mod project;
pub mod words;

pub use packed::{PackError, PackedMatrix, pack_row, packed_row_bytes, unpack_row};
pub use project::{
    MAX_SCALE, MIN_SCALE, ScaleError, group_mean, project_group, project_group_scaled,
    reconstruct_latents,
};

use serde::{Deserialize, Serialize};

/// How the scale of a group follows from its latent weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// `s = mean |w|` (BitNet b1.58, Ternary Bonsai).
    #[default]
    Mean,
    /// `s = max |w|`.
    Max,
    /// `s = mean |w|` over the weights with `|w| > mean / 2` (TWN's least-squares scale
    /// for that support); exactly those weights are non-zero.
    MeanNonzero,
    /// The scale and the trits that lie nearest to the weights, by the sum of squared errors
    /// (TWN's problem, solved exactly): `s` is the mean of the `k` largest `|w|`, for the `k`
    /// that is best.
    LeastSquares,
    /// As [`ScaleRule::Mean`], but the scale is rounded to f16: three more bits, with
    /// which `s * t` is exact in f16 and f32 and no longer in bf16. An experiment that
    /// measures what the rounding to bf16 costs: no file has it, and no name leads to it.
    MeanF16,
}

impl ScaleRule {
    /// The rules that files can have, in the order of help texts.
    pub const ALL: [Self; 4] = [Self::Mean, Self::Max, Self::MeanNonzero, Self::LeastSquares];

    /// Name as it is written in recipes and file metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Max => "max",
            Self::MeanNonzero => "mean-nonzero",
            Self::LeastSquares => "least-squares",
            Self::MeanF16 => "mean-f16",
        }
    }

    /// The rule called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

/// Arithmetic of the products; recorded in every export because it changes the logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// int8 activations, exact integer sums per group.
    #[default]
    Int8,
    /// bf16 operands, f32 accumulation.
    Bf16,
    /// f32 operands, f32 accumulation: parity with PyTorch.
    F32,
}

impl Numerics {
    /// Name as it is written in recipes and file metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// The mode called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Int8, Self::Bf16, Self::F32]
            .into_iter()
            .find(|mode| mode.name() == name)
    }
}

/// Number of groups in a row of `cols` weights; the last one may be short.
pub fn groups_per_row(cols: usize, group_size: usize) -> usize {
    cols.div_ceil(group_size)
}
