//! `tokenizer.json`: other models, ids that collide, merges that lead nowhere.

use crate::exhibit::{Exhibit, Item};
use crate::specimen::tokenizer_json;
use serde_json::{Map, Value, json};

/// The trained tokenizer after a change.
fn changed(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut file = tokenizer_json();
    change(&mut file);
    file.to_string().into_bytes()
}

/// The tokenizer with one part replaced.
fn with(pointer: &str, value: Value) -> Vec<u8> {
    changed(|file| *file.pointer_mut(pointer).expect("a part of the file") = value)
}

/// The vocabulary after a change.
fn vocab(change: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
    changed(|file| {
        change(
            file["model"]["vocab"]
                .as_object_mut()
                .expect("a vocabulary"),
        )
    })
}

/// The merges and one more.
fn merge(extra: Value) -> Vec<u8> {
    changed(|file| {
        let merges = file["model"]["merges"].as_array_mut().expect("a list");
        merges.push(extra);
    })
}

/// The added tokens and one more.
fn added(id: u64, content: &str) -> Vec<u8> {
    changed(|file| {
        let tokens = file["added_tokens"].as_array_mut().expect("a list");
        let mut token = tokens[0].clone();
        token["id"] = id.into();
        token["content"] = content.into();
        tokens.push(token);
    })
}

pub fn good() -> Vec<Item> {
    let texts = |file: &mut Value| {
        let merges = file["model"]["merges"].as_array_mut().expect("a list");
        for merge in merges {
            let part = |i: usize| merge[i].as_str().expect("a token").to_owned();
            *merge = json!(format!("{} {}", part(0), part(1)));
        }
    };
    let bytes = [
        changed(|_| {}),
        changed(texts),
        added(280, "<|more|>"),
        with("/normalizer", Value::Null),
    ];
    bytes.into_iter().map(Item::Tokenizer).collect()
}

pub fn exhibits() -> Vec<Exhibit> {
    let mut all = texts();
    all.extend(parts());
    all.extend(vocabularies());
    all.extend(merges());
    all.extend(added_tokens());
    all
}

fn exhibit(
    name: &'static str,
    wrong: &'static str,
    words: &'static [&'static str],
    bytes: Vec<u8>,
) -> Exhibit {
    Exhibit::new(name, wrong, words, Item::Tokenizer(bytes))
}

fn texts() -> Vec<Exhibit> {
    let good = changed(|_| {});
    vec![
        exhibit("empty", "no bytes", &["line 1 column 0"], Vec::new()),
        exhibit(
            "cut",
            "the second half is gone",
            &["EOF", "line 1"],
            good[..good.len() / 2].to_vec(),
        ),
        exhibit(
            "cut-at-the-end",
            "the last brace is gone",
            &["EOF"],
            good[..good.len() - 1].to_vec(),
        ),
        exhibit(
            "html",
            "a web page",
            &["line 1 column 1"],
            b"<html>404</html>".to_vec(),
        ),
        exhibit(
            "sentencepiece",
            "a binary file",
            &["not a tokenizer.json"],
            b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02".to_vec(),
        ),
        exhibit(
            "bad-utf8",
            "not UTF-8",
            &["not a tokenizer.json", "utf-8"],
            b"{\"\xff\":1}".to_vec(),
        ),
        exhibit("object", "an empty object", &["`model`"], b"{}".to_vec()),
        exhibit("list", "a list", &["not a tokenizer.json"], b"[1]".to_vec()),
        exhibit(
            "trailing",
            "a second object",
            &["trailing"],
            [&good[..], b"{}"].concat(),
        ),
        exhibit(
            "too-long",
            "over 64 MiB of spaces",
            &["too long"],
            vec![b' '; (64 << 20) + 1],
        ),
        exhibit(
            "depth-bomb",
            "nested lists",
            &["recursion limit"],
            format!("{{\"model\":{}", "[".repeat(1 << 20)).into_bytes(),
        ),
        exhibit(
            "normalizer-bomb",
            "nested normalizers",
            &["recursion limit"],
            {
                let open = r#"{"type":"Sequence","normalizers":["#.repeat(10_000);
                format!("{{\"normalizer\":{open}").into_bytes()
            },
        ),
        exhibit("same-key", "two models", &["\"model\" occurs twice"], {
            let text = String::from_utf8(good.clone()).expect("JSON is UTF-8");
            text.replacen('{', "{\"model\":null,", 1).into_bytes()
        }),
        exhibit("same-token", "a token twice", &["\"!\" occurs twice"], {
            let text = String::from_utf8(good.clone()).expect("JSON is UTF-8");
            text.replacen("\"vocab\":{", "\"vocab\":{\"!\":7,", 1)
                .into_bytes()
        }),
        exhibit(
            "version",
            "a format of the future",
            &["2.0"],
            with("/version", json!("2.0")),
        ),
    ]
}

