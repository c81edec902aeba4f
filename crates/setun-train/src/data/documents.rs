//! Text files become documents.
//!
//! A source is a file, a glob or a folder. `.jsonl` files hold one document per line, a
//! text or a conversation;
//! every other file is UTF-8 text, cut by [`SplitOn`]. The documents keep the order of
//! the sources, of the sorted files in each source and of their place in the file.

use super::{ChatOptions, Conversation, DataError, DataFormat};
use fancy_regex::Regex;
use std::{
    collections::HashSet,
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Files that a folder contributes.
const FOLDER_EXTENSIONS: [&str; 2] = ["txt", "jsonl"];

/// Field of a `.jsonl` object that makes it a conversation.
const MESSAGES: &str = "messages";

/// Where one document of a text file ends and the next begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SplitOn {
    /// At runs of lines that are empty or hold only white space. A document goes from
    /// the start of its first line to the end of its last, without that line's ending.
    #[default]
    BlankLines,
    /// Nowhere: each file is one document, byte for byte.
    File,
    /// At each line that the pattern matches from its start; that line belongs to the
    /// new document. Blank lines around a document are dropped, those inside are kept.
    Regex(String),
}

impl FromStr for SplitOn {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        let bad = |reason| DataError::BadSplitOn {
            text: text.to_owned(),
            reason,
        };
        match text {
            "blank-lines" => Ok(Self::BlankLines),
            "file" => Ok(Self::File),
            _ => {
                let pattern = text.strip_prefix("regex:").ok_or(bad(String::new()))?;
                line_regex(pattern)?;
                Ok(Self::Regex(pattern.to_owned()))
            }
        }
    }
}

impl fmt::Display for SplitOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BlankLines => f.write_str("blank-lines"),
            Self::File => f.write_str("file"),
            Self::Regex(pattern) => write!(f, "regex:{pattern}"),
        }
    }
}

/// How files become documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentOptions {
    /// How text files are cut.
    pub split_on: SplitOn,
    /// Field of a `.jsonl` object that holds the text.
    pub text_field: String,
    /// Documents with fewer characters are kept, but counted and reported.
    pub min_document_chars: usize,
}

impl Default for DocumentOptions {
    fn default() -> Self {
        Self {
            split_on: SplitOn::BlankLines,
            text_field: "text".to_owned(),
            min_document_chars: 16,
        }
    }
}

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Index into [`Corpus::sources`].
    pub source: usize,
    /// Byte in the file where the text (in `.jsonl`: its line) begins.
    pub offset: u64,
    /// The text, never empty.
    pub text: String,
    /// Which parts are learned, if this is a conversation; of a text all is.
    pub conversation: Option<Conversation>,
}

/// Documents that are shorter than [`DocumentOptions::min_document_chars`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShortDocuments {
    /// How many there are.
    pub count: usize,
    /// The first one, an index into [`Corpus::documents`].
    pub first: usize,
}

/// All documents of a run, before any split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    /// The files, in reading order, each once.
    pub sources: Vec<PathBuf>,
    /// The documents, in reading order.
    pub documents: Vec<Document>,
    /// Short documents, which often mean a wrong `split_on`; `None` when there are none.
    pub short_documents: Option<ShortDocuments>,
    /// `.jsonl` lines whose text is empty; they are left out.
    pub empty_documents: usize,
}

impl Corpus {
    /// UTF-8 bytes of all documents.
    pub fn num_bytes(&self) -> u64 {
        self.documents.iter().map(|d| d.text.len() as u64).sum()
    }

    /// `file, byte offset` of document `index`, for messages.
    pub fn place(&self, index: usize) -> String {
        let document = &self.documents[index];
        let path = self.sources[document.source].display();
        format!("{path}, byte {}", document.offset)
    }
}

/// Reads the documents of `sources`: files, globs and folders (recursive, `.txt` and
/// `.jsonl`), relative to `base`. A file that several sources name is read once.
/// Conversations are rendered in the built-in chat format.
///
/// # Errors
/// A source that is missing or has no files; a file that is empty or not UTF-8; a bad
/// `.jsonl` line; no documents at all.
pub fn load_documents(
    sources: &[String],
    base: &Path,
    options: &DocumentOptions,
) -> Result<Corpus, DataError> {
    load_documents_with(sources, base, options, &ChatOptions::default())
}

