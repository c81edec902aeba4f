//! One pass over a 2-D weight, a block of rows at a time: how ternary is it, and where
//! is it not?

use super::report::TensorReport;
use crate::layout::{GROUP_SIZES, scale_problem};
use crate::{IoError, Matrix, OpenModel, TensorFile};
use half::{bf16, f16};
use setun_formats::config::ParameterInfo;
use setun_ternary::{
    MAX_SCALE, PackedMatrix, ScaleRule, groups_per_row, pack_row, packed_row_bytes, project_group,
};
use std::ops::Range;

/// Largest distance of `w / s` from a trit that still counts as ternary: room for an
/// exporter that rounded `s * t` in f32, far below what bf16 or f16 rounding of a float
/// weight leaves.
const TOLERANCE: f32 = 1e-5;

/// Rows are read in blocks of about this many weights.
const BLOCK_WEIGHTS: usize = 1 << 18;

/// What a pass over one matrix found.
pub(super) struct Scan {
    pub(super) report: TensorReport,
    /// The first thing that is wrong, with its place.
    pub(super) offence: Option<String>,
    /// Whether `matrix` is exactly what the file holds.
    pub(super) exact: bool,
    /// The matrix behind the values, as far as they are ternary.
    pub(super) matrix: PackedMatrix,
}

/// Scans a matrix of values. The scale of a group is its largest magnitude; with
/// `strict` it must be exact in bf16.
pub(super) fn scan_values(
    file: &TensorFile,
    name: &str,
    group_size: usize,
    strict: bool,
) -> Result<Scan, IoError> {
    let (rows, cols) = matrix_shape(file, name)?;
    let mut tally = Tally::new(name, rows, cols, group_size);
    let mut packed_row = vec![0; packed_row_bytes(cols, group_size)];
    let mut trits = vec![0; cols];
    for block in blocks(rows, cols) {
        let values = file.float_rows(name, block.clone())?;
        for (row, values) in block.zip(values.chunks(cols)) {
            for (group, start) in (0..cols).step_by(group_size).enumerate() {
                let end = cols.min(start + group_size);
                let place = (row, group, start);
                tally.values(place, &values[start..end], strict, &mut trits[start..end]);
            }
            pack_row(&trits, group_size, &mut packed_row);
            tally.matrix.trits.extend(&packed_row);
        }
    }
    Ok(tally.finish())
}

/// Scans trits and scales of a packed file whose header was checked.
pub(super) fn scan_packed(
    file: &TensorFile,
    name: &str,
    rows: usize,
    cols: usize,
    group_size: usize,
) -> Result<Scan, IoError> {
    let mut tally = Tally::new(name, rows, cols, group_size);
    let mut trits = vec![0; cols];
    for block in blocks(rows, cols) {
        let bytes = file.row_bytes(&format!("{name}.trits"), block.clone())?;
        tally.matrix.trits.extend(bytes);
        let scales = file.row_bytes(&format!("{name}.scales"), block.clone())?;
        let scales = scales.as_chunks::<2>().0.iter();
        tally
            .matrix
            .scales
            .extend(scales.map(|&s| f16::from_le_bytes(s)));
        for row in block {
            if let Err(error) = tally.matrix.unpack_row(row, &mut trits) {
                tally.offend(|| format!("row {row}: {error}"));
                continue;
            }
            for group in 0..groups_per_row(cols, group_size) {
                let scale = tally.matrix.row_scales(row)[group];
                if let Some(problem) = scale_problem(scale) {
                    tally.offend(|| format!("row {row} group {group}: scale {scale} {problem}"));
                }
                tally.scale(scale.to_f32());
            }
            tally.count(&trits);
        }
    }
    Ok(tally.finish())
}

