//! Which documents are held out: decided first, by document, from content alone.
//!
//! By fraction, a document is held out when the first 64 bits of
//! `blake3(seed || text)` fall below `valid_fraction`. So identical texts are always on
//! the same side, and a document keeps its side when others are added or reordered.
//! By files, the documents of the named files are held out.

use super::{Corpus, DataError};
use blake3::Hash;
use std::{collections::HashSet, fs, path::PathBuf};

/// Train and held-out documents, as indices into [`Corpus::documents`], ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Documents to train on.
    pub train: Vec<usize>,
    /// Held-out documents.
    pub valid: Vec<usize>,
    /// blake3 (hex) over the blake3 hashes of the train documents, in order.
    pub train_hash: String,
    /// blake3 (hex) over the blake3 hashes of the held-out documents, in order.
    pub valid_hash: String,
    /// Train documents whose exact text is also held out, ascending; only files that the
    /// user names can cause it.
    pub exact_duplicates: Vec<usize>,
}

impl Split {
    /// Holds out about `valid_fraction` of the documents, chosen by `seed` and content.
    ///
    /// # Errors
    /// A fraction outside (0, 1), a side without documents, and a text that cannot be read.
    pub fn by_fraction(corpus: &Corpus, valid_fraction: f64, seed: u64) -> Result<Self, DataError> {
        if !(valid_fraction > 0.0 && valid_fraction < 1.0) {
            return Err(bad_split(format!(
                "valid_fraction is {valid_fraction}; it must lie between 0 and 1, \
                 for example 0.05"
            )));
        }
        let (mut train, mut valid) = (Side::default(), Side::default());
        let mut reader = corpus.reader();
        for index in 0..corpus.documents.len() {
            let text = reader.read(index)?.text;
            let side = match unit_interval(seed, &text) < valid_fraction {
                true => &mut valid,
                false => &mut train,
            };
            side.push(index, text_hash(&text));
        }
        // The side follows from the text, so no text is on both.
        let split = Self::from_sides(train, valid, Vec::new());
        let (num_train, num_valid) = (split.train.len(), split.valid.len());
        if num_train == 0 || num_valid == 0 {
            return Err(bad_split(format!(
                "valid_fraction {valid_fraction} of {} document(s) gives {num_train} to train on \
                 and {num_valid} held out; name held-out files, cut the text into more documents \
                 (split_on), or change the fraction or the seed",
                corpus.documents.len()
            )));
        }
        Ok(split)
    }

    /// Holds out the documents of `valid_files`, which must be among the corpus's
    /// sources (under any spelling of their paths).
    ///
    /// # Errors
    /// A file that is not a source, a side without documents, and a text that cannot be read.
    pub fn by_files(corpus: &Corpus, valid_files: &[PathBuf]) -> Result<Self, DataError> {
        let canonical =
            |path: &PathBuf| fs::canonicalize(path).map_err(DataError::io("read", path));
        let sources = corpus
            .sources
            .iter()
            .map(canonical)
            .collect::<Result<Vec<_>, _>>()?;
        let mut is_valid_source = vec![false; sources.len()];
        for file in valid_files {
            let file_canonical = canonical(file)?;
            let source = sources.iter().position(|s| *s == file_canonical);
            let source = source.ok_or_else(|| {
                let file = file.display();
                bad_split(format!("held-out file {file} is not among the files read"))
            })?;
            is_valid_source[source] = true;
        }
        let is_valid = |&d: &usize| is_valid_source[corpus.documents[d].source as usize];
        let (valid_list, train_list): (Vec<usize>, Vec<usize>) =
            (0..corpus.documents.len()).partition(is_valid);
        let mut reader = corpus.reader();
        let (mut train, mut valid) = (Side::default(), Side::default());
        let mut held_out = HashSet::new();
        for index in valid_list {
            let hash = text_hash(&reader.read(index)?.text);
            held_out.insert(hash);
            valid.push(index, hash);
        }
        let mut exact_duplicates = Vec::new();
        for index in train_list {
            let hash = text_hash(&reader.read(index)?.text);
            if held_out.contains(&hash) {
                exact_duplicates.push(index);
            }
            train.push(index, hash);
        }
        let split = Self::from_sides(train, valid, exact_duplicates);
        if split.valid.is_empty() {
            let reason = "the held-out files hold no document; name files that hold text";
            return Err(bad_split(reason.to_owned()));
        }
        if split.train.is_empty() {
            let reason = "every document is held out; name other files to train on";
            return Err(bad_split(reason.to_owned()));
        }
        Ok(split)
    }

    /// The split without the train documents in `drop`.
    ///
    /// # Errors
    /// When nothing is left to train on, or a text cannot be read.
    pub fn without_train(self, corpus: &Corpus, drop: &[usize]) -> Result<Self, DataError> {
        let drop: HashSet<usize> = drop.iter().copied().collect();
        let num_train = self.train.len();
        let keep = |list: Vec<usize>| -> Vec<usize> {
            list.into_iter().filter(|d| !drop.contains(d)).collect()
        };
        let train = keep(self.train);
        if train.is_empty() {
            return Err(bad_split(format!(
                "all {num_train} train document(s) share text with held-out ones; cut the text \
                 into smaller documents (split_on), hold out other files, or keep duplicates"
            )));
        }
        let (mut side, mut reader) = (Side::default(), corpus.reader());
        for index in train {
            side.push(index, text_hash(&reader.read(index)?.text));
        }
        Ok(Self {
            train_hash: side.hash(),
            exact_duplicates: keep(self.exact_duplicates),
            train: side.documents,
            ..self
        })
    }

    fn from_sides(train: Side, valid: Side, exact_duplicates: Vec<usize>) -> Self {
        Self {
            train_hash: train.hash(),
            valid_hash: valid.hash(),
            train: train.documents,
            valid: valid.documents,
            exact_duplicates,
        }
    }
}

