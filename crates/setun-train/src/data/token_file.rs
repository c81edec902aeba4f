//! The token file that `setun tokenize` writes.
//!
//! | bytes | content (little-endian) |
//! |---|---|
//! | 0..8 | `SETUNTOK` |
//! | 8..12 | version, u32: 1, or 2 with target bits |
//! | 12..16 | bytes of an id, u32: 2 or 4 |
//! | 16..24 | number of tokens, u64 |
//! | 24..32 | number of documents, u64 |
//! | 32..40 | UTF-8 bytes of what is learned, u64 |
//! | 40..44 | vocabulary size, u32 |
//! | 44..48 | id of `<\|endoftext\|>`, u32 |
//! | 48..80 | blake3 of the tokenizer's JSON |
//! | 80..112 | blake3 of the payload |
//! | 112..128 | first half of the blake3 of bytes 0..112 |
//! | 128.. | payload: document starts as u64, then the ids; in version 2 then one bit for each token, 1 for a target, in u64 words from the lowest bit up |
//!
//! The file is read in place by positioned reads, which need neither a memory map (and
//! so no `unsafe`) nor a shared file cursor.

use super::{
    DataError,
    targets::TargetBits,
    tokens::{Ids, Source, TokenInfo, TokenSet, id_bytes},
};
use blake3::{Hash, Hasher};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"SETUNTOK";
/// Every token is a target.
const VERSION: u32 = 1;
/// Target bits say which are.
const VERSION_WITH_TARGETS: u32 = 2;
const HEADER_BYTES: usize = 128;
/// Bytes that the checksum at the end of the header covers.
const CHECKED_BYTES: usize = 112;
/// Smaller files are verified when they are opened; larger ones on request.
const VERIFY_AT_OPEN_BYTES: u64 = 1 << 30;
/// Stack buffer of a positioned read.
const READ_BYTES: usize = 1 << 13;

const REMEDY: &str = "restore it from a copy or run setun tokenize again";

/// A file that holds ids: a token file, or one without a name that only this process has.
#[derive(Debug)]
pub(super) struct TokenFile {
    file: File,
    path: PathBuf,
    /// Byte where the ids begin.
    ids_at: u64,
    /// Of a token file.
    payload: Option<Payload>,
}

/// What is behind the header of a token file.
#[derive(Clone, Copy, Debug)]
struct Payload {
    num_bytes: u64,
    hash: Hash,
}

/// The header, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    info: TokenInfo,
    num_documents: u64,
    has_targets: bool,
    payload_hash: Hash,
}

impl TokenFile {
    pub(super) fn open(path: &Path) -> Result<TokenSet, DataError> {
        let file = File::open(path).map_err(DataError::io("read", path))?;
        let metadata = file.metadata().map_err(DataError::io("read", path))?;
        let mut bytes = [0; HEADER_BYTES];
        let available = metadata.len().min(HEADER_BYTES as u64) as usize;
        file.read_exact_at(&mut bytes[..available], 0)
            .map_err(DataError::io("read", path))?;
        let header = Header::parse(&bytes[..available], metadata.len())
            .map_err(|reason| bad_file(path, reason))?;
        let token_file = Self {
            file,
            path: path.to_path_buf(),
            ids_at: HEADER_BYTES as u64 + 8 * header.num_documents,
            payload: Some(Payload {
                // Header::parse has checked that the file is as long.
                num_bytes: metadata.len() - HEADER_BYTES as u64,
                hash: header.payload_hash,
            }),
        };
        if metadata.len() < VERIFY_AT_OPEN_BYTES {
            token_file.verify()?;
        }
        Ok(TokenSet {
            document_starts: token_file.read_document_starts(&header)?,
            targets: token_file.read_targets(&header)?,
            info: header.info,
            source: Source::File(token_file),
        })
    }

