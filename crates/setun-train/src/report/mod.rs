//! The report of a run: `report.json` and one self-contained `report.html`.
//!
//! A pure function of `run.json`, `metrics.jsonl` and, where there is one, the table of the
//! verified model file: the same input gives the same bytes.

pub mod compare;
pub mod observe;
pub mod plot;
pub mod record;
pub mod samples;

mod html;
mod markdown;

pub(crate) use markdown::markdown_table;

use serde::Serialize;

use observe::{Comparison, Observation, Overfit};
use record::{FinalResults, Metric, RunRecord, Timeline, VerificationTable};

/// A run, summed up.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What the run came down to; none before the first step.
    pub results: Option<FinalResults>,
    /// The best evaluation against each baseline.
    pub comparisons: Vec<Comparison>,
    /// Whether and from where the run overfitted.
    pub overfit: Option<Overfit>,
    /// What the numbers say, the most serious first.
    pub observations: Vec<Observation>,
    /// The check of the model file, where it was made.
    pub verification: Option<VerificationTable>,
    /// The run's record.
    pub run: RunRecord,
    /// The run's metrics, sorted by kind.
    pub timeline: Timeline,
}

impl Report {
    /// Sums a run up. `metrics` in the order of `metrics.jsonl`.
    pub fn build(
        record: &RunRecord,
        metrics: &[Metric],
        verification: Option<&VerificationTable>,
    ) -> Self {
        let timeline = Timeline::new(metrics);
        let results = FinalResults::new(record, &timeline);
        let best = results
            .as_ref()
            .and_then(|results| results.best_eval.as_ref());
        let comparisons = best
            .map(|best| observe::compare(record, best))
            .unwrap_or_default();
        let mut observations = observe::observations(record, metrics);
        observations.extend(verification.map(observe::observe_verification));
        observations.sort_by_key(|observation| observation.severity);
        Self {
            comparisons,
            overfit: observe::overfit(&timeline.evals),
            observations,
            verification: verification.cloned(),
            run: record.clone(),
            results,
            timeline,
        }
    }

    /// `report.json`: everything but the single steps.
    pub fn to_json(&self) -> String {
        // Every map key is a string and floats go through `record::float`.
        let json = serde_json::to_string_pretty(self).expect("a report is plain JSON");
        json + "\n"
    }

    /// `report.html`: one page without scripts that loads nothing.
    pub fn to_html(&self) -> String {
        html::page(self)
    }
}

/// `text` for HTML content and quoted attributes. Characters that HTML forbids become
/// U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share in percent, with digits that suit its size.
fn percent(share: f64) -> String {
    let value = 100.0 * share;
    let text = match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1.0 => format!("{value:.1}"),
        size if size >= 0.01 => format!("{value:.2}"),
        _ => compact(value),
    };
    // A no-break space.
    format!("{text}\u{a0}%")
}

/// A loss or bits per byte.
fn nats(value: f64) -> String {
    format!("{value:.3}")
}

/// The first `limit` characters, with an ellipsis where something is left out.
fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}\u{2026}", &text[..end]),
        None => text.to_owned(),
    }
}

/// A number with up to four significant digits.
fn compact(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() || size == 0.0 {
        return format!("{value:.0}");
    }
    if !(1e-3..1e9).contains(&size) {
        let text = format!("{value:.2e}");
        return match text.split_once('e') {
            Some((digits, exponent)) => format!("{}e{exponent}", trim_zeros(digits)),
            None => text,
        };
    }
    if size >= 1e3 {
        let sign = if value < 0.0 { "-" } else { "" };
        return format!("{sign}{}", grouped(size.round() as u64));
    }
    let decimals = (3 - size.log10().floor() as i32).max(0) as usize;
    trim_zeros(&format!("{value:.decimals$}")).to_owned()
}

/// A decimal number without zeros at the end of its fraction.
fn trim_zeros(number: &str) -> &str {
    match number.contains('.') {
        true => number.trim_end_matches('0').trim_end_matches('.'),
        false => number,
    }
}

/// A size in decimal units.
fn bytes(count: u64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.into_iter().find(|(size, _)| count as f64 >= *size) {
        Some((size, unit)) => format!("{:.1}\u{a0}{unit}", count as f64 / size),
        None => format!("{count}\u{a0}bytes"),
    }
}

/// A span of seconds in its two largest units.
fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) if h < 48 => format!("{h} h {m} min"),
        (h, ..) => format!("{} d {} h", h / 24, h % 24),
    }
}

