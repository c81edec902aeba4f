//! Writing models for others to load: Hugging Face directories and packed files, both
//! committed atomically and both holding exactly the weights that were trained.
//!
//! Ternary matrices are never projected again: `s * t` is written as it is, and it is
//! exact in f32, f16 and bf16. A value that its dtype cannot hold is an error that names
//! the place.

use crate::layout::{CONFIG, HF_SINGLE, PACKED, TOKENIZER, bad_scale};
use crate::{DirWriter, IoError, Matrix, OpenModel, TernaryHasher};
use half::{bf16, f16};
use serde_json::{Value, json};
use setun_formats::config::{ParameterInfo, Qwen3Config};
use setun_formats::packed::{PackedHeader, TernaryInfo, packed_metadata, packed_tensor_infos};
use setun_formats::tensors::{Dtype, TensorInfo, write_header};
use setun_formats::tokenizer::{END_OF_TEXT, Tokenizer};
use setun_ternary::PackedMatrix;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Dtype of the matrices in a Hugging Face export. Norms are always f32, so that nothing
/// is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportDtype {
    /// 4 bytes a weight; for dense models that must not be rounded.
    F32,
    /// 2 bytes a weight; the default.
    #[default]
    Bf16,
    /// 2 bytes a weight, largest value 65504.
    F16,
}

impl ExportDtype {
    /// Name as `config.json` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// What is read back after `value` was stored; infinite where it does not fit.
    fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }

    fn append(self, value: f32, bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend(value.to_le_bytes()),
            Self::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Self::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        }
    }
}

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
}

impl TensorSource for OpenModel {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        OpenModel::matrix(self, name)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        OpenModel::norm(self, name)
    }
}

/// Writes `parent/name` as a Hugging Face directory that transformers loads as
/// `Qwen3ForCausalLM`: config, `model.safetensors`, tokenizer files if there is a
/// tokenizer, generation settings and a manifest. Returns its path.
///
/// With `ternary`, every matrix of `source` must be ternary; the metadata record the
/// number format and the manifest the ternary hash. Without, every matrix must be dense
/// and is rounded to `dtype`.
///
/// # Errors
/// A target that exists; a matrix that is float where it must be ternary, or of another
/// shape; a value that `dtype` cannot hold; a tokenizer with more entries than the
/// vocabulary; what `source` and the operating system return. Nothing stays behind.
pub fn export_huggingface(
    parent: &Path,
    name: &str,
    config: &Qwen3Config,
    ternary: Option<&TernaryInfo>,
    dtype: ExportDtype,
    tokenizer_json: Option<&[u8]>,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let end_of_text = check_tokenizer(config, tokenizer_json)?;
    let parameters = config.parameters();
    let infos: Vec<TensorInfo> = parameters
        .iter()
        .map(|p| TensorInfo {
            name: p.name.clone(),
            dtype: if p.is_matrix() {
                dtype.dtype()
            } else {
                Dtype::F32
            },
            shape: p.shape.clone(),
        })
        .collect();
    let mut dir = DirWriter::create(parent, name)?;
    let mut hasher = TernaryHasher::new();
    dir.file(HF_SINGLE, |out| {
        write_header(out, &infos, &huggingface_metadata(ternary))?;
        for parameter in &parameters {
            write_values(out, parameter, ternary, dtype, source, &mut hasher)?;
        }
        Ok(())
    })?;
    write_text(&mut dir, CONFIG, &config.to_json_as(dtype.name()))?;
    let generation = generation_config(config, end_of_text);
    write_json(&mut dir, "generation_config.json", &generation)?;
    write_tokenizer(&mut dir, config, tokenizer_json, end_of_text)?;
    dir.commit(manifest_extra(
        "huggingface",
        ternary.map(|ternary| (ternary, hasher.finish())),
    ))
}

/// Writes `parent/name` with `packed.safetensors`, `config.json`, the tokenizer if there
/// is one, and a manifest. Returns its path.
///
/// # Errors
/// As [`export_huggingface`]; a float matrix cannot be packed.
pub fn export_packed(
    parent: &Path,
    name: &str,
    config: &Qwen3Config,
    ternary: &TernaryInfo,
    tokenizer_json: Option<&[u8]>,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    check_tokenizer(config, tokenizer_json)?;
    let header = PackedHeader {
        config: config.clone(),
        ternary: *ternary,
    };
    let mut dir = DirWriter::create(parent, name)?;
    let mut hash = String::new();
    dir.file(PACKED, |out| {
        hash = write_packed(out, &header, source).map_err(io::Error::other)?;
        Ok(())
    })?;
    write_text(&mut dir, CONFIG, &config.to_json())?;
    if let Some(json) = tokenizer_json {
        dir.file(TOKENIZER, |out| out.write_all(json))?;
    }
    dir.commit(manifest_extra("packed", Some((ternary, hash))))
}

