//! How large trees shall be: what a step costs by its rows, how often guesses are right,
//! and what follows from both.
//!
//! Nothing here knows a clock: whoever runs the steps says how long they took. Times decide
//! how much is drafted and verified, and so the speed of a text, never its tokens.

use crate::draft::{Budget, Draft, MAX_NODES, NUM_EVIDENCE};
use std::collections::BTreeMap;

/// Times that a median is taken of.
const SAMPLES: usize = 9;

/// Times that a number of rows needs to count: the median of three stands one outlier.
const ENOUGH: usize = 3;

/// Steps after which a number of rows that did not occur is forgotten. What was too dear is
/// tried again then.
const REMEMBERED: u64 = 512;

/// What a further row costs, as a share of a step of one row, before it is measured.
const PRIOR_SLOPE: f64 = 0.2;

/// What a further row costs at least, beyond all that is measured: a line through a few noisy
/// times may be flat or fall, and would promise the widest step for nothing.
const LEAST_SLOPE: f64 = 0.1;

/// Seconds of a step by its number of rows: the median of the last nine for each number
/// that occurred three times, a straight line between them. Beyond them the line goes on, but
/// with a tenth of a step for a row at least; what was never measured is guessed, one step as the unit.
#[derive(Clone, Debug, Default)]
pub struct CostModel {
    times: BTreeMap<usize, Times>,
    /// Number of observations.
    now: u64,
}

#[derive(Clone, Debug, Default)]
struct Times {
    /// The last ones, oldest first.
    recent: Vec<f64>,
    median: f64,
    /// When the last one came.
    at: u64,
}

impl CostModel {
    /// Without any measurement.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a step of `rows` rows that took `seconds`. Times that are no positive numbers
    /// are left out.
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        if rows == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        self.now += 1;
        let times = self.times.entry(rows).or_default();
        if times.recent.len() == SAMPLES {
            times.recent.remove(0);
        }
        times.recent.push(seconds);
        times.at = self.now;
        let mut sorted = times.recent.clone();
        sorted.sort_by(f64::total_cmp);
        times.median = sorted[sorted.len() / 2];
        let now = self.now;
        self.times.retain(|_, times| now - times.at < REMEMBERED);
    }

    /// Whether `rows` rows were measured often enough to count.
    pub fn is_measured(&self, rows: usize) -> bool {
        self.times.get(&rows).is_some_and(Times::count)
    }

    /// Expected seconds of a step of `rows` rows, at least 1.
    pub fn predict(&self, rows: usize) -> f64 {
        let rows = rows.max(1);
        let point = |(&rows, times): (&usize, &Times)| (rows as f64, times.median);
        let known = |(_, times): &(&usize, &Times)| times.count();
        let below = self.times.range(..=rows).rev().find(known).map(point);
        let above = self.times.range(rows..).find(known).map(point);
        let at = rows as f64;
        match (below, above) {
            (Some((x0, y0)), Some((x1, _))) if x0 == x1 => y0,
            (Some((x0, y0)), Some((x1, y1))) => y0 + (y1 - y0) * (at - x0) / (x1 - x0),
            (None, None) => Self::guess(at),
            (Some((x, y)), None) => match self.times.iter().find(known).map(point) {
                Some((x0, y0)) if x0 < x => {
                    y + ((y - y0) / (x - x0)).max(LEAST_SLOPE * y0) * (at - x)
                }
                _ => y * Self::guess(at) / Self::guess(x),
            },
            (None, Some((x, y))) => y * Self::guess(at) / Self::guess(x),
        }
    }

    /// As [`predict`](Self::predict), and the longest time seen, or none, while no number of rows
    /// counts: a guess has no unit that could be held against seconds.
    fn predict_seconds(&self, rows: usize) -> f64 {
        if self.times.values().any(Times::count) {
            return self.predict(rows);
        }
        self.times.values().map(|t| t.median).fold(0.0, f64::max)
    }

    fn guess(rows: f64) -> f64 {
        1.0 + PRIOR_SLOPE * (rows - 1.0)
    }
}

impl Times {
    fn count(&self) -> bool {
        self.recent.len() >= ENOUGH
    }
}

