//! Loops that reach what a machine can do at most: the denominators of a benchmark.
//!
//! They know no clock; each says how much work it did, and the caller takes the time.

use super::{Isa, Pool, multiversion};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

/// Independent chains, so that the latency of an operation is hidden.
const CHAINS: usize = 12;
/// Lanes of a chain in the portable loop.
const LANES: usize = 8;
/// Values that a task of [`read`] takes.
const RUN: usize = 1 << 16;

/// `rounds` rounds of independent f32 multiply-adds in registers on every thread; returns
/// their number in all.
pub fn fma(pool: &Pool, isa: Isa, rounds: usize) -> f64 {
    on_every_thread(pool, &|| fma_rounds(isa, rounds))
}

/// `rounds` rounds of independent multiply-adds of bf16 values as the bf16 products do them: on
/// a unit for it, where there is one, else as [`fma`]; returns their number in all.
pub fn bf16(pool: &Pool, isa: Isa, rounds: usize) -> f64 {
    on_every_thread(pool, &|| bf16_rounds(isa, rounds))
}

fn bf16_rounds(isa: Isa, rounds: usize) -> f64 {
    // SAFETY: an `Isa` that has a unit for bf16 is made by `Isa::available` only, where the
    // processor has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        match isa {
            Isa::Amx => return super::amx::bf16_rounds(rounds),
            Isa::Avx512Bf16 => return super::bf16::rounds(rounds),
            _ => {}
        }
    }
    fma_rounds(isa, rounds)
}

/// `rounds` rounds of independent products of bytes, summed in pairs as the int8 kernels
/// do, in registers on every thread; returns the number of multiply-adds in all.
pub fn int8(pool: &Pool, isa: Isa, rounds: usize) -> f64 {
    on_every_thread(pool, &|| int8_rounds(isa, rounds))
}

/// Reads `values` once, shared by the threads; returns a digest, so that nothing of it can
/// be left out.
pub fn read(pool: &Pool, isa: Isa, values: &[u64]) -> u64 {
    let digest = AtomicU64::new(0);
    pool.run(values.len().div_ceil(RUN), &|task, _| {
        let end = values.len().min((task + 1) * RUN);
        let part = fold(isa, &values[task * RUN..end]);
        digest.fetch_xor(part, Ordering::Relaxed);
    });
    digest.into_inner()
}

fn on_every_thread(pool: &Pool, rounds: &(dyn Fn() -> f64 + Sync)) -> f64 {
    // Several tasks each, so that a thread that starts late does not hold up the others.
    const TASKS: usize = 8;
    let tasks = TASKS * pool.threads();
    let work = std::sync::Mutex::new(0.0);
    pool.run(tasks, &|_, _| {
        let done = rounds();
        *work.lock().expect("no panic while the lock is held") += done;
    });
    work.into_inner().expect("no panic while the lock is held")
}

fn fma_rounds(isa: Isa, rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: an `Isa` that has AVX2 or AVX-512 is made by `Isa::available` only, after CPUID
        // has shown it.
        return unsafe {
            if isa.has_avx512() {
                super::avx512::fma_rounds(rounds)
            } else {
                super::avx2::fma_rounds(rounds)
            }
        };
    }
    let _ = isa;
    let (a, b) = (black_box(0.999f32), black_box(1e-3f32));
    let mut chains = [[1.0f32; LANES]; CHAINS];
    for _ in 0..rounds {
        for x in chains.as_flattened_mut() {
            *x = x.mul_add(a, b);
        }
    }
    black_box(chains);
    (rounds * CHAINS * LANES) as f64
}

fn int8_rounds(isa: Isa, rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: an `Isa` that has AVX2, AVX-512 or AMX is made by `Isa::available` only, after
        // CPUID has shown it.
        return unsafe {
            match isa {
                Isa::Amx => super::amx::int8_rounds(rounds),
                _ if isa.has_avx512() => super::avx512::int8_rounds(rounds),
                _ => super::avx2::int8_rounds(rounds),
            }
        };
    }
    let _ = isa;
    let (a, b) = (black_box(3i8), black_box(1i8));
    let mut chains = [[0i32; LANES]; CHAINS];
    for _ in 0..rounds {
        for x in chains.as_flattened_mut() {
            *x = x.wrapping_add(i32::from(black_box(a)) * i32::from(b));
        }
    }
    black_box(chains);
    (rounds * CHAINS * LANES) as f64
}

multiversion! {
    /// XOR of all values.
    fn fold[][](values: &[u64]) -> u64 = fold_kernel;
}

#[inline(always)]
fn fold_kernel(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let mut chunks = values.chunks_exact(32);
    for chunk in &mut chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane ^= x;
        }
    }
    let rest = chunks.remainder().iter();
    rest.chain(&lanes).fold(0, |all, x| all ^ x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_values_are_read_on_any_number_of_threads() {
        let values: Vec<u64> = (0..3 * RUN as u64 + 77).map(|i| i * i + 1).collect();
        let expected = values.iter().fold(0, |all, x| all ^ x);
        for isa in Isa::available() {
            for threads in [1, 3] {
                assert_eq!(read(&Pool::new(threads), isa, &values), expected);
            }
        }
    }

    #[test]
    fn the_work_grows_with_rounds_and_threads() {
        for isa in Isa::available() {
            for count in [fma, int8] {
                let one = count(&Pool::new(1), isa, 10);
                assert!(one > 0.0);
                assert_eq!(count(&Pool::new(2), isa, 30), 6.0 * one);
            }
        }
    }
}
