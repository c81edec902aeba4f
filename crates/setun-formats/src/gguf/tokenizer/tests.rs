//! Tokenizers through the metadata and back: the same ids on text of many scripts.

use super::*;
use std::collections::BTreeMap;

const PROSE: &str = "The balance ternary machine of Moscow counted with minus one, zero and \
    one. It's small, it's cheap, and they've built fifty of them.\n\n  Weights that \
    are ternary need two bits; the scale of a group needs sixteen.\n";

const SCRIPTS: &str = "naïve e\u{301}té Ελληνικά Русский язык עברית العربية हिन्दी ไทย 漢字とかな \
    한국어 😀👩‍👩‍👧 \u{0}\u{7f}\r\n\t\tx  y\u{a0}z   \n 3.14 1234567 it'S don't <|endoftext|>\
    <|im_start|>user <|fim_prefix|> <think> \u{200b}";

fn trained(vocab_size: usize) -> Tokenizer {
    let words: Vec<&str> = PROSE.split_inclusive(' ').collect();
    let document = |i: usize| {
        let word = |j: usize| words[(i * 7 + j * j * 3 + j) % words.len()];
        (0..40).map(word).collect::<String>()
    };
    let texts: Vec<String> = (0..30).map(document).chain([SCRIPTS.to_owned()]).collect();
    Tokenizer::train(texts.iter().map(String::as_str), vocab_size).unwrap()
}

fn file(tokenizer: &Tokenizer) -> Value {
    serde_json::from_str(&tokenizer.to_json()).unwrap()
}

fn header(entries: Vec<(String, GgufValue)>) -> GgufHeader {
    GgufHeader {
        metadata: BTreeMap::from_iter(entries),
        tensors: Vec::new(),
        data_offset: 0,
    }
}

/// The tokenizer after a way through the metadata of a model with `vocab_size` tokens.
fn through(json: &str, vocab_size: usize) -> Tokenizer {
    let entries = tokenizer_entries(json.as_bytes(), vocab_size).unwrap();
    let text = tokenizer_from_metadata(&header(entries)).unwrap().unwrap();
    Tokenizer::from_bytes(text.as_bytes()).unwrap()
}

fn assert_same(a: &Tokenizer, b: &Tokenizer) {
    assert_eq!(a.vocab_size(), b.vocab_size());
    assert_eq!(a.end_of_text(), b.end_of_text());
    for text in ["", " ", "\n\n", PROSE, SCRIPTS] {
        let ids = a.encode(text).unwrap();
        assert_eq!(b.encode(text).unwrap(), ids);
        assert_eq!(a.decode(&ids), b.decode(&ids));
        let prompt = a.encode_with_special(text).unwrap();
        assert_eq!(b.encode_with_special(text).unwrap(), prompt);
    }
}

