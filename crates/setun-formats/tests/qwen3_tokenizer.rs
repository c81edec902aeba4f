//! Qwen3's tokenizer gives the ids and the text that Hugging Face's library gives, over
//! texts in many scripts. `SETUN_TOKENIZER_FILE` names its `tokenizer.json`; how the
//! expected ids were made stands in `data/qwen3_tokens.json`.

use serde::Deserialize;
use setun_formats::Tokenizer;

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    /// With special tokens where the text spells them.
    ids: Vec<u32>,
    /// Without special tokens; absent where that is the same.
    plain_ids: Option<Vec<u32>>,
    /// What the ids decode to; absent where that is `text`.
    decoded: Option<String>,
}

#[test]
fn ids_and_texts_are_those_of_hugging_face() {
    let Some(path) = std::env::var_os("SETUN_TOKENIZER_FILE") else {
        println!("skipped: SETUN_TOKENIZER_FILE names no Qwen3 tokenizer.json");
        return;
    };
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(path).unwrap()).unwrap();
    let file: File = serde_json::from_str(include_str!("data/qwen3_tokens.json")).unwrap();
    assert!(file.cases.len() > 20);
    for case in &file.cases {
        let text = case.text.as_str();
        let ids = tokenizer.encode_with_special(text).unwrap();
        assert_eq!(ids, case.ids, "{text:?}");
        let plain = tokenizer.encode(text).unwrap();
        assert_eq!(&plain, case.plain_ids.as_ref().unwrap_or(&ids), "{text:?}");
        let decoded = case.decoded.as_deref().unwrap_or(text);
        assert_eq!(tokenizer.decode(&ids), decoded, "{text:?}");
        let mut stream = tokenizer.stream();
        let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        streamed.extend(stream.finish());
        assert_eq!(streamed, decoded, "{text:?}");
    }
    let all: Vec<&str> = file.cases.iter().map(|case| case.text.as_str()).collect();
    for (ids, case) in tokenizer
        .encode_batch(&all)
        .unwrap()
        .iter()
        .zip(&file.cases)
    {
        assert_eq!(ids, case.plain_ids.as_ref().unwrap_or(&case.ids));
    }
}
