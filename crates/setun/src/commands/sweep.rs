//! `setun sweep` and `setun compare`.

use super::{AFTER_STEP, isa, stop_on_signal, unwrap_settings};
use crate::args::{CompareArgs, SweepArgs};
use crate::console::{self, Console};
use crate::environment::Environment;
use crate::{CommandResult, Outcome};
use setun_io::write_atomic;
use setun_train::report::compare::HeadToHead;
use setun_train::results::RunResults;
use setun_train::run::RunOptions;
use setun_train::sweep::{Sweep, SweepTable};
use std::error::Error;

/// `setun sweep`
pub fn sweep(args: SweepArgs, environment: &Environment) -> CommandResult {
    let mut sweep = Sweep::load(&args.spec, &args.options).map_err(unwrap_settings)?;
    if args.dry_run {
        print_plan(&sweep)?;
        return Ok(Outcome::Success);
    }
    if args.table {
        let table = sweep.summarize()?;
        say!("{}", table.to_markdown());
        return Ok(outcome(&table));
    }
    let isa = isa(environment)?;
    let stop = stop_on_signal(AFTER_STEP)?;
    let mut console = Console::new();
    let end = sweep
        .run(&RunOptions::new(isa, &stop), &mut console)
        .map_err(unwrap_settings)?;
    drop(console);
    say!("{}", end.table.to_markdown());
    say!("table: {}", sweep.output.join("sweep.md").display());
    if end.stopped {
        say!("stopped; the same command goes on");
        return Ok(Outcome::Stopped);
    }
    Ok(outcome(&end.table))
}

fn outcome(table: &SweepTable) -> Outcome {
    match table.failures.is_empty() {
        true => Outcome::Success,
        false => Outcome::CheckFailed,
    }
}

fn print_plan(sweep: &Sweep) -> Result<(), Box<dyn Error>> {
    let plan = sweep.plan().map_err(unwrap_settings)?;
    for (index, (cell, (parameters, tokens))) in sweep.cells.iter().zip(&plan.sizes).enumerate() {
        let set: Vec<String> = cell.set.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let kind = if cell.ternary { "ternary" } else { "dense" };
        let base = if index == sweep.base { " (base)" } else { "" };
        say!("{}{base}: {kind}, {}", cell.name, set.join(" "));
        if let Some(twin) = cell.twin {
            say!("  dense twin: {}", sweep.cells[twin].name);
        }
        let per_parameter = *tokens as f64 / *parameters as f64;
        say!(
            "  {tokens} tokens, {parameters} parameters ({per_parameter:.2} tokens per parameter)"
        );
        for run in &cell.runs {
            say!("  seed {}: {}", run.seed, run.state.name());
        }
    }
    let num_runs = sweep
        .cells
        .iter()
        .map(|cell| cell.runs.len())
        .sum::<usize>();
    say!(
        "{} cells, {num_runs} runs, {} training tokens to go; output {}",
        sweep.cells.len(),
        plan.tokens_left,
        sweep.output.display()
    );
    Ok(())
}

/// `setun compare`
pub fn compare(args: CompareArgs, _: &Environment) -> CommandResult {
    let runs = args.runs.iter().map(|run| RunResults::read(run));
    let compared = HeadToHead::new(runs.collect::<Result<_, _>>()?);
    say!("{}", compared.to_markdown().trim_end());
    if let Some(output) = &args.output {
        std::fs::create_dir_all(output)
            .map_err(|e| format!("cannot create {}: {e}", output.display()))?;
        let files = [
            ("compare.md", compared.to_markdown()),
            ("compare.json", compared.to_json()),
            ("compare.html", compared.to_html()),
            ("compare.svg", compared.to_svg()),
        ];
        for (name, text) in files {
            write_atomic(&output.join(name), text.as_bytes())?;
        }
        say!("page: {}", output.join("compare.html").display());
    }
    Ok(Outcome::Success)
}
