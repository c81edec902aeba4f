//! All documents of a run: where each of them is, read again from its file when needed.
//!
//! A corpus may be larger than memory. So a document is a place in a file (24 bytes), and its
//! text is read, and for `.jsonl` parsed and rendered, each time that somebody asks for it. A
//! file that has changed since the corpus was made is refused, by its length and time.

use super::{
    ChatOptions, Conversation, DataError,
    documents::{JsonLine, parse_json_line},
};
use setun_formats::Tokenizer;
use std::{
    fs::{File, Metadata},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Where one text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    /// Index into [`Corpus::sources`].
    pub source: u32,
    /// Byte in the file where the text (in `.jsonl`: its line) begins.
    pub offset: u64,
    /// Bytes in the file, at least 1: of the text, in `.jsonl` of its line.
    pub num_bytes: u64,
    /// How these bytes become a text.
    pub kind: DocumentKind,
}

/// How the bytes of a file become a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DocumentKind {
    /// They are the text.
    Text,
    /// A line of a `.jsonl` file with a text.
    JsonText,
    /// A line of a `.jsonl` file with a conversation, rendered by the chat template.
    Conversation,
}

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The text, never empty.
    pub text: String,
    /// Which parts are learned, if this is a conversation; of a text all is.
    pub conversation: Option<Conversation>,
}

/// Documents that are shorter than [`super::DocumentOptions::min_document_chars`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortDocuments {
    /// How many there are.
    pub count: usize,
    /// The first one, an index into [`Corpus::documents`].
    pub first: usize,
}

/// All documents of a run, before any split.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// The files, in reading order, each once.
    pub sources: Vec<PathBuf>,
    /// The documents, in reading order.
    pub documents: Vec<Document>,
    /// Short documents, which often mean a wrong `split_on`; `None` when there are none.
    pub short_documents: Option<ShortDocuments>,
    /// `.jsonl` lines whose text is empty; they are left out.
    pub empty_documents: usize,
    /// What each source was when it was read.
    pub(super) stamps: Vec<Stamp>,
    /// Field of a `.jsonl` object that holds the text.
    pub(super) text_field: String,
    pub(super) chat: ChatOptions,
}

/// What tells that a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    num_bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            num_bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl Corpus {
    /// Bytes that the documents have in their files.
    pub fn num_bytes(&self) -> u64 {
        self.documents.iter().map(|d| d.num_bytes).sum()
    }

    /// `file, byte offset` of document `index`, for messages.
    pub fn place(&self, index: usize) -> String {
        let document = &self.documents[index];
        let path = self.sources[document.source as usize].display();
        format!("{path}, byte {}", document.offset)
    }

    /// Reads texts; each thread needs its own.
    pub fn reader(&self) -> Reader<'_> {
        Reader {
            corpus: self,
            open: None,
        }
    }

    /// A tokenizer of `vocab_size` entries for these documents; see [`Tokenizer::train`].
    ///
    /// # Errors
    /// A document that cannot be read, and what [`Tokenizer::train`] refuses.
    pub fn train_tokenizer(
        &self,
        documents: &[usize],
        vocab_size: usize,
    ) -> Result<Tokenizer, DataError> {
        let (mut reader, mut failed) = (self.reader(), None);
        let texts = documents.iter().map_while(|&index| {
            let text = reader.read(index);
            text.map_err(|why| failed = Some(why)).ok()
        });
        let trained = Tokenizer::train(texts.map(|text| text.text), vocab_size);
        match failed {
            Some(why) => Err(why),
            None => Ok(trained?),
        }
    }
}

/// Reads the texts of a corpus, with the file of the last one open.
#[derive(Debug)]
pub struct Reader<'a> {
    corpus: &'a Corpus,
    open: Option<(u32, File)>,
}

