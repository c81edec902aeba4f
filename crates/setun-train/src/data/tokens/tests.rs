//! Streams against their definition.

use super::*;
use crate::data::corpus::tests::Texts;
use std::cell::RefCell;

/// Encodes with one id per byte; `vocab_size - 1` is `<|endoftext|>`.
fn encode_bytes(
    texts: &[String],
    vocab_size: u32,
    seed: u64,
    spill: Option<&Path>,
    progress: &dyn Fn(u64, u64),
) -> Result<TokenSet, DataError> {
    let encode_one = |text: &&str| {
        if text.contains('!') {
            return Err(format!("no ! please: {}", text.len()));
        }
        Ok(text.bytes().map(u32::from).collect())
    };
    let encode = |texts: &[&str]| texts.iter().map(encode_one).collect();
    let encoder = Encoder {
        vocab_size,
        end_of_text: vocab_size - 1,
        tokenizer_hash: blake3::hash(b"bytes"),
        special: None,
        encode: &encode,
    };
    let documents: Vec<usize> = (0..texts.len()).collect();
    TokenSet::encode_with(
        &Texts::new(texts),
        &documents,
        &encoder,
        seed,
        spill,
        progress,
    )
}

/// A stream of documents with these ids (without separators), in this order.
pub(in crate::data) fn token_set(documents: &[Vec<u32>], vocab_size: u32) -> TokenSet {
    masked_token_set(documents, vocab_size, None)
}

/// The same, where only ids that fit are targets.
pub(in crate::data) fn masked_token_set(
    documents: &[Vec<u32>],
    vocab_size: u32,
    is_target: Option<fn(u32) -> bool>,
) -> TokenSet {
    let mut stream = Stream::new(vocab_size, is_target.is_some(), None);
    for document in documents {
        let ids = [&document[..], &[vocab_size - 1]].concat();
        let targets = ids.iter().map(|&id| is_target.is_none_or(|fits| fits(id)));
        let chunk = Chunk {
            targets: targets.collect(),
            ids,
            document_starts: vec![0],
            done_bytes: document.len() as u64,
            raw_bytes: document.len() as u64,
        };
        stream.append(&chunk).expect("memory takes it");
    }
    let set = stream.finish(vocab_size - 1, blake3::hash(b"test"));
    set.expect("it is in memory")
}

pub(in crate::data) fn all(tokens: &TokenSet) -> Vec<u32> {
    let mut ids = vec![0; tokens.num_tokens() as usize];
    tokens.read(0, &mut ids).expect("reads");
    ids
}

/// Several chunks of text, some documents larger than a chunk.
fn texts() -> Vec<String> {
    let line = |i: usize| format!("document {i} ").repeat(1 + i * i % 977);
    let mut texts: Vec<String> = (0..300).map(line).collect();
    texts.push("x".repeat(CHUNK_BYTES as usize + 1));
    texts
}

#[test]
fn every_document_is_there_once_in_the_seeded_order() {
    let texts = texts();
    let tokens = encode_bytes(&texts, 257, 3, None, &|_, _| {}).expect("encodes");
    let ids = all(&tokens);
    let starts = tokens.document_starts();
    let ends = starts.iter().skip(1).copied().chain([ids.len() as u64]);
    let mut found: Vec<String> = Vec::new();
    for (&from, to) in starts.iter().zip(ends) {
        let (last, body) = ids[from as usize..to as usize]
            .split_last()
            .expect("not empty");
        assert_eq!(*last, 256);
        found.push(body.iter().map(|&id| id as u8 as char).collect());
    }
    assert_ne!(found, texts, "the order is shuffled");
    let (mut found, mut texts) = (found, texts);
    found.sort();
    texts.sort();
    assert_eq!(found, texts);
    let raw: usize = texts.iter().map(String::len).sum();
    assert_eq!(tokens.info().raw_bytes, raw as u64);
    assert_eq!(tokens.num_tokens(), (raw + texts.len()) as u64);
}

