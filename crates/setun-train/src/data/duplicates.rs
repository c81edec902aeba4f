//! Near-duplicates across the split: 13-grams of words that both sides have.
//!
//! Words are split at white space, lower-cased and stripped of everything but letters
//! and digits, as in the contamination checks of GPT-3 (Brown et al. 2020, appendix C).
//! Grams are compared as 64-bit hashes: with 10^6 held-out and 10^8 train grams, the
//! chance of a single false match is about 5 in 10^6. Only the held-out grams are kept in
//! memory; the train documents stream past. Documents with fewer than 13 words have no
//! gram; exact copies among them are found by [`super::Split`]. Of a conversation only the
//! answers count.

use super::{Corpus, DataError, Split, Text, mix64};
use std::iter;

/// Words in a gram.
pub const GRAM_WORDS: usize = 13;

/// Odd multiplier of the rolling hash over word hashes.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Text that occurs on both sides of a split.
#[derive(Clone, Debug, PartialEq)]
pub struct Overlap {
    /// For each held-out document, in the split's order, the share of its grams that
    /// occur in the train documents; `None` when it has fewer than 13 words.
    pub valid_shares: Vec<Option<f64>>,
    /// Train documents that share at least one gram with a held-out one, ascending.
    pub train_documents: Vec<usize>,
}

impl Overlap {
    /// Compares both sides of `split`.
    ///
    /// # Errors
    /// A text that cannot be read.
    pub fn find(corpus: &Corpus, split: &Split) -> Result<Self, DataError> {
        let (mut hasher, mut reader) = (GramHasher::default(), corpus.reader());
        let mut grams = Vec::new();
        for &document in &split.valid {
            hasher.learned(&reader.read(document)?, |gram| grams.push(gram));
        }
        let mut known = GramTable::new(grams);
        let mut train_documents = Vec::new();
        for &document in &split.train {
            let mut num_shared = 0usize;
            hasher.learned(&reader.read(document)?, |gram| {
                num_shared += usize::from(known.mark(gram));
            });
            if num_shared > 0 {
                train_documents.push(document);
            }
        }
        let share = |&document: &usize| {
            let (mut num_grams, mut num_seen) = (0usize, 0usize);
            hasher.learned(&reader.read(document)?, |gram| {
                num_grams += 1;
                num_seen += usize::from(known.is_marked(gram));
            });
            Ok((num_grams > 0).then(|| num_seen as f64 / num_grams as f64))
        };
        Ok(Self {
            valid_shares: split
                .valid
                .iter()
                .map(share)
                .collect::<Result<_, DataError>>()?,
            train_documents,
        })
    }

    /// Held-out documents with at least one gram that the train documents have.
    pub fn num_valid_touched(&self) -> usize {
        self.valid_shares
            .iter()
            .flatten()
            .filter(|&&s| s > 0.0)
            .count()
    }

    /// Held-out documents with more than half of their grams in the train documents.
    pub fn num_valid_mostly_known(&self) -> usize {
        self.valid_shares
            .iter()
            .flatten()
            .filter(|&&s| s > 0.5)
            .count()
    }

    /// Held-out documents that are too short to be compared.
    pub fn num_valid_too_short(&self) -> usize {
        self.valid_shares.iter().filter(|s| s.is_none()).count()
    }

    /// The train documents to drop, so that no gram is on both sides; for
    /// [`Split::without_train`].
    pub fn train_to_drop(&self) -> &[usize] {
        &self.train_documents
    }

    /// For each of the held-out `documents` the train document that has most of its grams,
    /// the first of equals, with the share that it has; `None` where none has any.
    ///
    /// # Errors
    /// A text that cannot be read.
    pub fn nearest(
        &self,
        corpus: &Corpus,
        documents: &[usize],
    ) -> Result<Vec<Option<(usize, f64)>>, DataError> {
        let mut nearest = vec![None; documents.len()];
        if documents.is_empty() {
            return Ok(nearest);
        }
        let (mut hasher, mut reader) = (GramHasher::default(), corpus.reader());
        let mut held_out = Vec::new();
        for &document in documents {
            held_out.push(hasher.distinct(&reader.read(document)?));
        }
        for &document in &self.train_documents {
            let known = hasher.distinct(&reader.read(document)?);
            for (grams, nearest) in held_out.iter().zip(&mut nearest) {
                let is_known = |gram: &&u64| known.binary_search(gram).is_ok();
                let num_known = grams.iter().filter(is_known).count();
                let share = num_known as f64 / grams.len().max(1) as f64;
                if share > nearest.map_or(0.0, |(_, best)| best) {
                    *nearest = Some((document, share));
                }
            }
        }
        Ok(nearest)
    }
}

/// Hashes of the 13-grams of a text, with a buffer that serves one text after another.
#[derive(Default)]
struct GramHasher {
    words: Vec<u64>,
}

