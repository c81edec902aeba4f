//! What of a draft the target accepts: pure functions of the draft and of what the target
//! says behind the last committed token and behind each node.
//!
//! A node is judged by what the target says at its parent. That is the only reading under
//! which the result can equal decoding without a draft: the target's token at a place
//! depends on the tokens before it, and the tokens before a node are those of its path.
//! Siblings are alternatives, so one that is rejected ends nothing; but everything below it
//! has a text before it that does not exist, and is worth nothing even where the target
//! would agree with it.

use crate::distribution::Distribution;
use crate::draft::{Draft, DraftTree};

/// The accepted part of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Accepted nodes, from the root on.
    pub accepted: Vec<usize>,
    /// The target's own token behind them.
    pub next: u32,
}

impl Walk {
    /// Tokens that the cycle adds to the text.
    pub fn tokens(&self, tree: &DraftTree) -> Vec<u32> {
        let accepted = self.accepted.iter().map(|&node| tree.tokens()[node]);
        accepted.chain([self.next]).collect()
    }
}

/// Follows the target through a tree. `chosen` is the token that the target chooses behind
/// the last committed token (entry 0) and behind each node `n` (entry `n + 1`): the arg max
/// of its logits (ties: the lowest id), or what a sampler draws there. The child that
/// carries it is accepted; where none does, it is the last token.
///
/// With draws this is the rejection rule for guesses. A first child `x` is accepted with
/// probability `p(x)`, and if it is not, the second one with `p(y) / (1 - p(x))`, which is
/// `p` without `x`, and so on; what is chosen if none is accepted follows what is left.
/// One draw decides all of that, and where it is the one that decoding without a draft
/// makes at this position, the text is the same too.
///
/// # Panics
/// Unless `chosen` has an entry for each node and one more.
pub fn walk(tree: &DraftTree, chosen: &[u32]) -> Walk {
    assert_eq!(chosen.len(), tree.len() + 1, "an entry for each row");
    let (mut accepted, mut next) = (Vec::new(), chosen[0]);
    while let Some(node) = tree.child(accepted.last().copied(), next) {
        accepted.push(node);
        next = chosen[node + 1];
    }
    Walk { accepted, next }
}

/// The rejection rule for drafts whose tokens are draws (Leviathan et al. 2023, Chen et al.
/// 2023; siblings as in SpecInfer, Miao et al. 2023). Among the children of an accepted
/// node, in their order: `x`, drawn from `q`, is accepted with probability
/// `min(1, p(x) / q(x))`; else `p` becomes the normalised `max(0, p - q)`, and `q` loses
/// `x`, since siblings are drawn without replacement. If all are rejected a token is drawn
/// from what `p` has become. So each token follows `target`, whatever the draft.
///
/// `target[0]` is the distribution behind the last committed token and `target[n + 1]` that
/// behind node `n`, temperature and filters applied. `uniform` gives a number in `[0, 1)`
/// from the tokens accepted so far and the number of the draw at this place. A draft
/// without [`proposals`](Draft::proposals) is judged as guesses, `q` all on `x`.
///
/// # Panics
/// Unless `target` has an entry with weight for each node and one more.
pub fn walk_rejecting(
    draft: &Draft,
    target: &[Distribution],
    uniform: &mut dyn FnMut(usize, usize) -> f64,
) -> Walk {
    let tree = &draft.tree;
    assert_eq!(target.len(), tree.len() + 1, "an entry for each row");
    let mut accepted = Vec::new();
    loop {
        let at = accepted.last().copied();
        let entry = at.map_or(0, |node| node + 1);
        let children: Vec<(usize, u32)> =
            tree.children(at).map(|n| (n, tree.tokens()[n])).collect();
        let proposal = draft.proposals.get(entry);
        let draw = &mut |number| uniform(accepted.len(), number);
        match choose(&target[entry], proposal, &children, draw) {
            Ok(node) => accepted.push(node),
            Err(next) => return Walk { accepted, next },
        }
    }
}

/// One of the children, or a token of the target's.
fn choose(
    target: &Distribution,
    proposal: Option<&Distribution>,
    children: &[(usize, u32)],
    uniform: &mut dyn FnMut(usize) -> f64,
) -> Result<usize, u32> {
    let mut p = target.clone();
    let mut q = proposal.cloned();
    for (number, &(node, token)) in children.iter().enumerate() {
        let proposed = q.as_ref().map_or(1.0, |q| q.probability(token));
        if uniform(number) * proposed < p.probability(token) {
            return Ok(node);
        }
        let left = match &q {
            Some(q) => p.residual(q),
            None => p.without(token),
        };
        // Rounding can leave nothing where p and q are the same; then p is as good.
        p = if left.total() > 0.0 { left } else { p };
        q = q.map(|q| q.without(token));
    }
    let picked = p.pick(uniform(children.len()));
    Err(picked.or(p.best()).expect("a target with a token"))
}

/// What became of drafts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Steps that generated tokens, with a draft or without.
    pub steps: usize,
    /// Nodes that were verified.
    pub drafted: usize,
    /// Nodes that were accepted.
    pub accepted: usize,
    /// Tokens that were generated.
    pub emitted: usize,
    /// Accepted nodes that are not the first child of their parent.
    pub other_children: usize,
    /// Nodes that are not accepted although the target chose their token at their parent,
    /// because the parent is not.
    pub orphans: usize,
}

impl DraftStats {
    /// Adds a verified tree with `chosen` as in [`walk`], of whose walk `emitted` tokens
    /// became text.
    pub fn add(&mut self, tree: &DraftTree, chosen: &[u32], walk: &Walk, emitted: usize) {
        self.steps += 1;
        self.drafted += tree.len();
        self.accepted += walk.accepted.len();
        self.emitted += emitted;
        let ranks = walk.accepted.iter().map(|&node| tree.rank(node));
        self.other_children += ranks.filter(|&rank| rank > 0).count();
        let orphan = |&node: &usize| {
            tree.parent(node).is_some_and(|parent| {
                !walk.accepted.contains(&parent) && chosen[parent + 1] == tree.tokens()[node]
            })
        };
        self.orphans += (0..tree.len()).filter(orphan).count();
    }

    /// Accepted nodes of those drafted; 0 without any.
    pub fn acceptance(&self) -> f64 {
        self.accepted as f64 / self.drafted.max(1) as f64
    }

    /// Tokens of a step.
    pub fn tokens_per_step(&self) -> f64 {
        self.emitted as f64 / self.steps.max(1) as f64
    }
}

impl std::ops::AddAssign for DraftStats {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.emitted += other.emitted;
        self.other_children += other.other_children;
        self.orphans += other.orphans;
    }
}

#[cfg(test)]
mod tests;
