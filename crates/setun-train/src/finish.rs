//! Behind the last step: export, verification, samples, report.

use crate::TrainError;
use crate::data::{Batches, TokenSet};
use crate::evaluate::Evaluator;
use crate::machine::{self, RunClock};
use crate::metrics;
use crate::report::Report;
use crate::report::record::{
    FinalResults, Metric, ModelFile, RunRecord, Sample, Timeline, VerificationCheck,
    VerificationRow, VerificationTable,
};
use crate::report::samples::measure_sample;
use crate::run::Observer;
use crate::settings::Settings;
use serde::Serialize;
use setun_backend::Isa;
use setun_formats::Tokenizer;
use setun_infer::{Engine, EngineOptions, Request, SamplerOptions, StopRules};
use setun_io::{
    ConvertOptions, FileOps, Format, IoError, OpenModel, RealOps, VerifyReport, convert, verify,
    write_atomic, write_atomic_with,
};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Bytes of training text that samples are compared with.
const COMPARED_BYTES: usize = 64 << 20;

/// A finished run.
pub struct Finished {
    /// The run directory.
    pub run: PathBuf,
    /// The report, as written.
    pub report: Report,
    /// The verification; none for a dense model.
    pub verification: Option<VerifyReport>,
}

impl Finished {
    /// Whether everything that was verified is as it should be.
    pub fn ok(&self) -> bool {
        self.verification.as_ref().is_none_or(VerifyReport::ok)
    }
}

/// What is left of a session when its training memory is gone.
pub(crate) struct Finish {
    pub settings: Settings,
    pub run: PathBuf,
    pub tokenizer: Tokenizer,
    pub record: RunRecord,
    pub isa: Isa,
    pub threads: usize,
    pub batches: Batches,
    pub evaluator: Evaluator,
    pub clock: RunClock,
}

impl Finish {
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<Finished, TrainError> {
        let model = OpenModel::open(&self.run)?;
        observer.message("exporting the best checkpoint");
        self.record.files = self.export(&model)?;
        observer.message("continuing held-out prompts");
        self.record.samples = self.samples(&model)?;
        let metrics = metrics::read(&self.run, u64::MAX)?;
        self.record.results = FinalResults::new(&self.record, &Timeline::new(&metrics));
        let memory = &mut self.record.memory;
        memory.peak_bytes = memory.peak_bytes.max(machine::peak_resident_bytes());
        self.record.finished = Some(machine::now() as u64);
        self.record.seconds = self.clock.seconds();
        write_json(&RealOps, &self.run.join("run.json"), &self.record)?;
        let mut verification = None;
        if self.settings.ternary_info().is_some() {
            observer.message("verifying every weight of the checkpoints and exports");
            verification = Some(verify(&self.run)?);
        }
        let report = write_report(&self.run, &self.record, &metrics, verification.as_ref())?;
        Ok(Finished {
            run: self.run,
            report,
            verification,
        })
    }

    /// Writes the exports; returns where the weights are, in a checkpoint if nowhere else.
    fn export(&self, model: &OpenModel) -> Result<Vec<ModelFile>, TrainError> {
        let mut files = Vec::new();
        let parent = self.run.join("export");
        std::fs::create_dir_all(&parent).map_err(|e| IoError::file("create", &parent, e))?;
        for &format in &self.settings.export.formats {
            let target = parent.join(export_name(format));
            let remove = match target.is_dir() {
                true => std::fs::remove_dir_all,
                false => std::fs::remove_file,
            };
            if target.exists() {
                // Of an earlier end of this run; the new one replaces it.
                remove(&target).map_err(|e| IoError::file("remove", &target, e))?;
            }
            let options = ConvertOptions {
                // Dense weights are rounded to the type of the file.
                allow_lossy: model.ternary().is_none(),
                ..ConvertOptions::new(format)
            };
            convert(model, &target, &options, &mut |_, _| {
                ControlFlow::Continue(())
            })?;
            files.push(self.model_file(&target)?);
        }
        if files.is_empty() {
            let packed = model.directory().join("packed.safetensors");
            let latents = model.directory().join("latents.safetensors");
            let file = if packed.exists() { packed } else { latents };
            files.push(self.model_file(&file)?);
        }
        Ok(files)
    }

