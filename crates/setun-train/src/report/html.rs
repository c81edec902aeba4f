//! The report as one HTML page: inline CSS and SVG, no script, nothing to load.

use std::fmt::Write;

use super::observe::Severity;
use super::plot::{self, Plot, Series, Style, Unit};
use super::record::{
    Duplicates, EvalRecord, FinalResults, RunRecord, Sample, StepRecord, TernaryRecord,
    VerificationRow,
};
use super::{Report, bytes, compact, duration, escape, grouped, nats, percent, shorten, utc};

mod style;

pub(super) use style::STYLE;

/// Size of the plot of losses, and of each of the others.
const LARGE: (f64, f64) = (960.0, 360.0);
const SMALL: (f64, f64) = (520.0, 250.0);
/// A verbatim match is shown up to this many characters.
const SHOWN_MATCH: usize = 60;

/// The whole page. The content policy forbids every load, as a second guard after escaping.
pub(super) fn page(report: &Report) -> String {
    let title = escape(&report.run.name);
    let sections = [
        ("observations", "What the numbers say", observations(report)),
        ("curves", "Curves", curves(report)),
        ("held-out", "Held-out text and baselines", held_out(report)),
        ("samples", "Samples", samples(report)),
        ("verification", "Verification", verification(report)),
        ("data", "Data", data(report)),
        ("machine", "Machine and memory", machine(report)),
        ("configuration", "Configuration", configuration(report)),
    ];
    let mut nav = String::new();
    let mut body = String::new();
    for (id, heading, content) in &sections {
        _ = write!(nav, "<a href=\"#{id}\">{heading}</a>");
        _ = writeln!(
            body,
            "<section id=\"{id}\"><h2>{heading}</h2>{content}</section>"
        );
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>{title} - Setun report</title><style>{}{STYLE}{}</style></head>\n<body>\
         <header><p class=\"eyebrow\">Setun training report</p><h1>{title}</h1>{}</header>\
         {}<nav aria-label=\"Sections\">{nav}</nav><main>\n{body}</main>\
         <footer>Written by Setun {}.</footer></body></html>\n",
        plot::COLORS,
        plot::STYLE,
        subtitle(report),
        headline(report),
        escape(&report.run.code_version),
    )
}

fn subtitle(report: &Report) -> String {
    let (run, model) = (&report.run, &report.run.model);
    let mut kind = match model.group_size {
        Some(size) => format!("ternary, groups of {size}"),
        None => "dense".to_owned(),
    };
    if let Some(experiment) = &model.experiment {
        kind += &format!(", with {experiment}");
    }
    let time = match (run.finished, run.seconds) {
        (Some(_), Some(seconds)) => duration(seconds as u64),
        // A run that was resumed may have rested in between.
        (Some(end), None) => format!(
            "{} from the first start to the last end",
            duration(end.saturating_sub(run.started))
        ),
        (None, _) => "not finished".to_owned(),
    };
    let verified = match &report.verification {
        Some(table) if table.passed() => "<span class=\"chip good\">\u{2713} verified</span>",
        Some(_) => "<span class=\"chip bad\">\u{2717} verification failed</span>",
        None => "<span class=\"chip\">not verified</span>",
    };
    format!(
        "<p class=\"sub\">{} parameters, {kind}, numerics {} <span class=\"sep\">\u{b7}</span> \
         {} <span class=\"sep\">\u{b7}</span> {time} {verified}</p>",
        grouped(model.parameters),
        escape(&model.numerics),
        utc(run.started),
    )
}

fn headline(report: &Report) -> String {
    let Some(results) = &report.results else {
        return String::new();
    };
    let cards = [
        card(
            "Final training loss",
            nats(results.train_loss),
            format!("nats per token, {}", results.train_loss_of()),
        ),
        held_out_cards(results),
        file_card(&report.run),
        card(
            "Speed",
            compact(results.tokens_per_second),
            format!("tokens/s (median), {} epochs", compact(results.epochs)),
        ),
    ];
    let split = results.final_eval.as_ref().map(|eval| {
        format!(
            "<p class=\"sub\">Held-out: {} tokens, {} bytes, split hash <code>{}</code></p>",
            grouped(eval.tokens),
            grouped(report.run.data.valid_bytes),
            escape(&report.run.data.valid_hash)
        )
    });
    let cards = cards.concat();
    format!(
        "<dl class=\"cards\">{cards}</dl>{}",
        split.unwrap_or_default()
    )
}

