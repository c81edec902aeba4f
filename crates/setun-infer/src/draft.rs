//! Drafts: trees of guessed tokens, and what makes them.

mod automaton;
mod block;
mod lookup;
mod model;

pub use block::BlockGuesses;
pub use lookup::PromptLookup;
pub use model::ModelDrafter;

use crate::distribution::Distribution;
use crate::engine::{Engine, EngineError};
use crate::kv::Sequence;
use setun_backend::ROOT;
use thiserror::Error;

/// Most nodes of a draft.
pub const MAX_NODES: usize = 64;

/// Classes of [`Draft::evidence`].
pub const NUM_EVIDENCE: usize = 32;

/// Why tokens and parents are no tree.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TreeError {
    /// One list is longer than the other.
    #[error("a draft has {tokens} tokens and {parents} parents; give each token one parent")]
    Length {
        /// Tokens.
        tokens: usize,
        /// Parents.
        parents: usize,
    },
    /// More nodes than are verified at a time.
    #[error("a draft of {0} nodes is larger than {MAX_NODES}; cut it")]
    TooLarge(usize),
    /// A parent that is not an earlier node.
    #[error("node {node} of a draft has parent {parent}; parents come before their children")]
    Order {
        /// The node.
        node: usize,
        /// Its parent.
        parent: u32,
    },
    /// Two children of one parent with the same token.
    #[error("nodes {first} and {second} of a draft are siblings with the same token; merge them")]
    Repeated {
        /// The earlier node.
        first: usize,
        /// The later one.
        second: usize,
    },
}

/// A tree of guessed tokens behind a context. Nodes come after their parents; siblings have
/// different tokens and are alternatives, the likelier ones first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DraftTree {
    tokens: Vec<u32>,
    parents: Vec<u32>,
}

impl DraftTree {
    /// A tree of `tokens` with the `parents` of each: an earlier node, or
    /// [`ROOT`](setun_backend::ROOT) (-1 as i32) for a child of the last committed token.
    ///
    /// # Errors
    /// [`TreeError`] for the first thing that is wrong.
    pub fn new(tokens: Vec<u32>, parents: Vec<u32>) -> Result<Self, TreeError> {
        if tokens.len() != parents.len() {
            return Err(TreeError::Length {
                tokens: tokens.len(),
                parents: parents.len(),
            });
        }
        if tokens.len() > MAX_NODES {
            return Err(TreeError::TooLarge(tokens.len()));
        }
        for (node, &parent) in parents.iter().enumerate() {
            if parent != ROOT && parent as usize >= node {
                return Err(TreeError::Order { node, parent });
            }
            let same = |&other: &usize| parents[other] == parent && tokens[other] == tokens[node];
            if let Some(first) = (0..node).find(same) {
                let second = node;
                return Err(TreeError::Repeated { first, second });
            }
        }
        Ok(Self { tokens, parents })
    }

    /// One path; tokens behind the first [`MAX_NODES`] are left out.
    pub fn chain(tokens: &[u32]) -> Self {
        Self::merge(&[tokens])
    }

    /// Several chains as one trie: common beginnings are shared, in the order in which they
    /// come. Tokens for which there is no room are left out.
    pub fn merge(chains: &[&[u32]]) -> Self {
        let mut tree = Self::default();
        for chain in chains {
            let mut at = None;
            for &token in *chain {
                match tree.grow(at, token) {
                    Some(node) => at = Some(node),
                    None => break,
                }
            }
        }
        tree
    }

