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

/// Chooses trees that promise the most tokens a second, no tree included.
///
/// A node's value is the probability that it is accepted: the acceptance of nodes with its
/// evidence and rank, averaged over the last ones, times its parent's value. A child is
/// never worth more than its parent, so the `n` nodes of largest value are a tree, and
/// `(1 + sum of values) / cost(1 + n)` is its expected number of tokens a second. Guesses
/// that are not verified are compared with the text all the same, so that what has become
/// better is found out for free.
///
/// A drafter that costs time is asked less deep, or not at all for some steps after it has
/// lost time on average: as many as keep the loss at two percent.
#[derive(Clone, Debug)]
pub struct Planner {
    limit: Budget,
    cost: CostModel,
    draft_cost: CostModel,
    acceptance: [[Rate; RANKS]; NUM_EVIDENCE],
    /// That a path goes on from each depth to the next.
    deeper: [Rate; DEPTHS],
    /// Drafts of which the text has not yet said how much is right.
    waiting: Vec<Waiting>,
    /// Plain steps saved by a cycle with a draft, on average.
    saved: f64,
    pause: usize,
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
            acceptance: [std::array::from_fn(of_rank); NUM_EVIDENCE],
            deeper: [Rate::new(0.7); DEPTHS],
            waiting: Vec::new(),
            saved: 0.0,
            pause: 0,
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
        if self.pause > 0 {
            self.pause -= 1;
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
        self.cost.observe(cycle.rows, cycle.step_seconds);
        self.learn(cycle);
        if cycle.draft.is_none() {
            return;
        }
        let depth = cycle.depth.max(1);
        self.draft_cost.observe(depth, cycle.draft_seconds);
        self.pause = self.pause_after(cycle.tokens.len(), cycle.rows, depth);
    }

