use super::*;
use crate::sampler::{Sampler, SamplerOptions, uniform_draw};
use setun_backend::ROOT;
use setun_backend::philox::Philox;

const R: u32 = ROOT;

fn tree(tokens: &[u32], parents: &[u32]) -> DraftTree {
    DraftTree::new(tokens.to_vec(), parents.to_vec()).unwrap()
}

fn check(tree: &DraftTree, chosen: &[u32], accepted: &[usize], next: u32) -> DraftStats {
    let found = walk(tree, chosen);
    assert_eq!((found.accepted.as_slice(), found.next), (accepted, next));
    let mut stats = DraftStats::default();
    stats.add(tree, chosen, &found, found.tokens(tree).len());
    assert_eq!((stats.steps, stats.drafted), (1, tree.len()));
    assert_eq!(
        (stats.accepted, stats.emitted),
        (accepted.len(), accepted.len() + 1)
    );
    stats
}

#[test]
fn nothing_drafted_is_a_plain_step() {
    check(&DraftTree::default(), &[7], &[], 7);
}

#[test]
fn three_roots_and_no_second_level() {
    let tree = tree(&[4, 5, 6], &[R, R, R]);
    let second = check(&tree, &[5, 1, 2, 3], &[1], 2);
    assert_eq!(second.other_children, 1);
    let first = check(&tree, &[4, 1, 2, 3], &[0], 1);
    assert_eq!(first.other_children, 0);
    check(&tree, &[9, 4, 5, 6], &[], 9);
}

#[test]
fn children_of_a_rejected_root_are_dropped_though_they_match() {
    // Behind 4 the target says 8, and node 1 is 8; but the target said 5, not 4.
    let tree = tree(&[4, 8, 9, 5], &[R, 0, 1, R]);
    let stats = check(&tree, &[5, 8, 9, 1, 2], &[3], 2);
    assert_eq!((stats.orphans, stats.other_children), (2, 1));
    let none = check(&tree, &[6, 8, 9, 1, 2], &[], 6);
    assert_eq!((none.orphans, none.acceptance()), (2, 0.0));
}

#[test]
fn a_node_is_judged_at_its_parent() {
    // Both children carry what the target says at the other place.
    let tree = tree(&[1, 2, 3], &[R, 0, 0]);
    check(&tree, &[1, 3, 7, 8], &[0, 2], 8);
    check(&tree, &[2, 3, 7, 8], &[], 2);
    let deep = self::tree(&[1, 1, 1], &[R, 0, 1]);
    check(&deep, &[1, 1, 1, 1], &[0, 1, 2], 1);
    check(&deep, &[1, 1, 0, 1], &[0, 1], 0);
}

#[test]
fn stats_add_up() {
    let tree = tree(&[1, 2], &[R, R]);
    let one = check(&tree, &[2, 0, 5], &[1], 5);
    let mut two = one;
    two += one;
    assert_eq!((two.steps, two.drafted, two.other_children), (2, 4, 2));
    assert_eq!((two.acceptance(), two.tokens_per_step()), (0.5, 2.0));
}

/// Probability that a chi-square variable of `freedom` degrees exceeds `x`: the upper
/// incomplete gamma function Q(freedom / 2, x / 2), by its series.
fn chi_square_tail(freedom: usize, x: f64) -> f64 {
    let (a, x) = (freedom as f64 / 2.0, x / 2.0);
    let (mut term, mut sum, mut n) = (1.0 / a, 1.0 / a, a);
    while term > sum * 1e-16 {
        n += 1.0;
        term *= x / n;
        sum += term;
    }
    1.0 - sum * (a * x.ln() - x - libm::lgamma(a)).exp()
}

#[test]
fn the_tail_is_that_of_tables() {
    for (freedom, x, p) in [(1, 3.841, 0.05), (4, 18.467, 0.001), (10, 23.209, 0.01)] {
        assert!((chi_square_tail(freedom, x) - p).abs() < 2e-5);
    }
}

