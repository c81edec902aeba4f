//! Speculative decoding is greedy decoding: the same tokens, whatever is drafted.
//!
//! Two references: the engine without drafts, token by token; and the forward pass of
//! training, on the reference instruction set and one thread, whose arg max behind every
//! token of a text must be the next token. The second one shares no code with the engine's
//! loop, cache or sampler, and by induction over the tokens it says that a text is the
//! greedy one.

mod drafters;
mod model;

use drafters::{Draws, Mixed, Scripted, Wrong};
use model::{Model, Numbers, Trained, bits};
use setun_backend::{Isa, ROOT};
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_infer::draft::visibility_mask;
use setun_infer::{
    Budget, Chunk, Draft, DraftStats, DraftTree, Drafter, Engine, EngineError, EngineOptions,
    FinishReason, Generation, ModelDrafter, Planner, PromptLookup, Request, SamplerOptions,
    Speculator, StopRules, Target, TreeSize, Wanted,
};
use setun_ternary::Numerics;
use std::ops::ControlFlow;

/// Tokens of a text, at most.
const TEXT: usize = 100;

/// A small model; `dense` makes its weights arbitrary numbers.
fn small_model(numbers: &mut Numbers, numerics: Numerics, dense: bool) -> Model {
    let num_key_value_heads = numbers.between(1, 2);
    let config = Qwen3Config {
        vocab_size: numbers.one_of(&[64, 101, 300]),
        hidden_size: numbers.one_of(&[32, 48, 64]),
        intermediate_size: numbers.one_of(&[48, 64, 96]),
        num_hidden_layers: numbers.between(1, 2),
        num_attention_heads: 2 * num_key_value_heads,
        num_key_value_heads,
        head_dim: 16,
        max_position_embeddings: 256,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: numbers.between(0, 1) == 0,
        rope: RopeConfig {
            rope_theta: 1e4,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: vec![0],
    };
    let model = Model::with(numbers, config, 32, numerics);
    if dense { model.dense(numbers) } else { model }
}

fn greedy(prompt: Vec<u32>, end_tokens: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        sampler: SamplerOptions::greedy(),
        stop: StopRules {
            end_tokens,
            max_tokens,
        },
        seed: (0, 0),
        logprobs: None,
    }
}

fn budget(nodes: usize, depth: usize, width: usize) -> Budget {
    Budget {
        nodes,
        depth,
        width,
    }
}

/// A text with drafts in trees of a fixed size, and what became of them.
fn with_drafts(
    engine: &mut Engine,
    request: &Request,
    drafter: &mut dyn Drafter,
    size: TreeSize,
) -> (Generation, DraftStats) {
    // A clock that says nothing true: times must not change tokens.
    let mut ticks = 0u64;
    let mut clock = move || {
        ticks += 1;
        (ticks * ticks % 97) as f64
    };
    let mut speculator = Speculator::new(drafter, &mut clock);
    speculator.size = size;
    let mut seen = Vec::new();
    let generation = engine
        .speculate(request, &mut speculator, |token| seen.push(token))
        .unwrap();
    assert_eq!(seen, generation.tokens, "tokens are told as they come");
    (generation, speculator.stats)
}

/// The lowest token with the largest logit, from bits.
fn argmax(logits: &[u32]) -> u32 {
    let value = |i: usize| f32::from_bits(logits[i]);
    let better = |best, i| if value(i) > value(best) { i } else { best };
    (1..logits.len()).fold(0, better) as u32
}

/// Whether training's forward pass says that `text` goes on greedily behind its prompt.
fn check_by_training(trained: &mut Trained, text: &[u32], num_prompt: usize, what: &str) {
    let logits = trained.logits(&text[..text.len() - 1]);
    for position in num_prompt - 1..text.len() - 1 {
        let expected = argmax(&logits[position]);
        assert_eq!(expected, text[position + 1], "{what}, position {position}");
    }
}