    /// Plain steps until the next draft, behind a cycle of `rows` rows and a draft of `depth`
    /// from which `tokens` tokens came. Costs are medians, so that a disturbed draft silences
    /// no drafter for long.
    fn pause_after(&mut self, tokens: usize, rows: usize, depth: usize) -> usize {
        let plain = self.cost.predict(1);
        let drafting = self.draft_cost.predict_seconds(depth) / plain;
        let is_sure = self.draft_cost.is_measured(depth);
        let saved = tokens as f64 - self.cost.predict(rows) / plain - drafting;
        if saved.is_finite() {
            // A draft may cost more than this, verifying one may not: times of steps are noisy.
            let least = if is_sure { -8.0 - drafting } else { -8.0 };
            self.saved += (saved.clamp(least, 8.0) - self.saved) / 8.0;
        }
        let longest = match is_sure {
            true => LONGEST_PAUSE.max(drafting / LOSS),
            false => LONGEST_PAUSE,
        };
        (-self.saved / LOSS).clamp(0.0, longest) as usize
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
mod tests {
    use super::*;
    use crate::draft::{DraftTree, PromptLookup};
    use setun_backend::philox::Philox;

    #[test]
    fn costs_are_medians_with_lines_between() {
        let mut cost = CostModel::new();
        assert_eq!((cost.predict(1), cost.predict(6)), (1.0, 2.0));
        for _ in 0..3 {
            assert_eq!(cost.predict(6), 2.0, "few times do not count");
            cost.observe(1, 2.0);
        }
        assert_eq!(cost.predict(6), 4.0, "guessed from the one that is known");
        for seconds in [9.0, 4.0, f64::NAN, -1.0, 0.0] {
            cost.observe(5, seconds);
            assert!(!cost.is_measured(5));
        }
        cost.observe(5, 4.5);
        assert_eq!((cost.is_measured(5), cost.predict(5)), (true, 4.5));
        assert_eq!(cost.predict(3), 3.25);
        assert_eq!(cost.predict(9), 7.0, "the line goes on");
        for _ in 0..SAMPLES {
            cost.observe(5, 1.0);
        }
        assert_eq!(cost.predict(5), 1.0, "old times are forgotten");
        let more = 45.0 * LEAST_SLOPE * 2.0;
        assert_eq!(
            cost.predict(50),
            1.0 + more,
            "a line that falls does not go on"
        );
        for _ in 0..REMEMBERED {
            cost.observe(6, 4.0);
        }
        assert!(!cost.is_measured(1) && !cost.is_measured(5));
        assert_eq!(cost.predict(1), 2.0, "from what is left");
    }

    /// A planner for which a row more costs `slope` of a step, and the time of a step.
    fn planner(slope: f64) -> (Planner, impl Fn(usize) -> f64) {
        let seconds = move |rows: usize| 1e-3 * (1.0 + slope * (rows as f64 - 1.0));
        let mut planner = Planner::default();
        for rows in [1, 2, 4, 8, 16, 32, 64].repeat(3) {
            planner.cost.observe(rows, seconds(rows));
        }
        (planner, seconds)
    }

    fn all() -> Budget {
        Budget {
            nodes: 64,
            depth: 64,
            width: 64,
        }
    }

    /// Cycles of a chain of `depth` guesses, of which `right` are right, on a text that
    /// counts: time for each token, with a plain step as the unit.
    fn cycles(planner: &mut Planner, n: usize, depth: u32, right: u32, slope: f64) -> f64 {
        let seconds = |rows: usize| 1e-3 * (1.0 + slope * (rows as f64 - 1.0));
        let (mut time, mut at) = (0.0, 0);
        planner.begin_text();
        for _ in 0..n {
            let guess = |i| if i < right { at + i } else { u32::MAX - i };
            let chain: Vec<u32> = (0..depth).map(guess).collect();
            let draft = Draft::guesses(DraftTree::chain(&chain));
            let budget = planner.budget(all());
            let asked = !budget.is_empty();
            let chosen = match asked {
                true => planner.choose(&draft, 0.0),
                false => Vec::new(),
            };
            let kept = chosen.iter().filter(|&&c| c).count() as u32;
            let tokens: Vec<u32> = (at..=at + right.min(kept)).collect();
            let rows = 1 + kept as usize;
            planner.observe(Cycle {
                draft: asked.then_some(&draft),
                depth: budget.depth,
                draft_seconds: 0.0,
                rows,
                step_seconds: seconds(rows),
                tokens: &tokens,
            });
            time += seconds(rows);
            at += tokens.len() as u32;
        }
        time / f64::from(at) / 1e-3
    }

    #[test]
    fn trees_grow_with_acceptance_and_shrink_with_cost() {
        let kept = |planner: &Planner| {
            let draft = Draft::guesses(DraftTree::chain(&(0..40).collect::<Vec<u32>>()));
            planner.choose(&draft, 0.0).iter().filter(|&&c| c).count()
        };
        let (mut cheap, _) = planner(0.02);
        let start = kept(&cheap);
        cycles(&mut cheap, 50, 40, 40, 0.02);
        assert!(
            kept(&cheap) == 31 && start < 8,
            "{start} then {}",
            kept(&cheap)
        );
        cycles(&mut cheap, 300, 40, 0, 0.02);
        assert_eq!(kept(&cheap), 0);
        cycles(&mut cheap, 300, 40, 40, 0.02);
        assert_eq!(kept(&cheap), 31, "what is not verified is still compared");
        let (mut dear, _) = planner(1.1);
        cycles(&mut dear, 50, 40, 40, 1.1);
        assert_eq!(kept(&dear), 0, "a row costs as much as a step");
    }

    #[test]
    fn wrong_guesses_cost_little_and_right_ones_pay() {
        for slope in [0.02, 0.1, 0.5] {
            let (mut planner, _) = planner(slope);
            let time = cycles(&mut planner, 400, 16, 0, slope);
            assert!(time < 1.05, "slope {slope}: {time} of the plain time");
        }
        let (mut planner, _) = planner(0.1);
        let time = cycles(&mut planner, 400, 16, 8, 0.1);
        assert!(time < 0.25, "{time} of the plain time");
    }

    /// Number of drafts and seconds lost in `steps` steps of a millisecond with a drafter that
    /// takes `seconds(depth)` and is never right.
    fn wrong_drafts(steps: usize, seconds: impl Fn(usize) -> f64) -> (usize, f64) {
        let (mut planner, _) = planner(0.1);
        let draft = Draft::guesses(DraftTree::chain(&[1, 2, 3]));
        let (mut asked, mut lost) = (0, 0.0);
        for _ in 0..steps {
            let budget = planner.budget(all());
            let draft = (!budget.is_empty()).then_some(&draft);
            let seconds = seconds(budget.depth);
            let choose = |d| planner.choose(d, seconds);
            let kept = draft.map_or(0, |d| choose(d).iter().filter(|&&c| c).count());
            if draft.is_some() {
                asked += 1;
                lost += seconds + 1e-4 * kept as f64;
            }
            planner.observe(Cycle {
                draft,
                depth: budget.depth,
                draft_seconds: seconds,
                rows: 1 + kept,
                step_seconds: 1e-3 * (1.0 + 0.1 * kept as f64),
                tokens: &[9],
            });
        }
        (asked, lost)
    }

    #[test]
    fn a_slow_drafter_that_is_wrong_is_asked_seldom() {
        // As slow as the target, for each token.
        let (asked, lost) = wrong_drafts(2000, |depth| 1e-3 * depth as f64);
        assert!(asked > 5 && lost < 0.05 * 2.0, "{lost} s in {asked} drafts");
        // It reads first what came since it was asked: thirty steps and more each time.
        let (asked, lost) = wrong_drafts(20_000, |_| 30e-3);
        assert!(
            asked > 5 && lost < 0.05 * 20.0,
            "{lost} s in {asked} drafts"
        );
    }

    #[test]
    fn a_drafter_that_costs_nothing_is_asked_for_all_from_the_start() {
        let (mut planner, _) = planner(0.5);
        let draft = Draft::guesses(DraftTree::chain(&(0..40).collect::<Vec<u32>>()));
        for depth in 0..3 {
            assert_eq!(planner.budget(all()).depth, 32, "after {depth} drafts");
            planner.observe(Cycle {
                draft: Some(&draft),
                depth: 32 - depth,
                draft_seconds: 1e-6,
                rows: 1,
                step_seconds: 1e-3,
                tokens: &[0, 1],
            });
        }
    }

    /// Time of a text with prompt lookup against plain decoding, where a step of `n` rows
    /// costs `1 + slope (n - 1)` and drafting nothing; without a model, since the text is
    /// known.
    fn time_of(text: &[u32], slope: f64) -> f64 {
        time_on(text, slope, &|_| 1.0)
    }

    /// As [`time_of`] on a host that takes `slower(time)` times as long at each time.
    fn time_on(text: &[u32], slope: f64, slower: &dyn Fn(f64) -> f64) -> f64 {
        let seconds =
            |rows: usize, time: f64| 1e-3 * (1.0 + slope * (rows as f64 - 1.0)) * slower(time);
        let plain = text[10..]
            .iter()
            .fold(0.0, |time, _| time + seconds(1, time));
        let (mut planner, mut lookup) = (Planner::default(), PromptLookup::new());
        let (mut at, mut time) = (10, 0.0);
        while at < text.len() {
            let left = text.len() - at;
            let room = Budget {
                depth: left - 1,
                ..all()
            };
            let budget = planner.budget(room);
            let asked = !budget.is_empty();
            let draft = match asked {
                true => lookup.guess(&text[..at], budget),
                false => Draft::default(),
            };
            let chosen = planner.choose(&draft, 0.0);
            let verified = draft.keep(|node| chosen[node]).tree;
            let mut path = None;
            let mut n = 0;
            while let Some(node) = verified.child(path, text[at + n]) {
                (path, n) = (Some(node), n + 1);
            }
            let rows = 1 + verified.len();
            let tokens = &text[at..=at + n];
            let step_seconds = seconds(rows, time);
            planner.observe(Cycle {
                draft: asked.then_some(&draft),
                depth: budget.depth,
                draft_seconds: 0.0,
                rows,
                step_seconds,
                tokens,
            });
            time += step_seconds;
            at += tokens.len();
        }
        time / plain
    }

    #[test]
    fn a_host_that_changes_its_speed_costs_little() {
        let random = Philox::new(3, 4);
        let letters = |n: u32| -> Vec<u32> {
            let number = |i| random.block(i)[0] % n;
            (0..3000).map(number).collect()
        };
        for period in [0.03, 0.1, 0.3, 1.0] {
            for slope in [0.2, 0.35, 0.5] {
                // Slower for half of the time, and each step by up to a third.
                let slower = |time: f64| {
                    let busy = if (time / period) as u64 % 2 == 1 {
                        1.6
                    } else {
                        1.0
                    };
                    let noise = random.block((time * 1e7) as u64)[1] as f64 / 2f64.powi(32);
                    busy * (1.0 + noise * noise / 3.0)
                };
                for n in [2, 3, 4, 12] {
                    let time = time_on(&letters(n), slope, &slower);
                    assert!(
                        time < 1.05,
                        "period {period}, slope {slope}, {n} letters: {time}"
                    );
                }
            }
        }
    }

    #[test]
    fn lookup_pays_on_texts_that_repeat_and_costs_little_on_others() {
        let random = Philox::new(3, 3);
        let letters = |n: u32, from: u64| -> Vec<u32> {
            (from..from + 1500)
                .map(|i| random.block(i)[0] % n)
                .collect()
        };
        let phrase = letters(1000, 9000)[..100].to_vec();
        let mut changing = Vec::new();
        for part in 0..8 {
            changing.extend(phrase.iter().chain(&phrase));
            changing.extend(&letters(6, 10_000 + 2000 * part)[..200]);
        }
        for slope in [0.03, 0.1, 0.3, 0.6, 1.0] {
            for n in [2, 4, 12, 100, 5000] {
                let time = time_of(&letters(n, 0), slope);
                assert!(time < 1.05, "{n} letters, slope {slope}: {time}");
            }
            let (repeating, mixed) = (
                time_of(&phrase.repeat(15), slope),
                time_of(&changing, slope),
            );
            println!("slope {slope}: repeating {repeating:.2}, mixed {mixed:.2}");
            let best = (1.0 + 31.0 * slope) / 32.0;
            assert!(
                repeating < 1.05f64.min(1.3 * best + 0.1),
                "{slope}: {repeating}"
            );
            assert!(mixed < 1.05, "{slope}: {mixed}");
        }
    }

    #[test]
    fn chosen_nodes_are_a_tree_with_its_first_siblings() {
        let (mut planner, _) = planner(0.05);
        // Later siblings are the better ones.
        for _ in 0..50 {
            let draft = Draft::guesses(DraftTree::merge(&[&[1], &[2], &[3], &[4]]));
            planner.compare(&draft, &[3]);
        }
        let chains: [&[u32]; 4] = [&[1, 5], &[2, 6], &[3, 7], &[4]];
        let draft = Draft::guesses(DraftTree::merge(&chains));
        let chosen = planner.choose(&draft, 0.0);
        let tree = &draft.tree;
        for node in (0..tree.len()).filter(|&n| chosen[n]) {
            assert!(tree.parent(node).is_none_or(|p| chosen[p]));
            let earlier = tree.children(tree.parent(node)).take_while(|&n| n < node);
            assert!(earlier.into_iter().all(|n| chosen[n]));
        }
    }
}
