//! The backend of the machine's own processor: kernels over the threads of a [`Pool`].

mod attention;
mod cache;
mod layer_norm;
mod products;
mod projection;
mod scratch;
mod transformer;

use crate::cpu::{Isa, Pool, RowParts, RowsMut, gemm, int8, multiversion, packed};
use crate::kernels::attention::{scratch_len, sums_len};
use crate::kernels::rounding::ActRows;
use crate::kernels::{elementwise, loss, norm, optimizer, rounding};
use crate::memory::{Arena, Buf, Category, Plan};
use crate::ops::ActBuf;
use crate::real::Real;
use half::bf16;
use std::ops::Range;

/// Keys of an attention tile (ARCHITECTURE.md, Numbers).
pub const TILE: usize = 64;

/// Rows that a task of a row-wise operation takes.
const GRAIN: usize = 16;

/// [`GRAIN`], or fewer where there are few rows to share, but what is worth a thread's while.
fn grain(pool: &Pool, rows: usize, width: usize) -> usize {
    const WORTH_A_THREAD: usize = 2048;
    let shared = rows / (2 * pool.threads());
    shared.max(WORTH_A_THREAD / width).clamp(1, GRAIN)
}

/// The largest shapes that the scratch memory of a [`Host`] must serve.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Widest row of activations, `heads * head_dim` included.
    pub width: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Smallest group of a ternary matrix.
    pub group_size: usize,
}

impl Limits {
    /// What serves both.
    pub fn and(self, other: Self) -> Self {
        Self {
            width: self.width.max(other.width),
            head_dim: self.head_dim.max(other.head_dim),
            group_size: self.group_size.min(other.group_size),
        }
    }
}

/// Scratch memory of a [`Host`], part of the plan.
#[derive(Clone, Copy, Debug)]
pub struct HostWorkspace<R> {
    threads: usize,
    real_len: usize,
    real: Buf<R>,
    int8: Buf<u8>,
}

impl<R: Real> HostWorkspace<R> {
    /// Reserves the scratch memory of `threads` threads.
    pub fn reserve(plan: &mut Plan, threads: usize, limits: Limits) -> Self {
        let threads = threads.max(1);
        let sums = sums_len(limits.head_dim, TILE);
        let attention = scratch_len(limits.head_dim, TILE) + sums;
        let real_len = gemm::SCRATCH.max(attention).max(2 * limits.width);
        let int8_len = int8::scratch_len(limits.width, limits.group_size)
            .max(packed::scratch_len(limits.width, limits.group_size));
        let workspace = Category::Workspace;
        Self {
            threads,
            real_len,
            real: plan.alloc(workspace, "scratch of the threads", threads * real_len),
            int8: plan.alloc(workspace, "int8 panels of the threads", threads * int8_len),
        }
    }
}

/// The processor of this machine. [`Isa::Reference`] with one thread is the definition,
/// at f64 the accuracy oracle; every other choice gives the same bits.
pub struct Host<R: Real> {
    arena: Arena,
    pool: Pool,
    isa: Isa,
    workspace: HostWorkspace<R>,
}

impl<R: Real> Host<R> {
    /// Allocates `plan`, in which `workspace` was reserved.
    pub fn new(plan: &Plan, workspace: HostWorkspace<R>, isa: Isa) -> Self {
        Self {
            arena: Arena::new(plan),
            pool: Pool::new(workspace.threads),
            isa,
            workspace,
        }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// [`ActRows`] that tasks can split by rows.
enum ActParts<'a, R> {
    Real(RowsMut<'a, R>),
    Bf16(RowsMut<'a, bf16>),
    Int8 {
        q: RowsMut<'a, i8>,
        scales: RowsMut<'a, f32>,
        group_size: usize,
    },
}

impl<'a, R: Real> ActParts<'a, R> {
    fn lease(lease: &mut crate::memory::Lease<'a>, act: ActBuf<R>, width: usize) -> Self {
        match act {
            ActBuf::Real(x) => Self::Real(RowsMut::new(lease.write(x), width)),
            ActBuf::Bf16(x) => Self::Bf16(RowsMut::new(lease.write(x), width)),
            ActBuf::Int8 {
                q,
                scales,
                group_size,
            } => Self::Int8 {
                q: RowsMut::new(lease.write(q), width),
                scales: RowsMut::new(lease.write(scales), width.div_ceil(group_size)),
                group_size,
            },
        }
    }
}

// SAFETY: each variant's members keep their own rows disjoint.
unsafe impl<'a, R: Real> RowParts for ActParts<'a, R> {
    type Part = ActRows<'a, R>;

    unsafe fn part(&self, rows: Range<usize>) -> ActRows<'a, R> {
        // SAFETY: the caller's promise holds for each member.
        unsafe {
            match self {
                Self::Real(x) => ActRows::Real(x.part(rows)),
                Self::Bf16(x) => ActRows::Bf16(x.part(rows)),
                Self::Int8 {
                    q,
                    scales,
                    group_size,
                } => ActRows::Int8 {
                    q: q.part(rows.clone()),
                    scales: scales.part(rows),
                    group_size: *group_size,
                },
            }
        }
    }
}

/// Rows `rows` of a buffer whose rows have `width` values.
fn rows_of<'a, T>(x: &'a [T], rows: &Range<usize>, width: usize) -> &'a [T] {
    &x[rows.start * width..rows.end * width]
}

