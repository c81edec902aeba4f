//! Text files become documents.
//!
//! A source is a file, a glob or a folder. `.jsonl` files hold one document per line, a
//! text or a conversation;
//! every other file is UTF-8 text, cut by [`SplitOn`]. The documents keep the order of
//! the sources, of the sorted files in each source and of their place in the file.

use super::{
    ChatOptions, Corpus, DataError, DataFormat, Document, DocumentKind, ShortDocuments,
    corpus::Stamp,
};
use fancy_regex::Regex;
use std::{
    collections::HashSet,
    fmt,
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    str::{self, FromStr},
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
    let mut reading = Reading {
        corpus: Corpus {
            sources: expand_sources(sources, base)?,
            documents: Vec::new(),
            short_documents: None,
            empty_documents: 0,
            stamps: Vec::new(),
            text_field: options.text_field.clone(),
            chat: chat.clone(),
        },
        min_chars: options.min_document_chars,
    };
    for source in 0..reading.corpus.sources.len() {
        let path = reading.corpus.sources[source].clone();
        let is_json = has_extension(&path, "jsonl");
        if !is_json && chat.format == DataFormat::Chat {
            return Err(DataError::NotChat { path });
        }
        let mut lines = Lines::open(&path)?;
        reading.corpus.stamps.push(lines.stamp);
        match is_json {
            true => reading.json_lines(source as u32, &mut lines)?,
            false => reading.text(source as u32, &mut lines, &splitter)?,
        }
        if lines.are_blank {
            return Err(DataError::Empty { path });
        }
    }
    let corpus = reading.corpus;
    if corpus.documents.is_empty() {
        let sources = corpus.sources.len();
        return Err(DataError::NoDocuments { sources });
    }
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
            place: match base.as_os_str().is_empty() {
                true => format!("glob {source:?}"),
                false => format!("glob {source:?} in {}", base.display()),
            },
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

/// The lines of a file, one in memory at a time.
struct Lines {
    path: PathBuf,
    stamp: Stamp,
    input: BufReader<File>,
    /// The line that was read last, with its ending.
    line: Vec<u8>,
    /// Byte behind it.
    end: u64,
    number: u64,
    /// Whether nothing but white space has come.
    are_blank: bool,
}

/// One of them.
struct Line<'a> {
    /// With its ending; without the byte order mark that some editors put in front of UTF-8.
    text: &'a str,
    /// Byte in the file where `text` begins.
    start: u64,
    /// From 1.
    number: u64,
    is_blank: bool,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, DataError> {
        if path.extension().is_some_and(|e| e == "tokens") {
            let path = path.to_path_buf();
            return Err(DataError::TokensBesideText { path });
        }
        let io = |why| DataError::io("read", path)(why);
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            let path = path.to_path_buf();
            return Err(DataError::NotAFile { path });
        }
        Ok(Self {
            path: path.to_path_buf(),
            stamp: Stamp::of(&metadata),
            input: BufReader::with_capacity(1 << 16, file),
            line: Vec::new(),
            end: 0,
            number: 0,
            are_blank: true,
        })
    }

    fn next(&mut self) -> Result<Option<Line<'_>>, DataError> {
        self.line.clear();
        let read = self.input.read_until(b'\n', &mut self.line);
        read.map_err(DataError::io("read", &self.path))?;
        if self.line.is_empty() {
            return Ok(None);
        }
        let start = self.end;
        self.end += self.line.len() as u64;
        self.number += 1;
        let line = str::from_utf8(&self.line).map_err(|why| DataError::NotUtf8 {
            path: self.path.clone(),
            offset: start + why.valid_up_to() as u64,
        })?;
        let text = match start {
            0 => line.strip_prefix('\u{feff}').unwrap_or(line),
            _ => line,
        };
        let is_blank = text.trim().is_empty();
        self.are_blank &= is_blank;
        Ok(Some(Line {
            text,
            start: self.end - text.len() as u64,
            number: self.number,
            is_blank,
        }))
    }
}

/// A corpus that is being read.
struct Reading {
    corpus: Corpus,
    min_chars: usize,
}

impl Reading {
    /// Adds a document of `num_chars` characters; more than [`Self::min_chars`] need not be
    /// counted.
    fn push(&mut self, document: Document, num_chars: usize) {
        if num_chars < self.min_chars {
            let first = self.corpus.documents.len();
            let none = ShortDocuments { count: 0, first };
            self.corpus.short_documents.get_or_insert(none).count += 1;
        }
        self.corpus.documents.push(document);
    }

    fn text(
        &mut self,
        source: u32,
        lines: &mut Lines,
        splitter: &Splitter,
    ) -> Result<(), DataError> {
        let path = lines.path.clone();
        // From its first line that is not blank to its last.
        let mut open: Option<OpenText> = None;
        let whole_file = matches!(splitter, Splitter::File);
        while let Some(line) = lines.next()? {
            let content = line.text.trim_end_matches(['\n', '\r']);
            if splitter.ends_before(content, &line, &path)?
                && let Some(text) = open.take()
            {
                self.push(text.document(source), text.num_chars);
            }
            if whole_file {
                let text = open.get_or_insert(OpenText::at(line.start));
                text.extend(line.text, line.text);
            } else if !line.is_blank {
                let text = open.get_or_insert(OpenText::at(line.start));
                text.extend(content, line.text);
            } else if let Some(text) = &mut open {
                text.pass(line.text);
            }
        }
        if let Some(text) = open {
            self.push(text.document(source), text.num_chars);
        }
        Ok(())
    }

