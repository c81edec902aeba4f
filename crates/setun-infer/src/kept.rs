//! Choosing a token from the best entries of its logits, which is all that a fused head
//! product leaves.

use crate::distribution::Distribution;
use crate::sampler::{SamplerError, SamplerOptions};
use setun_backend::topk::{Candidate, Shaping, Total};

/// Entries that `options` need of each row, if that is few: the rest of the distribution
/// is never looked at then.
pub fn needed(options: &SamplerOptions) -> Option<usize> {
    match options {
        _ if options.temperature == 0.0 => Some(1),
        SamplerOptions {
            top_k: 1..=1024, ..
        } => Some(options.top_k),
        _ => None,
    }
}

/// What logits go through before they are kept. The temperature is not among it: [`choose`]
/// applies it to what was kept, in f64, as [`Sampler`](crate::Sampler) does.
pub fn shaping(options: &SamplerOptions) -> Shaping {
    Shaping {
        repetition_penalty: options.repetition_penalty,
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        ..Shaping::default()
    }
}

/// The token that [`Sampler::sample`](crate::Sampler::sample) chooses from the whole row.
/// `kept` has at least [`needed`] entries of it, best first, behind [`shaping`].
///
/// # Errors
/// Logits that are no numbers, or exclude every token.
pub fn choose(
    options: &SamplerOptions,
    kept: &[Candidate],
    total: Total,
    uniform: f64,
) -> Result<u32, SamplerError> {
    let picked = distribution(options, kept, total)?.pick(uniform);
    Ok(picked.unwrap_or(kept[0].id))
}

/// What [`choose`] chooses from, as [`Sampler::distribution`](crate::Sampler::distribution)
/// has it from the whole row.
///
/// # Errors
/// As [`choose`].
pub fn distribution(
    options: &SamplerOptions,
    kept: &[Candidate],
    total: Total,
) -> Result<Distribution, SamplerError> {
    let best = best_of(kept, total)?;
    if options.temperature == 0.0 {
        return Ok(Distribution::point(best.id));
    }
    let few = &kept[..kept.len().min(options.top_k.max(1))];
    let temperature = f64::from(options.temperature);
    let weigh = |c: &Candidate| {
        let below = f64::from(c.value) - f64::from(best.value);
        (c.id, libm::exp(below / temperature))
    };
    let finite = few.iter().filter(|c| c.value.is_finite());
    let mut weighted: Vec<(u32, f64)> = finite.map(weigh).collect();
    keep_top_p(options.top_p, &mut weighted);
    weighted.sort_unstable_by_key(|&(id, _)| id);
    weighted.retain(|&(_, weight)| weight >= f64::from(options.min_p));
    Ok(Distribution::new(weighted))
}

/// The best entry of a row.
///
/// # Errors
/// As [`choose`].
pub(crate) fn best_of(kept: &[Candidate], total: Total) -> Result<Candidate, SamplerError> {
    let best = *kept.first().ok_or(SamplerError::NoCandidate)?;
    if total.max == f32::INFINITY {
        let (token, value) = (best.id, total.max);
        return Err(SamplerError::InvalidLogit { token, value });
    }
    // The sum of a row with NaN is NaN; the largest value may be anything then.
    if total.sum.is_nan() && total.max != f32::NEG_INFINITY {
        return Err(SamplerError::NotANumber);
    }
    if best.value == f32::NEG_INFINITY {
        return Err(SamplerError::NoCandidate);
    }
    Ok(best)
}

/// A token goes when the better ones alone have `top_p` of the mass.
fn keep_top_p(top_p: f32, weighted: &mut Vec<(u32, f64)>) {
    if top_p == 1.0 {
        return;
    }
    let mut by_id = weighted.clone();
    by_id.sort_unstable_by_key(|&(id, _)| id);
    let wanted = f64::from(top_p) * sum(&by_id);
    let mut mass = 0.0;
    let mut num_kept = 0;
    for &(_, weight) in &*weighted {
        if num_kept > 0 && mass >= wanted {
            break;
        }
        mass += weight;
        num_kept += 1;
    }
    weighted.truncate(num_kept);
}