/// As [`load_documents`], with a say in what conversations become.
///
/// # Errors
/// As [`load_documents`]; also a file that is not `.jsonl` where only conversations may be.
pub fn load_documents_with(
    sources: &[String],
    base: &Path,
    options: &DocumentOptions,
    chat: &ChatOptions,
) -> Result<Corpus, DataError> {
    let splitter = Splitter::new(&options.split_on)?;
    let mut corpus = Corpus {
        sources: expand_sources(sources, base)?,
        ..Corpus::default()
    };
    for source in 0..corpus.sources.len() {
        let path = corpus.sources[source].clone();
        let text = read_text(&path)?;
        if has_extension(&path, "jsonl") {
            read_json_lines(&mut corpus, source, &text, &options.text_field, chat)?;
        } else if chat.format == DataFormat::Chat {
            return Err(DataError::NotChat { path });
        } else {
            let ranges = splitter.split(&text, &path)?;
            corpus
                .documents
                .extend(ranges.into_iter().map(|(from, to)| Document {
                    source,
                    offset: from as u64,
                    text: text[from..to].to_owned(),
                    conversation: None,
                }));
        }
    }
    if corpus.documents.is_empty() {
        let sources = corpus.sources.len();
        return Err(DataError::NoDocuments { sources });
    }
    corpus.short_documents = find_short(&corpus.documents, options.min_document_chars);
    Ok(corpus)
}

/// The files that `sources` name, in reading order and each once.
///
/// # Errors
/// A source that is missing, a bad glob, a glob or folder without files.
pub fn expand_sources(sources: &[String], base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    let mut known = HashSet::new();
    for source in sources {
        for path in expand_source(source, base)? {
            // Two spellings of one file must not count it twice, and a held-out file
            // must be recognised under any spelling.
            let canonical = fs::canonicalize(&path).map_err(DataError::io("read", &path))?;
            if known.insert(canonical) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn expand_source(source: &str, base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let path = base.join(source);
    // An existing path is taken literally, whatever glob characters it has.
    if path.is_dir() {
        let mut files = Vec::new();
        walk_folder(&path, &mut files)?;
        if files.is_empty() {
            return Err(DataError::NoFiles {
                place: format!("folder {}", path.display()),
                expected: ".txt or .jsonl file",
            });
        }
        return Ok(files);
    }
    if path.exists() {
        return Ok(vec![path]);
    }
    if !source.contains(['*', '?', '[']) {
        let base = base.to_path_buf();
        return Err(DataError::Missing { path, base });
    }
    expand_glob(source, base)
}

fn expand_glob(source: &str, base: &Path) -> Result<Vec<PathBuf>, DataError> {
    // Only the source is a pattern; the folder that it starts from is literal.
    let literal = glob::Pattern::escape(&base.to_string_lossy());
    let pattern = Path::new(&literal).join(source);
    let paths = glob::glob(&pattern.to_string_lossy()).map_err(|why| DataError::BadGlob {
        pattern: source.to_owned(),
        reason: why.to_string(),
    })?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|why| DataError::Io {
            action: "read",
            path: why.path().to_path_buf(),
            source: why.into(),
        })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(DataError::NoFiles {
            place: format!("glob {source:?} in {}", base.display()),
            expected: "file",
        });
    }
    files.sort();
    Ok(files)
}

/// Adds the readable files below `folder` in sorted order. Links to folders are not
/// followed, so that a cycle cannot trap the walk.
fn walk_folder(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let mut entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(DataError::io("read", folder))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type().map_err(DataError::io("read", &path))?;
        if kind.is_dir() {
            walk_folder(&path, files)?;
        } else if FOLDER_EXTENSIONS.iter().any(|e| has_extension(&path, e)) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// The text of a file, which has at least one character that is not white space.
fn read_text(path: &Path) -> Result<String, DataError> {
    let bytes = fs::read(path).map_err(DataError::io("read", path))?;
    let text = String::from_utf8(bytes).map_err(|why| DataError::NotUtf8 {
        path: path.to_path_buf(),
        offset: why.utf8_error().valid_up_to() as u64,
    })?;
    if without_mark(&text).trim().is_empty() {
        let path = path.to_path_buf();
        return Err(DataError::Empty { path });
    }
    Ok(text)
}

/// `text` without a byte order mark, which some editors put in front of UTF-8.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn read_json_lines(
    corpus: &mut Corpus,
    source: usize,
    text: &str,
    field: &str,
    chat: &ChatOptions,
) -> Result<(), DataError> {
    let body = without_mark(text);
    let mut offset = text.len() - body.len();
    for (number, line) in (1u64..).zip(body.split_inclusive('\n')) {
        let start = offset;
        offset += line.len();
        if line.trim().is_empty() {
            continue;
        }
        let path = &corpus.sources[source];
        let content = parse_json_line(line, field, chat.format);
        let content = content.map_err(|reason| DataError::BadJsonLine {
            path: path.clone(),
            line: number,
            field: field.to_owned(),
            reason,
        })?;
        let (text, conversation) = match content {
            Content::Text(text) => (text, None),
            Content::Chat => {
                let read = chat.read(line);
                let (text, conversation) = read.map_err(|reason| DataError::BadConversation {
                    path: path.clone(),
                    line: number,
                    reason,
                })?;
                (text, Some(conversation))
            }
        };
        if text.is_empty() {
            corpus.empty_documents += 1;
            continue;
        }
        corpus.documents.push(Document {
            source,
            offset: start as u64,
            text,
            conversation,
        });
    }
    Ok(())
}

/// What a line holds.
enum Content {
    Text(String),
    Chat,
}

/// The text in one line, or that it is a conversation, or what is wrong with the line.
fn parse_json_line(line: &str, field: &str, format: DataFormat) -> Result<Content, String> {
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|why| format!("not JSON ({why})"))?;
    let serde_json::Value::Object(mut object) = value else {
        return Err("not a JSON object".to_owned());
    };
    let has_messages = object.contains_key(MESSAGES);
    match (format, object.remove(field)) {
        (DataFormat::Chat, _) if has_messages => Ok(Content::Chat),
        (DataFormat::Chat, _) => Err(format!("no {MESSAGES:?}, which data.format = chat needs")),
        (_, Some(serde_json::Value::String(text))) => Ok(Content::Text(text)),
        (_, Some(_)) => Err(format!("{field:?} is not a string")),
        (DataFormat::Auto, None) if has_messages => Ok(Content::Chat),
        (_, None) => Err(format!("no field {field:?}")),
    }
}