/// Scans a matrix as the reader of its format gives it: trits and scales, or an error
/// that names the place.
pub(super) fn scan_model(model: &OpenModel, parameter: &ParameterInfo, group_size: usize) -> Scan {
    let (name, rows, cols) = (&parameter.name, parameter.shape[0], parameter.shape[1]);
    let mut tally = Tally::new(name, rows, cols, group_size);
    let mut trits = vec![0; cols];
    for block in blocks(rows, cols) {
        let matrix = match model.matrix_rows(name, block.clone()) {
            Ok(Matrix::Ternary(matrix)) => matrix,
            Ok(Matrix::Dense(_)) => {
                tally.offend(|| "is a float matrix".to_owned());
                return tally.finish();
            }
            Err(error) => {
                // The message names the tensor itself.
                tally.exact = false;
                tally.offence.get_or_insert(match error {
                    IoError::Invalid { problem, .. } => problem,
                    other => other.to_string(),
                });
                return tally.finish();
            }
        };
        for row in 0..matrix.rows {
            // Reading has checked every code.
            if let Err(error) = matrix.unpack_row(row, &mut trits) {
                tally.offend(|| format!("row {}: {error}", block.start + row));
                continue;
            }
            for (group, scale) in matrix.row_scales(row).iter().enumerate() {
                if !scale.is_finite() || scale.is_sign_negative() {
                    let row = block.start + row;
                    tally.offend(|| format!("row {row} group {group}: {scale} is not a scale"));
                }
                tally.scale(scale.to_f32());
            }
            tally.count(&trits);
        }
        tally.matrix.trits.extend(matrix.trits);
        tally.matrix.scales.extend(matrix.scales);
    }
    tally.finish()
}

/// The first place where `packed` is not the projection of the latents called `name`.
pub(super) fn projection_difference(
    latents: &TensorFile,
    name: &str,
    packed: &PackedMatrix,
    rule: ScaleRule,
) -> Result<Option<String>, IoError> {
    let (rows, cols, group_size) = (packed.rows, packed.cols, packed.group_size);
    let mut stored = vec![0; cols];
    let mut trits = vec![0; group_size.min(cols)];
    for block in blocks(rows, cols) {
        let values = latents.float_rows(name, block.clone())?;
        for (row, values) in block.zip(values.chunks(cols)) {
            if packed.unpack_row(row, &mut stored).is_err() {
                // The scan names it.
                return Ok(None);
            }
            let groups = values.chunks(group_size).zip(stored.chunks(group_size));
            for (group, (values, stored)) in groups.enumerate() {
                let trits = &mut trits[..values.len()];
                let scale = project_group(values, rule, trits).map_err(|why| {
                    let problem = format!("{name} row {row} group {group}: {why}");
                    IoError::invalid(latents.path(), problem)
                })?;
                let packed_scale = packed.row_scales(row)[group].to_f32();
                if scale != packed_scale {
                    return Ok(Some(format!(
                        "{name} row {row} group {group}: scale {packed_scale}, but the latents \
                         give {scale}"
                    )));
                }
                if let Some(i) = (0..trits.len()).find(|&i| trits[i] != stored[i]) {
                    let column = group * group_size + i;
                    return Ok(Some(format!(
                        "{name} row {row} column {column}: trit {}, but the latent {} gives {}",
                        stored[i], values[i], trits[i]
                    )));
                }
            }
        }
    }
    Ok(None)
}

/// The group size among the usual ones with which the fewest groups are not ternary (the
/// largest of those), and how many are not.
pub(super) fn infer_group_size(
    matrices: &[(&str, &TensorFile)],
) -> Result<(usize, usize), IoError> {
    let mut num_bad = [0usize; GROUP_SIZES.len()];
    for &(name, file) in matrices {
        let (rows, cols) = matrix_shape(file, name)?;
        for block in blocks(rows, cols) {
            let values = file.float_rows(name, block)?;
            for row in values.chunks(cols) {
                for (num_bad, &size) in num_bad.iter_mut().zip(&GROUP_SIZES) {
                    let bad = row.chunks(size).filter(|group| !is_ternary(group));
                    *num_bad += bad.count();
                }
            }
        }
    }
    // `min_by_key` takes the first of equals: the largest size.
    let best = GROUP_SIZES
        .into_iter()
        .zip(num_bad)
        .min_by_key(|&(_, bad)| bad);
    Ok(best.unwrap_or((GROUP_SIZES[0], 0)))
}

struct Tally {
    report: TensorReport,
    counts: [u64; 3],
    offence: Option<String>,
    exact: bool,
    matrix: PackedMatrix,
}

impl Tally {
    fn new(name: &str, rows: usize, cols: usize, group_size: usize) -> Self {
        Self {
            report: TensorReport {
                name: name.to_owned(),
                shape: vec![rows, cols],
                num_groups: rows * groups_per_row(cols, group_size),
                share_minus: 0.0,
                share_zero: 0.0,
                share_plus: 0.0,
                scale_min: f32::INFINITY,
                scale_max: 0.0,
                worst_distance: 0.0,
            },
            counts: [0; 3],
            offence: None,
            exact: true,
            matrix: PackedMatrix {
                rows,
                cols,
                group_size,
                trits: Vec::new(),
                scales: Vec::new(),
            },
        }
    }

