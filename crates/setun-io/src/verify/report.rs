//! What `verify` found, as data and as a table.

use crate::{IoError, ModelKind};
use serde::Serialize;
use setun_formats::packed::TernaryInfo;
use setun_ternary::{Numerics, ScaleRule};
use std::fmt;
use std::path::{Path, PathBuf};

/// The verdict on a path and the evidence for it.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// What was verified.
    pub path: PathBuf,
    /// Every model below it that could be read.
    pub models: Vec<ModelReport>,
    /// What is worth knowing and no failure.
    pub notes: Vec<String>,
    /// Everything that is wrong, each with its file and place; the first offending
    /// weight of each tensor.
    pub failures: Vec<String>,
    /// Whether it is a run, or a checkpoint, of a model that was not trained to be ternary.
    pub is_dense: bool,
}

/// One model of a [`VerifyReport`].
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// The directory or file.
    pub path: PathBuf,
    /// Its format.
    pub kind: ModelKind,
    /// Weights that share a scale.
    pub group_size: usize,
    /// Whether the group size was inferred from the values, for lack of a record.
    pub group_size_inferred: bool,
    /// How scales follow from latents.
    pub scale_rule: ScaleRule,
    /// Arithmetic of the forward pass.
    pub numerics: Numerics,
    /// Every 2-D weight, in canonical order.
    pub tensors: Vec<TensorReport>,
    /// Number of norms, which stay in f32.
    pub num_norms: usize,
    /// Number of weights in norms.
    pub num_norm_weights: usize,
    /// The canonical hash ([`TernaryHasher`](crate::TernaryHasher)); `None` if the
    /// values are not exactly ternary.
    pub ternary_hash: Option<String>,
}

/// One 2-D weight of a [`ModelReport`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorReport {
    /// Hugging Face name.
    pub name: String,
    /// `[out, in]`.
    pub shape: Vec<usize>,
    /// Number of groups, each with one scale.
    pub num_groups: usize,
    /// Share of the weights that are -1.
    pub share_minus: f64,
    /// Share of the weights that are 0.
    pub share_zero: f64,
    /// Share of the weights that are +1.
    pub share_plus: f64,
    /// Smallest scale.
    pub scale_min: f32,
    /// Largest scale.
    pub scale_max: f32,
    /// Largest distance of `w / s` from {-1, 0, +1}, where `s` is the largest magnitude
    /// in the group.
    pub worst_distance: f32,
}

impl VerifyReport {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            models: Vec::new(),
            notes: Vec::new(),
            failures: Vec::new(),
            is_dense: false,
        }
    }

    /// Whether everything that was looked at is ternary and undamaged.
    pub fn ok(&self) -> bool {
        self.failures.is_empty() && !self.models.is_empty()
    }

    pub(super) fn fail(&mut self, error: IoError) {
        self.failures.push(error.to_string());
    }

    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

impl ModelReport {
    pub(super) fn new(path: &Path, kind: ModelKind, ternary: &TernaryInfo, inferred: bool) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            group_size: ternary.group_size,
            group_size_inferred: inferred,
            scale_rule: ternary.scale_rule,
            numerics: ternary.numerics,
            tensors: Vec::new(),
            num_norms: 0,
            num_norm_weights: 0,
            ternary_hash: None,
        }
    }

    /// Number of weights in 2-D tensors.
    pub fn num_ternary_weights(&self) -> usize {
        let sizes = self.tensors.iter().map(TensorReport::num_weights);
        sizes.sum()
    }
}

impl TensorReport {
    fn num_weights(&self) -> usize {
        self.shape.iter().product()
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for model in &self.models {
            writeln!(f, "{model}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED: {failure}")?;
        }
        let path = self.path.display();
        match self.failures.len() {
            _ if self.ok() => write!(f, "{path}: verified, every matrix is ternary"),
            1 => write!(f, "{path}: NOT verified, 1 failure"),
            n => write!(f, "{path}: NOT verified, {n} failures"),
        }
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path.display())?;
        if self.group_size_inferred {
            writeln!(
                f,
                "group size {} (inferred from the values)",
                self.group_size
            )?;
        } else {
            let (rule, numerics) = (self.scale_rule.name(), self.numerics.name());
            let size = self.group_size;
            writeln!(
                f,
                "group size {size}, scale rule {rule}, numerics {numerics}"
            )?;
        }
        let mut rows = vec![HEADINGS.map(str::to_owned)];
        rows.extend(self.tensors.iter().map(TensorReport::row));
        rows.push(self.total());
        write_table(f, &rows)?;
        writeln!(
            f,
            "{} norms with {} weights stay in f32",
            self.num_norms, self.num_norm_weights
        )?;
        let hash = self.ternary_hash.as_deref();
        writeln!(
            f,
            "ternary hash {}",
            hash.unwrap_or("none: not exactly ternary")
        )
    }
}

const HEADINGS: [&str; 9] = [
    "tensor",
    "shape",
    "groups",
    "-1",
    "0",
    "+1",
    "scale min",
    "scale max",
    "worst |w/s - t|",
];

impl TensorReport {
    fn row(&self) -> [String; HEADINGS.len()] {
        [
            self.name.clone(),
            self.shape
                .iter()
                .map(usize::to_string)
                .collect::<Vec<_>>()
                .join(" x "),
            self.num_groups.to_string(),
            percent(self.share_minus),
            percent(self.share_zero),
            percent(self.share_plus),
            number(self.scale_min),
            number(self.scale_max),
            number(self.worst_distance),
        ]
    }
}

impl ModelReport {
    fn total(&self) -> [String; HEADINGS.len()] {
        let num_weights = self.num_ternary_weights();
        let share = |of: fn(&TensorReport) -> f64| {
            let sum: f64 = self
                .tensors
                .iter()
                .map(|t| of(t) * t.num_weights() as f64)
                .sum();
            percent(sum / num_weights.max(1) as f64)
        };
        let tensors = self.tensors.iter();
        [
            format!("total: {} matrices", self.tensors.len()),
            num_weights.to_string(),
            tensors
                .clone()
                .map(|t| t.num_groups)
                .sum::<usize>()
                .to_string(),
            share(|t| t.share_minus),
            share(|t| t.share_zero),
            share(|t| t.share_plus),
            number(
                tensors
                    .clone()
                    .map(|t| t.scale_min)
                    .fold(f32::INFINITY, f32::min),
            ),
            number(tensors.clone().map(|t| t.scale_max).fold(0.0, f32::max)),
            number(tensors.map(|t| t.worst_distance).fold(0.0, f32::max)),
        ]
    }
}

/// Names to the left, numbers to the right, each column as wide as its widest cell.
fn write_table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in rows {
        let (first, first_width) = (&row[0], widths[0]);
        write!(f, "{first:<first_width$}")?;
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            write!(f, "  {cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn number(x: f32) -> String {
    if x == 0.0 {
        "0".to_owned()
    } else {
        format!("{x:.3e}")
    }
}
