//! Guessing with a block drafter on the target's own engine.

use super::{Budget, Draft, Drafter, Target, class_of, middle_of};
use crate::engine::EngineError;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Most tokens of a position that take part.
const MAX_WIDTH: usize = 8;
/// Classes of evidence for the first positions; deeper ones, whose text the drafter has not
/// seen, have classes of their own.
const SHALLOW: usize = 2;
/// The first class of deep positions.
const DEEP_CLASSES: usize = 16;

/// The guesses of the engine's block drafter ([`Engine::guess_block`]) as a tree: the
/// likeliest paths, taking the guesses of the positions for independent (`DDTree`,
/// arXiv 2604.12989).
///
/// [`Engine::guess_block`]: crate::Engine::guess_block
#[derive(Clone, Copy, Debug, Default)]
pub struct BlockGuesses;

/// A node that may be added.
struct Open {
    /// Log-probability of the path.
    score: f64,
    /// Its parent's node.
    parent: Option<usize>,
    /// Its position, and which of the guesses there it is.
    place: (usize, usize),
}

impl Ord for Open {
    fn cmp(&self, other: &Self) -> Ordering {
        // The shallower one, then the better guess, comes first where scores are equal.
        let by_place = || other.place.cmp(&self.place);
        let by_score = self.score.total_cmp(&other.score);
        by_score
            .then_with(by_place)
            .then(other.parent.cmp(&self.parent))
    }
}

impl PartialOrd for Open {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Open {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Open {}

impl Drafter for BlockGuesses {
    fn prior(&self, class: usize) -> Option<f64> {
        let shallow = middle_of(class % DEEP_CLASSES)?;
        Some(if class < DEEP_CLASSES {
            shallow
        } else {
            0.8 * shallow
        })
    }

    fn draft(
        &mut self,
        target: Target<'_>,
        context: &[u32],
        budget: Budget,
    ) -> Result<Draft, EngineError> {
        let Some((&anchor, _)) = context.split_last() else {
            return Ok(Draft::default());
        };
        let width = budget.width.clamp(1, MAX_WIDTH);
        let (engine, sequence) = (target.engine, target.sequence);
        let guesses = engine.guess_block(sequence, anchor, budget.depth, width)?;
        Ok(likeliest_paths(&guesses, budget))
    }
}

/// The tree of the paths with the largest products of probabilities.
fn likeliest_paths(guesses: &[Vec<(u32, f64)>], budget: Budget) -> Draft {
    let mut draft = Draft::default();
    let depth = budget.depth.min(guesses.len());
    let at = |(position, rank): (usize, usize)| guesses[..depth].get(position)?.get(rank).copied();
    let mut open = BinaryHeap::new();
    let offer = |open: &mut BinaryHeap<Open>, parent, before: f64, place| {
        if let Some((_, log_probability)) = at(place) {
            let score = before + log_probability;
            open.push(Open {
                score,
                parent,
                place,
            });
        }
    };
    offer(&mut open, None, 0.0, (0, 0));
    while draft.tree.len() < budget.nodes
        && let Some(next) = open.pop()
    {
        let Some((token, log_probability)) = at(next.place) else {
            break;
        };
        let Some(node) = draft.tree.grow(next.parent, token) else {
            break;
        };
        let (position, rank) = next.place;
        let deep = u8::from(position >= SHALLOW) * DEEP_CLASSES as u8;
        draft
            .evidence
            .push(deep + class_of(libm::exp(log_probability)));
        if rank + 1 < budget.width {
            let before = next.score - log_probability;
            offer(&mut open, next.parent, before, (position, rank + 1));
        }
        offer(&mut open, Some(node), next.score, (position + 1, 0));
    }
    draft
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_backend::ROOT;

    fn guesses(rows: &[&[(u32, f64)]]) -> Vec<Vec<(u32, f64)>> {
        let logs = |row: &&[(u32, f64)]| row.iter().map(|&(t, p)| (t, libm::log(p))).collect();
        rows.iter().map(logs).collect()
    }

    fn budget(nodes: usize, depth: usize, width: usize) -> Budget {
        Budget {
            nodes,
            depth,
            width,
        }
    }

    #[test]
    fn the_best_paths_come_first() {
        let rows = guesses(&[
            &[(5, 0.6), (6, 0.3), (7, 0.1)],
            &[(8, 0.7), (9, 0.2)],
            &[(4, 0.9)],
        ]);
        let draft = likeliest_paths(&rows, budget(6, 3, 3));
        // 5; 5 8 (.42); 5 8 4 (.378); 6 (.3); 6 8 (.21); 6 8 4 (.189)
        assert_eq!(draft.tree.tokens(), [5, 8, 4, 6, 8, 4]);
        assert_eq!(draft.tree.parents(), [ROOT, 0, 1, ROOT, 3, 4]);
        assert_eq!(draft.evidence.len(), 6);
        assert!(draft.evidence[2] >= 16 && draft.evidence[1] < 16);
    }

    #[test]
    fn a_tree_keeps_to_its_budget() {
        let rows = guesses(&[&[(1, 0.5), (2, 0.5)], &[(3, 0.5), (4, 0.5)]]);
        for (nodes, depth, width) in [(0, 2, 2), (3, 1, 2), (9, 2, 1), (9, 9, 9), (1, 1, 1)] {
            let tree = likeliest_paths(&rows, budget(nodes, depth, width)).tree;
            assert!(tree.len() <= nodes && tree.max_depth() <= depth);
            assert!((0..tree.len()).all(|node| tree.rank(node) < width));
        }
        let all = likeliest_paths(&rows, budget(64, 9, 9)).tree;
        assert_eq!(all.len(), 2 + 4);
        assert!(likeliest_paths(&[], budget(9, 9, 9)).tree.is_empty());
    }
}
