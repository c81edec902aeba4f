//! Proof that a model on disk is ternary and undamaged, or the place where it is not.
//!
//! What is checked, from the file's own bytes:
//! - hashes, where the directory has a manifest;
//! - every 2-D weight, embedding and head included, is in {-s, 0, +s} by groups;
//! - scales are finite, not negative, at most 65504 and exact in bf16;
//! - in a checkpoint, the packed weights are the projection of the latents, and the
//!   norms are equal;
//! - the ternary hash equals the one in the manifest and the one that the trainer
//!   recorded in `run.json` for its last forward pass.

mod report;
mod scan;

pub use report::{ModelReport, TensorReport, VerifyReport};

use crate::checkpoints::{CHECKPOINTS, checkpoints, entry_names, verify_checkpoint};
use crate::drafter::verify_drafter;
use crate::huggingface::{Storage, check_tensors, read_checkpoint};
use crate::layout::{
    CONFIG, LATENTS, Located, PACKED, Shards, check_latents, is_run, locate, packed_header, read,
    read_config, ternary_metadata,
};
use crate::{
    IoError, MANIFEST, Manifest, ModelKind, OpenModel, TensorFile, TernaryHasher, verify_manifest,
};
use scan::{Scan, infer_group_size, projection_difference, scan_model, scan_packed, scan_values};
use serde_json::Value;
use setun_formats::config::Qwen3Config;
use setun_formats::packed::TernaryInfo;
use std::path::{Path, PathBuf};

/// Below this, a group holds so few weights that any float matrix comes close to being
/// ternary "by groups": each weight nearly has a scale of its own.
pub const MIN_GROUP_SIZE: usize = 8;

/// Directory of the exports in a run directory.
const EXPORTS: &str = "export";

/// Verifies a run (every checkpoint's hashes, the newest checkpoint, all exports), a
/// checkpoint, a packed file or directory, a Hugging Face, compressed-tensors or MLX
/// directory or file, or a GGUF file.
///
/// What is wrong with the model is in the report; all of it is looked at, so that one
/// damaged file does not hide another.
///
/// # Errors
/// Only a path that holds no model, or that cannot be read at all.
pub fn verify(path: &Path) -> Result<VerifyReport, IoError> {
    let mut report = VerifyReport::new(path);
    if is_run(path) {
        verify_run(path, &mut report)?;
    } else {
        verify_model(path, &mut report)?;
    }
    Ok(report)
}

fn verify_run(run: &Path, report: &mut VerifyReport) -> Result<(), IoError> {
    let mut all = checkpoints(run)?.into_iter();
    let newest = all.next();
    let exports = run.join(EXPORTS);
    let mut exported = entry_names(&exports)?;
    if newest.is_none() && exported.is_empty() {
        let skipped = Vec::new();
        let run = run.to_owned();
        return Err(IoError::NoCheckpoint { run, skipped });
    }
    if let Some((_, path)) = newest {
        verify_model(&path, report)?;
        if report.is_dense {
            exported.clear();
        }
    }
    for (step, path) in all {
        if let Err(error) = verify_checkpoint(step, &path) {
            report.fail(error);
        }
    }
    match verify_drafter(run) {
        Ok(None) => {}
        Ok(Some((file, weights))) => {
            let file = file.display();
            report.note(format!("{file}: a drafter, {weights} weights, all ternary"));
        }
        Err(error) => report.fail(error),
    }
    let recorded = recorded_hashes(run, report);
    for name in exported.iter().filter(|name| !name.starts_with('.')) {
        let path = exports.join(name);
        match verify_model(&path, report) {
            Err(IoError::NotAModel { .. }) => report.note(format!("{EXPORTS}/{name} is no model")),
            other => other?,
        }
        let model = report.models.last().filter(|model| model.path == path);
        if let Some(hash) = model.and_then(|model| model.ternary_hash.clone()) {
            let step = recorded.iter().find(|(_, recorded)| *recorded == hash);
            report.note(match step {
                Some((step, _)) => format!("{EXPORTS}/{name} holds the weights of {step}"),
                None => format!("{EXPORTS}/{name} matches no hash in run.json"),
            });
        }
    }
    Ok(())
}