fn held_out_cards(results: &FinalResults) -> String {
    let (Some(last), Some(best)) = (&results.final_eval, &results.best_eval) else {
        return String::new();
    };
    let (last_step, best_step) = (grouped(last.step), grouped(best.step));
    let places = |value: String| match best.step == last.step {
        true => format!("at step {last_step}, which is the best"),
        false => format!("at step {last_step}; best {value} at step {best_step}"),
    };
    let perplexity = places(compact(best.perplexity));
    let bits_per_byte = places(nats(best.bits_per_byte));
    let final_step = grouped(results.final_step);
    [
        card("Held-out perplexity", compact(last.perplexity), perplexity),
        card(
            "Held-out bits per byte",
            nats(last.bits_per_byte),
            bits_per_byte,
        ),
        card(
            "Best step",
            best_step,
            format!("of {final_step}; held-out loss {}", nats(best.loss)),
        ),
    ]
    .concat()
}

/// What the weights take, in the smallest file that was written, or as computed.
fn file_card(run: &RunRecord) -> String {
    let model = &run.model;
    let Some(file) = run.smallest_file() else {
        let name = match model.group_size {
            Some(_) => "Packed weights",
            None => "Latents in a checkpoint",
        };
        let bits = compact(model.bits_per_weight);
        let note = match &model.experiment {
            None => format!("computed, {bits} bits per parameter; no model file is recorded"),
            Some(experiment) => {
                format!("computed as if without {experiment}: no file can hold that")
            }
        };
        return card(name, bytes(model.packed_bytes), note);
    };
    let name = match file.path.starts_with("export") {
        true => "Model file",
        false => "Weights in a checkpoint",
    };
    let bits = 8.0 * file.bytes as f64 / model.parameters.max(1) as f64;
    let note = format!(
        "{}, {} bits per parameter",
        escape(&file.path),
        compact(bits)
    );
    card(name, bytes(file.bytes), note)
}

fn card(name: &str, value: String, note: String) -> String {
    format!("<div class=\"card\"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>")
}

fn observations(report: &Report) -> String {
    let mut items = String::new();
    for note in &report.observations {
        let (class, mark, word) = match note.severity {
            Severity::Warning => ("bad", "!", "Warning"),
            Severity::Info => ("info", "i", "Note"),
            Severity::Good => ("good", "\u{2713}", "Good"),
        };
        _ = write!(
            items,
            "<li class=\"{class}\"><span class=\"mark\" role=\"img\" aria-label=\"{word}\">{mark}\
             </span><span>{}</span></li>",
            escape(&note.text)
        );
    }
    format!("<ul class=\"notes\">{items}</ul>")
}

fn curves(report: &Report) -> String {
    let timeline = &report.timeline;
    let steps = |value: fn(&StepRecord) -> f64| -> Vec<(f64, f64)> {
        timeline
            .accepted()
            .map(|record| (record.step as f64, value(record)))
            .collect()
    };
    let looks = |value: fn(&TernaryRecord) -> f64| -> Vec<(f64, f64)> {
        timeline
            .ternary
            .iter()
            .map(|look| (look.step as f64, value(look)))
            .collect()
    };
    let mut lr = simple_plot("lr", "Learning rate", Style::Line, steps(|step| step.lr));
    lr.from_zero = true;
    let mut norm = simple_plot(
        "norm",
        "Gradient norm",
        Style::Noisy,
        steps(|step| step.grad_norm),
    );
    norm.log_y = true;
    let speed = steps(|step| step.tokens_per_second);
    let mut speed = simple_plot("speed", "Tokens per second", Style::Noisy, speed);
    speed.from_zero = true;
    let mut zeros = simple_plot(
        "zeros",
        "Share of zeros",
        Style::Line,
        looks(|l| l.zero_share),
    );
    zeros.unit = Unit::Share;
    let mut flips = simple_plot(
        "flips",
        "Trits changed per step",
        Style::Line,
        looks(|l| l.flip_rate),
    );
    flips.unit = Unit::Share;
    flips.log_y = true;
    let mut plots = vec![lr, norm, speed];
    plots.extend(divergence_plot(report));
    if report.run.model.group_size.is_some() {
        let scales = looks(|look| look.scale_median);
        plots.extend([
            zeros,
            flips,
            simple_plot("scales", "Median scale", Style::Line, scales),
        ]);
    }
    let small: String = plots.iter().map(figure).collect();
    format!(
        "{}<div class=\"grid\">{small}</div>",
        figure(&loss_plot(report))
    )
}

