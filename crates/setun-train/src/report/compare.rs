//! Several runs side by side: a table, and their curves in one plot.

use super::html::{self, figure, number, table};
use super::plot::{self, Plot, Series, Style};
use super::{bytes, compact, escape, grouped, markdown_table, nats, percent};
use crate::results::RunResults;
use serde::Serialize;
use std::fmt::Write;

/// Colours that the page defines; further runs begin again with the first.
const NUM_COLORS: usize = 12;

/// Columns of the table of results.
const QUALITY: [&str; 8] = [
    "steps",
    "tokens",
    "train",
    "held-out",
    "against 1",
    "perplexity",
    "bits/byte",
    "best (step)",
];
/// Columns of the table of everything else.
const OTHER: [&str; 8] = [
    "parameters",
    "verified",
    "zeros",
    "last/best",
    "held-out/train",
    "tokens/s",
    "memory",
    "file",
];
/// Size of a plot: room for a dozen numbers above each other.
const SIZE: (f64, f64) = (960.0, 440.0);
/// Distance of two lines below the plot of a picture.
const LEGEND_LINE: f64 = 20.0;

/// Runs to compare, the first of which the others are held against.
pub struct HeadToHead {
    runs: Vec<RunResults>,
    entries: Vec<Entry>,
}

/// A run as the table has it. Losses in nats per token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Name of the run, or where it is if others are called the same.
    pub name: String,
    /// Where it is, as it was named.
    pub path: String,
    /// Whether its model is ternary.
    pub ternary: bool,
    /// Parameters of the model.
    pub parameters: u64,
    /// Finished steps.
    pub steps: u64,
    /// Training tokens that those saw.
    pub tokens: u64,
    /// Mean training loss of the last steps.
    pub train_loss: f64,
    /// Last held-out loss.
    pub held_out_loss: Option<f64>,
    /// Its exponential.
    pub perplexity: Option<f64>,
    /// The same loss in bits per byte of text.
    pub bits_per_byte: Option<f64>,
    /// Best held-out loss.
    pub best_loss: Option<f64>,
    /// Steps after which it was measured.
    pub best_step: Option<u64>,
    /// Whether nats and perplexity compare with the first run's: equal held-out tokens,
    /// equal tokenizers.
    pub comparable: bool,
    /// Held-out loss minus the first run's, where nats compare.
    pub against_first: Option<f64>,
    /// Whether the model files were verified, and passed.
    pub verified: Option<bool>,
    /// Share of zeros among the trits; none for a dense model.
    pub zero_share: Option<f64>,
    /// Last held-out loss over the best one.
    pub last_over_best: Option<f64>,
    /// Last held-out loss over the training loss.
    pub held_out_over_train: Option<f64>,
    /// Median of training.
    pub tokens_per_second: f64,
    /// Peak of resident memory of the training, where it was measured.
    pub memory_bytes: Option<u64>,
    /// Size of the smallest file with the model's weights that was written; where none is
    /// recorded, as computed from the shape.
    pub file_bytes: u64,
}

impl HeadToHead {
    /// Puts `runs` side by side.
    pub fn new(runs: Vec<RunResults>) -> Self {
        let mut entries: Vec<Entry> = runs.iter().map(|run| entry(run, &runs[0])).collect();
        let names: Vec<String> = entries.iter().map(|entry| entry.name.clone()).collect();
        for entry in &mut entries {
            // One recipe, several runs: where they are tells them apart.
            if names.iter().filter(|name| **name == entry.name).count() > 1 {
                entry.name.clone_from(&entry.path);
            }
        }
        Self { runs, entries }
    }

    /// The rows of the table.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// `compare.json`.
    pub fn to_json(&self) -> String {
        // Losses that JSON has no number for become null.
        let json = serde_json::to_string_pretty(&self.entries).expect("entries are plain JSON");
        json + "\n"
    }

    /// `compare.md`: two tables with a row for each run, which fit a page.
    pub fn to_markdown(&self) -> String {
        let mut quality = vec![row("run", QUALITY.map(str::to_owned))];
        let mut other = vec![row("run", OTHER.map(str::to_owned))];
        for (index, entry) in self.entries.iter().enumerate() {
            let name = format!("{}: {}", index + 1, entry.name.replace('|', "/"));
            quality.push(row(&name, entry.quality()));
            other.push(row(&name, entry.other()));
        }
        let mut text = markdown_table(&quality);
        _ = write!(text, "\n{}", markdown_table(&other));
        for note in self.notes() {
            _ = write!(text, "\n{note}\n");
        }
        // Numbers and their units stay together on a page, not in a text file.
        text.replace('\u{a0}', " ")
    }

