//! Tree verification by hand: a vocabulary of 1000, width 64, one block, random weights.
//! Three cycles in a row, each on the text that the last one made: draft a tree, compute all
//! of it in one step, walk it, keep the accepted path. The text must be that of plain greedy
//! decoding.
//!
//! Run with `cargo run --release --example tree_verification -p setun-infer`.

use setun_backend::philox::Philox;
use setun_backend::{Isa, ROOT};
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_infer::verify::walk;
use setun_infer::{
    Chunk, DraftTree, Engine, EngineError, EngineOptions, Request, SamplerOptions, Sequence,
    StopRules, Wanted,
};
use setun_model::{ModelSpec, Scheme};
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};

const VOCAB_SIZE: u32 = 1000;

fn spec() -> ModelSpec {
    ModelSpec {
        config: Qwen3Config {
            vocab_size: VOCAB_SIZE as usize,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 1,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
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

fn engine() -> Result<Engine, EngineError> {
    let options = EngineOptions {
        cache_tokens: Some(512),
        ..EngineOptions::new(128, 2, Isa::detect())
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
        let matrix = matrix.expect("normal values have scales");
        parameters.set_ternary(backend, &p.name, &matrix)?;
    }
    Ok(engine)
}

/// `n` tokens of plain greedy decoding.
fn greedy(engine: &mut Engine, prompt: &[u32], n: usize) -> Result<Vec<u32>, EngineError> {
    let request = Request {
        prompt: prompt.to_vec(),
        sampler: SamplerOptions::greedy(),
        stop: StopRules {
            end_tokens: Vec::new(),
            max_tokens: n,
        },
        seed: (0, 0),
        logprobs: None,
    };
    Ok(engine.generate(&request, |_| {})?.tokens)
}

/// A false root whose child is right behind it, and a true path between false siblings.
fn draft(engine: &mut Engine, text: &[u32], right: usize) -> Result<DraftTree, EngineError> {
    let truth = greedy(engine, text, right)?;
    let wrong = |token: u32| (token + 1) % VOCAB_SIZE;
    let rejected = wrong(truth[0]);
    let behind = greedy(engine, &[text, &[rejected]].concat(), 1)?;
    let mut tree = DraftTree::chain(&[rejected, behind[0]]);
    let mut at = None;
    for &token in &truth {
        tree.grow(at, wrong(token));
        at = tree.grow(at, token);
    }
    Ok(tree)
}

/// The arg max behind the last token of `text` and behind each node, in one step.
fn verify(
    engine: &mut Engine,
    sequence: Sequence,
    last: u32,
    tree: &DraftTree,
) -> Result<Vec<u32>, EngineError> {
    // The last token of the text is the root of the step: its keys are not cached yet.
    let tokens = [&[last], tree.tokens()].concat();
    let parents = tree.parents().iter();
    let parents = parents.map(|&p| if p == ROOT { 0 } else { p + 1 });
    let parents: Vec<u32> = std::iter::once(ROOT).chain(parents).collect();
    let chunk = Chunk {
        sequence,
        tokens: &tokens,
        parents: Some(&parents),
        logits: Wanted::All,
    };
    let mut chosen = Vec::new();
    engine.step_topk(&[chunk], 1, &[], &mut |_, _, best, _| {
        chosen.push(best[0].id)
    })?;
    Ok(chosen)
}

fn print(tree: &DraftTree, accepted: &[usize]) {
    for node in 0..tree.len() {
        let sign = if accepted.contains(&node) { '+' } else { '-' };
        let indent = 2 * tree.depth(node);
        println!("{:indent$}{sign} {}", "", tree.tokens()[node]);
    }
}

fn main() -> Result<(), EngineError> {
    let (mut engine, mut guesser) = (engine()?, engine()?);
    let prompt = [17, 4, 256];
    let mut text = prompt.to_vec();
    let sequence = engine.start(&text);
    let known = Chunk {
        sequence,
        tokens: &text[..text.len() - 1],
        parents: None,
        logits: Wanted::Nothing,
    };
    engine.step(&[known], &mut |_, _, _| {})?;
    for cycle in 1..=3 {
        let tree = draft(&mut guesser, &text, cycle)?;
        let chosen = verify(&mut engine, sequence, text[text.len() - 1], &tree)?;
        let found = walk(&tree, &chosen);
        println!("cycle {cycle}: {text:?}");
        print(&tree, &found.accepted);
        let rows = found.accepted.iter().map(|&node| node + 1);
        let path: Vec<usize> = std::iter::once(0).chain(rows).collect();
        engine.commit(sequence, &path)?;
        text.extend(found.tokens(&tree));
        println!("  accepted nodes {:?}, then {}", found.accepted, found.next);
    }
    let plain = greedy(&mut guesser, &prompt, text.len() - prompt.len())?;
    assert_eq!(text[prompt.len()..], plain, "the texts differ");
    println!("{text:?}\nequals plain greedy decoding");
    Ok(())
}
