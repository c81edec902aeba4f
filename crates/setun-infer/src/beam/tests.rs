use super::*;
use setun_backend::philox::Philox;

/// Log-probabilities of every token behind some tokens.
type Model<'a> = dyn Fn(&[u32]) -> Vec<f64> + 'a;

/// All tokens with their log-probabilities, likeliest first, ties by id.
fn ranked(log_probabilities: &[f64]) -> Vec<(u32, f64)> {
    let mut all: Vec<(u32, f64)> = (0..).zip(log_probabilities.iter().copied()).collect();
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    all
}

fn search(model: &Model<'_>, options: BeamOptions, ends: &[u32], limit: usize) -> Vec<Hypothesis> {
    let mut item = Item::new(options, ends, limit);
    while !item.is_done() {
        let of_beam = |b: &Hypothesis| match b.is_finished {
            true => Vec::new(),
            false => ranked(&model(&b.tokens)),
        };
        let candidates: Vec<_> = item.pool().iter().map(of_beam).collect();
        let before = item.pool().to_vec();
        let origins = item.advance(&candidates);
        for (beam, origin) in item.pool().iter().zip(origins) {
            let parent = &before[origin.parent].tokens;
            assert_eq!(beam.tokens[..parent.len()], *parent);
            assert_eq!(beam.tokens.get(parent.len()).copied(), origin.token);
        }
    }
    item.into_results()
}

fn options(num_beams: usize, alpha: f64) -> BeamOptions {
    BeamOptions {
        length_penalty: LengthPenalty::Power(alpha),
        ..BeamOptions::new(num_beams)
    }
}

/// A random model over `vocab_size` tokens. Coarse logits give many ties.
fn random_model(seed: u64, vocab_size: usize, coarse: bool) -> impl Fn(&[u32]) -> Vec<f64> {
    move |tokens| {
        let stream = tokens.iter().fold(seed, |h, &t| {
            h.wrapping_mul(31).wrapping_add(u64::from(t) + 1)
        });
        let random = Philox::new(17, stream);
        let logit = |i: usize| match coarse {
            true => f64::from(random.block(i as u64)[0] % 3),
            false => 2.0 * random.normal_pair(i as u64).0,
        };
        let logits: Vec<f64> = (0..vocab_size).map(logit).collect();
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        logits.iter().map(|x| x - sum.ln()).collect()
    }
}

/// The rules, word by word: every beam with every token, no bound but the pool.
fn literal(
    model: &Model<'_>,
    num_beams: usize,
    alpha: f64,
    ends: &[u32],
    limit: usize,
) -> Vec<(Vec<u32>, f64)> {
    let score = |(tokens, sum): &(Vec<u32>, f64)| sum / libm::pow(tokens.len() as f64, alpha);
    let ended = |tokens: &[u32]| tokens.last().is_some_and(|t| ends.contains(t));
    let mut pool: Vec<(Vec<u32>, f64)> = vec![(Vec::new(), 0.0)];
    for _ in 0..limit {
        let finished: Vec<f64> = pool.iter().filter(|b| ended(&b.0)).map(score).collect();
        let best = finished.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let can_win = |b: &(Vec<u32>, f64)| b.1 / libm::pow(limit as f64, alpha) > best;
        if !pool
            .iter()
            .any(|b| !ended(&b.0) && (finished.is_empty() || can_win(b)))
        {
            break;
        }
        let mut next = Vec::new();
        for (place, beam) in pool.iter().enumerate() {
            if ended(&beam.0) {
                next.push((score(beam), false, place, 0, beam.clone()));
                continue;
            }
            let most = (1 + ends.len()) * num_beams;
            for (token, p) in ranked(&model(&beam.0)).into_iter().take(most) {
                let new = ([beam.0.as_slice(), &[token]].concat(), beam.1 + p);
                next.push((score(&new), true, place, token, new));
            }
        }
        let mut kept = Vec::new();
        while kept.len() < num_beams && !next.is_empty() {
            let mut best = 0;
            for i in 1..next.len() {
                let (a, b) = (&next[i], &next[best]);
                let earlier = (a.1, a.2, a.3) < (b.1, b.2, b.3);
                if a.0 > b.0 || (a.0 == b.0 && earlier) {
                    best = i;
                }
            }
            kept.push(next.remove(best).4);
        }
        pool = kept;
    }
    let mut sorted: Vec<_> = pool.into_iter().enumerate().collect();
    sorted.sort_by(|(i, a), (j, b)| {
        let order = score(b).partial_cmp(&score(a)).unwrap();
        order.then(ended(&b.0).cmp(&ended(&a.0))).then(i.cmp(j))
    });
    sorted.into_iter().map(|(_, beam)| beam).collect()
}

#[test]
fn equals_the_rules_word_by_word() {
    for case in 0..10_000u64 {
        let random = Philox::new(3, case).block(0);
        let (vocab_size, limit) = (3 + random[0] as usize % 4, 1 + random[1] as usize % 5);
        let (num_beams, alpha) = (
            1 + random[2] as usize % 4,
            [0.0, 0.6, 1.0][random[3] as usize % 3],
        );
        let model = random_model(case, vocab_size, case % 2 == 0);
        let got = search(&model, options(num_beams, alpha), &[0, 2], limit);
        let expected = literal(&model, num_beams, alpha, &[0, 2], limit);
        let got: Vec<_> = got.into_iter().map(|b| (b.tokens, b.sum)).collect();
        assert_eq!(got, expected, "case {case}");
    }
}