    pub(super) fn save(tokens: &TokenSet, path: &Path) -> Result<(), DataError> {
        let path = &*setun_io::output_path(path)?;
        let name = path.file_name().ok_or_else(|| {
            let reason = "is no file name; name the token file to write".to_owned();
            bad_file(path, reason)
        })?;
        let name = format!(".tmp-{}-{}", name.to_string_lossy(), std::process::id());
        let temporary = path.with_file_name(name);
        let written = write_all(tokens, &temporary)
            .and_then(|()| fs::rename(&temporary, path).map_err(DataError::io("write", path)))
            .and_then(|()| sync_parent(path));
        if written.is_err() {
            // The first error is what matters; a leftover that cannot go either is rare.
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Ids `position..position + out.len()`, which lie in the file.
    pub(super) fn read(
        &self,
        position: u64,
        vocab_size: u32,
        out: &mut [u32],
    ) -> Result<(), DataError> {
        let width = id_bytes(vocab_size);
        let mut at = self.ids_at + position * width as u64;
        let mut bytes = [0; READ_BYTES];
        for out in out.chunks_mut(READ_BYTES / width) {
            let bytes = &mut bytes[..out.len() * width];
            self.read_exact_at(bytes, at)?;
            for (id, bytes) in out.iter_mut().zip(bytes.chunks_exact(width)) {
                let mut four = [0; 4];
                four[..width].copy_from_slice(bytes);
                *id = u32::from_le_bytes(four);
            }
            // Large files are not hashed at open: an id that a flipped bit made must
            // not reach the embedding.
            if let Some(i) = out.iter().position(|&id| id >= vocab_size) {
                let (id, place) = (out[i], at + (i * width) as u64);
                let reason = format!(
                    "id {id} at byte {place} is outside the vocabulary of {vocab_size}: \
                     the file is damaged; {REMEDY}"
                );
                return Err(bad_file(&self.path, reason));
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Checks the payload of a token file; what nobody else can write passes.
    pub(super) fn verify(&self) -> Result<(), DataError> {
        let Some(payload) = self.payload else {
            return Ok(());
        };
        let mut hasher = Hasher::new();
        let mut block = vec![0; 1 << 16];
        let end = HEADER_BYTES as u64 + payload.num_bytes;
        let mut at = HEADER_BYTES as u64;
        while at < end {
            let now = (end - at).min(block.len() as u64) as usize;
            self.read_exact_at(&mut block[..now], at)?;
            hasher.update(&block[..now]);
            at += now as u64;
        }
        if hasher.finalize() == payload.hash {
            return Ok(());
        }
        let reason = format!("its tokens do not match their checksum: damaged; {REMEDY}");
        Err(bad_file(&self.path, reason))
    }

    fn read_document_starts(&self, header: &Header) -> Result<Vec<u64>, DataError> {
        // The header was checked against the file's length, so this size is real.
        let mut bytes = vec![0; 8 * header.num_documents as usize];
        self.read_exact_at(&mut bytes, HEADER_BYTES as u64)?;
        let starts: Vec<u64> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|&eight| u64::from_le_bytes(eight))
            .collect();
        let is_ascending = starts.is_sorted_by(|a, b| a < b);
        let ends = (starts.first(), starts.last());
        if let (Some(0), Some(&last)) = ends
            && is_ascending
            && last < header.info.num_tokens
        {
            return Ok(starts);
        }
        let reason = format!("its document starts do not ascend within the stream; {REMEDY}");
        Err(bad_file(&self.path, reason))
    }

    fn read_targets(&self, header: &Header) -> Result<Option<TargetBits>, DataError> {
        if !header.has_targets {
            return Ok(None);
        }
        let num_tokens = header.info.num_tokens;
        // The header was checked against the file's length, so these sizes are real.
        let at = self.ids_at + num_tokens * id_bytes(header.info.vocab_size) as u64;
        let mut bytes = vec![0; 8 * num_tokens.div_ceil(64) as usize];
        self.read_exact_at(&mut bytes, at)?;
        let words = bytes.as_chunks().0.iter();
        let words = words.map(|&eight| u64::from_le_bytes(eight)).collect();
        let bits = TargetBits::from_words(words, num_tokens).ok_or_else(|| {
            let reason = format!("it has targets behind its last token; {REMEDY}");
            bad_file(&self.path, reason)
        })?;
        Ok(Some(bits))
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> Result<(), DataError> {
        let read = self.file.read_exact_at(bytes, at);
        read.map_err(DataError::io("read", &self.path))
    }
}

/// Ids on their way into a file without a name, in the order in which they come.
#[derive(Debug)]
pub(super) struct Spill {
    out: BufWriter<File>,
    /// Its folder, for messages.
    path: PathBuf,
}

impl Spill {
    pub(super) fn create(directory: &Path) -> Result<Self, DataError> {
        let file = tempfile::tempfile_in(directory).map_err(DataError::io("write", directory))?;
        Ok(Self {
            out: BufWriter::with_capacity(1 << 16, file),
            path: directory.to_path_buf(),
        })
    }

    pub(super) fn write(&mut self, ids: &Ids) -> Result<(), DataError> {
        let mut write = |bytes: &[u8]| self.out.write_all(bytes);
        match ids {
            Ids::U16(ids) => ids.iter().try_for_each(|id| write(&id.to_le_bytes())),
            Ids::U32(ids) => ids.iter().try_for_each(|id| write(&id.to_le_bytes())),
        }
        .map_err(DataError::io("write", &self.path))
    }

    /// The file, to be read.
    pub(super) fn finish(self) -> Result<TokenFile, DataError> {
        let Self { out, path } = self;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error);
        Ok(TokenFile {
            file: file.map_err(DataError::io("write", &path))?,
            path,
            ids_at: 0,
            payload: None,
        })
    }
}

impl Header {
    /// Bytes behind the header; `None` when no file can have that many.
    fn payload_bytes(&self) -> Option<u64> {
        let ids = self
            .info
            .num_tokens
            .checked_mul(id_bytes(self.info.vocab_size) as u64)?;
        let targets = match self.has_targets {
            true => 8 * self.info.num_tokens.div_ceil(64),
            false => 0,
        };
        let starts = self.num_documents.checked_mul(8)?;
        starts.checked_add(ids)?.checked_add(targets)
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let version = match self.has_targets {
            true => VERSION_WITH_TARGETS,
            false => VERSION,
        };
        let width = id_bytes(self.info.vocab_size) as u32;
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        let fields: [&[u8]; 10] = [
            MAGIC,
            &version.to_le_bytes(),
            &width.to_le_bytes(),
            &self.info.num_tokens.to_le_bytes(),
            &self.num_documents.to_le_bytes(),
            &self.info.raw_bytes.to_le_bytes(),
            &self.info.vocab_size.to_le_bytes(),
            &self.info.end_of_text.to_le_bytes(),
            self.info.tokenizer_hash.as_bytes(),
            self.payload_hash.as_bytes(),
        ];
        for field in fields {
            let (now, later) = rest.split_at_mut(field.len());
            now.copy_from_slice(field);
            rest = later;
        }
        let checksum = blake3::hash(&bytes[..CHECKED_BYTES]);
        let half = HEADER_BYTES - CHECKED_BYTES;
        bytes[CHECKED_BYTES..].copy_from_slice(&checksum.as_bytes()[..half]);
        bytes
    }

    /// Parses the first bytes of a file of `file_bytes` bytes, or says what is wrong.
    fn parse(bytes: &[u8], file_bytes: u64) -> Result<Self, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("not a token file; make one with setun tokenize".to_owned());
        }
        let Ok(bytes): Result<&[u8; HEADER_BYTES], _> = bytes.try_into() else {
            return Err(format!("cut short at {file_bytes} bytes; {REMEDY}"));
        };
        let version = u32_at(bytes, 8);
        if ![VERSION, VERSION_WITH_TARGETS].contains(&version) {
            return Err(format!(
                "token file version {version}, but this build reads versions {VERSION} and \
                 {VERSION_WITH_TARGETS}: run setun tokenize again with this build"
            ));
        }
        let header = Self {
            info: TokenInfo {
                num_tokens: u64_at(bytes, 16),
                raw_bytes: u64_at(bytes, 32),
                vocab_size: u32_at(bytes, 40),
                end_of_text: u32_at(bytes, 44),
                tokenizer_hash: hash_at(bytes, 48),
            },
            num_documents: u64_at(bytes, 24),
            has_targets: version == VERSION_WITH_TARGETS,
            payload_hash: hash_at(bytes, 80),
        };
        // Writing the header again checks the id width and the checksum in one go.
        if header.to_bytes() != *bytes {
            return Err(format!(
                "its header does not match its checksum: damaged; {REMEDY}"
            ));
        }
        let info = &header.info;
        if header.num_documents == 0
            || info.num_tokens < header.num_documents
            || info.end_of_text >= info.vocab_size
        {
            return Err(format!("its header makes no sense; {REMEDY}"));
        }
        let expected = header
            .payload_bytes()
            .and_then(|n| n.checked_add(HEADER_BYTES as u64));
        match expected {
            Some(expected) if expected == file_bytes => Ok(header),
            Some(expected) if expected > file_bytes => Err(format!(
                "cut short: {file_bytes} bytes instead of {expected}; {REMEDY}"
            )),
            Some(expected) => Err(format!(
                "{file_bytes} bytes instead of {expected}: something was added; {REMEDY}"
            )),
            None => Err(format!("its header makes no sense; {REMEDY}")),
        }
    }
}

/// Writes the whole file to `path` and syncs it. The header comes last, because it holds
/// the hash of what is behind it.
fn write_all(tokens: &TokenSet, path: &Path) -> Result<(), DataError> {
    let file = File::create(path).map_err(DataError::io("write", path))?;
    let mut out = BufWriter::with_capacity(1 << 16, file);
    let mut hasher = Hasher::new();
    out.write_all(&[0; HEADER_BYTES])
        .map_err(DataError::io("write", path))?;
    tokens.each_payload_block(&mut |block| {
        hasher.update(block);
        out.write_all(block).map_err(DataError::io("write", path))
    })?;
    let header = Header {
        info: tokens.info,
        num_documents: tokens.document_starts.len() as u64,
        has_targets: tokens.targets.is_some(),
        payload_hash: hasher.finalize(),
    };
    let finish = || -> io::Result<()> {
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.write_all_at(&header.to_bytes(), 0)?;
        file.sync_all()
    };
    finish().map_err(DataError::io("write", path))
}

/// Makes the rename itself survive a power loss.
fn sync_parent(path: &Path) -> Result<(), DataError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let sync = File::open(parent).and_then(|folder| folder.sync_all());
    sync.map_err(DataError::io("write", parent))
}

fn bad_file(path: &Path, reason: String) -> DataError {
    let path = path.to_path_buf();
    DataError::BadTokenFile { path, reason }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

fn hash_at(bytes: &[u8; HEADER_BYTES], at: usize) -> Hash {
    let mut field = [0; 32];
    field.copy_from_slice(&bytes[at..at + 32]);
    Hash::from_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokens::tests::{all, masked_token_set, token_set};

    /// A fresh folder, removed at the end of its test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let id = std::process::id();
            let path = std::env::temp_dir().join(format!("setun-token-file-{name}-{id}"));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).expect("temporary folder");
            Self(path)
        }