/// A model with everything that texts of it are compared with.
struct Bench {
    name: String,
    numbers: Numbers,
    engine: Engine,
    trained: Trained,
    /// Another engine of the model, where drafts come from.
    oracle: Engine,
    helper: ModelDrafter,
    vocab_size: usize,
    widest: usize,
}

impl Bench {
    fn new(case: u64, numerics: Numerics, dense: bool) -> Self {
        let mut numbers = Numbers::new(5000 + case);
        let model = small_model(&mut numbers, numerics, dense);
        let vocab_size = model.spec.config.vocab_size;
        let max_rows = numbers.one_of(&[65, 70, 256]);
        let options = EngineOptions {
            max_rows,
            cache_tokens: Some(512),
            ..EngineOptions::new(200, numbers.between(1, 2), Isa::detect())
        };
        let oracle = EngineOptions {
            cache_tokens: Some(1024),
            ..options
        };
        let (engine, oracle) = (model.engine(options), model.engine(oracle));
        let trained = model.trained(200);
        // A helper that agrees now and then: the same model, its norms disturbed.
        let mut near = model;
        for (_, norm) in &mut near.norms {
            norm.iter_mut()
                .for_each(|x| *x *= 1.0 + 0.2 * numbers.normal() as f32);
        }
        let helper = ModelDrafter::new(near.engine(options), &near.spec).unwrap();
        Self {
            name: format!("case {case}, {numerics:?}, dense: {dense}"),
            engine,
            oracle,
            trained,
            helper,
            numbers,
            vocab_size,
            widest: 0,
        }
    }

    /// One text by plain decoding and again with some drafter.
    fn text(&mut self, which: usize) -> DraftStats {
        let num_prompt = self.numbers.between(1, 30);
        let prompt = self.numbers.tokens(num_prompt, self.vocab_size);
        let max_tokens = self.numbers.between(TEXT / 2, TEXT);
        let ends = self.numbers.tokens(which % 2, self.vocab_size);
        let request = greedy(prompt, ends, max_tokens);
        let plain = self.engine.generate(&request, |_| {}).unwrap();
        let truth = match plain.reason {
            FinishReason::EndToken(end) => [&request.prompt[..], &plain.tokens, &[end]].concat(),
            _ => [&request.prompt[..], &plain.tokens].concat(),
        };
        check_by_training(&mut self.trained, &truth, num_prompt, &self.name);
        let mut lookup = PromptLookup::new();
        let mut mixed = Mixed::new(&mut self.oracle, &truth, which as u64);
        let (drafter, size): (&mut dyn Drafter, _) = match which % 16 {
            0 => (&mut lookup, budget(16, 8, 2)),
            1 => (&mut lookup, budget(6, 3, 2)),
            2 => (&mut self.helper, budget(8, 8, 1)),
            3 => (&mut self.helper, budget(9, 3, 3)),
            _ => (&mut mixed, budget(64, 64, 64)),
        };
        let size = match which % 5 {
            4 => TreeSize::Adaptive(Box::new(Planner::new(size))),
            _ => TreeSize::Fixed(size),
        };
        let (found, stats) = with_drafts(&mut self.engine, &request, drafter, size);
        assert_eq!(found, plain, "{}, drafter {which}", self.name);
        self.widest = self.widest.max(mixed.widest);
        stats
    }
}

