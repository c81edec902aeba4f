//! A block drafter on its target's engine: it changes no text, and what it guesses depends
//! on the text alone, not on how that came into the cache.

mod model;

use model::{Model, Numbers};
use setun_backend::{Isa, ROOT};
use setun_formats::Qwen3Config;
use setun_infer::{
    BlockGuesses, Budget, Chunk, Engine, EngineError, EngineOptions, KvError, Request,
    SamplerOptions, Sequence, Speculator, StopRules, TreeSize, Wanted,
};
use setun_model::{DrafterSpec, ModelSpec};
use setun_ternary::{Numerics, PackedMatrix, groups_per_row};

const CONTEXT: usize = 120;
const BLOCK: usize = 5;

fn target(numbers: &mut Numbers, numerics: Numerics) -> Model {
    let mut model = Model::random(numbers, numerics);
    model.spec.config.num_hidden_layers = 2;
    Model::with(numbers, model.spec.config, 32, numerics)
}

/// The model in an engine with a drafter of random weights.
fn with_drafter(model: &Model, numbers: &mut Numbers, options: EngineOptions) -> Engine {
    let spec = DrafterSpec {
        model: ModelSpec {
            config: Qwen3Config {
                vocab_size: 1,
                num_hidden_layers: numbers.between(1, 2),
                tie_word_embeddings: true,
                eos_token_ids: Vec::new(),
                ..model.spec.config.clone()
            },
            ..model.spec.clone()
        },
        block_size: BLOCK,
        target_layer_ids: vec![0, 1],
    };
    let infos = spec.parameters();
    let mut engine = Engine::reserve_with_drafter(model.spec.clone(), spec, options);
    model.fill(&mut engine);
    let (parameters, backend) = engine.drafter_parts().unwrap();
    let parameters = parameters.clone();
    for info in infos {
        let cols = *info.shape.last().unwrap();
        if !info.is_matrix() {
            let norm: Vec<f32> = (0..cols)
                .map(|_| 1.0 + 0.2 * numbers.normal() as f32)
                .collect();
            parameters.set_values(backend, &info.name, &norm).unwrap();
            continue;
        }
        let rows = info.numel() / cols;
        let trits: Vec<i8> = (0..rows * cols)
            .map(|_| numbers.between(0, 2) as i8 - 1)
            .collect();
        let scale = half::bf16::from_f64(1.0 / (cols as f64).sqrt()).to_f32();
        let scales = vec![scale; rows * groups_per_row(cols, 32)];
        let matrix = PackedMatrix::from_trits(&trits, &scales, cols, 32);
        parameters
            .set_ternary(backend, &info.name, &matrix)
            .unwrap();
    }
    engine
}

fn options(max_rows: usize) -> EngineOptions {
    EngineOptions {
        max_rows,
        cache_tokens: Some(3 * CONTEXT),
        ..EngineOptions::new(CONTEXT, 2, Isa::detect())
    }
}

fn request(prompt: Vec<u32>, temperature: f32) -> Request {
    Request {
        prompt,
        sampler: SamplerOptions {
            temperature,
            ..SamplerOptions::default()
        },
        stop: StopRules {
            end_tokens: Vec::new(),
            max_tokens: 70,
        },
        seed: (5, 0),
        logprobs: None,
    }
}

#[test]
fn texts_are_those_of_plain_decoding() {
    let mut accepted = 0;
    for case in 0..18 {
        let mut numbers = Numbers::new(case);
        let numerics = [Numerics::Int8, Numerics::Bf16, Numerics::F32][case as usize % 3];
        let model = target(&mut numbers, numerics);
        let mut plain = model.engine(options(64));
        let mut engine = with_drafter(&model, &mut numbers, options(64));
        let vocab_size = model.spec.config.vocab_size;
        for text in 0..3 {
            let prompt = numbers.between(1, 40);
            let request = request(numbers.tokens(prompt, vocab_size), [0.0, 0.0, 0.7][text]);
            let expected = plain.generate(&request, |_| {}).unwrap();
            let budget = Budget {
                nodes: numbers.between(1, 30),
                depth: numbers.between(1, 6),
                width: numbers.between(1, 9),
            };
            let mut guesses = BlockGuesses;
            let mut clock = || 0.0;
            let mut speculator = Speculator::new(&mut guesses, &mut clock);
            speculator.size = TreeSize::Fixed(budget);
            let found = engine.speculate(&request, &mut speculator, |_| {}).unwrap();
            assert_eq!(found, expected, "case {case}, {budget:?}");
            assert!(speculator.stats.drafted > 0);
            accepted += speculator.stats.accepted;
        }
        assert_eq!(engine.tables().available(), (3 * CONTEXT).div_ceil(16));
    }
    // Random weights guess right now and then.
    assert!(accepted > 20, "{accepted}");
}

type Guesses = Vec<Vec<(u32, u64)>>;

fn guesses(engine: &mut Engine, sequence: Sequence, anchor: u32) -> Guesses {
    let rows = engine.guess_block(sequence, anchor, BLOCK - 1, 4).unwrap();
    assert_eq!(rows.len(), BLOCK - 1);
    let bits = |row: Vec<(u32, f64)>| row.into_iter().map(|(t, p)| (t, p.to_bits())).collect();
    rows.into_iter().map(bits).collect()
}

fn step(engine: &mut Engine, sequence: Sequence, tokens: &[u32], parents: Option<&[u32]>) {
    let chunk = Chunk {
        sequence,
        tokens,
        parents,
        logits: Wanted::Nothing,
    };
    engine.step(&[chunk], &mut |_, _, _| {}).unwrap();
}