fn parts() -> Vec<Exhibit> {
    let unigram = json!({ "type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]] });
    let word_piece = json!({ "type": "WordPiece", "unk_token": "a", "vocab": { "a": 0 },
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 100 });
    let replace = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "b" });
    let fixed = json!({ "type": "Sequence", "pretokenizers": [
        { "type": "FixedLength", "length": 0 },
        { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false } ] });
    let pattern = |regex: &str| {
        json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated",
              "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false } ] })
    };
    vec![
        exhibit(
            "unigram",
            "a Unigram model",
            &["the model", "Unigram"],
            with("/model", unigram),
        ),
        exhibit(
            "word-piece",
            "a WordPiece model",
            &["the model", "WordPiece"],
            with("/model", word_piece),
        ),
        exhibit(
            "unknown-model",
            "a model of no kind",
            &["the model", "Magic"],
            with("/model/type", json!("Magic")),
        ),
        exhibit(
            "model-null",
            "no model",
            &["null"],
            with("/model", Value::Null),
        ),
        exhibit(
            "dropout",
            "random merges",
            &["model.dropout"],
            with("/model/dropout", json!(0.1)),
        ),
        exhibit(
            "byte-fallback",
            "bytes as words",
            &["model.byte_fallback"],
            with("/model/byte_fallback", json!(true)),
        ),
        exhibit(
            "prefix",
            "a prefix",
            &["prefix", "##"],
            with("/model/continuing_subword_prefix", json!("##")),
        ),
        exhibit(
            "long-prefix",
            "a prefix longer than tokens",
            &["prefix"],
            with("/model/continuing_subword_prefix", json!("é".repeat(500))),
        ),
        exhibit(
            "suffix",
            "a suffix",
            &["suffix", "</w>"],
            with("/model/end_of_word_suffix", json!("</w>")),
        ),
        exhibit(
            "lower-case",
            "text loses its case",
            &["normalizer"],
            with("/normalizer", json!({ "type": "Lowercase" })),
        ),
        exhibit(
            "replaces",
            "text is replaced",
            &["normalizer"],
            with("/normalizer", replace),
        ),
        exhibit(
            "charsmap",
            "a map that is no map",
            &["normalizer", "Precompiled"],
            with(
                "/normalizer",
                json!({ "type": "Precompiled", "precompiled_charsmap": "////" }),
            ),
        ),
        exhibit(
            "no-pre-tokenizer",
            "no byte level",
            &["pre_tokenizer"],
            with("/pre_tokenizer", Value::Null),
        ),
        exhibit(
            "length-zero",
            "pieces of no characters",
            &["pre_tokenizer"],
            with("/pre_tokenizer", fixed),
        ),
        exhibit(
            "bad-pattern",
            "a pattern that does not close",
            &["pre_tokenizer"],
            with("/pre_tokenizer", pattern("(a")),
        ),
        exhibit(
            "pattern-bomb",
            "a pattern of 10^9 states",
            &["pre_tokenizer"],
            with("/pre_tokenizer", pattern("((a{1000}){1000}){1000}")),
        ),
        exhibit(
            "decoder-number",
            "a way back without a name",
            &["decoder", "line 1"],
            with("/decoder", json!({ "type": 7 })),
        ),
        exhibit(
            "removes",
            "delimiters vanish",
            &["pre_tokenizer", "removes"],
            with("/pre_tokenizer/pretokenizers/0/behavior", json!("Removed")),
        ),
        exhibit(
            "no-decoder",
            "no byte level back",
            &["decoder"],
            with("/decoder", Value::Null),
        ),
        exhibit(
            "decoder-of-others",
            "another way back",
            &["decoder"],
            with(
                "/decoder",
                json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
            ),
        ),
    ]
}