/// Writes the packed file (header and payload) to `out` and returns the ternary hash.
///
/// # Errors
/// As [`export_packed`], and what `out` returns.
pub fn write_packed(
    out: &mut dyn Write,
    header: &PackedHeader,
    source: &dyn TensorSource,
) -> Result<String, IoError> {
    let write_error = |e| IoError::file("write", Path::new(PACKED), e);
    let (config, ternary) = (&header.config, &header.ternary);
    let infos = packed_tensor_infos(config, ternary.group_size);
    write_header(out, &infos, &packed_metadata(header)).map_err(write_error)?;
    let shapes: BTreeMap<String, ParameterInfo> = config
        .parameters()
        .into_iter()
        .map(|p| (p.name.clone(), p))
        .collect();
    let parameter = |name: &str| {
        let known = shapes.get(name);
        known.ok_or_else(|| IoError::Refused(format!("the config has no parameter {name}")))
    };
    let mut hasher = TernaryHasher::new();
    // The scales follow their trits: the matrix is asked for once.
    let mut current: Option<(&str, PackedMatrix)> = None;
    for info in &infos {
        let bytes = if let Some(name) = info.name.strip_suffix(".trits") {
            let matrix = ternary_matrix(parameter(name)?, ternary, source)?;
            hasher.add(name, &matrix);
            let trits = matrix.trits.clone();
            current = Some((name, matrix));
            trits
        } else if let Some(name) = info.name.strip_suffix(".scales") {
            let matrix = match current.take() {
                Some((trits_of, matrix)) if trits_of == name => matrix,
                _ => ternary_matrix(parameter(name)?, ternary, source)?,
            };
            matrix.scales.iter().flat_map(|s| s.to_le_bytes()).collect()
        } else {
            norm_bytes(parameter(&info.name)?, source)?
        };
        out.write_all(&bytes).map_err(write_error)?;
    }
    Ok(hasher.finish())
}

/// Writes one parameter of a Hugging Face file, row by row.
fn write_values(
    out: &mut dyn Write,
    parameter: &ParameterInfo,
    ternary: Option<&TernaryInfo>,
    dtype: ExportDtype,
    source: &dyn TensorSource,
    hasher: &mut TernaryHasher,
) -> io::Result<()> {
    if !parameter.is_matrix() {
        let bytes = norm_bytes(parameter, source).map_err(io::Error::other)?;
        return out.write_all(&bytes);
    }
    let (name, cols) = (&parameter.name, parameter.shape[1]);
    let Some(ternary) = ternary else {
        let values = dense_matrix(parameter, source).map_err(io::Error::other)?;
        for (row, values) in values.chunks(cols).enumerate() {
            out.write_all(&row_bytes(name, row, values, dtype, false).map_err(io::Error::other)?)?;
        }
        return Ok(());
    };
    let matrix = ternary_matrix(parameter, ternary, source).map_err(io::Error::other)?;
    hasher.add(name, &matrix);
    let mut values = vec![0.0; cols];
    for row in 0..matrix.rows {
        matrix
            .dequantize_row(row, &mut values)
            .map_err(|e| io::Error::other(IoError::Refused(format!("{name} row {row}: {e}"))))?;
        out.write_all(&row_bytes(name, row, &values, dtype, true).map_err(io::Error::other)?)?;
    }
    Ok(())
}

/// One row in `dtype`; with `exact`, rounding is an error too.
fn row_bytes(
    name: &str,
    row: usize,
    values: &[f32],
    dtype: ExportDtype,
    exact: bool,
) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::with_capacity(4 * values.len());
    for (column, &value) in values.iter().enumerate() {
        let stored = dtype.rounded(value);
        if !stored.is_finite() || exact && stored != value {
            let held = dtype.name();
            return Err(IoError::Refused(format!(
                "{name} row {row} column {column}: {held} cannot hold {value}; export another dtype"
            )));
        }
        dtype.append(value, &mut bytes);
    }
    Ok(bytes)
}