    /// `compare.html`: one page without scripts that loads nothing.
    pub fn to_html(&self) -> String {
        let mut notes = String::new();
        for note in self.notes() {
            _ = write!(notes, "<p class=\"sub\">{}</p>", escape(&note));
        }
        let sections = [("Curves", self.curves()), ("Table", self.tables() + &notes)];
        let mut body = String::new();
        for (heading, content) in sections {
            _ = writeln!(body, "<section><h2>{heading}</h2>{content}</section>");
        }
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
             style-src 'unsafe-inline'\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             <meta name=\"color-scheme\" content=\"light dark\">\
             <title>Setun: {count} runs compared</title><style>{}{MORE_COLORS}{}{}{STYLE}</style></head>\n<body>\
             <header><p class=\"eyebrow\">Setun comparison</p><h1>{count} runs</h1></header>\
             <main>\n{body}</main></body></html>\n",
            plot::COLORS,
            html::STYLE,
            plot::STYLE,
            count = self.runs.len(),
        )
    }

    /// `compare.svg`: the curves as a picture of its own, for other pages.
    pub fn to_svg(&self) -> String {
        let plot = self.plot("all", 0.0);
        let (width, height) = plot.size;
        let curves = plot.to_svg();
        let curves = match curves.strip_prefix("<svg ") {
            Some(rest) => format!("<svg width=\"{width}\" height=\"{height}\" {rest}"),
            None => "<text x=\"24\" y=\"24\">Nothing recorded.</text>".to_owned(),
        };
        let mut legend = String::new();
        for (index, entry) in self.entries.iter().enumerate() {
            let x = 24.0 + width / 2.0 * (index % 2) as f64;
            let y = height + LEGEND_LINE * (index / 2 + 1) as f64;
            _ = write!(
                legend,
                "<g class=\"s{}\"><text class=\"end\" x=\"{x}\" y=\"{y}\">{} {}</text></g>",
                index % NUM_COLORS,
                index + 1,
                escape(&entry.name)
            );
        }
        let lines = 1 + self.entries.len().div_ceil(2);
        let all = height + LEGEND_LINE * lines as f64;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{all}\" \
             viewBox=\"0 0 {width} {all}\"><style>{}{MORE_COLORS}{}</style>\
             <rect width=\"{width}\" height=\"{all}\" fill=\"var(--surface)\"/>\
             <text class=\"label\" x=\"24\" y=\"20\">{}; dashed: held-out{}</text>\
             {curves}{legend}</svg>\n",
            plot::COLORS,
            plot::STYLE,
            escape(&plot.title),
            match self.draws_training() {
                true => ", thin: training",
                false => "",
            },
        )
    }

    /// Whether plots have training curves: too many would hide each other, and there is no loss
    /// in bits per byte for single steps.
    fn draws_training(&self) -> bool {
        self.all_comparable() && self.runs.len() <= NUM_COLORS
    }

    fn all_comparable(&self) -> bool {
        self.entries.iter().all(|entry| entry.comparable)
    }

    /// What a reader of the table must know.
    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "Losses in nats per token; held-out: the last that was measured; train: mean of the last \
             steps that were logged. last/best and held-out/train are ratios of losses: above 1 in \
             the first, the run went on past its best. file: the smallest that was written, or as \
             computed."
                .to_owned(),
        ];
        let first = &self.runs[0].record.data;
        for (index, run) in self.runs.iter().enumerate() {
            if self.entries[index].comparable {
                continue;
            }
            let data = &run.record.data;
            notes.push(format!(
                "Run {} was judged on other held-out tokens than run 1, in other windows \
                 (train.seq_len, data.document_mask) or with another tokenizer \
                 ({} tokens of {} bytes against {} of {}): not comparable (n/c) in nats, bits per byte \
                 only, and those only if the text is the same.",
                index + 1,
                grouped(data.valid_tokens),
                grouped(data.valid_bytes),
                grouped(first.valid_tokens),
                grouped(first.valid_bytes),
            ));
        }
        notes
    }

    fn curves(&self) -> String {
        let mut legend = String::new();
        for (index, entry) in self.entries.iter().enumerate() {
            _ = write!(
                legend,
                "<li><i class=\"c{}\"></i><b>{}</b> {}</li>",
                index % NUM_COLORS,
                index + 1,
                escape(&entry.name)
            );
        }
        let whole = self.plot("all", 0.0);
        let end = self.plot("end", 0.5);
        let lines = match (self.draws_training(), self.all_comparable()) {
            (true, _) => "Dashed with dots: held-out. Thin: training, smoothed.",
            (false, true) => "Held-out.",
            (false, false) => "Held-out, in bits per byte: these runs do not compare in nats.",
        };
        format!(
            "<ul class=\"runs\">{legend}</ul><p class=\"sub\">{lines} The number at a line's end \
             is that of its run.</p>{}{}",
            figure(&whole),
            figure(&end)
        )
    }

    /// The curves from the share `from` of the shortest run on: later, there would be runs
    /// with nothing to see.
    fn plot(&self, id: &str, from: f64) -> Plot {
        let comparable = self.all_comparable();
        let unit = if comparable {
            "nats per token"
        } else {
            "bits per byte"
        };
        let what = if from > 0.0 {
            ", without the beginning"
        } else {
            ""
        };
        let mut plot = Plot::new(id, &format!("Loss, in {unit}{what}"), SIZE);
        let per_step = |run: &RunResults| run.tokens_per_step() as f64;
        let same_steps = self
            .runs
            .iter()
            .all(|r| per_step(r) == per_step(&self.runs[0]));
        let scale = |run: &RunResults| if same_steps { 1.0 } else { per_step(run) };
        let ends = self.runs.iter();
        let ends = ends.map(|run| run.results.final_step as f64 * scale(run));
        let start = from * ends.fold(f64::INFINITY, f64::min);
        for (index, run) in self.runs.iter().enumerate() {
            let evals = run.timeline.evals.iter().map(|eval| {
                let y = if comparable {
                    eval.loss
                } else {
                    eval.bits_per_byte
                };
                (eval.step as f64 * scale(run), y)
            });
            let points = evals.filter(|point| point.0 >= start).collect();
            let mut series = Series::new(&self.entries[index].name, Style::Dots, points);
            series.tag = (index + 1).to_string();
            plot.series.push(series);
        }
        plot.num_end_labels = self.runs.len();
        // The colour of a series is that of its run, held-out and training.
        plot.num_colors = self.runs.len().min(NUM_COLORS);
        if self.draws_training() {
            for run in &self.runs {
                let steps = run.timeline.accepted();
                let points = steps.map(|step| (step.step as f64 * scale(run), step.loss));
                let points = points.filter(|point| point.0 >= start).collect();
                plot.series
                    .push(Series::new("train", Style::Smooth, points));
            }
        }
        plot.log_y = true;
        plot.legend = false;
        plot.x_name = if same_steps {
            "step"
        } else {
            "training tokens"
        }
        .to_owned();
        plot.description = self.description();
        plot
    }

    fn description(&self) -> String {
        let ends = self.entries.iter().enumerate().map(|(index, entry)| {
            let loss = match self.all_comparable() {
                true => entry.held_out_loss.map(nats),
                false => entry
                    .bits_per_byte
                    .map(|bits| format!("{bits:.4} bits per byte")),
            };
            let loss = loss.unwrap_or("nothing".to_owned());
            format!("run {} ({}) ends at {loss}", index + 1, entry.name)
        });
        let what = match self.draws_training() {
            true => "Held-out and training loss",
            false => "Held-out loss",
        };
        format!("{what}: {}.", ends.collect::<Vec<_>>().join(", "))
    }

    fn tables(&self) -> String {
        let (mut quality, mut other) = (String::new(), String::new());
        for (index, entry) in self.entries.iter().enumerate() {
            let name = format!(
                "<tr><th scope=\"row\"><i class=\"c{}\"></i>{}: {}</th>",
                index % NUM_COLORS,
                index + 1,
                escape(&entry.name)
            );
            let cells = |values: [String; 8]| values.map(number).concat();
            _ = write!(quality, "{name}{}</tr>", cells(entry.quality()));
            _ = write!(other, "{name}{}</tr>", cells(entry.other()));
        }
        let quality = table("Quality", &html_head(QUALITY), &quality);
        quality + &table("Model and machine", &html_head(OTHER), &other)
    }
}