impl Reader<'_> {
    /// The text of document `index`.
    ///
    /// # Errors
    /// A file that cannot be read any more, or that has changed.
    pub fn read(&mut self, index: usize) -> Result<Text, DataError> {
        let document = self.corpus.documents[index];
        let path = &self.corpus.sources[document.source as usize];
        let changed = || DataError::Changed { path: path.clone() };
        let mut bytes = vec![0; document.num_bytes as usize];
        let file = self.file(document.source)?;
        file.read_exact_at(&mut bytes, document.offset)
            .map_err(DataError::io("read", path))?;
        let bytes = String::from_utf8(bytes).map_err(|_| changed())?;
        if document.kind == DocumentKind::Text {
            return Ok(Text {
                text: bytes,
                conversation: None,
            });
        }
        // The line was read before: it can fail only if it is another one now.
        let Corpus {
            text_field, chat, ..
        } = self.corpus;
        let line = parse_json_line(&bytes, text_field, chat.format).map_err(|_| changed())?;
        let (text, conversation) = match line {
            JsonLine::Text(text) => (text, None),
            JsonLine::Chat => {
                let (text, conversation) = chat.read(&bytes).map_err(|_| changed())?;
                (text, Some(conversation))
            }
        };
        Ok(Text { text, conversation })
    }

    /// The file of a source, as long as it is what it was.
    fn file(&mut self, source: u32) -> Result<&File, DataError> {
        let file = match self.open.take() {
            Some((open, file)) if open == source => file,
            _ => self.open_source(source as usize)?,
        };
        Ok(&self.open.insert((source, file)).1)
    }

    fn open_source(&self, source: usize) -> Result<File, DataError> {
        let path: &Path = &self.corpus.sources[source];
        let io = |why| DataError::io("read", path)(why);
        let file = File::open(path).map_err(io)?;
        let stamp = Stamp::of(&file.metadata().map_err(io)?);
        if stamp != self.corpus.stamps[source] {
            let path = path.to_path_buf();
            return Err(DataError::Changed { path });
        }
        Ok(file)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::{fs, ops::Deref, sync::atomic::AtomicUsize, sync::atomic::Ordering};

    /// A corpus of given texts, in a file that goes with it.
    pub(in crate::data) struct Texts(Corpus);

    impl Texts {
        pub(in crate::data) fn new(texts: &[String]) -> Self {
            static NUMBER: AtomicUsize = AtomicUsize::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("setun-texts-{}-{number}.txt", std::process::id());
            let path = std::env::temp_dir().join(name);
            // The first text begins at byte 5.
            fs::write(&path, format!(".....{}", texts.concat())).expect("writes");
            let mut offset = 5;
            let documents = texts.iter().map(|text| {
                let num_bytes = text.len() as u64;
                offset += num_bytes;
                Document {
                    source: 0,
                    offset: offset - num_bytes,
                    num_bytes,
                    kind: DocumentKind::Text,
                }
            });
            Self(Corpus {
                documents: documents.collect(),
                stamps: vec![Stamp::of(&fs::metadata(&path).expect("it was written"))],
                sources: vec![path],
                short_documents: None,
                empty_documents: 0,
                text_field: String::new(),
                chat: ChatOptions::default(),
            })
        }
    }

    impl Deref for Texts {
        type Target = Corpus;

        fn deref(&self) -> &Corpus {
            &self.0
        }
    }

    impl Drop for Texts {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0.sources[0]);
        }
    }

    #[test]
    fn texts_are_read_in_any_order() {
        let texts = ["one", "zw\u{f6}lf", "\n\nthree\n"].map(str::to_owned);
        let corpus = Texts::new(&texts);
        let mut reader = corpus.reader();
        for index in [2, 0, 1, 0] {
            assert_eq!(reader.read(index).expect("reads").text, texts[index]);
        }
        assert_eq!(corpus.num_bytes(), 3 + 6 + 8);
    }

    #[test]
    fn a_file_that_changes_is_refused() {
        let corpus = Texts::new(&["first text".to_owned()]);
        fs::write(&corpus.sources[0], "something else, longer").expect("writes");
        let why = corpus.reader().read(0).expect_err("it has changed");
        assert!(why.to_string().contains("has changed"), "{why}");
        let why = corpus.train_tokenizer(&[0], 300).expect_err("the same");
        assert!(matches!(why, DataError::Changed { .. }), "{why}");
        fs::remove_file(&corpus.sources[0]).expect("it is there");
        let why = corpus.reader().read(0).expect_err("it is gone");
        assert!(matches!(why, DataError::Io { .. }), "{why}");
    }
}
