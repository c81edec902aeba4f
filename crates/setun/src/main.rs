//! The command line: reads arguments and the environment, calls the library, prints.
//!
//! Exit codes: 0 for success, 1 for a failed check or a failure on the way, 2 for
//! wrong usage (arguments, settings or environment), 130 for work that was asked to stop.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod console;
mod environment;
mod flags;

use std::error::Error;
use std::process::ExitCode;

use setun_train::settings::SettingsError;

use args::Command;
use environment::Environment;

/// How a command ended when nothing went wrong on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what was asked.
    Success,
    /// It ran to its end and found that a check does not hold; it has printed which.
    CheckFailed,
    /// It was asked to stop, and did, with something left to do.
    Stopped,
}

/// What a command returns.
pub type CommandResult = Result<Outcome, Box<dyn Error>>;

/// What the user asked for cannot be: neither an argument nor a setting, which have
/// errors of their own, but the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongUsage(pub String);

impl std::fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for WrongUsage {}

fn main() -> ExitCode {
    let command = match args::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(usage) => {
            // Nothing is left to do if even the message cannot be printed.
            let _ = usage.print();
            return exit_code(usage.exit_code());
        }
    };
    match run(command, &Environment::of_process()) {
        Ok(Outcome::Success) => ExitCode::SUCCESS,
        Ok(Outcome::CheckFailed) => ExitCode::FAILURE,
        // As a shell has it for what an interrupt ended.
        Ok(Outcome::Stopped) => exit_code(130),
        Err(error) => {
            console::tell(format_args!("error: {}", with_sources(error.as_ref())));
            let usage = error.is::<SettingsError>() || error.is::<WrongUsage>();
            exit_code(if usage { 2 } else { 1 })
        }
    }
}

fn run(command: Command, environment: &Environment) -> CommandResult {
    match command {
        Command::Train(args) => commands::train(args, environment),
        Command::Verify(args) => commands::verify(args, environment),
        Command::Generate(args) => commands::generate(args, environment),
        Command::Eval(args) => commands::eval(args, environment),
        Command::Tokenize(args) => commands::tokenize(args, environment),
        Command::TokenizerTrain(args) => commands::tokenizer_train(args, environment),
        Command::TokenizerShow(args) => commands::tokenizer_show(args, environment),
        Command::Convert(args) => commands::convert(args, environment),
        Command::Inspect(args) => commands::inspect(args, environment),
        Command::Report(args) => commands::report(args, environment),
        Command::Compare(args) => commands::compare(args, environment),
        Command::Sweep(args) => commands::sweep(args, environment),
        Command::Bench(args) => commands::bench(args, environment),
    }
}

/// The message of an error and of its causes, without those that it already quotes.
fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        source = cause.source();
    }
    text
}

fn exit_code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Layered(&'static str, Option<Box<Layered>>);

    impl std::fmt::Display for Layered {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layered {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn causes_are_named_once() {
        let cause = Layered("disk full", None);
        let quoting = Layered("cannot write a: disk full", Some(Box::new(cause)));
        let silent = Layered("checkpoint failed", Some(Box::new(quoting)));
        assert_eq!(
            with_sources(&silent),
            "checkpoint failed: cannot write a: disk full"
        );
    }
}