    /// What is written at `path`, for the record.
    fn model_file(&self, path: &Path) -> Result<ModelFile, TrainError> {
        let bytes = weight_bytes(path).map_err(|e| IoError::file("read", path, e))?;
        Ok(ModelFile {
            path: relative(path, &self.run),
            bytes,
        })
    }

    /// Continuations of the beginnings of held-out documents.
    fn samples(&mut self, model: &OpenModel) -> Result<Vec<Sample>, TrainError> {
        let s = &self.settings.sample;
        let valid = self.evaluator.windows().tokens();
        let prompts = document_beginnings(valid, s.prompts, s.prompt_tokens)?;
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let context = s.prompt_tokens + s.max_tokens;
        let options = EngineOptions::new(context, self.threads, self.isa);
        let mut engine = Engine::load(model, options)?;
        let sampler = SamplerOptions {
            temperature: s.temperature as f32,
            top_k: s.top_k,
            top_p: s.top_p as f32,
            min_p: s.min_p as f32,
            ..SamplerOptions::default()
        };
        let end_tokens = self.tokenizer.end_of_text().into_iter().collect();
        let stop = StopRules {
            end_tokens,
            max_tokens: s.max_tokens,
        };
        let (training, compared) = training_text(self.batches.tokens(), &self.tokenizer)?;
        self.record.compared_bytes = compared;
        let decoding = format!(
            "temperature {}, top-k {}, top-p {}",
            s.temperature, s.top_k, s.top_p
        );
        let mut samples = Vec::new();
        for (request, prompt) in prompts.iter().enumerate() {
            let request = Request {
                prompt: prompt.clone(),
                sampler,
                stop: stop.clone(),
                seed: (self.settings.run.seed, request as u64),
                logprobs: None,
            };
            let out = engine.generate(&request, |_| {})?;
            let text = self.tokenizer.decode(&out.tokens);
            let prompt = self.tokenizer.decode(prompt);
            let training = training.iter().map(String::as_str);
            samples.push(measure_sample(prompt, text, decoding.clone(), training));
        }
        Ok(samples)
    }
}

