//! The bad-file museum: every exhibit is a file or a directory with one thing wrong, and
//! must be refused with an error that says where, without a panic, in bounded time and
//! memory.
//!
//! All are built in code. Each room begins with its good files, which must be accepted,
//! so that no exhibit is refused for another reason than its own.

#[path = "museum/checkpoints.rs"]
mod checkpoints;
#[path = "museum/config.rs"]
mod config;
#[path = "museum/exhibit.rs"]
mod exhibit;
#[path = "museum/packed.rs"]
mod packed;
#[path = "museum/safetensors.rs"]
mod safetensors;
#[path = "museum/shards.rs"]
mod shards;
#[path = "museum/specimen.rs"]
mod specimen;
#[path = "museum/tokenizer.rs"]
mod tokenizer;

use exhibit::{Exhibit, Item, Scratch};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Fewest exhibits that the museum promises.
const MIN_EXHIBITS: usize = 120;
/// Longest that a reader may take over one exhibit, in an unoptimized build on a machine
/// that has other things to do. The longest takes about a second.
const MAX_TIME: Duration = Duration::from_secs(20);
/// Most address space that all exhibits together may add to what the good files needed.
const MAX_ADDED_BYTES: u64 = 1 << 30;

/// A room: its name, its good files, its exhibits.
type Room = (&'static str, Vec<Item>, Vec<Exhibit>);

fn rooms() -> Vec<Room> {
    vec![
        ("safetensors", safetensors::good(), safetensors::exhibits()),
        ("config", config::good(), config::exhibits()),
        ("tokenizer", tokenizer::good(), tokenizer::exhibits()),
        ("packed", packed::good(), packed::exhibits()),
        ("shards", shards::good(), shards::exhibits()),
        ("checkpoints", checkpoints::good(), checkpoints::exhibits()),
    ]
}

#[test]
fn every_exhibit_is_refused_with_its_place() {
    let scratch = Scratch::new("museum");
    let rooms = rooms();
    let mut problems = Vec::new();
    for (room, good, _) in &rooms {
        for (i, item) in good.iter().enumerate() {
            if let Err(error) = item.read(&scratch.room()) {
                problems.push(format!("{room}: good file {i} is refused: {error}"));
            }
        }
    }
    let peak_of_the_good = peak_bytes();
    let mut names = BTreeSet::new();
    for (room, _, exhibits) in &rooms {
        for exhibit in exhibits {
            let name = format!("{room}/{}", exhibit.name);
            let shown = catch_unwind(AssertUnwindSafe(|| show(exhibit, &scratch)));
            match shown {
                Ok(Ok(())) => {}
                Ok(Err(problem)) => problems.push(format!("{name} ({}): {problem}", exhibit.wrong)),
                Err(_) => problems.push(format!("{name} ({}): a panic", exhibit.wrong)),
            }
            assert!(names.insert(name.clone()), "two exhibits are called {name}");
        }
    }
    if let (Some(before), Some(after)) = (peak_of_the_good, peak_bytes()) {
        let added = after - before;
        assert!(added < MAX_ADDED_BYTES, "the exhibits took {added} bytes");
    }
    let num_exhibits = names.len();
    println!("{num_exhibits} exhibits");
    assert!(num_exhibits >= MIN_EXHIBITS, "only {num_exhibits} exhibits");
    let list = problems.join("\n");
    assert!(problems.is_empty(), "{} problems:\n{list}", problems.len());
}

/// Shows one exhibit to its readers; says what was wrong with their answer.
fn show(exhibit: &Exhibit, scratch: &Scratch) -> Result<(), String> {
    let start = Instant::now();
    let answer = exhibit.item.read(&scratch.room());
    let elapsed = start.elapsed();
    let Err(message) = answer else {
        return Err("accepted".to_owned());
    };
    if let Some(word) = exhibit.words.iter().find(|word| !message.contains(*word)) {
        return Err(format!("{word:?} is not in: {message}"));
    }
    if message.len() > 4000 {
        return Err(format!("an error of {} bytes", message.len()));
    }
    if elapsed > MAX_TIME {
        return Err(format!("took {elapsed:?}"));
    }
    Ok(())
}

/// The most address space that this process has had, where the system says so.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmPeak:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