fn vocabularies() -> Vec<Exhibit> {
    vec![
        exhibit(
            "no-vocab",
            "no tokens",
            &["vocab"],
            changed(|file| {
                drop(
                    file["model"]
                        .as_object_mut()
                        .expect("an object")
                        .remove("vocab"),
                )
            }),
        ),
        exhibit(
            "empty-vocab",
            "an empty vocabulary",
            &["model.vocab"],
            changed(|file| {
                file["model"]["vocab"] = json!({});
                file["model"]["merges"] = json!([]);
            }),
        ),
        exhibit(
            "vocab-list",
            "a list of tokens",
            &["not a tokenizer.json"],
            with("/model/vocab", json!(["a", "b"])),
        ),
        exhibit(
            "same-id",
            "two tokens of one id",
            &["\"B\"", "id 32", "\"A\""],
            vocab(|vocab| drop(vocab.insert("B".to_owned(), vocab["A"].clone()))),
        ),
        exhibit(
            "hole",
            "an id without a token",
            &["has id 279", "from 0 to 278"],
            vocab(|vocab| {
                let last = vocab
                    .values_mut()
                    .max_by_key(|id| id.as_u64())
                    .expect("a token");
                *last = json!(279);
            }),
        ),
        exhibit(
            "far-id",
            "an id of a million",
            &["\"A\"", "has id 1000000"],
            vocab(|vocab| vocab["A"] = json!(1_000_000)),
        ),
        exhibit(
            "huge-id",
            "an id of 2^32 - 1",
            &["4294967295", "too large"],
            vocab(|vocab| vocab["A"] = json!(u32::MAX)),
        ),
        exhibit(
            "id-over-32-bits",
            "an id of 2^32",
            &["4294967296"],
            vocab(|vocab| vocab["A"] = json!(1u64 << 32)),
        ),
        exhibit(
            "negative-id",
            "an id of -1",
            &["-1"],
            vocab(|vocab| vocab["A"] = json!(-1)),
        ),
        exhibit(
            "fraction-id",
            "an id of 0.5",
            &["0.5"],
            vocab(|vocab| vocab["A"] = json!(0.5)),
        ),
        exhibit(
            "text-id",
            "an id that is a text",
            &["string"],
            vocab(|vocab| vocab["A"] = json!("32")),
        ),
        exhibit(
            "no-byte",
            "a byte without a token",
            &["byte 0x41"],
            vocab(|vocab| {
                let id = vocab.remove("A").expect("a byte");
                vocab.insert("AAAA".to_owned(), id);
            }),
        ),
    ]
}

