//! Checkpoints: everything that a run needs to go on with the same bits.

use crate::TrainError;
use crate::guard::Guard;
use crate::trainer::Trainer;
use bytemuck::{Pod, cast_slice};
use half::bf16;
use serde::{Deserialize, Serialize};
use setun_backend::{Backend, Buf, Extent, Reader, StoredBuf};
use setun_formats::tensors::write_header;
use setun_formats::{
    Dtype, PackedHeader, ParameterInfo, Qwen3Config, TensorInfo, TernaryInfo, Tokenizer,
};
use setun_io::{
    BlockSink, DirWriter, FileOps, IoError, Matrix, OpenModel, TensorFile, TensorSource,
    checkpoint_name, write_packed,
};
use setun_model::{Parameter, Parameters};
use setun_ternary::PackedMatrix;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The step with the best held-out loss until the checkpoint in `dir`, as far as it says.
pub fn best_step(dir: &Path) -> Option<u64> {
    let text = std::fs::read(dir.join("state.json")).ok()?;
    let state: serde_json::Value = serde_json::from_slice(&text).ok()?;
    state["best"][0].as_u64()
}

/// `state.json`: what is not derivable from settings and step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Format of the checkpoint.
    pub version: u32,
    /// Steps that are finished.
    pub step: u64,
    /// Updates of the optimizer.
    pub updates: u64,
    /// Batches that were passed over, see [`Trainer::data_offset`].
    #[serde(default)]
    pub data_offset: u64,
    /// Windows of accepted values.
    #[serde(default)]
    pub guard: Guard,
    /// Skipped steps of late, ascending.
    #[serde(default)]
    pub recent_skips: Vec<u64>,
    /// Each time that the run went back to an earlier checkpoint: the step from which on
    /// it counts, and what happened.
    #[serde(default)]
    pub rewinds: Vec<(u64, String)>,
    /// Best held-out loss so far, with its step.
    pub best: Option<(u64, f64)>,
    /// Evaluations since then.
    pub evaluations_since_best: u64,
    /// Sum and number of the training losses since the last evaluation.
    pub losses_since_eval: (f64, u64),
    /// Flipped trits and steps since the last look at the ternary weights.
    pub flips_since_record: (u64, u64),
    /// Hashes of tokenizer, training and held-out tokens.
    pub data: DataIdentity,
}

/// What the data of a run are, to refuse others at resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataIdentity {
    /// blake3 of the tokenizer file.
    pub tokenizer: String,
    /// blake3 of the training tokens.
    pub train: String,
    /// blake3 of the held-out tokens.
    pub valid: String,
}

/// Version of [`TrainState`]. Version 1 had neither guard nor data offset; it is read as
/// if both were empty.
pub const STATE_VERSION: u32 = 2;

/// Ending of the name of a latent beside the moments.
const LATENT: &str = ".latent";

/// Weights that are copied at a time for the packed file.
const BLOCK_WEIGHTS: usize = 1 << 20;

/// The parameters as files want them.
struct LiveSource<'a, S> {
    reader: &'a S,
    parameters: &'a Parameters<f32>,
}

impl<S: Reader> LiveSource<'_, S> {
    fn named(&self, name: &str) -> Result<&Parameter<f32>, IoError> {
        self.parameters
            .named(name)
            .map_err(|e| IoError::Refused(e.to_string()))
    }

    /// `num_rows` rows of a matrix from row `start` on.
    fn rows(&self, p: &Parameter<f32>, start: usize, num_rows: usize) -> Matrix {
        let part = |width: usize| (start * width, num_rows * width);
        let Some(ternary) = p.ternary else {
            let (at, len) = part(p.cols);
            return Matrix::Dense(self.copy(p.values().part(at, len)));
        };
        let (trits, scales) = (part(p.cols), part(ternary.scales.len() / p.rows));
        Matrix::Ternary(PackedMatrix::from_trits(
            &self.copy(ternary.trits.part(trits.0, trits.1)),
            &self.copy(ternary.scales.part(scales.0, scales.1)),
            p.cols,
            ternary.group_size,
        ))
    }

    fn copy<T: Pod>(&self, buf: Buf<T>) -> Vec<T> {
        let mut values = vec![T::zeroed(); buf.len()];
        self.reader.copy_out(buf, &mut values);
        values
    }
}

