//! How large trees shall be: what a step costs by its rows, how often guesses are right,
//! and what follows from both.
//!
//! Nothing here knows a clock: whoever runs the steps says how long they took. Times decide
//! how much is drafted and verified, and so the speed of a text, never its tokens.

use crate::draft::{Budget, Draft, MAX_NODES, NUM_EVIDENCE};
use std::collections::BTreeMap;

/// Times that a number of rows needs to count.
const ENOUGH: usize = 3;

/// What a further row costs, as a share of a step of one row, before it is measured.
const PRIOR_SLOPE: f64 = 0.2;

/// What a further row costs at least, beyond all that is measured: a line through a few noisy
/// times may be flat or fall, and would promise the widest step for nothing.
const LEAST_SLOPE: f64 = 0.1;

/// Variance of the logarithm of a time around what is expected.
const NOISE: f64 = 0.01;

/// By how much the variance of the host's pace grows with each step.
const PACE_DRIFT: f64 = 0.003;

/// By how much that of a cost does.
const COST_DRIFT: f64 = 1e-4;

/// Deviations beyond which a time is taken for disturbed, and for no longer than so many.
const OUTLIER: f64 = 2.0;

/// Seconds of a step by its number of rows, a straight line between those that occurred three
/// times. Beyond them the line goes on, but with a tenth of a step for a row at least; what
/// was never measured is guessed, one step as the unit.
///
/// The logarithm of a time is that of the host's pace and that of the cost of its rows, and noise.
/// Both are followed by a Kalman filter each: what a time has beyond expectation goes to pace and
/// cost by their variances. So a host that is slow for a while changes no cost that is
/// well known, and costs that were measured at different moments can be compared.
#[derive(Clone, Debug, Default)]
pub struct CostModel {
    costs: BTreeMap<usize, Cost>,
    /// Number of observations.
    now: u64,
}

/// What is known of the cost of a number of rows.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Logarithm of seconds.
    log: f64,
    variance: f64,
    count: usize,
    /// The first logarithms, ascending.
    first: [f64; ENOUGH],
    /// When it was last observed.
    at: u64,
}

/// How many times as long steps take now as when they were first measured: a host that others use,
/// too, changes its speed.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    log: f64,
    variance: f64,
}

impl Pace {
    fn value(&self) -> f64 {
        libm::exp(self.log)
    }
}

impl CostModel {
    /// Without any measurement.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a step of `rows` rows that took `seconds`. Times that are no positive numbers
    /// are left out.
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        self.observe_at(&mut Pace::default(), rows, seconds);
    }

    /// As [`observe`](Self::observe), at the pace of the host, which learns from it.
    fn observe_at(&mut self, pace: &mut Pace, rows: usize, seconds: f64) {
        if rows == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        self.now += 1;
        let log = libm::log(seconds) - pace.log;
        let cost = self.costs.entry(rows).or_insert(Cost {
            log,
            variance: NOISE,
            count: 0,
            first: [f64::INFINITY; ENOUGH],
            at: self.now,
        });
        let age = (self.now - cost.at) as f64;
        cost.count += 1;
        cost.at = self.now;
        if let Some(first) = cost.first.get_mut(cost.count - 1) {
            *first = log;
            cost.first.sort_by(f64::total_cmp);
            // The least until there is a median: what is the very first to be timed is often
            // long, for reasons that do not come again.
            cost.log = cost.first[if cost.counts() { ENOUGH / 2 } else { 0 }];
            return;
        }
        cost.variance += age * COST_DRIFT;
        let variance = cost.variance + pace.variance + NOISE;
        let most = OUTLIER * variance.sqrt();
        let beyond = (log - cost.log).clamp(-most, most);
        for (log, own) in [
            (&mut cost.log, &mut cost.variance),
            (&mut pace.log, &mut pace.variance),
        ] {
            let share = *own / variance;
            *log += share * beyond;
            *own *= 1.0 - share;
        }
    }

    /// Whether `rows` rows were measured often enough to count.
    pub fn is_measured(&self, rows: usize) -> bool {
        self.costs.get(&rows).is_some_and(Cost::counts)
    }

    /// Expected seconds of a step of `rows` rows, at least 1.
    pub fn predict(&self, rows: usize) -> f64 {
        let rows = rows.max(1);
        let point = |(&rows, cost): (&usize, &Cost)| (rows as f64, libm::exp(cost.log));
        let known = |(_, cost): &(&usize, &Cost)| cost.counts();
        let below = self.costs.range(..=rows).rev().find(known).map(point);
        let above = self.costs.range(rows..).find(known).map(point);
        let at = rows as f64;
        match (below, above) {
            (Some((x0, y0)), Some((x1, _))) if x0 == x1 => y0,
            (Some((x0, y0)), Some((x1, y1))) => y0 + (y1 - y0) * (at - x0) / (x1 - x0),
            (None, None) => Self::guess(at),
            (Some((x, y)), None) => match self.costs.iter().find(known).map(point) {
                Some((x0, y0)) if x0 < x => {
                    y + ((y - y0) / (x - x0)).max(LEAST_SLOPE * y0) * (at - x)
                }
                _ => y * Self::guess(at) / Self::guess(x),
            },
            (None, Some((x, y))) => y * Self::guess(at) / Self::guess(x),
        }
    }

    /// As [`predict`](Self::predict), and the shortest time seen, or none, while no number of rows
    /// counts: a guess has no unit that could be held against seconds.
    fn predict_seconds(&self, rows: usize) -> f64 {
        if self.costs.values().any(Cost::counts) {
            return self.predict(rows);
        }
        let all = self.costs.values().map(|cost| libm::exp(cost.log));
        all.reduce(f64::min).unwrap_or(0.0)
    }

    fn guess(rows: f64) -> f64 {
        1.0 + PRIOR_SLOPE * (rows - 1.0)
    }
}

