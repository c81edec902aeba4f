//! What each command does: open, call the library, print.

use crate::args::{
    CheckpointChoice, EvalArgs, ReportArgs, TokenizeArgs, TokenizerShowArgs, TokenizerSource,
    TokenizerTrainArgs, TrainArgs, VerifyArgs,
};
use crate::console::{self, Console};
use crate::environment::Environment;
use crate::{CommandResult, Outcome, WrongUsage};
use setun_backend::Isa;
use setun_formats::Tokenizer;
use setun_io::{OpenModel, Which, is_run, output_path, write_atomic};
use setun_train::data::{
    ChatOptions, DataFormat, DocumentOptions, TokenSet, load_documents, load_documents_with,
    tokens::FIXED_ORDER,
};
use setun_train::prepare::chat_options;
use setun_train::report::Report;
use setun_train::run::{Observer, RunEnd, RunOptions};
use setun_train::settings::Settings;
use setun_train::{drafter, evaluate, finish, machine, run};
use std::cell::RefCell;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// As `println!`, but what cannot be printed is an error of the function and no panic.
macro_rules! say {
    ($($text:tt)*) => {
        console::print(format_args!("{}\n", format_args!($($text)*)))?
    };
}

mod bench;
mod convert;
mod generate;
mod sweep;

pub use bench::bench;
pub use convert::{convert, inspect};
pub use generate::generate;
pub use sweep::{compare, sweep};

/// `setun train`
pub fn train(args: TrainArgs, environment: &Environment) -> CommandResult {
    if let Some(target) = &args.drafter_for {
        return train_drafter(target, &args, environment);
    }
    let settings = match &args.resume {
        Some(run) => Settings::load_run(run, &args.overrides)?,
        None => Settings::load(args.recipe.as_deref(), &args.overrides)?,
    };
    let isa = isa(environment)?;
    if args.dry_run {
        return print_plan(settings);
    }
    let stop = stop_on_signal(AFTER_STEP)?;
    let options = RunOptions {
        resume: args.resume.as_deref(),
        profile: args.profile,
        ..RunOptions::new(isa, &stop)
    };
    let mut console = Console::new();
    let end = run::train(settings, &options, &mut console).map_err(unwrap_settings)?;
    drop(console);
    match end {
        RunEnd::Stopped { run, step } => {
            say!(
                "stopped after step {step}; go on with: setun train --resume {}",
                run.display()
            );
            Ok(Outcome::Stopped)
        }
        RunEnd::Finished(finished) => {
            print_summary(&finished.run, &finished.report)?;
            if let Some(verification) = &finished.verification {
                say!("{verification}");
            }
            Ok(if finished.ok() {
                Outcome::Success
            } else {
                Outcome::CheckFailed
            })
        }
    }
}

/// `setun train --drafter-for`
fn train_drafter(target: &Path, args: &TrainArgs, environment: &Environment) -> CommandResult {
    let settings = drafter::drafter_settings(target, &args.overrides)?;
    let stop = stop_on_signal(AFTER_STEP)?;
    let options = RunOptions::new(isa(environment)?, &stop);
    let mut console = Console::new();
    let trained = drafter::train_drafter(settings, target, &options, &mut console);
    let trained = trained.map_err(unwrap_settings)?;
    drop(console);
    let losses: Vec<String> = trained.losses.iter().map(|l| format!("{l:.3}")).collect();
    say!(
        "{} steps, held-out loss by guess: {}",
        trained.steps,
        losses.join(" ")
    );
    say!(
        "on held-out text: {:.1} % of the drafted tokens accepted, {:.2} tokens per step, \
         {:.2} times the speed of plain decoding, the same text",
        100.0 * trained.stats.acceptance(),
        trained.stats.tokens_per_step(),
        trained.speed
    );
    let (model, path) = (target.display(), trained.path.display());
    say!("use it: setun generate --model {model} --draft {path} --prompt TEXT");
    Ok(Outcome::Success)
}

/// Wrong settings end with another exit code, so `main` must see them.
fn unwrap_settings(error: setun_train::TrainError) -> Box<dyn Error> {
    match error {
        setun_train::TrainError::Settings(error) => Box::new(error),
        other => Box::new(other),
    }
}