fn loss_plot(report: &Report) -> Plot {
    let timeline = &report.timeline;
    let mut plot = Plot::new("loss", "Loss, in nats per token", LARGE);
    let train = timeline
        .accepted()
        .map(|step| (step.step as f64, step.loss))
        .collect();
    let mut train = Series::new(
        "training (smoothed; single steps faint)",
        Style::Noisy,
        train,
    );
    train.end_value = report.results.as_ref().map(|results| results.train_loss);
    let held_out = timeline
        .evals
        .iter()
        .map(|eval| (eval.step as f64, eval.loss))
        .collect();
    plot.series = vec![train, Series::new("held-out", Style::Dots, held_out)];
    plot.marker = timeline.best_eval().map(|best| {
        let label = format!("best: {} at step {}", nats(best.loss), grouped(best.step));
        (1, (best.step as f64, best.loss), label)
    });
    let skipped = timeline.steps.iter().filter(|step| !step.accepted());
    let skipped: Vec<f64> = skipped.map(|step| step.step as f64).collect();
    plot.rug = (!skipped.is_empty()).then(|| ("skipped step".to_owned(), skipped));
    plot.description = match &report.results {
        Some(results) => format!(
            "Training and held-out loss over {} steps. Training ends at {}.{}",
            grouped(results.final_step),
            nats(results.train_loss),
            match (&results.final_eval, &results.best_eval) {
                (Some(last), Some(best)) => format!(
                    " Held-out ends at {}; its best is {} at step {}.",
                    nats(last.loss),
                    nats(best.loss),
                    grouped(best.step)
                ),
                _ => String::new(),
            }
        ),
        None => "No step is recorded.".to_owned(),
    };
    plot
}

/// How far the student is from its teacher, if it has one.
fn divergence_plot(report: &Report) -> Option<Plot> {
    let accepted = report.timeline.accepted();
    let points: Vec<(f64, f64)> = accepted
        .filter_map(|record| Some((record.step as f64, record.divergence?)))
        .collect();
    let title = "Divergence from the teacher, in nats";
    (!points.is_empty()).then(|| simple_plot("divergence", title, Style::Noisy, points))
}

/// A small plot of one series, described by its first and last value.
fn simple_plot(id: &str, title: &str, style: Style, points: Vec<(f64, f64)>) -> Plot {
    let mut plot = Plot::new(id, title, SMALL);
    if let (Some(first), Some(last)) = (points.first(), points.last()) {
        plot.description = format!(
            "{title} over training steps: {} at step {}, {} at step {}.",
            compact(first.1),
            compact(first.0),
            compact(last.1),
            compact(last.0)
        );
    }
    let name = match style {
        Style::Noisy => "smoothed; single steps faint",
        Style::Line | Style::Dots | Style::Smooth => title,
    };
    plot.series.push(Series::new(name, style, points));
    plot
}

pub(super) fn figure(plot: &Plot) -> String {
    // A wide plot scrolls on a narrow screen, where its text would be too small to read.
    let class = if plot.size.0 > SMALL.0 {
        " class=\"wide\""
    } else {
        ""
    };
    let (caption, svg) = (escape(&plot.title), plot.to_svg());
    format!("<figure{class}><figcaption>{caption}</figcaption>{svg}</figure>")
}

fn held_out(report: &Report) -> String {
    let mut html = String::new();
    let best = report
        .results
        .as_ref()
        .and_then(|results| results.best_eval.as_ref());
    if let Some(best) = best {
        html.push_str(&baselines(report, best));
    }
    if report.timeline.evals.is_empty() {
        return html + "<p class=\"none\">No evaluation is recorded.</p>";
    }
    let mut rows = String::new();
    for eval in &report.timeline.evals {
        let is_best = best.is_some_and(|best| best.step == eval.step);
        let (class, mark) = if is_best {
            (" class=\"model\"", " (best)")
        } else {
            ("", "")
        };
        _ = write!(
            rows,
            "<tr{class}><th scope=\"row\" class=\"n\">{}{mark}</th>{}{}{}{}{}</tr>",
            grouped(eval.step),
            number(nats(eval.loss)),
            number(format!("{:.2}", eval.perplexity)),
            number(nats(eval.bits_per_byte)),
            number(nats(eval.train_loss)),
            number(grouped(eval.tokens)),
        );
    }
    let head = ">step|>held-out loss|>perplexity|>bits per byte|>training loss before it|>tokens";
    let summary = format!("All {} evaluations", report.timeline.evals.len());
    html + &details(&summary, false, &table("Held-out evaluations", head, &rows))
}

