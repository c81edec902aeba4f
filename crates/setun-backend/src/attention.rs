//! Causal attention on its own: slices in, slices out, without a plan or a backend.
//!
//! It is the arithmetic of [`kernels::attention`](crate::kernels::attention) that
//! [`Host`](crate::Host) runs in numerics `f32`, on one thread and with a tile size of
//! the caller's choice. At f64 it is an accuracy oracle.
//!
//! # Layout
//! Queries, the output and their gradients are `[batch, seq, num_heads, head_dim]`, keys,
//! values and their gradients `[batch, seq, num_kv_heads, head_dim]`, row-major. Query
//! head `h` reads key head `h / (num_heads / num_kv_heads)`. Scores are scaled by
//! `1 / sqrt(head_dim)`. Query `i` sees the keys up to position `i`.
//!
//! # Memory
//! Scores exist for one tile at a time. [`forward`] allocates about
//! `7 tile head_dim + 4 tile^2` values, [`backward`] `2 tile head_dim` more and one
//! value per query row and head; neither depends on `seq^2`.
//!
//! # Backward
//! The probabilities are recomputed from the log of their sum: `p = exp(s - lse)`. The
//! gradient of a score is `p * (dp - delta)`, where `delta = rowsum(dout * out)`. This
//! row term is `sum of p * dp` over *all* keys of the row, so it is computed once from the
//! whole row of the output before any tile; a sum over the keys of one tile would be
//! wrong as soon as a row has two tiles.

use crate::cpu::{Isa, multiversion};
use crate::kernels::attention::{
    QueryGradients, Saved, Sight, View, forward_block, head_gradients, row_delta, scratch_len,
    sums_len,
};
use crate::ops::Segment;
use crate::real::Real;
use thiserror::Error;

/// Sizes of an attention. All are at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences, which do not see each other.
    pub batch: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys of a tile and queries of a block. It sets the memory and the speed; results
    /// change with it by rounding only.
    pub tile: usize,
}

/// Sizes that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AttentionError {
    /// A size is zero.
    #[error("attention: {field} is 0, but must be at least 1")]
    Zero {
        /// Field of [`AttentionShape`].
        field: &'static str,
    },
    /// Query heads cannot share the key heads evenly.
    #[error(
        "attention: num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}"
    )]
    Heads {
        /// Query heads.
        num_heads: usize,
        /// Key and value heads.
        num_kv_heads: usize,
    },
    /// The sizes are too large to be multiplied.
    #[error("attention: {0:?} has more values than this machine can address")]
    TooLarge(AttentionShape),
    /// A slice has the wrong length.
    #[error("attention: {name} has {len} values, but {layout} needs {expected}")]
    Length {
        /// Name of the argument.
        name: &'static str,
        /// Its length.
        len: usize,
        /// Its dimensions.
        layout: &'static str,
        /// Their product.
        expected: usize,
    },
}

/// Attention forward: writes `out` and `lse`, the log of each row's sum of exponentials,
/// `[batch, seq, num_heads]`.
///
/// `first_key` `[batch, seq]` gives the first position that each query sees in its own
/// sequence; keys below it are masked. A query that sees nothing gets zeros and an `lse`
/// of negative infinity.
///
/// # Errors
/// [`AttentionError`] when the shape is impossible or a slice does not have its length;
/// nothing is written then.
pub fn forward<R: Real>(
    shape: AttentionShape,
    q: &[R],
    k: &[R],
    v: &[R],
    first_key: Option<&[u32]>,
    out: &mut [R],
    lse: &mut [R],
) -> Result<(), AttentionError> {
    let sizes = shape.sizes()?;
    sizes.check_inputs((q, k, v), first_key)?;
    sizes.query("out", out)?;
    sizes.row_heads("lse", lse)?;
    let view = shape.view((q, k, v), first_key);
    let isa = Isa::detect();
    let (heads, width) = (shape.num_heads, shape.head_dim);
    let mut scratch = vec![R::ZERO; scratch_len(width, view.tile)];
    for segment in shape.segments() {
        for (head, rows) in blocks(heads, shape.seq, view.tile) {
            let mut put = |row: usize, values: &[R], log_sum: R| {
                let at = (segment.q_start + row) * heads + head;
                out[at * width..(at + 1) * width].copy_from_slice(values);
                lse[at] = log_sum;
            };
            forward_rows(isa, view, segment, head, rows, &mut put, &mut scratch);
        }
    }
    Ok(())
}