fn verify_model(path: &Path, report: &mut VerifyReport) -> Result<(), IoError> {
    let located = match locate(path) {
        Ok(located) => located,
        Err(error @ (IoError::Damaged { .. } | IoError::Invalid { .. })) => {
            report.fail(error);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let dir = match &located {
        Located::Checkpoint(dir) | Located::HuggingFace(dir, _) => dir.clone(),
        Located::Packed(file) | Located::Gguf(file) => {
            file.parent().unwrap_or(Path::new("")).to_owned()
        }
    };
    // A GGUF file stands alone: a manifest beside it is of something else.
    let manifest = match located {
        Located::Gguf(_) => {
            report.note(format!("{}: a GGUF file has no hashes", path.display()));
            None
        }
        _ => check_manifest(&dir, matches!(located, Located::Checkpoint(_)), report),
    };
    let checked = match &located {
        Located::Checkpoint(dir) => check_checkpoint(dir, manifest.as_ref(), report),
        Located::Packed(file) => check_packed(file, report).map(|(model, _)| model),
        Located::HuggingFace(dir, files) => check_huggingface(dir, files, report),
        Located::Gguf(file) => check_open(file, report),
    };
    match checked {
        Ok(mut model) => {
            path.clone_into(&mut model.path);
            if let Some(manifest) = &manifest {
                check_recorded(&dir, manifest, &model, report);
            }
            if model.kind == ModelKind::Checkpoint {
                check_run_record(&dir, &model, report);
            }
            report.models.push(model);
        }
        Err(error) => report.fail(error),
    }
    Ok(())
}

/// The manifest of `dir` if there is one that can be read, whatever its hashes say.
fn check_manifest(dir: &Path, required: bool, report: &mut VerifyReport) -> Option<Manifest> {
    if !required && !dir.join(MANIFEST).exists() {
        report.note(format!("{}: no manifest, so no hashes", dir.display()));
        return None;
    }
    match verify_manifest(dir) {
        Ok(manifest) => Some(manifest),
        Err(error) => {
            report.fail(error);
            Manifest::read(dir).ok()
        }
    }
}

fn check_checkpoint(
    dir: &Path,
    manifest: Option<&Manifest>,
    report: &mut VerifyReport,
) -> Result<ModelReport, IoError> {
    let config = read_config(&dir.join(CONFIG))?;
    let packed = dir.join(PACKED);
    if !packed.exists() {
        let promised =
            manifest.is_some_and(|manifest| manifest.extra.get("ternary_hash").is_some());
        if promised {
            return Err(IoError::damaged(&packed, "the file is missing"));
        }
        report.is_dense = true;
        let problem = "not a ternary model: it was trained dense (model.ternary = false)";
        return Err(IoError::invalid(dir, problem));
    }
    let latents = TensorFile::open(&dir.join(LATENTS))?;
    if let Err(error) = check_latents(&latents, &config) {
        report.fail(error);
    }
    let (mut model, header) = check_packed_against(&packed, Some(&latents), report)?;
    if header != config {
        let problem = "its config differs from config.json beside it";
        report.fail(IoError::invalid(&packed, problem));
    }
    model.kind = ModelKind::Checkpoint;
    Ok(model)
}

fn check_packed(
    path: &Path,
    report: &mut VerifyReport,
) -> Result<(ModelReport, Qwen3Config), IoError> {
    check_packed_against(path, None, report)
}

/// Scans a packed file and, with `latents`, compares it with their projection.
fn check_packed_against(
    path: &Path,
    latents: Option<&TensorFile>,
    report: &mut VerifyReport,
) -> Result<(ModelReport, Qwen3Config), IoError> {
    let file = TensorFile::open(path)?;
    let header = packed_header(&file)?;
    let ternary = header.ternary;
    let mut model = ModelReport::new(path, ModelKind::Packed, &ternary, false);
    check_group_size(path, &ternary, report);
    let mut hasher = TernaryHasher::new();
    for parameter in header.config.parameters() {
        let name = &parameter.name;
        let &[rows, cols] = parameter.shape.as_slice() else {
            check_norm(&file, name, &mut model, report)?;
            if let Some(latents) = latents {
                compare_norms(latents, &file, name, report);
            }
            continue;
        };
        let scan = scan_packed(&file, name, rows, cols, ternary.group_size)?;
        hasher.add(name, &scan.matrix);
        if let Some(latents) = latents {
            match projection_difference(latents, name, &scan.matrix, ternary.scale_rule) {
                Ok(None) => {}
                Ok(Some(place)) => report.fail(IoError::invalid(path, place)),
                Err(error) => report.fail(error),
            }
        }
        add_scan(path, scan, &mut model, report);
    }
    model.ternary_hash = Some(hasher.finish());
    Ok((model, header.config))
}

fn check_huggingface(
    dir: &Path,
    files: &[PathBuf],
    report: &mut VerifyReport,
) -> Result<ModelReport, IoError> {
    let checkpoint = read_checkpoint(dir, files)?;
    if checkpoint.storage != Storage::Values {
        return match files {
            [file] => check_open(file, report),
            _ => check_open(dir, report),
        };
    }
    let (config, shards) = (checkpoint.config, checkpoint.shards);
    checkpoint
        .notes
        .into_iter()
        .for_each(|note| report.note(note));
    if let Err(error) = check_tensors(&shards, &config, Storage::Values, dir) {
        report.fail(error);
    }
    let matrices = matrices_of(&shards, &config);
    let recorded = ternary_metadata(&shards)?;
    let ternary = match recorded {
        Some(ternary) => ternary,
        None => inferred(dir, &matrices, report)?,
    };
    let mut model = ModelReport::new(dir, ModelKind::HuggingFace, &ternary, recorded.is_none());
    check_group_size(dir, &ternary, report);
    let mut hasher = Some(TernaryHasher::new());
    for (name, file) in matrices {
        let scan = scan_values(file, name, ternary.group_size, recorded.is_some())?;
        if !scan.exact {
            hasher = None;
        }
        // A tied head that is stored again is checked, but it is no parameter.
        if let Some(hasher) = &mut hasher
            && !(config.tie_word_embeddings && name == "lm_head.weight")
        {
            hasher.add(name, &scan.matrix);
        }
        add_scan(file.path(), scan, &mut model, report);
    }
    for (name, file) in shards
        .tensors()
        .filter(|(name, file)| num_dims(file, name) == 1)
    {
        check_norm(file, name, &mut model, report)?;
    }
    model.ternary_hash = hasher.map(TernaryHasher::finish);
    Ok(model)
}

/// Checks a model of words or blocks through the same reader that runs it: every matrix
/// must come out as trits and scales.
fn check_open(path: &Path, report: &mut VerifyReport) -> Result<ModelReport, IoError> {
    let mut model = OpenModel::open(path)?;
    let inferred = !model.records_group_size();
    model.detect_ternary()?;
    let Some(&ternary) = model.ternary() else {
        let problem = "not a ternary model: it holds float matrices whose values are not \
                       ternary with groups of 256, 128, 64 or 32";
        return Err(IoError::invalid(path, problem));
    };
    model
        .notes()
        .iter()
        .for_each(|note| report.note(note.clone()));
    let mut found = ModelReport::new(path, model.kind(), &ternary, inferred);
    check_group_size(path, &ternary, report);
    let mut hasher = Some(TernaryHasher::new());
    for parameter in model.config().parameters() {
        let name = &parameter.name;
        if !parameter.is_matrix() {
            let norm = model.norm(name)?;
            add_norm(model.path_of(name), name, &norm, &mut found, report);
            continue;
        }
        let scan = scan_model(&model, &parameter, ternary.group_size);
        match &mut hasher {
            Some(hasher) if scan.exact => hasher.add(name, &scan.matrix),
            _ => hasher = None,
        }
        let file = model.path_of(name).to_owned();
        add_scan(&file, scan, &mut found, report);
    }
    found.ternary_hash = hasher.map(TernaryHasher::finish);
    Ok(found)
}

/// All 2-D weights: the parameters in canonical order, then whatever else is there.
fn matrices_of<'a>(shards: &'a Shards, config: &Qwen3Config) -> Vec<(&'a str, &'a TensorFile)> {
    let parameters: Vec<String> = config.parameters().into_iter().map(|p| p.name).collect();
    let position = |name: &str| parameters.iter().position(|p| p == name);
    let is_matrix = |(name, file): &(&str, &TensorFile)| num_dims(file, name) >= 2;
    let mut matrices: Vec<_> = shards.tensors().filter(is_matrix).collect();
    matrices.sort_by_key(|(name, _)| position(name).unwrap_or(usize::MAX));
    matrices
}

fn num_dims(file: &TensorFile, name: &str) -> usize {
    file.shape(name).map_or(0, <[usize]>::len)
}

/// The group size that fits the values best; a failure if it does not fit all of them.
fn inferred(
    dir: &Path,
    matrices: &[(&str, &TensorFile)],
    report: &mut VerifyReport,
) -> Result<TernaryInfo, IoError> {
    let (group_size, num_bad_groups) = infer_group_size(matrices)?;
    if num_bad_groups == 0 {
        report.note(format!(
            "{}: no group size recorded; {group_size} is the largest that fits the values",
            dir.display()
        ));
    } else {
        let problem = format!(
            "not a ternary model: it records no group size, and none of 256, 128, 64, 32 fits \
             (with {group_size}, {num_bad_groups} groups are not ternary)"
        );
        report.fail(IoError::invalid(dir, problem));
    }
    Ok(TernaryInfo {
        group_size,
        scale_rule: Default::default(),
        numerics: Default::default(),
    })
}

fn check_group_size(path: &Path, ternary: &TernaryInfo, report: &mut VerifyReport) {
    if ternary.group_size < MIN_GROUP_SIZE {
        let problem = format!(
            "group size {} proves nothing: a ternary model has at least {MIN_GROUP_SIZE} weights \
             to a scale",
            ternary.group_size
        );
        report.fail(IoError::invalid(path, problem));
    }
}

fn add_scan(path: &Path, scan: Scan, model: &mut ModelReport, report: &mut VerifyReport) {
    if let Some(offence) = scan.offence {
        report.fail(IoError::invalid(path, offence));
    }
    model.tensors.push(scan.report);
}

fn check_norm(
    file: &TensorFile,
    name: &str,
    model: &mut ModelReport,
    report: &mut VerifyReport,
) -> Result<(), IoError> {
    add_norm(file.path(), name, &file.floats(name)?, model, report);
    Ok(())
}

fn add_norm(
    path: &Path,
    name: &str,
    values: &[f32],
    model: &mut ModelReport,
    report: &mut VerifyReport,
) {
    model.num_norms += 1;
    model.num_norm_weights += values.len();
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        let problem = format!("{name} element {i} is {}", values[i]);
        report.fail(IoError::invalid(path, problem));
    }
}

