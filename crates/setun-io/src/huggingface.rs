//! Hugging Face directories: the configuration, how the matrices are stored, and whether
//! the tensors are those of a dense Qwen3 model.
//!
//! MLX and compressed-tensors models are such directories too; `config.json` tells them
//! apart.

use crate::layout::{CONFIG, GENERATION, HF_INDEX, Shards, missing, read, read_generation};
use crate::{IoError, TensorFile};
use serde::Deserialize;
use serde_json::{Map, Value};
use setun_formats::config::{ConfigError, MAX_CONFIG_BYTES, ParameterInfo, Qwen3Config};
use setun_formats::tensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const EMBEDDING: &str = "model.embed_tokens.weight";
const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// Group sizes that MLX has kernels for.
pub(crate) const MLX_GROUP_SIZES: [usize; 3] = [128, 64, 32];

/// How the matrices of a Hugging Face directory are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// One float for each weight.
    Values,
    /// MLX 2-bit affine.
    Mlx { group_size: usize },
    /// compressed-tensors pack-quantized, 2 bits, symmetric, by groups.
    Compressed { group_size: usize },
}

/// A Hugging Face directory whose headers have been read.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) config: Qwen3Config,
    pub(crate) storage: Storage,
    pub(crate) shards: Shards,
    /// What the user should know about it.
    pub(crate) notes: Vec<String>,
}

/// Reads the configuration and the headers of `files`; the tensors are not checked yet,
/// see [`check_tensors`].
///
/// # Errors
/// A configuration of another model or quantization, by key; an index that does not
/// describe its shards.
pub(crate) fn read_checkpoint(dir: &Path, files: &[PathBuf]) -> Result<Checkpoint, IoError> {
    let shards = Shards::open(files)?;
    if files.len() > 1 {
        check_index(&dir.join(HF_INDEX), &shards)?;
    }
    let path = dir.join(CONFIG);
    let num_rows = embedding_rows(&shards);
    let (config, storage, recorded) = read_config(&path, num_rows)?;
    let mut notes = Vec::new();
    if let (Some(recorded), Some(rows)) = (recorded, num_rows)
        && recorded != rows
    {
        notes.push(format!(
            "{}: vocab_size is {recorded}, but the embedding has {rows} rows; {rows} is used",
            path.display()
        ));
    }
    let config = with_generation_ids(dir, config)?;
    Ok(Checkpoint {
        config,
        storage,
        shards,
        notes,
    })
}

/// Checks that the files hold all parameters in the form that `storage` says, and nothing
/// that would be silently dropped. `dir` is named when there is no file at all.
///
/// # Errors
/// The first tensor that is missing, has another type or shape, or is unknown.
pub(crate) fn check_tensors(
    shards: &Shards,
    config: &Qwen3Config,
    storage: Storage,
    dir: &Path,
) -> Result<(), IoError> {
    let mut known = BTreeSet::new();
    for parameter in config.parameters() {
        known.extend(check_parameter(shards, &parameter, storage, dir)?);
    }
    for (name, file) in shards.tensors() {
        // Older writers store the tied head again and a table that RoPE recomputes.
        let redundant = config.tie_word_embeddings && name.starts_with("lm_head.")
            || name.ends_with(".rotary_emb.inv_freq");
        if !known.contains(name) && !redundant {
            return Err(unexpected(file.path(), name));
        }
    }
    Ok(())
}

