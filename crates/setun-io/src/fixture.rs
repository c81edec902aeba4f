//! What the tests of this crate share: scratch directories and tiny models.

use crate::{DirWriter, IoError, MANIFEST, Matrix, TensorSource, checkpoint_name, write_packed};
use serde_json::json;
use setun_formats::config::{ParameterInfo, Qwen3Config, RopeConfig, YarnConfig};
use setun_formats::packed::{PackedHeader, TernaryInfo};
use setun_formats::tensors::{Dtype, SafeTensors, TensorInfo, write_f32, write_header};
use setun_formats::tokenizer::Tokenizer;
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";
pub(crate) const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
pub(crate) const Q_NORM: &str = "model.layers.0.self_attn.q_norm.weight";

/// A directory of its own for each test, removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("setun-io-{name}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(unique);
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A two-layer model with odd sizes and short last groups. Tests change what it holds
/// before it is saved.
#[derive(Clone)]
pub(crate) struct Tiny {
    pub(crate) header: PackedHeader,
    pub(crate) latents: BTreeMap<String, Vec<f32>>,
    pub(crate) packed: BTreeMap<String, PackedMatrix>,
}

impl Tiny {
    pub(crate) fn new(tied: bool, group_size: usize) -> Self {
        let config = Qwen3Config {
            vocab_size: 301,
            hidden_size: 72,
            intermediate_size: 100,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            num_key_value_heads: 1,
            head_dim: 10,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: tied,
            rope: RopeConfig {
                rope_theta: 1e4,
                yarn: None,
            },
            bos_token_id: None,
            eos_token_ids: vec![0],
        };
        Self::with(config, group_size, Numerics::Int8)
    }

    /// A one-layer model whose rows are 256 weights long, so that every format has blocks
    /// that divide them; with YaRN and numerics of its own.
    pub(crate) fn even(tied: bool, group_size: usize) -> Self {
        let yarn = YarnConfig {
            factor: 4.0,
            original_max_position_embeddings: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
        };
        let config = Qwen3Config {
            vocab_size: 283,
            hidden_size: 256,
            intermediate_size: 256,
            num_hidden_layers: 1,
            num_attention_heads: 8,
            num_key_value_heads: 1,
            head_dim: 32,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: tied,
            rope: RopeConfig {
                rope_theta: 1e6,
                yarn: tied.then_some(yarn),
            },
            bos_token_id: None,
            eos_token_ids: vec![279],
        };
        Self::with(config, group_size, Numerics::Bf16)
    }

    fn with(config: Qwen3Config, group_size: usize, numerics: Numerics) -> Self {
        let ternary = TernaryInfo {
            group_size,
            scale_rule: ScaleRule::Mean,
            numerics,
        };
        let mut tiny = Self {
            header: PackedHeader { config, ternary },
            latents: BTreeMap::new(),
            packed: BTreeMap::new(),
        };
        for (i, parameter) in tiny.config().parameters().iter().enumerate() {
            let values = values(parameter.numel(), i as u64);
            tiny.latents.insert(parameter.name.clone(), values);
        }
        tiny.project();
        tiny
    }

    pub(crate) fn config(&self) -> &Qwen3Config {
        &self.header.config
    }

    pub(crate) fn ternary(&self) -> &TernaryInfo {
        &self.header.ternary
    }

    /// Makes the packed matrices the projection of the latents.
    pub(crate) fn project(&mut self) {
        let (size, rule) = (self.ternary().group_size, self.ternary().scale_rule);
        for parameter in self.config().parameters() {
            if let [_, cols] = parameter.shape[..] {
                let latents = &self.latents[&parameter.name];
                let matrix = PackedMatrix::from_latents(latents, cols, size, rule).unwrap();
                self.packed.insert(parameter.name, matrix);
            }
        }
    }

    pub(crate) fn tokenizer() -> Tokenizer {
        let text = "the quick brown fox jumps over the lazy dog; the dog sleeps. ".repeat(20);
        Tokenizer::train([text.as_str()].into_iter(), 280).unwrap()
    }

    /// Saves a checkpoint as the trainer does; a dense one without packed weights.
    pub(crate) fn save(&self, run: &Path, step: u64, dense: bool) -> PathBuf {
        let checkpoints = run.join("checkpoints");
        let mut dir = DirWriter::create(&checkpoints, &checkpoint_name(step)).unwrap();
        dir.file("latents.safetensors", |out| self.write_latents(out))
            .unwrap();
        let mut extra = json!({ "step": step });
        if !dense {
            let mut hash = String::new();
            dir.file("packed.safetensors", |out| {
                hash = write_packed(out, &self.header, self).map_err(io::Error::other)?;
                Ok(())
            })
            .unwrap();
            let name = checkpoint_name(step);
            let record = json!({ "ternary_hashes": { name: hash } });
            fs::write(run.join("run.json"), record.to_string()).unwrap();
            extra = json!({
                "step": step,
                "ternary_hash": hash,
                "group_size": self.ternary().group_size,
                "scale_rule": self.ternary().scale_rule.name(),
                "numerics": self.ternary().numerics.name(),
            });
        }
        let config = self.config().to_json();
        dir.file("config.json", |out| out.write_all(config.as_bytes()))
            .unwrap();
        let tokenizer = Self::tokenizer().to_json();
        dir.file("tokenizer.json", |out| out.write_all(tokenizer.as_bytes()))
            .unwrap();
        dir.commit(extra).unwrap()
    }

    fn write_latents(&self, out: &mut dyn Write) -> io::Result<()> {
        let parameters = self.config().parameters();
        let info = |p: &ParameterInfo| TensorInfo {
            name: p.name.clone(),
            dtype: Dtype::F32,
            shape: p.shape.clone(),
        };
        let infos: Vec<TensorInfo> = parameters.iter().map(info).collect();
        write_header(out, &infos, &BTreeMap::new())?;
        let mut payloads = parameters.iter().map(|p| &self.latents[&p.name]);
        payloads.try_for_each(|values| write_f32(out, values))
    }
}

impl TensorSource for Tiny {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        Ok(Matrix::Ternary(self.packed[name].clone()))
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        Ok(self.latents[name].clone())
    }
}

/// The latents of a [`Tiny`] as a dense model.
pub(crate) struct Dense<'a>(pub(crate) &'a Tiny);

impl TensorSource for Dense<'_> {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        Ok(Matrix::Dense(self.0.latents[name].clone()))
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        self.0.norm(name)
    }
}

/// Deterministic values in (-0.5, 0.5).
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// Rewrites bytes of one tensor in place and removes the manifest beside the file, so
/// that only what looks at the weights can notice.
pub(crate) fn edit_tensor(file: &Path, name: &str, edit: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor(name).unwrap().data();
    let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
    let end = start + data.len();
    edit(&mut bytes[start..end]);
    fs::write(file, bytes).unwrap();
    let _ = fs::remove_file(file.with_file_name(MANIFEST));
}