fn print_plan(settings: Settings) -> CommandResult {
    let layout = run::dry_run(settings).map_err(unwrap_settings)?;
    say!("memory plan (allocated once, before the first step):");
    for (category, bytes) in layout.table() {
        say!(
            "  {category:<12} {bytes:>14} bytes  {:>9.1} MiB",
            mib(bytes)
        );
    }
    Ok(Outcome::Success)
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn print_summary(run: &Path, report: &Report) -> std::io::Result<()> {
    if let Some(results) = &report.results {
        say!(
            "final training loss {:.4} ({})",
            results.train_loss,
            results.train_loss_of()
        );
        for (name, eval) in [("best", &results.best_eval), ("final", &results.final_eval)] {
            if let Some(e) = eval {
                say!(
                    "{name:<5} held-out, step {}: loss {:.4}, perplexity {:.3}, {:.4} bits per \
                     byte on {} tokens",
                    e.step,
                    e.loss,
                    e.perplexity,
                    e.bits_per_byte,
                    e.tokens
                );
            }
        }
    }
    for c in &report.comparisons {
        say!(
            "against the {}: {:+.4} nats per token",
            c.baseline,
            -c.lead_nats
        );
    }
    for observation in &report.observations {
        say!("- {}", observation.text);
    }
    for sample in &report.run.samples {
        say!(
            "> {} | {}",
            one_line(&sample.prompt),
            one_line(&sample.text)
        );
    }
    say!(
        "run: {}\nreport: {}",
        run.display(),
        run.join("report.html").display()
    );
    Ok(())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The answer to the first interrupt of a training.
const AFTER_STEP: &str = "stopping after this step; once more to stop at once";

/// A flag that the first interrupt sets, which is answered; the second one ends the process at once, which
/// loses no committed checkpoint.
fn stop_on_signal(answer: &'static str) -> Result<Arc<AtomicBool>, Box<dyn Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        console::tell(format_args!("{answer}"));
    })?;
    Ok(stop)
}

/// `setun verify`
pub fn verify(args: VerifyArgs, _: &Environment) -> CommandResult {
    let report = setun_io::verify(&args.path)?;
    match args.json {
        true => say!("{}", serde_json::to_string_pretty(&report)?),
        false => say!("{report}"),
    }
    if report.ok() {
        return Ok(Outcome::Success);
    }
    let path = report.path.display();
    let first = report.failures.first().map_or("no model is there", |f| f);
    let remedy = match report.is_dense {
        true => "there is nothing ternary to verify",
        false => {
            "take the files from a copy or convert them again, a run goes on from an undamaged \
             checkpoint with setun train --resume"
        }
    };
    console::tell(format_args!(
        "error: {path} is not verified ({} failures): {first}; {remedy}",
        report.failures.len()
    ));
    Ok(Outcome::CheckFailed)
}

/// `setun eval`
pub fn eval(args: EvalArgs, environment: &Environment) -> CommandResult {
    if let Some(logits) = &args.logits {
        output_path(logits)?;
    }
    let model = open(&args.model, args.checkpoint)?;
    let of_run = settings_of(&args.model);
    let seq_len = eval_seq_len(
        &args,
        of_run.as_ref(),
        model.config().max_position_embeddings,
    )?;
    let document_mask = of_run.is_some_and(|settings| settings.data.document_mask);
    if document_mask && args.kv.is_some() {
        console::tell(format_args!(
            "note: --kv does not keep documents apart, as this run's own evaluation does"
        ));
    }
    let tokenizer = tokenizer_of(&model)?;
    let chat = chat_options(DataFormat::Auto, Some(&model), Some(&tokenizer))?;
    let tokens = read_tokens(&args.data, (&args.documents, &chat), &tokenizer, None)?;
    let options = evaluate::EvalOptions {
        seq_len,
        batch_size: args.batch_size,
        document_mask,
        threads: machine::threads(args.threads),
        isa: isa(environment)?,
        numerics: args.numerics,
    };
    let evaluation = if let Some(kind) = args.kv {
        evaluate::evaluate_cached(&model, tokens, options, kind)?
    } else {
        let (evaluation, logits) =
            evaluate::evaluate_model(&model, tokens, options, args.logits.is_some())?;
        if let Some(path) = &args.logits {
            evaluate::write_logits(path, &logits)?;
        }
        evaluation
    };
    if args.json {
        let mut record = serde_json::to_value(evaluation)?;
        record["seq_len"] = seq_len.into();
        say!("{}", serde_json::to_string_pretty(&record)?);
    } else {
        say!(
            "loss {:.6} nats per token, perplexity {:.4}, {:.6} bits per byte on {} tokens, \
             in windows of {seq_len}",
            evaluation.loss,
            evaluation.perplexity,
            evaluation.bits_per_byte,
            evaluation.tokens
        );
    }
    Ok(Outcome::Success)
}

