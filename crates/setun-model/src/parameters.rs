//! The parameters of a model in a backend: latent weights, gradients, projections.

use setun_backend::{
    Backend, Buf, Category, PackedBuf, Plan, ProjectStats, Real, TernaryBuf, WeightBuf, WeightData,
};
use setun_formats::{ParameterInfo, Qwen3Config};
use setun_ternary::reconstruct_latents;
use setun_ternary::{PackError, PackedMatrix, ScaleError, ScaleRule, groups_per_row};
use thiserror::Error;

/// How matrices become ternary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Weights that share a scale.
    pub group_size: usize,
    /// How the scale follows from the weights.
    pub scale_rule: ScaleRule,
}

/// Which values of its matrices a ternary model multiplies with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// Trits and scales: what is trained in the end, and the only form that is exported.
    #[default]
    Ternary,
    /// The latents as they are: the model before its projection.
    Latent,
    /// A blend of both: gradual projection.
    Blend,
}

/// What the memory of parameters is reserved for.
#[derive(Clone, Copy, Debug, Default)]
pub struct ParameterUse<'a> {
    /// Whether there are latents and gradients.
    pub train: bool,
    /// Whether matrices have a buffer for [`Form::Blend`].
    pub blend: bool,
    /// Matrices stay packed: bytes of one `[out, in]` with groups of a size, as
    /// [`Backend::packed_len`] says. Only decoding in numerics int8 can use them.
    pub packed: Option<fn(usize, usize, usize) -> usize>,
    /// Whether embedding and head stay dense in a ternary model: an experiment.
    pub dense_embedding: bool,
    /// Parameters that stay as they are: parts of their names, see [`is_frozen`].
    pub freeze: &'a [String],
}

/// Whether `name` is meant by one of `patterns`: a run of whole parts of the dotted name,
/// such as `embed_tokens`, `layers.3`, `layers.0.mlp` or `norm`.
pub fn is_frozen(name: &str, patterns: &[String]) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    patterns.iter().any(|pattern| {
        let pattern: Vec<&str> = pattern.split('.').collect();
        parts.windows(pattern.len()).any(|w| w == pattern)
    })
}

/// Whether the parameter called `name` is a row for each entry of the vocabulary: the
/// embedding, or a head of its own.
pub fn is_embedding(name: &str) -> bool {
    name == "model.embed_tokens.weight" || name == "lm_head.weight"
}

/// One parameter: a matrix `[rows, cols]`, or a norm with one row.
#[derive(Clone, Debug)]
pub struct Parameter<R> {
    /// Hugging Face's name.
    pub name: String,
    /// Rows; 1 for a norm.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it is a matrix.
    pub is_matrix: bool,
    /// The values that are trained; a ternary model that only runs has none for matrices.
    pub latent: Option<Buf<R>>,
    /// Gradient, in training; a frozen matrix has none.
    pub grad: Option<Buf<R>>,
    /// Projection: what the forward pass multiplies with.
    pub ternary: Option<TernaryBuf>,
    /// Projection that stays packed: what the forward pass multiplies with in decoding.
    pub packed: Option<PackedBuf>,
    /// Values on their way from the latents to the projection.
    pub blend: Option<Buf<R>>,
    /// What the forward pass multiplies with now.
    pub form: Form,
    /// Whether training leaves it as it is.
    pub frozen: bool,
}

impl<R> Parameter<R> {
    /// Number of values.
    pub fn numel(&self) -> usize {
        self.rows * self.cols
    }

    /// The matrix as products see it.
    pub fn weight(&self) -> WeightBuf<R> {
        let dense = match self.form {
            Form::Ternary => None,
            Form::Latent => self.latent,
            Form::Blend => self.blend,
        };
        if let Some(packed) = self.packed {
            return WeightBuf {
                out: self.rows,
                inp: self.cols,
                data: WeightData::Packed(packed),
            };
        }
        let data = match (dense, self.ternary, self.latent) {
            (Some(values), _, _) => WeightData::Dense(values),
            (None, Some(ternary), _) => WeightData::Ternary(ternary),
            (None, None, Some(latent)) => WeightData::Dense(latent),
            (None, None, None) => unreachable!("a parameter has a latent or a ternary form"),
        };
        WeightBuf {
            out: self.rows,
            inp: self.cols,
            data,
        }
    }

    /// The values of a norm or of a dense matrix.
    pub fn values(&self) -> Buf<R> {
        self.latent.expect("norms and dense matrices have values")
    }