multiversion! {
    /// [`norm::rms_norm`]
    fn rms_norm_rows[R: Real][R](
        x: &[R],
        weight: &[R],
        eps: f64,
        inv: &mut [R],
        y: &mut ActRows<'_, R>,
        scratch: &mut [R],
    ) = norm::rms_norm;
}
multiversion! {
    /// [`norm::rms_norm_backward`]
    fn rms_norm_backward_rows[R: Real][R](x: &[R], weight: &[R], inv: &[R], dy: &[R], dx: &mut [R])
        = norm::rms_norm_backward;
}
multiversion! {
    /// [`norm::rms_norm_dweight`]
    fn rms_norm_dweight_columns[R: Real][R](
        x: &[R],
        inv: &[R],
        dy: &[R],
        width: usize,
        start: usize,
        dweight: &mut [R],
    ) = norm::rms_norm_dweight;
}
multiversion! {
    /// [`norm::rms_norm_backward_in_place`]
    fn rms_norm_backward_in_place_rows[R: Real][R](x: &[R], weight: &[R], inv: &[R], dy: &mut [R])
        = norm::rms_norm_backward_in_place;
}
multiversion! {
    /// [`elementwise::dequantize_row`]
    fn dequantize_row[R: Real][R](trits: &[i8], scales: &[f32], group_size: usize, y: &mut [R])
        = elementwise::dequantize_row;
}
multiversion! {
    /// [`elementwise::blend_row`]
    fn blend_row[R: Real][R](
        latent: &[R],
        trits: &[i8],
        scales: &[f32],
        group_size: usize,
        share: R,
        y: &mut [R],
    ) = elementwise::blend_row;
}
multiversion! {
    /// [`elementwise::swiglu`]
    fn swiglu_rows[R: Real][R](
        gate: &[R],
        up: &[R],
        y: &mut ActRows<'_, R>,
        scratch: &mut [R],
    ) = elementwise::swiglu;
}
multiversion! {
    /// [`elementwise::swiglu_backward`]
    fn swiglu_backward_run[R: Real][R](dy: &[R], gate: &mut [R], up: &mut [R])
        = elementwise::swiglu_backward;
}
multiversion! {
    /// [`elementwise::add`]
    fn add_run[R: Real][R](x: &[R], y: &mut [R]) = elementwise::add;
}
multiversion! {
    /// [`elementwise::lerp`]
    fn lerp_run[R: Real][R](x: &[R], share: R, y: &mut [R]) = elementwise::lerp;
}
multiversion! {
    /// [`elementwise::dropout`]
    fn dropout_run[R: Real][R](chances: elementwise::Chances<R>, first: u32, x: &mut [R])
        = elementwise::dropout;
}
multiversion! {
    /// [`elementwise::embedding_backward`]
    fn embedding_backward_rows[R: Real][R](
        ids: &[u32],
        dy: &[R],
        width: usize,
        start: usize,
        dweight: &mut [R],
    ) = elementwise::embedding_backward;
}
multiversion! {
    /// [`loss::cross_entropy_row`]
    fn cross_entropy_row[R: Real][R](
        logits: &mut [R],
        target: usize,
        gradient: Option<loss::RowGradient<R>>
    ) -> R
        = loss::cross_entropy_row;
}
multiversion! {
    /// [`loss::capped_cross_entropy_row`]
    fn capped_cross_entropy_row[R: Real][R](
        logits: &mut [R],
        target: usize,
        gradient: Option<loss::RowGradient<R>>,
        softcap: R,
    ) -> R = loss::capped_cross_entropy_row;
}
multiversion! {
    /// [`loss::distill_row`]
    fn distill_row[R: Real][R](
        logits: &mut [R],
        teacher: &mut [R],
        target: usize,
        mix: loss::Mix<R>,
        scale: Option<R>,
    ) -> (R, R) = loss::distill_row;
}
multiversion! {
    /// [`optimizer::sum_squares`]
    fn sum_squares_chunk[R: Real][R](x: &[R]) -> f64 = optimizer::sum_squares;
}
multiversion! {
    /// [`optimizer::adamw`]
    fn adamw_run[R: Real][R](
        s: optimizer::AdamWScalars<R>,
        w: &mut [R],
        g: &[R],
        m: &mut [R],
        v: &mut [R],
    ) = optimizer::adamw;
}
multiversion! {
    /// [`optimizer::adamw_bf16`]
    fn adamw_bf16_run[R: Real][R](
        s: optimizer::AdamWScalars<R>,
        first: usize,
        w: &mut [R],
        g: &[R],
        m: &mut [bf16],
        v: &mut [bf16],
    ) = optimizer::adamw_bf16;
}
multiversion! {
    /// Rounds rows of activations.
    fn round_rows[R: Real][R](x: &[R], width: usize, y: &mut ActRows<'_, R>) = round_rows_kernel;
}
multiversion! {
    /// [`rounding::round_bf16`]
    fn round_bf16_run[R: Real][R](x: &[R], y: &mut [bf16]) = rounding::round_bf16;
}

#[inline(always)]
fn round_rows_kernel<R: Real>(x: &[R], width: usize, y: &mut ActRows<'_, R>) {
    for (row, x) in x.chunks(width).enumerate() {
        y.write_row(row, x);
    }
}
