//! From a model on disk to parameters.

use super::EngineError;
use setun_backend::{Backend, CacheKind, PACKED_ROWS};
use setun_io::{Matrix, OpenModel};
use setun_model::{ModelSpec, Parameters, Scheme};
use setun_ternary::Numerics;

/// The kind of cache that stores what attention reads in `numerics` as it is.
pub fn exact_cache(numerics: Numerics) -> CacheKind {
    match numerics {
        Numerics::F32 => CacheKind::F32,
        Numerics::Bf16 | Numerics::Int8 => CacheKind::Bf16,
    }
}

/// What a model on disk computes. Dense models without another wish run in f32.
pub fn spec_of(model: &OpenModel, numerics: Option<Numerics>) -> Result<ModelSpec, EngineError> {
    let ternary = model.ternary();
    let recorded = ternary.map_or(Numerics::F32, |t| t.numerics);
    let numerics = numerics.unwrap_or(recorded);
    if ternary.is_none() && numerics == Numerics::Int8 {
        return Err(EngineError::DenseInt8);
    }
    let scheme = ternary.map(|t| Scheme {
        group_size: t.group_size,
        scale_rule: t.scale_rule,
    });
    Ok(ModelSpec {
        config: model.config().clone(),
        scheme,
        numerics,
    })
}

/// Fills the parameters from files; latents from a ternary model are those that project
/// onto it.
///
/// # Errors
/// What the files or the parameters refuse.
pub fn load_parameters<B: Backend<Real = f32>>(
    model: &OpenModel,
    parameters: &Parameters<f32>,
    backend: &mut B,
) -> Result<(), EngineError> {
    for p in parameters.list.iter().filter(|p| p.packed.is_none()) {
        if !p.is_matrix {
            parameters.set_values(backend, &p.name, &model.norm(&p.name)?)?;
            continue;
        }
        match model.matrix(&p.name)? {
            Matrix::Ternary(m) => parameters.set_ternary(backend, &p.name, &m)?,
            Matrix::Dense(values) => parameters.set_values(backend, &p.name, &values)?,
        }
    }
    load_packed(model, parameters, backend)
}

/// Bytes of packed weights that are read at a time: few, so that they are laid out while they
/// are in a cache, and their memory is used again.
const LOADED_AT_A_TIME: usize = 1 << 18;
/// Parts of that size that wait to be laid out.
const READ_AHEAD: usize = 2;

/// The matrices that stay packed, some rows after the others; a thread of its own reads and
/// checks what comes next.
fn load_packed<B: Backend<Real = f32>>(
    model: &OpenModel,
    parameters: &Parameters<f32>,
    backend: &mut B,
) -> Result<(), EngineError> {
    let packed = parameters.list.iter().filter(|p| p.packed.is_some());
    let mut parts = packed.flat_map(|p| {
        let rows = (4 * LOADED_AT_A_TIME / p.cols).max(1);
        let step = rows.next_multiple_of(PACKED_ROWS);
        let starts = (0..p.rows).step_by(step);
        starts.map(move |first| (p, first..p.rows.min(first + step)))
    });
    std::thread::scope(|scope| {
        let (sender, parts_read) = std::sync::mpsc::sync_channel(READ_AHEAD);
        // Ends with the last part, or when nobody listens any more: after the first error.
        scope.spawn(move || {
            parts.try_for_each(|(p, rows)| {
                let first = rows.start;
                sender.send((p, first, model.matrix_rows(&p.name, rows)))
            })
        });
        for (p, first, matrix) in parts_read {
            match matrix? {
                Matrix::Ternary(m) => parameters.set_packed_rows(backend, &p.name, first, &m)?,
                // Refused, with the parameter's name.
                Matrix::Dense(values) => parameters.set_values(backend, &p.name, &values)?,
            }
        }
        Ok(())
    })
}
