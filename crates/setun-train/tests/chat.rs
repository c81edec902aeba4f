//! `examples/chat.jsonl` from the file to a model that has learned its answers.

use setun_backend::{Host, Isa};
use setun_formats::Tokenizer;
use setun_train::data::{
    Batches, Corpus, DocumentOptions, EvalWindows, Text, TokenSet, load_documents,
};
use setun_train::evaluate::Evaluator;
use setun_train::prepare::model_config;
use setun_train::settings::{Override, Settings};
use setun_train::trainer::{Layout, Trainer};
use std::path::Path;

const SEQ_LEN: usize = 64;

fn corpus() -> Corpus {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let source = ["examples/chat.jsonl".to_owned()];
    load_documents(&source, &root, &DocumentOptions::default()).unwrap()
}

/// A tokenizer trained on the example, with the tokens of ChatML.
fn tokenizer(corpus: &Corpus) -> Tokenizer {
    let all: Vec<usize> = (0..corpus.documents.len()).collect();
    let trained = corpus.train_tokenizer(&all, 400).unwrap();
    let mut file: serde_json::Value = serde_json::from_str(&trained.to_json()).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    for (id, content) in [(400, "<|im_start|>"), (401, "<|im_end|>")] {
        let mut token = added[0].clone();
        token["id"] = id.into();
        token["content"] = content.into();
        added.push(token);
    }
    Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap()
}

fn tokens(corpus: &Corpus, tokenizer: &Tokenizer) -> TokenSet {
    let all: Vec<usize> = (0..corpus.documents.len()).collect();
    TokenSet::encode(corpus, &all, tokenizer, 1, None, &|_, _| {}).unwrap()
}

fn settings() -> Settings {
    let keys = [
        ("data.train", "examples/chat.jsonl"),
        ("model.hidden_size", "128"),
        ("model.intermediate_size", "256"),
        ("model.num_hidden_layers", "2"),
        ("model.num_attention_heads", "2"),
        ("model.num_key_value_heads", "1"),
        ("train.batch_size", "4"),
        ("train.micro_batch_size", "4"),
        ("eval.batch_size", "4"),
        ("train.steps", "120"),
        ("data.document_mask", "true"),
    ];
    let overrides = keys.iter().map(|(key, value)| Override {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
    });
    let mut settings = Settings::load(None, &overrides.collect::<Vec<_>>()).unwrap();
    settings.train.seq_len = SEQ_LEN;
    settings
}

#[test]
fn only_answers_are_targets_and_only_templates_write_special_tokens() {
    let corpus = corpus();
    let tokenizer = tokenizer(&corpus);
    let tokens = tokens(&corpus, &tokenizer);
    let mut ids = vec![0; tokens.num_tokens() as usize];
    tokens.read(0, &mut ids).unwrap();
    let (mut answers, mut open) = (Vec::new(), Vec::new());
    for (position, &id) in ids.iter().enumerate() {
        if tokens.is_target(position as u64) {
            open.push(id);
            if id == 401 {
                answers.push(tokenizer.decode(&open));
                open.clear();
            }
        }
    }
    assert!(open.is_empty(), "every answer ends in the token <|im_end|>");
    answers.sort();
    let mut reader = corpus.reader();
    let all = 0..corpus.documents.len();
    let documents: Vec<Text> = all.map(|d| reader.read(d).unwrap()).collect();
    let mut expected: Vec<String> = Vec::new();
    for document in &documents {
        let conversation = document.conversation.as_ref().unwrap();
        let targets = conversation.targets.iter();
        expected.extend(targets.map(|t| document.text[t.clone()].to_owned()));
    }
    expected.sort();
    assert_eq!(answers, expected);
    let has = |answer: &str| answers.iter().any(|a| a == answer);
    assert!(has("Ich heiße Setun.<|im_end|>"));
    assert!(has(
        "Here it is: <|im_end|>. It is text here and ends nothing.<|im_end|>"
    ));
    assert!(has(
        "<think>\n17 times 3 is 51.\n</think>\n\n17 times 3 is 51.<|im_end|>"
    ));
    // One for each turn of the templates, none for what a message spells.
    let turns: usize = documents
        .iter()
        .map(|d| d.text.matches("<|im_start|>").count())
        .sum();
    let count = |token| ids.iter().filter(|&&id| id == token).count();
    assert_eq!((count(400), count(401)), (turns, turns));
    let bytes: usize = answers.iter().map(|a| a.len() - "<|im_end|>".len()).sum();
    assert_eq!(tokens.info().raw_bytes, bytes as u64);
}

#[test]
fn training_on_conversations_learns_the_answers() {
    let corpus = corpus();
    let tokenizer = tokenizer(&corpus);
    let settings = settings();
    let train = &settings.train;
    let new = || tokens(&corpus, &tokenizer);
    let batches = Batches::new(new(), SEQ_LEN, train.batch_size, 1).unwrap();
    let config = model_config(&settings, tokenizer.vocab_size(), None).unwrap();
    let Layout {
        plan,
        workspace,
        model,
        optimizer,
        teacher,
    } = Layout::new(&settings, &config, None, 2);
    let backend = Host::new(&plan, workspace, Isa::detect());
    let parts = (model, optimizer, teacher);
    let mut trainer = Trainer::new(backend, parts, &settings, &batches);
    let parameters = &mut trainer.model.parameters;
    parameters
        .initialize(&mut trainer.backend, 1, 0.0, 1.0)
        .unwrap();
    trainer.project().unwrap();

    let windows = EvalWindows::new(new(), SEQ_LEN, 4).unwrap();
    let num_targets = windows.tokens().num_targets();
    assert!(num_targets < windows.tokens().num_tokens() / 2);
    let mut evaluator = Evaluator::new(windows, 4 * SEQ_LEN, true);
    let mut evaluate = |trainer: &mut Trainer<Host<f32>>| {
        let evaluation = evaluator.run(&mut trainer.backend, &trainer.model).unwrap();
        assert_eq!(evaluation.tokens, num_targets);
        evaluation.loss
    };
    let before = evaluate(&mut trainer);
    // Near a guess over the vocabulary: rows that do not count add no loss and no token.
    let guess = (tokenizer.vocab_size() as f64).ln();
    assert!((before - guess).abs() < 1.0, "{before} for {guess}");
    for _ in 0..train.steps {
        assert!(trainer.step(&batches).unwrap().skipped.is_none());
    }
    let after = evaluate(&mut trainer);
    assert!(after < 0.5 * before, "{before} to {after}");
}