/// The trained tokenizer with these added tokens behind the vocabulary.
fn with_added(tokens: &[(&str, Value)]) -> String {
    let mut file = file(&trained(320));
    let added = tokens.iter().enumerate().map(|(i, (content, flags))| {
        let mut token = json!({ "id": 319 + i, "content": content, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": false });
        for (key, value) in flags.as_object().unwrap() {
            token[key] = value.clone();
        }
        token
    });
    file["added_tokens"] = added.collect();
    file.to_string()
}

#[test]
fn a_trained_tokenizer_comes_back_as_it_was() {
    let tokenizer = trained(330);
    for vocab_size in [330, 384] {
        let back = through(&tokenizer.to_json(), vocab_size);
        assert_eq!(file(&back), file(&tokenizer));
        assert_same(&back, &tokenizer);
    }
}

#[test]
fn types_and_padding_are_those_of_llama_cpp() {
    let special = json!({ "special": true });
    let plain = json!({});
    let json = with_added(&[
        (END_OF_TEXT, special.clone()),
        ("<|im_start|>", special),
        ("<|fim_prefix|>", plain.clone()),
        ("<think>", plain),
    ]);
    let entries = header(tokenizer_entries(json.as_bytes(), 326).unwrap()).metadata;
    let GgufValue::Array(GgufArray::Numbers(types)) = &entries[TOKEN_TYPE] else {
        panic!("{:?}", entries[TOKEN_TYPE]);
    };
    let types = types.to_i32s().unwrap();
    assert!(types[..319].iter().all(|&token_type| token_type == 1));
    assert_eq!(types[319..], [3, 3, 3, 4, 5, 5, 5]);
    let tokens = entries[TOKENS].as_strings().unwrap();
    assert_eq!(tokens[..2], ["!", "\""]);
    assert_eq!(
        tokens[322..],
        ["<think>", "[PAD323]", "[PAD324]", "[PAD325]"]
    );
    assert_eq!(entries[MODEL], GgufValue::String("gpt2".to_owned()));
    assert_eq!(entries[PRE], GgufValue::String("qwen2".to_owned()));
    assert_eq!(
        entries["tokenizer.ggml.add_bos_token"],
        GgufValue::Bool(false)
    );
    assert_eq!(
        entries["tokenizer.ggml.padding_token_id"],
        GgufValue::U32(319)
    );
    assert_eq!(entries[MERGES].as_strings().unwrap().len(), 319 - 256);
    // The flags of Qwen's own tokens follow from their types.
    assert!(!entries.contains_key(ADDED_TOKENS));
    let back = through(&json, 326);
    assert_eq!(
        file(&back)["added_tokens"],
        serde_json::from_str::<Value>(&json).unwrap()["added_tokens"]
    );
    assert_same(&back, &Tokenizer::from_bytes(json.as_bytes()).unwrap());
}

#[test]
fn other_flags_are_kept() {
    let json = with_added(&[
        (END_OF_TEXT, json!({ "special": true })),
        ("<|im_start|>", json!({ "rstrip": true })),
        ("user", json!({ "special": true, "single_word": true })),
    ]);
    let entries = tokenizer_entries(json.as_bytes(), 400).unwrap();
    assert!(entries.iter().any(|(key, _)| key == ADDED_TOKENS));
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    assert_same(&through(&json, 400), &tokenizer);
    // They must be the tokens of the file.
    for wrong in ["[]", "{", "[{\"id\":319,\"content\":\"user\"}]"] {
        let mut header = header(entries.clone());
        let text = GgufValue::String(wrong.to_owned());
        header.metadata.insert(ADDED_TOKENS.to_owned(), text);
        let error = tokenizer_from_metadata(&header).unwrap_err();
        assert!(error.to_string().contains(ADDED_TOKENS), "{error}");
    }
}

#[test]
fn added_tokens_in_front_of_words_keep_their_ids() {
    let mut file = file(&trained(300));
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    vocab
        .values_mut()
        .for_each(|id| *id = (id.as_u64().unwrap() + 1).into());
    vocab.insert(END_OF_TEXT.to_owned(), 0.into());
    file["added_tokens"][0]["id"] = 0.into();
    let json = file.to_string();
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    assert_eq!(tokenizer.end_of_text(), Some(0));
    assert_same(&through(&json, 300), &tokenizer);
}

#[test]
fn both_spellings_of_merges_are_written() {
    let tokenizer = trained(300);
    let mut file = file(&tokenizer);
    for merge in file["model"]["merges"].as_array_mut().unwrap() {
        let joined = format!(
            "{} {}",
            merge[0].as_str().unwrap(),
            merge[1].as_str().unwrap()
        );
        *merge = joined.into();
    }
    assert_same(&through(&file.to_string(), 300), &tokenizer);
    // The first line of a merges.txt is no merge.
    let merges = file["model"]["merges"].as_array_mut().unwrap();
    merges.insert(0, "#version: 0.2".into());
    assert_same(&through(&file.to_string(), 300), &tokenizer);
}

#[test]
fn tokenizers_that_have_no_name_are_refused() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 7] = [
        ("NFC", |f| f["normalizer"] = Value::Null),
        ("NFC", |f| f["normalizer"] = json!({ "type": "NFKC" })),
        ("pre-tokenizer", |f| {
            f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\s+".into();
        }),
        ("pre-tokenizer", |f| {
            f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext".into();
        }),
        ("pre-tokenizer", |f| {
            f["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into();
        }),
        ("pre-tokenizer", |f| {
            f["pre_tokenizer"] = f["decoder"].clone()
        }),
        ("ignore_merges", |f| {
            f["model"]["ignore_merges"] = true.into()
        }),
    ];
    for (expected, change) in cases {
        let mut file = file(&trained(300));
        change(&mut file);
        let error = tokenizer_entries(file.to_string().as_bytes(), 300).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
    let json = trained(300).to_json();
    let error = tokenizer_entries(json.as_bytes(), 299).unwrap_err();
    assert!(error.to_string().contains("in a model of 299"), "{error}");
    let error = tokenizer_entries(b"{}", 300).unwrap_err();
    assert!(matches!(error, GgufError::Tokenizer(_)));
}

#[test]
fn bad_vocabularies_are_refused_by_key() {
    let strings = |strings: &[&str]| {
        let strings = strings.iter().map(|&s| s.to_owned()).collect();
        Some(GgufValue::Array(GgufArray::Strings(strings)))
    };
    let numbers = |numbers: &[i32]| {
        let numbers = GgufNumbers::from_i32s(numbers);
        Some(GgufValue::Array(GgufArray::Numbers(numbers)))
    };
    let text = |text: &str| Some(GgufValue::String(text.to_owned()));
    let u8s = GgufNumbers::new(super::super::GgufScalar::U8, &[1; 300]).unwrap();
    let u8s = Some(GgufValue::Array(GgufArray::Numbers(u8s)));
    let mut odd_types = [1; 300];
    odd_types[7] = 2;
    let cases: [(&str, Option<GgufValue>, &str); 15] = [
        (MODEL, text("llama"), "\"llama\""),
        (MODEL, Some(GgufValue::U32(1)), "expected a string"),
        (PRE, text("llama-bpe"), "\"llama-bpe\""),
        (PRE, None, "is missing"),
        (TOKENS, None, "is missing"),
        (TOKENS, numbers(&[1]), "a list of strings"),
        (TOKENS, strings(&["a", "b"]), "2 i32"),
        (TOKENS, strings(&["a"; 300]), "token `a` occurs twice"),
        (TOKEN_TYPE, None, "is missing"),
        (TOKEN_TYPE, u8s, "300 i32"),
        (TOKEN_TYPE, numbers(&[1; 299]), "300 i32"),
        (TOKEN_TYPE, numbers(&odd_types), "2 for token 7"),
        (MERGES, None, "is missing"),
        (MERGES, strings(&["a b", "ab"]), "two tokens"),
        (MERGES, strings(&["a b c"]), "two tokens"),
    ];
    let entries = tokenizer_entries(trained(300).to_json().as_bytes(), 300).unwrap();
    for (key, value, expected) in cases {
        let mut header = header(entries.clone());
        header.metadata.remove(key);
        header
            .metadata
            .extend(value.map(|value| (key.to_owned(), value)));
        let error = tokenizer_from_metadata(&header).unwrap_err().to_string();
        assert!(error.contains(expected), "{key}: {error}");
    }
    assert_eq!(tokenizer_from_metadata(&header(Vec::new())), Ok(None));
    // Merges of tokens that are not there are found by the tokenizer.
    let mut header = header(entries);
    let merges = strings(&["漢 字"]).unwrap();
    header.metadata.insert(MERGES.to_owned(), merges);
    let json = tokenizer_from_metadata(&header).unwrap().unwrap();
    assert!(Tokenizer::from_bytes(json.as_bytes()).is_err());
}

#[test]
fn every_flip_is_read_or_refused() {
    let entries = tokenizer_entries(trained(270).to_json().as_bytes(), 272).unwrap();
    let mut bytes = Vec::new();
    let layout = super::super::write_header(&mut bytes, &entries, &[]).unwrap();
    let mut refused = 0;
    for at in 0..bytes.len() {
        // An odd factor reaches every bit pattern.
        let mask = (at.wrapping_mul(73) % 255 + 1) as u8;
        let mut bytes = bytes.clone();
        bytes[at] ^= mask;
        let limits = super::super::GgufLimits::default();
        let header = GgufHeader::parse(&bytes, layout.file_len, &limits);
        let Ok(Ok(Some(json))) = header.map(|header| tokenizer_from_metadata(&header)) else {
            refused += 1;
            continue;
        };
        if at.is_multiple_of(13) {
            refused += usize::from(Tokenizer::from_bytes(json.as_bytes()).is_err());
        }
    }
    assert!(refused > bytes.len() / 4, "{refused} of {}", bytes.len());
}

#[test]
fn the_end_of_text_is_found() {
    let json = trained(300).to_json();
    assert_eq!(eos_token_id(json.as_bytes()), Ok(Some(299)));
    let none = with_added(&[("x", json!({}))]);
    assert_eq!(eos_token_id(none.as_bytes()), Ok(None));
    assert!(eos_token_id(b"[]").is_err());
}

#[test]
fn a_published_tokenizer_comes_back() {
    let Some(path) = std::env::var_os("SETUN_TOKENIZER_FILE") else {
        println!("skipped: SETUN_TOKENIZER_FILE names no Qwen3 tokenizer.json");
        return;
    };
    let json = std::fs::read_to_string(path).unwrap();
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    let back = through(&json, 151_936);
    assert_same(&back, &tokenizer);
    let entries = header(tokenizer_entries(json.as_bytes(), 151_936).unwrap()).metadata;
    assert_eq!(entries[MERGES].as_strings().unwrap().len(), 151_387);
    assert_eq!(
        entries[TOKENS].as_strings().unwrap()[151_935],
        "[PAD151935]"
    );
    let parsed: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(file(&back)["added_tokens"], parsed["added_tokens"]);
    assert_eq!(file(&back)["model"], parsed["model"]);
}
