//! How much a sample copies from the training text and how much it repeats itself.

use std::collections::{BTreeMap, BTreeSet};

use super::record::Sample;

/// Length of the n-grams of [`repetition_rate`].
const NGRAM: usize = 4;

/// A sample with its longest verbatim match in `training` (documents; a match does not
/// cross their borders) and its repetition rate over words.
pub fn measure_sample<'a>(
    prompt: String,
    text: String,
    decoding: String,
    training: impl IntoIterator<Item = &'a str>,
) -> Sample {
    let (match_chars, match_text) = longest_verbatim_match(&text, training);
    let words: Vec<&str> = text.split_whitespace().collect();
    let repetition_rate = repetition_rate(&words);
    Sample {
        prompt,
        text,
        decoding,
        match_chars,
        match_text,
        repetition_rate,
    }
}

/// The longest piece of `sample` that occurs in one of the documents: its length in characters
/// and its text (the earliest in the documents among equals). Linear in the length of both.
pub fn longest_verbatim_match<'a>(
    sample: &str,
    documents: impl IntoIterator<Item = &'a str>,
) -> (usize, String) {
    let automaton = SuffixAutomaton::new(sample);
    let mut best = Match { chars: 0, end: 0 };
    for document in documents {
        automaton.scan(document, &mut best);
    }
    let text = sample
        .chars()
        .skip(best.end - best.chars)
        .take(best.chars)
        .collect();
    (best.chars, text)
}

/// Share of the 4-grams of `items` (token ids or words) that occurred before in `items`;
/// 0 for fewer than five items.
pub fn repetition_rate<T: Ord>(items: &[T]) -> f64 {
    let mut seen = BTreeSet::new();
    let num_ngrams = items.windows(NGRAM).len();
    let num_repeated = items
        .windows(NGRAM)
        .filter(|ngram| !seen.insert(*ngram))
        .count();
    num_repeated as f64 / num_ngrams.max(1) as f64
}

/// A piece of the sample: its length and the end of one of its places, in characters.
#[derive(Clone, Copy)]
struct Match {
    chars: usize,
    end: usize,
}

/// Every piece of a sample as a path from state 0 (Blumer et al. 1985). It has fewer than
/// two states per character, and a table of transitions over the sample's own alphabet, so
/// that a long text is scanned at one table look-up per character.
struct SuffixAutomaton {
    alphabet: Alphabet,
    states: Vec<State>,
    /// `[states, alphabet]`; [`NO_STATE`] where the sample has no such piece.
    next: Vec<u32>,
}

#[derive(Clone, Copy)]
struct State {
    /// Length of the state's longest piece.
    longest: usize,
    /// State of the longest suffix that occurs in more places.
    link: u32,
    /// End of the first place of the state's pieces.
    end: usize,
}

/// State 0 is the start and no transition leads to it, so 0 says "none".
const NO_STATE: u32 = 0;

impl SuffixAutomaton {
    fn new(sample: &str) -> Self {
        let alphabet = Alphabet::new(sample);
        let start = State {
            longest: 0,
            link: NO_STATE,
            end: 0,
        };
        let next = vec![NO_STATE; alphabet.len()];
        let mut automaton = Self {
            alphabet,
            states: vec![start],
            next,
        };
        let mut last = 0;
        for c in sample.chars() {
            // Every character of the sample is in its alphabet; else nothing is added.
            if let Some(letter) = automaton.alphabet.letter(c) {
                last = automaton.extend(last, letter);
            }
        }
        automaton
    }

    /// Appends one letter after state `last`, the state of the whole sample so far.
    fn extend(&mut self, last: u32, letter: usize) -> u32 {
        let end = self.states[last as usize].longest + 1;
        let whole = self.push(State {
            longest: end,
            link: 0,
            end,
        });
        let mut from = last;
        loop {
            let target = self.next(from, letter);
            if target != NO_STATE {
                let link = self.split(from, target, letter);
                self.states[whole as usize].link = link;
                return whole;
            }
            self.set_next(from, letter, whole);
            if from == 0 {
                return whole;
            }
            from = self.states[from as usize].link;
        }
    }

    /// The state of the piece that leads from `from` by `letter`: `target` itself, or, when
    /// `target` also has longer pieces, a copy for the shorter ones.
    fn split(&mut self, from: u32, target: u32, letter: usize) -> u32 {
        let longest = self.states[from as usize].longest + 1;
        if self.states[target as usize].longest == longest {
            return target;
        }
        let copy = self.push(State {
            longest,
            ..self.states[target as usize]
        });
        let width = self.alphabet.len();
        let row = target as usize * width;
        self.next
            .copy_within(row..row + width, copy as usize * width);
        self.states[target as usize].link = copy;
        let mut from = from;
        while self.next(from, letter) == target {
            self.set_next(from, letter, copy);
            if from == 0 {
                break;
            }
            from = self.states[from as usize].link;
        }
        copy
    }

    fn push(&mut self, state: State) -> u32 {
        self.states.push(state);
        self.next
            .resize(self.states.len() * self.alphabet.len(), NO_STATE);
        (self.states.len() - 1) as u32
    }

    fn next(&self, state: u32, letter: usize) -> u32 {
        self.next[state as usize * self.alphabet.len() + letter]
    }

