//! What counting reaches: unigram, bigram and trigram baselines on the same tokens.
//!
//! A model that is not clearly below the trigram has not learned more than short
//! contexts. With counts `c` over the training stream of `N` tokens and a vocabulary
//! of `V`:
//!
//! ```text
//! P1(w)     = (c(w) + 1) / (N + V)
//! P2(w|v)   = a * c(vw) / c(v)   + (1 - a) * P1(w)        a = A[log2 c(v)]
//! P3(w|uv)  = b * c(uvw) / c(uv) + (1 - b) * P2(w|v)      b = B[log2 c(uv)]
//! ```
//!
//! (Jelinek and Mercer 1980; contexts that were never seen have weight 0.) The weights
//! maximise the likelihood of the training stream with each occurrence's own counts
//! taken out (leave-one-out), plus one imagined occurrence per bucket that only the lower
//! order predicts, which keeps every weight below 1. That is the fixed point of the usual
//! EM iteration; the likelihood is concave in each weight, so bisection on its slope
//! finds it without EM's slow tail. The held-out text is only scored.
//!
//! Both streams are circular, as in [`super::batches`]: the context of the first token is
//! the end of the stream, whose last token is `<|endoftext|>`.
//!
//! Counts live in a trie of sorted arrays built from one sort of packed trigrams: 8 bytes
//! per training token while building, then 8 per distinct trigram and 12 per distinct
//! bigram. At most the first 2^23 training tokens are counted, so that the memory does not grow
//! with the corpus.

use super::{DataError, TokenSet};
use serde::{Deserialize, Serialize};

/// Most training tokens that are counted; bounds the memory at about 160 MB.
pub const MAX_TRAIN_TOKENS: u64 = 1 << 23;

/// Bits of an id in a packed trigram.
const ID_BITS: u32 = 21;

/// Buckets of context counts, by the floor of their logarithm to base 2.
const NUM_BUCKETS: usize = 32;

/// Tokens that are read at a time.
const BLOCK_TOKENS: usize = 1 << 13;

/// Held-out losses of counting models, in nats per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baselines {
    /// Add-one smoothed unigram.
    pub unigram: f64,
    /// Bigram interpolated with the unigram.
    pub bigram: f64,
    /// Trigram interpolated with the bigram.
    pub trigram: f64,
    /// Training tokens that were counted: all, or the first [`MAX_TRAIN_TOKENS`].
    pub num_train_tokens: u64,
}

impl Baselines {
    /// Counts `train` and scores every target of `valid`.
    ///
    /// # Errors
    /// Streams of different vocabularies, a vocabulary above 2^21, and a token file that
    /// cannot be read.
    pub fn measure(train: &TokenSet, valid: &TokenSet) -> Result<Self, DataError> {
        let (ours, theirs) = (train.info().vocab_size, valid.info().vocab_size);
        if ours != theirs {
            return Err(DataError::BadTokens {
                reason: format!(
                    "the training tokens have a vocabulary of {ours}, the held-out tokens one of \
                     {theirs}: tokenize both with the same tokenizer"
                ),
            });
        }
        NgramModel::fit(train, MAX_TRAIN_TOKENS)?.score(valid)
    }
}

/// Counts and interpolation weights.
struct NgramModel {
    trie: Trie,
    vocab_size: f64,
    bigram_weights: Weights,
    trigram_weights: Weights,
}

impl NgramModel {
    /// Counts the first `max_tokens` tokens of `train` and fits the weights on them.
    fn fit(train: &TokenSet, max_tokens: u64) -> Result<Self, DataError> {
        let vocab_size = train.info().vocab_size;
        if vocab_size > 1 << ID_BITS {
            return Err(DataError::BadTokens {
                reason: format!(
                    "the n-gram baselines of a training need a vocabulary of at most {}, not \
                     {vocab_size}: use a tokenizer with fewer entries",
                    1 << ID_BITS
                ),
            });
        }
        let num_tokens = train.num_tokens().min(max_tokens);
        let mut model = Self {
            trie: Trie::new(sorted_trigrams(train, num_tokens)?, vocab_size as usize),
            vocab_size: f64::from(vocab_size),
            bigram_weights: Weights::default(),
            trigram_weights: Weights::default(),
        };
        model.bigram_weights = model.fit_bigram_weights();
        model.trigram_weights = model.fit_trigram_weights();
        Ok(model)
    }