fn compare_norms(latents: &TensorFile, packed: &TensorFile, name: &str, report: &mut VerifyReport) {
    let (ours, theirs) = match (latents.floats(name), packed.floats(name)) {
        (Ok(ours), Ok(theirs)) => (ours, theirs),
        (Err(error), _) | (_, Err(error)) => return report.fail(error),
    };
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    if let Some(i) = ours.iter().zip(&theirs).position(differs) {
        let problem = format!(
            "{name} element {i}: the latents hold {}, the packed file {}",
            ours[i], theirs[i]
        );
        report.fail(IoError::invalid(packed.path(), problem));
    }
}

/// Compares the model with what its manifest says about it.
fn check_recorded(dir: &Path, manifest: &Manifest, model: &ModelReport, report: &mut VerifyReport) {
    let found = [
        ("ternary_hash", model.ternary_hash.clone().map(Value::from)),
        ("group_size", Some(model.group_size.into())),
        ("scale_rule", Some(model.scale_rule.name().into())),
        ("numerics", Some(model.numerics.name().into())),
    ];
    for (key, found) in found {
        let recorded = manifest.extra.get(key).filter(|value| !value.is_null());
        if let Some(recorded) = recorded
            && found.as_ref() != Some(recorded)
        {
            let found = found.map_or("none".to_owned(), |found| found.to_string());
            let problem = format!("{key} is {recorded} in the manifest, {found} by the weights");
            report.fail(IoError::invalid(&dir.join(MANIFEST), problem));
        }
    }
}