/// One side while it is put together.
#[derive(Default)]
struct Side {
    documents: Vec<usize>,
    /// Over the hashes of their texts.
    hasher: blake3::Hasher,
}

impl Side {
    fn push(&mut self, document: usize, hash: Hash) {
        self.documents.push(document);
        self.hasher.update(hash.as_bytes());
    }

    fn hash(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

fn bad_split(reason: String) -> DataError {
    DataError::BadSplit { reason }
}

/// The place of a text in [0, 1), fixed by the seed and the content.
fn unit_interval(seed: u64, text: &str) -> f64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(text.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    // The top 53 bits are exact in an f64.
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

fn text_hash(text: &str) -> Hash {
    blake3::hash(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::corpus::tests::Texts;

    fn numbered(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|i| format!("document {i}")).collect()
    }

    #[test]
    fn the_fraction_is_about_right_and_covers_all() {
        let corpus = Texts::new(&numbered(0..4000));
        let split = Split::by_fraction(&corpus, 0.1, 5).expect("splits");
        let mut all = [split.train.clone(), split.valid.clone()].concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..4000));
        // Five standard deviations of a binomial(4000, 0.1).
        assert!(
            split.valid.len().abs_diff(400) < 95,
            "{}",
            split.valid.len()
        );
        assert!(split.exact_duplicates.is_empty());
        assert_ne!(split, Split::by_fraction(&corpus, 0.1, 6).expect("splits"));
    }

    #[test]
    fn a_document_keeps_its_side_when_others_come() {
        let small = numbered(0..200);
        let mut large = numbered(200..300);
        large.extend(small.clone());
        let before = Split::by_fraction(&Texts::new(&small), 0.3, 1).expect("splits");
        let after = Split::by_fraction(&Texts::new(&large), 0.3, 1).expect("splits");
        let moved: Vec<usize> = before.valid.iter().map(|d| d + 100).collect();
        let kept: Vec<usize> = after.valid.into_iter().filter(|&d| d >= 100).collect();
        assert_eq!(moved, kept);
    }

    #[test]
    fn identical_texts_land_together() {
        let mut texts = numbered(0..100);
        texts.extend(numbered(0..100));
        let split = Split::by_fraction(&Texts::new(&texts), 0.4, 9).expect("splits");
        for d in &split.valid {
            assert!(split.valid.contains(&((d + 100) % 200)));
        }
    }

    #[test]
    fn hashes_follow_content_and_order() {
        let texts = ["a", "b", "c", "d", "e", "f", "g", "h"].map(str::to_owned);
        let split = Split::by_fraction(&Texts::new(&texts), 0.5, 2).expect("splits");
        let bytes: Vec<u8> = split
            .valid
            .iter()
            .flat_map(|&d| *blake3::hash(texts[d].as_bytes()).as_bytes())
            .collect();
        assert_eq!(split.valid_hash, blake3::hash(&bytes).to_hex().as_str());
        let mut changed = texts.clone();
        changed.reverse();
        let reversed = Split::by_fraction(&Texts::new(&changed), 0.5, 2).expect("splits");
        assert_eq!(reversed.valid.len(), split.valid.len());
        assert_ne!(reversed.train_hash, split.train_hash);
    }

    #[test]
    fn a_side_without_documents_is_refused() {
        let one = Texts::new(&numbered(0..1));
        for fraction in [0.001, 0.999] {
            let why = Split::by_fraction(&one, fraction, 0).expect_err("one document");
            assert!(why.to_string().contains("of 1 document(s)"), "{why}");
        }
        for fraction in [0.0, 1.0, -1.0, f64::NAN] {
            let why = Split::by_fraction(&one, fraction, 0).expect_err("bad fraction");
            assert!(why.to_string().contains("between 0 and 1"), "{why}");
        }
    }

    #[test]
    fn named_files_are_held_out_and_their_duplicates_reported() {
        let name = format!("setun-split-files-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).expect("temporary folder");
        fs::write(folder.join("a.txt"), "one\n\nshared\n\nthree").expect("file");
        fs::write(folder.join("v.txt"), "shared\n\nheld out").expect("file");
        let load = |sources: &[&str]| {
            let sources: Vec<String> = sources.iter().map(|&s| s.to_owned()).collect();
            let options = crate::data::DocumentOptions::default();
            crate::data::load_documents(&sources, &folder, &options).expect("reads")
        };
        let both = load(&["a.txt", "v.txt"]);
        let own_name = folder.file_name().expect("it was named above");
        let other_spelling = folder.join("..").join(own_name).join("v.txt");
        let split = Split::by_files(&both, &[other_spelling]).expect("splits");
        assert_eq!(
            (&split.train[..], &split.valid[..]),
            (&[0, 1, 2][..], &[3, 4][..])
        );
        assert_eq!(split.exact_duplicates, [1]);
        let cleaned = split
            .clone()
            .without_train(&both, &[1])
            .expect("two remain");
        assert_eq!(cleaned.train, [0, 2]);
        assert!(cleaned.exact_duplicates.is_empty());
        assert_ne!(cleaned.train_hash, split.train_hash);
        assert_eq!(cleaned.valid_hash, split.valid_hash);
        assert!(split.without_train(&both, &[0, 1, 2]).is_err());

        let only = load(&["v.txt"]);
        let message = |corpus, file: &str| {
            let why = Split::by_files(corpus, &[folder.join(file)]).expect_err("refused");
            why.to_string()
        };
        assert!(message(&only, "v.txt").contains("every document is held out"));
        assert!(message(&only, "a.txt").contains("not among the files read"));
        let _ = fs::remove_dir_all(&folder);
    }
}
