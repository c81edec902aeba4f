//! The tile unit of AMX in software, for tests on processors that have none.
//!
//! A processor without AMX raises an exception at each of its instructions, which Linux hands to
//! the process as SIGILL. After [`install`] a handler reads the instruction where it lies,
//! does it as Intel's manual says, on tiles that belong to the thread, and goes on behind it.
//! So the program that is tested is the program that ships: its encodings, its addresses, its
//! configuration, the state of each thread, and the instructions of every other kind between
//! them, which run natively.
//!
//! An instruction takes microseconds; no timing says anything about AMX. [`counts`] does: how
//! many dots, loads and stores a product takes.
//!
//! What the manual makes an exception (a shape that does not fit, tiles without a
//! configuration) ends the process with a message.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod decode;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod trap;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit;

/// Instructions done so far, by all threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// LDTILECFG.
    pub configurations: u64,
    /// TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD.
    pub dots_int8: u64,
    /// TDPBF16PS.
    pub dots_bf16: u64,
    /// TILELOADD, TILELOADDT1.
    pub loads: u64,
    /// TILESTORED.
    pub stores: u64,
}

/// From here on this process can execute the instructions of AMX-TILE, AMX-INT8 and AMX-BF16, in
/// software. False, and nothing is done, where the processor has tiles itself, or where that does
/// not work: it needs Linux on x86-64 with AVX2 and FMA.
pub fn install() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return trap::install();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Instructions done so far.
pub fn counts() -> Counts {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return trap::counts();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    Counts::default()
}