impl Entry {
    /// Texts of the columns [`QUALITY`].
    fn quality(&self) -> [String; 8] {
        let in_nats = |value: Option<f64>, text: fn(f64) -> String| match value {
            _ if !self.comparable => "n/c".to_owned(),
            value => or_dash(value, text),
        };
        let best = self.best_loss.zip(self.best_step);
        let best = match self.comparable {
            true => best.map(|(loss, step)| format!("{loss:.4} ({})", grouped(step))),
            false => best.map(|(_, step)| format!("({})", grouped(step))),
        };
        [
            grouped(self.steps),
            grouped(self.tokens),
            fourth(self.train_loss),
            in_nats(self.held_out_loss, fourth),
            in_nats(self.against_first, |x| format!("{x:+.4}")),
            in_nats(self.perplexity, compact),
            or_dash(self.bits_per_byte, fourth),
            best.unwrap_or("-".to_owned()),
        ]
    }

    /// Texts of the columns [`OTHER`].
    fn other(&self) -> [String; 8] {
        let verified = match (self.ternary, self.verified) {
            (false, _) => "dense",
            (true, None) => "not verified",
            (true, Some(true)) => "passed",
            (true, Some(false)) => "FAILED",
        };
        [
            grouped(self.parameters),
            verified.to_owned(),
            or_dash(self.zero_share, percent),
            or_dash(self.last_over_best, fourth),
            or_dash(self.held_out_over_train, fourth),
            compact(self.tokens_per_second),
            self.memory_bytes.map_or("-".to_owned(), bytes),
            bytes(self.file_bytes),
        ]
    }
}