#[test]
fn a_real_tokenizer_gives_the_text_back_and_is_recognised() {
    let texts = ["one small text, <|endoftext|> included", "another\none"].map(str::to_owned);
    let train = |size| Tokenizer::train(texts.iter().map(String::as_str), size);
    let tokenizer = train(260).expect("trains");
    let corpus = Texts::new(&texts);
    let tokens = TokenSet::encode(&corpus, &[0, 1], &tokenizer, 1, None, &|_, _| {});
    let tokens = tokens.expect("encodes");
    let end = tokenizer.end_of_text().expect("it was trained here");
    let mut found: Vec<String> = all(&tokens)
        .split_inclusive(|&id| id == end)
        .map(|document| tokenizer.decode(&document[..document.len() - 1]))
        .collect();
    found.sort();
    assert_eq!(found, [texts[1].clone(), texts[0].clone()]);
    tokens.check_tokenizer(&tokenizer).expect("the same");
    let other = train(261).expect("trains");
    let why = tokens.check_tokenizer(&other).expect_err("another");
    assert!(why.to_string().contains("another tokenizer"), "{why}");
}

#[test]
fn the_stream_is_a_function_of_the_seed() {
    let texts = texts();
    let hash = |seed| {
        let tokens = encode_bytes(&texts, 257, seed, None, &|_, _| {}).expect("encodes");
        tokens.content_hash().expect("hashes")
    };
    assert_eq!(hash(1), hash(1));
    assert_ne!(hash(1), hash(2));
}

#[test]
fn progress_rises_to_the_total() {
    let seen = RefCell::new(Vec::new());
    let progress = |done, total| seen.borrow_mut().push((done, total));
    let tokens = encode_bytes(&texts(), 257, 0, None, &progress).expect("encodes");
    let seen = seen.into_inner();
    assert!(seen.len() > 2 && seen.is_sorted());
    let total = tokens.info().raw_bytes;
    assert_eq!(seen.last(), Some(&(total, total)));
}

#[test]
fn the_first_bad_document_is_named_whatever_the_threads_do() {
    let mut texts = texts();
    for text in texts.iter_mut().skip(200) {
        text.push('!');
    }
    let messages: Vec<String> = (0..5)
        .map(|_| encode_bytes(&texts, 257, 3, None, &|_, _| {}).expect_err("bad"))
        .map(|why| why.to_string())
        // Each time another file has the texts.
        .filter_map(|why| Some(why.split_once(", byte ")?.1.to_owned()))
        .collect();
    assert_eq!(messages.len(), 5);
    assert!(messages[0].contains(": no ! please"), "{}", messages[0]);
    assert!(messages.iter().all(|m| *m == messages[0]), "{messages:?}");
}

#[test]
fn ids_outside_the_vocabulary_and_no_documents_are_refused() {
    let message = |vocab_size| {
        let why = encode_bytes(&["abc".to_owned()], vocab_size, 0, None, &|_, _| {});
        why.expect_err("refused").to_string()
    };
    assert!(
        message(98).contains("<|endoftext|> (id 97)"),
        "{}",
        message(98)
    );
    assert!(
        message(97).contains("id 97 in a vocabulary of 97"),
        "{}",
        message(97)
    );
    let why = encode_bytes(&[], 257, 0, None, &|_, _| {}).expect_err("none");
    assert!(why.to_string().contains("no documents"), "{why}");
}

#[test]
fn the_width_follows_the_vocabulary() {
    let narrow = token_set(&[vec![65_534, 0]], 65_536);
    assert!(matches!(narrow.source, Source::Memory(Ids::U16(_))));
    assert_eq!(all(&narrow), [65_534, 0, 65_535]);
    let wide = token_set(&[vec![65_536, 0]], 65_537 + 1);
    assert!(matches!(wide.source, Source::Memory(Ids::U32(_))));
    assert_eq!(all(&wide), [65_536, 0, 65_537]);
}

#[test]
fn circular_reads_wrap() {
    let tokens = token_set(&[vec![1, 2], vec![3]], 10);
    let mut out = [0; 12];
    tokens.read_circular(7, &mut out).expect("reads");
    assert_eq!(out, [9, 3, 9, 1, 2, 9, 3, 9, 1, 2, 9, 3]);
}

