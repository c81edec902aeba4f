//! The smallest batch decoder: a vocabulary of 1000, width 64, one block, random weights.
//! Two prompts are searched with four beams each, together.
//!
//! Run with `cargo run --release --example batch_beam -p setun-infer`.

use setun_backend::Isa;
use setun_backend::philox::Philox;
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_infer::{BeamOptions, BeamRequest, Engine, EngineError, EngineOptions};
use setun_model::{ModelSpec, Scheme};
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};

fn spec() -> ModelSpec {
    ModelSpec {
        config: Qwen3Config {
            vocab_size: 1000,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 1,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            rope: RopeConfig {
                rope_theta: 1e4,
                yarn: None,
            },
            bos_token_id: None,
            eos_token_ids: vec![0],
        },
        scheme: Some(Scheme {
            group_size: 64,
            scale_rule: ScaleRule::Mean,
        }),
        numerics: Numerics::Int8,
    }
}

fn main() -> Result<(), EngineError> {
    let options = EngineOptions {
        cache_tokens: Some(1024),
        ..EngineOptions::new(64, 2, Isa::detect())
    };
    let mut engine = Engine::reserve(spec(), options);
    let (parameters, backend) = engine.parts();
    for (stream, p) in (0u64..).zip(&parameters.list) {
        if !p.is_matrix {
            parameters.set_values(backend, &p.name, &vec![1.0; p.cols])?;
            continue;
        }
        let random = Philox::new(1, stream);
        let normal = |i| random.normal_pair(i as u64).0 as f32 / (p.cols as f32).sqrt();
        let latents: Vec<f32> = (0..p.rows * p.cols).map(normal).collect();
        let matrix = PackedMatrix::from_latents(&latents, p.cols, 64, ScaleRule::Mean);
        parameters.set_ternary(
            backend,
            &p.name,
            &matrix.expect("normal values have scales"),
        )?;
    }
    let request = |prompt: &[u32]| BeamRequest {
        prompt: prompt.to_vec(),
        end_tokens: vec![0],
        max_tokens: 8,
    };
    let requests = [request(&[1, 2, 3]), request(&[10, 20, 30, 40, 50])];
    let results = engine.beam_search(&requests, BeamOptions::new(4))?;
    for (request, found) in requests.iter().zip(&results) {
        println!("{:?}", request.prompt);
        for hypothesis in found {
            println!("  {:8.4} {:?}", hypothesis.score, hypothesis.tokens);
        }
    }
    Ok(())
}