impl GramHasher {
    /// Calls `visit` with the hash of each gram of `text`, in order.
    fn for_each(&mut self, text: &str, mut visit: impl FnMut(u64)) {
        self.words.clear();
        self.words
            .extend(text.split_whitespace().filter_map(word_hash));
        // Polynomial in MULTIPLIER over the window; the oldest word has this power.
        let oldest = iter::repeat_n(MULTIPLIER, GRAM_WORDS - 1).fold(1u64, u64::wrapping_mul);
        let mut rolling = 0u64;
        for (i, &word) in self.words.iter().enumerate() {
            if i >= GRAM_WORDS {
                let leaving = self.words[i - GRAM_WORDS].wrapping_mul(oldest);
                rolling = rolling.wrapping_sub(leaving);
            }
            rolling = rolling.wrapping_mul(MULTIPLIER).wrapping_add(word);
            if i + 1 >= GRAM_WORDS {
                visit(mix64(rolling));
            }
        }
    }

    /// As [`GramHasher::for_each`], for what is learned of `text`: of a conversation each
    /// answer. What its template writes, and a system prompt, is the same in all.
    fn learned(&mut self, text: &Text, mut visit: impl FnMut(u64)) {
        match &text.conversation {
            None => self.for_each(&text.text, visit),
            Some(conversation) => {
                for target in &conversation.targets {
                    self.for_each(&text.text[target.clone()], &mut visit);
                }
            }
        }
    }

    /// The different grams of what is learned of `text`, ascending.
    fn distinct(&mut self, text: &Text) -> Vec<u64> {
        let mut grams = Vec::new();
        self.learned(text, |gram| grams.push(gram));
        grams.sort_unstable();
        grams.dedup();
        grams
    }
}

/// Hash of a word's lower-cased letters and digits (FNV-1a, then mixed); `None` for a
/// word of punctuation only.
fn word_hash(word: &str) -> Option<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut is_empty = true;
    for c in word.chars().filter(|c| c.is_alphanumeric()) {
        for lower in c.to_lowercase() {
            hash = (hash ^ u64::from(lower)).wrapping_mul(0x100_0000_01b3);
            is_empty = false;
        }
    }
    (!is_empty).then(|| mix64(hash))
}

/// A set of hashes, each with a mark: sorted, with an index of the top bits, so that a
/// lookup touches one or two cache lines.
struct GramTable {
    hashes: Vec<u64>,
    marks: Vec<bool>,
    /// `starts[b]..starts[b + 1]` are the hashes with top bits `b`.
    starts: Vec<usize>,
    shift: u32,
}

impl GramTable {
    fn new(mut hashes: Vec<u64>) -> Self {
        hashes.sort_unstable();
        hashes.dedup();
        let bits = hashes.len().max(2).ilog2().min(24);
        let shift = u64::BITS - bits;
        let mut starts = vec![0usize; (1 << bits) + 1];
        for hash in &hashes {
            starts[(hash >> shift) as usize + 1] += 1;
        }
        for b in 1..starts.len() {
            starts[b] += starts[b - 1];
        }
        Self {
            marks: vec![false; hashes.len()],
            hashes,
            starts,
            shift,
        }
    }

    fn position(&self, hash: u64) -> Option<usize> {
        let bucket = (hash >> self.shift) as usize;
        let (from, to) = (self.starts[bucket], self.starts[bucket + 1]);
        let found = self.hashes[from..to].binary_search(&hash);
        found.ok().map(|i| from + i)
    }

    /// Marks `hash`; whether it is in the set.
    fn mark(&mut self, hash: u64) -> bool {
        let position = self.position(hash);
        if let Some(i) = position {
            self.marks[i] = true;
        }
        position.is_some()
    }