/// The window that was asked for, else that of the run, else the limit of the model.
fn eval_seq_len(
    args: &EvalArgs,
    of_run: Option<&Settings>,
    limit: usize,
) -> Result<usize, WrongUsage> {
    match args.seq_len {
        Some(asked) if asked > limit => Err(WrongUsage(format!(
            "--seq-len {asked}: {} has {limit} positions; give at most {limit}",
            args.model.display()
        ))),
        Some(asked) => Ok(asked),
        None => Ok(of_run
            .map_or(512, |settings| settings.train.seq_len)
            .min(limit)),
    }
}

/// Settings of the run that a model belongs to, however its path is spelled.
fn settings_of(path: &Path) -> Option<Settings> {
    let path = std::fs::canonicalize(path).ok()?;
    let mut folders = path.ancestors().take(4);
    folders.find_map(|dir| Settings::load_run(dir, &[]).ok())
}

/// `setun tokenize`
pub fn tokenize(args: TokenizeArgs, _: &Environment) -> CommandResult {
    // Before the work, and again by the one that writes.
    output_path(&args.output)?;
    let (tokenizer, model) = match &args.tokenizer {
        TokenizerSource::File(path) => (tokenizer_file(path)?, None),
        TokenizerSource::Model(path) => {
            let model = OpenModel::open(path)?;
            (tokenizer_of(&model)?, Some(model))
        }
    };
    let folder = args.output.parent().filter(|p| !p.as_os_str().is_empty());
    let spill = Some(folder.unwrap_or(Path::new(".")));
    let chat = chat_options(DataFormat::Auto, model.as_ref(), Some(&tokenizer))?;
    let tokens = read_tokens(&args.sources, (&args.documents, &chat), &tokenizer, spill)?;
    tokens.save(&args.output)?;
    say!(
        "{}: {} tokens from {} documents, {} bytes of text",
        args.output.display(),
        tokens.num_tokens(),
        tokens.document_starts().len(),
        tokens.info().raw_bytes
    );
    Ok(Outcome::Success)
}

/// Documents in their order, as tokens; a `.tokens` file as it is. Many tokens go into a file
/// without a name in `spill`.
fn read_tokens(
    sources: &[PathBuf],
    (documents, chat): (&DocumentOptions, &ChatOptions),
    tokenizer: &Tokenizer,
    spill: Option<&Path>,
) -> Result<TokenSet, Box<dyn Error>> {
    if let [path] = sources
        && path.extension().is_some_and(|e| e == "tokens")
    {
        let tokens = TokenSet::open(path)?;
        tokens.check_tokenizer(tokenizer)?;
        return Ok(tokens);
    }
    let names: Vec<String> = sources
        .iter()
        .map(|p| p.to_string_lossy().into_owned())
        .collect();
    let corpus = load_documents_with(&names, Path::new(""), documents, chat)?;
    let all: Vec<usize> = (0..corpus.documents.len()).collect();
    let console = RefCell::new(Console::new());
    let progress = |done, total| console.borrow_mut().progress("tokenizing", done, total, "");
    Ok(TokenSet::encode(
        &corpus,
        &all,
        tokenizer,
        FIXED_ORDER,
        spill,
        &progress,
    )?)
}

/// `setun tokenizer train`
pub fn tokenizer_train(args: TokenizerTrainArgs, _: &Environment) -> CommandResult {
    let names: Vec<String> = args
        .sources
        .iter()
        .map(|p| p.to_string_lossy().into_owned())
        .collect();
    let corpus = load_documents(&names, Path::new(""), &args.documents)?;
    let all: Vec<usize> = (0..corpus.documents.len()).collect();
    let tokenizer = corpus.train_tokenizer(&all, args.vocab_size)?;
    write_atomic(&args.output, tokenizer.to_json().as_bytes())?;
    say!(
        "{}: {} entries",
        args.output.display(),
        tokenizer.vocab_size()
    );
    Ok(Outcome::Success)
}

