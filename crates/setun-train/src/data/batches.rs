//! Windows of a token stream: what a training step and an evaluation read.
//!
//! # Training
//!
//! Let the stream have `N` tokens. The *target stream* is the stream repeated for ever:
//! target position `p` has the token `tokens[p mod N]`, and its input is the token before
//! it, `tokens[(p - 1) mod N]`. The token before the very first one is thus the last
//! `<|endoftext|>`, which is also what stands before every other document.
//!
//! Window `w` covers the targets `[w * seq, (w + 1) * seq)`; so every target position
//! is in exactly one window, without padding, also when `seq` does not divide `N`.
//! Epoch `e` owns the windows that start in `[e * N, (e + 1) * N)` and visits them in
//! the order of [`Permutation`] for `(seed, e)`. The `i`-th visited window fills row
//! `i mod batch` of step `i / batch`: a pure function of (seed, step), so that a resumed
//! run reads what a run without a stop reads.
//!
//! # Segments
//!
//! Attention stays inside a segment, and positions restart in each. Without a document
//! mask, a window is one segment. With it, a new segment begins at each input
//! `<|endoftext|>`: it is the context of the first target of the document behind it, and
//! no target of that document can see anything earlier. The `<|endoftext|>` that ends a
//! document is the last target of that document's segment.
//!
//! # Targets that do not count
//!
//! Of a conversation only the answers are targets ([`TokenSet::is_target`]). The others are
//! inputs as ever, but as targets they are [`IGNORE_TARGET`], which costs nothing and
//! teaches nothing. A window may have no target that counts.
//!
//! # Evaluation
//!
//! [`EvalWindows`] reads the stream once, in order: every token is a target exactly once.

use super::{DataError, Permutation, TokenSet};
use setun_backend::ops::IGNORE_TARGET;
use std::ops::Range;

/// Rows `start..start + len` of the flattened `[batch, seq]` inputs within which
/// attention stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: usize,
    /// Rows, at least 1 and at most `seq_len`.
    pub len: usize,
}

/// What is known about a training batch beside its tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchInfo {
    /// Targets before this batch, in epochs (1.0 = the whole stream once).
    pub epoch: f64,
}

/// Training batches `[batch_size, seq_len]` of a token stream.
#[derive(Debug)]
pub struct Batches {
    tokens: TokenSet,
    seq_len: usize,
    batch_size: usize,
    seed: u64,
    max_segments: usize,
}

impl Batches {
    /// Batches of `batch_size` windows of `seq_len` targets.
    ///
    /// # Errors
    /// Zero sizes, a stream that is shorter than one window with its first input, and one
    /// without any target.
    pub fn new(
        tokens: TokenSet,
        seq_len: usize,
        batch_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        check_sizes(seq_len, batch_size)?;
        check_targets(&tokens)?;
        let num_tokens = tokens.num_tokens();
        if num_tokens < seq_len as u64 + 1 {
            return Err(DataError::BadTokens {
                reason: format!(
                    "the training text has {num_tokens} tokens, but one window of seq_len \
                     {seq_len} needs {}: use more text or a shorter seq_len",
                    seq_len + 1
                ),
            });
        }
        Ok(Self {
            max_segments: batch_size * (1 + max_starts_in_window(&tokens, seq_len)),
            tokens,
            seq_len,
            batch_size,
            seed,
        })
    }

    /// The stream behind the batches.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// Targets of a batch.
    pub fn targets_per_batch(&self) -> usize {
        self.batch_size * self.seq_len
    }

    /// Most segments that a batch can have under a document mask: for buffers that are
    /// allocated once.
    pub fn max_segments(&self) -> usize {
        self.max_segments
    }