#[test]
fn one_beam_without_penalty_is_greedy() {
    for case in 0..200 {
        let model = random_model(case, 9, case % 2 == 0);
        let mut greedy = Vec::new();
        while greedy.len() < 12 && greedy.last() != Some(&4) {
            greedy.push(ranked(&model(&greedy))[0].0);
        }
        let found = search(&model, options(1, 0.0), &[4], 12);
        assert_eq!(found[0].tokens, greedy);
    }
}

/// Every sequence that ends, or reaches the limit.
fn all_sequences(model: &Model<'_>, ends: &[u32], limit: usize) -> Vec<(Vec<u32>, f64)> {
    let mut done = Vec::new();
    let mut open = vec![(Vec::new(), 0.0)];
    while let Some((tokens, sum)) = open.pop() {
        for (token, p) in ranked(&model(&tokens)) {
            let next = ([tokens.as_slice(), &[token]].concat(), sum + p);
            let ended = ends.contains(&token) || next.0.len() == limit;
            if ended {
                done.push(next)
            } else {
                open.push(next)
            }
        }
    }
    done
}

#[test]
fn a_pool_that_covers_everything_finds_the_best() {
    for case in 0..300 {
        let model = random_model(1000 + case, 4, false);
        for (alpha, stopping) in [
            (0.6, EarlyStopping::Exact),
            (1.0, EarlyStopping::Never),
            (0.0, EarlyStopping::Exact),
        ] {
            let all = all_sequences(&model, &[1, 3], 4);
            let score =
                |(tokens, sum): &(Vec<u32>, f64)| sum / libm::pow(tokens.len() as f64, alpha);
            let best = all.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
            let options = BeamOptions {
                early_stopping: stopping,
                ..options(all.len(), alpha)
            };
            let found = search(&model, options, &[1, 3], 4);
            assert_eq!(found[0].score, best, "case {case}");
        }
    }
}

/// Given log-probabilities behind given tokens; everything else is -50.
fn planted<'a>(table: &'a [(&'a [u32], u32, f64)]) -> impl Fn(&[u32]) -> Vec<f64> + 'a {
    move |tokens| {
        let mut row = vec![-50.0; 5];
        for (_, token, p) in table.iter().filter(|(at, ..)| *at == tokens) {
            row[*token as usize] = *p;
        }
        row
    }
}

#[test]
fn an_ended_beam_beats_one_that_runs_on_and_falls_behind() {
    let table: [(&[u32], u32, f64); 4] = [
        (&[], 1, -2.0),
        (&[], 2, -4.0),
        (&[1], 0, -1.0),
        (&[2], 3, -1.0),
    ];
    let found = search(&planted(&table), options(2, 0.0), &[0], 8);
    assert_eq!(
        (found[0].tokens.as_slice(), found[0].sum),
        (&[1, 0][..], -3.0)
    );
    assert!(found[0].is_finished);
}

#[test]
fn ranking_by_sum_and_by_score_differ() {
    // By score, both continuations (-0.6, -0.605) beat the ended beam (-1.0); by sum, it
    // comes before both (-1.2, -1.21).
    let table: [(&[u32], u32, f64); 4] = [
        (&[], 0, -1.0),
        (&[], 1, -0.9),
        (&[1], 2, -0.3),
        (&[1], 3, -0.31),
    ];
    let by = |ranking| {
        let options = BeamOptions {
            ranking,
            early_stopping: EarlyStopping::Never,
            ..options(2, 1.0)
        };
        search(&planted(&table), options, &[0], 2)
    };
    let tokens = |found: Vec<Hypothesis>| found.into_iter().map(|b| b.tokens).collect::<Vec<_>>();
    assert_eq!(tokens(by(Ranking::Score)), [vec![1, 2], vec![1, 3]]);
    assert_eq!(tokens(by(Ranking::Sum)), [vec![1, 2], vec![0]]);
}

#[test]
fn stopping_early_is_earlier_and_exact_stopping_loses_nothing() {
    for case in 0..500 {
        let model = random_model(5000 + case, 6, false);
        let run = |num_beams, early_stopping| {
            let options = BeamOptions {
                early_stopping,
                ..options(num_beams, 0.8)
            };
            let calls = std::cell::Cell::new(0);
            let counted = |tokens: &[u32]| {
                calls.set(calls.get() + 1);
                model(tokens)
            };
            (search(&counted, options, &[0, 5], 8), calls.get())
        };
        let (never, most) = run(3, EarlyStopping::Never);
        let (exact, calls) = run(3, EarlyStopping::Exact);
        assert_eq!(exact[0].score, never[0].score, "case {case}");
        assert!(calls <= most);
        assert!(run(3, EarlyStopping::Heuristic).1 <= most);
        // One beam is full as soon as it ends, so there is a call for each token.
        let (found, calls) = run(1, EarlyStopping::WhenFull);
        assert_eq!(found[0].tokens.len(), calls);
    }
}

#[test]
fn googles_penalty_has_its_own_form() {
    assert_eq!(LengthPenalty::Google(0.5).of(1), 1.0);
    assert_eq!(LengthPenalty::Google(1.0).of(7), 2.0);
    assert_eq!(LengthPenalty::Power(1.0).of(7), 7.0);
    let shrinking = BeamOptions {
        length_penalty: LengthPenalty::Power(-1.0),
        ..BeamOptions::new(2)
    };
    let mut item = Item::new(shrinking, &[0], 9);
    item.advance(&[vec![(1, -0.5), (2, -1.0)]]);
    assert_eq!(item.best_possible(&item.pool()[0]), -0.5 * 2.0);
}