fn ternary_matrix(
    parameter: &ParameterInfo,
    ternary: &TernaryInfo,
    source: &dyn TensorSource,
) -> Result<PackedMatrix, IoError> {
    let name = &parameter.name;
    let Matrix::Ternary(matrix) = source.matrix(name)? else {
        return Err(IoError::Refused(format!(
            "{name} is a float matrix: a ternary export needs every matrix ternary; \
             export the model as dense instead"
        )));
    };
    let found = (matrix.rows, matrix.cols, matrix.group_size);
    let expected = (parameter.shape[0], parameter.shape[1], ternary.group_size);
    if found != expected {
        return Err(IoError::Refused(format!(
            "{name} has (rows, columns, group size) {found:?}, expected {expected:?}"
        )));
    }
    if let Some(problem) = bad_scale(&matrix) {
        return Err(IoError::Refused(format!("{name} {problem}")));
    }
    Ok(matrix)
}

fn dense_matrix(parameter: &ParameterInfo, source: &dyn TensorSource) -> Result<Vec<f32>, IoError> {
    let name = &parameter.name;
    match source.matrix(name)? {
        Matrix::Dense(values) if values.len() == parameter.numel() => Ok(values),
        Matrix::Dense(values) => Err(IoError::Refused(format!(
            "{name} has {} values, the config asks for {:?}",
            values.len(),
            parameter.shape
        ))),
        Matrix::Ternary(_) => Err(IoError::Refused(format!(
            "{name} is ternary: the export must record its group size and numerics"
        ))),
    }
}

fn norm_bytes(parameter: &ParameterInfo, source: &dyn TensorSource) -> Result<Vec<u8>, IoError> {
    let (name, values) = (&parameter.name, source.norm(&parameter.name)?);
    if values.len() != parameter.numel() {
        return Err(IoError::Refused(format!(
            "{name} has {} values, the config asks for {:?}",
            values.len(),
            parameter.shape
        )));
    }
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        let value = values[i];
        return Err(IoError::Refused(format!("{name} element {i} is {value}")));
    }
    Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

fn huggingface_metadata(ternary: Option<&TernaryInfo>) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if let Some(ternary) = ternary {
        let fields = [
            ("setun.group_size", ternary.group_size.to_string()),
            ("setun.scale_rule", ternary.scale_rule.name().to_owned()),
            ("setun.numerics", ternary.numerics.name().to_owned()),
        ];
        metadata.extend(fields.map(|(key, value)| (key.to_owned(), value)));
    }
    metadata
}

fn manifest_extra(kind: &str, ternary: Option<(&TernaryInfo, String)>) -> Value {
    match ternary {
        None => json!({ "kind": kind }),
        Some((ternary, hash)) => json!({
            "kind": kind,
            "ternary_hash": hash,
            "group_size": ternary.group_size,
            "scale_rule": ternary.scale_rule.name(),
            "numerics": ternary.numerics.name(),
        }),
    }
}

/// Checks that the tokenizer fits the vocabulary; the id of its end-of-text token.
fn check_tokenizer(
    config: &Qwen3Config,
    tokenizer_json: Option<&[u8]>,
) -> Result<Option<u32>, IoError> {
    let Some(json) = tokenizer_json else {
        return Ok(None);
    };
    let path = Path::new(TOKENIZER);
    let tokenizer =
        Tokenizer::from_bytes(json).map_err(|e| IoError::invalid(path, e.to_string()))?;
    if tokenizer.vocab_size() > config.vocab_size {
        let problem = format!(
            "it has {} entries, the model's vocabulary {}: use the tokenizer of this model",
            tokenizer.vocab_size(),
            config.vocab_size
        );
        return Err(IoError::invalid(path, problem));
    }
    Ok(tokenizer.end_of_text())
}

// Sorted maps: the same bytes whether or not a build of serde_json keeps insertion order.
type Settings = BTreeMap<&'static str, Value>;

fn generation_config(config: &Qwen3Config, end_of_text: Option<u32>) -> Settings {
    let eos = match config.eos_token_ids.as_slice() {
        [] => json!(end_of_text),
        [one] => json!(one),
        several => json!(several),
    };
    let pad = end_of_text.or(config.eos_token_ids.first().copied());
    BTreeMap::from([
        ("bos_token_id", json!(config.bos_token_id)),
        ("eos_token_id", eos),
        ("pad_token_id", json!(pad)),
    ])
}

