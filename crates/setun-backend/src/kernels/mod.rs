//! The arithmetic, on slices, generic over [`Real`](crate::Real).
//!
//! Each function works on a run of rows, so a caller may split the rows over threads;
//! nothing in here knows about threads, buffers or instruction sets. The functions are
//! `inline(always)`: `cpu::isa` compiles each once per instruction set, and the
//! semantics of Rust's floating point make all copies equal to the bit.

pub mod attention;
pub mod cache;
pub mod elementwise;
pub mod layer_norm;
pub mod loss;
pub mod norm;
pub mod optimizer;
pub mod product;
pub mod project;
pub mod rounding;
pub mod topk;