/// With `SETUN_LONG` in the environment 100,000 tokens, else a twelfth of that.
#[test]
fn speculation_equals_greedy_decoding() {
    let share = if std::env::var_os("SETUN_LONG").is_some() {
        1
    } else {
        12
    };
    let (tokens, num_models) = (100_000 / share, 72 / share as u64);
    let kinds = [
        (Numerics::Int8, false),
        (Numerics::Bf16, false),
        (Numerics::F32, false),
        (Numerics::F32, true),
        (Numerics::Bf16, true),
    ];
    let (mut sum, mut of_kind) = (DraftStats::default(), [DraftStats::default(); 5]);
    let (mut case, mut widest) = (0, 0);
    while sum.emitted < tokens || case < num_models {
        let kind = case as usize % kinds.len();
        let mut bench = Bench::new(case, kinds[kind].0, kinds[kind].1);
        for which in 0..16 {
            let stats = bench.text(which + 16 * case as usize);
            of_kind[kind] += stats;
            sum += stats;
        }
        widest = widest.max(bench.widest);
        case += 1;
    }
    for (kind, stats) in kinds.iter().zip(&of_kind) {
        println!("{kind:?}: {stats:?}");
        assert!(stats.accepted > 0);
    }
    println!(
        "{case} models, 0 mismatches, {sum:?}, {:.3} accepted",
        sum.acceptance()
    );
    assert!(sum.emitted >= tokens);
    assert!(sum.acceptance() >= 0.3, "{}", sum.acceptance());
    assert!(sum.other_children >= 1000 / share, "{}", sum.other_children);
    assert!(sum.orphans >= 1000 / share, "{}", sum.orphans);
}

/// Texts of one model, with everything that changes what is drafted and verified.
struct Small {
    engine: Engine,
    numbers: Numbers,
    vocab_size: usize,
    trained: Trained,
}

impl Small {
    fn new(case: u64) -> Self {
        let mut numbers = Numbers::new(8000 + case);
        let numerics = numbers.one_of(&[Numerics::Int8, Numerics::Bf16, Numerics::F32]);
        let model = small_model(&mut numbers, numerics, false);
        let options = EngineOptions {
            cache_tokens: Some(512),
            ..EngineOptions::new(120, 1, Isa::detect())
        };
        Self {
            engine: model.engine(options),
            vocab_size: model.spec.config.vocab_size,
            trained: model.trained(120),
            numbers,
        }
    }

    fn prompt(&mut self, n: usize) -> Vec<u32> {
        self.numbers.tokens(n, self.vocab_size)
    }

    /// Prompt and its greedy continuation.
    fn truth(&mut self, num_prompt: usize, max_tokens: usize) -> Vec<u32> {
        let request = greedy(self.prompt(num_prompt), Vec::new(), max_tokens);
        let plain = self.engine.generate(&request, |_| {}).unwrap();
        [request.prompt, plain.tokens].concat()
    }
}

fn tree(tokens: &[u32], parents: &[u32]) -> DraftTree {
    DraftTree::new(tokens.to_vec(), parents.to_vec()).unwrap()
}

fn any_size() -> TreeSize {
    TreeSize::Fixed(budget(64, 64, 64))
}

#[test]
fn drafts_that_are_always_wrong_change_nothing() {
    for case in 0..6 {
        let mut small = Small::new(case);
        let truth = small.truth(5, 60);
        let request = greedy(truth[..5].to_vec(), Vec::new(), 60);
        let vocab_size = small.vocab_size as u32;
        for size in [any_size(), TreeSize::Adaptive(Box::default())] {
            let truth = &truth;
            let mut wrong = Wrong { truth, vocab_size };
            let fixed = matches!(size, TreeSize::Fixed(_));
            let (found, stats) = with_drafts(&mut small.engine, &request, &mut wrong, size);
            assert_eq!(found.tokens, truth[5..]);
            assert_eq!((stats.accepted, stats.emitted, stats.steps), (0, 60, 60));
            assert!(
                stats.drafted > 0 && (!fixed || stats.orphans > 0),
                "{stats:?}"
            );
        }
        check_by_training(&mut small.trained, &truth, 5, "wrong");
    }
}