#[test]
#[should_panic(expected = "2 tokens from 3 of 4")]
fn reads_outside_are_refused() {
    let tokens = token_set(&[vec![1, 2, 3]], 10);
    let _ = tokens.read(3, &mut [0; 2]);
}

#[test]
fn a_large_stream_goes_to_a_file_without_a_name() {
    let folder = std::env::temp_dir().join(format!("setun-spill-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("temporary folder");
    // 14 MB of ids, so that the file is written in several parts.
    let texts: Vec<String> = (0..140).map(|i| format!("{i:05} ").repeat(8000)).collect();
    for vocab_size in [300, 70_000] {
        let encode = |spill| encode_bytes(&texts, vocab_size, 7, spill, &|_, _| {});
        let held = encode(None).expect("encodes");
        let spilled = encode(Some(&folder)).expect("encodes");
        assert!(matches!(held.source, Source::Memory(_)));
        assert!(matches!(spilled.source, Source::File(_)));
        assert_eq!(std::fs::read_dir(&folder).expect("lists").count(), 0);
        assert_eq!(spilled.info(), held.info());
        assert_eq!(all(&spilled), all(&held));
        let hash = |tokens: &TokenSet| tokens.content_hash().expect("hashes");
        assert_eq!(hash(&spilled), hash(&held));
        spilled
            .verify()
            .expect("there is nothing to check it against");
        let copy = folder.join("copy.tokens");
        spilled.save(&copy).expect("saves");
        let opened = TokenSet::open(&copy).expect("opens");
        assert_eq!(hash(&opened), hash(&held));
        std::fs::remove_file(copy).expect("it was saved");
    }
    let small = encode_bytes(&texts[..1], 300, 7, Some(&folder), &|_, _| {});
    assert!(matches!(small.expect("encodes").source, Source::Memory(_)));
    std::fs::remove_dir_all(&folder).expect("it is empty");
    let why = encode_bytes(&texts, 300, 7, Some(&folder), &|_, _| {}).expect_err("gone");
    assert!(matches!(why, DataError::Io { .. }), "{why}");
}

/// What follows a huge document does not pile up in memory while that is encoded.
#[test]
fn few_chunks_wait_for_a_slow_one() {
    let num_threads = thread::available_parallelism().map_or(1, NonZero::get);
    let most = ahead(num_threads);
    let (num_documents, seed) = (most + 8, 5);
    let order = Permutation::new(num_documents as u64, seed, DOCUMENT_ORDER_EPOCH);
    let slow = order.at(0) as usize;
    let text = |i: usize| match i == slow {
        true => "?".repeat(CHUNK_BYTES as usize),
        false => "x".repeat(CHUNK_BYTES as usize),
    };
    let texts: Vec<String> = (0..num_documents).map(text).collect();
    let (done, seen) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let encode = |texts: &[&str]| {
        if texts[0].starts_with('?') {
            // As slow as it takes until the others do nothing any more.
            let mut before = usize::MAX;
            while done.load(Ordering::Relaxed) != before {
                before = done.load(Ordering::Relaxed);
                thread::sleep(Duration::from_millis(200));
            }
            seen.store(before, Ordering::Relaxed);
        } else {
            done.fetch_add(1, Ordering::Relaxed);
        }
        let ids = |text: &&str| -> Vec<u32> { text.bytes().map(u32::from).collect() };
        Ok::<Vec<Vec<u32>>, String>(texts.iter().map(ids).collect())
    };
    let encoder = Encoder {
        vocab_size: 257,
        end_of_text: 256,
        tokenizer_hash: blake3::hash(b"bytes"),
        special: None,
        encode: &encode,
    };
    let documents: Vec<usize> = (0..num_documents).collect();
    let corpus = Texts::new(&texts);
    let tokens = TokenSet::encode_with(&corpus, &documents, &encoder, seed, None, &|_, _| {});
    let tokens = tokens.expect("encodes");
    assert_eq!(tokens.document_starts().len(), num_documents);
    let seen = seen.into_inner();
    assert!(seen < most, "{seen} chunks waited, fewer than {most} may");
}
