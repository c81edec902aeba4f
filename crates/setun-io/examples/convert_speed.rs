//! How long it takes to make a random model of Qwen3-0.6B's shape ternary, against what one
//! core needs for the projection alone.
//!
//!     cargo run --release -p setun-io --example convert_speed -- [DIRECTORY]
//!
//! Writes about 1.5 GB below DIRECTORY (default: the system's temporary directory) and
//! removes it again.

use setun_formats::{ParameterInfo, Qwen3Config, RopeConfig, TernaryInfo};
use setun_io::{
    BlockSink, ConvertOptions, ExportDtype, Format, IoError, Matrix, OpenModel, TensorSource,
    convert, export_huggingface,
};
use setun_ternary::{Numerics, ScaleRule, project_group};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

const TERNARY: TernaryInfo = TernaryInfo {
    group_size: 128,
    scale_rule: ScaleRule::Mean,
    numerics: Numerics::Int8,
};
/// Weights in a block of rows that the source makes at a time.
const BLOCK_WEIGHTS: usize = 1 << 20;

fn config() -> Qwen3Config {
    Qwen3Config {
        vocab_size: 151_936,
        hidden_size: 1024,
        intermediate_size: 3072,
        num_hidden_layers: 28,
        num_attention_heads: 16,
        num_key_value_heads: 8,
        head_dim: 128,
        max_position_embeddings: 40_960,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        rope: RopeConfig {
            rope_theta: 1e6,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: vec![151_645],
    }
}

/// Weights of a fixed pseudo-random sequence.
struct Random(Qwen3Config);

/// The weights from `start` on, near zero and in bf16's range.
fn weights(start: usize, len: usize) -> Vec<f32> {
    let mut state = start as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

impl TensorSource for Random {
    fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        self.norm(name).map(Matrix::Dense)
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        let parameters = self.0.parameters();
        let parameter = parameters.iter().find(|p| p.name == name);
        Ok(weights(1, parameter.map_or(0, ParameterInfo::numel)))
    }

    fn for_each_block(
        &self,
        parameter: &ParameterInfo,
        each: &mut BlockSink<'_>,
    ) -> Result<(), IoError> {
        let (rows, cols) = (parameter.shape[0], parameter.shape[1]);
        let step = (BLOCK_WEIGHTS / cols).max(1);
        for row in (0..rows).step_by(step) {
            let num_weights = step.min(rows - row) * cols;
            each(row, Matrix::Dense(weights(row * cols, num_weights)))?;
        }
        Ok(())
    }
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Seconds that one core needs to project `num_weights` weights which are in its cache.
fn projection_seconds(num_weights: u64) -> f64 {
    let latents = weights(0, 1 << 14);
    let mut trits = vec![0; latents.len()];
    let rounds = 4000;
    let start = Instant::now();
    for _ in 0..rounds {
        let groups = latents.chunks(TERNARY.group_size);
        for (group, trits) in groups.zip(trits.chunks_mut(TERNARY.group_size)) {
            let scale = project_group(std::hint::black_box(group), TERNARY.scale_rule, trits);
            std::hint::black_box(scale.expect("finite weights"));
        }
    }
    let done = (rounds * latents.len()) as f64;
    start.elapsed().as_secs_f64() * num_weights as f64 / done
}

/// Most memory that this process has held, where the system says so.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib / 1024)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let parent = std::env::args_os()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let scratch = Scratch(parent.join(format!("setun-convert-speed-{}", std::process::id())));
    std::fs::create_dir_all(&scratch.0)?;
    let config = config();
    let num_weights = config.num_parameters();
    let source = Random(config.clone());
    let dtype = ExportDtype::Bf16;
    let model = export_huggingface(&scratch.0, "dense", &config, None, dtype, None, &source)?;
    println!(
        "{num_weights} weights in bf16 written; most memory {:?} MiB",
        peak_mib()
    );
    for name in ["packed", "gguf-q2_0"] {
        report(&model, &scratch.0, name, num_weights)?;
    }
    Ok(())
}

fn report(
    model: &Path,
    scratch: &Path,
    name: &str,
    num_weights: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let format = Format::from_name(name).ok_or("no such format")?;
    let out = scratch.join(if format.is_file() { "out.gguf" } else { "out" });
    let options = ConvertOptions {
        ternarize: Some(TERNARY),
        ..ConvertOptions::new(format)
    };
    let model = OpenModel::open(model)?;
    let (mut seconds, mut projection) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        projection.push(projection_seconds(num_weights));
        let start = Instant::now();
        convert(
            &model,
            &out,
            &options,
            &mut |_, _| ControlFlow::Continue(()),
        )?;
        seconds.push(start.elapsed().as_secs_f64());
        match format.is_file() {
            true => std::fs::remove_file(&out)?,
            false => std::fs::remove_dir_all(&out)?,
        }
    }
    seconds.sort_by(f64::total_cmp);
    projection.sort_by(f64::total_cmp);
    println!(
        "{name}: {:.2} s (median of 3), projection alone {:.2} s, ratio {:.2}; most memory {:?} MiB",
        seconds[1],
        projection[1],
        seconds[1] / projection[1],
        peak_mib()
    );
    Ok(())
}