impl<S: Reader> TensorSource for LiveSource<'_, S> {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        let p = self.named(name)?;
        Ok(self.rows(p, 0, p.rows))
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        let p = self.named(&parameter.name)?;
        let rows = (BLOCK_WEIGHTS / p.cols).max(1);
        for start in (0..p.rows).step_by(rows) {
            each(start, self.rows(p, start, rows.min(p.rows - start)))?;
        }
        Ok(())
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        Ok(self.copy(self.named(name)?.values()))
    }
}

/// Names and contents of files.
pub type SmallFiles = Arc<[(&'static str, Vec<u8>)]>;

/// What a checkpoint holds besides weights and state: `config.json`, `tokenizer.json`, and
/// `chat_template.jinja` and `generation_config.json` where the model that training starts
/// from has them, so that a resumed run renders conversations as before, and exports carry
/// both.
///
/// # Errors
/// A file of `init` that cannot be read.
pub fn small_files(
    config: &Qwen3Config,
    tokenizer: &Tokenizer,
    init: Option<&OpenModel>,
) -> Result<SmallFiles, TrainError> {
    let mut files = vec![
        ("config.json", config.to_json().into_bytes()),
        ("tokenizer.json", tokenizer.to_json().into_bytes()),
    ];
    if let Some(init) = init {
        if let Some(template) = init.chat_template()? {
            files.push(("chat_template.jinja", template.into_bytes()));
        }
        if let Some(generation) = init.generation_config()? {
            let json = serde_json::to_vec_pretty(&generation);
            let json = json.map_err(|e| TrainError::refused(e.to_string()))?;
            files.push(("generation_config.json", json));
        }
    }
    Ok(files.into())
}

/// What stays the same over a run.
#[derive(Clone)]
pub struct Constants {
    /// Small files, with their names.
    pub files: SmallFiles,
    /// Number format; none for a dense model.
    pub ternary: Option<PackedHeader>,
    /// The setting that makes the model neither dense nor what files call ternary.
    pub experiment: Option<&'static str>,
}

impl TrainState {
    /// The state of a run on `data` before its first step.
    pub fn new(data: DataIdentity) -> Self {
        Self {
            version: STATE_VERSION,
            step: 0,
            updates: 0,
            data_offset: 0,
            guard: Guard::default(),
            recent_skips: Vec::new(),
            rewinds: Vec::new(),
            best: None,
            evaluations_since_best: 0,
            losses_since_eval: (0.0, 0),
            flips_since_record: (0, 0),
            data,
        }
    }
}

/// A checkpoint that can be written while training goes on: it reads the live weights and
/// moments, which nothing may change as long as it holds them.
pub struct Snapshot<S> {
    shared: S,
    parameters: Parameters<f32>,
    latents: Vec<Entry>,
    moments: Vec<Entry>,
    state: TrainState,
    constants: Constants,
}

/// Takes hold of what a checkpoint of `trainer` consists of. The state is a copy, weights
/// and moments are not: the trainer waits for the writer before it changes them.
///
/// # Errors
/// An average with a scale that cannot be shipped.
pub fn snapshot<B: Backend<Real = f32>>(
    trainer: &mut Trainer<B>,
    state: &TrainState,
    constants: Constants,
) -> Result<Snapshot<B::Shared>, TrainError> {
    trainer.project_average()?;
    let trained = &trainer.model.parameters;
    let optimizer = &trainer.optimizer;
    let average = optimizer.average.as_ref().map(|a| &a.parameters);
    let parameters = average.unwrap_or(trained).clone();
    let latents: Vec<Entry> = parameters.list.iter().map(Entry::latent).collect();
    // With an average, the latents are state that only training needs.
    let beside = average.iter().flat_map(|_| &trained.list);
    let beside = beside.map(|p| Entry::of(p, LATENT, StoredBuf::Real(p.values())));
    let trained = trained.list.iter().enumerate();
    let moments = trained.filter(|(_, p)| !p.frozen).flat_map(|(i, p)| {
        [
            Entry::of(p, ".m", optimizer.m[i]),
            Entry::of(p, ".v", optimizer.v[i]),
        ]
    });
    let moments = moments.filter(|entry| !entry.buf.is_empty());
    let moments: Vec<Entry> = moments.chain(beside).collect();
    let ternary = parameters.list.iter().filter_map(|p| p.ternary);
    let extents: Vec<Extent> = latents
        .iter()
        .chain(&moments)
        .map(|entry| entry.buf.into())
        .chain(ternary.flat_map(|t| [t.trits.into(), t.scales.into()]))
        .collect();
    Ok(Snapshot {
        shared: trainer.backend.share(&extents),
        parameters,
        latents,
        moments,
        state: state.clone(),
        constants,
    })
}

impl<S: Reader> Snapshot<S> {
    /// Writes `RUN/checkpoints/step-N` through `files` and returns it with the hash of the
    /// ternary weights that the last forward pass used. `release` is called when weights
    /// and moments are not needed any more, before anything is synced.
    ///
    /// # Errors
    /// What the operating system returns; nothing half-written stays behind.
    pub fn write(
        self,
        files: &Arc<dyn FileOps>,
        run: &Path,
        release: impl FnOnce(),
    ) -> Result<(PathBuf, Option<String>), TrainError> {
        let Self {
            shared,
            parameters,
            latents,
            moments,
            state,
            constants,
        } = self;
        let (parent, name) = (run.join("checkpoints"), checkpoint_name(state.step));
        let mut dir = DirWriter::create_with(Arc::clone(files), &parent, &name)?;
        let mut hash = blake3::Hasher::new();
        dir.file("latents.safetensors", |out| {
            write_tensors(out, &shared, &latents, |bytes| {
                hash.update(bytes);
            })
        })?;
        dir.file("optimizer.safetensors", |out| {
            write_tensors(out, &shared, &moments, |_| {})
        })?;
        let mut ternary_hash = None;
        if let Some(header) = &constants.ternary {
            let source = LiveSource {
                reader: &shared,
                parameters: &parameters,
            };
            dir.file("packed.safetensors", |out| {
                ternary_hash = Some(write_packed(out, header, &source).map_err(io::Error::other)?);
                Ok(())
            })?;
        }
        drop(shared);
        release();
        let json =
            serde_json::to_string_pretty(&state).map_err(|e| TrainError::refused(e.to_string()))?;
        dir.file("state.json", |out| out.write_all(json.as_bytes()))?;
        for (name, bytes) in constants.files.iter() {
            dir.file(name, |out| out.write_all(bytes))?;
        }
        let params_hash = hash.finalize().to_hex().to_string();
        let extra = manifest_extra(
            state.step,
            &params_hash,
            ternary_hash.as_deref(),
            &constants,
        );
        Ok((dir.commit(extra)?, ternary_hash))
    }
}

fn manifest_extra(
    step: u64,
    params_hash: &str,
    ternary_hash: Option<&str>,
    constants: &Constants,
) -> serde_json::Value {
    let mut extra = serde_json::json!({ "step": step, "params_hash": params_hash });
    if let Some(experiment) = constants.experiment {
        extra["experiment"] = experiment.into();
    }
    if let (Some(header), Some(hash)) = (&constants.ternary, ternary_hash) {
        let TernaryInfo {
            group_size,
            scale_rule,
            numerics,
        } = header.ternary;
        extra["ternary_hash"] = hash.into();
        extra["group_size"] = group_size.into();
        extra["scale_rule"] = scale_rule.name().into();
        extra["numerics"] = numerics.name().into();
    }
    extra
}

/// Restores weights, moments and counters from a checkpoint directory that verified.
///
/// # Errors
/// A checkpoint of another model, another version, or other data.
pub fn restore<B: Backend<Real = f32>>(
    dir: &Path,
    trainer: &mut Trainer<B>,
    data: &DataIdentity,
) -> Result<TrainState, TrainError> {
    let path = dir.join("state.json");
    let text = std::fs::read(&path).map_err(|e| IoError::file("read", &path, e))?;
    let mut state: TrainState = serde_json::from_slice(&text)
        .map_err(|e| TrainError::refused(format!("{}: {e}", path.display())))?;
    if !(1..=STATE_VERSION).contains(&state.version) {
        return Err(TrainError::refused(format!(
            "{}: version {} of the checkpoint format, this program reads 1 to {STATE_VERSION}",
            path.display(),
            state.version
        )));
    }
    state.version = STATE_VERSION;
    check_data(&path, &state.data, data)?;
    let latents = TensorFile::open(&dir.join("latents.safetensors"))?;
    let moments = TensorFile::open(&dir.join("optimizer.safetensors"))?;
    let list = trainer.model.parameters.list.clone();
    for (i, p) in list.iter().enumerate() {
        let (b, trained) = (&mut trainer.backend, &trainer.model.parameters);
        let shipped = latents.floats(&p.name)?;
        match &trainer.optimizer.average {
            Some(average) => {
                average.parameters.set_values(b, &p.name, &shipped)?;
                let latent = moments.floats(&format!("{}{LATENT}", p.name))?;
                trained.set_values(b, &p.name, &latent)?;
            }
            None => trained.set_values(b, &p.name, &shipped)?,
        }
        if p.frozen {
            continue;
        }
        for (buf, letter) in [(trainer.optimizer.m[i], "m"), (trainer.optimizer.v[i], "v")] {
            if buf.is_empty() {
                continue;
            }
            let name = format!("{}.{letter}", p.name);
            let values = moments.floats(&name)?;
            if values.len() != p.numel() {
                return Err(TrainError::refused(format!(
                    "{}: {name} has {} values, the model needs {}",
                    moments.path().display(),
                    values.len(),
                    p.numel()
                )));
            }
            match buf {
                StoredBuf::Real(buf) => trainer.backend.write(buf, &values),
                StoredBuf::Bf16(buf) => {
                    // Exact: such values were written.
                    let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
                    trainer.backend.write(buf, &values);
                }
            }
        }
    }
    trainer.step = state.step;
    trainer.optimizer.updates = state.updates;
    trainer.data_offset = state.data_offset;
    trainer.guard.restore(&state.guard);
    trainer.project()?;
    Ok(state)
}

fn check_data(path: &Path, saved: &DataIdentity, found: &DataIdentity) -> Result<(), TrainError> {
    let pairs = [
        ("tokenizer", &saved.tokenizer, &found.tokenizer),
        ("training tokens", &saved.train, &found.train),
        ("held-out tokens", &saved.valid, &found.valid),
    ];
    for (what, saved, found) in pairs {
        if saved != found {
            return Err(TrainError::refused(format!(
                "the data have changed since this run began: blake3 of the {what} is {found}, \
                 {} has {saved}; put the files back, or start a new run with --init",
                path.display()
            )));
        }
    }
    Ok(())
}

/// A buffer under a name.
struct Entry {
    name: String,
    shape: Vec<usize>,
    buf: StoredBuf<f32>,
}

impl Entry {
    fn of(p: &Parameter<f32>, suffix: &str, buf: StoredBuf<f32>) -> Self {
        let shape = if p.is_matrix {
            vec![p.rows, p.cols]
        } else {
            vec![p.cols]
        };
        Self {
            name: format!("{}{suffix}", p.name),
            shape,
            buf,
        }
    }

    fn latent(p: &Parameter<f32>) -> Self {
        Self::of(p, "", StoredBuf::Real(p.values()))
    }
}

/// Writes tensors as f32 straight from the backend, a piece at a time.
fn write_tensors<S: Reader>(
    out: &mut dyn Write,
    reader: &S,
    entries: &[Entry],
    mut hash: impl FnMut(&[u8]),
) -> io::Result<()> {
    const PIECE: usize = 1 << 16;
    let infos: Vec<TensorInfo> = entries
        .iter()
        .map(|e| TensorInfo {
            name: e.name.clone(),
            dtype: Dtype::F32,
            shape: e.shape.clone(),
        })
        .collect();
    write_header(out, &infos, &BTreeMap::new())?;
    let mut values = vec![0.0f32; PIECE];
    for entry in entries {
        for start in (0..entry.buf.len()).step_by(PIECE) {
            let n = PIECE.min(entry.buf.len() - start);
            read_values(reader, entry.buf, start, &mut values[..n]);
            // Little-endian on every machine that this builds for.
            let bytes: &[u8] = cast_slice(&values[..n]);
            hash(bytes);
            out.write_all(bytes)?;
        }
    }
    Ok(())
}

/// The values from `start` on.
fn read_values<S: Reader>(reader: &S, buf: StoredBuf<f32>, start: usize, out: &mut [f32]) {
    match buf {
        StoredBuf::Real(buf) => reader.copy_out(buf.part(start, out.len()), out),
        StoredBuf::Bf16(buf) => {
            let mut values = vec![bf16::ZERO; out.len()];
            reader.copy_out(buf.part(start, out.len()), &mut values);
            for (out, x) in out.iter_mut().zip(values) {
                *out = x.to_f32();
            }
        }
    }
}