    fn fit_bigram_weights(&self) -> Weights {
        let trie = &self.trie;
        let mut estimator = WeightEstimator::default();
        for v in 0..trie.num_first() {
            for bigram in trie.bigrams_of(v) {
                let (w, count) = (trie.second[bigram] as usize, trie.second_counts[bigram]);
                estimator.add(count, trie.first_counts[v], || self.unigram_without(w));
            }
        }
        estimator.finish()
    }

    fn fit_trigram_weights(&self) -> Weights {
        let trie = &self.trie;
        let mut estimator = WeightEstimator::default();
        for bigram in 0..trie.second.len() {
            let v = trie.second[bigram] as usize;
            let context_count = trie.second_counts[bigram];
            for trigram in trie.trigrams_of(bigram) {
                let (w, count) = (trie.third[trigram], trie.third_counts[trigram]);
                estimator.add(count, context_count, || self.bigram_without(v, w));
            }
        }
        estimator.finish()
    }

    /// P1 of a token of the training stream, with that occurrence taken out.
    fn unigram_without(&self, w: usize) -> f64 {
        // (c - 1) + 1 over (N - 1) + V.
        f64::from(self.trie.first_counts[w]) / (self.trie.num_tokens - 1.0 + self.vocab_size)
    }

    /// P2 of a token behind `v` in the training stream, with that occurrence taken out.
    fn bigram_without(&self, v: usize, w: u32) -> f64 {
        let context_count = self.trie.first_counts[v] - 1;
        let count = self
            .trie
            .bigram(v, w)
            .map_or(1, |b| self.trie.second_counts[b])
            - 1;
        let lower = self.unigram_without(w as usize);
        self.bigram_weights.mix(count, context_count, lower)
    }

    /// Scores every target of `valid` in its circular context.
    fn score(&self, valid: &TokenSet) -> Result<Baselines, DataError> {
        let trie = &self.trie;
        let mut sums = [0.0f64; 3];
        let (mut v, mut context) = (0, None);
        for_each_circular(valid, valid.num_tokens(), |position, w| {
            // The first two calls only set the context: tokens N - 2 and N - 1.
            let next = trie.bigram(v, w);
            if position >= 0 && valid.is_target(position as u64) {
                let probabilities = self.probabilities(context, v, next, w);
                for (sum, p) in sums.iter_mut().zip(probabilities) {
                    *sum -= p.ln();
                }
            }
            (v, context) = (w as usize, next);
        })?;
        let [unigram, bigram, trigram] = sums.map(|sum| sum / valid.num_targets() as f64);
        Ok(Baselines {
            unigram,
            bigram,
            trigram,
            num_train_tokens: trie.num_tokens as u64,
        })
    }

    /// P1, P2 and P3 of `w` behind `v`, where `context` is the bigram that ends in `v`
    /// and `bigram` is (v, w), each if the training stream has it.
    fn probabilities(
        &self,
        context: Option<usize>,
        v: usize,
        bigram: Option<usize>,
        w: u32,
    ) -> [f64; 3] {
        let trie = &self.trie;
        let p1 = f64::from(trie.first_counts[w as usize] + 1) / (trie.num_tokens + self.vocab_size);
        let count = bigram.map_or(0, |b| trie.second_counts[b]);
        let p2 = self.bigram_weights.mix(count, trie.first_counts[v], p1);
        let (count, context_count) = context.map_or((0, 0), |b| {
            let trigram = trie.trigram(b, w);
            (
                trigram.map_or(0, |t| trie.third_counts[t]),
                trie.second_counts[b],
            )
        });
        let p3 = self.trigram_weights.mix(count, context_count, p2);
        [p1, p2, p3]
    }
}

/// Interpolation weight of the higher order for each bucket of context counts.
#[derive(Clone, Copy, Debug, Default)]
struct Weights([f64; NUM_BUCKETS]);

impl Weights {
    /// `weight * count / context_count + (1 - weight) * lower`.
    fn mix(&self, count: u32, context_count: u32, lower: f64) -> f64 {
        let Some(bucket) = context_count.checked_ilog2() else {
            return lower;
        };
        let weight = self.0[bucket as usize];
        weight * f64::from(count) / f64::from(context_count) + (1.0 - weight) * lower
    }
}

