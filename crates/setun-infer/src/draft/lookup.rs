//! Guessing that a text goes on as it did before.

use super::automaton::{Automaton, Edge, START};
use super::{Budget, Draft, Drafter, Target};
use crate::engine::EngineError;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Prompt lookup: the longest end of the context that occurred before says what comes next.
/// Where it went on in several ways the tree branches, the most frequent way first, then
/// the latest, then the lowest token; a shorter end of the context fills what is left.
///
/// The context is kept in a suffix automaton that grows with it: adding a token costs the same
/// however long the text is.
#[derive(Clone, Debug)]
pub struct PromptLookup {
    text: Vec<u32>,
    automaton: Automaton,
}

/// A way in which the text may go on.
#[derive(Clone, Copy, Debug)]
struct Way {
    token: u32,
    /// State behind the token.
    to: u32,
    /// Tokens before it that are the same as at the earlier place.
    matched: usize,
    /// Of the ways that went on from there.
    share: f64,
}

/// A way that is next to be drafted.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Product of shares.
    score: f64,
    /// Number in the order in which they were found.
    number: usize,
    parent: Option<usize>,
    depth: usize,
    way: Way,
}

impl Ord for Open {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.score.total_cmp(&other.score);
        by_score.then(other.number.cmp(&self.number))
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

impl Default for PromptLookup {
    fn default() -> Self {
        Self::new()
    }
}

impl PromptLookup {
    /// Without any text.
    pub fn new() -> Self {
        Self {
            text: Vec::new(),
            automaton: Automaton::new(),
        }
    }

    fn follow(&mut self, context: &[u32]) {
        if !context.starts_with(&self.text) {
            *self = Self::new();
        }
        let new = &context[self.text.len()..];
        for &token in new {
            self.automaton.push(token);
        }
        self.text.extend_from_slice(new);
    }

