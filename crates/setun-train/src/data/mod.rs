//! From text to batches: documents, the train/held-out split, tokens, windows.
//!
//! The order is fixed, because held-out text must stay held out:
//!
//! 1. [`documents`]: files become documents, conversations ([`chat`]) among them; a
//!    [`corpus`] knows where they are and reads them again when they are needed;
//! 2. [`split`]: documents become train and held-out, by their content alone;
//! 3. [`duplicates`]: text that is on both sides is found and can be dropped;
//! 4. [`tokens`]: each side becomes one token stream, in memory or, when large, in a file;
//! 5. [`batches`]: a training step reads windows of it, a pure function of (seed, step);
//! 6. [`ngram`]: what simple counting reaches on the same tokens.
//!
//! Nothing here depends on time, on thread timing or on the order of a hash map.

pub mod batches;
pub mod chat;
pub mod corpus;
pub mod documents;
pub mod duplicates;
pub mod ngram;
pub mod permutation;
pub mod split;
pub mod tokens;

mod targets;
mod token_file;

pub use batches::{BatchInfo, Batches, EvalBatch, EvalWindows, Segment};
pub use chat::{ChatOptions, Conversation, DataFormat};
pub use corpus::{Corpus, Document, DocumentKind, Reader, ShortDocuments, Text};
pub use documents::{
    DocumentOptions, SplitOn, expand_sources, load_documents, load_documents_with,
};
pub use duplicates::Overlap;
pub use ngram::Baselines;
pub use permutation::Permutation;
pub use split::Split;
pub use tokens::TokenSet;

use setun_formats::TokenizerError;
use std::{
    io,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// Why text or tokens cannot be used; each message names the place and the remedy.
#[derive(Debug, Error)]
pub enum DataError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb ("read", "write").
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A source names nothing that exists.
    #[error("no file or folder at {}: correct the path", base.join(path).display())]
    Missing {
        /// The path that was looked for.
        path: PathBuf,
        /// Folder that relative sources start from.
        base: PathBuf,
    },
    /// A glob or a folder holds no file to read.
    #[error("{place} holds no {expected}: add one, or name the files themselves")]
    NoFiles {
        /// The glob or the folder.
        place: String,
        /// What was looked for.
        expected: &'static str,
    },
    /// A glob does not parse.
    #[error("bad glob {pattern:?}: {reason}; to name a file literally, write [ as [[]")]
    BadGlob {
        /// The glob as it was given.
        pattern: String,
        /// What is wrong.
        reason: String,
    },
    /// A file has no text.
    #[error("{} has no text: remove it from the sources or fill it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A file is not UTF-8.
    #[error(
        "{} is not UTF-8 at byte {offset}: convert it (for example with iconv -t UTF-8), or remove it from the sources",
        path.display()
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// First byte that does not fit.
        offset: u64,
    },
    /// A place that no file can be written to.
    #[error(transparent)]
    Output(#[from] setun_io::IoError),
    /// A token file where text is read.
    #[error("{} holds tokens, and text is read here: name token files only, one for each side, or text only", path.display())]
    TokensBesideText {
        /// The file.
        path: PathBuf,
    },
    /// A pipe or a device, of which nothing could be read again.
    #[error("{} is no ordinary file, and documents are read more than once: save its text in a file", path.display())]
    NotAFile {
        /// What was opened.
        path: PathBuf,
    },
    /// A file is not what it was when its documents were found.
    #[error("{} has changed since it was first read: start again when nobody writes it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A line of a `.jsonl` file is not a document.
    #[error("{}:{line}: {reason}; each line must be a JSON object with a string {field:?}", path.display())]
    BadJsonLine {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: u64,
        /// The field that holds the text.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// A line of a `.jsonl` file is not a conversation.
    #[error("{}:{line}: {reason}", path.display())]
    BadConversation {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: u64,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A file that cannot hold conversations where there must be nothing else.
    #[error(
        "{} is not a .jsonl file, which conversations come in: remove it from the sources, or \
         set data.format to auto",
        path.display()
    )]
    NotChat {
        /// The file.
        path: PathBuf,
    },
    /// The text of the split rule means nothing.
    #[error("cannot split documents on {text:?}: use blank-lines, file or regex:PATTERN{reason}")]
    BadSplitOn {
        /// The rule as it was given.
        text: String,
        /// Empty, or a colon and what is wrong with the pattern.
        reason: String,
    },
    /// The pattern could not be matched on a line.
    #[error("{} at byte {offset}: the document pattern fails: {reason}; simplify it", path.display())]
    PatternFailed {
        /// The file.
        path: PathBuf,
        /// Start of the line.
        offset: u64,
        /// What the regex engine said.
        reason: String,
    },
    /// No source has a document.
    #[error("no documents in {sources} source file(s): name files that hold text")]
    NoDocuments {
        /// Files that were read.
        sources: usize,
    },
    /// The split leaves one side without documents, or its settings make no sense.
    #[error("cannot split the corpus: {reason}")]
    BadSplit {
        /// What is wrong and what to do.
        reason: String,
    },
    /// No tokenizer can be trained on the documents.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A document cannot be encoded.
    #[error("cannot tokenize the document at {place}: {reason}")]
    Encode {
        /// `file, byte offset` of the document.
        place: String,
        /// What the tokenizer said.
        reason: String,
    },
    /// A token stream does not fit what is asked of it.
    #[error("{reason}")]
    BadTokens {
        /// What is wrong and what to do.
        reason: String,
    },
    /// A token file is foreign, cut short or damaged.
    #[error("{}: {reason}", path.display())]
    BadTokenFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

impl DataError {
    /// Wraps an I/O error; for `map_err`.
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        // The path is copied only when there is an error: reading a batch allocates nothing.
        move |source| Self::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }
}

/// A bijective 64-bit mixer (the finalizer of `SplitMix64`, Steele et al. 2014).
fn mix64(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
