//! What is refused: requests that cannot be continued, before anything is computed, logits
//! that are no numbers, a step that the cache has no room for. And requests of a batch, each
//! with options and an end of its own.

mod model;

use model::{Model, Numbers, bits};
use setun_backend::Isa;
use setun_infer::{
    BeamOptions, BeamRequest, Chunk, Engine, EngineError, EngineOptions, FinishReason, KvError,
    Request, SamplerError, SamplerOptions, StopRules, Wanted,
};
use setun_ternary::Numerics;
use std::ops::ControlFlow;

fn request(prompt: Vec<u32>) -> Request {
    Request {
        prompt,
        sampler: SamplerOptions::default(),
        stop: StopRules {
            end_tokens: Vec::new(),
            max_tokens: 10,
        },
        seed: (1, 0),
        logprobs: None,
    }
}

fn beams(prompt: Vec<u32>) -> BeamRequest {
    BeamRequest {
        prompt,
        end_tokens: vec![0],
        max_tokens: 10,
    }
}

/// With four blocks of cache, and eight rows in a call.
fn small_engine(model: &Model) -> Engine {
    model.engine(EngineOptions {
        cache_tokens: Some(64),
        max_rows: 8,
        ..EngineOptions::new(48, 1, Isa::detect())
    })
}

#[test]
fn a_bad_request_is_named_before_anything_is_computed() {
    let mut numbers = Numbers::new(1);
    let model = Model::random(&mut numbers, Numerics::Int8);
    let mut engine = small_engine(&model);
    let good = numbers.tokens(5, model.spec.config.vocab_size);
    for bad in [Vec::new(), vec![0; 49], vec![u32::MAX]] {
        let requests = [good.clone(), bad.clone()].map(request);
        let mut seen = 0;
        let plain = engine.generate_batch(&requests, |_, _| seen += 1);
        let plain = plain.unwrap_err();
        let searched = engine.beam_search(&[good.clone(), bad].map(beams), BeamOptions::new(2));
        for error in [plain, searched.unwrap_err()] {
            let second = matches!(error, EngineError::Request { number: 2, .. });
            assert!(second && error.to_string().starts_with("request 2: "));
        }
        assert_eq!((seen, engine.tables().available()), (0, 4));
        let alone = engine.generate(&requests[1], |_| {}).unwrap_err();
        assert!(!alone.to_string().starts_with("request"), "{alone}");
    }
}

#[test]
fn beams_over_logits_that_are_no_numbers_are_refused() {
    let mut numbers = Numbers::new(2);
    let mut model = Model::random(&mut numbers, Numerics::F32);
    for (name, norm) in &mut model.norms {
        if name == "model.norm.weight" {
            norm.fill(f32::NAN);
        }
    }
    let mut engine = small_engine(&model);
    let found = engine.beam_search(&[beams(vec![1, 2, 3])], BeamOptions::new(2));
    let error = found.unwrap_err();
    let refused = matches!(error, EngineError::Sampler(SamplerError::NotANumber));
    assert!(refused, "{error}");
    assert_eq!(engine.tables().available(), 4, "nothing is left behind");
}

#[test]
fn a_step_that_does_not_fit_changes_no_sequence() {
    let mut numbers = Numbers::new(3);
    let model = Model::random(&mut numbers, Numerics::Bf16);
    let text = numbers.tokens(40, model.spec.config.vocab_size);
    let mut engine = small_engine(&model);
    let (a, b) = (engine.start(&[]), engine.start(&[]));
    let chunk = |sequence, tokens| Chunk {
        sequence,
        tokens,
        parents: None,
        logits: Wanted::Last,
    };
    let mut last = Vec::new();
    let mut keep = |_: usize, _: usize, logits: &mut [f32]| last = bits(logits);
    engine.step(&[chunk(a, &text[..10])], &mut keep).unwrap();
    // One more block for the first chunk, which alone would fit, and three for the second.
    let chunks = [chunk(a, &text[10..30]), chunk(b, &text[..])];
    let full = engine.step(&chunks, &mut keep);
    assert!(matches!(full, Err(EngineError::Kv(KvError::Full { .. }))));
    assert_eq!([a, b].map(|s| engine.len(s).unwrap()), [10, 0]);
    assert_eq!(engine.tables().available(), 3);
    engine.step(&chunks[..1], &mut keep).unwrap();
    let expected = model.trained(40).logits(&text[..30]).pop();
    assert!(expected == Some(last));
}