/// Collects leave-one-out events and finds the weights that predict them best.
#[derive(Default)]
struct WeightEstimator {
    buckets: [Bucket; NUM_BUCKETS],
}

/// Events whose contexts have about the same count.
#[derive(Default)]
struct Bucket {
    /// (higher-order probability above 0, lower-order probability, occurrences).
    events: Vec<(f32, f32, u32)>,
    /// Occurrences that the higher order gives probability 0.
    num_unpredicted: f64,
}

impl WeightEstimator {
    /// Adds an n-gram's `count` occurrences behind a context that occurs `context_count`
    /// times; `lower` gives the lower-order probability without one occurrence.
    fn add(&mut self, count: u32, context_count: u32, lower: impl FnOnce() -> f64) {
        // Without this occurrence, the context was seen one time less.
        let Some(bucket) = (context_count - 1).checked_ilog2() else {
            return;
        };
        let bucket = &mut self.buckets[bucket as usize];
        if count > 1 {
            let higher = f64::from(count - 1) / f64::from(context_count - 1);
            bucket.events.push((higher as f32, lower() as f32, count));
        } else {
            bucket.num_unpredicted += f64::from(count);
        }
    }

    fn finish(self) -> Weights {
        let mut weights = Weights::default();
        // A bucket without events takes the weight of the one below it.
        let mut last = 0.0;
        for (weight, bucket) in weights.0.iter_mut().zip(&self.buckets) {
            if !bucket.events.is_empty() || bucket.num_unpredicted > 0.0 {
                last = bucket.best_weight();
            }
            *weight = last;
        }
        weights
    }
}

