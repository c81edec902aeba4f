//! What the runs of a sweep came to: means, spreads and paired differences.

use super::Sweep;
use crate::report::markdown_table;
use crate::results::RunResults;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The result table of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SweepTable {
    /// Seeds of the runs.
    pub seeds: Vec<u64>,
    /// Name of the cell that the others are paired with.
    pub base: String,
    /// One row for each cell, in the order of the file; dense twins last.
    pub cells: Vec<CellRow>,
    /// The best ternary cell against the best dense one, if there are both: of each kind, among
    /// the cells that are finished for the same seeds, the most.
    pub best_pair: Option<BestPair>,
    /// Runs that ended with an error, in the order in which they were made.
    pub failures: Vec<String>,
}

/// One cell of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellRow {
    /// Name.
    pub name: String,
    /// What the cell sets.
    pub set: BTreeMap<String, String>,
    /// Whether its model is ternary.
    pub ternary: bool,
    /// The setting that makes its model neither dense nor what files call ternary.
    pub experiment: Option<&'static str>,
    /// Finished runs.
    pub num_runs: usize,
    /// Means over the finished runs; none without one.
    pub row: Option<Row>,
    /// Its held-out loss minus the base cell's, seed by seed.
    pub against_base: Option<Difference>,
    /// Name of its dense twin.
    pub twin: Option<String>,
    /// Its held-out loss minus its dense twin's, seed by seed.
    pub gap: Option<Difference>,
}

/// Means over the finished runs of a cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Last held-out loss, in nats per token.
    pub loss: f64,
    /// Its standard deviation over the seeds (n - 1); none for one run.
    pub deviation: Option<f64>,
    /// Best held-out loss.
    pub best_loss: f64,
    /// Last held-out loss in bits per byte.
    pub bits_per_byte: f64,
    /// Training loss of the last steps.
    pub train_loss: f64,
    /// Share of zeros among the trits; none for a dense model.
    pub zero_share: Option<f64>,
    /// Training tokens of a run.
    pub num_tokens: u64,
    /// Training tokens per second: a measurement, no result.
    pub tokens_per_second: f64,
    /// Last held-out loss of each finished run, by seed.
    pub losses: BTreeMap<u64, f64>,
}

/// A paired difference in nats per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Mean over the pairs.
    pub mean: f64,
    /// Standard error of the mean; none for one pair.
    pub standard_error: Option<f64>,
    /// Seeds that both cells have finished.
    pub num_pairs: usize,
}

/// The best cells of both kinds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BestPair {
    /// Name of the ternary cell.
    pub ternary: String,
    /// Name of the dense cell.
    pub dense: String,
    /// Ternary minus dense.
    pub gap: Difference,
}

/// Runs of a cell, by the order of the seeds; none where a run is not finished.
type Runs = [Option<RunResults>];

impl SweepTable {
    /// Sums up `results`, which has the runs of each cell of `sweep`.
    pub(super) fn new(
        sweep: &Sweep,
        results: &[Vec<Option<RunResults>>],
        failures: &[String],
    ) -> Self {
        let rows = sweep.cells.iter().enumerate().map(|(index, cell)| CellRow {
            name: cell.name.clone(),
            set: cell.set.iter().cloned().collect(),
            ternary: cell.ternary,
            experiment: cell.experiment,
            num_runs: results[index].iter().flatten().count(),
            row: row(&sweep.seeds, &results[index]),
            against_base: (index != sweep.base)
                .then(|| difference(&results[index], &results[sweep.base]))
                .flatten(),
            twin: cell.twin.map(|twin| sweep.cells[twin].name.clone()),
            gap: cell
                .twin
                .and_then(|twin| difference(&results[index], &results[twin])),
        });
        let cells: Vec<CellRow> = rows.collect();
        Self {
            seeds: sweep.seeds.clone(),
            base: sweep.cells[sweep.base].name.clone(),
            best_pair: best_pair(&cells, results),
            cells,
            failures: failures.to_vec(),
        }
    }

    /// `sweep.json`.
    pub fn to_json(&self) -> String {
        // Every map key is a string and losses of finished runs are numbers or null.
        let json = serde_json::to_string_pretty(self).expect("a table is plain JSON");
        json + "\n"
    }

