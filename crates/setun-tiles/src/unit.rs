//! Tiles and what is done with them (Intel SDM, volume 1, chapter 18, and the entries of the
//! instructions in volume 2).

use crate::decode::{Instruction, Numbers, Rows};
use std::arch::asm;

/// Rows of a tile, at most.
const ROWS: usize = 16;
/// Bytes of a row, at most.
const ROW_BYTES: usize = 64;
/// Tiles of palette 1.
const TILES: usize = 8;
/// Numbers of 32 bits in a row.
const LANES: usize = ROW_BYTES / 4;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([[u8; ROW_BYTES]; ROWS]);

/// The tiles of a thread and their configuration, as it lies in memory; all zeros before there is one.
pub(crate) struct Unit {
    config: [u8; 64],
    tiles: [Tile; TILES],
}

/// Why the processor would raise an exception.
type Fault = &'static str;

impl Unit {
    pub(crate) const NEW: Self = Self {
        config: [0; 64],
        tiles: [Tile([[0; ROW_BYTES]; ROWS]); TILES],
    };

    /// Does one instruction.
    ///
    /// # Errors
    /// What the processor would object to.
    ///
    /// # Safety
    /// What the instruction reads and writes in memory is the program's to read and write. The
    /// processor has AVX2 and FMA.
    pub(crate) unsafe fn run(&mut self, instruction: Instruction) -> Result<(), Fault> {
        // SAFETY: the caller's promise.
        unsafe {
            match instruction {
                Instruction::Configure(at) => return self.configure(*(at as *const [u8; 64])),
                Instruction::SaveConfiguration(at) => *(at as *mut [u8; 64]) = self.config,
                Instruction::Release => *self = Self::NEW,
                Instruction::Zero(tile) => {
                    self.size(tile)?;
                    self.tiles[tile] = Self::NEW.tiles[0];
                }
                Instruction::Load(tile, rows) => return self.load(tile, rows),
                Instruction::Store(tile, rows) => return self.store(tile, rows),
                Instruction::Dot { numbers, tiles } => return self.dot(numbers, tiles),
            }
        }
        Ok(())
    }

    fn configure(&mut self, config: [u8; 64]) -> Result<(), Fault> {
        *self = Self::NEW;
        match config[0] {
            0 => return Ok(()),
            1 => {}
            _ => return Err("LDTILECFG: a palette that there is not"),
        }
        if config[1] != 0 {
            return Err("LDTILECFG: a start row, which only an interrupted load has");
        }
        if config[2..16].iter().any(|&byte| byte != 0) {
            return Err("LDTILECFG: reserved bytes that are not zero");
        }
        self.config = config;
        for tile in 0..ROWS {
            let (rows, bytes) = self.stored_size(tile);
            if rows > ROWS || bytes > ROW_BYTES || (rows == 0) != (bytes == 0) {
                return Err("LDTILECFG: a tile of an impossible size");
            }
            if tile >= TILES && rows > 0 {
                return Err("LDTILECFG: a tile that there is not");
            }
        }
        Ok(())
    }

    fn stored_size(&self, tile: usize) -> (usize, usize) {
        let bytes = [self.config[16 + 2 * tile], self.config[17 + 2 * tile]];
        let rows = self.config[48 + tile];
        (usize::from(rows), usize::from(u16::from_le_bytes(bytes)))
    }

    /// Rows of a tile and bytes of a row.
    fn size(&self, tile: usize) -> Result<(usize, usize), Fault> {
        match self.stored_size(tile) {
            (0, _) => Err("a tile that is not configured on this thread"),
            size => Ok(size),
        }
    }

    /// # Safety
    /// The rows are there.
    unsafe fn load(&mut self, tile: usize, from: Rows) -> Result<(), Fault> {
        let (rows, bytes) = self.size(tile)?;
        self.tiles[tile] = Self::NEW.tiles[0];
        for (i, row) in self.tiles[tile].0.iter_mut().enumerate().take(rows) {
            let start = from.start.wrapping_add(from.stride.wrapping_mul(i as u64));
            // SAFETY: the caller's promise; a tile row has 64 bytes.
            unsafe { std::ptr::copy_nonoverlapping(start as *const u8, row.as_mut_ptr(), bytes) };
        }
        Ok(())
    }