    /// The gradient.
    pub fn gradient(&self) -> Buf<R> {
        self.grad.expect("a model that is trained has gradients")
    }
}

/// A group whose scale cannot be shipped.
#[derive(Clone, Debug, Error)]
#[error(
    "{name}, row {row}, group {group}: {why}; lower the learning rate or resume from an earlier checkpoint"
)]
pub struct ProjectFailure {
    /// Parameter.
    pub name: String,
    /// Row.
    pub row: usize,
    /// Group in the row.
    pub group: usize,
    /// What is wrong.
    pub why: ScaleError,
}

/// Why values do not fit a parameter.
#[derive(Clone, Debug, Error)]
pub enum SetError {
    /// No parameter of that name.
    #[error("the model has no parameter {0}")]
    Unknown(String),
    /// Another number of values.
    #[error("{name} has {expected} values, not {found}")]
    Length {
        /// Parameter.
        name: String,
        /// Values that it has.
        expected: usize,
        /// Values that were given.
        found: usize,
    },
    /// Another ternary form, or a dense matrix.
    #[error("{name} is {model} in this model, not {given}")]
    Form {
        /// Parameter.
        name: String,
        /// What the model holds.
        model: String,
        /// What was given.
        given: String,
    },
    /// Packed bytes that are no trits.
    #[error("{name}, row {row}: {source}")]
    Packed {
        /// Parameter.
        name: String,
        /// Row.
        row: usize,
        /// What is wrong.
        source: PackError,
    },
}

/// All parameters, in canonical order.
#[derive(Clone, Debug)]
pub struct Parameters<R> {
    /// The list.
    pub list: Vec<Parameter<R>>,
    /// How matrices become ternary; none for a dense model.
    pub scheme: Option<Scheme>,
}

impl<R: Real> Parameters<R> {
    /// Reserves memory for all parameters of `config`.
    pub fn reserve(
        plan: &mut Plan,
        config: &Qwen3Config,
        scheme: Option<Scheme>,
        purpose: ParameterUse<'_>,
    ) -> Self {
        let mut parameters = Self {
            list: Vec::new(),
            scheme,
        };
        parameters.extend(plan, config.parameters(), purpose);
        parameters
    }

    /// Reserves memory for more parameters, behind those that there are.
    pub(crate) fn extend(
        &mut self,
        plan: &mut Plan,
        infos: Vec<ParameterInfo>,
        purpose: ParameterUse<'_>,
    ) {
        for info in infos {
            let is_matrix = info.is_matrix();
            let cols = *info.shape.last().unwrap_or(&1);
            let rows = info.numel() / cols;
            let dense = !is_matrix || (purpose.dense_embedding && is_embedding(&info.name));
            let packed = self.scheme.filter(|_| !dense).zip(purpose.packed);
            let packed = packed.map(|(scheme, packed_len)| PackedBuf {
                bytes: plan.alloc(
                    Category::Parameters,
                    format!("{}.packed", info.name),
                    packed_len(rows, cols, scheme.group_size),
                ),
                group_size: scheme.group_size,
            });
            let trits = self.scheme.filter(|_| !dense && packed.is_none());
            let ternary = trits.map(|scheme| {
                let group_size = scheme.group_size;
                let scales = rows * groups_per_row(cols, group_size);
                TernaryBuf {
                    trits: plan.alloc(
                        Category::Parameters,
                        format!("{}.trits", info.name),
                        rows * cols,
                    ),
                    scales: plan.alloc(
                        Category::Parameters,
                        format!("{}.scales", info.name),
                        scales,
                    ),
                    group_size,
                }
            });
            let frozen = is_frozen(&info.name, purpose.freeze);
            let latent = (purpose.train || (ternary.is_none() && packed.is_none()))
                .then(|| plan.alloc(Category::Parameters, info.name.clone(), rows * cols));
            let blend = (purpose.blend && ternary.is_some()).then(|| {
                let name = format!("{} blend", info.name);
                plan.alloc(Category::Parameters, name, rows * cols)
            });
            // The gradient of a frozen norm costs next to nothing; nobody reads it.
            let grad = (purpose.train && !(frozen && is_matrix))
                .then(|| plan.alloc(Category::Gradients, format!("d {}", info.name), rows * cols));
            self.list.push(Parameter {
                name: info.name,
                rows,
                cols,
                is_matrix,
                latent,
                grad,
                ternary,
                packed,
                blend,
                form: Form::default(),
                frozen,
            });
        }
    }