    /// Writes the inputs and targets of `step`, both `[batch_size, seq_len]` row-major.
    /// Allocates nothing.
    ///
    /// # Errors
    /// A token file that cannot be read.
    ///
    /// # Panics
    /// When a slice has another length.
    pub fn fill(
        &self,
        step: u64,
        inputs: &mut [u32],
        targets: &mut [u32],
    ) -> Result<BatchInfo, DataError> {
        assert_eq!(inputs.len(), self.targets_per_batch(), "inputs of a batch");
        assert_eq!(
            targets.len(),
            self.targets_per_batch(),
            "targets of a batch"
        );
        let rows = inputs
            .chunks_exact_mut(self.seq_len)
            .zip(targets.chunks_exact_mut(self.seq_len));
        for (row, (inputs, targets)) in rows.enumerate() {
            read_window(&self.tokens, self.window_start(step, row), inputs, targets)?;
        }
        let targets_before = step as f64 * self.targets_per_batch() as f64;
        Ok(BatchInfo {
            epoch: targets_before / self.tokens.num_tokens() as f64,
        })
    }

    /// Writes the segments of `step`'s rows, in order, to `out`, which it clears first.
    /// Allocates only when `out` has room for fewer than [`Self::max_segments`].
    pub fn segments(&self, step: u64, document_mask: bool, out: &mut Vec<Segment>) {
        out.clear();
        let most = if document_mask {
            self.max_segments
        } else {
            self.batch_size
        };
        out.reserve(most);
        for row in 0..self.batch_size {
            let rows = row * self.seq_len..(row + 1) * self.seq_len;
            let position = self.window_start(step, row);
            push_segments(&self.tokens, position, rows, document_mask, out);
        }
    }

    /// Position in the stream, below `N`, of the first target of a row.
    fn window_start(&self, step: u64, row: usize) -> u64 {
        // 128 bits: the product of a long run's window count and seq may pass 64.
        let num_tokens = u128::from(self.tokens.num_tokens());
        let seq = self.seq_len as u128;
        let visit = u128::from(step) * self.batch_size as u128 + row as u128;
        // Windows are numbered by epoch too, so visit i belongs to the epoch of window i.
        let epoch = visit * seq / num_tokens;
        let first = (epoch * num_tokens).div_ceil(seq);
        let last = ((epoch + 1) * num_tokens).div_ceil(seq);
        let order = Permutation::new((last - first) as u64, self.seed, epoch as u64);
        let window = first + u128::from(order.at((visit - first) as u64));
        (window * seq % num_tokens) as u64
    }
}

/// What [`EvalWindows::fill`] has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalBatch {
    /// Rows in use: the first `num_targets` of inputs and targets.
    pub num_targets: usize,
}

/// The windows of a held-out stream in order, each token a target exactly once.
#[derive(Debug)]
pub struct EvalWindows {
    tokens: TokenSet,
    seq_len: usize,
    batch_size: usize,
    max_segments: usize,
}

impl EvalWindows {
    /// Batches of up to `batch_size` windows of up to `seq_len` targets.
    ///
    /// # Errors
    /// Zero sizes, and a stream without any target.
    pub fn new(tokens: TokenSet, seq_len: usize, batch_size: usize) -> Result<Self, DataError> {
        check_sizes(seq_len, batch_size)?;
        check_targets(&tokens)?;
        Ok(Self {
            max_segments: batch_size * (1 + max_starts_in_window(&tokens, seq_len)),
            tokens,
            seq_len,
            batch_size,
        })
    }

    /// The stream behind the windows.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// Batches that cover the stream.
    pub fn num_batches(&self) -> u64 {
        let per_batch = (self.batch_size * self.seq_len) as u64;
        self.tokens.num_tokens().div_ceil(per_batch)
    }

    /// Most segments that a batch can have under a document mask.
    pub fn max_segments(&self) -> usize {
        self.max_segments
    }