/// `setun tokenizer show`
pub fn tokenizer_show(args: TokenizerShowArgs, _: &Environment) -> CommandResult {
    let is_file = args.file.extension().is_some_and(|e| e == "json");
    let tokenizer = match is_file {
        true => tokenizer_file(&args.file)?,
        false => tokenizer_of(&OpenModel::open(&args.file)?)?,
    };
    let end = tokenizer.end_of_text();
    let end = end.map_or("none".to_owned(), |id| id.to_string());
    say!("{} entries, end of text: {end}", tokenizer.vocab_size());
    if let Some(text) = &args.text {
        let ids = tokenizer.encode_with_special(text)?;
        for id in &ids {
            say!("{id:>7}  {:?}", tokenizer.decode(&[*id]));
        }
        say!("{} tokens", ids.len());
    }
    Ok(Outcome::Success)
}

/// `setun report`
pub fn report(args: ReportArgs, _: &Environment) -> CommandResult {
    let report = finish::report_of_run(&args.run)?;
    print_summary(&args.run, &report)?;
    Ok(match &report.verification {
        Some(table) if !table.passed() => Outcome::CheckFailed,
        _ => Outcome::Success,
    })
}

fn open(path: &Path, which: Option<CheckpointChoice>) -> Result<OpenModel, Box<dyn Error>> {
    if which.is_some() && !is_run(path) {
        let problem = "--checkpoint chooses among those of a run, and this is none";
        return Err(WrongUsage(format!("{}: {problem}", path.display())).into());
    }
    let model = match which {
        None => OpenModel::open(path),
        Some(CheckpointChoice::Best) => OpenModel::open_with(path, Which::Best),
        Some(CheckpointChoice::Newest) => OpenModel::open_with(path, Which::Newest),
        Some(CheckpointChoice::Step(step)) => OpenModel::open_with(path, Which::Step(step)),
    }?;
    model
        .notes()
        .iter()
        .for_each(|note| console::tell(format_args!("note: {note}")));
    Ok(model)
}

fn tokenizer_of(model: &OpenModel) -> Result<Tokenizer, Box<dyn Error>> {
    model.tokenizer()?.ok_or_else(|| {
        let place = model.directory().display();
        format!("{place} has no tokenizer.json; put the model's tokenizer there").into()
    })
}

fn tokenizer_file(path: &Path) -> Result<Tokenizer, Box<dyn Error>> {
    let bytes = std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    Ok(Tokenizer::from_bytes(&bytes).map_err(|e| format!("{}: {e}", path.display()))?)
}

/// The instruction set of `SETUN_ISA`, else the fastest one of this machine.
fn isa(environment: &Environment) -> Result<Isa, Box<dyn Error>> {
    let Some(name) = &environment.isa else {
        return Ok(Isa::detect());
    };
    Isa::from_name(name).ok_or_else(|| {
        let names: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
        let names = names.join(", ");
        WrongUsage(format!("SETUN_ISA={name}: this machine runs {names}")).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};
    use std::ffi::OsString;

    fn eval_args(flags: &[&str]) -> EvalArgs {
        let start = ["setun", "eval", "--model", "no-such-model", "--data", "d"];
        match parse(start.iter().chain(flags).map(OsString::from)) {
            Ok(Command::Eval(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_window_above_the_limit_of_the_model_is_refused() {
        let window = |flags: &[&str], limit| eval_seq_len(&eval_args(flags), None, limit);
        assert_eq!(window(&[], 128), Ok(128));
        assert_eq!(window(&[], 4096), Ok(512));
        assert_eq!(window(&["--seq-len", "128"], 128), Ok(128));
        let error = window(&["--seq-len", "129"], 128).unwrap_err().to_string();
        assert!(error.contains("give at most 128"), "{error}");
    }

    #[test]
    fn the_window_of_a_run_is_found_however_its_path_is_spelled() {
        let run = std::env::temp_dir().join(format!("setun-window-{}", std::process::id()));
        let export = run.join("export/hf");
        std::fs::create_dir_all(&export).unwrap();
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny.toml");
        std::fs::copy(recipe, run.join("settings.toml")).unwrap();
        let winding = export.join("../hf/../hf");
        let found = [&run, &export, &winding]
            .map(|path| settings_of(path).map(|settings| settings.train.seq_len));
        std::fs::remove_dir_all(&run).unwrap();
        assert_eq!(found, [Some(32); 3]);
    }
}