/// The error for a tensor that no dense Qwen3 model has.
pub(crate) fn unexpected(path: &Path, name: &str) -> IoError {
    let reason = if name.contains(".experts.") || name.ends_with("mlp.gate.weight") {
        ": it belongs to a mixture of experts, and Setun runs dense models"
    } else if name.ends_with(".bias") {
        ": Qwen3 has no biases"
    } else if [".qweight", ".qzeros", ".g_idx"]
        .iter()
        .any(|end| name.ends_with(end))
    {
        ": the model was quantized by GPTQ or AWQ; start from the unquantized checkpoint"
    } else {
        ""
    };
    IoError::invalid(
        path,
        format!("tensor {name} is not part of a Qwen3 model of this config{reason}"),
    )
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// The file of each tensor, as `model.safetensors.index.json` says.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, IoError> {
    let index: ShardIndex = serde_json::from_slice(&read(path)?)
        .map_err(|e| IoError::invalid(path, format!("not a shard index: {e}")))?;
    if index.weight_map.is_empty() {
        return Err(IoError::invalid(path, "weight_map names no tensor"));
    }
    Ok(index.weight_map)
}

fn check_index(path: &Path, shards: &Shards) -> Result<(), IoError> {
    if !path.is_file() {
        return Ok(());
    }
    for (name, shard) in read_index(path)? {
        let file = shards.file_of(&name).map(TensorFile::path);
        let named = file.and_then(Path::file_name);
        if named.is_none_or(|named| named != shard.as_str()) {
            let problem = format!("it says that tensor {name} is in {shard}, but it is not there");
            return Err(IoError::invalid(path, problem));
        }
    }
    Ok(())
}

/// Rows of the token embedding, which are the vocabulary whatever `config.json` says.
fn embedding_rows(shards: &Shards) -> Option<usize> {
    let packed = format!("{EMBEDDING}_packed");
    let mut names = [EMBEDDING, packed.as_str()].into_iter();
    names.find_map(|name| {
        let shape = shards.file_of(name)?.shape(name).ok()?;
        (shape.len() == 2).then_some(shape[0])
    })
}

/// The configuration with the vocabulary of the embedding, how matrices are stored, and
/// the `vocab_size` that the file states.
fn read_config(
    path: &Path,
    num_rows: Option<usize>,
) -> Result<(Qwen3Config, Storage, Option<usize>), IoError> {
    let bytes = read(path)?;
    let invalid = |e: ConfigError| IoError::invalid(path, e.to_string());
    let first = Qwen3Config::parse(&bytes);
    // What is repaired below: another reader's settings, and ids beyond a wrong vocab_size.
    let repairable = match &first {
        Ok(_) => true,
        Err(ConfigError::Unsupported { key, .. }) => key == "quantization_config",
        Err(ConfigError::OutOfRange { key, .. }) => key.ends_with("os_token_id"),
        Err(_) => false,
    };
    if !repairable || bytes.len() > MAX_CONFIG_BYTES {
        return first
            .map(|config| (config, Storage::Values, None))
            .map_err(invalid);
    }
    let mut map: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|e| IoError::invalid(path, format!("not a JSON object: {e}")))?;
    let storage = take_storage(path, &mut map)?;
    let recorded = map.get("vocab_size").and_then(Value::as_u64);
    if let Some(rows) = num_rows {
        map.insert("vocab_size".to_owned(), rows.into());
    }
    let text = Value::Object(map).to_string();
    let config = Qwen3Config::parse(text.as_bytes()).map_err(invalid)?;
    let recorded = recorded.and_then(|n| usize::try_from(n).ok());
    Ok((config, storage, recorded))
}

/// Takes the quantization that Setun reads out of the configuration. Another one stays
/// in, so that it is refused by its key.
fn take_storage(path: &Path, map: &mut Map<String, Value>) -> Result<Storage, IoError> {
    let settings = |map: &Map<String, Value>, key: &str| {
        let value = map.get(key).and_then(Value::as_object);
        value.cloned()
    };
    let method = settings(map, "quantization_config")
        .and_then(|settings| Some(settings.get("quant_method")?.as_str()?.to_owned()));
    if method.as_deref() == Some("compressed-tensors") {
        let settings = settings(map, "quantization_config").unwrap_or_default();
        let group_size = compressed_group_size(path, &settings)?;
        map.remove("quantization_config");
        return Ok(Storage::Compressed { group_size });
    }
    let mlx = settings(map, "quantization");
    let mlx = mlx.or_else(|| settings(map, "quantization_config"));
    match mlx {
        Some(settings) if method.is_none() && settings.contains_key("bits") => {
            let group_size = mlx_group_size(path, &settings)?;
            map.remove("quantization");
            map.remove("quantization_config");
            Ok(Storage::Mlx { group_size })
        }
        _ => Ok(Storage::Values),
    }
}