/// In the order of the list, which is that of ids wherever bits matter.
fn sum(weighted: &[(u32, f64)]) -> f64 {
    weighted.iter().fold(0.0, |sum, (_, weight)| sum + weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Sampler, Shaped, occurrences};
    use setun_backend::philox::Philox;
    use setun_backend::topk::by_rank;

    /// The best entries of a row, by sorting all of it.
    fn kept(logits: &[f32], k: usize) -> (Vec<Candidate>, Total) {
        let ids = logits.iter().zip(0u32..);
        let mut all: Vec<_> = ids.map(|(&value, id)| Candidate { value, id }).collect();
        all.sort_by(by_rank);
        all.truncate(k);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = logits.iter().map(|x| (x - max).exp()).sum();
        (all, Total { max, sum })
    }

    #[test]
    fn chooses_what_the_sampler_chooses() {
        for case in 0..3000u64 {
            let random = Philox::new(31, case);
            let number = |i: u64| random.block(1000 + i)[0];
            let vocab_size = 1 + number(0) as usize % 300;
            let coarse = case % 2 == 0;
            let logit = |i: u64| match coarse {
                true => (number(10 + i) % 5) as f32,
                false => random.normal_pair(i).0 as f32,
            };
            let mut logits: Vec<f32> = (0..vocab_size as u64).map(logit).collect();
            if vocab_size > 3 {
                logits[1] = f32::NEG_INFINITY;
            }
            let options = SamplerOptions {
                temperature: [0.0, 0.7, 1.5][number(1) as usize % 3],
                top_k: 1 + number(2) as usize % 50,
                top_p: [1.0, 0.5, 0.9][number(3) as usize % 3],
                min_p: [0.0, 0.2][number(4) as usize % 2],
                repetition_penalty: [1.0, 1.3][number(5) as usize % 2],
                presence_penalty: [0.0, 0.5][number(6) as usize % 2],
                frequency_penalty: [0.0, -0.25][number(7) as usize % 2],
            };
            let history: Vec<u32> = (0..5).map(|i| number(20 + i) % vocab_size as u32).collect();
            let num_prompt = number(8) as usize % 6;
            let occurred = occurrences(&history, num_prompt);
            let mut shaped = logits.clone();
            let shape = Shaped::new(shaping(&options), &history, num_prompt);
            shape.shaping.apply(0, &shape.occurred, &mut shaped);
            let (best, total) = kept(&shaped, needed(&options).unwrap());
            let uniform = random.uniform(7);
            let chosen = choose(&options, &best, total, uniform).unwrap();
            let mut sampler = Sampler::new(options, vocab_size).unwrap();
            let mut row = logits.clone();
            let expected = sampler.sample(&mut logits, &occurred, uniform).unwrap();
            assert_eq!(chosen, expected, "case {case}, {options:?}");
            let left = distribution(&options, &best, total).unwrap();
            let expected = sampler.distribution(&mut row, &occurred).unwrap();
            assert_eq!(left, expected, "case {case}, {options:?}");
        }
    }

    #[test]
    fn rows_that_are_no_distribution_are_refused() {
        let options = SamplerOptions::greedy();
        let (best, total) = kept(&[f32::NEG_INFINITY; 3], 1);
        assert_eq!(
            choose(&options, &best, total, 0.5),
            Err(SamplerError::NoCandidate)
        );
        let (best, total) = kept(&[1.0, f32::INFINITY], 1);
        let error = choose(&options, &best, total, 0.5);
        assert!(matches!(
            error,
            Err(SamplerError::InvalidLogit { token: 1, .. })
        ));
        for row in [[1.0, f32::NAN], [f32::NAN, 1.0]] {
            let (best, total) = kept(&row, 1);
            let error = choose(&options, &best, total, 0.5);
            assert_eq!(error, Err(SamplerError::NotANumber), "{row:?}");
        }
    }
}