#[test]
fn a_caller_ends_one_text_and_not_the_others() {
    let mut numbers = Numbers::new(5);
    let model = Model::random(&mut numbers, Numerics::Int8);
    let mut engine = small_engine(&model);
    let vocab_size = model.spec.config.vocab_size;
    let requests = [(); 3].map(|()| request(numbers.tokens(5, vocab_size)));
    let whole = engine.generate_batch(&requests, |_, _| {}).unwrap();
    let mut told = [0; 3];
    let cut = engine.generate_batch(&requests, |index, _| {
        told[index] += 1;
        match (index, told[index]) {
            (1, 4) => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    let cut = cut.unwrap();
    assert_eq!([&cut[0], &cut[2]], [&whole[0], &whole[2]]);
    assert_eq!(cut[1].tokens, whole[1].tokens[..4]);
    assert_eq!((cut[1].reason, told[1]), (FinishReason::Stopped, 4));
    assert_eq!(engine.tables().available(), 4);
}

#[test]
fn requests_of_a_batch_keep_their_own_options() {
    let mut numbers = Numbers::new(4);
    let model = Model::random(&mut numbers, Numerics::Int8);
    let mut engine = small_engine(&model);
    let mut requests = Vec::new();
    // Without top-k, whole rows are looked at.
    for (number, (temperature, top_p)) in (0..).zip([(1.5, 1.0), (0.7, 0.5), (0.0, 1.0)]) {
        let mut new = request(numbers.tokens(5, model.spec.config.vocab_size));
        (new.sampler.temperature, new.sampler.top_p) = (temperature, top_p);
        new.seed = (1, number);
        requests.push(new);
    }
    let together = engine.generate_batch(&requests, |_, _| {}).unwrap();
    for (request, text) in requests.iter().zip(&together) {
        assert_eq!(&engine.generate(request, |_| {}).unwrap(), text);
    }
}

/// Prompts that arrive together and begin alike: one of them computes the beginning.
#[test]
fn prompts_of_a_batch_compute_once_what_they_have_in_common() {
    let mut numbers = Numbers::new(4);
    let model = Model::random(&mut numbers, Numerics::Int8);
    let vocab_size = model.spec.config.vocab_size;
    let common = numbers.tokens(70, vocab_size);
    // All of it, which leaves a token of the last block; a part of it; and what only two share.
    let mut prompts: Vec<Vec<u32>> = [70, 64, 40, 70, 70]
        .iter()
        .map(|&len| common[..len].to_vec())
        .collect();
    let more = numbers.tokens(30, vocab_size);
    prompts[3].extend(&more);
    prompts[4].extend(&more[..20]);
    let requests: Vec<Request> = prompts.into_iter().map(request).collect();
    let engine = |max_rows| {
        let options = EngineOptions::new(120, 1, Isa::detect());
        model.engine(EngineOptions {
            max_rows,
            ..options
        })
    };
    for max_rows in [7, 32, 256] {
        let mut together = engine(max_rows);
        let all = together.generate_batch(&requests, |_, _| {}).unwrap();
        // Whole blocks of 16, and never the last token.
        assert_eq!(together.reused(), 48 + 32 + 64 + 80, "{max_rows} rows");
        for (request, expected) in requests.iter().zip(&all) {
            let alone = engine(256).generate(request, |_| {}).unwrap();
            assert_eq!(&alone, expected, "{max_rows} rows");
        }
    }
}