/// Seconds since 1970 as date and time of day in UTC.
fn utc(seconds: u64) -> String {
    // Civil date from a day count, with years that begin in March so that the leap day is
    // the last one (Hinnant, "chrono-compatible low-level date algorithms").
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let leap_days = day_of_era / 1_460 + day_of_era / 146_096 - day_of_era / 36_524;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02} UTC")
}

/// A made-up run that overfits after step 800, for the tests of this module.
#[cfg(test)]
mod demo {
    use serde_json::json;

    use super::record::*;

    const TOKENS: u64 = 21_904;

    pub fn record() -> RunRecord {
        let baseline = |name: &str, loss: f64| Baseline {
            name: name.to_owned(),
            loss,
            bits_per_byte: bits_per_byte(loss),
            tokens: TOKENS,
        };
        RunRecord {
            name: "quick start <demo>".to_owned(),
            settings: json!({
                "seed": 7,
                "data": {"text": ["encyclopedia.txt"], "valid_share": 0.05},
                "model": {"hidden_size": 256, "num_hidden_layers": 4, "tie_word_embeddings": true},
                "train": {"steps": 1200, "batch_size": 8, "seq_len": 256, "lr": 1e-3, "note": "<b>"}
            }),
            seed: 7,
            code_version: "0.1.0 (1a2b3c4d)".to_owned(),
            machine: Machine {
                cpu: "Example CPU 3000".to_owned(),
                cores: 2,
                memory_bytes: 16_000_000_000,
                os: "linux x86_64".to_owned(),
                isa: "avx512".to_owned(),
                threads: 2,
            },
            data: data(),
            model: ModelFacts {
                config: json!({"hidden_size": 256, "num_hidden_layers": 4}),
                parameters: 3_412_480,
                matrix_parameters: 3_407_872,
                norm_parameters: 4_608,
                experiment: None,
                group_size: Some(128),
                scale_rule: "mean".to_owned(),
                numerics: "int8".to_owned(),
                bits_per_weight: 2.17,
                packed_bytes: 924_160,
            },
            memory: MemoryFacts {
                plan: memory_plan(),
                peak_bytes: Some(131_000_000),
            },
            baselines: vec![
                baseline("unigram", 5.912),
                baseline("interpolated bigram", 4.487),
                baseline("interpolated trigram", 4.201),
            ],
            ternary_hashes: [("step-00001200".to_owned(), "5e".repeat(32))].into(),
            started: 1_795_224_480,
            finished: Some(1_795_224_732),
            seconds: Some(240.5),
            files: vec![file("export/hf", 6_830_112), file("export/packed", 925_696)],
            results: None,
            samples: samples(),
            compared_bytes: None,
            early_stop: None,
            projection: None,
        }
    }

    fn file(path: &str, bytes: u64) -> ModelFile {
        ModelFile {
            path: path.to_owned(),
            bytes,
        }
    }

    fn bits_per_byte(loss: f64) -> f64 {
        loss * TOKENS as f64 / (std::f64::consts::LN_2 * 61_220.0)
    }

    fn data() -> DataFacts {
        DataFacts {
            train_documents: 588,
            valid_documents: 31,
            train_tokens: 88_310,
            valid_tokens: TOKENS,
            valid_bytes: 61_220,
            train_hash: "0f3a".repeat(16),
            valid_hash: "b7c1".repeat(16),
            short_documents: 3,
            duplicates: Some(Duplicates {
                exact: 0,
                exact_dropped: Some(0),
                dropped: 0,
                across_split: 2,
                examples: vec![DuplicatePair {
                    valid: "Harbour. A harbour is a place on the coast".to_owned(),
                    train: "Port. A port is a place on the coast".to_owned(),
                    similarity: 0.83,
                }],
            }),
            vocab_size: 1024,
            tokenizer_hash: "c4d2".repeat(16),
            sources: vec!["encyclopedia.txt".to_owned()],
        }
    }

    fn memory_plan() -> Vec<MemoryRow> {
        let rows = [
            ("parameters", 14_500_000),
            ("gradients", 13_650_000),
            ("optimizer state", 27_300_000),
            ("saved activations", 52_800_000),
            ("workspaces", 9_100_000),
        ];
        rows.map(|(category, bytes)| MemoryRow {
            category: category.to_owned(),
            bytes,
        })
        .to_vec()
    }