fn write_tokenizer(
    dir: &mut DirWriter,
    config: &Qwen3Config,
    tokenizer_json: Option<&[u8]>,
    end_of_text: Option<u32>,
) -> Result<(), IoError> {
    let Some(json) = tokenizer_json else {
        return Ok(());
    };
    dir.file(TOKENIZER, |out| out.write_all(json))?;
    let mut settings: Settings = BTreeMap::from([
        ("add_bos_token", false.into()),
        ("add_prefix_space", false.into()),
        ("bos_token", Value::Null),
        ("clean_up_tokenization_spaces", false.into()),
        ("errors", "replace".into()),
        ("model_max_length", config.max_position_embeddings.into()),
        ("split_special_tokens", false.into()),
        ("tokenizer_class", "Qwen2Tokenizer".into()),
        ("unk_token", Value::Null),
    ]);
    if let Some(id) = end_of_text {
        let token: Settings = BTreeMap::from([
            ("content", END_OF_TEXT.into()),
            ("lstrip", false.into()),
            ("normalized", false.into()),
            ("rstrip", false.into()),
            ("single_word", false.into()),
            ("special", true.into()),
        ]);
        settings.insert("added_tokens_decoder", json!({ id.to_string(): token }));
        settings.insert("eos_token", END_OF_TEXT.into());
        settings.insert("pad_token", END_OF_TEXT.into());
    }
    write_json(dir, "tokenizer_config.json", &settings)
}

fn write_json(dir: &mut DirWriter, name: &str, settings: &Settings) -> Result<(), IoError> {
    dir.file(name, |out| {
        serde_json::to_writer_pretty(&mut *out, settings)?;
        writeln!(out)
    })
}

