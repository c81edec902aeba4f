//! What machine this is, for the run record.

use crate::TrainError;
use crate::report::record::Machine;
use setun_backend::Isa;
use std::time::Instant;

/// Number of threads to use for a setting, where 0 stands for all cores.
pub fn threads(setting: usize) -> usize {
    match setting {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

/// Facts about this machine.
pub fn describe(isa: Isa, threads: usize) -> Machine {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let cpu = model
        .and_then(|line| line.split(": ").nth(1))
        .unwrap_or(std::env::consts::ARCH);
    Machine {
        cpu: cpu.trim().to_owned(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: field("/proc/meminfo", "MemTotal:").unwrap_or(0),
        os: std::env::consts::OS.to_owned(),
        isa: isa.name().to_owned(),
        threads,
    }
}

/// Memory that programs may still take, swap included, in bytes, where the system tells; in a
/// container at most its limit.
pub fn free_bytes() -> Option<u64> {
    let free = field("/proc/meminfo", "MemAvailable:")?;
    let swap = field("/proc/meminfo", "SwapFree:").unwrap_or(0);
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse().ok());
    Some((free + swap).min(limit.unwrap_or(u64::MAX)))
}

/// Refuses a training for which the memory is not there: the system would end it later,
/// without a word.
pub(crate) fn check_memory(needed: u64, free: Option<u64>) -> Result<(), TrainError> {
    let Some(free) = free.filter(|&free| free < needed) else {
        return Ok(());
    };
    Err(TrainError::refused(format!(
        "training needs {} MiB of memory, and {} MiB are free: lower train.micro_batch_size, \
         eval.batch_size or train.seq_len, or set train.recompute = true or \
         train.optimizer_state = \"bf16\"; setun train --dry-run prints the plan",
        needed >> 20,
        free >> 20
    )))
}

/// Resident anonymous memory of this process in bytes, where the system tells.
pub fn anonymous_bytes() -> Option<u64> {
    field("/proc/self/status", "RssAnon:")
}

/// Largest resident memory of this process since [`reset_peak`], in bytes, where the system
/// tells. Pages of mapped files are part of it, the system's cache of other files is not.
pub fn peak_resident_bytes() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// Begins a new measurement of the peak: a sweep makes many runs in one process. Where the
/// system refuses, the peak is that of the process so far.
pub fn reset_peak() {
    // See proc_pid_clear_refs(5).
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Seconds that a run takes, over all of its sessions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunClock {
    earlier: Option<f64>,
    start: Instant,
}

impl RunClock {
    /// For a session that began at `start`, after `earlier` seconds of others, where those are
    /// known.
    pub fn new(earlier: Option<f64>, start: Instant) -> Self {
        Self { earlier, start }
    }

    /// Up to now.
    pub fn seconds(self) -> Option<f64> {
        let earlier = self.earlier?;
        Some(earlier + self.start.elapsed().as_secs_f64())
    }
}

/// Value of a line such as `MemTotal:  24689764 kB`, in bytes.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Version of this program, with the commit if it was built from one.
pub fn code_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match option_env!("SETUN_COMMIT") {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_owned(),
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    elapsed.map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_training_that_does_not_fit_is_refused() {
        assert!(free_bytes().unwrap() > 1 << 20);
        check_memory(u64::MAX, None).unwrap();
        check_memory(5 << 20, Some(5 << 20)).unwrap();
        let error = check_memory(6 << 20, Some(5 << 20))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("needs 6 MiB") && error.contains("5 MiB are free"),
            "{error}"
        );
    }

    /// What was freed before the end is part of the peak.
    #[test]
    fn the_peak_remembers_what_was_freed() {
        drop(std::hint::black_box(vec![1u8; 128 << 20]));
        let peak = peak_resident_bytes().unwrap();
        // The system counts pages with some delay.
        assert!(peak >= 100 << 20, "{peak}");
    }
}