/// Attention backward: writes the gradients `dq`, `dk` and `dv` of `sum(dout * out)`, with
/// `out` and `lse` as [`forward`] left them.
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // The operands of the operation, each of them a slice.
pub fn backward<R: Real>(
    shape: AttentionShape,
    q: &[R],
    k: &[R],
    v: &[R],
    first_key: Option<&[u32]>,
    out: &[R],
    lse: &[R],
    dout: &[R],
    dq: &mut [R],
    dk: &mut [R],
    dv: &mut [R],
) -> Result<(), AttentionError> {
    let sizes = shape.sizes()?;
    sizes.check_inputs((q, k, v), first_key)?;
    sizes.query("out", out)?;
    sizes.row_heads("lse", lse)?;
    sizes.query("dout", dout)?;
    sizes.query("dq", dq)?;
    sizes.key("dk", dk)?;
    sizes.key("dv", dv)?;
    let rows = dout.chunks(shape.head_dim).zip(out.chunks(shape.head_dim));
    let delta: Vec<R> = rows.map(|(dout, out)| row_delta(dout, out)).collect();
    let delta = &delta;
    let saved = Saved { lse, dout, delta };
    let view = shape.view((q, k, v), first_key);
    let mut scratch = vec![R::ZERO; scratch_len(shape.head_dim, view.tile)];
    let mut sums = vec![R::ZERO; sums_len(shape.head_dim, view.tile)];
    let (isa, heads, width) = (Isa::detect(), shape.num_kv_heads, shape.head_dim);
    for segment in shape.segments() {
        let mut dq = OfSegment {
            dq: &mut *dq,
            segment,
            heads: shape.num_heads,
            width,
        };
        for head in 0..heads {
            let mut put = |position: usize, key: &[R], value: &[R]| {
                let at = ((segment.kv_start + position) * heads + head) * width;
                dk[at..at + width].copy_from_slice(key);
                dv[at..at + width].copy_from_slice(value);
            };
            let (dq, scratch, sums) = (&mut dq, &mut scratch, &mut sums);
            head_rows(isa, view, saved, segment, head, dq, &mut put, scratch, sums);
        }
    }
    Ok(())
}

/// Gradients of a segment's queries in `[rows, num_heads, head_dim]`.
struct OfSegment<'a, R> {
    dq: &'a mut [R],
    segment: Segment,
    heads: usize,
    width: usize,
}

impl<R> QueryGradients<R> for OfSegment<'_, R> {
    fn of(&mut self, row: usize, head: usize) -> &mut [R] {
        let at = ((self.segment.q_start + row) * self.heads + head) * self.width;
        &mut self.dq[at..at + self.width]
    }
}

/// Every head with every run of at most `tile` positions.
fn blocks(heads: usize, seq: usize, tile: usize) -> impl Iterator<Item = (usize, (usize, usize))> {
    let runs = move |head| (0..seq).step_by(tile).map(move |i| (head, i));
    let all = (0..heads).flat_map(runs);
    all.map(move |(head, i)| (head, (i, seq.min(i + tile))))
}

impl AttentionShape {
    fn view<'a, R>(
        &self,
        (q, k, v): (&'a [R], &'a [R], &'a [R]),
        first_key: Option<&'a [u32]>,
    ) -> View<'a, R> {
        View {
            q,
            k,
            v,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            // A tile beyond the sequence would be all padding.
            tile: self.tile.min(self.seq),
            isa: Isa::detect(),
            sight: first_key.map_or(Sight::Causal, Sight::From),
        }
    }

    fn segments(&self) -> impl Iterator<Item = Segment> {
        let seq = self.seq;
        (0..self.batch).map(move |b| Segment::own(b * seq, seq))
    }

    fn sizes(&self) -> Result<Sizes, AttentionError> {
        let fields = [
            ("batch", self.batch),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("seq", self.seq),
            ("head_dim", self.head_dim),
            ("tile", self.tile),
        ];
        for (field, size) in fields {
            if size == 0 {
                return Err(AttentionError::Zero { field });
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(AttentionError::Heads {
                num_heads: self.num_heads,
                num_kv_heads: self.num_kv_heads,
            });
        }
        let product = || {
            let rows = self.batch.checked_mul(self.seq)?;
            let row_heads = rows.checked_mul(self.num_heads)?;
            Some(Sizes {
                rows,
                row_heads,
                query: row_heads.checked_mul(self.head_dim)?,
                // Not larger than the queries, since num_kv_heads divides num_heads.
                key: rows * self.num_kv_heads * self.head_dim,
            })
        };
        product().ok_or(AttentionError::TooLarge(*self))
    }
}

/// Lengths of the operands.
struct Sizes {
    rows: usize,
    row_heads: usize,
    query: usize,
    key: usize,
}