fn find_short(documents: &[Document], min_chars: usize) -> Option<ShortDocuments> {
    let is_short = |d: &Document| d.text.chars().take(min_chars).count() < min_chars;
    let first = documents.iter().position(is_short)?;
    let count = documents[first..].iter().filter(|d| is_short(d)).count();
    Some(ShortDocuments { count, first })
}

/// [`SplitOn`] with its pattern compiled.
enum Splitter {
    BlankLines,
    File,
    Regex(Regex),
}

impl Splitter {
    fn new(split_on: &SplitOn) -> Result<Self, DataError> {
        Ok(match split_on {
            SplitOn::BlankLines => Self::BlankLines,
            SplitOn::File => Self::File,
            SplitOn::Regex(pattern) => Self::Regex(line_regex(pattern)?),
        })
    }

    /// Byte ranges of the documents in `text`, in order; none is blank.
    fn split(&self, text: &str, path: &Path) -> Result<Vec<(usize, usize)>, DataError> {
        let mut offset = text.len() - without_mark(text).len();
        if matches!(self, Self::File) {
            return Ok(vec![(offset, text.len())]);
        }
        let mut ranges = Vec::new();
        // The open document: from its first line that is not blank to its last.
        let mut open: Option<(usize, usize)> = None;
        for line in text[offset..].split_inclusive('\n') {
            let start = offset;
            offset += line.len();
            let content = line.trim_end_matches(['\n', '\r']);
            let is_blank = content.trim().is_empty();
            if self.ends_before(content, is_blank, start, path)? {
                ranges.extend(open.take());
            }
            if !is_blank {
                let from = open.map_or(start, |(from, _)| from);
                open = Some((from, start + content.len()));
            }
        }
        ranges.extend(open);
        Ok(ranges)
    }

    /// Whether the open document ends before this line.
    fn ends_before(
        &self,
        line: &str,
        is_blank: bool,
        start: usize,
        path: &Path,
    ) -> Result<bool, DataError> {
        match self {
            Self::BlankLines => Ok(is_blank),
            Self::File => Ok(false),
            Self::Regex(regex) => regex
                .is_match(line)
                .map_err(|why| DataError::PatternFailed {
                    path: path.to_path_buf(),
                    offset: start as u64,
                    reason: why.to_string(),
                }),
        }
    }
}