/// The model and the count models, worst first; bars show bits per byte.
fn baselines(report: &Report, best: &EvalRecord) -> String {
    let mut entries: Vec<(String, f64, f64, u64, bool)> = Vec::new();
    for baseline in &report.run.baselines {
        let name = baseline.name.clone();
        entries.push((
            name,
            baseline.loss,
            baseline.bits_per_byte,
            baseline.tokens,
            false,
        ));
    }
    let model = format!("this model (step {})", grouped(best.step));
    entries.push((model, best.loss, best.bits_per_byte, best.tokens, true));
    entries.sort_by(|a, b| b.1.total_cmp(&a.1));
    let widest = entries.iter().map(|entry| entry.2).fold(0.0, f64::max);
    let mut rows = String::new();
    for (name, loss, bits_per_byte, tokens, is_model) in &entries {
        let lead = match (is_model, *tokens == best.tokens) {
            (true, _) => String::new(),
            (false, true) => format!("{:+.3}", loss - best.loss),
            (false, false) => "other tokens".to_owned(),
        };
        _ = write!(
            rows,
            "<tr{}><th scope=\"row\">{}</th>{}{}{}{}{}<td class=\"bar\"><i style=\"width:{:.1}%\">\
             </i></td></tr>",
            if *is_model { " class=\"model\"" } else { "" },
            escape(name),
            number(nats(*loss)),
            number(nats(*bits_per_byte)),
            number(format!("{:.2}", loss.exp())),
            number(grouped(*tokens)),
            number(lead),
            (100.0 * bits_per_byte / widest).clamp(0.0, 100.0),
        );
    }
    let head = "|>nats per token|>bits per byte|>perplexity|>tokens|>model's lead, nats|";
    let caption = "Against count models of the same training tokens; bars show bits per byte";
    table(caption, head, &rows)
}

fn samples(report: &Report) -> String {
    if report.run.samples.is_empty() {
        return "<p class=\"none\">No sample was taken.</p>".to_owned();
    }
    report.run.samples.iter().map(sample).collect()
}

fn sample(sample: &Sample) -> String {
    let matched = shorten(&sample.match_text, SHOWN_MATCH);
    // The match is a piece of the text, so it can be marked in place.
    let text = match sample.text.split_once(&sample.match_text) {
        Some((before, after)) if !sample.match_text.is_empty() => format!(
            "{}<mark>{}</mark>{}",
            escape(before),
            escape(&sample.match_text),
            escape(after)
        ),
        _ => escape(&sample.text),
    };
    format!(
        "<article class=\"sample\"><p class=\"text\"><b>{}</b>{text}</p>\
         <p class=\"facts\">Longest verbatim match: <b>{} characters</b> \
         (<mark>{}</mark>) <span class=\"sep\">\u{b7}</span> repeated 4-grams: <b>{}</b> \
         <span class=\"sep\">\u{b7}</span> {}</p></article>",
        escape(&sample.prompt),
        sample.match_chars,
        escape(&matched),
        percent(sample.repetition_rate),
        escape(&sample.decoding),
    )
}

fn verification(report: &Report) -> String {
    let Some(table_of) = &report.verification else {
        return "<p class=\"none\">The model file was not verified.</p>".to_owned();
    };
    let mut checks = String::new();
    for check in &table_of.checks {
        _ = write!(
            checks,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td></tr>",
            escape(&check.name),
            escape(&check.detail),
            pass(check.pass)
        );
    }
    // Failures come first; the rest keeps the model's order.
    let mut rows: Vec<&VerificationRow> = table_of.rows.iter().collect();
    rows.sort_by_key(|row| row.pass);
    let rows_html: String = rows.iter().map(|row| verification_row(row)).collect();
    let head = "tensor|>shape|>groups|>-1 / 0 / +1||>scales|>worst distance|result";
    let tensors = table("Ternary tensors of the model file", head, &rows_html);
    let failed = rows.iter().filter(|row| !row.pass).count();
    let summary = format!(
        "{} tensors of {}, {failed} failed",
        rows.len(),
        escape(&table_of.subject)
    );
    let open = failed > 0 || rows.len() <= 12;
    let checks = match checks.is_empty() {
        true => checks,
        false => table("Checks of the whole file", "check|found|result", &checks),
    };
    checks + &details(&summary, open, &tensors)
}