    /// The child of `parent` with `token`, which is added if it is new; none if the tree is
    /// full or has no such parent.
    pub fn grow(&mut self, parent: Option<usize>, token: u32) -> Option<usize> {
        let found = self.child(parent, token);
        let is_orphan = parent.is_some_and(|p| p >= self.len());
        if found.is_some() || is_orphan || self.len() == MAX_NODES {
            return found;
        }
        self.tokens.push(token);
        self.parents.push(parent.map_or(ROOT, |p| p as u32));
        Some(self.len() - 1)
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Token of each node.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Parent of each node.
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// The node's parent; none for a child of the last committed token.
    pub fn parent(&self, node: usize) -> Option<usize> {
        (self.parents[node] != ROOT).then_some(self.parents[node] as usize)
    }

    /// Tokens from the last committed one to the node: 1 for its children.
    pub fn depth(&self, node: usize) -> usize {
        let up = |&node: &usize| self.parent(node);
        std::iter::successors(Some(node), up).count()
    }

    /// The largest depth; 0 without nodes.
    pub fn max_depth(&self) -> usize {
        (0..self.len()).map(|n| self.depth(n)).max().unwrap_or(0)
    }

    /// Children of a node, or of the last committed token, in their order.
    pub fn children(&self, parent: Option<usize>) -> impl Iterator<Item = usize> + '_ {
        let wanted = parent.map_or(ROOT, |p| p as u32);
        (0..self.len()).filter(move |&n| self.parents[n] == wanted)
    }

    /// The child of `parent` that carries `token`.
    pub fn child(&self, parent: Option<usize>, token: u32) -> Option<usize> {
        self.children(parent).find(|&n| self.tokens[n] == token)
    }

    /// Number of siblings before the node.
    pub fn rank(&self, node: usize) -> usize {
        let earlier = &self.parents[..node];
        earlier.iter().filter(|&&p| p == self.parents[node]).count()
    }

    /// Tokens of the path to the node, its own included.
    pub fn path(&self, node: usize) -> Vec<u32> {
        let up = |&node: &usize| self.parent(node);
        let mut tokens: Vec<u32> = std::iter::successors(Some(node), up)
            .map(|n| self.tokens[n])
            .collect();
        tokens.reverse();
        tokens
    }
}

/// Who sees whom when a tree is verified behind `past` tokens: entry `[i, j]` of a matrix
/// `[past + nodes, past + nodes]`, row by row, tells whether position or node `i` attends to
/// `j`. Tokens of the past see those up to themselves; a node sees the past, its ancestors
/// and itself. `parents` as in [`DraftTree::new`].
///
/// This is the definition. The engine never makes the matrix: it gathers the keys of a
/// node's path in the order of positions, because a mask over scattered slots would change
/// the order of sums and with it the last bits.
///
/// # Panics
/// If a parent does not come before its child.
pub fn visibility_mask(past: usize, parents: &[u32]) -> Vec<bool> {
    let size = past + parents.len();
    let mut mask = vec![false; size * size];
    for i in 0..past {
        mask[i * size..][..=i].fill(true);
    }
    for (node, &parent) in parents.iter().enumerate() {
        let (before, row) = mask.split_at_mut((past + node) * size);
        match parent {
            ROOT => row[..past].fill(true),
            parent => {
                let of_parent = &before[(past + parent as usize) * size..][..size];
                row[..size].copy_from_slice(of_parent);
            }
        }
        row[past + node] = true;
    }
    mask
}

/// How large a draft may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Most nodes.
    pub nodes: usize,
    /// Most tokens on a path.
    pub depth: usize,
    /// Most children of a node.
    pub width: usize,
}

impl Budget {
    /// The smaller of each.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            nodes: self.nodes.min(other.nodes),
            depth: self.depth.min(other.depth),
            width: self.width.min(other.width),
        }
    }

    /// Whether no node fits.
    pub fn is_empty(self) -> bool {
        self.nodes.min(self.depth).min(self.width) == 0
    }
}

/// A guess.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draft {
    /// The guessed tokens.
    pub tree: DraftTree,
    /// For each node a class below [`NUM_EVIDENCE`]: nodes of a class were accepted about
    /// as often in the past, which is how the size of trees is chosen. Empty: all alike.
    pub evidence: Vec<u8>,
    /// Empty where tokens are guesses and not draws. Else what the children of the
    /// committed end (entry 0) and of each node `n` (entry `n + 1`) were drawn from, one
    /// after the other without replacement. Then whether a node is in the tree, and its
    /// evidence, must not depend on what was drawn for it or for its later siblings: else
    /// texts no longer follow the target's distribution.
    pub proposals: Vec<Distribution>,
}