/// Compares a checkpoint with the hash that its run recorded, if it lies in a run.
fn check_run_record(dir: &Path, model: &ModelReport, report: &mut VerifyReport) {
    // The path may be relative or end in "..": only its real form has the parents.
    let Ok(real) = dir.canonicalize() else { return };
    let (Some(name), Some(parent)) = (real.file_name(), real.parent()) else {
        return;
    };
    let in_a_run = parent.file_name().is_some_and(|name| name == CHECKPOINTS);
    let Some(run) = parent.parent().filter(|_| in_a_run) else {
        return;
    };
    let name = name.to_string_lossy();
    let recorded = recorded_hashes(run, report);
    let hash = recorded.iter().find(|(step, _)| *step == name);
    match (hash, &model.ternary_hash) {
        (None, _) => report.note(format!("run.json records no ternary hash for {name}")),
        (Some((_, recorded)), Some(found)) if recorded == found => {}
        (Some((_, recorded)), found) => {
            let found = found.as_deref().unwrap_or("none");
            let problem = format!(
                "ternary_hashes[{name:?}], of the last forward pass, is {recorded}, but the \
                 checkpoint's is {found}"
            );
            report.fail(IoError::invalid(&run.join("run.json"), problem));
        }
    }
}

/// `(step name, ternary hash)` from `run.json`; empty if the run has none.
fn recorded_hashes(run: &Path, report: &mut VerifyReport) -> Vec<(String, String)> {
    let path = run.join("run.json");
    if !path.exists() {
        return Vec::new();
    }
    let record = read(&path).and_then(|json| {
        serde_json::from_slice::<Value>(&json)
            .map_err(|e| IoError::invalid(&path, format!("not a run record: {e}")))
    });
    let record = match record {
        Ok(record) => record,
        Err(error) => {
            report.fail(error);
            return Vec::new();
        }
    };
    let hashes = record.get("ternary_hashes").and_then(Value::as_object);
    let mut hashes: Vec<(String, String)> = hashes
        .into_iter()
        .flatten()
        .filter_map(|(step, hash)| Some((step.clone(), hash.as_str()?.to_owned())))
        .collect();
    hashes.sort();
    hashes
}

#[cfg(test)]
mod tests;