    /// Takes one group of values, which starts at `(row, group, column)`.
    fn values(
        &mut self,
        (row, group, column): (usize, usize, usize),
        values: &[f32],
        strict: bool,
        trits: &mut [i8],
    ) {
        let scale = largest_magnitude(values);
        let worst = worst_distance(values, scale);
        self.report.worst_distance = self.report.worst_distance.max(worst);
        if worst > TOLERANCE {
            self.offend(|| {
                let i = odd_one_out(values);
                let (column, value) = (column + i, values[i]);
                format!(
                    "row {row} column {column}: {value} is not ternary (group {group}, scale \
                     {scale})"
                )
            });
        }
        if scale > MAX_SCALE {
            self.offend(|| format!("row {row} group {group}: scale {scale} is above 65504"));
        } else if strict && bf16::from_f32(scale).to_f32() != scale {
            self.offend(|| format!("row {row} group {group}: scale {scale} is not exact in bf16"));
        }
        for (trit, &w) in trits.iter_mut().zip(values) {
            *trit = i8::from(w > 0.5 * scale) - i8::from(w < -0.5 * scale);
        }
        self.scale(scale);
        self.count(trits);
        let stored = f16::from_f32(scale);
        self.exact &= worst == 0.0 && stored.to_f32() == scale;
        self.matrix.scales.push(stored);
    }

    fn scale(&mut self, scale: f32) {
        self.report.scale_min = self.report.scale_min.min(scale);
        self.report.scale_max = self.report.scale_max.max(scale);
    }

    fn count(&mut self, trits: &[i8]) {
        for &trit in trits {
            self.counts[(trit + 1) as usize] += 1;
        }
    }

    fn offend(&mut self, describe: impl FnOnce() -> String) {
        if self.offence.is_none() {
            self.offence = Some(format!("{} {}", self.report.name, describe()));
        }
        self.exact = false;
    }

    fn finish(mut self) -> Scan {
        let total = (self.matrix.rows * self.matrix.cols).max(1) as f64;
        let [minus, zero, plus] = self.counts.map(|count| count as f64 / total);
        self.report.share_minus = minus;
        self.report.share_zero = zero;
        self.report.share_plus = plus;
        Scan {
            report: self.report,
            offence: self.offence,
            exact: self.exact,
            matrix: self.matrix,
        }
    }
}

fn matrix_shape(file: &TensorFile, name: &str) -> Result<(usize, usize), IoError> {
    match file.shape(name)? {
        &[rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
        shape => {
            let problem = format!("{name} has shape {shape:?}, expected a matrix");
            Err(IoError::invalid(file.path(), problem))
        }
    }
}

fn blocks(rows: usize, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (BLOCK_WEIGHTS / cols).max(1);
    (0..rows)
        .step_by(step)
        .map(move |start| start..rows.min(start + step))
}

/// Infinite if one value is not finite.
fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, w| {
        if w.is_finite() {
            max.max(w.abs())
        } else {
            f32::INFINITY
        }
    })
}

/// Largest distance of `|w| / scale` from {0, 1}; infinite if the scale is.
fn worst_distance(values: &[f32], scale: f32) -> f32 {
    if scale == 0.0 {
        return 0.0;
    }
    if !scale.is_finite() {
        return f32::INFINITY;
    }
    let distance = |w: &f32| {
        let ratio = w.abs() / scale;
        ratio.min((1.0 - ratio).abs())
    };
    values.iter().map(distance).fold(0.0, f32::max)
}

fn is_ternary(values: &[f32]) -> bool {
    worst_distance(values, largest_magnitude(values)) <= TOLERANCE
}

/// Index of the first value that is neither zero nor of the group's most frequent
/// magnitude: where one weight was changed, this is the one, even if it is the largest.
fn odd_one_out(values: &[f32]) -> usize {
    if let Some(i) = values.iter().position(|w| !w.is_finite()) {
        return i;
    }
    let mut magnitudes: Vec<u32> = values.iter().map(|w| w.abs().to_bits()).collect();
    magnitudes.retain(|&bits| bits != 0);
    magnitudes.sort_unstable();
    let frequent = magnitudes
        .chunk_by(|a, b| a == b)
        .max_by_key(|run| run.len())
        .map_or(0, |run| run[0]);
    let odd = |w: &f32| *w != 0.0 && w.abs().to_bits() != frequent;
    values.iter().position(odd).unwrap_or(0)
}