fn merges() -> Vec<Exhibit> {
    vec![
        exhibit(
            "no-merges",
            "no merges",
            &["merges"],
            changed(|file| {
                drop(
                    file["model"]
                        .as_object_mut()
                        .expect("an object")
                        .remove("merges"),
                )
            }),
        ),
        exhibit(
            "merge-of-nothing",
            "an unknown left side",
            &["merge 23", "\"xyz\""],
            merge(json!(["xyz", "A"])),
        ),
        exhibit(
            "merge-with-nothing",
            "an unknown right side",
            &["merge 23", "\"xyz\""],
            merge(json!(["A", "xyz"])),
        ),
        exhibit(
            "merge-to-nothing",
            "an unknown result",
            &["merge 23", "\"AA\""],
            merge(json!(["A", "A"])),
        ),
        exhibit(
            "merge-over-all",
            "a result longer than every token",
            &["merge 23"],
            changed(|file| {
                let vocab = file["model"]["vocab"].as_object().expect("a vocabulary");
                let longest = vocab
                    .keys()
                    .max_by_key(|token| token.len())
                    .expect("a token");
                let extra = json!([longest, longest]);
                file["model"]["merges"]
                    .as_array_mut()
                    .expect("a list")
                    .push(extra);
            }),
        ),
        exhibit(
            "empty-merge",
            "a merge of nothing with nothing",
            &["merge 23", "\"\""],
            merge(json!(["", ""])),
        ),
        exhibit(
            "merge-of-three",
            "three sides",
            &["expected a merge", "line 1"],
            merge(json!(["A", "B", "C"])),
        ),
        exhibit(
            "merge-of-one",
            "one side",
            &["expected a merge", "line 1"],
            merge(json!(["A"])),
        ),
        exhibit(
            "merge-number",
            "a merge that is a number",
            &["expected a merge"],
            merge(json!(7)),
        ),
        exhibit(
            "merge-text-of-three",
            "two spaces in a text",
            &["merge 0", "\"A B C\""],
            with("/model/merges", json!(["A B C"])),
        ),
        exhibit(
            "merge-text-of-one",
            "no space in a text",
            &["merge 0", "\"AB\""],
            with("/model/merges", json!(["AB"])),
        ),
        exhibit(
            "merges-in-both-spellings",
            "a text among lists",
            &["merge 23", "lists"],
            merge(json!("A B")),
        ),
        exhibit(
            "merges-object",
            "merges that are no list",
            &["expected a sequence", "line 1 column"],
            changed(|file| file["model"]["merges"] = json!({})),
        ),
    ]
}

fn added_tokens() -> Vec<Exhibit> {
    vec![
        exhibit(
            "added-without-id",
            "no id",
            &["`id`"],
            changed(|file| {
                let token = file["added_tokens"][0].as_object_mut().expect("an object");
                token.remove("id");
            }),
        ),
        exhibit(
            "added-without-text",
            "no text",
            &["`content`"],
            changed(|file| {
                let token = file["added_tokens"][0].as_object_mut().expect("an object");
                token.remove("content");
            }),
        ),
        exhibit(
            "added-far",
            "an id out of place",
            &["<|endoftext|>", "has id 7000", "279"],
            with("/added_tokens/0/id", json!(7000)),
        ),
        exhibit(
            "added-before-one-more",
            "a missing token in front",
            &["\"<|c|>\"", "281"],
            added(281, "<|c|>"),
        ),
        exhibit(
            "added-on-a-word",
            "the id of a word",
            &["\"<|c|>\"", "has id 0"],
            added(0, "<|c|>"),
        ),
        exhibit(
            "added-same-id",
            "the id of another",
            &["\"<|c|>\"", "has id 279"],
            added(279, "<|c|>"),
        ),
        exhibit(
            "added-twice",
            "a token twice",
            &["\"<|endoftext|>\"", "id 279", "before"],
            added(280, "<|endoftext|>"),
        ),
        exhibit(
            "added-empty",
            "a token of no text",
            &["id 280", "empty"],
            added(280, ""),
        ),
        exhibit(
            "added-huge",
            "an id of 2^32 - 1",
            &["4294967295"],
            added(u64::from(u32::MAX), "<|c|>"),
        ),
        exhibit(
            "added-over-32-bits",
            "an id of 2^40",
            &["1099511627776"],
            added(1 << 40, "<|c|>"),
        ),
        exhibit(
            "added-negative",
            "an id of -1",
            &["-1"],
            with("/added_tokens/0/id", json!(-1)),
        ),
        exhibit(
            "added-object",
            "added tokens that are no list",
            &["line 1"],
            with("/added_tokens", json!({})),
        ),
    ]
}
