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
    /// Train documents whose exact text is also held out; only files that the user
    /// names can cause it.
    pub exact_duplicates: Vec<usize>,
}

impl Split {
    /// Holds out about `valid_fraction` of the documents, chosen by `seed` and content.
    ///
    /// # Errors
    /// A fraction outside (0, 1), and a side without documents.
    pub fn by_fraction(corpus: &Corpus, valid_fraction: f64, seed: u64) -> Result<Self, DataError> {
        if !(valid_fraction > 0.0 && valid_fraction < 1.0) {
            return Err(bad_split(format!(
                "valid_fraction is {valid_fraction}; it must lie between 0 and 1, \
                 for example 0.05"
            )));
        }
        let is_valid = |text: &str| unit_interval(seed, text) < valid_fraction;
        let split = Self::from_sides(corpus, |index| is_valid(&corpus.documents[index].text));
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
    /// A file that is not a source, and a side without documents.
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
        let split = Self::from_sides(corpus, |index| {
            is_valid_source[corpus.documents[index].source]
        });
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
    /// When nothing is left to train on.
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
        Ok(Self {
            train_hash: list_hash(train.iter().map(|&d| text_hash(corpus, d))),
            exact_duplicates: keep(self.exact_duplicates),
            train,
            ..self
        })
    }

    fn from_sides(corpus: &Corpus, is_valid: impl Fn(usize) -> bool) -> Self {
        let all = 0..corpus.documents.len();
        let (valid, train): (Vec<usize>, Vec<usize>) = all.partition(|&d| is_valid(d));
        let hashes =
            |side: &[usize]| -> Vec<Hash> { side.iter().map(|&d| text_hash(corpus, d)).collect() };
        let (train_hashes, valid_hashes) = (hashes(&train), hashes(&valid));
        let held_out: HashSet<Hash> = valid_hashes.iter().copied().collect();
        let exact_duplicates = train.iter().zip(&train_hashes);
        Self {
            exact_duplicates: exact_duplicates
                .filter(|(_, hash)| held_out.contains(hash))
                .map(|(&d, _)| d)
                .collect(),
            train_hash: list_hash(train_hashes.into_iter()),
            valid_hash: list_hash(valid_hashes.into_iter()),
            train,
            valid,
        }
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

fn text_hash(corpus: &Corpus, document: usize) -> Hash {
    blake3::hash(corpus.documents[document].text.as_bytes())
}

fn list_hash(hashes: impl Iterator<Item = Hash>) -> String {
    let mut hasher = blake3::Hasher::new();
    for hash in hashes {
        hasher.update(hash.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Document;

    fn corpus(texts: &[String]) -> Corpus {
        let documents = texts.iter().map(|text| Document {
            source: 0,
            offset: 0,
            text: text.clone(),
            conversation: None,
        });
        Corpus {
            documents: documents.collect(),
            ..Corpus::default()
        }
    }

    fn numbered(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|i| format!("document {i}")).collect()
    }

    #[test]
    fn the_fraction_is_about_right_and_covers_all() {
        let corpus = corpus(&numbered(0..4000));
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
        let before = Split::by_fraction(&corpus(&small), 0.3, 1).expect("splits");
        let after = Split::by_fraction(&corpus(&large), 0.3, 1).expect("splits");
        let moved: Vec<usize> = before.valid.iter().map(|d| d + 100).collect();
        let kept: Vec<usize> = after.valid.into_iter().filter(|&d| d >= 100).collect();
        assert_eq!(moved, kept);
    }

    #[test]
    fn identical_texts_land_together() {
        let mut texts = numbered(0..100);
        texts.extend(numbered(0..100));
        let split = Split::by_fraction(&corpus(&texts), 0.4, 9).expect("splits");
        for d in &split.valid {
            assert!(split.valid.contains(&((d + 100) % 200)));
        }
    }

    #[test]
    fn hashes_follow_content_and_order() {
        let texts = ["a", "b", "c", "d", "e", "f", "g", "h"].map(str::to_owned);
        let split = Split::by_fraction(&corpus(&texts), 0.5, 2).expect("splits");
        let bytes: Vec<u8> = split
            .valid
            .iter()
            .flat_map(|&d| *blake3::hash(texts[d].as_bytes()).as_bytes())
            .collect();
        assert_eq!(split.valid_hash, blake3::hash(&bytes).to_hex().as_str());
        let mut changed = texts.clone();
        changed.reverse();
        let reversed = Split::by_fraction(&corpus(&changed), 0.5, 2).expect("splits");
        assert_eq!(reversed.valid.len(), split.valid.len());
        assert_ne!(reversed.train_hash, split.train_hash);
    }

    #[test]
    fn a_side_without_documents_is_refused() {
        let one = corpus(&numbered(0..1));
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