    /// # Safety
    /// The rows are there, and nobody else uses them.
    unsafe fn store(&self, tile: usize, to: Rows) -> Result<(), Fault> {
        let (rows, bytes) = self.size(tile)?;
        for (i, row) in self.tiles[tile].0.iter().enumerate().take(rows) {
            let start = to.start.wrapping_add(to.stride.wrapping_mul(i as u64));
            // SAFETY: the caller's promise; a tile row has 64 bytes.
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), start as *mut u8, bytes) };
        }
        Ok(())
    }

    /// # Safety
    /// The processor has AVX2 and FMA.
    unsafe fn dot(&mut self, numbers: Numbers, tiles: [usize; 3]) -> Result<(), Fault> {
        let [c, a, b] = tiles;
        if c == a || a == b || b == c {
            return Err("a dot of tiles that are not three");
        }
        let ((rows, cols), (left_rows, depth), (right_rows, right_cols)) =
            (self.size(c)?, self.size(a)?, self.size(b)?);
        if rows != left_rows || cols != right_cols || depth != 4 * right_rows || cols % 4 != 0 {
            return Err("a dot of tiles whose sizes do not fit");
        }
        let (left, right) = (self.tiles[a], self.tiles[b]);
        let sums = &mut self.tiles[c].0[..rows];
        // SAFETY: the caller's promise. Columns that the right tile lacks are zeros there.
        unsafe {
            match numbers {
                Numbers::Bytes { signed } => dot_bytes(sums, &left, &right, depth / 4, signed),
                Numbers::Bf16 => dot_bf16(sums, &left, &right, depth / 4),
            }
        }
        Ok(())
    }
}

/// `sums[m, n] += sum over k, i < 4 of left[m, 4 * k + i] * right[k, 4 * n + i]`, modulo 2^32.
#[target_feature(enable = "avx2")]
fn dot_bytes(
    sums: &mut [[u8; ROW_BYTES]],
    left: &Tile,
    right: &Tile,
    depth: usize,
    signed: [bool; 2],
) {
    let wide = |byte: u8, signed: bool| match signed {
        true => i32::from(byte as i8),
        false => i32::from(byte),
    };
    // By steps of the reduction, so that columns are neighbours.
    let mut steps = [[0i32; LANES]; ROW_BYTES];
    for (k, row) in right.0.iter().enumerate().take(depth) {
        for (at, &byte) in row.iter().enumerate() {
            steps[4 * k + at % 4][at / 4] = wide(byte, signed[1]);
        }
    }
    for (sums, left) in sums.iter_mut().zip(&left.0) {
        let mut row = [0i32; LANES];
        for (value, bytes) in row.iter_mut().zip(sums.as_chunks().0) {
            *value = i32::from_le_bytes(*bytes);
        }
        for (&byte, step) in left.iter().zip(&steps[..4 * depth]) {
            let value = wide(byte, signed[0]);
            for (sum, &other) in row.iter_mut().zip(step) {
                *sum = sum.wrapping_add(value * other);
            }
        }
        for (value, bytes) in row.iter().zip(sums.as_chunks_mut().0) {
            *bytes = value.to_le_bytes();
        }
    }
}

/// Round to nearest, denormals are zeros before and after, no exceptions: the control register
/// that TDPBF16PS works with, whatever the thread's own is.
static CONTROL: u32 = 0x9fc0;