/// How many times as long steps take now as their costs say: a host that others use, too, changes
/// its speed, and numbers of rows are measured at different moments. The median of the last few.
#[derive(Clone, Debug, Default)]
struct Pace {
    /// Oldest first.
    recent: Vec<f64>,
}

impl Pace {
    /// Steps that count.
    const MEMORY: usize = 5;

    fn observe(&mut self, ratio: f64) {
        if !ratio.is_finite() || ratio <= 0.0 {
            return;
        }
        if self.recent.len() == Self::MEMORY {
            self.recent.remove(0);
        }
        self.recent.push(ratio);
    }

    fn value(&self) -> f64 {
        let mut sorted = self.recent.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(1.0)
    }
}

/// An average that follows its observations.
#[derive(Clone, Copy, Debug)]
struct Rate {
    value: f64,
    weight: f64,
}

impl Rate {
    /// Observations that count.
    const MEMORY: f64 = 24.0;

    fn new(value: f64) -> Self {
        Self { value, weight: 2.0 }
    }

    fn observe(&mut self, hit: bool) {
        self.weight = (self.weight + 1.0).min(Self::MEMORY);
        self.value += (f64::from(u8::from(hit)) - self.value) / self.weight;
    }
}

/// Siblings whose acceptance is told apart.
const RANKS: usize = 4;

/// Depths whose acceptance is told apart.
const DEPTHS: usize = 16;

/// Rows of the steps that are chosen among: few, so that each is measured often, and such
/// that blocks of rows in products are full.
const ROWS: [usize; 11] = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];

/// A tree must promise this much more than a plain step.
const MARGIN: f64 = 1.02;

/// Share of the time that may be lost by drafts that do not pay.
const LOSS: f64 = 0.02;

/// Most drafts that wait for the text to go on.
const MOST_WAITING: usize = 16;

/// Most plain steps until a draft is tried again, unless it is known to cost so much that more
/// are needed.
const LONGEST_PAUSE: f64 = 256.0;

/// Plain steps that drafts may lose before anything is known of them.
const FIRST_CREDIT: f64 = 2.0;

/// Most plain steps that drafts which paid have put aside for those that do not.
const MOST_CREDIT: f64 = 6.0;

/// Chooses trees that promise the most tokens a second, no tree included.
///
/// A node's value is the probability that it is accepted: the acceptance of nodes with its
/// evidence and rank, averaged over the last ones, times its parent's value. A child is
/// never worth more than its parent, so the `n` nodes of largest value are a tree, and
/// `(1 + sum of values) / cost(1 + n)` is its expected number of tokens a second. Guesses
/// that are not verified are compared with the text all the same, so that what has become
/// better is found out for free.
///
/// A drafter that costs time is asked less deep, or not at all for some steps once it has lost
/// more than it saved before: as many as keep the loss at two percent.
#[derive(Clone, Debug)]
pub struct Planner {
    limit: Budget,
    /// Of steps and of drafts, as if the host had always been as fast.
    cost: CostModel,
    draft_cost: CostModel,
    pace: Pace,
    acceptance: [[Rate; RANKS]; NUM_EVIDENCE],
    /// That a path goes on from each depth to the next.
    deeper: [Rate; DEPTHS],
    /// Drafts of which the text has not yet said how much is right.
    waiting: Vec<Waiting>,
    /// Plain steps that drafts have saved, or lost where it is negative; then plain steps pay it
    /// back, a little each.
    credit: f64,
}

/// A draft with the tokens that came behind its context.
#[derive(Clone, Debug)]
struct Waiting {
    draft: Draft,
    tokens: Vec<u32>,
}

/// Whether a text that goes on with `tokens` has left the draft, or come to the end of it.
fn is_decided(draft: &Draft, tokens: &[u32]) -> bool {
    let mut at = None;
    for &token in tokens {
        match draft.tree.child(at, token) {
            Some(node) => at = Some(node),
            None => return true,
        }
    }
    draft.tree.children(at).next().is_none()
}