impl Cost {
    fn counts(&self) -> bool {
        self.count >= ENOUGH
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
    /// Drafts that were asked for.
    asked: usize,
}

/// Of so many drafts, one is for a [`Probe`].
const PROBED: usize = 16;

/// Trees beside the best, whose costs and acceptances would not be heard of any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Probe {
    Plain,
    Smaller,
    Larger,
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
            asked: 0,
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
        if !self.cost.is_measured(1) || self.credit < 0.0 {
            return none;
        }
        self.asked += 1;
        if self.probe() == Some(Probe::Plain) {
            return none;
        }
        let best = self.best_depth(limit.depth);
        let more = usize::from(self.probe() == Some(Probe::Larger));
        let depth = limit.depth.min(best + more);
        Budget {
            nodes: limit.nodes.min(self.most_nodes(depth)),
            depth,
            ..limit
        }
    }

    /// More nodes cost more than a path of this depth is worth, were all of it right.
    fn most_nodes(&self, depth: usize) -> usize {
        let worth = (1 + depth) as f64 * self.cost.predict(1);
        let pays = |&rows: &usize| self.cost.predict(rows) <= worth;
        ROWS.into_iter().take_while(pays).last().unwrap_or(2) - 1
    }

    /// Whether the cycle tries something else than what seems best.
    fn probe(&self) -> Option<Probe> {
        let kinds = [Probe::Plain, Probe::Larger, Probe::Smaller, Probe::Larger];
        let is_due = self.asked.is_multiple_of(PROBED);
        is_due.then(|| kinds[self.asked / PROBED % kinds.len()])
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
        for &(nodes, tokens, cost) in &offers {
            let gain = tokens - rate * cost;
            if gain > best.0 {
                best = (gain, nodes);
            }
        }
        let sizes = [0].into_iter().chain(offers.iter().map(|offer| offer.0));
        let nodes = match self.probe() {
            None | Some(Probe::Plain) => best.1,
            Some(Probe::Smaller) => sizes.take_while(|&n| n < best.1).last().unwrap_or(0),
            Some(Probe::Larger) => sizes.filter(|&n| n > best.1).min().unwrap_or(best.1),
        };
        let mut chosen = vec![false; values.len()];
        for &node in &order[..nodes] {
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
        self.pace.variance += PACE_DRIFT;
        self.cost
            .observe_at(&mut self.pace, cycle.rows, cycle.step_seconds);
        self.learn(cycle);
        if cycle.draft.is_none() {
            if self.credit < 0.0 {
                self.credit += LOSS * cycle.tokens.len() as f64;
            }
            return;
        }
        let depth = cycle.depth.max(1);
        let seconds = cycle.draft_seconds / self.pace.value();
        self.draft_cost.observe(depth, seconds);
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
