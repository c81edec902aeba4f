//! The good files from which the exhibits are made: a model of one small layer.

use half::f16;
use serde_json::{Value, json};
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_formats::packed::{PackedHeader, TernaryInfo, packed_metadata, packed_tensor_infos};
use setun_formats::tensors::{Dtype, TensorInfo, write_f16, write_f32, write_header};
use setun_formats::tokenizer::Tokenizer;
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};
use std::collections::BTreeMap;
use std::sync::OnceLock;

use crate::exhibit::Files;

pub const EMBED: &str = "model.embed_tokens.weight";
pub const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
pub const NORM: &str = "model.norm.weight";
pub const GROUP_SIZE: usize = 8;

pub fn config() -> Qwen3Config {
    Qwen3Config {
        vocab_size: 280,
        hidden_size: 8,
        intermediate_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        rope: RopeConfig {
            rope_theta: 1e6,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: vec![0],
    }
}

/// The configuration as JSON.
pub fn config_json() -> Value {
    serde_json::from_str(&config().to_json()).expect("what is written is JSON")
}

/// A trained tokenizer of 280 tokens, the last of them added.
pub fn tokenizer_json() -> Value {
    static JSON: OnceLock<String> = OnceLock::new();
    let json = JSON.get_or_init(|| {
        let text = "the quick brown fox jumps over the lazy dog; the dog sleeps. ".repeat(20);
        let tokenizer = Tokenizer::train([text.as_str()].into_iter(), 280);
        tokenizer.expect("the text has enough words").to_json()
    });
    serde_json::from_str(json).expect("what is written is JSON")
}

/// A safetensors file in parts, to be changed before it is written.
#[derive(Clone)]
pub struct Parts {
    pub infos: Vec<TensorInfo>,
    pub payloads: Vec<Vec<u8>>,
    pub metadata: BTreeMap<String, String>,
}

impl Parts {
    /// All parameters of the model in f32.
    pub fn dense() -> Self {
        let mut parts = Self {
            infos: Vec::new(),
            payloads: Vec::new(),
            metadata: BTreeMap::new(),
        };
        for parameter in config().parameters() {
            let mut payload = Vec::new();
            write_f32(&mut payload, &values(parameter.numel())).expect("a Vec takes all");
            parts.add(&parameter.name, Dtype::F32, &parameter.shape, payload);
        }
        parts
    }

    /// The packed file of the same model.
    pub fn packed() -> Self {
        let ternary = TernaryInfo {
            group_size: GROUP_SIZE,
            scale_rule: ScaleRule::Mean,
            numerics: Numerics::Int8,
        };
        let header = PackedHeader {
            config: config(),
            ternary,
        };
        let mut payloads = Vec::new();
        for parameter in header.config.parameters() {
            let values = values(parameter.numel());
            let mut payload = Vec::new();
            if let [_, cols] = parameter.shape[..] {
                let matrix = PackedMatrix::from_latents(&values, cols, GROUP_SIZE, ScaleRule::Mean)
                    .expect("the values are finite");
                payloads.push(matrix.trits);
                write_f16(&mut payload, &matrix.scales).expect("a Vec takes all");
            } else {
                write_f32(&mut payload, &values).expect("a Vec takes all");
            }
            payloads.push(payload);
        }
        Self {
            infos: packed_tensor_infos(&header.config, GROUP_SIZE),
            payloads,
            metadata: packed_metadata(&header),
        }
    }

    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize], payload: Vec<u8>) {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.infos.push(TensorInfo { name, dtype, shape });
        self.payloads.push(payload);
    }

    /// The place of the tensor `name`.
    pub fn at(&self, name: &str) -> usize {
        let at = self.infos.iter().position(|info| info.name == name);
        at.expect("the name of a tensor of the specimen")
    }

    pub fn remove(&mut self, name: &str) {
        let at = self.at(name);
        self.infos.remove(at);
        self.payloads.remove(at);
    }

    /// Gives a tensor another type and shape, with a payload of zeros that fits.
    pub fn retype(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        let at = self.at(name);
        self.infos[at].dtype = dtype;
        self.infos[at].shape = shape.to_vec();
        let num_bytes = self.infos[at].num_bytes().expect("a small tensor");
        self.payloads[at] = vec![0; num_bytes as usize];
    }

    /// Overwrites bytes of a payload.
    pub fn poke(&mut self, name: &str, offset: usize, bytes: &[u8]) {
        let at = self.at(name);
        self.payloads[at][offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_header(&mut bytes, &self.infos, &self.metadata).expect("the names are unique");
        bytes.extend(self.payloads.iter().flatten());
        bytes
    }
}

/// A Hugging Face directory with one file of weights.
pub fn huggingface() -> Files {
    Files::from([
        ("config.json".to_owned(), config().to_json().into_bytes()),
        (
            "tokenizer.json".to_owned(),
            tokenizer_json().to_string().into_bytes(),
        ),
        ("model.safetensors".to_owned(), Parts::dense().bytes()),
    ])
}

/// The files of a checkpoint, without its manifest.
pub fn checkpoint() -> Files {
    Files::from([
        ("config.json".to_owned(), config().to_json().into_bytes()),
        (
            "tokenizer.json".to_owned(),
            tokenizer_json().to_string().into_bytes(),
        ),
        ("latents.safetensors".to_owned(), Parts::dense().bytes()),
        ("packed.safetensors".to_owned(), Parts::packed().bytes()),
    ])
}

/// The files that a manifest lists, as JSON.
pub fn entries(files: &Files) -> Value {
    let entry = |(name, bytes): (&String, &Vec<u8>)| {
        let hash = blake3::hash(bytes).to_hex().to_string();
        (
            name.clone(),
            json!({ "bytes": bytes.len(), "blake3": hash }),
        )
    };
    files
        .iter()
        .map(entry)
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// A manifest with a right checksum over whatever stands behind it: `rest` is the text
/// behind the checksum's comma.
pub fn manifest(rest: &str) -> Vec<u8> {
    let text = |checksum: &str| format!("{{\n  \"checksum\": \"{checksum}\",\n{rest}}}\n");
    let checksum = blake3::hash(text(&"0".repeat(64)).as_bytes()).to_hex();
    text(&checksum).into_bytes()
}

/// `files` with a manifest that fits them.
pub fn committed(mut files: Files, extra: &Value) -> Files {
    let rest = format!(
        "\"version\": 1, \"files\": {}, \"extra\": {extra}",
        entries(&files)
    );
    files.insert("MANIFEST.json".to_owned(), manifest(&rest));
    files
}

/// f16 as it stands in a file.
pub fn half(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// Deterministic values between -0.5 and 0.5.
fn values(n: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 101.0 - 0.5;
    (0..n).map(value).collect()
}