    fn set_next(&mut self, state: u32, letter: usize, target: u32) {
        let width = self.alphabet.len();
        self.next[state as usize * width + letter] = target;
    }

    /// Follows `text` through the automaton, always at the longest piece of the sample that
    /// ends here, and keeps the longest of all in `best`.
    fn scan(&self, text: &str, best: &mut Match) {
        let (mut state, mut length) = (0u32, 0usize);
        for c in text.chars() {
            let Some(letter) = self.alphabet.letter(c) else {
                (state, length) = (0, 0);
                continue;
            };
            let mut target = self.next(state, letter);
            while target == NO_STATE && state != 0 {
                state = self.states[state as usize].link;
                length = self.states[state as usize].longest;
                target = self.next(state, letter);
            }
            if target == NO_STATE {
                continue;
            }
            state = target;
            length += 1;
            if length > best.chars {
                *best = Match {
                    chars: length,
                    end: self.states[state as usize].end,
                };
            }
        }
    }
}

/// The distinct characters of a sample, numbered.
struct Alphabet {
    ascii: [Option<u32>; 128],
    others: BTreeMap<char, u32>,
    len: usize,
}

impl Alphabet {
    fn new(sample: &str) -> Self {
        let letters: BTreeSet<char> = sample.chars().collect();
        let mut alphabet = Self {
            ascii: [None; 128],
            others: BTreeMap::new(),
            len: letters.len(),
        };
        for (number, c) in (0..).zip(letters) {
            match alphabet.ascii.get_mut(c as usize) {
                Some(entry) => *entry = Some(number),
                None => _ = alphabet.others.insert(c, number),
            }
        }
        alphabet
    }

    fn len(&self) -> usize {
        self.len
    }

    fn letter(&self, c: char) -> Option<usize> {
        let number = match self.ascii.get(c as usize) {
            Some(entry) => *entry,
            None => self.others.get(&c).copied(),
        };
        number.map(|number| number as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest common piece by trying them all.
    fn brute_force(sample: &str, text: &str) -> usize {
        let sample: Vec<char> = sample.chars().collect();
        let mut best = 0;
        for start in 0..sample.len() {
            for end in start + best + 1..=sample.len() {
                let piece: String = sample[start..end].iter().collect();
                if text.contains(&piece) {
                    best = end - start;
                }
            }
        }
        best
    }

    /// `length` characters of a small alphabet, with two-byte and four-byte ones.
    fn random_text(length: usize, seed: u64) -> String {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize
        };
        (0..length)
            .map(|_| ['a', 'b', 'é', '😀'][next() % 4])
            .collect()
    }

    #[test]
    fn the_match_is_the_longest() {
        for seed in 0..300 {
            let sample = random_text(seed as usize % 25, seed + 1);
            let text = random_text(60, 1000 + seed);
            let (chars, matched) = longest_verbatim_match(&sample, [text.as_str()]);
            assert_eq!(chars, brute_force(&sample, &text), "{sample} in {text}");
            assert_eq!(matched.chars().count(), chars);
            assert!(sample.contains(&matched) && text.contains(&matched));
        }
    }

    #[test]
    fn matches_of_whole_characters() {
        // Both letters start with the byte 0xC3: a match of bytes would find one.
        assert_eq!(longest_verbatim_match("é", ["ã"]), (0, String::new()));
        let found = longest_verbatim_match("The blue whale sings.", ["A blue whale swims."]);
        assert_eq!(found, (13, " blue whale s".to_owned()));
        assert_eq!(longest_verbatim_match("", ["text"]), (0, String::new()));
        assert_eq!(longest_verbatim_match("text", [""]), (0, String::new()));
        assert_eq!(
            longest_verbatim_match("aaaa", ["aaaaaaaa"]),
            (4, "aaaa".to_owned())
        );
    }

    #[test]
    fn matches_do_not_cross_documents() {
        let found = longest_verbatim_match("abcdef", ["xabc", "defx", "cde"]);
        assert_eq!(found, (3, "abc".to_owned()));
    }

    #[test]
    fn a_long_text_is_scanned_in_linear_time() {
        // Quadratic work here would be 4e10 steps.
        let text = "ab".repeat(1_000_000);
        let sample = "ab".repeat(10_000) + "c";
        assert_eq!(longest_verbatim_match(&sample, [text.as_str()]).0, 20_000);
    }

    #[test]
    fn repetition_counts_fourgrams_that_came_before() {
        assert_eq!(repetition_rate::<u32>(&[]), 0.0);
        assert_eq!(repetition_rate(&[1, 1, 1]), 0.0);
        assert_eq!(repetition_rate(&[1, 2, 3, 4, 5, 6]), 0.0);
        assert_eq!(repetition_rate(&[7; 13]), 0.9);
        // 1234 2341 3412 4123 1234: one of five came before.
        assert_eq!(repetition_rate(&[1, 2, 3, 4, 1, 2, 3, 4]), 0.2);
        let sample = measure_sample(
            "P".to_owned(),
            "a b c d a b c d".to_owned(),
            String::new(),
            ["x b c d y"],
        );
        assert_eq!((sample.repetition_rate, sample.match_chars), (0.2, 7));
        assert_eq!(sample.match_text, " b c d ");
    }
}
