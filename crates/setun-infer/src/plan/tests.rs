//! Costs and plans, on texts and clocks that are made up.

use super::*;
use crate::draft::{DraftTree, PromptLookup};
use setun_backend::philox::Philox;

#[test]
fn costs_have_lines_between() {
    let close = |found: f64, expected: f64| {
        let fits = (found / expected - 1.0).abs() < 1e-9;
        assert!(fits, "{found} for {expected}");
    };
    let mut cost = CostModel::new();
    close(cost.predict(1), 1.0);
    close(cost.predict(6), 2.0);
    for seconds in [9.0, 1.5, 2.0] {
        close(cost.predict(6), 2.0);
        cost.observe(1, seconds);
    }
    close(cost.predict(6), 4.0);
    for seconds in [9.0, 4.5, f64::NAN, -1.0, 0.0] {
        cost.observe(5, seconds);
        assert!(!cost.is_measured(5));
    }
    cost.observe(5, 4.0);
    assert!(cost.is_measured(5));
    close(cost.predict(5), 4.5);
    close(cost.predict(3), 3.25);
    close(cost.predict(9), 7.0);
    let mut falls = CostModel::new();
    for _ in 0..3 {
        falls.observe(1, 2.0);
        falls.observe(5, 1.0);
    }
    close(falls.predict(50), 1.0 + 45.0 * LEAST_SLOPE * 2.0);
}

#[test]
fn costs_follow_what_lasts_and_no_single_time() {
    let mut cost = CostModel::new();
    for _ in 0..20 {
        cost.observe(4, 1.0);
    }
    cost.observe(4, 30.0);
    let found = cost.predict(4);
    assert!(found < 1.03, "{found} after one long time");
    for _ in 0..150 {
        cost.observe(4, 1.2);
    }
    let found = cost.predict(4);
    assert!((1.17..1.2).contains(&found), "{found}");
}

#[test]
fn a_slow_host_changes_no_cost() {
    let (mut cost, mut pace) = (CostModel::new(), Pace::default());
    let step = |cost: &mut CostModel, pace: &mut Pace, rows: usize, slower: f64| {
        pace.variance += PACE_DRIFT;
        cost.observe_at(pace, rows, slower * (1.0 + 0.4 * (rows - 1) as f64));
    };
    for _ in 0..10 {
        for rows in 1..5 {
            step(&mut cost, &mut pace, rows, 1.0);
        }
    }
    // While it is slow, hardly any steps but those of three rows.
    for i in 0..300 {
        let rows = if i % PROBED == 0 { 2 } else { 3 };
        step(&mut cost, &mut pace, rows, 1.8);
    }
    let slower = pace.value();
    let ratio = cost.predict(3) / cost.predict(2) * 1.4 / 1.8;
    assert!((1.6..1.9).contains(&slower), "{slower}");
    assert!((0.95..1.06).contains(&ratio), "{ratio}");
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

/// Time for each token, with a plain step as the unit, of cycles with a drafter that takes
/// `0.3 + 0.05 * depth` steps, whose guesses are right with probability `right` one after the
/// other, three of them at most. On a host whose steps take up to a third longer, and which is
/// 1.8 times as slow in every other `period` of seconds; that is not counted as time. With `fixed`
/// guesses in each cycle in place of the planner's.
fn mostly_right(right: f64, slope: f64, period: f64, fixed: Option<usize>) -> f64 {
    let random = Philox::new(5, (right * 1e3) as u64);
    let mut planner = Planner::default();
    let (mut time, mut clock, mut at, mut draw) = (0.0, 0.0, 0, 0);
    let mut uniform = || {
        draw += 1;
        random.block(draw)[0] as f64 / 2f64.powi(32)
    };
    while at < 3000 {
        let is_busy = (clock / period) as u64 % 2 == 1;
        let slower = if is_busy { 1.8 } else { 1.0 };
        let budget = planner.budget(all());
        let depth = fixed
            .unwrap_or(if budget.is_empty() { 0 } else { budget.depth })
            .min(3);
        let hits = (0..3).take_while(|_| uniform() < right).count();
        let guess = |i: usize| if i < hits { at + i as u32 } else { u32::MAX };
        let chain: Vec<u32> = (0..depth).map(guess).collect();
        let draft = Draft::guesses(DraftTree::chain(&chain));
        let mut noisy = |steps: f64| 1e-3 * steps * (1.0 + uniform().powi(2) / 3.0);
        let draft_seconds = if depth > 0 {
            noisy(0.3 + 0.05 * depth as f64)
        } else {
            0.0
        };
        let chosen = planner.choose(&draft, draft_seconds * slower);
        let kept = fixed.unwrap_or(chosen.iter().filter(|&&c| c).count());
        let step_seconds = noisy(1.0 + slope * kept as f64);
        let tokens: Vec<u32> = (at..=at + hits.min(kept) as u32).collect();
        planner.observe(Cycle {
            draft: (depth > 0).then_some(&draft),
            depth,
            draft_seconds: draft_seconds * slower,
            rows: 1 + kept,
            step_seconds: step_seconds * slower,
            tokens: &tokens,
        });
        time += draft_seconds + step_seconds;
        clock += (draft_seconds + step_seconds) * slower;
        at += tokens.len() as u32;
    }
    1e3 * time / f64::from(at)
}

#[test]
fn a_drafter_that_is_mostly_right_is_used() {
    for period in [f64::INFINITY, 1.0, 0.3, 0.1, 0.03, 0.01] {
        for slope in [0.1, 0.3, 0.42] {
            for right in [0.5, 0.7, 0.8, 0.9, 0.95] {
                let fixed = (0..=3).map(|depth| mostly_right(right, slope, period, Some(depth)));
                let best = fixed.fold(f64::INFINITY, f64::min);
                let time = mostly_right(right, slope, period, None);
                let name = format!("period {period}, slope {slope}, right {right}");
                assert!(time < 1.08 * best, "{name}: {time}, best {best}");
            }
        }
    }
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
