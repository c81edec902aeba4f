//! What machine this is, for the run record.

use crate::report::record::Machine;
use setun_backend::Isa;

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

/// Resident anonymous memory of this process in bytes, where the system tells.
pub fn anonymous_bytes() -> Option<u64> {
    field("/proc/self/status", "RssAnon:")
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
