//! Trits as digits in base 3, five or four to a byte.
//!
//! Digits are `t + 1`. The first one is the most significant of a number `v` below 243;
//! four digits are followed by a zero. The byte is `v / 243` as a fraction of 256,
//! rounded up: `ceil(256 v / 243)`. So a reader gets digit after digit as what carries
//! out of a multiplication by 3, without a division: digit `n` of byte `b` is
//! `3 (b 3^n mod 256) / 256`, rounded down.
//!
//! The digits of a byte do not belong to neighbours but to weights that are one strip
//! apart.

use super::code_at;

/// Bytes of a block whose digits are spread alike: digit `n` of byte `m` belongs to
/// weight `first_weight + num_bytes * n + m`.
pub(super) struct Strip {
    first_weight: usize,
    num_bytes: usize,
    num_digits: usize,
}

/// The strips of `PTQ1_0`, in the order of their bytes.
pub(super) const PTQ1_0: [Strip; 3] = [strip(0, 16, 5), strip(80, 8, 5), strip(120, 2, 4)];
/// The strips of `TQ1_0`, in the order of their bytes.
pub(super) const TQ1_0: [Strip; 3] = [strip(0, 32, 5), strip(160, 16, 5), strip(240, 4, 4)];

const fn strip(first_weight: usize, num_bytes: usize, num_digits: usize) -> Strip {
    Strip {
        first_weight,
        num_bytes,
        num_digits,
    }
}

/// Digits of a byte: the places of the most significant digit first. [`NO_DIGITS`] for
/// the 13 bytes that [`byte_of`] never gives.
const DIGITS: [[u8; 5]; 256] = digits_table();
const NO_DIGITS: [u8; 5] = [3; 5];

const fn digits_table() -> [[u8; 5]; 256] {
    let mut table = [NO_DIGITS; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut digits = [0u8; 5];
        let mut rest = byte;
        let mut n = 0;
        while n < 5 {
            digits[n] = (rest * 3 / 256) as u8;
            rest = rest * 3 % 256;
            n += 1;
        }
        if byte_of(digits) == byte as u8 {
            table[byte] = digits;
        }
        byte += 1;
    }
    table
}

/// The byte of five digits.
const fn byte_of(digits: [u8; 5]) -> u8 {
    let mut value = 0u16;
    let mut n = 0;
    while n < 5 {
        value = value * 3 + digits[n] as u16;
        n += 1;
    }
    (value * 256).div_ceil(243) as u8
}

/// Writes the codes of a block, none of which is 3, as digits.
pub(super) fn encode(strips: &[Strip], codes: &[u8], mut bytes: &mut [u8]) {
    for strip in strips {
        let (of_strip, rest) = bytes.split_at_mut(strip.num_bytes);
        for (m, byte) in of_strip.iter_mut().enumerate() {
            let mut digits = [0; 5];
            for (n, digit) in digits[..strip.num_digits].iter_mut().enumerate() {
                *digit = code_at(codes, strip.first_weight + strip.num_bytes * n + m);
            }
            *byte = byte_of(digits);
        }
        bytes = rest;
    }
}

/// The inverse of [`encode`]; fails with the first byte that it never writes.
pub(super) fn decode(strips: &[Strip], mut bytes: &[u8], codes: &mut [u8]) -> Result<(), u8> {
    codes.fill(0);
    for strip in strips {
        let (of_strip, rest) = bytes.split_at(strip.num_bytes);
        for (m, &byte) in of_strip.iter().enumerate() {
            let digits = DIGITS[usize::from(byte)];
            let (digits, padding) = digits.split_at(strip.num_digits);
            if digits[0] == NO_DIGITS[0] || padding.iter().any(|&digit| digit != 0) {
                return Err(byte);
            }
            for (n, digit) in digits.iter().enumerate() {
                let weight = strip.first_weight + strip.num_bytes * n + m;
                codes[weight / 4] |= digit << (2 * (weight % 4));
            }
        }
        bytes = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digits of `value`, by division.
    fn digits_of(value: usize) -> [u8; 5] {
        let place = |n: u32| (value / 3usize.pow(4 - n) % 3) as u8;
        [place(0), place(1), place(2), place(3), place(4)]
    }

    #[test]
    fn every_number_has_its_own_byte() {
        let mut seen = [false; 256];
        for value in 0..243 {
            let digits = digits_of(value);
            let byte = byte_of(digits);
            // The rounding of ggml: up, by what is added before the division.
            let expected = (value * 256 + 242).checked_div(243);
            assert_eq!(Some(usize::from(byte)), expected);
            assert_eq!(DIGITS[usize::from(byte)], digits, "{value}");
            assert!(!std::mem::replace(&mut seen[usize::from(byte)], true));
        }
        for (byte, seen) in seen.iter().enumerate() {
            assert_eq!(DIGITS[byte] == NO_DIGITS, !seen, "{byte}");
        }
        // By hand: 22222 in base 3 is 242, and 256 * 242 / 243 = 254.95.
        assert_eq!(byte_of([2; 5]), 255);
        assert_eq!(byte_of([0, 0, 0, 0, 1]), 2);
        assert_eq!(byte_of([1; 5]), 128);
    }

    #[test]
    fn the_multiplication_of_readers_gives_the_same_digits() {
        for value in 0..243 {
            let digits = digits_of(value);
            let byte = byte_of(digits);
            for (n, &digit) in digits.iter().enumerate() {
                let shifted = byte.wrapping_mul(3u8.pow(n as u32));
                let read = (u16::from(shifted) * 3) >> 8;
                assert_eq!(read, u16::from(digit));
            }
        }
    }

    #[test]
    fn strips_cover_every_weight_and_byte_once() {
        for (strips, weights, bytes) in [(&PTQ1_0, 128, 26), (&TQ1_0, 256, 52)] {
            let mut seen = vec![false; weights];
            for strip in strips {
                for i in 0..strip.num_bytes * strip.num_digits {
                    assert!(!std::mem::replace(&mut seen[strip.first_weight + i], true));
                }
            }
            assert!(seen.iter().all(|&seen| seen));
            let sum: usize = strips.iter().map(|strip| strip.num_bytes).sum();
            assert_eq!(sum, bytes);
        }
    }
}
