//! `setun convert` and `setun inspect`.

use crate::args::{ConvertArgs, InspectArgs};
use crate::console::{self, Console};
use crate::environment::Environment;
use crate::{CommandResult, Outcome};
use setun_io::{ConvertOptions, ConvertSummary, IoError, convert as convert_model};
use setun_train::run::Observer;
use std::error::Error;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

/// Weights between two updates of the progress bar.
const PROGRESS_WEIGHTS: u64 = 1 << 22;

/// `setun convert`
pub fn convert(args: ConvertArgs, _: &Environment) -> CommandResult {
    let model = super::open(&args.input, args.checkpoint)?;
    let options = ConvertOptions {
        ternarize: args.ternarize,
        allow_lossy: args.lossy,
        max_shard_bytes: args.shard_bytes as u64,
        ..ConvertOptions::new(args.format)
    };
    let stop = super::stop_on_signal("stopping; once more to stop at once")?;
    let mut console = Console::new();
    let mut shown = 0;
    let converted = convert_model(&model, &args.output, &options, &mut |done, total| {
        if done == total || done - shown >= PROGRESS_WEIGHTS {
            shown = done;
            console.progress("converting", done, total, "weights");
        }
        match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    drop(console);
    let summary = match converted {
        Err(stopped @ IoError::Stopped) => {
            console::tell(format_args!("{stopped}"));
            return Ok(Outcome::Stopped);
        }
        converted => converted?,
    };
    for note in &summary.notes {
        console::tell(format_args!("note: {note}"));
    }
    print_summary(&summary)?;
    Ok(Outcome::Success)
}

fn print_summary(summary: &ConvertSummary) -> Result<(), Box<dyn Error>> {
    let bits = match setun_io::inspect(&summary.path)?.bits_per_weight() {
        Some(bits) => format!("{bits:.3} bits per weight"),
        None => "no weights".to_owned(),
    };
    let kind = match &summary.ternary {
        None => "float weights".to_owned(),
        Some(ternary) => format!(
            "ternary, group size {}, numerics {}",
            ternary.group_size,
            ternary.numerics.name()
        ),
    };
    say!(
        "{}: {} weights, {bits}, {} bytes in all, {kind}",
        summary.path.display(),
        summary.num_weights,
        summary.num_bytes,
    );
    Ok(())
}

/// `setun inspect`
pub fn inspect(args: InspectArgs, _: &Environment) -> CommandResult {
    let inspection = setun_io::inspect(&args.path)?;
    match args.json {
        true => say!("{}", serde_json::to_string_pretty(&inspection)?),
        false => console::print(format_args!("{inspection}"))?,
    }
    Ok(Outcome::Success)
}
