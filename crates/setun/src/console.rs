//! Progress: a bar on a terminal, plain lines elsewhere. Both on standard error.

use indicatif::{ProgressBar, ProgressStyle};
use setun_train::run::Observer;
use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Time between plain lines of one stage.
const QUIET: Duration = Duration::from_secs(15);

/// Prints to standard output. A closed pipe is no failure: its reader, such as `head`, has
/// what it wanted.
///
/// # Errors
/// Any other answer of the operating system, such as a full disk.
pub fn print(text: Arguments<'_>) -> io::Result<()> {
    print_to_reader(text).map(|_| ())
}

/// [`print`]; break where the pipe is closed, so that nobody reads what follows.
///
/// # Errors
/// As there.
pub fn print_to_reader(text: Arguments<'_>) -> io::Result<ControlFlow<()>> {
    let mut out = io::stdout();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(e) => {
            let message = format!("cannot write to standard output: {e}");
            Err(io::Error::new(e.kind(), message))
        }
        Ok(()) => Ok(ControlFlow::Continue(())),
    }
}

/// Prints a line to standard error; that it cannot be shown stops no work.
pub fn tell(line: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Shows the progress of long work.
pub struct Console {
    bar: Option<ProgressBar>,
    stage: String,
    last_line: Option<Instant>,
    terminal: bool,
}

impl Console {
    /// Looks whether standard error is a terminal.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            bar: None,
            stage: String::new(),
            last_line: None,
            terminal,
        }
    }

    fn bar(&mut self, stage: &str, total: u64) -> &ProgressBar {
        if self.stage != stage {
            self.clear();
            self.stage = stage.to_owned();
        }
        self.bar.get_or_insert_with(|| {
            let template = "{prefix} [{bar:30}] {pos}/{len} {elapsed}<{eta}  {msg}";
            let style = ProgressStyle::with_template(template);
            let bar = ProgressBar::new(total);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(stage.to_owned());
            bar
        })
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Observer for Console {
    fn message(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| tell(format_args!("{text}"))),
            None => tell(format_args!("{text}")),
        }
    }

    fn progress(&mut self, stage: &str, done: u64, total: u64, detail: &str) {
        if self.terminal {
            let bar = self.bar(stage, total);
            bar.set_message(detail.to_owned());
            bar.set_position(done);
            if done >= total {
                self.clear();
            }
            return;
        }
        let fresh = self.stage != stage;
        let due = self.last_line.is_none_or(|last| last.elapsed() >= QUIET);
        if fresh || due || done == total {
            self.stage = stage.to_owned();
            self.last_line = Some(Instant::now());
            tell(format_args!("{stage}: {done}/{total} {detail}"));
        }
    }
}