fn entry(run: &RunResults, first: &RunResults) -> Entry {
    let (results, model) = (&run.results, &run.record.model);
    let last = results.final_eval.as_ref();
    let best = results.best_eval.as_ref();
    let file = run.record.smallest_file();
    let comparable = run.same_held_out(first);
    let against = || Some(last?.loss - first.results.final_eval.as_ref()?.loss);
    Entry {
        name: run.record.name.clone(),
        path: run.path.display().to_string(),
        ternary: model.group_size.is_some(),
        parameters: model.parameters,
        steps: results.final_step,
        tokens: run.num_tokens(),
        train_loss: results.train_loss,
        held_out_loss: last.map(|eval| eval.loss),
        perplexity: last.map(|eval| eval.perplexity),
        bits_per_byte: last.map(|eval| eval.bits_per_byte),
        best_loss: best.map(|eval| eval.loss),
        best_step: best.map(|eval| eval.step),
        comparable,
        against_first: comparable.then(against).flatten(),
        verified: run.verified,
        zero_share: run.zero_share(),
        last_over_best: run.last_over_best(),
        held_out_over_train: run.held_out_over_train(),
        tokens_per_second: results.tokens_per_second,
        memory_bytes: run.memory_bytes(),
        file_bytes: file.map_or(model.packed_bytes, |file| file.bytes),
    }
}

fn row(name: &str, cells: [String; 8]) -> [String; 9] {
    let mut cells = cells.into_iter();
    std::array::from_fn(|i| match i {
        0 => name.to_owned(),
        _ => cells.next().unwrap_or_default(),
    })
}

/// The head of a table on the page: numbers to the right.
fn html_head(names: [&str; 8]) -> String {
    format!("run|>{}", names.join("|>"))
}

fn or_dash(value: Option<f64>, text: fn(f64) -> String) -> String {
    value.map_or("-".to_owned(), text)
}

fn fourth(value: f64) -> String {
    format!("{value:.4}")
}

/// Colours of the fourth to the twelfth run.
const MORE_COLORS: &str = "\
:root{--series-3:#a3249b;--series-4:#7a6a00;--series-5:#0e8a92;--series-6:#b3212f;--series-7:#6440c9;
--series-8:#8a5a3c;--series-9:#4b6a8a;--series-10:#d1498a;--series-11:#4f7a12}
@media(prefers-color-scheme:dark){:root{--series-3:#e58be0;--series-4:#d9c65a;--series-5:#5fd3da;
--series-6:#ff8b8b;--series-7:#b39dff;--series-8:#d3a888;--series-9:#a9bfd6;--series-10:#ff9cc7;
--series-11:#b7dd6e}}
";

/// What the page has over that of a report.
const STYLE: &str = "\
.runs{list-style:none;margin:0 0 8px;padding:0;display:flex;flex-wrap:wrap;gap:4px 20px;font-size:14px}
li i,th i{display:inline-block;width:12px;height:12px;border-radius:3px;margin:0 7px 0 0}
.c0{background:var(--series-0)}.c1{background:var(--series-1)}.c2{background:var(--series-2)}
.c3{background:var(--series-3)}.c4{background:var(--series-4)}.c5{background:var(--series-5)}
.c6{background:var(--series-6)}.c7{background:var(--series-7)}.c8{background:var(--series-8)}
.c9{background:var(--series-9)}.c10{background:var(--series-10)}.c11{background:var(--series-11)}
figure+figure{margin-top:28px}
";
