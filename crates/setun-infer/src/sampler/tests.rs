//! Tests of the sampler.

use super::*;
use crate::occurrences;

const INF: f32 = f32::INFINITY;

fn options(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> SamplerOptions {
    SamplerOptions {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplerOptions::default()
    }
}

/// A history that is all prompt.
fn prompt(history: &[u32]) -> Vec<(u32, u32)> {
    occurrences(history, history.len())
}

fn penalty(repetition_penalty: f32) -> SamplerOptions {
    SamplerOptions {
        repetition_penalty,
        ..SamplerOptions::greedy()
    }
}

fn sample(
    options: SamplerOptions,
    logits: &[f32],
    history: &[u32],
    uniform: f64,
) -> Result<u32, SamplerError> {
    Sampler::new(options, logits.len())?.sample(&mut logits.to_vec(), &prompt(history), uniform)
}

/// Every token that some of 1,000 evenly spaced uniform numbers gives, ascending.
fn reachable(options: SamplerOptions, logits: &[f32]) -> Vec<u32> {
    let uniforms = (0..1000).map(|i| f64::from(i) / 1000.0);
    let mut tokens: Vec<u32> = uniforms
        .map(|uniform| sample(options, logits, &[], uniform).unwrap())
        .collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

fn random_logits(stream: u64, vocab_size: usize, scale: f64) -> Vec<f32> {
    let philox = Philox::new(99, stream);
    (0..vocab_size as u64)
        .map(|i| (scale * philox.normal_pair(i).0) as f32)
        .collect()
}

/// The filters as Hugging Face spells them, each over the whole vocabulary with its
/// own softmax. Returns probabilities by id.
fn distribution_by_definition(
    logits: &[f32],
    history: &[u32],
    options: &SamplerOptions,
) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let penalty = f64::from(options.repetition_penalty);
    for (id, score) in (0u32..).zip(&mut scores) {
        if history.contains(&id) {
            *score *= if *score < 0.0 { penalty } else { 1.0 / penalty };
        }
        *score /= f64::from(options.temperature);
    }
    let mut ascending: Vec<usize> = (0..scores.len()).collect();
    ascending.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    if options.top_k > 0 {
        let num_removed = scores.len().saturating_sub(options.top_k);
        for &id in &ascending[..num_removed] {
            scores[id] = f64::NEG_INFINITY;
        }
    }
    if options.top_p < 1.0 {
        let probabilities = softmax(&scores);
        let mut cumulative = 0.0;
        for &id in &ascending[..scores.len() - 1] {
            cumulative += probabilities[id];
            if cumulative <= 1.0 - f64::from(options.top_p) {
                scores[id] = f64::NEG_INFINITY;
            }
        }
    }
    let probabilities = softmax(&scores);
    let top = probabilities.iter().fold(0.0f64, |top, &p| top.max(p));
    for (score, &p) in scores.iter_mut().zip(&probabilities) {
        if p < f64::from(options.min_p) * top {
            *score = f64::NEG_INFINITY;
        }
    }
    softmax(&scores)
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().fold(f64::NEG_INFINITY, |max, &x| max.max(x));
    let weights: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// Checks that the middle of every token's interval of the cumulative distribution,
/// as the definition has it, gives that token.
fn check_against_definition(options: SamplerOptions, logits: &[f32], history: &[u32]) {
    let mut sampler = Sampler::new(options, logits.len()).unwrap();
    let mut before = 0.0;
    let probabilities = distribution_by_definition(logits, history, &options);
    for (id, &p) in (0u32..).zip(&probabilities) {
        if p > 1e-9 {
            let found = sampler.sample(&mut logits.to_vec(), &prompt(history), before + p / 2.0);
            assert_eq!(found, Ok(id), "{options:?}");
        }
        before += p;
    }
}

#[test]
fn agrees_with_the_definition_of_hugging_face() {
    let mut num_cases = 0;
    for (stream, vocab_size) in [(0, 2), (1, 13), (2, 700)] {
        let logits = random_logits(stream, vocab_size, 3.0);
        for temperature in [0.3, 1.0, 2.5] {
            for top_k in [0, 1, 5, 200] {
                for top_p in [0.05, 0.5, 0.93, 0.9999, 1.0] {
                    for min_p in [0.0, 0.04, 0.6] {
                        let mut options = options(temperature, top_k, top_p, min_p);
                        check_against_definition(options, &logits, &[]);
                        options.repetition_penalty = 1.3;
                        check_against_definition(options, &logits, &[1, 0, 1, 1]);
                        num_cases += 2;
                    }
                }
            }
        }
    }
    assert_eq!(num_cases, 2 * 3 * 3 * 4 * 5 * 3);
}

/// Chi-square with 4 degrees of freedom: 18.47 is its 99.9 % quantile.
#[test]
fn frequencies_follow_the_probabilities() {
    const NUM_DRAWS: u64 = 50_000;
    let shares = [0.4f64, 0.05, 0.25, 0.1, 0.2];
    let logits: Vec<f32> = shares.iter().map(|p| p.ln() as f32 + 3.0).collect();
    let mut sampler = Sampler::new(SamplerOptions::default(), 5).unwrap();
    let mut counts = [0.0; 5];
    for position in 0..NUM_DRAWS {
        let uniform = uniform_at(1, 2, position);
        let token = sampler.sample(&mut logits.clone(), &[], uniform).unwrap();
        counts[token as usize] += 1.0;
    }
    let chi_square: f64 = shares
        .iter()
        .zip(counts)
        .map(|(p, count)| (p * NUM_DRAWS as f64, count))
        .map(|(expected, count)| (count - expected).powi(2) / expected)
        .sum();
    assert!(chi_square < 18.47, "{chi_square}: {counts:?}");
}

#[test]
fn uniform_numbers_depend_on_seed_request_and_position() {
    let mut numbers = Vec::new();
    for seed in 0..4 {
        for request in 0..4 {
            numbers.extend((0..4).map(|position| uniform_at(seed, request, position)));
        }
    }
    assert_eq!(uniform_at(3, 2, 1), numbers[3 * 16 + 2 * 4 + 1]);
    numbers.sort_by(f64::total_cmp);
    numbers.dedup();
    assert_eq!(numbers.len(), 64);
}

#[test]
fn a_call_does_not_depend_on_earlier_calls_and_does_not_allocate() {
    let mut options = options(0.8, 40, 0.9, 0.01);
    options.repetition_penalty = 1.2;
    let mut shared = Sampler::new(options, 300).unwrap();
    let capacity = shared.candidates.capacity();
    for position in 0..50 {
        let logits = random_logits(position, 300, 4.0);
        let history: Vec<u32> = (0..position as u32).map(|i| i * 37 % 300).collect();
        let uniform = uniform_at(5, 6, position);
        let (mut row, mut fresh_row) = (logits.clone(), logits.clone());
        let found = shared.sample(&mut row, &prompt(&history), uniform);
        let mut fresh = Sampler::new(options, 300).unwrap();
        assert_eq!(
            found,
            fresh.sample(&mut fresh_row, &prompt(&history), uniform)
        );
        assert_eq!(row, fresh_row);
        let left = shared
            .distribution(&mut logits.clone(), &prompt(&history))
            .unwrap();
        assert_eq!(found.clone().ok(), left.pick(uniform));
        let reversed: Vec<u32> = history.iter().rev().copied().collect();
        assert_eq!(found, sample(options, &logits, &reversed, uniform));
    }
    assert_eq!(shared.candidates.capacity(), capacity);
}

#[test]
fn greedy_takes_the_lowest_of_the_best() {
    let logits = [1.0, 3.0, -INF, 3.0, 2.0];
    for uniform in [0.0, 0.5, 0.999] {
        assert_eq!(
            sample(SamplerOptions::greedy(), &logits, &[], uniform),
            Ok(1)
        );
    }
    let negative_zero = [-0.0, 0.0];
    assert_eq!(
        sample(SamplerOptions::greedy(), &negative_zero, &[], 0.0),
        Ok(0)
    );
}

#[test]
fn a_tiny_temperature_is_almost_greedy() {
    let logits = [-f32::MAX, 1.0, 1.000_001, f32::MIN_POSITIVE];
    let cold = options(1e-45, 0, 1.0, 0.0);
    assert_eq!(reachable(cold, &logits), [2]);
}

#[test]
fn top_k_keeps_exactly_k_and_ties_fall_to_low_ids() {
    let logits = [1.0, 2.0, 1.0, 2.0, 1.0];
    let expected: [&[u32]; 5] = [&[1], &[1, 3], &[0, 1, 3], &[0, 1, 2, 3], &[0, 1, 2, 3, 4]];
    for (k, expected) in (1..).zip(expected) {
        assert_eq!(reachable(options(1.0, k, 1.0, 0.0), &logits), expected);
    }
    let all = [0, 1, 2, 3, 4];
    for k in [0, 6, usize::MAX] {
        assert_eq!(reachable(options(1.0, k, 1.0, 0.0), &logits), all);
    }
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it_and_never_none() {
    // Probabilities are exactly 1/4 each.
    let level = [0.0; 4];
    let cases: [(f32, &[u32]); 6] = [
        (0.0, &[0]),
        (1e-30, &[0]),
        (0.25, &[0]),
        (0.5, &[0, 1]),
        (0.500_001, &[0, 1, 2]),
        (0.8, &[0, 1, 2, 3]),
    ];
    for (top_p, expected) in cases {
        assert_eq!(reachable(options(1.0, 0, top_p, 0.0), &level), expected);
    }
}

/// More candidates than the first sorted block, all tied.
#[test]
fn top_p_crosses_blocks() {
    let level = [0.0; 400];
    let kept = reachable(options(1.0, 0, 0.625, 0.0), &level);
    assert_eq!(kept, (0..250).collect::<Vec<u32>>());
}

#[test]
fn min_p_keeps_its_bound_and_always_the_best() {
    let logits = [0.0, 0.5f32.ln(), 3.0, 3.0];
    assert_eq!(reachable(options(1.0, 0, 1.0, 1.0), &logits), [2, 3]);
    let kept = reachable(options(1.0, 0, 1.0, 0.04), &logits);
    assert_eq!(kept, [0, 2, 3], "exp(-3) = 0.0498 stays, half of it goes");
}

#[test]
fn repetition_penalty_counts_a_token_once_and_has_two_signs() {
    let mut logits = [4.0, -4.0, 4.0, -INF, 0.0];
    let mut sampler = Sampler::new(penalty(2.0), 5).unwrap();
    let occurred = occurrences(&[1, 0, 0, 3, 4, 1, 0], 3);
    assert_eq!(sampler.sample(&mut logits, &occurred, 0.0), Ok(2));
    assert_eq!(logits, [2.0, -8.0, 4.0, -INF, 0.0]);
}

#[test]
fn presence_and_frequency_penalties_count_what_was_generated() {
    let options = SamplerOptions {
        presence_penalty: 1.0,
        frequency_penalty: 0.25,
        ..SamplerOptions::greedy()
    };
    let occurred = occurrences(&[0, 1, 1, 2, 1, 2, 3], 3);
    assert_eq!(occurred, [(0, 0), (1, 1), (2, 2), (3, 1)]);
    let mut logits = [4.0, 4.0, 4.0, -INF, 3.0];
    let mut sampler = Sampler::new(options, 5).unwrap();
    assert_eq!(sampler.sample(&mut logits, &occurred, 0.0), Ok(0));
    assert_eq!(logits, [4.0, 2.75, 2.5, -INF, 3.0]);
}

#[test]
fn an_extreme_penalty_makes_no_infinity() {
    let mut logits = [f32::MAX, -f32::MAX];
    let mut sampler = Sampler::new(penalty(1e-30), 2).unwrap();
    assert_eq!(sampler.sample(&mut logits, &prompt(&[0]), 0.0), Ok(0));
    assert_eq!(logits, [f32::MAX, -f32::MAX]);
    let only_negative = [-1e30, -INF];
    assert_eq!(sample(penalty(1e30), &only_negative, &[0], 0.0), Ok(0));
}

#[test]
fn excluded_tokens_are_never_chosen() {
    let logits = [-INF, 0.0, -INF, -200.0, 0.0, -INF];
    let last = 1.0 - f64::EPSILON / 2.0;
    for options in [
        SamplerOptions::default(),
        SamplerOptions::greedy(),
        options(1.0, 4, 0.999, 0.0),
        options(1000.0, 6, 1.0, 0.0),
    ] {
        for token in reachable(options, &logits) {
            assert!(logits[token as usize].is_finite(), "{token} {options:?}");
        }
        let token = sample(options, &logits, &[], last).unwrap();
        assert!(logits[token as usize].is_finite(), "{token} {options:?}");
    }
    // The last candidate underflows to probability 0: the ends of the unit interval
    // give the first and the last token that has any.
    let underflow = [-1e9, 0.0, 0.0, -1e9];
    assert_eq!(
        sample(SamplerOptions::default(), &underflow, &[], 0.0),
        Ok(1)
    );
    assert_eq!(
        sample(SamplerOptions::default(), &underflow, &[], last),
        Ok(2)
    );
}

#[test]
fn bad_arguments_are_named_and_leave_the_logits_alone() {
    let mut sampler = Sampler::new(penalty(2.0), 3).unwrap();
    let mut fails = |logits: &[f32], history: &[u32], uniform: f64| {
        let mut row = logits.to_vec();
        let error = sampler
            .sample(&mut row, &prompt(history), uniform)
            .unwrap_err();
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&row), bits(logits));
        error.to_string()
    };
    assert!(fails(&[1.0, 2.0], &[0], 0.5).contains("2 logits"));
    assert!(fails(&[1.0; 3], &[0, 3], 0.5).contains("token 3 of the history"));
    for uniform in [1.0, -1e-9, f64::NAN] {
        assert!(fails(&[1.0; 3], &[0], uniform).contains("uniform"));
    }
    assert!(fails(&[1.0, f32::NAN, 2.0], &[0], 0.5).contains("token 1 is NaN"));
    assert!(fails(&[1.0, 2.0, INF], &[0], 0.5).contains("token 2 is inf"));
    assert!(fails(&[-INF; 3], &[0], 0.5).contains("every token is excluded"));
}

#[test]
fn options_outside_their_range_are_named() {
    let good = SamplerOptions::default();
    let check = |options: SamplerOptions, name: &str| {
        let error = Sampler::new(options, 4).unwrap_err();
        assert!(options.validate().is_err());
        assert!(error.to_string().starts_with(name), "{error}");
    };
    for value in [-0.1, f32::NAN, INF] {
        let temperature = value;
        check(
            SamplerOptions {
                temperature,
                ..good
            },
            "temperature is",
        );
        let top_p = value;
        check(SamplerOptions { top_p, ..good }, "top_p is");
        let min_p = value;
        check(SamplerOptions { min_p, ..good }, "min_p is");
        check(penalty(value), "repetition_penalty is");
    }
    check(penalty(0.0), "repetition_penalty is");
    check(SamplerOptions { top_p: 1.1, ..good }, "top_p is");
    check(SamplerOptions { min_p: 1.1, ..good }, "min_p is");
    let edges = options(0.0, usize::MAX, 0.0, 1.0);
    assert_eq!(edges.validate(), Ok(()));
    let error = Sampler::new(good, 0).unwrap_err();
    assert_eq!(error, SamplerError::VocabSize(0));
}