    /// Reserves memory for `len` more values that are trained, with norms' rules: they begin
    /// at 1 and do not decay.
    pub fn add_vector(&mut self, plan: &mut Plan, name: String, len: usize) {
        let purpose = ParameterUse {
            train: true,
            ..ParameterUse::default()
        };
        let shape = vec![len];
        self.extend(plan, vec![ParameterInfo { name, shape }], purpose);
    }

    /// Reserves memory for other values of the same parameters, with projections of their own.
    #[must_use]
    pub fn twin(&self, plan: &mut Plan) -> Self {
        let mut twin = self.clone();
        let category = Category::Optimizer;
        for p in &mut twin.list {
            let numel = p.numel();
            let name = |what: &str| format!("{} {what}", p.name);
            p.latent = p
                .latent
                .map(|_| plan.alloc(category, name("average"), numel));
            p.ternary = p.ternary.map(|ternary| TernaryBuf {
                trits: plan.alloc(category, name("average trits"), numel),
                scales: plan.alloc(category, name("average scales"), ternary.scales.len()),
                group_size: ternary.group_size,
            });
            (p.grad, p.blend) = (None, None);
        }
        twin
    }

    /// The parameter called `name`.
    ///
    /// # Errors
    /// [`SetError::Unknown`]
    pub fn named(&self, name: &str) -> Result<&Parameter<R>, SetError> {
        let found = self.list.iter().find(|p| p.name == name);
        found.ok_or_else(|| SetError::Unknown(name.to_owned()))
    }

    /// Projects every matrix; afterwards the forward pass uses the latents as they are
    /// now. Called once per change of the latents, never in between.
    ///
    /// # Errors
    /// A scale that cannot be shipped.
    pub fn project<B: Backend<Real = R>>(&self, b: &mut B) -> Result<ProjectStats, ProjectFailure> {
        let mut total = ProjectStats::default();
        let Some(scheme) = self.scheme else {
            return Ok(total);
        };
        for p in &self.list {
            let (Some(ternary), Some(latent)) = (p.ternary, p.latent) else {
                continue;
            };
            let stats = b
                .project(latent, p.cols, scheme.scale_rule, ternary)
                .map_err(|e| ProjectFailure {
                    name: p.name.clone(),
                    row: e.row,
                    group: e.group,
                    why: e.why,
                })?;
            total.zeros += stats.zeros;
            total.flips += stats.flips;
        }
        Ok(total)
    }

    /// What all matrices multiply with from now on.
    pub fn set_form(&mut self, form: Form) {
        for p in self.list.iter_mut().filter(|p| p.ternary.is_some()) {
            p.form = form;
        }
    }

    /// Makes all matrices multiply with `(1 - share) * latent + share * s * t` of their
    /// latents and projections as they are now.
    pub fn blend<B: Backend<Real = R>>(&mut self, b: &mut B, share: f64) {
        for p in &self.list {
            if let (Some(latent), Some(ternary), Some(to)) = (p.latent, p.ternary, p.blend) {
                b.blend(latent, p.cols, ternary, share, to);
            }
        }
        self.set_form(Form::Blend);
    }

