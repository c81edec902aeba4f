//! The plan is the memory: one allocation of that size, and nothing in a step.
//!
//! One test only: the counters see every thread of the process.

#[path = "../../setun-backend/tests/counting_allocator/mod.rs"]
mod counting_allocator;

use setun_backend::{Host, Isa};
use setun_formats::Tokenizer;
use setun_train::data::{Batches, DocumentOptions, Split, TokenSet, load_documents};
use setun_train::prepare::model_config;
use setun_train::settings::{Override, Settings};
use setun_train::trainer::{Layout, Trainer};
use std::path::Path;

fn settings() -> Settings {
    let keys = [
        ("data.train", "data/encyclopedia.txt"),
        ("tokenizer.vocab_size", "512"),
        ("model.hidden_size", "256"),
        ("model.intermediate_size", "512"),
        ("train.batch_size", "4"),
        ("train.micro_batch_size", "2"),
        ("train.seq_len", "48"),
        ("train.steps", "200"),
        ("data.document_mask", "true"),
    ];
    let overrides: Vec<Override> = keys
        .iter()
        .map(|(key, value)| Override {
            key: (*key).to_owned(),
            value: (*value).to_owned(),
        })
        .collect();
    Settings::load(None, &overrides).unwrap()
}

fn batches(settings: &Settings) -> (Batches, Tokenizer) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let source = ["data/encyclopedia.txt".to_owned()];
    let corpus = load_documents(&source, &root, &DocumentOptions::default()).unwrap();
    let split = Split::by_fraction(&corpus, 0.1, 1).unwrap();
    let tokenizer = corpus
        .train_tokenizer(&split.train, settings.tokenizer.vocab_size)
        .unwrap();
    let tokens = TokenSet::encode(&corpus, &split.train, &tokenizer, 1, None, &|_, _| {}).unwrap();
    let train = &settings.train;
    (
        Batches::new(tokens, train.seq_len, train.batch_size, 1).unwrap(),
        tokenizer,
    )
}

#[test]
fn the_plan_is_the_memory_and_a_hundred_steps_allocate_nothing() {
    let settings = settings();
    let (batches, tokenizer) = batches(&settings);
    let config = model_config(&settings, tokenizer.vocab_size(), None).unwrap();

    let layout = Layout::new(&settings, &config, None, 2);
    let planned = layout.plan.total_bytes();
    let mut trainer = None;
    let allocated = counting_allocator::peak_bytes(|| {
        let Layout {
            plan,
            workspace,
            model,
            optimizer,
            teacher,
        } = layout;
        let backend = Host::new(&plan, workspace, Isa::detect());
        trainer = Some(Trainer::new(
            backend,
            (model, optimizer, teacher),
            &settings,
            &batches,
        ));
    });
    let mut trainer = trainer.unwrap();
    let ratio = allocated as f64 / planned as f64;
    println!("planned {planned} bytes, allocated {allocated}: {ratio:.4}");
    assert!(
        (1.0..1.01).contains(&ratio),
        "allocated {ratio:.4} of the plan"
    );

    trainer
        .model
        .parameters
        .initialize(&mut trainer.backend, 1, 0.0, 1.0)
        .unwrap();
    trainer.project().unwrap();
    trainer.step(&batches).unwrap();
    let mut last = 0.0;
    let allocations = counting_allocator::allocations(|| {
        for _ in 0..100 {
            last = trainer.step(&batches).unwrap().loss;
        }
    });
    assert_eq!(allocations, 0);
    assert!(last < 6.0, "a hundred steps learn something: {last}");
}