/// `pattern`, tied to the start of a line (lines are matched one at a time).
fn line_regex(pattern: &str) -> Result<Regex, DataError> {
    let bad = |reason: String| DataError::BadSplitOn {
        text: format!("regex:{pattern}"),
        reason: format!(": {reason}"),
    };
    if pattern.is_empty() {
        return Err(bad("an empty pattern matches every line".to_owned()));
    }
    // Compiled alone first, so that an unbalanced pattern cannot pair with the wrapper.
    Regex::new(pattern).map_err(|why| bad(why.to_string()))?;
    Regex::new(&format!(r"\A(?:{pattern})")).map_err(|why| bad(why.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fresh folder, removed at the end of its test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str, files: &[(&str, &[u8])]) -> Self {
            let id = std::process::id();
            let root = std::env::temp_dir().join(format!("setun-documents-{name}-{id}"));
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(&root).expect("temporary folder");
            for (path, bytes) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().expect("has a parent")).expect("folder");
                fs::write(path, bytes).expect("file");
            }
            Self(root)
        }

        fn load(&self, sources: &[&str], split_on: SplitOn) -> Result<Corpus, DataError> {
            let sources: Vec<String> = sources.iter().map(|&s| s.to_owned()).collect();
            let options = DocumentOptions {
                split_on,
                ..DocumentOptions::default()
            };
            load_documents(&sources, &self.0, &options)
        }

        fn message(&self, sources: &[&str]) -> String {
            self.load(sources, SplitOn::BlankLines)
                .expect_err("must be refused")
                .to_string()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn texts(corpus: &Corpus) -> Vec<&str> {
        corpus.documents.iter().map(|d| d.text.as_str()).collect()
    }

    #[test]
    fn blank_lines_separate_documents() {
        let bytes = "\u{feff}\n \none\nmore\n\n \t\r\n\r\ntwo\r\nzwei\r\n\n\n  three".as_bytes();
        let folder = Folder::new("blank", &[("a.txt", bytes)]);
        let corpus = folder.load(&["a.txt"], SplitOn::BlankLines).expect("reads");
        assert_eq!(texts(&corpus), ["one\nmore", "two\r\nzwei", "  three"]);
        for document in &corpus.documents {
            let from = document.offset as usize;
            let same = &bytes[from..from + document.text.len()];
            assert_eq!(same, document.text.as_bytes());
        }
        assert_eq!(corpus.num_bytes(), 8 + 9 + 7);
    }

    #[test]
    fn a_file_is_one_document_byte_for_byte() {
        let folder = Folder::new("file", &[("a.md", b"\none\n\ntwo\n\n")]);
        let corpus = folder.load(&["a.md"], SplitOn::File).expect("reads");
        assert_eq!(texts(&corpus), ["\none\n\ntwo\n\n"]);
    }

    #[test]
    fn a_pattern_at_the_start_of_a_line_begins_a_document() {
        let text = b"preface\n\n# A\nx # y\n\nmore\n\n# B\n## no\n# C";
        let folder = Folder::new("regex", &[("a.txt", text)]);
        let split_on = "regex:# (?=[A-Z]$)".parse().expect("parses");
        let corpus = folder.load(&["a.txt"], split_on).expect("reads");
        let expected = ["preface", "# A\nx # y\n\nmore", "# B\n## no", "# C"];
        assert_eq!(texts(&corpus), expected);
    }

    #[test]
    fn split_rules_parse_and_print() {
        for text in ["blank-lines", "file", "regex:^Chapter \\d+"] {
            let rule: SplitOn = text.parse().expect("parses");
            assert_eq!(rule.to_string(), text);
        }
        for text in ["", "lines", "regex:", "regex:(", "regex:a)|(b", "Regex:a"] {
            let why = text.parse::<SplitOn>().expect_err("must be refused");
            assert!(why.to_string().contains("use blank-lines"), "{why}");
        }
    }

    #[test]
    fn json_lines_are_documents() {
        let lines = b"{\"text\":\"a\\nb\",\"id\":1}\n\n{\"text\":\"\"}\n{\"text\":\"\xc3\xa9\"}";
        let folder = Folder::new("jsonl", &[("a.jsonl", lines)]);
        let corpus = folder.load(&["a.jsonl"], SplitOn::File).expect("reads");
        assert_eq!(texts(&corpus), ["a\nb", "\u{e9}"]);
        assert_eq!(corpus.documents[1].offset, 36);
        assert_eq!(corpus.empty_documents, 1);
    }

    #[test]
    fn lines_with_messages_are_conversations() {
        let chat =
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
        let bad = r#"{"messages":[{"role":"user","content":"q"}]}"#;
        let lines = format!("{{\"text\":\"t\"}}\n{chat}\n");
        let broken = format!("{chat}\n\n{bad}");
        let folder = Folder::new(
            "chat",
            &[
                ("a.jsonl", lines.as_bytes()),
                ("b.jsonl", broken.as_bytes()),
                ("c.txt", b"text"),
            ],
        );
        let load = |source: &str, format| {
            let options = ChatOptions::new(format, setun_formats::ChatTemplate::ChatMl, None);
            let sources = [source.to_owned()];
            load_documents_with(&sources, &folder.0, &DocumentOptions::default(), &options)
        };
        let corpus = load("a.jsonl", DataFormat::Auto).expect("reads");
        let kinds = corpus.documents.iter().map(|d| d.conversation.is_some());
        assert_eq!(kinds.collect::<Vec<_>>(), [false, true]);
        assert!(corpus.documents[1].text.contains("<|im_start|>assistant\n"));
        for (source, format, expected) in [
            ("a.jsonl", DataFormat::Text, "a.jsonl:2: no field \"text\""),
            ("a.jsonl", DataFormat::Chat, "a.jsonl:1: no \"messages\""),
            (
                "b.jsonl",
                DataFormat::Auto,
                "b.jsonl:3: no message of the assistant",
            ),
            ("c.txt", DataFormat::Chat, "c.txt is not a .jsonl file"),
        ] {
            let message = load(source, format).expect_err("refused").to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn bad_json_lines_name_file_and_line() {
        let bad: [(&[u8], &str); 4] = [
            (b"{\"text\":\"a\"}\n{\"text\":", "a.jsonl:2: not JSON"),
            (b"\n[1]\n", "a.jsonl:2: not a JSON object"),
            (b"{\"text\":3}", "a.jsonl:1: \"text\" is not a string"),
            (b"{\"body\":\"a\"}", "a.jsonl:1: no field \"text\""),
        ];
        for (bytes, expected) in bad {
            let folder = Folder::new("badjson", &[("a.jsonl", bytes)]);
            let message = folder.message(&["a.jsonl"]);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn folders_and_globs_expand_sorted_and_once() {
        let files: [(&str, &[u8]); 5] = [
            ("d/z.txt", b"z"),
            ("d/b/one.TXT", b"b"),
            ("d/a.jsonl", b"{\"text\":\"a\"}"),
            ("d/skip.md", b"md"),
            ("d/[1].txt", b"one"),
        ];
        let folder = Folder::new("expand", &files);
        let load = |sources: &[&str]| folder.load(sources, SplitOn::File).expect("reads");
        assert_eq!(texts(&load(&["d"])), ["one", "a", "b", "z"]);
        assert_eq!(texts(&load(&["d/*.txt"])), ["one", "z"]);
        assert_eq!(texts(&load(&["d/**/*"])), ["one", "a", "b", "md", "z"]);
        assert_eq!(texts(&load(&["d/[1].txt"])), ["one"]);
        assert_eq!(
            texts(&load(&["d/z.txt", "d/b/../z.txt", "d"]))[..2],
            ["z", "one"]
        );
        assert_eq!(load(&["d", "d/*.txt"]).sources.len(), 4);
    }

    #[test]
    fn bad_sources_are_named_with_a_remedy() {
        let files: [(&str, &[u8]); 4] = [
            ("blank.txt", b" \n\n"),
            ("zero.txt", b""),
            ("latin.txt", b"caf\xe9"),
            ("none/readme.md", b"x"),
        ];
        let folder = Folder::new("bad", &files);
        let cases = [
            ("gone.txt", "gone.txt: correct the path"),
            ("gone/*.txt", "holds no file"),
            ("none", "holds no .txt or .jsonl file"),
            ("a[", "bad glob \"a[\""),
            ("blank.txt", "blank.txt has no text: remove it"),
            ("zero.txt", "zero.txt has no text: remove it"),
            ("latin.txt", "latin.txt is not UTF-8 at byte 3: convert it"),
        ];
        for (source, expected) in cases {
            let message = folder.message(&[source]);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn no_documents_is_an_error() {
        let folder = Folder::new("nothing", &[("a.jsonl", b"{\"text\":\"\"}\n")]);
        assert!(
            folder
                .message(&["a.jsonl"])
                .starts_with("no documents in 1 source")
        );
        assert!(folder.message(&[]).starts_with("no documents in 0 source"));
    }

    #[test]
    fn short_documents_are_kept_and_reported() {
        let text = "a long enough document\n\n\u{e9}\u{e9}\n\nx".as_bytes();
        let folder = Folder::new("short", &[("a.txt", text)]);
        let corpus = folder.load(&["a.txt"], SplitOn::BlankLines).expect("reads");
        assert_eq!(corpus.documents.len(), 3);
        let short = corpus.short_documents.as_ref().expect("two are short");
        assert_eq!((short.count, short.first), (2, 1));
        assert!(corpus.place(short.first).ends_with("a.txt, byte 24"));
        assert_eq!(find_short(&corpus.documents, 1), None);
    }
}
