//! Work on Setun itself that is too slow or too rough for a test: `cargo xtask crash`.
#![forbid(unsafe_code)]

mod crash;
mod random;
mod session;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use std::error::Error;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

fn main() -> ExitCode {
    match run(&arguments().get_matches()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("N")
            .default_value(default)
            .value_parser(value_parser!(u64))
            .help(help)
    };
    let crash = Command::new("crash")
        .about("Kills trainings at random instants, resumes them, and compares their results")
        .arg(number("kills", "30", "How often to kill"))
        .arg(number("seed", "1", "Seed of the instants"))
        .arg(number("steps", "120", "Steps of each training"))
        .arg(
            Arg::new("term")
                .long("term")
                .action(ArgAction::SetTrue)
                .help("Ask to stop with SIGTERM instead of killing"),
        )
        .arg(
            Arg::new("setun")
                .long("setun")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("The program; built in release mode when it is not given"),
        );
    Command::new("xtask")
        .subcommand_required(true)
        .subcommand(crash)
}

/// True if everything held.
fn run(matches: &ArgMatches) -> Result<bool, Box<dyn Error>> {
    let Some(("crash", matches)) = matches.subcommand() else {
        return Err("choose a subcommand".into());
    };
    let number = |name: &str| matches.get_one::<u64>(name).copied().unwrap_or_default();
    let setun = match matches.get_one::<PathBuf>("setun") {
        Some(path) => std::path::absolute(path)?,
        None => build()?,
    };
    crash::crash(&crash::Plan {
        setun,
        kills: number("kills"),
        steps: number("steps"),
        seed: number("seed"),
        term: matches.get_flag("term"),
    })
}

/// Builds the program and returns its path, as cargo states it.
fn build() -> Result<PathBuf, Box<dyn Error>> {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let output = std::process::Command::new(cargo)
        .args(["build", "--release", "--package", "setun"])
        .arg("--message-format=json")
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().rev();
    let mut executables = messages.filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    });
    let built = executables.next();
    built.ok_or_else(|| "the program could not be built".into())
}