/// A cycle that is over.
#[derive(Clone, Copy, Debug)]
pub struct Cycle<'a> {
    /// What was drafted, before nodes were left out; none if nothing was asked for.
    pub draft: Option<&'a Draft>,
    /// Largest depth that was asked for.
    pub depth: usize,
    /// Seconds of drafting.
    pub draft_seconds: f64,
    /// Rows of the step.
    pub rows: usize,
    /// Seconds of the step.
    pub step_seconds: f64,
    /// Tokens that came of it.
    pub tokens: &'a [u32],
}

impl Default for Planner {
    fn default() -> Self {
        Self::new(Budget {
            nodes: MAX_NODES,
            depth: 32,
            width: 8,
        })
    }
}

impl Planner {
    /// With trees of at most `limit`.
    pub fn new(limit: Budget) -> Self {
        let of_rank = |rank| Rate::new([0.5, 0.2, 0.1, 0.05][rank]);
        Self {
            limit,
            cost: CostModel::new(),
            draft_cost: CostModel::new(),
            pace: Pace::default(),
            acceptance: [std::array::from_fn(of_rank); NUM_EVIDENCE],
            deeper: [Rate::new(0.7); DEPTHS],
            waiting: Vec::new(),
            credit: FIRST_CREDIT,
        }
    }

    /// With acceptances to begin with: that of each class of evidence, where one is known.
    #[must_use]
    pub fn expecting(mut self, prior: impl Fn(usize) -> Option<f64>) -> Self {
        for (class, rates) in self.acceptance.iter_mut().enumerate() {
            if let Some(value) = prior(class) {
                rates.fill(Rate::new(value));
            }
        }
        self
    }

    /// The next cycle is of another text.
    pub fn begin_text(&mut self) {
        self.waiting.clear();
    }

    /// What the drafter is asked for, at most `room`; nothing while it does not pay, and
    /// until plain steps are measured.
    pub fn budget(&mut self, room: Budget) -> Budget {
        let limit = self.limit.min(room);
        let none = Budget { nodes: 0, ..limit };
        if !self.cost.is_measured(1) {
            return none;
        }
        if self.credit < 0.0 {
            return none;
        }
        let depth = self.best_depth(limit.depth);
        Budget { depth, ..limit }
    }

    /// The depth whose path promises the most tokens for the time of drafting and verifying
    /// it; all where drafting costs nothing, since nodes can be left out later.
    fn best_depth(&self, most: usize) -> usize {
        let plain = self.cost.predict(1);
        let drafting = |depth| self.draft_cost.predict_seconds(depth);
        if drafting(most) < 0.01 * plain {
            return most;
        }
        let (mut tokens, mut reached) = (1.0, 1.0);
        let mut best = (0.0, most.min(1));
        for depth in 1..=most {
            reached *= self.deeper[depth.min(DEPTHS) - 1].value;
            tokens += reached;
            let rate = tokens / (self.cost.predict(1 + depth) + drafting(depth));
            if rate > best.0 {
                best = (rate, depth);
            }
        }
        best.1
    }

    /// Which nodes of a draft that took `seconds` are worth their rows: those that bring more
    /// tokens than their time is worth, at the rate of the best cycle of drafting and
    /// verifying, or of plain steps if that is better.
    pub fn choose(&self, draft: &Draft, seconds: f64) -> Vec<bool> {
        let seconds = seconds / self.pace.value();
        let values = self.values(draft);
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        let plain = self.cost.predict(1);
        let offers = ROWS.into_iter().filter(|&rows| rows <= 1 + order.len());
        let offers: Vec<(usize, f64, f64)> = offers
            .map(|rows| {
                let nodes = &order[..rows - 1];
                let tokens = nodes.iter().fold(1.0, |sum, &node| sum + values[node]);
                (rows - 1, tokens, self.cost.predict(rows))
            })
            .collect();
        let rates = offers
            .iter()
            .map(|(_, tokens, cost)| tokens / (cost + seconds));
        let rate = rates.fold(MARGIN / plain, f64::max);
        let mut best = (1.0 - rate * plain, 0);
        for (nodes, tokens, cost) in offers {
            let gain = tokens - rate * cost;
            if gain > best.0 {
                best = (gain, nodes);
            }
        }
        let mut chosen = vec![false; values.len()];
        for &node in &order[..best.1] {
            chosen[node] = true;
        }
        chosen
    }

