//! The canonical hash of a ternary model: equal in every format that holds it.

use half::f16;
use setun_ternary::{PackedMatrix, pack_row, packed_row_bytes};

/// Hashes all ternary matrices of a model, added in the order of
/// [`Qwen3Config::parameters`](setun_formats::config::Qwen3Config::parameters).
///
/// BLAKE3 over, for each matrix: the length of the name, rows, columns and group size
/// (u64, little-endian), the name, the packed trits, and the scales (f16, little-endian).
/// The lengths make the encoding unambiguous. The scale of a group without trits other than 0
/// counts as 0: formats of values do not hold it.
#[derive(Clone, Debug, Default)]
pub struct TernaryHasher {
    hasher: blake3::Hasher,
}

impl TernaryHasher {
    /// A hash over nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the matrix called `name` (the Hugging Face parameter name).
    pub fn add(&mut self, name: &str, m: &PackedMatrix) {
        self.begin(name, m.rows, m.cols, m.group_size);
        self.trits(&m.trits);
        self.scales(&canonical_scales(m));
    }

    /// Begins a matrix that is added in parts: all its trits, then all its scales.
    pub(crate) fn begin(&mut self, name: &str, rows: usize, cols: usize, group_size: usize) {
        for number in [name.len(), rows, cols, group_size] {
            self.hasher.update(&(number as u64).to_le_bytes());
        }
        self.hasher.update(name.as_bytes());
    }

    /// Adds the packed trits of the next rows.
    pub(crate) fn trits(&mut self, trits: &[u8]) {
        self.hasher.update(trits);
    }

    /// Adds the [`canonical_scales`] of the next rows.
    pub(crate) fn scales(&mut self, scales: &[f16]) {
        for scales in scales.chunks(4096) {
            let bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            self.hasher.update(&bytes);
        }
    }

    /// The hash, 64 hexadecimal digits.
    pub fn finish(self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

/// The scales of `m`, 0 for groups of zeros.
pub(crate) fn canonical_scales(m: &PackedMatrix) -> Vec<f16> {
    let mut zeros = vec![0; packed_row_bytes(m.cols, m.group_size)];
    pack_row(&vec![0; m.cols], m.group_size, &mut zeros);
    let groups = m.trits.chunks(m.group_size.div_ceil(4));
    let zeros = zeros.chunks(m.group_size.div_ceil(4)).cycle();
    let scales = m.scales.iter().zip(groups.zip(zeros));
    scales
        .map(|(&scale, (group, zeros))| if group == zeros { f16::ZERO } else { scale })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_ternary::ScaleRule;

    fn matrix(cols: usize) -> PackedMatrix {
        let latents: Vec<f32> = (0..3 * cols).map(|i| (i % 7) as f32 - 3.0).collect();
        PackedMatrix::from_latents(&latents, cols, 4, ScaleRule::Mean).expect("finite latents")
    }

    fn hash(parts: &[(&str, &PackedMatrix)]) -> String {
        let mut hasher = TernaryHasher::new();
        for (name, m) in parts {
            hasher.add(name, m);
        }
        hasher.finish()
    }

    #[test]
    fn the_scale_of_zeros_does_not_count() {
        for cols in [5, 8, 11] {
            let latents: Vec<f32> = (0..2 * cols).map(|i| (i / 4 % 2) as f32).collect();
            let m = PackedMatrix::from_latents(&latents, cols, 4, ScaleRule::Mean).unwrap();
            let zeros: Vec<usize> = (0..m.scales.len())
                .filter(|&i| m.scales[i] == f16::ZERO)
                .collect();
            assert!(!zeros.is_empty() && zeros.len() < m.scales.len());
            let mut other = m.clone();
            zeros.iter().for_each(|&i| other.scales[i] = f16::ONE);
            assert_eq!(hash(&[("a", &m)]), hash(&[("a", &other)]));
        }
    }

    #[test]
    fn every_part_counts() {
        let m = matrix(8);
        let reference = hash(&[("a", &m)]);
        assert_eq!(reference.len(), 64);
        assert_eq!(reference, hash(&[("a", &m.clone())]));
        let mut trit = m.clone();
        trit.trits[0] ^= 1;
        let mut scale = m.clone();
        scale.scales.swap(0, 1);
        assert_ne!(scale.scales, m.scales);
        let mut shape = m.clone();
        (shape.rows, shape.cols) = (shape.cols, shape.rows);
        for other in [
            hash(&[("b", &m)]),
            hash(&[("a", &trit)]),
            hash(&[("a", &scale)]),
            hash(&[("a", &shape)]),
            hash(&[("a", &m), ("a", &m)]),
            hash(&[]),
        ] {
            assert_ne!(reference, other);
        }
    }
}
