//! Where exported weights come from, and what can happen to them on the way: matrices
//! pass by in blocks of rows, so that none is ever held whole.

use crate::regroup::widen;
use crate::weights::row_blocks;
use crate::{IoError, Matrix, OpenModel};
use setun_formats::config::ParameterInfo;
use setun_formats::packed::TernaryInfo;
use setun_ternary::PackedMatrix;
use std::cell::RefCell;
use std::ops::ControlFlow;

/// Takes the next rows of a matrix, which begin at the given row.
pub type BlockSink<'a> = dyn FnMut(usize, Matrix) -> Result<(), IoError> + 'a;

/// Weights by Hugging Face name: an open model, or the buffers of a training.
pub trait TensorSource {
    /// The matrix `[out, in]` called `name`.
    ///
    /// # Errors
    /// No such matrix, or it cannot be read.
    fn matrix(&self, name: &str) -> Result<Matrix, IoError>;

    /// The norm weights called `name`.
    ///
    /// # Errors
    /// No such norm, or it cannot be read.
    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError>;

    /// Passes all rows of a matrix to `each`, in order. A source that holds its matrices
    /// anyway passes each in one block.
    ///
    /// # Errors
    /// As [`TensorSource::matrix`], and what `each` returns.
    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        each(0, self.matrix(&parameter.name)?)
    }
}

impl TensorSource for OpenModel {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        OpenModel::matrix(self, name)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        OpenModel::norm(self, name)
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        let group_size = self.ternary().map(|ternary| ternary.group_size);
        let blocks = crate::weights::BLOCK_WEIGHTS;
        read_blocks(self, parameter, (group_size, blocks), each)
    }
}

/// An open model read in blocks of a chosen size, as ternary with a chosen group size.
pub(crate) struct Streamed<'a> {
    pub(crate) model: &'a OpenModel,
    /// `None` for values as they are.
    pub(crate) group_size: Option<usize>,
    pub(crate) block_weights: usize,
}

impl TensorSource for Streamed<'_> {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        self.model.matrix(name)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        self.model.norm(name)
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        read_blocks(
            self.model,
            parameter,
            (self.group_size, self.block_weights),
            each,
        )
    }
}

fn read_blocks(
    model: &OpenModel,
    parameter: &ParameterInfo,
    (group_size, block_weights): (Option<usize>, usize),
    each: &mut BlockSink<'_>,
) -> Result<(), IoError> {
    let &[num_rows, cols] = parameter.shape.as_slice() else {
        let problem = format!("{} is no matrix", parameter.name);
        return Err(IoError::invalid(model.directory(), problem));
    };
    for rows in row_blocks(num_rows, cols, block_weights) {
        let first = rows.start;
        each(first, model.rows_with(&parameter.name, rows, group_size)?)?;
    }
    Ok(())
}

/// Dense weights, projected on the way; ternary ones pass as they are.
pub(crate) struct Projected<'a> {
    pub(crate) source: &'a dyn TensorSource,
    pub(crate) ternary: TernaryInfo,
}

impl Projected<'_> {
    fn project(
        &self,
        parameter: &ParameterInfo,
        first_row: usize,
        matrix: Matrix,
    ) -> Result<Matrix, IoError> {
        let (Matrix::Dense(latents), Some(&cols)) = (&matrix, parameter.shape.get(1)) else {
            return Ok(matrix);
        };
        let (size, rule) = (self.ternary.group_size, self.ternary.scale_rule);
        PackedMatrix::from_latents(latents, cols, size, rule)
            .map(Matrix::Ternary)
            .map_err(|(row, group, why)| {
                let (name, row) = (&parameter.name, first_row + row);
                IoError::Refused(format!("{name} row {row} group {group}: {why}"))
            })
    }
}

impl TensorSource for Projected<'_> {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        self.source.matrix(name)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        self.source.norm(name)
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        self.source.for_each_block(parameter, &mut |first, matrix| {
            each(first, self.project(parameter, first, matrix)?)
        })
    }
}

/// Ternary weights whose groups are joined on the way, whatever their scales.
pub(crate) struct Widened<'a> {
    pub(crate) source: &'a dyn TensorSource,
    pub(crate) group_size: usize,
}

impl TensorSource for Widened<'_> {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        self.source.matrix(name)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        self.source.norm(name)
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        self.source.for_each_block(parameter, &mut |first, matrix| {
            let Matrix::Ternary(narrow) = matrix else {
                return each(first, matrix);
            };
            let wide = widen(&narrow, self.group_size).map_err(|e| {
                let name = &parameter.name;
                IoError::Refused(format!("{name}, rows counted from {first}: {e}"))
            })?;
            each(first, Matrix::Ternary(wide))
        })
    }
}

/// Takes the weights that are done and their total, and says whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// Counts the weights that pass.
pub(crate) struct Counted<'a, 'p> {
    pub(crate) source: &'a dyn TensorSource,
    /// Weights that have passed.
    pub(crate) done: RefCell<u64>,
    /// Weights of the model.
    pub(crate) total: u64,
    /// Is told both, and may end the work.
    pub(crate) progress: RefCell<&'p mut Progress<'p>>,
}

impl Counted<'_, '_> {
    fn count(&self, num_weights: u64) -> Result<(), IoError> {
        let mut done = self.done.borrow_mut();
        *done += num_weights;
        match (self.progress.borrow_mut())(*done, self.total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(IoError::Stopped),
        }
    }
}

impl TensorSource for Counted<'_, '_> {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        self.source.matrix(name)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        let norm = self.source.norm(name)?;
        self.count(norm.len() as u64)?;
        Ok(norm)
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        self.source.for_each_block(parameter, &mut |first, matrix| {
            let num_weights = match &matrix {
                Matrix::Dense(values) => values.len() as u64,
                Matrix::Ternary(matrix) => matrix.rows as u64 * matrix.cols as u64,
            };
            each(first, matrix)?;
            self.count(num_weights)
        })
    }
}
