//! The logits of a token are the same bits whichever way it is computed: chunks of any
//! size, batches of mixed lengths, forks, trees, prefix hits, eviction and a second
//! prefill, threads, instruction sets, and the forward pass of training.

mod model;

use model::{Model, Numbers, Trained, bits};
use setun_backend::{CacheKind, Isa, ROOT};
use setun_infer::{Chunk, Engine, EngineOptions, Sequence, Wanted};
use setun_ternary::Numerics;

/// Cases of the ordinary test; with `SETUN_LONG` in the environment there are 10,000.
const CASES: u64 = 300;

/// A text with the logits that the training forward pass gives it.
struct Text {
    tokens: Vec<u32>,
    logits: Vec<Vec<u32>>,
    sequence: Sequence,
}

impl Text {
    fn check(&self, position: usize, logits: &[f32], what: &str) {
        assert!(
            self.logits[position] == bits(logits),
            "{what}, position {position}"
        );
    }
}

struct Case {
    numbers: Numbers,
    trained: Trained,
    engine: Engine,
    texts: Vec<Text>,
    max_rows: usize,
    name: String,
}

impl Case {
    fn new(case: u64) -> Self {
        let mut numbers = Numbers::new(case);
        let modes = [
            Numerics::Int8,
            Numerics::Int8,
            Numerics::Bf16,
            Numerics::F32,
        ];
        let numerics = numbers.one_of(&modes);
        let model = Model::random(&mut numbers, numerics);
        let vocab_size = model.spec.config.vocab_size;
        let mut trained = model.trained(160);
        let isa = numbers.one_of(&Isa::available());
        let (threads, count) = (numbers.between(1, 2), numbers.between(1, 5));
        let longest = numbers.one_of(&[20, 70, 140]);
        let options = EngineOptions {
            cache_tokens: Some(16 * (count * longest).div_ceil(16) + 16 * (count + 2)),
            max_rows: numbers.between(1, 64),
            ..EngineOptions::new(160, threads, isa)
        };
        let name = format!("case {case}: {numerics:?} {isa:?} {threads} threads, {options:?}");
        let mut engine = model.engine(options);
        // Texts share beginnings, so that prefixes are found again.
        let common = numbers.tokens(longest, vocab_size);
        let texts = (0..count).map(|_| {
            let len = numbers.between(1, longest);
            let mut tokens = common[..numbers.between(0, len)].to_vec();
            tokens.extend(numbers.tokens(len - tokens.len(), vocab_size));
            let logits = trained.logits(&tokens);
            let sequence = engine.start(&tokens);
            Text {
                tokens,
                logits,
                sequence,
            }
        });
        let texts = texts.collect();
        Self {
            numbers,
            trained,
            engine,
            texts,
            max_rows: options.max_rows,
            name,
        }
    }

    fn len(&self, i: usize) -> usize {
        self.engine.len(self.texts[i].sequence).unwrap()
    }

    /// A random chunk of each text in one step.
    fn step(&mut self) {
        let mut wanted = Vec::new();
        for i in 0..self.texts.len() {
            let (past, left) = (self.len(i), self.texts[i].tokens.len() - self.len(i));
            let most = self.numbers.one_of(&[1, 8, 64]);
            let n = self.numbers.between(0, left.min(most));
            if n > 0 {
                wanted.push((i, past, n));
            }
        }
        // What texts have in common is computed once then.
        let only_last = self.numbers.between(0, 1) == 0;
        let texts = &self.texts;
        let chunks: Vec<Chunk<'_>> = wanted
            .iter()
            .map(|&(i, past, n)| Chunk {
                sequence: texts[i].sequence,
                tokens: &texts[i].tokens[past..past + n],
                parents: None,
                logits: match only_last {
                    true => Wanted::Last,
                    false => Wanted::All,
                },
            })
            .collect();
        let mut seen = 0;
        let name = &self.name;
        let mut check = |chunk: usize, token: usize, logits: &mut [f32]| {
            let (i, past, _) = wanted[chunk];
            texts[i].check(past + token, logits, name);
            seen += 1;
        };
        self.engine.step(&chunks, &mut check).expect(name);
        let expected = wanted.iter().map(|w| if only_last { 1 } else { w.2 });
        assert_eq!(seen, expected.sum::<usize>());
    }

