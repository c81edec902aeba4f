//! What the tests of training share: a tiny model on a small corpus, its whole state as
//! bytes, and a way back to an earlier state.

// Each test binary has its own copy and uses a part of it.
#![allow(dead_code)]

use setun_backend::{Backend, Buf, Host, Isa, StoredBuf};
use setun_train::data::{Batches, DocumentOptions, Split, TokenSet, load_documents};
use setun_train::guard::Guard;
use setun_train::prepare::model_config;
use setun_train::settings::{Override, Settings};
use setun_train::trainer::{Layout, Trainer};
use std::path::{Path, PathBuf};

/// A directory of one test; removed at its end, also when it fails.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let name = format!("setun-train-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The first documents of the encyclopedia.
pub fn corpus() -> String {
    let text = std::fs::read_to_string(workspace().join("data/encyclopedia.txt")).unwrap();
    let documents: Vec<&str> = text.split("\n\n").take(36).collect();
    documents.join("\n\n")
}

/// The tiny recipe on `corpus`, with `flags` on top.
pub fn settings(corpus: &Path, flags: &[(&str, &str)]) -> Settings {
    let corpus = [
        ("data.train", corpus.to_str().unwrap()),
        ("tokenizer.vocab_size", "384"),
        ("run.threads", "1"),
    ];
    let pairs = corpus.iter().chain(flags);
    let overrides: Vec<Override> = pairs
        .map(|(key, value)| Override {
            key: (*key).to_owned(),
            value: (*value).to_owned(),
        })
        .collect();
    Settings::load(Some(&workspace().join("recipes/tiny.toml")), &overrides).unwrap()
}

pub fn batches(settings: &Settings) -> Batches {
    let source = [settings.data.train[0].to_str().unwrap().to_owned()];
    let corpus = load_documents(&source, Path::new(""), &DocumentOptions::default()).unwrap();
    let split = Split::by_fraction(&corpus, 0.1, 1).unwrap();
    let vocab_size = settings.tokenizer.vocab_size;
    let tokenizer = corpus.train_tokenizer(&split.train, vocab_size).unwrap();
    let tokens = TokenSet::encode(&corpus, &split.train, &tokenizer, 1, None, &|_, _| {}).unwrap();
    let train = &settings.train;
    Batches::new(tokens, train.seq_len, train.batch_size, 1).unwrap()
}

/// A trainer with its first weights, on a backend that `wrap` puts around the host's.
pub fn trainer<B: Backend<Real = f32>>(
    settings: &Settings,
    batches: &Batches,
    threads: usize,
    wrap: impl FnOnce(Host<f32>) -> B,
) -> Trainer<B> {
    let config = model_config(settings, settings.tokenizer.vocab_size, None).unwrap();
    let Layout {
        plan,
        workspace,
        model,
        optimizer,
        teacher,
    } = Layout::new(settings, &config, None, threads);
    let backend = wrap(Host::new(&plan, workspace, Isa::detect()));
    let parts = (model, optimizer, teacher);
    let mut trainer = Trainer::new(backend, parts, settings, batches);
    let parameters = &trainer.model.parameters;
    parameters
        .initialize(&mut trainer.backend, 1, 0.0, 1.0)
        .unwrap();
    trainer.project().unwrap();
    trainer
}

/// All that a step may change.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub step: u64,
    updates: u64,
    guard: Guard,
    /// Bits of latents, moments and projections, in order.
    bits: Vec<Vec<u32>>,
}

fn buffers<B: Backend<Real = f32>>(trainer: &Trainer<B>) -> Vec<Buf<f32>> {
    let list = trainer.model.parameters.list.iter();
    let latents = list.clone().map(|p| p.values());
    let scales = list.filter_map(|p| p.ternary.map(|t| t.scales));
    let moments = trainer.optimizer.m.iter().chain(&trainer.optimizer.v);
    let moments = moments.map(|&moment| match moment {
        StoredBuf::Real(moment) => moment,
        StoredBuf::Bf16(_) => panic!("the settings of these tests keep moments in f32"),
    });
    latents.chain(moments).chain(scales).collect()
}

pub fn state<B: Backend<Real = f32>>(trainer: &Trainer<B>) -> State {
    let read = |buf: Buf<f32>| {
        let mut values = vec![0.0f32; buf.len()];
        trainer.backend.read(buf, &mut values);
        values.into_iter().map(f32::to_bits).collect()
    };
    State {
        step: trainer.step,
        updates: trainer.optimizer.updates,
        guard: trainer.guard.clone(),
        bits: buffers(trainer).into_iter().map(read).collect(),
    }
}

/// Puts `trainer` back into an earlier state.
pub fn restore<B: Backend<Real = f32>>(trainer: &mut Trainer<B>, state: &State) {
    for (buf, bits) in buffers(trainer).into_iter().zip(&state.bits) {
        let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        trainer.backend.write(buf, &values);
    }
    trainer.step = state.step;
    trainer.optimizer.updates = state.updates;
    trainer.guard = state.guard.clone();
    trainer.project().unwrap();
}

/// A pseudo-random sequence (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}
