//! Log-probabilities of the tokens of a text: of the model's distribution behind penalties,
//! before temperature and filters.

use setun_backend::topk::{Candidate, TILE, TileSum, Total, by_rank};

/// A token with its log-probability, and the likeliest tokens at its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// As many of the likeliest tokens as were asked for, best first, with theirs.
    pub top: Vec<(u32, f64)>,
}

/// What is kept of a row of logits until its token is known.
pub(crate) enum Row {
    /// Its best entries, best first, the chosen one among them.
    Kept(Vec<Candidate>, Total),
    /// All of it.
    Whole(Vec<f32>),
}

impl Row {
    /// Of `token`, with the `num_top` likeliest.
    pub(crate) fn of(&self, token: u32, num_top: usize) -> TokenLogprobs {
        let (value, best, total) = match self {
            Self::Kept(best, total) => {
                let found = best.iter().find(|c| c.id == token);
                let value = found.map_or(f32::NEG_INFINITY, |c| c.value);
                (value, best.clone(), *total)
            }
            Self::Whole(logits) => (
                logits[token as usize],
                best_of(logits, num_top),
                total_of(logits),
            ),
        };
        let top = best.iter().take(num_top);
        TokenLogprobs {
            token,
            logprob: total.log_probability(value),
            top: top
                .map(|c| (c.id, total.log_probability(c.value)))
                .collect(),
        }
    }
}

/// As the fused product adds it up.
fn total_of(logits: &[f32]) -> Total {
    let tiles: Vec<TileSum> = logits.chunks(TILE).map(TileSum::of).collect();
    Total::of(tiles.into_iter())
}

fn best_of(logits: &[f32], n: usize) -> Vec<Candidate> {
    let ids = logits.iter().zip(0u32..);
    let mut all: Vec<_> = ids.map(|(&value, id)| Candidate { value, id }).collect();
    if n < all.len() {
        all.select_nth_unstable_by(n, by_rank);
        all.truncate(n);
    }
    all.sort_unstable_by(by_rank);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_backend::philox::Philox;

    #[test]
    fn kept_entries_and_whole_rows_say_the_same() {
        let random = Philox::new(3, 1);
        let logits: Vec<f32> = (0..3000)
            .map(|i| 2.0 * random.normal_pair(i).0 as f32)
            .collect();
        let kept = Row::Kept(best_of(&logits, 40), total_of(&logits));
        let whole = Row::Whole(logits.clone());
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for (token, num_top) in [
            (best_of(&logits, 7)[6].id, 5),
            (best_of(&logits, 1)[0].id, 0),
        ] {
            let said = kept.of(token, num_top);
            assert_eq!(said, whole.of(token, num_top));
            let expected = f64::from(logits[token as usize]) - sum.ln();
            assert!(
                (said.logprob - expected).abs() < 1e-6,
                "{said:?} {expected}"
            );
            assert_eq!(said.top.len(), num_top);
            assert!(said.top.is_sorted_by(|a, b| a.1 >= b.1));
        }
        let all = whole.of(0, 3000).top;
        assert!((all.iter().map(|(_, p)| p.exp()).sum::<f64>() - 1.0).abs() < 1e-6);
    }
}