fn check_counts(expected: &Distribution, counts: &[u32], what: &str) {
    let draws = f64::from(counts.iter().sum::<u32>());
    let (mut chi_square, mut cells) = (0.0, 0);
    for (token, &count) in (0u32..).zip(counts) {
        let expected = draws * expected.probability(token);
        if expected == 0.0 {
            assert_eq!(count, 0, "{what}: {token} cannot be drawn");
            continue;
        }
        chi_square += (f64::from(count) - expected).powi(2) / expected;
        cells += 1;
    }
    let p = chi_square_tail(cells - 1, chi_square);
    assert!(p > 0.01, "{what}: chi-square {chi_square}, p {p}");
}

fn distribution(weights: &[f64]) -> Distribution {
    Distribution::new((0u32..).zip(weights.iter().copied()).collect())
}

/// Children of one parent, drawn without replacement.
fn draws(q: &Distribution, n: usize, uniform: &mut dyn FnMut(usize) -> f64) -> Vec<u32> {
    let mut left = q.clone();
    let mut tokens = Vec::new();
    while tokens.len() < n {
        let Some(token) = left.pick(uniform(tokens.len())) else {
            break;
        };
        left = left.without(token);
        tokens.push(token);
    }
    tokens
}

#[test]
fn rejection_keeps_the_distribution() {
    let p = distribution(&[0.4, 0.0, 0.25, 0.05, 0.1, 0.2]);
    let proposals = [
        distribution(&[0.1, 0.3, 0.3, 0.1, 0.1, 0.1]),
        distribution(&[0.4, 0.0, 0.25, 0.05, 0.1, 0.2]),
        distribution(&[0.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
        distribution(&[0.9, 0.02, 0.02, 0.02, 0.02, 0.02]),
    ];
    for (which, q) in (0u64..).zip(&proposals) {
        for children in 1..4 {
            let (mut counts, mut accepted) = ([0; 6], 0);
            for draw in 0..100_000 {
                let random = |n| uniform_draw(1, which, draw, n);
                let tokens = draws(q, children, &mut |n| random(n + 8));
                let draft = Draft {
                    tree: tree(&tokens, &vec![R; tokens.len()]),
                    evidence: Vec::new(),
                    proposals: vec![q.clone()],
                };
                let target = vec![p.clone(); tokens.len() + 1];
                let found =
                    walk_rejecting(&draft, &target, &mut |depth, n| random(n + 16 * depth + 16));
                counts[found.tokens(&draft.tree)[0] as usize] += 1;
                accepted += found.accepted.len();
            }
            check_counts(
                &p,
                &counts,
                &format!("proposal {which}, {children} children"),
            );
            assert!(accepted > 5_000, "{accepted}");
        }
    }
}

#[test]
fn guesses_keep_the_distribution_under_both_rules() {
    let p = distribution(&[0.4, 0.0, 0.25, 0.05, 0.1, 0.2]);
    for guesses in [&[0u32][..], &[1], &[3, 0], &[5, 1, 2], &[0, 2, 5, 4, 3]] {
        let draft = Draft::guesses(tree(guesses, &vec![R; guesses.len()]));
        let target = vec![p.clone(); guesses.len() + 1];
        let (mut counts, mut drawn, mut accepted) = ([0; 6], [0; 6], [0i32; 2]);
        for draw in 0..100_000 {
            let mut random = |depth, n| uniform_draw(2, 0, draw, n + 16 * depth);
            let rejecting = walk_rejecting(&draft, &target, &mut random);
            counts[rejecting.tokens(&draft.tree)[0] as usize] += 1;
            accepted[0] += i32::from(!rejecting.accepted.is_empty());
            let token = p.pick(uniform_draw(3, 0, draw, 0)).unwrap();
            let following = walk(&draft.tree, &vec![token; guesses.len() + 1]);
            drawn[following.tokens(&draft.tree)[0] as usize] += 1;
            accepted[1] += i32::from(!following.accepted.is_empty());
        }
        check_counts(&p, &counts, &format!("rejecting {guesses:?}"));
        check_counts(&p, &drawn, &format!("following {guesses:?}"));
        // The rules accept equally often: six standard deviations of the difference.
        assert!((accepted[0] - accepted[1]).abs() < 1350, "{accepted:?}");
    }
}

/// Temperature, then top-k, then the softmax of what is left, by their definitions.
fn by_definition(logits: &[f32], temperature: f64, top_k: usize) -> Distribution {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if top_k > 0 {
        order.truncate(top_k);
    }
    order.sort_unstable();
    let weigh = |&i: &usize| (i as u32, (f64::from(logits[i]) / temperature).exp());
    Distribution::new(order.iter().map(weigh).collect())
}

/// Against direct sampling, 100,000 draws of each, for several settings of the sampler.
#[test]
fn rejection_follows_the_filters_of_the_sampler() {
    let random = Philox::new(12, 0);
    let logits: Vec<f32> = (0..9)
        .map(|i| 2.0 * random.normal_pair(i).0 as f32)
        .collect();
    let q = distribution(&[1.0, 2.0, 1.0, 0.5, 3.0, 1.0, 1.0, 0.5, 2.0]);
    for (case, temperature) in (0u64..).zip([0.5f32, 1.0, 1.6]) {
        for top_k in [0usize, 3, 6] {
            let options = SamplerOptions {
                temperature,
                top_k,
                ..SamplerOptions::default()
            };
            let mut sampler = Sampler::new(options, logits.len()).unwrap();
            let p = sampler.distribution(&mut logits.clone(), &[]).unwrap();
            let expected = by_definition(&logits, f64::from(temperature), top_k);
            let (mut counts, mut direct) = ([0; 9], [0; 9]);
            for draw in 0..100_000 {
                let random = |n| uniform_draw(20 + top_k as u64, case, draw, n);
                let tokens = draws(&q, 2, &mut |n| random(n + 30));
                let draft = Draft {
                    proposals: vec![q.clone()],
                    ..Draft::guesses(tree(&tokens, &[R, R]))
                };
                let target = [p.clone(), p.clone(), p.clone()];
                let found = walk_rejecting(&draft, &target, &mut |depth, n| random(n + 8 * depth));
                counts[found.tokens(&draft.tree)[0] as usize] += 1;
                let token = sampler
                    .sample(&mut logits.clone(), &[], random(40))
                    .unwrap();
                direct[token as usize] += 1;
            }
            let what = format!("temperature {temperature}, top-k {top_k}");
            check_counts(&expected, &counts, &what);
            check_counts(&expected, &direct, &format!("{what}, direct"));
        }
    }
}

/// Two levels: the pair of the first two tokens follows the product of its distributions.
#[test]
fn rejection_keeps_the_distribution_of_pairs() {
    let first = distribution(&[0.5, 0.3, 0.2]);
    let second = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]].map(|w| distribution(&w));
    let q = distribution(&[0.2, 0.5, 0.3]);
    let mut counts = [0; 9];
    for draw in 0..100_000 {
        let random = |n| uniform_draw(5, 0, draw, n);
        let roots = draws(&q, 2, &mut |n| random(n + 40));
        let mut tree = tree(&roots, &[R, R]);
        for root in 0..2 {
            for token in draws(&q, 2, &mut |n| random(n + 50 + 4 * root)) {
                tree.grow(Some(root), token);
            }
        }
        let draft = Draft {
            proposals: vec![q.clone(); 7],
            ..Draft::guesses(tree)
        };
        let behind = |node: usize| second[draft.tree.tokens()[node] as usize].clone();
        let mut target = vec![first.clone()];
        target.extend((0..6).map(behind));
        let found = walk_rejecting(&draft, &target, &mut |depth, n| random(n + 8 * depth));
        let mut tokens = found.tokens(&draft.tree);
        if tokens.len() == 1 {
            // The next step draws on.
            tokens.extend(second[tokens[0] as usize].pick(random(60)));
        }
        counts[(tokens[0] * 3 + tokens[1]) as usize] += 1;
    }
    let pair = |i: usize| first.weights()[i / 3].1 * second[i / 3].weights()[i % 3].1;
    let expected: Vec<f64> = (0..9).map(pair).collect();
    check_counts(&distribution(&expected), &counts, "pairs");
}