    fn json_lines(&mut self, source: u32, lines: &mut Lines) -> Result<(), DataError> {
        let path = lines.path.clone();
        while let Some(line) = lines.next()? {
            if line.is_blank {
                continue;
            }
            let Corpus {
                text_field, chat, ..
            } = &self.corpus;
            let content = parse_json_line(line.text, text_field, chat.format);
            let content = content.map_err(|reason| DataError::BadJsonLine {
                path: path.clone(),
                line: line.number,
                field: text_field.clone(),
                reason,
            })?;
            let (text, kind) = match content {
                JsonLine::Text(text) => (text, DocumentKind::JsonText),
                JsonLine::Chat => {
                    let read = chat.read(line.text);
                    let (text, _) = read.map_err(|reason| DataError::BadConversation {
                        path: path.clone(),
                        line: line.number,
                        reason,
                    })?;
                    (text, DocumentKind::Conversation)
                }
            };
            if text.is_empty() {
                self.corpus.empty_documents += 1;
                continue;
            }
            let document = Document {
                source,
                offset: line.start,
                num_bytes: line.text.len() as u64,
                kind,
            };
            self.push(document, text.chars().take(self.min_chars).count());
        }
        Ok(())
    }
}

/// A text whose end has not been seen.
struct OpenText {
    from: u64,
    /// Byte behind its last character so far.
    to: u64,
    num_chars: usize,
    /// Bytes and characters of all lines since `from`.
    seen: (u64, usize),
}

impl OpenText {
    fn at(from: u64) -> Self {
        Self {
            from,
            to: from,
            num_chars: 0,
            seen: (0, 0),
        }
    }

    /// Adds a line of which `content`, its beginning, belongs to the text for sure.
    fn extend(&mut self, content: &str, line: &str) {
        self.to = self.from + self.seen.0 + content.len() as u64;
        self.num_chars = self.seen.1 + content.chars().count();
        self.pass(line);
    }

    /// A line that belongs to the text only if another follows.
    fn pass(&mut self, line: &str) {
        self.seen.0 += line.len() as u64;
        self.seen.1 += line.chars().count();
    }

    fn document(&self, source: u32) -> Document {
        Document {
            source,
            offset: self.from,
            num_bytes: self.to - self.from,
            kind: DocumentKind::Text,
        }
    }
}

/// What a line of a `.jsonl` file holds.
pub(super) enum JsonLine {
    Text(String),
    Chat,
}

/// The text in one line, or that it is a conversation, or what is wrong with the line.
pub(super) fn parse_json_line(
    line: &str,
    field: &str,
    format: DataFormat,
) -> Result<JsonLine, String> {
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|why| format!("not JSON ({why})"))?;
    let serde_json::Value::Object(mut object) = value else {
        return Err("not a JSON object".to_owned());
    };
    let has_messages = object.contains_key(MESSAGES);
    match (format, object.remove(field)) {
        (DataFormat::Chat, _) if has_messages => Ok(JsonLine::Chat),
        (DataFormat::Chat, _) => Err(format!("no {MESSAGES:?}, which data.format = chat needs")),
        (_, Some(serde_json::Value::String(text))) => Ok(JsonLine::Text(text)),
        (_, Some(_)) => Err(format!("{field:?} is not a string")),
        (DataFormat::Auto, None) if has_messages => Ok(JsonLine::Chat),
        (_, None) => Err(format!("no field {field:?}")),
    }
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

    /// Whether the open document ends before this line.
    fn ends_before(&self, content: &str, line: &Line<'_>, path: &Path) -> Result<bool, DataError> {
        match self {
            Self::BlankLines => Ok(line.is_blank),
            Self::File => Ok(false),
            Self::Regex(regex) => regex
                .is_match(content)
                .map_err(|why| DataError::PatternFailed {
                    path: path.to_path_buf(),
                    offset: line.start,
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

    fn texts(corpus: &Corpus) -> Vec<String> {
        let mut reader = corpus.reader();
        let all = 0..corpus.documents.len();
        all.map(|i| reader.read(i).expect("reads").text).collect()
    }

    #[test]
    fn blank_lines_separate_documents() {
        let bytes = "\u{feff}\n \none\nmore\n\n \t\r\n\r\ntwo\r\nzwei\r\n\n\n  three".as_bytes();
        let folder = Folder::new("blank", &[("a.txt", bytes)]);
        let corpus = folder.load(&["a.txt"], SplitOn::BlankLines).expect("reads");
        assert_eq!(texts(&corpus), ["one\nmore", "two\r\nzwei", "  three"]);
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
        let kinds = corpus.documents.iter().map(|d| d.kind);
        let expected = [DocumentKind::JsonText, DocumentKind::Conversation];
        assert_eq!(kinds.collect::<Vec<_>>(), expected);
        let read = corpus.reader().read(1).expect("reads");
        assert!(read.conversation.is_some());
        assert!(read.text.contains("<|im_start|>assistant\n"));
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
        let files: [(&str, &[u8]); 5] = [
            ("ids.tokens", b"SETUNTOK\xff"),
            ("blank.txt", b" \n\n"),
            ("zero.txt", b""),
            ("latin.txt", b"caf\xe9"),
            ("none/readme.md", b"x"),
        ];
        let folder = Folder::new("bad", &files);
        let cases = [
            ("gone.txt", "gone.txt: correct the path"),
            ("gone/*.txt", "holds no file"),
            (
                "ids.tokens",
                "ids.tokens holds tokens, and text is read here",
            ),
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
    fn what_can_be_read_only_once_is_refused() {
        let sources = ["/dev/null".to_owned()];
        let options = DocumentOptions::default();
        let why = load_documents(&sources, Path::new(""), &options).expect_err("no file");
        assert!(why.to_string().contains("save its text in a file"), "{why}");
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
        let short = corpus.short_documents.expect("two are short");
        assert_eq!((short.count, short.first), (2, 1));
        assert!(corpus.place(short.first).ends_with("a.txt, byte 24"));
    }
}
