//! AMX: products of 16 x 16 tiles, bf16 and int8.
//!
//! The unit's order of operations is the definition of [`Order::EvenOdd`]
//! (ARCHITECTURE.md, Numbers), so that nothing has to be arranged for equal bits: one
//! instruction takes 32 values of the reduction, an even and an odd chain from zero, and adds
//! their sum to the tile; denormals are zeros of their sign, before and after. Integer sums are exact.
//!
//! Two tiles of rows meet two of columns at a time: four accumulators, and each tile that is
//! loaded serves two instructions. Rust has no stable intrinsics for tiles, so the loops
//! are assembly; no contents of a tile outlive their block. What stays between blocks
//! is the configuration, which [`Tiles`] holds and which no other code in this program touches.
//!
//! [`Order::EvenOdd`]: crate::kernels::product::Order::EvenOdd

pub(super) mod int8;

use super::bf16::{PAIR, Pairs, Strip, TILE, Unit};
use std::arch::asm;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Bytes of a row of a tile.
const ROW_BYTES: usize = 64;
/// Bytes of a tile.
const TILE_BYTES: usize = TILE * ROW_BYTES;

/// Whether the processor has tiles of bf16 and int8 and the system lets this process use them.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        processor_has_tiles() && system_saves_tiles() && permitted() || in_software()
    })
}

/// Whether the tiles are those of `setun-tiles`: for tests, and of no use for anything else.
pub(super) fn in_software() -> bool {
    #[cfg(feature = "software-tiles")]
    return setun_tiles::install();
    #[cfg(not(feature = "software-tiles"))]
    false
}

/// CPUID, leaf 7: AMX-BF16, AMX-TILE, AMX-INT8.
fn processor_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    const WANTED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    let (leaves, _) = __get_cpuid_max(0);
    leaves >= 7 && __cpuid_count(7, 0).edx & WANTED == WANTED
}

/// XCR0: the state of tiles and of their configuration is switched with the thread.
fn system_saves_tiles() -> bool {
    const WANTED: u64 = 1 << 17 | 1 << 18;
    if !std::is_x86_feature_detected!("xsave") {
        return false;
    }
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: XGETBV with register 0 is there, as `xsave` means that the system has
        // switched it on.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: checked above.
    unsafe { xcr0() & WANTED == WANTED }
}

/// Asks Linux for the tiles, once for all threads: their state is large, so a process has
/// to want it.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: this call changes nothing but what the process may do; the kernel keeps all
    // registers but the three named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads (Intel SDM, volume 1, 18.3).
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tiles of this thread, in order of their numbers: sums of the upper rows with the left
/// and the right columns, of the lower rows, the rows themselves, upper and lower, and the
/// columns, left and right.
pub(crate) struct Tiles {
    /// Configured for one thread.
    _here: PhantomData<*mut ()>,
}

/// Eight tiles of 16 rows of 64 bytes.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Tiles {
    /// Configures the tiles of this thread unless they are: whoever calls what needs them again and
    /// again holds them in between.
    ///
    /// # Safety
    /// [`available`] is true.
    pub(super) unsafe fn configure() -> Self {
        if HOLDERS.replace(HOLDERS.get() + 1) == 0 {
            // SAFETY: the processor has tiles, and palette 1 has eight of this size.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly));
            }
        }
        Self { _here: PhantomData }
    }
}

thread_local! {
    /// [`Tiles`] of this thread.
    static HOLDERS: Cell<usize> = const { Cell::new(0) };
}