        fn file(&self) -> PathBuf {
            self.0.join("train.tok")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn documents(num_tokens: usize, vocab_size: u32) -> Vec<Vec<u32>> {
        let id = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % (vocab_size - 1);
        let ids: Vec<u32> = (0..num_tokens).map(id).collect();
        ids.chunks(777).map(<[u32]>::to_vec).collect()
    }

    #[test]
    fn a_saved_stream_reads_back_the_same() {
        let folder = Folder::new("same");
        for vocab_size in [300, 65_536, 65_537, 151_669] {
            let tokens = token_set(&documents(20_000, vocab_size), vocab_size);
            tokens.save(&folder.file()).expect("saves");
            let opened = TokenSet::open(&folder.file()).expect("opens");
            assert_eq!(opened.info(), tokens.info());
            assert_eq!(opened.document_starts(), tokens.document_starts());
            assert_eq!(all(&opened), all(&tokens));
            let hash = |tokens: &TokenSet| tokens.content_hash().expect("hashes");
            assert_eq!(hash(&opened), hash(&tokens));
            for (position, len) in [(0, 1), (3, 5000), (19_990, 10), (20_025, 1)] {
                let (mut a, mut b) = (vec![0; len], vec![0; len]);
                tokens.read(position, &mut a).expect("reads");
                opened.read(position, &mut b).expect("reads");
                assert_eq!(a, b);
            }
            let names = fs::read_dir(&folder.0).expect("lists").count();
            assert_eq!(names, 1, "nothing else is left behind");
        }
    }

    #[test]
    fn an_opened_file_can_be_saved_again() {
        let folder = Folder::new("again");
        token_set(&documents(5000, 70_000), 70_000)
            .save(&folder.file())
            .expect("saves");
        let copy = folder.0.join("copy.tok");
        let opened = TokenSet::open(&folder.file()).expect("opens");
        opened.save(&copy).expect("saves");
        let bytes = |path: &Path| fs::read(path).expect("reads");
        assert_eq!(bytes(&copy), bytes(&folder.file()));
    }

    #[test]
    fn targets_are_saved_with_the_tokens() {
        let folder = Folder::new("targets");
        for num_tokens in [1, 63, 64, 5000] {
            let documents = documents(num_tokens, 300);
            let tokens = masked_token_set(&documents, 300, Some(|id| id % 3 == 0));
            tokens.save(&folder.file()).expect("saves");
            let opened = TokenSet::open(&folder.file()).expect("opens");
            assert_eq!(opened.targets, tokens.targets);
            assert_eq!(all(&opened), all(&tokens));
            let expected = all(&tokens).iter().filter(|&id| id % 3 == 0).count();
            assert_eq!(opened.num_targets(), expected as u64);
            let hash = |tokens: &TokenSet| tokens.content_hash().expect("hashes");
            assert_eq!(hash(&opened), hash(&tokens));
            assert_ne!(hash(&opened), hash(&token_set(&documents, 300)));
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let folder = Folder::new("flip");
        masked_token_set(&documents(60, 300), 300, Some(|id| id > 99))
            .save(&folder.file())
            .expect("saves");
        let good = fs::read(folder.file()).expect("reads");
        for bit in 0..8 * good.len() {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(folder.file(), &bad).expect("writes");
            let why = TokenSet::open(&folder.file()).expect_err("damaged");
            assert!(
                matches!(why, DataError::BadTokenFile { .. }),
                "bit {bit}: {why}"
            );
        }
    }

    #[test]
    fn every_other_length_is_refused() {
        let folder = Folder::new("length");
        token_set(&documents(60, 300), 300)
            .save(&folder.file())
            .expect("saves");
        let mut bytes = fs::read(folder.file()).expect("reads");
        bytes.push(0);
        for len in (0..bytes.len() - 1).chain([bytes.len()]) {
            fs::write(folder.file(), &bytes[..len]).expect("writes");
            let message = TokenSet::open(&folder.file())
                .expect_err("length")
                .to_string();
            let expected = match len {
                0..8 => "not a token file",
                _ if len < bytes.len() => "cut short",
                _ => "something was added",
            };
            assert!(message.contains(expected), "{len} bytes: {message}");
        }
    }

    #[test]
    fn foreign_and_newer_files_are_named() {
        let folder = Folder::new("foreign");
        let message = |bytes: &[u8]| {
            fs::write(folder.file(), bytes).expect("writes");
            let why = TokenSet::open(&folder.file()).expect_err("refused");
            why.to_string()
        };
        assert!(message(&[b'x'; 500]).contains("train.tok: not a token file"));
        let mut newer = [0; 200];
        newer[..8].copy_from_slice(MAGIC);
        newer[8] = 3;
        assert!(message(&newer).contains("version 3, but this build reads versions 1 and 2"));
        let gone = TokenSet::open(&folder.0.join("gone.tok")).expect_err("missing");
        assert!(gone.to_string().contains("gone.tok"), "{gone}");
    }

    #[test]
    fn well_formed_headers_that_make_no_sense_are_refused() {
        let good = Header {
            info: *token_set(&documents(60, 300), 300).info(),
            num_documents: 1,
            has_targets: false,
            payload_hash: blake3::hash(b""),
        };
        let check = |change: &dyn Fn(&mut Header)| {
            let mut header = good;
            change(&mut header);
            Header::parse(&header.to_bytes(), 128 + 8 + 61 * 2)
        };
        assert_eq!(check(&|_| {}), Ok(good));
        let bad: [&dyn Fn(&mut Header); 5] = [
            &|h| h.num_documents = 0,
            &|h| h.num_documents = 62,
            &|h| h.info.end_of_text = 300,
            &|h| h.info.num_tokens = u64::MAX,
            &|h| (h.num_documents, h.info.num_tokens) = (u64::MAX / 8, u64::MAX / 2),
        ];
        for change in bad {
            let why = check(change).expect_err("makes no sense");
            assert!(why.contains("makes no sense"), "{why}");
        }
    }

    #[test]
    fn bad_ids_are_found_while_reading() {
        let folder = Folder::new("ids");
        let tokens = token_set(&documents(60, 300), 300);
        tokens.save(&folder.file()).expect("saves");
        // Opened before the damage, like a large file whose payload is not hashed.
        let opened = TokenSet::open(&folder.file()).expect("opens");
        let file = fs::OpenOptions::new().write(true).open(folder.file());
        let at = (HEADER_BYTES + 8 + 2 * 10) as u64;
        file.and_then(|file| file.write_all_at(&[0xff, 0xff], at))
            .expect("writes");
        let mut out = [0; 5];
        opened.read(0, &mut out).expect("before the damage");
        let why = opened.read(8, &mut out).expect_err("id 65535").to_string();
        assert!(why.contains("id 65535 at byte 156"), "{why}");
        assert!(opened.verify().is_err());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let folder = Folder::new("fail");
        let tokens = token_set(&documents(60, 300), 300);
        // The target is a folder with content, so the rename fails.
        let target = folder.0.join("taken");
        fs::create_dir_all(target.join("inside")).expect("folder");
        assert!(tokens.save(&target).is_err());
        assert!(tokens.save(&folder.0.join("gone/train.tok")).is_err());
        let names = fs::read_dir(&folder.0).expect("lists").count();
        assert_eq!(names, 1);
    }
}
