//! Converting holds a few blocks of rows, whatever the size of a matrix.

#[path = "../../setun-backend/tests/counting_allocator/mod.rs"]
mod counting_allocator;

use counting_allocator::peak_bytes;
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_formats::packed::TernaryInfo;
use setun_io::{
    ConvertOptions, ExportDtype, Format, IoError, Matrix, OpenModel, TensorSource, convert,
    export_huggingface,
};
use setun_ternary::{Numerics, ScaleRule};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// A vocabulary that makes the embedding by far the largest matrix.
const VOCAB: usize = 40_000;
const HIDDEN: usize = 256;

fn config() -> Qwen3Config {
    Qwen3Config {
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        intermediate_size: 256,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 1,
        head_dim: 64,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        rope: RopeConfig {
            rope_theta: 1e4,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: vec![0],
    }
}

/// Weights by a formula.
struct Formula(Qwen3Config);

impl TensorSource for Formula {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        self.norm(name).map(Matrix::Dense)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        let parameters = self.0.parameters();
        let parameter = parameters.iter().find(|p| p.name == name);
        let numel = parameter.map_or(0, |p| p.numel());
        let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 504.0;
        Ok((0..numel).map(value).collect())
    }
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn memory_does_not_grow_with_the_matrix() {
    let dir = std::env::temp_dir().join(format!("setun-io-streaming-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let scratch = Scratch(dir);
    let config = config();
    let (dtype, source) = (ExportDtype::F32, Formula(config.clone()));
    let hf = export_huggingface(&scratch.0, "dense", &config, None, dtype, None, &source).unwrap();
    let ternary = TernaryInfo {
        group_size: 128,
        scale_rule: ScaleRule::Mean,
        numerics: Numerics::Int8,
    };
    let stored = 4 * VOCAB * HIDDEN;
    let names = [
        "packed",
        "hf",
        "mlx",
        "compressed-tensors",
        "gguf-q2_0",
        "gguf-bf16",
    ];
    let mut input = hf;
    for name in names {
        let format = Format::from_name(name).unwrap();
        let end = if format.is_file() { ".gguf" } else { "" };
        let out = scratch.0.join(format!("{name}{end}"));
        let options = ConvertOptions {
            ternarize: Some(ternary),
            block_weights: 1 << 14,
            ..ConvertOptions::new(format)
        };
        let held = peak_bytes(|| {
            let model = OpenModel::open(&input).unwrap();
            convert(
                &model,
                &out,
                &options,
                &mut |_, _| ControlFlow::Continue(()),
            )
            .unwrap();
        });
        // Buffers of a writer and a reader, the scales of the embedding (three copies of
        // 160 kB), a few blocks of 64 kB; the matrix itself has 40 MB.
        assert!(held < stored / 8, "{name}: {held} of {stored} bytes held");
        input = out;
    }
}