fn mlx_group_size(path: &Path, settings: &Map<String, Value>) -> Result<usize, IoError> {
    let refused = |key: &str, expected: &str| {
        let found = settings.get(key).unwrap_or(&Value::Null);
        let problem = format!(
            "quantization.{key} is {found}, expected {expected}: Setun reads ternary MLX models \
             (2-bit affine, one setting for all layers)"
        );
        IoError::invalid(path, problem)
    };
    if settings.get("bits").and_then(Value::as_u64) != Some(2) {
        return Err(refused("bits", "2"));
    }
    if settings.get("mode").is_some_and(|mode| mode != "affine") {
        return Err(refused("mode", "\"affine\""));
    }
    let is_plain = |key: &&String| ["bits", "group_size", "mode"].contains(&key.as_str());
    if let Some(key) = settings.keys().find(|key| !is_plain(key)) {
        return Err(refused(key, "no setting of its own"));
    }
    let size = settings.get("group_size").and_then(Value::as_u64);
    let sizes = MLX_GROUP_SIZES.into_iter();
    sizes
        .clone()
        .find(|&known| size == Some(known as u64))
        .ok_or_else(|| refused("group_size", "32, 64 or 128"))
}

/// The one group size of all `config_groups`, each of which must be 2-bit, symmetric,
/// integer, by groups.
fn compressed_group_size(path: &Path, settings: &Map<String, Value>) -> Result<usize, IoError> {
    let refused = |key: &str, found: &Value, expected: &str| {
        let problem = format!(
            "quantization_config.{key} is {found}, expected {expected}: of compressed-tensors, \
             Setun reads pack-quantized 2-bit ternary models; start from the unquantized \
             checkpoint"
        );
        IoError::invalid(path, problem)
    };
    let format = settings.get("format").unwrap_or(&Value::Null);
    if format != "pack-quantized" {
        return Err(refused("format", format, "\"pack-quantized\""));
    }
    let groups = settings.get("config_groups").and_then(Value::as_object);
    let mut found = None;
    for (name, group) in groups.into_iter().flatten() {
        if let Some(inputs) = group.get("input_activations").filter(|v| !v.is_null()) {
            let key = format!("config_groups.{name}.input_activations");
            return Err(refused(&key, inputs, "null"));
        }
        let weights = group.get("weights").unwrap_or(&Value::Null);
        for (key, expected) in [
            ("num_bits", Value::from(2)),
            ("type", "int".into()),
            ("symmetric", true.into()),
            ("strategy", "group".into()),
        ] {
            let value = weights.get(key).unwrap_or(&Value::Null);
            if *value != expected {
                let key = format!("config_groups.{name}.weights.{key}");
                return Err(refused(&key, value, &expected.to_string()));
            }
        }
        let value = weights.get("group_size").unwrap_or(&Value::Null);
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        let size = size.filter(|&size| size > 0 && found.is_none_or(|other| other == size));
        if size.is_none() {
            let key = format!("config_groups.{name}.weights.group_size");
            return Err(refused(&key, value, "one size for all groups"));
        }
        found = size;
    }
    found.ok_or_else(|| refused("config_groups", &Value::Null, "at least one group"))
}

