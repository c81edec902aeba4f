//! Buffers, the memory plan and the operations of a transformer, forward and backward.
//!
//! - [`memory`]: the [`Plan`] lays out all memory of a run before step 0; [`Arena`] is
//!   its one allocation; [`Buf`] is a typed handle into it; [`Lease`] turns handles into
//!   slices and refuses overlapping writes.
//! - [`ops`]: the [`Backend`] trait, about 25 coarse operations with named arguments.
//! - [`kernels`]: the arithmetic, on slices, generic over [`Real`]: f32 follows the order
//!   of operations that every instruction set must reproduce, f64 is the accuracy oracle.
//! - [`cpu`]: instruction sets, the thread pool and blocked products.
//! - [`host`]: [`Host`], the backend of the machine's own processor.
//!
//! The only crate of the workspace with `unsafe`; each use carries its argument.

pub mod attention;
pub mod cache;
pub mod cpu;
pub mod host;
pub mod kernels;
pub mod layer_norm;
pub mod memory;
pub mod ops;
pub mod philox;
pub mod real;
pub mod topk;

pub use cache::{
    Among, CACHE_BLOCK, CacheBuf, CacheKind, CacheShape, CacheStore, CachedAttention,
    CachedSegment, ROOT,
};
pub use cpu::Isa;
pub use host::{Host, HostWorkspace, Limits};
pub use memory::{Arena, Buf, Category, Extent, Lease, Plan, PlanRow, Shared};
pub use ops::{
    ActBuf, AdamW, Attention, AttentionBackward, AttnBuf, Backend, CrossEntropy, Distillation,
    DraftBlocks, Dropout, LayerNorm, LayerNormBackward, NormRope, PACKED_ROWS, PackedBuf, Product,
    ProjectError, ProjectStats, Reader, RmsNorm, Segment, StoredBuf, TernaryBuf, WeightBuf,
    WeightData,
};
pub use real::Real;