fn verification_row(row: &VerificationRow) -> String {
    let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
    let shares = [row.minus_share, row.zero_share, row.plus_share];
    let [minus, zero, plus] = shares.map(|share| format!("{:.1}", 100.0 * share));
    format!(
        "<tr><th scope=\"row\"><code>{}</code></th>{}{}{}<td class=\"trits\" aria-hidden=\"true\">\
         <i style=\"width:{minus}%\"></i><i style=\"width:{zero}%\"></i>\
         <i style=\"width:{plus}%\"></i></td>{}{}<td>{}</td></tr>",
        escape(&row.name),
        number(shape.join(" \u{d7} ")),
        number(grouped(row.groups)),
        number(format!("{minus} / {zero} / {plus}\u{a0}%")),
        number(format!(
            "{} to {}",
            compact(row.scale_min),
            compact(row.scale_max)
        )),
        number(compact(row.worst_distance)),
        pass(row.pass),
    )
}

fn data(report: &Report) -> String {
    let data = &report.run.data;
    let duplicates = data.checked_duplicates();
    let checked = |text: fn(&Duplicates) -> String| {
        duplicates.map_or("not checked: the data are token files".to_owned(), text)
    };
    let facts = [
        ("Sources", escape(&data.sources.join(", "))),
        ("Training", counts(data.train_documents, data.train_tokens)),
        ("Held-out", counts(data.valid_documents, data.valid_tokens)),
        (
            "Held-out text",
            format!("{} bytes", grouped(data.valid_bytes)),
        ),
        (
            "Training hash",
            format!("<code>{}</code>", escape(&data.train_hash)),
        ),
        (
            "Held-out hash",
            format!("<code>{}</code>", escape(&data.valid_hash)),
        ),
        (
            "Vocabulary",
            format!("{} entries", grouped(data.vocab_size as u64)),
        ),
        ("Short documents", grouped(data.short_documents)),
        (
            "Exact copies of held-out documents",
            checked(|d| {
                let left_out = grouped(d.exact_left_out());
                let exact = grouped(d.exact);
                format!("{exact} training documents, of which {left_out} left out")
            }),
        ),
        (
            "Near-duplicates across the split",
            checked(|d| {
                let (left, left_out) = (grouped(d.across_split), grouped(d.near_left_out()));
                format!("{left} held-out documents; {left_out} training documents left out")
            }),
        ),
    ];
    fact_table(&facts) + &duplicates.map(duplicate_examples).unwrap_or_default()
}

fn duplicate_examples(duplicates: &Duplicates) -> String {
    if duplicates.examples.is_empty() {
        return String::new();
    }
    let mut rows = String::new();
    for pair in &duplicates.examples {
        _ = write!(
            rows,
            "<tr><td>{}</td><td>{}</td>{}</tr>",
            escape(&shorten(&pair.valid, 2 * SHOWN_MATCH)),
            escape(&shorten(&pair.train, 2 * SHOWN_MATCH)),
            number(percent(pair.similarity))
        );
    }
    let caption = match duplicates.across_split {
        0 => "Near-duplicates across the split that were left out (examples)",
        _ => "Near-duplicates across the split (examples)",
    };
    let head = "held-out document|nearest training document|>shared text";
    table(caption, head, &rows)
}

fn counts(documents: u64, tokens: u64) -> String {
    format!(
        "{} documents, {} tokens",
        grouped(documents),
        grouped(tokens)
    )
}