#[test]
fn a_block_fits_into_steps_of_fewer_rows() {
    let mut numbers = Numbers::new(50);
    let model = target(&mut numbers, Numerics::Int8);
    let text = numbers.tokens(20, model.spec.config.vocab_size);
    let all = [1, 3, 64].map(|max_rows| {
        let mut engine = with_drafter(&model, &mut Numbers::new(51), options(max_rows));
        let sequence = engine.start(&[]);
        step(&mut engine, sequence, &text, None);
        guesses(&mut engine, sequence, text[0])
    });
    assert_eq!([&all[0], &all[1]], [&all[2], &all[2]]);
}

#[test]
fn a_tree_stays_until_it_is_committed_or_a_block_is_guessed() {
    let mut numbers = Numbers::new(60);
    let model = target(&mut numbers, Numerics::Int8);
    let mut engine = with_drafter(&model, &mut numbers, options(16));
    let text = numbers.tokens(20, model.spec.config.vocab_size);
    let sequence = engine.start(&[]);
    step(&mut engine, sequence, &text[..16], None);
    let refused = |engine: &mut Engine, path: &[usize]| match engine.commit(sequence, path) {
        Err(EngineError::Kv(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&mut engine, &[0]), KvError::NoTree);
    let tree = |engine: &mut Engine| step(engine, sequence, &text[..3], Some(&[ROOT, 0, ROOT]));
    tree(&mut engine);
    assert_eq!(refused(&mut engine, &[0, 2]), KvError::Path { row: 2 });
    engine.commit(sequence, &[0, 1]).unwrap();
    assert_eq!(engine.len(sequence).unwrap(), 18);
    tree(&mut engine);
    guesses(&mut engine, sequence, text[0]);
    assert_eq!(refused(&mut engine, &[0]), KvError::NoTree);
    // And nothing is broken.
    step(&mut engine, sequence, &text, None);
    assert_eq!(engine.len(sequence).unwrap(), 38);
    engine.free(sequence).unwrap();
    assert_eq!(refused(&mut engine, &[0]), KvError::Unknown);
}

#[test]
fn guesses_depend_on_the_text_alone() {
    for case in 0..6 {
        let mut numbers = Numbers::new(100 + case);
        let numerics = [Numerics::Int8, Numerics::Bf16, Numerics::F32][case as usize % 3];
        let model = target(&mut numbers, numerics);
        let mut engine = with_drafter(&model, &mut numbers, options(16));
        let text = numbers.tokens(47, model.spec.config.vocab_size);
        let (anchor, past) = text.split_last().unwrap();
        let whole = engine.start(&[]);
        step(&mut engine, whole, past, None);
        let expected = guesses(&mut engine, whole, *anchor);
        assert_eq!(guesses(&mut engine, whole, *anchor), expected, "again");

        let single = engine.start(&[]);
        for &token in past {
            step(&mut engine, single, &[token], None);
        }
        assert_eq!(
            guesses(&mut engine, single, *anchor),
            expected,
            "token by token"
        );

        // The last tokens as a path of a tree, between nodes that are dropped.
        let tree = engine.start(&[]);
        step(&mut engine, tree, &past[..43], None);
        let tokens = [9, past[43], 8, past[44], past[45], 7];
        let parents = [ROOT, ROOT, 0, 1, 3, 3];
        let tokens = tokens.map(|t| t % model.spec.config.vocab_size as u32);
        step(&mut engine, tree, &tokens, Some(&parents));
        engine.commit(tree, &[1, 3, 4]).unwrap();
        assert_eq!(guesses(&mut engine, tree, *anchor), expected, "a path");

        // A fork, and a sequence that finds its beginning in the cache.
        let fork = engine.fork(tree).unwrap();
        assert_eq!(guesses(&mut engine, fork, *anchor), expected, "a fork");
        let found = engine.start(past);
        let held = engine.len(found).unwrap();
        assert!(held >= 16, "{held}");
        step(&mut engine, found, &past[held..], None);
        assert_eq!(guesses(&mut engine, found, *anchor), expected, "a prefix");
        for sequence in [whole, single, tree, fork, found] {
            engine.free(sequence).unwrap();
        }
    }
}

/// Slots whose hidden states still wait come to hold other tokens: of a path that was rejected,
/// of a tree that nobody committed, of a sequence that was given back.
#[test]
fn slots_that_are_used_again_keep_what_came_last() {
    for max_rows in [4, 7, 64] {
        let mut numbers = Numbers::new(200);
        let model = target(&mut numbers, Numerics::Int8);
        let new = || with_drafter(&model, &mut Numbers::new(201), options(max_rows));
        let text = numbers.tokens(40, model.spec.config.vocab_size);
        let mut plain = new();
        let sequence = plain.start(&[]);
        step(&mut plain, sequence, &text[..39], None);
        let expected = guesses(&mut plain, sequence, text[39]);

        let mut engine = new();
        let gone = engine.start(&[]);
        step(&mut engine, gone, &text[20..37], None);
        engine.free(gone).unwrap();
        let sequence = engine.start(&[]);
        step(&mut engine, sequence, &text[..30], None);
        let wrong = &text[3..7];
        for at in 30..37 {
            step(&mut engine, sequence, wrong, Some(&[ROOT, 0, 1, 2]));
            if at % 2 == 0 {
                engine.commit(sequence, &[0]).unwrap();
                engine.truncate(sequence, at).unwrap();
            }
            step(&mut engine, sequence, &text[at..=at], None);
        }
        step(&mut engine, sequence, &text[37..39], Some(&[ROOT, 0]));
        engine.commit(sequence, &[0, 1]).unwrap();
        assert_eq!(guesses(&mut engine, sequence, text[39]), expected);
    }
}