impl Drop for Tiles {
    fn drop(&mut self) {
        let others = HOLDERS.get() - 1;
        HOLDERS.set(others);
        if others == 0 {
            // SAFETY: a `Tiles` exists only where the processor has tiles. From here on the
            // system need not keep them when it switches threads.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}

impl Unit for Tiles {
    const PAIRS: Pairs = Pairs::Neighbours;

    unsafe fn start() -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::configure() }
    }

    unsafe fn multiply(&self, strip: Strip) {
        let panel = strip.depth * TILE_BYTES;
        // SAFETY: the caller's promise; loads and stores need no alignment. The block reads and
        // writes what the pointers lead to, moves on by whole panels, and names all registers
        // that it changes.
        unsafe {
            asm!(
                "2:",
                "tileloadd tmm0, [{c} + 1*{stride}]",
                "tileloadd tmm1, [{c} + 1*{stride} + 64]",
                "tileloadd tmm2, [{low} + 1*{stride}]",
                "tileloadd tmm3, [{low} + 1*{stride} + 64]",
                "mov {k}, {depth}",
                "3:",
                "tileloadd tmm6, [{b} + 1*{row}]",
                "tileloadd tmm4, [{a} + 1*{row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "lea {at}, [{b} + {panel}]",
                "tileloadd tmm7, [{at} + 1*{row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "lea {at}, [{a} + {panel}]",
                "tileloadd tmm5, [{at} + 1*{row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 1024",
                "add {b}, 1024",
                "dec {k}",
                "jnz 3b",
                "tilestored [{c} + 1*{stride}], tmm0",
                "tilestored [{c} + 1*{stride} + 64], tmm1",
                "tilestored [{low} + 1*{stride}], tmm2",
                "tilestored [{low} + 1*{stride} + 64], tmm3",
                "sub {a}, {panel}",
                "add {b}, {panel}",
                "add {c}, 128",
                "add {low}, 128",
                "dec {pairs}",
                "jnz 2b",
                a = inout(reg) strip.left => _,
                b = inout(reg) strip.right => _,
                c = inout(reg) strip.sums => _,
                low = inout(reg) strip.sums.wrapping_add(TILE * strip.stride) => _,
                stride = in(reg) 4 * strip.stride,
                row = in(reg) ROW_BYTES,
                depth = in(reg) strip.depth,
                panel = in(reg) panel,
                pairs = inout(reg) strip.pairs => _,
                k = out(reg) _,
                at = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

/// Rows of bytes for [`int8_dots`]: a tile's rows are `row` bytes apart, the tiles of
/// the next 64 values of the reduction `step` bytes.
#[derive(Clone, Copy)]
struct Bytes {
    /// The upper or left tile, and the lower or right one.
    tiles: [*const u8; 2],
    row: usize,
    step: usize,
}

/// Integer sums of 32 rows and 32 columns.
#[repr(align(64))]
struct Dots([[i32; PAIR]; PAIR]);

/// `dots = left * right` over `64 * depth` values of the reduction, at least 64. Without `LOWER`
/// of the upper rows only.
///
/// # Safety
/// The pointers lead to that many tiles of 16 rows; those of `right` hold 16 times four values
/// of each of 16 columns.
unsafe fn int8_dots<const LOWER: bool>(
    tiles: &Tiles,
    left: Bytes,
    right: Bytes,
    depth: usize,
    dots: &mut Dots,
) {
    // SAFETY: the caller's promise, which is that of both.
    unsafe {
        if LOWER {
            int8_dots_of_two(tiles, left, right, depth, dots);
        } else {
            int8_dots_of_one(tiles, left, right, depth, dots);
        }
    }
}

/// # Safety
/// As [`int8_dots`].
unsafe fn int8_dots_of_two(_: &Tiles, left: Bytes, right: Bytes, depth: usize, dots: &mut Dots) {
    let sums = dots.0.as_mut_ptr();
    // SAFETY: the caller's promise; `dots` has 32 rows of 128 bytes. The block names all
    // registers that it changes.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{b0} + 1*{b_row}]",
            "tileloadd tmm4, [{a0} + 1*{a_row}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + 1*{b_row}]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + 1*{a_row}]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            "add {a0}, {a_step}",
            "add {a1}, {a_step}",
            "add {b0}, {b_step}",
            "add {b1}, {b_step}",
            "dec {k}",
            "jnz 2b",
            "mov {k:e}, 128",
            "tilestored [{sums} + 1*{k}], tmm0",
            "tilestored [{sums} + 1*{k} + 64], tmm1",
            "tilestored [{sums} + 1*{k} + 2048], tmm2",
            "tilestored [{sums} + 1*{k} + 2112], tmm3",
            a0 = inout(reg) left.tiles[0] => _,
            a1 = inout(reg) left.tiles[1] => _,
            b0 = inout(reg) right.tiles[0] => _,
            b1 = inout(reg) right.tiles[1] => _,
            a_row = in(reg) left.row,
            b_row = in(reg) right.row,
            a_step = in(reg) left.step,
            b_step = in(reg) right.step,
            k = inout(reg) depth => _,
            sums = in(reg) sums,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

/// # Safety
/// As [`int8_dots`].
unsafe fn int8_dots_of_one(_: &Tiles, left: Bytes, right: Bytes, depth: usize, dots: &mut Dots) {
    let sums = dots.0.as_mut_ptr();
    // SAFETY: as in `int8_dots_of_two`.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{a} + 1*{a_row}]",
            "tileloadd tmm6, [{b0} + 1*{b_row}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + 1*{b_row}]",
            "tdpbssd tmm1, tmm4, tmm7",
            "add {a}, {a_step}",
            "add {b0}, {b_step}",
            "add {b1}, {b_step}",
            "dec {k}",
            "jnz 2b",
            "mov {k:e}, 128",
            "tilestored [{sums} + 1*{k}], tmm0",
            "tilestored [{sums} + 1*{k} + 64], tmm1",
            a = inout(reg) left.tiles[0] => _,
            b0 = inout(reg) right.tiles[0] => _,
            b1 = inout(reg) right.tiles[1] => _,
            a_row = in(reg) left.row,
            b_row = in(reg) right.row,
            a_step = in(reg) left.step,
            b_step = in(reg) right.step,
            k = inout(reg) depth => _,
            sums = in(reg) sums,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

/// [`peak::int8`](super::peak::int8) on one thread; returns the multiply-adds.
///
/// # Safety
/// [`available`] is true.
pub(super) unsafe fn int8_rounds(rounds: usize) -> f64 {
    // SAFETY: the caller's promise; tiles only.
    unsafe {
        let _tiles = Tiles::configure();
        asm!(
            "tilezero tmm4",
            "tilezero tmm5",
            "tilezero tmm6",
            "tilezero tmm7",
            "2:",
            "tdpbssd tmm0, tmm4, tmm6",
            "tdpbssd tmm1, tmm4, tmm7",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            "dec {k}",
            "jnz 2b",
            k = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem)
        );
    }
    (rounds.max(1) * 4 * TILE * TILE * ROW_BYTES) as f64
}

/// [`peak::bf16`](super::peak::bf16) on one thread; returns the multiply-adds.
///
/// # Safety
/// [`available`] is true.
pub(super) unsafe fn bf16_rounds(rounds: usize) -> f64 {
    // SAFETY: as in `int8_rounds`.
    unsafe {
        let _tiles = Tiles::configure();
        asm!(
            "tilezero tmm4",
            "tilezero tmm5",
            "tilezero tmm6",
            "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {k}",
            "jnz 2b",
            k = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem)
        );
    }
    (rounds.max(1) * 4 * TILE * TILE * ROW_BYTES / 2) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that look random, in `-range..=range`.
    fn bytes(seed: usize, n: usize, range: usize) -> Vec<i8> {
        let value = |i: usize| ((i + seed) * 7919 % 1009 % (2 * range + 1)) as i32 - range as i32;
        (0..n).map(|i| value(i) as i8).collect()
    }

    #[test]
    fn dots_of_bytes_are_exact() {
        if !available() {
            return;
        }
        let (a, b) = (bytes(3, 32 * 128, 127), bytes(5, 32 * 128, 1));
        // Sixteen times four values of each of 16 columns.
        let mut turned = vec![0i8; b.len()];
        for (i, &x) in b.iter().enumerate() {
            let (column, k) = (i / 128, i % 128);
            let (half, tile) = (column / TILE, k / ROW_BYTES);
            let at = k % ROW_BYTES / 4 * ROW_BYTES + column % TILE * 4 + k % 4;
            turned[(half * 2 + tile) * TILE_BYTES + at] = x;
        }
        for rows in [TILE, PAIR] {
            let mut dots = Dots([[i32::MIN; PAIR]; PAIR]);
            let (left, right) = (a.as_ptr().cast::<u8>(), turned.as_ptr().cast::<u8>());
            let left = Bytes {
                tiles: [left, left.wrapping_add(TILE * 128)],
                row: 128,
                step: ROW_BYTES,
            };
            let right = Bytes {
                tiles: [right, right.wrapping_add(2 * TILE_BYTES)],
                row: ROW_BYTES,
                step: TILE_BYTES,
            };
            // SAFETY: there is AMX; 32 rows and columns of 128 bytes.
            unsafe {
                let tiles = Tiles::configure();
                if rows > TILE {
                    int8_dots::<true>(&tiles, left, right, 2, &mut dots);
                } else {
                    int8_dots::<false>(&tiles, left, right, 2, &mut dots);
                }
            }
            for (i, dots) in dots.0.iter().enumerate().take(rows) {
                for (j, &dot) in dots.iter().enumerate() {
                    let pairs = a[i * 128..][..128].iter().zip(&b[j * 128..][..128]);
                    let expected: i32 = pairs.map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
                    assert_eq!(dot, expected, "row {i} of {rows}, column {j}");
                }
            }
        }
    }
}
