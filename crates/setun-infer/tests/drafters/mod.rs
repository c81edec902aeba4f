//! Drafters that know the text, and use it in their own ways.

use crate::model::Numbers;
use setun_infer::{
    Budget, Chunk, Distribution, Draft, DraftTree, Drafter, Engine, EngineError, Target, Wanted,
};

/// What `engine` says greedily behind a text.
pub fn greedy_after(engine: &mut Engine, text: &[u32]) -> u32 {
    let sequence = engine.start(text);
    let chunk = Chunk {
        sequence,
        tokens: &text[engine.len(sequence).unwrap()..],
        parents: None,
        logits: Wanted::Last,
    };
    let mut best = 0;
    let mut keep = |_: usize, _: usize, top: &[setun_backend::topk::Candidate], _| best = top[0].id;
    engine.step_topk(&[chunk], 1, &[], &mut keep).unwrap();
    engine.free(sequence).unwrap();
    best
}

/// Trees of the true continuation and noise: true tokens behind false siblings, false roots
/// whose children would be right, and now and then trees of 64 roots.
pub struct Mixed<'a> {
    oracle: &'a mut Engine,
    truth: &'a [u32],
    numbers: Numbers,
    vocab_size: usize,
    /// Most roots of a tree.
    pub widest: usize,
}

impl<'a> Mixed<'a> {
    pub fn new(oracle: &'a mut Engine, truth: &'a [u32], case: u64) -> Self {
        let vocab_size = oracle.spec().config.vocab_size;
        Self {
            oracle,
            truth,
            numbers: Numbers::new(70_000 + case),
            vocab_size,
            widest: 0,
        }
    }

    /// The true tokens, each behind a false sibling now and then, and at last one that is
    /// false, with a child.
    fn path(&mut self, tree: &mut DraftTree, left: &[u32]) {
        let right = self.numbers.between(0, 7).min(left.len());
        let mut at = None;
        for &token in &left[..right] {
            if self.numbers.between(0, 3) == 0 {
                let noise = self.numbers.tokens(1, self.vocab_size)[0];
                tree.grow(at, noise);
            }
            match tree.grow(at, token) {
                Some(node) => at = Some(node),
                None => return,
            }
        }
        for token in self.numbers.tokens(1, self.vocab_size) {
            at = tree.grow(at, token);
        }
    }

    /// A root, and below it what the target would say if that were right.
    fn plausible(&mut self, tree: &mut DraftTree, context: &[u32]) {
        let root = self.numbers.tokens(1, self.vocab_size)[0];
        let mut text = [context, &[root]].concat();
        let mut at = tree.grow(None, root);
        for _ in 0..self.numbers.between(1, 2) {
            let token = greedy_after(self.oracle, &text);
            text.push(token);
            at = at.and_then(|at| tree.grow(Some(at), token));
        }
    }

    /// Roots and children of any kind, up to the limit.
    fn noise(&mut self, tree: &mut DraftTree) {
        for token in self.numbers.tokens(70, self.vocab_size) {
            let parent = self.numbers.between(0, 2 * tree.len());
            tree.grow((parent < tree.len()).then_some(parent), token);
        }
    }
}

impl Drafter for Mixed<'_> {
    fn draft(&mut self, _: Target<'_>, context: &[u32], _: Budget) -> Result<Draft, EngineError> {
        let left = self.truth.get(context.len()..).unwrap_or_default();
        let mut tree = DraftTree::default();
        match self.numbers.between(0, 59) {
            0 => {
                // A step of 7 visits every token of these vocabularies.
                let first = self.numbers.between(0, self.vocab_size - 1);
                for i in 0..64 {
                    tree.grow(None, ((first + 7 * i) % self.vocab_size) as u32);
                }
                self.widest = tree.len();
            }
            1 => {
                self.path(&mut tree, left);
                self.noise(&mut tree);
            }
            2..=19 => {
                self.plausible(&mut tree, context);
                self.path(&mut tree, left);
            }
            _ => self.path(&mut tree, left),
        }
        Ok(Draft::guesses(tree))
    }
}

/// Never right: no root is the next token, and below the roots lies the true text.
pub struct Wrong<'a> {
    pub truth: &'a [u32],
    pub vocab_size: u32,
}

impl Drafter for Wrong<'_> {
    fn draft(&mut self, _: Target<'_>, context: &[u32], _: Budget) -> Result<Draft, EngineError> {
        let left = self.truth.get(context.len()..).unwrap_or_default();
        let next = left.first().copied().unwrap_or(0);
        let mut tree = DraftTree::default();
        for i in 1..4 {
            let root = tree.grow(None, (next + i) % self.vocab_size);
            let mut at = root;
            for &token in &left[left.len().min(1)..left.len().min(9)] {
                at = tree.grow(at, token);
            }
        }
        Ok(Draft::guesses(tree))
    }
}

/// The same tree every time, or those of a list in turn.
pub struct Scripted(pub Vec<DraftTree>);

impl Drafter for Scripted {
    fn draft(&mut self, _: Target<'_>, _: &[u32], _: Budget) -> Result<Draft, EngineError> {
        self.0.rotate_left(1);
        Ok(Draft::guesses(self.0[self.0.len() - 1].clone()))
    }
}

/// Draws two tokens, and behind each of them one, from fixed distributions.
pub struct Draws {
    pub q: Distribution,
    pub numbers: Numbers,
}

impl Draws {
    fn children(&mut self, tree: &mut DraftTree, parent: Option<usize>, n: usize) {
        let mut left = self.q.clone();
        for _ in 0..n {
            let token = left.pick(self.numbers.uniform()).unwrap();
            left = left.without(token);
            tree.grow(parent, token);
        }
    }
}

impl Drafter for Draws {
    fn draft(&mut self, _: Target<'_>, _: &[u32], _: Budget) -> Result<Draft, EngineError> {
        let mut tree = DraftTree::default();
        self.children(&mut tree, None, 2);
        for root in 0..2 {
            self.children(&mut tree, Some(root), 1);
        }
        Ok(Draft {
            proposals: vec![self.q.clone(); tree.len() + 1],
            ..Draft::guesses(tree)
        })
    }
}