/// Adds the ids of `generation_config.json` that end a text to those of `config.json`,
/// which names only the first of them in published Qwen3 checkpoints.
fn with_generation_ids(dir: &Path, mut config: Qwen3Config) -> Result<Qwen3Config, IoError> {
    if config.eos_token_ids.is_empty() {
        return Ok(config);
    }
    let settings = read_generation(dir)?.unwrap_or_default();
    for id in settings.eos_token_ids {
        if id as usize >= config.vocab_size {
            let problem = format!(
                "eos_token_id {id} is no token of the vocabulary of {}; correct it",
                config.vocab_size
            );
            return Err(IoError::invalid(&dir.join(GENERATION), problem));
        }
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok(config)
}

/// Checks one parameter; the names of its tensors.
fn check_parameter(
    shards: &Shards,
    parameter: &ParameterInfo,
    storage: Storage,
    dir: &Path,
) -> Result<Vec<String>, IoError> {
    let name = &parameter.name;
    if let &[rows, cols] = parameter.shape.as_slice() {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match storage {
            Storage::Mlx { group_size } if has(shards, &format!("{module}.scales")) => {
                check_divides(shards, name, cols, group_size)?;
                let groups = [rows, cols / group_size];
                let (scales, biases) = (format!("{module}.scales"), format!("{module}.biases"));
                expect(shards, dir, name, &[Dtype::U32], &[rows, cols / 16])?;
                expect(shards, dir, &scales, &FLOATS, &groups)?;
                expect(shards, dir, &biases, &FLOATS, &groups)?;
                return Ok(vec![name.clone(), scales, biases]);
            }
            Storage::Compressed { group_size } if has(shards, &format!("{name}_packed")) => {
                let packed = format!("{name}_packed");
                check_divides(shards, &packed, cols, group_size)?;
                let (scale, shape) = (format!("{name}_scale"), format!("{name}_shape"));
                expect(shards, dir, &packed, &[Dtype::I32], &[rows, cols / 16])?;
                expect(shards, dir, &scale, &FLOATS, &[rows, cols / group_size])?;
                check_shape_tensor(shards, dir, &shape, [rows, cols])?;
                return Ok(vec![packed, scale, shape]);
            }
            _ => {}
        }
    }
    expect(shards, dir, name, &FLOATS, &parameter.shape)?;
    Ok(vec![name.clone()])
}

fn has(shards: &Shards, name: &str) -> bool {
    shards.file_of(name).is_some()
}

fn expect(
    shards: &Shards,
    dir: &Path,
    name: &str,
    dtypes: &[Dtype],
    shape: &[usize],
) -> Result<(), IoError> {
    match shards.file_of(name) {
        None => Err(missing(dir, name)),
        Some(file) => file.expect(name, dtypes, shape),
    }
}

/// Words hold 16 codes, and both formats know whole groups only.
fn check_divides(
    shards: &Shards,
    name: &str,
    cols: usize,
    group_size: usize,
) -> Result<(), IoError> {
    if cols.is_multiple_of(16) && cols.is_multiple_of(group_size) {
        return Ok(());
    }
    let problem =
        format!("{name} is quantized, but its {cols} columns are not whole groups of {group_size}");
    Err(IoError::invalid(shards.path_of(name), problem))
}

/// compressed-tensors stores the unpacked shape as a tensor of its own.
fn check_shape_tensor(
    shards: &Shards,
    dir: &Path,
    name: &str,
    shape: [usize; 2],
) -> Result<(), IoError> {
    expect(shards, dir, name, &[Dtype::I64, Dtype::I32], &[2])?;
    let Some(file) = shards.file_of(name) else {
        return Err(missing(dir, name));
    };
    let bytes = file.bytes(name)?;
    let found: Vec<i64> = match bytes.len() {
        8 => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|&b| i64::from(i32::from_le_bytes(b))).collect()
        }
        _ => {
            let words = bytes.as_chunks::<8>().0.iter();
            words.map(|&b| i64::from_le_bytes(b)).collect()
        }
    };
    if found.iter().zip(shape).all(|(&found, n)| found == n as i64) {
        return Ok(());
    }
    let problem = format!("{name} is {found:?}, the config asks for {shape:?}");
    Err(IoError::invalid(file.path(), problem))
}

#[cfg(test)]
mod tests;