    /// At most `width` ways to go on from a state of which `matched` tokens are known to be
    /// the context's; those of a shorter string come behind the state's own.
    fn ways(&self, state: u32, matched: usize, width: usize) -> Vec<Way> {
        /// A state and the one of its longest end.
        const STRINGS: usize = 2;
        let mut ways: Vec<Way> = Vec::new();
        let (mut at, mut matched, mut trust) = (state, matched, 1.0);
        let mut strings = 0;
        while at != START && strings < STRINGS && ways.len() < width {
            let edges = self.automaton.edges(at);
            if !edges.is_empty() {
                let total: u32 = edges.values().map(|e| e.count.max(1)).sum();
                let mut found: Vec<_> = edges.iter().collect();
                found.retain(|(token, _)| ways.iter().all(|w| w.token != **token));
                let order = |&(&token, e): &(&u32, &Edge)| (Reverse((e.count, e.last)), token);
                let room = width - ways.len();
                if room < found.len() {
                    found.select_nth_unstable_by_key(room, order);
                    found.truncate(room);
                }
                found.sort_unstable_by_key(order);
                ways.extend(found.iter().map(|&(&token, edge)| Way {
                    token,
                    to: edge.to,
                    matched,
                    share: trust * f64::from(edge.count.max(1)) / f64::from(total),
                }));
                (strings, trust) = (strings + 1, trust / 4.0);
            }
            at = self.automaton.link(at).unwrap_or(START);
            matched = matched.min(self.automaton.len(at));
        }
        ways
    }
}

impl Drafter for PromptLookup {
    fn draft(
        &mut self,
        _: Target<'_>,
        context: &[u32],
        budget: Budget,
    ) -> Result<Draft, EngineError> {
        Ok(self.guess(context, budget))
    }
}

impl PromptLookup {
    /// Guesses what follows `context`; most of the work on a context that goes on from the
    /// last one is done already.
    pub fn guess(&mut self, context: &[u32], budget: Budget) -> Draft {
        self.follow(context);
        let mut draft = Draft::default();
        let mut open = BinaryHeap::new();
        let mut number = 0;
        let mut add = |open: &mut BinaryHeap<Open>, (parent, depth), ways: Vec<Way>, score: f64| {
            for way in ways {
                number += 1;
                let score = score * way.share;
                open.push(Open {
                    score,
                    number,
                    parent,
                    depth,
                    way,
                });
            }
        };
        let state = self.automaton.repeated();
        let ways = self.ways(state, self.automaton.len(state), budget.width);
        add(&mut open, (None, 1), ways, 1.0);
        while draft.tree.len() < budget.nodes
            && let Some(next) = open.pop()
        {
            if next.depth > budget.depth {
                continue;
            }
            let Some(node) = draft.tree.grow(next.parent, next.way.token) else {
                break;
            };
            draft.evidence.push(evidence(&next.way));
            let ways = self.ways(next.way.to, next.way.matched + 1, budget.width);
            add(&mut open, (Some(node), next.depth + 1), ways, next.score);
        }
        draft
    }
}

/// By how long the match is, and how many of the ways went this one.
fn evidence(way: &Way) -> u8 {
    let length = match way.matched {
        0..=1 => 0,
        2 => 1,
        3..=4 => 2,
        5..=8 => 3,
        9..=16 => 4,
        _ => 5,
    };
    let share = match way.share {
        s if s >= 1.0 => 0,
        s if s >= 0.5 => 1,
        s if s >= 0.2 => 2,
        _ => 3,
    };
    4 * length + share
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draft::DraftTree;
    use setun_backend::ROOT;

    const R: u32 = ROOT;

    fn budget(nodes: usize, depth: usize, width: usize) -> Budget {
        Budget {
            nodes,
            depth,
            width,
        }
    }

    fn draft(context: &[u32], budget: Budget) -> DraftTree {
        let draft = PromptLookup::new().guess(context, budget);
        assert_eq!(draft.evidence.len(), draft.tree.len());
        draft.tree
    }

    fn tree(tokens: &[u32], parents: &[u32]) -> DraftTree {
        DraftTree::new(tokens.to_vec(), parents.to_vec()).unwrap()
    }

    #[test]
    fn a_repeated_text_goes_on_as_before() {
        let context = [1, 2, 3, 4, 5, 6, 1, 2, 3];
        assert_eq!(
            draft(&context, budget(3, 8, 1)),
            DraftTree::chain(&[4, 5, 6])
        );
        assert_eq!(draft(&context, budget(9, 2, 1)), DraftTree::chain(&[4, 5]));
        // At the end of the text it goes on with the only match there is.
        let long = draft(&context, budget(9, 9, 1));
        assert_eq!(long, DraftTree::chain(&[4, 5, 6, 1, 2, 3, 4, 5, 6]));
    }

    #[test]
    fn nothing_new_is_guessed_without_a_match() {
        assert!(draft(&[], budget(9, 9, 9)).is_empty());
        assert!(draft(&[1, 2, 3], budget(9, 9, 9)).is_empty());
        assert!(draft(&[1, 2, 1], budget(0, 9, 9)).is_empty());
        assert!(draft(&[1, 2, 1], budget(9, 9, 0)).is_empty());
    }

    #[test]
    fn it_branches_where_continuations_differ() {
        // Behind "1 2" came 3 twice, 4 once and later, 5 once.
        let context = [1, 2, 3, 9, 1, 2, 5, 8, 1, 2, 4, 7, 1, 2, 3, 6, 1, 2];
        let found = draft(&context, budget(3, 1, 3));
        assert_eq!(found, tree(&[3, 4, 5], &[R, R, R]));
        assert_eq!(draft(&context, budget(3, 1, 2)), tree(&[3, 4], &[R, R]));
        let deep = draft(&context, budget(7, 3, 3));
        assert_eq!(deep.children(None).count(), 3);
        let behind_three: Vec<u32> = deep.children(Some(0)).map(|n| deep.tokens()[n]).collect();
        assert_eq!(behind_three, [6, 9], "the latest first");
    }

    #[test]
    fn it_grows_with_its_context_and_starts_again_with_another() {
        let text: Vec<u32> = (0..200u32).map(|i| i * i % 23 % 7).collect();
        let mut lookup = PromptLookup::new();
        for len in (0..200).step_by(3) {
            let grown = lookup.guess(&text[..len], budget(20, 6, 3));
            assert_eq!(grown.tree, draft(&text[..len], budget(20, 6, 3)));
        }
        let other = [5, 6, 5];
        let found = lookup.guess(&other, budget(20, 2, 3));
        assert_eq!(found.tree, draft(&other, budget(20, 2, 3)));
    }
}