impl Bucket {
    /// The weight in [0, 1) where the log-likelihood's slope changes sign.
    fn best_weight(&self) -> f64 {
        let (mut low, mut high) = (0.0, 1.0);
        if self.slope(low) <= 0.0 {
            return 0.0;
        }
        // 40 halvings: a weight to 1e-12.
        for _ in 0..40 {
            let middle = 0.5 * (low + high);
            if self.slope(middle) > 0.0 {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    /// Derivative of the log-likelihood by the weight.
    fn slope(&self, weight: f64) -> f64 {
        let terms = self.events.iter().map(|&(higher, lower, count)| {
            let (higher, lower) = (f64::from(higher), f64::from(lower));
            let gain = higher - lower;
            f64::from(count) * gain / (lower + weight * gain)
        });
        // One imagined occurrence joins those that only the lower order predicts.
        terms.sum::<f64>() - (self.num_unpredicted + 1.0) / (1.0 - weight)
    }
}

/// Counts of all n-grams up to 3: for each token the sorted list of its successors, for
/// each of these the sorted list of theirs.
struct Trie {
    num_tokens: f64,
    first_counts: Vec<u32>,
    /// `first_starts[u]..first_starts[u + 1]` are the bigrams that begin with `u`.
    first_starts: Vec<u32>,
    second: Vec<u32>,
    second_counts: Vec<u32>,
    /// `second_starts[b]..second_starts[b + 1]` are the trigrams that extend bigram `b`.
    second_starts: Vec<u32>,
    third: Vec<u32>,
    third_counts: Vec<u32>,
}

impl Trie {
    /// Builds the trie of a circular stream from its packed trigrams, sorted. Because
    /// the stream is circular, every token begins a bigram and a trigram, so counts as
    /// context and as n-gram are the same.
    fn new(trigrams: Vec<u64>, vocab_size: usize) -> Self {
        let mut trie = Self {
            num_tokens: trigrams.len() as f64,
            first_counts: vec![0; vocab_size],
            first_starts: vec![0; vocab_size + 1],
            second: Vec::new(),
            second_counts: Vec::new(),
            second_starts: Vec::new(),
            third: Vec::new(),
            third_counts: Vec::new(),
        };
        let mut last_bigram = None;
        for run in trigrams.chunk_by(|a, b| a == b) {
            let (u, v, w) = unpack(run[0]);
            let count = run.len() as u32;
            if last_bigram.replace((u, v)) != Some((u, v)) {
                trie.first_starts[u as usize + 1] += 1;
                trie.second.push(v);
                trie.second_counts.push(0);
                trie.second_starts.push(trie.third.len() as u32);
            }
            trie.first_counts[u as usize] += count;
            if let Some(bigram_count) = trie.second_counts.last_mut() {
                *bigram_count += count;
            }
            trie.third.push(w);
            trie.third_counts.push(count);
        }
        trie.second_starts.push(trie.third.len() as u32);
        for u in 1..trie.first_starts.len() {
            trie.first_starts[u] += trie.first_starts[u - 1];
        }
        trie
    }

    fn num_first(&self) -> usize {
        self.first_counts.len()
    }

    fn bigrams_of(&self, u: usize) -> std::ops::Range<usize> {
        self.first_starts[u] as usize..self.first_starts[u + 1] as usize
    }

    fn trigrams_of(&self, bigram: usize) -> std::ops::Range<usize> {
        self.second_starts[bigram] as usize..self.second_starts[bigram + 1] as usize
    }

    /// Index of the bigram (v, w).
    fn bigram(&self, v: usize, w: u32) -> Option<usize> {
        let range = self.bigrams_of(v);
        let found = self.second[range.clone()].binary_search(&w);
        found.ok().map(|i| range.start + i)
    }

    /// Index of the trigram that extends a bigram by `w`.
    fn trigram(&self, bigram: usize, w: u32) -> Option<usize> {
        let range = self.trigrams_of(bigram);
        let found = self.third[range.clone()].binary_search(&w);
        found.ok().map(|i| range.start + i)
    }
}

/// The trigrams of the first `num_tokens` tokens as a circle, packed and sorted.
fn sorted_trigrams(tokens: &TokenSet, num_tokens: u64) -> Result<Vec<u64>, DataError> {
    let mut trigrams = Vec::with_capacity(num_tokens as usize);
    let mask = (1u64 << (3 * ID_BITS)) - 1;
    let mut packed = 0u64;
    for_each_circular(tokens, num_tokens, |position, id| {
        packed = (packed << ID_BITS | u64::from(id)) & mask;
        if position >= 0 {
            trigrams.push(packed);
        }
    })?;
    trigrams.sort_unstable();
    Ok(trigrams)
}

fn unpack(trigram: u64) -> (u32, u32, u32) {
    let mask = (1u64 << ID_BITS) - 1;
    let id = |place: u32| (trigram >> (place * ID_BITS) & mask) as u32;
    (id(2), id(1), id(0))
}

/// Visits (position, token) for the positions -2, -1, 0, ... of the first `num_tokens`
/// tokens taken as a circle.
fn for_each_circular(
    tokens: &TokenSet,
    num_tokens: u64,
    mut visit: impl FnMut(i64, u32),
) -> Result<(), DataError> {
    let mut block = vec![0u32; BLOCK_TOKENS];
    for position in [-2i64, -1] {
        let wrapped = position.rem_euclid(num_tokens as i64) as u64;
        tokens.read(wrapped, &mut block[..1])?;
        visit(position, block[0]);
    }
    let mut position = 0;
    while position < num_tokens {
        let now = (num_tokens - position).min(BLOCK_TOKENS as u64) as usize;
        tokens.read(position, &mut block[..now])?;
        for (i, &id) in (position as i64..).zip(&block[..now]) {
            visit(i, id);
        }
        position += now as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokens::tests::{all, token_set};
    use std::collections::BTreeMap;

    impl NgramModel {
        fn probability(&self, u: u32, v: u32, w: u32) -> [f64; 3] {
            let (context, bigram) = (
                self.trie.bigram(u as usize, v),
                self.trie.bigram(v as usize, w),
            );
            self.probabilities(context, v as usize, bigram, w)
        }
    }

    /// A stream with some structure: each id depends on the two before it.
    fn structured(num_documents: u64, vocab_size: u32, seed: u64) -> TokenSet {
        let mut state = seed;
        let mut random = |n: u32| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            (crate::data::mix64(state) % u64::from(n)) as u32
        };
        let mut document = |_| {
            let (mut u, mut v) = (0, 0);
            let len = random(60);
            let next = |_| {
                let (range, jump) = (vocab_size - 1, random(10));
                let w = if jump < 2 {
                    random(range)
                } else {
                    (u * 7 + v * 3 + jump / 5) % range
                };
                (u, v) = (v, w);
                w
            };
            (0..len).map(next).collect()
        };
        let documents: Vec<Vec<u32>> = (0..num_documents).map(&mut document).collect();
        token_set(&documents, vocab_size)
    }

    #[test]
    fn a_tiny_case_equals_the_count_by_hand() {
        // 0 1 0 1 0 1 0 2, N = 8, V = 3: c(0) = 4, c(1) = 3, c(2) = 1.
        let train = token_set(&[vec![0, 1, 0, 1, 0, 1, 0]], 3);
        let model = NgramModel::fit(&train, MAX_TRAIN_TOKENS).expect("counts");
        let trie = &model.trie;
        assert_eq!(trie.first_counts, [4, 3, 1]);
        let count = |v: usize, w| trie.bigram(v, w).map_or(0, |b| trie.second_counts[b]);
        assert_eq!(
            [count(0, 1), count(0, 2), count(1, 0), count(2, 0)],
            [3, 1, 3, 1]
        );
        assert_eq!([count(0, 0), count(1, 1), count(2, 2)], [0, 0, 0]);
        // Contexts 0 (seen 3 times without the occurrence) and 1 (2 times) are in bucket
        // 1; context 2 is never seen without its only occurrence. Leave-one-out:
        // 3 x (0,1): higher 2/3, lower 3/10; 3 x (1,0): higher 1, lower 4/10;
        // 1 x (0,2): higher 0; and the imagined one. Slope at weight a:
        let slope = |a: f64| {
            let first = 3.0 * (2.0 / 3.0 - 0.3) / (0.3 + a * (2.0 / 3.0 - 0.3));
            first + 3.0 * 0.6 / (0.4 + a * 0.6) - 2.0 / (1.0 - a)
        };
        let a = model.bigram_weights.0[1];
        assert!(slope(a - 1e-6) > 0.0 && slope(a + 1e-6) < 0.0, "weight {a}");
        // Bucket 2 (context 0 at scoring time, count 4) has no events: it takes bucket 1's.
        let [p1, p2, _] = model.probability(1, 0, 1);
        assert!((p1 - 4.0 / 11.0).abs() < 1e-12);
        assert!((p2 - (a * 0.75 + (1.0 - a) * 4.0 / 11.0)).abs() < 1e-12);
        // Context 2 was seen once: no weight is known for that, so the unigram decides.
        let [p1, p2, p3] = model.probability(0, 2, 0);
        assert_eq!((p1, p2), (5.0 / 11.0, 5.0 / 11.0));
        assert_eq!(p3, p2, "so was context (0, 2)");
    }

    #[test]
    fn a_weight_with_a_closed_form() {
        // 8 occurrences, higher 1, lower 0.4: 8 * 0.6 / (0.4 + 0.6 a) = 1 / (1 - a)
        // gives a = 4.4 / 5.4.
        let mut estimator = WeightEstimator::default();
        estimator.add(4, 4, || 0.4);
        estimator.add(4, 4, || 0.4);
        let weights = estimator.finish();
        assert!((weights.0[1] - 4.4 / 5.4).abs() < 1e-6, "{weights:?}");
        assert_eq!(weights.0[0], 0.0);
        assert_eq!(weights.0[5], weights.0[1]);
    }

    #[test]
    fn probabilities_sum_to_one() {
        let model = NgramModel::fit(&structured(200, 40, 1), MAX_TRAIN_TOKENS).expect("counts");
        let mut most_mixed = 0.0f64;
        for (u, v) in (0..40).flat_map(|u| (0..40).map(move |v| (u, v))) {
            let mut sums = [0.0; 3];
            for w in 0..40 {
                let p = model.probability(u, v, w);
                assert!(p.iter().all(|&p| p > 0.0 && p < 1.0), "{p:?}");
                most_mixed = most_mixed.max((p[2] - p[1]).abs());
                sums.iter_mut().zip(p).for_each(|(sum, p)| *sum += p);
            }
            assert!(
                sums.iter().all(|sum| (sum - 1.0).abs() < 1e-9),
                "{u} {v}: {sums:?}"
            );
        }
        assert!(most_mixed > 0.1, "the trigram adds something");
    }

    #[test]
    fn the_trie_counts_what_a_map_counts() {
        let tokens = structured(50, 40, 2);
        let ids = all(&tokens);
        let n = ids.len();
        let mut counts: BTreeMap<[u32; 3], u32> = BTreeMap::new();
        for i in 0..n {
            let trigram = [ids[(i + n - 2) % n], ids[(i + n - 1) % n], ids[i]];
            *counts.entry(trigram).or_default() += 1;
        }
        let trie = Trie::new(sorted_trigrams(&tokens, n as u64).expect("reads"), 40);
        assert_eq!(trie.third.len(), counts.len());
        for ([u, v, w], &count) in &counts {
            let bigram = trie.bigram(*u as usize, *v).expect("counted");
            let trigram = trie.trigram(bigram, *w).expect("counted");
            assert_eq!(trie.third_counts[trigram], count);
        }
        for u in 0..40 {
            let same = ids.iter().filter(|&&id| id == u).count();
            assert_eq!(trie.first_counts[u as usize] as usize, same);
        }
    }

    #[test]
    fn scores_are_means_over_all_targets_in_circular_context() {
        let (train, valid) = (structured(200, 40, 1), structured(20, 40, 9));
        let measured = Baselines::measure(&train, &valid).expect("measures");
        let model = NgramModel::fit(&train, MAX_TRAIN_TOKENS).expect("counts");
        let ids = all(&valid);
        let n = ids.len();
        let mut sums = [0.0; 3];
        for i in 0..n {
            let p = model.probability(ids[(i + n - 2) % n], ids[(i + n - 1) % n], ids[i]);
            sums.iter_mut()
                .zip(p)
                .for_each(|(sum, p)| *sum -= p.ln() / n as f64);
        }
        let found = [measured.unigram, measured.bigram, measured.trigram];
        for (found, expected) in found.iter().zip(sums) {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
        // The stream is made by a rule on two tokens, so each order must help.
        assert!(measured.trigram < measured.bigram && measured.bigram < measured.unigram);
        assert!(measured.unigram < 40f64.ln() + 0.1);
        assert_eq!(measured.num_train_tokens, train.num_tokens());
    }

    #[test]
    fn the_fitted_weights_beat_their_neighbours_on_left_out_counts() {
        let model = NgramModel::fit(&structured(300, 40, 4), MAX_TRAIN_TOKENS).expect("counts");
        let trie = &model.trie;
        // Bucket 3 of the bigrams, recomputed in f64 from the counts.
        let likelihood = |a: f64| {
            let mut sum = (1.0 - a).ln();
            for v in (0..40).filter(|&v| (8..16).contains(&trie.first_counts[v].saturating_sub(1)))
            {
                for b in trie.bigrams_of(v) {
                    let (w, count) = (trie.second[b] as usize, f64::from(trie.second_counts[b]));
                    let higher = (count - 1.0) / f64::from(trie.first_counts[v] - 1);
                    let lower = f64::from(trie.first_counts[w]) / (trie.num_tokens - 1.0 + 40.0);
                    sum += count * (a * higher + (1.0 - a) * lower).ln();
                }
            }
            sum
        };
        let a = model.bigram_weights.0[3];
        for other in (0..100).map(|i| f64::from(i) / 100.0) {
            assert!(
                likelihood(other) <= likelihood(a) + 1e-6,
                "{other} beats {a}"
            );
        }
    }

    #[test]
    fn long_streams_are_cut_and_say_so() {
        let train = structured(50, 40, 2);
        let model = NgramModel::fit(&train, 100).expect("counts");
        assert_eq!(model.score(&train).expect("scores").num_train_tokens, 100);
        assert_eq!(model.trie.third_counts.iter().sum::<u32>(), 100);
    }

    #[test]
    fn different_vocabularies_and_huge_ones_are_refused() {
        let small = token_set(&[vec![1]], 3);
        let large = token_set(&[vec![1]], (1 << 21) + 1);
        let why = Baselines::measure(&small, &large)
            .expect_err("they differ")
            .to_string();
        assert!(why.contains("a vocabulary of 3"), "{why}");
        let why = Baselines::measure(&large, &large).expect_err("too large");
        assert!(why.to_string().contains("fewer entries"), "{why}");
    }

    #[test]
    fn a_stream_of_one_token_has_finite_losses() {
        let one = token_set(&[vec![]], 3);
        let measured = Baselines::measure(&one, &one).expect("measures");
        assert!((measured.unigram - 2f64.ln()).abs() < 1e-12);
        assert_eq!(measured.trigram, measured.unigram);
    }
}