fn machine(report: &Report) -> String {
    let (run, machine) = (&report.run, &report.run.machine);
    let peak = run
        .memory
        .peak_bytes
        .map_or("not measured".to_owned(), bytes);
    let facts = [
        ("Processor", escape(&machine.cpu)),
        (
            "Cores, threads used",
            format!("{}, {}", machine.cores, machine.threads),
        ),
        ("Instruction set", escape(&machine.isa)),
        ("Memory", bytes(machine.memory_bytes)),
        ("System", escape(&machine.os)),
        ("Code version", escape(&run.code_version)),
        ("Peak resident memory", peak),
    ];
    let mut rows = String::new();
    for row in &run.memory.plan {
        let size = number(bytes(row.bytes));
        _ = write!(
            rows,
            "<tr><th scope=\"row\">{}</th>{size}</tr>",
            escape(&row.category)
        );
    }
    let total: u64 = run.memory.plan.iter().map(|row| row.bytes).sum();
    let size = number(bytes(total));
    _ = write!(
        rows,
        "<tr class=\"model\"><th scope=\"row\">total</th>{size}</tr>"
    );
    let plan = table("Memory plan", "category|>size", &rows);
    format!(
        "<div class=\"grid\"><div>{}</div><div>{plan}</div></div>",
        fact_table(&facts)
    )
}

fn configuration(report: &Report) -> String {
    let run = &report.run;
    let mut html = fact_table(&[("Seed", run.seed.to_string())]);
    for (title, value) in [
        ("Settings", &run.settings),
        ("Model (config.json)", &run.model.config),
    ] {
        let mut leaves = Vec::new();
        flatten(value, String::new(), &mut leaves);
        let mut rows = String::new();
        for (key, value) in &leaves {
            _ = write!(
                rows,
                "<tr><th scope=\"row\"><code>{}</code></th><td><code>{}</code></td></tr>",
                escape(key),
                escape(value)
            );
        }
        html += &details(title, false, &table(title, "key|value", &rows));
    }
    if !run.ternary_hashes.is_empty() {
        let mut rows = String::new();
        for (checkpoint, hash) in &run.ternary_hashes {
            let (checkpoint, hash) = (escape(checkpoint), escape(hash));
            _ = write!(
                rows,
                "<tr><th scope=\"row\">{checkpoint}</th><td><code>{hash}</code></td></tr>"
            );
        }
        let title = "Ternary hashes of the checkpoints";
        html += &details(title, false, &table(title, "checkpoint|hash", &rows));
    }
    if !report.timeline.events.is_empty() {
        let mut rows = String::new();
        for (step, message) in &report.timeline.events {
            _ = write!(
                rows,
                "<tr>{}<td>{}</td></tr>",
                number(grouped(*step)),
                escape(message)
            );
        }
        html += &details("Events", false, &table("Events", ">step|event", &rows));
    }
    html
}

/// Nested settings as `a.b.c` and value.
fn flatten(value: &serde_json::Value, key: String, leaves: &mut Vec<(String, String)>) {
    match value {
        serde_json::Value::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                let key = if key.is_empty() {
                    name.clone()
                } else {
                    format!("{key}.{name}")
                };
                flatten(value, key, leaves);
            }
        }
        serde_json::Value::String(text) => leaves.push((key, text.clone())),
        other => leaves.push((key, other.to_string())),
    }
}

/// A table under the names in `head`, which are separated by `|`; a name with `>` before it
/// belongs to a column of numbers.
pub(super) fn table(caption: &str, head: &str, rows: &str) -> String {
    let mut cells = String::new();
    for name in head.split('|') {
        cells += &match name.strip_prefix('>') {
            Some(name) => format!("<th scope=\"col\" class=\"n\">{name}</th>"),
            None if name.is_empty() => "<td></td>".to_owned(),
            None => format!("<th scope=\"col\">{name}</th>"),
        };
    }
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{caption}\"><table>\
         <caption>{caption}</caption><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody>\
         </table></div>"
    )
}

/// Names and values; the values are HTML already.
fn fact_table(facts: &[(&str, String)]) -> String {
    let mut rows = String::new();
    for (name, value) in facts {
        _ = write!(rows, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    format!("<dl class=\"facts\">{rows}</dl>")
}

fn details(summary: &str, open: bool, content: &str) -> String {
    let open = if open { " open" } else { "" };
    format!("<details{open}><summary>{summary}</summary>{content}</details>")
}

pub(super) fn number(text: String) -> String {
    format!("<td class=\"n\">{text}</td>")
}

fn pass(pass: bool) -> &'static str {
    match pass {
        true => "<span class=\"chip good\">\u{2713} pass</span>",
        false => "<span class=\"chip bad\">\u{2717} fail</span>",
    }
}
