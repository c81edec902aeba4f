//! Beam search with a model: prompts do not influence each other, and one beam is greedy.

mod model;

use model::{Model, Numbers};
use setun_backend::Isa;
use setun_infer::{
    BeamOptions, BeamRequest, EngineOptions, LengthPenalty, Request, SamplerOptions, StopRules,
};
use setun_ternary::Numerics;

fn request(prompt: Vec<u32>, max_tokens: usize) -> BeamRequest {
    BeamRequest {
        prompt,
        end_tokens: vec![0, 1],
        max_tokens,
    }
}

#[test]
fn prompts_of_a_batch_do_not_influence_each_other() {
    for case in 0..12 {
        let mut numbers = Numbers::new(900 + case);
        let numerics = numbers.one_of(&[Numerics::Int8, Numerics::Bf16]);
        let model = Model::random(&mut numbers, numerics);
        let vocab_size = model.spec.config.vocab_size;
        let requests: Vec<BeamRequest> = [3, 5, 20, 1]
            .map(|n| request(numbers.tokens(n, vocab_size), 10))
            .into();
        let options = BeamOptions::new(4);
        let search = |requests: &[BeamRequest], tokens, threads| {
            let engine = EngineOptions {
                cache_tokens: Some(tokens),
                ..EngineOptions::new(64, threads, Isa::detect())
            };
            model.engine(engine).beam_search(requests, options).unwrap()
        };
        let together = search(&requests, 2048, 2);
        for (request, found) in requests.iter().zip(&together) {
            let alone = search(std::slice::from_ref(request), 1024, 1);
            assert_eq!(&alone[0], found);
            assert!(found.is_sorted_by(|a, b| a.score >= b.score) && found.len() == 4);
        }
        // A cache for one prompt at a time gives the same.
        assert_eq!(search(&requests, 320, 2), together);
    }
}

#[test]
fn one_beam_equals_greedy_decoding() {
    for case in 0..10 {
        let mut numbers = Numbers::new(700 + case);
        let model = Model::random(&mut numbers, Numerics::Int8);
        let vocab_size = model.spec.config.vocab_size;
        let prompt = numbers.tokens(5, vocab_size);
        let options = EngineOptions {
            cache_tokens: Some(256),
            ..EngineOptions::new(64, 1, Isa::detect())
        };
        let mut engine = model.engine(options);
        let greedy = Request {
            prompt: prompt.clone(),
            sampler: SamplerOptions::greedy(),
            stop: StopRules {
                end_tokens: vec![0, 1],
                max_tokens: 20,
            },
            seed: (0, 0),
            logprobs: None,
        };
        let greedy = engine.generate(&greedy, |_| {}).unwrap();
        let options = BeamOptions {
            length_penalty: LengthPenalty::Power(0.0),
            ..BeamOptions::new(1)
        };
        let found = engine.beam_search(&[request(prompt, 20)], options).unwrap();
        let mut tokens = found[0][0].tokens.clone();
        if found[0][0].is_finished {
            tokens.pop();
        }
        assert_eq!(tokens, greedy.tokens);
    }
}