    /// Probability that each node is accepted; a later sibling's is at most an earlier
    /// one's, so that no tree has it without the earlier one.
    fn values(&self, draft: &Draft) -> Vec<f64> {
        let tree = &draft.tree;
        let mut values = vec![0.0; tree.len()];
        let mut least_child = vec![1.0f64; tree.len() + 1];
        for node in 0..tree.len() {
            let parent = tree.parent(node);
            let rank = tree.rank(node).min(RANKS - 1);
            let accepted = self.acceptance[draft.evidence(node)][rank].value;
            let least = &mut least_child[parent.map_or(0, |p| p + 1)];
            *least = least.min(accepted);
            values[node] = parent.map_or(1.0, |p| values[p]) * *least;
        }
        values
    }

    /// Counts a cycle.
    pub fn observe(&mut self, cycle: Cycle<'_>) {
        if self.cost.is_measured(cycle.rows) {
            let ratio = cycle.step_seconds / self.cost.predict(cycle.rows);
            self.pace.observe(ratio);
        }
        let pace = self.pace.value();
        self.cost.observe(cycle.rows, cycle.step_seconds / pace);
        self.learn(cycle);
        if cycle.draft.is_none() {
            if self.credit < 0.0 {
                self.credit += LOSS * cycle.tokens.len() as f64;
            }
            return;
        }
        let depth = cycle.depth.max(1);
        self.draft_cost.observe(depth, cycle.draft_seconds / pace);
        self.count(cycle.tokens.len(), cycle.rows, depth);
    }

    /// What a cycle of `rows` rows and a draft of `depth` has saved, from which `tokens` tokens
    /// came. Costs are medians, so that a disturbed draft silences no drafter for long.
    fn count(&mut self, tokens: usize, rows: usize, depth: usize) {
        let plain = self.cost.predict(1);
        let drafting = self.draft_cost.predict_seconds(depth) / plain;
        let is_sure = self.draft_cost.is_measured(depth);
        let saved = tokens as f64 - self.cost.predict(rows) / plain - drafting;
        if saved.is_finite() {
            // A draft may cost more than this, verifying one may not: times of steps are noisy.
            let least = if is_sure { -8.0 - drafting } else { -8.0 };
            self.credit = (self.credit + saved.max(least)).min(MOST_CREDIT);
        }
        let longest = match is_sure {
            true => LONGEST_PAUSE.max(drafting / LOSS),
            false => LONGEST_PAUSE,
        };
        self.credit = self.credit.max(-LOSS * longest);
    }

    /// Compares drafts with the text as far as that goes. Of a draft that was not verified
    /// whole, plain steps say the rest, so that one that did not seem to pay is found out
    /// by the next tokens and not by the next drafts.
    fn learn(&mut self, cycle: Cycle<'_>) {
        for mut waiting in std::mem::take(&mut self.waiting) {
            waiting.tokens.extend_from_slice(cycle.tokens);
            match is_decided(&waiting.draft, &waiting.tokens) {
                true => self.compare(&waiting.draft, &waiting.tokens),
                false => self.waiting.push(waiting),
            }
        }
        let Some(draft) = cycle.draft else { return };
        if is_decided(draft, cycle.tokens) {
            self.compare(draft, cycle.tokens);
        } else if self.waiting.len() < MOST_WAITING {
            self.waiting.push(Waiting {
                draft: draft.clone(),
                tokens: cycle.tokens.to_vec(),
            });
        }
    }

    /// Follows the text through the draft: who was right?
    fn compare(&mut self, draft: &Draft, tokens: &[u32]) {
        let tree = &draft.tree;
        let mut at = None;
        for (depth, &token) in tokens.iter().enumerate() {
            let mut next = None;
            let mut children = 0;
            for (rank, node) in tree.children(at).enumerate() {
                let hit = tree.tokens()[node] == token;
                let class = &mut self.acceptance[draft.evidence(node)];
                class[rank.min(RANKS - 1)].observe(hit);
                next = next.or(hit.then_some(node));
                children += 1;
            }
            if children == 0 {
                return;
            }
            self.deeper[depth.min(DEPTHS - 1)].observe(next.is_some());
            match next {
                Some(node) => at = Some(node),
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests;