/// Fixed trees around the true tokens `t`, and what becomes of them.
#[test]
fn fixed_trees_are_judged_by_hand() {
    let mut small = Small::new(20);
    let truth = small.truth(6, 10);
    let (t, v) = (&truth[6..], small.vocab_size as u32);
    let other = |token: u32, by: u32| (token + by) % v;
    let behind_false = {
        let text = [&truth[..6], &[other(t[0], 1)]].concat();
        drafters::greedy_after(&mut small.engine, &text)
    };
    // Tokens of one step; the rest of the text has empty drafts.
    let mut first = |drafted: DraftTree| {
        let request = greedy(truth[..6].to_vec(), Vec::new(), 10);
        let mut script = vec![DraftTree::default(); 9];
        script.insert(0, drafted);
        let mut scripted = Scripted(script);
        let size = any_size();
        let (found, stats) = with_drafts(&mut small.engine, &request, &mut scripted, size);
        assert_eq!(found.tokens, t);
        stats
    };
    // Three roots and no second level: the second one is right.
    let roots = [other(t[0], 1), t[0], other(t[0], 2)];
    let stats = first(tree(&roots, &[ROOT; 3]));
    assert_eq!(
        (stats.accepted, stats.other_children, stats.steps),
        (1, 1, 9)
    );
    // All wrong.
    let stats = first(tree(&roots.map(|r| other(r, 3)), &[ROOT; 3]));
    assert_eq!((stats.accepted, stats.steps), (usize::from(v <= 5), 10));
    // A rejected root whose child is what the target says behind it, beside a right one.
    let parents = [ROOT, 0, ROOT, 2, 3];
    let stats = first(tree(
        &[roots[0], behind_false, t[0], t[1], other(t[2], 1)],
        &parents,
    ));
    assert_eq!((stats.accepted, stats.orphans, stats.steps), (2, 1, 8));
    // The same without a right root.
    let stats = first(tree(&[roots[0], behind_false], &[ROOT, 0]));
    assert_eq!((stats.accepted, stats.orphans, stats.steps), (0, 1, 10));
    // A whole path, and one that is right only further down.
    let stats = first(DraftTree::chain(&t[..9]));
    assert_eq!((stats.accepted, stats.steps), (9, 1));
    let stats = first(DraftTree::chain(&[other(t[0], 1), t[1], t[2]]));
    assert_eq!((stats.accepted, stats.steps), (0, 10));
}

#[test]
fn three_cycles_in_a_row_each_go_on_from_the_last() {
    let mut small = Small::new(21);
    let truth = small.truth(4, 30);
    let mut text = truth[..4].to_vec();
    for cycle in 0..3u32 {
        // Two right tokens behind a false sibling each.
        let next = &truth[text.len()..];
        let v = small.vocab_size as u32;
        let drafted = tree(
            &[(next[0] + 1) % v, next[0], (next[1] + 1) % v, next[1]],
            &[ROOT, ROOT, 1, 1],
        );
        let request = greedy(text.clone(), Vec::new(), 3);
        let mut scripted = Scripted(vec![drafted]);
        let size = any_size();
        let (found, stats) = with_drafts(&mut small.engine, &request, &mut scripted, size);
        assert_eq!(found.tokens, truth[text.len()..][..3], "cycle {cycle}");
        assert_eq!(
            (stats.steps, stats.accepted, stats.other_children),
            (1, 2, 2)
        );
        text.extend(found.tokens);
    }
}

/// Limits and end tokens at every place of an accepted path.
#[test]
fn texts_end_inside_of_trees_as_without_them() {
    let mut small = Small::new(22);
    let truth = small.truth(7, 40);
    let mut reasons = [0; 3];
    for i in 0..60 {
        let max_tokens = small.numbers.between(0, 45);
        let end_tokens = match i % 3 {
            0 => vec![truth[7 + small.numbers.between(0, 39)]],
            _ => Vec::new(),
        };
        let num_prompt = small.numbers.between(105, 119);
        let prompt = match i % 3 {
            1 => small.prompt(num_prompt),
            _ => truth[..7].to_vec(),
        };
        let request = greedy(prompt, end_tokens, max_tokens);
        let plain = small.engine.generate(&request, |_| {}).unwrap();
        let text = [&request.prompt[..], &plain.tokens, &request.stop.end_tokens].concat();
        let mut always_right = Right(&text);
        let (found, stats) =
            with_drafts(&mut small.engine, &request, &mut always_right, any_size());
        assert_eq!(found, plain, "{request:?}");
        assert!(stats.steps <= 1 + plain.tokens.len() / 9, "{stats:?}");
        reasons[match plain.reason {
            FinishReason::EndToken(_) => 0,
            FinishReason::MaxTokens => 1,
            FinishReason::ContextFull => 2,
            FinishReason::Stopped => unreachable!("nobody asks for that"),
        }] += 1;
    }
    assert!(reasons.iter().all(|&n| n > 5), "{reasons:?}");
    assert_eq!(
        small.engine.tables().available(),
        32,
        "nothing is left behind"
    );
}