    /// Writes batch `batch`: its windows one after the other, `seq_len` rows each, the
    /// last window of the stream maybe shorter. The rest of the slices, which hold
    /// `batch_size * seq_len`, stays as it was. Allocates nothing.
    ///
    /// # Errors
    /// A token file that cannot be read.
    ///
    /// # Panics
    /// When a slice is shorter than the batch, or `batch` is not below
    /// [`Self::num_batches`].
    pub fn fill(
        &self,
        batch: u64,
        inputs: &mut [u32],
        targets: &mut [u32],
    ) -> Result<EvalBatch, DataError> {
        let (start, num_targets) = self.range(batch);
        let (inputs, targets) = (&mut inputs[..num_targets], &mut targets[..num_targets]);
        // Neighbouring windows are neighbours in the stream: one read serves all.
        read_window(&self.tokens, start, inputs, targets)?;
        Ok(EvalBatch { num_targets })
    }

    /// Writes the segments of batch `batch` to `out`, as [`Batches::segments`] does.
    ///
    /// # Panics
    /// When `batch` is not below [`Self::num_batches`].
    pub fn segments(&self, batch: u64, document_mask: bool, out: &mut Vec<Segment>) {
        out.clear();
        let most = if document_mask {
            self.max_segments
        } else {
            self.batch_size
        };
        out.reserve(most);
        let (start, num_targets) = self.range(batch);
        for from in (0..num_targets).step_by(self.seq_len) {
            let rows = from..num_targets.min(from + self.seq_len);
            push_segments(&self.tokens, start + from as u64, rows, document_mask, out);
        }
    }

    /// First target and number of targets of a batch.
    fn range(&self, batch: u64) -> (u64, usize) {
        let num_batches = self.num_batches();
        assert!(batch < num_batches, "batch {batch} of {num_batches}");
        let per_batch = (self.batch_size * self.seq_len) as u64;
        let start = batch * per_batch;
        let num_targets = per_batch.min(self.tokens.num_tokens() - start);
        (start, num_targets as usize)
    }
}

fn check_sizes(seq_len: usize, batch_size: usize) -> Result<(), DataError> {
    if seq_len > 0 && batch_size > 0 {
        return Ok(());
    }
    Err(DataError::BadTokens {
        reason: format!(
            "seq_len is {seq_len} and batch_size is {batch_size}: both must be at least 1"
        ),
    })
}

/// A mean over no targets does not exist.
fn check_targets(tokens: &TokenSet) -> Result<(), DataError> {
    if tokens.num_targets() > 0 {
        return Ok(());
    }
    let reason = "the tokens hold no target, so nothing to learn: tokenize the text again";
    Err(DataError::BadTokens {
        reason: reason.to_owned(),
    })
}

/// Reads the targets from stream position `start` (below `N`) on, and their inputs.
fn read_window(
    tokens: &TokenSet,
    start: u64,
    inputs: &mut [u32],
    targets: &mut [u32],
) -> Result<(), DataError> {
    tokens.read_circular(start, targets)?;
    let before = start.checked_sub(1).unwrap_or(tokens.num_tokens() - 1);
    tokens.read(before, &mut inputs[..1])?;
    let known = targets.len() - 1;
    inputs[1..].copy_from_slice(&targets[..known]);
    for (position, target) in (start..).zip(targets) {
        if !tokens.is_target(position % tokens.num_tokens()) {
            *target = IGNORE_TARGET;
        }
    }
    Ok(())
}

/// Adds the segments of one window: `rows` of the batch, whose first target is at
/// stream position `start` (below `N`). The window is not longer than the stream.
fn push_segments(
    tokens: &TokenSet,
    start: u64,
    rows: Range<usize>,
    document_mask: bool,
    out: &mut Vec<Segment>,
) {
    let mut open = rows.start;
    if document_mask {
        // The input before a document's first token is an <|endoftext|>, so the inputs
        // that begin a segment are those whose target begins a document.
        let num_tokens = tokens.num_tokens();
        let end = start + rows.len() as u64;
        let wrapped = end.saturating_sub(num_tokens);
        let until_end = starts_within(tokens, start..end.min(num_tokens)).iter();
        let from_begin = starts_within(tokens, 0..wrapped).iter();
        let distances = until_end
            .map(|s| s - start)
            .chain(from_begin.map(|s| s + num_tokens - start));
        for row in distances.map(|distance| rows.start + distance as usize) {
            if row > open {
                out.push(Segment {
                    start: open,
                    len: row - open,
                });
                open = row;
            }
        }
    }
    out.push(Segment {
        start: open,
        len: rows.end - open,
    });
}