/// `even = fma(left[m, 2 * k], right[k, 2 * n], even)`, and `odd` likewise, both from zero, one `k`
/// after the other; then `sums[m, n] += even + odd`. `depth` pairs, at least one.
#[target_feature(enable = "avx2,fma")]
fn dot_bf16(sums: &mut [[u8; ROW_BYTES]], left: &Tile, right: &Tile, depth: usize) {
    let mut control = 0u32;
    for (sums, left) in sums.iter_mut().zip(&left.0) {
        for half in [0, ROW_BYTES / 2] {
            // SAFETY: `depth` rows of 64 bytes on the right, as many pairs on the left, and half
            // a row of sums. The control register is as before when the block ends, and the block
            // names all others that it changes.
            unsafe {
                asm!(
                    "stmxcsr [{control}]",
                    "ldmxcsr [{wanted}]",
                    "vpxor {even}, {even}, {even}",
                    "vpxor {odd}, {odd}, {odd}",
                    "vpcmpeqd {upper}, {upper}, {upper}",
                    "vpslld {upper}, {upper}, 16",
                    "2:",
                    "vpbroadcastd {a}, [{left}]",
                    "vmovdqu {b}, [{right}]",
                    "vpslld {a_even}, {a}, 16",
                    "vpslld {b_even}, {b}, 16",
                    "vpand {a}, {a}, {upper}",
                    "vpand {b}, {b}, {upper}",
                    "vfmadd231ps {even}, {a_even}, {b_even}",
                    "vfmadd231ps {odd}, {a}, {b}",
                    "add {left}, 4",
                    "add {right}, 64",
                    "dec {k}",
                    "jnz 2b",
                    "vaddps {even}, {even}, {odd}",
                    "vmovups {a}, [{sums}]",
                    "vaddps {a}, {a}, {even}",
                    "vmovups [{sums}], {a}",
                    "ldmxcsr [{control}]",
                    control = in(reg) &raw mut control,
                    wanted = in(reg) &raw const CONTROL,
                    left = inout(reg) left.as_ptr() => _,
                    right = inout(reg) right.0.as_ptr().cast::<u8>().add(half) => _,
                    sums = in(reg) sums.as_mut_ptr().add(half),
                    k = inout(reg) depth => _,
                    even = out(ymm_reg) _,
                    odd = out(ymm_reg) _,
                    upper = out(ymm_reg) _,
                    a = out(ymm_reg) _,
                    b = out(ymm_reg) _,
                    a_even = out(ymm_reg) _,
                    b_even = out(ymm_reg) _,
                    options(nostack)
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tiles of so many rows and bytes.
    fn config(tiles: &[(u8, u16)]) -> [u8; 64] {
        let mut config = [0; 64];
        config[0] = 1;
        for (i, (rows, bytes)) in tiles.iter().enumerate() {
            config[48 + i] = *rows;
            config[16 + 2 * i..][..2].copy_from_slice(&bytes.to_le_bytes());
        }
        config
    }

    #[test]
    fn what_the_processor_would_refuse_is_refused() {
        let mut unit = Unit::NEW;
        let (mut palette, mut reserved, mut started) = ([0; 64], config(&[]), config(&[]));
        (palette[0], reserved[9], started[1]) = (2, 1, 1);
        let mut ninth = config(&[]);
        (ninth[32], ninth[56]) = (4, 1);
        let sizes = [(17, 64), (16, 65), (0, 4), (4, 0)].map(|size| config(&[size]));
        let bad = [palette, reserved, started, ninth];
        for config in bad.iter().chain(&sizes) {
            assert!(unit.configure(*config).is_err(), "{config:?}");
        }
        unit.configure(config(&[(3, 20), (3, 8), (2, 20)])).unwrap();
        let dot = |unit: &mut Unit, tiles: [usize; 3]| {
            if !std::is_x86_feature_detected!("avx2") || !std::is_x86_feature_detected!("fma") {
                return unit.size(tiles[0]).map(|_| ());
            }
            // SAFETY: there are AVX2 and FMA.
            unsafe { unit.dot(Numbers::Bf16, tiles) }
        };
        assert_eq!(dot(&mut unit, [0, 1, 2]), Ok(()));
        for tiles in [
            [0, 2, 1],
            [0, 1, 1],
            [0, 0, 2],
            [1, 1, 2],
            [0, 1, 3],
            [3, 4, 5],
        ] {
            assert!(dot(&mut unit, tiles).is_err(), "{tiles:?}");
        }
        assert!(unit.size(7).is_err());
    }
}
