//! The block drafter: gradients against finite differences, decoding against training.

use setun_backend::ops::IGNORE_TARGET;
use setun_backend::philox::Philox;
use setun_backend::topk::Kept;
use setun_backend::{
    Among, Backend, CACHE_BLOCK, CacheKind, CachedSegment, Host, HostWorkspace, Isa, Limits, Plan,
    Real, Segment,
};
use setun_formats::{Qwen3Config, RopeConfig};
use setun_model::{
    BlockDrafter, CachedRows, DecodeShape, DraftBatch, DrafterSpec, ModelSpec, ParameterUse,
    Parameters, Purpose, Qwen3, TrainShape,
};
use setun_ternary::Numerics;

const BLOCK: usize = 3;
const TEXT: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 8];
const ANCHORS: [u32; 3] = [1, 4, 8];

fn config(vocab_size: usize, num_hidden_layers: usize) -> Qwen3Config {
    Qwen3Config {
        vocab_size,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        rope: RopeConfig {
            rope_theta: 1e4,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

fn model(config: Qwen3Config) -> ModelSpec {
    ModelSpec {
        config,
        scheme: None,
        numerics: Numerics::F32,
    }
}

/// A target with a drafter, both of random weights.
struct Pair<R: Real> {
    backend: Host<R>,
    target: Qwen3<R>,
    drafter: BlockDrafter<R>,
}

impl<R: Real> Pair<R> {
    fn new(of_target: Purpose, of_drafter: Purpose) -> Self {
        let train = matches!(of_drafter, Purpose::Train(_));
        let mut plan = Plan::new();
        let mut target = Qwen3::reserve(&mut plan, model(config(11, 3)), of_target);
        let spec = DrafterSpec {
            model: model(config(1, 2)),
            block_size: BLOCK,
            target_layer_ids: vec![0, 2],
        };
        let parameters = ParameterUse {
            train,
            ..ParameterUse::default()
        };
        let purpose = (of_drafter, parameters);
        let drafter = BlockDrafter::reserve(&mut plan, &spec, purpose, &mut target);
        let limits = Limits {
            width: 16,
            head_dim: 4,
            group_size: 8,
        };
        let workspace = HostWorkspace::reserve(&mut plan, 2, limits);
        let mut backend = Host::new(&plan, workspace, Isa::detect());
        target.prepare(&mut backend);
        drafter.prepare(&mut backend);
        fill(&mut backend, &target.parameters, 1);
        fill(&mut backend, &drafter.body.parameters, 2);
        Self {
            backend,
            target,
            drafter,
        }
    }

    fn in_training() -> Self {
        let rows = TEXT.len();
        let of_target = Purpose::Infer {
            rows,
            context: rows,
            head_chunk: 4,
        };
        let of_drafter = Purpose::Train(TrainShape {
            rows: rows + ANCHORS.len() * BLOCK,
            positions: rows + BLOCK,
            recompute: false,
            head_chunk: 1,
        });
        Self::new(of_target, of_drafter)
    }

    /// Losses of all rows for these targets.
    fn losses(&mut self, targets: &[u32], gradient_scale: Option<f64>) -> Vec<R> {
        let positions: Vec<u32> = (0..TEXT.len() as u32).collect();
        let b = &mut self.backend;
        self.target.write_batch(b, &TEXT, &positions, &[]);
        self.target
            .forward(b, TEXT.len(), &[Segment::own(0, TEXT.len())]);
        let batch = DraftBatch {
            context: TEXT.len(),
            anchors: &ANCHORS,
            tokens: &ANCHORS.map(|a| TEXT[a as usize]),
            targets,
        };
        self.drafter.train(b, &self.target, batch, gradient_scale);
        let mut losses = vec![R::ZERO; targets.len()];
        self.drafter.read_losses(b, TEXT.len(), &mut losses);
        losses
    }
}

fn fill<R: Real>(backend: &mut Host<R>, parameters: &Parameters<R>, stream: u64) {
    for (i, p) in parameters.list.iter().enumerate() {
        let random = Philox::new(stream, i as u64);
        let value = |j| match p.is_matrix {
            true => 0.5 * random.normal_pair(j).0,
            false => 1.0 + 0.2 * random.normal_pair(j).0,
        };
        let values: Vec<R> = (0..p.numel() as u64)
            .map(|j| R::from_f64(value(j)))
            .collect();
        backend.write(p.values(), &values);
    }
}

fn targets() -> Vec<u32> {
    let of_row = |row: usize| match row % BLOCK {
        0 => IGNORE_TARGET,
        i => (row * 5 + i) as u32 % 11,
    };
    (0..ANCHORS.len() * BLOCK).map(of_row).collect()
}

#[test]
fn gradients_equal_central_differences() {
    const STEP: f64 = 1e-5;
    let mut pair = Pair::<f64>::in_training();
    pair.losses(&targets(), Some(1.0));
    let list = pair.drafter.body.parameters.list.clone();
    assert_eq!(list.len(), 1 + 2 * 11 + 1 + 2 + 1);
    for p in &list {
        let mut gradient = vec![0.0; p.numel()];
        pair.backend.read(p.gradient(), &mut gradient);
        let mut values = vec![0.0; p.numel()];
        pair.backend.read(p.values(), &mut values);
        assert!(
            gradient.iter().any(|g| *g != 0.0),
            "{} learns nothing",
            p.name
        );
        for i in (0..p.numel()).step_by((p.numel() / 12).max(1) | 1) {
            let kept = values[i];
            let mut loss = |value: f64| {
                values[i] = value;
                pair.backend.write(p.values(), &values);
                pair.losses(&targets(), None).iter().sum::<f64>()
            };
            let difference = (loss(kept + STEP) - loss(kept - STEP)) / (2.0 * STEP);
            loss(kept);
            let error = (gradient[i] - difference).abs() / (1.0 + difference.abs());
            assert!(
                error < 1e-7,
                "{}[{i}]: {} against {difference}",
                p.name,
                gradient[i]
            );
        }
    }
}

/// Log-probabilities of all tokens for each mask behind the anchor `at`, by decoding; `waiting`:
/// the drafter reads hidden states of both calls at the end.
fn decoded(at: usize, waiting: bool) -> Vec<Vec<f64>> {
    let shape = DecodeShape {
        rows: TEXT.len(),
        positions: 64,
        cache: CacheKind::F32,
        num_blocks: 4,
        head_chunk: 8,
    };
    let purpose = Purpose::Decode(shape);
    let mut pair = Pair::<f32>::new(purpose, purpose);
    let blocks = [2, 0];
    let slot = |p: usize| blocks[p / CACHE_BLOCK] * CACHE_BLOCK as u32 + (p % CACHE_BLOCK) as u32;
    let slots: Vec<u32> = (0..at + BLOCK).map(slot).collect();
    let positions: Vec<u32> = (0..at as u32).collect();
    let segment = |q_start: usize, q_len: usize, past: usize| CachedSegment {
        q_start,
        q_len,
        past,
        blocks: &blocks,
        among: Among::Chain,
    };
    let b = &mut pair.backend;
    // The text in two calls, so that the drafter's context comes in two parts, or the first waits
    // for the second.
    for (first, end) in [(0, at / 2), (at / 2, at)] {
        if first == end {
            continue;
        }
        let segments = [segment(0, end - first, first)];
        let cached = CachedRows {
            slots: &slots[first..end],
            segments: &segments,
            unread: if waiting { first } else { 0 },
        };
        pair.target
            .write_batch(b, &TEXT[first..end], &positions[first..end], &[]);
        pair.target.forward_cached(b, cached);
        if !waiting {
            let slots = &slots[first..end];
            pair.drafter.absorb(b, slots, &positions[first..end]);
        }
    }
    if waiting {
        pair.drafter.absorb(b, &slots[..at], &positions);
    }
    let block = CachedSegment {
        among: Among::All,
        ..segment(0, BLOCK, at)
    };
    let cached = CachedRows {
        slots: &slots[at..],
        segments: &[block],
        unread: 0,
    };
    let mut kept = Kept::default();
    let anchor = (TEXT[at], at as u32);
    pair.drafter
        .draft(b, &pair.target, anchor, cached, (BLOCK, 11), &mut kept);
    let each = kept.candidates.iter().zip(&kept.totals);
    let rows = each.map(|(candidates, total)| {
        let mut row = vec![f64::NAN; 11];
        for c in candidates {
            row[c.id as usize] = total.log_probability(c.value);
        }
        row
    });
    rows.collect()
}

#[test]
fn decoding_says_what_training_says() {
    let mut pair = Pair::<f32>::in_training();
    for (block, &anchor) in ANCHORS.iter().enumerate() {
        let rows = decoded(anchor as usize, false);
        assert_eq!(rows, decoded(anchor as usize, true));
        assert_eq!(rows.len(), BLOCK - 1);
        for (i, row) in rows.iter().enumerate() {
            for (token, log_probability) in row.iter().enumerate() {
                let mut targets = vec![IGNORE_TARGET; ANCHORS.len() * BLOCK];
                let at = block * BLOCK + 1 + i;
                targets[at] = token as u32;
                let loss = f64::from(pair.losses(&targets, None)[at]);
                let error = (loss + log_probability).abs();
                assert!(
                    error < 1e-4,
                    "anchor {anchor}, mask {i}: {loss} {log_probability}"
                );
            }
        }
    }
}