/// The document starts within a range of the stream.
fn starts_within(tokens: &TokenSet, range: Range<u64>) -> &[u64] {
    let starts = tokens.document_starts();
    let from = starts.partition_point(|&s| s < range.start);
    let to = starts.partition_point(|&s| s < range.end);
    &starts[from..to]
}

/// Most documents that start within any `seq_len` neighbouring targets, over the end of
/// the stream too.
fn max_starts_in_window(tokens: &TokenSet, seq_len: usize) -> usize {
    let starts = tokens.document_starts();
    let num_tokens = tokens.num_tokens();
    // Position of start i on the stream written twice.
    let unrolled = |i: usize| starts[i % starts.len()] + (i / starts.len()) as u64 * num_tokens;
    let (mut most, mut end) = (0, 0);
    for begin in 0..starts.len() {
        while end < begin + starts.len() && unrolled(end) < unrolled(begin) + seq_len as u64 {
            end += 1;
        }
        most = most.max(end - begin);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokens::tests::{all, masked_token_set, token_set};

    const END: u32 = 999;

    /// Documents of these lengths (without the separator) with ids that tell positions.
    fn stream(lengths: &[usize]) -> TokenSet {
        let mut next = 0..END;
        let document = |&len: &usize| next.by_ref().take(len).collect();
        let documents: Vec<Vec<u32>> = lengths.iter().map(document).collect();
        token_set(&documents, END + 1)
    }

    fn batch(batches: &Batches, step: u64) -> (Vec<u32>, Vec<u32>, f64) {
        let mut inputs = vec![u32::MAX; batches.targets_per_batch()];
        let mut targets = inputs.clone();
        let info = batches
            .fill(step, &mut inputs, &mut targets)
            .expect("fills");
        (inputs, targets, info.epoch)
    }

    #[test]
    fn every_position_is_a_target_once_per_epoch() {
        // After seq epochs the windows close at an epoch's end for every seq and N.
        for (lengths, seq) in [
            (&[7, 4, 9][..], 5),
            (&[7, 4, 9], 22),
            (&[30], 4),
            (&[30], 30),
            (&[31], 4),
            (&[0, 0, 3, 0], 6),
            (&[1], 1),
        ] {
            let batches = Batches::new(stream(lengths), seq, 1, 11).expect("long enough");
            let num_tokens = batches.tokens().num_tokens();
            let mut counts = vec![0usize; num_tokens as usize];
            for visit in 0..num_tokens {
                let start = batches.window_start(visit, 0);
                for i in 0..seq as u64 {
                    counts[((start + i) % num_tokens) as usize] += 1;
                }
            }
            assert!(
                counts.iter().all(|&n| n == seq),
                "{lengths:?}, {seq}: {counts:?}"
            );
        }
    }

    #[test]
    fn an_epoch_that_the_windows_divide_has_each_token_once() {
        let batches = Batches::new(stream(&[9, 5, 13]), 5, 2, 3).expect("30 tokens");
        let stream = all(batches.tokens());
        for epoch in 0..4 {
            let mut seen: Vec<u32> = (3 * epoch..3 * epoch + 3)
                .flat_map(|step| batch(&batches, step).1)
                .collect();
            let mut expected = stream.clone();
            seen.sort_unstable();
            expected.sort_unstable();
            assert_eq!(seen, expected, "epoch {epoch}");
        }
    }

    #[test]
    fn inputs_are_the_tokens_before_the_targets() {
        let batches = Batches::new(stream(&[9, 5, 12]), 7, 3, 3).expect("29 tokens");
        let stream = all(batches.tokens());
        for step in 0..40 {
            let (inputs, targets, _) = batch(&batches, step);
            for row in 0..3 {
                let start = batches.window_start(step, row) as usize;
                for i in 0..7 {
                    assert_eq!(targets[7 * row + i], stream[(start + i) % 29]);
                    assert_eq!(inputs[7 * row + i], stream[(start + i + 28) % 29]);
                }
            }
        }
        let first = (0..40).find(|&step| batches.window_start(step, 0) == 0);
        let (inputs, ..) = batch(&batches, first.expect("the first window is visited"));
        assert_eq!(inputs[0], END);
    }

    #[test]
    fn a_resumed_run_reads_what_a_straight_run_reads() {
        let new = |seed| Batches::new(stream(&[40, 3, 21, 77]), 8, 3, seed).expect("145 tokens");
        let straight = new(5);
        let all: Vec<_> = (0..30).map(|step| batch(&straight, step)).collect();
        for stop in 1..30 {
            let resumed = new(5);
            for step in (stop..30).rev() {
                assert_eq!(batch(&resumed, step), all[step as usize]);
            }
        }
        assert_ne!(batch(&new(6), 0), all[0], "the seed matters");
        assert_ne!(window_starts(&straight, 0), window_starts(&straight, 8));
    }

    /// Window starts of the windows that begin in an epoch.
    fn window_starts(batches: &Batches, epoch: u64) -> Vec<u64> {
        let (num_tokens, seq) = (batches.tokens().num_tokens(), batches.seq_len as u64);
        let visits = (epoch * num_tokens).div_ceil(seq)..((epoch + 1) * num_tokens).div_ceil(seq);
        visits
            .map(|i| batches.window_start(i / 3, (i % 3) as usize))
            .collect()
    }

    #[test]
    fn a_stream_shorter_than_a_batch_repeats() {
        let batches = Batches::new(stream(&[4, 4]), 6, 5, 0).expect("10 tokens");
        let (_, targets, epoch) = batch(&batches, 1);
        assert_eq!(epoch, 3.0);
        // 30 targets are three epochs of 10, and visits stay in their epochs.
        let mut counts = [0; 10];
        for row in 0..5 {
            let start = batches.window_start(1, row);
            (0..6).for_each(|i| counts[((start + i) % 10) as usize] += 1);
        }
        assert_eq!(counts, [3; 10]);
        assert_eq!(targets.len(), 30);
    }

    #[test]
    fn huge_steps_do_not_overflow() {
        let batches = Batches::new(stream(&[40, 3]), 8, 3, 5).expect("45 tokens");
        let (inputs, ..) = batch(&batches, u64::MAX);
        assert!(inputs.iter().all(|&id| id < END + 1));
    }

    #[test]
    fn too_little_text_and_zero_sizes_are_refused() {
        let why = Batches::new(stream(&[4]), 5, 2, 0).expect_err("5 tokens");
        let expected = "has 5 tokens, but one window of seq_len 5 needs 6";
        assert!(why.to_string().contains(expected), "{why}");
        assert!(Batches::new(stream(&[4]), 0, 2, 0).is_err());
        assert!(Batches::new(stream(&[4]), 2, 0, 0).is_err());
        assert!(EvalWindows::new(stream(&[4]), 0, 1).is_err());
        let without_targets = || masked_token_set(&[vec![1; 8]], 10, Some(|_| false));
        assert!(Batches::new(without_targets(), 2, 1, 0).is_err());
        assert!(EvalWindows::new(without_targets(), 2, 1).is_err());
    }

    /// Segments from the definition: a new one at each `<|endoftext|>` input.
    fn segments_by_hand(inputs: &[u32], seq: usize, document_mask: bool) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::new();
        for (i, &id) in inputs.iter().enumerate() {
            if i % seq == 0 || document_mask && id == END {
                segments.push(Segment { start: i, len: 0 });
            }
            segments.last_mut().expect("row 0 opens one").len += 1;
        }
        segments
    }

    #[test]
    fn segments_follow_their_definition_without_allocating() {
        for lengths in [
            &[9, 5, 12][..],
            &[0, 0, 0, 20],
            &[1; 17],
            &[40],
            &[3, 0, 9, 0],
        ] {
            for seq in [1, 4, 7, 13] {
                let batches = Batches::new(stream(lengths), seq, 3, 8).expect("long enough");
                let mut out = Vec::with_capacity(batches.max_segments());
                let capacity = out.capacity();
                for step in 0..60 {
                    let (inputs, ..) = batch(&batches, step);
                    for mask in [false, true] {
                        batches.segments(step, mask, &mut out);
                        assert_eq!(out, segments_by_hand(&inputs, seq, mask));
                    }
                }
                assert_eq!(out.capacity(), capacity);
            }
        }
    }

    #[test]
    fn evaluation_reads_every_token_once_in_order() {
        for lengths in [&[9, 5, 12][..], &[2], &[30, 0, 0], &[23], &[0]] {
            for (seq, batch_size) in [(1, 1), (4, 3), (7, 1), (8, 3), (50, 2)] {
                let windows = EvalWindows::new(stream(lengths), seq, batch_size).expect("sizes");
                let mut seen = (Vec::new(), Vec::new());
                let mut segments = Vec::with_capacity(windows.max_segments());
                let capacity = segments.capacity();
                for k in 0..windows.num_batches() {
                    let mut inputs = vec![0; seq * batch_size];
                    let mut targets = vec![0; seq * batch_size];
                    let filled = windows.fill(k, &mut inputs, &mut targets).expect("fills");
                    let inputs = &inputs[..filled.num_targets];
                    for mask in [false, true] {
                        windows.segments(k, mask, &mut segments);
                        assert_eq!(segments, segments_by_hand(inputs, seq, mask));
                    }
                    seen.0.extend_from_slice(inputs);
                    seen.1.extend_from_slice(&targets[..filled.num_targets]);
                }
                let stream = all(windows.tokens());
                assert_eq!(seen.1, stream);
                assert_eq!(seen.0[0], END);
                assert_eq!(seen.0[1..], stream[..stream.len() - 1]);
                assert_eq!(segments.capacity(), capacity);
            }
        }
    }

    #[test]
    fn targets_that_do_not_count_are_only_inputs() {
        let documents = [vec![1, 2, 3, 4, 5], vec![6, 7]];
        let plain = token_set(&documents, 10);
        let masked = || masked_token_set(&documents, 10, Some(|id| id % 2 == 0));
        assert_eq!((plain.num_targets(), masked().num_targets()), (9, 3));
        let with_all = Batches::new(plain, 4, 2, 1).expect("9 tokens");
        let batches = Batches::new(masked(), 4, 2, 1).expect("9 tokens");
        let counts = |id: u32| {
            if id.is_multiple_of(2) {
                id
            } else {
                IGNORE_TARGET
            }
        };
        for step in 0..20 {
            let (inputs, targets, _) = batch(&batches, step);
            let (all_inputs, all_targets, _) = batch(&with_all, step);
            assert_eq!(inputs, all_inputs);
            let expected: Vec<u32> = all_targets.into_iter().map(counts).collect();
            assert_eq!(targets, expected);
        }
        let windows = EvalWindows::new(masked(), 4, 1).expect("sizes");
        let (mut inputs, mut targets) = ([0; 4], [0; 4]);
        windows.fill(0, &mut inputs, &mut targets).expect("fills");
        assert_eq!(targets, [IGNORE_TARGET, 2, IGNORE_TARGET, 4]);
        assert_eq!(inputs, [9, 1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "batch 3 of 3")]
    fn batches_behind_the_end_are_refused() {
        let windows = EvalWindows::new(stream(&[8]), 3, 1).expect("sizes");
        let _ = windows.fill(3, &mut [0; 3], &mut [0; 3]);
    }
}