/// Bytes of the files with weights at `path`, a file or a directory.
fn weight_bytes(path: &Path) -> std::io::Result<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.len());
    }
    let mut bytes = 0;
    for entry in path.read_dir()? {
        let file = entry?.path();
        if file.extension().is_some_and(|e| e == "safetensors") {
            bytes += file.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Name of an export below `RUN/export`.
fn export_name(format: Format) -> String {
    let extension = if format.is_file() { ".gguf" } else { "" };
    format!("{}{extension}", format.name())
}

/// The first tokens of held-out documents, spread over all of them.
fn document_beginnings(
    tokens: &TokenSet,
    count: usize,
    len: usize,
) -> Result<Vec<Vec<u32>>, TrainError> {
    let starts = tokens.document_starts();
    let end_of = |i: usize| starts.get(i + 1).copied().unwrap_or(tokens.num_tokens()) - 1;
    let long: Vec<u64> = (0..starts.len())
        .filter(|&i| end_of(i) - starts[i] >= len as u64)
        .map(|i| starts[i])
        .collect();
    let mut prompts = Vec::new();
    for start in spread(&long, count) {
        let mut prompt = vec![0u32; len];
        tokens.read(start, &mut prompt)?;
        prompts.push(prompt);
    }
    Ok(prompts)
}

/// So many of `places`, or all of fewer, at even distances.
fn spread(places: &[u64], count: usize) -> impl Iterator<Item = u64> {
    let count = count.min(places.len());
    (0..count).map(move |i| places[i * places.len() / count])
}

/// The training documents as text again, up to a limit, and their bytes if there is more.
fn training_text(
    tokens: &TokenSet,
    tokenizer: &Tokenizer,
) -> Result<(Vec<String>, Option<u64>), TrainError> {
    let starts = tokens.document_starts();
    let (mut texts, mut bytes) = (Vec::new(), 0);
    for (i, &start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).copied().unwrap_or(tokens.num_tokens()) - 1;
        let mut ids = vec![0u32; (end - start) as usize];
        tokens.read(start, &mut ids)?;
        let text = tokenizer.decode(&ids);
        bytes += text.len();
        texts.push(text);
        if bytes >= COMPARED_BYTES && i + 1 < starts.len() {
            return Ok((texts, Some(bytes as u64)));
        }
    }
    Ok((texts, None))
}

/// Builds the report and writes `report.json` and `report.html`.
///
/// # Errors
/// What the operating system returns.
pub fn write_report(
    run: &Path,
    record: &RunRecord,
    metrics: &[Metric],
    verification: Option<&VerifyReport>,
) -> Result<Report, TrainError> {
    let table = verification.map(verification_table);
    let report = Report::build(record, metrics, table.as_ref());
    write_atomic(&run.join("report.json"), report.to_json().as_bytes())?;
    write_atomic(&run.join("report.html"), report.to_html().as_bytes())?;
    Ok(report)
}

/// Writes the report of a run directory anew from its files.
///
/// # Errors
/// A directory that is no run.
pub fn report_of_run(run: &Path) -> Result<Report, TrainError> {
    let path = run.join("run.json");
    let text = std::fs::read(&path).map_err(|e| IoError::file("read", &path, e))?;
    let record: RunRecord = serde_json::from_slice(&text)
        .map_err(|e| TrainError::refused(format!("{}: {e}; is this a run?", path.display())))?;
    let metrics = metrics::read(run, u64::MAX)?;
    let settings = Settings::load_run(run, &[])?;
    let verification = settings.ternary_info().map(|_| verify(run)).transpose()?;
    write_report(run, &record, &metrics, verification.as_ref())
}

/// The table of the first model (the checkpoint that was verified first), and one line
/// for each model.
fn verification_table(report: &VerifyReport) -> VerificationTable {
    let check = |model: &setun_io::ModelReport| VerificationCheck {
        name: relative(&model.path, &report.path),
        pass: model.ternary_hash.is_some(),
        detail: format!("{} ternary weights", model.num_ternary_weights()),
    };
    let mut checks: Vec<_> = report.models.iter().map(check).collect();
    checks.extend(report.failures.iter().map(|failure| VerificationCheck {
        name: "failure".to_owned(),
        pass: false,
        detail: failure.clone(),
    }));
    let rows = report
        .models
        .first()
        .map_or(&[][..], |model| &model.tensors);
    let rows = rows.iter().map(|t| VerificationRow {
        name: t.name.clone(),
        shape: t.shape.clone(),
        groups: t.num_groups as u64,
        minus_share: t.share_minus,
        zero_share: t.share_zero,
        plus_share: t.share_plus,
        scale_min: f64::from(t.scale_min),
        scale_max: f64::from(t.scale_max),
        worst_distance: f64::from(t.worst_distance),
        pass: t.worst_distance <= 1e-5,
    });
    let subject = report
        .models
        .first()
        .map(|model| relative(&model.path, &report.path));
    VerificationTable {
        subject: subject.unwrap_or_default(),
        checks,
        rows: rows.collect(),
    }
}

fn relative(path: &Path, base: &Path) -> String {
    path.strip_prefix(base)
        .unwrap_or(path)
        .display()
        .to_string()
}

/// Writes a value as JSON, atomically.
pub(crate) fn write_json(
    files: &dyn FileOps,
    path: &Path,
    value: &impl Serialize,
) -> Result<(), TrainError> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|e| TrainError::refused(format!("{}: {e}", path.display())))?;
    write_atomic_with(files, path, text.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_as_many_as_were_asked_for() {
        let places: Vec<u64> = (0..11).collect();
        let some = |of: usize, count| spread(&places[..of], count).collect::<Vec<_>>();
        assert_eq!(some(6, 5), [0, 1, 2, 3, 4]);
        assert_eq!(some(11, 5), [0, 2, 4, 6, 8]);
        assert_eq!(some(3, 5), [0, 1, 2]);
        assert!(some(0, 5).is_empty() && some(6, 0).is_empty());
    }
}