fn write_text(dir: &mut DirWriter, name: &str, text: &str) -> Result<(), IoError> {
    dir.file(name, |out| writeln!(out, "{}", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{DOWN, Dense, EMBED, Q_NORM, Scratch, Tiny};
    use crate::{TensorFile, verify_manifest};
    use std::fs;

    fn export(
        scratch: &Scratch,
        tiny: &Tiny,
        ternary: bool,
        dtype: ExportDtype,
        source: &dyn TensorSource,
    ) -> Result<PathBuf, IoError> {
        let tokenizer = Tiny::tokenizer().to_json();
        let ternary = ternary.then_some(tiny.ternary());
        let json = Some(tokenizer.as_bytes());
        export_huggingface(
            scratch.path(),
            "hf",
            tiny.config(),
            ternary,
            dtype,
            json,
            source,
        )
    }

    fn json(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_huggingface_export_holds_exact_values_and_its_number_format() {
        for dtype in [ExportDtype::Bf16, ExportDtype::F16, ExportDtype::F32] {
            let scratch = Scratch::new("export-hf");
            let tiny = Tiny::new(true, 16);
            let dir = export(&scratch, &tiny, true, dtype, &tiny).unwrap();
            let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
            assert_eq!(file.metadata()["setun.group_size"], "16");
            assert_eq!(file.metadata()["setun.scale_rule"], "mean");
            assert_eq!(file.metadata()["setun.numerics"], "int8");
            for (name, matrix) in &tiny.packed {
                let mut row = vec![0.0; matrix.cols];
                for r in 0..matrix.rows {
                    matrix.dequantize_row(r, &mut row).unwrap();
                    assert_eq!(file.float_rows(name, r..r + 1).unwrap(), row);
                }
            }
            file.expect(Q_NORM, &[Dtype::F32], &[10]).unwrap();
            assert_eq!(file.floats(Q_NORM).unwrap(), tiny.latents[Q_NORM]);
            assert_eq!(json(&dir.join("config.json"))["torch_dtype"], dtype.name());
        }
    }

    #[test]
    fn the_files_around_the_weights() {
        let scratch = Scratch::new("export-files");
        let tiny = Tiny::new(false, 16);
        let dir = export(&scratch, &tiny, true, ExportDtype::Bf16, &tiny).unwrap();
        let end_of_text = Tiny::tokenizer().end_of_text().unwrap();
        let tokenizer = json(&dir.join("tokenizer_config.json"));
        assert_eq!(tokenizer["tokenizer_class"], "Qwen2Tokenizer");
        assert_eq!(tokenizer["eos_token"], END_OF_TEXT);
        assert_eq!(tokenizer["pad_token"], END_OF_TEXT);
        assert_eq!(tokenizer["model_max_length"], 64);
        assert!(tokenizer.get("chat_template").is_none());
        let id = end_of_text.to_string();
        assert_eq!(
            tokenizer["added_tokens_decoder"][id]["content"],
            END_OF_TEXT
        );
        let generation = json(&dir.join("generation_config.json"));
        assert_eq!(generation["eos_token_id"], 0);
        assert_eq!(generation["pad_token_id"], end_of_text);
        let manifest = verify_manifest(&dir).unwrap();
        assert_eq!(manifest.files.len(), 5);
        assert_eq!(manifest.extra["group_size"], 16);
    }

    #[test]
    fn the_hash_does_not_depend_on_the_format() {
        let scratch = Scratch::new("export-hash");
        let tiny = Tiny::new(false, 16);
        let hf = export(&scratch, &tiny, true, ExportDtype::F16, &tiny).unwrap();
        let parent = scratch.path();
        let packed = export_packed(parent, "p", tiny.config(), tiny.ternary(), None, &tiny);
        let hash = |dir: &Path| verify_manifest(dir).unwrap().extra["ternary_hash"].clone();
        let mut hasher = TernaryHasher::new();
        for p in tiny.config().parameters().iter().filter(|p| p.is_matrix()) {
            hasher.add(&p.name, &tiny.packed[&p.name]);
        }
        assert_eq!(hash(&hf), hasher.finish());
        assert_eq!(hash(&hf), hash(&packed.unwrap()));
    }

    #[test]
    fn dense_values_are_rounded_as_asked() {
        let scratch = Scratch::new("export-dense");
        let tiny = Tiny::new(false, 16);
        let dir = export(&scratch, &tiny, false, ExportDtype::Bf16, &Dense(&tiny)).unwrap();
        let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
        assert!(!file.metadata().contains_key("setun.group_size"));
        let rounded = tiny.latents[EMBED]
            .iter()
            .map(|&w| bf16::from_f32(w).to_f32());
        assert_eq!(file.floats(EMBED).unwrap(), rounded.collect::<Vec<_>>());
        assert_eq!(file.floats(Q_NORM).unwrap(), tiny.latents[Q_NORM]);
    }

    #[test]
    fn what_cannot_be_exported_is_named_and_leaves_nothing() {
        let scratch = Scratch::new("export-refused");
        let good = Tiny::new(false, 16);
        let refused = |result: Result<PathBuf, IoError>, expected: &[&str]| {
            let error = result.unwrap_err().to_string();
            assert!(expected.iter().all(|e| error.contains(e)), "{error}");
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
        };
        let bf16 = ExportDtype::Bf16;
        refused(
            export(&scratch, &good, true, bf16, &Dense(&good)),
            &[EMBED, "float matrix"],
        );
        refused(
            export(&scratch, &good, false, bf16, &good),
            &[EMBED, "is ternary"],
        );

        let mut tiny = good.clone();
        // 1 + 2^-10 is an f16 and not a bf16.
        tiny.packed.get_mut(DOWN).unwrap().scales[9] = f16::from_f32(1.0 + 1.0 / 1024.0);
        let expected = [DOWN, "row 1 group 2", "not exact in bf16"];
        refused(
            export(&scratch, &tiny, true, ExportDtype::F16, &tiny),
            &expected,
        );
        let parent = scratch.path();
        let packed = export_packed(parent, "p", tiny.config(), tiny.ternary(), None, &tiny);
        refused(packed, &expected);

        let mut tiny = good.clone();
        tiny.latents.get_mut(DOWN).unwrap()[105] = 70_000.0;
        let dense = Dense(&tiny);
        let expected = [DOWN, "row 1 column 5", "float16 cannot hold 70000"];
        refused(
            export(&scratch, &tiny, false, ExportDtype::F16, &dense),
            &expected,
        );

        let mut tiny = good.clone();
        tiny.latents.get_mut(Q_NORM).unwrap()[3] = f32::NAN;
        let expected = [Q_NORM, "element 3 is NaN"];
        refused(export(&scratch, &tiny, true, bf16, &tiny), &expected);

        let mut tiny = good.clone();
        tiny.header.config.vocab_size = 100;
        let expected = ["tokenizer.json", "280 entries", "100"];
        refused(export(&scratch, &tiny, true, bf16, &tiny), &expected);
        let mut other = good.clone();
        other.header.ternary.group_size = 32;
        refused(
            export(&scratch, &other, true, bf16, &good),
            &[EMBED, "group size"],
        );
    }

    #[test]
    fn an_earlier_export_is_kept() {
        let scratch = Scratch::new("export-again");
        let tiny = Tiny::new(false, 16);
        let dir = export(&scratch, &tiny, true, ExportDtype::Bf16, &tiny).unwrap();
        let again = export(&scratch, &tiny, true, ExportDtype::F16, &tiny).unwrap_err();
        assert!(matches!(again, IoError::Exists { .. }), "{again}");
        verify_manifest(&dir).unwrap();
    }
}