    fn is_marked(&self, hash: u64) -> bool {
        self.position(hash).is_some_and(|i| self.marks[i])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::corpus::tests::Texts;
    use std::collections::HashSet;

    /// Words `name0 name1 ...` for the numbers in `range`.
    fn words(name: &str, range: std::ops::Range<usize>) -> String {
        let list: Vec<String> = range.map(|i| format!("{name}{i}")).collect();
        list.join(" ")
    }

    fn overlap(train: &[String], valid: &[String]) -> Overlap {
        with_corpus(train, valid).1
    }

    fn with_corpus(train: &[String], valid: &[String]) -> (Texts, Overlap) {
        let corpus = Texts::new(&[train, valid].concat());
        let split = Split {
            train: (0..train.len()).collect(),
            valid: (train.len()..train.len() + valid.len()).collect(),
            train_hash: String::new(),
            valid_hash: String::new(),
            exact_duplicates: Vec::new(),
        };
        let overlap = Overlap::find(&corpus, &split).expect("reads");
        (corpus, overlap)
    }

    /// Share of `valid`'s grams in `train`, with the grams as lists of words.
    fn share_by_hand(train: &[String], valid: &str) -> f64 {
        let list = |text: &str| -> Vec<String> {
            let clean = |w: &str| {
                w.chars()
                    .filter(|c| c.is_alphanumeric())
                    .collect::<String>()
            };
            let lower = text.split_whitespace().map(|w| clean(w).to_lowercase());
            lower.filter(|w| !w.is_empty()).collect()
        };
        let mut known: HashSet<Vec<String>> = HashSet::new();
        for text in train {
            known.extend(list(text).windows(GRAM_WORDS).map(<[String]>::to_vec));
        }
        let valid = list(valid);
        let grams: Vec<_> = valid.windows(GRAM_WORDS).collect();
        let seen = grams.iter().filter(|g| known.contains(**g)).count();
        seen as f64 / grams.len() as f64
    }

    #[test]
    fn case_punctuation_and_spacing_do_not_matter() {
        let valid = "The quick, brown fox -- jumps over the lazy dog; then it sleeps a while.";
        let train = "it said: THE QUICK brown\nfox jumps over \"the\" lazy dog, then it sleeps a";
        let found = overlap(&[train.to_owned()], &[valid.to_owned()]);
        // 14 words make two grams; the train text lacks the last word.
        assert_eq!(found.valid_shares, [Some(0.5)]);
        assert_eq!(found.train_to_drop(), [0]);
        assert_eq!(
            (found.num_valid_touched(), found.num_valid_mostly_known()),
            (1, 0)
        );
    }

    #[test]
    fn twelve_shared_words_are_no_overlap() {
        let valid = format!("{} end", words("w", 0..12));
        let train = format!("{} other", words("w", 0..12));
        let found = overlap(&[train], &[valid]);
        assert_eq!(found.valid_shares, [Some(0.0)]);
        assert!(found.train_documents.is_empty());
    }

    #[test]
    fn shares_equal_a_count_by_hand() {
        let train = [
            words("a", 0..100),
            words("b", 0..50),
            format!("{} {}", words("c", 0..20), words("a", 90..100)),
            words("d", 0..5),
        ];
        let valid = [
            words("a", 40..140),
            words("z", 0..40),
            words("b", 0..50),
            words("c", 3..16),
            words("b", 0..12),
        ];
        let found = overlap(&train, &valid);
        for (text, share) in valid.iter().zip(&found.valid_shares).take(4) {
            assert_eq!(*share, Some(share_by_hand(&train, text)), "{text}");
        }
        assert_eq!(found.valid_shares[4], None);
        assert_eq!(found.train_documents, [0, 1, 2]);
        assert_eq!(found.num_valid_touched(), 3);
        assert_eq!(found.num_valid_mostly_known(), 3);
        assert_eq!(found.num_valid_too_short(), 1);
    }

    #[test]
    fn each_document_has_its_own_nearest_one() {
        let train = [
            words("a", 0..60),
            format!("{} {}", words("a", 0..20), words("b", 0..60)),
            words("b", 30..90),
        ];
        let valid = [
            words("b", 0..40),
            words("a", 0..40),
            words("z", 0..40),
            words("b", 47..60),
        ];
        let (corpus, found) = with_corpus(&train, &valid);
        let nearest = found.nearest(&corpus, &[3, 4, 5, 6]).expect("reads");
        assert_eq!(
            nearest,
            [Some((1, 1.0)), Some((0, 1.0)), None, Some((1, 1.0))]
        );
        let none = found.nearest(&corpus, &[]).expect("nothing to read");
        assert!(none.is_empty());
    }

    #[test]
    fn dropping_what_was_found_leaves_no_overlap() {
        let train = [words("a", 0..60), words("b", 0..60), words("c", 0..60)];
        let valid = [format!("{} {}", words("b", 20..40), words("q", 0..20))];
        let found = overlap(&train, &valid);
        assert_eq!(found.train_to_drop(), [1]);
        let kept = [train[0].clone(), train[2].clone()];
        assert_eq!(overlap(&kept, &valid).num_valid_touched(), 0);
    }

    #[test]
    fn the_table_finds_what_it_holds_and_nothing_else() {
        let hashes: Vec<u64> = (0..5000).map(mix64).collect();
        let mut table = GramTable::new([hashes.clone(), hashes.clone()].concat());
        assert_eq!(table.hashes.len(), 5000);
        assert!(hashes[..2500].iter().all(|&h| table.mark(h)));
        assert!(hashes[2500..].iter().all(|&h| !table.is_marked(h)));
        assert!((5000..9000).all(|i| !table.mark(mix64(i))));
        assert!(!GramTable::new(Vec::new()).mark(7));
    }
}