    /// Sets the latent values (of a dense model: the values) of `name`.
    ///
    /// # Errors
    /// An unknown name, another length, a ternary model without latents.
    pub fn set_values<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        name: &str,
        values: &[f32],
    ) -> Result<(), SetError> {
        let p = self.named(name)?;
        if values.len() != p.numel() {
            let (expected, found) = (p.numel(), values.len());
            return Err(SetError::Length {
                name: name.to_owned(),
                expected,
                found,
            });
        }
        let Some(latent) = p.latent else {
            return Err(form_error(p, "dense"));
        };
        let values: Vec<R> = values.iter().map(|&x| R::from_f32(x)).collect();
        b.write(latent, &values);
        Ok(())
    }

    /// Sets rows of `name` from `first_row` on, a multiple of [`setun_backend::PACKED_ROWS`], as their number is
    /// unless they are the last: for weights that stay packed.
    ///
    /// # Errors
    /// An unknown name, weights that do not stay packed, another width or group size, bytes that
    /// are no trits.
    ///
    /// # Panics
    /// If `first_row` is no such multiple, or the rows end behind the matrix.
    pub fn set_packed_rows<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        name: &str,
        first_row: usize,
        matrix: &PackedMatrix,
    ) -> Result<(), SetError> {
        let p = self.named(name)?;
        let fits = |to: &PackedBuf| (matrix.cols, matrix.group_size) == (p.cols, to.group_size);
        let Some(to) = p.packed.filter(fits) else {
            let (cols, size) = (matrix.cols, matrix.group_size);
            return Err(form_error(
                p,
                &format!("rows of {cols} in packed groups of {size}"),
            ));
        };
        matrix.check().map_err(|(row, source)| SetError::Packed {
            name: name.to_owned(),
            row: first_row + row,
            source,
        })?;
        b.write_packed(to, (first_row, p.rows), matrix);
        Ok(())
    }

    /// Sets trits and scales of `name`, and latents that project onto them if the model
    /// has latents (never project twice: ARCHITECTURE.md, Numbers).
    ///
    /// # Errors
    /// An unknown name, another shape or group size, bytes that are no trits.
    pub fn set_ternary<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        name: &str,
        matrix: &PackedMatrix,
    ) -> Result<(), SetError> {
        let p = self.named(name)?;
        if p.packed.is_some() && matrix.rows == p.rows {
            return self.set_packed_rows(b, name, 0, matrix);
        }
        let given = (matrix.rows, matrix.cols, matrix.group_size);
        let buf = p
            .ternary
            .filter(|t| given == (p.rows, p.cols, t.group_size));
        let (Some(buf), Some(scheme)) = (buf, self.scheme) else {
            let text = format!("ternary {}x{} in groups of {}", given.0, given.1, given.2);
            return Err(form_error(p, &text));
        };
        let mut trits = vec![0i8; p.numel()];
        for (row, trits) in trits.chunks_mut(p.cols).enumerate() {
            let unpacked = matrix.unpack_row(row, trits);
            unpacked.map_err(|source| SetError::Packed {
                name: name.to_owned(),
                row,
                source,
            })?;
        }
        let scales: Vec<f32> = matrix.scales.iter().map(|s| s.to_f32()).collect();
        b.write(buf.trits, &trits);
        b.write(buf.scales, &scales);
        if let Some(latent) = p.latent {
            let mut values = vec![0.0f32; p.numel()];
            let groups = groups_per_row(p.cols, scheme.group_size);
            let rows = values.chunks_mut(p.cols).zip(trits.chunks(p.cols));
            for ((values, trits), scales) in rows.zip(scales.chunks(groups)) {
                let parts = values
                    .chunks_mut(scheme.group_size)
                    .zip(trits.chunks(scheme.group_size));
                for ((values, trits), &scale) in parts.zip(scales) {
                    reconstruct_latents(trits, scale, scheme.scale_rule, values);
                }
            }
            let values: Vec<R> = values.iter().map(|&x| R::from_f32(x)).collect();
            b.write(latent, &values);
        }
        Ok(())
    }

    /// Values of a norm, or latents of a matrix.
    pub fn read_values<B: Backend<Real = R>>(&self, b: &B, p: &Parameter<R>) -> Vec<f32> {
        let mut values = vec![R::ZERO; p.numel()];
        b.read(p.values(), &mut values);
        values.iter().map(|x| x.to_f32()).collect()
    }

    /// Trits and scales of a ternary matrix, as the forward pass uses them.
    pub fn read_ternary<B: Backend<Real = R>>(
        &self,
        b: &B,
        p: &Parameter<R>,
    ) -> Option<PackedMatrix> {
        let buf = p.ternary?;
        let mut trits = vec![0i8; buf.trits.len()];
        let mut scales = vec![0.0f32; buf.scales.len()];
        b.read(buf.trits, &mut trits);
        b.read(buf.scales, &mut scales);
        Some(PackedMatrix::from_trits(
            &trits,
            &scales,
            p.cols,
            buf.group_size,
        ))
    }
}

fn form_error<R>(p: &Parameter<R>, given: &str) -> SetError {
    let group_size = p.ternary.map(|t| t.group_size);
    let model = match group_size.or(p.packed.map(|t| t.group_size)) {
        Some(group_size) => format!("ternary {}x{} in groups of {group_size}", p.rows, p.cols),
        None => format!("dense {}x{}", p.rows, p.cols),
    };
    SetError::Form {
        name: p.name.clone(),
        model,
        given: given.to_owned(),
    }
}