    /// `sweep.md`: the table for people.
    pub fn to_markdown(&self) -> String {
        let mut rows = vec![
            [
                "cell",
                "runs",
                "held-out",
                "sd",
                "best",
                "bits/byte",
                "train",
                "against base",
                "gap to dense",
                "tokens",
                "tokens/s",
            ]
            .map(str::to_owned),
        ];
        rows.extend(self.cells.iter().map(|cell| self.cells_of(cell)));
        let mut text = markdown_table(&rows);
        _ = write!(
            text,
            "\nHeld-out loss in nats per token after the last step, mean over seeds {}; base: {}. \
             Differences are means of pairs of the same seed, with their standard error.\n",
            join(&self.seeds),
            self.base
        );
        if let Some(best) = &self.best_pair {
            _ = write!(
                text,
                "\nBest ternary cell {} against best dense cell {}: {} nats per token.\n",
                best.ternary,
                best.dense,
                best.gap.text()
            );
        }
        for failure in &self.failures {
            _ = write!(text, "\nFailed: {failure}\n");
        }
        text
    }

    fn cells_of(&self, cell: &CellRow) -> [String; 11] {
        let none = || "-".to_owned();
        let nats = |x: f64| format!("{x:.4}");
        let of = |value: fn(&Row) -> String| cell.row.as_ref().map_or_else(none, value);
        let difference = |d: Option<Difference>| d.map_or_else(none, |d| d.text());
        let against = match cell.name == self.base {
            true => "base".to_owned(),
            false => difference(cell.against_base),
        };
        let deviation = cell.row.as_ref().and_then(|row| row.deviation);
        [
            cell.name.clone(),
            format!("{}/{}", cell.num_runs, self.seeds.len()),
            of(|row| format!("{:.4}", row.loss)),
            deviation.map_or_else(none, nats),
            of(|row| format!("{:.4}", row.best_loss)),
            of(|row| format!("{:.4}", row.bits_per_byte)),
            of(|row| format!("{:.4}", row.train_loss)),
            against,
            difference(cell.gap),
            of(|row| row.num_tokens.to_string()),
            of(|row| format!("{:.0}", row.tokens_per_second)),
        ]
    }
}

impl Difference {
    /// For people: `+0.0123 ± 0.0020`.
    pub fn text(&self) -> String {
        match self.standard_error {
            Some(error) => format!("{:+.4} \u{b1} {error:.4}", self.mean),
            None => format!("{:+.4}", self.mean),
        }
    }

    /// Of the pairs `a - b`; none without one.
    fn of(pairs: &[f64]) -> Option<Self> {
        let mean = mean(pairs)?;
        let error = deviation(pairs).map(|sd| sd / (pairs.len() as f64).sqrt());
        Some(Self {
            mean,
            standard_error: error,
            num_pairs: pairs.len(),
        })
    }
}

fn row(seeds: &[u64], runs: &Runs) -> Option<Row> {
    let finished: Vec<&RunResults> = runs.iter().flatten().collect();
    let of = |value: fn(&RunResults) -> Option<f64>| -> Vec<f64> {
        finished.iter().filter_map(|run| value(run)).collect()
    };
    let losses = of(last_loss);
    let by_seed = seeds.iter().zip(runs);
    let by_seed = by_seed.filter_map(|(&seed, run)| Some((seed, last_loss(run.as_ref()?)?)));
    Some(Row {
        loss: mean(&losses)?,
        deviation: deviation(&losses),
        best_loss: mean(&of(|run| Some(run.results.best_eval.as_ref()?.loss)))?,
        bits_per_byte: mean(&of(|run| {
            Some(run.results.final_eval.as_ref()?.bits_per_byte)
        }))?,
        train_loss: mean(&of(|run| Some(run.results.train_loss)))?,
        zero_share: mean(&of(RunResults::zero_share)),
        num_tokens: finished.first()?.num_tokens(),
        tokens_per_second: mean(&of(|run| Some(run.results.tokens_per_second)))?,
        losses: by_seed.collect(),
    })
}