    /// A tree behind one text: its own continuation as one path among others.
    fn tree(&mut self, i: usize) {
        let past = self.len(i);
        let left = self.texts[i].tokens.len() - past;
        let nodes = self.numbers.between(1, 8);
        let vocab_size = self.engine.spec().config.vocab_size;
        let mut tokens = self.numbers.tokens(nodes, vocab_size);
        let mut parents: Vec<u32> = vec![ROOT; nodes];
        let (mut path, mut last) = (Vec::new(), ROOT);
        for node in 0..nodes {
            let earlier = self.numbers.between(0, node);
            parents[node] = if earlier == node {
                ROOT
            } else {
                earlier as u32
            };
            if path.len() < left && self.numbers.between(0, 1) == 0 {
                (tokens[node], parents[node]) = (self.texts[i].tokens[past + path.len()], last);
                (last, path) = (node as u32, [path, vec![node]].concat());
            }
        }
        let sequence = self.texts[i].sequence;
        if nodes > self.max_rows || past + nodes > 160 {
            return;
        }
        let chunk = Chunk {
            sequence,
            tokens: &tokens,
            parents: Some(&parents),
            logits: Wanted::All,
        };
        let mut rows = Vec::new();
        let mut keep = |_: usize, _: usize, logits: &mut [f32]| rows.push(bits(logits));
        self.engine.step(&[chunk], &mut keep).expect(&self.name);
        for (node, row) in rows.iter().enumerate() {
            let mut branch = vec![tokens[node]];
            let mut at = parents[node];
            while at != ROOT {
                branch.push(tokens[at as usize]);
                at = parents[at as usize];
            }
            let text: Vec<u32> = self.texts[i].tokens[..past]
                .iter()
                .chain(branch.iter().rev())
                .copied()
                .collect();
            let expected = self.trained.logits(&text).pop();
            assert!(
                expected.as_ref() == Some(row),
                "{}: node {node} of {parents:?}",
                self.name
            );
        }
        self.engine.commit(sequence, &path).expect(&self.name);
        assert_eq!(self.len(i), past + path.len());
    }

    /// Something that changes what is in the cache.
    fn disturb(&mut self) {
        let i = self.numbers.between(0, self.texts.len() - 1);
        let sequence = self.texts[i].sequence;
        match self.numbers.between(0, 5) {
            0 => {
                let len = self.numbers.between(0, self.len(i));
                self.engine.truncate(sequence, len).unwrap();
            }
            1 => {
                let fork = self.engine.fork(sequence).unwrap();
                let gone = std::mem::replace(&mut self.texts[i].sequence, fork);
                // The one that goes on writing must not disturb the fork.
                self.engine
                    .truncate(gone, self.len(i).saturating_sub(1))
                    .unwrap();
                self.engine.free(gone).unwrap();
            }
            2 => {
                self.engine.free(sequence).unwrap();
                self.texts[i].sequence = self.engine.start(&self.texts[i].tokens);
            }
            3 => self.tree(i),
            4 => self.follow(i),
            _ => {}
        }
    }

    /// Another text goes on from where text `i` has been the same: in its blocks.
    fn follow(&mut self, i: usize) {
        let j = self.numbers.between(0, self.texts.len() - 1);
        if i == j {
            return;
        }
        let both = self.texts[i].tokens.iter().zip(&self.texts[j].tokens);
        let same = both.take_while(|(a, b)| a == b).count();
        let fork = self.engine.fork(self.texts[i].sequence).unwrap();
        let len = same.min(self.len(i));
        self.engine.truncate(fork, len).unwrap();
        let before = std::mem::replace(&mut self.texts[j].sequence, fork);
        self.engine.free(before).unwrap();
    }

    fn run(mut self) {
        for _ in 0..30 {
            self.step();
            self.disturb();
            let ended = (0..self.texts.len()).all(|i| self.len(i) == self.texts[i].tokens.len());
            if ended {
                break;
            }
        }
    }
}

#[test]
fn every_way_gives_the_same_bits() {
    let long = std::env::var_os("SETUN_LONG").is_some();
    for case in 0..if long { 10_000 } else { CASES } {
        Case::new(case).run();
    }
}

#[test]
fn an_int8_cache_is_as_invariant_and_close() {
    let mut numbers = Numbers::new(77);
    let model = Model::random(&mut numbers, Numerics::Int8);
    let vocab_size = model.spec.config.vocab_size;
    let tokens = numbers.tokens(100, vocab_size);
    let logits = |kind, rows| {
        let options = EngineOptions {
            cache: Some(kind),
            max_rows: rows,
            ..EngineOptions::new(100, 2, Isa::detect())
        };
        let mut engine = model.engine(options);
        let mut all: Vec<f32> = Vec::new();
        let chunk = Chunk {
            sequence: engine.start(&tokens),
            tokens: &tokens,
            parents: None,
            logits: Wanted::All,
        };
        let mut keep = |_: usize, _: usize, x: &mut [f32]| all.extend_from_slice(x);
        engine.step(&[chunk], &mut keep).unwrap();
        all
    };
    let exact = logits(CacheKind::Bf16, 64);
    let rounded = logits(CacheKind::Int8, 64);
    assert!(bits(&rounded) == bits(&logits(CacheKind::Int8, 7)));
    assert!(bits(&exact) != bits(&rounded));
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let distance = norm(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b));
    assert!(
        distance < 1e-2 * norm(&mut exact.iter().copied()),
        "{distance}"
    );
}
