//! One bit for each token of a stream: whether it is a target.

/// Which tokens of a stream are targets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TargetBits {
    /// Token `i` is bit `i % 64` of word `i / 64`; the bits behind the last token are 0.
    words: Vec<u64>,
    num_tokens: u64,
    num_targets: u64,
}

impl TargetBits {
    /// From the words of a token file; `None` if they do not fit `num_tokens`.
    pub(super) fn from_words(words: Vec<u64>, num_tokens: u64) -> Option<Self> {
        let rest = num_tokens % 64;
        let fits = words.len() as u64 == num_tokens.div_ceil(64);
        let is_clean = rest == 0 || words.last().is_some_and(|last| last >> rest == 0);
        let num_targets = words.iter().map(|word| u64::from(word.count_ones())).sum();
        (fits && is_clean).then_some(Self {
            words,
            num_tokens,
            num_targets,
        })
    }

    /// The bits as a token file stores them.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many tokens are targets.
    pub(super) fn num_targets(&self) -> u64 {
        self.num_targets
    }

    /// Appends a token.
    pub(super) fn push(&mut self, is_target: bool) {
        let bit = self.num_tokens % 64;
        if bit == 0 {
            self.words.push(0);
        }
        if let Some(word) = self.words.last_mut() {
            *word |= u64::from(is_target) << bit;
        }
        self.num_tokens += 1;
        self.num_targets += u64::from(is_target);
    }

    /// Whether the token at `position`, which lies in the stream, is a target.
    pub(super) fn at(&self, position: u64) -> bool {
        self.words[(position / 64) as usize] >> (position % 64) & 1 == 1
    }
}
