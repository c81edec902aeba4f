//! `setun sweep` and `setun compare`.

use super::{path_argument, path_flag, switch};
use clap::builder::ValueParser;
use clap::{Arg, ArgAction, Command, value_parser};
use setun_train::settings::Override;

const HELP: &str = "\
The file names a recipe and what its runs differ in:

  recipe = \"base.toml\"            # paths are relative to this file
  output = \"../runs/rates\"        # a directory for each cell and seed, and the table
  seeds = [1, 2, 3, 4]            # initial weights and order of the data
  dense_twin = true               # a dense run beside every ternary cell, or a cell's name
  base = \"lr-0.002\"               # the cell that others are paired with; else the first

  [set]                           # settings of all cells, over the recipe
  \"train.steps\" = 640

  [grid]                          # a cell for each combination
  \"train.lr\" = [1e-3, 2e-3]

  [[cell]]                        # and cells one by one
  name = \"slow\"
  set = { \"train.lr\" = 1e-4 }

  [[cell]]
  name = \"taught\"
  teacher = \"slow\"                # distill.teacher: that cell's run of the same seed
  set = { \"distill.weight\" = 0.5 }

Runs are made one after the other. Called again, finished ones are kept, one that was
interrupted goes on from its newest checkpoint. sweep.md and sweep.json in the output
directory are written after every run.

Examples:
  setun sweep bench/recipe/rates.toml --dry-run
  setun sweep bench/recipe/factors.toml --seeds 1,2,3,4 --cells group-64,group-256
  setun sweep bench/recipe/rates.toml --set data.train=train.tokens --set data.valid=valid.tokens";

/// `setun sweep`
pub fn sweep() -> Command {
    Command::new("sweep")
        .about("Train many runs that differ in a few settings, and compare them")
        .args([
            path_argument("spec", "SPEC.toml").help("What to run"),
            path_flag("output", "DIR").help("Directory of the sweep instead of the file's"),
            Arg::new("seeds")
                .long("seeds")
                .value_name("N,N...")
                .value_delimiter(',')
                .value_parser(value_parser!(u64))
                .help("Seeds instead of the file's"),
            Arg::new("cells")
                .long("cells")
                .value_name("NAME,NAME...")
                .value_delimiter(',')
                .help("Only these cells with their dense twins and teachers, and the base"),
            Arg::new("set")
                .long("set")
                .value_name("KEY=VALUE")
                .action(ArgAction::Append)
                .value_parser(ValueParser::new(assignment))
                .help("A setting of all runs, as train.steps=100; wins over file and recipe"),
            switch("dry-run").help("List runs, their tokens and how far they are, and stop"),
            switch("table")
                .conflicts_with("dry-run")
                .help("Write the table of the finished runs, and stop"),
        ])
        .after_help(HELP)
}

/// `setun compare`
pub fn compare() -> Command {
    Command::new("compare")
        .about("Put runs side by side: a table, and a page with their curves in one plot")
        .args([
            path_argument("runs", "RUNS")
                .num_args(2..)
                .help("Run directories; the others are held against the first"),
            path_flag("output", "DIR")
                .help("Also write compare.md, .json, .html and .svg (the curves alone) there"),
        ])
        .after_help(
            "Runs with other held-out tokens or another tokenizer than the first are marked: \
             they do not\ncompare in nats and perplexity.\n\n\
             Example:\n  setun compare runs/ternary runs/dense --output runs/compared",
        )
}

fn assignment(text: &str) -> Result<Override, String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) = pair.ok_or("it is KEY=VALUE, such as train.steps=100")?;
    Ok(Override {
        key: key.trim().to_owned(),
        value: value.trim().to_owned(),
    })
}