    fn samples() -> Vec<Sample> {
        let training = "A harbour is a place on the coast where ships can anchor safely, sheltered \
            from wind and waves by land or by walls that people built into the sea.";
        let texts = [
            (
                "Glaciers",
                " are rivers of ice that move slowly down the side of a valley.",
            ),
            (
                "The telescope",
                " was a place on the coast where ships were made of glass and the glass was round.",
            ),
            (
                "Harbours",
                " are old. A harbour is a place on the coast where ships can anchor safely, sheltered from wind and waves by land or by men.",
            ),
            (
                "Honey",
                " is made of the sea and the sea and the sea and the sea and the sea and the sea.",
            ),
            (
                "Script",
                " <script>alert('sample')</script> & \"quotes\"\u{0} end of the sample.",
            ),
        ];
        let sample = |(prompt, text): (&str, &str)| {
            let decoding = "temperature 0.8, top-p 0.95".to_owned();
            super::samples::measure_sample(prompt.to_owned(), text.to_owned(), decoding, [training])
        };
        texts.map(sample).to_vec()
    }

    /// Noise in -1..1 that depends on `n` only.
    fn noise(n: u64) -> f64 {
        let mut x = (n + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Training loss without its noise.
    fn trend(step: f64) -> f64 {
        2.6 + 4.3 * (-step / 130.0).exp() - 0.0006 * step + 0.2 / (1.0 + step / 40.0)
    }

    fn held_out(step: f64) -> f64 {
        trend(step) + 0.25 + 5e-4 * step.min(800.0) + (step - 800.0).max(0.0) * 1.1e-3
    }

    pub fn metrics() -> Vec<Metric> {
        let mut metrics = Vec::new();
        for n in 1..=1200u64 {
            let step = n as f64;
            let skipped = matches!(n, 212 | 640 | 641);
            let warm_up = (step / 60.0).min(1.0);
            let grad_norm = (0.35 + 6.0 * (-step / 40.0).exp()) * (1.0 + 0.4 * noise(3 * n));
            metrics.push(Metric::Step(StepRecord {
                step: n,
                loss: if skipped {
                    f64::INFINITY
                } else {
                    trend(step) + 0.16 * noise(n)
                },
                divergence: None,
                lr: 1e-3 * warm_up * 0.5 * (1.0 + (std::f64::consts::PI * step / 1200.0).cos()),
                grad_norm: if skipped { 45.0 } else { grad_norm },
                clipped: grad_norm > 1.0,
                tokens_per_second: 41_000.0 * (1.0 + 0.06 * noise(7 * n)),
                epoch: step * 2048.0 / 88_310.0,
                skipped: skipped.then(|| "loss is not finite".to_owned()),
            }));
            if n % 100 == 0 {
                let loss = held_out(step);
                let train_loss = trend(step - 50.0);
                let (perplexity, bits_per_byte) = (loss.exp(), bits_per_byte(loss));
                let eval = EvalRecord {
                    step: n,
                    loss,
                    perplexity,
                    bits_per_byte,
                    tokens: TOKENS,
                    train_loss,
                };
                metrics.push(Metric::Eval(eval));
            }
            if n % 25 == 0 {
                let settling = 1.0 + (std::f64::consts::PI * step / 1200.0).cos();
                metrics.push(Metric::Ternary(TernaryRecord {
                    step: n,
                    zero_share: 0.31 + 0.062 * (1.0 - (-step / 350.0).exp()),
                    flip_rate: 2e-3 * warm_up * settling * (1.0 + 0.1 * noise(n)) + 1e-6,
                    scale_median: 0.0625,
                }));
            }
        }
        metrics
    }

    pub fn verification() -> VerificationTable {
        let mut names = vec![("model.embed_tokens.weight".to_owned(), vec![1024, 256])];
        for layer in 0..4 {
            for (part, shape) in [
                ("self_attn.q_proj", [256, 256]),
                ("mlp.down_proj", [256, 704]),
            ] {
                names.push((
                    format!("model.layers.{layer}.{part}.weight"),
                    shape.to_vec(),
                ));
            }
        }
        let row = |(n, (name, shape)): (usize, (String, Vec<usize>))| VerificationRow {
            name,
            groups: (shape[0] * shape[1].div_ceil(128)) as u64,
            shape,
            minus_share: 0.31 - 0.004 * n as f64,
            zero_share: 0.38 + 0.007 * n as f64,
            plus_share: 0.31 - 0.003 * n as f64,
            scale_min: 0.012,
            scale_max: 0.21,
            worst_distance: 0.0,
            pass: true,
        };
        VerificationTable {
            subject: "the packed export".to_owned(),
            checks: vec![VerificationCheck {
                name: "hash of all trits and scales".to_owned(),
                pass: true,
                detail: "equals the last forward pass of the training".to_owned(),
            }],
            rows: names.into_iter().enumerate().map(row).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_holds_the_results_and_reads_back() {
        let report = Report::build(
            &demo::record(),
            &demo::metrics(),
            Some(&demo::verification()),
        );
        let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["results"]["best_eval"]["step"], 800);
        assert_eq!(json["results"]["skipped_steps"], 3);
        assert_eq!(json["overfit"]["best_step"], 800);
        assert_eq!(json["comparisons"][2]["baseline"], "interpolated trigram");
        assert_eq!(json["timeline"]["evals"].as_array().unwrap().len(), 12);
        assert_eq!(json["verification"]["rows"].as_array().unwrap().len(), 9);
        let record: RunRecord = serde_json::from_value(json["run"].clone()).unwrap();
        assert_eq!(record.name, demo::record().name);
        assert_eq!(record.samples.len(), 5);
    }

    #[test]
    fn the_same_run_gives_the_same_bytes() {
        let build = || Report::build(&demo::record(), &demo::metrics(), None);
        assert_eq!(build().to_json(), build().to_json());
        assert_eq!(build().to_html(), build().to_html());
    }

    #[test]
    fn a_run_that_has_not_begun_has_a_report() {
        let mut record = demo::record();
        record.samples.clear();
        record.baselines.clear();
        let report = Report::build(&record, &[], None);
        assert_eq!(report.results, None);
        assert!(report.to_html().contains("No training step is recorded."));
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(percent(0.3104), "31.0\u{a0}%");
        assert_eq!(percent(0.00251), "0.25\u{a0}%");
        assert_eq!(percent(2e-6), "2e-4\u{a0}%");
        assert_eq!(percent(f64::NAN), "NaN\u{a0}%");
        assert_eq!(compact(7.12345), "7.123");
        assert_eq!(compact(-0.5), "-0.5");
        assert_eq!(compact(41_234.6), "41,235");
        assert_eq!(compact(1e-4), "1e-4");
        assert_eq!(compact(f64::NAN), "NaN");
        assert_eq!(bytes(999), "999\u{a0}bytes");
        assert_eq!(bytes(7_400_000), "7.4\u{a0}MB");
    }

    #[test]
    fn dates_and_durations() {
        assert_eq!(utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(utc(951_868_800), "2000-03-01 00:00 UTC");
        assert_eq!(utc(1_735_689_599), "2024-12-31 23:59 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00 UTC");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(252), "4 min 12 s");
        assert_eq!(duration(7_260), "2 h 1 min");
        assert_eq!(duration(200_000), "2 d 7 h");
    }

    #[test]
    fn escaping_leaves_no_markup() {
        assert_eq!(
            escape("<script>&\"'\u{0}\r\n"),
            "&lt;script&gt;&amp;&quot;&#39;\u{fffd}\u{fffd}\n"
        );
    }

    fn demo_page() -> String {
        let table = demo::verification();
        Report::build(&demo::record(), &demo::metrics(), Some(&table)).to_html()
    }

    #[test]
    fn the_page_runs_and_loads_nothing() {
        let html = demo_page();
        for forbidden in [
            "<script", "http:", "https:", "src=", "url(http", "@import", "<link", "onload",
        ] {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
        assert!(html.contains("default-src 'none'"));
        assert!(html.contains("prefers-color-scheme:dark"));
    }

    #[test]
    fn all_text_is_escaped() {
        let html = demo_page();
        assert!(html.contains(
            "&lt;script&gt;alert(&#39;sample&#39;)&lt;/script&gt; &amp; &quot;quotes&quot;\u{fffd}"
        ));
        assert!(html.contains("quick start &lt;demo&gt;") && !html.contains("<demo>"));
        assert!(html.contains("<code>&lt;b&gt;</code>"), "settings too");
    }

    #[test]
    fn hostile_text_in_every_field_stays_text() {
        let text = serde_json::to_string(&demo::record()).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        poison(&mut json);
        let record = serde_json::from_value(json).unwrap();
        let mut table = demo::verification();
        table.subject = "<x-evil>".to_owned();
        table.rows[0].name = "<x-evil>".to_owned();
        table.checks[0].name = "<x-evil>".to_owned();
        table.checks[0].detail = "<x-evil>".to_owned();
        let mut metrics = demo::metrics();
        let message = "<x-evil>".to_owned();
        metrics.push(Metric::Event { step: 1, message });
        let html = Report::build(&record, &metrics, Some(&table)).to_html();
        assert!(!html.contains("<x-evil"), "unescaped text");
        assert!(html.matches("&lt;x-evil&gt;").count() > 30);
    }

    /// Replaces all strings (not those that serde reads as numbers).
    fn poison(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::String(text) => *text = "<x-evil>".to_owned(),
            serde_json::Value::Array(items) => items.iter_mut().for_each(poison),
            serde_json::Value::Object(map) => map.values_mut().for_each(poison),
            _ => {}
        }
    }

    #[test]
    fn every_svg_has_a_title_and_a_description() {
        let html = demo_page();
        let plots: Vec<&str> = html.split("<svg ").skip(1).collect();
        assert_eq!(plots.len(), 7);
        for plot in plots {
            let (head, body) = plot.split_once('>').unwrap();
            assert!(head.contains("role=\"img\" aria-labelledby="), "{head}");
            for element in ["<title id=", "<desc id="] {
                let (_, text) = body.split_once(element).unwrap();
                let (_, text) = text.split_once('>').unwrap();
                assert!(!text.starts_with('<'), "empty {element}");
            }
        }
        assert!(!html.contains("NaN"));
    }

    #[test]
    fn headline_numbers_are_there() {
        let report = Report::build(&demo::record(), &demo::metrics(), None);
        let html = report.to_html();
        let results = report.results.unwrap();
        let last = results.final_eval.unwrap();
        for text in [
            nats(results.train_loss),
            compact(last.perplexity),
            nats(last.bits_per_byte),
        ] {
            assert!(html.contains(&format!("<dd>{text}<small>")), "{text}");
        }
        assert!(html.contains(&format!("split hash <code>{}</code>", "b7c1".repeat(16))));
        assert!(html.contains("21,904 tokens"));
        assert!(html.contains("not verified"));
    }

    /// What was measured has its place and its unit; what was not is called so.
    #[test]
    fn labels_say_what_their_numbers_are() {
        let mut record = demo::record();
        let page =
            |record: &RunRecord, metrics: &[Metric]| Report::build(record, metrics, None).to_html();
        let html = page(&record, &demo::metrics());
        assert!(html.contains("<dt>Model file</dt><dd>925.7\u{a0}kB<small>export/packed, 2.17 "));
        assert!(html.contains("mean of the last 20 accepted steps"));
        assert!(html.contains(" 4 min 0 s "), "the time of the sessions");

        record.model.group_size = None;
        record.files = vec![record::ModelFile {
            path: "checkpoints/step-00001200/latents.safetensors".to_owned(),
            bytes: 13_649_920,
        }];
        record.seconds = None;
        record.data.duplicates = None;
        let mut metrics = demo::metrics();
        metrics.retain(
            |metric| !matches!(metric, Metric::Step(step) if !step.step.is_multiple_of(10)),
        );
        let html = page(&record, &metrics);
        assert!(html.contains("<dt>Weights in a checkpoint</dt><dd>13.6\u{a0}MB"));
        assert!(html.contains("mean of the last 20 logged steps"));
        assert!(html.contains("4 min 12 s from the first start to the last end"));
        assert_eq!(html.matches("not checked: the data are token").count(), 3);
        assert!(!html.contains("Near-duplicates across the split (examples)"));
        record.files.clear();
        let html = page(&record, &metrics);
        assert!(html.contains("<dt>Latents in a checkpoint</dt>"));
    }

    #[test]
    fn a_failed_tensor_comes_first_and_shows() {
        let mut table = demo::verification();
        table.rows[4].pass = false;
        let html = Report::build(&demo::record(), &demo::metrics(), Some(&table)).to_html();
        assert!(html.contains("verification failed"));
        let first = html.find(&table.rows[4].name).unwrap();
        assert!(html[first + 500..].contains(&table.rows[0].name));
        assert!(html.contains("<details open><summary>9 tensors of the packed export, 1 failed"));
    }

    /// Set SETUN_KEEP_REPORT to look at the page.
    #[test]
    fn the_demo_page_is_written_for_eyes() {
        let name = format!("setun-report-{}.html", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, demo_page()).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 1_000_000);
        if std::env::var_os("SETUN_KEEP_REPORT").is_none() {
            std::fs::remove_file(&path).unwrap();
        }
    }
}
