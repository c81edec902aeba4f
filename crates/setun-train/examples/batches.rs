//! Writes the batches of a run as other programs can read them: for each step the inputs
//! `[batch_size, seq_len]` and then the targets, 32-bit little-endian numbers.
//!
//!     cargo run --release -p setun-train --example batches -- RUN STEPS OUT

use setun_io::OpenModel;
use setun_train::prepare::prepare;
use setun_train::run::Observer;
use setun_train::settings::Settings;
use std::io::Write;
use std::path::Path;

/// Tells nobody.
struct Quiet;

impl Observer for Quiet {
    fn message(&mut self, _: &str) {}
    fn progress(&mut self, _: &str, _: u64, _: u64, _: &str) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, steps, out] = arguments.as_slice() else {
        return Err("usage: batches RUN STEPS OUT".into());
    };
    let settings = Settings::load_run(Path::new(run), &[])?;
    let init = settings.model.init_from.as_deref();
    let init = init.map(OpenModel::open).transpose()?;
    let batches = prepare(&settings, init.as_ref(), settings.output(), &mut Quiet)?.batches;
    let mut file = std::io::BufWriter::new(std::fs::File::create(out)?);
    let mut inputs = vec![0; batches.targets_per_batch()];
    let mut targets = inputs.clone();
    for step in 0..steps.parse()? {
        batches.fill(step, &mut inputs, &mut targets)?;
        file.write_all(bytemuck::cast_slice(&inputs))?;
        file.write_all(bytemuck::cast_slice(&targets))?;
    }
    Ok(file.flush()?)
}