impl Draft {
    /// Guesses without evidence.
    pub fn guesses(tree: DraftTree) -> Self {
        Self {
            tree,
            ..Self::default()
        }
    }

    /// Evidence of a node.
    pub fn evidence(&self, node: usize) -> usize {
        let class = self.evidence.get(node).copied().unwrap_or(0);
        usize::from(class).min(NUM_EVIDENCE - 1)
    }

    /// With the nodes that `wanted` and whose ancestors are wanted too.
    #[must_use]
    pub fn keep(&self, wanted: impl Fn(usize) -> bool) -> Self {
        let mut kept = Self::default();
        let mut place = vec![None; self.tree.len()];
        let proposals = |from: usize| self.proposals.get(from).cloned();
        kept.proposals.extend(proposals(0));
        for node in 0..self.tree.len() {
            let parent = self.tree.parent(node);
            let lost = parent.is_some_and(|p| place[p].is_none());
            if lost || !wanted(node) {
                continue;
            }
            let parent = parent.and_then(|p| place[p]);
            place[node] = kept.tree.grow(parent, self.tree.tokens[node]);
            kept.evidence.push(self.evidence(node) as u8);
            kept.proposals.extend(proposals(node + 1));
        }
        kept
    }

    /// What fits into `budget`: the first nodes, none too deep or too far aside. Draws stay
    /// what they were, since this looks at no token.
    #[must_use]
    pub fn cut(self, budget: Budget) -> Self {
        let tree = &self.tree;
        let narrow = |n: usize| tree.depth(n) <= budget.depth && tree.rank(n) < budget.width;
        let fits = tree.len() <= budget.nodes && (0..tree.len()).all(narrow);
        if fits {
            return self;
        }
        let narrow = self.keep(narrow);
        narrow.keep(|node| node < budget.nodes)
    }
}

/// The target at the time of a draft: the sequence holds the text but for its last token.
pub struct Target<'a> {
    /// The engine.
    pub engine: &'a mut Engine,
    /// The text's sequence, which a drafter leaves as it is.
    pub sequence: Sequence,
}

/// Something that guesses how a text goes on. What it guesses changes the speed of a text,
/// never the text.
pub trait Drafter {
    /// Guesses what follows `context`, prompt and text so far. A draft larger than `budget`
    /// is cut. A context may have nothing to do with the one before it.
    ///
    /// # Errors
    /// Whatever keeps it from guessing at all; without a guess the draft is empty.
    fn draft(
        &mut self,
        target: Target<'_>,
        context: &[u32],
        budget: Budget,
    ) -> Result<Draft, EngineError>;

    /// Share of the nodes with this class of evidence that will be accepted, where that is
    /// known before any was verified.
    fn prior(&self, _class: usize) -> Option<f64> {
        None
    }
}

/// Probabilities between the classes of [`class_of`].
const CLASS_BOUNDS: [f64; 15] = [
    0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003,
];

/// Class of [`Draft::evidence`] of a token to which a drafter gives this probability.
fn class_of(probability: f64) -> u8 {
    let above = CLASS_BOUNDS.iter().filter(|&&bound| probability < bound);
    above.count() as u8
}

/// The probability in the middle of a class, which is the acceptance of its tokens if the
/// drafter knows what it does not know; none for a class of another kind.
fn middle_of(class: usize) -> Option<f64> {
    let low = match class {
        0..15 => CLASS_BOUNDS[class],
        15 => 0.0,
        _ => return None,
    };
    let high = class.checked_sub(1).map_or(1.0, |c| CLASS_BOUNDS[c]);
    Some((low + high) / 2.0)
}

#[cfg(test)]
mod tests;