fn last_loss(run: &RunResults) -> Option<f64> {
    run.results.final_eval.as_ref().map(|eval| eval.loss)
}

/// `a - b`, over the seeds that both have, where nats mean the same in both.
fn difference(a: &Runs, b: &Runs) -> Option<Difference> {
    let pairs = a.iter().zip(b).filter_map(|(a, b)| {
        let (a, b) = (a.as_ref()?, b.as_ref()?);
        let both = last_loss(a)? - last_loss(b)?;
        a.same_held_out(b).then_some(both)
    });
    Difference::of(&pairs.collect::<Vec<_>>())
}

fn best_pair(cells: &[CellRow], results: &[Vec<Option<RunResults>>]) -> Option<BestPair> {
    let best = |ternary: bool| {
        let is_kind = |cell: &CellRow| cell.ternary == ternary && cell.experiment.is_none();
        let kind = cells.iter().enumerate().filter(|(_, cell)| is_kind(cell));
        let rows: Vec<(usize, &Row)> = kind
            .filter_map(|(i, cell)| Some((i, cell.row.as_ref()?)))
            .collect();
        best_row(&rows, |a, b| difference(&results[a], &results[b]).is_some())
    };
    let (ternary, dense) = (best(true)?, best(false)?);
    Some(BestPair {
        ternary: cells[ternary].name.clone(),
        dense: cells[dense].name.clone(),
        gap: difference(&results[ternary], &results[dense])?,
    })
}

/// The index with the least mean loss among those that are finished for the seeds of the one with
/// the most runs, and compare with it: means over other seeds, or other held-out text, say nothing.
fn best_row(rows: &[(usize, &Row)], compare: impl Fn(usize, usize) -> bool) -> Option<usize> {
    let most = rows.iter().rev().max_by_key(|(_, row)| row.losses.len())?;
    let alike = rows
        .iter()
        .filter(|(i, row)| row.losses.keys().eq(most.1.losses.keys()) && compare(*i, most.0));
    let best = alike.min_by(|a, b| a.1.loss.total_cmp(&b.1.loss));
    best.map(|(i, _)| *i)
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Sample standard deviation.
fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let squares = values.iter().map(|x| (x - mean) * (x - mean));
    Some((squares.sum::<f64>() / (values.len() - 1) as f64).sqrt())
}

fn join(numbers: &[u64]) -> String {
    let texts: Vec<String> = numbers.iter().map(u64::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_row_has_the_most_seeds_and_the_same_text() {
        let row = |losses: &[(u64, f64)]| Row {
            loss: losses.iter().map(|l| l.1).sum::<f64>() / losses.len() as f64,
            deviation: None,
            best_loss: 0.0,
            bits_per_byte: 0.0,
            train_loss: 0.0,
            zero_share: None,
            num_tokens: 1,
            tokens_per_second: 1.0,
            losses: losses.iter().copied().collect(),
        };
        let lucky = row(&[(2, 1.0)]);
        let (a, b) = (row(&[(1, 3.0), (2, 1.5)]), row(&[(1, 2.5), (2, 1.5)]));
        let other_text = row(&[(1, 0.5), (2, 0.5)]);
        let rows = [(0, &lucky), (1, &a), (2, &b), (3, &other_text)];
        assert_eq!(best_row(&rows, |i, j| (i == 3) == (j == 3)), Some(2));
        assert_eq!(best_row(&rows[..1], |_, _| true), Some(0));
        assert_eq!(best_row(&[], |_, _| true), None);
    }

    #[test]
    fn differences_have_the_error_of_their_mean() {
        let d = Difference::of(&[0.1, 0.2, 0.3, 0.4]).unwrap();
        assert!((d.mean - 0.25).abs() < 1e-12);
        // sd = sqrt(5/3) / 10, over the root of 4.
        let expected = (5.0f64 / 3.0).sqrt() / 20.0;
        assert!((d.standard_error.unwrap() - expected).abs() < 1e-12);
        assert_eq!(d.text(), "+0.2500 \u{b1} 0.0645");
        assert_eq!(Difference::of(&[-0.5]).unwrap().text(), "-0.5000");
        assert_eq!(Difference::of(&[]), None);
    }
}