impl Sizes {
    fn check_inputs<R>(
        &self,
        (q, k, v): (&[R], &[R], &[R]),
        first_key: Option<&[u32]>,
    ) -> Result<(), AttentionError> {
        self.query("q", q)?;
        self.key("k", k)?;
        self.key("v", v)?;
        first_key.map_or(Ok(()), |first| {
            check("first_key", first, "[batch, seq]", self.rows)
        })
    }

    fn query<R>(&self, name: &'static str, x: &[R]) -> Result<(), AttentionError> {
        check(name, x, "[batch, seq, num_heads, head_dim]", self.query)
    }

    fn key<R>(&self, name: &'static str, x: &[R]) -> Result<(), AttentionError> {
        check(name, x, "[batch, seq, num_kv_heads, head_dim]", self.key)
    }

    fn row_heads<R>(&self, name: &'static str, x: &[R]) -> Result<(), AttentionError> {
        check(name, x, "[batch, seq, num_heads]", self.row_heads)
    }
}

fn check<T>(
    name: &'static str,
    x: &[T],
    layout: &'static str,
    expected: usize,
) -> Result<(), AttentionError> {
    let len = x.len();
    if len == expected {
        return Ok(());
    }
    Err(AttentionError::Length {
        name,
        len,
        layout,
        expected,
    })
}

multiversion! {
    /// [`forward_block`]
    fn forward_rows[R: Real][R](
        view: View<'_, R>,
        segment: Segment,
        head: usize,
        rows: (usize, usize),
        put: &mut dyn FnMut(usize, &[R], R),
        scratch: &mut [R],
    ) = forward_block;
}
/// Takes a position and its `dk` and `dv`.
type PutKeyGradients<'a, R> = dyn FnMut(usize, &[R], &[R]) + 'a;

multiversion! {
    /// [`head_gradients`]
    fn head_rows[R: Real][R](
        view: View<'_, R>,
        saved: Saved<'_, R>,
        segment: Segment,
        key_head: usize,
        dq: &mut dyn QueryGradients<R>,
        put: &mut PutKeyGradients<'_, R>,
        scratch: &mut [R],
        sums: &mut [R],
    ) = head_gradients;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape {
        batch: 1,
        num_heads: 4,
        num_kv_heads: 2,
        seq: 3,
        head_dim: 2,
        tile: 2,
    };

    fn run(shape: AttentionShape, lens: [usize; 5]) -> Result<(), AttentionError> {
        let [q, k, v, out, lse] = lens.map(|n| vec![0.5f32; n]);
        let (mut out, mut lse) = (out, lse);
        forward(shape, &q, &k, &v, None, &mut out, &mut lse)
    }

    #[test]
    fn a_slice_of_the_wrong_length_is_named() {
        let good = [24, 12, 12, 24, 12];
        assert_eq!(run(SHAPE, good), Ok(()));
        for (i, name) in ["q", "k", "v", "out", "lse"].into_iter().enumerate() {
            let mut lens = good;
            lens[i] += 1;
            let message = run(SHAPE, lens).unwrap_err().to_string();
            let start = format!("attention: {name} has {} values, but [batch", good[i] + 1);
            assert!(message.starts_with(&start), "{message}");
        }
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let zero = AttentionShape { tile: 0, ..SHAPE };
        let error = run(zero, [0; 5]).unwrap_err();
        assert_eq!(error, AttentionError::Zero { field: "tile" });
        let uneven = AttentionShape {
            num_kv_heads: 3,
            ..SHAPE
        };
        let error = run(uneven, [0; 5]).unwrap_err();
        assert!(matches!(error, AttentionError::Heads { .. }));
        let huge = AttentionShape {
            seq: usize::MAX / 2,
            ..SHAPE
        };
        assert_eq!(run(huge, [0; 5]), Err(AttentionError::TooLarge(huge)));
    }

    #[test]
    fn equal_keys_give_the_mean_of_the_values_seen() {
        let shape = AttentionShape {
            num_heads: 1,
            num_kv_heads: 1,
            ..SHAPE
        };
        let v = [1.0, 10.0, 3.0, 30.0, 8.0, 80.0];
        let (mut out, mut lse) = ([0.0f64; 6], [0.0; 3]);
        forward(shape, &v, &[0.0; 6], &v, None, &mut out, &mut lse).unwrap();
        for (got, expected) in out.iter().zip([1.0, 10.0, 2.0, 20.0, 4.0, 40.0]) {
            assert!((got - expected).abs() < 1e-12, "{got} {expected}");
        }
        for (row, lse) in lse.iter().enumerate() {
            assert!((lse - ((row + 1) as f64).ln()).abs() < 1e-12);
        }
    }
}
