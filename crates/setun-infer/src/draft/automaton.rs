//! The suffix automaton of a text (Blumer et al., 1985), grown token by token.
//!
//! It has a state for each set of substrings that end at the same places, at most two for
//! each token. The substrings of a state are suffixes of the longest one of them; its link
//! leads to the state of the longest suffix that ends in more places. So the link of the
//! state of the whole text is the longest end of the text that was there before, and its
//! edges are what came next.

use std::collections::BTreeMap;

/// The state of the empty string.
pub(super) const START: u32 = 0;

/// States that a token counts for: those of the longest ends of the text before it.
const COUNTED: usize = 8;

/// What came behind the strings of a state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Edge {
    /// The state of the strings with the token.
    pub to: u32,
    /// How often, in the states that are counted.
    pub count: u32,
    /// The last place, a number of tokens.
    pub last: u32,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// Tokens of the longest string.
    len: u32,
    link: Option<u32>,
    edges: BTreeMap<u32, Edge>,
}

/// A text that is looked up in itself.
#[derive(Clone, Debug)]
pub(super) struct Automaton {
    states: Vec<State>,
    /// The state of the whole text.
    whole: u32,
}

impl Automaton {
    /// Of the empty text.
    pub fn new() -> Self {
        Self {
            states: vec![State::default()],
            whole: START,
        }
    }

    /// Adds a token: a constant number of states on average over a text, each step a look
    /// into an ordered map.
    pub fn push(&mut self, token: u32) {
        let before = self.whole;
        let len = self.states[before as usize].len + 1;
        let new = self.add(State {
            len,
            ..State::default()
        });
        let mut at = Some(before);
        while let Some(state) = at
            && !self.edges(state).contains_key(&token)
        {
            let edge = Edge {
                to: new,
                ..Edge::default()
            };
            self.states[state as usize].edges.insert(token, edge);
            at = self.link(state);
        }
        let link = at.map_or(START, |state| self.exactly(state, token));
        self.states[new as usize].link = Some(link);
        self.whole = new;
        self.count(before, token, len);
    }

    /// The state whose longest string is that of `state` with `token`, which is split off
    /// if it shared a state with longer ones.
    fn exactly(&mut self, state: u32, token: u32) -> u32 {
        let to = self.edges(state)[&token].to;
        let len = self.states[state as usize].len + 1;
        if self.states[to as usize].len == len {
            return to;
        }
        let copy = State {
            len,
            ..self.states[to as usize].clone()
        };
        let copy = self.add(copy);
        self.states[to as usize].link = Some(copy);
        let mut at = Some(state);
        while let Some(state) = at
            && let Some(edge) = self.states[state as usize].edges.get_mut(&token)
            && edge.to == to
        {
            edge.to = copy;
            at = self.link(state);
        }
        copy
    }

    /// Counting for all ends would cost as much as there are ends; short ones are only
    /// asked when no long one is there, and then any order does.
    fn count(&mut self, before: u32, token: u32, place: u32) {
        let mut at = Some(before);
        for _ in 0..COUNTED {
            let Some(state) = at else { return };
            if let Some(edge) = self.states[state as usize].edges.get_mut(&token) {
                edge.count += 1;
                edge.last = place;
            }
            at = self.link(state);
        }
    }

    fn add(&mut self, state: State) -> u32 {
        self.states.push(state);
        self.states.len() as u32 - 1
    }

    /// The state of the longest end of the text that occurred before, or [`START`].
    pub fn repeated(&self) -> u32 {
        self.link(self.whole).unwrap_or(START)
    }

    /// The state of the longest end of its strings that occurs in more places.
    pub fn link(&self, state: u32) -> Option<u32> {
        self.states[state as usize].link
    }

    /// Tokens of the longest string of a state.
    pub fn len(&self, state: u32) -> usize {
        self.states[state as usize].len as usize
    }

    /// What came behind a state, by token.
    pub fn edges(&self, state: u32) -> &BTreeMap<u32, Edge> {
        &self.states[state as usize].edges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_backend::philox::Philox;

    /// The longest end of `text` that occurs earlier in it, and the tokens behind those
    /// places, by trying all.
    fn by_trying(text: &[u32]) -> (usize, Vec<u32>) {
        for len in (1..text.len()).rev() {
            let end = &text[text.len() - len..];
            let places = (0..text.len() - len).filter(|&i| text[i..].starts_with(end));
            let mut next: Vec<u32> = places.map(|i| text[i + len]).collect();
            if !next.is_empty() {
                next.sort_unstable();
                next.dedup();
                return (len, next);
            }
        }
        (0, Vec::new())
    }

    #[test]
    fn finds_the_longest_end_that_was_there_before() {
        for case in 0..60 {
            let random = Philox::new(8, case);
            let letters = 1 + case as u32 % 5;
            let mut automaton = Automaton::new();
            let mut text = Vec::new();
            for i in 0..80 {
                let token = random.block(i)[0] % letters;
                text.push(token);
                automaton.push(token);
                let state = automaton.repeated();
                let (len, next) = by_trying(&text);
                assert_eq!(automaton.len(state), len, "{text:?}");
                if len > 0 {
                    let edges: Vec<u32> = automaton.edges(state).keys().copied().collect();
                    assert_eq!(edges, next, "{text:?}");
                }
            }
            assert!(automaton.states.len() <= 2 * text.len());
        }
    }

    #[test]
    fn edges_count_how_often_and_when() {
        let mut automaton = Automaton::new();
        for token in [1, 2, 1, 3, 1, 2, 1] {
            automaton.push(token);
        }
        // "1 2 1" was there before, then came 3.
        let state = automaton.repeated();
        assert_eq!(automaton.len(state), 3);
        let edges = automaton.edges(state);
        assert_eq!(edges.keys().collect::<Vec<_>>(), [&3]);
        let one = automaton.link(state).unwrap();
        let edges = automaton.edges(one);
        assert_eq!((edges[&2].count, edges[&2].last), (2, 6));
        assert_eq!((edges[&3].count, edges[&3].last), (1, 4));
    }
}