/// Nine right tokens at a time, with what comes behind the end of the text too.
struct Right<'a>(&'a [u32]);

impl Drafter for Right<'_> {
    fn draft(&mut self, _: Target<'_>, context: &[u32], _: Budget) -> Result<Draft, EngineError> {
        let left = self.0.get(context.len()..).unwrap_or_default();
        let beyond = [&left[..left.len().min(9)], &[1, 1, 1]].concat();
        Ok(Draft::guesses(DraftTree::chain(&beyond)))
    }
}

#[test]
fn a_caller_ends_a_text_inside_of_a_tree() {
    let mut small = Small::new(23);
    let truth = small.truth(7, 40);
    let request = greedy(truth[..7].to_vec(), Vec::new(), 40);
    for wanted in 1..40 {
        let (mut right, mut no_clock) = (Right(&truth), || 0.0);
        let mut speculator = Speculator::new(&mut right, &mut no_clock);
        speculator.size = any_size();
        let mut told = 0;
        let found = small.engine.speculate(&request, &mut speculator, |_| {
            told += 1;
            match told == wanted {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        let found = found.unwrap();
        assert_eq!(found.tokens, truth[7..7 + wanted]);
        assert_eq!((found.reason, told), (FinishReason::Stopped, wanted));
        assert_eq!(speculator.stats.emitted, wanted);
        assert_eq!(small.engine.tables().available(), 32, "blocks are lost");
    }
}

/// Penalties count the tokens of a node's own path, and a guess never changes a draw.
#[test]
fn sampled_texts_and_penalties_are_those_of_plain_decoding() {
    let mut accepted = 0;
    for case in 0..40 {
        let mut small = Small::new(100 + case % 8);
        let sampler = SamplerOptions {
            temperature: small.numbers.one_of(&[0.0, 0.4, 1.0]),
            top_k: [0, 3, 40][case as usize % 3],
            top_p: small.numbers.one_of(&[1.0, 0.9]),
            min_p: small.numbers.one_of(&[0.0, 0.05]),
            repetition_penalty: [1.0, 1.4, 3.0][(case / 3) as usize % 3],
            presence_penalty: [0.0, 0.6][(case / 2) as usize % 2],
            frequency_penalty: [0.0, 0.3, -0.2][(case / 4) as usize % 3],
        };
        let request = Request {
            sampler,
            seed: (3, case),
            logprobs: (case % 4 == 1).then_some(case as usize % 5),
            ..greedy(small.prompt(10), Vec::new(), 60)
        };
        let plain = small.engine.generate(&request, |_| {}).unwrap();
        let wanted = request.logprobs.map_or(0, |_| plain.tokens.len());
        assert_eq!(plain.logprobs.len(), wanted);
        let truth = [&request.prompt[..], &plain.tokens].concat();
        let mut oracle = Small::new(100 + case % 8).engine;
        let mut mixed = Mixed::new(&mut oracle, &truth, case);
        let (found, stats) = with_drafts(&mut small.engine, &request, &mut mixed, any_size());
        assert_eq!(found, plain, "case {case}, {sampler:?}");
        accepted += stats.accepted;
    }
    assert!(accepted > 500, "{accepted}");
}

/// Times decide the size of trees; whatever they are, the text is the same.
#[test]
fn times_do_not_change_texts() {
    let mut small = Small::new(31);
    let truth = small.truth(10, 80);
    let request = greedy(truth[..10].to_vec(), Vec::new(), 80);
    let mut steps = Vec::new();
    let clocks: [fn(f64) -> f64; 6] = [
        |n| n * 1e-3,
        |n| n * n,
        |n| -n,
        |_| f64::NAN,
        |_| 0.0,
        |n| (n * 7.0) % 13.0,
    ];
    for time in clocks {
        let mut ticks = 0.0;
        let mut clock = || {
            ticks += 1.0;
            time(ticks)
        };
        let mut always_right = Right(&truth);
        let mut speculator = Speculator::new(&mut always_right, &mut clock);
        let found = small.engine.speculate(&request, &mut speculator, |_| {});
        assert_eq!(found.unwrap().tokens, truth[10..]);
        steps.push(speculator.stats.steps);
    }
    steps.sort_unstable();
    steps.dedup();
    assert!(steps[0] < 40 && steps.contains(&80), "{steps:?}");
}

/// A helper that is the model itself is always right, as long as its context reaches.
#[test]
fn a_helper_follows_the_text() {
    let mut numbers = Numbers::new(77);
    let model = small_model(&mut numbers, Numerics::Int8, false);
    let options = |context| EngineOptions {
        cache_tokens: Some(context + 32),
        ..EngineOptions::new(context, 1, Isa::detect())
    };
    let mut engine = model.engine(options(120));
    let prompt = numbers.tokens(10, model.spec.config.vocab_size);
    let request = greedy(prompt, Vec::new(), 60);
    let plain = engine.generate(&request, |_| {}).unwrap();
    let mut run = |context: usize, size| {
        let helper = model.engine(options(context));
        let mut helper = ModelDrafter::new(helper, &model.spec).unwrap();
        let size = TreeSize::Fixed(size);
        let (found, stats) = with_drafts(&mut engine, &request, &mut helper, size);
        assert_eq!(found, plain);
        stats
    };
    let long = run(120, budget(6, 6, 1));
    assert_eq!(long.accepted, long.drafted, "{long:?}");
    assert!(long.accepted > 20, "{long:?}");
    let short = run(30, budget(6, 6, 1));
    assert_eq!(short.accepted, short.drafted, "{short:?}");
    assert!(short.accepted <= 20 && short.steps >= 40, "{short:?}");
    let wide = run(120, budget(12, 4, 3));
    assert_eq!(wide.other_children, 0, "the likeliest comes first");
    assert!(
        wide.accepted > 20 && wide.drafted > 2 * wide.accepted,
        "{wide:?}"
    );
}

#[test]
fn a_helper_of_another_vocabulary_is_refused() {
    let mut numbers = Numbers::new(1);
    let target = small_model(&mut numbers, Numerics::Int8, false);
    let mut other = small_model(&mut numbers, Numerics::Int8, false);
    while other.spec.config.vocab_size == target.spec.config.vocab_size {
        other = small_model(&mut numbers, Numerics::Int8, false);
    }
    let engine = other.engine(EngineOptions::new(50, 1, Isa::detect()));
    let error = ModelDrafter::new(engine, &target.spec).err().unwrap();
    assert!(error.to_string().contains("vocabulary"), "{error}");
}

/// What a node's logits depend on is its row of the mask, nothing more and nothing less.
#[test]
fn logits_depend_on_what_the_mask_shows() {
    let mut small = Small::new(30);
    let prompt = small.prompt(5);
    let parents = [ROOT, 0, 0, ROOT, 2, 3, 2, 6, ROOT];
    let n = parents.len();
    let all = small.prompt(5 + n);
    let v = small.vocab_size as u32;
    let engine = &mut small.engine;
    let mut rows_of = |text: &[u32]| {
        let sequence = engine.start(&[]);
        let (past, nodes) = text.split_at(5);
        let chunk = |tokens, parents| Chunk {
            sequence,
            tokens,
            parents,
            logits: Wanted::All,
        };
        let mut rows = Vec::new();
        let mut keep = |_: usize, _: usize, logits: &mut [f32]| rows.push(bits(logits));
        engine.step(&[chunk(past, None)], &mut keep).unwrap();
        engine
            .step(&[chunk(nodes, Some(&parents))], &mut keep)
            .unwrap();
        engine.free(sequence).unwrap();
        rows
    };
    let mask = visibility_mask(prompt.len(), &parents);
    let size = prompt.len() + n;
    let before = rows_of(&all);
    for changed in 0..size {
        let mut text = all.clone();
        text[changed] = (text[changed] + 1) % v;
        let after = rows_of(&text);
        for row in 0..size {
            let differs = before[row] != after[row];
            assert_eq!(differs, mask[row * size + changed], "row {row}, {changed}");
        }
    }
}

/// Tokens drawn by a drafter that knows nothing, 100,000 times with `SETUN_LONG`: the first
/// two tokens of a text follow the model.
#[test]
fn drawn_drafts_keep_the_distribution_of_texts() {
    let draws = if std::env::var_os("SETUN_LONG").is_some() {
        100_000
    } else {
        6_000
    };
    let mut small = Small::new(40);
    let prompt = small.prompt(3);
    let sampler = SamplerOptions {
        temperature: 0.7,
        top_k: 5,
        ..SamplerOptions::default()
    };
    let weights = (0..small.vocab_size as u32).map(|t| (t, f64::from(1 + t % 4)));
    let mut draws_of = Draws {
        q: setun_infer::Distribution::new(weights.collect()),
        numbers: Numbers::new(41),
    };
    let first = small.shaped(&prompt, sampler);
    let mut counts = std::collections::BTreeMap::new();
    let mut accepted = 0;
    for number in 0..draws {
        let request = Request {
            sampler,
            seed: (11, number),
            logprobs: None,
            ..greedy(prompt.clone(), Vec::new(), 2)
        };
        let engine = &mut small.engine;
        let (found, stats) = with_drafts(engine, &request, &mut draws_of, any_size());
        *counts
            .entry((found.tokens[0], found.tokens[1]))
            .or_insert(0) += 1;
        accepted += stats.accepted;
    }
    assert!(accepted > draws as usize / 20, "{accepted}");
    let (mut chi_square, mut cells, mut rest) = (0.0, 0usize, (0.0, 0.0));
    for &(a, p) in &first {
        for (b, q) in small.shaped(&[&prompt[..], &[a]].concat(), sampler) {
            let expected = p * q * draws as f64;
            let count = f64::from(counts.remove(&(a, b)).unwrap_or(0));
            if expected < 5.0 {
                rest = (rest.0 + expected, rest.1 + count);
                continue;
            }
            chi_square += (count - expected).powi(2) / expected;
            cells += 1;
        }
    }
    assert!(counts.is_empty(), "drawn but impossible: {counts:?}");
    if rest.0 > 0.0 {
        chi_square += (rest.1 - rest.0).powi(2) / rest.0;
        cells += 1;
    }
    let bound = chi_square_quantile_99(cells - 1);
    println!("{draws} draws, {accepted} accepted, chi-square {chi_square:.2} of {bound:.2}");
    assert!(
        cells > 8 && chi_square < bound,
        "{chi_square}, {cells} cells"
    );
}

/// The 99 % quantile of chi-square, by Wilson and Hilferty (1931): to 1 % from 5 degrees on.
fn chi_square_quantile_99(freedom: usize) -> f64 {
    let k = freedom as f64;
    let cube_root = 1.0 - 2.0 / (9.0 * k) + 2.326_348 * (2.0 / (9.0 * k)).sqrt();
    k * cube_root.powi(3)
}

impl Small {
    /// Tokens with their probabilities behind a text: temperature, then top-k, of the
    /// logits of training's forward pass.
    fn shaped(&mut self, text: &[u32], sampler: SamplerOptions) -> Vec<(u32, f64)> {
        let logits = self.trained.logits(text).pop().unwrap();
        let logit = |&bits: &u32| f64::from(f32::from_bits(bits)) / f64::from(sampler.temperature);
        let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(logit)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.truncate(sampler.top_k);
        let sum: f64 = all.iter().map(|x| x.1.exp()).sum();
        all.iter().map(|&(t, x)| (t, x.exp() / sum)).collect()
    }
}
